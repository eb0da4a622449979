"""inspect --accuracy: what an artifact says of how far it is from its original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import output
from llmc.errors import ArtifactError

if TYPE_CHECKING:
    from llmc.runtime.accuracy import Accuracy, TensorAccuracy
    from llmc.runtime.manifest import Manifest

WORST = 20  # tensors that are listed


def show_accuracy(path: Path, manifest: Manifest, picture: Path | None, json: bool) -> None:
    """Prints it, the worst tensors first, and draws it where `picture` is given. ArtifactError where nothing was
    measured."""
    told = manifest.accuracy
    if told is None:
        raise ArtifactError(f"{path} does not tell its accuracy: compile it again with --accuracy")
    if picture is not None:
        from llmc.cli.accuracy_picture import draw_accuracy

        draw_accuracy(told, picture, _title(manifest))
    if json:
        facts = {"path": str(path), "parameters": manifest.model.parameters}
        output.print_json({**facts, "bits_per_weight": manifest.model.bits_per_weight, **asdict(told)})
        return
    output.facts(
        {
            "model": f"{manifest.model.name} ({manifest.model.parameters:,} parameters, "
            f"{manifest.model.bits_per_weight:.2f} bits each)",
            **summary(told),
        }
    )
    if not told.tensors:
        return
    print()
    output.table(
        _totals(told.tensors), ("encoding", "matrices", "numbers", "bits each", "weight error", "output error")
    )
    worst = sorted(told.tensors, key=badness, reverse=True)
    print()
    rows = [(each.name, each.encoding, *errors([each])) for each in worst[:WORST]]
    output.table(rows, ("the worst", "encoding", "weight error", "output error"))
    if len(worst) > WORST:
        print(f"and {len(worst) - WORST} more, which --json lists")


def summary(told: Accuracy) -> dict[str, str]:
    """The figures of the whole model, for people."""
    if told.text is not None:
        text = told.text
        return {
            "beside the original": f"KL {text.mean_kl_divergence:.2g} nats, the same likeliest token "
            f"{100 * text.top1_agreement:.1f}%",
            "measured on": f"{output.count(text.tokens, 'token')} that "
            + ("it wrote itself" if text.source == "written" else "were drawn from the original's predictions")
            + _through(text.through),
        }
    if told.vectors is not None:
        vectors = told.vectors
        return {
            "beside the original": f"cosine {vectors.mean_cosine:.4f} on average, {vectors.least_cosine:.4f} at least, "
            f"of {vectors.output}",
            "measured on": f"{output.count(vectors.texts, 'text')} of random ids, {vectors.tokens} in all"
            + _through(vectors.through),
        }
    return {}


def _through(through: str) -> str:
    return "" if through == "artifact" else ", through its graph in numpy"


def summary_of(manifest: Mapping[str, object]) -> str:
    """A line about a manifest's accuracy; empty where it tells none of the whole model."""
    from llmc.runtime.accuracy import parse_accuracy
    from llmc.runtime.json_reader import Reader

    if manifest.get("accuracy") is None:
        return ""
    found = summary(parse_accuracy(Reader(manifest["accuracy"], "accuracy")))
    return f"beside the original: {found['beside the original']} ({found['measured on']})" if found else ""


def badness(tensor: TensorAccuracy) -> float:
    """What tensors are ordered by: the outputs' error, or the weights' where nothing multiplies by them."""
    return tensor.weight_error if tensor.output_error is None else tensor.output_error


def errors(tensors: Sequence[TensorAccuracy]) -> tuple[str, str]:
    """Relative squared errors of weights and outputs, as parts; means over all numbers."""
    weights = _mean((each.weight_error, each.numbers) for each in tensors)
    outputs = _mean((each.output_error, each.numbers) for each in tensors if each.output_error is not None)
    return f"{weights:.2e}" if weights is not None else "", f"{outputs:.2e}" if outputs is not None else ""


def _mean(parts: Iterable[tuple[float, int]]) -> float | None:
    pairs = list(parts)
    total = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs) / total if total else None


def _totals(tensors: Sequence[TensorAccuracy]) -> list[tuple[object, ...]]:
    """A row for each encoding, and one for all."""
    groups: dict[str, list[TensorAccuracy]] = {}
    for each in tensors:
        groups.setdefault(each.encoding, []).append(each)
    if len(groups) > 1:
        groups["all"] = list(tensors)
    rows: list[tuple[object, ...]] = []
    for name, group in groups.items():
        numbers = sum(each.numbers for each in group)
        bits = sum(each.bits * each.numbers for each in group) / max(1, numbers)
        rows.append((name, len(group), f"{numbers:,}", f"{bits:.2f}", *errors(group)))
    return rows


def _title(manifest: Manifest) -> str:
    told = manifest.accuracy
    assert told is not None
    facts = summary(told).get("beside the original", "")
    title = f"{manifest.model.name}, {manifest.model.bits_per_weight:.2f} bits per weight"
    return f"{title}: {facts}" if facts else title
