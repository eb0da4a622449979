"""Linear ops with weights of 4 or 8 bits and activations of 8 bits per group.

Two kernels share one inner product. `quantized_linear_rows` keeps a few rows' sums in registers while it streams each
weight tile once: for one token and small batches, whose limit is the memory that holds the weights.
`quantized_linear_blocks` unpacks a panel of weights into the first-level cache and runs a block of rows over it: for
prefill, whose limit is the byte multipliers. On tile registers `linear_tile_rows` and `linear_tiles` do the same.

Both take (xq i8 [T, Kpad], xscales f32 [T, groups], xsums i32 [T, groups], data, scales, minimums if asymmetric,
bias f32 [n] if any, residual f32 [T, features] if any, out f32 [T, features]; T, begin, end).
xsums are the sums of xq over each group. Weights lie as `QuantizedLayout` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.machine import Machine
from llmc.targets.x86 import linear_builder as b
from llmc.targets.x86.isa import VectorIsa, isa_for
from llmc.targets.x86.layouts import QuantizedLayout
from llmc.targets.x86.linear_blocks import each_block
from llmc.targets.x86.linear_epilogue import Epilogue

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

# Quads that are unrolled: 32 inputs, the smallest group and the most that an i16 accumulator holds (`narrow_quads`).
UNROLLED = 8
# Unpacked weights that a panel holds at a time: with the sums they fit a first-level cache of 32 KiB.
PANEL_BYTES = 16 << 10
# How far ahead of the multiplications a streamed tile is asked for: hardware prefetchers alone start late on the short
# streams that tiles are. 3 KiB measured best, 1.5 to 8 KiB within 3%.
AHEAD_BYTES = 3072


def quantized_layout(machine: Machine, bits: int, group: int, symmetric: bool, gated: bool) -> QuantizedLayout:
    """The layout that this machine's kernels read."""
    isa = isa_for(machine)
    return QuantizedLayout(bits, group, symmetric, isa.lanes, isa.weight_offset(bits, symmetric), gated)


@dataclass
class Operands:
    """A kernel's quantized operands, as expressions over its pointers."""

    isa: VectorIsa
    layout: QuantizedLayout
    k: int
    handles: Mapping[str, Expr]

    def __post_init__(self) -> None:
        layout, groups, lanes = self.layout, self.layout.groups(self.k), self.isa.lanes
        per_group = [b.MANY, groups, lanes]
        self.xq = b.view(self.handles["xq"], [b.MANY, groups, layout.group], "int8")
        self.xscales = b.view(self.handles["xscales"], [b.MANY, groups], "float32")
        self.xsums = b.view(self.handles["xsums"], [b.MANY, groups], "int32")
        self.data = b.view(self.handles["data"], [b.MANY, groups, layout.vectors, lanes * 4], "uint8")
        self.scales = b.view(self.handles["scales"], per_group, "float16")
        if not layout.symmetric:
            self.minimums = b.view(self.handles["minimums"], per_group, "float16")

    @staticmethod
    def pointers(layout: QuantizedLayout) -> list[tuple[str, str]]:
        weight = [("data", "uint8"), ("scales", "float16")]
        minimums = [] if layout.symmetric else [("minimums", "float16")]
        return [("xq", "int8"), ("xscales", "float32"), ("xsums", "int32"), *weight, *minimums]

    def stored(self, tile: Expr, group: Expr, quad: Expr, odd: int) -> Expr:
        """The stored weights of one quad a lane. Of 4-bit weights two quads share a vector; `odd`: the second one."""
        from tvm import tirx

        def vector(position: Expr) -> Expr:
            return self.isa.load(self.data, tile, group, position, 0, lanes=self.isa.vector_bytes)

        if self.layout.bits == 8:
            return tirx.reinterpret(self.isa.i8, vector(quad))
        packed = vector(tirx.shift_right(quad, b.index(1)))
        return self.isa.high_nibbles(packed) if odd else self.isa.low_nibbles(packed)

    def ahead(self, tile: Expr, group: Expr, streams: int) -> Expr:
        """Where in the weights to prefetch from while this group of a tile is multiplied.

        That is AHEAD_BYTES on; past the tile's end, in the tile that follows it in its stream, `streams` tiles on.
        """
        from tvm import tirx

        size = self.layout.groups(self.k) * self.layout.vectors * self.isa.vector_bytes
        inside = b.let(group * (self.layout.vectors * self.isa.vector_bytes) + AHEAD_BYTES)
        skip = tirx.Select(inside >= size, b.index((streams - 1) * size), b.index(0)) if streams > 1 else 0
        return b.let(tile * size + inside + skip)

    def prefetch(self, ahead: Expr, quad: Expr) -> None:
        """Ask for what will follow the vector of this quad; ahead: see there."""
        from tvm import tirx

        vector = quad if self.layout.bits == 8 else tirx.shift_right(quad, b.index(1))
        b.prefetch(b.view(self.handles["data"], [b.MANY], "uint8"), ahead + vector * self.isa.vector_bytes)

    def activations(self, row: Expr, group: Expr, quad: Expr) -> Expr:
        """Four activations in every lane."""
        from tvm import tirx

        four = self.isa.load(self.xq, row, group, quad * 4, lanes=4)
        return self.isa.splat_quad(tirx.reinterpret("int32", four))

    def accumulate(self, total: Expr, sums: Expr, row: tuple[Expr, Expr | None], tile: Expr, group: Expr) -> Expr:
        """total (f32) + what a group's integer sums stand for; row: the row's scale and shift, see `KnownRows`."""
        isa, (scale, shift) = self.isa, row
        scale = isa.f16_to_f32(isa.load(self.scales, tile, group, 0)) * isa.splat(scale)
        total = isa.fma(sums.astype(isa.f32), scale, total)
        if shift is None:
            return total
        return isa.fma(isa.f16_to_f32(isa.load(self.minimums, tile, group, 0)), isa.splat(shift), total)


class KnownRows:
    """What depends on row and group only, computed once for all weights: on the stack, by row and group."""

    def __init__(self, ops: Operands, rows: int, groups: int) -> None:
        self.ops = ops
        self.scales = self._scratch([rows, groups], "float32")
        # What integer sums start from, so that the stored weights' offset cancels; what minimums are multiplied by.
        self.starts = self._scratch([rows, groups], "int32") if ops.layout.offset else None
        self.shifts = None if ops.layout.symmetric else self._scratch([rows, groups], "float32")

    def _scratch(self, shape: Sequence[int], dtype: str) -> Buffer:
        lanes = self.ops.isa.lanes
        return b.view(b.scratch(-(-math.prod(shape) // lanes), f"{dtype}x{lanes}").data, shape, dtype)

    def fill(self, first_row: Expr, rows: Expr | int, tokens: Expr, first_group: Expr, groups: int) -> None:
        """Make rows first_row, ... and groups first_group, ... readable; rows past the last token repeat it."""
        from tvm import tirx

        ops = self.ops
        with b.loop(rows) as m:
            row = b.let(tirx.Min(first_row + m, tokens - 1))
            for start, width in _pieces(groups, ops.isa.lanes):
                scales, xsums = (_load(x, row, first_group + start, width) for x in (ops.xscales, ops.xsums))
                _store(self.scales, m, start, scales)
                if self.starts is not None:
                    _store(self.starts, m, start, xsums * _same(-ops.layout.offset, width))
                if self.shifts is not None:
                    floats = xsums.astype("float32" if width == 1 else f"float32x{width}")
                    _store(self.shifts, m, start, scales * floats)

    def start(self, m: Expr, g: Expr) -> Expr:
        """What integer sums of filled row m and group g start from."""
        return self.ops.isa.splat(0 if self.starts is None else self.starts[m, g], "int32")

    def factors(self, m: Expr, g: Expr) -> tuple[Expr, Expr | None]:
        """The scale, and what the minimum is multiplied by."""
        return self.scales[m, g], None if self.shifts is None else self.shifts[m, g]


def _pieces(count: int, most: int) -> list[tuple[int, int]]:
    """`count` elements as (start, width) of vectors of at most `most` lanes, widths powers of two."""
    found, start, width = [], 0, most
    while start < count:
        while width > count - start:
            width //= 2
        found.append((start, width))
        start += width
    return found


def _load(buffer: Buffer, row: Expr, start: Expr, width: int) -> Expr:
    """`width` elements of a row, also of one."""
    from tvm import tirx

    return buffer[row, start] if width == 1 else buffer[row, tirx.Ramp(start, b.index(1), width)]


def _store(buffer: Buffer, row: Expr, start: int, value: Expr) -> None:
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    lanes = int(value.ty.dtype.lanes)
    at = b.index(start)
    I.buffer_store(buffer, value, [row, at if lanes == 1 else tirx.Ramp(at, b.index(1), lanes)])


def _same(value: int, width: int) -> Expr:
    from tvm import tirx

    scalar = tirx.const(value, "int32")
    return scalar if width == 1 else tirx.Broadcast(scalar, width)


def _dot_group(
    ops: Operands,
    sums: b.Registers,
    rows: Sequence[Expr],
    group: Expr,
    weights: Sequence[Callable[[Expr, int], Expr]],
    chains: int = 1,
) -> None:
    """sums[(tile * rows + row) * chains + chain] += one group's products.

    weights[tile](quad, odd) are stored weights. Successive quads go to successive chains, so that with few rows the
    multiplier's latency is hidden. Quads are loaded in order: prefetches stay beside their weights, and LLVM does not
    load a chunk's weights early only to spill them (a sixth of the time of 512 rows of 8-bit weights with AVX-512).
    """
    isa, bits = ops.isa, ops.layout.bits
    narrow = isa.narrow_quads(bits) > 0
    with b.loop(ops.layout.group // 4 // UNROLLED) as chunk:
        parts = b.Registers(len(sums.slots), isa.i16) if narrow else None
        for step in range(UNROLLED):
            quad = chunk * UNROLLED + step
            b.keep_order()
            # Shared by tiles; one tile multiplies straight from memory.
            shared = [b.let(ops.activations(row, group, quad)) for row in rows] if len(weights) > 1 else None
            for t, weight in enumerate(weights):
                w = b.let(weight(quad, step % 2))
                for m, row in enumerate(rows):
                    slot = (t * len(rows) + m) * chains + step % chains
                    a = ops.activations(row, group, quad) if shared is None else shared[m]
                    if parts is None:
                        sums[slot] = isa.dot(sums[slot], w, a, bits)
                    elif step < chains:
                        parts[slot] = isa.dot_narrow(w, a)
                    else:
                        parts[slot] = parts[slot] + isa.dot_narrow(w, a)
        if parts is not None:
            for slot in range(len(sums.slots)):
                sums[slot] = isa.widen(sums[slot], parts[slot])


def quantized_linear_rows(
    machine: Machine,
    *,
    n: int,
    k: int,
    bits: int,
    group: int,
    symmetric: bool,
    gated: bool = False,
    activation: str = "none",
    bias: bool = False,
    residual: bool = False,
    rows: int = 1,
    tiles: int = 1,
    row_block: int = 1,
) -> PrimFunc:
    """Any T. One unit: `tiles` weight tiles, streamed side by side: several streams keep more of the memory busy.

    rows x tiles integer sums are in registers. Every weight byte comes from the memory once per `row_block` rows, and
    once per `rows` rows from a cache; few rows are limited by the memory's read bandwidth. A short block repeats the
    last row.
    """
    isa, epilogue = isa_for(machine), Epilogue(n, gated, activation, bias, residual)
    layout = quantized_layout(machine, bits, group, symmetric, gated)
    groups, all_tiles = layout.groups(k), layout.tiles(n)
    if row_block % rows or tiles % epilogue.tiles:
        raise ValueError(f"{row_block} rows in blocks of {rows}, or {tiles} tiles in parts of {epilogue.tiles}")
    chains = 2 if rows * tiles < 8 else 1

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        ops, tokens = Operands(isa, layout, k, handles), sizes["T"]
        known = KnownRows(ops, row_block, groups)
        with b.loop((tokens + (row_block - 1)) // row_block) as part:
            first_row = b.let(part * row_block)
            blocks = b.let((tirx.Min(tokens - first_row, b.index(row_block)) + (rows - 1)) // rows)
            known.fill(first_row, blocks * rows, tokens, b.index(0), groups)
            with b.loop(sizes["end"] - sizes["begin"]) as i, b.loop(blocks) as block:
                unit(ops, known, first_row, block * rows, b.let((sizes["begin"] + i) * tiles), tokens)

    def unit(ops: Operands, known: KnownRows, base: Expr, first: Expr, first_tile: Expr, tokens: Expr) -> None:
        from tvm import tirx

        # The last unit may be short: it repeats the last tile and stores it once.
        tile = [b.let(tirx.Min(first_tile + t, b.index(all_tiles - 1))) if t else first_tile for t in range(tiles)]
        row = b.clamped_rows(base + first, rows, tokens)
        totals = b.Registers(tiles * rows, isa.f32)
        for slot in range(tiles * rows):
            totals[slot] = isa.splat(0.0)
        with b.loop(groups) as g:
            sums = b.Registers(tiles * rows * chains, isa.i32)
            for slot in range(tiles * rows):
                sums[slot * chains] = known.start(first + slot % rows, g)
                for chain in range(1, chains):
                    sums[slot * chains + chain] = isa.splat(0, "int32")

            def weight(t: int, g: Expr = g) -> Callable[[Expr, int], Expr]:
                ahead = ops.ahead(tile[t], g, tiles)

                def streamed(quad: Expr, odd: int) -> Expr:
                    if bits == 8 or not odd:
                        ops.prefetch(ahead, quad)
                    return ops.stored(tile[t], g, quad, odd)

                return streamed

            _dot_group(ops, sums, row, g, [weight(t) for t in range(tiles)], chains)
            for slot in range(tiles * rows):
                whole = sums[slot * chains]
                for chain in range(1, chains):
                    whole = whole + sums[slot * chains + chain]
                t, m = divmod(slot, rows)
                totals[slot] = ops.accumulate(totals[slot], whole, known.factors(first + m, g), tile[t], g)
        for t in range(0, tiles, epilogue.tiles):
            for m in range(rows):
                with b.when(tirx.And(base + first + m < tokens, first_tile + t < all_tiles)):
                    finished = [totals[(t + j) * rows + m] for j in range(epilogue.tiles)]
                    epilogue.emit(isa, ops.handles, row[m], (first_tile + t) // epilogue.tiles, finished)

    return b.plain_function([*Operands.pointers(layout), *epilogue.pointers()], ["T"], body, b.ORDER_HELPER)


def quantized_linear_blocks(
    machine: Machine,
    *,
    n: int,
    k: int,
    bits: int,
    group: int,
    symmetric: bool,
    gated: bool = False,
    activation: str = "none",
    bias: bool = False,
    residual: bool = False,
    rows: int,
    tiles: int,
    row_block: int,
) -> PrimFunc:
    """Prefill. One unit: `row_block` rows by a panel of `tiles` weight tiles; consecutive units share the panel.

    rows x tiles integer sums are in registers; the f32 sums of the whole block and the unpacked panel (up to
    PANEL_BYTES a step) are on the stack, in the first two caches. Loads per multiply: 1/rows + 1/tiles; the limit is
    the multipliers.
    """
    isa, epilogue = isa_for(machine), Epilogue(n, gated, activation, bias, residual)
    layout = quantized_layout(machine, bits, group, symmetric, gated)
    groups, all_tiles = layout.groups(k), layout.tiles(n)
    quads = group // 4
    step = min(groups, max(1, PANEL_BYTES // (tiles * group * isa.lanes)))  # groups that are unpacked at a time

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        ops, tokens = Operands(isa, layout, k, handles), sizes["T"]
        panel = b.scratch([tiles, step * quads], isa.i8) if bits == 4 else None
        known = KnownRows(ops, row_block, step)
        walk = each_block(
            isa, epilogue, handles, sizes, all_tiles=all_tiles, rows=rows, tiles=tiles, row_block=row_block
        )
        with walk as unit:
            tile, totals = unit.tile, unit.totals

            def groups_from(first: Expr, count: int) -> None:
                if panel is not None:
                    with b.loop(count) as g, b.loop(layout.vectors) as vector:
                        for t in range(tiles):
                            for odd in (0, 1):
                                quad = vector * 2 + odd
                                b.store(panel, [t, g * quads + quad], ops.stored(tile[t], first + g, quad, odd))
                known.fill(unit.first_row, unit.blocks * rows, tokens, first, count)
                with b.loop(unit.blocks) as block:
                    row = b.clamped_rows(unit.first_row + block * rows, rows, tokens)
                    with b.when(first + count >= groups):
                        fetch_results(row)
                    with b.loop(count) as g:
                        fetch_next(block, row, first + g)
                        multiply(block, row, first + g, g)

            def fetch_results(row: Sequence[Expr]) -> None:
                """The lines that the last groups' sums will go to, a little before they do."""
                out = b.view(handles["out"], [b.MANY], "float32")
                for m in range(rows):
                    for column in range(tiles // epilogue.tiles):
                        first_column = (unit.first_tile // epilogue.tiles + column) * isa.lanes
                        b.prefetch(out, row[m] * epilogue.features + first_column, write=True)

            def fetch_next(block: Expr, row: Sequence[Expr], group: Expr) -> None:
                """This group of the next rows, and by and by the weights that are unpacked next."""
                activations = b.view(handles["xq"], [b.MANY], "int8")
                for m in range(rows):
                    b.prefetch(activations, ((row[m] + rows) * groups + group) * layout.group, near=True)
                data = b.view(handles["data"], [b.MANY], "uint8")
                for t in range(tiles):
                    vector = (tile[t] * groups + group + step) * layout.vectors + block % layout.vectors
                    b.prefetch(data, vector * isa.vector_bytes)

            def multiply(block: Expr, row: Sequence[Expr], group: Expr, position: Expr) -> None:
                sums = b.Registers(tiles * rows, isa.i32)
                for slot in range(tiles * rows):
                    sums[slot] = known.start(block * rows + slot % rows, position)

                def weight(t: int) -> Callable[[Expr, int], Expr]:
                    if panel is None:
                        return lambda quad, odd: ops.stored(tile[t], group, quad, odd)
                    return lambda quad, _: panel[t, position * quads + quad]

                _dot_group(ops, sums, row, group, [weight(t) for t in range(tiles)])
                for slot in range(tiles * rows):
                    t, m = divmod(slot, rows)
                    whole = totals[block * rows + m, t]
                    factors = known.factors(block * rows + m, position)
                    whole = ops.accumulate(whole, sums[slot], factors, tile[t], group)
                    b.store(totals, [block * rows + m, t], whole)

            with b.loop(groups // step) as part:
                groups_from(part * step, step)
            if groups % step:
                groups_from(b.index(groups // step * step), groups % step)

    return b.plain_function([*Operands.pointers(layout), *epilogue.pointers()], ["T"], body, b.ORDER_HELPER)
