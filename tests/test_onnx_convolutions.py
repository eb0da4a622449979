"""Convolutions of ONNX against torch and onnxruntime: integers, groups, every padding, what does not fit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx_graphs import Draws, Nodes, compare, evaluated

from llmc.compiler.ir.elementwise import Constant
from llmc.compiler.ir.structural import Matmul, Pad, Scatter
from llmc.errors import FrontendError

RNG = np.random.default_rng(3)
floats = Draws(RNG).floats
integers = Draws(RNG).integers


def convolved(op: str, x: np.ndarray, *operands: object, **attributes: object) -> np.ndarray:
    nodes = Nodes({"x": (str(x.dtype), x.shape)})
    (found,) = evaluated(nodes.graph(nodes.add(op, "x", *operands, **attributes)), {"x": x})
    return found


def sums(x: np.ndarray, w: np.ndarray, groups: int, stride: int = 1) -> np.ndarray:
    """The convolution of whole numbers along one axis, one zero in front; exact in f64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 0)))
    return F.conv1d(
        torch.from_numpy(padded), torch.from_numpy(w.astype(np.float64)), None, stride, 0, 1, groups
    ).numpy()


INTEGERS = {"kernel_shape": [3], "pads": [1, 0], "group": 2}
ZEROS = (None, np.uint8(7), np.array([7], np.uint8), np.array([0, 1, 2, 250, 4, 5], np.uint8))


@pytest.mark.parametrize("zero", ZEROS, ids=("none", "one", "a vector of one", "one a channel"))
def test_integer_convolutions_with_zero_points(zero: np.ndarray | None) -> None:
    """What is padded stands for zero: it is the zero point of x."""
    x, w = integers(2, 4, 7), integers(6, 2, 3)
    found = convolved("ConvInteger", x, w, np.uint8(9), zero, **INTEGERS)
    moved = w.astype(np.int64) - (0 if zero is None else zero.reshape(-1, 1, 1).astype(np.int64))
    np.testing.assert_array_equal(found, sums(x.astype(np.int64) - 9, moved, 2))
    plain = convolved("ConvInteger", x, w, **INTEGERS)
    np.testing.assert_array_equal(plain, sums(x, w, 2))


@pytest.mark.parametrize("scale", [0.25, [0.25], [0.25, 0.5, 1, 2, 0.125, 0.0625]], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_integer_convolutions_that_are_rounded_again(scale: float | list[float], bias: bool) -> None:
    """Scales are powers of two, so that f32 has every product exactly; halves are rounded to even."""
    x, w, own = integers(2, 4, 7), integers(6, 2, 3, dtype=np.int8), np.array(scale, np.float32)
    offsets = [RNG.integers(-99, 99, 6).astype(np.int32)] if bias else []
    found = convolved(
        "QLinearConv", x, np.float32(0.5), np.uint8(9), w, own, np.zeros(own.shape, np.int8),
        np.float32(8), np.uint8(100), *offsets, **INTEGERS,
    )  # fmt: skip
    total = sums(x.astype(np.int64) - 9, w, 2) + (offsets[0][:, None] if bias else 0)
    expected = np.rint(total * 0.5 * own.reshape(-1, 1).astype(np.float64) / 8) + 100
    np.testing.assert_array_equal(found, np.clip(expected, 0, 255))


def test_a_convolution_without_groups_is_a_linear_layer() -> None:
    """So that it is quantized like one."""
    nodes = Nodes({"x": ("float32", (2, 4, 7))})
    graph = nodes.graph(nodes.add("Conv", "x", floats(6, 4, 3), kernel_shape=[3]))
    (product,) = (op for op in graph.ops if isinstance(op, Matmul))
    assert product.b.shape == (12, 6)


@pytest.mark.parametrize("stride", [[1, 2, 3], [3, 1, 2], [1, 1, 3]], ids=str)
def test_transposed_convolutions_of_three_axes_of_different_sizes(stride: list[int]) -> None:
    x, w = floats(1, 2, 3, 4, 5), floats(2, 3, 1, 2, 3)
    found = convolved("ConvTranspose", x, w, kernel_shape=[1, 2, 3], strides=stride)
    expected = F.conv_transpose3d(torch.from_numpy(x), torch.from_numpy(w), None, stride).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
def test_convolutions_with_every_padding(mode: str) -> None:
    for size, kernel, stride in itertools.product((7, 8), (2, 3), (1, 2)):
        nodes = Nodes({"x": ("float32", (1, 2, size, 6))})
        options = {"kernel_shape": [kernel, 2], "strides": [stride, 2], "auto_pad": mode}
        outputs = [
            nodes.add("Conv", "x", floats(3, 2, kernel, 2), **options),
            nodes.add("ConvTranspose", "x", floats(2, 3, kernel, 2), floats(3), **options),
        ]
        compare(nodes, outputs, {"x": floats(1, 2, size, 6)})


@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
def test_transposed_convolutions_to_a_given_shape(mode: str) -> None:
    for shape, more in (([8, 15], 0), ([9, 16], 0), ([7, 14], 0), ([8, 15], 1), ([10, 14], 0), ([7, 17], 0)):
        nodes = Nodes({"x": ("float32", (1, 2, 4, 5))})
        output = nodes.add(
            "ConvTranspose", "x", floats(2, 3, 3, 3), kernel_shape=[3, 3], strides=[2, 3], output_shape=shape,
            auto_pad=mode, output_padding=[more, more],
        )  # fmt: skip
        compare(nodes, [output], {"x": floats(1, 2, 4, 5)})


def test_transposed_convolutions_to_a_whole_shape() -> None:
    """Old files name the batch and the channels too."""
    x, w = floats(1, 2, 4, 5), floats(2, 3, 3, 3)
    whole, spatial = (
        convolved("ConvTranspose", x, w, kernel_shape=[3, 3], strides=[2, 3], output_shape=shape)
        for shape in ([1, 3, 8, 14], [8, 14])
    )
    np.testing.assert_array_equal(whole, spatial)


def test_transposed_convolutions_with_pads_larger_than_their_reach() -> None:
    """More is cut off than the windows add: elements of the input go, not zeros."""
    for pads in ([3, 0], [0, 3], [2, 2]):
        nodes = Nodes({"x": ("float32", (1, 2, 7))})
        output = nodes.add("ConvTranspose", "x", floats(2, 3, 2), kernel_shape=[2], pads=pads)
        compare(nodes, [output], {"x": floats(1, 2, 7)})


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_same_padding_of_a_free_size(mode: str, kernel: int) -> None:
    nodes = Nodes({"x": ("float32", (1, 2, "S"))})
    output = nodes.add("Conv", "x", floats(3, 2, kernel), kernel_shape=[kernel], auto_pad=mode)
    for size in (1, 7, 64):
        compare(nodes, [output], {"x": floats(1, 2, size)})


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (2, 2, 1), (2, 2, 2), (1, 3, 1)])
def test_windows_over_a_free_size(kernel: int, stride: int, dilation: int) -> None:
    nodes = Nodes({"x": ("float32", (1, 2, "S"))})
    options = {"kernel_shape": [kernel], "strides": [stride], "dilations": [dilation], "pads": [2, 1]}
    output = nodes.add("Conv", "x", floats(3, 2, kernel), **options)
    for size in (1, 2, 7, 64):
        compare(nodes, [output], {"x": floats(1, 2, size)})


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_causal_convolutions_with_a_state(past: bool, kernel: int) -> None:
    """The same over all of a sequence, and over its parts one after another."""
    x, w, bias = floats(2, 3, 7), floats(3, 1, kernel), floats(3)
    state = floats(2, 3, kernel - 1) if past else np.zeros((2, 3, kernel - 1), np.float32)
    nodes = Nodes({"x": ("float32", x.shape)}, 26)
    outputs = nodes.many("CausalConvWithState", "x", w, bias, *([state] if past else []), outputs=2, activation="silu")
    found, after = evaluated(nodes.graph(*outputs), {"x": x})
    whole = np.concatenate([state, x], 2)
    assert not any(isinstance(op, Pad) for op in nodes.graph(*outputs).ops)
    plain = F.conv1d(torch.from_numpy(whole), torch.from_numpy(w), torch.from_numpy(bias), groups=3)
    np.testing.assert_allclose(found, F.silu(plain).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after, whole[:, :, 7:])


def test_an_activation_that_causal_convolutions_do_not_have() -> None:
    nodes = Nodes({"x": ("float32", (2, 3, 7))}, 26)
    with pytest.raises(FrontendError, match="activation 'relu' is not supported"):
        nodes.graph(nodes.many("CausalConvWithState", "x", floats(3, 1, 4), outputs=2, activation="relu")[0])


def test_what_is_added_up_in_the_padding_is_a_row_of_its_own() -> None:
    """`t.scatter` has no rows below 0."""
    nodes = Nodes({"x": ("float32", (1, 4, 9))})
    graph = nodes.graph(nodes.add("Col2Im", "x", np.array([2, 2]), np.array([2, 2]), pads=[1, 1, 1, 1]))
    (places,) = (op.indices for op in graph.ops if isinstance(op, Scatter))
    assert isinstance(places, Constant)
    assert places.value.array.min() == 0
    assert places.value.array.max() == 4


Shape = tuple[int | str, ...]


@pytest.mark.parametrize(
    ("op", "x", "w", "attributes", "message"),
    [
        ("Conv", (1, 4, 7, 7), (2, 4, 3), {}, "do not fit 2 axes"),
        ("Conv", (2, 3), (4,), {}, "do not go together"),
        ("Conv", (1, 4, 7), (2, 3, 3), {}, "4 channels in 1 groups are not the kernel's 3"),
        ("Conv", (1, 4, 7), (2, 4, 3), {"group": 2}, "4 channels in 2 groups are not the kernel's 4"),
        ("Conv", (1, 4, 7), (2, 4, 3), {"strides": [1, 1]}, "do not fit 1 axes"),
        ("Conv", (1, 4, 7), (2, 4, 3), {"dilations": [1, 1]}, "do not fit 1 axes"),
        ("Conv", (1, 4, 7), (2, 4, 3), {"pads": [1]}, "do not fit 1 axes"),
        ("Conv", (1, 4, 7, 7), (2, 4, 3, 3), {"strides": [1], "dilations": [1]}, "do not fit 2 axes"),
        ("Conv", (1, 4, 7), (2, 4, 3), {"strides": [0]}, "must be positive"),
        ("Conv", (1, 4, 7), (2, 4, 3), {"dilations": [0]}, "must be positive"),
        ("Conv", (1, 4, 7), (2, 4, 0), {}, "must be positive"),
        ("Conv", (1, 4, 7), (2, 4, 3), {"auto_pad": "SOME"}, "auto_pad 'SOME' is not supported"),
        ("Conv", (1, 4, 2), (2, 4, 3), {}, "a window of 3 does not fit into 2 elements"),
        ("Conv", (1, 4, 3), (2, 4, 2), {"dilations": [4], "pads": [1, 0]}, "a window of 5 does not fit into 4"),
        ("Conv", (1, 4, "S"), (2, 4, 3), {}, "a window of 3 does not fit into S elements"),
        ("Conv", (1, 4, "S"), (2, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2]}, "auto_pad with strides"),
        ("Conv", (1, 4, 7), ("M", 4, "S"), {}, "kernel's size must be a known number"),
        ("ConvTranspose", (1, 4, 7, 7), (4, 2, 3), {}, "do not go together"),
        ("ConvTranspose", (1, 4, "S"), (4, 2, 3), {"auto_pad": "SAME_UPPER"}, "need sizes that are known numbers"),
        ("MaxPool", (1, 4, "S"), None, {"kernel_shape": [1], "ceil_mode": 1}, "ceil_mode needs sizes"),
    ],
)  # fmt: skip
def test_what_does_not_fit(op: str, x: Shape, w: Shape | None, attributes: dict[str, object], message: str) -> None:
    nodes = Nodes({"x": ("float32", x), **({} if w is None else {"w": ("float32", w)})})
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add(op, *nodes.inputs, **attributes))
