"""Where each element of a moved value comes from: reshapes, transposes and broadcasts followed digit by digit.

An index into an axis is a number of several digits, as a reshape splits it: [batch, S, heads * dim] has three axes and
four digits. Every step permutes digits, splits one, or adds one that the value does not depend on (a repetition). What
cannot be said so (a reshape that cuts across digits) is not followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.compiler.ir.dims import Dim, exact_division, product
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Broadcast, Reshape, Transpose
from llmc.compiler.ir.types import Shape

MOVES = (Reshape, Transpose, Broadcast)


@dataclass(eq=False)
class Digit:
    """One digit of an index, larger than 1. repeated: the source has no such digit."""

    size: int | Dim
    repeated: bool = False
    parts: tuple[Digit, Digit] | None = None  # the digits that it turned out to consist of, the first one is the higher

    def leaves(self) -> list[Digit]:
        return [self] if self.parts is None else [leaf for part in self.parts for leaf in part.leaves()]

    def split(self, lower: int | Dim) -> tuple[Digit, Digit] | None:
        """The digit as two, of which the lower one has `lower` values; None where that does not divide it."""
        higher = exact_division(self.size, lower)
        if higher is None:
            return None
        self.parts = Digit(higher, self.repeated), Digit(lower, self.repeated)
        return self.parts


class Layout:
    """The digits of a value's axes, all of them known by the source's."""

    def __init__(self, source: Shape) -> None:
        self.source_axes = [[Digit(dim)] if dim != 1 else [] for dim in source]
        self.axes = [list(axis) for axis in self.source_axes]

    def source(self) -> list[list[Digit]]:
        """The source's axes, in the digits that they have been split into."""
        return [[leaf for digit in axis for leaf in digit.leaves()] for axis in self.source_axes]

    def follow(self, op: Value) -> bool:
        """Take one step; False where it cannot be followed."""
        if isinstance(op, Transpose):
            self.permute(op.permutation)
            return True
        if isinstance(op, Broadcast):
            self.broadcast(op.shape)
            return True
        return isinstance(op, Reshape) and self.reshape(op.to)

    def permute(self, order: Sequence[int]) -> None:
        self.axes = [self.axes[axis] for axis in order]

    def broadcast(self, shape: Shape) -> None:
        """Repeat axes of size 1, and put new ones in front."""
        own: list[list[Digit]] = [[] for _ in range(len(shape) - len(self.axes))] + self.axes
        self.axes = [
            [Digit(dim, repeated=True)] if not axis and dim != 1 else axis for axis, dim in zip(own, shape, strict=True)
        ]

    def reshape(self, to: Shape) -> bool:
        """Deal the digits out to other axes, from the last to the first; False where one would be cut unevenly."""
        left = [digit for axis in self.axes for digit in axis]
        axes: list[list[Digit]] = []
        for dim in reversed(to):
            wanted: int | Dim = dim
            axis: list[Digit] = []
            while wanted != 1:
                if not left:
                    return False
                digit = left.pop()
                rest = exact_division(wanted, digit.size)
                if rest is None:
                    parts = digit.split(wanted)
                    if parts is None:
                        return False
                    left.append(parts[0])
                    digit, rest = parts[1], 1
                axis.insert(0, digit)
                wanted = rest
            axes.insert(0, axis)
        self.axes = axes
        return not left

    def leaves(self, axis: int) -> list[Digit]:
        """The digits of one axis of the value."""
        return [leaf for digit in self.axes[axis] for leaf in digit.leaves()]


def arranged(source: Value, axes: list[list[Digit]], wanted: list[Digit], shape: Shape) -> Value:
    """`source`, whose axes have these digits, with its elements in the order of the `wanted` digits, in a shape.

    A transpose where the order is another one; in front of it a reshape where an axis has to be taken apart.
    """
    if [digit for axis in axes for digit in axis] != wanted:
        moved = [i for i, axis in enumerate(axes) if axis]
        moved.sort(key=lambda i: wanted.index(axes[i][0]))
        if [digit for i in moved for digit in axes[i]] != wanted:
            digits = [digit for axis in axes for digit in axis]
            source = Reshape(source, tuple(digit.size for digit in digits))
            order = tuple(digits.index(digit) for digit in wanted)
        else:  # axes of size 1 stay in front
            order = (*(i for i, axis in enumerate(axes) if not axis), *moved)
        source = Transpose(source, order)
    return source if source.shape == shape else Reshape(source, shape)


def size_of(digits: Sequence[Digit]) -> int | Dim:
    """How many values the digits have together."""
    return product(tuple(digit.size for digit in digits))
