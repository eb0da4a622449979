"""Tile registers (AMX) as statements of a kernel: eight matrices of 16 rows by 64 bytes.

The multiplications are

    tile c (f32 [16, 16]) += tile a (bf16 [16, 32]) @ b,   b: tile of pairs [16, 16, 2], b[k // 2, column, k % 2]
    tile c (i32 [16, 16]) += tile a (i8 [16, 64]) @ b,     b: tile of quads [16, 16, 4]

Tiles are chosen by number, as the instructions' immediate operands, so that LLVM allocates none: a kernel configures
all eight, and releases them at its end. A thread may use them only after the system was asked
for it, see `runtime/cpu.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu import vectors
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr

REGISTERS = 8
ROWS = 16
ROW_BYTES = 64
COLUMNS = ROW_BYTES // 4  # of f32 or i32
WORDS = ROWS * COLUMNS  # of 32 bits in a tile
INPUTS = ROW_BYTES // 2  # bf16 in a row: what one multiplication sums over
TILE = ROWS * INPUTS  # bf16 in a tile

# The configuration that the hardware reads: palette 1, from the first row; bytes a row of each tile at byte 16, as
# u16; rows of each tile at byte 48, as u8.
_PALETTE = 1
_BYTES_A_ROW_AT = 16
_ROWS_AT = 48


def has_tiles(machine: Machine, kind: str) -> bool:
    """Whether the machine multiplies tiles of `kind`: "bf16" or "int8"."""
    return machine.has("amx-tile", f"amx-{kind}")


@contextmanager
def configured(shapes: Mapping[int, tuple[Expr | int, int]] | None = None) -> Iterator[None]:
    """All tiles at full size while the body runs, or as `shapes` says: (rows, bytes a row) of tiles by number.

    Loads and stores take as many rows, and a multiplication as many cycles as tile a has rows. Contents are undefined
    at first.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    words: list[Expr | int] = [0] * 16
    words[0] = _PALETTE
    for tile in range(REGISTERS):
        rows, row_bytes = (shapes or {}).get(tile, (ROWS, ROW_BYTES))
        words[_BYTES_A_ROW_AT // 4 + tile // 2] += row_bytes << (16 * (tile % 2))
        many = rows if isinstance(rows, int) else rows.astype("int32")
        words[_ROWS_AT // 4 + tile // 4] += many * (1 << (8 * (tile % 4)))
    block = b.scratch(1, "int32x16")
    flat = b.view(block.data, [16], "int32")
    for place, word in enumerate(words):
        vectors.store(flat, place, tirx.const(word, "int32") if isinstance(word, int) else word)
    I.evaluate(tirx.call_llvm_intrin("void", "llvm.x86.ldtilecfg", tirx.address_of(flat[b.index(0)])))
    yield
    I.evaluate(tirx.call_llvm_intrin("void", "llvm.x86.tilerelease"))


def zero(tile: int) -> None:
    """tile = 0."""
    _emit("tilezero", _number(tile))


def load(tile: int, buffer: Buffer, start: Expr | int, stride: Expr | int = ROW_BYTES) -> None:
    """16 rows of 64 bytes from element `start` of a flat buffer on; `stride`: bytes from row to row."""
    from tvm import tirx

    _emit("tileloadd64", _number(tile), tirx.address_of(buffer[b.index(start)]), b.index(stride))


def store(tile: int, buffer: Buffer, start: Expr | int, stride: Expr | int = ROW_BYTES) -> None:
    """The inverse of `load`."""
    from tvm import tirx

    _emit("tilestored64", _number(tile), tirx.address_of(buffer[b.index(start)]), b.index(stride))


def dot_bf16(c: int, a: int, b_: int) -> None:
    """c += a @ b: 16 x 16 sums of 32 products of bf16. Sums are f32; subnormal numbers count as zero."""
    _emit("tdpbf16ps", _number(c), _number(a), _number(b_))


def dot_int8(c: int, a: int, b_: int, unsigned: bool = False) -> None:
    """c += a @ b: 16 x 16 sums of 64 products of i8; unsigned: b is u8. Exact."""
    _emit("tdpbsud" if unsigned else "tdpbssd", _number(c), _number(a), _number(b_))


def _number(tile: int) -> Expr:
    from tvm import tirx

    return tirx.const(tile, "int8")


def _emit(name: str, *arguments: Expr) -> None:
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    I.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))
