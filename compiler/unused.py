"""Options that change nothing about the model at hand: they are named, so that nobody believes that they did."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.compiler.options import AUTO, INTEGERS, CompileOptions
from llmc.compiler.passes.manager import Report

_DEFAULT_GROUP = CompileOptions().group_size
_WITH_MINIMUMS = ("int4", "int3", "int2")  # what `symmetric` decides about: see `schemes.scheme_of`
_OTHER_SIZES = "--max-dim and --dim are for the sizes of this one"


def unused(options: CompileOptions, is_text: bool, reports: Sequence[Report], step: int) -> list[str]:
    """A line for each option that was given and has no effect.

    is_text: whether the model is one of texts; reports: of the passes; step: tokens of a step at most, 1 where there
    are none.
    """
    schemes = {options.quantization, options.embedding, options.head, *(scheme for _, scheme in options.overrides)}
    rounds = bool(schemes & {AUTO, *INTEGERS})
    found = []
    if not options.symmetric and not schemes & {AUTO, *_WITH_MINIMUMS}:
        found.append("--asymmetric has no effect: it is for int4 and less")
    if options.group_size != _DEFAULT_GROUP and not rounds:
        found.append("--group-size has no effect: no weight is rounded to integers")
    if options.calibrate not in (None, "none") and not rounds:
        found.append("--calibrate has no effect: no weight is rounded to integers")
    hits = {hit for report in reports if report.name.partition("{")[0] == "quantize" for hit in report.hits}
    if options.head is not None and not _took(hits, "head"):
        tied = any(hit.startswith("tied head ") for hit in hits)
        why = "the head is the embedding's table, and has its scheme" if tied else "no layer was found that it is for"
        found.append(f"--head has no effect: {why}")
    if options.embedding is not None and not _took(hits, "embedding"):
        found.append("--embedding has no effect: no table of tokens was found that it is for")
    if not is_text:
        for name, number in (("--max-context", options.max_context), ("--max-step", options.max_step)):
            if number is not None:
                found.append(f"{name} has no effect: it is for models of texts; {_OTHER_SIZES}")
    elif options.max_step is not None and options.max_step < step:
        found.append(f"--max-step has no effect below {step}: a step of this model takes whole texts")
    return found


def _took(hits: set[str], kind: str) -> bool:
    """Whether some weight of this kind got the scheme of its kind, and did not have integers already."""
    return any(hit.startswith(f"{kind} ") and not hit.startswith(f"{kind} already ") for hit in hits)
