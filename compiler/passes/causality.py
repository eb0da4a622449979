"""Whether the tokens of a graph see only those before them: shown of every attention in it, recognised or not."""

from __future__ import annotations

import math

import numpy as np

from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.elementwise import Add, And, Cast, Not, Or, Sub, Where
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Reshape
from llmc.compiler.ir.types import FLOATS, Array
from llmc.compiler.passes.distances import Distances
from llmc.compiler.passes.masks import HIDDEN, ByDistance, Unrecognised
from llmc.compiler.passes.pair_functions import MOST_PAIRS, PairReader
from llmc.compiler.passes.probe import Probe
from llmc.compiler.passes.rewriting import number_of
from llmc.compiler.passes.softmaxes import softmax_operand, without_maximum
from llmc.errors import IRError

_ROWS = 256  # queries that are looked at together


def attends_causally(graph: Graph) -> bool:
    """Whether every attention of a text [1, S] hides later tokens; False where there is none, or one is not known to.

    graph: after recognition. An attention that is no `llm.attention` is a softmax over scores [..., S, S].
    """
    probe = Probe(graph)
    reasons = [op.causal for op in graph.ops if isinstance(op, Attention)]
    operands = [softmax_operand(op) for op in graph.ops]
    pairs = [x for x in operands if x is not None and x.shape[-2:] == (probe.size, probe.size)]
    reasons += [_hides_later(probe, without_maximum(x)) for x in pairs if probe.depends_on_tokens(x)]
    return bool(reasons) and all(reasons)


def _hides_later(probe: Probe, scores: Value) -> bool:
    """Whether scores [..., S, S], whatever they are made of, hide every key after its query."""
    if probe.size is None or probe.longest is None:
        return False
    distances = Distances(PairReader(probe, probe.longest, size=probe.size))
    value = scores
    while isinstance(value, Op):
        if isinstance(value, Where):
            return _fills_later(distances, value)
        if isinstance(value, (Add, Sub)):
            acting = [x for x in value.operands if probe.depends_on_tokens(x)]
            others = [x for x in value.operands if x not in acting]
            if len(acting) != 1 or (isinstance(value, Sub) and acting[0] is value.b):
                return False
            if number_of(others[0]) is None:
                found = _numbers(distances, others[0])
                return found is not None and isinstance(value, Add) and _is_causal(found)
            value = acting[0]
        elif isinstance(value, (Cast, Reshape)) and value.dtype in FLOATS and value.shape[-2:] == value.x.shape[-2:]:
            value = value.x
        else:
            return False
    return False


def _fills_later(distances: Distances, choice: Where) -> bool:
    """Whether a choice puts numbers that hide at all later keys, and scores at each query's own place."""
    for fill, holds in ((choice.b, False), (choice.a, True)):
        number = number_of(fill)
        if number is None or number > HIDDEN:
            continue
        own = _at_own_place(distances, choice.condition)
        return own is not None and bool((own != holds).all()) and _is_later(distances, choice.condition, holds)
    return False


def _is_later(distances: Distances, condition: Value, holds: bool) -> bool:
    """Whether a condition is `holds` at every key after its query."""
    if isinstance(condition, And) and not holds:
        return any(_is_later(distances, x, holds) for x in condition.operands)
    if isinstance(condition, Or) and holds:
        return any(_is_later(distances, x, holds) for x in condition.operands)
    if isinstance(condition, Not):
        return _is_later(distances, condition.x, not holds)
    if isinstance(condition, (Reshape, Broadcast)) and condition.shape[-2:] == condition.x.shape[-2:]:
        return _is_later(distances, condition.x, holds)
    found = _numbers(distances, condition)
    if found is None:
        return _is_later_by_pairs(distances, condition, holds)
    return bool(((found.own[:, found.distances > 0] > 0) == holds).all())


def _is_later_by_pairs(distances: Distances, condition: Value, holds: bool) -> bool:
    """`_is_later` of a condition that is no function of distance: for every pair, where these are few enough."""
    reader, at = distances.reader, np.arange(distances.most)
    try:
        point = reader.pair(condition)
        if "length" in point.variables or math.prod(point.shape) * len(at) ** 2 > MOST_PAIRS:
            return False
        for rows in np.array_split(at, -(-len(at) // _ROWS)):
            later = (at > rows[:, None]).reshape(len(rows), len(at), *(1,) * len(point.shape))
            if (later & (reader.evaluate(point, rows[:, None], at[None]) != holds)).any():
                return False
    except (Unrecognised, IRError):
        return False
    return True


def _at_own_place(distances: Distances, condition: Value) -> Array | None:
    """A condition for every query and the key at its place; None where it is not known."""
    at = np.arange(distances.most)[:, None]
    try:
        return distances.reader.evaluate(distances.reader.pair(condition), at, at)
    except (Unrecognised, IRError):
        return None


def _numbers(distances: Distances, value: Value) -> ByDistance | None:
    try:
        return distances.numbers(distances.up_to_rows(distances.reader.pair(value)))
    except Unrecognised:
        return None


def _is_causal(found: ByDistance) -> bool:
    try:
        return found.is_causal
    except Unrecognised:
        return False
