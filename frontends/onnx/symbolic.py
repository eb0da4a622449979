"""The known elements of small tensors: numbers are folded, sizes are followed through shape arithmetic.

A folder does to arrays of Python numbers and `Dim`s what an op does to tensors. Where a result depends on how large a
size is (the smaller of two, whether they are equal) and the sizes' ranges do not settle it, the folder raises, nothing
is known of the result, and the op is translated as any other.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.compiler.ir.dims import Dim, exact_division, product
from llmc.compiler.ir.elementwise import constant
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.op import Op, Value
from llmc.errors import DimError, LlmcError
from llmc.frontends.onnx.forms import HALVES, at_most, axes_of, dtype_named, integers, larger, smaller
from llmc.frontends.onnx.translation import SMALL, Item, Node, Objects, Translation, objects

Folder = Callable[..., Any]
FOLDERS: dict[str, Folder] = {}
_STEPS = 64  # ops of constants that are evaluated at once, at most
_LARGEST = 1 << 20  # elements of a value on the way


def folds(*ops: str) -> Callable[[Folder], Folder]:
    """Register what an op of the standard domain does to known elements.

    Called with the node and one `Item | None` an input, all of them known; gives an item, an object array of the first
    input's dtype, or a list of these, one an output.
    """

    def register(function: Folder) -> Folder:
        FOLDERS.update(dict.fromkeys(ops, function))
        return function

    return register


def fold(node: Node, items: Sequence[Item | None], translation: Translation) -> list[Item] | None:
    """The results of arithmetic on known sizes; None where the op or an input is no such. Numbers alone are not folded
    here: they take the op's own handler, and then `numbers_of`.
    """
    folder = None if node.domain else FOLDERS.get(node.op)
    given = [item for item in items if item is not None]
    if folder is None or any(item.known is None for item in given):
        return None
    if not any(isinstance(x, Dim) for item in given for x in item.known.flat):  # type: ignore[union-attr]
        return None
    try:
        found = folder(translation, node, *items)
        results = found if isinstance(found, list) else [found]
        made = [x if isinstance(x, Item) else Item(known=x, dtype=given[0].dtype) for x in results]
        return made if all(_elements(item).size <= SMALL and _holds(item) for item in made) else None
    except (LlmcError, ValueError, IndexError, KeyError, TypeError, ZeroDivisionError, OverflowError):
        return None


_LAST = {"i32": 2**31 - 1, "i64": 2**63 - 1, "f32": 2**24, "f64": 2**53}  # up to which every whole number is held


def _holds(item: Item) -> bool:
    """Whether the item's dtype holds all that its sizes may be: beyond it integers wrap, and floats round."""
    sizes = {x for x in _elements(item).flat if isinstance(x, Dim)}
    return all(at_most(-_LAST[item.dtype], x) and at_most(x, _LAST[item.dtype]) for x in sizes)


def numbers_of(value: Value) -> Item:
    """An item for a value; where it comes of constants alone and is small, it is evaluated and its elements known."""
    if not _small(value, SMALL) or not _is_constant(value):
        return Item(value)
    try:
        array = np.asarray(evaluate_values([value], {}, _no_params, {})["0"])
    except LlmcError:
        return Item(value)
    return Item(constant(array, value.dtype), objects(array.tolist(), array.shape))


def _small(value: Value, limit: int) -> bool:
    size = product(value.shape)
    return isinstance(size, int) and size <= limit


def _is_constant(root: Value) -> bool:
    """Whether a value comes of a few ops on small constants."""
    found = [root]
    for value in found:
        if not isinstance(value, Op) or not _small(value, _LARGEST) or len(found) > _STEPS:
            return False
        found.extend(operand for operand in dict.fromkeys(value.operands) if operand not in found)
    return True


def _no_params(name: str) -> Any:
    raise AssertionError(name)


def _elements(item: Item) -> Objects:
    assert item.known is not None
    return item.known


def _each(function: Callable[..., Any], *arrays: Objects) -> Objects:
    """A function of elements over arrays that broadcast."""
    spread = np.broadcast_arrays(*arrays)
    return objects([function(*row) for row in zip(*(a.flat for a in spread), strict=True)]).reshape(spread[0].shape)


def _whole(x: Any) -> Any:
    """A number as an int, where sizes are counted with it; ValueError for a fraction."""
    if isinstance(x, float):
        if not x.is_integer():
            raise ValueError(f"{x} is no whole number")
        return int(x)
    return x


def _arithmetic(function: Callable[[Any, Any], Any]) -> Folder:
    def folder(t: Translation, node: Node, a: Item, b: Item) -> Objects:
        return _each(lambda x, y: function(_whole(x), _whole(y)), _elements(a), _elements(b))

    return folder


def _quotient(a: Any, b: Any) -> Any:
    """a / b truncated towards zero."""
    if not isinstance(a, Dim) and not isinstance(b, Dim):
        return int(math.copysign(abs(a) // abs(b), a * b)) if a else 0
    exact = exact_division(a, b)
    if exact is not None:
        return exact
    if at_most(0, a):
        return a // b  # an error where b is a size or below zero
    raise DimError(f"the sign of {a} / {b} depends on the sizes")


def _division(t: Translation, node: Node, a: Item, b: Item) -> Objects:
    def exact(x: Any, y: Any) -> Any:
        found = exact_division(_whole(x), _whole(y))
        if found is None:
            raise DimError(f"{x} / {y} is a fraction")
        return found

    whole = a.dtype[0] in "iu"
    return _each(lambda x, y: _quotient(x, y) if whole else exact(x, y), _elements(a), _elements(b))


def _rest(t: Translation, node: Node, a: Item, b: Item) -> Objects:
    def rest(x: Any, y: Any) -> Any:
        x, y = _whole(x), _whole(y)
        # As in C the rest has the sign of x, else that of y.
        quotient = _quotient(x, y) if node.get("fmod", 0) else x // y
        return x - y * quotient

    return _each(rest, _elements(a), _elements(b))


folds("Add")(_arithmetic(operator.add))
folds("Sub")(_arithmetic(operator.sub))
folds("Mul")(_arithmetic(operator.mul))
folds("Div")(_division)
folds("Mod")(_rest)


def _extreme(choose: Callable[[Any, Any], Any]) -> Folder:
    def folder(t: Translation, node: Node, *items: Item) -> Objects:
        return functools.reduce(functools.partial(_each, choose), (_each(_whole, _elements(item)) for item in items))

    return folder


folds("Max")(_extreme(larger))
folds("Min")(_extreme(smaller))


def _equal(a: Any, b: Any) -> bool:
    if a == b:
        return True
    difference = _whole(a) - _whole(b)
    if at_most(1, difference) or at_most(difference, -1):
        return False
    raise DimError(f"whether {a} is {b} depends on the sizes")


def _ordered(a: Any, b: Any) -> bool:
    """a <= b"""
    found = at_most(_whole(a), _whole(b))
    if found is None:
        raise DimError(f"whether {a} is at most {b} depends on the sizes")
    return found


def _comparison(function: Callable[[Any, Any], bool]) -> Folder:
    def folder(t: Translation, node: Node, a: Item, b: Item) -> Item:
        return Item(known=_each(function, _elements(a), _elements(b)), dtype="bool")

    return folder


folds("Equal")(_comparison(_equal))
folds("LessOrEqual")(_comparison(_ordered))
folds("GreaterOrEqual")(_comparison(lambda a, b: _ordered(b, a)))
folds("Less")(_comparison(lambda a, b: not _ordered(b, a)))
folds("Greater")(_comparison(lambda a, b: not _ordered(a, b)))


@folds("Neg")
def _neg(t: Translation, node: Node, x: Item) -> Objects:
    return _each(operator.neg, _elements(x))


@folds("Abs", "Relu")
def _abs(t: Translation, node: Node, x: Item) -> Objects:
    """Sizes are not negative, unless they are differences."""
    if all(at_most(0, _whole(size)) for size in _elements(x).flat):
        return _elements(x)
    raise DimError("a sign depends on the sizes")


@folds("Identity", "Floor", "Ceil", "Round")
def _same(t: Translation, node: Node, x: Item) -> Objects:
    return _elements(x)


@folds("Sqrt")
def _sqrt(t: Translation, node: Node, x: Item) -> Objects:
    """The root of a square: of n * n, and of a number that is one."""

    def root(size: Any) -> Any:
        if not isinstance(size, Dim):
            found = math.isqrt(_whole(size))
            if found * found != size:
                raise ValueError(f"{size} is no square")
            return found
        (monomial, coefficient), *others = size.terms
        if others or any(power % 2 for _, power in monomial):
            raise DimError(f"{size} is no square")
        half: Any = Dim(((tuple((atom, power // 2) for atom, power in monomial), 1),))
        return half * root(coefficient)

    return _each(root, _elements(x))


@folds("Cast")
def _cast(t: Translation, node: Node, x: Item) -> Item:
    named = dtype_named(node.attributes["to"])
    return Item(known=_as(_elements(x), named if named in HALVES else t.dtype(named)), dtype=t.dtype(named))


@folds("CastLike")
def _cast_like(t: Translation, node: Node, x: Item, other: Item) -> Item:
    return Item(known=_as(_elements(x), other.dtype), dtype=other.dtype)


def _as(elements: Objects, dtype: str) -> Objects:
    """Elements in a dtype; a size stays one as a float, and as a bool is true where it is never zero."""
    if dtype == "bool":
        return _each(lambda x: not _equal(x, 0), elements)
    # Smaller integers might not hold a size.
    if dtype not in ("i64", "i32", "f32", "f64"):
        raise ValueError(f"sizes are not followed in {dtype}")
    number: type = float if dtype.startswith("f") else int
    return _each(lambda x: x if isinstance(x, Dim) else number(x), elements)


@folds("Where")
def _where(t: Translation, node: Node, condition: Item, a: Item, b: Item) -> Item:
    known = _each(lambda c, x, y: x if c else y, _elements(condition), _elements(a), _elements(b))
    return Item(known=known, dtype=a.dtype)


@folds("Gather")
def _gather(t: Translation, node: Node, x: Item, indices: Item) -> Objects:
    at = np.asarray(_elements(indices).tolist(), np.int64)
    return _nested(np.take(_elements(x), at, axis=node.get("axis", 0)))


@folds("GatherElements")
def _gather_elements(t: Translation, node: Node, x: Item, indices: Item) -> Objects:
    given, at = _elements(x), np.asarray(_elements(indices).tolist(), np.int64)
    axis = range(x.rank)[node.get("axis", 0)]
    # Of the other axes, only as much as the indices have: numpy would repeat these.
    within = tuple(slice(None) if i == axis else slice(size) for i, size in enumerate(at.shape))
    return np.take_along_axis(given[within], at, axis)


@folds("ScatterND")
def _scatter_nd(t: Translation, node: Node, x: Item, indices: Item, updates: Item) -> Objects:
    if node.get("reduction", "none") != "none":
        raise ValueError("only replacing is followed")
    result, at = _elements(x).copy(), np.asarray(_elements(indices).tolist(), np.int64)
    for place in np.ndindex(at.shape[:-1]):
        result[tuple(at[place])] = _elements(updates)[place]
    return result


@folds("ScatterElements")
def _scatter_elements(t: Translation, node: Node, x: Item, indices: Item, updates: Item) -> Objects:
    if node.get("reduction", "none") != "none":
        raise ValueError("only replacing is followed")
    result, at = _elements(x).copy(), np.asarray(_elements(indices).tolist(), np.int64)
    axis = range(x.rank)[node.get("axis", 0)]
    for place in np.ndindex(at.shape):
        result[(*place[:axis], at[place], *place[axis + 1 :])] = _elements(updates)[place]
    return result


def _nested(result: Any) -> Objects:
    """What numpy gives for a choice of one element is that element: an array of rank 0 again."""
    return result if isinstance(result, np.ndarray) else objects([result]).reshape(())


@folds("Concat")
def _concat(t: Translation, node: Node, *items: Item) -> Objects:
    return np.concatenate([_elements(item) for item in items], node.attributes["axis"])


@folds("Slice")
def _slice(t: Translation, node: Node, x: Item, *bounds_items: Item | None) -> Objects:
    given: list[Any]
    if bounds_items:
        given = [None if item is None else integers(item, "a bound") for item in bounds_items]
    else:
        given = [node.attributes["starts"], node.attributes["ends"], node.get("axes")]
    starts, ends, axes, steps = [*given, None, None][:4]
    index = [slice(None)] * x.rank
    for i, axis in enumerate(axes or range(len(starts))):
        index[axis] = slice(starts[i], ends[i], 1 if steps is None else steps[i])
    return _elements(x)[tuple(index)]


@folds("Split")
def _split(t: Translation, node: Node, x: Item, sizes: Item | None = None) -> list[Objects]:
    given, axis = _elements(x), node.get("axis", 0)
    lengths = integers(sizes, "the parts") if sizes is not None else node.get("split")
    if lengths is None:
        size, parts = given.shape[axis], node.get("num_outputs") or len(node.outputs)
        each = -(-size // parts)
        return np.split(given, [min(each * i, size) for i in range(1, parts)], axis)
    return np.split(given, np.cumsum(lengths)[:-1], axis)


@folds("Squeeze")
def _squeeze(t: Translation, node: Node, x: Item, axes: Item | None = None) -> Objects:
    return _nested(np.squeeze(_elements(x), axes_of(node, x.rank, axes)))


@folds("Unsqueeze")
def _unsqueeze(t: Translation, node: Node, x: Item, axes: Item | None = None) -> Objects:
    given = integers(axes, "the axes") if axes is not None else node.attributes["axes"]
    return np.expand_dims(_elements(x), tuple(given))


@folds("Reshape")
def _reshape(t: Translation, node: Node, x: Item, shape: Item) -> Objects:
    target = integers(shape, "the shape")
    given = _elements(x)
    return given.reshape([given.shape[i] if dim == 0 else dim for i, dim in enumerate(target)])


@folds("Flatten")
def _flatten(t: Translation, node: Node, x: Item) -> Objects:
    given, axis = _elements(x), node.get("axis", 1)
    return given.reshape((math.prod(given.shape[:axis]), math.prod(given.shape[axis:])))


@folds("Transpose")
def _transpose(t: Translation, node: Node, x: Item) -> Objects:
    return np.transpose(_elements(x), node.get("perm"))


@folds("Expand")
def _expand(t: Translation, node: Node, x: Item, shape: Item) -> Objects:
    target = integers(shape, "the shape")
    if math.prod(target) > SMALL:
        raise ValueError("too large to follow")
    return _elements(x) * np.ones(target, object)


@folds("Tile")
def _tile(t: Translation, node: Node, x: Item, repeats: Item) -> Objects:
    counts = integers(repeats, "the repeats")
    if math.prod(counts) * _elements(x).size > SMALL:
        raise ValueError("too large to follow")
    return np.tile(_elements(x), counts)


@folds("Size")
def _size(t: Translation, node: Node, x: Item) -> Item:
    return Item(known=objects([_elements(x).size], ()))


def _reduction(function: Callable[[Any, Any], Any], start: Any) -> Folder:
    def folder(t: Translation, node: Node, x: Item, axes: Item | None = None) -> Objects:
        along = axes_of(node, x.rank, axes)
        if not along:
            along = () if node.get("noop_with_empty_axes", 0) else tuple(range(x.rank))
        result = _elements(x)
        for axis in along:
            lines = np.moveaxis(result, axis, -1)
            reduced = [functools.reduce(function, lines[place], start) for place in np.ndindex(lines.shape[:-1])]
            shape = [1 if i == axis else dim for i, dim in enumerate(result.shape)]
            result = objects(reduced).reshape(shape)
        return result if node.get("keepdims", 1) else _nested(np.squeeze(result, along))

    return folder


folds("ReduceProd")(_reduction(lambda a, b: _whole(a) * _whole(b), 1))
folds("ReduceSum")(_reduction(lambda a, b: _whole(a) + _whole(b), 0))
folds("ReduceMax")(_reduction(lambda a, b: b if a is None else larger(_whole(a), _whole(b)), None))
folds("ReduceMin")(_reduction(lambda a, b: b if a is None else smaller(_whole(a), _whole(b)), None))


@folds("CumSum")
def _cumsum(t: Translation, node: Node, x: Item, axis: Item) -> Objects:
    if node.get("exclusive", 0) or node.get("reverse", 0):
        raise ValueError("only plain running sums are followed")
    (along,) = integers(axis, "the axis")
    return np.cumsum(_elements(x), along)


@folds("NonZero")
def _non_zero(t: Translation, node: Node, x: Item) -> Item:
    there = np.asarray(_each(lambda size: not _equal(size, 0), _elements(x)).tolist(), bool)
    places = np.array(np.nonzero(np.atleast_1d(there)))
    return Item(known=objects(places.tolist(), places.shape))


@folds("Range")
def _range(t: Translation, node: Node, start: Item, limit: Item, delta: Item) -> Objects:
    """Sizes in steps: from S to S + 4."""
    first, last, step = (_whole(_elements(item).item()) for item in (start, limit, delta))
    count = last - first
    if isinstance(count, Dim) or (count := -(-count // step)) > SMALL:
        raise DimError("how many depends on the sizes")
    return objects([first + step * i for i in range(count)])


@folds("Clip")
def _clip(t: Translation, node: Node, x: Item, low: Item | None = None, high: Item | None = None) -> Objects:
    result = _each(_whole, _elements(x))
    # Before opset 11 the bounds were attributes.
    for choose, bound, name in ((larger, low, "min"), (smaller, high, "max")):
        limit = node.get(name) if bound is None else _elements(bound).item()
        if limit is not None:
            result = _each(lambda size, choose=choose, limit=limit: choose(size, _whole(limit)), result)
    return result
