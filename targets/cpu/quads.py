"""Quads of stored weights as the bytes that are multiplied: taken out of the vectors that they share, looked up in the
table of their levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.vector_isa import VectorIsa

if TYPE_CHECKING:
    from tvm.tirx import Expr


def quad_bytes(isa: VectorIsa, layout: QuantizedLayout, vector: Callable[[int], Expr], place: int) -> Expr:
    """Quad `place` of those of a bundle, u8, as it is multiplied. vector: loads the bundle's vector of that number."""
    if layout.bits == 8:
        return vector(0)
    codes = None
    for number, bit, width, below in layout.fields(place):
        packed = vector(number)
        moved = packed if bit == below else isa.shift_bytes(packed, bit - below)
        # Bits of other quads are above those of the highest plane only: a table does not look at them.
        kept = ((1 << width) - 1) << below
        if below + width == layout.bits:
            kept = kept if layout.table is None else 0xFF & -(1 << below)
        field = moved if kept == 0xFF else moved & kept
        codes = field if codes is None else codes | field
    assert codes is not None
    return codes if layout.table is None else isa.look_up_bytes(layout.table, b.let(codes))
