"""The forms of activations that kernels of any CPU read: bytes in groups, and pairs of bf16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from llmc.targets.cpu.linear_problem import chosen
from llmc.targets.cpu.quantize_activations import (
    SMALLEST,
    BytesProblem,
    QuantizeRows,
    RoundingProblem,
    RoundRows,
    padded,
)
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.forms import Array, Buffer, Converted, RowCount, Writer
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser, P, Template


def writer(chooser: Chooser, template: type[Template[P]], problem: P) -> Writer:
    """The kernel of a template that rounds rows."""
    found = chosen(chooser, template, problem)
    return Writer(found.kernel(problem, chooser.machine), found.grain(problem))


@dataclass(frozen=True)
class IntegerGroups(Converted):
    """Each row rounded to bytes in groups of `group` neighbours that share a scale, with the groups' sums beside them.

    xq i8 [rows, padded], xscales f32 [rows, groups]: x = xscales * xq, within half a scale; xq in [-127, 127], zeros
    behind the last feature. xsums i32 [rows, groups]: the sum of a group's bytes, or, `paired`, that of the first two
    of every four in the low 16 bits and of the other two in the high ones, both signed (`VectorIsa.pair_sums`).
    """

    group: int
    paired: bool = False

    @property
    def name(self) -> str:
        return f"i8 in groups of {self.group}"

    @property
    def columns(self) -> int:
        """Bytes of a row."""
        return padded(self.features, self.group)

    def buffers(self, rows: RowCount) -> tuple[Buffer, ...]:
        groups = self.columns // self.group
        return (
            Buffer("xq", "int8", (rows, self.columns)),
            Buffer("xscales", "float32", (rows, groups)),
            Buffer("xsums", "int32", (rows, groups)),
        )

    def encode(self, x: Array) -> dict[str, Array]:
        row_wise = np.zeros((len(x), self.columns), np.float32)
        row_wise[:, : self.features] = x
        groups = row_wise.reshape(len(x), -1, self.group)
        peaks = np.abs(groups).max(2, initial=0)
        kept = peaks >= np.float32(SMALLEST)
        inverse = np.divide(np.float32(127), peaks, where=kept, out=np.zeros_like(peaks))
        q = np.rint(groups * inverse[..., None]).astype(np.int8)
        scales = np.where(kept, peaks / np.float32(127), np.float32(0))
        return {"xq": q.reshape(len(x), -1), "xscales": scales, "xsums": self._sums(q)}

    def _sums(self, q: Array) -> Array:
        sums: Array = q.sum(2, dtype=np.int32)
        if self.paired:
            fours = q.reshape(*q.shape[:2], -1, 4).sum(2, dtype=np.int16)
            sums = np.ascontiguousarray(fours[..., 0::2] + fours[..., 1::2]).view(np.int32)[..., 0]
        return sums

    def decode(self, arrays: Mapping[str, Array], rows: int) -> Array:
        q = arrays["xq"][:rows].reshape(rows, -1, self.group).astype(np.float32)
        values: Array = q * arrays["xscales"][:rows, :, None]
        return values.reshape(rows, -1)[:, : self.features]

    def writer(self, chooser: Chooser, **norm: Any) -> Writer:
        if self.paired != isa_for(chooser.machine).pair_sums(self.group):
            raise ValueError(f"sums of {self.name} are not those that kernels for {chooser.machine.name!r} read")
        return writer(chooser, QuantizeRows, BytesProblem(k=self.features, group=self.group, **norm))


def integer_groups(machine: Machine, features: int, group: int) -> IntegerGroups:
    """The bytes in groups that this machine's kernels read."""
    return IntegerGroups(features, group, isa_for(machine).pair_sums(group))


@dataclass(frozen=True)
class Bf16Pairs(Converted):
    """Each row rounded to bf16: u16 bits [rows, features], a zero behind an odd number of them."""

    name = "bf16 in pairs"

    def buffers(self, rows: RowCount) -> tuple[Buffer, ...]:
        return (Buffer("xh", "uint16", (rows, padded(self.features, 2))),)

    def encode(self, x: Array) -> dict[str, Array]:
        (buffer,) = self.buffers(len(x))
        bits = buffer.empty()
        bits[:, : self.features] = x.astype(bfloat16).view(np.uint16)
        return {"xh": bits}

    def decode(self, arrays: Mapping[str, Array], rows: int) -> Array:
        values: Array = np.ascontiguousarray(arrays["xh"][:rows, : self.features]).view(bfloat16).astype(np.float32)
        return values

    def writer(self, chooser: Chooser, **norm: Any) -> Writer:
        return writer(chooser, RoundRows, RoundingProblem(k=self.features, **norm))
