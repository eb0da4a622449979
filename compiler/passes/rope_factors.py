"""Rotations by cosines and sines that anything decides: inputs, caches gathered by them, batches of positions.

As in fuse-rope a rotation is a linear map of one value, but nothing is known of the factors that it multiplies by, so
they are probed with random numbers, row by row. Where the map is `llm.rope` for those, it is so for all; the cosines
and sines are then columns of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Add, Cast, Div, Mul, Neg, Sub, Unary
from llmc.compiler.ir.llm import Rope
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Reshape, Slice, Transpose
from llmc.compiler.ir.types import FLOATS, Array, Shape
from llmc.compiler.passes.linear_maps import LinearMaps
from llmc.compiler.passes.probe import Probe
from llmc.compiler.passes.rewriting import number_of
from llmc.errors import IRError

Floats = NDArray[np.float64]
_MOST = 1 << 20  # elements of a value that is probed, at most
_FEW = 3  # tokens to probe with where their number is free


@dataclass(frozen=True)
class Turned:
    """y as `llm.rope` of x. heads: the axes of y along which no factor varies."""

    x: Value
    y: Op
    interleaved: bool
    heads: tuple[int, ...]
    cos: Value  # [T, 1, pairs]
    sin: Value
    region: frozenset[Value]

    def build(self, new: dict[Value, Value]) -> Value:
        """The rotation in the new graph."""
        x = new.get(self.x, self.x)
        tokens = tuple(axis for axis in range(x.rank - 1) if axis not in self.heads)
        order = (*tokens, *self.heads, x.rank - 1)
        moved = x if order == tuple(range(x.rank)) else Transpose(x, order)
        flat = (product(moved.shape[: len(tokens)]), product(moved.shape[len(tokens) : -1]), moved.shape[-1])
        angles = Concat((renewed(self.cos, new), renewed(self.sin, new)), 1)
        turned: Value = Rope(moved if moved.shape == flat else Reshape(moved, flat), angles, self.interleaved)
        turned = turned if turned.shape == moved.shape else Reshape(turned, moved.shape)
        return turned if moved is x else Transpose(turned, tuple(int(i) for i in np.argsort(order)))


def renewed(value: Value, new: dict[Value, Value]) -> Value:
    """A value that was written over the old graph, over the new one."""
    if value in new or not isinstance(value, Op):
        return new.get(value, value)
    new[value] = value.map_operands(lambda operand: renewed(operand, new))
    return new[value]


class FactorRotations(LinearMaps):
    """Finds rotations in a graph that is no text."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe.graph)
        self.probe = probe

    def find(self, start: Op) -> Turned | None:
        """The rotation that a multiplication is part of: the largest y that one x determines."""
        best: Turned | None = None
        for y in self.linear_users(start):
            if isinstance(y, (Concat, Reshape, Add)) and (best is None or isinstance(y, (Concat, Reshape))):
                best = self._as_rope(y) or best
        return best

    def turns(self, op: Value) -> bool:
        return isinstance(op, Mul) and op.dtype in FLOATS and _factor(op) is not None

    def linear_operands(self, value: Value) -> tuple[Value, ...]:
        if not isinstance(value, Op) or value.dtype not in FLOATS:
            return ()
        if isinstance(value, (Neg, Slice, Concat, Reshape, Add, Sub)):
            same = not isinstance(value, (Add, Sub)) or value.a.shape == value.b.shape
            return value.operands if same else ()
        if isinstance(value, Mul):
            factor = _factor(value)
            return () if factor is None else (value.a if value.b is factor else value.b,)
        return ()

    def _as_rope(self, y: Op) -> Turned | None:
        source = self.source(y)
        if source is None or source[0].type != y.type or y.rank < 2 or not isinstance(y.shape[-1], int):
            return None
        x, nodes = source
        factors = tuple(dict.fromkeys(f for v in nodes if isinstance(v, Mul) and (f := _factor(v)) is not None))
        shape = self.probe.shape(y, _FEW)
        if not factors or np.prod(shape) > _MOST:
            return None
        generator = np.random.default_rng(0)
        leaves = {leaf: generator.standard_normal(self.probe.shape(leaf, _FEW)) for leaf in _leaves(factors)}
        try:
            known = dict(zip(factors, self.probe.evaluate(factors, _FEW, None, leaves), strict=True))
            found = self._probe(x, y, shape, known)
        except IRError:
            return None
        if found is None:
            return None
        interleaved, cos, sin = found
        lead = range(y.rank - 1)
        heads = tuple(axis for axis in lead if all(_size(f, axis, y.rank) == 1 for f in factors) and y.shape[axis] != 1)
        parts: list[Value] = []
        for wanted in (cos, sin):
            part = next((p for f in factors if (p := _columns(f, known[f], wanted, y, shape, heads)) is not None), None)
            if part is None:
                return None
            parts.append(part)
        return Turned(x, y, interleaved, heads, parts[0], parts[1], frozenset((*nodes, y)))

    def _probe(
        self, x: Value, y: Op, shape: tuple[int, ...], known: dict[Value, Array]
    ) -> tuple[bool, Floats, Floats] | None:
        """Whether channels pair up interleaved, and cosines and sines [rows, pairs]; None if y is no rotation."""
        channels = shape[-1]

        def apply(values: Floats) -> Floats:
            full = np.broadcast_to(values.reshape(-1, channels), (int(np.prod(shape[:-1])), channels))
            return np.asarray(
                self.probe.evaluate([y], _FEW, None, {**known, x: full.reshape(shape)})[0], np.float64
            ).reshape(-1, channels)

        touched = np.flatnonzero(np.abs(apply(np.eye(channels)[0])).max(axis=0) > 0)
        if len(touched) != 2 or touched[0] != 0:
            return None
        distance = int(touched[1])
        interleaved = distance == 1 and channels > 2
        if not interleaved and 2 * distance > channels:
            return None
        # All first channels of pairs at once; channels that only pass give themselves back.
        first = np.zeros(channels)
        first[slice(0, channels - channels % 2, 2) if interleaved else slice(0, distance)] = 1
        found = apply(first)
        if interleaved:
            cos, sin = found[:, 0 : channels - channels % 2 : 2], found[:, 1::2]
            pairs = int(np.flatnonzero(np.abs(sin).max(axis=0) > 0)[-1]) + 1
            cos, sin = cos[:, :pairs], sin[:, :pairs]
        else:
            pairs = distance
            cos, sin = found[:, :pairs], found[:, pairs : 2 * pairs]
        x_values = np.random.default_rng(1).standard_normal((len(found), channels))
        a, b = (
            (x_values[:, 0 : 2 * pairs : 2], x_values[:, 1 : 2 * pairs : 2])
            if interleaved
            else (x_values[:, :pairs], x_values[:, pairs : 2 * pairs])
        )
        turned = (a * cos - b * sin, b * cos + a * sin)
        expected = x_values.copy()
        expected[:, : 2 * pairs] = (
            np.stack(turned, axis=-1).reshape(len(found), -1) if interleaved else np.concatenate(turned, axis=1)
        )
        return (interleaved, cos, sin) if np.allclose(apply(x_values), expected, rtol=0, atol=1e-12) else None


def _factor(op: Mul) -> Value | None:
    """The operand of a product that is the same for several rows of the other one, and differs along them."""
    for value, other in ((op.b, op.a), (op.a, op.b)):
        if other.shape == op.shape and product(value.shape) != product(op.shape):
            varies = value.rank > 1 and value.shape[-1] != 1 and product(value.shape[:-1]) != 1
            return value if varies else None
    return None


def _leaves(factors: tuple[Value, ...]) -> list[Value]:
    """What factors are made of, as far as one column says what another one is: cos(cat(angles, angles))."""
    found: dict[Value, None] = {}
    stack = list(factors)
    while stack:
        value = stack.pop()
        moved = isinstance(value, (Concat, Reshape, Broadcast, Transpose, Slice, Cast, Unary))
        if moved and isinstance(value, Op) and all(operand.dtype in FLOATS for operand in value.operands):
            stack.extend(value.operands)
        elif isinstance(value, (Mul, Div)) and number_of(value.b) is not None:
            stack.append(value.a)
        else:
            found[value] = None
    return list(found)


def _size(factor: Value, axis: int, rank: int) -> object:
    """The factor's size along an axis of a value of `rank`."""
    own = axis - (rank - factor.rank)
    return 1 if own < 0 else factor.shape[own]


def _columns(
    factor: Value, values: Array, wanted: Floats, y: Op, shape: tuple[int, ...], heads: tuple[int, ...]
) -> Value | None:
    """Columns of a factor [..., columns] that are `wanted` [rows, pairs], as f32 [T, 1, pairs]; None for none."""
    columns, pairs = values.shape[-1], wanted.shape[1]
    rows = np.broadcast_to(values, (*shape[:-1], columns)).reshape(-1, columns)
    for start in range(columns - pairs + 1):
        step = next((s for s in (1, 2) if start + (pairs - 1) * s < columns and _equal(rows, wanted, start, s)), None)
        if step is None:
            continue
        tokens = tuple(axis for axis in range(y.rank - 1) if axis not in heads)
        padded: Shape = (*(1,) * (y.rank - factor.rank), *factor.shape)
        own: Shape = (*(padded[axis] for axis in tokens), columns)
        full: Shape = (*(y.shape[axis] for axis in tokens), columns)
        value: Value = factor if factor.shape == own else Reshape(factor, own)
        value = value if own == full else Broadcast(value, full)
        value = Reshape(value, (product(full[:-1]), 1, columns))
        value = value if value.dtype == "f32" else Cast(value, "f32")
        stop = start + (pairs - 1) * step + 1
        return value if (start, stop) == (0, columns) else Slice(value, 2, start, stop, step)
    return None


def _equal(rows: Floats, wanted: Floats, start: int, step: int) -> bool:
    stop = start + (wanted.shape[1] - 1) * step + 1
    return np.array_equal(rows[:, start:stop:step], wanted)
