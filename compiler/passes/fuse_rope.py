"""fuse-rope: rotary position embeddings, however they are written, become `llm.rope` over shared angles.

A rotation is a linear map of one value, with coefficients that only positions decide. The pass finds such a map
x -> y, probes it with a few vectors, and compares it with `llm.rope`: channels i and i + pairs (half) or 2i and 2i + 1
(interleaved) turn by an angle, the channels after them pass. Angles that are position times frequency, times one
scale, become `llm.rope_angles`; others (a table of sines) stay tensors, packed as [S, 2, pairs].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.elementwise import Add, Cast, Mul, Neg, Sub, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, Rope, RopeAngles, static
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.structural import Concat, Gather, GatherElements, Reshape, Slice, Transpose
from llmc.compiler.ir.types import FLOATS, Array, Tensor, precise
from llmc.compiler.passes.linear_maps import LinearMaps
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.probe import NOT_TOKENS, WEIGHTS, Probe
from llmc.compiler.passes.rope_factors import FactorRotations, Turned
from llmc.errors import IRError

NEAR = (0, 1, 2, 3)
FAR = (1, 2, 17, 1000, 30011)
TOLERANCE = 1e-9  # of cosines computed in f64 from positions up to 30011

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Map:
    """y as `llm.rope` of x: where the tokens are, which channels pair, and how far they turn at probed positions.

    x may be wider than y (queries, keys and values side by side): its channels from `start` are meant.
    """

    x: Value
    y: Op
    token: int
    start: int
    interleaved: bool
    cos: Floats  # [positions, pairs]
    sin: Floats
    at: tuple[int, ...]
    factors: tuple[Value, ...]  # the positional values that the rotation multiplies by
    region: frozenset[Value]

    @property
    def pairs(self) -> int:
        return int(self.cos.shape[1])


@dataclass(frozen=True)
class FuseRope(Pass, name="fuse-rope"):
    """No options."""

    def run(self, graph: Graph, report: Report) -> Graph:
        probe = Probe(graph)
        if probe.positions is None or probe.size is None:
            return _by_factors(graph, probe, report)
        finder = _Finder(graph, probe)
        angles = _Angles(probe)
        builders: dict[Op, tuple[_Map, Value]] = {}
        covered: set[Value] = set()
        for op in graph.ops:
            if op in covered or not finder.turns(op):
                continue
            found = finder.find(op)
            if found is None:
                if finder.reason:
                    report.refuse(op, finder.reason)
                continue
            value = angles.of(found)
            if value is None:
                report.refuse(found.y, "its angles are neither position times frequency nor one of its factors")
                continue
            covered |= found.region
            builders[found.y] = (found, value)
            report.hit("interleaved" if found.interleaved else "half")
        new: dict[Value, Value] = {}
        for op in graph.ops:
            rebuilt: Value = op.map_operands(lambda value: new.get(value, value))
            if op in builders:
                found, value = builders[op]
                rebuilt = _rope(new.get(found.x, found.x), value, found)
            if rebuilt is not op:
                new[op] = rebuilt
        return graph.replace_outputs((name, new.get(value, value)) for name, value in graph.outputs)


def _by_factors(graph: Graph, probe: Probe, report: Report) -> Graph:
    """Rotations in a graph that is no text: by factors of which nothing is known."""
    finder = FactorRotations(probe)
    found: dict[Op, Turned] = {}
    covered: set[Value] = set()
    for op in graph.ops:
        if op not in covered and finder.turns(op) and op not in graph.constants:
            rotation = finder.find(op)
            if rotation is not None:
                covered |= rotation.region
                found[rotation.y] = rotation
                report.hit("interleaved" if rotation.interleaved else "half")
    new: dict[Value, Value] = {}
    for op in graph.ops:
        rebuilt: Value = op.map_operands(lambda value: new.get(value, value))
        if op in found:
            rebuilt = found[op].build(new)
        if rebuilt is not op:
            new[op] = rebuilt
    return graph.replace_outputs((name, new.get(value, value)) for name, value in graph.outputs)


def _rope(x: Value, angles: Value, found: _Map) -> Value:
    """`llm.rope` of x in whatever layout it has: tokens to the front, heads flat, and back."""
    if x.shape != found.y.shape:
        x = Slice(x, x.rank - 1, found.start, found.start + static(found.y.shape[-1]))
    others = tuple(axis for axis in range(x.rank - 1) if axis != found.token)
    order = (found.token, *others, x.rank - 1)
    inverse = tuple(int(axis) for axis in np.argsort(order))
    moved = Transpose(x, order) if order != tuple(range(x.rank)) else x
    flat_shape = (moved.shape[0], product(moved.shape[1:-1]), moved.shape[-1])
    flat = moved if moved.shape == flat_shape else Reshape(moved, flat_shape)
    turned: Value = Rope(flat, angles, found.interleaved)
    if turned.shape != moved.shape:
        turned = Reshape(turned, moved.shape)
    return Transpose(turned, inverse) if moved is not x else turned


class _Finder(LinearMaps):
    """Finds the rotation that a multiplication by a positional value is part of."""

    def __init__(self, graph: Graph, probe: Probe) -> None:
        super().__init__(graph)
        self.probe = probe
        self.reason = ""
        self._factors: dict[tuple[Value, tuple[int, ...]], Array] = {}

    def acts(self, value: Value) -> bool:
        """Whether the value depends on what the tokens are."""
        return bool(self.probe.sources.get(value, frozenset()) - NOT_TOKENS)

    def turns(self, op: Value) -> bool:
        """Whether this multiplies activations by something that positions decide."""
        if not isinstance(op, Mul) or op.dtype not in FLOATS:
            return False
        return any(self.acts(a) and self._factor(b) for a, b in ((op.a, op.b), (op.b, op.a)))

    def _factor(self, value: Value) -> bool:
        return "positions" in self.probe.sources.get(value, frozenset()) <= NOT_TOKENS

    def linear_operands(self, value: Value) -> tuple[Value, ...]:
        """The operands that `value` is a linear function of; none where it is not such a function."""
        if not isinstance(value, Op) or value.dtype not in FLOATS:
            return ()
        if isinstance(value, (Neg, Slice, Concat, Reshape, Transpose)):
            return value.operands if all(self.acts(v) for v in value.operands) else ()
        if isinstance(value, Cast):
            return (value.x,) if value.x.dtype in FLOATS else ()
        if isinstance(value, (Add, Sub)):
            return value.operands if self.acts(value.a) and self.acts(value.b) else ()
        if isinstance(value, Mul) and self.acts(value.a) != self.acts(value.b):
            return (value.a if self.acts(value.a) else value.b,)
        return ()

    def find(self, start: Op) -> _Map | None:
        """The rotation that `start` is part of: the largest y that one x determines."""
        self.reason = ""
        best: _Map | None = None
        for y in self.linear_users(start):
            # A larger y counts only while it passes more channels of the same head (partial rotation).
            if best is not None and not isinstance(y, Concat):
                continue
            found = self._as_rope(y)
            if found is not None:
                best = found
        return best

    def _as_rope(self, y: Op) -> _Map | None:
        """y as a rotation, or None."""
        source = self.source(y)
        if source is None or self.probe.size is None:
            return None
        x, nodes = source
        axes = [axis for axis, dim in enumerate(y.shape) if isinstance(dim, Dim)]
        if len(axes) != 1 or y.shape[axes[0]] != self.probe.size or axes[0] == y.rank - 1 or y.rank < 2:
            return None
        muls = [v for v in nodes if isinstance(v, Mul) and self.turns(v)]
        factors = tuple(dict.fromkeys(v.b if self.acts(v.a) else v.a for v in muls))
        channel_slices = [v.start for v in nodes if isinstance(v, Slice) and v.x is x and v.axis % x.rank == x.rank - 1]
        start = 0 if x.shape == y.shape else min((n for n in channel_slices if isinstance(n, int)), default=-1)
        if not 0 <= start <= static(x.shape[-1]) - static(y.shape[-1]):
            return None
        try:
            near = self._probe(x, y, axes[0], start, self._evaluated(factors, NEAR), NEAR)
        except IRError as error:
            self.reason = f"its factors cannot be evaluated: {error}"
            return None
        if near is None:
            return None
        interleaved, cos, sin = near
        at: tuple[int, ...] = NEAR
        try:
            far = self._probe(x, y, axes[0], start, self._evaluated(factors, FAR), FAR)
            if far is None or far[0] != interleaved or far[1].shape[1] != cos.shape[1]:
                self.reason = "it turns other channels at far positions"
                return None
            at, cos, sin = (*NEAR, *FAR), np.concatenate([cos, far[1]]), np.concatenate([sin, far[2]])
        except IRError:
            pass  # a table of fewer positions than the farthest one probed
        return _Map(x, y, axes[0], start, interleaved, cos, sin, at, factors, frozenset((*nodes, y)))

    def _evaluated(self, factors: tuple[Value, ...], at: tuple[int, ...]) -> dict[Value, Array]:
        """The positional values at some positions; layers share them."""
        missing = [factor for factor in factors if (factor, at) not in self._factors]
        found = self.probe.evaluate(missing, len(at), at, stand_ins=True)
        self._factors.update({(factor, at): value for factor, value in zip(missing, found, strict=True)})
        return {factor: self._factors[factor, at] for factor in factors}

    def _probe(
        self, x: Value, y: Op, token: int, start: int, known: dict[Value, Array], at: tuple[int, ...]
    ) -> tuple[bool, Floats, Floats] | None:
        """Whether channels pair up interleaved, and cosines and sines [positions, pairs]; None if y is no rotation."""
        count = len(at)
        shape = tuple(count if isinstance(dim, Dim) else dim for dim in y.shape)
        channels = shape[-1]
        wide = (*_without(shape, token)[:-1], static(x.shape[-1]))
        noise = np.random.default_rng(1).standard_normal((count, *wide))

        def apply(value: Floats) -> Floats:
            """y [positions, heads, channels] for an x that is `value` or broadcasts from it."""
            full = noise.copy()
            full[..., start : start + channels] = value
            result = self.probe.evaluate([y], count, at, {**known, x: np.moveaxis(full, 0, token)})[0]
            return np.asarray(np.moveaxis(result, token, 0), np.float64).reshape(count, -1, channels)

        unit = apply(np.eye(channels)[0])
        touched = np.flatnonzero(np.abs(unit).max(axis=(0, 1)) > 1e-12)
        if len(touched) != 2 or touched[0] != 0:
            return None
        distance = int(touched[1])
        interleaved = distance == 1 and channels > 2
        first = np.zeros(channels)
        if interleaved:
            first[0 : channels - channels % 2 : 2] = 1
            found = apply(first)
            cos, sin = found[:, 0, 0 : channels - channels % 2 : 2], found[:, 0, 1::2]
            turning = np.flatnonzero((np.abs(sin) > 1e-15).any(axis=0) | (np.abs(cos - 1) > 1e-12).any(axis=0))
            cos, sin = cos[:, : turning[-1] + 1], sin[:, : turning[-1] + 1]
        else:
            if 2 * distance > channels:
                return None
            first[:distance] = 1
            found = apply(first)
            cos, sin = found[:, 0, :distance], found[:, 0, distance : 2 * distance]
        random = np.random.default_rng(0).standard_normal((count, *_without(shape, token)))
        turned = Rope(
            Input("x", Tensor((count, product(shape) // (count * channels), channels), "f64")),
            Input("angles", Tensor((count, 2, cos.shape[1]), "f64")),
            interleaved,
        )
        with precise():
            expected = turned.evaluate(random.reshape(count, -1, channels), np.stack([cos, sin], axis=1))
        if not np.allclose(apply(random), expected, rtol=0, atol=TOLERANCE):
            return None
        return interleaved, cos, sin


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


class _Angles:
    """Angles [S, 2, pairs] of rotations, one value for all that turn alike."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.known: dict[object, Value] = {}
        assert probe.positions is not None and probe.size is not None
        self.size = probe.size
        self.positions = Reshape(probe.positions, (probe.size,))

    def of(self, found: _Map) -> Value | None:
        """The angles of one rotation; None when nothing in the graph has them."""
        return self._shared(found) or self._by_frequency(found) or self._from_table(found) or self._packed(found)

    def _shared(self, found: _Map) -> Value | None:
        return self.known.get((found.factors, found.interleaved, found.pairs))

    def _keep(self, found: _Map, value: Value) -> Value:
        self.known[found.factors, found.interleaved, found.pairs] = value
        return value

    def _by_frequency(self, found: _Map) -> Value | None:
        """Position times frequency: the angle at position 1 is the frequency (below pi, as in every known scheme)."""
        if any(WEIGHTS in self.probe.sources[factor] for factor in found.factors):
            return None
        at = np.asarray(found.at, np.float64)[:, None]
        scale = float(np.hypot(found.cos[1, 0], found.sin[1, 0]))
        frequencies = np.arctan2(found.sin[1], found.cos[1])
        # The weights of most models are f32; take the f32 number where the angle was computed from one.
        rounded = frequencies.astype(np.float32).astype(np.float64)
        frequencies = np.where(np.abs(rounded - frequencies) <= 1e-13 * np.abs(rounded), rounded, frequencies)
        scale = 1.0 if abs(scale - 1) < 1e-14 else scale
        for got, function in ((found.cos, np.cos), (found.sin, np.sin)):
            if not np.allclose(got, scale * function(at * frequencies), rtol=0, atol=TOLERANCE):
                return None
        key = (frequencies.tobytes(), scale)
        if key not in self.known:
            self.known[key] = RopeAngles(self.positions, constant(frequencies, "f32"), scale)
        return self._keep(found, self.known[key])

    def _from_table(self, found: _Map) -> Value | None:
        """Rows of a compile-time table by position: the table's columns put in order, looked up once a step."""
        for lookup in self._lookups(found.factors):
            columns = lookup.x.shape[-1]
            rows, table = self.probe.evaluate([lookup, lookup.x], len(found.at), found.at, stand_ins=True)
            table = table.reshape(table.shape[-2:])
            rows = rows.reshape(len(found.at), -1)
            if rows.shape[1] != columns or not np.array_equal(rows, table[list(found.at)]):
                continue
            cos, sin = (_columns(rows, wanted) for wanted in (found.cos, found.sin))
            if cos is None or sin is None:
                continue
            flat = lookup.x if lookup.x.rank == 2 else Reshape(lookup.x, lookup.x.shape[-2:])
            parts = [Slice(flat, 1, c.start, c.stop, c.step) for c in (cos, sin)]
            packed = Embed(Concat(tuple(parts), 1), self.positions, "f32")
            return self._keep(found, Reshape(packed, (self.size, 2, found.pairs)))
        return None

    def _lookups(self, roots: tuple[Value, ...]) -> list[Gather | GatherElements]:
        """Lookups in compile-time tables [..., rows, columns] among what the roots need."""
        seen: set[Value] = set()
        stack = list(roots)
        found: list[Gather | GatherElements] = []
        while stack:
            value = stack.pop()
            if value in seen or not isinstance(value, Op):
                continue
            seen.add(value)
            stack.extend(value.operands)
            if not isinstance(value, (Gather, GatherElements)) or not self.probe.is_constant(value.x):
                continue
            if value.x.rank >= 2 and product(value.x.shape[:-2]) == 1 and value.axis % value.x.rank == value.x.rank - 2:
                found.append(value)
        return found

    def _packed(self, found: _Map) -> Value | None:
        """The rotation's own factors, sliced and put side by side."""
        parts: list[Value] = []
        for wanted in (found.cos, found.sin):
            part = next(filter(None, (self._part(factor, wanted, found.at) for factor in found.factors)), None)
            if part is None:
                return None
            parts.append(Reshape(part, (self.size, 1, found.pairs)))
        return self._keep(found, Concat(tuple(parts), 1))

    def _part(self, factor: Value, wanted: Floats, at: tuple[int, ...]) -> Value | None:
        axes = [axis for axis, dim in enumerate(factor.shape) if dim == self.size]
        channels = factor.shape[-1]
        before = product(factor.shape[: axes[0]]) if len(axes) == 1 else 0
        if before != 1 or not isinstance(channels, int) or product(factor.shape) != self.size * channels:
            return None
        flat = self.probe.evaluate([factor], len(at), at, stand_ins=True)[0].reshape(len(at), channels)
        for negate in (False, True):
            columns = _columns(flat, -wanted if negate else wanted)
            if columns is not None:
                value: Value = Reshape(factor, (self.size, channels))
                value = value if value.dtype == "f32" else Cast(value, "f32")
                value = Slice(value, 1, columns.start, columns.stop, columns.step)
                return Neg(value) if negate else value
        return None


def _columns(rows: Array, wanted: Floats) -> slice | None:
    """Where `wanted` [n, pairs] is among the columns of `rows` [n, columns]: together, or every other one."""
    pairs = wanted.shape[1]
    for step in (1, 2):
        for start in range(rows.shape[1] - (pairs - 1) * step):
            stop = start + (pairs - 1) * step + 1
            if np.allclose(rows[:, start:stop:step], wanted, rtol=0, atol=TOLERANCE):
                return slice(start, stop, step)
    return None
