"""f32 activations to bf16 in tiles, after a norm if asked: what `linear_tiles` multiplies.

Row r and input i of part p are at [r // 16, i // 32, p, r % 16, i % 32], so that a tile is one kilobyte in a row. One
part rounds to bf16; three hold all of an f32, each what the ones before leave. Inputs past `k` are zeros; rows past the
last token, up to a multiple of 32, hold anything, and so do the results that come of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import Dim
from llmc.targets.cpu import builder as b
from llmc.targets.cpu.quantize_activations import norm_inputs, normalised
from llmc.targets.machine import Machine
from llmc.targets.x86.isa import X86Isa, isa_for
from llmc.targets.x86.tiles import INPUTS, ROWS, TILE

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc


def tiles_elements(rows: int | Dim, inputs: int, parts: int = 1) -> int | Dim:
    """bf16 in the tiles of `rows` rows of `inputs` (a multiple of 32) activations."""
    return (rows + (2 * ROWS - 1)) // (2 * ROWS) * (2 * ROWS * inputs * parts)


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
            first = b.let(first - tirx.reinterpret(isa.f32, bits << isa.splat(16, "uint32")))
            second = b.let(second - tirx.reinterpret(isa.f32, bits & isa.splat(0xFFFF0000, "uint32")))


def activation_tiles(
    machine: Machine,
    *,
    k: int,
    inputs: int,
    norm: str = "none",
    eps: float = 0.0,
    weight_offset: float = 0.0,
    norm_bias: bool = False,
    parts: int = 1,
) -> PrimFunc:
    """(x f32 [T, k], weight f32 [k] if norm, norm_bias f32 [k] if any, xtiles u16; begin, end). One unit: one row.

    norm: as in `quantize_activations`. parts: 1 or 3. Rounds to nearest, ties to even. The limit is the memory.
    """
    isa = isa_for(machine)

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        x = b.view(handles["x"], [b.MANY, k], "float32")
        out = b.view(handles["xtiles"], [b.MANY], "uint16")
        with b.loop(sizes["end"] - sizes["begin"]) as i:
            row = b.let(sizes["begin"] + i)
            value = normalised(isa, handles, x, row, k, norm, eps, weight_offset, norm_bias)
            first = b.let(row // ROWS * (inputs * ROWS * parts) + row % ROWS * INPUTS)

            def block(start: Expr, valid: int) -> None:
                halves = value(start, valid), value(start + isa.lanes, valid - isa.lanes)
                if parts > 1:
                    halves = b.let(halves[0]), b.let(halves[1])
                for part, both in enumerate(bf16_parts(isa, *halves, parts)):
                    at = first + start * (ROWS * parts) + part * TILE
                    b.store_vector(isa, out, [at], tirx.reinterpret("uint16x32", both))

            with b.loop(k // INPUTS) as j:
                block(j * INPUTS, INPUTS)
            for start in range(k // INPUTS * INPUTS, inputs, INPUTS):
                block(b.index(start), k - start)

    return b.plain_function([*norm_inputs(norm, norm_bias), ("xtiles", "uint16")], [], body, isa.pairs_helper)
