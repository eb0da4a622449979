"""Linear ops of many rows on tile registers: products of bf16, sums in f32.

f32 weights and activations are each split into three bf16 parts, and those six of the nine products that matter are
summed: what is left out is 2^-25 of a product at most, about an f32's own rounding.

Weights become bf16 in a panel of their own layout once for a block of rows, with their scales multiplied in, so that
sums run over all inputs without a rescale; activations come in the form `Bf16Tiles`. One unit of work is `row_block`
rows by a panel of weight tiles. Inputs are taken `depth` at a time: what these need stays in the second-level cache.

A multiplication of 16 x 32 by 32 x 16 takes 16 cycles. Blocks of two by two load four tiles for four products, which
two loads a cycle hide. While the tile unit multiplies, the vector units have time: between the products of one depth
they unpack the weights of the next, and between those of one block of results they finish the block before. So in time:

    tile unit      | products of depth 0    | products of depth 1    | ... of the last depth       | next unit's depth 0
    vector units   | unpack depth 1's panel | unpack depth 2's panel | unpack the next unit's, and | ...
                   |                        |                        | finish the block before     |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.vectors import load, permute, prefetch, store
from llmc.targets.x86 import tiles as amx
from llmc.targets.x86.activation_tiles import PAIRED_ROWS, bf16_parts
from llmc.targets.x86.isa import X86Isa
from llmc.targets.x86.tile_weights import CHUNK, TILE_CHUNKS, Source, chunks
from llmc.targets.x86.tiles import INPUTS, TILE

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

PAIR = PAIRED_ROWS // amx.ROWS  # tiles side by side, of rows and of columns
CORNERS = PAIR * PAIR  # tiles of a block of results
SUMS = CORNERS * amx.ROWS * amx.ROWS  # numbers of a block of results
RESULTS = 2  # blocks of results: one is finished while the next is summed

# Which part of the activations meets which part of the weights, so ordered that few tiles are loaded anew.
_PRODUCTS = {1: ((0, 0),), 3: ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (2, 0))}


@dataclass(frozen=True)
class TileWork:
    """What `tile_linear` emits: sizes and blocks. Weights are read from `source`, `all_tiles` tiles of them; inputs are
    taken `depth` at a time. packed: the result is in the form `Bf16Tiles`. far: activations of a block of rows do not
    stay in the second-level cache, and are asked for ahead of their use.

        workspace = two panels of bf16: tiles * depth * parts * 16 each,  sums: f32 [row_block, tiles * 16],
                    results: f32 [RESULTS, SUMS]
    """

    isa: X86Isa
    epilogue: Epilogue
    source: Source
    all_tiles: int
    depth: int
    tiles: int
    row_block: int
    packed: bool
    far: bool

    @property
    def parts(self) -> int:
        """bf16 that a weight, and an activation, becomes."""
        return self.source.parts

    @property
    def inputs(self) -> int:
        """Columns of the activations."""
        return self.source.sections * self.source.section

    @property
    def whole(self) -> int:
        """How often `depth` inputs are taken before the last ones."""
        return (self.inputs - 1) // self.depth

    @property
    def last(self) -> int:
        """Inputs that are taken last."""
        return self.inputs - self.whole * self.depth

    @property
    def panels(self) -> int:
        """Of the weight."""
        return -(-self.all_tiles // self.tiles)

    @property
    def first_sum(self) -> int:
        """Where the sums begin in the workspace, in f32: after two panels of bf16."""
        return self.depth * self.parts * self.tiles * self.isa.lanes

    @property
    def first_result(self) -> int:
        """Where the blocks of results begin."""
        return self.first_sum + self.row_block * self.tiles * self.isa.lanes

    @property
    def workspace_bytes(self) -> int:
        """Bytes that each thread needs."""
        return 4 * (self.first_result + RESULTS * SUMS)


class _Ahead:
    """Two panels of bf16 weights: one is multiplied while the other is unpacked, chunk by chunk."""

    def __init__(self, isa: X86Isa, source: Source, handles: Mapping[str, Expr], depth: int, tiles: int) -> None:
        self.isa, self.source, self.handles, self.depth, self.tiles = isa, source, handles, depth, tiles
        self.tile_elements = depth * source.parts * isa.lanes
        self.panel = b.view(handles["workspace"], [b.MANY], "uint16")
        self.data = b.view(handles["data"], [b.MANY], "uint8")
        self.now = b.Scalar("int64", tiles * self.tile_elements)  # where the panel that is multiplied starts
        # What is unpacked: these tiles from this section on, so many chunks of each; what of it is next.
        self.first_tile, self.first_section, self.tile_chunks, self.count = (b.Scalar("int64", 0) for _ in range(4))
        self.tile, self.chunk = b.Scalar("int64", 0), b.Scalar("int64", 0)

    def turn(self, first_tile: Expr, first_input: Expr | int, inputs: Expr | int, count: Expr) -> Expr:
        """The panel that was unpacked is multiplied from now on, and `count` tiles are to be unpacked; -> chunks."""
        self.now.set(self.tiles * self.tile_elements - self.now.get())
        self.first_tile.set(first_tile)
        self.first_section.set(b.index(first_input) // self.source.section)
        tile_chunks = b.let(b.index(inputs) // (2 * CHUNK))
        self.tile_chunks.set(tile_chunks)
        self.count.set(count)
        self.tile.set(0)
        self.chunk.set(0)
        return b.let(tile_chunks * count)

    def unpack(self, most: Expr) -> None:
        """So many of the chunks that are left."""
        with b.loop(most):
            tile = self.tile.get()
            with b.when(tile < self.count.get()):
                chunk = self.chunk.get()
                self._unpack(tile, chunk)
                self._move_on(tile, chunk)

    def _move_on(self, tile: Expr, chunk: Expr) -> None:
        from tvm import tirx

        ends = chunk + 1 == self.tile_chunks.get()
        self.chunk.set(tirx.Select(ends, b.index(0), chunk + 1))
        self.tile.set(tirx.Select(ends, tile + 1, tile))

    def _unpack(self, tile: Expr, chunk: Expr) -> None:
        from tvm import tirx

        source, lanes, per_section = self.source, self.isa.lanes, chunks(self.source)
        start = b.let(
            self.tiles * self.tile_elements - self.now.get() + tile * self.tile_elements
            + chunk // TILE_CHUNKS * (TILE * source.parts) + chunk % TILE_CHUNKS * (CHUNK * 2 * lanes)
        )  # fmt: skip

        def put(row: int, pairs: Expr, part: int = 0) -> None:
            at = start + row * (2 * lanes) + part * TILE
            store(self.panel, at, tirx.reinterpret("uint16x32", pairs))

        first_tile, section = (
            b.let(self.first_tile.get() + tile),
            b.let(self.first_section.get() + chunk // per_section),
        )
        self._prefetch(first_tile, section, b.let(chunk % per_section))
        source.unpack(self.handles, first_tile, section, b.let(chunk % per_section), put)

    def _prefetch(self, tile: Expr, section: Expr, chunk: Expr) -> None:
        """Ask for the chunk that is unpacked a depth after this one. It need not be there."""
        from tvm import tirx

        source = self.source
        following = b.let(section + self.depth // source.section)
        ends = following >= source.sections
        tile = b.let(tirx.Select(ends, tile + self.tiles, tile))
        section = b.let(tirx.Select(ends, section % (self.depth // source.section), following))
        nbytes = source.section_bytes // chunks(source)
        for line in range(0, nbytes, self.isa.cache_line):
            first = (tile * source.sections + section) * source.section_bytes
            prefetch(self.data, first + chunk * nbytes + line)


class _Finish:
    """A block of results, finished row by row while the next block is summed: bias, activation, gate, residual, store.

    Blocks of f32 [2 row tiles, 2 column tiles, 16, 16] lie in `RESULTS` places in turn, which stay in the first-level
    cache.
    """

    def __init__(
        self, isa: X86Isa, epilogue: Epilogue, handles: Mapping[str, Expr], all_tiles: int, packed: bool, parts: int,
        results: int,
    ) -> None:  # fmt: skip
        self.isa, self.epilogue, self.handles = isa, epilogue, handles
        self.all_tiles, self.packed, self.parts, self.results = all_tiles, packed, parts, results
        self.sums = b.view(handles["workspace"], [b.MANY], "float32")
        self.place = b.Scalar("int64", results)
        self.rows, self.first_row, self.first_tile = (b.Scalar("int64", 0) for _ in range(3))

    def wait(self, rows: Expr, first_row: Expr, first_tile: Expr) -> None:
        """A block that was stored to `next_place` is to be finished."""
        self.place.set(self.next_place())
        self.rows.set(rows)
        self.first_row.set(first_row)
        self.first_tile.set(first_tile)

    def next_place(self) -> Expr:
        """Where in `sums` the next block goes."""
        return b.let(2 * self.results + SUMS - self.place.get())

    def _packed_at(self, row: Expr, column: Expr, part: int) -> Expr:
        """Where a column of the result goes in tiles."""
        features, block = self.epilogue.features // INPUTS, column // INPUTS
        tile = (row // amx.ROWS * features + block) * self.parts + part
        return tile * TILE + row % amx.ROWS * INPUTS + column % INPUTS

    def row(self, m: Expr) -> None:
        """Finish row m of the block that waits, if it has so many."""
        with b.when(m < self.rows.get()):
            row, first_tile = b.let(self.first_row.get() + m), self.first_tile.get()
            lanes, tile = self.isa.lanes, amx.ROWS * amx.ROWS
            at = b.let(self.place.get() + m // amx.ROWS * (PAIR * tile) + m % amx.ROWS * lanes)
            vectors = [load(self.sums, at + c * tile, self.isa.lanes) for c in range(PAIR)]
            if self.packed:
                self._row_packed(row, first_tile, vectors)
            elif self.epilogue.tiles == PAIR:
                self.epilogue.emit(self.isa, self.handles, row, b.let(first_tile // PAIR), vectors)
            else:
                self._each_column(row, first_tile, vectors)

    def _each_column(self, row: Expr, first_tile: Expr, vectors: list[Expr]) -> None:
        for c, vector in enumerate(vectors):

            def emit(c: int = c, vector: Expr = vector) -> None:
                self.epilogue.emit(self.isa, self.handles, row, b.let(first_tile + c), [vector])

            if c == 0 or self.all_tiles % PAIR == 0:
                emit()
            else:
                with b.when(first_tile + c < self.all_tiles):
                    emit()

    def _row_packed(self, row: Expr, first_tile: Expr, vectors: list[Expr]) -> None:
        """A row of a tile is two vectors of results; a gated block has one of them."""
        from tvm import tirx

        isa, epilogue = self.isa, self.epilogue
        column = b.let(first_tile // epilogue.tiles)
        sums_of = [vectors] if epilogue.tiles == PAIR else [[vector] for vector in vectors]
        values = [
            b.let(epilogue.value(isa, self.handles, row, b.let(column + i), sums)) for i, sums in enumerate(sums_of)
        ]
        out = b.view(self.handles["out"], [b.MANY], "uint16")
        for part, both in enumerate(bf16_parts(isa, values[0], values[-1], self.parts)):
            bits = b.let(both)
            kept = bits if len(values) == PAIR else permute([bits], range(isa.lanes // 2))
            lanes = isa.lanes * len(values)
            at = self._packed_at(row, column * isa.lanes, part)
            store(out, at, tirx.reinterpret(f"uint16x{lanes}", kept))


def tile_linear(work: TileWork) -> PrimFunc:
    """(x u16 in the form `Bf16Tiles`, data, scales and minimums as the weights have them, bias f32 [n] if any, residual
    f32 [T, features] if any, out, workspace u8; T, begin, end). One unit: `row_block` rows by `tiles` weight tiles;
    consecutive units share the rows."""
    out = {"out": "uint16"} if work.packed else {}
    results = [(name, out.get(name, dtype)) for name, dtype in work.epilogue.pointers()]
    pointers = [("x", "uint16"), *work.source.pointers(), *results, ("workspace", "uint8")]
    return b.plain_function(pointers, ["T"], lambda handles, sizes: _body(work, handles, sizes), work.isa.pairs_helper)


def _body(work: TileWork, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
    from tvm import tirx

    units = b.let(sizes["end"] - sizes["begin"])
    sums = b.view(handles["workspace"], [b.MANY], "float32")
    x = b.view(handles["x"], [b.MANY], "uint16")
    ahead = _Ahead(work.isa, work.source, handles, work.depth, work.tiles)
    finish = _Finish(work.isa, work.epilogue, handles, work.all_tiles, work.packed, work.parts, work.first_result)

    def panel(unit: Expr) -> tuple[Expr, Expr]:
        """A unit's first tile, and how many it has."""
        first = b.let(unit % work.panels * work.tiles)
        return first, b.let(tirx.Min(b.index(work.all_tiles) - first, b.index(work.tiles)))

    first_depth = work.depth if work.whole else work.last
    first_tile, count = panel(sizes["begin"])
    ahead.unpack(ahead.turn(first_tile, 0, first_depth, b.let(tirx.Select(units > 0, count, b.index(0)))))
    with amx.configured(), b.loop(units) as i:
        number = b.let(sizes["begin"] + i)
        first_tile, tiles_here = panel(number)
        next_tile, tiles_next = panel(number + 1)
        first_row = b.let(number // work.panels * work.row_block)
        rows_here = b.let(tirx.Min(sizes["T"] - first_row, b.index(work.row_block)))
        row_pairs, column_pairs = b.let((rows_here + (PAIRED_ROWS - 1)) // PAIRED_ROWS), b.let((tiles_here + 1) // PAIR)
        unit = _Unit(work, ahead, finish, x, sums, first_tile, first_row, rows_here, row_pairs, column_pairs)
        with b.loop(work.whole) as s:
            length = b.let(tirx.Select(s + 1 < work.whole, b.index(work.depth), b.index(work.last)))
            chunks_ahead = ahead.turn(first_tile, b.let((s + 1) * work.depth), length, tiles_here)
            unit.multiply(b.let(s * work.depth), work.depth, chunks_ahead, is_last=False)
        after = b.let(tirx.Select(i + 1 < units, tiles_next, b.index(0)))
        chunks_ahead = ahead.turn(next_tile, 0, first_depth, after)
        unit.multiply(b.index(work.whole * work.depth), work.last, chunks_ahead, is_last=True)


@dataclass(frozen=True)
class _Unit:
    """`rows_here` rows from `first_row` times a panel from `first_tile`, in blocks of two by two tiles, while its code
    is emitted. x: activations; sums: the workspace."""

    work: TileWork
    ahead: _Ahead
    finish: _Finish
    x: Buffer
    sums: Buffer
    first_tile: Expr
    first_row: Expr
    rows_here: Expr
    row_pairs: Expr
    column_pairs: Expr

    def multiply(self, first: Expr, count: int, chunks_ahead: Expr, is_last: bool) -> None:
        """Add up `count` inputs from `first` on, for all blocks of results."""
        blocks = b.let(self.row_pairs * self.column_pairs * (count // INPUTS))
        share = b.let((chunks_ahead + (blocks - 1)) // blocks)
        self.finish.rows.set(0)
        with b.loop(self.row_pairs) as row_pair, b.loop(self.column_pairs) as column_pair:
            self._block(first, count, share, row_pair, column_pair, is_last)
        if is_last:
            with b.loop(PAIRED_ROWS) as m:
                self.finish.row(m)

    def _block(self, first: Expr, count: int, share: Expr, row_pair: Expr, column_pair: Expr, is_last: bool) -> None:
        """One block of results; `share` chunks of weights are unpacked after each product of INPUTS inputs."""
        from tvm import tirx

        work, isa = self.work, self.work.isa
        place = b.let((row_pair * (work.tiles // PAIR) + column_pair) * SUMS + work.first_sum)
        corners = [place + c * (SUMS // CORNERS) for c in range(CORNERS)]
        self._start(first, corners, is_last)
        row_tile = self.first_row // amx.ROWS + row_pair * PAIR
        rows = [b.let(((row_tile + r) * work.inputs + first) * (amx.ROWS * work.parts)) for r in range(PAIR)]
        now, tile_elements = self.ahead.now.get(), work.depth * isa.lanes * work.parts
        columns = [b.let(now + (column_pair * PAIR + c) * tile_elements) for c in range(PAIR)]
        block_row, block_tile = (
            b.let(self.first_row + row_pair * PAIRED_ROWS),
            b.let(self.first_tile + column_pair * PAIR),
        )
        with b.loop(count // INPUTS) as block:
            between = {0: lambda: self.ahead.unpack(share)}
            if is_last:
                between[2 * len(_PRODUCTS[work.parts])] = lambda: self._finish_some(block, count)
            if work.far:
                self._fetch_next(count, rows, row_pair, column_pair, block)
            self._products(block, rows, columns, between)
        if is_last:
            place = self.finish.next_place()
            for c in range(CORNERS):
                amx.store(c, self.sums, place + c * (SUMS // CORNERS))
            many = b.let(tirx.Min(self.rows_here - row_pair * PAIRED_ROWS, b.index(PAIRED_ROWS)))
            self.finish.wait(many, block_row, block_tile)
        else:
            for c in range(CORNERS):
                amx.store(c, self.sums, corners[c])

    def _start(self, first: Expr, corners: Sequence[Expr], is_last: bool) -> None:
        """Sums from zero, or from where the inputs before have left them."""

        def zero() -> None:
            for c in range(CORNERS):
                amx.zero(c)

        def load() -> None:
            for c in range(CORNERS):
                amx.load(c, self.sums, corners[c])

        if is_last and not self.work.whole:
            zero()
        else:
            b.either(first == 0, zero, load)

    def _finish_some(self, block: Expr, count: int) -> None:
        """Some rows of the block that waits: all of them, by and by."""
        rows_each = -(-PAIRED_ROWS // (count // INPUTS))
        with b.loop(rows_each) as j:
            self.finish.row(b.let(block * rows_each + j))

    def _fetch_next(self, count: int, rows: list[Expr], row_pair: Expr, column_pair: Expr, block: Expr) -> None:
        """Ask for a share of the rows that come next: the following pair's, or the first pair's next inputs."""
        from tvm import tirx

        work = self.work
        row_tile = amx.ROWS * work.parts * work.inputs
        to_first = count * (amx.ROWS * work.parts) - row_pair * (PAIR * row_tile)
        following = b.let(tirx.Select(row_pair + 1 < self.row_pairs, b.index(PAIR * row_tile), to_first))
        lines = -(-amx.ROWS * work.parts // (work.tiles // PAIR))
        for row in rows:
            at = row + following + block * (TILE * work.parts) + column_pair * (lines * INPUTS)
            for line in range(lines):
                prefetch(self.x, at + line * INPUTS)

    def _products(
        self, block: Expr, rows: list[Expr], columns: list[Expr], between: dict[int, Callable[[], None]]
    ) -> None:
        """Of INPUTS inputs; between: what is done after the product of that number."""
        parts = self.work.parts
        before: tuple[int | None, int | None] = (None, None)
        number = 0
        for of_x, of_w in _PRODUCTS[parts]:
            if of_w != before[1]:
                for c in range(PAIR):
                    amx.load(6 + c, self.ahead.panel, columns[c] + (block * parts + of_w) * TILE)
            for r in range(PAIR):
                if of_x != before[0]:
                    amx.load(4 + r, self.x, rows[r] + (block * parts + of_x) * TILE)
                for c in range(PAIR):
                    amx.dot_bf16(2 * r + c, 4 + r, 6 + c)
                    if number in between:
                        between[number]()
                    number += 1
            before = of_x, of_w
