"""eval --compare: artifacts of one model in a table, the nearest to the original first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import output
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.cli.reference import TransformersReference
    from llmc.compiler.progress import Progress
    from llmc.runtime.perplexity import Ids, Quality
    from llmc.runtime.runtime import Runtime

WRITTEN_WINDOWS = 4  # of a text that the reference writes


@dataclass(frozen=True)
class Ranked:
    """An artifact and what was measured of it. bits_per_weight: of all parameters; file_bytes: the whole file."""

    artifact: str
    bits_per_weight: float
    file_bytes: int
    quality: Quality


def cut_text(
    runtimes: Sequence[Runtime],
    content: str | None,
    reference: TransformersReference | None,
    size: int,
    count: int | None,
    progress: Progress,
) -> list[Ids]:
    """Windows of a text, or without one texts that the reference writes. LlmcError where there is none of either."""
    from llmc.runtime.perplexity import windows_of

    if content is not None:
        return windows_of(runtimes[0], content, size, count)
    assert reference is not None
    text = runtimes[0].manifest.text
    if text is None or text.bos_id is None:
        raise LlmcError("the model has no token that texts begin with, so that none can be written: give --text FILE")
    longest = min(runtime.max_context for runtime in runtimes)
    if not 2 <= size <= longest:
        raise LlmcError(f"--window is 2 to {longest} here, the context, not {size}")
    progress.start("the reference writes a text")
    return reference.write(text.bos_id, count or WRITTEN_WINDOWS, size)


def ranked(artifacts: Sequence[Path], runtimes: Sequence[Runtime], found: Sequence[Quality]) -> list[Ranked]:
    """By divergence from the reference, where there is one, else by perplexity; the best first."""
    rows = [
        Ranked(str(path), runtime.manifest.model.bits_per_weight, path.stat().st_size, quality)
        for path, runtime, quality in zip(artifacts, runtimes, found, strict=True)
    ]
    return sorted(rows, key=lambda row: (row.quality.mean_kl_divergence or 0.0, row.quality.perplexity))


def print_ranking(rows: Sequence[Ranked], text: str | None, json: bool) -> None:
    """One table, or one JSON object. text: the file that was read; None: the reference wrote it."""
    if json:
        artifacts = [
            {"artifact": row.artifact, "bits_per_weight": row.bits_per_weight, "file_bytes": row.file_bytes}
            | asdict(row.quality)
            for row in rows
        ]
        output.print_json({"text": text, "artifacts": artifacts})
        return
    first = rows[0].quality
    against = first.reference_perplexity
    header = ["artifact", "bits each", "file", "perplexity"]
    header += ["against the reference", "mean KL, nats", "same likeliest token"] if against is not None else []
    table: list[list[object]] = []
    for row in rows:
        quality = row.quality
        cells = [row.artifact, f"{row.bits_per_weight:.2f}", output.size(row.file_bytes), f"{quality.perplexity:.4f}"]
        if against is not None:
            change = 100 * (quality.perplexity / against - 1)
            cells += [f"{change:+.2f}%", f"{quality.mean_kl_divergence:.6f}"]
            cells += [f"{100 * (quality.top1_agreement or 0):.2f}%"]
        table.append(list(cells))
    output.table(table, header)
    source = "a text that the reference wrote" if text is None else text
    beside = "" if against is None else f"; the reference's perplexity is {against:.4f}"
    print(f"{first.tokens} tokens of {source}, in {first.windows} windows of {first.window}{beside}")
