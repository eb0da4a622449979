"""Structural patterns over values, for recognisers.

    x, eps = Var("x"), Const("eps")
    found = match(op, Node(Mul, x, Node(Rsqrt, Node(Add, Node(Mean, ...), eps))))
    found["x"]

Operands of commutative ops match in either order. A variable that appears twice must match one value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.elementwise import Binary, Cast, Constant
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Reshape
from llmc.compiler.ir.types import NUMPY_DTYPES

Number = int | float | bool
Bindings = dict[str, Value]


class Pattern:
    """Base: `matches` yields every way in which the pattern fits, as extended bindings."""

    def matches(self, value: Value, bound: Bindings) -> Iterator[Bindings]:
        raise AssertionError


@dataclass(frozen=True)
class Var(Pattern):
    """Any value, optionally one for which `where` holds."""

    name: str
    where: Callable[[Value], bool] | None = None

    def matches(self, value: Value, bound: Bindings) -> Iterator[Bindings]:
        if self.name in bound:
            if bound[self.name] is value:
                yield bound
            return
        if self.where is None or self.where(value):
            yield {**bound, self.name: value}


@dataclass(frozen=True)
class Const(Pattern):
    """A constant that is one number everywhere (see `number_of`)."""

    name: str

    def matches(self, value: Value, bound: Bindings) -> Iterator[Bindings]:
        if number_of(value) is not None:
            yield {**bound, self.name: value}


class Node(Pattern):
    """An op of a class (or one of several), its operand patterns, and optionally a name and a check of attributes."""

    def __init__(
        self,
        kinds: type[Op] | tuple[type[Op], ...],
        *operands: Pattern,
        name: str = "",
        where: Callable[[Op], bool] | None = None,
    ) -> None:
        self.kinds, self.operands, self.name, self.where = kinds, operands, name, where

    def matches(self, value: Value, bound: Bindings) -> Iterator[Bindings]:
        if not isinstance(value, self.kinds) or (self.where is not None and not self.where(value)):
            return
        operands = value.operands
        if len(operands) != len(self.operands):
            return
        orders = [operands]
        if isinstance(value, Binary) and value.commutative and operands[0] is not operands[1]:
            orders.append(operands[::-1])
        for order in orders:
            for found in _all(self.operands, order, bound):
                yield {**found, self.name: value} if self.name else found


@dataclass(frozen=True)
class Through(Pattern):
    """A pattern seen through any number of ops of some kinds with one operand (casts, reshapes)."""

    kinds: tuple[type[Op], ...]
    inner: Pattern

    def matches(self, value: Value, bound: Bindings) -> Iterator[Bindings]:
        yield from self.inner.matches(value, bound)
        while isinstance(value, self.kinds):
            value = value.operands[0]
            yield from self.inner.matches(value, bound)


def _all(patterns: tuple[Pattern, ...], values: tuple[Value, ...], bound: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    for found in patterns[0].matches(values[0], bound):
        yield from _all(patterns[1:], values[1:], found)


def match(value: Value, pattern: Pattern) -> Bindings | None:
    """The first way in which the pattern fits, or None."""
    return next(pattern.matches(value, {}), None)


def number_of(value: Value) -> Number | None:
    """The number that a constant holds everywhere, seen through casts (applied), broadcasts and reshapes."""
    casts: list[str] = []
    while isinstance(value, (Cast, Broadcast, Reshape)):
        if isinstance(value, Cast):
            casts.append(value.to)
        value = value.x
    if not isinstance(value, Constant) or value.value.array.size == 0:
        return None
    flat = value.value.array.reshape(-1)
    if flat.size > 1 and not bool(np.all(flat == flat[0])):
        return None
    scalar = flat[0]
    for dtype in reversed(casts):
        scalar = scalar.astype(NUMPY_DTYPES[dtype])
    if isinstance(scalar, (np.bool_, np.integer)):
        return bool(scalar) if isinstance(scalar, np.bool_) else int(scalar)
    return float(scalar)
