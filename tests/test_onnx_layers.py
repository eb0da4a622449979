"""Layers of ONNX (recurrent ones, pooling, resizing, losses) against onnxruntime: every attribute, odd sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_graphs import Draws, Nodes, compare, evaluated

from llmc.errors import FrontendError
from llmc.frontends.onnx.translation import Node
from llmc.frontends.onnx.windows import spatial_windows

RNG = np.random.default_rng(11)
floats = Draws(RNG).floats


def one(op: str, x: np.ndarray, *constants: object, outputs: int = 1, opset: int = 21, **attributes: object) -> None:
    """The op over x and constants of the file is what onnxruntime gives, all its outputs."""
    nodes = Nodes({"x": (str(x.dtype), x.shape)}, opset)
    compare(nodes, nodes.many(op, "x", *constants, outputs=outputs, **attributes), {"x": x}, 2e-5)


STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 5, 2
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(op: str, directions: int, full: bool) -> list[np.ndarray | None]:
    """The weights of a layer; full: with biases, lengths, initial states and peepholes."""
    gates = GATES[op] * HIDDEN
    found: list[np.ndarray | None] = [floats(directions, gates, INPUTS), floats(directions, gates, HIDDEN)]
    if full:
        found += [floats(directions, 2 * gates), np.array([4, 1, 3], np.int32), floats(directions, BATCH, HIDDEN)]
        if op == "LSTM":
            found += [floats(directions, BATCH, HIDDEN), floats(directions, 3 * HIDDEN)]
    return found


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("full", [False, True])
def test_recurrent_layers(op: str, direction: str, full: bool) -> None:
    x, directions = floats(STEPS, BATCH, INPUTS), 2 if direction == "bidirectional" else 1
    outputs = 3 if op == "LSTM" else 2
    weights = recurrent(op, directions, full)
    attributes: dict[str, object] = {"hidden_size": HIDDEN, "direction": direction}
    one(op, x, *weights, outputs=outputs, **attributes)
    if op == "GRU":
        one(op, x, *weights, outputs=outputs, linear_before_reset=1, **attributes)
    names = {"RNN": ["Relu", "Sigmoid"], "GRU": ["Tanh", "Relu", "Sigmoid", "Tanh"]}.get(
        op, ["Tanh", "Sigmoid", "Relu", "Sigmoid", "Relu", "Tanh"]
    )
    chosen = names[: len(names) // 2 * directions]
    one(op, x, *weights, outputs=outputs, activations=chosen, **attributes)


@pytest.mark.parametrize("op", GATES)
def test_a_recurrent_layer_with_the_batch_in_front(op: str) -> None:
    """onnxruntime does not have it: it is the other layout with its axes turned."""
    x, (w, r, bias, lengths, *states) = floats(STEPS, BATCH, INPUTS), recurrent(op, 2, True)
    peepholes = states[2:]
    options = {"hidden_size": HIDDEN, "direction": "bidirectional", "outputs": 3 if op == "LSTM" else 2}
    found = []
    for layout in (0, 1):
        own, start = (x, states[:2]) if layout == 0 else (
            x.swapaxes(0, 1), [state.swapaxes(0, 1) for state in states[:2] if state is not None]
        )  # fmt: skip
        nodes = Nodes({"x": ("float32", own.shape)})
        outputs = nodes.many(op, "x", w, r, bias, lengths, *start, *peepholes, layout=layout, **options)
        found.append(evaluated(nodes.graph(*outputs), {"x": own}))
    (y, *last), (turned, *turned_last) = found
    np.testing.assert_array_equal(turned, y.transpose(2, 0, 1, 3))
    for a, b in zip(last, turned_last, strict=True):
        np.testing.assert_array_equal(b, a.swapaxes(0, 1))


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("LSTM", {"clip": 1.0}, "clip and input_forget"),
        ("LSTM", {"input_forget": 1}, "clip and input_forget"),
        ("RNN", {"activations": ["Affine"]}, "activations .'Affine'. are not supported"),
        ("RNN", {"activations": ["Relu"], "activation_alpha": [2.0]}, "without parameters"),
        ("RNN", {"activations": ["Relu"], "activation_beta": [2.0]}, "without parameters"),
    ],
)
def test_what_recurrent_layers_do_not_have(op: str, attributes: dict[str, object], message: str) -> None:
    nodes = Nodes({"x": ("float32", (STEPS, BATCH, INPUTS))})
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add(op, "x", *recurrent(op, 1, False), hidden_size=HIDDEN, **attributes))


@pytest.mark.parametrize("steps", [0, 513, "S"])
def test_a_recurrent_layer_needs_a_number_of_steps(steps: int | str) -> None:
    nodes = Nodes({"x": ("float32", (steps, BATCH, INPUTS))})
    with pytest.raises(FrontendError, match=f"runs over {steps} steps; a known number from 1 to 512"):
        nodes.graph(nodes.add("RNN", "x", *recurrent("RNN", 1, False), hidden_size=HIDDEN))


POOLS = ("MaxPool", "AveragePool", "LpPool")


@pytest.mark.parametrize("op", POOLS)
@pytest.mark.parametrize("mode", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
def test_pooling_with_every_padding(op: str, mode: str) -> None:
    for kernel, stride, dilation in itertools.product(([3], [2]), ([1], [2], [3]), ([1], [2])):
        if mode.startswith("SAME") and (dilation != [1] or stride > kernel):
            continue  # onnxruntime pads for the kernel without its dilation, and fails where nothing is to be padded
        options = {"kernel_shape": kernel, "strides": stride, "dilations": dilation, "auto_pad": mode}
        for size in (7, 8, 9):
            one(op, floats(2, 3, size), **options)
            if mode == "NOTSET":
                one(op, floats(2, 3, size), pads=[1, 0], **options)
                one(op, floats(2, 3, size), pads=[0, 1], **options)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_padding_is_less_than_any_integer(dtype: type) -> None:
    info = np.iinfo(dtype)
    for x in (np.full((1, 2, 7), info.min, dtype), np.arange(info.min, info.min + 14, dtype=dtype).reshape(1, 2, 7)):
        one("MaxPool", x, kernel_shape=[3], strides=[2], pads=[2, 2])


@pytest.mark.parametrize("size", range(5, 12))
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_pooling_with_a_last_window_that_is_not_whole(size: int, stride: int) -> None:
    for pads in ([0, 0], [1, 0], [0, 1], [1, 1]):
        options = {"kernel_shape": [3], "strides": [stride], "pads": pads, "ceil_mode": 1}
        one("MaxPool", floats(1, 2, size), **options)
        one("AveragePool", floats(1, 2, size), opset=19, **options)


@pytest.mark.parametrize("size", [7, 8, 9])
def test_padding_that_counts(size: int) -> None:
    for pads in ([1, 1], [0, 1], [1, 0], [2, 2]):
        one("AveragePool", floats(1, 2, size), kernel_shape=[3], strides=[2], pads=pads, count_include_pad=1)


@pytest.mark.parametrize("counted", [0, 1])
def test_padding_of_each_of_three_axes(counted: int) -> None:
    pads = [1, 0, 1, 0, 1, 1]
    one("AveragePool", floats(1, 2, 3, 4, 5), kernel_shape=[2, 2, 3], pads=pads, count_include_pad=counted)


def test_average_pools_over_free_sizes_are_those_of_numbers() -> None:
    for stride, pads, counted in ((1, [1, 1], 0), (2, [2, 0], 0), (2, [0, 2], 1), (3, [2, 1], 1)):
        nodes = Nodes({"x": ("float32", (1, 2, "S"))})
        output = nodes.add("AveragePool", "x", kernel_shape=[3], strides=[stride], pads=pads, count_include_pad=counted)
        for size in (1, 7, 8):
            compare(nodes, [output], {"x": floats(1, 2, size)})


@pytest.mark.parametrize("order", [0, 1])
def test_places_of_largest_elements(order: int) -> None:
    x = RNG.permutation(2 * 3 * 7 * 5).reshape(2, 3, 7, 5).astype(np.float32)
    for kernel, pads in (([2, 3], [0, 0, 0, 0]), ([3, 2], [1, 1, 0, 1])):
        one("MaxPool", x, outputs=2, kernel_shape=kernel, strides=[2, 1], pads=pads, storage_order=order)
        one("MaxPool", x, outputs=2, kernel_shape=kernel, strides=[2, 1], pads=pads)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_norms_of_windows_and_channels(p: int) -> None:
    x = floats(2, 3, 7)
    one("LpPool", x, kernel_shape=[3], p=p)
    one("GlobalLpPool", x, p=p)
    one("LpNormalization", x, p=min(p, 2), axis=1)


@pytest.mark.parametrize(
    ("op", "options"), [("LpNormalization", {"axis": 2}), ("MeanVarianceNormalization", {"axes": [-3]})]
)
def test_an_axis_that_is_not_there_is_no_other_one(op: str, options: dict[str, object]) -> None:
    nodes = Nodes({"x": ("float32", (2, 3))})
    with pytest.raises(FrontendError, match="is outside a tensor of rank 2"):
        nodes.graph(nodes.add(op, "x", **options))


def test_rows_of_zeros_have_no_length() -> None:
    one("LpNormalization", np.array([[0, 0], [3, -4]], np.float32))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_responses_of_near_channels(size: int) -> None:
    x = floats(3, 7, 5, 2)
    if size % 2:
        one("LRN", x, size=size, alpha=0.3, beta=0.6, bias=2.0)
    nodes = Nodes({"x": ("float32", x.shape)})
    (found,) = evaluated(nodes.graph(nodes.add("LRN", "x", size=size, alpha=0.3, beta=0.6, bias=2.0)), {"x": x})
    total = np.zeros_like(x)
    for channel in range(7):
        low, high = max(0, channel - (size - 1) // 2), min(6, channel + size // 2)
        total[:, channel] = (x[:, low : high + 1] ** 2).sum(1)
    np.testing.assert_allclose(found, x / (2 + 0.3 / size * total) ** 0.6, rtol=1e-5)


def refers(op: str, x: np.ndarray, *constants: object, outputs: int = 1, opset: int = 21, **attributes: object) -> None:
    """As the standard's reference does it, all outputs."""
    nodes = Nodes({"x": (str(x.dtype), x.shape)}, opset)
    names = nodes.many(op, "x", *constants, outputs=outputs, **attributes)
    expected = ReferenceEvaluator(nodes.model(*names)).run(None, {"x": x})
    for own, other in zip(evaluated(nodes.graph(*names), {"x": x}), expected, strict=True):
        assert (own.shape, own.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 2, 1, 2)], ids=str)
def test_batch_norms_of_every_rank(shape: tuple[int, ...]) -> None:
    x, channels = floats(*shape), [np.abs(floats(3)) for _ in range(4)]
    one("BatchNormalization", x, *channels)
    one("BatchNormalization", x, *channels, epsilon=0.3)
    refers("BatchNormalization", x, *channels, outputs=3, training_mode=1, momentum=0.7, epsilon=0.3)
    refers("BatchNormalization", x, *channels, outputs=3, training_mode=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_batch_norms_of_other_floats(dtype: type) -> None:
    """Halves are widened, as onnxruntime does; f64 stays f64."""
    x, channels = floats(2, 3, 5), [np.abs(floats(3)) + np.float32(0.5) for _ in range(4)]
    nodes = Nodes({"x": (np.dtype(dtype).name, x.shape)})
    graph = nodes.graph(nodes.add("BatchNormalization", "x", *(c.astype(dtype) for c in channels), epsilon=0.1))
    (found,) = evaluated(graph, {"x": x.astype(dtype)})
    scale, bias, mean, variance = (c.astype(dtype).astype(np.float64)[:, None] for c in channels)
    expected = (x.astype(dtype).astype(np.float64) - mean) / np.sqrt(variance + np.float32(0.1)) * scale + bias
    assert found.dtype == dtype
    # A half is rounded once, by half a step, from what f32 makes of numbers up to 8; f64 by some steps.
    rtol, atol = (2.0**-11, 2e-6) if dtype is np.float16 else (1e-14, 1e-14)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def test_norms_of_instances_and_groups() -> None:
    x = floats(2, 6, 5)
    one("InstanceNormalization", x, floats(6), floats(6), epsilon=0.2)
    one("InstanceNormalization", floats(2, 6, 3, 2), floats(6), floats(6))
    refers("GroupNormalization", x, floats(6), floats(6), num_groups=2, epsilon=0.2)
    refers("GroupNormalization", x, floats(6), floats(6), num_groups=6)
    refers("GroupNormalization", floats(2, 6, 3, 2), floats(6), floats(6), num_groups=3)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("opset", [18, 20])
def test_before_opset_21_groups_have_one_scale_each(groups: int, opset: int) -> None:
    """As many as groups, even where that is said for channels since."""
    x, scale, bias = floats(2, 6, 5), floats(groups), floats(groups)
    each = 6 // groups
    nodes = Nodes({"x": ("float32", x.shape)}, opset)
    (found,) = evaluated(nodes.graph(nodes.add("GroupNormalization", "x", scale, bias, num_groups=groups)), {"x": x})
    now = Nodes({"x": ("float32", x.shape)}, 21)
    output = now.add("GroupNormalization", "x", scale.repeat(each), bias.repeat(each), num_groups=groups)
    np.testing.assert_array_equal(found, evaluated(now.graph(output), {"x": x})[0])
    with pytest.raises(FrontendError, match=r"GroupNormalization \(node_0\) cannot be translated"):
        wrong = Nodes({"x": ("float32", x.shape)}, opset)
        wrong.graph(wrong.add("GroupNormalization", "x", floats(6), floats(6), num_groups=groups))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_moments_of_groups_are_wide_unless_said(dtype: type) -> None:
    """Halves whose squares no half holds; f64 keeps its places."""
    x = (floats(2, 6, 5) * 300).astype(dtype)
    wide = x.astype(np.float64).reshape(2, 2, 15)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + np.float32(1e-5))
    weights = [np.ones(6, dtype), np.zeros(6, dtype)]
    nodes = Nodes({"x": (np.dtype(dtype).name, x.shape)})
    output = nodes.add("GroupNormalization", "x", *weights, num_groups=2)
    (found,) = evaluated(nodes.graph(output), {"x": x})
    tolerance = 2**-10 if dtype is np.float16 else 1e-10
    np.testing.assert_allclose(found.reshape(2, 2, 15), expected, rtol=tolerance, atol=tolerance)
    if dtype is np.float16:
        narrow = nodes.add("GroupNormalization", "x", *weights, num_groups=2, stash_type=10)
        assert not any(op.dtype == "f32" for op in nodes.graph(narrow).ops)


def test_norms_over_some_axes() -> None:
    x = floats(2, 3, 4, 5)
    one("MeanVarianceNormalization", x)
    one("MeanVarianceNormalization", x, axes=[1, -1])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [None, 1, -1])
def test_losses(reduction: str, weighted: bool, ignored: int | None) -> None:
    options: dict[str, object] = {"reduction": reduction}
    if ignored is not None:
        options["ignore_index"] = ignored
    for shape in ((3,), (3, 2)):
        target = np.array([0, 1, 3, 1, ignored or 0, 2])[: int(np.prod(shape))].reshape(shape)
        weights = [np.array([1, 2, 0.5, 3], np.float32)] if weighted else []
        x = floats(3, 4, *shape[1:])
        one("NegativeLogLikelihoodLoss", x, target, *weights, **options)
        one("SoftmaxCrossEntropyLoss", x, target, *weights, outputs=2, **options)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weights", [None, [1, 2, 3], [np.inf, 2, 3]], ids=str)
def test_what_is_ignored_may_be_infinite(reduction: str, weights: list[float] | None) -> None:
    """Logs and weights of a class that an ignored target could have stood for."""
    x = np.array([[-np.inf, 1, 2], [1, 2, 3], [3, 2, 1]], np.float32)
    target, rest = np.array([7, 1, 2]), [] if weights is None else [np.array(weights, np.float32)]
    one("NegativeLogLikelihoodLoss", x, target, *rest, reduction=reduction, ignore_index=7)
    one("SoftmaxCrossEntropyLoss", x, target, *rest, outputs=2, reduction=reduction, ignore_index=7)


@pytest.mark.parametrize("reduction", ["average", "odd", "total"])
def test_a_loss_that_is_not_reduced_as_any(reduction: str) -> None:
    nodes = Nodes({"x": ("float32", (3, 4))})
    with pytest.raises(FrontendError, match=f"reduction '{reduction}' is not supported"):
        nodes.graph(nodes.add("NegativeLogLikelihoodLoss", "x", np.zeros(3, np.int64), reduction=reduction))


@pytest.mark.parametrize("op", ["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
def test_pools_of_everything(op: str) -> None:
    one(op, floats(2, 3, 5))
    one(op, floats(2, 3, 4, 1))
    nodes = Nodes({"x": ("float32", (2, 3))})
    with pytest.raises(FrontendError, match="has no spatial axes"):
        nodes.graph(nodes.add(op, "x"))


def unpooled(x: np.ndarray, shape: list[int] | None, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest elements of x put back: x, where they stand in it, and what is found."""
    nodes = Nodes({"x": ("float32", x.shape)})
    largest, places = nodes.many("MaxPool", "x", outputs=2, **options)
    back = nodes.add("MaxUnpool", largest, places, *([] if shape is None else [np.array(shape)]), **options)
    (found,) = evaluated(nodes.graph(back), {"x": x})
    kept, flat = evaluated(nodes.graph(largest, places), {"x": x})
    expected = np.zeros(x.size, np.float32)
    expected[flat.reshape(-1)] = kept.reshape(-1)
    return found, expected.reshape(x.shape), kept


def test_elements_put_back_where_they_were() -> None:
    x = RNG.permutation(2 * 24).reshape(1, 2, 6, 4).astype(np.float32)
    for options in ({"strides": [2, 2]}, {}, {"strides": [2, 2], "pads": [1, 0, 1, 0]}):
        found, expected, _ = unpooled(x, None, kernel_shape=[2, 2], **options)
        np.testing.assert_array_equal(found, expected)
    found, expected, _ = unpooled(x, [1, 2, 7, 6], kernel_shape=[2, 2], strides=[2, 2])
    np.testing.assert_array_equal(found, np.pad(expected, ((0, 0), (0, 0), (0, 1), (0, 2))))
    line, block = x.reshape(2, 3, 8), x.reshape(1, 1, 4, 2, 6)
    np.testing.assert_array_equal(*unpooled(line, None, kernel_shape=[2], strides=[2])[:2])
    np.testing.assert_array_equal(*unpooled(block, None, kernel_shape=[2, 1, 3], strides=[2, 1, 3])[:2])
    ragged = block[..., :5]
    np.testing.assert_array_equal(
        *unpooled(ragged, None, kernel_shape=[2, 1, 3], strides=[2, 1, 3], pads=[0, 0, 0, 0, 0, 1])[:2]
    )
    with pytest.raises(FrontendError, match="a larger result is supported for two spatial axes only"):
        unpooled(line, [2, 3, 9], kernel_shape=[2], strides=[2])
    with pytest.raises(FrontendError, match="a larger result is supported for two spatial axes only"):
        unpooled(block, [1, 1, 4, 2, 9], kernel_shape=[2, 1, 3], strides=[2, 1, 3])


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_strides_beyond_the_window_need_no_padding(mode: str) -> None:
    """onnxruntime fails: the padding would be negative."""
    x = floats(1, 2, 8)
    nodes = Nodes({"x": ("float32", x.shape)})
    output = nodes.add("MaxPool", "x", kernel_shape=[1], strides=[3], auto_pad=mode)
    np.testing.assert_array_equal(evaluated(nodes.graph(output), {"x": x})[0], x[:, :, ::3])


def test_the_last_window_ends_where_the_padded_elements_do() -> None:
    """Elements more than the padding are added where the ceiling asks for them, and no more than it asks for."""
    for size, kernel, stride, dilation, ceil in itertools.product((5, 6, 7, 12), (1, 2, 3), (1, 2, 3), (1, 2), (0, 1)):
        for low, high in itertools.product(range(kernel), repeat=2):
            options = {"strides": [stride], "dilations": [dilation], "pads": [low, high], "ceil_mode": ceil}
            (window,) = spatial_windows(Node("MaxPool", "", 21, "n", ("x",), ("y",), options), [size], [kernel])
            assert isinstance(window.count, int)
            places, last = window.places(), size + high - 1
            assert places.shape == (window.count, kernel) and places[0, 0] == -low
            assert window.extra == max(0, places[-1, -1] - last)
            assert window.extra == 0 or (ceil and places[-1, 0] < size)
            begin, end = places[-1, [0, -1]] + stride  # of one more
            assert end > last and (not ceil or end - stride >= last or begin >= size)


@pytest.mark.parametrize("spatial", [1, 2])
def test_the_place_of_a_largest_element_is_never_in_the_padding(spatial: int) -> None:
    """Not where all elements are as small as what is put around them. onnxruntime gives -1 there."""
    shape = (1, 2, 5, 4)[: 2 + spatial]
    for x in (np.full(shape, -128, np.int8), np.full(shape, -np.inf, np.float32)):
        nodes = Nodes({"x": (x.dtype.name, shape)})
        options = {"kernel_shape": [3] * spatial, "strides": [2] * spatial, "pads": [1, 1] * spatial}
        largest, places = evaluated(nodes.graph(*nodes.many("MaxPool", "x", outputs=2, **options)), {"x": x})
        area = x[0, 0].size
        np.testing.assert_array_equal(x.reshape(-1)[places], largest)
        for window in np.ndindex(places.shape):
            assert places[window] // area == window[1]
            at = np.unravel_index(places[window] % area, shape[2:])
            assert all(abs(a - 2 * middle) <= 1 for a, middle in zip(at, window[2:], strict=True))


def test_windows_of_one_element_are_cut_out() -> None:
    nodes = Nodes({"x": ("float32", (1, 3, 9))})
    output = nodes.add("Conv", "x", floats(5, 3, 1), kernel_shape=[1], strides=[4])
    assert "t.gather" not in {op.name for op in nodes.graph(output).ops}


def test_nothing_is_put_around_what_has_no_padding() -> None:
    nodes = Nodes({"x": ("float32", (1, 3, 9))})
    output = nodes.add("MaxPool", "x", kernel_shape=[3], strides=[2])
    assert {op.name for op in nodes.graph(output).ops} == {"t.constant", "t.gather", "t.max"}


def test_windows_side_by_side_are_a_reshape() -> None:
    """As those of patch embeddings: nothing is gathered."""
    nodes = Nodes({"x": ("float32", (1, 3, 9, 8))})
    output = nodes.add("Conv", "x", floats(5, 3, 4, 4), kernel_shape=[4, 4], strides=[4, 4])
    assert "t.gather" not in {op.name for op in nodes.graph(output).ops}
