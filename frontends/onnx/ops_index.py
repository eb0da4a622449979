"""Elements chosen and placed by index: Gather*, Scatter*, OneHot, TopK, Compress, ReverseSequence.

Gathers and scatters of many axes become ones of rows: the axes are flattened, and the indices with them.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.shapes import axis_of
from llmc.frontends.onnx.forms import (
    along,
    broadcast,
    cast,
    checked,
    cut,
    from_start,
    iota,
    known,
    numbers,
    require_room,
    reshape,
    size_scalar,
    transpose,
    unsqueeze,
)
from llmc.frontends.onnx.translation import Item, Node, SizeUnknown, Translation, Unsupported, handles


@handles("Gather")
def _gather(t: Translation, node: Node, x: Item, indices: Item) -> Value:
    axis = axis_of(node.get("axis", 0), x.rank)
    at = indices.numbers
    if at is not None and at.size == 1:
        # One known row is a slice: exporters index shapes and stacked values so.
        place: int | Dim = int(at.item())
        place = place + x.shape[axis] if int(at.item()) < 0 else place
        row = cut(x.value, axis, place, place + 1)
        return reshape(row, (*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]))
    alike = uniform(x.value)
    if alike is not None:
        return broadcast(alike, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
    return s.Gather(x.value, _known_in_range(indices.value, x.shape[axis], f"axis {axis} of {node.inputs[0]}"), axis)


def _known_in_range(index: Value, size: int | Dim, what: str) -> Value:
    """An index that is checked now where it is known; gathers count negative ones from the end themselves."""
    return checked(index, size, what) if isinstance(index, e.Constant) else index


def uniform(value: Value) -> Value | None:
    """The number, of rank 0, that every element of a value is, where it is broadcast from a constant.

    Whichever elements are taken of a mask of ones, they are ones.
    """
    while isinstance(value, (s.Broadcast, s.Reshape)):
        value = value.x
    if not isinstance(value, e.Constant) or value.value.array.size != 1:
        return None
    return reshape(value, ())


def _cut_to(value: Value, shape: tuple[int | Dim, ...], axis: int) -> Value:
    """The first elements of every other axis, as many as the indices have there."""
    for i, size in enumerate(shape):
        if i != axis:
            value = cut(value, i, 0, size)
    return value


@handles("GatherElements")
def _gather_elements(t: Translation, node: Node, x: Item, indices: Item) -> Value:
    axis = axis_of(node.get("axis", 0), x.rank)
    at = _known_in_range(indices.value, x.shape[axis], f"axis {axis} of {node.inputs[0]}")
    return s.GatherElements(_cut_to(x.value, indices.shape, axis), at, axis)


def flat_index(indices: Value, sizes: tuple[int | Dim, ...], what: str, first: int = 0) -> Value:
    """Index tuples [N, k] into axes of `sizes` as indices [N] into these axes as one.

    what, first: the name of the tensor and the first of those axes, for messages.
    """
    flat: Value | None = None
    for i, size in enumerate(sizes):
        own = reshape(cut(indices, 1, i, i + 1), indices.shape[:1])
        column = checked(own, size, f"axis {first + i} of {what}")
        flat = column if flat is None else e.Add(e.Mul(flat, size_scalar(size)), column)
    return flat if flat is not None else broadcast(e.constant(0), indices.shape[:1])


@handles("GatherND")
def _gather_nd(t: Translation, node: Node, x: Item, indices: Item) -> Value:
    batch = node.get("batch_dims", 0)
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise SizeUnknown(f"the indices' last size {depth} must be a known number when compiling")
    leading, chosen, rest = x.shape[:batch], x.shape[batch : batch + depth], x.shape[batch + depth :]
    result = (*indices.shape[:-1], *rest)
    alike = uniform(x.value)
    if alike is not None:
        return broadcast(alike, result)
    rows = reshape(x.value, (product(leading) * product(chosen), *rest))
    flat = flat_index(reshape(indices.value, (product(indices.shape[:-1]), depth)), chosen, node.inputs[0], batch)
    if batch:
        # Each batch has rows of its own.
        each = product(indices.shape[batch:-1])
        base = e.Mul(iota(product(leading)), size_scalar(product(chosen)))
        flat = reshape(e.Add(reshape(flat, (product(leading), each)), unsqueeze(base, 1)), flat.shape)
    return reshape(s.Gather(rows, flat, 0), result)


@handles("ScatterND")
def _scatter_nd(t: Translation, node: Node, x: Item, indices: Item, updates: Item) -> Value:
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise SizeUnknown(f"the indices' last size {depth} must be a known number when compiling")
    chosen, rest = x.shape[:depth], x.shape[depth:]
    count = product(indices.shape[:-1])
    flat = flat_index(reshape(indices.value, (count, depth)), chosen, node.inputs[0])
    rows = reshape(x.value, (product(chosen), *rest))
    placed = s.Scatter(rows, flat, reshape(updates.value, (count, *rest)), node.get("reduction", "none"))
    return reshape(placed, x.shape)


@handles("Scatter", "ScatterElements")
def _scatter_elements(t: Translation, node: Node, x: Item, indices: Item, updates: Item) -> Value:
    axis = axis_of(node.get("axis", 0), x.rank)
    shape = indices.shape
    flat: Value | None = None
    for i, size in enumerate(x.shape):
        what = f"axis {axis} of {node.inputs[0]}"
        place = checked(indices.value, size, what) if i == axis else along(iota(shape[i]), i, x.rank)
        flat = place if flat is None else e.Add(e.Mul(flat, size_scalar(size)), place)
    if flat is None:
        raise Unsupported("a tensor of rank 0 has nothing to place")
    flat = reshape(broadcast(flat, shape), (product(shape),))
    elements = reshape(x.value, (product(x.shape),))
    placed = s.Scatter(elements, flat, reshape(updates.value, (product(shape),)), node.get("reduction", "none"))
    return reshape(placed, x.shape)


@handles("TensorScatter")
def _tensor_scatter(t: Translation, node: Node, x: Item, update: Item, starts: Item | None = None) -> Value:
    """A cache [batch, ...] with an update put in along an axis, each batch from its own start."""
    axis = axis_of(node.get("axis", -2), x.rank)
    if axis == 0:
        raise Unsupported("the axis of a cache cannot be its batch")
    batch, size, length = x.shape[0], x.shape[axis], update.shape[axis]
    begin = broadcast(e.constant(0), (batch,)) if starts is None else cast(starts.value, "i64")
    place: Value = e.Add(unsqueeze(begin, 1), iota(length))
    mode = node.get("mode", "linear")
    if mode not in ("linear", "circular"):
        raise Unsupported(f"mode {mode!r} is neither of linear, circular")
    if mode == "circular":
        place = e.Mod(place, size_scalar(size))
    else:
        place = checked(place, size, f"axis {axis} of {node.inputs[0]}")
    # Batch and axis in front make rows: row b * size + place.
    order = [0, axis, *(i for i in range(1, x.rank) if i != axis)]
    rows = transpose(x.value, order)
    flat = e.Add(e.Mul(unsqueeze(iota(batch), 1), size_scalar(size)), place)
    rest = rows.shape[2:]
    placed = s.Scatter(
        reshape(rows, (batch * size, *rest)),
        reshape(flat, (batch * length,)),
        reshape(transpose(update.value, order), (batch * length, *rest)),
    )
    return transpose(reshape(placed, rows.shape), [order.index(i) for i in range(x.rank)])


@handles("OneHot")
def _one_hot(t: Translation, node: Node, indices: Item, depth: Item, values: Item) -> Value:
    (size,) = known(depth, "the depth")
    size = size if isinstance(size, Dim) else int(size)
    rank = indices.rank + 1
    axis = axis_of(node.get("axis", -1), rank)
    places = along(iota(size), axis, rank)
    hot = e.Equal(unsqueeze(from_start(indices.value, size), axis), places)
    off, on = (reshape(cut(values.value, 0, i, i + 1), ()) for i in range(2))
    return e.Where(hot, on, off)


@handles("TopK")
def _top_k(t: Translation, node: Node, x: Item, k: Item | None = None) -> list[Value]:
    axis = axis_of(node.get("axis", -1), x.rank)
    (count,) = [node.get("k")] if k is None else known(k, "the number of elements")
    require_room(x.shape[axis] - count, f"{count} elements of an axis of {x.shape[axis]}")
    chosen = s.TopK(x.value, count, axis, bool(node.get("largest", 1)))
    return [s.GatherElements(x.value, chosen, axis), chosen]


@handles("Compress")
def _compress(t: Translation, node: Node, x: Item, condition: Item) -> Value:
    kept = np.flatnonzero(numbers(condition, "which elements are kept"))
    axis = node.get("axis")
    value = x.value if axis is not None else reshape(x.value, (product(x.shape),))
    along_axis = 0 if axis is None else axis_of(axis, x.rank)
    what = f"axis {along_axis} of {node.inputs[0]}"
    return s.Gather(value, checked(e.constant(kept, "i64"), value.shape[along_axis], what), along_axis)


@handles("NonZero")
def _non_zero(t: Translation, node: Node, x: Item) -> Value:
    return e.constant(np.array(np.nonzero(np.atleast_1d(numbers(x, "which elements are zero")))), "i64")


@handles("ReverseSequence")
def _reverse_sequence(t: Translation, node: Node, x: Item, lengths: Item) -> Value:
    """The first `lengths[b]` elements of each batch in reverse order, the others as they are."""
    batch, time = node.get("batch_axis", 1), node.get("time_axis", 0)
    step = along(iota(x.shape[time]), time, x.rank)
    length = along(cast(lengths.value, "i64"), batch, x.rank)
    place = e.Where(e.Less(step, length), e.Sub(e.Sub(length, e.constant(1)), step), step)
    return s.GatherElements(x.value, broadcast(place, x.shape), time)


@handles("ArrayFeatureExtractor", domain="ai.onnx.ml")
def _array_feature_extractor(t: Translation, node: Node, x: Item, indices: Item) -> Value:
    rows = x.value if x.rank > 1 else unsqueeze(x.value, 0)
    return s.Gather(rows, reshape(indices.value, (product(indices.shape),)), rows.rank - 1)
