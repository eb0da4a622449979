"""How activations lie between ops: forms, each with its buffers and its meaning in numpy.

A *form* says where the numbers of an activation's rows lie, and how exactly they are kept. Most activations lie in
their own buffer, f32 row by row. Where what reads them wants otherwise (bytes with scales, bf16 in tiles), somebody
writes them so too, or instead: `agreement` decides who, and for which rows.

Forms that all CPUs share are in `cpu/forms.py`; an architecture, or another kind of machine, has its own beside the
kernels that read them, and no other file names them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from llmc.compiler.ir.dims import Dim, product
from llmc.targets.kernel import Kernel
from llmc.targets.template import Chooser

RowCount: TypeAlias = int | Dim
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Buffer:
    """One array of a form, C-contiguous, aligned as all that kernels are given. dtype: numpy's name."""

    name: str
    dtype: str
    shape: tuple[RowCount, ...]

    @property
    def elements(self) -> RowCount:
        return product(self.shape)

    def empty(self) -> Array:
        """Room for it, of a known shape. Zeros."""
        return np.zeros([int(size) for size in self.shape if isinstance(size, int)], self.dtype)


@dataclass(frozen=True)
class Form(ABC):
    """How rows of `features` activations lie. Equal forms are the same bytes for the same numbers.

    Rows are independent of each other: a row's bytes follow from the row, and what is at other rows changes none.
    """

    features: int

    @property
    @abstractmethod
    def name(self) -> str:
        """For people, and in the names of its buffers: "i8 in groups of 64"."""

    @abstractmethod
    def buffers(self, rows: RowCount) -> tuple[Buffer, ...]:
        """Its arrays for so many rows, in the order in which kernels take them."""

    @abstractmethod
    def encode(self, x: Array) -> dict[str, Array]:
        """f32 [rows, features] as the form's arrays, by name. Where a form leaves room unused: zeros."""

    @abstractmethod
    def decode(self, arrays: Mapping[str, Array], rows: int) -> Array:
        """f32 [rows, features]: what the arrays stand for."""


@dataclass(frozen=True)
class OwnRows(Form):
    """f32 row by row, in the buffer that every activation has: who computes it writes it."""

    name: ClassVar[str] = "f32"

    def buffers(self, rows: RowCount) -> tuple[Buffer, ...]:
        return (Buffer("x", "float32", (rows, self.features)),)

    def encode(self, x: Array) -> dict[str, Array]:
        return {"x": x}

    def decode(self, arrays: Mapping[str, Array], rows: int) -> Array:
        return arrays["x"][:rows]


@dataclass(frozen=True)
class Writer:
    """A kernel that writes a form: (x f32 [T, features], what a norm reads, the form's buffers; begin, end). One unit
    of work is a row. grain: the fewest that are worth a thread."""

    kernel: Kernel
    grain: int


class Converted(Form):
    """A form that a kernel makes of an activation's own rows."""

    @abstractmethod
    def writer(self, chooser: Chooser, **norm: Any) -> Writer:
        """That kernel. norm: what is done to the rows first, as a `RoundingProblem` has it."""
