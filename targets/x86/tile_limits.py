"""The limits of tile registers (AMX) as kernels: multiplying bytes, and pairs of bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.limit_kernels import INPUT_BYTES
from llmc.targets.cpu.limits import LimitKernel
from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine
from llmc.targets.x86 import tiles

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

TILE_SUMS = 6


def limit_tiles(machine: Machine, *, dtype: str) -> PrimFunc:
    """(input i8, output i32; begin, end): products of two tiles, summed up in six others. One unit is a round of six.

    Bytes: none. Limit: the matrix unit, which takes a product every 16 cycles and some 50 for each.
    """

    def body(p: dict[str, Expr], s: dict[str, Expr]) -> None:
        x, out = b.view(p["input"], [INPUT_BYTES], "int8"), b.view(p["output"], [tiles.ROWS * tiles.ROWS], "int32")
        dot = tiles.dot_int8 if dtype == "int8" else tiles.dot_bf16
        with tiles.configured():
            for tile in range(TILE_SUMS):
                tiles.zero(tile)
            for tile in range(TILE_SUMS, tiles.REGISTERS):
                tiles.load(tile, x, 0)
            with b.loop(s["end"] - s["begin"]):
                for tile in range(TILE_SUMS):
                    dot(tile, tiles.REGISTERS - 2, tiles.REGISTERS - 1)
            for tile in range(TILE_SUMS):
                tiles.store(tile, out, 0)

    return b.plain_function([("input", "int8"), ("output", "int32")], [], body)


def limit_kernels(machine: Machine) -> list[LimitKernel]:
    """Multiplying what this machine has instructions for."""
    found = []
    for dtype, factors in (("int8", 4), ("bf16", 2)):
        if tiles.has_tiles(machine, dtype):
            operations = 2 * TILE_SUMS * tiles.ROWS * tiles.ROWS * tiles.ROWS * factors
            made = kernel(limit_tiles, machine.key, dtype=dtype)
            found.append(LimitKernel(f"tile_{dtype}", made, operations, INPUT_BYTES))
    return found
