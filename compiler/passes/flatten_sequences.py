"""The part of flatten-tokens that makes one value of a sequence's tokens: pooling, the first or last token, a count.

The new value has a row a sequence, [B, ...]; `starts` i32[B + 1] says which rows of [T, ...] are its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import Dim, bounds, product
from llmc.compiler.ir.elementwise import Add, Cast, Less, Mul, Neg, Where, constant
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.pattern import number_of
from llmc.compiler.ir.ragged import PoolTokens, end_rows, first_rows, last_rows, token_counts
from llmc.compiler.ir.ranges import Ranges
from llmc.compiler.ir.structural import (
    Broadcast,
    CheckedIndex,
    Gather,
    GatherElements,
    Iota,
    Matmul,
    Max,
    Mean,
    Min,
    Reduce,
    Reshape,
    Slice,
    Sum,
)
from llmc.compiler.ir.types import FLOATS

if TYPE_CHECKING:
    from llmc.compiler.passes.flatten_tokens import Flattener

_WHOLE = 1 << 24  # whole numbers up to this one, and no more, are f32 numbers

POOLING: dict[type[Reduce], str] = {Mean: "mean", Max: "max", Sum: "sum"}


class Mixes(Exception):
    """Raised for an op that mixes tokens or has no rule; the text says why."""


def token_count(f: Flattener, op: Op) -> Value | None:
    """[B]: a multiple of each sequence's tokens plus a constant, where `op` is that number; None for any other op.

    Sources write a size as the element of a count 0, 1, ... that it is the index of.
    """
    if not (isinstance(op, Slice) and isinstance(op.x, Iota) and op.shape == (1,) and isinstance(op.start, Dim)):
        return None
    return number_of_tokens(f, op.start, op.dtype)


def number_of_tokens(f: Flattener, size: int | Dim, dtype: str) -> Value | None:
    """a * tokens + b of each sequence [B]; None where a size is another function of the tokens."""
    if isinstance(size, int):
        return None
    factor = sum(coefficient for monomial, coefficient in size.terms if monomial)
    offset = sum(coefficient for monomial, coefficient in size.terms if not monomial)
    if size != f.size * factor + offset:
        return None
    count: Value = token_counts(f.starts)
    count = count if dtype == "i32" else Cast(count, dtype)
    count = Mul(count, constant(factor, dtype)) if factor != 1 else count
    return Add(count, constant(offset, dtype)) if offset else count


def leave_tokens(f: Flattener, op: Op) -> Value:
    """The new value of an op whose operands have tokens and whose result has none: a row a sequence."""
    if isinstance(op, Reduce):
        return _pooled(f, op)
    if isinstance(op, Slice) and f.layout(op.x).token == op.axis % op.x.rank:
        return _rows(f, op.x, _sliced_row(f, op))
    if isinstance(op, Gather) and op.x in f.decided and f.layout(op.x).token == op.axis % op.x.rank:
        return _rows(f, op.x, _indexed_row(f, op.indices))
    if isinstance(op, GatherElements) and op.x in f.decided and f.layout(op.x).token == op.axis % op.x.rank:
        if product(op.shape) != product(op.x.shape[: op.axis]) * product(op.x.shape[op.axis + 1 :]):
            raise Mixes("it takes parts of a token")
        return _rows(f, op.x, _indexed_row(f, _one_element(op.indices)))
    if isinstance(op, Matmul):
        return _weighted_sum(f, op)
    raise Mixes("it makes one value of all tokens")


def _rows(f: Flattener, x: Value, rows: Value) -> Value:
    """One token's row of each sequence."""
    return Gather(f.new[x], rows, 0)


def _sliced_row(f: Flattener, op: Slice) -> Value:
    starts = f.starts
    if op.shape[op.axis] != 1:
        raise Mixes("it takes several tokens of a sequence")
    if op.start == 0:
        return first_rows(starts)
    if op.start == f.size - 1:
        return last_rows(starts)
    raise Mixes("it makes one value of all tokens: that of one which is neither the first nor the last")


def _indexed_row(f: Flattener, index: Value) -> Value:
    """[B]: the rows of the tokens at an index within their sequence, counted from its end where it is negative.

    An index that is not known to be within is looked at: the row behind a sequence is that of another one.
    """
    if product(index.shape) != 1:
        raise Mixes("it takes several tokens of a sequence")
    starts = f.starts
    if index not in f.decided:
        number = number_of(index)
        if number not in (0, -1):
            raise Mixes("it makes one value of all tokens: that of one which is neither the first nor the last")
        return first_rows(starts) if number == 0 else last_rows(starts)
    own = f.new[index]
    own = own if own.rank == 1 else Reshape(own, (own.shape[0],))
    if not isinstance(f.size, Dim) or not Ranges({}).integers(index).within(f.size * -1, f.size - 1):
        own = CheckedIndex(own, token_counts(starts), what="the token that is taken of a text")
    own = own if own.dtype == "i32" else Cast(own, "i32")
    return Add(own, Where(Less(own, constant(0, "i32")), end_rows(starts), first_rows(starts)))


def _one_element(value: Value) -> Value:
    """What a value of equal elements repeats."""
    while isinstance(value, (Broadcast, Reshape)) and product(value.shape) != 1:
        value = value.x
    return value


def _pooled(f: Flattener, op: Reduce) -> Value:
    """A reduction over the token axis, and over others after it."""
    token = f.layout(op.x).token
    assert token is not None and token in {axis % op.x.rank for axis in op.axes}, "no token is left"
    kind = POOLING.get(type(op))
    if kind is None and not isinstance(op, Min):
        raise Mixes(f"{op.name} has no rule for the tokens of a sequence")
    layout = f.layout(op.x)
    rest = layout.all_rest if layout.batch in {axis % op.x.rank for axis in op.axes} else layout.rest
    pooled = _constant_pooled(f, op, kind, rest)
    if pooled is None:
        x = f.full(op.x)[0] if rest != layout.rest else f.new[op.x]
        if x.dtype not in FLOATS:
            _require_exact(f, op)
            x = Cast(x, "f32")
        starts = f.starts
        pooled = PoolTokens(x, starts, kind) if kind is not None else Neg(PoolTokens(Neg(x), starts, "max"))
        if pooled.dtype != op.dtype:
            pooled = Cast(pooled, op.dtype)
    others = tuple(1 + rest.index(axis % op.x.rank) for axis in op.axes if axis % op.x.rank != token)
    return op.replace(x=pooled, axes=others) if others else pooled


def _require_exact(f: Flattener, op: Reduce) -> None:
    """Refuse what f32 may round of whole numbers that are pooled."""
    if isinstance(op, Mean):
        raise Mixes("it takes the mean of whole numbers, which f32 may round to another one")
    count = bounds(f.size)[1] if isinstance(op, Sum) else 1
    if count is None or not Ranges({}).integers(op.x).within(-(_WHOLE // count), _WHOLE // count):
        raise Mixes("it pools whole numbers that may be beyond 2^24, which f32 does not hold")


def _constant_pooled(f: Flattener, op: Reduce, kind: str | None, rest: tuple[int, ...]) -> Value | None:
    """The pooled value [B, sizes of the axes `rest`] where every token has the same number; None elsewhere."""
    source = _one_element(op.x)
    if source in f.decided or product(source.shape) != 1:
        return None
    one: Value = Reshape(source, (1,))
    if kind == "sum":
        counts = token_counts(f.starts)
        one = Mul(counts if counts.dtype == one.dtype else Cast(counts, one.dtype), one)
    else:
        one = Broadcast(one, (f.rows(op),))
    sizes = tuple(op.x.shape[i] for i in rest)
    return Broadcast(Reshape(one, (f.rows(op), *(1 for _ in rest))), (f.rows(op), *sizes))


def _weighted_sum(f: Flattener, op: Matmul) -> Value:
    """[M, S] times [S, N]: for each sequence, the sum over tokens of a column times a row."""
    if product(op.shape[:-2]) != 1:
        raise Mixes("it multiplies tokens of a sequence in a way without a rule")
    for value, axis in ((op.a, op.a.rank - 1), (op.b, op.b.rank - 2)):
        assert f.layout(value).token == axis, "no token is left"
    left = Reshape(f.new[op.a], (f.tokens, op.a.shape[-2], 1))
    right = Reshape(f.new[op.b], (f.tokens, 1, op.b.shape[-1]))
    return PoolTokens(Mul(left, right), f.starts, "sum")
