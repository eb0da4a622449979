"""fuse-attention: matmul, mask, softmax, matmul become `llm.attention`, whatever stands between them.

The scores' function is recognised by its values (see `masks`), and so is which head reads which key head: queries, keys
and values are traced back through reshapes, transposes, broadcasts and scalings to where they are smallest, and the
tracing is checked by following every element. The result is [1, S, heads, dim], moved back to the source's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.elementwise import (
    Activation,
    Add,
    Binary,
    Cast,
    Compare,
    Div,
    Exp,
    Mul,
    Neg,
    Reciprocal,
    Sub,
    Unary,
    Where,
    constant,
)
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention, Rope, static
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Matmul, Max, Reshape, Slice, Softmax, Sum, Transpose
from llmc.compiler.ir.types import FLOATS, Array, Shape
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.masks import Scores, Unrecognised, describe_scores
from llmc.compiler.passes.probe import Probe
from llmc.compiler.passes.rewriting import number_of
from llmc.errors import IRError

ByHead = Callable[[Array], Array]


@dataclass(frozen=True)
class _Heads:
    """[1, S, heads, dim] of a traced value: `source` transposed by `order`, reshaped, rotated; it lacks a `factor`."""

    source: Value
    order: tuple[int, ...]
    heads: int
    dim: int
    factor: float
    rope: Rope | None = None

    def build(self, new: dict[Value, Value], size: Dim) -> Value:
        """The value in the new graph, where `new` maps the old graph's values."""
        source = new.get(self.source, self.source)
        moved = source if self.order == tuple(range(source.rank)) else Transpose(source, self.order)
        shape = (1, size, self.heads, self.dim)
        if self.rope is not None:
            angles = new.get(self.rope.angles, self.rope.angles)
            moved = Rope(_shaped(moved, shape[1:]), angles, self.rope.interleaved)
        return _shaped(moved, shape)


def _shaped(value: Value, shape: Shape) -> Value:
    return value if value.shape == shape else Reshape(value, shape)


@dataclass(frozen=True)
class _Found:
    """One attention: its parts, and the op whose value it replaces."""

    q: _Heads
    k: _Heads
    v: _Heads
    scores: Scores
    sinks: Value | None
    result: Op


@dataclass(frozen=True)
class FuseAttention(Pass, name="fuse-attention"):
    """No options."""

    def run(self, graph: Graph, report: Report) -> Graph:
        probe = Probe(graph)
        size = probe.size
        if size is None:
            return graph
        finder = _Finder(graph, probe, size)
        found: dict[Op, _Found] = {}
        for op in graph.ops:
            logits = softmax_operand(op)
            if logits is None or not probe.has_size(op) or probe.is_positional(op) or probe.is_constant(op):
                continue
            try:
                attention = finder.find(op, logits)
            except Unrecognised as reason:
                report.refuse(op, str(reason))
                continue
            found[attention.result] = attention
            report.hit("attention")
        new: dict[Value, Value] = {}
        for op in graph.ops:
            rebuilt: Value = op.map_operands(lambda value: new.get(value, value))
            if op in found:
                rebuilt = _build(found[op], new, size)
            if rebuilt is not op:
                new[op] = rebuilt
        return graph.replace_outputs((name, new.get(value, value)) for name, value in graph.outputs)


def _build(found: _Found, new: dict[Value, Value], size: Dim) -> Value:
    q, k, v = (part.build(new, size) for part in (found.q, found.k, found.v))
    mask = found.scores.mask
    result: Value = Attention(
        q, k, v, found.sinks, None if mask.slopes is None else constant(mask.slopes, "f32"),
        scale=found.scores.scale * found.q.factor * found.k.factor, causal=mask.causal, window=mask.window,
        softcap=found.scores.softcap,
    )  # fmt: skip
    return _shaped(Transpose(result, (0, 2, 1, 3)), found.result.shape)


def softmax_operand(op: Op) -> Value | None:
    """x where `op` is softmax(x) over the last axis, also written as exp(x - max(x)) / sum(exp(x - max(x)))."""
    if isinstance(op, Softmax):
        return op.x if op.axis % op.rank == op.rank - 1 else None
    exponential: Value | None = None
    if isinstance(op, Div):
        exponential, total = op.a, op.b
    elif isinstance(op, Mul):
        for a, b in ((op.a, op.b), (op.b, op.a)):
            if isinstance(b, Reciprocal):
                exponential, total = a, b.x
    if not isinstance(exponential, Exp) or not isinstance(total, Sum) or total.x is not exponential:
        return None
    if not total.keep or _axes(total) != (op.rank - 1,):
        return None
    return without_maximum(exponential.x)


def without_maximum(value: Value) -> Value:
    """x where value is x - max(x, -1); a softmax does not see the difference."""
    if not isinstance(value, (Add, Sub)):
        return value
    largest = value.b if isinstance(value, Sub) else None
    if isinstance(value, Add):
        largest = next((v.x for v in (value.b, value.a) if isinstance(v, Neg)), None)
    if isinstance(largest, Max) and largest.keep and _axes(largest) == (value.rank - 1,):
        other = value.a if isinstance(value, Sub) or largest is getattr(value.b, "x", None) else value.b
        return other if largest.x is other else value
    return value


def _axes(op: Max | Sum) -> tuple[int, ...]:
    return tuple(sorted(axis % op.x.rank for axis in op.axes))


class _Finder:
    """Finds the attention around a softmax."""

    def __init__(self, graph: Graph, probe: Probe, size: Dim) -> None:
        self.graph, self.probe, self.size = graph, probe, size

    def acts(self, value: Value) -> bool:
        """Whether the value depends on what the tokens are."""
        return bool(self.probe.sources.get(value, frozenset()) - {"positions", "@"})

    def find(self, softmax: Op, logits: Value) -> _Found:
        """The attention; Unrecognised says what is in the way."""
        scores, column = self._split_sinks(without_maximum(logits))
        if scores.shape[-2:] != (self.size, self.size):
            raise Unrecognised(f"a softmax over {scores.type} is not over the keys of every query")
        raw = self._product(scores)
        heads = product(raw.shape[:-2])
        if not isinstance(heads, int) or product(scores.shape[:-2]) != heads or raw.shape[-2:] != scores.shape[-2:]:
            raise Unrecognised(f"products {raw.type} and scores {scores.type} differ in shape")
        weighted = self._weighted(softmax, column is not None)
        v_heads = product(weighted.shape[:-2])
        if v_heads != heads:
            raise Unrecognised(f"{heads} heads of scores meet {v_heads} heads of values")
        description = describe_scores(self.probe, raw, scores, heads, column is not None)
        sinks = None if column is None else self._sinks(column, heads)
        q = self._traced(raw.a, raw, False, heads, scalable=True)
        k = self._traced(raw.b, raw, True, heads, scalable=True)
        v = self._traced(weighted.b, weighted, False, heads, scalable=False)
        if q.heads != heads:
            raise Unrecognised(f"{q.heads} heads of queries are shared by {heads}")
        if k.heads != v.heads:
            # The one with fewer heads is the one that was traced further; take both as they reach the products.
            k = self._traced(raw.b, raw, True, heads, scalable=True, shared=False)
            v = self._traced(weighted.b, weighted, False, heads, scalable=False, shared=False)
        return _Found(q, k, v, description, sinks, weighted)

    def _split_sinks(self, logits: Value) -> tuple[Value, Value | None]:
        """The scores, and the column of sinks [..., S, 1] that is concatenated to them."""
        if not isinstance(logits, Concat) or logits.axis % logits.rank != logits.rank - 1:
            return logits, None
        if len(logits.xs) != 2 or logits.xs[1].shape[-1] != 1 or self.acts(logits.xs[1]):
            raise Unrecognised("something other than one column of sinks is concatenated to its scores")
        return without_maximum(logits.xs[0]), logits.xs[1]

    def _sinks(self, column: Value, heads: int) -> Value:
        """Sinks [heads] from their column [..., heads, S, 1]."""
        value = column
        while isinstance(value, (Broadcast, Reshape)) and product(value.shape) != heads:
            value = value.x
        if not self.probe.is_constant(value) or product(value.shape) != heads:
            raise Unrecognised("its sinks are not one number a head, known when compiling")
        return value if value.shape == (heads,) else Reshape(value, (heads,))

    def _product(self, scores: Value) -> Matmul:
        """The one product of activations that the scores are a function of."""
        leaves: list[Matmul] = []
        seen: set[Value] = set()
        stack = [scores]
        while stack:
            value = stack.pop()
            if value in seen or not self.acts(value):
                continue
            seen.add(value)
            if isinstance(value, Matmul) and self.acts(value.a) and self.acts(value.b):
                leaves.append(value)
            elif isinstance(value, (Unary, Binary, Compare, Where, Cast, Activation, Reshape)):
                stack.extend(value.operands)
            else:
                name = value.name if isinstance(value, Op) else "an input"
                raise Unrecognised(f"its scores depend on {name}: {value.type}, which is no product of q and k")
        if len(leaves) != 1:
            raise Unrecognised(f"its scores depend on {len(leaves)} products of activations")
        return leaves[0]

    def _weighted(self, softmax: Op, drops_column: bool) -> Matmul:
        """The product of the probabilities with the values."""
        value: Op = softmax
        while True:
            users = self.graph.users.get(value, ())
            if len(users) != 1:
                raise Unrecognised(f"its probabilities are used {len(users)} times")
            user = users[0]
            if isinstance(user, Matmul) and user.a is value and user.b is not value:
                if drops_column or value.shape[-1] != self.size:
                    raise Unrecognised("its probabilities keep the column of sinks")
                return user
            same_last = user.rank >= 2 and user.shape[-2:] == value.shape[-2:]
            if isinstance(user, Slice) and drops_column and user.axis % user.rank == user.rank - 1:
                if user.start != 0 or user.stop != self.size or user.step != 1:
                    raise Unrecognised("its probabilities keep the column of sinks")
                drops_column = False
            elif not ((isinstance(user, Reshape) and same_last) or (isinstance(user, Cast) and user.dtype in FLOATS)):
                raise Unrecognised(f"its probabilities pass through {user.name}")
            value = user

    def _traced(
        self, value: Value, user: Matmul, transposed: bool, heads: int, *, scalable: bool, shared: bool = True
    ) -> _Heads:
        """Where an operand [..., S, dim] (transposed: [..., dim, S]) of a product with `heads` comes from."""
        dim = value.shape[-2] if transposed else value.shape[-1]
        if not isinstance(dim, int) or value.shape[-1 if transposed else -2] != self.size:
            raise Unrecognised(f"an operand {value.type} of a product of its is no [..., S, dim]")
        leading = tuple(static(n) for n in user.shape[:-2])

        def by_head(traced: Array) -> Array:
            """[heads, S, dim] of the operand, repeated as the product repeats it."""
            traced = np.swapaxes(traced, -1, -2) if transposed else traced
            return np.broadcast_to(traced, (*leading, *traced.shape[-2:])).reshape(heads, -1, dim)

        found = self._search(value, by_head, heads, dim, scalable, shared)
        if found is None:
            raise Unrecognised(f"it is not clear which head of {value.type} is which")
        if isinstance(found.source, Rope) and shared and found.heads == heads:
            # Heads that are repeated and then rotated alike are rotated once.
            rope = found.source
            inner = self._search(rope.x, lambda x: np.swapaxes(x, 0, 1), heads, dim, scalable, shared)
            if inner is not None and inner.heads < heads:
                return replace(inner, factor=found.factor * inner.factor, rope=rope)
        return found

    def _search(
        self, value: Value, by_head: ByHead, heads: int, dim: int, scalable: bool, shared: bool
    ) -> _Heads | None:
        """The earliest value that has every head of `value`; all `heads` of them unless they may be `shared`."""
        for source in reversed(list(_origins(value, scalable))):
            found = self._as_heads(source, value, by_head, heads, dim)
            if found is not None and (shared or found.heads == heads):
                return found
        return None

    def _as_heads(self, source: Value, value: Value, by_head: ByHead, heads: int, dim: int) -> _Heads | None:
        """`source` as [1, S, heads, dim], if every head of `value` is one of its heads, in groups."""
        axes = [axis for axis, size in enumerate(source.shape) if size == self.size]
        total = product(source.shape)
        count = total // self.size if isinstance(total, Dim) and len(axes) == 1 else 0
        if not isinstance(count, int) or count % dim or count == 0 or heads % (count // dim):
            return None
        own = count // dim
        tokens = 3
        shape = tuple(tokens if axis == axes[0] else static(size) for axis, size in enumerate(source.shape))
        elements = np.arange(1.0, np.prod(shape) + 1).reshape(shape)
        try:
            traced = by_head(self.probe.evaluate([value], tokens, None, {source: elements})[0])
        except IRError:
            return None
        for channel in (axis for axis in reversed(range(source.rank)) if axis != axes[0] and shape[axis] == dim):
            others = tuple(axis for axis in range(source.rank) if axis not in (axes[0], channel))
            # Axes of size 1 stay in front, so that the order is the identity where it can be.
            first = tuple(axis for axis in others if shape[axis] == 1 and axis < axes[0])
            order = (*first, axes[0], *(axis for axis in others if axis not in first), channel)
            expected = elements.transpose(order).reshape(tokens, own, dim)
            expected = np.repeat(expected.swapaxes(0, 1), heads // own, axis=0)
            factor = float(traced[0, 0, 0] / expected[0, 0, 0])
            if factor != 0 and np.allclose(traced, factor * expected, rtol=1e-12, atol=0):
                return _Heads(source, order, own, dim, factor)
        return None


def _origins(value: Value, scalable: bool) -> Iterator[Value]:
    """The value and what it is moved, repeated or (if `scalable`) scaled from, one step after another."""
    yield value
    while True:
        if isinstance(value, (Reshape, Transpose, Broadcast)):
            value = value.x
        elif scalable and isinstance(value, Mul) and number_of(value.b) is not None:
            value = value.a
        elif scalable and isinstance(value, Mul) and number_of(value.a) is not None:
            value = value.b
        elif scalable and isinstance(value, Div) and number_of(value.b) is not None:
            value = value.a
        else:
            return
        yield value
