"""Shapes asked for and changed, and elements chosen by index: every form of an op against onnxruntime."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx_graphs import Nodes, compare, evaluated

from llmc.compiler.ir.elementwise import constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.structural import CheckedIndex, Iota, Pad, Slice
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError, IRError
from llmc.frontends.onnx.translation import SMALL, Body, Item, Node, Translation

RNG = np.random.default_rng(7)


def counted(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)


def at(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def one(op: str, x: np.ndarray, *constants: object, outputs: int = 1, opset: int = 21, **attributes: object) -> None:
    """The op over x and constants of the file is what onnxruntime gives, all its outputs."""
    nodes = Nodes({"x": (str(x.dtype), x.shape)}, opset)
    compare(nodes, nodes.many(op, "x", *constants, outputs=outputs, **attributes), {"x": x})


def free(op: str, shape: tuple[int | str, ...], *constants: object, **attributes: object) -> None:
    """The same over free sizes."""
    nodes = Nodes({"x": ("float32", shape)})
    output = nodes.add(op, "x", *constants, **attributes)
    for size in (3, 7, 33):
        compare(nodes, [output], {"x": counted(*(size if isinstance(d, str) else d for d in shape))})


def test_reshapes_with_zeros_and_what_is_left() -> None:
    one("Reshape", counted(2, 3, 4), at(0, -1))
    one("Reshape", counted(2, 3, 4), at(4, 0, -1))
    one("Reshape", counted(2, 0, 4), at(0, 7), allowzero=1)
    one("Reshape", counted(2, 0, 4), at(4, 0, 0), allowzero=0)
    free("Reshape", ("S", 4, 6), at(0, 3, -1))


@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2, 3])
def test_flattening_from_each_axis(axis: int) -> None:
    one("Flatten", counted(2, 3, 4), axis=axis)
    free("Flatten", ("S", 3, 4), axis=axis)


def test_flattening_of_other_ranks() -> None:
    one("Flatten", counted(3))
    one("Flatten", counted(), axis=0)
    for shape, axis in (((2, 3), 3), ((2, 3), -3), ((), 1), ((), -1)):
        nodes = Nodes({"x": ("float32", shape)})
        with pytest.raises(FrontendError, match=f"axis {axis} is outside"):
            nodes.graph(nodes.add("Flatten", "x", axis=axis))


@pytest.mark.parametrize("axes", [(0,), (-1,), (2, 0), (0, -1, 1)], ids=str)
def test_axes_put_in_and_taken_out(axes: tuple[int, ...]) -> None:
    one("Unsqueeze", counted(2, 3), at(*axes))
    one("Squeeze", counted(1, 1, 1, 3, 1), at(*{axis % 5 for axis in axes if axis != 3}))
    one("Squeeze", counted(1, 2, 1))


@pytest.mark.parametrize("axis", [-3, -1, 0, 1, 2])
def test_joining_leaves_out_what_is_empty(axis: int) -> None:
    x = counted(2, 3, 4)
    empty = np.zeros([0 if i == axis % 3 else d for i, d in enumerate(x.shape)], np.float32)
    one("Concat", x, empty, x, axis=axis)
    one("Concat", empty, empty, axis=axis)
    one("Concat", empty, axis=axis)
    nodes = Nodes({"x": ("float32", x.shape)})
    assert not nodes.graph(nodes.add("Concat", empty, "x", empty, axis=axis)).ops


def test_the_first_version_joined_along_the_second_axis() -> None:
    nodes = Nodes({"x": ("float32", (2, 3, 4))}, 1)
    assert nodes.graph(nodes.add("Concat", "x", "x")).outputs[0][1].shape == (2, 6, 4)


@pytest.mark.parametrize(("size", "parts"), [(7, 3), (6, 3), (4, 3), (5, 2), (3, 3)])
@pytest.mark.parametrize("axis", [0, -1])
def test_splits_into_a_number_of_parts(size: int, parts: int, axis: int) -> None:
    one("Split", counted(size, size), outputs=parts, num_outputs=parts, axis=axis)
    one("Split", counted(size, size), at(1, 0, size - 1), outputs=3, axis=axis)
    if size % parts == 0:
        one("Split", counted(size, size), outputs=parts, axis=axis, opset=13)


def test_splits_of_the_first_axis_where_none_is_said() -> None:
    one("Split", counted(4, 6), at(1, 3), outputs=2)


def test_a_free_size_splits_into_equal_parts() -> None:
    nodes = Nodes({"x": ("float32", ("S",))})
    doubled = nodes.add("Concat", "x", "x", axis=0)
    outputs = nodes.many("Split", doubled, outputs=2, num_outputs=2)
    compare(nodes, outputs, {"x": counted(7)})


def test_repeats_of_each_axis() -> None:
    for repeats in itertools.product((1, 2, 3), repeat=3):
        one("Tile", counted(2, 1, 3), at(*repeats))
    one("Tile", counted(2, 1, 3), at(2, 0, 1))
    free("Tile", ("S", 2), at(3, 2))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [(0, 2), (2, 0), (1, 0), (0, 1), (1, 2), (2, 1), (2, 2), (0, 0)], ids=str)
def test_pads_of_a_free_size(mode: str, pads: tuple[int, int]) -> None:
    """Of three sizes, so that there is something to mirror."""
    filling: list[object] = [np.float32(1.5)] if mode == "constant" else [None]
    nodes = Nodes({"x": ("float32", (2, "S"))})
    thrice = nodes.add("Concat", "x", "x", "x", axis=1)
    outputs = [
        nodes.add("Pad", thrice, at(0, pads[0], 0, pads[1]), *filling, mode=mode),
        nodes.add("Pad", thrice, at(*pads), *filling, at(-1), mode=mode),
    ]
    for size in (1, 7, 33):
        compare(nodes, outputs, {"x": counted(2, size)})


@pytest.mark.parametrize("fill", [2**53 - 1, 2**53, 2**53 + 1, 2**60 + 1, -(2**53) - 1, -(2**63)])
def test_pads_of_large_integers_are_exact(fill: int) -> None:
    nodes = Nodes({"x": ("int64", (2, 3))})
    compare(
        nodes, [nodes.add("Pad", "x", at(0, 1, 2, 0), np.int64(fill))], {"x": counted(2, 3, dtype=np.int64)}, rtol=0
    )


@pytest.mark.parametrize("fill", [0, 1, -7, 2**53 - 1])
def test_pads_of_one_number_are_one_op(fill: int) -> None:
    nodes = Nodes({"x": ("int64", (2, 3))})
    ops = nodes.graph(nodes.add("Pad", "x", at(0, 1, 2, 0), np.int64(fill))).ops
    assert [type(op) for op in ops] == [Pad]


def test_pads_of_a_number_that_is_computed() -> None:
    for dtype in ("float32", "int64"):
        nodes = Nodes({"x": (dtype, (2, 3)), "fill": (dtype, ())})
        outputs = [nodes.add("Pad", "x", at(0, 1, 2, 0), "fill"), nodes.add("Pad", "x", at(0, 0, 0, 0), "fill")]
        compare(nodes, outputs, {"x": counted(2, 3, dtype=np.dtype(dtype)), "fill": np.array(7, dtype)})


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads_of_nothing_are_nothing(mode: str) -> None:
    """Also where nothing could be mirrored."""
    for size in (1, 3, "S"):
        nodes = Nodes({"x": ("float32", (2, size))})
        assert not nodes.graph(nodes.add("Pad", "x", at(0, 0, 0, 0), mode=mode)).ops


@pytest.mark.parametrize("pads", [(0, "S"), ("S", 0)], ids=str)
def test_mirrored_pads_are_numbers(pads: tuple[int | str, int | str]) -> None:
    nodes = Nodes({"x": ("float32", ("S",))})
    size = nodes.add("Shape", "x")
    row = nodes.add("Concat", *(size if pad == "S" else at(0) for pad in pads), axis=0)
    with pytest.raises(FrontendError, match="pads of mode 'edge' must be known numbers when compiling"):
        nodes.graph(nodes.add("Pad", "x", row, mode="edge"))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads_that_take_elements_off(mode: str) -> None:
    for pads in ((-1, 0), (0, -2), (-1, 2), (2, -1), (-1, -1)):
        x = counted(3, 7)
        nodes = Nodes({"x": ("float32", x.shape)})
        (found,) = evaluated(nodes.graph(nodes.add("Pad", "x", at(*pads), None, at(1), mode=mode)), {"x": x})
        left = x[:, max(0, -pads[0]) : 7 - max(0, -pads[1])]
        expected = np.pad(left, ((0, 0), (max(0, pads[0]), max(0, pads[1]))), mode=mode)  # type: ignore[call-overload]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32, np.float64, np.int16])
@pytest.mark.parametrize(
    ("start", "limit", "delta"), [(0, 5, 1), (2, 9, 3), (9, 2, -3), (5, 5, 1), (5, 2, 1), (-3, 4, 2)]
)
def test_ranges(dtype: type, start: int, limit: int, delta: int) -> None:
    nodes = Nodes({})
    compare(nodes, [nodes.add("Range", *(np.array(x, dtype) for x in (start, limit, delta)))], {})


@pytest.mark.parametrize("size", [SMALL, SMALL + 1])
@pytest.mark.parametrize(("start", "delta"), [(0, 1), (3, 1), (0, 2), (3, -2)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_long_ranges(size: int, start: int, delta: int, dtype: type) -> None:
    nodes = Nodes({})
    output = nodes.add("Range", *(np.array(x, dtype) for x in (start, start + delta * size, delta)))
    compare(nodes, [output], {})
    made = {op.name for op in nodes.graph(output).ops}
    assert ("t.iota" in made) == (size > SMALL)
    assert (start, delta) != (0, 1) or not made & {"t.add", "t.mul"}


def test_ranges_of_fractions() -> None:
    for start, limit, delta in ((0, 1, 0.25), (1, 0, -0.3), (0.5, 2.1, 0.4)):
        nodes = Nodes({})
        compare(nodes, [nodes.add("Range", *(np.float32(x) for x in (start, limit, delta)))], {})


def test_ranges_of_large_integers_and_of_decimal_fractions() -> None:
    nodes = Nodes({})
    outputs = [
        nodes.add("Range", *(np.int64(2**60 + i) for i in (1, 4)), np.int64(1)),
        nodes.add("Range", *(np.int64(2**60 + i) for i in (4, -1)), np.int64(-2)),
        nodes.add("Range", np.float32(0.1), np.float32(1.1), np.float32(0.1)),
        nodes.add("Range", np.float32(0.3), np.float32(0.9), np.float32(0.2)),
    ]
    compare(nodes, outputs[:2], {}, rtol=0)
    compare(nodes, outputs[2:], {})


@pytest.mark.parametrize("bounds", ["to S", "from S", "from S to S + 4"])
@pytest.mark.parametrize("delta", [0.5, 1.5, -1.5])
def test_steps_of_sizes_are_whole(bounds: str, delta: float) -> None:
    nodes = Nodes({"x": ("float32", ("S",))})
    size = nodes.add("Cast", nodes.add("Gather", nodes.add("Shape", "x"), np.int64(0)), to=1)
    start, limit = {
        "to S": (np.float32(0), size), "from S": (size, np.float32(0)),
        "from S to S + 4": (size, nodes.add("Add", size, np.float32(4))),
    }[bounds]  # fmt: skip
    with pytest.raises(FrontendError, match=rf"in steps of {delta} sizes are not counted"):
        nodes.graph(nodes.add("Range", start, limit, np.float32(delta)))


@pytest.mark.parametrize("delta", [1, 2, 3, -1, -2])
@pytest.mark.parametrize("start", [-3, 0, 2])
def test_ranges_up_to_a_free_size(delta: int, start: int) -> None:
    nodes = Nodes({"x": ("float32", ("S",))})
    size = nodes.add("Gather", nodes.add("Shape", "x"), np.int64(0))
    end = nodes.add("Add", nodes.add("Mul", size, np.int64(2)), np.int64(start))
    bounds = (np.int64(start), end) if delta > 0 else (end, np.int64(start))
    output = nodes.add("Range", *bounds, np.int64(delta))
    for count in (1, 7, 64):
        compare(nodes, [output], {"x": counted(count)})


def test_a_range_up_to_a_size_may_be_empty() -> None:
    nodes = Nodes({"x": ("float32", ("S",))})
    size = nodes.add("Gather", nodes.add("Shape", "x"), np.int64(0))
    output = nodes.add("Range", np.int64(1), size, np.int64(1))
    for count in (1, 7):
        compare(nodes, [output], {"x": counted(count)})
    assert [type(op) for op in nodes.graph(nodes.add("Range", np.int64(0), size, np.int64(1))).ops] == [Iota]
    with pytest.raises(FrontendError, match="whether the range from 2 to S has any elements depends on the input"):
        nodes.graph(nodes.add("Range", np.int64(2), size, np.int64(1)))


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [None, -2, -1, 0, 1, 3])
def test_triangles(upper: int, k: int | None) -> None:
    moved = [] if k is None else [np.int64(k)]
    for shape in ((3, 3), (2, 3, 5), (5, 2), (0, 3)):
        one("Trilu", counted(*shape) + 1, *moved, upper=upper)
    one("Trilu", counted(4, 4, dtype=np.int64) + 1, *moved, upper=upper)
    free("Trilu", (2, "S", "S"), *moved, upper=upper)


@pytest.mark.parametrize("k", [-1, 0, 2])
def test_ones_on_a_diagonal(k: int) -> None:
    one("EyeLike", counted(3, 5), k=k)
    one("EyeLike", counted(5, 3, dtype=np.int32), k=k, dtype=11)
    free("EyeLike", ("S", 4), k=k)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_blocks_of_places_and_channels(mode: str) -> None:
    x = counted(2, 18, 2, 5)
    one("DepthToSpace", x, blocksize=3, mode=mode)
    one("DepthToSpace", x, blocksize=3)
    nodes = Nodes({"x": ("float32", x.shape)})
    turned = nodes.add("DepthToSpace", "x", blocksize=3, mode=mode)
    back = nodes.add("SpaceToDepth", turned, blocksize=3, mode=mode)
    (found,) = evaluated(nodes.graph(back), {"x": x})
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("op", ["DepthToSpace", "SpaceToDepth"])
@pytest.mark.parametrize("mode", ["", "odd"])
def test_blocks_of_another_order_are_refused(op: str, mode: str) -> None:
    nodes = Nodes({"x": ("float32", (1, 4, 2, 2))})
    with pytest.raises(FrontendError, match=f"mode '{mode}' is neither of DCR, CRD"):
        nodes.graph(nodes.add(op, "x", blocksize=2, mode=mode))


@pytest.mark.parametrize("size", [SMALL, SMALL + 1])
def test_as_many_numbers_as_are_followed(size: int) -> None:
    kept = np.arange(size) % 3 == 0
    nodes = Nodes({})
    output = nodes.add("NonZero", kept)
    if size == SMALL:
        compare(nodes, [output], {})
        return
    with pytest.raises(FrontendError, match="which elements are zero must be known numbers"):
        nodes.graph(output)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3), (8, 9), (9, 8), (5, 6), (2, 9)], ids=str)
def test_crops_and_pads_at_the_centre(sizes: tuple[int, int]) -> None:
    one("CenterCropPad", counted(5, 6), at(*sizes), opset=18)
    one("CenterCropPad", counted(5, 2, 6), at(*sizes), opset=18, axes=[0, -1])


@pytest.mark.parametrize("size", [1, 4096, 4097])
def test_long_axes_in_reverse(size: int) -> None:
    one("Slice", counted(2, size), at(-1), at(-(2**63)), at(1), at(-1))
    free("Slice", ("S", 2), at(-1), at(-(2**63)), at(0), at(-1))


@pytest.mark.parametrize("axis", [-3, -1, 0, 1])
def test_rows_by_a_known_index(axis: int) -> None:
    size = (4, 3, 5)[axis]
    for index in (np.int64(-1), np.int64(0), np.int64(size - 1), at(-size), np.array([[1]]), at(1, -1)):
        one("Gather", counted(4, 3, 5), index, axis=axis)
    nodes = Nodes({"x": ("float32", (4, 3, 5))})
    assert [type(op) for op in nodes.graph(nodes.add("Gather", "x", at(1), axis=axis)).ops] == [Slice]
    nodes = Nodes({"x": ("float32", ("S", 3))})
    compare(nodes, [nodes.add("Gather", "x", np.int64(-1)), nodes.add("Gather", "x", at(0))], {"x": counted(7, 3)})


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_elements_of_one_number_are_that_number(axis: int) -> None:
    nodes = Nodes({"i": ("int64", (3, 2))})
    same = nodes.add("Expand", np.float32(7), at(2, 3, 4))
    compare(nodes, [nodes.add("Gather", same, "i", axis=axis)], {"i": np.array([[0, 1], [1, 0], [-1, -2]])})


def test_elements_of_what_has_none() -> None:
    nodes = Nodes({"i": ("int64", (0, 1))})
    empty = np.zeros((0, 3), np.float32)
    compare(nodes, [nodes.add(op, empty, "i") for op in ("Gather", "GatherND")], {"i": np.zeros((0, 1), np.int64)})


def test_an_index_of_no_axis_is_all() -> None:
    x, index = counted(2, 3), np.zeros((4, 5, 0), np.int64)
    one("GatherND", x, index)
    one("ScatterND", x, index, RNG.random((4, 5, 2, 3)).astype(np.float32))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_elements_at_fewer_indices_than_there_are_rows(axis: int) -> None:
    x = counted(4, 3, 5)
    index = RNG.integers(-3, 3, (2, 2, 2))
    one("GatherElements", x, index, axis=axis)
    one("GatherElements", x, index)
    nodes = Nodes({"x": ("float32", x.shape), "i": ("int64", index.shape)})
    compare(nodes, [nodes.add("GatherElements", "x", "i", axis=axis)], {"x": x, "i": index})


def test_features_by_index() -> None:
    for x, expected in ((counted(5), [[3, 0]]), (counted(2, 5), [[3, 0], [8, 5]])):
        node = Node("ArrayFeatureExtractor", "ai.onnx.ml", 1, "n", ("x", "i"), ("y",))
        given = Input("x", Tensor(x.shape, "f32"))
        index = Item(constant([3, 0], "i64"))
        (item,) = Translation().run(Body(("x", "i"), ("y",), (node,)), {"x": Item(given), "i": index})
        (found,) = evaluated(Graph("g", (given,), (("y", item.value),)), {"x": x})
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("rows", "checks"), [(6, 0), (5, 0), (4, 1), (3, 1)])
@pytest.mark.parametrize("op", ["GatherND", "ScatterND", "ScatterElements"])
def test_an_index_is_checked_unless_it_cannot_be_out_of_range(op: str, rows: int, checks: int) -> None:
    nodes = Nodes({"x": ("float32", (rows, 1)), "i": ("int64", (3, 1))})
    index = nodes.add("Mod", "i", np.int64(5))
    graph = nodes.graph(nodes.add(op, "x", index, *([] if op == "GatherND" else [np.ones((3, 1), np.float32)])))
    assert sum(isinstance(each, CheckedIndex) for each in graph.ops) == checks


@pytest.mark.parametrize(
    ("shape", "target"), [((3,), (2, 3)), ((3, 1), (2,)), ((1, 3), (2, 1)), ((3,), (3, 1)), ((), (2,))]
)
def test_spreads(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    one("Expand", counted(*shape), at(*target))
    free("Expand", ("S", 1), at(2, 1, 3))


@pytest.mark.parametrize(
    ("op", "index", "updates", "attributes", "checked"),
    [
        ("GatherND", (6, 2), None, {}, ["axis 0 of x", "axis 1 of x"]),
        ("GatherND", (2, 6, 1), None, {"batch_dims": 1}, ["axis 1 of x"]),
        ("ScatterND", (6, 2), (6, 4), {}, ["axis 0 of x", "axis 1 of x"]),
        ("ScatterElements", (2, 3, 4), (2, 3, 4), {"axis": 1}, ["axis 1 of x"]),
    ],
)
def test_an_index_that_is_checked_names_its_axis(
    op: str, index: tuple[int, ...], updates: tuple[int, ...] | None, attributes: dict[str, int], checked: list[str]
) -> None:
    more = {} if updates is None else {"u": ("float32", updates)}
    nodes = Nodes({"x": ("float32", (2, 3, 4)), "i": ("int64", index), **more})
    graph = nodes.graph(nodes.add(op, *nodes.inputs, **attributes))
    assert [each.what for each in graph.ops if isinstance(each, CheckedIndex)] == checked


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_largest_of_an_axis(axis: int) -> None:
    x = RNG.permutation(60).reshape(3, 4, 5).astype(np.float32)
    for largest, count in itertools.product((0, 1), (0, 1, 3)):
        one("TopK", x, at(count), outputs=2, axis=axis, largest=largest)
    one("TopK", x, outputs=2, opset=1 + 8, k=2, axis=axis)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_ones_at_indices(axis: int) -> None:
    nodes = Nodes({"i": ("int64", (3, 2))})
    output = nodes.add("OneHot", "i", at(4), np.array([2.5, -1.5], np.float32), axis=axis)
    compare(nodes, [output], {"i": np.array([[0, 3], [-1, -4], [4, -5]])})


def test_as_many_ones_as_a_size_says() -> None:
    nodes = Nodes({"i": ("int64", (3,)), "x": ("float32", ("S",))})
    depths, ends = (nodes.add("Shape", "x"), np.array([5.0], np.float32)), np.array([0, 1], np.float32)
    outputs = [nodes.add("OneHot", "i", depth, ends) for depth in depths]
    for size in (1, 7):
        compare(nodes, outputs, {"i": np.array([0, -1, 4]), "x": counted(size)})


@pytest.mark.parametrize("mode", ["linear", "circular"])
@pytest.mark.parametrize("starts", [None, [1, 3]])
@pytest.mark.parametrize("axis", [1, -2, 2])
def test_a_cache_is_written_from_each_start(mode: str, starts: list[int] | None, axis: int) -> None:
    x, update = counted(2, 5, 5, 3), -1 - counted(2, 5, 5, 3)
    update = update[:, :, :2] if axis != 1 else update[:, :2]
    nodes = Nodes({"x": ("float32", x.shape), "u": ("float32", update.shape)}, 24)
    given = [] if starts is None else [np.array(starts)]
    (found,) = evaluated(
        nodes.graph(nodes.add("TensorScatter", "x", "u", *given, axis=axis, mode=mode)), {"x": x, "u": update}
    )
    expected = x.copy()
    for b, start in enumerate(starts or [0, 0]):
        for i in range(2):
            place = (slice(None),) * (axis % 4 - 1)
            expected[b][(*place, (start + i) % 5)] = update[b][(*place, i)]
    np.testing.assert_array_equal(found, expected)


def test_a_cache_is_not_written_beyond_its_end() -> None:
    nodes = Nodes({"x": ("float32", (2, 5, 3)), "u": ("float32", (2, 2, 3))}, 24)
    graph = nodes.graph(nodes.add("TensorScatter", "x", "u", np.array([4, 0])))
    with pytest.raises(IRError, match="axis 1 of x"):
        evaluated(graph, {"x": counted(2, 5, 3), "u": counted(2, 2, 3)})
    for mode in ("", "ring"):
        with pytest.raises(FrontendError, match=f"mode '{mode}' is neither of linear, circular"):
            nodes.graph(nodes.add("TensorScatter", "x", "u", np.array([0, 0]), mode=mode))


def test_elements_kept_by_a_mask() -> None:
    one("Compress", counted(3, 4), np.array([False, True, True]), axis=0)
    one("Compress", counted(3, 4), np.array([True, False, False, True]), axis=-1)
    one("Compress", counted(3, 4), np.array([False, True, False, False, True]))
    one("Compress", counted(3, 4), np.array([True, False, True, False, False]), axis=0)  # more, but nothing of it
    for size in (3, "S"):
        nodes = Nodes({"x": ("float32", (size, 4))})
        with pytest.raises((FrontendError, IRError), match=r"index .*out of range"):
            graph = nodes.graph(nodes.add("Compress", "x", np.array([False] * 3 + [True]), axis=0))
            evaluated(graph, {"x": counted(3, 4)})


@pytest.mark.parametrize(("batch", "time"), [(0, 1), (1, 0)])
def test_beginnings_of_sequences_reversed(batch: int, time: int) -> None:
    x = counted(*((3, 5, 2) if batch == 0 else (5, 3, 2)))
    one("ReverseSequence", x, at(1, 5, 3), batch_axis=batch, time_axis=time)
    if batch == 1:
        one("ReverseSequence", x, at(1, 5, 3))


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("depth", [1, 2])
def test_gathers_of_batches(batch: int, depth: int) -> None:
    x = counted(2, 3, 4, 5)
    lead = x.shape[:batch]
    index = np.stack([RNG.integers(-n, n, (*lead, 6)) for n in x.shape[batch : batch + depth]], -1)
    one("GatherND", x, index, batch_dims=batch)
    nodes = Nodes({"x": ("float32", x.shape), "i": ("int64", index.shape)})
    compare(nodes, [nodes.add("GatherND", "x", "i", batch_dims=batch)], {"x": x, "i": index})


@pytest.mark.parametrize(
    ("op", "constants", "attributes", "message"),
    [
        ("Reshape", (at(-1, 2, -1),), {}, "leaves more than one size open"),
        ("Reshape", (at(6, -1, -1),), {}, "leaves more than one size open"),
        ("Slice", (at(0, 0), at(1)), {}, "is not valid"),
        ("Slice", (at(0), at(1), at(0, 1)), {}, "is not valid"),
        ("Pad", (at(1, 0, 0),), {}, "is not valid"),
        ("Pad", (at(1, 0, 0, 0, 0, 0, 0),), {}, "is not valid"),
        ("Reshape", (at(5, -1),), {}, "do not split evenly"),
        ("Reshape", (at(0, 0, -1),), {"allowzero": 1}, "a size cannot be inferred"),
        ("Reshape", (), {}, "no shape is given"),
        ("Unsqueeze", (), {}, "no axes are given"),
        ("Squeeze", (at(0),), {}, "its size is not 1"),
        ("Tile", (at(2, 2),), {}, "2 repeats for 3 axes"),
        ("Split", (at(1, 2),), {"axis": 2}, "are not the 4 of axis 2"),
        ("Slice", (at(0),), {}, "a slice needs starts and ends"),
        ("Slice", (None, at(1)), {}, "a slice needs starts and ends"),
        ("Slice", (at(0), at(1), at(0), at(0)), {}, "a step is zero"),
        ("Pad", (), {}, "no pads are given"),
        ("Pad", (at(1, 0, 0, 0, 0, 0),), {"mode": "odd"}, "pads of mode 'odd'"),
        ("TopK", (at(5),), {}, "5 elements of an axis of 4"),
        ("TensorScatter", (np.zeros((2, 3, 4), np.float32),), {"axis": 0}, "cannot be its batch"),
        ("Gather", (at(0, 2),), {}, "index 2 is out of range: axis 0 of x has 2 elements"),
        ("Gather", (at(0, 5, -9),), {}, "index 5 is out of range"),
        ("Gather", (at(-3, 0),), {}, "index -3 is out of range"),
        ("GatherElements", (np.full((1, 1, 1), 3),), {"axis": 1}, "index 3 is out of range: axis 1 of x"),
    ],
)  # fmt: skip
def test_what_makes_no_shape(
    op: str, constants: tuple[object, ...], attributes: dict[str, object], message: str
) -> None:
    nodes = Nodes({"x": ("float32", (2, 3, 4))})
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add(op, "x", *constants, **attributes))


@pytest.mark.parametrize("less", [5, 64])
def test_a_start_that_only_some_sizes_count_from_the_end_is_open(less: int) -> None:
    nodes = Nodes({"x": ("float32", ("S",))})
    start = nodes.add("Sub", nodes.add("Shape", "x"), at(less))
    with pytest.raises(FrontendError, match=f"whether S . -{less} is negative depends on the input"):
        nodes.graph(nodes.add("Slice", "x", start, at(99)))


@pytest.mark.parametrize(
    ("op", "constants", "attributes", "message"),
    [
        ("Pad", (at(70, 0),), {"mode": "wrap"}, "take more elements than the axis of S has"),
        ("Pad", (at(1, 0),), {"mode": "reflect"}, "take more elements than the axis of S has"),
        ("TopK", (at(2),), {}, "2 elements of an axis of S"),
        ("CenterCropPad", (at(3),), {}, "cropping needs sizes that are known"),
        ("Slice", (at(3), at(9)), {}, "whether 3 is within an axis of S depends on the input"),
    ],
)  # fmt: skip
def test_what_a_free_size_leaves_open(
    op: str, constants: tuple[object, ...], attributes: dict[str, object], message: str
) -> None:
    nodes = Nodes({"x": ("float32", ("S",))})
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add(op, "x", *constants, **attributes))
