"""fuse-rope: rotary position embeddings, however they are written, become `llm.rope` over shared angles.

`rotations` finds them, and `rope_angles` says their angles in a text. In a graph of arrays nothing is known of the
cosines and sines, which may be inputs: they are columns of what the rotation multiplies by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Rope, static
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Reshape, Slice, Transpose
from llmc.compiler.ir.types import Shape
from llmc.compiler.passes.element_numbers import Numbers
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.probe import Probe
from llmc.compiler.passes.rewriting import Renewed, rebuild
from llmc.compiler.passes.rope_angles import Angles, NoAngles, taken
from llmc.compiler.passes.rotations import Rotation, Rotations, size_of


@dataclass(frozen=True)
class _Turned:
    """A rotation and what it becomes: angles [tokens, 2, pairs] and the axes of y that count tokens, in their order."""

    rotation: Rotation
    angles: Value
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class FuseRope(Pass, name="fuse-rope"):
    """No options."""

    def run(self, graph: Graph, report: Report) -> Graph:
        probe = Probe(graph)
        finder = Rotations(probe)
        angles = Angles(probe, finder.numbers) if finder.is_text else None
        found: dict[Op, _Turned] = {}
        covered: set[Value] = set()
        for op in graph.ops:
            if op in covered or op in graph.constants or not finder.is_map_op(op):
                continue
            rotation = finder.find(op)
            if rotation is None:
                continue
            covered |= rotation.region
            try:
                turned = _in_arrays(rotation, finder) if angles is None else _in_text(rotation, angles)
            except NoAngles as reason:
                report.refuse(rotation.y, str(reason))
                continue
            found[rotation.y] = turned
            report.hit("interleaved" if rotation.turn.interleaved else "half")

        def build(op: Op, renewed: Renewed) -> Value | None:
            return _rope(found[op], renewed) if op in found else None

        after = rebuild(graph, build)
        if angles is None or angles.lengths is None:
            return after
        return Graph(graph.name, (*graph.inputs, angles.lengths), after.outputs)


def _rope(turned: _Turned, renewed: Renewed) -> Value:
    """`llm.rope` of x in whatever layout it has: tokens to the front, heads flat, and back."""
    rotation = turned.rotation
    x, y = renewed(rotation.x), rotation.y
    if x.shape != y.shape:
        x = Slice(x, x.rank - 1, rotation.start, rotation.start + static(y.shape[-1]))
    heads = tuple(axis for axis in range(x.rank - 1) if axis not in turned.tokens)
    order = (*turned.tokens, *heads, x.rank - 1)
    moved = Transpose(x, order) if order != tuple(range(x.rank)) else x
    count = len(turned.tokens)
    flat = (product(moved.shape[:count]), product(moved.shape[count:-1]), moved.shape[-1])
    inner = moved if moved.shape == flat else Reshape(moved, flat)
    result: Value = Rope(inner, renewed(turned.angles), rotation.turn.interleaved)
    if result.shape != moved.shape:
        result = Reshape(result, moved.shape)
    return result if moved is x else Transpose(result, tuple(int(axis) for axis in np.argsort(order)))


def _in_text(rotation: Rotation, angles: Angles) -> _Turned:
    assert rotation.token is not None
    return _Turned(rotation, angles.of(rotation), (rotation.token,))


def _in_arrays(rotation: Rotation, finder: Rotations) -> _Turned:
    """The rotation by columns of its factors, which vary along some axes of y: those count tokens."""
    if not rotation.turn.is_certain:
        raise NoAngles("two channels of a pair differ in what they are multiplied by")
    y, factors = rotation.y, rotation.factors
    tokens = tuple(
        axis for axis in range(y.rank - 1) if y.shape[axis] == 1 or any(size_of(f, axis, y.rank) != 1 for f in factors)
    )
    parts: list[Value] = []
    for wanted in (rotation.turn.cos_a, rotation.turn.sin_a):
        part = next((p for f in factors if (p := _columns(f, wanted, y, finder, tokens)) is not None), None)
        if part is None:
            raise NoAngles("its cosines or sines are not columns of one value")
        parts.append(part)
    return _Turned(rotation, Concat(tuple(parts), 1), tokens)


def _columns(factor: Value, wanted: Numbers, y: Op, finder: Rotations, tokens: tuple[int, ...]) -> Value | None:
    """Columns of a factor [..., columns] that are `wanted` [rows, pairs], as f32 [T, 1, pairs]; None for none."""
    columns = static(factor.shape[-1])
    shape = finder.numbers.shape(y)
    rows = np.broadcast_to(finder.numbers.of(factor), (*shape[:-1], columns)).reshape(-1, columns)
    place = {number: at for at, number in enumerate(rows[0].tolist())}
    at = np.array([place.get(number, 0) for number in wanted[0].tolist()])
    if not np.array_equal(rows[:, at], wanted):
        return None
    padded: Shape = (*(1,) * (y.rank - factor.rank), *factor.shape)
    own: Shape = (*(padded[axis] for axis in tokens), columns)
    full: Shape = (*(y.shape[axis] for axis in tokens), columns)
    value: Value = factor if factor.shape == own else Reshape(factor, own)
    value = value if own == full else Broadcast(value, full)
    value = Reshape(value, (product(full[:-1]), 1, columns))
    return taken(value if value.dtype == "f32" else Cast(value, "f32"), 2, at)
