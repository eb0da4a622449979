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
    packed = vector(place // 2)
    if layout.bits == 4 and layout.table is None:
        return isa.high_nibbles(packed) if place % 2 else isa.low_nibbles(packed)
    codes = _moved(isa, packed, 4 if place % 2 else 0)
    if layout.bits == 6:
        codes = (codes & 15) | (_moved(isa, vector(layout.bundle_vectors - 1), 2 * place - 4) & 0xF0)
    assert layout.table is not None
    return isa.look_up_bytes(layout.table, b.let(codes))


def _moved(isa: VectorIsa, packed: Expr, right: int) -> Expr:
    """The bits of each byte `right` places down, or up where that is negative, beside bits of the next byte."""
    from tvm import tirx

    if right == 0:
        return packed
    words = tirx.reinterpret(f"uint16x{isa.lanes * 2}", packed)
    return tirx.reinterpret(isa.u8, words >> right if right > 0 else words << -right)
