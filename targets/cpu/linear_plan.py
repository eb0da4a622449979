"""Which kernels serve one linear op at every number of tokens, over one packed weight.

A `LinearPlan` is all that a lowering rule needs: the layout to pack the weight with, the kernels, for which T each one
runs, the forms that they read activations in, and how their work divides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmc.targets.cpu.forms import Bf16Pairs, integer_groups
from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.linear_float import dequantized_linear, float_linear
from llmc.targets.cpu.linear_quantized import quantized_layout, quantized_linear_blocks, quantized_linear_rows
from llmc.targets.cpu.matrix_unit import matrix_unit
from llmc.targets.cpu.variants import Layout, LinearPlan, Variant
from llmc.targets.cpu.vector_isa import Blocking, VectorIsa, isa_for
from llmc.targets.forms import Form, OwnRows
from llmc.targets.kernel import Kernel, Param, kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

GRAIN_BYTES = 32 << 10  # about a microsecond of memory: less is not worth handing to a thread
LATENCY_BYTES = 64  # of weights that are multiplied in four cycles, at least: what no core reads from memory
FEW_TILES = 64  # a weight with fewer is not streamed in pairs of tiles


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
        return _float_plan(machine, dequantized_linear, layout, params, OwnRows(k))
    form = integer_groups(machine, k, group)

    def rows(low: int, high: int) -> Variant:
        streamed = _streamed_blocking(isa, layout, n, high)
        made = kernel(quantized_linear_rows, machine.key, **vars(streamed), **params)
        return _rows_variant(made, form, layout, low, high, streamed.tiles)

    def several(low: int, high: int) -> Variant:
        found = None if unit is None else unit.quantized_rows(high, params)
        return rows(low, high) if found is None else _rows_variant(found.kernel, form, layout, low, high, found.tiles)

    blocking = isa.quantized_blocks
    made = kernel(quantized_linear_blocks, machine.key, **vars(blocking), **params)
    blocks = _blocks_variant(made, form, layout, blocking, 17)
    variants = (rows(1, 1), rows(2, 4), several(5, 8), several(9, 16), blocks)
    return LinearPlan(layout, _arguments(layout, params), variants, "int8")


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

    activations "bf16" asks for products of bf16 pairs; they are f32 where weights or machine do not do that.
    in_company: every number of rows has the same bits in a row; else only where that costs nothing.
    """
    if activations not in ("bf16", "f32"):
        raise ValueError(f"unknown activations {activations!r} for float weights; known: bf16, f32")
    isa = isa_for(machine)
    pairs = activations == "bf16" and dtype == "bf16" and isa.bf16_dots is not None
    params = _params(n, k, gated, activation, bias, residual) | {"dtype": dtype, "pairs": pairs}
    layout = FloatLayout(dtype, isa.lanes, gated)
    return _float_plan(machine, float_linear, layout, params, Bf16Pairs(k) if pairs else OwnRows(k), in_company)


def _float_plan(
    machine: Machine,
    template: Callable[..., PrimFunc],
    layout: Layout,
    params: dict[str, Param],
    form: Form,
    in_company: bool = False,
) -> LinearPlan:
    """Few rows stream the weight: through the matrix unit, if it is of bf16, else through vector registers."""
    isa, unit = isa_for(machine), matrix_unit(machine)

    def plan(*variants: Variant) -> LinearPlan:
        arithmetic = "bf16" if isinstance(form, Bf16Pairs) else "f32"
        return LinearPlan(layout, _arguments(layout, params), variants, arithmetic)

    def rows(low: int, high: int) -> Variant:
        tiles = _streamed_floats(isa, layout, high)
        made = kernel(template, machine.key, rows=high, tiles=tiles, **params)
        return _rows_variant(made, form, layout, low, high, tiles)

    on_unit = None
    if unit is not None and params.get("dtype") == "bf16" and isinstance(form, OwnRows):
        on_unit = unit.float_rows(params)
    few: tuple[Variant, ...]
    if on_unit is not None:
        read = on_unit.form or form
        if in_company:  # the matrix unit adds up in another order than vectors
            return plan(_rows_variant(on_unit.kernel, read, layout, 1, None, on_unit.tiles))
        few = rows(1, 1), _rows_variant(on_unit.kernel, read, layout, 2, on_unit.rows, on_unit.tiles)
    else:
        bounds = (0, 1, 4, 8, 12) if isa.registers >= 32 else (0, 1, 4, 6, 8)
        few = tuple(rows(low + 1, high) for low, high in itertools.pairwise(bounds))
    most = few[-1].high
    assert most is not None
    blocking = isa.float_blocks
    blocks = kernel(template, machine.key, **vars(blocking), **params)
    return plan(*few, _blocks_variant(blocks, form, layout, blocking, most + 1))


def _params(n: int, k: int, gated: bool, activation: str, bias: bool, residual: bool) -> dict[str, Param]:
    Epilogue(n, gated, activation, bias, residual)  # refuses what does not fit together
    return {"n": n, "k": k, "gated": gated, "activation": activation, "bias": bias, "residual": residual}


def _arguments(layout: Layout, params: dict[str, Param]) -> tuple[str, ...]:
    fused = (name for name in ("bias", "residual") if params[name])
    return (*layout.arrays(*_size_in(params)), *fused, "out")


def _size(made: Kernel) -> tuple[int, int]:
    return _size_in(dict(made.params))


def _size_in(params: dict[str, Param]) -> tuple[int, int]:
    n, k = params["n"], params["k"]
    assert isinstance(n, int)
    assert isinstance(k, int)
    return n, k


def _rows_variant(made: Kernel, form: Form, layout: Layout, low: int, high: int | None, tiles: int) -> Variant:
    """A kernel whose every unit streams its share of the weight, `tiles` tiles."""
    n, k = _size(made)
    units = -(-layout.tiles(n) // tiles)
    return Variant(made, form, low, high, units, 0, max(1, GRAIN_BYTES * units // layout.nbytes(n, k)))


def _blocks_variant(made: Kernel, form: Form, layout: Layout, blocking: Blocking, low: int) -> Variant:
    """A prefill kernel: units are large, so that each is worth a thread."""
    panels = -(-layout.tiles(_size(made)[0]) // blocking.tiles)
    return Variant(made, form, low, None, panels, blocking.row_block)
