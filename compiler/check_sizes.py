"""How long the sequences of a check must be, and how long they may be: sizes read off a graph, and what they cost.

What a graph does with positions changes at its constants: a window's end, a bucket's edge, the last row of a table. A
check at shorter lengths would miss a mistake there, so lengths are chosen beyond all of these constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.ir.attention import TILE, Attention, PagedAttention
from llmc.compiler.ir.dims import Dim, Symbol, concrete, product
from llmc.compiler.ir.elementwise import Cast, Constant, Div, Exp, FloorDivide, Log, Mod, Mul, Pow
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.evaluate import Data, LoadParam, bind_symbols, evaluate_values
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import Broadcast, Gather, GatherElements, Matmul, Reshape, Slice, Softmax, Transpose
from llmc.compiler.ir.types import FLOATS, INTEGERS, Array, Tensor
from llmc.compiler.scenario import random_inputs
from llmc.errors import IRError

LEAST = 4 * TILE + PAGE + 1  # tokens of the longest sequence, whatever the constants: many pages, several query tiles
FEW, MIDDLE = 2, PAGE + 9  # the other sequences: one of almost nothing, one of two pages
_SMALL = 1 << 16  # elements of a stored table of integers that is looked at
_ELEMENT = 16  # what an element of any op costs, in multiply-adds: numpy reads, writes and allocates it
_POSITIONAL = ("positions",)


@dataclass(frozen=True)
class Sizes:
    """Lengths of the sequences that a check runs, and the length of the longest as it should have been.

    reason: why that could not be; empty where it is.
    """

    lengths: tuple[int, ...]
    wanted: int
    reason: str = ""

    def __str__(self) -> str:
        text = f"sequences of {_listed(self.lengths)} tokens"
        return f"{text} (not of {self.wanted:,}: {self.reason})" if self.reason else text


def _listed(values: Sequence[int]) -> str:
    texts = [f"{value:,}" for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def choose_sizes(graph: Graph, context: int, load: LoadParam, budget: float, runs: int = 1) -> Sizes:
    """Lengths for a token graph whose sequences have at most `context` tokens: one beyond every constant that a
    position is compared or combined with, one of two pages, one short.

    budget: multiply-adds that `runs` evaluations may take. The longest sequence is cut where they would take more.
    """
    most = min(context, longest_of(graph))
    wanted = min(most, max(LEAST, beyond_constants(graph, most, load)))
    others = tuple(min(length, most) for length in (FEW, MIDDLE))
    length, reason = wanted, ""
    while length > FEW and runs * cost_of(graph, (length, *others)) > budget:
        length = max(FEW, int(length * 0.8))
        others = tuple(min(length, other) for other in others)
        reason = "evaluating that many takes too long"
    return Sizes((others[0], length, *others[1:]) if most > FEW else (length,), wanted, reason)


AWKWARD = (7, 31, 33, 129)  # sizes that no tile and no vector divides


def array_draws(graph: Graph, seed: int, budget: float, runs: int) -> tuple[list[dict[str, Data]], list[str]]:
    """Inputs for a graph of arrays, and what they are in words: at small sizes, at awkward ones beyond the graph's
    constants, and at the greatest; of those no more than `budget` multiply-adds allow for `runs` evaluations."""
    lows = {symbol.name: symbol.low for symbol in graph.symbols}
    highs = {symbol.name: symbol.high for symbol in graph.symbols}
    wanted: list[dict[str, int]] = [{}]
    reason = ""
    if highs:
        beyond = beyond_constants(graph, min((h for h in highs.values() if h is not None), default=1 << 20), None)
        awkward = (*AWKWARD, beyond) if beyond > AWKWARD[-1] else AWKWARD
        for size in reversed(awkward):
            binding = {name: _bound(lows[name], high, size) for name, high in highs.items()}
            if runs * cost_at(graph, binding) <= budget:
                wanted.append(binding)
                break
            reason = f"not at {_words(binding)}: evaluating that takes too long"
        greatest = {name: high for name, high in highs.items() if high is not None}
        if greatest.keys() == highs.keys() and greatest not in wanted:
            if runs * cost_at(graph, greatest) <= budget:
                wanted.append(greatest)
            else:
                reason = f"not at {_words(greatest)}: evaluating that takes too long"
    draws = [random_inputs(graph, seed + index, sizes) for index, sizes in enumerate(wanted)]
    shown = [f"arrays of {_words(sizes) or 'the only sizes'}" for sizes in (bind_symbols(graph, d) for d in draws)]
    shown[-1] += f" (seed {seed})"
    return draws, [*shown, reason] if reason else shown


def _words(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size:,}" for name, size in sorted(sizes.items()))


def cost_at(graph: Graph, binding: Mapping[str, int]) -> float:
    """About how many multiply-adds an evaluation at some sizes takes."""
    return sum(_cost(op, {} if op in graph.constants else binding) for op in graph.ops)


def longest_of(graph: Graph) -> int:
    """The most tokens that the graph's own sizes allow, and the tables that it looks positions up in."""
    highs = [s.high for v in graph.inputs if isinstance(v.type, Tensor) for s in _symbols(v) if s.high is not None]
    for op in graph.ops:
        if isinstance(op, (Gather, Embed)):
            indices = op.indices if isinstance(op, Gather) else op.ids
            while isinstance(indices, (Cast, Reshape)):
                indices = indices.x
            rows = _table(op).shape[op.axis if isinstance(op, Gather) else 0]
            if isinstance(indices, Input) and indices.name in _POSITIONAL and isinstance(rows, int):
                highs.append(rows)
    return min(highs, default=1 << 28)


def _symbols(value: Input) -> list[Symbol]:
    return [s for dim in value.shape if isinstance(dim, Dim) for s in dim.symbols()]


def cost_of(graph: Graph, lengths: Sequence[int]) -> float:
    """About how many multiply-adds an evaluation of the sequences takes, one after another."""
    total = 0.0
    for length in lengths:
        binding = {symbol.name: _bound(symbol.low, symbol.high, length) for symbol in graph.symbols}
        total += cost_at(graph, binding)
    return total


def _bound(low: int, high: int | None, size: int) -> int:
    return max(low, size if high is None else min(size, high))


def _cost(op: Op, binding: Mapping[str, int]) -> float:
    if isinstance(op, (Constant, Reshape, Slice, Transpose, Broadcast)):
        return 0.0  # views
    if not isinstance(op.type, Tensor):
        return 0.0

    def count(dims: Sequence[int | Dim]) -> float:
        return float(concrete(product(tuple(dims)), binding))

    elements = count(op.shape)
    if isinstance(op, Matmul):
        return elements * (count(op.a.shape[-1:]) + _ELEMENT)
    if isinstance(op, (Linear, GatedLinear)):
        return count(op.x.shape[:-1]) * count(op.w.shape) + count(op.w.shape) * _ELEMENT + elements * _ELEMENT
    if isinstance(op, Attention):
        scores = count(op.q.shape[:-1]) * count(op.k.shape[-3:-2])
        return scores * (2 * count(op.q.shape[-1:]) + 4 * _ELEMENT)
    if isinstance(op, PagedAttention):
        return 0.0  # sizes of steps do not say how long sequences are: lifted graphs have none
    if isinstance(op, (Softmax, Exp)):
        return elements * 4 * _ELEMENT
    if isinstance(op, (Gather, Embed)) and isinstance(_table(op), Param):
        return (elements + count(_table(op).shape)) * _ELEMENT  # the table is widened as a whole
    return elements * _ELEMENT


def _table(op: Gather | Embed) -> Value:
    return op.x if isinstance(op, Gather) else op.table


def beyond_constants(graph: Graph, context: int, load: LoadParam | None) -> int:
    """A length at which everything that positions are compared with, divided by or looked up in has had its effect.

    The largest of those below `context`, and a page more; 0 where there is none. Constants are whole numbers of any
    shape and dtype, one over a whole number, thresholds behind a logarithm, windows and the rows of tables.
    """
    found = _Constants(graph, context, load)
    for op in graph.ops:
        found.visit(op)
    largest = max(found.values, default=0)
    return largest + PAGE + 1 if largest else 0


@dataclass
class _Constants:
    """Walks a graph in order; `values` collects what counts. scale: tokens that one unit of a value stands for."""

    graph: Graph
    context: int
    load: LoadParam | None
    values: set[int] = field(default_factory=set)
    scale: dict[Value, float] = field(default_factory=dict)
    logarithms: set[Value] = field(default_factory=set)
    others: set[Value] = field(default_factory=set)  # what depends on more than positions and sizes

    def visit(self, op: Op) -> None:
        """One op, after its operands."""
        for name in ("window",):
            self._add(float(getattr(op, name, 0) or 0), 1.0)
        if op in self.graph.constants:
            return
        if isinstance(op, (Gather, GatherElements)) and op.x in self.graph.constants:
            rows = op.x.shape[op.axis]
            if self._is_positional(op.indices) and isinstance(rows, int):
                self._add(float(rows), self._scale(op.indices))
        if not all(self._is_positional(value) or value in self.graph.constants for value in op.operands):
            self.others.add(op)
            return
        scale = max((self._scale(value) for value in op.operands), default=1.0)
        if isinstance(op, Log) or any(value in self.logarithms for value in op.operands):
            self.logarithms.add(op)
        for place, value in enumerate(op.operands):
            if value in self.graph.constants and not (isinstance(op, Pow) and place == 0):
                scale = max(scale, self._meet(op, place, value, scale))
        self.scale[op] = scale

    def _meet(self, op: Op, place: int, value: Value, scale: float) -> float:
        """Adds a constant operand; returns what one unit of the result stands for."""
        found = self._numbers(value)
        for number in found:
            self._add(number, scale)
            if 0 < number < 1:
                self._add(1 / number, scale)
            if op in self.logarithms and 0 < number < 40:
                self._add(float(math.ceil(math.exp(number))), scale)
        if isinstance(op, (Div, FloorDivide, Mod)) and place == 1 and found:
            return scale * max(1.0, max(found))
        if isinstance(op, Mul) and found and 0 < max(found) < 1:
            return scale / max(found)
        return scale

    def _add(self, number: float, scale: float) -> None:
        near = round(number)
        if near >= 1 and abs(number - near) <= 1e-6 * near:
            for wanted in (near, math.ceil(near * min(scale, 1e9))):
                if wanted < self.context:
                    self.values.add(wanted)

    def _scale(self, value: Value) -> float:
        return self.scale.get(value, 1.0)

    def _is_positional(self, value: Value) -> bool:
        if isinstance(value, Input):
            return value.name in _POSITIONAL
        return isinstance(value, Op) and value not in self.others and value not in self.graph.constants

    def _numbers(self, value: Value) -> list[float]:
        """The absolute values of a constant; nothing of large ones, and of tables of floats."""
        if not isinstance(value.type, Tensor) or value.dtype not in (*INTEGERS, *FLOATS):
            return []
        count = product(value.shape)
        if not isinstance(count, int) or count > _SMALL:
            return []
        needed = [item for item in topological([value]) if isinstance(item, Param)]
        load = self.load
        if needed and (load is None or any(_elements(item) > _SMALL for item in needed)):
            return []
        try:
            data = evaluate_values([value], {}, load or _nothing, {})["0"]
        except IRError:
            return []
        numbers = np.abs(np.asarray(data).astype(np.float64)).reshape(-1)
        numbers = numbers[np.isfinite(numbers)]
        if numbers.size > 1 and value.dtype in FLOATS and not (numbers == np.round(numbers)).all():
            return []
        # All of a few; the largest below the context of many.
        return [float(number) for number in np.unique(numbers[numbers < self.context])[-64:]]


def _nothing(name: str) -> Array:
    raise IRError(f"it depends on the weight {name}")


def _elements(value: Value) -> int:
    count = product(value.shape)
    return count if isinstance(count, int) else _SMALL + 1
