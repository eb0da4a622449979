"""Linear maps in a graph: what one value is a linear function of, where all of it passes through, and its matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.elementwise import Add, Cast, Mul, Neg, Sub
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Concat, Reshape, Slice, Transpose
from llmc.compiler.passes.element_numbers import ONE, ElementNumbers, Numbers

REACH = 48  # ops in a map, at most
_MOST_TERMS = 4  # that one element is the sum of, at most


@dataclass(frozen=True)
class Term:
    """What is added into each element of y: an element of x, by its place in x's flat array, times a coefficient, by
    its number (`ElementNumbers`; 0: nothing is added). Both have y's shape."""

    source: Numbers
    coefficient: Numbers


class LinearMaps:
    """Base: says by `linear_operands` and `is_map_op` what counts as linear, and where the map itself begins."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.index: dict[Value, int] = {op: i for i, op in enumerate(graph.ops)}

    def linear_operands(self, value: Value) -> tuple[Value, ...]:
        """The operands that `value` is a linear function of; none where it is not such a function."""
        raise AssertionError

    def is_map_op(self, op: Value) -> bool:
        """Whether this op belongs to the map: what is before the first such op is the map's source."""
        raise AssertionError

    def terms(self, x: Value, nodes: Sequence[Value], numbers: ElementNumbers) -> list[Term] | None:
        """The last of `nodes` as a sum of terms in x, where `nodes` are the ops after x in order; None for too many."""
        shape = numbers.shape(x)
        places = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64).reshape(shape)
        found: dict[Value, list[Term]] = {x: [Term(places, np.full(shape, ONE, np.int64))]}
        for value in nodes:
            assert isinstance(value, Op)
            own = [found[operand] for operand in self.linear_operands(value)]
            found[value] = _terms(value, own, self.linear_operands(value), numbers)
            if len(found[value]) > _MOST_TERMS:
                return None
        return found[nodes[-1]]

    def linear_users(self, start: Op) -> list[Op]:
        """What is a linear function of `start`, through REACH ops at most, in order."""
        found: set[Op] = set()
        stack = [start]
        while stack and len(found) < REACH:
            value = stack.pop()
            for user in self.graph.users.get(value, ()):
                if user not in found and value in self.linear_operands(user):
                    found.add(user)
                    stack.append(user)
        return sorted(found, key=lambda op: self.index[op])

    def cone(self, y: Op) -> tuple[list[Value], Value] | None:
        """The ops between y and the one value that it is a linear function of, in order; None when there are two."""
        nodes: set[Value] = set()
        leaves: set[Value] = set()
        stack: list[Value] = [y]
        while stack:
            value = stack.pop()
            if value in nodes or value in leaves:
                continue
            operands = self.linear_operands(value)
            if operands:
                nodes.add(value)
                stack.extend(operands)
            else:
                leaves.add(value)
            if len(leaves) > 1 or len(nodes) > REACH:
                return None
        leaf = leaves.pop()
        return sorted(nodes, key=self.index.__getitem__), leaf

    def source(self, y: Op) -> tuple[Value, list[Value]] | None:
        """The last value through which all of y passes before it is turned; and the ops after it.

        It has y's shape, or more channels: other slices of it need not be y's.
        """
        cone = self.cone(y)
        if cone is None:
            return None
        nodes, leaf = cone
        order = [leaf, *nodes]
        place = {value: i for i, value in enumerate(order)}
        last_use = [0] * len(order)
        for i, value in enumerate(nodes, start=1):
            for operand in self.linear_operands(value):
                last_use[place[operand]] = i
        found: tuple[Value, list[Value]] | None = None
        reaches = 0  # the last use of any value before the present one
        for i, value in enumerate(order):
            if isinstance(value, Op) and self.is_map_op(value) and i > 0:
                break
            if reaches <= i and value is not y and holds_channels(value, y):
                found = value, order[i + 1 :]
            reaches = max(reaches, last_use[i])
        return found


def holds_channels(x: Value, y: Value) -> bool:
    """Whether x has y's type, or more channels."""
    if x.type == y.type:
        return True
    a, b = x.shape[-1], y.shape[-1]
    return x.dtype == y.dtype and x.shape[:-1] == y.shape[:-1] and isinstance(a, int) and isinstance(b, int) and a > b


def _terms(op: Op, own: list[list[Term]], linear: tuple[Value, ...], numbers: ElementNumbers) -> list[Term]:
    """The terms of one op's result; own: those of its linear operands."""
    if isinstance(op, (Reshape, Transpose, Slice)):
        moved = op.bind(numbers.binding)
        return [Term(moved.evaluate(term.source), moved.evaluate(term.coefficient)) for term in own[0]]
    if isinstance(op, Concat):
        bound = op.bind(numbers.binding)
        count = max(len(terms) for terms in own)
        padded = [[*terms, *[Term(terms[0].source, 0 * terms[0].source)] * (count - len(terms))] for terms in own]
        rows = zip(*padded, strict=True)
        return [Term(bound.evaluate(*(t.source for t in r)), bound.evaluate(*(t.coefficient for t in r))) for r in rows]
    shape = numbers.shape(op)
    spread = [[Term(*(np.broadcast_to(a, shape) for a in (t.source, t.coefficient))) for t in terms] for terms in own]
    if isinstance(op, Neg):
        return [Term(term.source, -term.coefficient) for term in spread[0]]
    if isinstance(op, Cast):
        return spread[0]
    if isinstance(op, (Add, Sub)):
        sign = -1 if isinstance(op, Sub) else 1
        return [*spread[0], *(Term(term.source, sign * term.coefficient) for term in spread[1])]
    assert isinstance(op, Mul)
    factor = numbers.of(op.b if linear[0] is op.a else op.a)
    return [Term(term.source, numbers.times(term.coefficient, factor)) for term in spread[0]]
