"""Linear ops with weights of 2 to 6 or 8 bits and activations of 8 bits per group.

Two kernels share one inner product. `QuantizedRows` keeps a few rows' sums in registers while it streams each
weight tile once: for one token and small batches, whose limit is the memory that holds the weights.
`QuantizedBlocks` unpacks a panel of weights into the first-level cache and runs a block of rows over it: for
prefill, whose limit is the byte multipliers. A matrix unit (`matrix_unit.py`) does the same its own way.

Both take (xq i8 [T, Kpad], xscales f32 [T, groups], xsums i32 [T, groups], data, scales, minimums if asymmetric,
bias f32 [n] if any, residual f32 [T, features] if any, out f32 [T, features]; T, begin, end).
xsums are the sums of xq over each group, or two sums in one number (`VectorIsa.pair_sums`). Weights lie as
`QuantizedLayout` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.group_sums import UNROLL, Sums, Weights, WideSums
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.linear_blocks import Block, each_block
from llmc.targets.cpu.linear_overlap import Half, LatePlace, Place
from llmc.targets.cpu.linear_problem import QuantizedProblem, panel_tiles, refuse_blocks
from llmc.targets.cpu.linear_products import GroupSums, KnownRows, Operands, known_bytes, sums_bytes
from llmc.targets.cpu.tile_slices import TileSlice, batches, in_memory, slices_of
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for
from llmc.targets.cpu.vectors import prefetch, splat, store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

FEW_TILES = 64  # a weight with fewer is not streamed in pairs of tiles


def _refuse_unroll(unroll: int, problem: QuantizedProblem, machine: Machine) -> str:
    quads, whole = problem.layout(machine).bundle_quads, problem.group // 4
    if whole % unroll:
        return f"a group of {whole} quads is no whole number of {unroll} unrolled ones"
    return "" if unroll % quads == 0 else f"{unroll} unrolled quads are no whole number of bundles of {quads}"


def _unroll(isa: VectorIsa, problem: QuantizedProblem) -> int:
    """Quads that are unrolled unless asked for otherwise: whole ones of a group, which has four at least."""
    return math.gcd(isa.unrolled_quads, problem.group // 4)


def _panel_sums(isa: VectorIsa, layout: QuantizedLayout) -> Sums:
    """Of `QuantizedBlocks`."""
    return isa.panel_sums(layout.byte_bits, layout.group)


def _has_panel(isa: VectorIsa, layout: QuantizedLayout) -> bool:
    """Whether weights are not multiplied as they lie."""
    return layout.packed or _panel_sums(isa, layout).together > 1


@dataclass(frozen=True)
class QuantizedRows(CpuTemplate[QuantizedProblem], name="quantized_linear_rows"):
    """Any T. One unit: `tiles` weight tiles, streamed side by side: several streams keep more of the memory busy.

    rows by slices of these tiles are multiplied at once: as many integer sums are in registers. Every weight byte comes
    from the memory once per `row_block` rows, and once per `rows` rows from a cache; few rows are limited by the read
    bandwidth. A short block repeats the last row. unroll, chains: of the quads of a group, see `Sums.emit`.
    ahead: bytes from what is multiplied to what is asked for, since hardware prefetchers alone start late on the short
    streams that tiles are (3 KiB measured best for two tiles side by side, 1.5 to 8 KiB within 3%). least: bytes of
    weights that are worth a thread: 32 KiB are about a microsecond of memory. together: units of one row whose sums
    become results together. An activation function is a long chain of dependent steps: one at a time costs a tenth of a
    gated product whose weights are in the third-level cache.
    """

    version: ClassVar[int] = 2
    rows: int = knob(1, 2, 4, 8)
    tiles: int = knob(1, 2)
    slices: int = knob(1, 2, 4)
    row_block: int = knob(1, 4, 8, 16)
    unroll: int = knob(*UNROLL, 16)
    chains: int = knob(1, 2)
    ahead: int = knob(1536, 3072, 6144)
    least: int = knob(16 << 10, 32 << 10, 64 << 10, code=False)
    together: int = knob(1, 8, 16)

    @classmethod
    def default(cls, problem: QuantizedProblem, machine: Machine, rows: Rows = ANY_ROWS) -> QuantizedRows:
        """Two streams keep a core's memory pipeline busier than one (a fifth, at 4 and 8 rows) and halve the
        activations' loads. A weight of few tiles keeps them apart, so that there is work for many threads."""
        isa, layout, high = isa_for(machine), problem.layout(machine), rows[1] or 16
        most = {1: 1, 4: 4}.get(high, 8)
        if slices_of(isa, layout) > 1:
            return cls._sliced(problem, isa, layout, most, high)
        sums = most * isa.sums(layout.byte_bits, problem.group).registers
        pairs = problem.gated or (2 * sums <= isa.registers // 2 and layout.tiles(problem.n) >= FEW_TILES)
        if pairs:  # measured: 8 gated rows in 16 registers take a third longer than 4 and 4
            most = min(most, isa.registers // 4)
        tiles = 2 if pairs else 1
        chains, together = 2 if most * tiles < 8 else 1, cls._together(problem, high)
        unroll = _unroll(isa, problem)
        return cls(most, tiles, tiles, high, unroll, chains=chains, ahead=3072, least=32 << 10, together=together)

    @classmethod
    def _together(cls, problem: QuantizedProblem, high: int) -> int:
        return 8 if high == 1 and problem.activation != "none" else 1

    @classmethod
    def _sliced(
        cls, problem: QuantizedProblem, isa: VectorIsa, layout: QuantizedLayout, most: int, high: int
    ) -> QuantizedRows:
        """Where a tile has several slices: up to 4 rows by two of them, in one stream, which is asked for as far ahead
        as two are. Where weights take long to be made ready, 8 rows share that, and the second slice is in a cache.

        One row of 8-bit weights was measured to read a fifth to a third more of memory with 1.5 KiB than with 6 KiB."""
        shared = most == 8 and isa.dot_centre(layout.byte_bits) != 0
        rows, slices = (8, 1) if shared else (min(most, 4), 2)
        sums = rows * isa.few_slices * isa.sums(layout.byte_bits, problem.group).registers
        if not shared and 2 * sums <= isa.registers:
            slices = isa.few_slices
        chains = 2 if rows * slices < 8 else 1
        ahead, tiles = 1536 if rows == 1 and problem.bits == 8 else 6144, problem.epilogue.tiles
        together = cls._together(problem, high)
        unroll = _unroll(isa, problem)
        return cls(rows, tiles, slices, high, unroll, chains=chains, ahead=ahead, least=32 << 10, together=together)

    def refuse(self, problem: QuantizedProblem, machine: Machine) -> str:
        sums = isa_for(machine).sums(problem.layout(machine).byte_bits, problem.group)
        return (
            refuse_blocks(problem, machine, self.rows, self.tiles, self.slices, self.row_block)
            or sums.refuse(self.unroll, self.chains)
            or _refuse_unroll(self.unroll, problem, machine)
            or ("units of several rows are finished one by one" if self.together > 1 and self.row_block > 1 else "")
            or super().refuse(problem, machine)
        )

    def stack_bytes(self, problem: QuantizedProblem, machine: Machine) -> int:
        isa, layout = isa_for(machine), problem.layout(machine)
        known = known_bytes(isa, layout, self.row_block, layout.groups(problem.k))
        count = self.tiles * slices_of(isa, layout)
        totals = [isa.vector_bytes] * (self.rows * count * (1 if self.together == 1 else 1 + self.together))
        return arrays(*known, *totals, *sums_bytes(isa, self.rows, count, self.chains))

    def build(self, problem: QuantizedProblem, machine: Machine) -> PrimFunc:
        return _StreamedRows(problem, self, isa_for(machine), problem.layout(machine)).function()


@dataclass(frozen=True)
class _StreamedRows:
    """The code of `QuantizedRows`."""

    problem: QuantizedProblem
    knobs: QuantizedRows
    isa: VectorIsa
    layout: QuantizedLayout

    def function(self) -> PrimFunc:
        pointers = [*Operands.pointers(self.layout), *self.problem.epilogue.pointers()]
        return b.plain_function(pointers, ["T"], self.body, b.ORDER_HELPER + self.isa.in_place_helper)

    def body(self, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        rows, row_block, groups = self.knobs.rows, self.knobs.row_block, self.layout.groups(self.problem.k)
        ops, tokens = Operands(self.isa, self.layout, self.problem.k, handles), sizes["T"]
        known = KnownRows(ops, row_block, groups)
        with b.loop((tokens + (row_block - 1)) // row_block) as number:
            first_row = b.let(number * row_block)
            blocks = b.let((tirx.Min(tokens - first_row, b.index(row_block)) + (rows - 1)) // rows)
            known.fill(first_row, blocks * rows, tokens, b.index(0), groups)
            if self.knobs.together > 1:
                self.several(ops, known, first_row, sizes)
            else:
                with b.loop(sizes["end"] - sizes["begin"]) as i, b.loop(blocks) as block:
                    first, first_tile = block * rows, b.let((sizes["begin"] + i) * self.knobs.tiles)
                    totals = self.unit(ops, known, first_row, first, first_tile, tokens)
                    self.finish(ops, totals, first_row, first, first_tile, tokens)

    def several(self, ops: Operands, known: KnownRows, row: Expr, sizes: Mapping[str, Expr]) -> None:
        """The units of one row, some of which are finished together."""
        from tvm import tirx

        tiles, together, tokens = self.knobs.tiles, self.knobs.together, sizes["T"]
        count = tiles * slices_of(self.isa, self.layout)
        kept = b.scratch(together * count, self.isa.f32)
        with b.loop((sizes["end"] - sizes["begin"] + (together - 1)) // together) as batch:
            begin = b.let(sizes["begin"] + batch * together)
            units = b.let(tirx.Min(sizes["end"] - begin, b.index(together)))
            with b.loop(units) as i:
                totals = self.unit(ops, known, row, b.index(0), b.let((begin + i) * tiles), tokens)
                for slot in range(count):
                    store(kept, i * count + slot, totals[slot])
            with b.loop(units) as i:
                sums = b.Registers(count, self.isa.f32)
                for slot in range(count):
                    sums[slot] = kept[i * count + slot]
                self.finish(ops, sums, row, b.index(0), b.let((begin + i) * tiles), tokens)

    def unit(
        self, ops: Operands, known: KnownRows, base: Expr, first: Expr, first_tile: Expr, tokens: Expr
    ) -> b.Registers:
        """The sums [slice * rows + row] of rows from `first` of the block that starts at row `base`, times the tiles
        from `first_tile`."""
        from tvm import tirx

        isa, rows, tiles = self.isa, self.knobs.rows, self.knobs.tiles
        each = slices_of(isa, self.layout)
        all_tiles = self.layout.tiles(self.problem.n)
        # The last unit may be short: it repeats the last tile and stores it once.
        tile = [b.let(tirx.Min(first_tile + t, b.index(all_tiles - 1))) if t else first_tile for t in range(tiles)]
        row = b.clamped_rows(base + first, rows, tokens)
        # Beside the integer sums of two slices they would spill those: 4 rows of 4 bits took a tenth longer with 16
        # registers.
        few = self.knobs.slices < tiles * each or isa.registers < 32
        totals = (in_memory if each > 1 and few else b.Registers)(tiles * each * rows, isa.f32)
        for slot in range(tiles * each * rows):
            totals[slot] = splat(0.0, isa.lanes)
        for start, batch in batches(tile, each, self.knobs.slices):
            with b.loop(self.layout.groups(self.problem.k)) as g:
                weights = [self.weight(ops, at, g) for at in batch]
                sums = GroupSums(ops, known, row, first, g, g)(weights, self.knobs.unroll, self.knobs.chains)
                for slot in range(len(batch) * rows):
                    (s, m), place = divmod(slot, rows), start * rows + slot
                    factors = known.factors(first + m, g)
                    totals[place] = ops.accumulate(totals[place], sums[slot], factors, batch[s], g)
        return totals

    def finish(
        self, ops: Operands, totals: b.Registers, base: Expr, first: Expr, first_tile: Expr, tokens: Expr
    ) -> None:
        """Store what the sums of a unit become."""
        from tvm import tirx

        isa, epilogue, rows, tiles = self.isa, self.problem.epilogue, self.knobs.rows, self.knobs.tiles
        each, all_tiles = slices_of(isa, self.layout), self.layout.tiles(self.problem.n)
        row = b.clamped_rows(base + first, rows, tokens)
        for t in range(0, tiles, epilogue.tiles):
            for m in range(rows):

                def finished(number: int, t: int = t, m: int = m) -> list[Expr]:
                    return [totals[((t + j) * each + number) * rows + m] for j in range(epilogue.tiles)]

                with b.when(tirx.And(base + first + m < tokens, first_tile + t < all_tiles)):
                    column = (first_tile + t) // epilogue.tiles
                    epilogue.emit_tile(isa, self.layout.tile_rows, ops.handles, row[m], column, finished)

    def weight(self, ops: Operands, at: TileSlice, group: Expr) -> Weights:
        """A slice's weights of a group; the first of a tile asks for those that follow as it is read."""
        streams = max(1, self.knobs.slices // slices_of(self.isa, self.layout))
        ahead = ops.ahead(at.tile, group, streams, self.knobs.ahead) if at.number == 0 else None

        def streamed(quad: Expr, step: int) -> Expr:
            if ahead is not None:
                ops.prefetch(ahead, quad, step)
            return ops.stored(at, group, quad, step)

        return streamed


@dataclass(frozen=True)
class QuantizedBlocks(CpuTemplate[QuantizedProblem], name="quantized_linear_blocks"):
    """Prefill. One unit: `row_block` rows by a panel of `tiles` weight tiles; consecutive units share the panel.

    rows x slices integer sums are in registers; the f32 sums of the block, and the unpacked part of the panel, are on
    the stack, in the first two caches. panel: bytes that are unpacked at a time, about: with the sums they fit a
    first-level cache of 32 KiB. Loads per multiply: 1/rows + 1/slices; the limit is the multipliers.

    overlap: parts of a block's slices. With 2, the sums of one half become results while the other half is multiplied:
    see `linear_overlap`.
    """

    version: ClassVar[int] = 3
    rows: int = knob(2, 3, 4, 6, 8)
    tiles: int = knob(1, 2, 4)
    slices: int = knob(2, 4)
    row_block: int = knob(32, 64, 96, 192)
    panel: int = knob(8 << 10, 16 << 10, 32 << 10)
    unroll: int = knob(*UNROLL, 16)
    overlap: int = knob(1, 2)

    @classmethod
    def default(cls, problem: QuantizedProblem, machine: Machine, rows: Rows = ANY_ROWS) -> QuantizedBlocks:
        isa, unroll = isa_for(machine), _unroll(isa_for(machine), problem)
        tiles = panel_tiles(problem, machine, isa.quantized_blocks)
        return cls(**vars(isa.quantized_blocks), tiles=tiles, panel=16 << 10, unroll=unroll, overlap=isa.overlap)

    def refuse(self, problem: QuantizedProblem, machine: Machine) -> str:
        sums = _panel_sums(isa_for(machine), problem.layout(machine))
        return (
            refuse_blocks(problem, machine, self.rows, self.tiles, self.slices, self.row_block)
            or sums.refuse(self.unroll, 1)
            or _refuse_unroll(self.unroll, problem, machine)
            or self._refuse_overlap(sums, problem, machine)
            or super().refuse(problem, machine)
        )

    def _refuse_overlap(self, sums: Sums, problem: QuantizedProblem, machine: Machine) -> str:
        if self.overlap == 1:
            return ""
        if not isinstance(sums, WideSums):
            return "sums that are widened by and by leave no place for other work"
        have = self.tiles * slices_of(isa_for(machine), problem.layout(machine))
        return "" if have == self.slices else f"halves of {self.slices} slices are not all of a panel's {have}"

    @property
    def spare(self) -> int:
        """Rows of sums for what nobody reads."""
        return self.rows if self.overlap > 1 else 0

    def groups(self, layout: QuantizedLayout, k: int) -> int:
        """Groups that are unpacked at a time."""
        return min(layout.groups(k), max(1, self.panel // (self.tiles * layout.group * layout.tile_rows)))

    def stack_bytes(self, problem: QuantizedProblem, machine: Machine) -> int:
        isa, layout = isa_for(machine), problem.layout(machine)
        groups, count = self.groups(layout, problem.k), self.tiles * slices_of(isa, layout)
        known = known_bytes(isa, layout, self.row_block, groups)
        panel = isa.vector_bytes * count * groups * (problem.group // 4) * _has_panel(isa, layout)
        totals = isa.vector_bytes * (self.row_block + self.spare) * count
        wide = isinstance(_panel_sums(isa, layout), WideSums)
        sums = [isa.vector_bytes] * (self.rows * count) if wide else sums_bytes(isa, self.rows, count, 1)
        return arrays(panel, *known, totals, *sums, *sums)  # of as many groups as usual, and of those that are left

    def build(self, problem: QuantizedProblem, machine: Machine) -> PrimFunc:
        return _PanelBlocks(problem, self, isa_for(machine), problem.layout(machine)).function()


@dataclass(frozen=True)
class _PanelBlocks:
    """The code of `QuantizedBlocks`."""

    problem: QuantizedProblem
    knobs: QuantizedBlocks
    isa: VectorIsa
    layout: QuantizedLayout

    @property
    def groups(self) -> int:
        """Of a row."""
        return self.layout.groups(self.problem.k)

    @property
    def step(self) -> int:
        """Groups that are unpacked at a time."""
        return self.knobs.groups(self.layout, self.problem.k)

    @property
    def quads(self) -> int:
        """Of a group."""
        return self.layout.group // 4

    def function(self) -> PrimFunc:
        pointers = [*Operands.pointers(self.layout), *self.problem.epilogue.pointers()]
        return b.plain_function(pointers, ["T"], self.body, b.ORDER_HELPER + self.isa.in_place_helper)

    def body(self, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        ops = Operands(self.isa, self.layout, self.problem.k, handles)
        step, count = self.step, self.knobs.tiles * slices_of(self.isa, self.layout)
        has_panel = _has_panel(self.isa, self.layout)
        panel = b.scratch([count, step * self.quads], self.isa.i8) if has_panel else None
        if panel is not None:
            b.order_scratch(panel)
        known = KnownRows(ops, self.knobs.row_block, step, _panel_sums(self.isa, self.layout))
        walk = each_block(
            self.isa,
            self.problem.epilogue,
            handles,
            sizes,
            tile_rows=self.layout.tile_rows,
            all_tiles=self.layout.tiles(self.problem.n),
            rows=self.knobs.rows,
            tiles=self.knobs.tiles,
            row_block=self.knobs.row_block,
            spare=self.knobs.spare,
        )
        with walk as block:
            panels = _Panel(self, ops, known, block, panel, sizes["T"])
            with b.loop(self.groups // step) as number:
                panels.multiply(number * step, step)
            if self.groups % step:
                panels.multiply(b.index(self.groups // step * step), self.groups % step)


@dataclass(frozen=True)
class _Panel:
    """A unit of `QuantizedBlocks` while its code is emitted. panel: unpacked weights, where they are packed."""

    code: _PanelBlocks
    ops: Operands
    known: KnownRows
    unit: Block
    panel: Buffer | None
    tokens: Expr

    def multiply(self, first: Expr, count: int) -> None:
        """Add up `count` groups from `first` on."""
        code, rows = self.code, self.code.knobs.rows
        if self.panel is not None:
            self._unpack(self.panel, first, count)
        self.known.fill(self.unit.first_row, self.unit.blocks * rows, self.tokens, first, count)
        if code.knobs.overlap > 1:
            self._multiply_halves(first, count)
            return
        with b.loop(self.unit.blocks) as block:
            row = self._rows(block, first, count)
            for start, batch in batches(self.unit.tile, self.unit.each, code.knobs.slices):
                with b.loop(count) as g:
                    if start == 0:
                        self._fetch_next(block, row, first + g)
                    self._multiply_group(start, batch, block, row, first + g, g)

    def _rows(self, block: Expr, first: Expr, count: int) -> list[Expr]:
        """The rows of a block; where these groups are the last, their results' lines are asked for."""
        rows = self.code.knobs.rows
        row = b.clamped_rows(self.unit.first_row + block * rows, rows, self.tokens)
        with b.when(first + count >= self.code.groups):
            self._fetch_results(row)
        return row

    def _multiply_halves(self, first: Expr, count: int) -> None:
        """The same with `overlap`: see `linear_overlap`."""
        rows, unroll, slices = self.code.knobs.rows, self.code.knobs.unroll, self.unit.tile_slices
        middle = len(slices) // 2
        early, later = (
            Half(self.ops, self.known, self.unit.totals, rows, place, slices[place : place + middle])
            for place in (0, middle)
        )
        late = LatePlace(self.code.knobs.row_block)
        # The second half loads the rows' quads again: LLVM would keep all of a group's, on the stack.
        b.order_scratch(self.ops.xq)
        with b.loop(self.unit.blocks) as block:
            row = self._rows(block, first, count)
            with b.loop(count) as g:
                group, here = first + g, Place(block * rows, block * rows, g)
                self._fetch_next(block, row, group)
                sums = GroupSums(self.ops, self.known, row, block * rows, group, g)
                early.multiply(sums, self._weights(early, group, g), unroll, later.results(late.get(), first))
                late.set(here)
                later.multiply(sums, self._weights(later, group, g), unroll, early.results(here, first))
        for piece in later.results(late.get(), first):
            piece()

    def _weights(self, half: Half, group: Expr, position: Expr) -> list[Weights]:
        return [self._weight(half.first + s, at, group, position) for s, at in enumerate(half.slices)]

    def _unpack(self, panel: Buffer, first: Expr, count: int) -> None:
        code, sums = self.code, self.known.sums
        each = max(code.layout.bundle_quads, sums.together)
        with b.loop(count) as g, b.loop(code.quads // each) as bundle:
            for s, at in enumerate(self.unit.tile_slices):
                for start in range(0, each, sums.together):
                    places = range(start, start + sums.together)
                    quads = [self.ops.stored(at, first + g, bundle * each + place, place) for place in places]
                    for place, found in zip(places, sums.arranged(code.isa, quads), strict=True):
                        store(panel, (s, g * code.quads + (bundle * each + place)), found)

    def _fetch_results(self, row: Sequence[Expr]) -> None:
        """The lines that the last groups' sums will go to, a little before they do."""
        epilogue, tile_rows = self.code.problem.epilogue, self.code.layout.tile_rows
        out = b.view(self.ops.handles["out"], [b.MANY], "float32")
        for m in range(self.code.knobs.rows):
            for column in range(self.code.knobs.tiles // epilogue.tiles):
                first_column = (self.unit.first_tile // epilogue.tiles + column) * tile_rows
                prefetch(out, row[m] * epilogue.features + first_column, write=True)

    def _fetch_next(self, block: Expr, row: Sequence[Expr], group: Expr) -> None:
        """This group of the next rows, and by and by the weights that are unpacked next."""
        layout, groups, knobs, step = self.code.layout, self.code.groups, self.code.knobs, self.code.step
        activations = b.view(self.ops.handles["xq"], [b.MANY], "int8")
        for m in range(knobs.rows):
            prefetch(activations, ((row[m] + knobs.rows) * groups + group) * layout.group, near=True)
        data = b.view(self.ops.handles["data"], [b.MANY], "uint8")
        for t in range(knobs.tiles):
            line = (self.unit.tile[t] * groups + group + step) * layout.vectors + block % layout.vectors
            prefetch(data, line * self.ops.line)

    def _multiply_group(
        self, start: int, batch: Sequence[TileSlice], block: Expr, row: Sequence[Expr], group: Expr, position: Expr
    ) -> None:
        rows, totals = self.code.knobs.rows, self.unit.totals
        weights = [self._weight(start + s, at, group, position) for s, at in enumerate(batch)]
        sums = GroupSums(self.ops, self.known, row, block * rows, group, position)(weights, self.code.knobs.unroll)
        for slot in range(len(batch) * rows):
            s, m = divmod(slot, rows)
            whole = totals[block * rows + m, start + s]
            factors = self.known.factors(block * rows + m, position)
            whole = self.ops.accumulate(whole, sums[slot], factors, batch[s], group)
            store(totals, (block * rows + m, start + s), whole)

    def _weight(self, s: int, at: TileSlice, group: Expr, position: Expr) -> Weights:
        panel, quads = self.panel, self.code.quads
        if panel is None:
            return lambda quad, step: self.ops.stored(at, group, quad, step)
        return lambda quad, _: panel[s, position * quads + quad]
