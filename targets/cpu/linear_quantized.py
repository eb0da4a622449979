"""Linear ops with weights of 4 or 8 bits and activations of 8 bits per group.

Two kernels share one inner product. `quantized_linear_rows` keeps a few rows' sums in registers while it streams each
weight tile once: for one token and small batches, whose limit is the memory that holds the weights.
`quantized_linear_blocks` unpacks a panel of weights into the first-level cache and runs a block of rows over it: for
prefill, whose limit is the byte multipliers. A matrix unit (`matrix_unit.py`) does the same its own way.

Both take (xq i8 [T, Kpad], xscales f32 [T, groups], xsums i32 [T, groups], data, scales, minimums if asymmetric,
bias f32 [n] if any, residual f32 [T, features] if any, out f32 [T, features]; T, begin, end).
xsums are the sums of xq over each group, or two sums in one number (`VectorIsa.pair_sums`). Weights lie as
`QuantizedLayout` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.group_sums import Weights
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.linear_blocks import each_block
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.linear_products import GroupSums, KnownRows, Operands
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

# Unpacked weights that a panel holds at a time: with the sums they fit a first-level cache of 32 KiB.
PANEL_BYTES = 16 << 10


def quantized_layout(machine: Machine, bits: int, group: int, symmetric: bool, gated: bool) -> QuantizedLayout:
    """The layout that this machine's kernels read."""
    isa = isa_for(machine)
    return QuantizedLayout(bits, group, symmetric, isa.lanes, isa.weight_offset(bits, symmetric), gated)


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

            def weight(t: int, g: Expr = g) -> Weights:
                ahead = ops.ahead(tile[t], g, tiles)

                def streamed(quad: Expr, odd: int) -> Expr:
                    if bits == 8 or not odd:
                        ops.prefetch(ahead, quad)
                    return ops.stored(tile[t], g, quad, odd)

                return streamed

            sums = GroupSums(ops, known, row, first, g, g)([weight(t) for t in range(tiles)], chains)
            for slot in range(tiles * rows):
                t, m = divmod(slot, rows)
                totals[slot] = ops.accumulate(totals[slot], sums[slot], known.factors(first + m, g), tile[t], g)
        for t in range(0, tiles, epilogue.tiles):
            for m in range(rows):
                with b.when(tirx.And(base + first + m < tokens, first_tile + t < all_tiles)):
                    finished = [totals[(t + j) * rows + m] for j in range(epilogue.tiles)]
                    epilogue.emit(isa, ops.handles, row[m], (first_tile + t) // epilogue.tiles, finished)

    return b.plain_function(
        [*Operands.pointers(layout), *epilogue.pointers()], ["T"], body, b.ORDER_HELPER + isa.in_place_helper
    )


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
        if panel is not None:
            b.order_scratch(panel)
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
                def weight(t: int) -> Weights:
                    if panel is None:
                        return lambda quad, odd: ops.stored(tile[t], group, quad, odd)
                    return lambda quad, _: panel[t, position * quads + quad]

                weights = [weight(t) for t in range(tiles)]
                sums = GroupSums(ops, known, row, block * rows, group, position)(weights)
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

    return b.plain_function(
        [*Operands.pointers(layout), *epilogue.pointers()], ["T"], body, b.ORDER_HELPER + isa.in_place_helper
    )
