"""flatten-tokens, values a sequence: each one's row is what it gives alone, or there is a reason for none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.ragged import PoolTokens
from llmc.compiler.ir.structural import CheckedIndex
from llmc.compiler.ir.types import FLOATS, Array, Tensor, precise
from llmc.compiler.ir.verify import verify
from llmc.compiler.passes.flatten_tokens import FlattenTokens
from llmc.compiler.passes.manager import Report
from llmc.errors import IRError

S = symbol("S", 2, 64)
WIDTH, HEADS, DIM, VOCABULARY = 12, 3, 4, 17
LENGTHS = (5, 2, 7)
IDS = Input("ids", Tensor((1, S), "i32"))
EMBEDDED = s.Gather(Param("table", Tensor((VOCABULARY, WIDTH), "f32")), IDS, 0)
FLAT = s.Reshape(EMBEDDED, (S, WIDTH))
HEAD = s.Transpose(s.Reshape(EMBEDDED, (1, S, HEADS, DIM)), (0, 2, 1, 3))  # [1, heads, S, dim]


def load(name: str) -> Array:
    shape = {"table": (VOCABULARY, WIDTH), "w": (WIDTH, 3)}[name]
    return np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)


def number(value: float, dtype: str = "f32") -> e.Constant:
    return e.constant(value, dtype)


def size(multiple: int = 1, more: int = 0, dtype: str = "i64") -> Value:
    """multiple * S + more, as sources write it."""
    return s.Slice(s.Iota(multiple * S + more + 1, dtype), 0, multiple * S + more, multiple * S + more + 1)


def below(most: int, least: int | None = None) -> Value:
    """ids from `least` (-most unless it is given) to `most`."""
    return e.Maximum(e.Minimum(IDS, number(most, "i32")), number(-most if least is None else least, "i32"))


MEAN = s.Mean(EMBEDDED, (1,))
LAST = e.Sub(size(), number(1, "i64"))
LARGEST = s.Argmax(s.Reshape(s.Max(EMBEDDED, (1,), False), (1, WIDTH)), 1)  # [1]: any of 0 to 11
FOLLOWED: dict[str, Value] = {
    "a size": size(),
    "a size in i32": size(dtype="i32"),
    "a size in f32": size(dtype="f32"),
    "three sizes and two": size(3, 2),
    "a size less one": s.Slice(s.Iota(S), 0, S - 1, S),
    "the first token": s.Slice(EMBEDDED, 1, 0, 1),
    "the first token, counted from the end": s.Slice(EMBEDDED, -2, 0, 1),
    "the last token": s.Slice(FLAT, 0, S - 1, S),
    "the last token of heads": s.Slice(HEAD, 2, S - 1, S),
    "the first by number": s.Gather(EMBEDDED, number(0, "i64"), 1),
    "the last by number": s.Gather(EMBEDDED, number(-1, "i64"), -2),
    "the last of heads by a row of numbers": s.Gather(HEAD, e.constant([[-1]], "i64"), 2),
    "by a number that the size decides": s.Gather(EMBEDDED, LAST, 1),
    "by half the size, as a number": s.Gather(FLAT, s.Reshape(e.FloorDivide(LAST, number(2, "i64")), ()), 0),
    "by a number of two axes": s.Gather(EMBEDDED, s.Reshape(LAST, (1, 1)), 1),
    "the last, by a number from the end": s.Gather(EMBEDDED, e.Sub(LAST, size()), 1),
    "by a number before the end": s.Gather(EMBEDDED, e.Neg(e.Cast(s.Reshape(size(), (1,)), "i32")), 1),
    "a place that is looked at": CheckedIndex(LAST, None, S, "a place"),
    "a place from the end, of two axes": CheckedIndex(s.Reshape(e.Sub(LAST, size()), (1, 1)), None, S),
    "places below twice the size and three": CheckedIndex(s.Concat((size(), LAST), 0), None, 2 * S + 3),
    "a place below a number": CheckedIndex(LAST, None, 64),
    "a token by a place that is looked at": s.Gather(FLAT, CheckedIndex(LAST, None, S), 0),
    "elements by a number that the size decides": s.GatherElements(
        EMBEDDED, s.Broadcast(s.Reshape(LAST, (1, 1, 1)), (1, 1, WIDTH)), 1
    ),
    "elements of two channels": s.GatherElements(
        s.Slice(EMBEDDED, 2, 0, 2), s.Broadcast(s.Reshape(LAST, (1, 1, 1)), (1, 1, 2)), 1
    ),
    "elements of the first": s.GatherElements(FLAT, s.Broadcast(number(0, "i64"), (1, WIDTH)), -2),
    "mean": MEAN,
    "mean that drops its axis": s.Mean(EMBEDDED, (1,), False),
    "mean over heads and tokens": s.Mean(HEAD, (1, 2)),
    "mean over tokens and channels of heads": s.Mean(HEAD, (-2, -1), False),
    "sum over all": s.Sum(HEAD, (0, 1, 2, 3), False),
    "sum over batch and tokens": s.Sum(HEAD, (0, 2)),
    "sum over batch and tokens, counted from the end": s.Sum(HEAD, (-4, -2)),
    "sum of whole numbers": s.Sum(e.Cast(e.Greater(EMBEDDED, number(0)), "i64"), (1,)),
    "the sum of whole numbers up to 2^18": s.Sum(below(1 << 18), (1,)),
    "the largest whole number": s.Max(below(1 << 24), (1,)),
    "the least whole number": s.Min(below(1 << 24), (0, 1), False),
    "the least": s.Min(HEAD, (2,)),
    "the mean of a number": s.Mean(s.Broadcast(number(3), (1, S, 2)), (1,)),
    "the largest of a number": s.Max(s.Broadcast(e.constant([3.0], "f32"), (1, S, 2)), (1, 2)),
    "the sum of a number": s.Sum(s.Broadcast(number(3), (S, 4, 2)), (0,)),
    "the sum of a number over more": s.Sum(s.Broadcast(number(3), (S, 4, 2)), (0, -1), False),
    "the sum of a whole number": s.Sum(s.Broadcast(number(1, "i64"), (1, S)), (1,)),
    "the sum of a number of two axes": s.Sum(s.Broadcast(e.constant([[3.0]], "f32"), (S, 2)), (0,)),
    "the mean of a number of two axes": s.Mean(s.Broadcast(e.constant([[3.0]], "f32"), (S, 2)), (0,)),
    "the sum of a row of numbers": s.Sum(s.Broadcast(e.constant([1.0, 2.0], "f32"), (1, S, 2)), (1,)),
    "a product with tokens on both sides": s.Matmul(s.Transpose(FLAT, (1, 0)), FLAT),
    "a product with several in front": s.Matmul(s.Transpose(EMBEDDED, (0, 2, 1)), FLAT),
    "a product with several axes in front": s.Matmul(
        s.Transpose(s.Reshape(EMBEDDED, (1, 1, S, WIDTH)), (0, 1, 3, 2)), s.Reshape(EMBEDDED, (1, 1, S, WIDTH))
    ),
    "parts of a mean times a matrix": s.Matmul(
        s.Reshape(MEAN, (1, 3, 4)), e.constant(np.arange(12.0).reshape(4, 3), "f32")
    ),
    "a mean times a matrix": s.Matmul(MEAN, Param("w", Tensor((WIDTH, 3), "f32"))),
    "a mean and a last token": s.Concat((MEAN, s.Slice(EMBEDDED, 1, S - 1, S)), 2),
    "a mean over its size": e.Div(MEAN, e.Cast(size(), "f32")),
    "rows of two sequences' values": s.Concat((MEAN, MEAN), 0),
    "a mean spread to two": s.Broadcast(MEAN, (2, 1, WIDTH)),
    "a mean without its ones": s.Reshape(MEAN, (WIDTH,)),
    "softmax of a mean": s.Softmax(s.Reshape(MEAN, (WIDTH,)), 0),
}  # fmt: skip


def flattened(value: Value) -> tuple[Graph, Graph, Report]:
    before, report = Graph("g", (IDS,), (("y", value),)), Report()
    after = FlattenTokens(max_step=64, sequences=True).run(before, report)
    verify(after)
    return before, after, report


@pytest.mark.parametrize("name", FOLLOWED)
def test_each_sequence_gets_what_it_gives_alone(name: str) -> None:
    before, after, report = flattened(FOLLOWED[name])
    old = before.output("y").shape
    others = old[1:] if old[:1] == (1,) else old
    assert report.refusals == [] and [str(dim) for dim in after.output("y").shape] == ["B", *map(str, others)]
    pooled = [op for op in after.ops if isinstance(op, PoolTokens)]
    assert all(op.dtype in FLOATS for op in pooled)
    assert not (pooled and (" of a number" in name or " of a whole number" in name)), "it is known of all tokens"
    assert not any(isinstance(op, e.Cast) and op.to == op.x.dtype for op in after.ops), "a cast that does nothing"
    assert after.output("y").dtype == before.output("y").dtype
    ids = np.random.default_rng(3).integers(0, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    with precise():
        found = np.asarray(evaluate(after, {"ids": ids, "starts": starts}, load)["y"])
        for row, (begin, end) in zip(found, itertools.pairwise(starts), strict=True):
            expected = np.asarray(evaluate(before, {"ids": ids[None, begin:end]}, load)["y"])
            np.testing.assert_allclose(row.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


def test_what_is_made_of_a_count_or_a_mean_is_no_more_than_that() -> None:
    mean = s.Mean(EMBEDDED, (1,), False)
    for value, expected in (
        (size(dtype="i32"), ["t.slice", "t.slice", "t.sub"]),
        (mean, ["t.gather", "llm.pool_tokens"]),
        (s.Matmul(mean, Param("w", Tensor((WIDTH, 3), "f32"))), ["t.gather", "llm.pool_tokens", "t.matmul"]),
    ):
        assert [op.name for op in flattened(value)[1].ops] == expected


ANOTHER = "it makes one value of all tokens: that of one which is neither the first nor the last"
COUNTS = "it counts tokens from 0, which is not their position in a mixture of sequences"
ALL = "it makes one value of all tokens"
ROUNDED = "it pools whole numbers that may be beyond 2^24, which f32 does not hold"
BOUNDS = "its bounds depend on the number of tokens"
REFUSED: dict[str, tuple[Value, str]] = {
    "half a size": (s.Slice(s.Iota(S + 1), 0, S // 2, S // 2 + 1), COUNTS),
    "a square": (s.Slice(s.Iota(S * S + 1), 0, S * S, S * S + 1), COUNTS),
    "two counts": (s.Slice(s.Iota(S + 1), 0, S - 1, S + 1), COUNTS),
    "the second token": (s.Slice(EMBEDDED, 1, 1, 2), ANOTHER),
    "the last but one": (s.Slice(EMBEDDED, 1, S - 2, S - 1), ANOTHER),
    "the second by number": (s.Gather(EMBEDDED, number(1, "i64"), 1), ANOTHER),
    "the last but one by number": (s.Gather(EMBEDDED, number(-2, "i64"), 1), ANOTHER),
    "two tokens": (s.Gather(EMBEDDED, e.constant([0, 0], "i64"), 1), "it takes several tokens of a sequence"),
    "elements of two tokens": (
        s.GatherElements(EMBEDDED, s.Broadcast(number(0, "i64"), (1, 2, WIDTH)), 1),
        "it takes parts of a token",
    ),
    "a product": (s.Prod(EMBEDDED, (1,)), "t.prod has no rule for the tokens of a sequence"),
    "the mean of whole numbers": (
        s.Mean(below(9), (1,)), "it takes the mean of whole numbers, which f32 may round to another one",
    ),
    "the sum of whole numbers above 2^18": (s.Sum(below((1 << 18) + 1, 0), (1,)), ROUNDED),
    "the sum of whole numbers below -2^18": (s.Sum(below(0, -(1 << 18) - 1), (1,)), ROUNDED),
    "the largest whole number above 2^24": (s.Max(below((1 << 24) + 1, 0), (1,)), ROUNDED),
    "the largest whole number below -2^24": (s.Max(below(0, -(1 << 24) - 1), (1,)), ROUNDED),
    "the least id": (s.Min(IDS, (1,)), ROUNDED),
    "any": (s.Any(e.Greater(EMBEDDED, number(0)), (1,)), "t.any has no rule for the tokens of a sequence"),
    "the place of the largest": (s.Argmax(EMBEDDED, 1), ALL),
    "heads by heads": (
        s.Matmul(s.Transpose(HEAD, (0, 1, 3, 2)), HEAD),
        "it multiplies tokens of a sequence in a way without a rule",
    ),
    "a mean beside each token": (
        e.Add(EMBEDDED, MEAN), "it gives each token one value of all tokens of its sequence"
    ),
    "as many numbers as tokens": (s.Slice(s.Broadcast(s.Mean(EMBEDDED, (1, 2), False), (64,)), 0, 0, S), BOUNDS),
    "a token for no number": (
        s.Gather(EMBEDDED, e.constant(np.zeros(0), "i64"), 1), "it takes several tokens of a sequence",
    ),
    "elements of a mean": (
        s.GatherElements(MEAN, e.constant(np.zeros((1, 1, 3)), "i64"), 2),
        "it gathers from one place for every token",
    ),
    "each token times a mean": (
        s.Matmul(FLAT, s.Reshape(MEAN, (WIDTH, 1))), "it multiplies tokens with tokens",
    ),
    "a place below the square of a size": (
        CheckedIndex(LAST, None, S * S),
        f"it asks for {S * S} of each sequence, which is no multiple of its tokens and a number",
    ),
    "a place below a size that has its own": (
        CheckedIndex(LAST, size(), S), "it asks for each token how many its sequence has",
    ),
    "each token's place in its sequence": (
        CheckedIndex(IDS, None, S), "it asks for each token how many its sequence has",
    ),
    "a number below the size": (
        e.Add(size(), CheckedIndex(number(1, "i64"), None, S)), "it asks for the tokens of a sequence, S",
    ),
    "the first two tokens": (s.Slice(EMBEDDED, 1, 0, 2), "it takes several tokens of a sequence"),
    "no token": (s.Slice(EMBEDDED, 1, 0, 0), "it takes several tokens of a sequence"),
    "the last two tokens": (s.Slice(EMBEDDED, 1, S - 2, S), "it takes several tokens of a sequence"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_row_of_its_own_says_why(name: str) -> None:
    value, reason = REFUSED[name]
    before, after, report = flattened(value)
    assert after is before
    assert [why for _, why in report.refusals] == [f"{reason}; the graph stays one sequence at a time"]


def test_whole_numbers_of_a_text_of_any_length_are_not_summed() -> None:
    free = symbol("S", 2)
    ids = Input("ids", Tensor((1, free), "i32"))
    ones = e.Cast(e.Greater(ids, number(3, "i32")), "i64")
    for value, reasons in (
        (s.Sum(ones, (1,)), [f"{ROUNDED}; the graph stays one sequence at a time"]),
        (s.Max(ones, (1,)), []),
    ):
        report = Report()
        FlattenTokens(sequences=True).run(Graph("g", (ids,), (("y", value),)), report)
        assert [why for _, why in report.refusals] == reasons


@pytest.mark.parametrize(
    ("index", "checked"),
    [(LAST, False), (e.Neg(size()), False), (e.Sub(number(0, "i64"), LAST), False), (size(), True),
     (e.Sub(number(-1, "i64"), size()), True), (LARGEST, True)],
    ids=["the last", "the first from the end", "another from the end", "behind", "before", "of the tokens"],
)  # fmt: skip
def test_an_index_that_may_be_outside_of_its_sequence_is_looked_at(index: Value, checked: bool) -> None:
    _, after, _ = flattened(s.Gather(EMBEDDED, index, 1))
    checks = [op for op in after.ops if isinstance(op, CheckedIndex)]
    assert bool(checks) == checked and {op.what for op in checks} <= {"the token that is taken of a text"}
    if index in (LAST, LARGEST):
        return
    ids, starts = np.arange(7, dtype=np.int32), np.array([0, 4, 7], np.int32)
    if checked:
        with pytest.raises(IRError, match="index out of range"):
            evaluate(after, {"ids": ids, "starts": starts}, load)
    else:
        evaluate(after, {"ids": ids, "starts": starts}, load)
