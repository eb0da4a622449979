"""How the products of one group become i32 sums: a strategy that the instruction set chooses.

`WideSums` add dots of quads to i32 at once. `PairSums` add sums of two products in i16 first, which is quicker where
no instruction sums four, and only as many as i16 holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.vectors import splat

if TYPE_CHECKING:
    from tvm.tirx import Expr

    from llmc.targets.cpu.vector_isa import VectorIsa

UNROLL = (4, 8)  # quads that may be unrolled, of which the smallest group has four: whole bundles
# Quads of a group between whose products other work is emitted; what is left of a larger group follows in a loop.
BESIDE = 16
# What is taken from weights of 0..15 so that i16 accumulators hold more of them, see `PairSums`.
CENTRE = 8

# (quad, its number in the code, which is the quad less a multiple of what shares vectors) -> a tile's weights as bytes
Weights = Callable[["Expr", int], "Expr"]


class Products(Protocol):
    """The products of one group of some rows and tiles, as a strategy sees them. A *slot* is tile * rows + row."""

    @property
    def isa(self) -> VectorIsa: ...

    @property
    def bits(self) -> int:
        """Of the bytes that are multiplied."""

    @property
    def quads(self) -> int:
        """Of the group."""

    @property
    def rows(self) -> Sequence[Expr]: ...

    def several(self, m: int, quad: Expr, count: int) -> Expr:
        """`count` quads of activations of row number m, i32, as many lanes."""

    def start(self, slot: int) -> Expr:
        """What i32 sums start from."""

    def narrow_start(self, slot: int) -> Expr:
        """What i16 sums of a whole group start from."""

    def operands(self, weights: Sequence[Weights], first: Expr, quads: int) -> Iterator[tuple[int, int, Expr, Expr]]:
        """(step, slot, stored weights, activations) of every product of `quads` quads from `first` on."""


class NarrowDots(Protocol):
    """The instructions that `PairSums` are made of."""

    def dot_narrow(self, weights: Expr, activations: Expr) -> Expr:
        """Sums of two adjacent products of stored weights and activations, as i16. The caller sees to it that they
        fit."""

    def widen(self, acc: Expr, narrow: Expr) -> Expr:
        """acc (i32) + sums of two adjacent i16."""


class Sums(ABC):
    """One strategy. registers: how many vectors a running sum takes. centre: what i16 sums of a whole group take from
    each stored weight, 0 where there are none. together: how many quads of a slice are `arranged` together."""

    registers = 1
    centre = 0
    together = 1

    @abstractmethod
    def dtype(self, isa: VectorIsa) -> str:
        """Of the sums that products are added to."""

    @abstractmethod
    def add(self, isa: VectorIsa, total: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        """total + the products of a quad."""

    def arranged(self, isa: VectorIsa, quads: Sequence[Expr]) -> list[Expr]:
        """Successive quads of a slice, a multiple of `together`, as `emit` wants them: as many vectors (i8). Where some
        are arranged together, weights are a panel that was made so."""
        return list(quads)

    def refuse(self, unroll: int, chains: int) -> str:
        """Why so many quads cannot be unrolled into so many chains; empty where they can."""
        return "" if unroll % chains == 0 else f"{unroll} unrolled quads are no whole number for {chains} chains"

    @abstractmethod
    def emit(self, products: Products, weights: Sequence[Weights], unroll: int, chains: int) -> b.Registers:
        """Emit the sums of a group, i32 by slot, `unroll` quads at a time. chains: successive quads go to successive
        sums, so that with few rows the multiplier's latency is hidden."""


@dataclass(frozen=True)
class WideSums(Sums):
    """Dots go straight to i32, so that other work can stand between them."""

    def dtype(self, isa: VectorIsa) -> str:
        return isa.i32

    def add(self, isa: VectorIsa, total: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        return isa.dot(total, weights, activations, bits)

    def emit(self, products: Products, weights: Sequence[Weights], unroll: int, chains: int) -> b.Registers:
        isa, bits = products.isa, products.bits
        count = len(weights) * len(products.rows)
        sums = [b.Registers(count, isa.i32) for _ in range(chains)]
        for slot in range(count):
            sums[0][slot] = products.start(slot)
            for more in sums[1:]:
                more[slot] = splat(0, isa.lanes, "int32")
        with b.loop(products.quads // unroll) as several:
            for step, slot, w, a in products.operands(weights, several * unroll, unroll):
                chain = sums[step % chains]
                chain[slot] = isa.in_place(isa.dot(chain[slot], w, a, bits))
        for slot in range(count):
            for more in sums[1:]:
                sums[0][slot] = sums[0][slot] + more[slot]
        return sums[0]

    def emit_beside(
        self,
        products: Products,
        weights: Sequence[Weights],
        sums: b.Registers,
        unroll: int,
        others: Sequence[Callable[[], None]],
    ) -> None:
        """Emit the sums of a group into `sums`, by slot, and the pieces of other work between its products.

        A multiplication waits for nothing then: what the other work waits for has passed meanwhile.
        """
        lead = min(products.quads, BESIDE)
        for slot in range(len(weights) * len(products.rows)):
            sums[slot] = products.start(slot)
        self._add(products, weights, sums, b.index(0), lead, others)
        if products.quads > lead:
            with b.loop((products.quads - lead) // unroll) as several:
                self._add(products, weights, sums, lead + several * unroll, unroll, ())

    def _add(
        self,
        products: Products,
        weights: Sequence[Weights],
        sums: b.Registers,
        first: Expr,
        quads: int,
        others: Sequence[Callable[[], None]],
    ) -> None:
        """The products of `quads` quads; after each, its share of the other work."""
        isa, last = products.isa, len(weights) * len(products.rows) - 1
        for step, slot, w, a in products.operands(weights, first, quads):
            sums[slot] = isa.in_place(isa.dot(sums[slot], w, a, products.bits))
            if slot == last:
                for piece in others[step * len(others) // quads : (step + 1) * len(others) // quads]:
                    piece()


@dataclass(frozen=True)
class PairSums(Sums):
    """Sums of pairs of products are added in i16, then in i32.

    narrow: the instructions. held: how many of the sums i16 holds from zero on. whole: i16 hold a whole group, where
    they start from `centre` times the group's two sums of activations (`VectorIsa.pair_sums`), so that weights count
    from their centre on.
    """

    narrow: NarrowDots
    held: int
    whole: bool

    registers = 2

    @property
    def centre(self) -> int:  # type: ignore[override]
        return CENTRE if self.whole else 0

    def dtype(self, isa: VectorIsa) -> str:
        return isa.i16

    def add(self, isa: VectorIsa, total: Expr, weights: Expr, activations: Expr, bits: int) -> Expr:
        return total + self.narrow.dot_narrow(weights, activations)

    def refuse(self, unroll: int, chains: int) -> str:
        if unroll > self.held and not self.whole:
            return f"i16 hold {self.held} sums of two products, not {unroll}"
        return super().refuse(unroll, chains)

    def emit(self, products: Products, weights: Sequence[Weights], unroll: int, chains: int) -> b.Registers:
        return self._whole(products, weights) if self.whole else self._several(products, weights, unroll)

    def _several(self, products: Products, weights: Sequence[Weights], unroll: int) -> b.Registers:
        """`unroll` of them at a time."""
        isa, count = products.isa, len(weights) * len(products.rows)
        sums = b.Registers(count, isa.i32)
        for slot in range(count):
            sums[slot] = products.start(slot)
        with b.loop(products.quads // unroll) as several:
            pairs = b.Registers(count, isa.i16)
            for step, slot, w, a in products.operands(weights, several * unroll, unroll):
                dots = self.narrow.dot_narrow(w, a)
                pairs[slot] = isa.in_place(pairs[slot] + dots) if step else dots
            for slot in range(count):
                sums[slot] = self.narrow.widen(sums[slot], pairs[slot])
        return sums

    def _whole(self, products: Products, weights: Sequence[Weights]) -> b.Registers:
        isa, count = products.isa, len(weights) * len(products.rows)
        pairs = b.Registers(count, isa.i16)
        for slot in range(count):
            pairs[slot] = products.narrow_start(slot)
        for _, slot, w, a in products.operands(weights, b.index(0), products.quads):
            pairs[slot] = isa.in_place(pairs[slot] + self.narrow.dot_narrow(w, a))
        sums = b.Registers(count, isa.i32)
        for slot in range(count):
            sums[slot] = self.narrow.widen(products.start(slot), pairs[slot])
        return sums
