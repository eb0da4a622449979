"""Resize and Upsample: each axis by itself, as a product with a matrix of weights, or as a choice of elements.

Coordinates and kernels are those of the standard: linear is a triangle, cubic R. Keys, Cubic convolution interpolation
for digital image processing (1981), with coefficient `cubic_coeff_a`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.shapes import axis_of
from llmc.compiler.ir.types import INTEGERS
from llmc.frontends.onnx.forms import cast, highest, known, like, lowest, move_axis, numbers
from llmc.frontends.onnx.ops_linear import matmul
from llmc.frontends.onnx.translation import Item, Node, SizeUnknown, Translation, Unsupported, handles

_WHOLE = (0.0, 1.0)
_FIRST = "as before opset 11"  # how the nearest element was chosen: the next one where an axis gets shorter


@dataclass(frozen=True)
class _Axis:
    """One axis: from `size` elements to `count`. roi: the part of it that is read, as fractions of it."""

    size: int
    count: int
    scale: float
    roi: tuple[float, float]

    def coordinates(self, mode: str) -> np.ndarray:
        """[count]: where in the input each output element lies.

        In f32, as onnxruntime and torch compute it: how it is rounded decides which of two elements is the nearest.
        """
        at, scale = np.arange(self.count, dtype=np.float32), np.float32(self.scale)
        last, steps = np.float32(self.size - 1), np.float32(self.count - 1)
        centre = (at + np.float32(0.5)) / scale
        half = centre - np.float32(0.5)
        start, end = np.array(self.roi, np.float32)
        if mode == "half_pixel":
            return half
        if mode == "asymmetric":
            return at / scale
        if mode == "pytorch_half_pixel":
            return half if self.count > 1 else np.zeros_like(at)
        if mode == "align_corners":
            return np.asarray(at * last / steps) if self.count > 1 else np.zeros_like(at)
        if mode == "half_pixel_symmetric":
            size = np.float32(self.size)
            off = size / np.float32(2) * (np.float32(1) - np.float32(self.count) / (scale * size))
            return np.asarray(off + centre - np.float32(0.5))
        if mode == "tf_crop_and_resize":
            if self.count > 1:
                return np.asarray(start * last + at * (end - start) * last / steps)
            return np.full_like(at, np.float32(0.5) * (start + end) * last)
        raise Unsupported(f"coordinates of mode {mode!r} are not supported")


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(1 - np.abs(x), 0))


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.asarray(np.where(x <= 1, near, np.where(x < 2, far, 0)))


def weights(axis: _Axis, node: Node) -> np.ndarray:
    """[count, size]: how much of each input element goes into each output element."""
    where = axis.coordinates(node.get("coordinate_transformation_mode", "half_pixel")).astype(np.float64)
    cubic = node.get("mode", "nearest") == "cubic"
    # When shrinking without aliases the kernel is stretched over all elements that fall together.
    stretch = min(axis.scale, 1.0) if node.get("antialias", 0) else 1.0
    reach = math.ceil((2 if cubic else 1) / stretch)
    taps = np.floor(where)[:, None] + np.arange(-reach, reach + 1)
    distance = (taps - where[:, None]) * stretch
    parts = _cubic(distance, node.get("cubic_coeff_a", -0.75)) if cubic else _triangle(distance)
    if node.get("exclude_outside", 0):
        parts = np.where((taps >= 0) & (taps < axis.size), parts, 0)
    parts = parts / parts.sum(1, keepdims=True)
    # What lies outside counts as the element at the edge.
    inside = np.clip(taps, 0, axis.size - 1).astype(np.int64)
    found = np.zeros((axis.count, axis.size))
    np.add.at(found, (np.arange(axis.count)[:, None], inside), parts)
    return found


def nearest(axis: _Axis, node: Node) -> np.ndarray:
    """[count]: the input element that each output element is."""
    where = axis.coordinates(node.get("coordinate_transformation_mode", "half_pixel")).astype(np.float64)
    rounded = {
        "round_prefer_floor": np.ceil(where - 0.5),
        "round_prefer_ceil": np.floor(where + 0.5),
        "floor": np.floor(where),
        "ceil": np.ceil(where),
        _FIRST: np.ceil(where) if axis.scale < 1 else np.floor(where),
    }
    mode = node.get("nearest_mode", "round_prefer_floor")
    if mode not in rounded:
        raise Unsupported(f"nearest_mode {mode!r} is not supported")
    return np.asarray(np.clip(rounded[mode], 0, axis.size - 1), np.int64)


def _axes(
    node: Node, x: Item, scales: list[float] | None, sizes: list[Any] | None, roi: list[float] | None
) -> dict[int, _Axis]:
    """The axes that change, with their scales and sizes. What stays as it is may have any size."""
    chosen = node.get("axes")
    along = [axis_of(axis, x.rank) for axis in chosen] if chosen is not None else list(range(x.rank))
    parts = [_WHOLE] * len(along) if roi is None else list(zip(roi[: len(along)], roi[len(along) :], strict=True))
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if sizes is not None:
        scales = None
        if policy != "stretch":
            ratios = [_number(want) / _number(x.shape[axis]) for axis, want in zip(along, sizes, strict=True)]
            scales = [min(ratios) if policy == "not_larger" else max(ratios)] * len(along)
    wanted = sizes if scales is None else scales
    if wanted is None:
        raise Unsupported("neither scales nor sizes are given")
    found = {}
    for axis, part, want in zip(along, parts, wanted, strict=True):
        size = x.shape[axis]
        if part == _WHOLE and want == (size if scales is None else 1):
            continue
        size = _number(size)
        if scales is None:
            found[axis] = _Axis(size, _number(want), _number(want) / size, part)
        else:
            # In f32, where 10 * 0.7 is 7; to the nearest number where sizes are given.
            count = np.float32(size) * np.float32(want) + np.float32(0 if sizes is None else 0.5)
            found[axis] = _Axis(size, math.floor(count), want, part)
    return found


def _number(size: int | Dim) -> int:
    if isinstance(size, int):
        return size
    raise SizeUnknown("resized axes need sizes that are known numbers when compiling")


def _given(item: Item | None, what: str) -> list[float] | None:
    """An input's numbers; None where it is left out or empty."""
    if item is None or item.shape == (0,):
        return None
    return [float(number) for number in numbers(item, what).flat]


@handles("Resize", since=11)
def _resize(
    t: Translation,
    node: Node,
    x: Item,
    roi: Item | None = None,
    scales: Item | None = None,
    sizes: Item | None = None,
) -> Value | Item:
    counts = None if sizes is None or sizes.shape == (0,) else known(sizes, "the sizes")
    cropped = node.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    axes = _axes(
        node,
        x,
        _given(scales, "the scales"),
        counts,
        _given(roi, "the region") if cropped else None,
    )
    result = resized(node, x.value, axes)
    if not cropped:
        return result
    # Elements from outside the input are one number.
    inside = np.ones((1,) * x.rank, bool)
    for i, axis in axes.items():
        where = axis.coordinates("tf_crop_and_resize")
        shape = [axis.count if j == i else 1 for j in range(x.rank)]
        inside = inside & ((where >= 0) & (where <= axis.size - 1)).reshape(shape)
    return e.Where(e.constant(inside), result, like(node.get("extrapolation_value", 0.0), result))


@handles("Resize", since=10)
@handles("Upsample", since=9)
def _upsample(t: Translation, node: Node, x: Item, scales: Item) -> Value:
    return _as_first_versions(node, x, [float(scale) for scale in numbers(scales, "the scales").flat])


@handles("Upsample", since=7)
def _upsample_7(t: Translation, node: Node, x: Item) -> Value:
    return _as_first_versions(node, x, list(node.attributes["scales"]))


def _as_first_versions(node: Node, x: Item, scales: list[float]) -> Value:
    """Before opset 11: no choice of coordinates or of rounding."""
    attributes = {
        "mode": node.get("mode", "nearest"), "coordinate_transformation_mode": "asymmetric", "nearest_mode": _FIRST
    }  # fmt: skip
    own = Node(node.op, node.domain, node.version, node.name, node.inputs, node.outputs, attributes)
    return resized(own, x.value, _axes(own, x, scales, None, None))


def resized(node: Node, x: Value, axes: dict[int, _Axis]) -> Value:
    """x with some axes resized."""
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        for i, axis in axes.items():
            x = s.Gather(x, e.constant(nearest(axis, node), "i64"), i)
        return x
    if mode not in ("linear", "bilinear", "trilinear", "cubic"):
        raise Unsupported(f"mode {mode!r} is not supported")
    dtype = x.dtype
    if dtype in ("i64", "u64"):
        raise Unsupported(f"numbers between those of {dtype} have no exact place in floats: cast the input before")
    if dtype not in ("f32", "f64"):
        x = cast(x, "f64" if dtype in ("i32", "u32") else "f32")
    for i, axis in axes.items():
        turned = move_axis(x, i, x.rank - 1)
        x = move_axis(matmul(turned, e.constant(weights(axis, node).T, x.dtype)), x.rank - 1, i)
    if dtype in INTEGERS:
        x = e.Minimum(e.Maximum(e.Round(x), like(lowest(dtype), x)), like(highest(dtype), x))
    return cast(x, dtype)
