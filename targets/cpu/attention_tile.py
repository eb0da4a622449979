"""Attention of one query tile to one key-value head, blocked by cache page, with an online softmax.

All query heads that share the key-value head are rows of one small matrix, so a page is read once for all of them.
Per page: scores = Q K (the page of keys is stored transposed, one vector is one channel of many tokens), softmax
statistics, acc = acc * correction + P V. Both products run the same register-blocked loop, `multiply`.

Decode (one token, few heads) reads f16 pages straight from the cache: the memory's bandwidth is the limit. Larger tiles
first convert a page to f32 in L1 and reuse it for every row block: the FMA units are the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.compiler.ir.encoded import PAGE
from llmc.targets.cpu.attention_parts import MASKED, Parts, locate_parts
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_products import multiply
from llmc.targets.cpu.attention_query import QueryRows
from llmc.targets.cpu.builder import either, index, let, loop, scratch, when
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for
from llmc.targets.cpu.vector_math import exp, tanh
from llmc.targets.cpu.vectors import (
    MEMORY_HELPER,
    aligned_scratch,
    as_f32,
    cast,
    copy,
    divide,
    for_pieces,
    integer,
    keep_in_memory,
    load,
    maximum,
    pieces,
    prefetch,
    range_kernel,
    reduce,
    remainder,
    splat,
    store,
)
from llmc.targets.kernel import Param
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

ROW_MULTIPLE = 16  # rows of a chunk are a multiple of it, and of every register block's


@dataclass(frozen=True)
class AttentionTile(CpuTemplate[AttentionProblem], name="attention_tile"):
    """Vectors of f32. The unit of a page is the cache's format, and the pages of a part decide bits whatever the kernel
    (docs/adr/0017). The page after this one is prefetched, as the block table names it: a distance in bytes means
    nothing in a cache of pages.

    chunk: rows whose accumulators and queries are held at once; they stay in L2. block: query rows of a register block
    where there are many. accumulators: registers that hold sums; the others have keys, values and scores.
    """

    chunk: int = knob(16, 32, 64, 128)
    block: int = knob(1, 2, 4, 8, 16)
    accumulators: int = knob(4, 6, 8, 12, 16, 20, 24, 28)

    @classmethod
    def default(cls, problem: AttentionProblem, machine: Machine, rows: Rows = ANY_ROWS) -> AttentionTile:
        registers = isa_for(machine).registers
        sized = [cls(chunk, default_block(registers), registers * 3 // 4) for chunk in (64, 32, 16)]
        return next((each for each in sized if not each.refuse(problem, machine)), sized[0])

    def refuse(self, problem: AttentionProblem, machine: Machine) -> str:
        return refuse_registers(self.block, self.accumulators, isa_for(machine)) or super().refuse(problem, machine)

    def stack_bytes(self, problem: AttentionProblem, machine: Machine) -> int:
        return vector_stack(problem, isa_for(machine), self.chunk, self.block, self.accumulators)

    def build(self, problem: AttentionProblem, machine: Machine) -> PrimFunc:
        knobs = {"chunk": self.chunk, "block": self.block, "accumulators": self.accumulators}
        return TileBody(isa=isa_for(machine), **problem.params(), **knobs).kernel()  # type: ignore[arg-type]


def default_block(registers: int) -> int:
    """Rows of a register block: with two or three vectors each, sums fill most of the registers."""
    return 8 if registers == 32 else 4


def refuse_registers(block: int, accumulators: int, isa: VectorIsa) -> str:
    """Why a register block cannot be, empty where it can."""
    if block > accumulators:
        return f"{block} rows of a block have more sums than {accumulators} accumulators"
    if accumulators > isa.registers - 4:
        return f"{accumulators} accumulators leave less than 4 of {isa.registers} registers to operands"
    return ""


def vector_stack(problem: AttentionProblem, isa: VectorIsa, chunk: int, block: int, accumulators: int) -> int:
    """Bytes of stack of `TileBody`."""
    lanes, padded = isa.lanes, chunk + isa.lanes
    rows_of_chunk = (problem.head_dim, problem.value_dim, lanes, 1, 1, 1)  # queries, sums, totals, place, slope, middle
    sizes = [chunk * width for width in rows_of_chunk] + [padded] * 5 + [problem.head_dim, lanes]
    group = problem.group
    if group <= accumulators and group <= chunk:
        sizes += _page_sizes(problem, lanes, group, convert=False)
    sizes += _page_sizes(problem, lanes, block, convert=problem.cache_dtype != "float32")
    return arrays(*(4 * size for size in sizes))


def _page_sizes(problem: AttentionProblem, lanes: int, rows: int, convert: bool) -> list[int]:
    """Numbers in the arrays that `TileBody.rows_chunk` makes."""
    sums = [width for size in (PAGE, problem.value_dim) for _, width in pieces(size, lanes)] * rows
    page = [(problem.head_dim + problem.value_dim) * PAGE] * convert
    return [*page, rows * PAGE, *[-(-rows // lanes) * lanes] * 2, *sums]


@dataclass(frozen=True)
class TileBody(Parts):
    """Emits the work of one unit. Rows are numbered token by token, the group's heads within a token."""

    isa: VectorIsa
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int
    softcap: float
    sinks: bool
    alibi: bool
    cache_dtype: str
    causal: bool
    span: int
    query: tuple[Param, ...]
    chunk: int
    block: int
    accumulators: int

    @property
    def query_rows(self) -> QueryRows:
        return QueryRows(*self.query) if self.query else QueryRows(self.heads * self.head_dim)  # type: ignore[arg-type]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def lanes(self) -> int:
        return int(self.isa.lanes)

    def kernel(self, helpers: str = "", sizes: tuple[str, ...] = ()) -> PrimFunc:
        pointers = [("query", "float32"), ("keys", self.cache_dtype), ("values", self.cache_dtype)]
        pointers += [("tiles", "int32"), ("block_table", "int32")]
        pointers += [("sinks", "float32")] * self.sinks + [("slopes", "float32")] * self.alibi
        pointers += [("starts", "int32")] * (not self.causal) + [("bias", "float32")] * bool(self.span)
        pointers += self.query_rows.pointers()
        pointers += [("out", "float32"), ("state", "float32"), ("partial", "float32")]
        return range_kernel(pointers, ["M", "S", *sizes], self.unit, helpers + MEMORY_HELPER)

    def unit(self, a: SimpleNamespace, u: Expr) -> None:
        """One (tile, key-value head, split)."""
        self.work(a, self.locate(a, u))

    def locate(self, a: SimpleNamespace, u: Expr) -> SimpleNamespace:
        """What unit u is: its head, split, rows, their positions, and its range of the sequence's pages."""
        split = let(remainder(u, a.S))
        outer = let(divide(u, a.S))
        kv_head = let(remainder(outer, self.kv_heads))
        tile = let(divide(outer, self.kv_heads) * 4)
        sequence, token = integer(load(a.tiles, tile)), integer(load(a.tiles, tile + 1))
        count, position = integer(load(a.tiles, tile + 2)), integer(load(a.tiles, tile + 3))
        length = None
        if not self.causal:
            length = let(integer(load(a.starts, sequence + 1)) - integer(load(a.starts, sequence)))
        last_page = let(divide(self.last_seen(length, position + count - 1), PAGE))
        first_page: Expr = index(0)
        if self.window:
            first_page = let(self.first_page(position))
        return SimpleNamespace(
            unit=u,
            length=length,
            bias=a.bias if self.span else None,
            kv_head=kv_head,
            split=split,
            token=token,
            count=count,
            rows=let(count * self.group),
            position=position,
            bottom=(bottom := let(position + count)),
            end=bottom if length is None else length,
            table=let(sequence * a.M),
            **locate_parts(first_page, last_page, split, a.S),
        )

    def allocate(self, place: SimpleNamespace) -> SimpleNamespace:
        """`place`, with the memory that a chunk of rows works in."""
        return SimpleNamespace(
            **vars(place),
            query=aligned_scratch(self.chunk * self.head_dim, self.lanes),
            **self.allocate_rows(self.value_dim),
        )

    def allocate_rows(self, width: int) -> dict[str, Buffer]:
        """Accumulators of `width` numbers a row, and the rows' statistics."""
        return {
            "acc": aligned_scratch(self.chunk * width, self.lanes),
            "peak": aligned_scratch(self.chunk + self.lanes, self.lanes),
            "total": aligned_scratch(self.chunk * self.lanes, self.lanes),
            **{name: aligned_scratch(self.chunk + self.lanes, self.lanes) for name in ("top", "sum", "older", "newer")},
            "where": scratch(self.chunk, "int32"),
            "turned": aligned_scratch(self.head_dim if self.query_rows.changed else 1, self.lanes),
            "slope": scratch(self.chunk if self.alibi else 1, "float32"),
            **({"middle": scratch(self.chunk, "int32")} if self.span else {}),
        }

    def work(self, a: SimpleNamespace, place: SimpleNamespace) -> None:
        """All rows of the unit."""
        from tvm import tirx

        t = self.allocate(place)

        def decode() -> None:
            after = self.locate(a, let(tirx.Min(t.unit + 1, a.end - 1)))
            self.rows_chunk(a, t, index(0), index(self.group), self.group, convert=False, after=after)

        def prefill() -> None:
            self.each_chunk(
                t,
                lambda first, left: self.rows_chunk(
                    a, t, first, left, self.block, convert=self.cache_dtype != "float32"
                ),
            )

        if self.group <= self.accumulators and self.group <= self.chunk:
            either(t.count == 1, decode, prefill)
        else:
            prefill()

    def each_chunk(self, t: SimpleNamespace, body: Callable[[Expr, Expr], None]) -> None:
        """body(first row, number of rows) for every chunk of the unit's rows: as few and as even as can be."""
        from tvm import tirx

        number = let(divide(t.rows + (self.chunk - 1), self.chunk))
        block = ROW_MULTIPLE
        size = let(divide(divide(t.rows + (number - 1), number) + (block - 1), block) * block)
        with loop(divide(t.rows + (size - 1), size)) as place:
            first = let(place * size)
            body(first, let(tirx.Min(t.rows - first, size)))

    def rows_chunk(
        self,
        a: SimpleNamespace,
        t: SimpleNamespace,
        first: Expr,
        count: Expr,
        block: int,
        convert: bool,
        after: SimpleNamespace | None = None,
    ) -> None:
        """`count` rows from row `first` of the tile on, over this unit's parts, in register blocks of `block` rows.

        after: the unit that comes next, if it begins with reading pages from memory as well.
        """
        from tvm import tirx

        blocks = let(divide(count + (block - 1), block))
        self.start_rows(a, t, first, count, blocks * block)
        keys_local = aligned_scratch(self.head_dim * PAGE if convert else 1, self.lanes)
        values_local = aligned_scratch(PAGE * self.value_dim if convert else 1, self.lanes)

        def one_page(page: Expr, stop: Expr) -> None:
            page_id = integer(load(a.block_table, t.table + page))
            keys = let((page_id * self.kv_heads + t.kv_head) * (self.head_dim * PAGE))
            values = let((page_id * self.kv_heads + t.kv_head) * (PAGE * self.value_dim))
            key_buffer, value_buffer = a.keys, a.values
            following: tuple[Expr, Expr] | None = None
            if convert:
                copy(self.lanes, a.keys, keys, keys_local, index(0), self.head_dim * PAGE)
                copy(self.lanes, a.values, values, values_local, index(0), PAGE * self.value_dim)
                key_buffer, value_buffer, keys, values = keys_local, values_local, index(0), index(0)
            else:
                following = self.following(a, t, page, stop, after)
            with loop(blocks) as b:
                row = let(b * block)
                last = self.last_seen(
                    t.length, self.position(t, tirx.Min(first + row + (block - 1), first + count - 1))
                )
                with when(page * PAGE <= last):
                    self.page_block(t, row, block, page, (key_buffer, keys), (value_buffer, values), following)

        stop = self.last_page_of(t, first, count)
        with loop(t.parts) as number:
            part = let(t.first_part + number)
            self.start_part(a, t, first, count, let(blocks * block), part)
            low, high = self.pages_of_rows(t, part, first, stop)
            with loop(tirx.Max(high - low, index(0))) as place:
                one_page(let(low + place), stop)
            self.finish_part(a, t, first, count, number)
        self.finish_rows(a, t, first, count)

    def following(
        self, a: SimpleNamespace, t: SimpleNamespace, page: Expr, stop: Expr, after: SimpleNamespace | None
    ) -> tuple[Expr, Expr]:
        """Where the keys and values begin that are wanted after `page`: the next page's, or past `stop` those of the
        first page of the unit `after`, if there is one. A unit that starts with a page from memory waits for it: with
        four pages a unit, a tenth of the time.
        """
        from tvm import tirx

        place, head = t.table + tirx.Min(page + 1, stop - 1), t.kv_head
        if after is not None:
            more = page + 1 < stop
            place = tirx.Select(more, t.table + page + 1, after.table + after.first)
            head = tirx.Select(more, t.kv_head, after.kv_head)
        next_head = let(integer(load(a.block_table, let(place))) * self.kv_heads + head)
        return next_head * (self.head_dim * PAGE), next_head * (PAGE * self.value_dim)

    def last_page_of(self, t: SimpleNamespace, first: Expr, count: Expr) -> Expr:
        """Behind the unit's last page that some row of [first, first + count) sees."""
        from tvm import tirx

        return let(tirx.Min(t.stop, divide(self.last_seen(t.length, self.position(t, first + count - 1)), PAGE) + 1))

    def pages_of_rows(self, t: SimpleNamespace, part: Expr, first: Expr, stop: Expr) -> tuple[Expr, Expr]:
        """The pages [low, high) of a part, before `stop`, that rows from `first` on may see; low may pass high."""
        from tvm import tirx

        low, high = let(part * t.size), let(tirx.Min(stop, (part + 1) * t.size))
        if self.window:
            low = let(tirx.Max(low, self.first_page(self.position(t, first))))
        return low, high

    def position(self, t: SimpleNamespace, row: Expr) -> Expr:
        """The position of a row of the unit."""
        return let(t.position + divide(row, self.group))

    def last_seen(self, length: Expr | None, position: Expr) -> Expr:
        """The last key that a row at `position` of a sequence of `length` keys sees."""
        from tvm import tirx

        if length is None:
            return position
        return tirx.Min(length - 1, position + (self.window - 1)) if self.window else length - 1

    def first_page(self, position: Expr) -> Expr:
        """The first page in the window of a row at `position`."""
        from tvm import tirx

        return divide(tirx.Max(position - (self.window - 1), index(0)), PAGE)

    def start_rows(self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, count: Expr, padded: Expr) -> None:
        """Scaled queries and positions; rows from `count` to `padded` get a query of zeros."""
        with loop(padded) as r:

            def blank(r: Expr = r) -> None:
                self.start_query(t, r, None)
                store(t.where, r, cast(t.end - 1, "int32"))
                if self.alibi:
                    store(t.slope, r, splat(0.0, 1))
                if self.span:
                    store(t.middle, r, cast(index(self.span - 1), "int32"))

            def fill(r: Expr = r) -> None:
                row = let(first + r)
                item = let(remainder(row, self.group))
                token = let(divide(row, self.group))
                head = let(t.kv_head * self.group + item)
                place = let(t.token + token)
                self.start_query(t, r, self.query_rows.read(a, self.lanes, self.head_dim, place, head, t.turned))
                store(t.where, r, cast(t.position + token, "int32"))
                if self.alibi:
                    store(t.slope, r, load(a.slopes, head) * self.score_unit)
                if self.span:
                    store(t.middle, r, cast(head * (2 * self.span - 1) + (self.span - 1), "int32"))

            either(r < count, fill, blank)

    @property
    def score_unit(self) -> float:
        """Scores are held as multiples of this: 1, or log2(e) where weights are powers of two."""
        return 1.0

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by: the scores' scale; a softcap first divides, its `biased` multiplies again."""
        return self.scale / self.softcap if self.softcap else self.scale * self.score_unit

    def start_sums(self, t: SimpleNamespace, r: Expr) -> None:
        """Zeros in row r's accumulators."""
        for_pieces(
            self.value_dim,
            self.lanes,
            lambda offset, width: store(t.acc, r * self.value_dim + offset, splat(0.0, width)),
        )

    def start_query(self, t: SimpleNamespace, r: Expr, source: tuple[Buffer, Expr] | None) -> None:
        """Row r's scaled query from (buffer, first element); None: zeros."""

        def piece(offset: Expr | int, width: int) -> None:
            value = splat(0.0, width)
            if source is not None:
                value = load(source[0], source[1] + offset, width) * self.query_factor
            store(t.query, r * self.head_dim + offset, value)

        for_pieces(self.head_dim, self.lanes, piece)

    def page_block(
        self,
        t: SimpleNamespace,
        row: Expr,
        rows: int,
        page: Expr,
        keys: tuple[Buffer, Expr],
        values: tuple[Buffer, Expr],
        following: tuple[Expr, Expr] | None,
    ) -> None:
        """One page for rows [row, row + rows): scores, statistics, weighted values.

        Each buffer comes with the page's first element. `following`: where the next page begins, if it comes from
        memory; each of its lines is prefetched when the same line of this page is used, so that the memory never idles
        for long (all values' lines beside the first half of their columns: 15% slower).
        """
        scores = aligned_scratch(rows * PAGE, self.lanes)
        shrink = scratch(-(-rows // self.lanes) * self.lanes, "float32")
        next_keys, next_values = (None, None) if following is None else following
        self.score_page(t, row, rows, keys, next_keys, scores)
        self.softmax(t, row, rows, page, scores, shrink)
        self.add_values(t, row, rows, page, values, next_values, scores, shrink)

    def score_page(
        self,
        t: SimpleNamespace,
        row: Expr,
        rows: int,
        keys: tuple[Buffer, Expr],
        following: Expr | None,
        scores: Buffer,
    ) -> None:
        """scores [rows, PAGE] = queries times the page's keys. following: where the next page's keys begin."""
        multiply(
            self.isa,
            self.accumulators,
            rows,
            PAGE,
            self.head_dim,
            left=lambda r, k: load(t.query, (row + r) * self.head_dim + k),
            right=lambda k, offset, width: as_f32(load(keys[0], keys[1] + k * PAGE + offset, width)),
            start=lambda r, offset, width: splat(0.0, width),
            finish=lambda r, offset, width, value: store(scores, r * PAGE + offset, value),
            ahead=_fetch(keys[0], following, PAGE),
        )

    def add_values(
        self,
        t: SimpleNamespace,
        row: Expr,
        rows: int,
        page: Expr,
        values: tuple[Buffer, Expr],
        following: Expr | None,
        weights: Buffer,
        shrink: Buffer,
    ) -> None:
        """The rows' accumulators, times `shrink` [rows], += weights [rows, PAGE] times the page's values. following:
        where the next page's values begin."""
        from tvm import tirx

        keep_in_memory(t.acc)
        # Slots of the last page that hold no token of this sequence yet may hold anything, NaN included: skip them.
        visible = let(tirx.Min(t.end - page * PAGE, index(PAGE)))
        multiply(
            self.isa,
            self.accumulators,
            rows,
            self.value_dim,
            visible,
            left=lambda r, k: load(weights, r * PAGE + k),
            right=lambda k, offset, width: as_f32(load(values[0], values[1] + k * self.value_dim + offset, width)),
            start=lambda r, offset, width: load(t.acc, (row + r) * self.value_dim + offset, width) * load(shrink, r),
            finish=lambda r, offset, width, value: store(t.acc, (row + r) * self.value_dim + offset, value),
            ahead=_fetch(values[0], following, self.value_dim),
        )

    def softmax(self, t: SimpleNamespace, row: Expr, rows: int, page: Expr, scores: Buffer, shrink: Buffer) -> None:
        """Scores to weights relative to each row's greatest score so far; shrink[r] is what older weights lose."""
        from tvm import tirx

        lanes, cut = self.lanes, pieces(PAGE, self.lanes)
        peaks = scratch(-(-rows // lanes) * lanes, "float32")

        def plain(r: Expr) -> None:
            self.raise_peak(t, row + r, r, [load(scores, r * PAGE + offset, width) for offset, width in cut], peaks)

        def edited(r: Expr) -> None:
            where = load(t.where, row + r)
            limit = let(where - (page * PAGE).astype("int32"))  # the row's own slot of the page
            held = self.held(t, page)
            vectors = []
            for offset, width in cut:
                value = self.biased(t, row + r, load(scores, r * PAGE + offset, width), limit, offset)
                vectors.append(let(self.masked(value, limit, held, offset)))
                store(scores, r * PAGE + offset, vectors[-1])
            self.raise_peak(t, row + r, r, vectors, peaks)

        def each(work: Callable[[Expr], None]) -> None:
            with loop(rows) as r:
                work(r)

        if self.softcap or self.alibi or self.span:
            each(edited)
        else:
            edge = page * PAGE + (PAGE - 1) > self.last_seen(t.length, t.position)
            if self.window:
                edge = tirx.Or(edge, page * PAGE < t.bottom - self.window)
            either(edge, lambda: each(edited), lambda: each(plain))
        for i in range(0, rows, lanes):
            # All rows at once; lanes past `rows` hold anything and are not used.
            store(shrink, i, exp(self.isa, load(t.peak, row + i, lanes) - load(peaks, i, lanes)))
        with loop(rows) as r:
            after = let(load(peaks, r))
            total = load(t.total, (row + r) * lanes, lanes) * load(shrink, r)
            for offset, width in cut:
                weight = let(exp(self.isa, load(scores, r * PAGE + offset, width) - after))
                store(scores, r * PAGE + offset, weight)
                total = total + weight
            store(t.total, (row + r) * lanes, total)
            store(t.peak, row + r, after)

    def raise_peak(self, t: SimpleNamespace, row: Expr, r: Expr, vectors: Sequence[Expr], peaks: Buffer) -> None:
        """peaks[r] = the greatest of the row's peak so far and these scores."""
        greatest = vectors[0]
        for vector in vectors[1:]:
            greatest = maximum(greatest, vector)
        store(peaks, r, maximum(load(t.peak, row), reduce(greatest, maximum)))

    def biased(self, t: SimpleNamespace, row: Expr, value: Expr, limit: Expr, offset: int) -> Expr:
        """Softcap, ALiBi and the table of distances on one vector of scores. limit: the row's own slot of the page."""
        if self.softcap:
            value = tanh(self.isa, value) * (self.softcap * self.score_unit)
        if self.alibi:
            distance = cast(self.slots(offset) - limit, "float32")
            value = value + load(t.slope, row) * distance
        if self.span:
            at = integer(load(t.middle, row) - limit)
            value = value + load(t.bias, at + offset, self.lanes) * self.score_unit
        return value

    def held(self, t: SimpleNamespace, page: Expr) -> Expr | None:
        """How many slots the sequence fills from the start of a page on; None where rows do not see so far."""
        return None if self.causal else let((t.end - page * PAGE).astype("int32"))

    def masked(self, value: Expr, limit: Expr, held: Expr | None, offset: int) -> Expr:
        """MASKED in the lanes of keys after the row's own position (or `held`), or outside its window."""
        from tvm import tirx

        slot = self.slots(offset)
        visible = slot <= limit if held is None else slot < held
        value = tirx.Select(visible, value, splat(MASKED, self.lanes))
        if self.window and held is not None:
            near = slot < (limit + self.window)
            value = tirx.Select(near, value, splat(MASKED, self.lanes))
        if self.window:
            inside = slot > (limit - self.window)
            value = tirx.Select(inside, value, splat(MASKED, self.lanes))
        return value

    def slots(self, offset: int) -> Expr:
        """Slot numbers in the page of one vector of scores."""
        from tvm import tirx

        return tirx.Ramp(tirx.const(offset, "int32"), tirx.const(1, "int32"), self.lanes)

    def sums(self, t: SimpleNamespace, r: Expr, body: Callable[[Expr | int, int, Expr], None]) -> None:
        """body(first column, columns, sums) for row r's accumulators, piece by piece."""
        for_pieces(
            self.value_dim,
            self.lanes,
            lambda offset, width: body(offset, width, load(t.acc, r * self.value_dim + offset, width)),
        )


def _fetch(buffer: Buffer, start: Expr | None, row: int) -> Callable[[Expr | int, int, int], None] | None:
    """Prefetches (k, offset, width) of rows of `row` elements from `start` on, as `multiply` calls them."""
    if start is None:
        return None
    return lambda k, offset, width: prefetch(buffer, start + k * row + offset, width)
