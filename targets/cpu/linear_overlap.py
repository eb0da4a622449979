"""Two halves of a block of integer sums, of which one becomes results while the other is multiplied.

The sums of a group are scaled and added to f32 totals: a conversion, two multiplications, a load and a store for each
vector of sums, all of which wait for the group's last products. A core looks a hundred instructions ahead or two, and
that is less than a group: multipliers idled a tenth of the time of 512 rows, groups of 64 (docs/adr/0037). Here the
scaling of one half is spread in pieces over the products of the other half's first quads: its sums were ready before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.group_sums import Weights, WideSums
from llmc.targets.cpu.linear_products import GroupSums, KnownRows, Operands
from llmc.targets.cpu.tile_slices import TileSlice
from llmc.targets.cpu.vectors import splat, store

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr


@dataclass(frozen=True)
class Place:
    """Where sums belong: the first of their rows in `KnownRows` and in the totals, and their group in `KnownRows`."""

    row: Expr
    total: Expr
    position: Expr


class LatePlace:
    """Where the second half's sums belong, in variables: they become results when the next group is multiplied.

    At first there are none: what becomes of the zeros goes to spare rows of totals, which begin at row `spare`.
    """

    def __init__(self, spare: int) -> None:
        self.row, self.total, self.position = (b.Scalar("int64", start) for start in (0, spare, 0))

    def set(self, place: Place) -> None:
        """They are these now."""
        self.row.set(place.row)
        self.total.set(place.total)
        self.position.set(place.position)

    def get(self) -> Place:
        """As they are now."""
        return Place(self.row.get(), self.total.get(), self.position.get())


class Half:
    """Half of a panel's slices, from number `first` on, and the integer sums of `rows` rows with them."""

    def __init__(
        self, ops: Operands, known: KnownRows, totals: Buffer, rows: int, first: int, slices: Sequence[TileSlice]
    ) -> None:
        self.ops, self.known, self.totals, self.rows = ops, known, totals, rows
        self.first, self.slices = first, slices
        self.sums = b.Registers(len(slices) * rows, ops.isa.i32)
        for slot in range(len(slices) * rows):
            self.sums[slot] = splat(0, ops.isa.lanes, "int32")

    def multiply(
        self, products: GroupSums, weights: Sequence[Weights], unroll: int, others: Sequence[Callable[[], None]]
    ) -> None:
        """Emit the sums of a group, with pieces of the other half's work between the products."""
        assert isinstance(self.known.sums, WideSums)
        self.known.sums.emit_beside(products, weights, self.sums, unroll, others)

    def results(self, place: Place, first_group: Expr) -> list[Callable[[], None]]:
        """What adds the sums, scaled, to the totals: one piece for each vector of sums."""
        factors: dict[int, tuple[Expr, Expr | None]] = {}  # a slice's scales and minimums, once for all rows
        group = first_group + place.position

        def piece(s: int, m: int) -> None:
            if m == 0:
                at, symmetric = self.slices[s], self.ops.layout.symmetric
                minimum = None if symmetric else b.let(self.ops.minimum(at, group))
                factors[s] = b.let(self.ops.per_group("scales", at, group)), minimum
            row = self.known.factors(place.row + m, place.position)
            where = (place.total + m, self.first + s)
            whole = self.ops.scaled(self.totals[where], self.sums[s * self.rows + m], row, *factors[s])
            store(self.totals, where, self.ops.isa.in_place(whole))

        return [lambda s=s, m=m: piece(s, m) for s in range(len(self.slices)) for m in range(self.rows)]  # type: ignore[misc]
