"""Activations as bf16 in tiles, after a norm if asked: what tile registers multiply. The form, and its kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_dtypes import bfloat16

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.forms import writer
from llmc.targets.cpu.quantize_activations import RoundingProblem, RowRounding, normalised, padded
from llmc.targets.cpu.vectors import splat, store
from llmc.targets.forms import Array, Buffer, Converted, RowCount, Writer
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser
from llmc.targets.x86.isa import X86Isa, isa_for
from llmc.targets.x86.tiles import INPUTS, ROWS, TILE

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc


PAIRED_ROWS = 2 * ROWS  # of a block of results: kernels multiply two tiles of rows at a time


@dataclass(frozen=True)
class Bf16Tiles(Converted):
    """Rows as `parts` bf16 an activation, in tiles of 16 rows by 32 inputs: xtiles u16 bits, a tile after the other.

    Row r and input i of part p are at [r // 16, i // 32, p, r % 16, i % 32], so that a tile is one kilobyte in a row.
    One part rounds to bf16; three hold all of an f32 (from 2^-109 on up), each what the ones before leave. inputs: a
    multiple of 32, at least `features`; those behind the last feature are zeros. Rows behind the last one, up to a
    multiple of 32, hold anything, and so do the results that come of them.
    """

    inputs: int
    parts: int = 1

    @property
    def name(self) -> str:
        return f"bf16 in tiles of {self.inputs} inputs" + (f", {self.parts} parts" if self.parts > 1 else "")

    def buffers(self, rows: RowCount) -> tuple[Buffer, ...]:
        tiles = (rows + (PAIRED_ROWS - 1)) // PAIRED_ROWS * (PAIRED_ROWS // ROWS)
        return (Buffer("xtiles", "uint16", (tiles, self.inputs // INPUTS, self.parts, ROWS, INPUTS)),)

    def encode(self, x: Array) -> dict[str, Array]:
        (buffer,) = self.buffers(len(x))
        left = np.zeros((padded(len(x), PAIRED_ROWS), self.inputs), np.float32)
        left[: len(x), : self.features] = x
        tiles = buffer.empty()
        for part in range(self.parts):
            rounded = left.astype(bfloat16)
            left = left - rounded.astype(np.float32)
            bits = rounded.view(np.uint16).reshape(-1, ROWS, self.inputs // INPUTS, INPUTS)
            tiles[:, :, part] = bits.transpose(0, 2, 1, 3)
        return {"xtiles": tiles}

    def decode(self, arrays: Mapping[str, Array], rows: int) -> Array:
        (buffer,) = self.buffers(rows)
        tiles = arrays["xtiles"].reshape(-1)[: buffer.empty().size].reshape(buffer.empty().shape)
        values = tiles.view(bfloat16).astype(np.float32).transpose(2, 0, 3, 1, 4).reshape(self.parts, -1, self.inputs)
        total: Array = values[-1]
        for larger in values[-2::-1]:  # the small ones first: exact
            total = total + larger
        return total[:rows, : self.features]

    def writer(self, chooser: Chooser, **norm: Any) -> Writer:
        problem = TilesProblem(k=self.features, inputs=self.inputs, parts=self.parts, **norm)
        return writer(chooser, ActivationTiles, problem)


def bf16_parts(isa: X86Isa, first: Expr, second: Expr, parts: int, paired: bool = False) -> Iterator[Expr]:
    """Two f32 vectors as `parts` pairs of vectors of bf16 in i32 lanes, whose sums they are but for rounding.

    One after the other as `pack_bf16` has them; paired: as `pack_pairs` has them. Three parts of 8 digits are an f32's
    24 (no exponent is lost above 2^-109).
    """
    from tvm import tirx

    for part in range(parts):
        pairs = b.let(isa.pack_pairs(first, second)) if paired or part + 1 < parts else None
        yield pairs if paired else isa.pack_bf16(first, second)
        if part + 1 < parts:
            bits = tirx.reinterpret(f"uint32x{isa.lanes}", pairs)
            first = b.let(first - tirx.reinterpret(isa.f32, bits << 16))
            second = b.let(second - tirx.reinterpret(isa.f32, bits & splat(0xFFFF0000, isa.lanes, "uint32")))


@dataclass(frozen=True, kw_only=True)
class TilesProblem(RoundingProblem):
    """To bf16 in tiles: (..., xtiles u16), see `Bf16Tiles`. Rounds to nearest, ties to even."""

    inputs: int
    parts: int = 1


@dataclass(frozen=True)
class ActivationTiles(RowRounding[TilesProblem], name="activation_tiles"):
    """Row by row into tiles."""

    def refuse(self, problem: TilesProblem, machine: Machine) -> str:
        if isa_for(machine).bf16_dots is None:
            return f"{machine.name} has no instruction that rounds to bf16"
        return super().refuse(problem, machine)

    def build(self, problem: TilesProblem, machine: Machine) -> PrimFunc:
        isa = isa_for(machine)

        def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
            _write_tiles(problem, isa, self.chains, handles, sizes)

        return b.plain_function([*problem.inputs_read(), ("xtiles", "uint16")], [], body, isa.pairs_helper)


def _write_tiles(
    problem: TilesProblem, isa: X86Isa, chains: int, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]
) -> None:
    from tvm import tirx

    k, inputs, parts = problem.k, problem.inputs, problem.parts
    x = b.view(handles["x"], [b.MANY, k], "float32")
    out = b.view(handles["xtiles"], [b.MANY], "uint16")
    with b.loop(sizes["end"] - sizes["begin"]) as i:
        row = b.let(sizes["begin"] + i)
        value = normalised(isa, handles, x, row, problem, chains)
        first = b.let(row // ROWS * (inputs * ROWS * parts) + row % ROWS * INPUTS)

        def block(start: Expr, valid: int) -> None:
            halves = value(start, valid), value(start + isa.lanes, valid - isa.lanes)
            if parts > 1:
                halves = b.let(halves[0]), b.let(halves[1])
            for part, both in enumerate(bf16_parts(isa, *halves, parts)):
                at = first + start * (ROWS * parts) + part * TILE
                store(out, at, tirx.reinterpret("uint16x32", both))

        with b.loop(k // INPUTS) as j:
            block(j * INPUTS, INPUTS)
        for start in range(k // INPUTS * INPUTS, inputs, INPUTS):
            block(b.index(start), k - start)
