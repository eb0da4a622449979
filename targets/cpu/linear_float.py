"""Linear ops that multiply in floating point: f32, f16 or bf16 weights, and quantized weights with f32 activations.

Weights become f32 in registers (a few rows) or in a panel in the first-level cache (blocks of rows), and sums are f32
fused multiply-adds. With bf16 activations and weights, pairs are multiplied (`VectorIsa.bf16_dots`).

All kernels take (x, data, scales and minimums if quantized, bias f32 [n] if any, residual f32 [T, features] if any,
out f32 [T, features]; T, begin, end). x is f32 [T, k], or bf16 bits u16 [T, 2 * ceil(k / 2)].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.float_operands import Activations, AnyWeights, DequantizedWeights, FloatWeights
from llmc.targets.cpu.linear_blocks import each_block
from llmc.targets.cpu.linear_problem import FloatProblem, QuantizedProblem, panel_tiles, refuse_blocks
from llmc.targets.cpu.tile_slices import TileSlice, batches, in_memory, slices_of, tile_slices
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import prefetch, splat, store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

LATENCY_BYTES = 64  # of weights that are multiplied in four cycles, at least: what no core reads from memory

AnyProblem: TypeAlias = FloatProblem | QuantizedProblem
F = TypeVar("F", FloatProblem, QuantizedProblem)


def _function(weights: AnyWeights, problem: AnyProblem, body: Callable[..., None]) -> PrimFunc:
    pointers = [("x", "uint16" if weights.dots else "float32"), *weights.pointers(), *problem.epilogue.pointers()]
    return b.plain_function(pointers, ["T"], body, b.ORDER_HELPER + (weights.dots.helper if weights.dots else ""))


def _steps(terms: int, unroll: int) -> Iterator[tuple[Expr, int]]:
    """(first term, how many): emit each once. A loop of unrolled steps, then what is left."""
    if terms >= unroll:
        with b.loop(terms // unroll) as step:
            yield step * unroll, unroll
    if terms % unroll:
        yield b.index(terms // unroll * unroll), terms % unroll


def _parts(terms: int, part: int) -> Iterator[tuple[Expr, int]]:
    """(part, its terms): emit each once. A loop of whole parts, then the short last one."""
    if terms >= part:
        with b.loop(terms // part) as i:
            yield i, part
    if terms % part:
        yield b.index(terms // part), terms % part


def _bundles(first: Expr, count: int, size: int) -> Iterator[tuple[Expr, int, int]]:
    """(term, its place among `count`, terms in the bundle)."""
    for start in range(0, count, size):
        yield first + start, start, min(size, count - start)


class _Stream:
    """Prefetches of one tile, `distance` bytes before its bytes are multiplied."""

    def __init__(
        self, handles: Mapping[str, Expr], weights: AnyWeights, tile: Expr, streams: int, distance: int
    ) -> None:
        self.data, self.distance = b.view(handles["data"], [b.MANY], "uint8"), distance
        self.weights, self.start, self.streams = weights, b.let(tile * weights.tile_bytes), streams

    def ahead(self, term: Expr) -> Callable[[int], None]:
        """For terms from `term` on: a function of a bundle's place among them, which asks for what follows it so far.

        Past the end of a tile that is the tile which follows it in its stream, `streams` tiles on.
        """
        from tvm import tirx

        weights = self.weights
        inside = b.let(term // weights.bundle * weights.bundle_bytes + self.distance)
        skip = b.index((self.streams - 1) * weights.tile_bytes)
        at = b.let(self.start + inside + tirx.Select(inside >= weights.tile_bytes, skip, b.index(0)))

        def ask(place: int) -> None:
            offset = place // weights.bundle * weights.bundle_bytes
            b.keep_order()
            if offset % weights.isa.cache_line == 0:
                prefetch(self.data, at + offset)

        return ask


@dataclass(frozen=True)
class _Unit:
    """A work unit of `StreamedFloats` while its code is emitted. row: indices in x; streams: of every tile; totals: by
    slice and row."""

    x: Activations
    handles: Mapping[str, Expr]
    row: Sequence[Expr]
    streams: Sequence[_Stream]
    totals: b.Registers


@dataclass(frozen=True)
class _Rows:
    """The code of `StreamedFloats`."""

    problem: AnyProblem
    weights: AnyWeights
    knobs: StreamedFloats[Any]  # of the problem's kind

    def function(self) -> PrimFunc:
        return _function(self.weights, self.problem, self.body)

    def body(self, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        weights, rows, tiles = self.weights, self.knobs.rows, self.knobs.tiles
        x = Activations(weights.isa, weights.k, weights.dots, handles["x"])
        with b.loop(sizes["end"] - sizes["begin"]) as i, b.loop((sizes["T"] + (rows - 1)) // rows) as block:
            self.unit(x, handles, sizes["T"], b.let((sizes["begin"] + i) * tiles), block * rows)

    def unit(self, x: Activations, handles: Mapping[str, Expr], tokens: Expr, first_tile: Expr, first: Expr) -> None:
        """Rows from `first` on, times the tiles from `first_tile` on."""
        from tvm import tirx

        isa, epilogue, layout = self.weights.isa, self.problem.epilogue, self.weights.layout
        rows, tiles, each = self.knobs.rows, self.knobs.tiles, slices_of(isa, layout)
        all_tiles = layout.tiles(self.problem.n)
        # The last unit may be short: it repeats the last tile and stores it once.
        tile = [b.let(tirx.Min(first_tile + t, b.index(all_tiles - 1))) if t else first_tile for t in range(tiles)]
        row = b.clamped_rows(first, rows, tokens)
        totals = b.Registers(tiles * each * rows, isa.f32)
        for slot in range(len(totals.slots)):
            totals[slot] = splat(0.0, isa.lanes)
        several = self.knobs.slices < tiles * each
        finished = in_memory(tiles * each * rows, isa.f32) if several else totals
        streams = [
            _Stream(handles, self.weights, at, max(1, self.knobs.slices // each), self.knobs.ahead) for at in tile
        ]
        for start, batch in batches(tile, each, self.knobs.slices):
            self.multiply(_Unit(x, handles, row, streams, totals), start, batch)
            for slot in range(start * rows, (start + len(batch)) * rows) if several else ():
                finished[slot] = totals[slot]
        for t in range(0, tiles, epilogue.tiles):
            for m in range(rows):

                def sums(number: int, t: int = t, m: int = m) -> list[Expr]:
                    return [finished[((t + j) * each + number) * rows + m] for j in range(epilogue.tiles)]

                with b.when(tirx.And(first + m < tokens, first_tile + t < all_tiles)):
                    column = (first_tile + t) // epilogue.tiles
                    epilogue.emit_tile(isa, layout.tile_rows, handles, row[m], column, sums)

    def multiply(self, unit: _Unit, start: int, batch: Sequence[TileSlice]) -> None:
        """All terms of the unit's slices from `start` on."""
        weights, rows, totals = self.weights, self.knobs.rows, unit.totals
        for part, terms in _parts(weights.terms, weights.part):
            sources = [weights.at(unit.handles, at, part) for at in batch]
            for first, count in _steps(terms, self.knobs.unroll):
                ahead = [
                    None if at.number else unit.streams[at.place].ahead(part * weights.part + first) for at in batch
                ]
                for term, place, size in _bundles(first, count, weights.bundle):
                    vectors = []
                    for source, ask in zip(sources, ahead, strict=True):
                        if ask is not None:
                            ask(place)
                        vectors.append(source(term, size))
                    for j in range(size):
                        w = [b.let(vector[j]) for vector in vectors]
                        for m in range(rows):
                            # Shared by slices; one slice multiplies straight from memory.
                            spread = unit.x.spread(unit.row[m], part * weights.part + term + j)
                            spread = b.let(spread) if len(batch) > 1 else spread
                            for s in range(len(batch)):
                                slot = (start + s) * rows + m
                                totals[slot] = unit.x.multiply(totals[slot], w[s], spread)


def _following(weights: AnyWeights, first_tile: Expr, part: Expr, tiles: int) -> Expr:
    """Where the part begins that a panel unpacks after this one, in its first tile: at last the next panel's first."""
    from tvm import tirx

    inside = b.let((part + 1) * (weights.part // weights.bundle * weights.bundle_bytes))
    ended = inside >= weights.tile_bytes
    return first_tile * weights.tile_bytes + tirx.Select(ended, b.index(tiles * weights.tile_bytes), inside)


def _blocks_kernel(problem: AnyProblem, weights: AnyWeights, knobs: FloatPanels[F]) -> PrimFunc:
    """The code of `FloatPanels`."""
    isa, layout, each = weights.isa, weights.layout, slices_of(weights.isa, weights.layout)
    rows, tiles, row_block, unroll = knobs.rows, knobs.tiles, knobs.row_block, knobs.unroll
    lines = -(-unroll // weights.bundle * weights.bundle_bytes // isa.cache_line) * tiles  # of a step, in all tiles

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        x, tokens = Activations(isa, weights.k, weights.dots, handles["x"]), sizes["T"]
        data = b.view(handles["data"], [b.MANY], "uint8")
        panel = b.scratch([tiles * each, weights.part], isa.i32 if weights.dots else isa.f32)
        walk = each_block(
            isa,
            problem.epilogue,
            handles,
            sizes,
            tile_rows=layout.tile_rows,
            all_tiles=layout.tiles(problem.n),
            rows=rows,
            tiles=tiles,
            row_block=row_block,
        )
        with walk as unit:
            totals = unit.totals
            for part, terms in _parts(weights.terms, weights.part):
                for s, at in enumerate(tile_slices(unit.tile, each)):
                    source = weights.at(handles, at, part)
                    for first, steps in _steps(terms, unroll):
                        for term, _, size in _bundles(first, steps, weights.bundle):
                            for j, vector in enumerate(source(term, size)):
                                store(panel, (s, term + j), vector)
                share = b.let((lines + unit.blocks - 1) // unit.blocks)
                following = b.let(_following(weights, unit.first_tile, part, tiles))
                with b.loop(unit.blocks) as block:
                    row = b.clamped_rows(unit.first_row + block * rows, rows, tokens)
                    for start in range(0, tiles * each, knobs.slices):
                        sums = b.Registers(rows * knobs.slices, isa.f32)
                        for slot in range(rows * knobs.slices):
                            sums[slot] = totals[block * rows + slot % rows, start + slot // rows]
                        for first, steps in _steps(terms, unroll):
                            if start == 0:
                                with b.loop(share) as i:
                                    line = b.let(block * share + i)
                                    at = first // weights.bundle * weights.bundle_bytes + line // tiles * isa.cache_line
                                    prefetch(data, following + line % tiles * weights.tile_bytes + at)
                            for j in range(steps):
                                for slot in range(rows * knobs.slices):
                                    w = panel[start + slot // rows, first + j]
                                    at = part * weights.part + first + j
                                    sums[slot] = x.multiply(sums[slot], w, x.spread(row[slot % rows], at))
                        for slot in range(rows * knobs.slices):
                            store(totals, (block * rows + slot % rows, start + slot // rows), sums[slot])

    return _function(weights, problem, body)


@dataclass(frozen=True)
class StreamedFloats(CpuTemplate[F]):
    """Any T, `rows` at a time. One unit: `tiles` tiles, streamed side by side: several streams keep more of the memory
    busy. rows by slices of these tiles are multiplied at once. The limit is the memory's read bandwidth. Each sum adds
    its terms in order, as in blocks of rows, so that a row has the same bits beside any number of others. unroll: terms
    of a step. ahead, least: see `QuantizedRows`.
    """

    version: ClassVar[int] = 2
    rows: int = knob(1, 4, 6, 8, 12)
    tiles: int = knob(1, 2, 4)
    slices: int = knob(1, 2, 4)
    unroll: int = knob(8, 16, 32)
    ahead: int = knob(1536, 3072, 6144)
    least: int = knob(16 << 10, 32 << 10, 64 << 10, code=False)

    def stack_bytes(self, problem: F, machine: Machine) -> int:
        isa = isa_for(machine)
        count = self.tiles * slices_of(isa, problem.layout(machine))
        return arrays(*[isa.vector_bytes] * (self.rows * count * (2 if self.slices < count else 1)))


def streams(problem: AnyProblem, machine: Machine, bits: int, rows: int) -> dict[str, int]:
    """rows, tiles, slices and ahead of a kernel for up to so many rows: two streams, if sums leave room for weights.

    Measured out of cache, f32 and bf16: one row reads a third more with two than with one, and as much with four. One
    row has one sum a slice, and a sum takes one term every four cycles: short terms come in four slices, so that this
    is no slower than the memory. Two slices of one tile are one stream, whose prefetches go twice as far ahead; 8 rows
    by two slices would not fit 16 registers, and are multiplied as 4 and 4 (a tenth to a third faster than 8 by one).
    """
    isa, least = isa_for(machine), problem.epilogue.tiles
    each, ahead = slices_of(isa, problem.layout(machine)), 3072
    if rows == 1:
        slices = min(4, max(2, LATENCY_BYTES * 8 // (bits * isa.lanes)))
    elif each == 1:
        slices = 2 if problem.gated or 2 * rows <= isa.registers - 4 else 1
    else:
        rows, slices, ahead = rows if 2 * rows <= isa.registers - 4 else 4, 2, 6144
    return {"rows": rows, "tiles": max(least, slices // each), "slices": slices, "ahead": ahead}


@dataclass(frozen=True)
class FloatPanels(CpuTemplate[F]):
    """Prefill. One unit: `row_block` rows by a panel of `tiles` tiles; consecutive units share the panel.

    A part of the panel is made f32 once for all rows of the block; rows x slices sums are in registers while a part
    lasts. Loads per multiply: 1/rows + 1/slices. The limit is the multipliers; of up to some 30 rows it is the memory,
    so the next part is asked for evenly while this one is multiplied: 24 to 35% faster at 13 to 48 rows of f32. unroll:
    terms of a step.
    """

    version: ClassVar[int] = 2
    rows: int = knob(2, 4, 6, 8)
    tiles: int = knob(1, 2, 4)
    slices: int = knob(2, 4)
    row_block: int = knob(32, 64, 96, 192)
    unroll: int = knob(8, 16, 32)

    def panel_bytes(self, part: int, problem: AnyProblem, machine: Machine) -> int:
        """Bytes of stack, of parts of so many terms."""
        isa = isa_for(machine)
        vectors = self.tiles * slices_of(isa, problem.layout(machine))
        sums = [isa.vector_bytes] * (2 * self.rows * vectors)  # of whole parts, and of the last one
        return arrays(isa.vector_bytes * vectors * part, isa.vector_bytes * self.row_block * vectors, *sums)


def _refuse_pairs(problem: FloatProblem, machine: Machine) -> str:
    if problem.pairs and (problem.dtype != "bf16" or isa_for(machine).bf16_dots is None):
        return f"bf16 activations need bf16 weights and products of their pairs, not {problem.dtype} on {machine.name}"
    return ""


def _refuse_unroll(unroll: int, part: int, bundle: int) -> str:
    if part % unroll or unroll % bundle:
        return f"steps of {unroll} do not divide parts of {part} terms into whole loads of {bundle}"
    return ""


def _float_weights(problem: FloatProblem, machine: Machine, part: int) -> FloatWeights:
    return FloatWeights(isa_for(machine), problem.layout(machine), problem.n, problem.k, problem.pairs, part)


@dataclass(frozen=True)
class FloatRows(StreamedFloats[FloatProblem], name="float_linear_rows"):
    """Weights in f32, f16 or bf16. part: terms of the outer of two loops."""

    part: int = knob(64, 128)

    @classmethod
    def default(cls, problem: FloatProblem, machine: Machine, rows: Rows = ANY_ROWS) -> FloatRows:
        blocks = streams(problem, machine, 32 if problem.dtype == "f32" else 16, rows[1] or 1)
        return cls(**blocks, unroll=8, least=32 << 10, part=64)

    def refuse(self, problem: FloatProblem, machine: Machine) -> str:
        return (
            _refuse_pairs(problem, machine)
            or refuse_blocks(problem, machine, self.rows, self.tiles, self.slices, self.rows)
            or _refuse_unroll(self.unroll, self.part, 2)
            or super().refuse(problem, machine)
        )

    def build(self, problem: FloatProblem, machine: Machine) -> PrimFunc:
        return _Rows(problem, _float_weights(problem, machine, self.part), self).function()


@dataclass(frozen=True)
class FloatBlocks(FloatPanels[FloatProblem], name="float_linear_blocks"):
    """Weights in f32, f16 or bf16. part: terms that a panel holds at a time."""

    part: int = knob(64, 128)

    @classmethod
    def default(cls, problem: FloatProblem, machine: Machine, rows: Rows = ANY_ROWS) -> FloatBlocks:
        blocks = isa_for(machine).float_blocks
        return cls(**vars(blocks), tiles=panel_tiles(problem, machine, blocks), unroll=8, part=64)

    def refuse(self, problem: FloatProblem, machine: Machine) -> str:
        return (
            _refuse_pairs(problem, machine)
            or refuse_blocks(problem, machine, self.rows, self.tiles, self.slices, self.row_block)
            or _refuse_unroll(self.unroll, self.part, 2)
            or super().refuse(problem, machine)
        )

    def stack_bytes(self, problem: FloatProblem, machine: Machine) -> int:
        return self.panel_bytes(self.part, problem, machine)

    def build(self, problem: FloatProblem, machine: Machine) -> PrimFunc:
        return _blocks_kernel(problem, _float_weights(problem, machine, self.part), self)


@dataclass(frozen=True)
class DequantizedRows(StreamedFloats[QuantizedProblem], name="dequantized_linear_rows"):
    """Weights of 2 to 6 or 8 bits times f32 activations."""

    @classmethod
    def default(cls, problem: QuantizedProblem, machine: Machine, rows: Rows = ANY_ROWS) -> DequantizedRows:
        unroll = max(8, 4 * problem.layout(machine).bundle_quads)
        return cls(**streams(problem, machine, problem.bits, rows[1] or 1), unroll=unroll, least=32 << 10)

    def refuse(self, problem: QuantizedProblem, machine: Machine) -> str:
        return (
            refuse_blocks(problem, machine, self.rows, self.tiles, self.slices, self.rows)
            or _refuse_unroll(self.unroll, problem.group, 4 * problem.layout(machine).bundle_quads)
            or super().refuse(problem, machine)
        )

    def build(self, problem: QuantizedProblem, machine: Machine) -> PrimFunc:
        weights = DequantizedWeights(isa_for(machine), problem.layout(machine), problem.k)
        return _Rows(problem, weights, self).function()


@dataclass(frozen=True)
class DequantizedBlocks(FloatPanels[QuantizedProblem], name="dequantized_linear_blocks"):
    """Weights of 2 to 6 or 8 bits times f32 activations; a panel holds a group at a time."""

    @classmethod
    def default(cls, problem: QuantizedProblem, machine: Machine, rows: Rows = ANY_ROWS) -> DequantizedBlocks:
        blocks = isa_for(machine).float_blocks
        unroll = max(8, 4 * problem.layout(machine).bundle_quads)
        return cls(**vars(blocks), tiles=panel_tiles(problem, machine, blocks), unroll=unroll)

    def refuse(self, problem: QuantizedProblem, machine: Machine) -> str:
        return (
            refuse_blocks(problem, machine, self.rows, self.tiles, self.slices, self.row_block)
            or _refuse_unroll(self.unroll, problem.group, 4 * problem.layout(machine).bundle_quads)
            or super().refuse(problem, machine)
        )

    def stack_bytes(self, problem: QuantizedProblem, machine: Machine) -> int:
        return self.panel_bytes(problem.group, problem, machine)

    def build(self, problem: QuantizedProblem, machine: Machine) -> PrimFunc:
        weights = DequantizedWeights(isa_for(machine), problem.layout(machine), problem.k)
        return _blocks_kernel(problem, weights, self)
