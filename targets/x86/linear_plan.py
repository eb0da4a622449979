"""Which kernels serve one linear op at every number of tokens, over one packed weight.

A `LinearPlan` is all that a lowering rule needs: the layout to pack the weight with, the kernels, for which T each one
runs, and how its work divides.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.targets.kernel import Kernel, Param, kernel
from llmc.targets.machine import Machine
from llmc.targets.x86.isa import VectorIsa, isa_for
from llmc.targets.x86.layouts import FloatLayout, QuantizedLayout
from llmc.targets.x86.linear_epilogue import Epilogue
from llmc.targets.x86.linear_quantized import quantized_layout, quantized_linear_blocks, quantized_linear_rows

GRAIN_BYTES = 32 << 10  # about a microsecond of memory: less is not worth handing to a thread


@dataclass(frozen=True)
class Variant:
    """One kernel and where it applies: low <= T <= high (None: no limit).

    Its work units number `panels * ceil(T / row_block)`, or just `panels` where row_block is 0 (each unit does all
    rows). grain: the fewest units worth handing to a thread.
    """

    kernel: Kernel
    low: int
    high: int | None
    panels: int
    row_block: int
    grain: int

    def units(self, tokens: object) -> object:
        """Independent work units for `tokens` rows: an int, or a symbolic dim with +, * and //."""
        if not self.row_block:
            return self.panels
        return (tokens + (self.row_block - 1)) // self.row_block * self.panels  # type: ignore[operator]


@dataclass(frozen=True)
class LinearPlan:
    """How one linear op runs.

    arguments: names of the kernels' pointers, the same for every variant, in order: activations ("xq", "xscales",
    "xsums", or "x"), the layout's arrays ("data", "scales", "minimums"), "bias", "residual", "out". One size: T.
    activations: what the kernels multiply, "i8" (see quantize_activations, with the weight's group), "f32" or "bf16".
    variants: their T ranges are disjoint and cover 1, 2, ...
    """

    layout: QuantizedLayout | FloatLayout
    activations: str
    arguments: tuple[str, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class _Blocking:
    """Register and cache blocking of the prefill kernels."""

    rows: int
    tiles: int
    row_block: int


def _quantized_blocking(isa: VectorIsa) -> _Blocking:
    """rows x tiles integer sums, `tiles` weight vectors and one activation have to fit the registers."""
    if isa.lanes == 16:
        return _Blocking(6, 4, 96)
    return _Blocking(4, 2, 64)


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
) -> LinearPlan:
    """y[T, features] from 8-bit activations and weights of 4 or 8 bits, logical [n, k] (n = 2F when gated).

    activation: one of `vector_math.ACTIVATIONS`. The sums are exact but for one f32 rounding a group.
    """
    isa = isa_for(machine)
    layout = quantized_layout(machine, bits, group, symmetric, gated)
    epilogue = Epilogue(n, gated, activation, bias, residual)
    params: dict[str, Param] = {
        "n": n,
        "k": k,
        "bits": bits,
        "group": group,
        "symmetric": symmetric,
        "gated": gated,
        "activation": activation,
        "bias": bias,
        "residual": residual,
    }

    def rows(count: int, low: int, high: int) -> Variant:
        made = kernel(quantized_linear_rows, machine.key, rows=count, **params)
        return _rows_variant(made, low, high, epilogue.columns(isa.lanes), layout.nbytes(n, k))

    blocking = _quantized_blocking(isa)
    made = kernel(quantized_linear_blocks, machine.key, **vars(blocking), **params)
    blocks = Variant(made, 17, None, -(-layout.tiles(n) // blocking.tiles), blocking.row_block, 1)
    arguments = ("xq", "xscales", "xsums", *layout.arrays(n, k), *(name for name, _ in epilogue.pointers()))
    variants = (rows(1, 1, 1), rows(4, 2, 4), rows(8, 5, 16), blocks)
    return LinearPlan(layout, "i8", arguments, variants)


def _rows_variant(made: Kernel, low: int, high: int, columns: int, nbytes: int) -> Variant:
    """A variant that streams the weight: `columns` units over `nbytes`."""
    return Variant(made, low, high, columns, 0, max(1, GRAIN_BYTES * columns // max(1, nbytes)))
