"""Values that depend on positions and sizes only, evaluated at a few of them: how recognisers see meaning, not form."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from llmc.compiler.ir.dims import Dim, concrete, symbols_of
from llmc.compiler.ir.evaluate import LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import static
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Array, Tensor, numpy_dtype, precise
from llmc.errors import IRError

OTHER = 2  # what sizes other than the number of tokens are while evaluating, where they may be
WEIGHTS = "@"  # stands for all params among the sources of a value


class Probe:
    """Where a graph's values come from, and what those that come from `positions` and sizes are.

    Most graphs are one sequence: ids and positions are [1, S], S symbolic. size: what counts tokens in others.
    """

    def __init__(self, graph: Graph, size: Dim | None = None) -> None:
        self.graph = graph
        self._size = size
        self.positions: Input | None = next((v for v in graph.inputs if _counts_tokens(v)), None)
        self._stand_ins: dict[str, Array] = {}

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
        """The names of the inputs that each value depends on; `WEIGHTS` stands for any param."""
        found: dict[Value, frozenset[str]] = {v: frozenset((v.name,)) for v in self.graph.inputs}
        weights = frozenset((WEIGHTS,))
        for op in self.graph.ops:
            names: frozenset[str] = frozenset()
            for operand in op.operands:
                names |= weights if isinstance(operand, Param) else found[operand]
            found[op] = names
        return found

    def is_positional(self, value: Value) -> bool:
        """Whether nothing but positions, sizes and constants decides the value."""
        return isinstance(value, (Op, Input)) and self.sources.get(value, frozenset("?")) <= {"positions"}

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

        Weights are random (`stand_ins`) or read (see `reading`). IRError when the roots need weights that nobody reads,
        or need token ids, or index beyond a table.
        """
        at = np.arange(size) if positions is None else np.asarray(positions)
        given: dict[Value, Array] = dict(known or {})
        if self.positions is not None:
            given[self.positions] = at.reshape(1, size)
        binding = self.binding(size)
        load = self._stand_in if stand_ins else read_weight
        with precise() if exact else contextlib.nullcontext():
            found = evaluate_values(list(roots), given, load, binding)
        return [np.asarray(found[str(i)]) for i in range(len(roots))]

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
