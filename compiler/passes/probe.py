"""Values that depend on positions and sizes only, evaluated at a few of them: how recognisers see meaning, not form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from llmc.compiler.ir.dims import Dim, symbols_of
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Array, Tensor, precise
from llmc.errors import IRError

WEIGHTS = "@"  # stands for all params among the sources of a value


class Probe:
    """Where a graph's values come from, and what those that come from `positions` and sizes are.

    The graph is one sequence: ids and positions are [1, S], S symbolic.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.positions: Input | None = next((v for v in graph.inputs if v.name == "positions"), None)

    @cached_property
    def size(self) -> Dim | None:
        """The symbolic number of tokens S; None when no input has one."""
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
    ) -> list[Array]:
        """The roots for `size` tokens at `positions` (default 0, 1, ...), some values given; f64 when `exact`.

        IRError when they need weights or token ids, or index beyond a table.
        """
        at = np.arange(size) if positions is None else np.asarray(positions)
        given: dict[Value, Array] = dict(known or {})
        if self.positions is not None:
            given[self.positions] = at.reshape(1, size)
        names = [] if self.size is None else [symbol.name for symbol in self.size.symbols()]
        binding = dict.fromkeys(names, size)
        if exact:
            with precise():
                found = evaluate_values(list(roots), given, _no_weights, binding)
        else:
            found = evaluate_values(list(roots), given, _no_weights, binding)
        return [np.asarray(found[str(i)]) for i in range(len(roots))]


def _no_weights(name: str) -> Array:
    raise IRError(f"it depends on the weight {name}")
