"""QuantizeLinear, DequantizeLinear and packed integers, one op each: every shape of scales, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_contrib_tools import Case, Fixed
from onnx_contrib_tools import compare as same
from onnx_graphs import Nodes, compare, evaluated
from onnx_products import exact_products

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import RoundToIntegers
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.onnx.ops_defined import body_of
from llmc.frontends.onnx.translation import Item, Translation

RNG = np.random.default_rng(23)
X = (RNG.standard_normal((4, 6, 8)) * 40).astype(np.float32)
SHAPES: tuple[tuple[tuple[int, ...], dict[str, int]], ...] = (
    ((), {}), ((1,), {}), ((6,), {}), ((6,), {"axis": 1}), ((4,), {"axis": 0}), ((8,), {"axis": -1}),
    ((8,), {"axis": 2}), ((2, 6, 8), {"axis": 0, "block_size": 2}), ((4, 2, 8), {"axis": 1, "block_size": 3}),
    ((4, 2, 8), {"axis": -2, "block_size": 3}), ((4, 6, 2), {"axis": -1, "block_size": 4}),
    ((4, 6, 2), {"axis": 2, "block_size": 4}),
)  # fmt: skip


def scales(shape: tuple[int, ...]) -> np.ndarray:
    return (RNG.random(shape) + 0.5).astype(np.float32)


def integers(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize(("shape", "attributes"), SHAPES, ids=str)
def test_rounding_and_scaling(dtype: type, shape: tuple[int, ...], attributes: dict[str, int]) -> None:
    scale, zero = scales(shape), integers(shape, dtype)
    nodes = Nodes({"x": ("float32", X.shape)})
    outputs = [
        nodes.add("QuantizeLinear", "x", scale, zero, **attributes),
        nodes.add("DequantizeLinear", integers(X.shape, dtype), scale, zero, **attributes),
        nodes.add("DequantizeLinear", integers(X.shape, dtype), scale, **attributes),
    ]
    if dtype is np.uint8:
        outputs.append(nodes.add("QuantizeLinear", "x", scale, **attributes))
    compare(nodes, outputs, {"x": X})


@pytest.mark.parametrize("length", [1, 7])
def test_one_scale_in_a_vector_is_for_all(length: int) -> None:
    """Also where the axis has one element."""
    x = X[:, :1, :length]
    nodes = Nodes({"x": ("float32", x.shape)})
    scale, zero = np.array([0.7], np.float32), np.array([3], np.uint8)
    outputs = [nodes.add("QuantizeLinear", "x", scale, zero, axis=axis) for axis in (1, 2)]
    compare(nodes, outputs, {"x": x})


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_the_integers_may_be_named(number: int) -> None:
    nodes = Nodes({"x": ("float32", X.shape)})
    output = nodes.add("QuantizeLinear", "x", np.float32(0.7), output_dtype=number)
    (expected,) = ReferenceEvaluator(nodes.model(output)).run(None, {"x": X})
    (found,) = evaluated(nodes.graph(output), {"x": X})
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_numbers_of_rank_0_are_rounded() -> None:
    nodes = Nodes({"x": ("float32", ())})
    outputs = [nodes.add("QuantizeLinear", "x", np.float32(0.7), np.int8(3))]
    compare(nodes, outputs, {"x": np.float32(12.3)})


def test_halves_are_rounded_to_even_and_cut_off() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300, 127.5], np.float32)
    nodes = Nodes({"x": ("float32", x.shape)})
    outputs = [nodes.add("QuantizeLinear", "x", np.float32(1), zero) for zero in (np.int8(0), np.uint8(1), np.int8(-3))]
    compare(nodes, outputs, {"x": x})


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "message"),
    [
        ("QuantizeLinear", (scales(()),), {"precision": 1}, "precision=1 is not supported, only 0"),
        ("QuantizeLinear", (scales(()),), {"output_dtype": 17}, "data type float8e4m3fn is not supported"),
        ("QuantizeLinear", (scales(()), np.float32(0)), {}, "rounding to f32 is not supported"),
        ("QuantizeLinear", (scales((6,)),), {"axis": 3}, "axis 3 of"),
        ("QuantizeLinear", (scales((6,)),), {"axis": -4}, "axis -4 of"),
        ("QuantizeLinear", (scales((4, 6)),), {}, "one a tensor, an axis or a block"),
        ("QuantizeLinear", (scales((4, 2)),), {"block_size": 3}, "one a tensor, an axis or a block"),
        ("DequantizeLinear", (scales(()),), {}, "the data are f32, not integers"),
    ],
)
def test_what_is_not_rounded(op: str, operands: tuple[object, ...], attributes: dict[str, int], message: str) -> None:
    nodes = Nodes({"x": ("float32", X.shape)})
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add(op, "x", *operands, **attributes))


def test_scales_of_every_element_are_blocks_of_one_only_where_the_node_says_so() -> None:
    nodes = Nodes({"x": ("int8", X.shape)})
    compare(
        nodes, [nodes.add("DequantizeLinear", "x", scales(X.shape), block_size=1)], {"x": integers(X.shape, np.int8)}
    )
    with pytest.raises(FrontendError, match="one a tensor, an axis or a block"):
        nodes.graph(nodes.add("DequantizeLinear", "x", scales(X.shape)))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5)])
def test_one_scale_in_a_vector_is_for_tensors_of_every_rank(shape: tuple[int, ...]) -> None:
    nodes = Nodes({"x": ("int8", shape)})
    output = nodes.add("DequantizeLinear", "x", np.float32([0.5]), np.int8([3]), axis=0)
    compare(nodes, [output], {"x": integers(shape, np.int8)})


@pytest.mark.parametrize("zero", [np.zeros(1, np.int8), np.zeros(6, np.int8), np.zeros((4, 2, 8), np.int8)])
def test_zero_points_have_the_shape_of_scales(zero: np.ndarray) -> None:
    nodes = Nodes({"x": ("int8", X.shape)})
    scale = {1: scales((6,)), 6: scales(()), 64: scales((6,))}[zero.size]
    options = {"block_size": 3} if zero.size == 64 else {}
    with pytest.raises(FrontendError, match="the zero points are not shaped like the scales"):
        nodes.graph(nodes.add("DequantizeLinear", "x", scale, zero, **options))


def table(**changes: object) -> Case:
    """Rows of 64 integers of 4 bits in two bytes each, in blocks of 32."""
    options: dict[str, object] = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    data = changes.pop("data", integers((9, 32), np.uint8))
    zeros = changes.pop("zeros", None)
    inputs = [Fixed(np.asarray(data)), np.array([[1, 8]]), Fixed(scales((9, 2)))]
    return Case(
        "GatherBlockQuantized", [*inputs, *([] if zeros is None else [Fixed(np.asarray(zeros))])], options | changes
    )


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (table(bits=2), "bits=2: only 4 and 8 bits are supported"),
        (table(data=integers((9, 32), np.int8)), "the table is i8: only uint8 is supported"),
        (table(data=integers((9, 3, 32), np.uint8)), "only rows of a matrix are looked up"),
        (table(gather_axis=1), "only rows of a matrix are looked up"),
        (table(quantize_axis=0), "only blocks along the last axis are supported"),
        (table(zeros=scales((9, 2))), "zero points are f32: only uint8 is supported"),
    ],
)
def test_tables_that_are_not_looked_up(case: Case, message: str) -> None:
    with pytest.raises(FrontendError, match=message):
        case.graph()


@pytest.mark.parametrize("changes", [{}, {"gather_axis": -2}, {"quantize_axis": -1}], ids=str)
def test_tables_by_axes_from_the_end(changes: dict[str, object]) -> None:
    plain, other = table(), table(**changes)
    other.inputs = plain.inputs
    np.testing.assert_array_equal(plain.translated()[0], other.translated()[0])


def test_tables_without_axes_are_looked_up_by_rows() -> None:
    plain, other = table(), table()
    other.inputs = plain.inputs
    del other.attributes["gather_axis"], other.attributes["quantize_axis"]
    np.testing.assert_array_equal(plain.translated()[0], other.translated()[0])


@pytest.mark.parametrize(("shape", "axis"), [((), 1), ((8,), 1), ((8,), 2), ((8,), -1)])
def test_rows_of_integers_are_scaled_along_their_own_axes(shape: tuple[int, ...], axis: int) -> None:
    """The tokens' axis is none of the table's, though both have eight elements."""
    nodes = Nodes({"i": ("int64", (2, 8))})
    rows = nodes.add("Gather", integers((9, 8), np.int8), "i")
    output = nodes.add("DequantizeLinear", rows, scales(shape), integers(shape, np.int8), axis=axis)
    compare(nodes, [output], {"i": RNG.integers(0, 9, (2, 8))})


def ops_of(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops if op.name != "t.constant"]


def test_integers_are_scaled_whole_where_they_are_stored() -> None:
    """Of those the passes keep the integers; others are numbers like any."""
    scale, zero = scales((6,)), integers((6,), np.int8)
    shape = (30, 6, 29)  # more than what is folded at once
    nodes = Nodes({"x": ("int8", shape), "i": ("int64", (2, 7))})
    moved = nodes.add("Transpose", integers(shape[::-1], np.int8), perm=[2, 1, 0])
    stored = nodes.add("DequantizeLinear", moved, scale, zero)
    assert ops_of(nodes.graph(stored)) == ["t.transpose", "t.reshape", "t.reshape", "llm.scale_integers"]
    given = nodes.add("DequantizeLinear", "x", scale, zero)
    assert "llm.scale_integers" not in ops_of(nodes.graph(given))
    mixed = nodes.add("DequantizeLinear", nodes.add("Add", moved, nodes.add("Neg", "x")), scale, zero)
    assert "llm.scale_integers" not in ops_of(nodes.graph(mixed))
    counted = nodes.add("Cast", nodes.add("Range", np.int64(0), nodes.add("Size", "x"), np.int64(1)), to=6)
    assert "llm.scale_integers" not in ops_of(nodes.graph(nodes.add("DequantizeLinear", counted, np.float32(0.5))))
    compare(nodes, [given, mixed], {"x": integers(shape, np.int8), "i": np.zeros((2, 7), np.int64)})
    rows = nodes.add("Gather", integers((40, 8), np.int8), "i")
    embedded = nodes.graph(nodes.add("DequantizeLinear", rows, np.float32(0.5)))
    assert ops_of(embedded)[-2:] == ["llm.scale_integers", "t.gather"]
    scaled_rows = nodes.graph(nodes.add("DequantizeLinear", rows, scales((8,)), axis=2))
    assert "llm.scale_integers" not in ops_of(scaled_rows)


@pytest.mark.parametrize("least", [-382, -400, -255])
def test_numbers_near_nothing_are_rounded_by_a_scale_that_is_rounded_itself(least: int) -> None:
    """Of the smallest numbers there are: a 255th of 382 of them is one, and what is below its 255 is cut off."""
    x = (np.array([least, least // 2, 0]) * np.float64(2**-149)).astype(np.float32)
    case = Case("DynamicQuantizeLinear", [x], {}, 3, domain="")
    for own, expected in zip(case.translated(), case.onnxruntime(), strict=True):
        np.testing.assert_array_equal(own, expected)


@exact_products
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (1, 1)])
def test_a_product_of_integers_has_one_scale_for_its_rows(shape: tuple[int, ...]) -> None:
    a, b = integers((2, 7, 5), np.uint8), Fixed(integers((5, 3), np.int8))
    case = Case("MatMulIntegerToFloat", [a, b, Fixed(scales(shape)), Fixed(scales((3,)))])
    if shape in ((), (1,)):
        same(case, 1e-6)
    else:
        with pytest.raises(FrontendError, match="for a: only one"):
            case.graph()


def test_products_and_tables_have_4_bits_unless_said_otherwise() -> None:
    packed, factors = Fixed(integers((9, 2, 64), np.uint8)), Fixed(scales((9, 2)))
    x = RNG.standard_normal((2, 256)).astype(np.float32)
    same(Case("MatMulNBits", [x, packed, factors], {"N": 9, "K": 256, "block_size": 128}))
    rows = Fixed(integers((9, 128), np.uint8))
    same(Case("GatherBlockQuantized", [rows, np.array([[1, 8]]), factors], {"quantize_axis": 1}))


@pytest.mark.parametrize(("bits", "dtype"), [(4, np.int8), (8, np.int8), (8, np.float32)])
def test_zero_points_of_products_that_have_no_meaning(bits: int, dtype: type) -> None:
    packed, factors = Fixed(integers((9, 2, 4 * bits), np.uint8)), Fixed(scales((9, 2)))
    x, zeros = RNG.standard_normal((2, 64)).astype(np.float32), Fixed(np.zeros((9, 2), dtype))
    with pytest.raises(FrontendError, match=r"zero points are (i8|f32): .*only uint8"):
        Case("MatMulNBits", [x, packed, factors, zeros], {"N": 9, "K": 64, "bits": bits, "block_size": 32}).graph()


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_nothing_is_cut_off_where_blocks_are_whole(blocks: int) -> None:
    packed, factors = Fixed(integers((9, blocks, 16), np.uint8)), Fixed(scales((9, blocks)))
    zeros = Fixed(integers((9, -(-blocks // 2)), np.uint8))
    x = RNG.standard_normal((2, 32 * blocks)).astype(np.float32)
    case = Case("MatMulNBits", [x, packed, factors, zeros], {"N": 9, "K": 32 * blocks, "block_size": 32})
    same(case)
    assert ops_of(case.graph()).count("t.slice") == blocks % 2


SCALE, ZERO = np.float32(0.5), np.uint8(3)
COLUMNS = np.float32([0.5, 0.25, 2])


@pytest.mark.parametrize(
    ("first", "second", "vanishes"),
    [
        ((SCALE, ZERO), (SCALE, ZERO), True), ((SCALE, ZERO), (np.float32(0.25), ZERO), False),
        ((SCALE, ZERO), (SCALE, np.uint8(4)), False), ((SCALE,), (SCALE, ZERO), False),
        ((SCALE, ZERO), (SCALE,), False),
        ((np.array([0.5], np.float32), ZERO), (SCALE, ZERO), True),
        ((COLUMNS, np.uint8([3, 4, 5])), (COLUMNS, np.uint8([3, 4, 5])), True),
        ((COLUMNS, np.uint8([3, 4, 5])), (COLUMNS, np.uint8([3, 4, 6])), False),
        ((COLUMNS, np.uint8([3, 4, 5])), (COLUMNS[::-1].copy(), np.uint8([3, 4, 5])), False),
    ],
)  # fmt: skip
def test_a_rounding_of_a_text_model_goes_where_it_is_undone(
    first: tuple[object, ...], second: tuple[object, ...], vanishes: bool
) -> None:
    nodes = Nodes({"x": ("float32", (2, 3))})
    output = nodes.add("DequantizeLinear", nodes.add("QuantizeLinear", "x", *first), *second)
    given = {"x": Item(Input("x", Tensor((2, 3), "f32")))}
    (item,) = Translation(wide_floats=True).run(body_of(nodes.model(output).graph, {"": 21}), given)
    ops = Graph("g", (given["x"].value,), (("y", item.value),)).ops  # type: ignore[arg-type]
    assert any(isinstance(op, RoundToIntegers) for op in ops) is not vanishes
