"""What a linear kernel does with finished sums: bias, activation, gate, residual, store.

plain:  out = act(sum + bias) + residual
gated:  out = act(gate + bias[:F]) * (up + bias[F:]) + residual
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.vector_isa import VectorIsa
from llmc.targets.cpu.vector_math import ACTIVATIONS, activation
from llmc.targets.cpu.vectors import load, store

if TYPE_CHECKING:
    from tvm.tirx import Expr


@dataclass(frozen=True)
class Epilogue:
    """What is fused behind a linear op with n logical output rows (2F when gated).

    bias: f32 [n], in logical order. residual: f32 [T, features], added last; it may be the very buffer of the result.
    """

    n: int
    gated: bool = False
    activation: str = "none"
    bias: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        if self.gated and self.n % 2:
            raise ValueError(f"a gated weight has as many gate rows as up rows, not {self.n} in all")

    @property
    def features(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.gated else self.n

    @property
    def tiles(self) -> int:
        """Weight tiles that make one vector of the result."""
        return 2 if self.gated else 1

    def columns(self, lanes: int) -> int:
        """Vectors in a row of the result."""
        return -(-self.features // lanes)

    def pointers(self) -> list[tuple[str, str]]:
        """The kernel's last pointer parameters: bias?, residual?, out."""
        names = [name for name in ("bias", "residual") if getattr(self, name)]
        return [(name, "float32") for name in (*names, "out")]

    def emit(self, isa: VectorIsa, handles: Mapping[str, Expr], row: Expr, column: Expr, sums: Sequence[Expr]) -> None:
        """Finish vector `column` of the given row of the result; sums: f32 vectors, (gate, up) or one."""
        out = b.view(handles["out"], [b.MANY, self.features], "float32")
        first, count = self._features_of(isa, column)
        store(out, (row, first), self.value(isa, handles, row, column, sums), count)

    def emit_tile(
        self,
        isa: VectorIsa,
        tile_rows: int,
        handles: Mapping[str, Expr],
        row: Expr,
        tile: Expr,
        sums: Callable[[int], Sequence[Expr]],
    ) -> None:
        """Finish all vectors of tile `tile` of the result, as far as there are features; sums: those of a slice."""
        slices = tile_rows // isa.lanes
        for number in range(slices):
            column = tile * slices + number
            if number and self.features % tile_rows:
                with b.when(column * isa.lanes < self.features):
                    self.emit(isa, handles, row, column, sums(number))
            else:
                self.emit(isa, handles, row, column, sums(number))

    def value(self, isa: VectorIsa, handles: Mapping[str, Expr], row: Expr, column: Expr, sums: Sequence[Expr]) -> Expr:
        """What `emit` stores. Lanes past the last feature hold anything."""
        first, count = self._features_of(isa, column)
        values = list(sums)
        if self.bias:
            bias = b.view(handles["bias"], [self.n], "float32")
            values = [v + load(bias, first + i * self.features, isa.lanes, count) for i, v in enumerate(sums)]
        value = activation(isa, self.activation, values[0])
        if self.gated:
            value = value * values[1]
        if self.residual:
            residual = b.view(handles["residual"], [b.MANY, self.features], "float32")
            value = value + load(residual, (row, first), isa.lanes, count)
        return value

    def _features_of(self, isa: VectorIsa, column: Expr) -> tuple[Expr, Expr | None]:
        """The first feature of a vector of the result, and how many there are from there on; None: enough."""
        first = b.let(column * isa.lanes)
        return first, self.features - first if self.features % isa.lanes else None
