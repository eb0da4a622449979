"""f32 activations to bf16 in tiles, after a norm if asked: what `linear_tiles` multiplies.

Row r and input i are at [r // 16, i // 32, r % 16, i % 32], so that a tile is one kilobyte in a row. Inputs past `k`
are zeros; rows past the last token, up to a multiple of 32, hold anything, and so do the results that come of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import Dim
from llmc.targets.machine import Machine
from llmc.targets.x86 import linear_builder as b
from llmc.targets.x86.isa import isa_for
from llmc.targets.x86.quantize_activations import norm_inputs, normalised

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

INPUTS = 32
ROWS = 16


def tiles_elements(rows: int | Dim, inputs: int) -> int | Dim:
    """bf16 in the tiles of `rows` rows of `inputs` (a multiple of 32) activations."""
    return (rows + (2 * ROWS - 1)) // (2 * ROWS) * (2 * ROWS * inputs)


def activation_tiles(
    machine: Machine,
    *,
    k: int,
    inputs: int,
    norm: str = "none",
    eps: float = 0.0,
    weight_offset: float = 0.0,
    norm_bias: bool = False,
) -> PrimFunc:
    """(x f32 [T, k], weight f32 [k] if norm, norm_bias f32 [k] if any, xtiles u16; begin, end). One unit: one row.

    norm: as in `quantize_activations`. Rounds to nearest, ties to even. The limit is the memory.
    """
    isa = isa_for(machine)

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        x = b.view(handles["x"], [b.MANY, k], "float32")
        out = b.view(handles["xtiles"], [b.MANY], "uint16")
        with b.loop(sizes["end"] - sizes["begin"]) as i:
            row = b.let(sizes["begin"] + i)
            value = normalised(isa, handles, x, row, k, norm, eps, weight_offset, norm_bias)
            first = b.let(row // ROWS * (inputs * ROWS) + row % ROWS * INPUTS)

            def block(start: Expr, valid: int) -> None:
                both = isa.pack_bf16(value(start, valid), value(start + isa.lanes, valid - isa.lanes))
                b.store_vector(isa, out, [first + start * ROWS], tirx.reinterpret("uint16x32", both))

            with b.loop(k // INPUTS) as j:
                block(j * INPUTS, INPUTS)
            for start in range(k // INPUTS * INPUTS, inputs, INPUTS):
                block(b.index(start), k - start)

    return b.plain_function([*norm_inputs(norm, norm_bias), ("xtiles", "uint16")], [], body, isa.pairs_helper)
