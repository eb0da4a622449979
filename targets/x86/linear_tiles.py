"""Linear ops of many rows on tile registers: products of bf16, sums in f32.

f32 weights and activations are each split into three bf16 parts, and those six of the nine products that matter are
summed: what is left out is 2^-25 of a product at most, about an f32's own rounding.

Weights become bf16 in a panel of their own layout once for a block of rows, with their scales multiplied in, so that
sums run over all inputs without a rescale; activations come as bf16 in tiles, see `activation_tiles`. One unit of work
is `row_block` rows by a panel of weight tiles. Inputs are taken `step` at a time: what a step needs stays in the
second-level cache.

    bytes of a workspace = panel: 32 * step * tiles * parts,  and sums: 64 * row_block * tiles

A multiplication of 16 x 32 by 32 x 16 takes 16 cycles. Blocks of two by two load four tiles for four products, which
two loads a cycle hide. The limit is the multipliers; unpacking costs about 1/6 cycle a weight and block of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from llmc.targets.machine import Machine
from llmc.targets.x86 import linear_builder as b
from llmc.targets.x86 import tiles as amx
from llmc.targets.x86.activation_tiles import INPUTS, TILE, bf16_parts
from llmc.targets.x86.isa import VectorIsa, isa_for
from llmc.targets.x86.layouts import FloatLayout, QuantizedLayout
from llmc.targets.x86.linear_epilogue import Epilogue
from llmc.targets.x86.linear_quantized import quantized_layout

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

CACHE_LINE = 64
PAIR = 2  # tiles side by side, of rows and of columns

# Which part of the activations meets which part of the weights, so ordered that few tiles are loaded anew.
_PRODUCTS = {1: ((0, 0),), 3: ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (2, 0))}


class Put(Protocol):
    """Where a source of weights puts what it unpacks: pairs of bf16 as i32 lanes, by row of the tile."""

    def __call__(self, row: Expr | int, pairs: Expr, split: int = 0) -> None:
        """split: which of the parts of an f32 weight."""


class _Source(Protocol):
    """Weights as the kernel's arguments have them. part: inputs that are unpacked at once; split: bf16 of a weight."""

    part: int
    parts: int
    part_bytes: int
    split: int

    def pointers(self) -> list[tuple[str, str]]:
        """The kernel's arguments for them."""

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, part: Expr, put: Put) -> None:
        """One part of one tile, as part / 2 rows of pairs."""


class _Quantized:
    """Weights of 4 or 8 bits: one part is a group."""

    split = 1

    def __init__(self, isa: VectorIsa, layout: QuantizedLayout, k: int) -> None:
        self.isa, self.layout, self.groups = isa, layout, layout.groups(k)
        self.part, self.parts = layout.group, self.groups
        self.part_bytes = layout.vectors * isa.vector_bytes

    def pointers(self) -> list[tuple[str, str]]:
        minimums = [] if self.layout.symmetric else [("minimums", "float16")]
        return [("data", "uint8"), ("scales", "float16"), *minimums]

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, part: Expr, put: Put) -> None:
        """One group of one tile, as group / 2 rows of pairs."""
        from tvm import tirx

        isa, layout = self.isa, self.layout
        data = b.view(handles["data"], [b.MANY, self.groups, layout.vectors, isa.vector_bytes], "uint8")

        def per_group(name: str) -> Expr:
            buffer = b.view(handles[name], [b.MANY, self.groups, isa.lanes], "float16")
            return b.let(isa.f16_to_f32(isa.load(buffer, tile, part, 0)))

        scale = per_group("scales")
        # What a stored zero stands for; exact, since scales have 11 bits.
        base = per_group("minimums") if not layout.symmetric else None
        if layout.bits == 8 and layout.offset:
            shift = scale * isa.splat(float(-layout.offset))
            base = b.let(shift if base is None else base + shift)
        table = b.let(_numbers(isa, layout.offset)) if layout.bits == 4 else None

        def value(words: Expr, bit: int) -> Expr:
            moved = words >> isa.splat(bit, "uint32") if bit else words
            if table is not None:
                number = isa.look_up(table, tirx.reinterpret(isa.i32, moved))
            else:
                number = tirx.reinterpret(isa.i32, moved & isa.splat(255, "uint32")).astype(isa.f32)
            return number * scale if base is None else isa.fma(number, scale, base)

        rows = 2 * 8 // layout.bits  # of pairs in a vector
        for v in range(layout.vectors):
            raw = isa.load(data, tile, part, v, 0, lanes=isa.vector_bytes)
            words = b.let(tirx.reinterpret(f"uint32x{isa.lanes}", raw))
            for row in range(rows):
                # Inputs 4..7 of a vector of 4-bit weights are its high nibbles.
                bit = row % 2 * 16 + row // 2 * 4
                put(v * rows + row, isa.pack_pairs(value(words, bit), value(words, bit + 8)))


class _Float:
    """Weights in bf16, which lie in pairs already."""

    split = 1

    def __init__(self, isa: VectorIsa, k: int) -> None:
        self.isa, self.pairs = isa, -(-k // 2)
        self.part, self.parts = INPUTS, -(-k // INPUTS)
        self.part_bytes = INPUTS * isa.lanes * 2

    def pointers(self) -> list[tuple[str, str]]:
        return [("data", "uint16")]

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, part: Expr, put: Put) -> None:
        """16 pairs of rows of one tile, zeros after the last."""
        from tvm import tirx

        isa = self.isa
        data = b.view(handles["data"], [b.MANY, self.pairs * isa.lanes * 2], "uint16")
        for row in range(INPUTS // 2):
            pair = part * (INPUTS // 2) + row

            def copy(row: int = row, pair: Expr = pair) -> None:
                both = isa.load(data, tile, pair * (isa.lanes * 2), lanes=isa.lanes * 2)
                put(row, tirx.reinterpret(isa.i32, both))

            if self.pairs % (INPUTS // 2) == 0:
                copy()
            else:
                b.either(pair < self.pairs, copy, lambda row=row: put(row, isa.splat(0, "int32")))  # type: ignore[misc]


class _Single:
    """Weights in f32, split into three bf16."""

    split = 3

    def __init__(self, isa: VectorIsa, k: int) -> None:
        self.isa, self.k = isa, k
        self.part, self.parts = INPUTS, -(-k // INPUTS)
        self.part_bytes = INPUTS * isa.lanes * 4

    def pointers(self) -> list[tuple[str, str]]:
        return [("data", "float32")]

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, part: Expr, put: Put) -> None:
        """16 pairs of rows of one tile, zeros after the last."""
        isa = self.isa
        data = b.view(handles["data"], [b.MANY, self.k, isa.lanes], "float32")
        zero = isa.splat(0.0)
        for row in range(INPUTS // 2):
            first = b.let(part * INPUTS + 2 * row)

            def pairs(count: int, row: int = row, first: Expr = first) -> None:
                loaded = [b.let(isa.load(data, tile, first + i, 0)) for i in range(count)]
                even, odd = [*loaded, *[zero] * (2 - count)]
                for split, both in enumerate(bf16_parts(isa, even, odd, self.split, paired=True)):
                    put(row, both, split)

            if self.k % INPUTS == 0:
                pairs(2)
            else:
                b.either(
                    first + 1 < self.k,
                    lambda pairs=pairs: pairs(2),  # type: ignore[misc]
                    lambda pairs=pairs, first=first: b.either(  # type: ignore[misc]
                        first < self.k, lambda: pairs(1), lambda: pairs(0)
                    ),
                )


def _prefetch(source: _Source, handles: Mapping[str, Expr], tile: Expr, part: Expr, line: Expr) -> None:
    """Start reading a cache line of the weights: line `line` from part `part` of a tile on. None need be there."""
    data = b.view(handles["data"], [b.MANY], "uint8")
    b.prefetch(data, tile * (source.parts * source.part_bytes) + part * source.part_bytes + line * CACHE_LINE)


def _numbers(isa: VectorIsa, offset: int) -> Expr:
    """0 - offset, 1 - offset, ... as f32, one a lane."""
    from tvm import tirx

    lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), isa.lanes)
    return (lane - isa.splat(offset, "int32")).astype(isa.f32)


def workspace_bytes(step: int, tiles: int, row_block: int, split: int = 1) -> int:
    """Bytes that each thread needs. split: bf16 that a weight becomes."""
    return (32 * step * split + 64 * row_block) * tiles  # 16 columns of bf16 and of f32


def tile_linear(
    machine: Machine,
    *,
    n: int,
    k: int,
    bits: int = 16,
    group: int = INPUTS,
    symmetric: bool = True,
    gated: bool = False,
    activation: str = "none",
    bias: bool = False,
    residual: bool = False,
    packed: bool = False,
    step: int,
    tiles: int,
    row_block: int,
) -> PrimFunc:
    """(x u16 [ceil(T / 32) * 2, inputs / 32, split, 16, 32] bf16 bits in tiles, data, scales and minimums as the
    weights have them, bias f32 [n] if any, residual f32 [T, features] if any, out f32 [T, features], workspace u8;
    T, begin, end).

    bits: 4, 8, 16 for bf16 weights, or 32 for f32 ones, which split into 3 as the activations do (else 1). packed: out
    is in tiles as x is; features are a multiple of 32. One unit: `row_block` rows by `tiles` weight tiles; consecutive
    units share the rows. step: inputs that are unpacked at a time, whole groups.
    """
    isa, epilogue = isa_for(machine), Epilogue(n, gated, activation, bias, residual)
    source: _Source
    if bits == 32:
        all_tiles, source = FloatLayout("f32", isa.lanes, gated).tiles(n), _Single(isa, k)
    elif bits == 16:
        all_tiles, source = FloatLayout("bf16", isa.lanes, gated).tiles(n), _Float(isa, k)
    else:
        layout = quantized_layout(machine, bits, group, symmetric, gated)
        all_tiles, source = layout.tiles(n), _Quantized(isa, layout, k)
    if packed and (epilogue.features % INPUTS or tiles % (PAIR * epilogue.tiles)):
        raise ValueError(f"{epilogue.features} features in panels of {tiles} tiles cannot be packed into tiles")
    if row_block % (PAIR * amx.ROWS) or tiles % PAIR or step % source.part or source.part % INPUTS:
        raise ValueError(f"blocks of {row_block} rows by {tiles} tiles in steps of {step} inputs do not fit")
    step = min(step, source.parts * source.part)
    inputs, split = source.parts * source.part, source.split
    width = tiles * isa.lanes  # columns of a panel, gate and up counted

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        from tvm import tirx

        tokens = sizes["T"]
        panels = -(-all_tiles // tiles)
        panel = b.view(handles["workspace"], [b.MANY], "uint16")
        first_sum = step * split * width // 2  # the sums follow the panel; in f32
        sums = b.view(handles["workspace"], [b.MANY], "float32")
        x = b.view(handles["x"], [b.MANY], "uint16")
        with amx.configured(), b.loop(sizes["end"] - sizes["begin"]) as i:
            unit = b.let(sizes["begin"] + i)
            first_tile = b.let(unit % panels * tiles)
            tiles_here = b.let(tirx.Min(b.index(all_tiles) - first_tile, b.index(tiles)))
            pairs_here = b.let((tiles_here + 1) // PAIR)
            first_row = b.let(unit // panels * row_block)
            rows_here = b.let(tirx.Min(tokens - first_row, b.index(row_block)))

            def inputs_from(first: Expr, count: int) -> None:
                """Multiply `count` inputs from `first` on."""
                with b.loop(tiles_here) as t, b.loop(count // source.part) as part:
                    start = b.let((t * step + part * source.part) * (isa.lanes * split))

                    def put(row: Expr | int, pairs: Expr, split: int = 0) -> None:
                        at = start + row * (isa.lanes * 2) + split * TILE
                        b.store_vector(isa, panel, [at], tirx.reinterpret("uint16x32", pairs))

                    source.unpack(handles, first_tile + t, b.let(first // source.part + part), put)
                with b.loop((rows_here + 31) // 32) as row_pair, b.loop(pairs_here) as column_pair:
                    fetch_next(b.let(first + count), row_pair, column_pair)
                    multiply(first, count, row_pair, column_pair)

            def fetch_next(following: Expr, row_pair: Expr, column_pair: Expr) -> None:
                """Ask for a share of the weights that are unpacked next: some lines of these tiles."""
                ends = following >= inputs
                part = b.let(tirx.Select(ends, b.index(0), following // source.part))
                tile = b.let(first_tile + column_pair * PAIR + tirx.Select(ends, b.index(tiles), b.index(0)))
                lines = -(-step // source.part * source.part_bytes // CACHE_LINE // (row_block // 32))
                for c in range(PAIR):
                    for line in range(lines):
                        _prefetch(source, handles, tile + c, part, row_pair * lines + line)

            def multiply(first: Expr, count: int, row_pair: Expr, column_pair: Expr) -> None:
                into = b.let(first_sum + row_pair * (32 * width) + column_pair * (PAIR * isa.lanes))
                corner = [into, into + isa.lanes, into + 16 * width, into + (16 * width + isa.lanes)]
                b.either(
                    first == 0,
                    lambda: _each(range(4), amx.zero),
                    lambda: _each(range(4), lambda c: amx.load(c, sums, corner[c], 4 * width)),
                )
                row_tile = first_row // 16 + row_pair * PAIR
                rows = [b.let(((row_tile + r) * inputs + first) * (16 * split)) for r in range(PAIR)]
                columns = [b.let((column_pair * PAIR + c) * (step * isa.lanes * split)) for c in range(PAIR)]
                with b.loop(count // INPUTS) as block:
                    before: tuple[int | None, int | None] = (None, None)
                    for of_x, of_w in _PRODUCTS[split]:
                        if of_w != before[1]:
                            for c in range(PAIR):
                                amx.load(6 + c, panel, columns[c] + (block * split + of_w) * TILE)
                        for r in range(PAIR):
                            if of_x != before[0]:
                                amx.load(4 + r, x, rows[r] + (block * split + of_x) * TILE)
                            for c in range(PAIR):
                                amx.dot_bf16(2 * r + c, 4 + r, 6 + c)
                        before = of_x, of_w
                for c in range(4):
                    amx.store(c, sums, corner[c], 4 * width)

            with b.loop(inputs // step) as part:
                inputs_from(b.let(part * step), step)
            if inputs % step:
                inputs_from(b.index(inputs // step * step), inputs % step)

            def finished(row: Expr, m: Expr, column: Expr) -> tuple[Expr, Expr, list[Expr]]:
                """The row, a vector of the result's columns, and its sums; column: counted in the panel."""
                at = b.let(first_sum + m * width + column * (epilogue.tiles * isa.lanes))
                vectors = [isa.load(sums, at + j * isa.lanes) for j in range(epilogue.tiles)]
                return row, b.let(first_tile // epilogue.tiles + column), vectors

            def write(row: Expr, m: Expr) -> None:
                with b.loop(tiles_here // epilogue.tiles) as column:
                    epilogue.emit(isa, handles, *finished(row, m, column))

            def write_packed(row: Expr, m: Expr) -> None:
                out = b.view(handles["out"], [b.MANY], "uint16")
                with b.loop(tiles_here // (PAIR * epilogue.tiles)) as pair:
                    columns = [b.let(pair * PAIR + half) for half in range(PAIR)]
                    first, second = (
                        b.let(epilogue.value(isa, handles, *finished(row, m, column))) for column in columns
                    )
                    block = b.let(first_tile // (PAIR * epilogue.tiles) + pair)
                    at = b.let((row // 16 * (epilogue.features // INPUTS) + block) * (TILE * split) + row % 16 * INPUTS)
                    for part, both in enumerate(bf16_parts(isa, first, second, split)):
                        b.store_vector(isa, out, [at + part * TILE], tirx.reinterpret("uint16x32", both))

            with b.loop(rows_here) as m:
                (write_packed if packed else write)(b.let(first_row + m), m)

    results = [(name, "uint16" if packed and name == "out" else dtype) for name, dtype in epilogue.pointers()]
    pointers = [("x", "uint16"), *source.pointers(), *results, ("workspace", "uint8")]
    return b.plain_function(pointers, ["T"], body, isa.pairs_helper)


def _each(numbers: range, emit: Callable[[int], None]) -> None:
    for number in numbers:
        emit(number)
