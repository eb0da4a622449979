"""Weights of linear ops as bf16 in tiles of pairs, out of the forms that they are stored in, a chunk at a time.

A tile of weights is 16 result columns of all inputs. A *section* of it is what shares a scale, or what fills a tile
register: whole tiles of `INPUTS` inputs. A *chunk* is CHUNK rows of pairs, little enough to be unpacked between two
products of tiles. f32 weights become three bf16 *parts*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.layouts import QuantizedLayout
from llmc.targets.cpu.vectors import as_f32, load, splat
from llmc.targets.x86.activation_tiles import bf16_parts
from llmc.targets.x86.isa import X86Isa
from llmc.targets.x86.tiles import INPUTS

if TYPE_CHECKING:
    from tvm.tirx import Expr

CHUNK = 4
TILE_CHUNKS = INPUTS // (2 * CHUNK)  # of INPUTS inputs


class Put(Protocol):
    """Where a source of weights puts what it unpacks: pairs of bf16 as i32 lanes, by row of the chunk."""

    def __call__(self, row: int, pairs: Expr, part: int = 0) -> None:
        """part: which of the parts of an f32 weight."""


class Source(Protocol):
    """Weights as the kernel's arguments have them.

    section: inputs of a section; sections: how many a tile has; section_bytes: of a section; parts: bf16 that a weight
    becomes.
    """

    section: int
    sections: int
    section_bytes: int
    parts: int

    def pointers(self) -> list[tuple[str, str]]:
        """The kernel's arguments for them."""

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, section: Expr, chunk: Expr, put: Put) -> None:
        """One chunk of one section of one tile."""


def chunks(source: Source) -> int:
    """Chunks of a section."""
    return source.section // (2 * CHUNK)


class Quantized:
    """Weights of 4, 6 or 8 bits: one section is a group."""

    parts = 1

    def __init__(self, isa: X86Isa, layout: QuantizedLayout, k: int) -> None:
        self.isa, self.layout, self.groups = isa, layout, layout.groups(k)
        self.section, self.sections = layout.group, self.groups
        self.section_bytes = layout.vectors * isa.vector_bytes

    def pointers(self) -> list[tuple[str, str]]:
        minimums = [] if self.layout.symmetric else [("minimums", "float16")]
        return [("data", "uint8"), ("scales", "float16"), *minimums]

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, section: Expr, chunk: Expr, put: Put) -> None:
        """One vector of 4-bit weights, half a bundle of 6-bit ones, or two vectors of 8-bit ones."""
        from tvm import tirx

        isa, layout = self.isa, self.layout
        data = b.view(handles["data"], [b.MANY, self.groups, layout.vectors, isa.vector_bytes], "uint8")

        def per_group(name: str) -> Expr:
            buffer = b.view(handles[name], [b.MANY, self.groups, isa.lanes], "float16")
            return b.let(as_f32(load(buffer, (tile, section, 0), isa.lanes)))

        scale = per_group("scales")
        scale = scale if layout.unit == 1 or layout.bits == 4 else b.let(scale * layout.unit)
        # What a stored zero stands for; exact, since scales have 11 bits.
        base = per_group("minimums") if not layout.symmetric else None
        if base is not None and layout.in_steps:
            base = b.let(base * scale)
        if layout.bits > 4 and layout.byte_offset:
            shift = scale * float(-layout.byte_offset)
            base = b.let(shift if base is None else base + shift)
        table = b.let(_numbers(isa, layout)) if layout.bits == 4 else None

        def value(words: Expr, bit: int) -> Expr:
            moved = words >> bit if bit else words
            if table is not None:
                number = isa.look_up(table, tirx.reinterpret(isa.i32, moved))
            else:
                number = tirx.reinterpret(isa.i32, moved & 255).astype(isa.f32)
            return number * scale if base is None else isa.fma(number, scale, base)

        def vector(number: Expr) -> Expr:
            raw = load(data, (tile, section, number, 0), isa.vector_bytes)
            return b.let(tirx.reinterpret(f"uint32x{isa.lanes}", raw))

        quads = [(vector(chunk), 0), (vector(chunk), 4)] if layout.bits == 4 else [
            (quad, 0) for quad in (self._six_bits(vector, chunk) if layout.bits == 6 else
                                   (vector(chunk * 2), vector(chunk * 2 + 1)))]  # fmt: skip
        for number, (words, half) in enumerate(quads):  # of 4-bit weights, the second one is the high halves
            for row in (0, 1):
                bit = row * 16 + half
                put(number * 2 + row, isa.pack_pairs(value(words, bit), value(words, bit + 8)))

    def _six_bits(self, vector: Callable[[Expr], Expr], chunk: Expr) -> list[Expr]:
        """The two quads of a chunk: the first two of a bundle, or the others."""
        from tvm import tirx

        isa, table = self.isa, self.layout.table
        assert table is not None
        first = b.let((chunk >> 1) * self.layout.bundle_vectors)
        low, lane = vector(first + (chunk & 1)), f"uint32x{isa.lanes}"
        high = b.let(vector(first + 2) >> splat(tirx.Cast("uint32", (chunk & 1) * 4), isa.lanes))
        codes = [(low >> 4 * i) & 0x0F0F0F0F | ((high >> 2 * i) & 0x03030303) << 4 for i in (0, 1)]
        found = [isa.look_up_bytes(table, tirx.reinterpret(isa.u8, each)) for each in codes]
        return [b.let(tirx.reinterpret(lane, each)) for each in found]


class Float:
    """Weights in bf16, which lie in pairs already."""

    parts = 1

    def __init__(self, isa: X86Isa, k: int) -> None:
        self.isa, self.pairs = isa, -(-k // 2)
        self.section, self.sections = INPUTS, -(-k // INPUTS)
        self.section_bytes = INPUTS * isa.lanes * 2

    def pointers(self) -> list[tuple[str, str]]:
        return [("data", "uint16")]

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, section: Expr, chunk: Expr, put: Put) -> None:
        """CHUNK pairs of rows of one tile, zeros after the last."""
        from tvm import tirx

        isa = self.isa
        data = b.view(handles["data"], [b.MANY, self.pairs * isa.lanes * 2], "uint16")
        for row in range(CHUNK):
            pair = section * (INPUTS // 2) + chunk * CHUNK + row

            def copy(row: int = row, pair: Expr = pair) -> None:
                both = load(data, (tile, pair * (isa.lanes * 2)), isa.lanes * 2)
                put(row, tirx.reinterpret(isa.i32, both))

            if self.pairs % (INPUTS // 2) == 0:
                copy()
            else:
                b.either(pair < self.pairs, copy, lambda row=row: put(row, splat(0, isa.lanes, "int32")))  # type: ignore[misc]


class Single:
    """Weights in f32, split into three bf16."""

    parts = 3

    def __init__(self, isa: X86Isa, k: int) -> None:
        self.isa, self.k = isa, k
        self.section, self.sections = INPUTS, -(-k // INPUTS)
        self.section_bytes = INPUTS * isa.lanes * 4

    def pointers(self) -> list[tuple[str, str]]:
        return [("data", "float32")]

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, section: Expr, chunk: Expr, put: Put) -> None:
        """CHUNK pairs of rows of one tile, zeros after the last."""
        isa = self.isa
        data = b.view(handles["data"], [b.MANY, self.k, isa.lanes], "float32")
        zero = splat(0.0, isa.lanes)
        for row in range(CHUNK):
            first = b.let(section * INPUTS + (chunk * CHUNK + row) * 2)

            def pairs(count: int, row: int = row, first: Expr = first) -> None:
                loaded = [b.let(load(data, (tile, first + i, 0), isa.lanes)) for i in range(count)]
                even, odd = [*loaded, *[zero] * (2 - count)]
                for part, both in enumerate(bf16_parts(isa, even, odd, self.parts, paired=True)):
                    put(row, both, part)

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


def _numbers(isa: X86Isa, layout: QuantizedLayout) -> Expr:
    """What stored integers from 0 on stand for, as f32, one a lane."""
    from tvm import tirx

    levels = layout.levels
    if levels is not None:
        numbers = [tirx.const(float(value), "float32") for value in levels.values]
        return tirx.Shuffle(numbers, [tirx.const(place, "int32") for place in range(isa.lanes)])
    lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), isa.lanes)
    return (lane - layout.offset).astype(isa.f32)
