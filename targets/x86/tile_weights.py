"""Weights of linear ops as bf16 in tiles of pairs, out of the forms that they are stored in, a chunk at a time.

A tile of weights is 16 result columns of all inputs. A *section* of it is what shares a scale, or what fills a tile
register: whole tiles of `INPUTS` inputs. A *chunk* is CHUNK rows of pairs, little enough to be unpacked between two
products of tiles. f32 weights become three bf16 *parts*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.layouts import PLANES, QuantizedLayout
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
    """Weights of 2 to 6 or 8 bits: one section is a group, or two where these have 16 inputs."""

    parts = 1

    def __init__(self, isa: X86Isa, layout: QuantizedLayout, k: int) -> None:
        self.isa, self.layout, self.groups = isa, layout, layout.groups(k)
        self.scales = layout.scale_groups(k)
        self.each = max(1, INPUTS // layout.group)  # groups of a section
        self.section, self.sections = layout.group * self.each, self.groups // self.each
        self.section_bytes = layout.vectors * self.each * isa.vector_bytes

    def pointers(self) -> list[tuple[str, str]]:
        minimums = [] if self.layout.symmetric else [("minimums", "float16")]
        return [("data", "uint8"), ("scales", "float16"), *minimums]

    def unpack(self, handles: Mapping[str, Expr], tile: Expr, section: Expr, chunk: Expr, put: Put) -> None:
        """The two quads of a chunk, whose bits may be in several vectors."""
        from tvm import tirx

        isa, layout = self.isa, self.layout
        data = b.view(handles["data"], [b.MANY, self.sections, layout.vectors * self.each, isa.vector_bytes], "uint8")
        group = section
        if self.each > 1:
            group = b.let(section * self.each + chunk // (layout.group // (2 * CHUNK)))

        def per_group(name: str) -> Expr:
            buffer = b.view(handles[name], [b.MANY, self.scales, isa.lanes], "float16")
            return b.let(as_f32(load(buffer, (tile, b.index(0) if layout.per_row else group, 0), isa.lanes)))

        scale = per_group("scales")
        scale = scale if layout.unit == 1 or layout.bits == 4 else b.let(scale * layout.unit)
        # What a stored zero stands for; exact, since scales have 11 bits.
        base = per_group("minimums") if not layout.symmetric else None
        if base is not None and layout.in_steps:
            base = b.let(base * scale)
        if layout.bits != 4 and layout.byte_offset:
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
            (quad, 0) for quad in self._quads(vector, chunk)]  # fmt: skip
        for number, (words, half) in enumerate(quads):  # of 4-bit weights, the second one is the high halves
            for row in (0, 1):
                bit = row * 16 + half
                put(number * 2 + row, isa.pack_pairs(value(words, bit), value(words, bit + 8)))

    def _quads(self, vector: Callable[[Expr], Expr], chunk: Expr) -> list[Expr]:
        """The two quads of a chunk as the bytes that are multiplied."""
        from tvm import tirx

        isa, layout, lane = self.isa, self.layout, f"uint32x{self.isa.lanes}"
        if layout.bits == 8:
            return [vector(chunk * 2), vector(chunk * 2 + 1)]
        chunks = layout.bundle_quads // 2  # of a bundle
        first = b.let(chunk // chunks * layout.bundle_vectors)
        place = b.let(chunk % chunks * 2)
        codes: list[Expr] = []
        start = below = 0
        for width in PLANES[layout.bits]:
            bit = splat(tirx.Cast("uint32", (place * width) % 8), isa.lanes)
            both = b.let(vector(first + start + place * width // 8) >> bit)
            mask = 0x01010101 * ((1 << width) - 1)
            fields = [((both >> width * i if i else both) & mask) << below for i in (0, 1)]
            codes = [code | field for code, field in zip(codes, fields, strict=True)] if codes else fields
            start, below = start + layout.bundle_quads * width // 8, below + width
        if layout.table is None:
            return [b.let(code) for code in codes]
        found = [isa.look_up_bytes(layout.table, tirx.reinterpret(isa.u8, code)) for code in codes]
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
