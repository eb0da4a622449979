"""Numbers for the elements of values: equal numbers are equal elements, whatever inputs and weights are.

What a graph computes twice gets one number: cos(cat(a, a)) has each of its numbers twice. Nothing is evaluated, so that
what holds for the numbers holds for every value that can occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import Dim, concrete, product
from llmc.compiler.ir.elementwise import Activation, Binary, Cast, Compare, Constant, Mul, Neg, Unary, Where
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Gather, GatherElements, Matmul, Reshape, Slice, Transpose
from llmc.compiler.ir.types import FLOATS, Shape
from llmc.compiler.passes.rewriting import widens

Numbers = NDArray[np.int64]
ONE = 1  # the number of the constant 1; 0 is that of 0
MOST = 1 << 20  # elements of a constant that are told apart by value, at most
_MOVES = (Reshape, Broadcast, Transpose, Slice)
_ELEMENTWISE = (Unary, Binary, Compare, Activation, Cast, Where)


class Element(NamedTuple):
    """What an element is: an op's result of other elements, by their numbers; or a constant (op None), by its value."""

    op: type[Op] | None
    attributes: tuple[object, ...] = ()
    operands: tuple[int, ...] = ()
    value: float = 0.0


class ElementNumbers:
    """Numbers of values of one graph, for the sizes in `binding`. -n is the number of minus the element n."""

    def __init__(self, binding: Mapping[str, int]) -> None:
        self.binding = dict(binding)
        self._of: dict[Value, Numbers] = {}
        one = Element(None, value=1.0)
        self._by_element: dict[Element, int] = {one: ONE}
        self._elements: dict[int, Element] = {ONE: one}
        self._last = ONE

    def shape(self, value: Value) -> tuple[int, ...]:
        """The value's shape for these sizes."""
        return tuple(concrete(dim, self.binding) for dim in value.shape)

    def of(self, value: Value) -> Numbers:
        """The numbers of a value's elements, in its shape."""
        stack = [value]
        while stack:
            top = stack[-1]
            if top in self._of:
                stack.pop()
                continue
            missing = [operand for operand in self._described_by(top) if operand not in self._of]
            if missing:
                stack.extend(missing)
                continue
            self._of[top] = self._number(top)
            stack.pop()
        return self._of[value]

    def element(self, number: int) -> Element | None:
        """What the element of this number, or minus it, is; None where nothing is known of it."""
        return self._elements.get(abs(number))

    def unscaled(self, number: int) -> Iterator[tuple[float, int]]:
        """(scale, other number > 0) with scale times the other element being this one: itself, then what it is a
        product of, as long as the other factor is a constant. Products of whole numbers are not taken apart: they may
        overflow."""
        scale = 1.0 if number > 0 else -1.0
        while True:
            yield scale, abs(number)
            element = self.element(number)
            if element is None or element.op is not Mul or element.attributes:  # floats have none: see `times`
                return
            constants = [self.element(operand) for operand in element.operands]
            known = [i for i, item in enumerate(constants) if item is not None and item.op is None]
            if len(known) != 1:
                return
            constant, number = constants[known[0]], element.operands[1 - known[0]]
            assert constant is not None
            scale *= constant.value  # factors are numbers of elements without their signs

    def times(self, a: Numbers, b: Numbers) -> Numbers:
        """The numbers of products, element by element."""
        a, b = np.broadcast_arrays(a, b)
        low = np.asarray(np.minimum(np.abs(a), np.abs(b)))
        products = np.array(np.maximum(np.abs(a), np.abs(b)))  # what it is where the other factor is 1
        high = products.copy()
        rest = low > ONE
        if rest.any():
            products[rest] = self._combined(Element(Mul), [low[rest], high[rest]])
        return np.asarray(np.sign(a) * np.sign(b) * products)

    @staticmethod
    def _described_by(value: Value) -> tuple[Value, ...]:
        """The operands that say what a value's elements are; none for what gets numbers of its own.

        Such is what moves elements along an axis of free size: for these sizes two of its elements may be one, and for
        others not.
        """
        if moves_along_free_axes(value):
            return ()
        if isinstance(value, (*_MOVES, *_ELEMENTWISE, Concat)):
            return value.operands
        if isinstance(value, Gather) and isinstance(value.indices, Constant):
            return (value.x,)
        if isinstance(value, Matmul) and value.a.shape[-1] == 1:
            return value.operands
        return ()

    def _number(self, value: Value) -> Numbers:
        if isinstance(value, Constant) and value.value.array.size <= MOST:
            return self._constants(value)
        if not isinstance(value, Op) or not self._described_by(value):
            return self._fresh(self.shape(value))
        given = [self._of[operand] for operand in self._described_by(value)]
        if isinstance(value, (*_MOVES, Concat)):
            return np.asarray(value.bind(self.binding).evaluate(*given))
        if isinstance(value, Gather):
            assert isinstance(value.indices, Constant)
            return np.asarray(np.take(given[0], value.indices.value.array, axis=value.axis))
        if isinstance(value, Neg):
            return -given[0]
        if widens(value):
            return given[0]
        if isinstance(value, (Mul, Matmul)) and value.dtype in FLOATS:  # a product of one column and one row
            return self.times(*given)
        attributes = (value.dtype, *sorted(value.attributes().items()))
        spread = np.broadcast_arrays(*given)
        flat = self._combined(Element(type(value), attributes), [part.reshape(-1) for part in spread])
        return flat.reshape(self.shape(value))

    def _combined(self, what: Element, operands: list[Numbers]) -> Numbers:
        """Numbers of an op's results, from those of its operands [n]."""
        rows, place = np.unique(np.stack(operands, axis=1), axis=0, return_inverse=True)
        named = [self._named(what._replace(operands=tuple(row))) for row in rows.tolist()]
        return np.array(named, np.int64)[place.reshape(-1)]

    def _constants(self, value: Constant) -> Numbers:
        array = np.asarray(value.value.array)
        if array.dtype.kind not in "fiub" and value.dtype not in ("f16", "bf16"):
            return self._fresh(array.shape)
        found, place = np.unique(array.astype(np.float64).reshape(-1), return_inverse=True)
        if not np.isfinite(found).all():
            return self._fresh(array.shape)
        numbers = [
            0 if x == 0 else self._named(Element(None, value=abs(x))) * (1 if x > 0 else -1) for x in found.tolist()
        ]
        return np.array(numbers, np.int64)[place.reshape(-1)].reshape(array.shape)

    def _named(self, element: Element) -> int:
        if element not in self._by_element:
            self._last += 1
            self._by_element[element] = self._last
            self._elements[self._last] = element
        return self._by_element[element]

    def _fresh(self, shape: tuple[int, ...]) -> Numbers:
        count = int(np.prod(shape, dtype=np.int64))
        first = self._last + 1
        self._last += count
        return np.arange(first, first + count, dtype=np.int64).reshape(shape)


def moves_along_free_axes(value: Value) -> bool:
    """Whether an op puts elements at other places of an axis of free size, as no one size of it shows."""
    if isinstance(value, Slice):
        return any(isinstance(size, Dim) for size in (value.x.shape[value.axis], value.start, value.stop))
    if isinstance(value, Concat):
        return any(isinstance(x.shape[value.axis], Dim) for x in value.xs)
    if isinstance(value, Gather):
        return isinstance(value.x.shape[value.axis], Dim)
    return isinstance(value, Reshape) and _free_axes(value.x.shape) != _free_axes(value.shape)


def each_token_alone(op: Op) -> bool:
    """Whether an element of the result is made of elements at the same place of every axis of free size.

    What positions decide through such ops alone may be evaluated for any of them, in any order.
    """
    if not any(isinstance(dim, Dim) for value in (op, *op.operands) for dim in value.shape):
        return True
    if isinstance(op, Matmul):
        return not isinstance(op.a.shape[-1], Dim)
    if isinstance(op, (Gather, GatherElements)):
        return not isinstance(op.x.shape[op.axis], Dim)
    return isinstance(op, (*_MOVES, *_ELEMENTWISE, Concat)) and not moves_along_free_axes(op)


def _free_axes(shape: Shape) -> list[tuple[int | Dim, int | Dim]]:
    """The axes of free size, each with the elements after it; (0, 0) for one with nothing before it."""
    return [
        (0, 0) if product(shape[:axis]) == 1 else (dim, product(shape[axis + 1 :]))
        for axis, dim in enumerate(shape)
        if isinstance(dim, Dim)
    ]
