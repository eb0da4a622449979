"""The vector instruction sets of x86, as the few operations that kernels are written over.

A `VectorIsa` knows how many 32-bit lanes a register has and which instructions multiply bytes. Its methods return TIR
expressions, so one template serves AVX2, AVX-VNNI, AVX-512 and AVX-512-VNNI. `v` below is `lanes` values of 32 bits;
a *quad* is four consecutive bytes, and a vector of bytes holds one quad a lane.

Dot products of bytes take *stored weight* bytes and *signed activation* bytes in [-127, 127]. What a stored byte means
depends on what the machine multiplies well, see `weight_offset`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr


def bind(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`let t = value in body(t)`: names a value that an expression uses more than once."""
    from tvm import tirx

    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def _llvm(dtype: str, name: str, *args: Expr) -> Expr:
    from tvm.script import tirx as T

    return T.call_llvm_pure_intrin(dtype, name, *args)


@dataclass(frozen=True)
class VectorIsa:
    """One instruction set.

    lanes: 32-bit lanes of a register (8 or 16). registers: how many there are. vnni: bytes are multiplied and summed
    into i32 by one instruction (`vpdpbusd`). bf16_dot: pairs of bf16 likewise (`vdpbf16ps`).
    """

    name: str
    lanes: int
    registers: int
    vnni: bool = False
    bf16_dot: bool = False

    # Types

    @property
    def f32(self) -> str:
        return f"float32x{self.lanes}"

    @property
    def i32(self) -> str:
        return f"int32x{self.lanes}"

    @property
    def i16(self) -> str:
        return f"int16x{self.lanes * 2}"

    @property
    def i8(self) -> str:
        return f"int8x{self.lanes * 4}"

    @property
    def u8(self) -> str:
        return f"uint8x{self.lanes * 4}"

    @property
    def vector_bytes(self) -> int:
        return self.lanes * 4

    # Moving values

    def splat(self, value: Expr | float, dtype: str = "float32") -> Expr:
        """A scalar in every lane (as many lanes as a register holds of `dtype`)."""
        from tvm import tirx

        lanes = self.vector_bytes * 8 // int("".join(c for c in dtype if c.isdigit()))
        scalar = tirx.const(value, dtype) if isinstance(value, (int, float)) else value
        return tirx.Broadcast(scalar, lanes)

    def load(self, buffer: Buffer, *indices: Expr | int, lanes: int | None = None) -> Expr:
        """`lanes` consecutive elements, from the given element on."""
        from tvm import tirx

        *outer, start = indices
        return tirx.BufferLoad(buffer, [*outer, tirx.Ramp(tirx.convert(start), 1, lanes or self.lanes)])

    def first(self, count: int) -> Expr:
        """A mask of the first `count` lanes."""
        from tvm import tirx

        return tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), self.lanes) < self.splat(count, "int32")

    def load_first(self, buffer: Buffer, count: int, *indices: Expr | int) -> Expr:
        """The first `count` of `lanes` consecutive f32, zeros in the other lanes; nothing past them is read."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as I

        if count <= 0:
            return self.splat(0.0)
        if count >= self.lanes:
            return self.load(buffer, *indices)
        *outer, start = indices
        mask = self.first(count)
        found = I.masked_load(self.f32, buffer, *outer, tirx.Ramp(start, 1, self.lanes), mask)
        return tirx.Select(mask, found, self.splat(0.0))  # TVM leaves the other lanes undefined

    def reduce(self, kind: str, vector: Expr) -> Expr:
        """All lanes as one scalar: kind "fadd" (in order of lanes) of f32, "add" or "umax" of i32 or u32."""
        from tvm import tirx

        dtype = "float32" if kind == "fadd" else "uint32" if kind == "umax" else "int32"
        start = [tirx.const(0.0, "float32")] if kind == "fadd" else []
        return _llvm(dtype, f"llvm.vector.reduce.{kind}", *start, vector)

    def magnitude(self, value: Expr) -> Expr:
        """|value|, f32."""
        from tvm import tirx

        return tirx.reinterpret(self.f32, tirx.reinterpret(self.i32, value) & self.splat(0x7FFFFFFF, "int32"))

    def splat_quad(self, quad: Expr) -> Expr:
        """Four bytes (an i32) repeated in every lane, as signed bytes."""
        from tvm import tirx

        return tirx.reinterpret(self.i8, tirx.Broadcast(quad, self.lanes))

    # Floating point

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """a * b + c, rounded once."""
        return _llvm(self.f32, "llvm.fma", a, b, c)

    def f16_to_f32(self, half: Expr) -> Expr:
        """`lanes` f16 to f32 (vcvtph2ps)."""
        return half.astype(self.f32)

    def f32_to_bf16(self, value: Expr) -> Expr:
        """f32 to bf16 as u16, to nearest even; NaN stays NaN. `value` must be a variable."""
        from tvm import tirx

        one = self.splat(1, "uint32")
        bits = tirx.reinterpret(f"uint32x{self.lanes}", value)
        even = (bits >> self.splat(16, "uint32")) & one
        rounded = (bits + (even + self.splat(0x7FFF, "uint32"))) >> self.splat(16, "uint32")
        quiet = (bits >> self.splat(16, "uint32")) | self.splat(0x40, "uint32")
        # By its bits: TVM takes a comparison of a number with itself for settled.
        is_nan = (bits & self.splat(0x7FFFFFFF, "uint32")) > self.splat(0x7F800000, "uint32")
        return tirx.Select(is_nan, quiet, rounded).astype(f"uint16x{self.lanes}")

    def bf16_pair_to_f32(self, pairs: Expr, odd: bool) -> Expr:
        """The even or odd bf16 of each 32-bit lane (i32 expression), to f32."""
        from tvm import tirx

        bits = pairs & self.splat(-65536, "int32") if odd else pairs << self.splat(16, "int32")
        return tirx.reinterpret(self.f32, bits)

    def dot_bf16(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        """acc + a.even*b.even + a.odd*b.odd on bf16 pairs held in i32 lanes. Needs `bf16_dot` and `bf16_helper`."""
        from tvm import tirx

        return tirx.call_pure_extern(self.f32, "llmc_dot_bf16", acc, a, b)

    @property
    def bf16_helper(self) -> str:
        """LLVM code that a kernel with `dot_bf16` imports: TVM turns every bf16 it sees into f32, so none may show."""
        f32, i32, bf16 = (f"<{self.lanes * m} x {t}>" for m, t in ((1, "float"), (1, "i32"), (2, "bfloat")))
        name = f"@llvm.x86.avx512bf16.dpbf16ps.{self.lanes * 32}"
        return f"""
            declare {f32} {name}({f32}, {bf16}, {bf16})
            define {f32} @llmc_dot_bf16({f32} %acc, {i32} %a, {i32} %b) alwaysinline {{
              %x = bitcast {i32} %a to {bf16}
              %y = bitcast {i32} %b to {bf16}
              %sum = call {f32} {name}({f32} %acc, {bf16} %x, {bf16} %y)
              ret {f32} %sum
            }}
        """

    def pack_pairs(self, even: Expr, odd: Expr) -> Expr:
        """Two f32 vectors as bf16 pairs in i32 lanes, rounded to nearest even. Needs `bf16_dot` and `pairs_helper`."""
        from tvm import tirx

        return tirx.call_pure_extern(self.i32, "llmc_pack_pairs", even, odd)

    def pack_bf16(self, first: Expr, second: Expr) -> Expr:
        """Two f32 vectors, one after the other, as bf16 in i32 lanes, rounded to nearest even. As `pack_pairs`."""
        from tvm import tirx

        return tirx.call_pure_extern(self.i32, "llmc_pack_bf16", first, second)

    @property
    def pairs_helper(self) -> str:
        """LLVM code that a kernel with `pack_pairs` or `pack_bf16` imports."""
        f32, i32, bf16 = (f"<{self.lanes * m} x {t}>" for m, t in ((1, "float"), (1, "i32"), (2, "bfloat")))
        name = f"@llvm.x86.avx512bf16.cvtne2ps2bf16.{self.lanes * 32}"
        order = ", ".join(f"i32 {lane}, i32 {lane + self.lanes}" for lane in range(self.lanes))
        return f"""
            declare {bf16} {name}({f32}, {f32})
            define {i32} @llmc_pack_bf16({f32} %first, {f32} %second) alwaysinline {{
              %both = call {bf16} {name}({f32} %second, {f32} %first)
              %lanes = bitcast {bf16} %both to {i32}
              ret {i32} %lanes
            }}
            define {i32} @llmc_pack_pairs({f32} %even, {f32} %odd) alwaysinline {{
              %both = call {bf16} {name}({f32} %odd, {f32} %even)
              %pairs = shufflevector {bf16} %both, {bf16} poison, <{self.lanes * 2} x i32> <{order}>
              %lanes = bitcast {bf16} %pairs to {i32}
              ret {i32} %lanes
            }}
        """

    def look_up(self, table: Expr, places: Expr) -> Expr:
        """table[places % lanes], f32, lane by lane (vpermps)."""
        name = "llvm.x86.avx2.permps" if self.lanes == 8 else "llvm.x86.avx512.permvar.sf.512"
        return _llvm(self.f32, name, table, places)

    # Bytes

    def low_nibbles(self, packed: Expr) -> Expr:
        """The low four bits of each byte (u8 in, i8 out, 0..15)."""
        from tvm import tirx

        return tirx.reinterpret(self.i8, packed & self.splat(15, "uint8"))

    def high_nibbles(self, packed: Expr) -> Expr:
        """The high four bits of each byte (u8 in, i8 out, 0..15). x86 shifts no bytes: 16-bit lanes, then a mask."""
        from tvm import tirx

        words = tirx.reinterpret(f"uint16x{self.lanes * 2}", packed) >> self.splat(4, "uint16")
        return tirx.reinterpret(self.i8, tirx.reinterpret(self.u8, words) & self.splat(15, "uint8"))

    def weight_offset(self, bits: int, symmetric: bool) -> int:
        """What to add to a logical weight to store it: `sum q*a = dot(stored, a) - offset * sum a`.

        The instructions multiply unsigned by signed bytes, so weights are stored unsigned. Without VNNI the products
        of two pairs must fit i16, which 8-bit weights do only as |w| <= 128 with the sign moved to the activation.
        """
        if bits == 4:
            return 8 if symmetric else 0
        if self.vnni:
            return 128 if symmetric else 0
        return 0 if symmetric else -128

    def narrow_quads(self, bits: int) -> int:
        """How many dots of stored weights an i16 accumulator holds; 0: dots go straight to i32.

        4-bit weights: 8 dots of 2 * 15 * 127 are 30480, below 32768.
        """
        return 8 if bits == 4 and not self.vnni else 0

    def pair_sums(self, group: int) -> bool:
        """Whether activations come with two sums a group of inputs: of the first two of every four, and of the others.

        An i16 accumulator that starts from -8 times such a sum ends at the sum of (w - 8) * a, for w in 0..15. Over 64
        inputs that is at most 32 * 8 * 127 = 32512; on the way there it may wrap around. So a group of up to 64 inputs
        is widened once, not twice, and no i32 sums take registers meanwhile.
        """
        return not self.vnni and group <= 64

    def dot(self, acc: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        """acc (i32 lanes) + the dot of each lane's quad of stored weights with its quad of activations. Exact."""
        if self.vnni:
            # AVX-VNNI has the same intrinsic; LLVM picks the VEX encoding where AVX-512 is absent.
            return _llvm(self.i32, f"llvm.x86.avx512.vpdpbusd.{self.lanes * 32}", acc, weights, activations)
        if bits == 4:
            return self.widen(acc, self.dot_narrow(weights, activations))
        magnitude, signed = self._move_sign(weights, activations)
        return self.widen(acc, self.dot_narrow(magnitude, signed))

    def dot_narrow(self, weights: Expr, activations: Expr) -> Expr:
        """Sums of two adjacent u8 x s8 products as i16 (vpmaddubsw). The caller sees to it that they fit."""
        name = "llvm.x86.avx2.pmadd.ub.sw" if self.lanes == 8 else "llvm.x86.avx512.pmaddubs.w.512"
        return _llvm(self.i16, name, weights, activations)

    def in_place(self, sums: Expr) -> Expr:
        """`sums` (i16 or i32), computed here and in this order. Needs `in_place_helper`.

        LLVM otherwise adds successive products to each other first, or does one row after the other, and spills.
        """
        from tvm import tirx

        dtype = str(sums.ty.dtype)
        return tirx.call_pure_extern(dtype, f"llmc_in_place_{dtype}", sums)

    @property
    def in_place_helper(self) -> str:
        """LLVM code that a kernel with `in_place` imports: uses of a sum that stay in place, and do nothing."""

        def of(dtype: str, vector: str) -> str:
            return f"""
            define {vector} @llmc_in_place_{dtype}({vector} %sums) alwaysinline {{
              %held = call {vector} asm sideeffect "", "=v,0"({vector} %sums)
              ret {vector} %held
            }}
            """

        return of(self.i16, f"<{self.lanes * 2} x i16>") + of(self.i32, f"<{self.lanes} x i32>")

    def widen(self, acc: Expr, narrow: Expr) -> Expr:
        """acc (i32) + sums of two adjacent i16 (vpmaddwd with ones)."""
        name = "llvm.x86.avx2.pmadd.wd" if self.lanes == 8 else "llvm.x86.avx512.pmaddw.d.512"
        return acc + _llvm(self.i32, name, narrow, self.splat(1, "int16"))

    def _move_sign(self, weights: Expr, activations: Expr) -> tuple[Expr, Expr]:
        """(|w|, a * sign(w)): the same products, with the unsigned operand that vpmaddubsw wants."""
        from tvm import tirx

        zero = self.splat(0, "int8")
        magnitude = tirx.Select(weights < zero, zero - weights, weights)  # LLVM: vpabsb
        if self.lanes == 8:
            return magnitude, _llvm(self.i8, "llvm.x86.avx2.psign.b", activations, weights)
        return magnitude, tirx.Select(weights < zero, zero - activations, activations)  # a masked vpsubb


def isa_for(machine: Machine) -> VectorIsa:
    """The widest instruction set that the machine has and its `vector_bits` allow. Raises ValueError below AVX2."""
    if machine.vector_bits >= 512 and machine.has("avx512f", "avx512bw", "avx512vl", "avx512dq"):
        vnni, bf16 = machine.has("avx512vnni"), machine.has("avx512bf16")
        return VectorIsa("avx512vnni" if vnni else "avx512", 16, 32, vnni, bf16)
    if machine.has("avx2", "fma", "f16c"):
        vnni = machine.has("avxvnni") or machine.has("avx512vnni", "avx512vl")
        return VectorIsa("avxvnni" if vnni else "avx2", 8, 16, vnni)
    raise ValueError(f"machine {machine.name!r} lacks AVX2, FMA or F16C, the least that kernels are written for")
