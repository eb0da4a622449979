"""t-level ops that move elements, reduce them or multiply matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any as Anything
from typing import ClassVar

import numpy as np

from llmc.compiler.ir.dims import Dim, bounds, concrete, exact_division, known_at_most, product
from llmc.compiler.ir.op import Lookup, Op, Tokens, Value
from llmc.compiler.ir.shapes import axis_of, broadcast_shapes, require, require_equal, require_same_dtype
from llmc.compiler.ir.types import FLOATS, INTEGERS, UNSIGNED, Array, Shape, Tensor, numpy_dtype
from llmc.errors import IRError


def bound_shape(shape: Shape) -> tuple[int, ...]:
    """A shape whose symbols have been bound; DimError names one that has not."""
    return tuple(concrete(dim, {}) for dim in shape)


class Iota(Op, name="t.iota"):
    """0, 1, ..., size - 1."""

    tokens = Tokens.MIXES

    size: int | Dim
    dtype_name: str = "i64"

    def infer(self) -> Tensor:
        return Tensor((self.size,), self.dtype_name)

    def evaluate(self) -> Array:
        return np.arange(concrete(self.size, {}), dtype=numpy_dtype(self.dtype_name))


class Reshape(Op, name="t.reshape"):
    """The same elements, row-major, in another shape with as many elements."""

    tokens = Tokens.MOVES

    x: Value
    to: tuple[int | Dim, ...]

    def infer(self) -> Tensor:
        require_equal(
            f"cannot reshape {list(self.x.shape)} to {list(self.to)}: different element counts",
            (product(self.x.shape), product(self.to)),
        )
        return Tensor(self.to, self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        return x.reshape(bound_shape(self.to))


class Transpose(Op, name="t.transpose"):
    """Axes permuted: result axis i is operand axis permutation[i]."""

    tokens = Tokens.MOVES

    x: Value
    permutation: tuple[int, ...]

    def infer(self) -> Tensor:
        require(
            sorted(self.permutation) == list(range(self.x.rank)),
            f"{self.permutation} is no permutation of {self.x.rank} axes",
        )
        return Tensor(tuple(self.x.shape[i] for i in self.permutation), self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        return x.transpose(self.permutation)


class Broadcast(Op, name="t.broadcast"):
    """The operand repeated along axes of size 1 and new leading axes."""

    tokens = Tokens.MOVES

    x: Value
    to: tuple[int | Dim, ...]

    def infer(self) -> Tensor:
        require(broadcast_shapes(self.x.shape, self.to) == self.to, f"{self.x.shape} does not broadcast to {self.to}")
        return Tensor(self.to, self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        return np.broadcast_to(x, bound_shape(self.to))


class Slice(Op, name="t.slice"):
    """Elements start, start + step, ... below stop along one axis."""

    tokens = Tokens.MOVES

    x: Value
    axis: int
    start: int | Dim
    stop: int | Dim
    step: int = 1

    def infer(self) -> Tensor:
        axis = axis_of(self.axis, self.x.rank)
        size = self.x.shape[axis]
        require(known_at_most(0, self.start) and known_at_most(self.start, self.stop), "needs 0 <= start <= stop")
        require(known_at_most(self.stop, size), f"stop {self.stop} is beyond the axis of {size}")
        require(self.step >= 1, "needs a positive step")
        length = (self.stop - self.start + (self.step - 1)) // self.step
        return Tensor((*self.x.shape[:axis], length, *self.x.shape[axis + 1 :]), self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        index = [slice(None)] * x.ndim
        index[self.axis] = slice(self.start, self.stop, self.step)
        return x[tuple(index)]


class Concat(Op, name="t.concat"):
    """Operands one after another along one axis."""

    tokens = Tokens.MOVES

    xs: tuple[Value, ...]
    axis: int

    def infer(self) -> Tensor:
        require(len(self.xs) > 0, "needs at least one operand")
        dtype = require_same_dtype(*self.xs)
        axis = axis_of(self.axis, self.xs[0].rank)
        shape = list(self.xs[0].shape)
        for other in self.xs[1:]:
            said = f"shapes {self.xs[0].shape} and {other.shape} differ outside axis {axis}"
            require(len(other.shape) == len(shape), said)
            pairs = zip(shape, other.shape, strict=True)
            require_equal(said, *(pair for i, pair in enumerate(pairs) if i != axis))
            shape[axis] = shape[axis] + other.shape[axis]
        return Tensor(tuple(shape), dtype)

    def evaluate(self, *xs: Array) -> Array:
        return np.concatenate(xs, axis=self.axis)


class Pad(Op, name="t.pad"):
    """`low` and `high` constant elements before and after each axis."""

    tokens = Tokens.MOVES

    x: Value
    low: tuple[int, ...]
    high: tuple[int, ...]
    value: float = 0.0

    def infer(self) -> Tensor:
        require(len(self.low) == len(self.high) == self.x.rank, "needs one low and one high per axis")
        require(all(count >= 0 for count in (*self.low, *self.high)), "padding cannot be negative")
        shape = tuple(d + a + b for d, a, b in zip(self.x.shape, self.low, self.high, strict=True))
        return Tensor(shape, self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        return np.pad(x, tuple(zip(self.low, self.high, strict=True)), constant_values=np.asarray(self.value, x.dtype))


class Gather(Op, name="t.gather"):
    """Slices of x along an axis by index: the axis is replaced by the indices' shape. Negative indices wrap."""

    tokens = Tokens.MOVES

    x: Value
    indices: Value
    axis: int = 0

    def infer(self) -> Tensor:
        require(self.indices.dtype in INTEGERS, f"indices must be integers, not {self.indices.dtype}")
        axis = axis_of(self.axis, self.x.rank)
        shape = (*self.x.shape[:axis], *self.indices.shape, *self.x.shape[axis + 1 :])
        return Tensor(shape, self.x.dtype)

    def lookups(self) -> tuple[Lookup, ...]:
        return (Lookup("indices", self.x, self.axis % self.x.rank),)

    def evaluate(self, x: Array, indices: Array) -> Array:
        return np.take(x, indices, axis=self.axis)


class GatherElements(Op, name="t.gather_elements"):
    """result[i][j] = x[indices[i][j]][j] for axis 0, and so on."""

    tokens = Tokens.MOVES

    x: Value
    indices: Value
    axis: int

    def infer(self) -> Tensor:
        require(self.indices.dtype in INTEGERS, f"indices must be integers, not {self.indices.dtype}")
        require(self.indices.rank == self.x.rank, "indices must have the operand's rank")
        axis = axis_of(self.axis, self.x.rank)
        for other, (wanted, size) in enumerate(zip(self.indices.shape, self.x.shape, strict=True)):
            require(other == axis or wanted == size, f"indices and operand differ in axis {other}: {wanted} and {size}")
        return Tensor(self.indices.shape, self.x.dtype)

    def lookups(self) -> tuple[Lookup, ...]:
        return (Lookup("indices", self.x, self.axis % self.x.rank),)

    def evaluate(self, x: Array, indices: Array) -> Array:
        return np.take_along_axis(x, indices.astype(np.int64), self.axis)


class CheckedIndex(Op, name="t.checked_index"):
    """Places in an axis: x where it is 0 .. size - 1, x + size where it is -size .. -1; any other value is an error.

    While evaluating the error is an IRError; a step that runs says it and ends. sizes: of each element of x, in place
    of the one `size` for all. what: who asks for what, for the message. The result is i32 for an x of i32, else i64.
    """

    tokens = Tokens.ELEMENTS

    x: Value
    sizes: Value | None = None
    size: int | Dim = 0
    what: str = ""

    def infer(self) -> Tensor:
        require(self.x.dtype in INTEGERS, f"indices must be integers, not {self.x.dtype}")
        if self.sizes is not None:
            require(self.sizes.dtype in ("i32", "i64"), f"sizes must be i32 or i64, not {self.sizes.dtype}")
            require(self.sizes.shape == self.x.shape, f"sizes of {self.sizes.shape} for indices of {self.x.shape}")
        high = bounds(self.size)[1]
        narrow = self.x.dtype == "i32" and high is not None and high < 1 << 31
        return Tensor(self.x.shape, "i32" if narrow else "i64")

    @property
    def failure(self) -> str:
        """What an error says of an index that is out of range."""
        text = f"index out of range: {self.what or 'an index'}"
        return text if self.sizes is not None else f"{text}; the axis has {self.size} elements"

    def evaluate(self, x: Array, sizes: Array | None = None) -> Array:
        size = np.asarray(concrete(self.size, {}) if sizes is None else sizes, np.int64)
        wide = x.astype(np.int64)
        first = np.int64(0) if self.x.dtype in UNSIGNED else -size
        outside = (wide < first) | (wide >= size)
        if outside.any():
            worst = int(np.argmax(outside.reshape(-1)))
            raise IRError(f"{self.failure}: {x.reshape(-1)[worst]}")
        return np.where(wide < 0, wide + size, wide).astype(numpy_dtype(self.dtype))


class Cumsum(Op, name="t.cumsum"):
    """Running sum along an axis."""

    tokens = Tokens.AXES

    x: Value
    axis: int

    def infer(self) -> Tensor:
        axis_of(self.axis, self.x.rank)
        return Tensor(self.x.shape, self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        return np.cumsum(x, axis=self.axis, dtype=x.dtype)


class Reduce(Op):
    """Base: `function` over axes, which become 1 (keep) or vanish."""

    tokens = Tokens.AXES

    x: Value
    axes: tuple[int, ...]
    keep: bool = True
    function: ClassVar[Callable[..., Anything]]

    def infer(self) -> Tensor:
        axes = {axis_of(axis, self.x.rank) for axis in self.axes}
        require(len(axes) == len(self.axes), f"axes {self.axes} name an axis of rank {self.x.rank} twice")
        shape: Shape = tuple(
            1 if i in axes else dim for i, dim in enumerate(self.x.shape) if self.keep or i not in axes
        )
        return Tensor(shape, self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        wide = x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x
        return np.asarray(type(self).function(wide, axis=self.axes, keepdims=self.keep), x.dtype)


class Sum(Reduce, name="t.sum"):
    """Sum."""

    function = staticmethod(np.sum)


class Prod(Reduce, name="t.prod"):
    """Product; of nothing, 1."""

    function = staticmethod(np.prod)


def _mean(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    count = int(np.prod([x.shape[i] for i in axis], dtype=np.int64))
    return np.asarray(np.sum(x, axis=axis, keepdims=keepdims) / count)


class Mean(Reduce, name="t.mean"):
    """Arithmetic mean (of nothing, not a number); of integers, truncated towards zero."""

    function = staticmethod(_mean)


def extreme(dtype: np.dtype[Anything], lowest: bool) -> Anything:
    """The least (greatest) value of a dtype: minus (plus) infinity for floats."""
    if dtype.kind == "b":
        return not lowest
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if lowest else np.iinfo(dtype).max
    return -np.inf if lowest else np.inf


class Max(Reduce, name="t.max"):
    """Largest element; of nothing, the least value of the dtype (minus infinity for floats). NaN wins."""

    function = staticmethod(lambda x, axis, keepdims: np.max(x, axis, None, keepdims, extreme(x.dtype, True)))


class Min(Reduce, name="t.min"):
    """Smallest element; of nothing, the greatest value of the dtype (infinity for floats). NaN wins."""

    function = staticmethod(lambda x, axis, keepdims: np.min(x, axis, None, keepdims, extreme(x.dtype, False)))


class Any(Reduce, name="t.any"):
    """Whether any element holds."""

    function = staticmethod(np.any)


class All(Reduce, name="t.all"):
    """Whether every element holds."""

    function = staticmethod(np.all)


class Argmax(Op, name="t.argmax"):
    """The index of the first largest element along an axis, which vanishes."""

    tokens = Tokens.AXES

    x: Value
    axis: int

    def infer(self) -> Tensor:
        axis = axis_of(self.axis, self.x.rank)
        return Tensor((*self.x.shape[:axis], *self.x.shape[axis + 1 :]), "i64")

    def evaluate(self, x: Array) -> Array:
        return np.asarray(np.argmax(x, axis=self.axis))


class TopK(Op, name="t.top_k"):
    """Indices (i64) of the k largest or smallest elements along an axis, in order; of equal ones the first comes first.

    NaN counts as the largest.
    """

    tokens = Tokens.AXES

    x: Value
    k: int | Dim
    axis: int
    largest: bool = True

    def infer(self) -> Tensor:
        axis = axis_of(self.axis, self.x.rank)
        require(known_at_most(self.k, self.x.shape[axis]), f"k = {self.k} of an axis of {self.x.shape[axis]}")
        return Tensor((*self.x.shape[:axis], self.k, *self.x.shape[axis + 1 :]), "i64")

    def evaluate(self, x: Array) -> Array:
        # Equal elements stay in order in a stable sort: for the largest first, of the reversed axis, read backwards.
        wide = x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x
        if self.largest:
            size = x.shape[self.axis]
            backwards = np.argsort(np.flip(wide, self.axis), self.axis, kind="stable")
            order = size - 1 - np.flip(backwards, self.axis)
        else:
            order = np.argsort(wide, self.axis, kind="stable")
        return np.take(order, np.arange(concrete(self.k, {})), axis=self.axis)


_REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
}


class Scatter(Op, name="t.scatter"):
    """x [R, ...] with updates [N, ...] put into rows `indices` [N], one after another.

    reduction: "none" replaces the row (of several updates of one row, the last stays); "add", "mul", "max" and "min"
    combine with what is there. Indices are in 0 .. R - 1.
    """

    tokens = Tokens.MIXES

    x: Value
    indices: Value
    updates: Value
    reduction: str = "none"

    def infer(self) -> Tensor:
        require(self.reduction in ("none", *_REDUCTIONS), f"unknown reduction {self.reduction!r}")
        require(self.indices.dtype in INTEGERS, f"indices must be integers, not {self.indices.dtype}")
        require_same_dtype(self.x, self.updates)
        require(self.x.rank >= 1 and self.indices.rank == 1, "needs rows and a vector of indices")
        rows = (*self.indices.shape, *self.x.shape[1:])
        said = f"updates {list(self.updates.shape)} are not {list(self.indices.shape)} rows of {list(self.x.shape)}"
        require(self.updates.rank == len(rows), said)
        require_equal(said, *zip(rows, self.updates.shape, strict=True))
        return self.x.tensor

    def lookups(self) -> tuple[Lookup, ...]:
        return (Lookup("indices", self.x),)

    def evaluate(self, x: Array, indices: Array, updates: Array) -> Array:
        result = x.copy()
        for row, update in zip(indices.tolist(), updates, strict=True):
            if self.reduction == "none":
                result[row] = update
            else:
                result[row] = _REDUCTIONS[self.reduction](result[row], update)
        return result


def axes_of(op: Op) -> tuple[int, ...]:
    """The axes that an op with `Tokens.AXES` works along, of its operand x."""
    axes = getattr(op, "axes", None)
    rank = op.operands[0].rank
    return tuple(axis % rank for axis in (axes if axes is not None else (getattr(op, "axis"),)))  # noqa: B009


class Softmax(Op, name="t.softmax"):
    """exp(x) / sum(exp(x)) along an axis, computed after subtracting the maximum."""

    tokens = Tokens.AXES

    x: Value
    axis: int

    def infer(self) -> Tensor:
        axis_of(self.axis, self.x.rank)
        require(self.x.dtype in FLOATS, f"needs floats, not {self.x.dtype}")
        return Tensor(self.x.shape, self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
        e = np.exp(wide - wide.max(axis=self.axis, keepdims=True))
        return np.asarray(e / e.sum(axis=self.axis, keepdims=True), x.dtype)


class Matmul(Op, name="t.matmul"):
    """Matrix product over the last two axes, leading axes broadcast; accumulated in f32 or wider."""

    tokens = Tokens.MIXES

    a: Value
    b: Value

    def infer(self) -> Tensor:
        dtype = require_same_dtype(self.a, self.b)
        require(self.a.rank >= 2 and self.b.rank >= 2, "needs matrices (rank 2 or more)")
        said = f"inner sizes differ: {list(self.a.shape)} times {list(self.b.shape)}"
        require_equal(said, (self.a.shape[-1], self.b.shape[-2]))
        leading = broadcast_shapes(self.a.shape[:-2], self.b.shape[:-2])
        return Tensor((*leading, self.a.shape[-2], self.b.shape[-1]), dtype)

    def evaluate(self, a: Array, b: Array) -> Array:
        if a.dtype.kind in "iu" or a.dtype == np.float64:
            return np.asarray(np.matmul(a, b))
        return np.asarray(np.matmul(a.astype(np.float32), b.astype(np.float32)), a.dtype)


def split_exact(size: int | Dim, parts: int) -> int | Dim:
    """`size / parts`, IRError when that is not a whole size."""
    quotient = exact_division(size, parts)
    require(quotient is not None, f"{size} does not split into {parts} equal parts")
    assert quotient is not None
    return quotient
