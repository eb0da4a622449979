"""Resizing against onnxruntime and the standard's reference: every mode, coordinates and policy, up and down."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_graphs import Draws, Nodes, compare, evaluated

from llmc.errors import FrontendError

RNG = np.random.default_rng(13)
floats = Draws(RNG).floats
COORDINATES = ("half_pixel", "asymmetric", "pytorch_half_pixel", "align_corners", "half_pixel_symmetric")


def referenced(x: np.ndarray, *operands: object, **attributes: object) -> None:
    """As the standard's reference does it."""
    nodes = Nodes({"x": (str(x.dtype), x.shape)})
    output = nodes.add("Resize", "x", *operands, **attributes)
    (found,) = evaluated(nodes.graph(output), {"x": x})
    (expected,) = ReferenceEvaluator(nodes.model(output)).run(None, {"x": x})
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def as_onnxruntime(x: np.ndarray, *operands: object, opset: int = 21, op: str = "Resize", **attributes: object) -> None:
    """Cubic weights are polynomials of coordinates in f32: their noise is some units of the largest element."""
    nodes = Nodes({"x": (str(x.dtype), x.shape)}, opset)
    compare(nodes, [nodes.add(op, "x", *operands, **attributes)], {"x": x}, 2e-5)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_scales_up_and_down(mode: str, coordinates: str) -> None:
    """Also where a scale gives no whole number of elements: coordinates are of the elements that there are."""
    for size, scale in itertools.product((2, 5, 10), (0.4, 0.6, 0.7, 0.75, 1.5, 1.7, 2.0, 2.6)):
        if int(np.float32(size) * np.float32(scale)) not in (0, size):  # onnxruntime copies what keeps its shape
            scales = np.array([1, 1, scale, 1], np.float32)
            as_onnxruntime(floats(1, 1, size, 2), None, scales, mode=mode, coordinate_transformation_mode=coordinates)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_sizes_up_and_down(mode: str, coordinates: str) -> None:
    for size in (1, 2, 4, 7, 10):
        sizes = np.array([1, 1, size, 3])
        as_onnxruntime(floats(1, 1, 5, 3), None, None, sizes, mode=mode, coordinate_transformation_mode=coordinates)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_the_nearest_element(rounding: str, coordinates: str) -> None:
    """Scales that are no sums of powers of two have their ties too, by how f32 rounds."""
    options = {"nearest_mode": rounding, "coordinate_transformation_mode": coordinates}
    for scale in (0.5, 1.5, 2.0, 3.0):
        as_onnxruntime(floats(1, 2, 6, 4), None, np.array([1, 1, scale, scale], np.float32), **options)
    if coordinates != "half_pixel_symmetric":
        for size, scale in itertools.product((3, 5, 10), (0.3, 0.6, 0.7, 0.8, 1.3, 1.7, 2.3)):
            if int(np.float32(size) * np.float32(scale)) not in (0, size):
                as_onnxruntime(floats(1, 1, size, 2), None, np.array([1, 1, scale, 1], np.float32), **options)


def test_ten_elements_times_seven_tenths_are_seven() -> None:
    """In f32, as in onnxruntime and the standard's inference of shapes; f32's 0.7 times 10 is a little less."""
    nodes = Nodes({"x": ("float32", (10, 10))})
    output = nodes.add("Resize", "x", None, np.array([0.7, 1.1], np.float32))
    assert nodes.graph(output).outputs[0][1].shape == (7, 11)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("options", [{"antialias": 1}, {"exclude_outside": 1}, {"cubic_coeff_a": -0.5}], ids=str)
def test_kernels(mode: str, options: dict[str, object]) -> None:
    if mode == "linear" and "exclude_outside" in options:
        return
    for scale in (0.3, 0.6, 2.0):
        referenced(floats(1, 1, 9, 7), None, np.array([1, 1, scale, 0.5], np.float32), mode=mode, **options)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_a_region_of_the_input(mode: str) -> None:
    for first, last in ((0.0, 1.0), (0.2, 0.7), (-0.2, 1.3)):
        roi = np.array([0, 0, first, 0.1, 1, 1, last, 0.9], np.float32)
        options = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0, "mode": mode}
        for size in (1, 3, 8):
            as_onnxruntime(floats(1, 1, 5, 4), roi, None, np.array([1, 1, size, 3]), **options)
            spatial = {"axes": [2, 3], **options}
            as_onnxruntime(floats(1, 1, 5, 4), roi[[2, 3, 6, 7]], None, np.array([size, 3]), **spatial)
            as_onnxruntime(floats(1, 1, 5, 4), roi, np.array([1, 1, size / 4, 2], np.float32), **options)
        del options["extrapolation_value"]
        as_onnxruntime(floats(1, 1, 5, 4), roi, None, np.array([1, 1, 8, 3]), **options)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_sizes_that_keep_the_proportions(policy: str) -> None:
    for sizes, mode in itertools.product(((3, 9), (10, 4), (5, 5)), ("nearest", "linear")):
        options = {"axes": [2, 3], "keep_aspect_ratio_policy": policy, "mode": mode}
        as_onnxruntime(floats(1, 1, 4, 6), None, None, np.array(sizes), **options)
    nodes = Nodes({"x": ("float32", ("B", 1, 4, 6))})
    same = nodes.add("Resize", "x", None, None, np.array([4, 6]), axes=[2, 3], keep_aspect_ratio_policy=policy)
    assert not nodes.graph(same).ops


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_the_first_versions(mode: str) -> None:
    scales = np.array([1, 1, 2, 1.5], np.float32)
    for op, opset in (("Upsample", 9), ("Resize", 10)):
        nodes = Nodes({"x": ("float32", (1, 2, 3, 4))}, opset)
        compare(nodes, [nodes.add(op, "x", scales, mode=mode)], {"x": floats(1, 2, 3, 4)})
    nodes = Nodes({"x": ("float32", (1, 2, 3, 4))}, 8)
    compare(nodes, [nodes.add("Upsample", "x", scales=scales.tolist(), mode=mode)], {"x": floats(1, 2, 3, 4)})


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scale", [0.3, 0.5, 0.6, 0.8, 2.5])
def test_the_first_versions_of_shorter_axes(mode: str, scale: float) -> None:
    """The nearest element of a shorter axis is the next one, as in the standard's tests of that time."""
    as_onnxruntime(floats(1, 1, 10, 3), np.array([1, 1, scale, 1], np.float32), opset=10, mode=mode)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_integers_are_rounded_and_cut_off(mode: str, dtype: type) -> None:
    """A cubic kernel goes beyond its elements: past the dtype's limits these stay, and do not begin again."""
    info = np.iinfo(dtype)
    x = np.array([info.min, info.max, info.max, info.min, info.min, 7, 100, 3], dtype).reshape(1, 1, 8)
    nodes = Nodes({"x": (np.dtype(dtype).name, x.shape)})
    output = nodes.add("Resize", "x", None, np.array([1, 1, 2], np.float32), mode=mode)
    (found,) = evaluated(nodes.graph(output), {"x": x})
    wide = Nodes({"x": ("float64", x.shape)})
    output = wide.add("Resize", "x", None, np.array([1, 1, 2], np.float32), mode=mode)
    (exact,) = evaluated(wide.graph(output), {"x": x.astype(np.float64)})
    assert (mode == "linear") == (exact.max() <= info.max)
    np.testing.assert_array_equal(found, np.clip(np.round(exact), info.min, info.max).astype(dtype))


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_an_axis_of_any_rank_may_be_the_one(shape: tuple[int, ...]) -> None:
    scales = np.array([1] * (len(shape) - 1) + [2], np.float32)
    for mode in ("linear", "cubic"):
        referenced(floats(*shape), None, scales, mode=mode)


def test_what_stays_as_it_is_may_have_any_size() -> None:
    nodes = Nodes({"x": ("float32", ("B", 1, 3, 4))})
    outputs = [
        nodes.add("Resize", "x", None, np.array([1, 1, 2, 1], np.float32), mode="linear"),
        nodes.add("Resize", "x", None, None, np.array([6, 5]), axes=[2, -1]),
        nodes.add("Resize", "x", None, None, np.array([6]), axes=[2]),
    ]
    for batch in (1, 5):
        compare(nodes, outputs, {"x": floats(batch, 1, 3, 4)})


@pytest.mark.parametrize(
    ("shape", "operands", "attributes", "message"),
    [
        ((1, 1, 4), (None, np.array([1, 1, 2], np.float32)), {"mode": "odd"}, "mode 'odd' is not supported"),
        ((1, 1, 4), (None, np.array([1, 1, 2], np.float32)), {"nearest_mode": "odd"}, "nearest_mode 'odd'"),
        ((1, 1, 4), (None, np.array([1, 1, 2], np.float32)), {"coordinate_transformation_mode": "odd"}, "mode 'odd'"),
        ((1, 1, 4), (), {}, "neither scales nor sizes are given"),
        ((1, 1, 4), (None, np.zeros(0, np.float32), np.zeros(0, np.int64)), {}, "neither scales nor sizes are given"),
        (("B", 1, 4), (None, np.array([2, 1, 2], np.float32)), {}, "resized axes need sizes that are known"),
        (("B", 1, 4), (None, None, np.array([2, 1, 4])), {}, "resized axes need sizes that are known"),
        ((1, 1, 4), (None, None, np.array([1, 2])), {}, "is not valid"),
        ((1, 1, 4), (None, np.array([1, 2], np.float32)), {}, "is not valid"),
    ],
)  # fmt: skip
def test_what_is_not_resized(
    shape: tuple[int | str, ...], operands: tuple[object, ...], attributes: dict[str, object], message: str
) -> None:
    nodes = Nodes({"x": ("float32", shape)})
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add("Resize", "x", *operands, **attributes))


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_large_integers_are_not_interpolated(dtype: str) -> None:
    nodes = Nodes({"x": (dtype, (1, 1, 4))})
    with pytest.raises(FrontendError, match="cast the input before"):
        nodes.graph(nodes.add("Resize", "x", None, np.array([1, 1, 2], np.float32), mode="linear"))
    found = evaluated(
        nodes.graph(nodes.add("Resize", "x", None, np.array([1, 1, 2], np.float32))),
        {"x": np.array([[[2**62 + 1, 2, 3, 4]]], dtype)},
    )
    np.testing.assert_array_equal(found[0], [[[2**62 + 1, 2**62 + 1, 2, 2, 3, 3, 4, 4]]])
