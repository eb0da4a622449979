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
    """A scalar constant, optionally a given one (to a relative 1e-5), seen through casts and broadcasts."""

    name: str = ""
    equals: float | None = None

    def matches(self, value: Value, bound: Bindings) -> Iterator[Bindings]:
        number = scalar_of(value)
        if number is None or (self.equals is not None and not np.isclose(number, self.equals, rtol=1e-5, atol=0)):
            return
        yield {**bound, self.name: value} if self.name else bound


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
class Either(Pattern):
    """Any of several patterns, the first that fits first."""

    options: tuple[Pattern, ...]

    def matches(self, value: Value, bound: Bindings) -> Iterator[Bindings]:
        for option in self.options:
            yield from option.matches(value, bound)


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


def scalar_of(value: Value) -> float | None:
    """The number that a constant holds everywhere, seen through casts, broadcasts and reshapes; None otherwise."""
    from llmc.compiler.ir.structural import Broadcast, Reshape

    while isinstance(value, (Cast, Broadcast, Reshape)):
        value = value.x
    if not isinstance(value, Constant) or value.value.array.size == 0:
        return None
    flat = value.value.array.reshape(-1)
    return float(flat[0]) if bool(np.all(flat == flat[0])) else None
