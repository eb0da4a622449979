"""Which kernels serve one linear op at every number of tokens, over one packed weight.

A `LinearPlan` is all that a lowering rule needs: the layout to pack the weight with, the kernels, for which T each one
runs, and how its work divides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.linear_float import dequantized_linear, float_linear
from llmc.targets.cpu.linear_quantized import quantized_layout, quantized_linear_blocks, quantized_linear_rows
from llmc.targets.cpu.matrix_unit import matrix_unit
from llmc.targets.cpu.vector_isa import Blocking, VectorIsa, isa_for
from llmc.targets.kernel import Kernel, Param, kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

Layout: TypeAlias = QuantizedLayout | FloatLayout

GRAIN_BYTES = 32 << 10  # about a microsecond of memory: less is not worth handing to a thread
FEW_ROWS = "xfew"  # the argument of few rows of activations, as the tiles that `MatrixUnit.float_rows` reads
LATENCY_BYTES = 64  # of weights that are multiplied in four cycles, at least: what no core reads from memory
FEW_TILES = 64  # a weight with fewer is not streamed in pairs of tiles


@dataclass(frozen=True)
class Variant:
    """One kernel and where it applies: low <= T <= high (None: no limit).

    Its work units number `panels * ceil(T / row_block)`, or just `panels` where row_block is 0 (each unit does all
    rows). grain: the fewest units worth handing to a thread. arguments: where they are not the plan's.
    """

    kernel: Kernel
    low: int
    high: int | None
    panels: int
    row_block: int
    grain: int
    arguments: tuple[str, ...] = ()

    def units(self, tokens: object) -> object:
        """Independent work units for `tokens` rows: an int, or a symbolic dim with +, * and //."""
        if not self.row_block:
            return self.panels
        return (tokens + (self.row_block - 1)) // self.row_block * self.panels  # type: ignore[operator]


@dataclass(frozen=True)
class LinearPlan:
    """How one linear op runs.

    arguments: names of the kernels' pointers in order: activations ("xq", "xscales", "xsums", or "x"; FEW_ROWS in a
    variant's own), the layout's arrays ("data", "scales", "minimums"), "bias", "residual", "out". One size: T.
    activations: what the kernels multiply, "i8" (see quantize_activations, with the weight's group), "f32" or "bf16".
    variants: their T ranges are disjoint and cover 1, 2, ...
    """

    layout: Layout
    activations: str
    arguments: tuple[str, ...]
    variants: tuple[Variant, ...]


def _streamed_blocking(isa: VectorIsa, layout: QuantizedLayout, n: int, high: int) -> Blocking:
    """For up to `high` rows: how many at once, and how many weight tiles side by side.

    Two streams keep a core's memory pipeline busier than one (a fifth, at 4 and 8 rows) and halve the activations'
    loads. A weight of few tiles keeps them apart, so that there is work for many threads.
    """
    rows = {1: 1, 4: 4}.get(high, 8)
    sums = rows * isa.sums(layout.bits, layout.group).registers
    pairs = layout.gated or (2 * sums <= isa.registers // 2 and layout.tiles(n) >= FEW_TILES)
    if pairs:
        rows = min(rows, isa.registers // 4)  # measured: 8 gated rows in 16 registers take a third longer than 4 and 4
    return Blocking(rows, 2 if pairs else 1, high)


def _streamed_floats(isa: VectorIsa, layout: Layout, rows: int) -> int:
    """Tiles side by side of a kernel for up to so many rows: two streams, if the sums leave registers for the weights.

    Measured out of cache, f32 and bf16: one row reads a third more with two than with one, and as much with four. One
    row has one sum a tile, and a sum takes one term every four cycles: short terms come in four tiles, so that this is
    no slower than the memory.
    """
    if rows == 1:
        bits = layout.bits if isinstance(layout, QuantizedLayout) else 32 if layout.dtype == "f32" else 16
        return min(4, max(2, LATENCY_BYTES * 8 // (bits * isa.lanes)))
    return 2 if layout.gated or 2 * rows <= isa.registers - 4 else 1


def quantized_linear_plan(
    machine: Machine,
    *,
    n: int,
    k: int,
    bits: int,
    group: int,
    symmetric: bool,
    gated: bool = False,
    activation: str = "none",
    bias: bool = False,
    residual: bool = False,
    activations: str = "i8",
) -> LinearPlan:
    """y[T, features] from weights of 4 or 8 bits, logical [n, k] (n = 2F when gated).

    activation: one of `vector_math.ACTIVATIONS`. activations "i8": 8-bit activations in the weight's groups; the sums
    are exact but for one f32 rounding a group. "f32" or "bf16": weights are dequantized in registers and multiplied
    with f32 activations (no machine multiplies bf16 by integers, so bf16 gains nothing and loses digits).
    """
    if activations not in ("i8", "bf16", "f32"):
        raise ValueError(f"unknown activations {activations!r}; known: i8, bf16, f32")
    isa, unit = isa_for(machine), matrix_unit(machine)
    layout = quantized_layout(machine, bits, group, symmetric, gated)
    params = _params(n, k, gated, activation, bias, residual)
    params |= {"bits": bits, "group": group, "symmetric": symmetric}
    if activations != "i8":
        return _float_plan(machine, dequantized_linear, layout, params, "f32")

    def rows(low: int, high: int) -> Variant:
        streamed = _streamed_blocking(isa, layout, n, high)
        made = kernel(quantized_linear_rows, machine.key, **vars(streamed), **params)
        return _rows_variant(made, layout, low, high, streamed.tiles)

    def several(low: int, high: int) -> Variant:
        found = None if unit is None else unit.quantized_rows(high, params)
        return rows(low, high) if found is None else _rows_variant(found.kernel, layout, low, high, found.tiles)

    blocking = isa.quantized_blocks
    made = kernel(quantized_linear_blocks, machine.key, **vars(blocking), **params)
    variants = (rows(1, 1), rows(2, 4), several(5, 8), several(9, 16), _blocks_variant(made, layout, blocking, 17))
    return LinearPlan(layout, "i8", _arguments(("xq", "xscales", "xsums"), layout, params), variants)


def float_linear_plan(
    machine: Machine,
    *,
    n: int,
    k: int,
    dtype: str,
    gated: bool = False,
    activation: str = "none",
    bias: bool = False,
    residual: bool = False,
    activations: str = "f32",
    in_company: bool = False,
) -> LinearPlan:
    """y[T, features] from weights of dtype "f32", "f16" or "bf16", logical [n, k] (n = 2F when gated).

    activations "bf16" asks for products of bf16 pairs; the plan says "f32" where weights or machine do not do that.
    in_company: every number of rows has the same bits in a row; else only where that costs nothing.
    """
    if activations not in ("bf16", "f32"):
        raise ValueError(f"unknown activations {activations!r} for float weights; known: bf16, f32")
    isa = isa_for(machine)
    pairs = activations == "bf16" and dtype == "bf16" and isa.bf16_dots is not None
    params = _params(n, k, gated, activation, bias, residual) | {"dtype": dtype, "pairs": pairs}
    layout = FloatLayout(dtype, isa.lanes, gated)
    return _float_plan(machine, float_linear, layout, params, "bf16" if pairs else "f32", in_company)


def _float_plan(
    machine: Machine,
    template: Callable[..., PrimFunc],
    layout: Layout,
    params: dict[str, Param],
    activations: str,
    in_company: bool = False,
) -> LinearPlan:
    """Few rows stream the weight: through the matrix unit, if it is of bf16, else through vector registers."""
    isa, unit = isa_for(machine), matrix_unit(machine)
    arguments = _arguments(("x",), layout, params)

    def rows(low: int, high: int) -> Variant:
        tiles = _streamed_floats(isa, layout, high)
        made = kernel(template, machine.key, rows=high, tiles=tiles, **params)
        return _rows_variant(made, layout, low, high, tiles)

    on_unit = None
    if unit is not None and params.get("dtype") == "bf16" and activations == "f32":
        on_unit = unit.float_rows(params)
    few: tuple[Variant, ...]
    if on_unit is not None:
        on_tiles = (FEW_ROWS, *arguments[1:])
        if in_company:  # the matrix unit adds up in another order than vectors
            every = _rows_variant(on_unit.kernel, layout, 1, None, on_unit.tiles)
            return LinearPlan(layout, activations, arguments, (replace(every, arguments=on_tiles),))
        several = _rows_variant(on_unit.kernel, layout, 2, on_unit.rows, on_unit.tiles)
        few = (rows(1, 1), replace(several, arguments=on_tiles))
    else:
        bounds = (0, 1, 4, 8, 12) if isa.registers >= 32 else (0, 1, 4, 6, 8)
        few = tuple(rows(low + 1, high) for low, high in itertools.pairwise(bounds))
    most = few[-1].high
    assert most is not None
    blocking = isa.float_blocks
    blocks = kernel(template, machine.key, **vars(blocking), **params)
    variants = (*few, _blocks_variant(blocks, layout, blocking, most + 1))
    return LinearPlan(layout, activations, arguments, variants)


def _params(n: int, k: int, gated: bool, activation: str, bias: bool, residual: bool) -> dict[str, Param]:
    Epilogue(n, gated, activation, bias, residual)  # refuses what does not fit together
    return {"n": n, "k": k, "gated": gated, "activation": activation, "bias": bias, "residual": residual}


def _arguments(inputs: tuple[str, ...], layout: Layout, params: dict[str, Param]) -> tuple[str, ...]:
    fused = (name for name in ("bias", "residual") if params[name])
    return (*inputs, *layout.arrays(*_size_in(params)), *fused, "out")


def _size(made: Kernel) -> tuple[int, int]:
    return _size_in(dict(made.params))


def _size_in(params: dict[str, Param]) -> tuple[int, int]:
    n, k = params["n"], params["k"]
    assert isinstance(n, int)
    assert isinstance(k, int)
    return n, k


def _rows_variant(made: Kernel, layout: Layout, low: int, high: int | None, tiles: int = 0) -> Variant:
    """A kernel whose every unit streams its share of the weight: `tiles` tiles, by default those of one result."""
    n, k = _size(made)
    units = -(-layout.tiles(n) // (tiles or (2 if layout.gated else 1)))
    return Variant(made, low, high, units, 0, max(1, GRAIN_BYTES * units // layout.nbytes(n, k)))


def _blocks_variant(made: Kernel, layout: Layout, blocking: Blocking, low: int) -> Variant:
    """A prefill kernel: units are large, so that each is worth a thread."""
    return Variant(made, low, None, -(-layout.tiles(_size(made)[0]) // blocking.tiles), blocking.row_block, 1)
