"""Linear ops that multiply in floating point: f32, f16 or bf16 weights, and quantized weights with f32 activations.

Weights become f32 in registers (a few rows) or in a panel in the first-level cache (blocks of rows), and sums are f32
fused multiply-adds. With bf16 activations and weights, pairs are multiplied (`VectorIsa.bf16_dots`).

All kernels take (x, data, scales and minimums if quantized, bias f32 [n] if any, residual f32 [T, features] if any,
out f32 [T, features]; T, begin, end). x is f32 [T, k], or bf16 bits u16 [T, 2 * ceil(k / 2)].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.linear_blocks import each_block
from llmc.targets.cpu.linear_problem import FloatProblem, LinearProblem, QuantizedProblem, refuse_blocks
from llmc.targets.cpu.vector_isa import Bf16Dots, VectorIsa, isa_for
from llmc.targets.cpu.vectors import as_f32, load, prefetch, splat, store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, P, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

LATENCY_BYTES = 64  # of weights that are multiplied in four cycles, at least: what no core reads from memory

# (first term of the part, how many of its vectors) -> vectors, one a term
Vectors = Callable[["Expr", int], list["Expr"]]


class _FloatWeights:
    """f32, f16 or bf16 weights as vectors of `lanes` rows, one for each *term* of the sum.

    A term is one input, or a pair of inputs where bf16 pairs are multiplied. `bundle` terms share a load of
    `bundle_bytes`; a tile has `tile_bytes`.
    """

    def __init__(self, isa: VectorIsa, layout: FloatLayout, n: int, k: int, pairs: bool, part: int) -> None:
        self.isa, self.layout, self.n, self.k = isa, layout, n, k
        self.dots = isa.bf16_dots if pairs else None
        self.terms = -(-k // 2) if pairs else k
        self.part = part
        self.bundle = 2 if layout.dtype == "bf16" and not pairs else 1
        self.bundle_bytes = isa.lanes * (2 if layout.dtype == "f16" else 4)
        self.tile_bytes = -(-self.terms // self.bundle) * self.bundle_bytes

    def pointers(self) -> list[tuple[str, str]]:
        return [("data", str(self.layout.arrays(self.n, self.k)["data"][1]))]

    def at(self, handles: Mapping[str, Expr], tile: Expr, part: Expr) -> Vectors:
        """The vectors of one part of one tile."""
        from tvm import tirx

        isa, ((_, *shape), dtype) = self.isa, self.layout.arrays(self.n, self.k)["data"]
        data = b.view(handles["data"], [b.MANY, *shape], str(dtype))
        first = part * self.part

        def vectors(term: Expr, count: int) -> list[Expr]:
            if self.layout.dtype == "f32":
                return [load(data, (tile, first + term, 0), isa.lanes)]
            if self.layout.dtype == "f16":
                return [as_f32(load(data, (tile, first + term, 0), isa.lanes))]
            pair = first + term if self.dots else (first + term) // 2
            flat = b.view(handles["data"], [b.MANY, shape[0], isa.lanes * 2], "uint16")
            both = b.let(tirx.reinterpret(isa.i32, load(flat, (tile, pair, 0), isa.lanes * 2)))
            return [both] if self.dots else [isa.bf16_pair_to_f32(both, odd=i == 1) for i in range(count)]

        return vectors


class _DequantizedWeights:
    """Weights of 4 or 8 bits as f32 vectors: of a vector of bytes, lane by lane, byte by byte."""

    def __init__(self, isa: VectorIsa, layout: QuantizedLayout, k: int) -> None:
        self.isa, self.layout, self.k = isa, layout, k
        self.terms, self.part, self.bundle = k, layout.group, 32 // layout.bits
        self.bundle_bytes = isa.vector_bytes
        self.tile_bytes = layout.groups(k) * layout.vectors * isa.vector_bytes
        self.dots: Bf16Dots | None = None

    def pointers(self) -> list[tuple[str, str]]:
        minimums = [] if self.layout.symmetric else [("minimums", "float16")]
        return [("data", "uint8"), ("scales", "float16"), *minimums]

    def at(self, handles: Mapping[str, Expr], tile: Expr, part: Expr) -> Vectors:
        """The vectors of one group of one tile."""
        from tvm import tirx

        isa, layout, groups = self.isa, self.layout, self.layout.groups(self.k)
        data = b.view(handles["data"], [b.MANY, groups, layout.vectors, isa.vector_bytes], "uint8")

        def per_group(name: str) -> Expr:
            buffer = b.view(handles[name], [b.MANY, groups, isa.lanes], "float16")
            return b.let(as_f32(load(buffer, (tile, part, 0), isa.lanes)))

        scale, minimum = per_group("scales"), None if layout.symmetric else per_group("minimums")
        # Stored bytes are signed where the machine wants them so; flipping the top bit makes them unsigned, 128 up.
        signed = layout.bits == 8 and isa.signed_bytes
        offset = layout.offset + (128 if signed else 0)

        def vectors(term: Expr, count: int) -> list[Expr]:
            raw = load(data, (tile, part, term // self.bundle, 0), isa.vector_bytes)
            if signed:
                raw = raw ^ 128
            words = b.let(tirx.reinterpret(f"uint32x{isa.lanes}", raw))
            return [value(words, i) for i in range(count)]

        def value(words: Expr, position: int) -> Expr:
            # Inputs 4..7 of a vector of 4-bit weights are its high nibbles.
            shift = position % 4 * 8 + position // 4 * 4
            bits = (words >> shift) & ((1 << layout.bits) - 1)
            # 2^23 + an integer below 2^23 has the integer as its low bits: no conversion, and the offset comes free.
            number = tirx.reinterpret(isa.f32, bits | 0x4B000000) - (8388608.0 + offset)
            return number * scale if minimum is None else isa.fma(number, scale, minimum)

        return vectors


_Weights = _FloatWeights | _DequantizedWeights


class _Activations:
    """The other factor: one activation, or one pair, in every lane."""

    def __init__(self, isa: VectorIsa, k: int, dots: Bf16Dots | None, handle: Expr) -> None:
        self.isa, self.dots = isa, dots
        dtype, width = ("uint16", -(-k // 2) * 2) if dots else ("float32", k)
        self.buffer: Buffer = b.view(handle, [b.MANY, width], dtype)

    def spread(self, row: Expr, term: Expr) -> Expr:
        """The activation, or the pair, of this term in every lane."""
        from tvm import tirx

        if self.dots is None:
            return splat(self.buffer[row, term], self.isa.lanes)
        pair = tirx.reinterpret("int32", load(self.buffer, (row, term * 2), 2))
        return tirx.Broadcast(pair, self.isa.lanes)

    def multiply(self, total: Expr, weights: Expr, spread: Expr) -> Expr:
        """total + weights * activations."""
        if self.dots is not None:
            return self.dots.dot(total, weights, spread)
        return self.isa.fma(spread, weights, total)


def _function(weights: _Weights, problem: LinearProblem, body: Callable[..., None]) -> PrimFunc:
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

    def __init__(self, handles: Mapping[str, Expr], weights: _Weights, tile: Expr, streams: int, distance: int) -> None:
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


def _rows_kernel(problem: LinearProblem, weights: _Weights, knobs: StreamedFloats[P]) -> PrimFunc:
    """The code of `StreamedFloats`."""
    isa, epilogue, all_tiles = weights.isa, problem.epilogue, weights.layout.tiles(problem.n)
    rows, tiles = knobs.rows, knobs.tiles

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        x = _Activations(isa, weights.k, weights.dots, handles["x"])
        with b.loop(sizes["end"] - sizes["begin"]) as i, b.loop((sizes["T"] + (rows - 1)) // rows) as block:
            unit(x, handles, sizes["T"], b.let((sizes["begin"] + i) * tiles), block * rows)

    def unit(x: _Activations, handles: Mapping[str, Expr], tokens: Expr, first_tile: Expr, first_row: Expr) -> None:
        from tvm import tirx

        # The last unit may be short: it repeats the last tile and stores it once.
        tile = [b.let(tirx.Min(first_tile + t, b.index(all_tiles - 1))) if t else first_tile for t in range(tiles)]
        row = b.clamped_rows(first_row, rows, tokens)
        totals = b.Registers(tiles * rows, isa.f32)
        for slot in range(len(totals.slots)):
            totals[slot] = splat(0.0, isa.lanes)
        streams = [_Stream(handles, weights, tile[t], tiles, knobs.ahead) for t in range(tiles)]
        for part, terms in _parts(weights.terms, weights.part):
            sources = [weights.at(handles, tile[t], part) for t in range(tiles)]
            for first, count in _steps(terms, knobs.unroll):
                ahead = [stream.ahead(part * weights.part + first) for stream in streams]
                for term, place, size in _bundles(first, count, weights.bundle):
                    vectors = []
                    for t in range(tiles):
                        ahead[t](place)
                        vectors.append(sources[t](term, size))
                    for j in range(size):
                        at = part * weights.part + term + j
                        w = [b.let(vectors[t][j]) for t in range(tiles)]
                        for m in range(rows):
                            # Shared by tiles; one tile multiplies straight from memory.
                            spread = x.spread(row[m], at)
                            spread = b.let(spread) if tiles > 1 else spread
                            for t in range(tiles):
                                slot = t * rows + m
                                totals[slot] = x.multiply(totals[slot], w[t], spread)
        for t in range(0, tiles, epilogue.tiles):
            for m in range(rows):
                with b.when(tirx.And(first_row + m < tokens, first_tile + t < all_tiles)):
                    sums = [totals[(t + j) * rows + m] for j in range(epilogue.tiles)]
                    epilogue.emit(isa, handles, row[m], (first_tile + t) // epilogue.tiles, sums)

    return _function(weights, problem, body)


def _following(weights: _Weights, first_tile: Expr, part: Expr, tiles: int) -> Expr:
    """Where the part begins that a panel unpacks after this one, in its first tile: at last the next panel's first."""
    from tvm import tirx

    inside = b.let((part + 1) * (weights.part // weights.bundle * weights.bundle_bytes))
    ended = inside >= weights.tile_bytes
    return first_tile * weights.tile_bytes + tirx.Select(ended, b.index(tiles * weights.tile_bytes), inside)


def _blocks_kernel(problem: LinearProblem, weights: _Weights, knobs: FloatPanels[P]) -> PrimFunc:
    """The code of `FloatPanels`."""
    isa, epilogue, all_tiles = weights.isa, problem.epilogue, weights.layout.tiles(problem.n)
    rows, tiles, row_block, unroll = knobs.rows, knobs.tiles, knobs.row_block, knobs.unroll
    lines = -(-unroll // weights.bundle * weights.bundle_bytes // isa.cache_line) * tiles  # of a step, in all tiles

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        x, tokens = _Activations(isa, weights.k, weights.dots, handles["x"]), sizes["T"]
        data = b.view(handles["data"], [b.MANY], "uint8")
        panel = b.scratch([tiles, weights.part], isa.i32 if weights.dots else isa.f32)
        walk = each_block(
            isa, epilogue, handles, sizes, all_tiles=all_tiles, rows=rows, tiles=tiles, row_block=row_block
        )
        with walk as unit:
            totals = unit.totals
            for part, terms in _parts(weights.terms, weights.part):
                for t in range(tiles):
                    source = weights.at(handles, unit.tile[t], part)
                    for first, count in _steps(terms, unroll):
                        for term, _, size in _bundles(first, count, weights.bundle):
                            for j, vector in enumerate(source(term, size)):
                                store(panel, (t, term + j), vector)
                share = b.let((lines + unit.blocks - 1) // unit.blocks)
                following = b.let(_following(weights, unit.first_tile, part, tiles))
                with b.loop(unit.blocks) as block:
                    row = b.clamped_rows(unit.first_row + block * rows, rows, tokens)
                    sums = b.Registers(rows * tiles, isa.f32)
                    for slot in range(rows * tiles):
                        sums[slot] = totals[block * rows + slot % rows, slot // rows]
                    for first, count in _steps(terms, unroll):
                        with b.loop(share) as i:
                            line = b.let(block * share + i)
                            at = first // weights.bundle * weights.bundle_bytes + line // tiles * isa.cache_line
                            prefetch(data, following + line % tiles * weights.tile_bytes + at)
                        for j in range(count):
                            for slot in range(rows * tiles):
                                w = panel[slot // rows, first + j]
                                at = part * weights.part + first + j
                                sums[slot] = x.multiply(sums[slot], w, x.spread(row[slot % rows], at))
                    for slot in range(rows * tiles):
                        store(totals, (block * rows + slot % rows, slot // rows), sums[slot])

    return _function(weights, problem, body)


@dataclass(frozen=True)
class StreamedFloats(CpuTemplate[P]):
    """Any T, `rows` at a time. One unit: `tiles` tiles, streamed side by side: several streams keep more of the memory
    busy. The limit is the memory's read bandwidth. Each sum adds its terms in order, as in blocks of rows, so that a
    row has the same bits beside any number of others. unroll: terms of a step. ahead, least: see `QuantizedRows`.
    """

    rows: int = knob(1, 4, 6, 8, 12)
    tiles: int = knob(1, 2, 4)
    unroll: int = knob(8, 16)
    ahead: int = knob(1536, 3072, 6144)
    least: int = knob(16 << 10, 32 << 10, 64 << 10, code=False)

    def stack_bytes(self, problem: P, machine: Machine) -> int:
        return arrays(*[isa_for(machine).vector_bytes] * (self.rows * self.tiles))


def streams(problem: LinearProblem, isa: VectorIsa, bits: int, rows: int) -> int:
    """Tiles side by side of a kernel for up to so many rows: two streams, if the sums leave registers for the weights.

    Measured out of cache, f32 and bf16: one row reads a third more with two than with one, and as much with four. One
    row has one sum a tile, and a sum takes one term every four cycles: short terms come in four tiles, so that this is
    no slower than the memory.
    """
    if rows == 1:
        return min(4, max(2, LATENCY_BYTES * 8 // (bits * isa.lanes)))
    return 2 if problem.gated or 2 * rows <= isa.registers - 4 else 1


@dataclass(frozen=True)
class FloatPanels(CpuTemplate[P]):
    """Prefill. One unit: `row_block` rows by a panel of `tiles` tiles; consecutive units share the panel.

    A part of the panel is made f32 once for all rows of the block; rows x tiles sums are in registers while a part
    lasts. Loads per multiply: 1/rows + 1/tiles. The limit is the multipliers; of up to some 30 rows it is the memory,
    so the next part is asked for evenly while this one is multiplied: 24 to 35% faster at 13 to 48 rows of f32. unroll:
    terms of a step.
    """

    rows: int = knob(2, 4, 6, 8)
    tiles: int = knob(2, 4)
    row_block: int = knob(32, 64, 96, 192)
    unroll: int = knob(8, 16)

    def panel_bytes(self, part: int, isa: VectorIsa) -> int:
        """Bytes of stack, of parts of so many terms."""
        sums = [isa.vector_bytes] * (2 * self.rows * self.tiles)  # of whole parts, and of the last one
        return arrays(isa.vector_bytes * self.tiles * part, isa.vector_bytes * self.row_block * self.tiles, *sums)


def _refuse_pairs(problem: FloatProblem, machine: Machine) -> str:
    if problem.pairs and (problem.dtype != "bf16" or isa_for(machine).bf16_dots is None):
        return f"bf16 activations need bf16 weights and products of their pairs, not {problem.dtype} on {machine.name}"
    return ""


def _refuse_unroll(unroll: int, part: int, bundle: int) -> str:
    if part % unroll or unroll % bundle:
        return f"steps of {unroll} do not divide parts of {part} terms into whole loads of {bundle}"
    return ""


def _float_weights(problem: FloatProblem, machine: Machine, part: int) -> _FloatWeights:
    return _FloatWeights(isa_for(machine), problem.layout(machine), problem.n, problem.k, problem.pairs, part)


@dataclass(frozen=True)
class FloatRows(StreamedFloats[FloatProblem], name="float_linear_rows"):
    """Weights in f32, f16 or bf16. part: terms of the outer of two loops."""

    part: int = knob(64, 128)

    @classmethod
    def default(cls, problem: FloatProblem, machine: Machine, rows: Rows = ANY_ROWS) -> FloatRows:
        most = rows[1] or 1
        tiles = streams(problem, isa_for(machine), 32 if problem.dtype == "f32" else 16, most)
        return cls(most, tiles, unroll=8, ahead=3072, least=32 << 10, part=64)

    def refuse(self, problem: FloatProblem, machine: Machine) -> str:
        return (
            _refuse_pairs(problem, machine)
            or refuse_blocks(problem.epilogue, self.rows, self.tiles, self.rows)
            or _refuse_unroll(self.unroll, self.part, 2)
            or super().refuse(problem, machine)
        )

    def build(self, problem: FloatProblem, machine: Machine) -> PrimFunc:
        return _rows_kernel(problem, _float_weights(problem, machine, self.part), self)


@dataclass(frozen=True)
class FloatBlocks(FloatPanels[FloatProblem], name="float_linear_blocks"):
    """Weights in f32, f16 or bf16. part: terms that a panel holds at a time."""

    part: int = knob(64, 128)

    @classmethod
    def default(cls, problem: FloatProblem, machine: Machine, rows: Rows = ANY_ROWS) -> FloatBlocks:
        return cls(**vars(isa_for(machine).float_blocks), unroll=8, part=64)

    def refuse(self, problem: FloatProblem, machine: Machine) -> str:
        return (
            _refuse_pairs(problem, machine)
            or refuse_blocks(problem.epilogue, self.rows, self.tiles, self.row_block)
            or _refuse_unroll(self.unroll, self.part, 2)
            or super().refuse(problem, machine)
        )

    def stack_bytes(self, problem: FloatProblem, machine: Machine) -> int:
        return self.panel_bytes(self.part, isa_for(machine))

    def build(self, problem: FloatProblem, machine: Machine) -> PrimFunc:
        return _blocks_kernel(problem, _float_weights(problem, machine, self.part), self)


@dataclass(frozen=True)
class DequantizedRows(StreamedFloats[QuantizedProblem], name="dequantized_linear_rows"):
    """Weights of 4 or 8 bits times f32 activations."""

    @classmethod
    def default(cls, problem: QuantizedProblem, machine: Machine, rows: Rows = ANY_ROWS) -> DequantizedRows:
        most = rows[1] or 1
        tiles = streams(problem, isa_for(machine), problem.bits, most)
        return cls(most, tiles, unroll=8, ahead=3072, least=32 << 10)

    def refuse(self, problem: QuantizedProblem, machine: Machine) -> str:
        return (
            refuse_blocks(problem.epilogue, self.rows, self.tiles, self.rows)
            or _refuse_unroll(self.unroll, problem.group, 32 // problem.bits)
            or super().refuse(problem, machine)
        )

    def build(self, problem: QuantizedProblem, machine: Machine) -> PrimFunc:
        weights = _DequantizedWeights(isa_for(machine), problem.layout(machine), problem.k)
        return _rows_kernel(problem, weights, self)


@dataclass(frozen=True)
class DequantizedBlocks(FloatPanels[QuantizedProblem], name="dequantized_linear_blocks"):
    """Weights of 4 or 8 bits times f32 activations; a panel holds a group at a time."""

    @classmethod
    def default(cls, problem: QuantizedProblem, machine: Machine, rows: Rows = ANY_ROWS) -> DequantizedBlocks:
        return cls(**vars(isa_for(machine).float_blocks), unroll=8)

    def refuse(self, problem: QuantizedProblem, machine: Machine) -> str:
        return (
            refuse_blocks(problem.epilogue, self.rows, self.tiles, self.row_block)
            or _refuse_unroll(self.unroll, problem.group, 32 // problem.bits)
            or super().refuse(problem, machine)
        )

    def stack_bytes(self, problem: QuantizedProblem, machine: Machine) -> int:
        return self.panel_bytes(problem.group, isa_for(machine))

    def build(self, problem: QuantizedProblem, machine: Machine) -> PrimFunc:
        weights = _DequantizedWeights(isa_for(machine), problem.layout(machine), problem.k)
        return _blocks_kernel(problem, weights, self)
