"""The vector instruction sets of x86: AVX2, AVX-VNNI, AVX-512 and AVX-512-VNNI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu.group_sums import PairSums, Sums, WideSums
from llmc.targets.cpu.layouts import WeightTiles
from llmc.targets.cpu.vector_isa import Bf16Dots, Blocking, VectorIsa, llvm_call
from llmc.targets.cpu.vectors import splat
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr

LEAST = ("avx2", "fma", "f16c")  # what all vector kernels are written for
# The rows of the widest vectors; bytes are stored as `vpdpbusd` and `vpmaddubsw` take them, unsigned.
WEIGHT_TILES = WeightTiles(16)


@dataclass(frozen=True)
class X86Bf16Dots(Bf16Dots):
    """`vdpbf16ps` of so many lanes."""

    lanes: int

    def dot(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        from tvm import tirx

        return tirx.call_pure_extern(f"float32x{self.lanes}", "llmc_dot_bf16", acc, a, b)

    @property
    def helper(self) -> str:
        """TVM turns every bf16 it sees into f32, so none may show."""
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


@dataclass(frozen=True)
class X86Isa(VectorIsa):
    """lanes: 8 or 16. vnni: bytes are multiplied and summed into i32 by one instruction (`vpdpbusd`). vbmi: bytes are
    looked up among 64 by one instruction (`vpermb`)."""

    vnni: bool = False
    vbmi: bool = False

    # Floating point

    def pack_pairs(self, even: Expr, odd: Expr) -> Expr:
        """Two f32 vectors as bf16 pairs in i32 lanes, rounded to nearest even. Needs `bf16_dots` and `pairs_helper`."""
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
        return llvm_call(self.f32, name, table, places)

    # Bytes

    def look_up_bytes(self, table: Sequence[int], codes: Expr) -> Expr:
        """As the base has it. `vpermb` looks at six bits of a code and `vpshufb` at four, and at the highest, which
        makes 0 of it: of four tables of 16, all but one give 0."""
        if self.vbmi and self.lanes == 16:  # fewer than 64 again and again
            return llvm_call(self.u8, "llvm.x86.avx512.permvar.qi.512", self._repeated(table), codes)
        if len(table) <= 16:
            return self._shuffle(table, codes & 15)
        found = None
        for first in range(0, len(table), 16):
            # From 16 on, a place and 0x70 have the highest bit.
            place = codes & (len(table) - 1)
            place = place ^ first if first else place
            place = llvm_call(self.u8, "llvm.uadd.sat", place, splat(0x70, self.vector_bytes, "uint8"))
            part = self._shuffle(table[first : first + 16], place)
            found = part if found is None else found | part
        return found

    def _shuffle(self, table: Sequence[int], places: Expr) -> Expr:
        name = "llvm.x86.avx2.pshuf.b" if self.lanes == 8 else "llvm.x86.avx512.pshuf.b.512"
        return llvm_call(self.u8, name, self._repeated(table), places)

    def _repeated(self, table: Sequence[int]) -> Expr:
        """A vector of these bytes, again and again."""
        from tvm import tirx

        numbers = [tirx.const(table[place % len(table)], "uint8") for place in range(self.vector_bytes)]
        return tirx.Shuffle(numbers, [tirx.const(place, "int32") for place in range(self.vector_bytes)])

    def dot_centre(self, bits: int) -> int:
        """Without VNNI the products of two pairs must fit i16, which 8-bit weights do only as |w| <= 128 with the sign
        moved to the activation: they are made signed first."""
        return 128 if bits == 8 and not self.vnni else 0

    def pair_sums(self, group: int) -> bool:
        """As the base has it, for weights of up to 4 bits without VNNI.

        An i16 accumulator that starts from -8 times such a sum ends at the sum of (w - 8) * a, for w in 0..15. Over 64
        inputs that is at most 32 * 8 * 127 = 32512; on the way there it may wrap around. So a group of up to 64 inputs
        is widened once, not twice, and no i32 sums take registers meanwhile.
        """
        return not self.vnni and group <= 64

    def sums(self, bits: int, group: int) -> Sums:
        """Weights of up to 4 bits without VNNI: 8 dots of 2 * 15 * 127 are 30480, which i16 hold."""
        return PairSums(self, 8, whole=self.pair_sums(group)) if bits <= 4 and not self.vnni else WideSums()

    def dot(self, acc: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        """As the base has it. The instructions multiply unsigned by signed bytes."""
        if self.vnni:
            # AVX-VNNI has the same intrinsic; LLVM picks the VEX encoding where AVX-512 is absent.
            return llvm_call(self.i32, f"llvm.x86.avx512.vpdpbusd.{self.lanes * 32}", acc, weights, activations)
        if bits < 8:  # two products of at most 127 * 127 fit i16
            return self.widen(acc, self.dot_narrow(weights, activations))
        magnitude, signed = self._move_sign(weights, activations)
        return self.widen(acc, self.dot_narrow(magnitude, signed))

    def dot_narrow(self, weights: Expr, activations: Expr) -> Expr:
        """Sums of two adjacent u8 x s8 products as i16 (vpmaddubsw). The caller sees to it that they fit."""
        name = "llvm.x86.avx2.pmadd.ub.sw" if self.lanes == 8 else "llvm.x86.avx512.pmaddubs.w.512"
        return llvm_call(self.i16, name, weights, activations)

    def widen(self, acc: Expr, narrow: Expr) -> Expr:
        """acc (i32) + sums of two adjacent i16 (vpmaddwd with ones)."""
        name = "llvm.x86.avx2.pmadd.wd" if self.lanes == 8 else "llvm.x86.avx512.pmaddw.d.512"
        return acc + llvm_call(self.i32, name, narrow, splat(1, self.lanes * 2, "int16"))

    def _move_sign(self, stored: Expr, activations: Expr) -> tuple[Expr, Expr]:
        """(|w|, a * sign(w)) of w = stored - 128: the same products, with an unsigned operand as vpmaddubsw wants."""
        from tvm import tirx

        weights = stored ^ splat(-128, self.vector_bytes, "int8")
        magnitude = llvm_call(self.i8, "llvm.abs", weights, tirx.const(False, "bool"))  # of -128: 128
        if self.lanes == 8:
            return magnitude, llvm_call(self.i8, "llvm.x86.avx2.psign.b", activations, weights)
        zero = splat(
            0, self.vector_bytes, "int8"
        )  # where a stored byte has its top bit, a masked vpsubb leaves the activation
        return magnitude, tirx.Select(stored < zero, activations, zero - activations)


# Blocks of integers were measured on 4-bit groups of 64: without VNNI an i16 sum stands beside every i32 one, so that
# they are smaller. With overlap 4 rows are as fast as 6, in less code (docs/adr/0037).
def _wide(vnni: bool, vbmi: bool, bf16: bool) -> X86Isa:
    """AVX-512."""
    blocks = Blocking(4, 4, 192) if vnni else Blocking(4, 4, 64)
    name = "avx512vnni" if vnni else "avx512"
    dots, floats = X86Bf16Dots(16) if bf16 else None, Blocking(6, 4, 96)
    overlap = 2 if vnni else 1
    return X86Isa(name, 16, 32, dots, blocks, floats, "v", overlap=overlap, vnni=vnni, vbmi=vbmi)


def _narrow(vnni: bool) -> X86Isa:
    """AVX2."""
    blocks = Blocking(3, 4, 96) if vnni else Blocking(4, 2, 64)
    name = "avxvnni" if vnni else "avx2"
    return X86Isa(name, 8, 16, None, blocks, Blocking(4, 2, 96), "v", vnni=vnni)


def missing(machine: Machine) -> tuple[str, ...]:
    """What the machine lacks of what all vector kernels are written for."""
    return tuple(name for name in LEAST if not machine.has(name))


def isa_for(machine: Machine) -> X86Isa:
    """The widest instruction set that the machine has and its `vector_bits` allow. Raises ValueError below AVX2."""
    if machine.vector_bits >= 512 and machine.has("avx512f", "avx512bw", "avx512vl", "avx512dq"):
        return _wide(machine.has("avx512vnni"), machine.has("avx512vbmi"), machine.has("avx512bf16"))
    if not missing(machine):
        return _narrow(machine.has("avxvnni") or machine.has("avx512vnni", "avx512vl"))
    raise ValueError(f"machine {machine.name!r} lacks AVX2, FMA or F16C, the least that kernels are written for")
