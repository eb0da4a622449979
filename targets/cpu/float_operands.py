"""What kernels multiply in floating point: weights as f32 vectors, or pairs of bf16, and activations in every lane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.layouts import FloatLayout, QuantizedLayout
from llmc.targets.cpu.quads import quad_bytes
from llmc.targets.cpu.tile_slices import TileSlice
from llmc.targets.cpu.vector_isa import Bf16Dots, VectorIsa
from llmc.targets.cpu.vectors import as_f32, load, splat

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr

# (first term of the part, how many of its vectors) -> vectors, one a term
Vectors = Callable[["Expr", int], list["Expr"]]


class FloatWeights:
    """f32, f16 or bf16 weights as vectors of a slice's rows, one for each *term* of the sum.

    A term is one input, or a pair of inputs where bf16 pairs are multiplied. `bundle` terms share a load of
    `bundle_bytes`; a tile has `tile_bytes`.
    """

    def __init__(self, isa: VectorIsa, layout: FloatLayout, n: int, k: int, pairs: bool, part: int) -> None:
        self.isa, self.layout, self.n, self.k = isa, layout, n, k
        self.dots = isa.bf16_dots if pairs else None
        self.terms = -(-k // 2) if pairs else k
        self.part = part
        self.bundle = 2 if layout.dtype == "bf16" and not pairs else 1
        self.bundle_bytes = layout.tile_rows * (2 if layout.dtype == "f16" else 4)
        self.tile_bytes = -(-self.terms // self.bundle) * self.bundle_bytes

    def pointers(self) -> list[tuple[str, str]]:
        return [("data", str(self.layout.arrays(self.n, self.k)["data"][1]))]

    def at(self, handles: Mapping[str, Expr], at: TileSlice, part: Expr) -> Vectors:
        """The vectors of one part of one slice."""
        from tvm import tirx

        isa, ((_, *shape), dtype) = self.isa, self.layout.arrays(self.n, self.k)["data"]
        data = b.view(handles["data"], [b.MANY, *shape], str(dtype))
        tile, first, row = at.tile, part * self.part, at.number * isa.lanes

        def vectors(term: Expr, count: int) -> list[Expr]:
            if self.layout.dtype == "f32":
                return [load(data, (tile, first + term, row), isa.lanes)]
            if self.layout.dtype == "f16":
                return [as_f32(load(data, (tile, first + term, row), isa.lanes))]
            pair = first + term if self.dots else (first + term) // 2
            flat = b.view(handles["data"], [b.MANY, shape[0], self.layout.tile_rows * 2], "uint16")
            both = b.let(tirx.reinterpret(isa.i32, load(flat, (tile, pair, row * 2), isa.lanes * 2)))
            return [both] if self.dots else [isa.bf16_pair_to_f32(both, odd=i == 1) for i in range(count)]

        return vectors


class DequantizedWeights:
    """Weights of 2 to 6 or 8 bits as f32 vectors: of a quad, lane by lane, byte by byte."""

    def __init__(self, isa: VectorIsa, layout: QuantizedLayout, k: int) -> None:
        self.isa, self.layout, self.k = isa, layout, k
        self.terms, self.part, self.bundle = k, layout.group, 4 * layout.bundle_quads
        self.vector_bytes = layout.tile_rows * 4
        self.bundle_bytes = layout.bundle_vectors * self.vector_bytes
        self.tile_bytes = layout.groups(k) * layout.vectors * self.vector_bytes
        self.dots: Bf16Dots | None = None

    def pointers(self) -> list[tuple[str, str]]:
        minimums = [] if self.layout.symmetric else [("minimums", "float16")]
        return [("data", "uint8"), ("scales", "float16"), *minimums]

    def at(self, handles: Mapping[str, Expr], at: TileSlice, part: Expr) -> Vectors:
        """The vectors of one group of one slice."""
        from tvm import tirx

        isa, layout, groups = self.isa, self.layout, self.layout.groups(self.k)
        data = b.view(handles["data"], [b.MANY, groups, layout.vectors, self.vector_bytes], "uint8")
        tile, row = at.tile, at.number * isa.lanes

        def per_group(name: str) -> Expr:
            buffer = b.view(handles[name], [b.MANY, layout.scale_groups(self.k), layout.tile_rows], "float16")
            place = b.index(0) if layout.per_row else part
            return b.let(as_f32(load(buffer, (tile, place, row), isa.lanes)))

        scale, minimum = per_group("scales"), None if layout.symmetric else per_group("minimums")
        if minimum is not None and layout.in_steps:
            minimum = b.let(minimum * scale)
        scale = scale if layout.unit == 1 else b.let(scale * layout.unit)
        # Flipping the top bit of signed bytes makes them unsigned, 128 up.
        offset = layout.byte_offset + (128 if layout.signed else 0)
        # 4-bit weights that are multiplied as they are need not become bytes: their fields are narrower.
        fields = layout.bits == 4 and layout.levels is None

        def vectors(term: Expr, count: int) -> list[Expr]:
            first = term // self.bundle * layout.bundle_vectors

            def vector(number: int) -> Expr:
                return load(data, (tile, part, first + number, row * 4), isa.vector_bytes)

            quads = 1 if fields else -(-count // 4)
            words = [
                vector(0) if fields else quad_bytes(isa, layout, vector, place) ^ (128 if layout.signed else 0)
                for place in range(quads)
            ]
            words = [b.let(tirx.reinterpret(f"uint32x{isa.lanes}", raw)) for raw in words]
            return [value(words, i) for i in range(count)]

        def value(words: list[Expr], position: int) -> Expr:
            if fields:  # inputs 4 to 7 are the high halves
                bits = (words[0] >> (position % 4 * 8 + position // 4 * 4)) & 15
            else:
                bits = (words[position // 4] >> (position % 4 * 8)) & 255
            # 2^23 + an integer below 2^23 has the integer as its low bits: no conversion, and the offset comes free.
            number = tirx.reinterpret(isa.f32, bits | 0x4B000000) - (8388608.0 + offset)
            return number * scale if minimum is None else isa.fma(number, scale, minimum)

        return vectors


AnyWeights: TypeAlias = FloatWeights | DequantizedWeights


class Activations:
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
