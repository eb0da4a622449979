"""Values of positions and sizes, evaluated at some of them: recognisers compare values, not spellings."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from llmc.compiler.ir.dims import Dim, Symbol, concrete, product, symbols_of
from llmc.compiler.ir.elementwise import (
    Activation,
    Add,
    Binary,
    Bitcast,
    Cast,
    Compare,
    Constant,
    FloorDivide,
    Maximum,
    Minimum,
    Mul,
    Unary,
    Where,
)
from llmc.compiler.ir.evaluate import LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, RopeAngles, static
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import (
    Argmax,
    Broadcast,
    CheckedIndex,
    Concat,
    Cumsum,
    Gather,
    GatherElements,
    Iota,
    Matmul,
    Pad,
    Reduce,
    Reshape,
    Slice,
    Softmax,
    Transpose,
)
from llmc.compiler.ir.types import Array, Shape, Tensor, numpy_dtype, precise
from llmc.errors import IRError

LENGTH = "length"  # stands for the number of tokens among the sources of a value
OTHER = 2  # what sizes other than the number of tokens are while evaluating, where they may be
WEIGHTS = "@"  # stands for all params among the sources of a value
NOT_TOKENS = frozenset(("positions", LENGTH, WEIGHTS))  # sources that say nothing of what the tokens are


class Probe:
    """Where a graph's values come from, and what those that come from `positions` and sizes are.

    Most graphs are one sequence: ids and positions are [1, S], S symbolic. size: what counts tokens in others.

    A value of positions alone is the same for a token in a longer sequence: element i along its token axis does not
    depend on S, so that evaluating it for the longest sequence says all. One whose sources hold LENGTH may differ with
    the number of tokens (a size as a number, the largest position, what is counted from the end), and is known only
    for the lengths that it is evaluated at: see `at_lengths`.
    """

    def __init__(self, graph: Graph, size: Dim | None = None) -> None:
        self.graph = graph
        self._size = size
        self.positions: Input | None = next((v for v in graph.inputs if _counts_tokens(v)), None)
        self._stand_ins: dict[str, Array] = {}
        self._decided: dict[frozenset[Symbol], frozenset[Value]] = {}

    @cached_property
    def size(self) -> Dim | None:
        """The symbolic number of tokens S; None when no input ends in one."""
        if self._size is not None:
            return self._size
        for value in self.graph.inputs:
            if isinstance(value.type, Tensor) and value.type.shape and isinstance(value.type.shape[-1], Dim):
                return value.type.shape[-1]
        return None

    @cached_property
    def sources(self) -> dict[Value, frozenset[str]]:
        """The names of the inputs that each value depends on; `WEIGHTS` stands for any param, LENGTH for a number of
        tokens.

        One number (or a few, not one a token) that is made of all positions of a sequence, such as the largest, is its
        length in another form: it counts as LENGTH alone.
        """
        found: dict[Value, frozenset[str]] = {v: frozenset((v.name,)) for v in self.graph.inputs}
        weights = frozenset((WEIGHTS,))
        symbols = frozenset() if self.size is None else self.size.symbols()
        for op in self.graph.ops:
            names: frozenset[str] = frozenset()
            for operand in op.operands:
                names |= weights if isinstance(operand, Param) else found[operand]
            if depends_on_size(op, symbols):
                names |= {LENGTH}
                if not self.has_size(op):
                    names -= {"positions"}
            found[op] = names
        return found

    def depends_on_tokens(self, value: Value) -> bool:
        """Whether the value depends on what the tokens are, or on any input but positions."""
        return bool(self.sources.get(value, frozenset()) - NOT_TOKENS)

    def depends_on_length(self, value: Value) -> bool:
        """Whether the number of tokens may decide the value's elements, beside how many there are."""
        return LENGTH in self.sources.get(value, frozenset())

    def decided_by(self, symbols: frozenset[Symbol]) -> frozenset[Value]:
        """Values with elements that these sizes may decide, beside how many there are."""
        if symbols not in self._decided:
            found: set[Value] = set()
            for op in self.graph.ops:
                if any(operand in found for operand in op.operands) or depends_on_size(op, symbols):
                    found.add(op)
            self._decided[symbols] = frozenset(found)
        return self._decided[symbols]

    def decided_by_other_sizes(self, value: Value) -> bool:
        """Whether sizes beside the number of tokens may decide elements: `evaluate` knows one value of each only."""
        tokens = frozenset() if self.size is None else self.size.symbols()
        return value in self.decided_by(frozenset(self.graph.symbols) - tokens)

    def is_constant(self, value: Value) -> bool:
        """Whether the value is known when compiling."""
        return isinstance(value, Param) or value in self.graph.constants

    def has_size(self, value: Value) -> bool:
        """Whether the number of tokens appears in the value's shape."""
        symbols = frozenset() if self.size is None else self.size.symbols()
        return isinstance(value.type, Tensor) and any(symbols_of(dim) & symbols for dim in value.type.shape)

    def evaluate(
        self,
        roots: Sequence[Value],
        size: int,
        positions: Sequence[int] | None = None,
        known: Mapping[Value, Array] | None = None,
        exact: bool = True,
        stand_ins: bool = False,
    ) -> list[Array]:
        """The roots for `size` tokens at `positions` (default 0, 1, ...), some values given; f64 when `exact`.

        What depends on the length is for a sequence of `size` tokens, wherever they are: give positions of your own for
        values that do not (`depends_on_length`), and use `at_lengths` for those that do. Weights are random
        (`stand_ins`) or read (see `reading`). IRError when the roots need weights that cannot be read, or token ids,
        or index beyond a table.
        """
        at = np.arange(size) if positions is None else np.asarray(positions)
        given: dict[Value, Array] = dict(known or {})
        if self.positions is not None:
            given[self.positions] = at.reshape(1, size).astype(numpy_dtype(self.positions.dtype))
        binding = self.binding(size)
        load = self._stand_in if stand_ins else read_weight
        with precise() if exact else contextlib.nullcontext():
            found = evaluate_values(list(roots), given, load, binding)
        return [np.asarray(found[str(i)]) for i in range(len(roots))]

    def at_lengths(
        self, roots: Sequence[Value], lengths: Iterable[int], exact: bool = True, stand_ins: bool = False
    ) -> Iterator[list[Array]]:
        """The roots for whole sequences from position 0 on, of one length after the other; as `evaluate` otherwise."""
        for length in lengths:
            yield self.evaluate(roots, length, exact=exact, stand_ins=stand_ins)

    @property
    def longest(self) -> int | None:
        """The most tokens that a sequence may have: the context; None where something does not bound it."""
        symbols = frozenset() if self.size is None else self.size.symbols()
        highs = [symbol.high for symbol in symbols if symbol.high is not None]
        return min(highs, default=None) if len(highs) == len(symbols) else None

    def binding(self, size: int) -> dict[str, int]:
        """A value for every symbol: `size` for the number of tokens, a small one for others (such as a batch)."""
        tokens = frozenset() if self.size is None else self.size.symbols()
        return {s.name: size if s in tokens else min(max(s.low, OTHER), s.high or OTHER) for s in self.graph.symbols}

    def shape(self, value: Value, size: int) -> tuple[int, ...]:
        """The value's shape for `size` tokens."""
        binding = self.binding(size)
        return tuple(concrete(dim, binding) for dim in value.shape)

    def _stand_in(self, name: str) -> Array:
        """Random values for a weight: what holds for them holds for any."""
        if name in self._stand_ins:
            return self._stand_ins[name]
        kind = next(param.tensor for param in self.graph.params if param.name == name)
        shape = tuple(static(dim) for dim in kind.shape)
        values = np.random.default_rng(list(name.encode())).standard_normal(shape).astype(numpy_dtype(kind.dtype))
        self._stand_ins[name] = values
        return values


_ELEMENTWISE = (Unary, Binary, Compare, Activation, Cast, Bitcast, Where)


def depends_on_size(op: Op, symbols: frozenset[Symbol]) -> bool:
    """Whether an element of the result may differ with the sizes `symbols`, its operands' elements being the same.

    False is a promise: where the result has elements for n and for n + 1 tokens, they are equal.
    """
    if not any(_mentions(value.type, symbols) for value in (op, *op.operands)):
        return False
    if isinstance(op, (Constant, Iota, Broadcast, Transpose, Cumsum, Embed, RopeAngles, *_ELEMENTWISE)):
        return False
    if isinstance(op, CheckedIndex):  # what is negative counts from the end
        return bool(symbols_of(op.size) & symbols) and not _never_negative(op.x)
    if isinstance(op, Slice):
        return bool(symbols_of(op.start) & symbols)
    if isinstance(op, Concat):
        return any(symbols_of(value.shape[op.axis]) & symbols for value in op.xs[:-1])
    if isinstance(op, Pad):
        return any(more and symbols_of(dim) & symbols for more, dim in zip(op.high, op.x.shape, strict=True))
    if isinstance(op, (Gather, GatherElements)):
        return bool(symbols_of(op.x.shape[op.axis]) & symbols) and not _never_negative(op.indices)
    if isinstance(op, Reduce):
        return any(symbols_of(op.x.shape[axis]) & symbols for axis in op.axes)
    if isinstance(op, (Argmax, Softmax)):
        return bool(symbols_of(op.x.shape[op.axis]) & symbols)
    if isinstance(op, Matmul):
        return bool(symbols_of(op.a.shape[-1]) & symbols)
    if isinstance(op, Reshape):
        return _strides(op.x.shape, symbols) != _strides(op.shape, symbols)
    return True


def _mentions(kind: object, symbols: frozenset[Symbol]) -> bool:
    return isinstance(kind, Tensor) and any(symbols_of(dim) & symbols for dim in kind.shape)


def _strides(shape: Shape, symbols: frozenset[Symbol]) -> list[tuple[int | Dim, int | Dim]]:
    """The axes of such sizes, each with the elements after it; (0, 0) for one with nothing before: it only grows."""
    return [
        (0, 0) if product(shape[:axis]) == 1 else (dim, product(shape[axis + 1 :]))
        for axis, dim in enumerate(shape)
        if symbols_of(dim) & symbols
    ]


def _never_negative(index: Value) -> bool:
    """Whether indices are counts, sums of these and the like: a negative one would count from the end."""
    if isinstance(index, Input):
        return index.name in ("ids", "positions")
    if isinstance(index, Constant):
        return bool((index.value.array >= 0).all())
    if isinstance(index, (Iota, CheckedIndex)):
        return True
    if isinstance(index, (Reshape, Broadcast, Transpose, Slice, Cast, Gather, Concat)):
        values = (index.x,) if isinstance(index, Gather) else index.operands
        return all(_never_negative(value) for value in values)
    if isinstance(index, Maximum):
        return _never_negative(index.a) or _never_negative(index.b)
    if isinstance(index, (Add, Mul, Minimum, FloorDivide)):
        return _never_negative(index.a) and _never_negative(index.b)
    return False


def _counts_tokens(value: Input) -> bool:
    """Whether an input is the `positions` i32[1, S] of a text model, and not one of any graph's own."""
    kind = value.type
    return (
        value.name == "positions"
        and isinstance(kind, Tensor)
        and kind.dtype == "i32"
        and kind.rank == 2
        and kind.shape[0] == 1
    )


_reader: contextvars.ContextVar[LoadParam | None] = contextvars.ContextVar("reader", default=None)


@contextlib.contextmanager
def reading(load: LoadParam) -> Iterator[None]:
    """Inside this block recognisers may read weights that a mask is made of (a model's buffers, small and few)."""
    token = _reader.set(load)
    try:
        yield
    finally:
        _reader.reset(token)


def read_weight(name: str) -> Array:
    """A weight's values, where they can be read (see `reading`); IRError elsewhere."""
    load = _reader.get()
    if load is None:
        raise IRError(f"it depends on the weight {name}")
    return load(name)
