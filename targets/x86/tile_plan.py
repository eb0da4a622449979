"""Where tile registers serve linear ops: which kernels, in which blocks, and from how many rows on.

Few rows are limited by the memory that holds the weights, and are multiplied as integers (`linear_plan`). From
`ROWS_FROM` rows on the multipliers are the limit, and tiles of bf16 have several times more of them. Both read the same
packed weights. Activations that the graph rounds to int8 are rounded to bf16 there, which keeps more of them: a
rounding in the graph says how coarse a kernel may be, not how coarse it must be. In steps of several sequences a row's
kind decides instead of the number of rows (`row_kinds`). f32 weights and activations are split
into three bf16 each, with nothing rounded away: six multiplications on tiles are still faster than one without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu.cpu_template import CpuTemplate
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.linear_problem import ManyRowsProblem, chosen
from llmc.targets.cpu.variants import LinearPlan, Variant
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Chooser, Rows, knob
from llmc.targets.x86.activation_tiles import PAIRED_ROWS, Bf16Tiles
from llmc.targets.x86.isa import isa_for
from llmc.targets.x86.linear_tiles import PAIR, TileWork, tile_linear
from llmc.targets.x86.tile_weights import Float, Quantized, Single, Source
from llmc.targets.x86.tiles import INPUTS, has_tiles

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

ROWS_FROM = 17  # measured: below, integer kernels are as fast
SPLIT_FROM = 49  # the same for f32 weights, which are six times as many products
COST, SPLIT_COST = 0.5, 0.65  # of 128 to 512 rows, as docs/adr/0006 and 0007 measured it
FEW, MANY = 128, 256  # rows of a unit, as far as there are so many
NARROW, WIDEST = 4, 28  # tiles of a panel
THREADS = (2, 4, 8, 16)  # that panels are meant to share out among: how many there will be is not known here
# Inputs at a time. Where the activations of a block of rows stay in the second-level cache, many are best: sums are
# hardly stored and loaded again (1.3 against 1.1 TFLOPS of one core on [9728, 896]). Elsewhere few leave room for wide
# panels, which read the activations less often.
NEAR_DEPTH, FAR_DEPTH = 1024, 256
READING = 4.0  # what reading the activations costs a panel of one tile, as a part of multiplying it


def usable(machine: Machine) -> bool:
    """Whether linear ops run on tiles here."""
    return has_tiles(machine, "bf16") and isa_for(machine).lanes == 16 and isa_for(machine).bf16_dots is not None


def rows_from(bits: int) -> int:
    """Rows from which on tiles serve weights of so many bits."""
    return SPLIT_FROM if bits == 32 else ROWS_FROM


def cost(bits: int) -> float:
    """Time that many rows take, against kernels on vectors."""
    return SPLIT_COST if bits == 32 else COST


def section_of(features: int, group: int) -> int:
    """Inputs of whole groups (0: none) that fill tiles; 0 where groups of a weight of so many inputs do not."""
    if group * 2 == INPUTS and -(-features // group) % 2 == 0:
        return INPUTS
    return (group or INPUTS) if group % INPUTS == 0 else 0


def activations(features: int, bits: int, group: int = INPUTS) -> Bf16Tiles:
    """The form of activations in front of weights of so many bits: as many bf16 as a weight becomes, whole sections."""
    return Bf16Tiles(features, -(-features // group) * group, 3 if bits == 32 else 1)


def form_of(problem: ManyRowsProblem) -> Bf16Tiles:
    """How its kernels read activations."""
    return activations(problem.k, problem.bits, section_of(problem.k, problem.group) or INPUTS)


@dataclass(frozen=True)
class TileLinear(CpuTemplate[ManyRowsProblem], name="tile_linear"):
    """See `linear_tiles`. A unit is `row_block` rows by a panel of `tiles` weight tiles. depth: inputs that a panel
    holds at a time, at most: whole groups, and a third of it where each becomes three parts. far: 1 where the
    activations of a block of rows do not stay in the second-level cache, and are asked for ahead of their use."""

    tiles: int = knob(*range(2, WIDEST + 1, 2))
    row_block: int = knob(32, 64, FEW, MANY, 512)
    depth: int = knob(128, FAR_DEPTH, 512, NEAR_DEPTH, 2048)
    far: int = knob(0, 1)

    @classmethod
    def default(cls, problem: ManyRowsProblem, machine: Machine, rows: Rows = ANY_ROWS) -> TileLinear:
        form, high = form_of(problem), rows[1]
        row_block = FEW if high is not None and high <= FEW else MANY
        near = 2 * form.inputs * form.parts * row_block <= machine.l2_bytes // 2
        far = not near and high is None
        multiple = _panel_multiple(problem)
        tiles = _panel(problem.layout(machine).tiles(problem.n), multiple) if far else max(multiple, NARROW)
        return cls(tiles, row_block, NEAR_DEPTH if near else FAR_DEPTH, int(far))

    def refuse(self, problem: ManyRowsProblem, machine: Machine) -> str:
        if not usable(machine):
            return f"{machine.name} has no tile registers for bf16, as wide as its vectors"
        if not section_of(problem.k, problem.group):
            return f"{problem.k} inputs in groups of {problem.group} are no whole number of {INPUTS}"
        if problem.packed and problem.epilogue.features % INPUTS:
            return f"{problem.epilogue.features} features do not fill tiles of {INPUTS}"
        if self.tiles % _panel_multiple(problem):
            return f"panels of {self.tiles} weight tiles have no whole number of tiles of results"
        if self.row_block % PAIRED_ROWS:
            return f"{self.row_block} rows are no whole number of {PAIRED_ROWS}"
        return super().refuse(problem, machine)

    def work(self, problem: ManyRowsProblem, machine: Machine) -> TileWork:
        """What the kernel does."""
        isa, form = isa_for(machine), form_of(problem)
        source: Source
        layout = problem.layout(machine)
        if isinstance(layout, QuantizedLayout):
            source = Quantized(isa, layout, problem.k)
        else:
            source = Single(isa, problem.k) if problem.bits == 32 else Float(isa, problem.k)
        depth = _even_depth(form.inputs, section_of(problem.k, problem.group), self.depth // form.parts)
        return TileWork(
            isa=isa,
            epilogue=problem.epilogue,
            source=source,
            all_tiles=layout.tiles(problem.n),
            depth=min(depth, form.inputs),
            tiles=self.tiles,
            row_block=self.row_block,
            packed=problem.packed,
            far=bool(self.far),
        )

    def build(self, problem: ManyRowsProblem, machine: Machine) -> PrimFunc:
        return tile_linear(self.work(problem, machine))


def _panel_multiple(problem: ManyRowsProblem) -> int:
    """Weight tiles of a panel are a multiple: pairs, and of packed results whole tiles."""
    return PAIR * problem.epilogue.tiles if problem.packed else PAIR


def tile_plan(chooser: Chooser, problem: ManyRowsProblem) -> LinearPlan:
    """y[T, features] for T >= `rows_from` from weights of 4, 8, 16 (bf16) or 32 (f32) bits."""
    machine, form, layout = chooser.machine, form_of(problem), problem.layout(chooser.machine)

    def variant(low: int, high: int | None) -> Variant:
        member = chosen(chooser, TileLinear, problem, (low, high))
        panels, workspace = -(-layout.tiles(problem.n) // member.tiles), member.work(problem, machine).workspace_bytes
        made = member.kernel(problem, machine)
        return Variant(made, form, low, high, panels, member.row_block, workspace=workspace)

    fused = tuple(name for name in ("bias", "residual") if getattr(problem, name))
    arguments = (*layout.arrays(problem.n, problem.k), *fused, "out", "workspace")
    variants = (variant(rows_from(problem.bits), FEW), variant(FEW + 1, None))
    return LinearPlan(layout, arguments, variants, "bf16", 1 if form.parts == 1 else 6)


def _panel(all_tiles: int, multiple: int) -> int:
    """Tiles of a panel. Narrow ones share out among threads, wide ones read the activations less often."""

    def cost(tiles: int) -> float:
        panels = -(-all_tiles // tiles)
        units = 2 * panels  # of a prompt of two blocks of rows
        busy = sum(-(-units // threads) * threads / units for threads in THREADS) / len(THREADS)
        return busy * panels * tiles / all_tiles + READING / tiles

    return min(range(multiple, WIDEST + 1, multiple), key=cost)


def _even_depth(inputs: int, group: int, most: int) -> int:
    """Inputs at a time: whole groups, near `most`, so that each time there are about as many."""
    times = max(1, -(-inputs // max(most, group)))
    return -(-inputs // (times * group)) * group
