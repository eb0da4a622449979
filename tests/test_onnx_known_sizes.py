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
from llmc.errors import FrontendError, LlmcError
from llmc.frontends.onnx.ops_defined import body_of
from llmc.frontends.onnx.translation import SMALL, Item, Translation

FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
DOUBLE = TensorProto.DOUBLE
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


def equal_before(n: Nodes, v: str) -> str:
    """As before opset 18: as many parts as outputs."""
    n.opset = 13
    return n.many("Split", v, outputs=3)[2]


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
    "rest of a number below zero": lambda n, v: n.add("Mod", n.add("Concat", v, at(-7, 7), axis=0), at(3)),
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
    "equal to what is out of reach": lambda n, v: n.add("Equal", v, at(65, 0, 8)),
    "at most itself": lambda n, v: n.add("LessOrEqual", v, v),
    "less than itself": lambda n, v: n.add("Less", v, v),
    "at least itself": lambda n, v: n.add("GreaterOrEqual", v, v),
    "greater than itself": lambda n, v: n.add("Greater", v, v),
    "greater than nothing": lambda n, v: n.add("Greater", v, at(0)),
    "less than much": lambda n, v: n.add("Less", v, at(65)),
    "less than nothing": lambda n, v: n.add("Less", v, at(1, 1, 8)),
    "negative": lambda n, v: n.add("Neg", square(n, v)),
    "absolute": lambda n, v: n.add("Abs", v),
    "absolute of what may be zero": lambda n, v: n.add("Abs", n.add("Sub", v, at(1))),
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
    "a place put": lambda n, v: n.add("ScatterND", v, at(1), np.int64(4)),
    "places put by rows": lambda n, v: n.add(
        "ScatterND", square(n, v), np.array([[[1, 2]], [[0, -1]]]), np.array([[4], [5]])
    ),
    "rows put": lambda n, v: n.add("ScatterND", square(n, v), np.array([[1]]), np.array([[4, 5, 6]])),
    "joined": lambda n, v: n.add("Concat", v, at(4), axis=0),
    "joined across": lambda n, v: n.add("Concat", square(n, v), np.array([[4], [5]]), axis=-1),
    "a slice": lambda n, v: n.add("Slice", v, at(1), at(9)),
    "a slice that ends before the first": lambda n, v: n.add("Slice", v, at(0), at(-4)),
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
    "flat from the last but one": lambda n, v: n.add("Flatten", n.add("Unsqueeze", square(n, v), at(0)), axis=-2),
    "flat beyond the last": lambda n, v: n.add("Flatten", square(n, v), axis=2),
    "flat from all": lambda n, v: n.add("Flatten", v, axis=-1),
    "turned": lambda n, v: n.add("Transpose", square(n, v)),
    "turned as said": lambda n, v: n.add("Transpose", n.add("Unsqueeze", square(n, v), at(0)), perm=[1, 0, 2]),
    "spread": lambda n, v: n.add("Expand", v, at(2, 1)),
    "spread from one": lambda n, v: n.add("Expand", one(n, v), at(3)),
    "repeated": lambda n, v: n.add("Tile", square(n, v), at(1, 2)),
    "repeated down": lambda n, v: n.add("Tile", square(n, v), at(2, 1)),
    "parts": lambda n, v: n.many("Split", v, at(1, 2), outputs=2)[1],
    "three parts": lambda n, v: n.many("Split", v, at(1, 1, 1), outputs=3)[1],
    "parts of the first axis": lambda n, v: n.many("Split", square(n, v), outputs=2, num_outputs=2)[1],
    "equal parts as before": lambda n, v: equal_before(n, v),
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
    "quotient of what may be one below zero": lambda n, v: n.add("Div", n.add("Sub", v, at(2)), at(3)),
    "quotient by a size": lambda n, v: n.add("Div", at(7, 64, 200), v),
    "equal to the least": lambda n, v: n.add("Equal", v, at(1, 1, 8)),
    "equal to the most": lambda n, v: n.add("Equal", v, at(64, 64, 8)),
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


@pytest.mark.parametrize(
    ("op", "ops"),
    [
        (lambda n, v: one(n, v), ["t.iota", "t.slice"]),
        (lambda n, v: n.add("Gather", v, at(1)), ["t.iota", "t.slice"]),
        (lambda n, v: n.add("Cast", one(n, v), to=INT32), ["t.iota", "t.slice", "t.cast"]),
        (lambda n, v: squared(n, v), ["t.iota", "t.slice", "t.iota", "t.slice", "t.mul"]),
        (lambda n, v: n.add("Mul", one(n, v), np.int64(3)),
         ["t.constant", "t.iota", "t.slice", "t.mul"]),
        (lambda n, v: n.add("Add", one(n, v), np.int64(3)),
         ["t.iota", "t.slice", "t.constant", "t.add"]),
        (lambda n, v: n.add("Gather", v, at(0, 1)), ["t.iota", "t.slice", "t.iota", "t.slice", "t.concat"]),
    ],
    ids=["S", "[S]", "i32", "S * S", "3 * S", "S + 3", "[B, S]"],
)  # fmt: skip
def test_a_size_that_is_needed_as_a_tensor_is_made_of_few_ops(op: Build, ops: list[str]) -> None:
    """And of one that gives it its shape."""
    nodes, output = sizes_of(op)
    assert [each.name for each in nodes.graph(output).ops] == [*ops, "t.reshape"]


@pytest.mark.parametrize(("dtype", "last"), [(INT32, 2**31 - 1), (INT64, 2**63 - 1), (FLOAT, 2**24), (DOUBLE, 2**53)])
def test_sizes_are_followed_as_far_as_their_dtype_holds_all_whole_numbers(dtype: int, last: int) -> None:
    def shifted(n: Nodes, v: str, most: int) -> str:
        """S and as much more that its greatest value is `most`."""
        return n.add("Cast", n.add("Add", one(n, v), np.int64(most - 64)), to=dtype)

    def turned(n: Nodes, v: str, least: int) -> str:
        """A number less S, at least `least`."""
        return n.add("Cast", n.add("Sub", np.int64(least + 64), one(n, v)), to=dtype)

    cases = [
        (lambda n, v: shifted(n, v, last), True),
        (lambda n, v: shifted(n, v, last + 1), False),
        (lambda n, v: turned(n, v, -last), True),
    ]
    if dtype in (FLOAT, DOUBLE):
        cases.append((lambda n, v: turned(n, v, -last - 1), False))
    for build, known in cases:
        nodes, output = sizes_of(build)
        (item,), _ = nodes.items(output)
        assert (item.known is not None) == known
        graph, runtime = nodes.graph(output), nodes.runtime(output)
        for tokens in (1, 64):
            x = np.zeros((2, tokens, 8), np.float32)
            np.testing.assert_array_equal(evaluated(graph, {"x": x}), runtime.run(None, {"x": x}))


@pytest.mark.parametrize(("count", "known"), [(SMALL, True), (SMALL + 1, False)])
def test_elements_of_small_tensors_are_followed(count: int, known: bool) -> None:
    builds: dict[str, Build] = {
        "joined": lambda n, v: n.add("Concat", v, np.arange(count - 3), axis=0),
        "spread": lambda n, v: n.add("Expand", one(n, v), at(count)),
        "repeated": lambda n, v: n.add("Tile", one_row(n, v), at(count)),
        "numbers": lambda n, v: n.add("Expand", np.int64(3), at(count)),
        "stored numbers": lambda n, v: n.add("Identity", np.arange(count)),
    }
    for name, build in builds.items():
        nodes, output = sizes_of(build)
        (item,), _ = nodes.items(output)
        assert ((item.known is not None), item.shape) == (known, (count,)), name
        if item.known is not None:
            first = concrete(item.known[0], {"B": 2, "S": 5})
            assert first == {"joined": 2, "numbers": 3, "stored numbers": 0}.get(name, 5)


def largest_of(n: Nodes, elements: int, steps: int) -> str:
    """The largest of many numbers, which many ops give."""
    x = n.add("Range", np.int64(0), np.int64(elements), np.int64(1))
    for _ in range(steps):
        x = n.add("Neg", x)
    return n.add("ReduceMax", x, keepdims=0)


def test_what_few_ops_make_of_constants_is_known() -> None:
    """Up to 64 ops, of up to 2**20 elements each."""
    nodes = Nodes({})
    chain = nodes.graph(largest_of(nodes, 5000, 80))
    others = len(chain.ops) - 80
    for elements, steps, known in (
        (5000, 64 - others, True), (5000, 65 - others, False), (1 << 20, 2, True), ((1 << 20) + 1, 2, False)
    ):  # fmt: skip
        nodes = Nodes({})
        (item,), _ = nodes.items(largest_of(nodes, elements, steps))
        assert (item.known is not None) == known
        (found,) = evaluated(nodes.graph(largest_of(nodes, elements, steps)), {})
        assert found == (elements - 1 if steps % 2 == 0 else 0)
        if item.known is not None:
            assert item.known.item() == found


def test_what_is_made_of_inputs_is_not_known() -> None:
    nodes = Nodes({"x": ("int64", (3,))})
    (item,), _ = nodes.items(nodes.add("ReduceMax", nodes.add("Add", nodes.add("Add", "x", at(1, 2, 3)), "x")))
    assert item.known is None


def test_what_does_not_evaluate_fails_when_it_runs() -> None:
    nodes = Nodes({})
    many = nodes.add("Range", np.int64(0), np.int64(5000), np.int64(1))
    output = nodes.add("ReduceMax", nodes.add("Gather", at(1, 2, 3), many), keepdims=0)
    (item,), _ = nodes.items(output)
    assert item.known is None
    with pytest.raises(LlmcError, match="out of"):
        evaluated(nodes.graph(output), {})


@pytest.mark.parametrize(
    "build",
    [
        lambda n, v: n.add("Slice", v, None, at(2)),
        lambda n, v: n.add("Slice", v, at(0), None),
        lambda n, v: n.add("Concat", v, v),
        lambda n, v: n.add("Where", np.array([True, False, True]), np.int8([1, 2, 3]), v),
    ],
    ids=["no starts", "no ends", "no axis", "two dtypes"],
)
def test_nodes_that_are_not_valid_are_refused(build: Build) -> None:
    nodes, output = sizes_of(build)
    with pytest.raises(FrontendError, match=r"\(node_\d\) (is not valid|cannot be translated)"):
        nodes.graph(output)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_sizes_that_halves_would_round_are_not_followed(kind: int) -> None:
    """Where a text model's halves are f32, a size that is cast to one is still rounded to eleven bits, or eight."""
    nodes = Nodes({"x": ("float32", ("B", "S", 8))})
    half = nodes.add("Cast", nodes.add("Shape", "x"), to=kind)
    full = nodes.add("Cast", nodes.add("Shape", "x"), to=FLOAT)
    wide = Translation(wide_floats=frozenset({"f16", "bf16"}))
    x = Input("x", Tensor((symbol("B", 1, 64), symbol("S", 1, 64), 8), "f32"))
    rounded, followed = wide.run(body_of(nodes.model(half, full).graph, {"": 21}), {"x": Item(x)})
    assert rounded.known is None and followed.known is not None
    assert rounded.dtype == followed.dtype == "f32"
