"""Linear ops of many rows on tile registers: products of bf16, sums in f32.

f32 weights and activations are each split into three bf16 parts, and those six of the nine products that matter are
summed: what is left out is 2^-25 of a product at most, about an f32's own rounding.

Weights become bf16 in a panel of their own layout once for a block of rows, with their scales multiplied in, so that
sums run over all inputs without a rescale; activations come as bf16 in tiles, see `activation_tiles`. One unit of work
is `row_block` rows by a panel of weight tiles. Inputs are taken `step` at a time: what a step needs stays in the
second-level cache.

    bytes of a workspace = two panels: 64 * step * tiles * parts,  sums: 64 * row_block * tiles,  results: 8192

A multiplication of 16 x 32 by 32 x 16 takes 16 cycles. Blocks of two by two load four tiles for four products, which
two loads a cycle hide. While the tile unit multiplies, the vector units have time: between the products of one step
they unpack the weights of the next, and between those of one block of results they finish the block before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.layouts import FloatLayout
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.linear_quantized import quantized_layout
from llmc.targets.cpu.vectors import permute
from llmc.targets.machine import Machine
from llmc.targets.x86 import tiles as amx
from llmc.targets.x86.activation_tiles import bf16_parts
from llmc.targets.x86.isa import X86Isa, isa_for
from llmc.targets.x86.tile_weights import CHUNK, Float, Quantized, Single, Source, chunks
from llmc.targets.x86.tiles import INPUTS, TILE

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

PAIR = 2  # tiles side by side, of rows and of columns
ROWS = PAIR * amx.ROWS  # of a block of results
SUMS = PAIR * PAIR * amx.ROWS * amx.ROWS  # of a block of results
RESULTS = 2  # blocks of results: one is finished while the next is summed

# Which part of the activations meets which part of the weights, so ordered that few tiles are loaded anew.
_PRODUCTS = {1: ((0, 0),), 3: ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (2, 0))}


def workspace_bytes(step: int, tiles: int, row_block: int, split: int = 1) -> int:
    """Bytes that each thread needs. split: bf16 that a weight becomes."""
    return (2 * 32 * step * split + 64 * row_block) * tiles + RESULTS * SUMS * 4  # 16 columns of bf16 and of f32


class _Ahead:
    """Two panels of bf16 weights: one is multiplied while the other is unpacked, chunk by chunk."""

    def __init__(self, isa: X86Isa, source: Source, handles: Mapping[str, Expr], step: int, tiles: int) -> None:
        self.isa, self.source, self.handles, self.step, self.tiles = isa, source, handles, step, tiles
        self.tile_elements = step * source.split * isa.lanes
        self.panel = b.view(handles["workspace"], [b.MANY], "uint16")
        self.data = b.view(handles["data"], [b.MANY], "uint8")
        self.now = b.Scalar("int64", tiles * self.tile_elements)  # where the panel that is multiplied starts
        # What is unpacked: these tiles from this part on, so many chunks of each; what of it is next.
        self.first_tile, self.first_part, self.tile_chunks, self.count = (b.Scalar("int64", 0) for _ in range(4))
        self.tile, self.chunk = b.Scalar("int64", 0), b.Scalar("int64", 0)

    def turn(self, first_tile: Expr, first_input: Expr | int, inputs: Expr | int, count: Expr) -> Expr:
        """The panel that was unpacked is multiplied from now on, and `count` tiles are to be unpacked; -> chunks."""
        self.now.set(self.tiles * self.tile_elements - self.now.get())
        self.first_tile.set(first_tile)
        self.first_part.set(b.index(first_input) // self.source.part)
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

        source, lanes, per_part = self.source, self.isa.lanes, chunks(self.source)
        start = b.let(
            self.tiles * self.tile_elements - self.now.get()
            + tile * self.tile_elements + chunk // 4 * (TILE * source.split) + chunk % 4 * (CHUNK * 2 * lanes)
        )  # fmt: skip

        def put(row: int, pairs: Expr, split: int = 0) -> None:
            at = start + row * (2 * lanes) + split * TILE
            b.store_vector(self.isa, self.panel, [at], tirx.reinterpret("uint16x32", pairs))

        first_tile, part = b.let(self.first_tile.get() + tile), b.let(self.first_part.get() + chunk // per_part)
        self._prefetch(first_tile, part, b.let(chunk % per_part))
        source.unpack(self.handles, first_tile, part, b.let(chunk % per_part), put)

    def _prefetch(self, tile: Expr, part: Expr, chunk: Expr) -> None:
        """Ask for the chunk that is unpacked a step after this one. It need not be there."""
        from tvm import tirx

        source = self.source
        following = b.let(part + self.step // source.part)
        ends = following >= source.parts
        tile = b.let(tirx.Select(ends, tile + self.tiles, tile))
        part = b.let(tirx.Select(ends, part % (self.step // source.part), following))
        nbytes = source.part_bytes // chunks(source)
        for line in range(0, nbytes, self.isa.cache_line):
            b.prefetch(self.data, (tile * source.parts + part) * source.part_bytes + chunk * nbytes + line)


class _Finish:
    """A block of results, finished row by row while the next block is summed: bias, activation, gate, residual, store.

    Blocks of f32 [2 row tiles, 2 column tiles, 16, 16] lie in `RESULTS` places in turn, which stay in the first-level
    cache.
    """

    def __init__(
        self, isa: X86Isa, epilogue: Epilogue, handles: Mapping[str, Expr], all_tiles: int, packed: bool, split: int,
        results: int,
    ) -> None:  # fmt: skip
        self.isa, self.epilogue, self.handles = isa, epilogue, handles
        self.all_tiles, self.packed, self.split, self.results = all_tiles, packed, split, results
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
        tile = (row // amx.ROWS * features + block) * self.split + part
        return tile * TILE + row % amx.ROWS * INPUTS + column % INPUTS

    def row(self, m: Expr) -> None:
        """Finish row m of the block that waits, if it has so many."""
        with b.when(m < self.rows.get()):
            row, first_tile = b.let(self.first_row.get() + m), self.first_tile.get()
            lanes, tile = self.isa.lanes, amx.ROWS * amx.ROWS
            at = b.let(self.place.get() + m // amx.ROWS * (PAIR * tile) + m % amx.ROWS * lanes)
            vectors = [self.isa.load(self.sums, at + c * tile) for c in range(PAIR)]
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
        groups = [vectors] if epilogue.tiles == PAIR else [[vector] for vector in vectors]
        values = [
            b.let(epilogue.value(isa, self.handles, row, b.let(column + i), sums)) for i, sums in enumerate(groups)
        ]
        out = b.view(self.handles["out"], [b.MANY], "uint16")
        for part, both in enumerate(bf16_parts(isa, values[0], values[-1], self.split)):
            bits = b.let(both)
            kept = bits if len(values) == PAIR else permute([bits], range(isa.lanes // 2))
            lanes = isa.lanes * len(values)
            at = self._packed_at(row, column * isa.lanes, part)
            b.store_vector(isa, out, [at], tirx.reinterpret(f"uint16x{lanes}", kept))


def tile_linear(
    machine: Machine,
    *,
    n: int,
    k: int,
    bits: int = 16,
    group: int = INPUTS,
    symmetric: bool = True,
    gated: bool = False,
    activation: str = "none",
    bias: bool = False,
    residual: bool = False,
    packed: bool = False,
    far: bool = False,
    step: int,
    tiles: int,
    row_block: int,
) -> PrimFunc:
    """(x u16 [ceil(T / 32) * 2, inputs / 32, split, 16, 32] bf16 bits in tiles, data, scales and minimums as the
    weights have them, bias f32 [n] if any, residual f32 [T, features] if any, out f32 [T, features], workspace u8;
    T, begin, end).

    bits: 4, 8, 16 for bf16 weights, or 32 for f32 ones, which split into 3 as the activations do (else 1). packed: out
    is in tiles as x is; features are a multiple of 32. One unit: `row_block` rows by `tiles` weight tiles; consecutive
    units share the rows. step: inputs that are unpacked at a time, whole groups. far: the activations of a block of
    rows do not stay in the second-level cache, and are asked for ahead of their use.
    """
    isa, epilogue = isa_for(machine), Epilogue(n, gated, activation, bias, residual)
    source: Source
    if bits == 32:
        all_tiles, source = FloatLayout("f32", isa.lanes, gated).tiles(n), Single(isa, k)
    elif bits == 16:
        all_tiles, source = FloatLayout("bf16", isa.lanes, gated).tiles(n), Float(isa, k)
    else:
        layout = quantized_layout(machine, bits, group, symmetric, gated)
        all_tiles, source = layout.tiles(n), Quantized(isa, layout, k)
    if packed and (epilogue.features % INPUTS or tiles % (PAIR * epilogue.tiles)):
        raise ValueError(f"{epilogue.features} features in panels of {tiles} tiles cannot be packed into tiles")
    if row_block % ROWS or tiles % PAIR or step % source.part or source.part % INPUTS:
        raise ValueError(f"blocks of {row_block} rows by {tiles} tiles in steps of {step} inputs do not fit")
    inputs, split = source.parts * source.part, source.split
    step = min(step, inputs)
    whole = (inputs - 1) // step  # steps before the last
    last = inputs - whole * step
    first_sum = step * split * tiles * isa.lanes  # in f32, after two panels of bf16
    first_result = first_sum + row_block * tiles * isa.lanes

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        panels, units = -(-all_tiles // tiles), b.let(sizes["end"] - sizes["begin"])
        sums = b.view(handles["workspace"], [b.MANY], "float32")
        x = b.view(handles["x"], [b.MANY], "uint16")
        ahead = _Ahead(isa, source, handles, step, tiles)
        finish = _Finish(isa, epilogue, handles, all_tiles, packed, split, first_result)

        def panel(unit: Expr) -> tuple[Expr, Expr]:
            """A unit's first tile, and how many it has."""
            first = b.let(unit % panels * tiles)
            return first, b.let(tirx.Min(b.index(all_tiles) - first, b.index(tiles)))

        first_step = step if whole else last
        first_tile, count = panel(sizes["begin"])
        ahead.unpack(ahead.turn(first_tile, 0, first_step, b.let(tirx.Select(units > 0, count, b.index(0)))))
        with amx.configured(), b.loop(units) as i:
            unit = b.let(sizes["begin"] + i)
            first_tile, tiles_here = panel(unit)
            next_tile, tiles_next = panel(unit + 1)
            first_row = b.let(unit // panels * row_block)
            rows_here = b.let(tirx.Min(sizes["T"] - first_row, b.index(row_block)))
            row_pairs, column_pairs = b.let((rows_here + (ROWS - 1)) // ROWS), b.let((tiles_here + 1) // PAIR)

            def multiply(first: Expr, count: int, chunks_ahead: Expr, is_last: bool) -> None:
                """Add up `count` inputs from `first` on, for all blocks of results."""
                blocks = b.let(row_pairs * column_pairs * (count // INPUTS))
                share = b.let((chunks_ahead + (blocks - 1)) // blocks)
                finish.rows.set(0)
                with b.loop(row_pairs) as row_pair, b.loop(column_pairs) as column_pair:
                    one_block(first, count, share, row_pair, column_pair, is_last)
                if is_last:
                    with b.loop(ROWS) as m:
                        finish.row(m)

            def one_block(
                first: Expr, count: int, share: Expr, row_pair: Expr, column_pair: Expr, is_last: bool
            ) -> None:
                place = b.let((row_pair * (tiles // PAIR) + column_pair) * SUMS + first_sum)
                corners = [place + c * (SUMS // 4) for c in range(4)]
                if is_last and not whole:
                    _each(range(4), amx.zero)
                else:
                    b.either(
                        first == 0,
                        lambda: _each(range(4), amx.zero),
                        lambda: _each(range(4), lambda c: amx.load(c, sums, corners[c])),
                    )
                row_tile = first_row // amx.ROWS + row_pair * PAIR
                rows = [b.let(((row_tile + r) * inputs + first) * (amx.ROWS * split)) for r in range(PAIR)]
                now = ahead.now.get()
                columns = [b.let(now + (column_pair * PAIR + c) * (step * isa.lanes * split)) for c in range(PAIR)]
                block_row, block_tile = b.let(first_row + row_pair * ROWS), b.let(first_tile + column_pair * PAIR)
                rows_each = -(-ROWS // (count // INPUTS))
                with b.loop(count // INPUTS) as block:

                    def finish_some() -> None:
                        with b.loop(rows_each) as j:
                            finish.row(b.let(block * rows_each + j))

                    work = {0: lambda: ahead.unpack(share)}
                    if is_last:
                        work[2 * len(_PRODUCTS[split])] = finish_some
                    if far:
                        fetch_next(count, rows, row_pair, column_pair, block)
                    products(block, rows, columns, work)
                if is_last:
                    place = finish.next_place()
                    for c in range(4):
                        amx.store(c, sums, place + c * (SUMS // 4))
                    many = b.let(tirx.Min(rows_here - row_pair * ROWS, b.index(ROWS)))
                    finish.wait(many, block_row, block_tile)
                else:
                    for c in range(4):
                        amx.store(c, sums, corners[c])

            def fetch_next(count: int, rows: list[Expr], row_pair: Expr, column_pair: Expr, block: Expr) -> None:
                """Ask for a share of the rows that come next: the following pair's, or the first pair's next step."""
                row_tile = amx.ROWS * split * inputs
                to_first = count * (amx.ROWS * split) - row_pair * (PAIR * row_tile)
                following = b.let(tirx.Select(row_pair + 1 < row_pairs, b.index(PAIR * row_tile), to_first))
                lines = -(-amx.ROWS * split // (tiles // PAIR))
                for row in rows:
                    at = row + following + block * (TILE * split) + column_pair * (lines * INPUTS)
                    for line in range(lines):
                        b.prefetch(x, at + line * INPUTS)

            def products(
                block: Expr, rows: list[Expr], columns: list[Expr], work: dict[int, Callable[[], None]]
            ) -> None:
                """Of INPUTS inputs; work: what is done after the product of that number."""
                before: tuple[int | None, int | None] = (None, None)
                number = 0
                for of_x, of_w in _PRODUCTS[split]:
                    if of_w != before[1]:
                        for c in range(PAIR):
                            amx.load(6 + c, ahead.panel, columns[c] + (block * split + of_w) * TILE)
                    for r in range(PAIR):
                        if of_x != before[0]:
                            amx.load(4 + r, x, rows[r] + (block * split + of_x) * TILE)
                        for c in range(PAIR):
                            amx.dot_bf16(2 * r + c, 4 + r, 6 + c)
                            if number in work:
                                work[number]()
                            number += 1
                    before = of_x, of_w

            with b.loop(whole) as s:
                length = b.let(tirx.Select(s + 1 < whole, b.index(step), b.index(last)))
                chunks_ahead = ahead.turn(first_tile, b.let((s + 1) * step), length, tiles_here)
                multiply(b.let(s * step), step, chunks_ahead, is_last=False)
            after = b.let(tirx.Select(i + 1 < units, tiles_next, b.index(0)))
            chunks_ahead = ahead.turn(next_tile, 0, first_step, after)
            multiply(b.index(whole * step), last, chunks_ahead, is_last=True)

    results = [(name, "uint16" if packed and name == "out" else dtype) for name, dtype in epilogue.pointers()]
    pointers = [("x", "uint16"), *source.pointers(), *results, ("workspace", "uint8")]
    return b.plain_function(pointers, ["T"], body, isa.pairs_helper)


def _each(numbers: range, emit: Callable[[int], None]) -> None:
    for number in numbers:
        emit(number)
