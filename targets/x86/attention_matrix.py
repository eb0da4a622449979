"""Attention on tile registers (AMX): products of bf16, sums in f32, for units of more than a few query rows.

A step takes some pages for every block of 16 rows: their keys and values become bf16 pairs once for all rows
of the unit, then each block has scores = Q K in tiles, weights = 2^(scores - greatest) in vectors, sums += weights V
in tiles. Scores carry a factor of log2(e), so that a weight is a power of two, and bf16 is built from integers: while
tiles are in use, half of the units for floating point stand still. For 16 rows, 32 keys and 64 channels the tiles take
128 cycles; a page's conversion about 600 once for all rows of a chunk; the rest goes to weights and to moving tiles.
Units of few rows that decode take the f32 kernel instead.

Rounding: queries, keys and values to bf16, 2^-8 of each at most (keys and values of an f16 cache lose their last three
bits); weights by 2^-8 (1 + ln 2). A row's weights are summed as rounded. Weights of masked keys are exactly 0, and
values of slots that hold no token are read as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.compiler.ir.encoded import PAGE
from llmc.targets.cpu.attention_parts import MASKED, fused
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_tile import TileBody, default_block, refuse_registers, vector_stack
from llmc.targets.cpu.builder import either, index, let, loop, scratch, when
from llmc.targets.cpu.cpu_template import SCALARS, CpuTemplate, arrays
from llmc.targets.cpu.vector_math import exp
from llmc.targets.cpu.vectors import (
    aligned_scratch,
    as_f32,
    divide,
    integer,
    load,
    maximum,
    permute,
    prefetch,
    reduce,
    remainder,
    splat,
    store,
)
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Rows, knob
from llmc.targets.x86 import tiles as amx
from llmc.targets.x86.isa import X86Bf16Dots, X86Isa, isa_for
from llmc.targets.x86.tiles import COLUMNS, ROWS, WORDS
from llmc.targets.x86.tiles import INPUTS as DEPTH

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

HALF = PAGE // 2
BIAS = 127  # of the exponent of f32 and bf16
FIXED = 65536.0  # f32 from here on are multiples of 1/128
FIXED_BITS = 0x47800000  # its bits
WIDE = 768  # elements of a key and a value together


@dataclass(frozen=True)
class AttentionMatrix(CpuTemplate[AttentionProblem], name="attention_matrix"):
    """Tiles of bf16 for units of many rows, vectors of f32 as `AttentionTile` for `few` that decode.

    few: heads that share a key head, up to which tokens decode on vectors; also the rows of those' register blocks.
    accumulators: registers that hold their sums. step_pages: pages between two looks at the greatest score; their
    pairs stay in L1, beside scores and weights. room: KiB of queries and sums of the rows that share a conversion of
    keys and values; they stay in L2.
    """

    few: int = knob(4, 8, 16, exact=False)
    accumulators: int = knob(8, 12, 16, 20, 24, 28)
    step_pages: int = knob(1, 2, 4, exact=False)
    room: int = knob(32, 64, 128, 256, 512)

    @classmethod
    def default(cls, problem: AttentionProblem, machine: Machine, rows: Rows = ANY_ROWS) -> AttentionMatrix:
        """Half of the room for wide heads, whose pages take more of the stack."""
        registers = isa_for(machine).registers
        room = 256 if problem.head_dim + problem.value_dim <= WIDE else 128
        return cls(default_block(registers), registers * 3 // 4, step_pages=2, room=room)

    def refuse(self, problem: AttentionProblem, machine: Machine) -> str:
        if not fits(machine, problem.value_dim, problem.cache_dtype):
            return "no tiles of bf16 for such values, or none in the machine"
        return refuse_registers(self.few, self.accumulators, isa_for(machine)) or super().refuse(problem, machine)

    def stack_bytes(self, problem: AttentionProblem, machine: Machine) -> int:
        isa = isa_for(machine)
        chunk, step, lanes = self._chunk(problem), self.step_pages, isa.lanes
        depth_tiles, value_tiles = -(-problem.head_dim // DEPTH), -(-problem.value_dim // COLUMNS)
        words = chunk // ROWS * depth_tiles, step * 2 * depth_tiles, step * value_tiles, step
        rows = value_tiles * COLUMNS, lanes, 1, 1, 1  # sums, totals, places, slopes, middles
        sizes = [WORDS * tiles for tiles in words] + [chunk * width for width in rows] + [chunk + lanes] * 5
        sizes += [ROWS * step * PAGE, ROWS * lanes, *[lanes] * 8, problem.head_dim]
        few = vector_stack(problem, isa, self.few, self.few, self.accumulators)
        return arrays(*(4 * size for size in sizes)) - SCALARS + few  # single numbers are in both

    def _chunk(self, problem: AttentionProblem) -> int:
        return chunk_rows(problem.head_dim, problem.value_dim, self.room << 10)

    def build(self, problem: AttentionProblem, machine: Machine) -> PrimFunc:
        isa = isa_for(machine)
        knobs = {"chunk": self.few, "block": self.few, "accumulators": self.accumulators}
        own = {"tall_chunk": self._chunk(problem), "step_pages": self.step_pages}
        body = MatrixBody(isa=isa, **problem.params(), **knobs, **own)  # type: ignore[arg-type]
        return body.kernel(isa.pairs_helper + X86Bf16Dots(isa.lanes).helper, ("PROMPT",))


def fits(machine: Machine, value_dim: int, cache_dtype: str) -> bool:
    """Whether this kernel can serve: f32 caches want f32 products; values shorter than a tile are not worth it."""
    instructions = amx.has_tiles(machine, "bf16") and machine.has("avx512bf16", "avx512vbmi")
    return instructions and cache_dtype == "float16" and value_dim >= 16


def chunk_rows(head_dim: int, value_dim: int, room: int) -> int:
    """Rows whose queries, sums and statistics are held at once: what `room` bytes hold, a multiple of 16."""
    row_bytes = 2 * round_up(head_dim, DEPTH) + 4 * round_up(value_dim, COLUMNS) + 4 * COLUMNS
    return max(ROWS, room // row_bytes // ROWS * ROWS)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def round_up_128th(isa: X86Isa, x: Expr) -> Expr:
    """The next multiple of 1/128: no score is above its row's peak, and peaks are exact in fixed point."""
    from tvm import tirx
    from tvm.script import tirx as T

    how = tirx.const(7 << 4 | 2, "int32")  # 7 binary places, upwards
    every, current = tirx.const(-1, "int16"), tirx.const(4, "int32")
    return T.call_llvm_pure_intrin(
        isa.f32, "llvm.x86.avx512.mask.rndscale.ps.512", x, how, splat(0.0, isa.lanes), every, current
    )


def excess() -> list[int]:
    """By how much a mantissa of 7 bits i / 128 exceeds that of 2^(i / 128)."""
    return [i - round(128 * (2 ** (i / 128) - 1)) for i in range(128)]


def load_bytes(buffer: Buffer, start: int) -> Expr:
    """A vector of bytes from an i32 array."""
    from tvm import tirx

    return tirx.reinterpret("int8x64", load(buffer, start, COLUMNS))


def power_pairs(isa: X86Isa, low: Expr, high: Expr, table: Sequence[Expr]) -> Expr:
    """bf16 pairs of 2^x for low = x + BIAS + FIXED and high likewise, x <= 0; exactly 0 for x <= -BIAS.

    The sum with FIXED has x + BIAS in its last bits, in units of 1/128: the exponent of 2^x, then a mantissa that grows
    linearly, which `table` (`excess`) corrects. Relative error: x is rounded to 1/128 and the mantissa to 7 bits,
    2^-8 (ln 2 + 1) in all.
    """
    from tvm import tirx
    from tvm.script import tirx as T

    least = splat(FIXED_BITS, isa.lanes, "int32")
    bits = [let(tirx.Max(tirx.reinterpret(isa.i32, v), least)) for v in (low, high)]
    words = let((bits[0] & 0xFFFF) | (bits[1] << 16))
    places = tirx.reinterpret("int8x64", words)
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    found = tirx.reinterpret(isa.i32, T.call_llvm_pure_intrin("int8x64", name, table[0], places, table[1]))
    return words - (found & 0x00FF00FF)


def reduce_rows(vectors: Sequence[Expr], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Lane r is all lanes of vectors[r] combined: as many vectors as lanes, halved pair by pair."""
    lanes = width = len(vectors)
    while len(vectors) > 1:
        width //= 2
        low = [lane * 2 * width + i for lane in range(lanes // width) for i in range(width)]
        high = [lane + width for lane in low]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [let(combine(permute([a, b], low), permute([a, b], high))) for a, b in pairs]
    return vectors[0]


@dataclass(frozen=True)
class MatrixBody(TileBody):
    """Emits the work of one unit: as `TileBody` does where it has a few rows that decode, on tiles otherwise.

    So a row's kind decides: one that decodes has a unit of its own, of as many rows as heads share a key-value head.
    """

    isa: X86Isa
    tall_chunk: int
    step_pages: int

    def work(self, a: SimpleNamespace, place: SimpleNamespace) -> None:
        from tvm import tirx

        shared = {field.name: getattr(self, field.name) for field in fields(TileBody)}
        tall = TallBody(**{**shared, "chunk": self.tall_chunk}, step_pages=self.step_pages)
        alone = tirx.And(a.PROMPT == 0, place.rows <= self.block)
        either(alone, lambda: super(MatrixBody, self).work(a, place), lambda: tall.work(a, place))


@dataclass(frozen=True)
class TallBody(TileBody):
    """Units of many rows. Queries lie in tiles [block of 16 rows, head_dim / 32] of bf16 pairs; sums in rows of
    `sums_width`, whose last 16 columns are the last 16 of the values.
    """

    isa: X86Isa
    step_pages: int

    @property
    def depth_tiles(self) -> int:
        return -(-self.head_dim // DEPTH)

    @property
    def value_tiles(self) -> int:
        return -(-self.value_dim // COLUMNS)

    @property
    def score_unit(self) -> float:
        return math.log2(math.e)

    @property
    def sums_width(self) -> int:
        return self.value_tiles * COLUMNS

    def work(self, a: SimpleNamespace, place: SimpleNamespace) -> None:
        t = SimpleNamespace(
            **vars(place),
            query=self.words(self.chunk // ROWS * self.depth_tiles),
            keys=self.words(self.step_pages * 2 * self.depth_tiles),
            values=self.words(self.step_pages * self.value_tiles),
            scores=aligned_scratch(ROWS * self.step_pages * PAGE, self.lanes),
            weights=self.words(self.step_pages),
            greatest=aligned_scratch(ROWS * self.lanes, self.lanes),
            peaks=aligned_scratch(ROWS, self.lanes),
            shrink=aligned_scratch(ROWS, self.lanes),
            excess=aligned_scratch(2 * self.lanes, self.lanes, "int32"),
            **self.allocate_rows(self.sums_width),
        )
        self.fill_table(t.excess)
        with amx.configured():
            self.clear_unused_depth(t)
            self.each_chunk(t, lambda first, count: self.chunk_of_rows(a, t, first, count))

    def fill_table(self, table: Buffer) -> None:
        """The bytes of `excess`."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as I

        numbers = bytes(excess())
        for place in range(0, len(numbers), 4):
            four = int.from_bytes(numbers[place : place + 4], "little")
            I.buffer_store(table, tirx.const(four, "int32"), [index(place // 4)])

    def words(self, tiles: int) -> Buffer:
        """Memory for tiles of bf16 pairs."""
        return aligned_scratch(tiles * WORDS, self.lanes, "int32")

    # Queries, keys and values as tiles

    def start_sums(self, t: SimpleNamespace, r: Expr) -> None:
        for j in range(self.value_tiles):
            store(t.acc, r * self.sums_width + j * COLUMNS, splat(0.0, COLUMNS))

    def sums(self, t: SimpleNamespace, r: Expr, body: Callable[[Expr | int, int, Expr], None]) -> None:
        for j in range(self.value_tiles):
            body(self.value_column(j), COLUMNS, load(t.acc, r * self.sums_width + j * COLUMNS, COLUMNS))

    def join_row(self, a: SimpleNamespace, t: SimpleNamespace, r: Expr, row: Expr) -> None:
        """As in `Parts`. All is read before any of it is written, as the last two tiles of values may overlap."""
        older, newer = (let(splat(load(each, r), COLUMNS)) for each in (t.older, t.newer))
        joined: list[tuple[Expr | int, Expr]] = []

        def piece(offset: Expr | int, width: int, value: Expr) -> None:
            joined.append((offset, let(fused(load(a.out, row + offset, width), older, value * newer))))

        self.sums(t, r, piece)
        for offset, value in joined:
            store(a.out, row + offset, value)

    def value_column(self, tile: int) -> int:
        """The first channel of a tile of values: the last tile overlaps the one before where they do not divide."""
        return min(tile * COLUMNS, self.value_dim - COLUMNS)

    def start_query(self, t: SimpleNamespace, r: Expr, source: tuple[Buffer, Expr] | None) -> None:
        start = let(divide(r, ROWS) * (self.depth_tiles * WORDS) + (r - divide(r, ROWS) * ROWS) * self.lanes)
        for j in range(self.depth_tiles):
            halves = []
            for offset in (j * DEPTH, j * DEPTH + self.lanes):
                value = splat(0.0, self.isa.lanes)
                if source is not None:
                    found = load(source[0], source[1] + offset, self.isa.lanes, self.head_dim - offset)
                    value = found * self.query_factor
                halves.append(value)
            store(t.query, start + j * WORDS, self.isa.pack_bf16(*halves))

    def clear_unused_depth(self, t: SimpleNamespace) -> None:
        """Zeros in those rows of the tiles of keys that no channel fills."""
        used, rows = -(-self.head_dim // 2), self.depth_tiles * ROWS
        if used == rows:
            return
        with loop(self.step_pages * 2) as half, loop(rows - used) as row:
            at = (half * rows + used + row) * self.lanes
            store(t.keys, at, splat(0, self.isa.lanes, "int32"))

    def convert(self, a: SimpleNamespace, t: SimpleNamespace, page: Expr, place: Expr, last: Expr) -> None:
        """Page `page` of the sequence as tiles of pairs, to `place` of the step. Meanwhile the page of the next step,
        none after `last`, is on its way from memory.
        """
        from tvm import tirx

        page_id = integer(load(a.block_table, t.table + page))
        head = let(page_id * self.kv_heads + t.kv_head)
        keys, values = let(head * (self.head_dim * PAGE)), let(head * (PAGE * self.value_dim))
        next_id = integer(load(a.block_table, t.table + tirx.Min(page + self.step_pages, last)))
        next_head = let(next_id * self.kv_heads + t.kv_head)
        next_keys, next_values = let(next_head * (self.head_dim * PAGE)), let(next_head * (PAGE * self.value_dim))
        self.convert_keys(a, t, place, keys, next_keys)
        self.convert_values(a, t, page, place, values, next_values)

    def convert_keys(self, a: SimpleNamespace, t: SimpleNamespace, place: Expr, first: Expr, following: Expr) -> None:
        """Channels in pairs. first, following: where the page's keys begin, and the next one's."""
        isa, lanes = self.isa, self.lanes

        def pair_of(channel: Expr | int, both: bool) -> None:
            for half in range(2):
                start = first + channel * PAGE + half * lanes
                odd = as_f32(load(a.keys, start + PAGE, lanes)) if both else splat(0.0, lanes)
                at = (place * 2 + half) * (self.depth_tiles * WORDS) + divide(index(channel), 2) * lanes
                store(t.keys, at, isa.pack_pairs(as_f32(load(a.keys, start, lanes)), odd))

        with loop(self.head_dim // 2) as pair:
            prefetch(a.keys, following + pair * (2 * PAGE), 2 * PAGE)
            pair_of(pair * 2, True)
        if self.head_dim % 2:
            pair_of(self.head_dim - 1, False)

    def convert_values(
        self, a: SimpleNamespace, t: SimpleNamespace, page: Expr, place: Expr, first: Expr, following: Expr
    ) -> None:
        """Tokens in pairs with those half a page on. Slots of the last page that hold no token of this sequence yet may
        hold anything, NaN included: they count as zeros. first, following: where the page's values begin, and the next
        one's."""
        from tvm import tirx

        isa, lanes, zeros = self.isa, self.lanes, splat(0.0, self.lanes)

        def pair_of(pair: Expr, tokens: int) -> None:
            for j in range(self.value_tiles):
                start = first + pair * self.value_dim + self.value_column(j)
                even = as_f32(load(a.values, start, lanes)) if tokens else zeros
                odd = as_f32(load(a.values, start + HALF * self.value_dim, lanes)) if tokens > 1 else zeros
                at = (place * self.value_tiles + j) * WORDS + pair * lanes
                store(t.values, at, isa.pack_pairs(even, odd))

        held = let(tirx.Min(t.end - page * PAGE, index(PAGE)))
        both = let(tirx.Max(held - HALF, index(0)))
        some = let(tirx.Min(held, index(HALF)))
        with loop(both) as pair:
            prefetch(a.values, following + pair * (2 * self.value_dim), 2 * self.value_dim)
            pair_of(pair, 2)
        with loop(some - both) as number:
            pair_of(let(both + number), 1)
        with loop(HALF - some) as number:
            pair_of(let(some + number), 0)

    # The work

    def chunk_of_rows(self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, count: Expr) -> None:
        """`count` rows from row `first` of the unit on, over those of this split's pages that they see."""
        from tvm import tirx

        blocks = let(divide(count + (ROWS - 1), ROWS))
        self.start_rows(a, t, first, count, blocks * ROWS)
        stop = self.last_page_of(t, first, count)

        def step(page: Expr, high: Expr) -> None:
            pages = let(tirx.Min(high - page, index(self.step_pages)))
            with loop(pages) as place:
                self.convert(a, t, let(page + place), place, let(stop - 1))
            with loop(blocks) as block:
                row = let(block * ROWS)
                top = self.position(t, first + row)
                bottom = self.position(t, tirx.Min(first + row + (ROWS - 1), first + count - 1))
                begin: Expr = index(0)
                if self.window:
                    begin = let(tirx.Max(self.first_page(top) - page, index(0)))
                end = let(tirx.Min(divide(self.last_seen(t.length, bottom), PAGE) + 1 - page, pages))
                with when(begin < end):
                    self.rows_block(t, row, page, begin, end, top)

        with loop(t.parts) as number:
            part = let(t.first_part + number)
            self.start_part(a, t, first, count, let(blocks * ROWS), part)
            low, high = self.pages_of_rows(t, part, first, stop)
            with loop(divide(tirx.Max(high - low, index(0)) + (self.step_pages - 1), self.step_pages)) as place:
                step(let(low + place * self.step_pages), high)
            self.finish_part(a, t, first, count, number)
        self.finish_rows(a, t, first, count)

    def pages_of_rows(self, t: SimpleNamespace, part: Expr, first: Expr, stop: Expr) -> tuple[Expr, Expr]:
        """From the first page of a step on: steps lie at the same pages for all rows, which round by step."""
        low, high = super().pages_of_rows(t, part, first, stop)
        return let(low - remainder(low, self.step_pages)), high

    def rows_block(self, t: SimpleNamespace, row: Expr, page: Expr, begin: Expr, end: Expr, top: Expr) -> None:
        """16 rows from `row` on, whose first is at position `top`, over places [begin, end) of a step from `page`."""
        self.multiply_keys(t, row, begin, end)
        self.weigh(t, row, page, begin, end, top)
        self.multiply_values(t, row, begin, end)

    def multiply_keys(self, t: SimpleNamespace, row: Expr, begin: Expr, end: Expr) -> None:
        """scores[16, keys of the step] = queries times keys: tiles 0 and 1, a page at a time."""
        start = let(row * (self.depth_tiles * self.lanes))
        resident = self.depth_tiles <= 2
        if resident:
            for j in range(self.depth_tiles):
                amx.load(6 + j, t.query, start + j * WORDS)
        with loop(end - begin) as number:
            place = let(begin + number)
            amx.zero(0)
            amx.zero(1)
            for j in range(self.depth_tiles):
                left = 6 + j % 2
                if not resident:
                    amx.load(left, t.query, start + j * WORDS)
                for half in range(2):
                    right = 2 + half + 2 * (j % 2)
                    amx.load(right, t.keys, ((place * 2 + half) * self.depth_tiles + j) * WORDS)
                    amx.dot_bf16(half, left, right)
            for half in range(2):
                amx.store(half, t.scores, place * PAGE + half * COLUMNS, self.step_pages * PAGE * 4)

    def multiply_values(self, t: SimpleNamespace, row: Expr, begin: Expr, end: Expr) -> None:
        """sums += weights times values: four tiles of sums at a time."""
        stride = self.sums_width * 4
        for group in range(0, self.value_tiles, 4):
            tiles = range(group, min(group + 4, self.value_tiles))
            for j in tiles:
                amx.load(j - group, t.acc, row * self.sums_width + j * COLUMNS, stride)
            with loop(end - begin) as number:
                place = let(begin + number)
                amx.load(4, t.weights, place * WORDS)
                for j in tiles:
                    right = 5 + j % 3
                    amx.load(right, t.values, (place * self.value_tiles + j) * WORDS)
                    amx.dot_bf16(j - group, 4, right)
            for j in tiles:
                amx.store(j - group, t.acc, row * self.sums_width + j * COLUMNS, stride)

    def weigh(self, t: SimpleNamespace, row: Expr, page: Expr, begin: Expr, end: Expr, top: Expr) -> None:
        """Scores to weights relative to each row's greatest score so far; older sums shrink where it has risen."""
        from tvm import tirx

        lanes = self.lanes
        if self.softcap or self.alibi or self.span:
            self.each_row(t, row, page, begin, end, True)
        else:
            edge = (page + end) * PAGE - 1 > self.last_seen(t.length, top)
            if self.window:
                # The last row of the block is less than 16 positions after the first.
                edge = tirx.Or(edge, (page + begin) * PAGE <= top + (ROWS - 1) - self.window)
            either(
                edge,
                lambda: self.each_row(t, row, page, begin, end, True),
                lambda: self.each_row(t, row, page, begin, end, False),
            )
        rows = [let(load(t.greatest, r * lanes, lanes)) for r in range(ROWS)]
        before = let(load(t.peak, row, lanes))
        after = let(round_up_128th(self.isa, maximum(before, reduce_rows(rows, maximum))))
        shrink = let(exp(self.isa, (before - after) * (1.0 / self.score_unit)))
        store(t.peak, row, after)
        store(t.peaks, 0, after)
        store(t.shrink, 0, shrink)
        with when(reduce(before - after, tirx.Min) < tirx.const(0.0, "float32")), loop(ROWS) as r:
            factor = let(splat(load(t.shrink, r), lanes))
            for j in range(self.value_tiles):
                at = (row + r) * self.sums_width + j * COLUMNS
                store(t.acc, at, load(t.acc, at, lanes) * factor)
            at = (row + r) * lanes
            store(t.total, at, load(t.total, at, lanes) * factor)
        table = [let(load_bytes(t.excess, half * lanes)) for half in range(2)]
        dots = X86Bf16Dots(lanes)
        with loop(ROWS) as r:
            shift = let(splat((FIXED + BIAS) - load(t.peaks, r), lanes))
            total = scratch(lanes, "float32")
            store(total, 0, load(t.total, (row + r) * lanes, lanes))
            with loop(end - begin) as number:
                place = let(begin + number)
                start = r * (self.step_pages * PAGE) + place * PAGE
                low, high = (let(load(t.scores, start + half * lanes, lanes) + shift) for half in range(2))
                pairs = let(power_pairs(self.isa, low, high, table))
                ones = splat(0x3F803F80, self.isa.lanes, "int32")
                store(total, 0, dots.dot(load(total, 0, lanes), pairs, ones))
                store(t.weights, place * WORDS + r * lanes, pairs)
            store(t.total, (row + r) * lanes, load(total, 0, lanes))

    def each_row(self, t: SimpleNamespace, row: Expr, page: Expr, begin: Expr, end: Expr, edit: bool) -> None:
        """Lane by lane the greatest score of each row, to t.greatest [16, lanes]; edit: masks and biases first."""
        lanes = self.lanes
        with loop(ROWS) as r:
            greatest = [scratch(lanes, "float32") for _ in range(2)]
            for half in greatest:
                store(half, 0, splat(MASKED, lanes))
            where = load(t.where, row + r) - (page * PAGE).astype("int32") if edit else None
            with loop(end - begin) as number:
                place = let(begin + number)
                for half in range(2):
                    at = r * (self.step_pages * PAGE) + place * PAGE + half * lanes
                    value = let(load(t.scores, at, lanes))
                    if where is not None:
                        limit = let(where - (place * PAGE).astype("int32"))  # the row's own slot of the page
                        held = self.held(t, page + place)
                        value = let(self.biased(t, row + r, value, limit, half * lanes))
                        value = let(self.masked(value, limit, held, half * lanes))
                        store(t.scores, at, value)
                    store(greatest[half], 0, maximum(load(greatest[half], 0, lanes), value))
            store(t.greatest, r * lanes, maximum(*(load(half, 0, lanes) for half in greatest)))
