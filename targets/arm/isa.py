"""The vector instruction sets of 64-bit ARM: NEON, and with it dotprod, i8mm and bf16. All have 32 registers of 128
bits; SVE and SME are not used, where a CPU has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.arm.sums import HalfSums, SquareSums
from llmc.targets.cpu.group_sums import Sums, WideSums
from llmc.targets.cpu.layouts import WeightTiles
from llmc.targets.cpu.vector_isa import Bf16Dots, Blocking, VectorIsa, llvm_call
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr

LANES = 4
# A line of the cache a quad of all rows, which four vectors read: one prefetch each, and room for wider vectors. Bytes
# are stored as all instructions take them, signed.
WEIGHT_TILES = WeightTiles(16, signed_bytes=True)


@dataclass(frozen=True)
class ArmBf16Dots(Bf16Dots):
    """`bfdot`: it rounds sums of two products to odd, and takes numbers below 2^-126 for zeros."""

    def dot(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        from tvm import tirx

        return tirx.call_pure_extern("float32x4", "llmc_dot_bf16", acc, a, b)

    @property
    def helper(self) -> str:
        """TVM turns every bf16 it sees into f32, so none may show."""
        name = "@llvm.aarch64.neon.bfdot.v4f32.v8bf16"
        return f"""
            declare <4 x float> {name}(<4 x float>, <8 x bfloat>, <8 x bfloat>)
            define <4 x float> @llmc_dot_bf16(<4 x float> %acc, <4 x i32> %a, <4 x i32> %b) alwaysinline {{
              %x = bitcast <4 x i32> %a to <8 x bfloat>
              %y = bitcast <4 x i32> %b to <8 x bfloat>
              %sum = call <4 x float> {name}(<4 x float> %acc, <8 x bfloat> %x, <8 x bfloat> %y)
              ret <4 x float> %sum
            }}
        """


@dataclass(frozen=True)
class ArmIsa(VectorIsa):
    """dotprod: four bytes are multiplied and summed into i32 by one instruction (`sdot`). i8mm: two rows by two of
    eight bytes (`smmla`)."""

    dotprod: bool = False
    i8mm: bool = False

    @property
    def spread_quads(self) -> int:
        """`sdot` takes one quad of a vector for all lanes."""
        return LANES

    def shift_bytes(self, packed: Expr, right: int) -> Expr:
        """Bytes are shifted by themselves."""
        return packed >> right if right > 0 else packed << -right

    def look_up_bytes(self, table: Sequence[int], codes: Expr) -> Expr:
        """As the base has it, by one `tbl` of one, two or four registers."""
        from tvm import tirx

        count = max(1, len(table) // 16)
        numbers = [tirx.const(table[place % len(table)] % 256, "uint8") for place in range(16 * count)]
        order = [tirx.const(place, "int32") for place in range(16)]
        registers = [tirx.Shuffle(numbers[first : first + 16], order) for first in range(0, 16 * count, 16)]
        return llvm_call(self.u8, f"llvm.aarch64.neon.tbl{count}.v16i8", *registers, codes & (len(table) - 1))

    def sums(self, bits: int, group: int) -> Sums:
        return WideSums() if self.dotprod else HalfSums.of(bits)

    def panel_sums(self, bits: int, group: int) -> Sums:
        return SquareSums() if self.i8mm else self.sums(bits, group)

    def dot(self, acc: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        if self.dotprod:
            return llvm_call(self.i32, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, weights, activations)
        low, high = HalfSums.products(weights, activations)
        return acc + HalfSums.joined(HalfSums.widened(low), HalfSums.widened(high))


def missing(machine: Machine) -> tuple[str, ...]:
    """What the machine lacks of what all vector kernels are written for."""
    return () if machine.has("neon") else ("neon",)


def isa_for(machine: Machine) -> ArmIsa:
    """What the machine has. ValueError without NEON.

    Blocks of integers leave registers to weights and activations: 16 sums of 32 registers, half as many where each
    takes two."""
    if missing(machine):
        raise ValueError(f"machine {machine.name!r} lacks NEON, the least that kernels are written for")
    dotprod, i8mm = machine.has("dotprod"), machine.has("dotprod", "i8mm")
    bf16 = ArmBf16Dots() if machine.has("bf16") else None
    if i8mm:
        name, blocks = "i8mm", Blocking(8, 2, 96)
    elif dotprod:
        name, blocks = "dotprod", Blocking(4, 4, 96)
    else:
        name, blocks = "neon", Blocking(2, 4, 64)
    return ArmIsa(
        name,
        LANES,
        32,
        bf16,
        blocks,
        Blocking(4, 4, 96),
        "w",
        few_slices=4,
        unrolled_quads=16,
        dotprod=dotprod,
        i8mm=i8mm,
    )
