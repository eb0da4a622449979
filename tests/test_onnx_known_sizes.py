"""Every op that is followed on sizes: its elements are known when compiling, and are what onnxruntime computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto
from onnx_graphs import Nodes, evaluated

from llmc.compiler.ir.dims import Dim, concrete, symbol
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.frontends.onnx.ops_defined import body_of
from llmc.frontends.onnx.translation import Item, Translation

FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
SIZES = ((2, 5), (1, 1), (3, 64))
Build = Callable[[Nodes, str], str]


def at(*places: int) -> np.ndarray:
    return np.array(places, np.int64)


def square(n: Nodes, v: str) -> str:
    """[[B, S, 8], [8, S, B]]"""
    turned = n.add("Slice", v, at(2), at(-4), at(0), at(-1))
    return n.add("Concat", n.add("Unsqueeze", v, at(0)), n.add("Unsqueeze", turned, at(0)), axis=0)


def floats(n: Nodes, v: str) -> str:
    return n.add("Cast", v, to=FLOAT)


def whole(n: Nodes, v: str) -> str:
    return n.add("Cast", v, to=INT64)


def one(n: Nodes, v: str) -> str:
    """S as a tensor of rank 0."""
    return n.add("Gather", v, np.int64(1))


def squared(n: Nodes, v: str) -> str:
    return n.add("Mul", one(n, v), one(n, v))


def clipped(n: Nodes, v: str, *bounds: object, **attributes: float) -> str:
    n.opset = 10 if attributes else 21
    return whole(n, n.add("Clip", floats(n, v), *bounds, **attributes))


def split_before(n: Nodes, v: str) -> str:
    """As before opset 13: the lengths are an attribute."""
    n.opset = 11
    return n.many("Split", v, outputs=2, split=[1, 2])[1]


KNOWN: dict[str, Build] = {
    "a part of a shape": lambda n, v: n.add("Shape", "x", start=1, end=2),
    "a shape from its end": lambda n, v: n.add("Shape", "x", start=-2, end=-1),
    "a shape beyond its ends": lambda n, v: n.add("Shape", "x", start=-9, end=9),
    "no part of a shape": lambda n, v: n.add("Shape", "x", start=2, end=1),
    "sizes of all": lambda n, v: n.add("Size", "x"),
    "sizes of few": lambda n, v: n.add("Size", square(n, v)),
    "sum with a row": lambda n, v: n.add("Add", square(n, v), v),
    "difference": lambda n, v: n.add("Sub", square(n, v), one(n, v)),
    "rest": lambda n, v: n.add("Mod", v, at(3)),
    "rest as in C": lambda n, v: n.add("Mod", v, at(3), fmod=1),
    "numbers of numbers": lambda n, v: n.add("Mul", n.add("Add", at(2, 3), at(5)), at(2)),
    "half of one less": lambda n, v: n.add("Div", n.add("Sub", v, at(1)), at(2)),
    "rows of i32": lambda n, v: n.add("Gather", n.add("Cast", v, to=INT32), at(1, 0)),
    "a part of floats": lambda n, v: n.add("Slice", floats(n, v), at(1), at(3)),
    "quotient of numbers": lambda n, v: n.add("Div", n.add("Concat", v, at(-7, 7, 0), axis=0), at(2)),
    "exact quotient of what is below zero": lambda n, v: n.add("Div", n.add("Mul", v, at(-6)), at(-3)),
    "exact quotient of floats": lambda n, v: whole(n, n.add("Div", floats(n, n.add("Mul", v, v)), floats(n, v))),
    "floor of a float": lambda n, v: whole(n, n.add("Floor", floats(n, v))),
    "the larger one": lambda n, v: n.add("Max", v, at(0), at(1)),
    "the smaller one": lambda n, v: n.add("Min", v, at(64, 64, 7), at(70)),
    "equal": lambda n, v: n.add("Equal", v, n.add("Concat", n.add("Gather", v, at(0)), at(0, 7), axis=0)),
    "at most itself": lambda n, v: n.add("LessOrEqual", v, v),
    "less than itself": lambda n, v: n.add("Less", v, v),
    "at least itself": lambda n, v: n.add("GreaterOrEqual", v, v),
    "greater than itself": lambda n, v: n.add("Greater", v, v),
    "greater than nothing": lambda n, v: n.add("Greater", v, at(0)),
    "less than much": lambda n, v: n.add("Less", v, at(65)),
    "less than nothing": lambda n, v: n.add("Less", v, at(1, 1, 8)),
    "negative": lambda n, v: n.add("Neg", square(n, v)),
    "absolute": lambda n, v: n.add("Abs", v),
    "positive part": lambda n, v: whole(n, n.add("Relu", floats(n, v))),
    "root of squares": lambda n, v: whole(n, n.add("Sqrt", floats(n, n.add("Mul", n.add("Mul", v, v), at(9))))),
    "root of fourth powers": lambda n, v: whole(
        n,
        n.add("Sqrt", n.add("Mul", n.add("Mul", floats(n, v), floats(n, v)), n.add("Mul", floats(n, v), floats(n, v)))),
    ),
    "a size is not zero": lambda n, v: n.add("Cast", v, to=BOOL),
    "zero is false": lambda n, v: n.add("Cast", n.add("Concat", v, at(0), axis=0), to=BOOL),
    "i32": lambda n, v: n.add("Cast", n.add("Concat", v, at(-3), axis=0), to=INT32),
    "like another": lambda n, v: n.add("CastLike", v, n.add("Cast", v, to=INT32)),
    "floats and back": lambda n, v: whole(n, n.add("Mul", floats(n, v), np.float32(2))),
    "a choice": lambda n, v: n.add("Where", np.array([[True], [False]]), v, at(4)),
    "rows": lambda n, v: n.add("Gather", square(n, v), at(1, -2)),
    "columns": lambda n, v: n.add("Gather", square(n, v), at(-1), axis=1),
    "a column": lambda n, v: n.add("Gather", square(n, v), np.int64(1), axis=-1),
    "elements": lambda n, v: n.add("GatherElements", square(n, v), np.array([[0, -1], [2, 1]]), axis=1),
    "elements of one row": lambda n, v: n.add("GatherElements", square(n, v), np.array([[1, 2]]), axis=-1),
    "elements down": lambda n, v: n.add("GatherElements", square(n, v), np.array([[1], [0], [1]])),
    "elements put": lambda n, v: n.add("ScatterElements", v, at(-1), at(4)),
    "elements put across": lambda n, v: n.add(
        "ScatterElements", square(n, v), np.array([[2, 0]]), np.array([[4, 5]]), axis=1
    ),
    "elements put down": lambda n, v: n.add(
        "ScatterElements", square(n, v), np.array([[1, 0]]), np.array([[4, 5]]), axis=-2
    ),
    "places put": lambda n, v: n.add("ScatterND", square(n, v), np.array([[1, 2], [0, -1]]), at(4, 5)),
    "rows put": lambda n, v: n.add("ScatterND", square(n, v), np.array([[1]]), np.array([[4, 5, 6]])),
    "joined": lambda n, v: n.add("Concat", v, at(4), axis=0),
    "joined across": lambda n, v: n.add("Concat", square(n, v), np.array([[4], [5]]), axis=-1),
    "a slice": lambda n, v: n.add("Slice", v, at(1), at(9)),
    "a slice across": lambda n, v: n.add("Slice", square(n, v), at(1), at(2), at(1)),
    "a slice in steps": lambda n, v: n.add("Slice", square(n, v), at(0, 0), at(2, 3), at(0, 1), at(1, 2)),
    "backwards": lambda n, v: n.add("Slice", v, at(-1), at(-4), at(0), at(-1)),
    "backwards but the first": lambda n, v: n.add("Slice", v, at(-1), at(-3), at(0), at(-1)),
    "backwards in steps": lambda n, v: n.add("Slice", v, at(2), at(-9), at(0), at(-2)),
    "reshaped": lambda n, v: n.add("Reshape", square(n, v), at(-1, 2)),
    "reshaped as it was": lambda n, v: n.add("Reshape", square(n, v), at(0, 1, 3)),
    "flat": lambda n, v: n.add("Flatten", square(n, v)),
    "flat from the first": lambda n, v: n.add("Flatten", square(n, v), axis=0),
    "flat from the last": lambda n, v: n.add("Flatten", square(n, v), axis=-1),
    "flat beyond the last": lambda n, v: n.add("Flatten", square(n, v), axis=2),
    "flat from all": lambda n, v: n.add("Flatten", v, axis=-1),
    "turned": lambda n, v: n.add("Transpose", square(n, v)),
    "turned as said": lambda n, v: n.add("Transpose", n.add("Unsqueeze", square(n, v), at(0)), perm=[1, 0, 2]),
    "spread": lambda n, v: n.add("Expand", v, at(2, 1)),
    "spread from one": lambda n, v: n.add("Expand", one(n, v), at(3)),
    "repeated": lambda n, v: n.add("Tile", square(n, v), at(1, 2)),
    "repeated down": lambda n, v: n.add("Tile", square(n, v), at(2, 1)),
    "parts": lambda n, v: n.many("Split", v, at(1, 2), outputs=2)[1],
    "equal parts": lambda n, v: n.many("Split", square(n, v), outputs=3, num_outputs=3, axis=1)[2],
    "parts as before": lambda n, v: split_before(n, v),
    "the empty last part": lambda n, v: n.many("Split", n.add("Concat", v, at(4), axis=0), outputs=3, num_outputs=3)[2],
    "the short last part": lambda n, v: n.many("Split", v, outputs=2, num_outputs=2)[1],
    "squeezed": lambda n, v: n.add("Squeeze", n.add("Unsqueeze", v, at(0, 2))),
    "squeezed where said": lambda n, v: n.add("Squeeze", n.add("Unsqueeze", v, at(0, -1)), at(-1)),
    "product of all": lambda n, v: n.add("ReduceProd", v, keepdims=0),
    "product of rows": lambda n, v: n.add("ReduceProd", square(n, v), at(1)),
    "sums of columns": lambda n, v: n.add("ReduceSum", square(n, v), at(0), keepdims=0),
    "sum of all": lambda n, v: n.add("ReduceSum", square(n, v)),
    "sum of nothing": lambda n, v: n.add("ReduceSum", square(n, v), at(), noop_with_empty_axes=1),
    "sum of all by no axes": lambda n, v: n.add("ReduceSum", square(n, v), at()),
    "the largest": lambda n, v: n.add("ReduceMax", n.add("Concat", one_row(n, v), at(64), axis=0)),
    "the smallest": lambda n, v: n.add("ReduceMin", n.add("Concat", at(1), one_row(n, v), at(65), axis=0), keepdims=0),
    "running sums": lambda n, v: n.add("CumSum", v, np.int64(0)),
    "running sums across": lambda n, v: n.add("CumSum", square(n, v), np.int64(1)),
    "running sums down": lambda n, v: n.add("CumSum", square(n, v), np.int64(-2)),
    "where they are": lambda n, v: n.add("NonZero", n.add("Concat", at(0), v, axis=0)),
    "where they are in rows": lambda n, v: n.add("NonZero", square(n, v)),
    "some numbers up": lambda n, v: n.add("Range", one(n, v), n.add("Add", one(n, v), np.int64(5)), np.int64(2)),
    "some numbers down": lambda n, v: n.add("Range", one(n, v), n.add("Sub", one(n, v), np.int64(5)), np.int64(-2)),
    "no numbers": lambda n, v: n.add("Range", one(n, v), n.add("Sub", one(n, v), np.int64(5)), np.int64(2)),
    "cut off below": lambda n, v: clipped(n, v, np.float32(1)),
    "cut off above": lambda n, v: clipped(n, v, None, np.float32(64)),
    "cut off nowhere by attributes": lambda n, v: clipped(n, v, min=0.0, max=64.0),
}
POLYNOMIALS: dict[str, Build] = {
    "of squares": lambda n, v: n.add("Sub", n.add("Mul", n.add("Mul", v, v), at(3)), n.add("Mul", v, at(7))),
    "of two sizes": lambda n, v: n.add("Sub", n.add("Mul", one(n, v), v), n.add("Add", v, at(5))),
    "of halves": lambda n, v: n.add("Mul", n.add("Div", v, at(2)), n.add("Add", n.add("Div", v, at(3)), at(-2))),
    "of halves of halves": lambda n, v: n.add("Div", n.add("Add", n.add("Div", v, at(2)), one(n, v)), at(3)),
    "of the last one": lambda n, v: n.add("Mul", n.add("Sub", n.add("Neg", v), at(1)), at(-1)),
}
KNOWN |= {f"a polynomial {name}": build for name, build in POLYNOMIALS.items()}
KNOWN |= {f"a polynomial {name} in i32": lambda n, v, b=build: n.add("Cast", b(n, v), to=INT32)
          for name, build in POLYNOMIALS.items()}  # fmt: skip
COMPUTED: dict[str, Build] = {
    "rest by what is below zero": lambda n, v: n.add("Mod", v, at(-3)),
    "rest as in C of what is below zero": lambda n, v: n.add("Mod", n.add("Sub", v, at(70)), at(3), fmod=1),
    "cut off by attributes": lambda n, v: clipped(n, v, min=0.0, max=3.0),
    "cut off from below by an attribute": lambda n, v: clipped(n, v, min=4.0),
    "quotient of what may be below zero": lambda n, v: n.add("Div", n.add("Sub", v, at(4)), at(3)),
    "quotient by what is below zero": lambda n, v: n.add("Div", v, at(-3)),
    "fraction of floats": lambda n, v: n.add("Div", floats(n, v), np.float32(2)),
    "fraction and back": lambda n, v: n.add("Mul", floats(n, v), np.float32(0.5)),
    "absolute of a difference": lambda n, v: n.add("Abs", n.add("Sub", v, at(4))),
    "root of what is no square": lambda n, v: n.add("Sqrt", floats(n, one(n, v))),
    "root of a square and one": lambda n, v: n.add("Sqrt", floats(n, n.add("Add", squared(n, v), np.int64(1)))),
    "root of a square and itself": lambda n, v: n.add("Sqrt", floats(n, n.add("Add", squared(n, v), one(n, v)))),
    "root of twice a square": lambda n, v: n.add("Sqrt", floats(n, n.add("Mul", squared(n, v), np.int64(2)))),
    "root of a cube": lambda n, v: n.add("Sqrt", floats(n, n.add("Mul", squared(n, v), one(n, v)))),
    "whether a difference is zero": lambda n, v: n.add("Cast", n.add("Sub", v, at(4)), to=BOOL),
    "small integers": lambda n, v: n.add("Cast", v, to=TensorProto.UINT8),
    "elements added": lambda n, v: n.add("ScatterElements", v, at(-1), at(4), reduction="add"),
    "places added": lambda n, v: n.add("ScatterND", v, np.array([[1]]), at(4), reduction="add"),
    "running sums of those before": lambda n, v: n.add("CumSum", v, np.int64(0), exclusive=1),
    "running sums from the end": lambda n, v: n.add("CumSum", v, np.int64(0), reverse=1),
    "the smaller of two": lambda n, v: n.add("Min", v, at(4)),
    "the larger of two": lambda n, v: n.add("Max", v, at(4)),
    "the larger of all": lambda n, v: n.add("ReduceMax", v),
    "as many numbers as a size": lambda n, v: n.add("Range", np.int64(0), one(n, v), np.int64(2)),
}


def one_row(n: Nodes, v: str) -> str:
    """[S]"""
    return n.add("Gather", v, at(1))


def sizes_of(build: Build) -> tuple[Nodes, str]:
    nodes = Nodes({"x": ("float32", ("B", "S", 8))})
    return nodes, build(nodes, nodes.add("Shape", "x"))


@pytest.mark.parametrize("name", [*KNOWN, *COMPUTED])
def test_it_is_what_onnxruntime_computes(name: str) -> None:
    """Of `KNOWN` every element is followed; what depends on which size is the larger is computed."""
    nodes, output = sizes_of({**KNOWN, **COMPUTED}[name])
    (item,), _ = nodes.items(output)
    assert (item.known is not None) == (name in KNOWN)
    graph, runtime = nodes.graph(output), nodes.runtime(output)
    for batch, tokens in SIZES:
        x = np.zeros((batch, tokens, 8), np.float32)
        (expected,) = runtime.run(None, {"x": x})
        (computed,) = evaluated(graph, {"x": x})
        assert (computed.shape, computed.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(computed, expected)
        if item.known is not None:
            if item.dtype in ("i64", "i32"):
                assert all(isinstance(size, (int, Dim)) for size in item.known.flat)
            sizes = {"B": batch, "S": tokens}
            known = [concrete(size, sizes) if isinstance(size, Dim) else size for size in item.known.flat]
            np.testing.assert_array_equal(np.reshape(known, item.known.shape).astype(expected.dtype), expected)


def test_sizes_that_halves_would_round_are_not_followed() -> None:
    """Where a text model's halves are f32, a size that is cast to one is still rounded to eleven bits."""
    nodes = Nodes({"x": ("float32", ("B", "S", 8))})
    half = nodes.add("Cast", nodes.add("Shape", "x"), to=TensorProto.FLOAT16)
    full = nodes.add("Cast", nodes.add("Shape", "x"), to=FLOAT)
    wide = Translation(wide_floats=frozenset({"f16"}))
    x = Input("x", Tensor((symbol("B", 1, 64), symbol("S", 1, 64), 8), "f32"))
    rounded, followed = wide.run(body_of(nodes.model(half, full).graph, {"": 21}), {"x": Item(x)})
    assert rounded.known is None and followed.known is not None
    assert rounded.dtype == followed.dtype == "f32"
