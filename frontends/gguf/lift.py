"""A GGUF file to a graph, its weights and what else an artifact needs: as transformers' model of its architecture."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from llmc.errors import FrontendError
from llmc.frontends.gguf.description import Description, Plan, architectures
from llmc.frontends.gguf.pooled import plan_pooled
from llmc.frontends.gguf.reader import GgufFile
from llmc.frontends.gguf.settings import Settings
from llmc.frontends.gguf.source import model_name, open_files
from llmc.frontends.gguf.text import read_text
from llmc.frontends.gguf.weights import GgufWeights, Tensors
from llmc.frontends.hf.classes import choose_class
from llmc.frontends.hf.config import check_config, config_of
from llmc.frontends.hf.lift import Opened, check_options, lift_opened
from llmc.frontends.lifted import Lifted, Text

_NAMED = re.compile(r"[A-Za-z0-9][\w. -]{0,80}")
# Keys outside of general., tokenizer. and the architecture's own: who split, quantized or measured the file.
_HARMLESS = ("general.", "tokenizer.", "split.", "quantize.", "imatrix.", "training.", "GGUF.")
# SentencePiece vocabularies whose scores are no order of merges.
_BY_ORDER = ("gemma", "gemma2", "gemma3", "gemma-embedding", "gemma3n")
_MOST_LAYERS, _MOST_DRAFTS = 512, 16
_UNREAD = ": they may change what the model computes, so it is refused; is the file newer than this version of llmc?"


def lift(path: str | Path, *, max_context: int | None = None, weights: str = "checkpoint", seed: int = 0) -> Lifted:
    """Read a model's file, or all parts of one that was split. No weight is loaded.

    max_context: tokens a sequence may have (default: the model's own limit). weights: "checkpoint", or "random" for
    noise from `seed`.
    """
    check_options(max_context, weights)
    return lift_opened(open_model(Path(path), weights), max_context, seed)


def open_model(path: Path, weights: str = "checkpoint") -> Opened:
    """A model's file, read as far as building the model needs: everything in it is used, harmless, or refused."""
    files = open_files(path)
    metadata = files[0].metadata
    tensors = Tensors(files)
    model = _describe(files[0], tensors)
    plan = _plan(model)
    _check_all_used(model, plan)
    where = files[0].path
    check_config(plan.config, where)
    config = config_of(plan.config, where)
    kind = choose_class(config, where, base_only=plan.pooling is not None)
    source = GgufWeights(tensors, plan.weights)
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)

    def text() -> Text:
        return read_text(where, metadata, vocabulary, model.name in _BY_ORDER)

    return Opened(
        config,
        kind,
        source if weights == "checkpoint" else None,
        _name(where, metadata.get("general.name")),
        text,
        None if plan.pooling is None else plan_pooled(kind, config, text(), plan.pooling, where),
        notes=(*plan.notes, *_drafts(model), *_foreign_keys(model), _formats(tensors), *_rounded_anew(source, tensors)),
        least=source.least(),
    )


def _describe(file: GgufFile, tensors: Tensors) -> Description:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FrontendError(f"{file.path} has no general.architecture: it does not say what model it is")
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        what = {"adapter": "an adapter: merge it into its model", "mmproj": "the vision or sound part of a model"}
        raise FrontendError(f"{file.path} is {what.get(str(kind), f'a {kind!s:.40}')}, not a model of text")
    return Description(file.path, name, Settings(file.path, file.metadata, name), tensors)


def _plan(model: Description) -> Plan:
    known = architectures()
    if model.name not in known:
        names = ", ".join(sorted(known))
        raise FrontendError(f"{model.path}: architecture {model.name!r:.60} is not supported; those that are: {names}")
    if not 0 <= model.drafts <= _MOST_DRAFTS:
        raise model.settings.error("nextn_predict_layers", f"is {model.drafts}, outside 0..{_MOST_DRAFTS}")
    if not 1 <= model.layers <= _MOST_LAYERS:
        outside = f"outside {1 + model.drafts}..{_MOST_LAYERS + model.drafts}"
        raise model.settings.error("block_count", f"is {model.layers + model.drafts}, {outside}")
    try:
        return known[model.name](model)
    except ZeroDivisionError:
        raise FrontendError(f"{model.path}: a size in its metadata is 0") from None


def _check_all_used(model: Description, plan: Plan) -> None:
    """Whatever the file says about what the model computes has to have an effect, or be refused."""
    unread = model.settings.unread()
    if unread:
        raise FrontendError(f"{model.path}: settings that {model.name} is not known to have: {_some(unread)}{_UNREAD}")
    rest = model.left_over(plan.weights)
    if rest:
        raise FrontendError(f"{model.path}: tensors that {model.name} is not known to have: {_some(rest)}{_UNREAD}")


def _some(names: list[str]) -> str:
    """The first of many names, and how many there are more."""
    return ", ".join(f"{name:.80}" for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _drafts(model: Description) -> tuple[str, ...]:
    return (f"{model.drafts} layers that draft tokens are left out",) if model.drafts else ()


def _foreign_keys(model: Description) -> tuple[str, ...]:
    keys = [key for key in model.settings.metadata if not key.startswith((*_HARMLESS, f"{model.name}."))]
    return (f"metadata that is not known, and has no effect: {', '.join(keys):.200}",) if keys else ()


def _formats(tensors: Tensors) -> str:
    """What the file holds, by type."""
    counts = Counter(tensors[name].kind.name for name in tensors.names)
    return "the file's tensors: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _rounded_anew(source: GgufWeights, tensors: Tensors) -> tuple[str, ...]:
    """What becomes of weights that the file has rounded in a way that no encoding holds."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, scheme in source.least().items():
        kinds = sorted({tensors[tensor].kind.name for tensor in source.tensors_of(name)})
        counts["/".join(kinds), scheme] += 1
    listed = ", ".join(f"{count} {kind} to {scheme} at least" for (kind, scheme), count in counts.most_common())
    if not listed:
        return ()
    return (f"no encoding holds the integers of some weights: -q rounds them anew, {listed} (--override decides)",)


def _name(path: Path, said: object) -> str:
    """The file's name; for a blob without one, what the file says of itself."""
    if path.suffix == ".gguf":
        return model_name(path)
    return said if isinstance(said, str) and _NAMED.fullmatch(said) else path.name
