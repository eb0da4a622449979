"""AMX as a `MatrixUnit`: which of the kernels on tile registers serve what."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.targets.cpu.limits import LimitKernel
from llmc.targets.cpu.linear_problem import FloatProblem, ManyRowsProblem, QuantizedProblem
from llmc.targets.cpu.matrix_unit import FewRows, MatrixUnit
from llmc.targets.cpu.quantize_activations import padded
from llmc.targets.cpu.variants import LinearPlan
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser
from llmc.targets.x86 import linear_float_tile_rows as float_tile_rows
from llmc.targets.x86 import tile_plan
from llmc.targets.x86.activation_tiles import Bf16Tiles
from llmc.targets.x86.attention_matrix import AttentionMatrix, fits
from llmc.targets.x86.isa import isa_for
from llmc.targets.x86.linear_float_tile_rows import FloatTileRows
from llmc.targets.x86.linear_tile_rows import TILES, QuantizedTileRows
from llmc.targets.x86.tile_limits import limit_kernels
from llmc.targets.x86.tiles import INPUTS, ROWS


@dataclass(frozen=True)
class Amx:
    """The tile registers of a machine that has them and vectors of 16 lanes."""

    machine: Machine

    def activations(self, features: int, bits: int, group: int | None) -> Bf16Tiles | None:
        section = tile_plan.section_of(features, group or 0)
        if bits not in (4, 6, 8, 16, 32) or not section or not tile_plan.usable(self.machine):
            return None
        return tile_plan.activations(features, bits, section)

    def result(self, features: int, bits: int) -> Bf16Tiles | None:
        return tile_plan.activations(features, bits) if features % INPUTS == 0 else None

    def rows_from(self, bits: int) -> int:
        return tile_plan.rows_from(bits)

    def cost(self, bits: int) -> float:
        return tile_plan.cost(bits)

    def plan(self, chooser: Chooser, problem: ManyRowsProblem) -> LinearPlan:
        return tile_plan.tile_plan(chooser, problem)

    def quantized_rows(self, chooser: Chooser, problem: QuantizedProblem, rows: int) -> FewRows | None:
        found = chooser.choose(QuantizedTileRows, problem, (1, rows))
        if isinstance(found, str):
            return None
        return FewRows(found.kernel(problem, self.machine), found.rows, TILES, found.least)

    def float_rows(self, chooser: Chooser, problem: FloatProblem) -> FewRows | None:
        if not tile_plan.usable(self.machine):  # activations become bf16 with the same instructions
            return None
        found = chooser.choose(FloatTileRows, problem, (1, ROWS))
        if isinstance(found, str):
            return None
        form = Bf16Tiles(problem.k, padded(problem.k, INPUTS), float_tile_rows.PARTS)
        return FewRows(found.kernel(problem, self.machine), ROWS, float_tile_rows.TILES, found.least, form)

    def attention(self, value_dim: int, cache_dtype: str) -> type[AttentionMatrix] | None:
        return AttentionMatrix if fits(self.machine, value_dim, cache_dtype) else None

    def limits(self) -> list[LimitKernel]:
        return limit_kernels(self.machine)


def matrix_unit(machine: Machine) -> MatrixUnit | None:
    """AMX, where its tiles have as many columns as vectors have lanes."""
    return Amx(machine) if machine.has("amx-tile") and isa_for(machine).lanes == ROWS else None
