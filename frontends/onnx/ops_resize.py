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
from llmc.compiler.ir.types import FLOATS
from llmc.frontends.onnx.forms import cast, known, like, move_axis, numbers, reshape
from llmc.frontends.onnx.translation import Item, Node, SizeUnknown, Translation, Unsupported, handles


@dataclass(frozen=True)
class _Axis:
    """One axis: from `size` elements to `count`. roi: the part of it that is read, as fractions of it."""

    size: int
    count: int
    scale: float
    roi: tuple[float, float]

    def coordinates(self, mode: str) -> np.ndarray:
        """[count]: where in the input each output element lies."""
        at = np.arange(self.count, dtype=np.float64)
        width, last = self.scale * self.size, self.size - 1
        half = (at + 0.5) / self.scale - 0.5
        start, end = self.roi
        if mode == "half_pixel":
            return half
        if mode == "asymmetric":
            return at / self.scale
        if mode == "pytorch_half_pixel":
            return half if width != 1 else np.full(self.count, -0.5)
        if mode == "align_corners":
            return at * last / (width - 1) if width != 1 else np.zeros(self.count)
        if mode == "half_pixel_symmetric":
            return np.asarray(half + self.size / 2 * (1 - self.count / width))
        if mode == "tf_crop_and_resize":
            inner = at * (end - start) * last / (width - 1) if width != 1 else (end - start) * last / 2
            return np.broadcast_to(inner + start * last, (self.count,))
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
    where = axis.coordinates(node.get("coordinate_transformation_mode", "half_pixel"))
    cubic = node.get("mode", "nearest") == "cubic"
    # When shrinking without aliases the kernel is stretched over all elements that fall together.
    stretch = min(axis.scale, 1.0) if node.get("antialias", 0) else 1.0
    reach = math.ceil((2 if cubic else 1) / stretch)
    taps = np.floor(where)[:, None] + np.arange(-reach, reach + 1)
    distance = (taps - where[:, None]) * stretch
    parts = _cubic(distance, node.get("cubic_coeff_a", -0.75)) if cubic else _triangle(distance)
    if node.get("exclude_outside", 0):
        parts = np.where((taps >= 0) & (taps < axis.size), parts, 0)
    if node.get("exclude_outside", 0) or node.get("antialias", 0):
        parts = parts / parts.sum(1, keepdims=True)
    # What lies outside counts as the element at the edge.
    inside = np.clip(taps, 0, axis.size - 1).astype(np.int64)
    found = np.zeros((axis.count, axis.size))
    np.add.at(found, (np.arange(axis.count)[:, None], inside), parts)
    return found


def nearest(axis: _Axis, node: Node) -> np.ndarray:
    """[count]: the input element that each output element is."""
    where = axis.coordinates(node.get("coordinate_transformation_mode", "half_pixel"))
    rounded = {
        "round_prefer_floor": np.ceil(where - 0.5),
        "round_prefer_ceil": np.floor(where + 0.5),
        "floor": np.floor(where),
        "ceil": np.ceil(where),
    }
    mode = node.get("nearest_mode", "round_prefer_floor")
    if mode not in rounded:
        raise Unsupported(f"nearest_mode {mode!r} is not supported")
    return np.asarray(np.clip(rounded[mode], 0, axis.size - 1), np.int64)


def _axes(
    node: Node, x: Item, scales: list[float] | None, sizes: list[Any] | None, roi: list[float] | None
) -> dict[int, _Axis]:
    """The axes that change, with their scales and sizes."""
    chosen = node.get("axes")
    along = [axis_of(axis, x.rank) for axis in chosen] if chosen is not None else list(range(x.rank))
    if scales is not None and len(scales) == len(along):
        # What stays as it is may have any size.
        moving = [i for i, scale in enumerate(scales) if scale != 1 or roi is not None]
        along, scales = [along[i] for i in moving], [scales[i] for i in moving]
        roi = None if roi is None else [*roi[: len(along)], *roi[-len(along) :]]
    if sizes is not None and len(sizes) == len(along) and roi is None and not node.get("keep_aspect_ratio_policy"):
        moving = [i for i, axis in enumerate(along) if sizes[i] != x.shape[axis]]
        along, sizes = [along[i] for i in moving], [sizes[i] for i in moving]
    if sizes is not None and any(isinstance(size, Dim) for size in sizes):
        raise SizeUnknown("the sizes must be known numbers when compiling")
    have = [size for size in (x.shape[axis] for axis in along) if isinstance(size, int)]
    if len(have) != len(along):
        raise SizeUnknown("resized axes need sizes that are known numbers when compiling")
    if sizes is not None:
        ratios = [wanted / size for wanted, size in zip(sizes, have, strict=True)]
        policy = node.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            one = min(ratios) if policy == "not_larger" else max(ratios)
            ratios = [one] * len(along)
            sizes = [math.floor(one * size + 0.5) for size in have]
    elif scales is not None:
        ratios = scales
        sizes = [math.floor(size * ratio) for size, ratio in zip(have, scales, strict=True)]
    else:
        raise Unsupported("neither scales nor sizes are given")
    parts = roi or [0.0] * len(along) + [1.0] * len(along)
    return {
        axis: _Axis(have[i], sizes[i], ratios[i], (parts[i], parts[len(along) + i]))
        for i, axis in enumerate(along)
        if have[i] != sizes[i] or ratios[i] != 1 or (parts[i], parts[len(along) + i]) != (0.0, 1.0)
    }


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
    """Before opset 11: no choice of coordinates."""
    plain = {"mode": node.get("mode", "nearest"), "coordinate_transformation_mode": "asymmetric"}
    own = Node(
        node.op, node.domain, node.version, node.name, node.inputs, node.outputs, {**plain, "nearest_mode": "floor"}
    )
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
    if dtype not in ("f32", "f64"):
        x = cast(x, "f32")
    for i, axis in axes.items():
        turned = move_axis(x, i, x.rank - 1)
        rows = reshape(turned, (*turned.shape[:-1], axis.size)) if turned.rank > 1 else reshape(turned, (1, axis.size))
        product = s.Matmul(rows, e.constant(weights(axis, node).T, x.dtype))
        x = move_axis(reshape(product, (*turned.shape[:-1], axis.count)), x.rank - 1, i)
    return cast(x if dtype in FLOATS else e.Round(x), dtype)
