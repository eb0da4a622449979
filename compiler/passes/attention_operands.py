"""Where queries, keys and values of an attention come from: traced back to where they are smallest.

Reshapes, transposes, repetitions and scalings between a source and a product are followed digit by digit (see
`layouts`), so that it is known which head of the source each head of the product is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.elementwise import Div, Mul
from llmc.compiler.ir.llm import Rope
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Broadcast, Reshape
from llmc.compiler.ir.types import Shape
from llmc.compiler.passes.layouts import MOVES, Digit, Layout, arranged, size_of
from llmc.compiler.passes.rewriting import number_of

Finish = Callable[[Layout], bool]


@dataclass(frozen=True)
class Heads:
    """[*batch, rows, heads, dim] of an operand: `source` rearranged and rotated; it lacks a `factor`.

    repeat: the shape that the source is broadcast to first. axes: the source's digits; wanted: their order.
    """

    source: Value
    axes: list[list[Digit]]
    wanted: list[Digit]
    shape: Shape
    heads: int
    factor: float = 1.0
    repeat: Shape | None = None
    rope: Rope | None = None

    def build(self, new: dict[Value, Value]) -> Value:
        """The value in the new graph, where `new` maps the old graph's values."""
        source = new.get(self.source, self.source)
        if self.repeat is not None and source.shape != self.repeat:
            source = Broadcast(source, self.repeat)
        if self.rope is None:
            return arranged(source, self.axes, self.wanted, self.shape)
        flat = (product(self.shape[:-2]), *self.shape[-2:])
        angles = new.get(self.rope.angles, self.rope.angles)
        turned: Value = Rope(arranged(source, self.axes, self.wanted, flat), angles, self.rope.interleaved)
        return turned if turned.shape == self.shape else Reshape(turned, self.shape)


@dataclass(frozen=True)
class Operand:
    """An operand [..., rows, dim] (transposed: [..., dim, rows]) of a product [*leading, ...] of [*batch, heads]."""

    value: Value
    leading: Shape
    transposed: bool
    batch: Shape
    heads: int
    scalable: bool  # whether factors may be left out

    @property
    def rows_and_dim(self) -> tuple[int | Dim, int | Dim]:
        first, second = self.value.shape[-2:]
        return (second, first) if self.transposed else (first, second)

    def traced(self, shared: bool) -> Heads | None:
        """The earliest value with every head; with all of `heads` unless they may be `shared`. None: not clear."""
        rows, dim = self.rows_and_dim

        def finish(layout: Layout) -> bool:
            if self.transposed:
                layout.axes[-2:] = layout.axes[:-3:-1]
            layout.broadcast((*self.leading, rows, dim))
            return layout.reshape((*self.batch, self.heads, rows, dim))

        found = self._search(self.value, finish, shared)
        if found is None:
            return self._repeated()
        if isinstance(found.source, Rope) and shared and found.heads == self.heads and _in_order(found):
            # Heads that are repeated and then rotated alike are rotated once.
            inner = self._search(found.source.x, self._finish_tokens, shared)
            if inner is not None and inner.heads < self.heads:
                return replace(inner, factor=found.factor * inner.factor, rope=found.source)
        return found

    def _finish_tokens(self, layout: Layout) -> bool:
        """[tokens, heads, dim] to [*batch, heads, rows, dim]."""
        rows, dim = self.rows_and_dim
        if not layout.reshape((*self.batch, rows, self.heads, dim)):
            return False
        layout.axes[-3], layout.axes[-2] = layout.axes[-2], layout.axes[-3]
        return True

    def _search(self, value: Value, finish: Finish, shared: bool) -> Heads | None:
        steps = list(_origins(value, self.scalable))
        for count in reversed(range(len(steps))):
            found = self._as_heads(steps[count][0], [op for op, _ in steps[:count]][::-1], finish)
            if found is not None and (shared or found.heads == self.heads):
                return replace(found, factor=steps[count][1])
        return None

    def _as_heads(self, source: Value, steps: list[Value], finish: Finish) -> Heads | None:
        """`source`, if every head at the end of the steps is one of its heads, in groups."""
        layout = Layout(source.shape)
        if not all(layout.follow(op) for op in steps if isinstance(op, MOVES)) or not finish(layout):
            return None
        count = len(self.batch)
        outer = [digit for axis in range(count) for digit in layout.leaves(axis)]
        heads, rows, dim = (layout.leaves(count + i) for i in range(3))
        own = [digit for digit in heads if not digit.repeated]
        if any(digit.repeated for digit in (*outer, *heads[: len(own)], *rows, *dim)):
            return None
        size = size_of(own)
        if not isinstance(size, int):
            return None
        shape = (*(self.batch or (1,)), self.rows_and_dim[0], size, self.rows_and_dim[1])
        return Heads(source, layout.source(), [*outer, *rows, *own, *dim], shape, size)

    def _repeated(self) -> Heads | None:
        """The operand itself, repeated as the product repeats it."""
        full = (*self.leading, *self.value.shape[-2:])
        layout = Layout(full)
        if self.transposed:
            layout.axes[-2:] = layout.axes[:-3:-1]
        rows, dim = self.rows_and_dim
        if not layout.reshape((*self.batch, self.heads, rows, dim)):
            return None
        count = len(self.batch)
        order = [*range(count), count + 1, count, count + 2]
        wanted = [digit for axis in order for digit in layout.leaves(axis)]
        shape = (*(self.batch or (1,)), rows, self.heads, dim)
        return Heads(self.value, layout.source(), wanted, shape, self.heads, repeat=full)


def _in_order(found: Heads) -> bool:
    return [digit for axis in found.axes for digit in axis] == found.wanted


def _origins(value: Value, scalable: bool) -> Iterator[tuple[Value, float]]:
    """The value and what it is moved, repeated or (if `scalable`) scaled from, and the factor that is lost by that."""
    factor = 1.0
    yield value, factor
    while isinstance(value, MOVES) or (scalable and isinstance(value, (Mul, Div))):
        if isinstance(value, MOVES):
            value = value.x
        else:
            before, scale = value.a, _number(value.b)
            if scale is None and isinstance(value, Mul):
                before, scale = value.b, _number(value.a)
            if scale is None or scale == 0 or before.shape != value.shape:
                return
            factor = factor * scale if isinstance(value, Mul) else factor / scale
            value = before
        yield value, factor


def _number(value: Value) -> float | None:
    number = number_of(value)
    return None if number is None else float(number)
