"""Ops that read or change shapes: Shape, Reshape, Expand, Transpose, Concat, Split, Slice, Tile, Pad and their kin."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.shapes import axis_of, broadcast_shapes
from llmc.compiler.ir.structural import split_exact
from llmc.frontends.onnx.forms import (
    at_most,
    axes_of,
    broadcast,
    concat,
    cut,
    divided,
    dtype_named,
    flip,
    integers,
    iota,
    is_negative,
    known,
    like,
    numbers,
    require_room,
    reshape,
    settled,
    size_scalar,
    squeeze,
    transpose,
    unsqueeze,
)
from llmc.frontends.onnx.translation import SMALL, Item, Node, SizeUnknown, Translation, Unsupported, handles, objects


@handles("Shape")
def _shape(t: Translation, node: Node, x: Item) -> Item:
    rank = x.rank
    start, end = (
        int(np.clip(v + rank if v < 0 else v, 0, rank)) for v in (node.get("start", 0), node.get("end", rank))
    )
    return Item(known=objects(x.shape[start:end]))


@handles("Size")
def _size(t: Translation, node: Node, x: Item) -> Item:
    return Item(known=objects([product(x.shape)], ()))


@handles("Reshape")
def _reshape(t: Translation, node: Node, x: Item, shape: Item | None = None) -> Value:
    target = settled(node, "shape", shape)
    if target is None:
        raise Unsupported("no shape is given")
    return reshape(x.value, target_shape(x.shape, target, bool(node.get("allowzero", 0))))


def target_shape(shape: tuple[int | Dim, ...], target: list[Any], zero_is_zero: bool) -> list[int | Dim]:
    """A reshape's target with 0 (the operand's size there) and -1 (what is left) settled."""
    sizes = [shape[i] if dim == 0 and not zero_is_zero and i < len(shape) else dim for i, dim in enumerate(target)]
    if -1 not in sizes:
        return sizes
    at = sizes.index(-1)
    if -1 in sizes[at + 1 :]:
        raise Unsupported(f"the shape {target} leaves more than one size open")
    sizes[at] = divided(shape, sizes[:at] + sizes[at + 1 :])
    return sizes


@handles("Flatten")
def _flatten(t: Translation, node: Node, x: Item) -> Value:
    axis = node.get("axis", 1)
    axis = axis if axis == x.rank else axis_of(axis, x.rank)
    return reshape(x.value, (product(x.shape[:axis]), product(x.shape[axis:])))


@handles("Squeeze")
def _squeeze(t: Translation, node: Node, x: Item, axes: Item | None = None) -> Value:
    found = axes_of(node, x.rank, axes)
    return squeeze(x.value, *(found if found is not None else (i for i, dim in enumerate(x.shape) if dim == 1)))


@handles("Unsqueeze")
def _unsqueeze(t: Translation, node: Node, x: Item, axes: Item | None = None) -> Value:
    found = settled(node, "axes", axes)
    if found is None:
        raise Unsupported("no axes are given")
    return unsqueeze(x.value, *(int(axis) for axis in found))


@handles("Transpose")
def _transpose(t: Translation, node: Node, x: Item) -> Value:
    return transpose(x.value, node.get("perm") or list(reversed(range(x.rank))))


@handles("Expand")
def _expand(t: Translation, node: Node, x: Item, shape: Item) -> Value:
    return broadcast(x.value, broadcast_shapes(x.shape, tuple(known(shape, "the shape"))))


@handles("ConstantOfShape")
def _constant_of_shape(t: Translation, node: Node, shape: Item) -> Value | Item:
    value = node.get("value")
    if value is None:
        value = Item(known=objects([0.0], (1,)), dtype="f32")
    return broadcast(reshape(value.value, ()), known(shape, "the shape"))


@handles("Tile")
def _tile(t: Translation, node: Node, x: Item, repeats: Item) -> Value:
    counts = known(repeats, "the repeats")
    if len(counts) != x.rank:
        raise Unsupported(f"{len(counts)} repeats for {x.rank} axes")
    value = x.value
    for axis, (count, dim) in enumerate(zip(counts, x.shape, strict=True)):
        if count == 1:
            continue
        before, after = value.shape[:axis], value.shape[axis + 1 :]
        repeated = broadcast(unsqueeze(value, axis), (*before, count, dim, *after))
        value = reshape(repeated, (*before, count * dim, *after))
    return value


@handles("Concat")
def _concat(t: Translation, node: Node, *items: Item) -> Value:
    axis = axis_of(node.get("axis", 1), items[0].rank)
    # A size of 0 adds nothing, and is what an empty past brings.
    kept = [item for item in items if item.shape[axis] != 0] or [items[0]]
    return concat([item.value for item in kept], axis)


@handles("Split")
def _split(t: Translation, node: Node, x: Item, sizes: Item | None = None) -> list[Value]:
    axis = axis_of(node.get("axis", 0), x.rank)
    size = x.shape[axis]
    lengths = settled(node, "split", sizes)
    if lengths is None:
        parts = node.get("num_outputs") or len(node.outputs)
        if isinstance(size, int):
            # All of one size but the last, which may be smaller.
            each = -(-size // parts)
            lengths = [max(min(each, size - i * each), 0) for i in range(parts)]
        else:
            lengths = [split_exact(size, parts)] * parts
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    if starts[-1] != size:
        raise Unsupported(f"parts of {lengths} are not the {size} of axis {axis}")
    return [cut(x.value, axis, starts[i], starts[i + 1]) for i in range(len(lengths))]


@handles("Slice")
def _slice(
    t: Translation,
    node: Node,
    x: Item,
    starts: Item | None = None,
    ends: Item | None = None,
    axes: Item | None = None,
    steps: Item | None = None,
) -> Value:
    first, last = settled(node, "starts", starts), settled(node, "ends", ends)
    if first is None or last is None:
        raise Unsupported("a slice needs starts and ends")
    along = [int(axis) for axis in settled(node, "axes", axes) or range(len(first))]
    by = [1] * len(first) if steps is None else integers(steps, "the steps")
    value = x.value
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        value = sliced(value, axis_of(axis, x.rank), start, end, step)
    return value


def sliced(value: Value, axis: int, start: int | Dim, end: int | Dim, step: int) -> Value:
    """numpy's value[start:end:step] along one axis; sizes and steps below zero as there."""
    size = value.shape[axis]
    if step == 0:
        raise Unsupported("a step is zero")
    if step < 0:
        # Element i is element size - 1 - i of the reversed axis.
        mirrored = [_clamped(position, size, -1) for position in (start, end)]
        return sliced_up(flip(value, axis), axis, size - 1 - mirrored[0], size - 1 - mirrored[1], -step)
    return sliced_up(value, axis, _clamped(start, size, 0), _clamped(end, size, 0), step)


def _clamped(position: int | Dim, size: int | Dim, lowest: int) -> int | Dim:
    """A position counted from the end if negative, then between `lowest` and `size` + `lowest`."""
    if is_negative(position):
        position = position + size
        if at_most(position, lowest):
            return lowest
    above = size + lowest
    if at_most(above, position):
        return above
    if at_most(lowest, position) and at_most(position, above):
        return position
    raise SizeUnknown(
        f"whether {position} is within an axis of {size} depends on the input; bound it with --max-context for a text"
        " model, with --max-dim for another"
    )


def sliced_up(value: Value, axis: int, start: int | Dim, stop: int | Dim, step: int) -> Value:
    """Elements start, start + step, ... below stop, none where stop is not above start."""
    if at_most(stop, start):
        return cut(value, axis, 0, 0)
    return cut(value, axis, start, stop, step)


@handles("Pad")
def _pad(
    t: Translation,
    node: Node,
    x: Item,
    pads: Item | None = None,
    fill: Item | None = None,
    axes: Item | None = None,
) -> Value:
    amounts = settled(node, "pads", pads)
    if amounts is None:
        amounts = settled(node, "paddings")
    if amounts is None:
        raise Unsupported("no pads are given")
    chosen = settled(node, "axes", axes)
    along = range(x.rank) if chosen is None else [axis_of(int(axis), x.rank) for axis in chosen]
    low: list[Any] = [0] * x.rank
    high: list[Any] = [0] * x.rank
    for axis, before, after in zip(along, amounts[: len(along)], amounts[len(along) :], strict=True):
        low[axis], high[axis] = before, after
    value = x.value
    mode = node.get("mode", "constant")
    for axis in range(x.rank):
        # What is taken off comes first: a negative pad.
        size = value.shape[axis]
        begin, end = (-pad if at_most(pad, 0) else 0 for pad in (low[axis], high[axis]))
        value = cut(value, axis, begin, size - end)
        low[axis], high[axis] = (0 if at_most(pad, 0) else pad for pad in (low[axis], high[axis]))
    if mode != "constant":
        for axis in range(x.rank):
            value = _mirrored(value, axis, low[axis], high[axis], mode)
        return value
    filling = like(node.get("value", 0), value) if fill is None else reshape(fill.value, ())
    return padded(value, low, high, filling)


def padded(value: Value, low: list[Any], high: list[Any], fill: Value) -> Value:
    """Elements of one value put before and after each axis."""
    exact = isinstance(fill, e.Constant) and (fill.dtype not in ("i64", "u64") or abs(int(fill.value.array)) < 2**53)
    if exact and all(isinstance(pad, int) for pad in (*low, *high)):
        assert isinstance(fill, e.Constant)
        if not any((*low, *high)):
            return value
        return s.Pad(value, tuple(low), tuple(high), float(fill.value.array.reshape(())))
    for axis in range(value.rank):
        before, after = (
            [broadcast(fill, (*value.shape[:axis], pad, *value.shape[axis + 1 :]))] if pad != 0 else []
            for pad in (low[axis], high[axis])
        )
        value = concat([*before, value, *after], axis)
    return value


def _mirrored(value: Value, axis: int, low: int, high: int, mode: str) -> Value:
    """An axis made longer by elements of its own."""
    if low == 0 and high == 0:
        return value
    size = value.shape[axis]
    modes = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
    if mode not in modes:
        raise Unsupported(f"pads of mode {mode!r} are not supported")
    if not isinstance(low, int) or not isinstance(high, int):
        raise SizeUnknown(f"pads of mode {mode!r} must be known numbers when compiling")
    if isinstance(size, int):
        index = np.pad(np.arange(size), (low, high), mode=modes[mode])  # type: ignore[call-overload]
        return s.Gather(value, e.constant(index, "i64"), axis)
    # Each place of the longer axis, counted from the first element, and the element that stands there.
    place: Value = e.Sub(iota(size + (low + high)), e.constant(low))
    last, zero = size_scalar(size - 1), e.constant(0)
    if mode == "edge":
        return s.Gather(value, e.Minimum(e.Maximum(place, zero), last), axis)
    room = size - max(low, high) - (mode == "reflect")
    require_room(room, f"pads of mode {mode!r}, {low} and {high}, take more elements than the axis of {size} has")
    if mode == "reflect":
        return s.Gather(value, e.Sub(last, e.Abs(e.Sub(last, e.Abs(place)))), axis)
    return s.Gather(value, e.Mod(e.Add(place, size_scalar(size)), size_scalar(size)), axis)


@handles("Range")
def _range(t: Translation, node: Node, start: Item, limit: Item, delta: Item) -> Value:
    found = [start.numbers, limit.numbers, delta.numbers]
    if all(array is not None for array in found):
        begin, end, step = (array.reshape(()) for array in found)  # type: ignore[union-attr]
        size = max(_steps(begin, end, step), 0)
        if size <= SMALL:
            wide = begin.astype(np.float64) if begin.dtype.kind not in "iu" else begin
            return e.constant((wide + np.arange(size).astype(wide.dtype) * step.astype(wide.dtype)), start.dtype)
        length: int | Dim = size
    else:
        (first,), (last,) = known(start, "the start"), known(limit, "the limit")
        step = _whole_step(delta)
        span = last - first if step > 0 else first - last
        length = (span + (abs(step) - 1)) // abs(step)
        if at_most(0, length) is not True:
            raise SizeUnknown(f"whether the range from {first} to {last} has any elements depends on the input")
    counted = s.Iota(length, start.dtype) if start.dtype in ("i64", "i32") else e.Cast(s.Iota(length), start.dtype)
    scaled = counted if delta.numbers is not None and delta.numbers == 1 else e.Mul(counted, reshape(delta.value, ()))
    offset = start.numbers
    return scaled if offset is not None and offset == 0 else e.Add(scaled, reshape(start.value, ()))


@handles("Trilu")
def _trilu(t: Translation, node: Node, x: Item, k: Item | None = None) -> Value:
    value = x.value
    rows, columns = value.shape[-2:]
    row = e.Add(unsqueeze(s.Iota(rows), 1), e.constant(0) if k is None else reshape(k.value, ()))
    column = s.Iota(columns)
    kept = e.LessEqual(row, column) if node.get("upper", 1) else e.GreaterEqual(row, column)
    return e.Where(kept, value, like(0, value))


@handles("EyeLike")
def _eye_like(t: Translation, node: Node, x: Item) -> Value:
    dtype = t.dtype(dtype_named(node.get("dtype"))) if node.get("dtype") else x.dtype
    rows, columns = x.shape
    diagonal = e.Equal(e.Add(unsqueeze(s.Iota(rows), 1), e.constant(node.get("k", 0), "i64")), s.Iota(columns))
    return e.Cast(diagonal, dtype)


@handles("DepthToSpace")
def _depth_to_space(t: Translation, node: Node, x: Item) -> Value:
    n, c, h, w = x.shape
    block = node.attributes["blocksize"]
    depth = split_exact(c, block * block)
    if _is_depth_first(node):
        parts = transpose(reshape(x.value, (n, block, block, depth, h, w)), (0, 3, 4, 1, 5, 2))
    else:
        parts = transpose(reshape(x.value, (n, depth, block, block, h, w)), (0, 1, 4, 2, 5, 3))
    return reshape(parts, (n, depth, h * block, w * block))


@handles("SpaceToDepth")
def _space_to_depth(t: Translation, node: Node, x: Item) -> Value:
    n, c, h, w = x.shape
    block = node.attributes["blocksize"]
    rows, columns = split_exact(h, block), split_exact(w, block)
    blocks = reshape(x.value, (n, c, rows, block, columns, block))
    parts = transpose(blocks, (0, 3, 5, 1, 2, 4) if _is_depth_first(node) else (0, 1, 3, 5, 2, 4))
    return reshape(parts, (n, c * block * block, rows, columns))


def _is_depth_first(node: Node) -> bool:
    """Whether a block's places are counted before the channels are."""
    mode = node.get("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise Unsupported(f"mode {mode!r} is neither of DCR, CRD")
    return bool(mode == "DCR")


@handles("CenterCropPad")
def _center_crop_pad(t: Translation, node: Node, x: Item, shape: Item) -> Value:
    axes = node.get("axes")
    along = range(x.rank) if axes is None else [axis_of(axis, x.rank) for axis in axes]
    value = x.value
    for axis, size in zip(along, numbers(shape, "the shape").tolist(), strict=True):
        have = value.shape[axis]
        if not isinstance(have, int):
            raise SizeUnknown("cropping needs sizes that are known numbers when compiling")
        if size <= have:
            value = cut(value, axis, (have - size) // 2, (have - size) // 2 + size)
        else:
            low, high = [0] * x.rank, [0] * x.rank
            low[axis], high[axis] = (size - have) // 2, size - have - (size - have) // 2
            value = padded(value, low, high, like(0, value))
    return value


def _steps(begin: Any, end: Any, step: Any) -> int:
    """How many steps there are from `begin` to before `end`. Integers may be too large for floats to tell apart."""
    if begin.dtype.kind in "iu":
        return -(-(int(end) - int(begin)) // int(step))
    return int(np.ceil((float(end) - float(begin)) / float(step)))


def _whole_step(delta: Item) -> int:
    step = numbers(delta, "the step").item()
    if step != int(step):
        raise SizeUnknown(f"in steps of {step} sizes are not counted: only whole steps are supported")
    return int(step)
