"""What linear kernels compute: sizes, weights, and what is fused behind the sums."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.errors import CompileError
from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.tile_slices import slices_of
from llmc.targets.cpu.vector_isa import Blocking, isa_for, weight_tiles
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Chooser, Problem, Rows, T


@dataclass(frozen=True, kw_only=True)
class LinearProblem(Problem):
    """A weight of n output rows (2F when gated) by k inputs. Kernels take pointers to activations, the weight's arrays,
    bias f32 [n] if any, residual f32 [T, features] if any, and out f32 [T, features]; then T, begin, end. What is
    fused: see `Epilogue`. ValueError where it does not fit together."""

    n: int
    k: int
    gated: bool = False
    activation: str = "none"
    bias: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        _ = self.epilogue

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.n, self.gated, self.activation, self.bias, self.residual)


@dataclass(frozen=True, kw_only=True)
class QuantizedProblem(LinearProblem):
    """Weights of 2 to 6 or 8 bits in groups along the inputs. table: they stand for levels of a table. in_steps: their
    minimums count steps of the scale. per_row: the groups of a row share one scale."""

    bits: int
    group: int
    symmetric: bool
    table: bool = False
    in_steps: bool = False
    per_row: bool = False

    def layout(self, machine: Machine) -> QuantizedLayout:
        """How the weight lies on this machine."""
        tiles = weight_tiles(machine)
        return tiles.quantized(
            self.bits, self.group, self.symmetric, self.table, self.gated, self.in_steps, self.per_row
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FloatProblem(LinearProblem):
    """Weights of `dtype` "f32", "f16" or "bf16". pairs: activations are bf16, and pairs of them are multiplied with
    pairs of bf16 weights."""

    dtype: str
    pairs: bool = False

    def layout(self, machine: Machine) -> FloatLayout:
        """How the weight lies on this machine."""
        return weight_tiles(machine).floats(self.dtype, self.gated)


@dataclass(frozen=True, kw_only=True)
class ManyRowsProblem(LinearProblem):
    """For a matrix unit: weights of 2 to 6 or 8 bits in groups, of 16 (bf16) or of 32 (f32), which have no group.

    packed: the result is in the unit's own form (`MatrixUnit.result`) instead of f32.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    table: bool = False
    in_steps: bool = False
    per_row: bool = False
    packed: bool = False

    def layout(self, machine: Machine) -> QuantizedLayout | FloatLayout:
        """How the weight lies on this machine."""
        tiles = weight_tiles(machine)
        if self.bits < 16:
            return tiles.quantized(
            self.bits, self.group, self.symmetric, self.table, self.gated, self.in_steps, self.per_row
        )  # fmt: skip
        return tiles.floats("f32" if self.bits == 32 else "bf16", self.gated)


def chosen(chooser: Chooser, template: type[T], problem: Problem, rows: Rows = ANY_ROWS) -> T:
    """How to write a kernel that a linear op cannot do without. CompileError where it cannot be."""
    found = chooser.choose(template, problem, rows)
    if isinstance(found, str):
        sizes = " by ".join(str(problem.params()[name]) for name in ("n", "k") if name in problem.params())
        raise CompileError(
            f"kernel {template.name} of {sizes} {found}: the layer is too wide for it. Give that layer another scheme "
            "(--override), or larger groups (--group-size)"
        )
    return found


def panel_tiles(problem: QuantizedProblem | FloatProblem, machine: Machine, blocks: Blocking) -> int:
    """Tiles of a panel, whose slices are multiplied as many at once as `blocks` says: gate and up, at least."""
    each = slices_of(isa_for(machine), problem.layout(machine))
    return max(problem.epilogue.tiles, blocks.slices // each)


def refuse_blocks(
    problem: QuantizedProblem | FloatProblem, machine: Machine, rows: int, tiles: int, slices: int, row_block: int
) -> str:
    """Why no unit of a kernel can have `tiles` tiles and `row_block` rows, of which `rows` rows by `slices` slices are
    multiplied at once; empty: it can."""
    if row_block % rows:
        return f"{row_block} rows are no whole number of blocks of {rows}"
    if tiles % problem.epilogue.tiles:
        return f"{tiles} tiles at a time have no whole pairs of gate and up"
    have = tiles * slices_of(isa_for(machine), problem.layout(machine))
    if have % slices:
        return f"{have} slices of tiles are no whole number of {slices} at once"
    return ""
