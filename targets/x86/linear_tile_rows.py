"""Quantized linear ops of a few rows on tile registers (AMX): the same exact integer sums as `quantized_linear_rows`.

A group of 64 inputs by 16 result columns is one multiplication of tiles, which takes as many cycles as there are rows;
the vector units would take eight times as long. 4-bit weights are unpacked to a ring of tiles on the stack on the way,
8-bit ones are tiles as they lie. What is left of the time goes to unpacking and to the sums' conversion and scaling, so
that up to 8 rows the limit is nearly the memory's read bandwidth, as for one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.linear_epilogue import Epilogue
from llmc.targets.cpu.linear_products import KnownRows, Operands
from llmc.targets.cpu.linear_quantized import quantized_layout
from llmc.targets.machine import Machine
from llmc.targets.x86 import tiles as amx
from llmc.targets.x86.isa import X86Isa, isa_for

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

TILES = 2  # weight tiles of a unit, side by side: they share the loads of activations
# Groups that are unpacked ahead of their multiplication. A tile is loaded only after the stores to it have left the
# core's store buffer, and those wait behind all that was issued before them: without a head start each group waits for
# the one before.
UNPACK_AHEAD = 2
RING = 4  # groups in flight: unpacked ones, and sums that are not scaled yet
# Numbers of the tile registers.
_A, _B, _C = (0, 1), (2, 3, 4), (5, 6, 7)


class _Shape:
    """How a group is cut into multiplications: `parts` of `inputs` inputs, which are `quads` rows of a tile."""

    def __init__(self, isa: X86Isa, layout: QuantizedLayout) -> None:
        self.inputs = 64 if layout.group % 64 == 0 else 32
        self.parts, self.quads = layout.group // self.inputs, self.inputs // 4
        self.tile_bytes = self.quads * isa.vector_bytes
        # 4-bit weights are multiplied as the high halves of bytes, 16 times what they stand for: that is two's
        # complement for no operation more.
        self.signed = layout.bits == 4 and layout.symmetric
        self.factor = 1 / 16 if layout.bits == 4 else 1.0

    def tiles(self, isa: X86Isa, rows: Expr) -> dict[int, tuple[Expr | int, int]]:
        """The configuration for that many rows of activations."""
        found: dict[int, tuple[Expr | int, int]] = dict.fromkeys(_A, (rows, self.inputs))
        found |= dict.fromkeys(_B, (self.quads, isa.vector_bytes))
        return found | dict.fromkeys(_C, (rows, isa.vector_bytes))


@dataclass
class _Unit:
    """TILES weight tiles times a block of rows, while their code is emitted.

    unpacked: u8 vectors [RING, TILES, quads of a group], of 4-bit weights. sums: i32 vectors [RING, TILES, rows].
    totals: f32 vectors [TILES * rows], in registers as far as they go.
    """

    ops: Operands
    shape: _Shape
    known: KnownRows
    unpacked: Buffer | None
    sums: Buffer
    totals: b.Registers
    rows: int
    tile: Sequence[Expr]
    first_row: Expr

    def run(self) -> None:
        """Add up all groups."""
        from tvm import tirx

        ops = self.ops
        groups = ops.layout.groups(ops.k)
        last = b.index(groups - 1)
        for slot in range(TILES * self.rows):
            self.totals[slot] = ops.isa.splat(0.0)
        for g in range(UNPACK_AHEAD):
            self._unpack(b.index(min(g, groups - 1)), b.index(g), None)
        with b.loop(groups) as g:
            prefetch = self._prefetches(g)
            self._unpack(b.let(tirx.Min(g + UNPACK_AHEAD, last)), b.let((g + UNPACK_AHEAD) % RING), prefetch)
            self._multiply(g, b.let(g % RING))
            # 8-bit weights are not unpacked; their prefetches go between the rows' sums.
            spread = prefetch if self.unpacked is None else None
            b.either(
                g > 0,
                lambda: self._scale(g - 1, b.let((g - 1) % RING), spread),
                lambda: self._each_row(spread),
            )
        self._scale(last, b.index((groups - 1) % RING), None)

    def _prefetches(self, group: Expr) -> Callable[[int, int, int], None]:
        """(tile, part, parts): ask for that part of the lines of a tile that are due while this group is multiplied."""
        ops = self.ops
        data = b.view(ops.handles["data"], [b.MANY], "uint8")
        ahead = [ops.ahead(tile, group, TILES) for tile in self.tile]

        def prefetch(t: int, part: int, parts: int) -> None:
            b.keep_order()
            lines = ops.layout.vectors
            for line in range(lines * part // parts, lines * (part + 1) // parts):
                b.prefetch(data, ahead[t] + line * ops.isa.vector_bytes)

        return prefetch

    def _unpack(self, group: Expr, place: Expr, prefetch: Callable[[int, int, int], None] | None) -> None:
        """4-bit weights of a group to a place of the ring."""
        from tvm import tirx

        if self.unpacked is None:
            return
        isa, layout = self.ops.isa, self.ops.layout
        for t, tile in enumerate(self.tile):
            for vector in range(layout.vectors):
                if prefetch is not None:
                    prefetch(t, vector, layout.vectors)
                packed = isa.load(self.ops.data, tile, group, vector, 0, lanes=isa.vector_bytes)
                words = b.let(tirx.reinterpret(isa.i32, packed))
                for odd, moved in enumerate((words << isa.splat(4, "int32"), words)):
                    high = tirx.reinterpret(isa.u8, moved)
                    if self.shape.signed:
                        high = high ^ isa.splat(0x80, "uint8")
                    b.store(self.unpacked, [place, t, vector * 2 + odd], high & isa.splat(0xF0, "uint8"))

    def _multiply(self, group: Expr, place: Expr) -> None:
        """A group's sums to a place of the ring."""
        ops, shape, layout = self.ops, self.shape, self.ops.layout
        groups = layout.groups(ops.k)
        xq = b.view(ops.handles["xq"], [b.MANY], "int8")
        sums = b.view(self.sums.data, [b.MANY], "int32")
        for part in range(shape.parts):
            start = self.first_row * (groups * layout.group) + group * layout.group + part * shape.inputs
            amx.load(_A[part % 2], xq, start, groups * layout.group)
            for t, tile in enumerate(self.tile):
                if part == 0:
                    amx.zero(_C[t])
                if self.unpacked is None:
                    source = b.view(ops.handles["data"], [b.MANY], "uint8")
                    vector = (tile * groups + group) * layout.vectors + part * shape.quads
                    amx.load(_B[t], source, vector * ops.isa.vector_bytes)
                else:
                    source = b.view(self.unpacked.data, [b.MANY], "uint8")
                    amx.load(_B[t], source, ((place * TILES + t) * shape.parts + part) * shape.tile_bytes)
                amx.dot_int8(_C[t], _A[part % 2], _B[t], unsigned=not shape.signed)
        for t in range(TILES):
            amx.store(_C[t], sums, (place * TILES + t) * (self.rows * ops.isa.lanes))

    def _scale(self, group: Expr, place: Expr, prefetch: Callable[[int, int, int], None] | None) -> None:
        """totals += what the sums in a place of the ring stand for."""
        ops, isa = self.ops, self.ops.isa
        scales = [b.let(isa.f16_to_f32(isa.load(ops.scales, tile, group, 0)) * isa.splat(self.shape.factor))
                  for tile in self.tile]  # fmt: skip
        minimums = (
            None
            if ops.layout.symmetric
            else [b.let(isa.f16_to_f32(isa.load(ops.minimums, tile, group, 0))) for tile in self.tile]
        )

        def add(t: int, m: int) -> None:
            slot = t * self.rows + m
            whole = self.sums[place, t, m]
            if not self.shape.signed:  # otherwise the tiles hold weights without their offset
                whole = whole + self.known.start(b.index(m), group)
            scale, shift = self.known.factors(b.index(m), group)
            total = isa.fma(whole.astype(isa.f32), scales[t] * isa.splat(scale), self.totals[slot])
            if minimums is not None and shift is not None:
                total = isa.fma(minimums[t], isa.splat(shift), total)
            self.totals[slot] = total

        self._each_row(prefetch, add)

    def _each_row(
        self,
        prefetch: Callable[[int, int, int], None] | None,
        emit: Callable[[int, int], None] = lambda t, m: None,
    ) -> None:
        """Code for every tile and row, with prefetches spread over it."""
        for t in range(TILES):
            for m in range(self.rows):
                if prefetch is not None:
                    prefetch(t, m, self.rows)
                emit(t, m)


def quantized_linear_tile_rows(
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
) -> PrimFunc:
    """Any T, `rows` (up to 16) at a time. One unit: TILES weight tiles. Parameters as `quantized_linear_rows` has them.

    Every weight byte comes from the memory once per `rows` rows. A short block is multiplied as short as it is.
    """
    isa, epilogue = isa_for(machine), Epilogue(n, gated, activation, bias, residual)
    if not amx.has_tiles(machine, "int8") or isa.lanes != amx.ROWS or not 0 < rows <= amx.ROWS:
        raise ValueError(f"{rows} rows of {isa.lanes} lanes do not go through tiles on {machine.name!r}")
    layout = quantized_layout(machine, bits, group, symmetric, gated)
    groups, all_tiles, shape = layout.groups(k), layout.tiles(n), _Shape(isa, layout)

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        ops, tokens = Operands(isa, layout, k, handles), sizes["T"]
        known = KnownRows(ops, rows, groups)
        unpacked = b.scratch([RING, TILES, group // 4], isa.u8) if bits == 4 else None
        sums = b.scratch([RING, TILES, rows], isa.i32)
        with b.loop((tokens + (rows - 1)) // rows) as block:
            first_row = b.let(block * rows)
            here = b.let(tirx.Min(tokens - first_row, b.index(rows)))
            known.fill(first_row, rows, tokens, b.index(0), groups)
            with amx.configured(shape.tiles(isa, here)), b.loop(sizes["end"] - sizes["begin"]) as i:
                # The last unit may be short: it repeats the last tile and stores it once.
                first_tile, last = b.let((sizes["begin"] + i) * TILES), b.index(all_tiles - 1)
                tile = [first_tile, *(b.let(tirx.Min(first_tile + t, last)) for t in range(1, TILES))]
                totals = b.Registers(TILES * rows, isa.f32)
                _Unit(ops, shape, known, unpacked, sums, totals, rows, tile, first_row).run()
                for t in range(0, TILES, epilogue.tiles):
                    for m in range(rows):
                        with b.when(tirx.And(m < here, first_tile + t < all_tiles)):
                            finished = [totals[(t + j) * rows + m] for j in range(epilogue.tiles)]
                            column = (first_tile + t) // epilogue.tiles
                            epilogue.emit(isa, handles, first_row + m, column, finished)

    return b.plain_function([*Operands.pointers(layout), *epilogue.pointers()], ["T"], body, b.ORDER_HELPER)
