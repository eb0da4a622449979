"""The kernels of one linear op: which numbers of rows each serves, and in which form it reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.forms import Form
from llmc.targets.kernel import Kernel

Layout: TypeAlias = QuantizedLayout | FloatLayout


@dataclass(frozen=True)
class Variant:
    """One kernel and where it applies: low <= T <= high (None: no limit).

    form: how it reads activations. Its work units number `panels * ceil(T / row_block)`, or just `panels` where
    row_block is 0 (each unit does all rows). grain: the fewest units worth handing to a thread. workspace: bytes that
    each thread needs. columns: of the result, that a unit computes, u * columns and the next ones, fewer at the end;
    0 where units are otherwise.
    """

    kernel: Kernel
    form: Form
    low: int
    high: int | None
    panels: int
    row_block: int
    grain: int = 1
    workspace: int = 0
    columns: int = 0

    def units(self, tokens: object) -> object:
        """Independent work units for `tokens` rows: an int, or a symbolic dim with +, * and //."""
        if not self.row_block:
            return self.panels
        return (tokens + (self.row_block - 1)) // self.row_block * self.panels  # type: ignore[operator]


@dataclass(frozen=True)
class LinearPlan:
    """How one linear op runs, over one packed weight.

    arguments: names of the kernels' pointers behind the buffers of the form, in order: the layout's arrays ("data",
    "scales", "minimums"), "bias", "residual", "out", "workspace". One size: T. variants: their T ranges are disjoint,
    and cover all from the first one's `low` on. arithmetic: what is multiplied, as `Call` counts it. products: how many
    products an activation and a weight make.
    """

    layout: Layout
    arguments: tuple[str, ...]
    variants: tuple[Variant, ...]
    arithmetic: str
    products: int = 1

    def names(self, variant: Variant) -> tuple[str, ...]:
        """All pointers of a variant's kernel, in order."""
        return (*(buffer.name for buffer in variant.form.buffers(1)), *self.arguments)
