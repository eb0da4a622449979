"""AMX as a `MatrixUnit`: which of the kernels on tile registers serve what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.compiler.ir.dims import Dim
from llmc.targets.cpu.limits import LimitKernel
from llmc.targets.cpu.matrix_unit import FewRows, MatrixUnit, TilePlan
from llmc.targets.kernel import Kernel, Param, kernel
from llmc.targets.machine import Machine
from llmc.targets.x86 import linear_float_tile_rows as float_tile_rows
from llmc.targets.x86 import linear_tile_rows, tile_plan
from llmc.targets.x86.activation_tiles import activation_tiles, tiles_elements
from llmc.targets.x86.attention_matrix import AttentionMatrix, fits
from llmc.targets.x86.isa import isa_for
from llmc.targets.x86.tile_limits import limit_kernels
from llmc.targets.x86.tiles import INPUTS, ROWS, has_tiles


@dataclass(frozen=True)
class Amx:
    """The tile registers of a machine that has them and vectors of 16 lanes."""

    machine: Machine

    inputs = INPUTS
    few_split = float_tile_rows.SPLIT

    @property
    def serves_many(self) -> bool:
        return tile_plan.usable(self.machine)

    def rows_from(self, bits: int) -> int:
        return tile_plan.rows_from(bits)

    def split_of(self, bits: int) -> int:
        return tile_plan.split_of(bits)

    def plan(self, *, n: int, k: int, bits: int, packed: bool, **facts: object) -> TilePlan:
        return tile_plan.tile_plan(self.machine, n=n, k=k, bits=bits, packed=packed, **facts)  # type: ignore[arg-type]

    def elements(self, rows: int | Dim, inputs: int, split: int = 1) -> int | Dim:
        return tiles_elements(rows, inputs, split)

    def activations(self, *, k: int, inputs: int, **facts: Param) -> Kernel:
        return kernel(activation_tiles, self.machine.key, k=k, inputs=inputs, **facts)

    def quantized_rows(self, rows: int, params: Mapping[str, Param]) -> FewRows | None:
        if not has_tiles(self.machine, "int8"):
            return None
        made = kernel(linear_tile_rows.quantized_linear_tile_rows, self.machine.key, rows=rows, **params)
        return FewRows(made, rows, linear_tile_rows.TILES)

    def float_rows(self, params: Mapping[str, Param]) -> FewRows | None:
        if not self.serves_many:  # activations become bf16 with the same instructions
            return None
        own = {name: value for name, value in params.items() if name not in ("dtype", "pairs")}
        made = kernel(float_tile_rows.float_linear_tile_rows, self.machine.key, **own)
        return FewRows(made, ROWS, float_tile_rows.TILES)

    def attention(self, value_dim: int, cache_dtype: str) -> type[AttentionMatrix] | None:
        return AttentionMatrix if fits(self.machine, value_dim, cache_dtype) else None

    def limits(self) -> list[LimitKernel]:
        return limit_kernels(self.machine)


def matrix_unit(machine: Machine) -> MatrixUnit | None:
    """AMX, where its tiles have as many columns as vectors have lanes."""
    return Amx(machine) if machine.has("amx-tile") and isa_for(machine).lanes == ROWS else None
