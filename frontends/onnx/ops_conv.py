"""Convolutions as matrix products of windows, those of integers too, and the transposed one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import product
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import split_exact
from llmc.frontends.onnx.forms import broadcast, cut, flip, integers, like, reshape, transpose, unsqueeze
from llmc.frontends.onnx.ops_linear import requantized, without_zero
from llmc.frontends.onnx.ops_shape import padded
from llmc.frontends.onnx.translation import Item, Node, SizeUnknown, Translation, Unsupported, handles
from llmc.frontends.onnx.windows import Window, in_windows, spatial_windows, table


def convolved(x: Value, w: Value, windows: Sequence[Window], groups: int) -> Value:
    """x [N, C, ...] with w [M, C / groups, kernel ...]: [N, M, windows ...]."""
    spatial = len(windows)
    out = w.shape[0]
    if x.rank != spatial + 2 or w.rank != spatial + 2:
        raise Unsupported(f"an input {list(x.shape)} and a kernel {list(w.shape)} do not go together")
    counts = tuple(window.count for window in windows)
    elements = product(w.shape[1:])
    patches = in_windows(x, windows, 0)
    batch, channels = x.shape[:2]
    if split_exact(channels, groups) != w.shape[1]:
        raise Unsupported(f"{channels} channels in {groups} groups are not the kernel's {w.shape[1]}")
    count_axes, kernel_axes = [2 + 2 * i for i in range(spatial)], [3 + 2 * i for i in range(spatial)]
    if groups == 1:
        # [N, windows, C * kernel] @ [C * kernel, M]: a linear layer over the windows.
        rows = transpose(patches, (0, *count_axes, 1, *kernel_axes))
        rows = reshape(rows, (batch, product(counts), elements))
        result: Value = s.Matmul(rows, s.Transpose(reshape(w, (out, elements)), (1, 0)))
        return reshape(s.Transpose(result, (0, 2, 1)), (batch, out, *counts))
    each = split_exact(out, groups)
    grouped = reshape(patches, (batch, groups, w.shape[1], *patches.shape[2:]))
    rows = transpose(grouped, (0, 1, *(axis + 1 for axis in count_axes), 2, *(axis + 1 for axis in kernel_axes)))
    rows = reshape(rows, (batch, groups, product(counts), elements))
    kernel = s.Transpose(reshape(w, (groups, each, elements)), (0, 2, 1))
    result = s.Transpose(s.Matmul(rows, kernel), (0, 1, 3, 2))
    return reshape(result, (batch, out, *counts))


def _kernel(node: Node, w: Value) -> list[int]:
    sizes = w.shape[2:]
    if not all(isinstance(size, int) for size in sizes):
        raise SizeUnknown("the kernel's size must be a known number when compiling")
    return [size for size in sizes if isinstance(size, int)]


def _along_channels(vector: Value, rank: int) -> Value:
    return reshape(vector, (1, vector.shape[0], *(1,) * (rank - 2)))


@handles("Conv")
def _conv(t: Translation, node: Node, x: Item, w: Item, bias: Item | None = None) -> Value:
    windows = spatial_windows(node, x.shape[2:], _kernel(node, w.value))
    result = convolved(x.value, w.value, windows, node.get("group", 1))
    return result if bias is None else e.Add(result, _along_channels(bias.value, x.rank))


@handles("ConvInteger")
def _conv_integer(
    t: Translation, node: Node, x: Item, w: Item, x_zero: Item | None = None, w_zero: Item | None = None
) -> Value:
    windows = spatial_windows(node, x.shape[2:], _kernel(node, w.value))
    first, second = without_zero(x.value, x_zero), without_zero(w.value, w_zero, 0)
    return convolved(first, second, windows, node.get("group", 1))


@handles("QLinearConv")
def _qlinear_conv(
    t: Translation, node: Node, x: Item, x_scale: Item, x_zero: Item, w: Item, w_scale: Item, w_zero: Item,
    y_scale: Item, y_zero: Item, bias: Item | None = None,
) -> Value:  # fmt: skip
    windows = spatial_windows(node, x.shape[2:], _kernel(node, w.value))
    first, second = without_zero(x.value, x_zero), without_zero(w.value, w_zero, 0)
    total = convolved(first, second, windows, node.get("group", 1))
    if bias is not None:
        total = e.Add(total, _along_channels(bias.value, x.rank))
    scale = w_scale.value if w_scale.rank == 0 else _along_channels(w_scale.value, x.rank)
    return requantized(total, e.Mul(reshape(x_scale.value, ()), scale), y_scale.value, y_zero.value)


@handles("ConvTranspose")
def _conv_transpose(t: Translation, node: Node, x: Item, w: Item, bias: Item | None = None) -> Value:
    """A convolution over the input spread out by the strides, with the kernel turned round."""
    kernel = _kernel(node, w.value)
    rank, groups = len(kernel), node.get("group", 1)
    strides, dilations = node.get("strides") or [1] * rank, node.get("dilations") or [1] * rank
    more = node.get("output_padding") or [0] * rank
    pads = _transposed_pads(node, x.shape[2:], kernel, strides, dilations, more)
    value = x.value
    windows = []
    for i in range(rank):
        axis, size = 2 + i, x.shape[2 + i]
        reach = dilations[i] * (kernel[i] - 1) + 1
        # Zeros between the elements: each becomes itself and stride - 1 of them, but for the last.
        spread = unsqueeze(value, axis + 1)
        high = [strides[i] - 1 if j == axis + 1 else 0 for j in range(spread.rank)]
        spread = padded(spread, [0] * spread.rank, high, like(0, value))
        value = reshape(spread, (*value.shape[:axis], size * strides[i], *value.shape[axis + 1 :]))
        value = cut(value, axis, 0, (size - 1) * strides[i] + 1)
        low, high_pad = reach - 1 - pads[i][0], reach - 1 - pads[i][1] + more[i]
        value = cut(value, axis, max(-low, 0), value.shape[axis] - max(-high_pad, 0))
        low, high_pad = max(low, 0), max(high_pad, 0)
        length = value.shape[axis]
        windows.append(Window(length, kernel[i], 1, dilations[i], low, high_pad, length + low + high_pad - reach + 1))
    inputs, each = w.shape[:2]
    turned = w.value
    for axis in range(2, 2 + rank):
        turned = flip(turned, axis)
    per_group = split_exact(inputs, groups)
    turned = reshape(turned, (groups, per_group, each, *kernel))
    turned = transpose(turned, (0, 2, 1, *range(3, 3 + rank)))
    result = convolved(value, reshape(turned, (groups * each, per_group, *kernel)), windows, groups)
    return result if bias is None else e.Add(result, _along_channels(bias.value, x.rank))


def _transposed_pads(
    node: Node, sizes: Sequence[object], kernel: list[int], strides: list[int], dilations: list[int], more: list[int]
) -> list[tuple[int, int]]:
    """What is cut off each side of each axis of the result."""
    rank = len(kernel)
    pads = node.get("pads") or [0] * (2 * rank)
    mode, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if mode in ("NOTSET", "VALID") and wanted is None:
        return [(pads[i], pads[rank + i]) if mode == "NOTSET" else (0, 0) for i in range(rank)]
    found = []
    for i, size in enumerate(sizes):
        if not isinstance(size, int):
            raise SizeUnknown("auto_pad and output_shape need sizes that are known numbers when compiling")
        goal = wanted[-rank:][i] if wanted is not None else size * strides[i]
        total = strides[i] * (size - 1) + more[i] + dilations[i] * (kernel[i] - 1) + 1 - goal
        if total < 0:
            # Larger than the windows make it: the end is longer.
            found.append((0, total))
            continue
        small = total // 2
        found.append((small, total - small) if mode == "SAME_UPPER" else (total - small, small))
    return found


@handles("Col2Im")
def _col_to_im(t: Translation, node: Node, x: Item, image: Item, block: Item) -> Value:
    """Windows [N, C * kernel, windows] added up where they overlap."""
    sizes, kernel = integers(image, "the image's shape"), integers(block, "the block's shape")
    windows = spatial_windows(node, sizes, kernel)
    elements = math.prod(kernel)
    batch, channels = x.shape[0], split_exact(x.shape[1], elements)
    # [kernel * windows] rows of [N * C]; what lies in the padding goes to one more row, which is cut off.
    places = table(windows).reshape(-1, elements).T.reshape(-1)
    area = math.prod(sizes)
    rows = reshape(x.value, (batch * channels, elements * x.shape[2]))
    places[places < 0] = area
    empty = broadcast(like(0, x.value), (area + 1, batch * channels))
    added = s.Scatter(empty, e.constant(places, "i64"), transpose(rows, (1, 0)), "add")
    return reshape(transpose(cut(added, 0, 0, area), (1, 0)), (batch, channels, *sizes))


@handles("CausalConvWithState")
def _causal_conv(
    t: Translation, node: Node, x: Item, w: Item, bias: Item | None = None, past: Item | None = None
) -> list[Value]:
    """A depthwise convolution [N, C, length] of the past [N, C, kernel - 1] and the input; and the next past."""
    kernel = _kernel(node, w.value)[0]
    value = x.value
    before = broadcast(like(0, value), (*value.shape[:2], kernel - 1)) if past is None else past.value
    whole = s.Concat((before, value), 2) if kernel > 1 else value
    size = whole.shape[2]
    result = convolved(whole, w.value, [Window(size, kernel, 1, 1, 0, 0, size - kernel + 1)], int(w.shape[0]))  # type: ignore[arg-type]
    if bias is not None:
        result = e.Add(result, _along_channels(bias.value, 3))
    kind = node.get("activation", "none")
    if kind in ("silu", "swish"):
        result = e.Activation(result, "silu")
    elif kind != "none":
        raise Unsupported(f"activation {kind!r} is not supported")
    return [result, cut(whole, 2, size - (kernel - 1), size)]
