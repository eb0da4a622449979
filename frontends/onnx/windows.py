"""Windows over the spatial axes of a tensor [batch, channels, ...]: shared by convolutions and pooling.

An axis of windows [windows, elements of one] is gathered from an axis by a table of indices; windows that lie side by
side, as those of patch embeddings, are a reshape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.op import Value
from llmc.frontends.onnx.forms import cut, like, require_room, reshape, transpose, unsqueeze
from llmc.frontends.onnx.ops_shape import padded
from llmc.frontends.onnx.translation import Node, SizeUnknown, Unsupported

Size = int | Dim


@dataclass(frozen=True)
class Window:
    """The windows of one axis of `size` elements.

    low, high: elements put before and after it. count: how many windows. extra: elements more at its end, which the
    last window of a ceiling needs and which belong to no padding.
    """

    size: Size
    kernel: int
    stride: int
    dilation: int
    low: int
    high: int
    count: Size
    extra: int = 0

    def places(self) -> np.ndarray:
        """[count, kernel]: the element that each window has at each place, counted without padding."""
        if not isinstance(self.count, int):
            raise SizeUnknown("its sizes must be known numbers when compiling")
        return (np.arange(self.count) * self.stride)[:, None] + np.arange(self.kernel) * self.dilation - self.low


def spatial_windows(node: Node, sizes: Sequence[Size], kernel: Sequence[int]) -> list[Window]:
    """The windows of each spatial axis, as the attributes of a convolution or pooling op say."""
    rank = len(sizes)
    strides, dilations = node.get("strides") or [1] * rank, node.get("dilations") or [1] * rank
    pads = node.get("pads") or [0] * (2 * rank)
    mode = node.get("auto_pad", "NOTSET")
    if not len(strides) == len(dilations) == len(kernel) == rank or len(pads) != 2 * rank:
        raise Unsupported(f"kernel {list(kernel)}, strides {strides} and pads {pads} do not fit {rank} axes")
    if min((*strides, *dilations, *kernel), default=1) < 1:
        raise Unsupported("kernels, strides and dilations must be positive")
    found = []
    for i, (size, length, stride, dilation) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        reach = dilation * (length - 1) + 1
        low, high = pads[i], pads[rank + i]
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            low, high = _same(size, stride, reach, mode == "SAME_LOWER")
        elif mode == "VALID":
            low = high = 0
        elif mode != "NOTSET":
            raise Unsupported(f"auto_pad {mode!r} is not supported")
        span = size + low + high - reach
        require_room(span, f"a window of {reach} does not fit into {size + low + high} elements")
        count, extra = span // stride + 1, 0
        if node.get("ceil_mode", 0) and mode in ("NOTSET", "VALID"):
            if not isinstance(span, int):
                raise SizeUnknown("ceil_mode needs sizes that are known numbers when compiling")
            count = -(-span // stride) + 1
            # A window that starts after the elements and the padding before them is left out.
            if (count - 1) * stride >= span + reach - high:
                count -= 1
            extra = max((count - 1) * stride - span, 0)
        found.append(Window(size, length, stride, dilation, low, high, count, extra))
    return found


def _same(size: Size, stride: int, reach: int, lower: bool) -> tuple[int, int]:
    """The padding that gives as many windows as strides begun."""
    total = (-(-size // stride) - 1) * stride + reach - size if isinstance(size, int) else reach - 1
    if not isinstance(size, int) and stride != 1:
        raise SizeUnknown("auto_pad with strides needs sizes that are known numbers when compiling")
    total = max(total, 0)
    small = total // 2
    return (total - small, small) if lower else (small, total - small)


def in_windows(x: Value, windows: Sequence[Window], fill: float) -> Value:
    """x [N, C, a, b, ...] as [N, C, count a, kernel a, count b, kernel b, ...], with `fill` around it."""
    low = [0, 0, *(w.low for w in windows)]
    high = [0, 0, *(w.high + w.extra for w in windows)]
    if any((*low, *high)):
        x = padded(x, low, high, like(fill, x))
    for i, window in enumerate(windows):
        x = _one_axis(x, 2 + 2 * i, window)
    return x


def _one_axis(x: Value, axis: int, window: Window) -> Value:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if window.kernel == 1 or (window.kernel == window.stride and window.dilation == 1):
        step = window.stride
        if window.kernel == 1:
            x = cut(x, axis, 0, (window.count - 1) * step + 1, step)
        else:
            x = cut(x, axis, 0, window.count * step)
        return reshape(x, (*before, window.count, window.kernel, *after))
    if isinstance(window.count, int):
        return s.Gather(x, e.constant(window.places() + window.low, "i64"), axis)
    first = e.Mul(unsqueeze(s.Iota(window.count), 1), e.constant(window.stride))
    return s.Gather(x, e.Add(first, e.constant(np.arange(window.kernel) * window.dilation)), axis)


def together(x: Value, spatial: int) -> Value:
    """Windows [N, C, count a, kernel a, ...] with each in one last axis: [N, C, count a, ..., kernel]."""
    counts, kernels = [2 + 2 * i for i in range(spatial)], [3 + 2 * i for i in range(spatial)]
    turned = transpose(x, (0, 1, *counts, *kernels))
    total = 1
    for axis in kernels:
        size = x.shape[axis]
        assert isinstance(size, int)
        total *= size
    return reshape(turned, (*turned.shape[: 2 + spatial], total))


def table(windows: Sequence[Window]) -> np.ndarray:
    """[count a, ..., kernel]: the element of the axes as one that each window has at each place; -1 in the padding."""
    flat, inside = np.asarray(0), np.asarray(True)
    for window in windows:
        places = window.places()
        flat = np.add.outer(flat * window.size, places)
        inside = np.logical_and.outer(inside, (places >= 0) & (places < window.size))
    counts, counts_first = flat.shape[::2], [*range(0, flat.ndim, 2), *range(1, flat.ndim, 2)]
    return np.where(inside, flat, -1).transpose(counts_first).reshape((*counts, -1))
