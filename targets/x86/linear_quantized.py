"""Linear ops with weights of 4 or 8 bits and activations of 8 bits per group.

Two kernels share one inner product. `quantized_linear_rows` keeps a few rows' sums in registers while it streams each
weight tile once: for one token and small batches, whose limit is the memory that holds the weights.
`quantized_linear_blocks` unpacks a panel of weights into the first-level cache and runs a block of rows over it: for
prefill, whose limit is the byte multipliers.

Both take (xq i8 [T, Kpad], xscales f32 [T, groups], xsums i32 [T, groups], data, scales, minimums if asymmetric,
bias f32 [n] if any, residual f32 [T, features] if any, out f32 [T, features]; T, begin, end).
xsums are the sums of xq over each group. Weights lie as `QuantizedLayout` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.machine import Machine
from llmc.targets.x86 import linear_builder as b
from llmc.targets.x86.isa import VectorIsa, isa_for
from llmc.targets.x86.layouts import QuantizedLayout
from llmc.targets.x86.linear_epilogue import Epilogue

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

# Quads that are unrolled: 32 inputs, the smallest group and the most that an i16 accumulator holds (`narrow_quads`).
UNROLLED = 8
# Unpacked weights that a panel holds at a time: with the sums they fit a first-level cache of 32 KiB.
PANEL_BYTES = 16 << 10
# How far ahead of the multiplications a streamed tile is asked for: hardware prefetchers alone start late on the short
# streams that tiles are. 1 to 2 KiB measured the same, 4 KiB no gain.
AHEAD_BYTES = 1536


def quantized_layout(machine: Machine, bits: int, group: int, symmetric: bool, gated: bool) -> QuantizedLayout:
    """The layout that this machine's kernels read."""
    isa = isa_for(machine)
    return QuantizedLayout(bits, group, symmetric, isa.lanes, isa.weight_offset(bits, symmetric), gated)


@dataclass
class _Operands:
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

    def activations(self, row: Expr, group: Expr, quad: Expr) -> Expr:
        """Four activations in every lane."""
        from tvm import tirx

        four = self.isa.load(self.xq, row, group, quad * 4, lanes=4)
        return self.isa.splat_quad(tirx.reinterpret("int32", four))

    def stored(self, tile: Expr, group: Expr, quad: Expr, odd: int) -> Expr:
        """The stored weights of one quad a lane. Of 4-bit weights two quads share a vector; `odd`: the second one."""
        from tvm import tirx

        def vector(position: Expr) -> Expr:
            return self.isa.load(self.data, tile, group, position, 0, lanes=self.isa.vector_bytes)

        if self.layout.bits == 8:
            return tirx.reinterpret(self.isa.i8, vector(quad))
        packed = vector(tirx.shift_right(quad, b.index(1)))
        return self.isa.high_nibbles(packed) if odd else self.isa.low_nibbles(packed)

    def prefetch(self, tile: Expr, group: Expr, quad: Expr) -> None:
        """Ask for what follows the vector of this quad, AHEAD_BYTES on in the tile's stream."""
        from tvm import tirx

        layout, width = self.layout, self.isa.vector_bytes
        vector = quad if layout.bits == 8 else tirx.shift_right(quad, b.index(1))
        position = ((tile * layout.groups(self.k) + group) * layout.vectors + vector) * width + AHEAD_BYTES
        b.prefetch(b.view(self.handles["data"], [b.MANY], "uint8"), position)

    def correction(self, row: Expr, group: Expr) -> Expr:
        """What the integer sums start from, so that the stored weights' offset cancels."""
        offset = self.layout.offset
        return self.isa.splat(self.xsums[row, group] * -offset if offset else 0, "int32")

    def accumulate(self, total: Expr, sums: Expr, row: Expr, tile: Expr, group: Expr) -> Expr:
        """total (f32) + what a group's integer sums stand for."""
        isa = self.isa
        scale = isa.f16_to_f32(isa.load(self.scales, tile, group, 0)) * isa.splat(self.xscales[row, group])
        total = isa.fma(sums.astype(isa.f32), scale, total)
        if self.layout.symmetric:
            return total
        shift = self.xscales[row, group] * self.xsums[row, group].astype("float32")
        return isa.fma(isa.f16_to_f32(isa.load(self.minimums, tile, group, 0)), isa.splat(shift), total)


def _dot_group(
    ops: _Operands,
    sums: b.Registers,
    rows: Sequence[Expr],
    group: Expr,
    weights: Sequence[Callable[[Expr, int], Expr]],
    chains: int = 1,
) -> None:
    """sums[(tile * rows + row) * chains + chain] += one group's products.

    weights[tile](quad, odd) are stored weights. Successive quads go to successive chains, so that with few rows the
    multiplier's latency is hidden.
    """
    isa, bits = ops.isa, ops.layout.bits
    narrow = isa.narrow_quads(bits) > 0
    with b.loop(ops.layout.group // 4 // UNROLLED) as chunk:
        parts = b.Registers(len(sums.slots), isa.i16) if narrow else None
        for step in range(UNROLLED):
            quad = chunk * UNROLLED + step
            for t, weight in enumerate(weights):
                w = b.let(weight(quad, step % 2))
                for m, row in enumerate(rows):
                    slot = (t * len(rows) + m) * chains + step % chains
                    a = ops.activations(row, group, quad)
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
) -> PrimFunc:
    """Any T, `rows` at a time (the last block repeats the last row). One unit: one vector of result columns.

    Moves every weight byte once per `rows` rows; with rows=1 the limit is the memory's read bandwidth.
    """
    isa, epilogue = isa_for(machine), Epilogue(n, gated, activation, bias, residual)
    layout = quantized_layout(machine, bits, group, symmetric, gated)
    tiles = epilogue.tiles
    chains = 2 if rows * tiles < 4 else 1

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        ops = _Operands(isa, layout, k, handles)
        with b.loop(sizes["end"] - sizes["begin"]) as i, b.loop((sizes["T"] + (rows - 1)) // rows) as block:
            column = b.let(sizes["begin"] + i)
            row = b.clamped_rows(block * rows, rows, sizes["T"])
            totals = b.Registers(tiles * rows, isa.f32)
            for slot in range(tiles * rows):
                totals[slot] = isa.splat(0.0)
            with b.loop(layout.groups(k)) as g:
                sums = b.Registers(tiles * rows * chains, isa.i32)
                for slot in range(tiles * rows):
                    sums[slot * chains] = ops.correction(row[slot % rows], g)
                    for chain in range(1, chains):
                        sums[slot * chains + chain] = isa.splat(0, "int32")

                def weight(t: int, g: Expr = g) -> Callable[[Expr, int], Expr]:
                    def streamed(quad: Expr, odd: int) -> Expr:
                        if bits == 8 or not odd:
                            ops.prefetch(column * tiles + t, g, quad)
                        return ops.stored(column * tiles + t, g, quad, odd)

                    return streamed

                _dot_group(ops, sums, row, g, [weight(t) for t in range(tiles)], chains)
                for slot in range(tiles * rows):
                    whole = sums[slot * chains]
                    for chain in range(1, chains):
                        whole = whole + sums[slot * chains + chain]
                    tile = column * tiles + slot // rows
                    totals[slot] = ops.accumulate(totals[slot], whole, row[slot % rows], tile, g)
            for m in range(rows):
                with b.when(block * rows + m < sizes["T"]):
                    epilogue.emit(isa, handles, row[m], column, [totals[t * rows + m] for t in range(tiles)])

    return b.plain_function([*_Operands.pointers(layout), *epilogue.pointers()], ["T"], body)


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
    if row_block % rows or tiles % epilogue.tiles:
        raise ValueError(f"{row_block} rows in blocks of {rows}, or {tiles} tiles in parts of {epilogue.tiles}")
    quads = group // 4
    step = min(groups, max(1, PANEL_BYTES // (tiles * group * isa.lanes)))  # groups that are unpacked at a time

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        ops, tokens = _Operands(isa, layout, k, handles), sizes["T"]
        panel = b.scratch([tiles, step * quads], isa.i8) if bits == 4 else None
        totals = b.scratch([row_block, tiles], isa.f32)
        row_blocks = b.let((tokens + (row_block - 1)) // row_block)
        with b.loop(sizes["end"] - sizes["begin"]) as i:
            unit = b.let(sizes["begin"] + i)
            first_tile = b.let(unit // row_blocks * tiles)
            # The last panel may be short: it repeats the last tile and stores it once.
            tile = [b.let(tirx.Min(first_tile + t, b.index(all_tiles - 1))) for t in range(tiles)]
            first_row = b.let(unit % row_blocks * row_block)
            here = b.let(tirx.Min(tokens - first_row, b.index(row_block)))
            blocks = b.let((here + (rows - 1)) // rows)
            with b.loop(blocks * rows) as m:
                for t in range(tiles):
                    b.store(totals, [m, t], isa.splat(0.0))

            def groups_from(first: Expr, count: int) -> None:
                if panel is not None:
                    with b.loop(count) as g, b.loop(layout.vectors) as vector:
                        for t in range(tiles):
                            for odd in (0, 1):
                                quad = vector * 2 + odd
                                b.store(panel, [t, g * quads + quad], ops.stored(tile[t], first + g, quad, odd))
                with b.loop(blocks) as block:
                    row = b.clamped_rows(first_row + block * rows, rows, tokens)
                    with b.loop(count) as g:
                        multiply(block, row, first + g, g)

            def multiply(block: Expr, row: Sequence[Expr], group: Expr, position: Expr) -> None:
                sums = b.Registers(tiles * rows, isa.i32)
                for slot in range(tiles * rows):
                    sums[slot] = ops.correction(row[slot % rows], group)

                def weight(t: int) -> Callable[[Expr, int], Expr]:
                    if panel is None:
                        return lambda quad, odd: ops.stored(tile[t], group, quad, odd)
                    return lambda quad, _: panel[t, position * quads + quad]

                _dot_group(ops, sums, row, group, [weight(t) for t in range(tiles)])
                for slot in range(tiles * rows):
                    t, m = divmod(slot, rows)
                    whole = totals[block * rows + m, t]
                    whole = ops.accumulate(whole, sums[slot], row[m], tile[t], group)
                    b.store(totals, [block * rows + m, t], whole)

            with b.loop(groups // step) as part:
                groups_from(part * step, step)
            if groups % step:
                groups_from(b.index(groups // step * step), groups % step)
            with b.loop(here) as m:
                for t in range(0, tiles, epilogue.tiles):
                    with b.when(first_tile + t < all_tiles):
                        sums = [totals[m, t + j] for j in range(epilogue.tiles)]
                        column = (first_tile + t) // epilogue.tiles
                        epilogue.emit(isa, handles, first_row + m, column, sums)

    return b.plain_function([*_Operands.pointers(layout), *epilogue.pointers()], ["T"], body)
