"""Warnings about what a compile had to give up: a cache, steps of several texts, a layer's precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.structural import Softmax
from llmc.compiler.ir.types import KV
from llmc.compiler.passes.lengths import OF_LENGTH
from llmc.compiler.passes.manager import Report
from llmc.compiler.passes.schemes import behind_logits
from llmc.errors import CompileError

# The passes that a cache and steps of several texts need, in the order in which one fails the next.
_NEEDED = ("flatten-tokens", "insert-kv-cache")
_EXPLAIN = "`llmc explain` lists what every pass refused"


def losses(graph: Graph, reports: Sequence[Report], task: str, quantization: str) -> list[str]:
    """A line for each thing that the model lost, with the reason.

    graph: after all passes; reports: of these passes; task: as in `frontends/lifted.py`; quantization: the scheme that
    was asked for. Nothing is lost where this is empty. CompileError where what is left would not be the model: texts
    of one step that see each other.
    """
    found = []
    together = any(value.name == "starts" for value in graph.inputs)
    if task == "encode" and together and any(isinstance(op, Attention) for op in graph.ops):
        raise CompileError(f"texts of one step would see each other: {_reason(graph, reports)}. Please report it")
    if task == "generate" and not any(isinstance(value.type, KV) for value in graph.inputs):
        found.append(
            "slow: this model keeps no KV cache, so that every token computes the whole sequence anew. "
            f"{_reason(graph, reports) or 'No attention was recognised'}. {_EXPLAIN}"
        )
    if task == "encode" and all(value.name != "starts" for value in graph.inputs):
        found.append(
            "slow: this model takes one text a step. "
            f"{_reason(graph, reports) or 'Its tokens could not be told apart'}. {_EXPLAIN}"
        )
    if quantization == "none":
        return found
    found += [
        f"not quantized as asked: {what}: {why}" for r in reports if r.name == "quantize" for what, why in r.refusals
    ]
    head = behind_logits(graph) if task == "generate" else None
    if head is not None and not isinstance(head, Linear):
        what = f"{head.name} : {head.type}" if isinstance(head, Op) else str(head.type)
        found.append(
            f"the head was not found behind the logits ({what} is in between): its weight is rounded as any other "
            "layer's is. Give --override NAME=int8 for that weight"
        )
    return found


def _reason(graph: Graph, reports: Sequence[Report]) -> str:
    """The first refusal of the first pass that refused anything: of rotations by a law of the sequence's length, of
    attention, where some is left as a softmax over tokens, else of what was behind it."""
    for report in reports:
        for what, why in report.refusals if report.name == "fuse-rope" else ():
            if OF_LENGTH in why:  # whatever else was refused is no better with a cache
                return f"fuse-rope refused {what}: {why}"
    raw = any(isinstance(op, Softmax) and isinstance(op.shape[op.axis], Dim) for op in graph.ops)
    for name in ("fuse-attention", *_NEEDED) if raw else _NEEDED:
        for report in reports:
            if report.name == name and report.refusals:
                what, why = report.refusals[0]
                return f"{name} refused {what}: {why}"
    return ""


def integer_notes(reports: Sequence[Report]) -> list[str]:
    """What a user should know of weights that came quantized and could not stay as they were."""
    reasons = Counter(why for report in reports if report.name == "keep-integers" for _, why in report.refusals)
    return [f"{count} quantized weight{'s' * (count > 1)}: {why}" for why, count in reasons.items()]
