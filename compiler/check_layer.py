"""The check that every compile runs: the first layer as recognised, against the first layer as lifted.

A recogniser that misreads a model misreads all of its layers in the same way, so that checking the first one finds the
mistake at little cost. The lifted graph is cut after the first layer, the passes of the compile run on that piece
alone, without quantization, and both are evaluated in f64 on the same random tokens, at a length beyond the graph's
constants.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.check import TOLERANCE, Checker, difference_of
from llmc.compiler.check_sizes import FEW, Sizes, choose_sizes, cost_at
from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.graph import Graph, substitute_values, topological
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Param, Value
from llmc.compiler.ir.structural import Gather, Softmax
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.passes.manager import Pass, Report, run_passes
from llmc.compiler.scenario import is_token_graph
from llmc.errors import CompileError, LlmcError

BUDGET = 1.2e10  # multiply-adds in f64 of all evaluations: about a second of one core
RUNS = 2  # before and after
ROWS = 512  # of a table of token embeddings that is looked up: the others are the same to a pass


@dataclass
class LayerCheck:
    """What was compared, for people; `skipped`: why nothing was. differences: relative to the largest value."""

    sizes: str = ""
    skipped: str = ""
    differences: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"not compared: {self.skipped}" if self.skipped else f"compared on {self.sizes}"


def check_first_layer(
    graph: Graph, passes: list[Pass], load: LoadParam, context: int, seed: int = 0, tolerance: float = TOLERANCE
) -> LayerCheck:
    """Runs the passes on the first layer of a lifted graph, and compares it before and after; CompileError names the
    pass whose result computes something else. Weights are the model's own.

    passes: those of the compile, without quantization. Skipped, with the reason, where even short inputs cost more than
    `BUDGET`, and where the layer does not evaluate on random inputs (indices beyond its tables).
    """
    fitting = _fitting(graph, context, load)
    if fitting is None:
        return LayerCheck(skipped="evaluating one layer takes more than two seconds")
    piece, sizes = fitting
    lengths = None if sizes is None else sizes.lengths
    weights = _few_rows(piece, load)

    def checker() -> Checker:
        return Checker(weights, seed, lengths, tolerance, context, BUDGET, RUNS)

    segment = _Segments(checker())
    try:
        run_passes(piece, passes, [segment])
        segment.end()
    except _Different as different:
        try:
            run_passes(piece, passes, [checker()])
        except CompileError as error:
            raise CompileError(f"{_WRONG}: {error}") from error
        raise CompileError(f"{_WRONG}: {different}. `--check` compares every pass") from None
    except _Unknown as unknown:
        return LayerCheck(skipped=str(unknown))
    return LayerCheck(str(sizes or "; ".join(segment.checker.sizes)), differences=segment.differences)


_WRONG = "the first layer as recognised does not compute what the model's first layer does"


class _Different(LlmcError):
    """Two evaluations differ."""


class _Unknown(LlmcError):
    """The graph before does not evaluate."""


@dataclass
class _Segments:
    """An observer that compares only the ends of a run of exact passes: what inexact passes change is no difference."""

    checker: Checker
    differences: list[float] = field(default_factory=list)
    first: Graph | None = None
    last: Graph | None = None

    def __call__(self, item: Pass, before: Graph, after: Graph, report: Report) -> None:
        if self.first is None:
            self.first = before
        if not item.exact and after is not before:
            self.last = before
            self.end()
            self.first = after
        self.last = after

    def end(self) -> None:
        """Compares the first graph of the run with the last."""
        if self.first is None or self.last is None or self.first is self.last:
            return
        try:
            expected = self.checker.evaluate(self.first)
        except CompileError as error:
            raise _Unknown(str(error)) from error
        found = self.checker.evaluate(self.last)
        scenario = self.checker.scenario
        for name, array in expected.items():
            if name not in found or found[name].shape != array.shape:
                raise _Different(f"its output {name} has another shape")
            place = None if scenario is None else scenario.place
            difference = difference_of("the passes", name, array, found[name], True, place)
            self.differences.append(difference.relative)
            if not difference.relative <= self.checker.tolerance:
                if self.checker.differs_by_rounding(self.first, self.last):
                    return
                raise _Different(str(difference))


def _fitting(graph: Graph, context: int, load: LoadParam) -> tuple[Graph, Sizes | None] | None:
    """The largest piece up to the end of the first layer that is affordable at the length wanted, or else the piece
    that is affordable at the greatest length; with the lengths (None for a graph of arrays)."""
    of_tokens = is_token_graph(graph)
    found = [(name, value) for name, value in cuts(graph) if not of_tokens or _is_rows(value)]
    pieces = [_with_small_tables(graph.replace_outputs((pair,))) for pair in found]
    best: tuple[Graph, Sizes] | None = None
    for piece in pieces or [_with_small_tables(graph)]:
        if not of_tokens:
            least = {symbol.name: max(symbol.low, min(9, symbol.high or 9)) for symbol in piece.symbols}
            if RUNS * cost_at(piece, least) <= BUDGET:
                return piece, None
            continue
        sizes = choose_sizes(piece, context, load, BUDGET, RUNS)
        if not sizes.reason:
            return piece, sizes
        if max(sizes.lengths) > FEW and (best is None or max(sizes.lengths) > max(best[1].lengths)):
            best = piece, sizes
    return best


def cuts(graph: Graph) -> list[tuple[str, Value]]:
    """Values that all of the graph behind its first attention is computed from, the last in front of the second
    attention first: ends of the first layer. Where there is one attention: values behind it; none where there is none.

    Attention is whatever has a softmax. A value is a cut if no edge leads around it from the first attention to the
    second.
    """
    attentions = [op for op in graph.ops if isinstance(op, (Softmax, Attention)) and op not in graph.constants]
    if not attentions:
        return []
    first = attentions[0]
    behind = _depending_on(graph, first)
    second: Value | None = next((op for op in attentions[1:] if op in behind), None)
    outputs = [value for _, value in graph.outputs]
    goals = [second] if second is not None else outputs
    needed = set(topological(goals))
    between = [op for op in graph.ops if op in behind and op in needed]
    place = {op: index for index, op in enumerate(between)}
    last_use = list(range(len(between)))
    for op in between:
        for operand in op.operands:
            if operand in place:
                last_use[place[operand]] = max(last_use[place[operand]], place[op])
    found: list[tuple[str, Value]] = []
    reach = 0
    for index, op in enumerate(between):
        if reach <= index and op not in goals and isinstance(op.type, Tensor):
            found.append(("layer", op))
        reach = max(reach, last_use[index])
    if second is None:
        # The outputs themselves first, all that there is behind the only layer.
        return [graph.outputs[0], *reversed(found)] if len(graph.outputs) == 1 else found[::-1]
    return found[::-1]


def _is_rows(value: Value) -> bool:
    """Whether a value has a row a token: [1, S, ...]."""
    shape = value.shape
    symbolic = [axis for axis, dim in enumerate(shape) if isinstance(dim, Dim)]
    return symbolic == [1] and shape[0] == 1


def _depending_on(graph: Graph, source: Value) -> set[Value]:
    found = {source}
    for op in graph.ops:
        if any(operand in found for operand in op.operands):
            found.add(op)
    return found


def _with_small_tables(graph: Graph) -> Graph:
    """The graph with the first rows of tables that nothing but token ids looks up."""
    ids = next((value for value in graph.inputs if value.name == "ids"), None)
    smaller: dict[Value, Value] = {}
    for param in graph.params:
        users = graph.users.get(param, ())
        looked_up = all(
            (isinstance(op, Gather) and op.x is param and op.axis == 0 and _is_ids(op.indices, ids))
            or (isinstance(op, Embed) and op.table is param and _is_ids(op.ids, ids))
            for op in users
        )
        rows = param.shape[0] if param.rank else 0
        if users and looked_up and isinstance(rows, int) and rows > ROWS:
            smaller[param] = Param(param.name, Tensor((ROWS, *param.shape[1:]), param.dtype))
    return substitute_values(graph, smaller) if smaller else graph


def _is_ids(value: Value, ids: Value | None) -> bool:
    while isinstance(value, Cast):
        value = value.x
    return ids is not None and value is ids


def _few_rows(graph: Graph, load: LoadParam) -> LoadParam:
    """Weights by name, of the sizes that the graph wants."""
    rows = {param.name: param.shape[0] for param in graph.params if param.rank}

    def loaded(name: str) -> Array:
        array = load(name)
        wanted = rows.get(name)
        return np.asarray(array[:wanted]) if isinstance(wanted, int) and wanted < len(array) else array

    return loaded
