"""A weight tile as vectors: one with fewer lanes than a tile has rows holds a *slice* of the tile.

All slices of a tile belong to one work unit, which multiplies some of them at once, and then the next: each line of the
memory is read once, and what is read again of it comes from a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.vector_isa import VectorIsa

if TYPE_CHECKING:
    from tvm.tirx import Expr


@dataclass(frozen=True)
class TileSlice:
    """As many rows of a tile as a vector has lanes, from row `number` * lanes on. place: of the tile in its unit."""

    tile: Expr
    place: int
    number: int


def slices_of(isa: VectorIsa, layout: QuantizedLayout | FloatLayout) -> int:
    """How many slices a tile has."""
    return layout.tile_rows // isa.lanes


def tile_slices(tiles: Sequence[Expr], each: int) -> list[TileSlice]:
    """The slices of tiles, in the order of a unit's sums; each: how many a tile has."""
    return [TileSlice(tile, place, number) for place, tile in enumerate(tiles) for number in range(each)]


def batches(tiles: Sequence[Expr], each: int, at_once: int) -> Iterator[tuple[int, list[TileSlice]]]:
    """(the first one's place among a unit's slices, `at_once` slices)."""
    unit = tile_slices(tiles, each)
    for first in range(0, len(unit), at_once):
        yield first, unit[first : first + at_once]


def in_memory(count: int, dtype: str) -> b.Registers:
    """Vector variables that LLVM keeps in no registers, which others need more. Needs `builder.ORDER_HELPER`."""
    variables = b.Registers(count, dtype)
    for slot in variables.slots:
        b.order_scratch(slot)
    return variables
