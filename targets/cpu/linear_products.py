"""What quantized linear kernels share: operands, what depends on rows only, and the integer sums of one group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.group_sums import Sums, Weights
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.quads import quad_bytes
from llmc.targets.cpu.tile_slices import TileSlice
from llmc.targets.cpu.vector_isa import VectorIsa
from llmc.targets.cpu.vectors import as_f32, cast, load, permute, pieces, prefetch, splat, store, typed

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr


@dataclass
class Operands:
    """A kernel's quantized operands, as expressions over its pointers."""

    isa: VectorIsa
    layout: QuantizedLayout
    k: int
    handles: Mapping[str, Expr]

    def __post_init__(self) -> None:
        layout, groups, tile_rows = self.layout, self.layout.groups(self.k), self.layout.tile_rows
        per_group = [b.MANY, layout.scale_groups(self.k), tile_rows]
        self.xq = b.view(self.handles["xq"], [b.MANY, groups, layout.group], "int8")
        self.xscales = b.view(self.handles["xscales"], [b.MANY, groups], "float32")
        self.xsums = b.view(self.handles["xsums"], [b.MANY, groups], "int32")
        self.data = b.view(self.handles["data"], [b.MANY, groups, layout.vectors, tile_rows * 4], "uint8")
        self.scales = b.view(self.handles["scales"], per_group, "float16")
        if not layout.symmetric:
            self.minimums = b.view(self.handles["minimums"], per_group, "float16")

    @staticmethod
    def pointers(layout: QuantizedLayout) -> list[tuple[str, str]]:
        weight = [("data", "uint8"), ("scales", "float16")]
        minimums = [] if layout.symmetric else [("minimums", "float16")]
        return [("xq", "int8"), ("xscales", "float32"), ("xsums", "int32"), *weight, *minimums]

    @property
    def line(self) -> int:
        """Bytes of a tile's vector."""
        return self.layout.tile_rows * 4

    def stored(self, at: TileSlice, group: Expr, quad: Expr, step: int) -> Expr:
        """The weights of one quad a lane, as bytes to multiply (i8). step: the quad, less a multiple of a bundle's."""
        from tvm import tirx

        layout = self.layout
        bundle = self._bundle(quad)

        def vector(number: int) -> Expr:
            place = (at.tile, group, bundle * layout.bundle_vectors + number, at.number * self.isa.vector_bytes)
            return load(self.data, place, self.isa.vector_bytes)

        found = quad_bytes(self.isa, layout, vector, step % layout.bundle_quads)
        return tirx.reinterpret(self.isa.i8, found)

    def _bundle(self, quad: Expr) -> Expr:
        from tvm import tirx

        return tirx.shift_right(quad, b.index(self.layout.bundle_quads.bit_length() - 1))

    def ahead(self, tile: Expr, group: Expr, streams: int, distance: int) -> Expr:
        """Where in the weights to prefetch from while this group of a tile is multiplied.

        That is `distance` bytes on; past the tile's end, in the tile that follows it in its stream, `streams` tiles on.
        """
        from tvm import tirx

        size = self.layout.groups(self.k) * self.layout.vectors * self.line
        inside = b.let(group * (self.layout.vectors * self.line) + distance)
        skip = tirx.Select(inside >= size, b.index((streams - 1) * size), b.index(0)) if streams > 1 else 0
        return b.let(tile * size + inside + skip)

    def prefetch(self, ahead: Expr, quad: Expr, step: int) -> None:
        """Ask for what will follow the lines of this quad's bundle, one at each of its quads; ahead: see there."""
        place, layout = step % self.layout.bundle_quads, self.layout
        if place < layout.bundle_vectors:
            number = self._bundle(quad) * layout.bundle_vectors + place
            prefetch(b.view(self.handles["data"], [b.MANY], "uint8"), ahead + number * self.line)

    def activations(self, row: Expr, group: Expr, quad: Expr) -> Expr:
        """Four activations in every lane."""
        from tvm import tirx

        four = load(self.xq, (row, group, quad * 4), 4)
        return self.isa.splat_quad(tirx.reinterpret("int32", four))

    def scale_of(self, group: Expr) -> Expr:
        """Which of a row's scales is a group's."""
        return b.index(0) if self.layout.per_row else group

    def quads(self, row: Expr, group: Expr, quad: Expr, count: int) -> Expr:
        """`count` quads of activations of a row, i32, as many lanes."""
        from tvm import tirx

        return tirx.reinterpret(typed("int32", count), load(self.xq, (row, group, quad * 4), 4 * count))

    def per_group(self, name: str, at: TileSlice, group: Expr) -> Expr:
        """The "scales" or "minimums" of a group, f32."""
        first, group = at.number * self.isa.lanes, self.scale_of(group)
        return as_f32(load(getattr(self, name), (at.tile, group, first), self.isa.lanes))

    def minimum(self, at: TileSlice, group: Expr) -> Expr:
        """The least that the weights of a group stand for, f32: exact where it is counted in steps of the scale."""
        found = self.per_group("minimums", at, group)
        return found * self.per_group("scales", at, group) if self.layout.in_steps else found

    def accumulate(self, total: Expr, sums: Expr, row: tuple[Expr, Expr | None], at: TileSlice, group: Expr) -> Expr:
        """total (f32) + what a group's integer sums stand for; row: the row's scale and shift, see `KnownRows`."""
        minimum = None if self.layout.symmetric else self.minimum(at, group)
        return self.scaled(total, sums, row, self.per_group("scales", at, group), minimum)

    def scaled(
        self, total: Expr, sums: Expr, row: tuple[Expr, Expr | None], scales: Expr, minimum: Expr | None
    ) -> Expr:
        """The same, of the weights' scales and minimums."""
        isa, (scale, shift) = self.isa, row
        total = isa.fma(sums.astype(isa.f32), scales * scale, total)
        if shift is None or minimum is None:
            return total
        return isa.fma(minimum, splat(shift, isa.lanes), total)


class KnownRows:
    """What depends on row and group only, computed once for all weights: on the stack, by row and group.

    sums: the strategy of all that is multiplied; None: as `VectorIsa.sums` says."""

    def __init__(self, ops: Operands, rows: int, groups: int, sums: Sums | None = None) -> None:
        self.ops = ops
        layout = ops.layout
        self.pairs = ops.isa.pair_sums(layout.group)
        self.sums = sums or ops.isa.sums(layout.byte_bits, layout.group)
        self.centre = self.sums.centre
        taken = self.centre or ops.isa.dot_centre(layout.byte_bits)  # from the bytes that are multiplied
        self.offset = taken - layout.byte_offset
        self.scales = self._scratch([rows, groups], "float32")
        # What integer sums start from, so that the stored weights' offset cancels; what minimums are multiplied by.
        self.starts = self._scratch([rows, groups], "int32") if self.offset else None
        self.shifts = None if layout.symmetric else self._scratch([rows, groups], "float32")
        # Pairs of i16 that i16 sums start from, so that weights count from their centre on.
        self.narrow_starts = self._scratch([rows, groups], "int32") if self.centre else None

    def _scratch(self, shape: Sequence[int], dtype: str) -> Buffer:
        lanes = self.ops.isa.lanes
        return b.view(b.scratch(-(-math.prod(shape) // lanes), f"{dtype}x{lanes}").data, shape, dtype)

    def fill(self, first_row: Expr, rows: Expr | int, tokens: Expr, first_group: Expr, groups: int) -> None:
        """Make rows first_row, ... and groups first_group, ... readable; rows past the last token repeat it."""
        from tvm import tirx

        ops = self.ops
        with b.loop(rows) as m:
            row = b.let(tirx.Min(first_row + m, tokens - 1))
            for start, width in pieces(groups, ops.isa.lanes):
                scales, xsums = (b.let(load(x, (row, first_group + start), width)) for x in (ops.xscales, ops.xsums))
                store(self.scales, (m, start), scales if ops.layout.unit == 1 else scales * ops.layout.unit)
                if self.narrow_starts is not None:
                    pairs = tirx.reinterpret(f"int16x{2 * width}", xsums) * splat(-self.centre, 2 * width, "int16")
                    store(self.narrow_starts, (m, start), tirx.reinterpret(str(xsums.ty.dtype), pairs))
                if self.pairs:
                    xsums = b.let((xsums >> 16) + ((xsums << 16) >> 16))
                if self.starts is not None:
                    store(self.starts, (m, start), xsums * self.offset)
                if self.shifts is not None:
                    store(self.shifts, (m, start), scales * cast(xsums, "float32"))

    def start(self, m: Expr, g: Expr) -> Expr:
        """What integer sums of filled row m and group g start from."""
        return splat(0 if self.starts is None else self.starts[m, g], self.ops.isa.lanes, "int32")

    def narrow_start(self, m: Expr, g: Expr) -> Expr:
        """What i16 sums of a whole group start from, where they hold one."""
        from tvm import tirx

        assert self.narrow_starts is not None
        return tirx.reinterpret(self.ops.isa.i16, splat(self.narrow_starts[m, g], self.ops.isa.lanes, "int32"))

    def factors(self, m: Expr, g: Expr) -> tuple[Expr, Expr | None]:
        """The scale, and what the minimum is multiplied by."""
        return self.scales[m, g], None if self.shifts is None else self.shifts[m, g]


def known_bytes(isa: VectorIsa, layout: QuantizedLayout, rows: int, groups: int) -> list[int]:
    """Bytes of the arrays of `KnownRows`, at most."""
    return [4 * -(-rows * groups // isa.lanes) * isa.lanes] * (3 if layout.symmetric else 4)


def sums_bytes(isa: VectorIsa, rows: int, tiles: int, chains: int) -> list[int]:
    """Bytes of the registers of a group's sums, at most: several chains, or sums in i16 and in i32."""
    return [isa.vector_bytes] * (rows * tiles * max(chains, 2))


@dataclass(frozen=True)
class GroupSums:
    """Integer sums of one group, for some rows and tiles; called, it emits them and returns i32 [tile * rows + row].

    rows: their indices in `xq`; first, position: the first row and the group in `known`. Quads are loaded in order:
    prefetches stay beside their weights, and LLVM does not load weights early only to spill them (a sixth of the time
    of 512 rows of 8-bit weights with 16 lanes, a fifth of 4-bit ones with 8).
    """

    ops: Operands
    known: KnownRows
    rows: Sequence[Expr]
    first: Expr
    group: Expr
    position: Expr

    def __call__(self, weights: Sequence[Weights], unroll: int, chains: int = 1) -> b.Registers:
        """unroll, chains: see `Sums.emit`."""
        return self.known.sums.emit(self, weights, unroll, chains)

    @property
    def isa(self) -> VectorIsa:
        return self.ops.isa

    @property
    def bits(self) -> int:
        return self.ops.layout.byte_bits

    @property
    def quads(self) -> int:
        """Of the group."""
        return self.ops.layout.group // 4

    def start(self, slot: int) -> Expr:
        """What i32 sums start from."""
        return self.known.start(self.first + slot % len(self.rows), self.position)

    def narrow_start(self, slot: int) -> Expr:
        """What i16 sums of a whole group start from."""
        return self.known.narrow_start(self.first + slot % len(self.rows), self.position)

    def operands(self, weights: Sequence[Weights], first: Expr, quads: int) -> Iterator[tuple[int, int, Expr, Expr]]:
        """(step, slot, stored weights, activations) of every product of `quads` quads from `first` on."""
        spread: list[Expr] = []  # vectors of several quads, of each row
        for step in range(quads):
            quad = first + step
            b.keep_order()
            shared = self._shared(spread, quad, step, len(weights))
            for t, weight in enumerate(weights):
                w = b.let(weight(quad, step))
                for m in range(len(self.rows)):
                    a = self._activations(m, quad) if shared is None else shared[m]
                    yield step, t * len(self.rows) + m, w, a

    def _shared(self, spread: list[Expr], quad: Expr, step: int, tiles: int) -> list[Expr] | None:
        """A quad of each row, shared by tiles; None where one tile multiplies straight from memory."""
        from tvm import tirx

        several = self.isa.spread_quads
        if several == 1:
            return [b.let(self._activations(m, quad)) for m in range(len(self.rows))] if tiles > 1 else None
        if step % several == 0:
            spread[:] = [b.let(self.several(m, quad, several)) for m in range(len(self.rows))]
        return [tirx.reinterpret(self.isa.i8, permute([each], [step % several] * several)) for each in spread]

    def several(self, m: int, quad: Expr, count: int) -> Expr:
        """`count` quads of activations of row number m, i32, as many lanes."""
        return self.ops.quads(self.rows[m], self.group, quad, count)

    def _activations(self, m: int, quad: Expr) -> Expr:
        return self.ops.activations(self.rows[m], self.group, quad)
