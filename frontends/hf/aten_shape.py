"""aten ops that make, move or pick elements."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.op import Param, Value
from llmc.compiler.ir.ranges import Ranges
from llmc.errors import FrontendError
from llmc.frontends.hf.aten import Meaning, Scalar, Translation, axis, broadcast, cast, handles, reshape

Node = torch.fx.Node
Size = int | Dim


@handles(
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "expand_as_identity",
    "_conj",
)  # fmt: skip
def _same(t: Translation, node: Node, x: Value, *_: object, **__: object) -> Value:
    return x


@handles("dropout", "feature_dropout")
def _dropout(t: Translation, node: Node, x: Value, part: float, train: bool) -> Value:
    if train and part:
        raise FrontendError(f"{node.name}: dropping {part} of the elements is not supported: the result is random")
    return x


@handles("to", "_to_copy", "type_as", "_autocast_to_reduced_precision", "_autocast_to_full_precision")
def _to(t: Translation, node: Node, x: Value, *_: object, **__: object) -> Value:
    return cast(x, t.dtype(node))


@handles("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def _view(t: Translation, node: Node, x: Value, *_: object, **__: object) -> Value:
    return reshape(x, t.shape(node))


@handles("expand", "expand_as", "broadcast_to")
def _expand(t: Translation, node: Node, x: Value, *_: object, **__: object) -> Value:
    return broadcast(x, t.shape(node))


@handles("permute")
def _permute(t: Translation, node: Node, x: Value, dims: list[int]) -> Value:
    return s.Transpose(x, tuple(axis(x, d) for d in dims))


@handles("transpose", "swapaxes", "swapdims")
def _transpose(t: Translation, node: Node, x: Value, a: int, b: int) -> Value:
    order = list(range(x.rank))
    first, second = axis(x, a), axis(x, b)
    order[first], order[second] = second, first
    return s.Transpose(x, tuple(order))


@handles("t", "numpy_T")
def _t(t: Translation, node: Node, x: Value) -> Value:
    return s.Transpose(x, tuple(reversed(range(x.rank))))


@handles("slice")
def _slice(
    t: Translation, node: Node, x: Value, dim: int = 0, start: Size | None = None, end: Size | None = None,
    step: int = 1,
) -> Value:  # fmt: skip
    index = axis(x, dim)
    size, length = x.shape[index], t.shape(node)[index]
    first = start or 0
    if isinstance(first, int) and first < 0:
        first = 0 if isinstance(size, int) and size + first < 0 else size + first
    elif isinstance(first, int) and isinstance(size, int):
        first = min(first, size)
    if length == size:
        return x
    return s.Slice(x, index, first, first + (length - 1) * step + 1, step)


@handles("narrow")
def _narrow(t: Translation, node: Node, x: Value, dim: int, start: Size, length: Size) -> Value:
    return _slice(t, node, x, dim, start)


def _pick(x: Value, index: int, at: Size) -> Value:
    return reshape(s.Slice(x, index, at, at + 1), (*x.shape[:index], *x.shape[index + 1 :]))


@handles("select")
def _select(t: Translation, node: Node, x: Value, dim: int, index: Meaning) -> Value:
    where = axis(x, dim)
    if isinstance(index, int) and index < 0:
        index = x.shape[where] + index
    return _pick(x, where, index)


def _pieces(x: Value, index: int, sizes: list[Size]) -> tuple[Value, ...]:
    pieces: list[Value] = []
    start: Size = 0
    for size in sizes:
        pieces.append(s.Slice(x, index, start, start + size))
        start = start + size
    return tuple(pieces)


@handles("split", "split_with_sizes", "chunk", "tensor_split")
def _split(t: Translation, node: Node, x: Value, how: object, dim: int = 0) -> tuple[Value, ...]:
    index = axis(x, dim)
    return _pieces(x, index, [t.size(piece.shape[index]) for piece in node.meta["val"]])


@handles("unbind")
def _unbind(t: Translation, node: Node, x: Value, dim: int = 0) -> tuple[Value, ...]:
    index = axis(x, dim)
    return tuple(_pick(x, index, i) for i in range(len(node.meta["val"])))


@handles("cat", "concat", "concatenate")
def _cat(t: Translation, node: Node, xs: list[Value], dim: int = 0) -> Value:
    dtype = t.dtype(node)
    # torch lets an empty vector join anything.
    kept = [cast(x, dtype) for x in xs if x.shape != (0,)] or [cast(xs[0], dtype)]
    return kept[0] if len(kept) == 1 else s.Concat(tuple(kept), axis(kept[0], dim))


@handles("stack")
def _stack(t: Translation, node: Node, xs: list[Value], dim: int = 0) -> Value:
    shape = t.shape(node)
    index = dim + len(shape) if dim < 0 else dim
    one = (*shape[:index], 1, *shape[index + 1 :])
    return s.Concat(tuple(reshape(cast(x, t.dtype(node)), one) for x in xs), index)


@handles("repeat")
def _repeat(t: Translation, node: Node, x: Value, repeats: list[Size]) -> Value:
    leading = len(repeats) - x.rank
    shape = (*([1] * leading), *x.shape)
    apart = tuple(part for dim in shape for part in (1, dim))
    grown = tuple(part for times, dim in zip(repeats, shape, strict=True) for part in (times, dim))
    return reshape(broadcast(reshape(x, apart), grown), t.shape(node))


@handles("repeat_interleave.self_int")
def _repeat_interleave(
    t: Translation, node: Node, x: Value, repeats: int, dim: int | None = None, output_size: object = None
) -> Value:
    if dim is None:
        x, dim = reshape(x, (product(x.shape),)), 0
    index = axis(x, dim)
    before, after = x.shape[: index + 1], x.shape[index + 1 :]
    return reshape(broadcast(reshape(x, (*before, 1, *after)), (*before, repeats, *after)), t.shape(node))


@handles("flip")
def _flip(t: Translation, node: Node, x: Value, dims: list[int]) -> Value:
    for dim in dims:
        index = axis(x, dim)
        size = x.shape[index]
        backwards = e.Sub(t.tensor(size - 1, "i64"), s.Iota(size))
        x = s.Gather(x, backwards, index)
    return x


@handles("pad", "constant_pad_nd")
def _pad(t: Translation, node: Node, x: Value, pad: list[int], mode: object = "constant", value: object = 0) -> Value:
    fill = mode if isinstance(mode, (int, float)) else value
    if isinstance(mode, str) and mode != "constant":
        raise FrontendError(f"{node.name}: padding by {mode} is not supported")
    if not all(isinstance(amount, int) for amount in pad):
        raise FrontendError(f"{node.name}: padding by {pad}, which depends on the sizes of inputs, is not supported")
    low, high = [0] * x.rank, [0] * x.rank
    for i in range(len(pad) // 2):
        index = x.rank - 1 - i
        low[index], high[index] = max(pad[2 * i], 0), max(pad[2 * i + 1], 0)
        first, last = max(-pad[2 * i], 0), x.shape[index] - max(-pad[2 * i + 1], 0)
        if (first, last) != (0, x.shape[index]):
            x = s.Slice(x, index, first, last)
    if not any(low + high):
        return x
    return s.Pad(x, tuple(low), tuple(high), float(fill or 0))  # type: ignore[arg-type]


# Picking by index.


@handles("embedding")
def _embedding(t: Translation, node: Node, table: Value, ids: Value, *_: object, **__: object) -> Value:
    # Rows are picked before they are cast, so that the table is never cast whole.
    if isinstance(table, e.Cast) and isinstance(table.x, Param):
        return cast(s.Gather(table.x, _narrow_index(ids), 0), table.dtype)
    return s.Gather(table, _narrow_index(ids), 0)


def _narrow_index(indices: Value) -> Value:
    """The index without a widening cast: picking takes any integer."""
    return indices.x if isinstance(indices, e.Cast) and indices.x.dtype == "i32" else indices


@handles("index_select")
def _index_select(t: Translation, node: Node, x: Value, dim: int, indices: Value) -> Value:
    return s.Gather(x, _narrow_index(indices), axis(x, dim))


@handles("gather")
def _gather(t: Translation, node: Node, x: Value, dim: int, indices: Value, *_: object) -> Value:
    index = axis(x, dim)
    # torch allows an index smaller than the operand on the other axes.
    for other in range(x.rank):
        if other != index and indices.shape[other] != x.shape[other]:
            x = s.Slice(x, other, 0, indices.shape[other])
    return s.GatherElements(x, indices, index)


@handles("index")
def _index(t: Translation, node: Node, x: Value, indices: list[Value | None]) -> Value:
    """x[..., i, j, ...] with index tensors on neighbouring axes, which are merged into one."""
    places = [i for i, value in enumerate(indices) if value is not None]
    tensors = [value for value in indices if value is not None]
    if any(value.dtype == "bool" for value in tensors):
        raise FrontendError(f"{node.name}: picking by a bool mask is not supported: its result has no fixed size")
    first, last = places[0], places[-1]
    if places != list(range(first, last + 1)):
        raise FrontendError(f"{node.name}: indices on axes {places} are not supported")
    if len(tensors) == 1:
        return reshape(s.Gather(x, _narrow_index(tensors[0]), first), t.shape(node))
    flat: Value | None = None
    for place, value in zip(places, tensors, strict=True):
        at = cast(value, "i64")
        size = t.tensor(x.shape[place], "i64")
        # Out of one axis an index may be a place of another row: each is looked at for itself.
        if not Ranges({}).integers(at).within(0, x.shape[place] - 1):
            at = cast(s.CheckedIndex(at, None, x.shape[place], f"axis {place} of {node.name}"), "i64")
        flat = at if flat is None else e.Add(e.Mul(flat, size), at)
    assert flat is not None
    merged = product(x.shape[first : last + 1])
    x = reshape(x, (*x.shape[:first], merged, *x.shape[last + 1 :]))
    return reshape(s.Gather(x, flat, first), t.shape(node))


@handles("slice_scatter")
def _slice_scatter(
    t: Translation, node: Node, x: Value, source: Value, dim: int = 0, start: Size | None = None,
    end: Size | None = None, step: int = 1,
) -> Value:  # fmt: skip
    """x with a slice replaced."""
    index = axis(x, dim)
    size, length = x.shape[index], source.shape[index]
    if step != 1:
        raise FrontendError(f"{node.name}: replacing every {step}th element is not supported")
    first = start or 0
    if isinstance(first, int) and first < 0:
        first = size + first
    parts = (s.Slice(x, index, 0, first), cast(source, x.dtype), s.Slice(x, index, first + length, size))
    return s.Concat(tuple(part for part in parts if part.shape[index] != 0), index)


@handles("scatter.value")
def _scatter_value(t: Translation, node: Node, x: Value, dim: int, indices: Value, value: Scalar) -> Value:
    """x with one number written at the places that the indices name along an axis."""
    index = axis(x, dim)
    if any(indices.shape[i] != x.shape[i] for i in range(x.rank) if i != index):
        raise FrontendError(f"{node.name}: scattering over a part of the other axes is not supported")
    last = (*(i for i in range(x.rank) if i != index), index)
    turned = s.Transpose(indices, last)
    named = e.Equal(reshape(turned, (*turned.shape, 1)), cast(s.Iota(x.shape[index]), indices.dtype))
    hit = s.Any(named, (x.rank - 1,), False)
    back = tuple(last.index(i) for i in range(x.rank))
    return e.Where(s.Transpose(hit, back), t.tensor(value, x.dtype), x)


# Making tensors.


@handles("arange")
def _arange(t: Translation, node: Node, *bounds: Meaning, **_: object) -> Value:
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    dtype = t.dtype(node)
    (size,) = t.shape(node)
    value: Value = cast(s.Iota(size), dtype)
    if step != 1:
        value = e.Mul(value, t.tensor(step, dtype))
    return value if isinstance(start, (int, float)) and start == 0 else e.Add(value, t.tensor(start, dtype))


def _filling(value: Scalar) -> Callable[..., Value]:
    return lambda t, node, *_, **__: t.filled(node, value)


handles("zeros", "zeros_like", "new_zeros")(_filling(0))
handles("ones", "ones_like", "new_ones")(_filling(1))
handles("empty", "empty_like", "new_empty", "empty_permuted")(_filling(0))


@handles("full", "full_like", "new_full")
def _full(t: Translation, node: Node, like: object, *values: Meaning, **named: Meaning) -> Value:
    return t.filled(node, named["fill_value"] if "fill_value" in named else values[-1])


@handles("scalar_tensor")
def _scalar_tensor(t: Translation, node: Node, value: Meaning, **_: object) -> Value:
    return t.tensor(value, t.dtype(node))


@handles("fill")
def _fill(t: Translation, node: Node, x: Value, value: Meaning) -> Value:
    return t.filled(node, value)


@handles("copy")
def _copy(t: Translation, node: Node, x: Value, source: Value, *_: object) -> Value:
    return broadcast(cast(source, x.dtype), x.shape)


def _triangle(make: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    def handler(t: Translation, node: Node, x: Value, diagonal: int = 0) -> Value:
        rows, columns = x.shape[-2], x.shape[-1]
        row = e.Add(reshape(s.Iota(rows), (rows, 1)), e.constant(diagonal))
        return e.Where(make(s.Iota(columns), row), x, e.constant(0, x.dtype))

    return handler


handles("tril")(_triangle(e.LessEqual))
handles("triu")(_triangle(e.GreaterEqual))


@handles("one_hot")
def _one_hot(t: Translation, node: Node, x: Value, classes: int) -> Value:
    hot = e.Equal(reshape(x, (*x.shape, 1)), cast(s.Iota(classes), x.dtype))
    return cast(hot, t.dtype(node))
