"""Attention by parts of the context: where they begin, and how what they give becomes one result.

A part is a run of pages between places that a row's position alone decides. Each has a softmax of its own, and the
parts of a row are merged in order, the first two, then the third, and so on. So the bits of a row depend on nothing
else: a unit of work does one part, and `attention_combine` merges them; or it does all parts of its tile, and merges
each as it comes, with the same arithmetic. The step's number of splits says which, tile by tile.

Merging a part that a row sees nothing of changes no bit of it: its weight is exactly 0, the other's exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.compiler.ir.attention import MOST_PARTS, PART
from llmc.compiler.ir.encoded import PAGE
from llmc.targets.cpu.builder import either, index, let, loop, when
from llmc.targets.cpu.vector_isa import VectorIsa
from llmc.targets.cpu.vector_math import exp
from llmc.targets.cpu.vectors import add, divide, for_pieces, load, maximum, reduce, remainder, splat, store

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr

MASKED = -1e30  # the score of a key that a row must not see: finite, so that no difference of scores is NaN


def part_pages(pages: Expr) -> Expr:
    """Pages of a part of a context of so many: PART tokens, doubled until there are MOST_PARTS at most."""
    from tvm import tirx
    from tvm.script import tirx as T

    least = PART // PAGE
    times = let(divide(pages + (least * MOST_PARTS - 1), least * MOST_PARTS))  # of the shortest parts' context
    zeros = T.call_llvm_pure_intrin("int64", "llvm.ctlz", times - 1, tirx.const(False, "bool"))
    return let(index(least) << (index(64) - zeros))


def locate_parts(first_page: Expr, last_page: Expr, split: Expr, splits: Expr) -> dict[str, Expr]:
    """The parts of a unit whose tile sees these pages.

    size: pages of a part. last_part: the tile's last part. first_part, parts: this unit's, one where there is a split
    for every part of the tile, else all of them in split 0; the splits that are left have none. first, stop: its pages.
    """
    from tvm import tirx

    size = part_pages(last_page + 1)
    begin, last_part = let(divide(first_page, size)), let(divide(last_page, size))
    count = let(last_part + 1 - begin)
    shared = splits >= count
    first_part = let(begin + tirx.Select(shared, split, tirx.Select(split == 0, index(0), count)))
    end = let(tirx.Min(last_part + 1, first_part + tirx.Select(shared, index(1), count)))
    return {
        "size": size,
        "last_part": last_part,
        "first_part": first_part,
        "parts": let(tirx.Max(end - first_part, index(0))),
        "first": let(tirx.Min(tirx.Max(first_page, first_part * size), last_page)),
        "stop": let(tirx.Min(last_page + 1, end * size)),
    }


def fused(x: Expr, y: Expr, z: Expr) -> Expr:
    """x * y + z, rounded once: which of two products an addition takes in is not left to LLVM."""
    from tvm.script import tirx as T

    return T.call_llvm_pure_intrin(str(x.ty.dtype), "llvm.fma", x, y, z)


def merge_weights(isa: VectorIsa, peak: Expr, other: Expr) -> tuple[Expr, Expr, Expr]:
    """(the greater of two greatest scores, what sums relative to the first are multiplied by, and to the second)."""
    top = let(maximum(peak, other))
    return top, let(exp(isa, peak - top)), let(exp(isa, other - top))


class Parts:
    """What `TileBody` does before and after the pages of each part.

    a: a kernel's arguments; t: what its unit is, and the memory that it works in; first, count: a chunk of its rows.
    """

    if TYPE_CHECKING:
        isa: VectorIsa
        heads: int
        value_dim: int
        sinks: bool

        @property
        def lanes(self) -> int: ...
        @property
        def group(self) -> int: ...
        @property
        def score_unit(self) -> float: ...
        def start_sums(self, t: SimpleNamespace, r: Expr) -> None: ...
        def sums(self, t: SimpleNamespace, r: Expr, body: Callable[[Expr | int, int, Expr], None]) -> None: ...

    def start_part(
        self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, count: Expr, padded: Expr, part: Expr
    ) -> None:
        """No keys so far. A sink is one more key without a value, in the last part of its row."""
        from tvm import tirx

        with loop(padded) as r:
            self.start_sums(t, r)

            def plain(r: Expr = r) -> None:
                self.start_statistics(t, r, splat(MASKED, 1), 0.0)

            def with_sink(r: Expr = r) -> None:
                head = let(t.kv_head * self.group + remainder(first + r, self.group))
                sink = load(a.sinks, head) * self.score_unit
                self.start_statistics(t, r, sink, 1.0 / self.lanes)

            if self.sinks:
                either(tirx.And(part == t.last_part, r < count), with_sink, plain)
            else:
                plain()

    def start_statistics(self, t: SimpleNamespace, r: Expr, peak: Expr, total: float) -> None:
        store(t.peak, r, peak)
        store(t.total, r * self.lanes, splat(total, self.lanes))

    def finish_part(self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, count: Expr, number: Expr) -> None:
        """The unit's part `number` is summed up."""

        def several() -> None:
            either(number == 0, lambda: self.keep(a, t, first, count), lambda: self.join(a, t, first, count))

        either(t.parts == 1, lambda: self.finish_only(a, t, first, count), several)

    def finish_rows(self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, count: Expr) -> None:
        """All parts of a unit that had none or several are done."""
        from tvm import tirx

        def none(r: Expr) -> None:
            store(a.state, self.state_of(a, t, first, r), splat(MASKED, 1))
            store(a.state, self.state_of(a, t, first, r) + 1, splat(0.0, 1))

        def whole(r: Expr) -> None:
            factor = let(tirx.const(1.0, "float32") / load(t.sum, r))
            row = let(self.row_of(t, first, r) * self.value_dim)

            def scaled(offset: Expr | int, width: int) -> None:
                store(a.out, row + offset, load(a.out, row + offset, width) * factor)

            for_pieces(self.value_dim, self.lanes, scaled)

        def state(r: Expr) -> None:
            store(a.state, self.state_of(a, t, first, r), load(t.top, r))
            store(a.state, self.state_of(a, t, first, r) + 1, load(t.sum, r))

        with when(t.parts != 1), loop(count) as r:
            some = partial(either, a.S == 1, partial(whole, r), partial(state, r))
            either(t.parts == 0, partial(none, r), some)

    def finish_only(self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, count: Expr) -> None:
        """Write the rows of a unit of one part: normalised where no other unit has parts of them."""
        from tvm import tirx

        with loop(count) as r:
            unit = self.row_of(t, first, r)
            total = reduce(load(t.total, r * self.lanes, self.lanes), add)

            def write(target: Buffer, base: Expr, factor: Expr | None, r: Expr = r) -> None:
                def piece(offset: Expr | int, width: int, value: Expr) -> None:
                    store(target, base + offset, value if factor is None else value * factor)

                self.sums(t, r, piece)

            out = unit * self.value_dim

            def whole(out: Expr = out, total: Expr = total, write: Callable[..., None] = write) -> None:
                write(a.out, out, let(tirx.const(1.0, "float32") / total))

            def part(
                r: Expr = r, unit: Expr = unit, out: Expr = out, total: Expr = total, write: Callable[..., None] = write
            ) -> None:
                store(a.state, self.state_of(a, t, first, r), self.peak_of(t, r))
                store(a.state, self.state_of(a, t, first, r) + 1, total)
                either(
                    t.split == 0,
                    lambda: write(a.out, out, None),
                    lambda: write(a.partial, (unit * (a.S - 1) + t.split - 1) * self.value_dim, None),
                )

            either(a.S == 1, whole, part)

    def keep(self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, count: Expr) -> None:
        """The first part: its sums of values go to `out`, to be merged there."""
        with loop(count) as r:
            row = let(self.row_of(t, first, r) * self.value_dim)
            store(t.top, r, self.peak_of(t, r))
            store(t.sum, r, reduce(load(t.total, r * self.lanes, self.lanes), add))

            def piece(offset: Expr | int, width: int, value: Expr, row: Expr = row) -> None:
                store(a.out, row + offset, value)

            self.sums(t, r, piece)

    def join(self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, count: Expr) -> None:
        """A later part: merged with those before it."""
        lanes = self.lanes
        with loop(count) as r:
            store(t.newer, r, self.peak_of(t, r))
            store(t.older, r, reduce(load(t.total, r * lanes, lanes), add))
        with loop(divide(count + (lanes - 1), lanes)) as number:  # lanes past `count` hold anything and are not used
            i = let(number * lanes)
            total = let(load(t.older, i, lanes))
            top, older, newer = merge_weights(self.isa, load(t.top, i, lanes), load(t.newer, i, lanes))
            store(t.sum, i, fused(load(t.sum, i, lanes), older, total * newer))
            store(t.top, i, top)
            store(t.older, i, older)
            store(t.newer, i, newer)
        with loop(count) as r:
            self.join_row(a, t, r, let(self.row_of(t, first, r) * self.value_dim))

    def join_row(self, a: SimpleNamespace, t: SimpleNamespace, r: Expr, row: Expr) -> None:
        """Merge row r's sums of values with those at element `row` of `out`."""
        older, newer = let(load(t.older, r)), let(load(t.newer, r))

        def piece(offset: Expr | int, width: int, value: Expr) -> None:
            before = load(a.out, row + offset, width)
            store(a.out, row + offset, fused(before, splat(older, width), value * newer))

        self.sums(t, r, piece)

    def peak_of(self, t: SimpleNamespace, r: Expr) -> Expr:
        """Row r's greatest score in its part, as it is where weights are powers of e."""
        return load(t.peak, r) * (1.0 / self.score_unit)

    def row_of(self, t: SimpleNamespace, first: Expr, r: Expr) -> Expr:
        """The row of the result, token by token and head by head, that is row `first + r` of the unit."""
        row = let(first + r)
        return let(
            (t.token + divide(row, self.group)) * self.heads + t.kv_head * self.group + remainder(row, self.group)
        )

    def state_of(self, a: SimpleNamespace, t: SimpleNamespace, first: Expr, r: Expr) -> Expr:
        """Where the statistics of a row lie in `state`."""
        return let((self.row_of(t, first, r) * a.S + t.split) * 2)
