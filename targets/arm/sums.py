"""How products of bytes become sums on ARM, beyond `WideSums`, which `sdot` serves: without a dot instruction, and with
one for two rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.group_sums import Products, Sums, Weights
from llmc.targets.cpu.vector_isa import llvm_call
from llmc.targets.cpu.vectors import permute, splat

if TYPE_CHECKING:
    from tvm.tirx import Expr

    from llmc.targets.cpu.vector_isa import VectorIsa

I16, I32 = "int16x8", "int32x4"
MOST_ACTIVATION = 127


@dataclass(frozen=True)
class HalfSums(Sums):
    """Plain NEON: a vector's lower and upper bytes are multiplied into two i16 sums (`smlal`, `smlal2`), byte by byte.

    held: quads after which these are added to i32 sums (`sadalp`), as i16 hold no more: of weights of up to 15, 16
    products of at most 15 * 127, of signed bytes two of at most 128 * 127. The four bytes of a row are added up at the
    group's end (`addp`).
    """

    held: int

    registers = 2

    @classmethod
    def of(cls, bits: int) -> HalfSums:
        """For bytes of so many bits: signed ones of 8, unsigned ones of fewer."""
        most = 32767 // ((128 if bits == 8 else (1 << bits) - 1) * MOST_ACTIVATION)
        return cls(min(16, 1 << most.bit_length() - 1))

    @staticmethod
    def products(weights: Expr, activations: Expr) -> tuple[Expr, Expr]:
        """Products as i16, of the lower and of the upper eight bytes."""

        def half(value: Expr, side: int) -> Expr:
            return permute([value], range(8 * side, 8 * side + 8))

        low, high = (
            llvm_call(I16, "llvm.aarch64.neon.smull.v8i16", half(weights, side), half(activations, side))
            for side in (0, 1)
        )
        return low, high

    @staticmethod
    def widened(narrow: Expr) -> Expr:
        """i16 to i32, neighbours added."""
        return llvm_call(I32, "llvm.aarch64.neon.saddlp.v4i32.v8i16", narrow)

    @staticmethod
    def joined(low: Expr, high: Expr) -> Expr:
        """Four sums of both halves' neighbours, i32."""
        return llvm_call(I32, "llvm.aarch64.neon.addp.v4i32", low, high)

    def dtype(self, isa: VectorIsa) -> str:
        return isa.i16

    def add(self, isa: VectorIsa, total: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        low, high = self.products(weights, activations)
        return total + low + high

    def refuse(self, unroll: int, chains: int) -> str:
        return super().refuse(unroll, 1)

    def emit(self, products: Products, weights: Sequence[Weights], unroll: int, chains: int) -> b.Registers:
        """Successive quads go to one sum: there are two a slot, and the multiplier adds every cycle or two."""
        isa, count = products.isa, len(weights) * len(products.rows)
        held = math.gcd(self.held, products.quads)
        span = max(held, unroll)
        wide, narrow = ([b.Registers(count, dtype) for _ in range(2)] for dtype in (I32, I16))
        is_once = held == products.quads
        for slot in () if is_once else range(count):
            for half in wide:
                half[slot] = splat(0, 4, "int32")
        with b.loop(products.quads // span) as several:
            for step, slot, w, a in products.operands(weights, several * span, span):
                for half, sums, product in zip(narrow, wide, self.products(w, a), strict=True):
                    half[slot] = isa.in_place(half[slot] + product) if step % held else product
                    if step % held == held - 1:
                        found = self.widened(half[slot])
                        sums[slot] = found if is_once else isa.in_place(sums[slot] + found)
        total = b.Registers(count, I32)
        for slot in range(count):
            total[slot] = products.start(slot) + self.joined(wide[0][slot], wide[1][slot])
        return total


@dataclass(frozen=True)
class SquareSums(Sums):
    """i8mm: `smmla` adds eight products of each of two rows of activations with each of two rows of weights.

    Of a pair of rows and a slice, which has four, there are two sums: of its first two rows, and of the others. Two
    quads of a slice become those operands by `arranged`, once for a panel. An odd last row is multiplied with itself.
    """

    together = 2

    def dtype(self, isa: VectorIsa) -> str:
        return isa.i32

    def add(self, isa: VectorIsa, total: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        return llvm_call(I32, "llvm.aarch64.neon.smmla.v4i32.v16i8", total, activations, weights)

    def arranged(self, isa: VectorIsa, quads: Sequence[Expr]) -> list[Expr]:
        """Eight bytes of two rows each: quads 0 and 1 of rows 0, 1, of rows 2, 3, then quads 2 and 3."""
        from tvm import tirx

        found = []
        for first in range(0, len(quads), 2):
            pair = [b.let(tirx.reinterpret(I32, quad)) for quad in quads[first : first + 2]]
            for rows in ((0, 1), (2, 3)):
                order = [row + 4 * quad for row in rows for quad in (0, 1)]
                found.append(tirx.reinterpret(isa.i8, permute(pair, order)))
        return found

    @staticmethod
    def _two_rows(first: Expr, second: Expr, start: int) -> Expr:
        """Two quads of each of two rows, from quad `start` of four on."""
        from tvm import tirx

        return tirx.reinterpret("int8x16", permute([first, second], [start, start + 1, 4 + start, 5 + start]))

    def emit(self, products: Products, weights: Sequence[Weights], unroll: int, chains: int) -> b.Registers:
        isa, rows, bits = products.isa, len(products.rows), products.bits
        pairs = -(-rows // 2)
        sums = b.Registers(2 * pairs * len(weights), I32)
        for slot in range(2 * pairs * len(weights)):
            sums[slot] = splat(0, 4, "int32")
        with b.loop(products.quads // unroll) as several:
            for step in range(0, unroll, 2):
                quad = several * unroll + step
                b.keep_order()
                if step % 4 == 0:
                    four = [b.let(products.several(m, quad, 4)) for m in range(rows)]
                a = [b.let(self._two_rows(four[2 * p], four[min(2 * p + 1, rows - 1)], step % 4)) for p in range(pairs)]
                for t, weight in enumerate(weights):
                    for side in (0, 1):
                        w = b.let(weight(quad + side, step + side))
                        for p in range(pairs):
                            slot = (t * pairs + p) * 2 + side
                            sums[slot] = isa.in_place(self.add(isa, sums[slot], w, a[p], bits))
        found = b.Registers(rows * len(weights), I32)
        for t in range(len(weights)):
            for m in range(rows):
                first = (t * pairs + m // 2) * 2
                order = [2 * (m % 2) + lane + 4 * side for side in (0, 1) for lane in (0, 1)]
                slot = t * rows + m
                found[slot] = products.start(slot) + permute([sums[first], sums[first + 1]], order)
        return found
