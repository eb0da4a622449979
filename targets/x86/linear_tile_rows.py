"""Quantized linear ops of a few rows on tile registers (AMX): the same exact integer sums as `QuantizedRows`.

A group of 64 inputs by 16 result columns is one multiplication of tiles, which takes as many cycles as there are rows;
the vector units would take eight times as long. Packed weights go through a ring of tiles on the stack on the way,
8-bit ones are tiles as they lie. What is left of the time goes to unpacking and to the sums' conversion and scaling, so
that up to 8 rows the limit is nearly the memory's read bandwidth, as for one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.linear_problem import QuantizedProblem
from llmc.targets.cpu.linear_products import KnownRows, Operands, known_bytes
from llmc.targets.cpu.quads import quad_bytes
from llmc.targets.cpu.vectors import as_f32, load, prefetch, splat, store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Rows, knob
from llmc.targets.x86 import tiles as amx
from llmc.targets.x86.isa import X86Isa, isa_for

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

TILES = 2  # weight tiles of a unit, side by side, as many as tile registers hold: they share loads of activations
# Numbers of the tile registers.
_A, _B, _C = (0, 1), (2, 3, 4), (5, 6, 7)


class _Shape:
    """How a group is cut into multiplications: `count` of `inputs` inputs, which are `quads` rows of a tile."""

    def __init__(self, isa: X86Isa, layout: QuantizedLayout) -> None:
        self.inputs = 64 if layout.group % 64 == 0 else 32
        self.count, self.quads = layout.group // self.inputs, self.inputs // 4
        self.tile_bytes = self.quads * isa.vector_bytes
        # Even steps of 4 bits are multiplied as the high halves of bytes, 16 times what they stand for: that is two's
        # complement for no operation more.
        self.halves = layout.bits == 4 and layout.levels is None
        self.signed = self.halves and layout.symmetric
        self.factor = 1 / 16 if self.halves else 1.0

    def tiles(self, isa: X86Isa, rows: Expr) -> dict[int, tuple[Expr | int, int]]:
        """The configuration for that many rows of activations."""
        found: dict[int, tuple[Expr | int, int]] = dict.fromkeys(_A, (rows, self.inputs))
        found |= dict.fromkeys(_B, (self.quads, isa.vector_bytes))
        return found | dict.fromkeys(_C, (rows, isa.vector_bytes))


@dataclass
class _Unit:
    """TILES weight tiles times a block of rows, while their code is emitted.

    unpacked: u8 vectors [ring, TILES, quads of a group], of packed weights. sums: i32 vectors [ring, TILES, rows].
    totals: f32 vectors [TILES * rows], in registers as far as they go.
    """

    knobs: QuantizedTileRows
    ops: Operands
    shape: _Shape
    known: KnownRows
    unpacked: Buffer | None
    sums: Buffer
    totals: b.Registers
    tile: Sequence[Expr]
    first_row: Expr

    def run(self) -> None:
        """Add up all groups."""
        from tvm import tirx

        ops = self.ops
        groups = ops.layout.groups(ops.k)
        last = b.index(groups - 1)
        for slot in range(TILES * self.knobs.rows):
            self.totals[slot] = splat(0.0, ops.isa.lanes)
        unpack_ahead, ring = self.knobs.unpack_ahead, self.knobs.ring
        for g in range(unpack_ahead):
            self._unpack(b.index(min(g, groups - 1)), b.index(g), None)
        with b.loop(groups) as g:
            prefetch = self._prefetches(g)
            self._unpack(b.let(tirx.Min(g + unpack_ahead, last)), b.let((g + unpack_ahead) % ring), prefetch)
            self._multiply(g, b.let(g % ring))
            # 8-bit weights are not unpacked; their prefetches go between the rows' sums.
            spread = prefetch if self.unpacked is None else None
            b.either(
                g > 0,
                lambda: self._scale(g - 1, b.let((g - 1) % ring), spread),
                lambda: self._each_row(spread),
            )
        self._scale(last, b.index((groups - 1) % ring), None)

    def _prefetches(self, group: Expr) -> Callable[[int, int, int], None]:
        """(tile, i, n): ask for the i-th of n shares of the lines of a tile that are due while this group is
        multiplied."""
        ops = self.ops
        data = b.view(ops.handles["data"], [b.MANY], "uint8")
        ahead = [ops.ahead(tile, group, TILES, self.knobs.ahead) for tile in self.tile]

        def ask(t: int, share: int, shares: int) -> None:
            b.keep_order()
            lines = ops.layout.vectors
            for line in range(lines * share // shares, lines * (share + 1) // shares):
                prefetch(data, ahead[t] + line * ops.isa.vector_bytes)

        return ask

    def _unpack(self, group: Expr, place: Expr, prefetch: Callable[[int, int, int], None] | None) -> None:
        """Packed weights of a group to a place of the ring."""
        if self.unpacked is None:
            return
        layout = self.ops.layout
        bundles = layout.vectors // layout.bundle_vectors
        for t, tile in enumerate(self.tile):
            for bundle in range(bundles):
                if prefetch is not None:
                    prefetch(t, bundle, bundles)
                for number, quad in enumerate(self._quads(tile, group, bundle)):
                    store(self.unpacked, (place, t, bundle * layout.bundle_quads + number), quad)

    def _quads(self, tile: Expr, group: Expr, bundle: int) -> list[Expr]:
        """The quads of a bundle as they are multiplied."""
        from tvm import tirx

        isa, layout = self.ops.isa, self.ops.layout
        vectors = [
            b.let(load(self.ops.data, (tile, group, bundle * layout.bundle_vectors + number, 0), isa.vector_bytes))
            for number in range(layout.bundle_vectors)
        ]
        if not self.shape.halves:
            return [quad_bytes(isa, layout, lambda i: vectors[i], place) for place in range(layout.bundle_quads)]
        words = b.let(tirx.reinterpret(isa.i32, vectors[0]))
        high = [tirx.reinterpret(isa.u8, moved) for moved in (words << 4, words)]
        return [(half ^ 0x80 if self.shape.signed else half) & 0xF0 for half in high]

    def _multiply(self, group: Expr, place: Expr) -> None:
        """A group's sums to a place of the ring."""
        ops, shape, layout = self.ops, self.shape, self.ops.layout
        groups = layout.groups(ops.k)
        xq = b.view(ops.handles["xq"], [b.MANY], "int8")
        sums = b.view(self.sums.data, [b.MANY], "int32")
        for number in range(shape.count):
            start = self.first_row * (groups * layout.group) + group * layout.group + number * shape.inputs
            amx.load(_A[number % 2], xq, start, groups * layout.group)
            for t, tile in enumerate(self.tile):
                if number == 0:
                    amx.zero(_C[t])
                if self.unpacked is None:
                    source = b.view(ops.handles["data"], [b.MANY], "uint8")
                    vector = (tile * groups + group) * layout.vectors + number * shape.quads
                    amx.load(_B[t], source, vector * ops.isa.vector_bytes)
                else:
                    source = b.view(self.unpacked.data, [b.MANY], "uint8")
                    amx.load(_B[t], source, ((place * TILES + t) * shape.count + number) * shape.tile_bytes)
                amx.dot_int8(_C[t], _A[number % 2], _B[t], unsigned=not shape.signed)
        for t in range(TILES):
            amx.store(_C[t], sums, (place * TILES + t) * (self.knobs.rows * ops.isa.lanes))

    def _scale(self, group: Expr, place: Expr, prefetch: Callable[[int, int, int], None] | None) -> None:
        """totals += what the sums in a place of the ring stand for."""
        ops, isa = self.ops, self.ops.isa
        own = ops.scale_of(group)
        scales = [b.let(as_f32(load(ops.scales, (tile, own, 0), isa.lanes)) * self.shape.factor)
                  for tile in self.tile]  # fmt: skip
        minimums = None if ops.layout.symmetric else [b.let(self._minimum(tile, group)) for tile in self.tile]

        def add(t: int, m: int) -> None:
            slot = t * self.knobs.rows + m
            whole = self.sums[place, t, m]
            if not self.shape.signed:  # otherwise the tiles hold weights without their offset
                whole = whole + self.known.start(b.index(m), group)
            scale, shift = self.known.factors(b.index(m), group)
            total = isa.fma(whole.astype(isa.f32), scales[t] * scale, self.totals[slot])
            if minimums is not None and shift is not None:
                total = isa.fma(minimums[t], splat(shift, isa.lanes), total)
            self.totals[slot] = total

        self._each_row(prefetch, add)

    def _minimum(self, tile: Expr, group: Expr) -> Expr:
        """The least that the weights of a tile's group stand for."""
        ops, lanes = self.ops, self.ops.isa.lanes
        found = as_f32(load(ops.minimums, (tile, group, 0), lanes))
        return found * as_f32(load(ops.scales, (tile, group, 0), lanes)) if ops.layout.in_steps else found

    def _each_row(
        self,
        prefetch: Callable[[int, int, int], None] | None,
        emit: Callable[[int, int], None] = lambda t, m: None,
    ) -> None:
        """Code for every tile and row, with prefetches spread over it."""
        for t in range(TILES):
            for m in range(self.knobs.rows):
                if prefetch is not None:
                    prefetch(t, m, self.knobs.rows)
                emit(t, m)


@dataclass(frozen=True)
class QuantizedTileRows(CpuTemplate[QuantizedProblem], name="quantized_linear_tile_rows"):
    """Any T, `rows` at a time, with the arguments of `QuantizedRows`. One unit: TILES weight tiles.

    Every weight byte comes from the memory once per `rows` rows. A short block is multiplied as short as it is.
    unpack_ahead: groups that are unpacked ahead of their multiplication. A tile is loaded only after the stores to it
    have left the core's store buffer, and those wait behind all that was issued before them: without a head start each
    group waits for the one before. ring: groups in flight, unpacked ones, and sums that are not scaled yet. ahead,
    least: see `QuantizedRows`.
    """

    rows: int = knob(4, 8, 16)
    unpack_ahead: int = knob(1, 2, 3)
    ring: int = knob(2, 4, 8)
    ahead: int = knob(1536, 3072, 6144)
    least: int = knob(16 << 10, 32 << 10, 64 << 10, code=False)

    @classmethod
    def default(cls, problem: QuantizedProblem, machine: Machine, rows: Rows = ANY_ROWS) -> QuantizedTileRows:
        return cls(rows[1] or amx.ROWS, unpack_ahead=2, ring=4, ahead=3072, least=32 << 10)

    def refuse(self, problem: QuantizedProblem, machine: Machine) -> str:
        if not amx.has_tiles(machine, "int8") or isa_for(machine).lanes != amx.ROWS:
            return f"{machine.name} has no tile registers for bytes, as wide as its vectors"
        if problem.group % 32:
            return f"groups of {problem.group} do not fill the tiles that multiply bytes"
        if self.ring <= self.unpack_ahead:  # what is unpacked would overwrite what is multiplied
            return f"a ring of {self.ring} groups has no room for {self.unpack_ahead} ahead and one that is multiplied"
        return super().refuse(problem, machine)

    def stack_bytes(self, problem: QuantizedProblem, machine: Machine) -> int:
        isa, layout = isa_for(machine), problem.layout(machine)
        known = known_bytes(isa, layout, self.rows, layout.groups(problem.k))
        flying = [TILES * problem.group // 4 * layout.packed, TILES * self.rows]
        rings = [isa.vector_bytes * self.ring * each for each in flying]
        return arrays(*known, *rings, *[isa.vector_bytes] * (TILES * self.rows))

    def build(self, problem: QuantizedProblem, machine: Machine) -> PrimFunc:
        isa, layout = isa_for(machine), problem.layout(machine)

        def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
            _emit(self, problem, Operands(isa, layout, problem.k, handles), sizes)

        pointers = [*Operands.pointers(layout), *problem.epilogue.pointers()]
        return b.plain_function(pointers, ["T"], body, b.ORDER_HELPER)


def _emit(knobs: QuantizedTileRows, problem: QuantizedProblem, ops: Operands, sizes: Mapping[str, Expr]) -> None:
    from tvm import tirx

    isa, layout, epilogue, rows, tokens = ops.isa, ops.layout, problem.epilogue, knobs.rows, sizes["T"]
    assert isinstance(isa, X86Isa)
    groups, all_tiles, shape = layout.groups(problem.k), layout.tiles(problem.n), _Shape(isa, layout)
    known = KnownRows(ops, rows, groups)
    unpacked = b.scratch([knobs.ring, TILES, layout.group // 4], isa.u8) if layout.packed else None
    sums = b.scratch([knobs.ring, TILES, rows], isa.i32)
    with b.loop((tokens + (rows - 1)) // rows) as block:
        first_row = b.let(block * rows)
        here = b.let(tirx.Min(tokens - first_row, b.index(rows)))
        known.fill(first_row, rows, tokens, b.index(0), groups)
        with amx.configured(shape.tiles(isa, here)), b.loop(sizes["end"] - sizes["begin"]) as i:
            # The last unit may be short: it repeats the last tile and stores it once.
            first_tile, last = b.let((sizes["begin"] + i) * TILES), b.index(all_tiles - 1)
            tile = [first_tile, *(b.let(tirx.Min(first_tile + t, last)) for t in range(1, TILES))]
            totals = b.Registers(TILES * rows, isa.f32)
            _Unit(knobs, ops, shape, known, unpacked, sums, totals, tile, first_row).run()
            for t in range(0, TILES, epilogue.tiles):
                for m in range(rows):
                    with b.when(tirx.And(m < here, first_tile + t < all_tiles)):
                        finished = [totals[(t + j) * rows + m] for j in range(epilogue.tiles)]
                        column = (first_tile + t) // epilogue.tiles
                        epilogue.emit(isa, ops.handles, first_row + m, column, finished)
