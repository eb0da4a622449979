"""How prefill kernels walk their work: units of a block of rows by a panel of weight tiles, sums kept on the stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.tile_slices import TileSlice, tile_slices
from llmc.targets.cpu.vector_isa import VectorIsa
from llmc.targets.cpu.vectors import splat, store

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr


@dataclass(frozen=True)
class Block:
    """One unit of work while its body is emitted.

    tile: the panel's weight tiles; a short last panel repeats the last tile. each: slices of a tile. first_row, blocks:
    the unit's rows, in `blocks` register blocks. totals: f32 vectors [row_block + spare, slices], zero at first,
    written out when the body ends.
    """

    tile: list[Expr]
    each: int
    first_tile: Expr
    first_row: Expr
    blocks: Expr
    totals: Buffer

    @property
    def tile_slices(self) -> list[TileSlice]:
        """The panel's slices, in the order of the totals."""
        return tile_slices(self.tile, self.each)


@contextmanager
def each_block(
    isa: VectorIsa,
    epilogue: Epilogue,
    handles: Mapping[str, Expr],
    sizes: Mapping[str, Expr],
    *,
    tile_rows: int,
    all_tiles: int,
    rows: int,
    tiles: int,
    row_block: int,
    spare: int = 0,
) -> Iterator[Block]:
    """Run the body for every unit of [begin, end): `row_block` of the T rows by `tiles` of the weight's tiles.

    rows: rows that are multiplied at once. Consecutive units share the panel. spare: rows that totals have behind those
    of the block, for what nobody reads. ValueError where sizes do not fit.
    """
    from tvm import tirx

    if row_block % rows or tiles % epilogue.tiles:
        raise ValueError(f"{row_block} rows in blocks of {rows}, or {tiles} tiles in parts of {epilogue.tiles}")
    tokens = sizes["T"]
    each = tile_rows // isa.lanes
    totals = b.scratch([row_block + spare, tiles * each], isa.f32)
    row_blocks = b.let((tokens + (row_block - 1)) // row_block)
    with b.loop(sizes["end"] - sizes["begin"]) as i:
        unit = b.let(sizes["begin"] + i)
        first_tile = b.let(unit // row_blocks * tiles)
        tile = [b.let(tirx.Min(first_tile + t, b.index(all_tiles - 1))) for t in range(tiles)]
        first_row = b.let(unit % row_blocks * row_block)
        here = b.let(tirx.Min(tokens - first_row, b.index(row_block)))
        blocks = b.let((here + (rows - 1)) // rows)
        with b.loop(blocks * rows) as m:
            for s in range(tiles * each):
                store(totals, (m, s), splat(0.0, isa.lanes))

        yield Block(tile, each, first_tile, first_row, blocks, totals)

        with b.loop(here) as m:
            for t in range(0, tiles, epilogue.tiles):
                with b.when(first_tile + t < all_tiles):  # a repeated tile is stored once
                    column = b.let((first_tile + t) // epilogue.tiles)

                    def sums(number: int, t: int = t) -> list[Expr]:
                        return [totals[m, (t + j) * each + number] for j in range(epilogue.tiles)]

                    epilogue.emit_tile(isa, tile_rows, handles, first_row + m, column, sums)
