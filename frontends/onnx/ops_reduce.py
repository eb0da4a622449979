"""Reductions and functions along an axis: Reduce*, ArgMax, Softmax and its kin, CumSum."""

from __future__ import annotations

from collections.abc import Callable

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import product
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.shapes import axis_of
from llmc.compiler.ir.types import FLOATS
from llmc.frontends.onnx.forms import (
    axes_of,
    broadcast,
    cast,
    concat,
    cut,
    flip,
    highest,
    integers,
    iota,
    like,
    reshape,
    size_scalar,
    unsqueeze,
)
from llmc.frontends.onnx.translation import Handler, Item, Node, Translation, handles

Reduction = Callable[[Value, tuple[int, ...], bool], Value]


def reduction(make: Reduction, before: Callable[[Value], Value] | None = None) -> Handler:
    """A Reduce* op: axes by attribute or input; none are all of them, or none where `noop_with_empty_axes` says so.

    before: what is done to each element first, which happens even where nothing is reduced.
    """

    def handler(t: Translation, node: Node, x: Item, axes: Item | None = None) -> Value:
        along = axes_of(node, x.rank, axes)
        value = x.value if before is None else before(x.value)
        if not along:
            along = () if node.get("noop_with_empty_axes", 0) else tuple(range(x.rank))
        return make(value, along, bool(node.get("keepdims", 1)))

    return handler


def total(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    """The sum, over no axes too."""
    return s.Sum(x, axes, keep) if axes else x


def _mean(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return s.Mean(x, axes, keep) if axes else x


def _prod(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return s.Prod(x, axes, keep) if axes else x


def _max(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    if not axes:
        return x
    return s.Any(x, axes, keep) if x.dtype == "bool" else s.Max(x, axes, keep)


def _min(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    if not axes:
        return x
    return s.All(x, axes, keep) if x.dtype == "bool" else s.Min(x, axes, keep)


def _square(x: Value) -> Value:
    return e.Mul(x, x)


def root(x: Value) -> Value:
    """The square root; of integers, rounded towards zero."""
    return e.Sqrt(x) if x.dtype in FLOATS else cast(e.Sqrt(cast(x, "f64")), x.dtype)


def _log(x: Value) -> Value:
    return e.Log(x) if x.dtype in FLOATS else cast(e.Log(cast(x, "f64")), x.dtype)


def _log_sum_exp(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    if x.dtype not in FLOATS:
        return cast(_log_sum_exp(cast(x, "f64"), axes, keep), x.dtype)
    if not axes:
        return x
    # The largest element is taken out first, unless all are -inf (or there are none).
    top: Value = s.Max(x, axes, True)
    top = e.Where(e.Equal(e.Abs(top), like(float("inf"), top)), like(0, top), top)
    found = e.Add(e.Log(s.Sum(e.Exp(e.Sub(x, top)), axes, True)), top)
    return found if keep else reshape(found, s.Sum(x, axes, False).shape)


for _name, _make, _before in (
    ("ReduceSum", total, None), ("ReduceMean", _mean, None), ("ReduceMax", _max, None), ("ReduceMin", _min, None),
    ("ReduceProd", _prod, None), ("ReduceL1", total, e.Abs), ("ReduceSumSquare", total, _square),
    ("ReduceL2", lambda x, axes, keep: root(total(x, axes, keep)), _square),
    ("ReduceLogSum", lambda x, axes, keep: _log(total(x, axes, keep)), None), ("ReduceLogSumExp", _log_sum_exp, None),
):  # fmt: skip
    handles(_name)(reduction(_make, _before))


def _opposite(x: Value) -> Value:
    """A function of x that grows as x falls, without overflow."""
    if x.dtype in FLOATS:
        return e.Neg(x)
    return e.Sub(like(highest(x.dtype) if x.dtype.startswith("u") else -1, x), x)


@handles("ArgMax", "ArgMin")
def _argmax(t: Translation, node: Node, x: Item) -> Value:
    axis = axis_of(node.get("axis", 0), x.rank)
    value = x.value if node.op == "ArgMax" else _opposite(x.value)
    if node.get("select_last_index", 0):
        found: Value = e.Sub(size_scalar(x.shape[axis] - 1), s.Argmax(flip(value, axis), axis))
    else:
        found = s.Argmax(value, axis)
    return unsqueeze(found, axis) if node.get("keepdims", 1) else found


def _in_rows(make: Callable[[Value, int], Value]) -> Handler:
    """What before opset 13 took all axes from `axis` on as one, by default from the second."""

    def handler(t: Translation, node: Node, x: Item) -> Value:
        if node.version >= 13:
            return make(x.value, axis_of(node.get("axis", -1), x.rank))
        axis = axis_of(node.get("axis", 1), x.rank)
        if axis == x.rank - 1:
            return make(x.value, axis)
        rows = reshape(x.value, (product(x.shape[:axis]), product(x.shape[axis:])))
        return reshape(make(rows, 1), x.shape)

    return handler


def log_softmax(x: Value, axis: int) -> Value:
    """log(softmax(x)), computed without the softmax."""
    centred = e.Sub(x, s.Max(x, (axis,)))
    return e.Sub(centred, e.Log(s.Sum(e.Exp(centred), (axis,))))


def _hardmax(x: Value, axis: int) -> Value:
    first = unsqueeze(s.Argmax(x, axis), axis)
    places = reshape(iota(x.shape[axis]), [dim if i == axis else 1 for i, dim in enumerate(x.shape)])
    return e.Cast(e.Equal(places, first), x.dtype)


handles("Softmax")(_in_rows(s.Softmax))
handles("LogSoftmax")(_in_rows(log_softmax))
handles("Hardmax")(_in_rows(_hardmax))


@handles("CumSum")
def _cumsum(t: Translation, node: Node, x: Item, axis_item: Item) -> Value:
    (given,) = integers(axis_item, "the axis")
    axis = axis_of(given, x.rank)
    value = flip(x.value, axis) if node.get("reverse", 0) else x.value
    if node.get("exclusive", 0):
        # What comes before: one zero, and all elements but the last.
        zero = broadcast(like(0, value), [1 if i == axis else dim for i, dim in enumerate(value.shape)])
        value = concat([zero, cut(value, axis, 0, value.shape[axis] - 1)], axis)
    value = s.Cumsum(value, axis)
    return flip(value, axis) if node.get("reverse", 0) else value


@handles("CumProd")
def _cumprod(t: Translation, node: Node, x: Item, axis_item: Item) -> Value:
    """Each product by itself, of a row of a table that has ones where it does not reach."""
    (given,) = integers(axis_item, "the axis")
    axis = axis_of(given, x.rank)
    value, size = unsqueeze(x.value, axis), x.shape[axis]
    rank = x.rank + 1
    result = reshape(iota(size), [size if i == axis else 1 for i in range(rank)])
    factor = reshape(iota(size), [size if i == axis + 1 else 1 for i in range(rank)])
    compare = (
        (e.Greater if node.get("exclusive", 0) else e.GreaterEqual)
        if node.get("reverse", 0)
        else (e.Less if node.get("exclusive", 0) else e.LessEqual)
    )
    return s.Prod(e.Where(compare(factor, result), value, like(1, value)), (axis + 1,), keep=False)
