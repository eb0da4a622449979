"""A unit that multiplies whole matrices, beside the vector unit: what rules and plans ask it, and what it answers.

An architecture that has one gives a `MatrixUnit`; where there is none, everything runs on vectors. Its activations lie
in *tiles* of bf16, whatever they are to the graph: a rounding in the graph says how coarse a kernel may be.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from llmc.compiler.ir.dims import Dim
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.limits import LimitKernel
from llmc.targets.kernel import Kernel, Param
from llmc.targets.machine import Machine
from llmc.targets.template import Template


@dataclass(frozen=True)
class TileVariant:
    """A kernel for low <= T <= high (None: no limit); see `linear_plan.Variant`."""

    kernel: Kernel
    low: int
    high: int | None
    panels: int
    row_block: int
    workspace: int

    def units(self, tokens: object) -> object:
        """Independent work units for `tokens` rows: an int, or a symbolic dim with +, * and //."""
        return (tokens + (self.row_block - 1)) // self.row_block * self.panels  # type: ignore[operator]


@dataclass(frozen=True)
class TilePlan:
    """One linear op of many rows. arguments: names of the pointers, in order, "xtiles" first, "workspace" last.

    inputs: columns of the activations' tiles. split: bf16 that an activation and a weight become. products: how many of
    bf16 that makes for each of theirs.
    """

    layout: QuantizedLayout | FloatLayout
    arguments: tuple[str, ...]
    inputs: int
    split: int
    products: int
    variants: tuple[TileVariant, ...]


@dataclass(frozen=True)
class FewRows:
    """A kernel that streams a weight for up to `rows` rows at a time, `tiles` weight tiles a unit of work."""

    kernel: Kernel
    rows: int
    tiles: int


class MatrixUnit(Protocol):
    """The matrix unit of one machine."""

    @property
    def inputs(self) -> int:
        """Inputs of a tile: columns of activations are padded to a multiple."""

    @property
    def few_split(self) -> int:
        """bf16 that an activation becomes for `float_rows`."""

    @property
    def serves_many(self) -> bool:
        """Whether linear ops of many rows run on it: what is said of `rows_from`, `split_of`, `plan` holds then."""

    def rows_from(self, bits: int) -> int:
        """Rows from which on it serves weights of so many bits: 4, 8, 16 (bf16), 32 (f32)."""

    def split_of(self, bits: int) -> int:
        """bf16 that stand for one activation in front of weights of so many bits."""

    def plan(self, *, n: int, k: int, bits: int, packed: bool, **facts: object) -> TilePlan:
        """y[T, features] for T >= `rows_from`. packed: y is in tiles. facts: group and symmetric of an encoding, gated,
        activation, bias, residual."""

    def elements(self, rows: int | Dim, inputs: int, split: int = 1) -> int | Dim:
        """bf16 in the tiles of `rows` rows of `inputs` (a multiple of the unit's) activations."""

    def activations(self, *, k: int, inputs: int, **facts: Param) -> Kernel:
        """f32 rows to tiles: (x, what a norm reads, tiles). facts: the norm's parameters, as `quantize_activations` has
        them; parts: bf16 an activation, where not 1."""

    def quantized_rows(self, rows: int, params: Mapping[str, Param]) -> FewRows | None:
        """For integer activations and weights of up to `rows` rows; same arguments as `quantized_linear_rows`."""

    def float_rows(self, params: Mapping[str, Param]) -> FewRows | None:
        """For bf16 weights and f32 activations, which lie in tiles of `few_split` parts."""

    def attention(self, value_dim: int, cache_dtype: str) -> type[Template[AttentionProblem]] | None:
        """A template of attention that multiplies bf16; its kernels have one more size, behind S: PROMPT, 1 where the
        step's rows are those of prompts or texts that are encoded, and 0 where they decode."""

    def limits(self) -> list[LimitKernel]:
        """What it multiplies at most, as kernels."""


def matrix_unit(machine: Machine) -> MatrixUnit | None:
    """The machine's matrix unit, if it has one: its architecture's folder knows."""
    found: MatrixUnit | None = importlib.import_module(f"llmc.targets.{machine.arch}.target").matrix_unit(machine)
    return found


def many_rows_unit(machine: Machine) -> MatrixUnit | None:
    """The matrix unit, where it serves linear ops of many rows."""
    unit = matrix_unit(machine)
    return unit if unit is not None and unit.serves_many else None
