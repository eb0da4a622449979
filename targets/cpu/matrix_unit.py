"""A unit that multiplies whole matrices, beside the vector unit: what rules and plans ask it, and what it answers.

An architecture that has one gives a `MatrixUnit`; where there is none, everything runs on vectors. It has forms of its
own for activations, whatever they are rounded to in the graph: that says how coarse a kernel may be.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.limits import LimitKernel
from llmc.targets.cpu.linear_problem import FloatProblem, ManyRowsProblem, QuantizedProblem
from llmc.targets.cpu.variants import LinearPlan
from llmc.targets.forms import Converted, Form
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser, Template


@dataclass(frozen=True)
class FewRows:
    """A kernel that streams a weight for up to `rows` rows at a time, `tiles` weight tiles a unit of work.

    least: bytes of weights that are worth a thread. form: how it reads activations; None: as kernels on vectors do.
    """

    kernel: Kernel
    rows: int
    tiles: int
    least: int
    form: Form | None = None


class MatrixUnit(Protocol):
    """The matrix unit of one machine.

    Linear ops of many rows run on it where `activations` is a form; what is said of `rows_from`, `cost`, `result` and
    `plan` holds then. `bits` is of a weight: 4, 8, 16 (bf16), 32 (f32). `group`: the inputs that share a scale.
    """

    def activations(self, features: int, bits: int, group: int | None) -> Form | None:
        """The form that it reads activations in, in front of such weights; None where it has no kernel for them."""

    def result(self, features: int, bits: int) -> Converted | None:
        """The form that it can write results in, instead of f32."""

    def rows_from(self, bits: int) -> int:
        """Rows from which on it is faster than vectors."""

    def cost(self, bits: int) -> float:
        """Time that many rows take, against kernels on vectors: less than 1."""

    def plan(self, chooser: Chooser, problem: ManyRowsProblem) -> LinearPlan:
        """y[T, features] for T >= `rows_from`."""

    def quantized_rows(self, chooser: Chooser, problem: QuantizedProblem, rows: int) -> FewRows | None:
        """For integer activations and weights of up to `rows` rows; same arguments as `QuantizedRows`."""

    def float_rows(self, chooser: Chooser, problem: FloatProblem) -> FewRows | None:
        """For bf16 weights and f32 activations, as exact as in f32."""

    def attention(self, value_dim: int, cache_dtype: str) -> type[Template[AttentionProblem]] | None:
        """A template of attention that multiplies bf16; its kernels have one more size, behind S: PROMPT, 1 where the
        step's rows are those of prompts or texts that are encoded, and 0 where they decode."""

    def limits(self) -> list[LimitKernel]:
        """What it multiplies at most, as kernels."""


def matrix_unit(machine: Machine) -> MatrixUnit | None:
    """The machine's matrix unit, if it has one: its architecture's folder knows."""
    found: MatrixUnit | None = importlib.import_module(f"llmc.targets.{machine.arch}.target").matrix_unit(machine)
    return found
