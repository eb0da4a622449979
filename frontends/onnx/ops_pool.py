"""Pooling: one number for each window, or for each channel."""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import product
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.shapes import axis_of
from llmc.compiler.ir.types import NUMPY_DTYPES
from llmc.frontends.onnx.forms import (
    along,
    broadcast,
    iota,
    known,
    like,
    lowest,
    reshape,
    size_scalar,
    unsqueeze,
)
from llmc.frontends.onnx.translation import Item, Node, Translation, Unsupported, handles
from llmc.frontends.onnx.windows import Window, in_windows, spatial_windows, table, together


def _windows(node: Node, x: Item) -> list[Window]:
    return spatial_windows(node, x.shape[2:], node.attributes["kernel_shape"])


def _grouped(x: Value, windows: list[Window], fill: float) -> Value:
    """[N, C, windows ..., elements of one]"""
    return together(in_windows(x, windows, fill), len(windows))


@handles("AveragePool")
def _average_pool(t: Translation, node: Node, x: Item) -> Value:
    windows = _windows(node, x)
    grouped = _grouped(x.value, windows, 0)
    axis = grouped.rank - 1
    if not any(w.low or w.high or w.extra for w in windows):
        return s.Mean(grouped, (axis,), keep=False)
    total: Value = s.Sum(grouped, (axis,), keep=False)
    for i, window in enumerate(windows):
        count = _counted(window, bool(node.get("count_include_pad", 0)), x.dtype)
        total = e.Div(total, along(count, 2 + i, total.rank))
    return total


def _counted(window: Window, with_padding: bool, dtype: str) -> Value:
    """[count]: how many elements of a window count. An axis's padding does if asked for; what only the last window
    reaches never does."""
    low, high = (window.low, window.high) if with_padding else (0, 0)
    if isinstance(window.size, int):
        places = window.places()
        inside = (places >= -low) & (places < window.size + high)
        return e.constant(inside.sum(1).astype(NUMPY_DTYPES[dtype]), dtype)
    first = e.Mul(unsqueeze(iota(window.count), 1), e.constant(window.stride))
    place = e.Add(first, e.constant(np.arange(window.kernel) * window.dilation - window.low))
    counts = e.And(e.GreaterEqual(place, e.constant(-low)), e.Less(place, size_scalar(window.size + high)))
    return s.Sum(e.Cast(counts, dtype), (1,), keep=False)


@handles("MaxPool")
def _max_pool(t: Translation, node: Node, x: Item) -> Value | list[Value]:
    windows = _windows(node, x)
    grouped = _grouped(x.value, windows, lowest(x.dtype))
    axis = grouped.rank - 1
    largest = s.Max(grouped, (axis,), keep=False)
    if len(node.outputs) < 2:
        return largest
    # Which element of the whole input it was: of the window's, by a table, after those of earlier channels.
    first = s.Argmax(grouped, axis)
    places = table(windows)
    # Padding is as large as any element only where all of a window's are as small: it stands for one of them then.
    places = np.where(places < 0, places.max(-1, keepdims=True), places)
    area = product(x.shape[2:])
    if node.get("storage_order", 0):
        sizes = [window.size for window in windows]
        columns = np.unravel_index(np.maximum(places, 0), sizes)  # type: ignore[arg-type]
        places = np.asarray(np.ravel_multi_index(columns[::-1], sizes[::-1]))  # type: ignore[arg-type]
    count, elements = int(np.prod(places.shape[:-1])), places.shape[-1]
    base = e.constant((np.arange(count) * elements).reshape(places.shape[:-1]), "i64")
    within = s.Gather(e.constant(places.reshape(-1), "i64"), e.Add(first, base), 0)
    channel = reshape(iota(product(x.shape[:2])), (*x.shape[:2], *(1,) * len(windows)))
    assert isinstance(area, int)
    return [largest, e.Add(within, e.Mul(channel, e.constant(area, "i64")))]


@handles("LpPool")
def _lp_pool(t: Translation, node: Node, x: Item) -> Value:
    grouped = _grouped(x.value, _windows(node, x), 0)
    return _norm(grouped, (grouped.rank - 1,), node.get("p", 2), keep=False)


def _norm(x: Value, axes: tuple[int, ...], p: float, keep: bool) -> Value:
    """(sum |x|^p)^(1/p)"""
    if p == 1:
        return s.Sum(e.Abs(x), axes, keep)
    if p == 2:
        return e.Sqrt(s.Sum(e.Mul(x, x), axes, keep))
    return e.Pow(s.Sum(e.Pow(e.Abs(x), like(p, x)), axes, keep), like(1 / p, x))


def _spatial(x: Item) -> tuple[int, ...]:
    if x.rank < 3:
        raise Unsupported(f"an input of {list(x.shape)} has no spatial axes")
    return tuple(range(2, x.rank))


@handles("GlobalAveragePool")
def _global_average_pool(t: Translation, node: Node, x: Item) -> Value:
    return s.Mean(x.value, _spatial(x))


@handles("GlobalMaxPool")
def _global_max_pool(t: Translation, node: Node, x: Item) -> Value:
    return s.Max(x.value, _spatial(x))


@handles("GlobalLpPool")
def _global_lp_pool(t: Translation, node: Node, x: Item) -> Value:
    return _norm(x.value, _spatial(x), node.get("p", 2), keep=True)


@handles("MaxUnpool")
def _max_unpool(t: Translation, node: Node, x: Item, places: Item, shape: Item | None = None) -> Value:
    """Elements written to where `MaxPool` found them, zeros elsewhere."""
    rank = x.rank - 2
    kernel, strides = node.attributes["kernel_shape"], node.get("strides") or [1] * rank
    pads = node.get("pads") or [0] * (2 * rank)
    own = [(size - 1) * strides[i] + kernel[i] - pads[i] - pads[rank + i] for i, size in enumerate(x.shape[2:])]
    target = tuple(known(shape, "the shape")) if shape is not None else (*x.shape[:2], *own)
    flat = reshape(places.value, (product(x.shape),))
    area, inner = product(target[2:]), product(tuple(own))
    if area != inner:
        # Indices count in the input of the pooling; the result may be larger than that.
        if rank != 2:
            raise Unsupported("a larger result is supported for two spatial axes only")
        width, height = own[1], own[0]
        row = e.FloorDivide(flat, e.constant(width))
        column = e.Sub(flat, e.Mul(row, e.constant(width)))
        channel = e.FloorDivide(row, e.constant(height))
        line = e.Sub(row, e.Mul(channel, e.constant(height)))
        across = e.Add(e.Mul(channel, e.constant(target[2])), line)
        flat = e.Add(e.Mul(across, e.constant(target[3])), column)
    empty = broadcast(like(0, x.value), (product(target),))
    return reshape(s.Scatter(empty, flat, reshape(x.value, flat.shape)), target)


@handles("LpNormalization")
def _lp_normalization(t: Translation, node: Node, x: Item) -> Value:
    axis = axis_of(node.get("axis", -1), x.rank)
    norm = _norm(x.value, (axis,), node.get("p", 2), keep=True)
    # A row of zeros stays one.
    return e.Where(e.Equal(norm, like(0, norm)), like(0, norm), e.Div(x.value, norm))
