"""Where tile registers serve linear ops: which kernels, in which blocks, and from how many rows on.

Few rows are limited by the memory that holds the weights, and are multiplied as integers (`linear_plan`). From
`ROWS_FROM` rows on the multipliers are the limit, and tiles of bf16 have several times more of them. Both read the same
packed weights. Activations that the graph rounds to int8 are rounded to bf16 there, which keeps more of them: a
rounding in the graph says how coarse a kernel may be, not how coarse it must be. In steps of several sequences a row's
kind decides instead of the number of rows (`row_kinds`). f32 weights and activations are split
into three bf16 each, with nothing rounded away: six multiplications on tiles are still faster than one without.
"""

from __future__ import annotations

from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.linear_quantized import quantized_layout
from llmc.targets.cpu.variants import LinearPlan, Variant
from llmc.targets.kernel import Param, kernel
from llmc.targets.machine import Machine
from llmc.targets.x86.activation_tiles import Bf16Tiles
from llmc.targets.x86.isa import isa_for
from llmc.targets.x86.linear_tiles import tile_linear, workspace_bytes
from llmc.targets.x86.tiles import INPUTS, has_tiles

ROWS_FROM = 17  # measured: below, integer kernels are as fast
SPLIT_FROM = 49  # the same for f32 weights, which are six times as many products
COST, SPLIT_COST = 0.5, 0.65  # of 128 to 512 rows, as docs/adr/0006 and 0007 measured it
FEW, MANY = 128, 256  # rows of a block
NARROW, WIDEST = 4, 28  # tiles of a panel
THREADS = (2, 4, 8, 16)  # that panels are meant to share out among: how many there will be is not known here
# Inputs at a time. Where the activations of a block of rows stay in the second-level cache, long steps are best: sums
# are hardly stored and loaded again (1.3 against 1.1 TFLOPS of one core on [9728, 896]). Elsewhere short steps leave
# room for wide panels, which read the activations less often.
NEAR_STEP, FAR_STEP = 1024, 256
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


def activations(features: int, bits: int, group: int = INPUTS) -> Bf16Tiles:
    """The form of activations in front of weights of so many bits: as many bf16 as a weight becomes, whole groups."""
    return Bf16Tiles(features, -(-features // group) * group, 3 if bits == 32 else 1)


def tile_plan(
    machine: Machine,
    *,
    n: int,
    k: int,
    bits: int,
    group: int = INPUTS,
    symmetric: bool = True,
    gated: bool = False,
    activation: str = "none",
    bias: bool = False,
    residual: bool = False,
    packed: bool = False,
) -> LinearPlan:
    """y[T, features] for T >= `rows_from` from weights of 4, 8, 16 (bf16) or 32 (f32) bits; packed: y is in tiles."""
    isa = isa_for(machine)
    layout: QuantizedLayout | FloatLayout = (
        FloatLayout("f32" if bits == 32 else "bf16", isa.lanes, gated)
        if bits >= 16
        else quantized_layout(machine, bits, group, symmetric, gated)
    )
    epilogue = Epilogue(n, gated, activation, bias, residual)
    params: dict[str, Param] = {"n": n, "k": k, "bits": bits, "group": group, "symmetric": symmetric, "gated": gated}
    params |= {"activation": activation, "bias": bias, "residual": residual, "packed": packed}
    form = activations(k, bits, group)
    inputs, split = form.inputs, form.parts
    least = 2 * epilogue.tiles if packed else 2

    def variant(low: int, high: int | None, row_block: int) -> Variant:
        near = 2 * inputs * split * row_block <= machine.l2_bytes // 2
        step = _even_step(inputs, group, (NEAR_STEP if near else FAR_STEP) // split)
        far = not near and high is None
        tiles = _panel(layout.tiles(n), least) if far else max(least, NARROW)
        made = kernel(tile_linear, machine.key, **params, far=far, step=step, tiles=tiles, row_block=row_block)
        panels = -(-layout.tiles(n) // tiles)
        workspace = workspace_bytes(step, tiles, row_block, split)
        return Variant(made, form, low, high, panels, row_block, workspace=workspace)

    fused = tuple(name for name in ("bias", "residual") if params[name])
    arguments = (*layout.arrays(n, k), *fused, "out", "workspace")
    variants = (variant(rows_from(bits), FEW, FEW), variant(FEW + 1, None, MANY))
    return LinearPlan(layout, arguments, variants, "bf16", 1 if split == 1 else 6)


def _panel(all_tiles: int, multiple: int) -> int:
    """Tiles of a panel. Narrow ones share out among threads, wide ones read the activations less often."""

    def cost(tiles: int) -> float:
        panels = -(-all_tiles // tiles)
        units = 2 * panels  # of a prompt of two blocks of rows
        busy = sum(-(-units // threads) * threads / units for threads in THREADS) / len(THREADS)
        return busy * panels * tiles / all_tiles + READING / tiles

    return min(range(multiple, WIDEST + 1, multiple), key=cost)


def _even_step(inputs: int, group: int, most: int) -> int:
    """Inputs at a time: whole groups, near `most`, so that the steps are about as long as each other."""
    steps = max(1, -(-inputs // max(most, group)))
    return -(-inputs // (steps * group)) * group
