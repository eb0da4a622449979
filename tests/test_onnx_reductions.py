"""Reductions of ONNX, running sums, places of extremes and softmax, against onnxruntime and numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_graphs import Draws, Nodes, compare, evaluated

from llmc.compiler.ir.structural import Reshape
from llmc.compiler.ir.types import Array

RNG = np.random.default_rng(19)
floats = Draws(RNG).floats


def one(op: str, x: Array, *constants: object, opset: int = 21, **attributes: object) -> None:
    """The op over x and constants of the file is what onnxruntime gives."""
    nodes = Nodes({"x": (str(x.dtype), x.shape)}, opset)
    compare(nodes, [nodes.add(op, "x", *constants, **attributes)], {"x": x})


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])
def test_running_sums_and_products(dtype: type) -> None:
    x = RNG.integers(-3, 4, (3, 4, 2)).astype(dtype)
    for axis, exclusive, reverse in itertools.product((0, 1, -1), (0, 1), (0, 1)):
        one("CumSum", x, np.int64(axis), exclusive=exclusive, reverse=reverse)
        nodes = Nodes({"x": (np.dtype(dtype).name, x.shape)}, 26)
        output = nodes.add("CumProd", "x", np.int64(axis), exclusive=exclusive, reverse=reverse)
        turned = np.flip(x, axis) if reverse else x
        ones = np.ones_like(turned.take([0], axis))
        before = np.concatenate([ones, turned.take(range(x.shape[axis] - 1), axis)], axis) if exclusive else turned
        products = np.cumprod(before, axis)
        expected = np.flip(products, axis) if reverse else products
        np.testing.assert_array_equal(evaluated(nodes.graph(output), {"x": x})[0], expected)
    nodes = Nodes({"x": (np.dtype(dtype).name, x.shape)}, 26)
    output = nodes.add("CumProd", "x", np.int64(0), reverse=1)
    np.testing.assert_array_equal(evaluated(nodes.graph(output), {"x": x})[0], np.cumprod(x[::-1], 0)[::-1])


def test_reductions_of_truths_and_integers() -> None:
    truths = np.array([[True, False], [True, True]])
    for op in ("ReduceMax", "ReduceMin"):
        one(op, truths, np.array([1]), keepdims=0)
        one(op, truths, np.zeros(0, np.int64), noop_with_empty_axes=1)
    x = RNG.integers(1, 9, (3, 4)).astype(np.int32)
    for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceSumSquare",
               "ReduceL2", "ReduceLogSum"):  # fmt: skip
        one(op, x, np.array([-1]), keepdims=0)
        one(op, x, opset=11, axes=[0], keepdims=1)


def test_sums_of_exponentials_do_not_overflow() -> None:
    x = np.array([[500, 501, -500], [-np.inf, -np.inf, -np.inf], [-np.inf, 0, 1]], np.float32)
    for keep in (0, 1):
        one("ReduceLogSumExp", x, np.array([1]), keepdims=keep)
    one("ReduceLogSum", np.abs(floats(3, 7)), np.array([1]))


def test_what_is_reduced_of_nothing() -> None:
    x = np.zeros((2, 0, 3), np.float32)
    for op, value in (("ReduceSum", 0), ("ReduceProd", 1), ("ReduceMax", -np.inf), ("ReduceMin", np.inf)):
        nodes = Nodes({"x": ("float32", x.shape)})
        (found,) = evaluated(nodes.graph(nodes.add(op, "x", np.array([1]), keepdims=0)), {"x": x})
        np.testing.assert_array_equal(found, np.full((2, 3), value, np.float32))


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1",
                                "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"])  # fmt: skip
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions(op: str, keep: int) -> None:
    x = floats(3, 7, 2)
    for axes in ([0], [1, 2], [-1], [0, -2], [1, -2]):
        one(op, x, np.array(axes), keepdims=keep)
    one(op, x, keepdims=keep)
    one(op, x, np.zeros(0, np.int64), noop_with_empty_axes=1, keepdims=keep)


@pytest.mark.parametrize("op", ["ReduceMin", "ReduceMax"])
def test_the_least_and_greatest_of_bf16(op: str) -> None:
    x = floats(3, 7).astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    nodes = Nodes({"x": ("bfloat16", x.shape)})
    (found,) = evaluated(nodes.graph(nodes.add(op, "x", np.array([1]), keepdims=0)), {"x": x})
    np.testing.assert_array_equal(found, x.min(1) if op == "ReduceMin" else x.max(1))


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_first_and_last_of_equal_elements(op: str, dtype: type) -> None:
    x = RNG.integers(0, 3, (3, 31, 2)).astype(dtype)
    for last in (0, 1):
        one(op, x, axis=1, keepdims=last, select_last_index=last)


def test_least_of_the_least_integer() -> None:
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    for x in ([3, low, 5], [high, low, 5], [high, high, 5]):
        one("ArgMin", np.array(x, np.int32), axis=0)


@pytest.mark.parametrize("version", [11, 12, 13])
def test_softmax_before_opset_13_takes_axes_together(version: int) -> None:
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        for axis in (0, 1, 2, -1):
            one(op, floats(3, 7, 2), opset=version, axis=axis)
        one(op, floats(3, 7, 2), opset=version)
        one(op, floats(3, 7), opset=version)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("version", [12, 13])
def test_softmax_of_the_last_axis_moves_nothing(op: str, version: int) -> None:
    """Which is the axis where none is said since opset 13."""
    axis = {} if version >= 13 else {"axis": 2}
    one(op, floats(3, 7, 2), opset=version, **axis)
    nodes = Nodes({"x": ("float32", (3, 7, 2))}, version)
    assert not any(isinstance(op, Reshape) for op in nodes.graph(nodes.add(op, "x", **axis)).ops)
