"""What passes take the inputs of a text for: indices in range, counts, rows asked for, whole sequences."""

from __future__ import annotations

import numpy as np
import pytest
from pass_harness import run_checked

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, Linear, RMSNorm, Rope
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.ragged import end_rows, first_rows, last_rows, token_counts
from llmc.compiler.ir.structural import CheckedIndex, Gather
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.passes.bound_indices import BoundIndices, for_all_values
from llmc.compiler.passes.flatten_tokens import SEQUENCES
from llmc.compiler.passes.manager import Report, parse_pipeline, run_passes
from llmc.compiler.passes.probe import reading
from llmc.compiler.passes.select_rows import SelectRows
from llmc.compiler.passes.use_positions import UsePositions
from llmc.compiler.passes.whole_sequence import WholeSequence

T, R, S = symbol("T", 1, 512), symbol("R", 1), symbol("S", 2, 40)


def given(name: str, *shape: int | Dim, dtype: str = "i32") -> Input:
    return Input(name, Tensor(shape, dtype))


def param(name: str, *shape: int, dtype: str = "f32") -> Param:
    return Param(name, Tensor(shape, dtype))


def number(value: int, dtype: str = "i32") -> e.Constant:
    return e.constant(value, dtype)


IDS, POSITIONS, ROWS = given("ids", T), given("positions", T), given("rows", R)
STARTS = given("starts", SEQUENCES + 1)
A, B, C, D = (given(name, T) for name in "abcd")


# bound-indices: what is looked at, and what its message says


def checks(value: Value, *inputs: Input, options: BoundIndices | None = None) -> list[CheckedIndex]:
    after = (options or BoundIndices()).run(Graph("g", inputs, (("y", value),)), Report())
    return [op for op in after.ops if isinstance(op, CheckedIndex)]


def sum_of(*values: Value) -> Value:
    total = values[0]
    for value in values[1:]:
        total = e.Add(total, value)
    return total


MESSAGES: dict[str, tuple[Value, tuple[Input, ...]]] = {
    "axis 0 of wte, by a": (Gather(param("wte", 9, 3), A, 0), (A,)),
    "axis 1 of wte, by a": (Gather(param("wte", 3, 9), A, 1), (A,)),
    "axis 0 of wte, by a, b, c": (Gather(param("wte", 9, 3), sum_of(A, B, C), 0), (A, B, C)),
    "axis 0 of wte, by a, b, c, ...": (Gather(param("wte", 9, 3), sum_of(A, B, C, D), 0), (A, B, C, D)),
    "axis 0 of b, by a": (Gather(B, A, 0), (A, B)),
    "axis 0 of a value that is computed, by a": (Gather(e.Neg(B), A, 0), (A, B)),
    "axis 0 of wte.weight, by a": (Gather(e.Cast(param("wte.weight", 9, 3, dtype="bf16"), "f32"), A, 0), (A,)),
    "axis 0 of a constant table, by a": (Gather(e.constant(np.arange(9.0), "f32"), A, 0), (A,)),
    "axis 0 of wte": (Gather(param("wte", 9, 3), e.constant([3, 9], "i32"), 0), ()),
    "axis 0 of wte, by ids": (Embed(param("wte", 9, 3), IDS), (IDS,)),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_check_says_what_is_looked_up_and_by_what(message: str) -> None:
    value, inputs = MESSAGES[message]
    (check,) = checks(value, *inputs)
    assert check.what == message


TEXT = (IDS, POSITIONS, ROWS, STARTS)
OF_TOKENS = e.Neg(IDS)
IN_TEXT: dict[str, tuple[Value, int]] = {  # and how many checks it needs
    "rows asked for": (Gather(OF_TOKENS, ROWS, 0), 0),
    "rows asked for, and the one behind": (Gather(OF_TOKENS, e.Add(ROWS, number(1)), 0), 1),
    "rows asked for, and the one before": (Gather(OF_TOKENS, e.Sub(ROWS, number(1)), 0), 1),
    "the row before each start": (Gather(OF_TOKENS, e.Sub(STARTS, number(1)), 0), 1),
    "positions among the tokens": (Gather(OF_TOKENS, POSITIONS, 0), 1),
    "first rows": (Gather(OF_TOKENS, first_rows(STARTS), 0), 0),
    "last rows": (Gather(OF_TOKENS, last_rows(STARTS), 0), 0),
    "rows behind the last": (Gather(OF_TOKENS, end_rows(STARTS), 0), 1),
    "rows before the first": (Gather(OF_TOKENS, e.Sub(first_rows(STARTS), number(1)), 0), 1),
    "all starts": (Gather(OF_TOKENS, STARTS, 0), 1),
    "all starts but the first and the last": (
        Gather(OF_TOKENS, s.Slice(STARTS, 0, 1, SEQUENCES), 0),
        0,
    ),
    "the row before each start but the first": (
        Gather(OF_TOKENS, e.Sub(s.Slice(STARTS, 0, 1, SEQUENCES), number(1)), 0),
        0,
    ),
    "starts in another order": (Gather(OF_TOKENS, s.Slice(STARTS, 0, 0, SEQUENCES + 1), 0), 1),
    "as many as there are tokens": (Gather(OF_TOKENS, token_counts(STARTS), 0), 1),
    "ids below the vocabulary": (Gather(param("t", 30, 2), IDS, 0), 0),
    "ids in a smaller table": (Gather(param("t", 29, 2), IDS, 0), 1),
    "positions below the context": (Gather(param("t", 50, 2), POSITIONS, 0), 0),
    "a product of floats": (
        Gather(param("t", 50, 2), e.Cast(e.Cast(POSITIONS, "f32"), "i32"), 0),
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_TEXT)
def test_what_the_runtime_sees_to_is_not_looked_at_again(name: str) -> None:
    value, count = IN_TEXT[name]
    found = checks(value, *TEXT, options=BoundIndices(True, vocabulary=30, context=50))
    assert len(found) == count
    assert len(checks(value, *TEXT)) == 1, "in a graph of arrays inputs hold anything"


def test_inputs_are_those_of_a_text_only_beside_ids() -> None:
    text = BoundIndices(True, vocabulary=30, context=50)
    assert len(checks(Gather(param("t", 50, 2), POSITIONS, 0), POSITIONS, options=text)) == 0, "by trying all"
    assert len(checks(Gather(e.Neg(B), ROWS, 0), B, ROWS, options=text)) == 1
    assert len(checks(Gather(param("t", 50, 2), e.Cast(e.Sqrt(e.Cast(POSITIONS, "f32")), "i32"), 0), POSITIONS,
                      options=text)) == 1  # fmt: skip


def test_ids_are_below_the_rows_of_the_smallest_table_that_they_look_up() -> None:
    small, large = param("small", 7, 2), param("large", 9, 2)
    at = e.Cast(s.Reshape(IDS, (T, 1)), "i64")
    both = e.Add(s.Reshape(Embed(large, at), (T, 2)), Gather(small, IDS, 0))
    assert checks(both, IDS, options=BoundIndices(True)) == []
    assert len(checks(e.Add(both, Gather(param("other", 6, 2), e.Add(IDS, number(0)), 0)), IDS,
                      options=BoundIndices(True))) == 1  # fmt: skip
    assert len(checks(Gather(small, e.Abs(IDS), 0), IDS, options=BoundIndices(True))) == 1
    # A table of a free size says nothing, nor does one that is looked up by something else.
    free = given("free", T, 2, dtype="f32")
    assert len(checks(e.Add(Gather(free, IDS, 0), Gather(small, POSITIONS, 0)), free, IDS, POSITIONS,
                      options=BoundIndices(True))) == 2  # fmt: skip


def loaded(name: str) -> Array:
    return np.array([3, 1, 2], np.int32)


TABLE = e.constant([5, 6, 7], "i32")
DECIDED: dict[str, tuple[Value, list[int] | None]] = {
    "the input": (A, [0, 1, 2]),
    "its double": (e.Add(A, A), [0, 2, 4]),
    "beside a constant": (e.Mul(A, number(4)), [0, 4, 8]),
    "in another shape": (s.Reshape(e.Neg(A), (T, 1)), [0, -1, -2]),
    "spread": (s.Slice(e.Add(A, number(1)), 0, 0, T), None),
    "a table's entries": (Gather(TABLE, A, 0), [5, 6, 7]),
    "a weight's entries": (Gather(param("w", 3, dtype="i32"), A, 0), [3, 1, 2]),
    "beyond a table": (Gather(e.constant([5, 6], "i32"), A, 0), None),
    "its own entries": (Gather(A, A, 0), None),
    "a running sum": (s.Cumsum(A, 0), None),
    "a running sum of a table's entries": (s.Cumsum(Gather(TABLE, A, 0), 0), None),
    "two inputs": (e.Add(A, B), None),
    "another input": (B, None),
    "no input": (TABLE, None),
    "too many": (s.Broadcast(s.Reshape(A, (T, 1)), (T, 1 << 20)), None),
    "many": (s.Broadcast(s.Reshape(A, (T, 1)), (T, 2)), [0, 0, 1, 1, 2, 2]),
    "a free size besides": (s.Broadcast(s.Reshape(A, (T, 1)), (T, R)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", DECIDED)
def test_an_index_is_known_for_every_value_of_the_one_input_that_decides_it(name: str) -> None:
    index, expected = DECIDED[name]
    found = for_all_values(index, {"a": 3, "c": 5}, loaded)
    assert (None if found is None else found[1].reshape(-1).tolist()) == expected
    assert found is None or found[0] is A


def test_an_input_of_more_or_fewer_values_than_its_size_shows_nothing() -> None:
    assert for_all_values(given("a", 3), {"a": 3}, loaded) is not None
    assert for_all_values(given("a", 4), {"a": 3}, loaded) is None
    assert for_all_values(given("a", T, 2), {"a": 3}, loaded) is None
    assert for_all_values(A, {"a": 0}, loaded) is None
    assert for_all_values(A, {"a": 1 << 20}, loaded) is not None
    assert for_all_values(A, {"a": (1 << 20) + 1}, loaded) is None


def test_weights_decide_an_index_where_they_can_be_read() -> None:
    value = Gather(param("t", 4, 2), Gather(param("w", 3, dtype="i32"), e.Mod(IDS, number(3)), 0), 0)
    text = BoundIndices(True, vocabulary=30, context=50)
    assert len(checks(value, IDS, options=text)) == 1
    with reading(loaded):
        assert checks(value, IDS, options=text) == []


# use-positions

TOKENS = given("ids", 1, S)
SIZE = s.Slice(s.Iota(S + 1, "i32"), 0, S, S + 1)
X = Input("x", Tensor((1, S, 6), "f32"))
PLACES = given("positions", 1, S)
ONES = s.Broadcast(e.constant(np.ones((1, 1)), "i32"), (1, S))
COUNTS: dict[str, tuple[Value, int | None]] = {  # and where it begins; None: no count
    "a count": (s.Iota(S), 0),
    "a running sum of ones": (s.Cumsum(ONES, 1), 1),
    "a count from -2 on": (e.Sub(s.Iota(S, "i32"), number(2)), -2),
    "a count in a row of rows": (s.Reshape(s.Iota(S), (1, 1, S, 1)), 0),
    "a count of nothing, and then the tokens": (
        e.Add(s.Iota(S, "i32"), e.Sub(SIZE, SIZE)),
        0,
    ),
    "from the end": (e.Sub(SIZE, s.Iota(S, "i32")), None),
    "from the last on": (e.Add(s.Iota(S, "i32"), SIZE), None),
    "backwards": (e.Neg(s.Iota(S, "i32")), None),
    "twice": (e.Mul(s.Iota(S, "i32"), number(2)), None),
    "up to seven": (e.Minimum(s.Iota(S, "i32"), number(7)), None),
    "up to the last but one": (e.Minimum(s.Iota(S, "i32"), number(38)), None),
    "in floats": (s.Iota(S, "f32"), None),
    "one more than tokens": (s.Iota(S + 1), None),
    "two for each token": (s.Reshape(s.Iota(2 * S, "i32"), (S, 2)), None),
    "positions": (e.Add(PLACES, number(0)), None),
    "the first seven": (s.Iota(7), None),
    "from a later length on": (
        e.Where(e.Greater(SIZE, number(20)), s.Iota(S, "i32"), e.Add(s.Iota(S, "i32"), number(1))),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_of_tokens_is_their_positions(name: str) -> None:
    value, offset = COUNTS[name]
    used = e.Cast(value, "f64")
    graph = Graph("g", (PLACES,), (("y", used),))
    after, (report,) = run_checked(graph, "use-positions", tolerance=0)
    found = after.output("y").x  # type: ignore[attr-defined]
    if offset is None:
        assert type(found) is type(value)
        return
    assert report.hits == {"count": 1}
    assert not any(isinstance(op, (s.Iota, s.Cumsum)) for op in after.ops)
    assert not any(isinstance(op, e.Cast) and op.x.dtype == op.to for op in after.ops), "a cast that does nothing"
    assert after.output("y").shape == used.shape and found.dtype == value.dtype


def test_a_count_that_another_size_shifts_is_none() -> None:
    """Behind a past of P tokens the first one is at P, whatever P is."""
    past = symbol("P", 0, 5)
    for begin, hits in ((past, {}), (0, {"count": 1})):
        count = e.Cast(s.Slice(s.Iota(S + past), 0, begin, S + begin), "f64")
        graph = Graph("g", (PLACES, Input("past", Tensor((past,), "f64"))), (("y", count),))
        after, (report,) = run_checked(graph, "use-positions", tolerance=0)
        assert report.hits == hits and (after is graph) == (not hits)


def test_a_count_is_what_its_own_dtypes_make_it() -> None:
    """1.1f * 0.9090909f is 1 in f32, and less in f64."""
    few = symbol("S", 2, 4)
    count = s.Iota(few, "f32")
    for factor in (1.1, 0.9090909):
        count = e.Mul(count, e.constant(factor, "f32"))
    value = e.Neg(e.Cast(e.Floor(count), "i64"))
    places = given("positions", 1, few)
    after, (report,) = run_passes(Graph("g", (places,), (("y", value),)), parse_pipeline("use-positions"))
    assert report.hits == {"count": 1} and not any(isinstance(op, s.Iota) for op in after.ops)


def test_without_positions_or_a_longest_sequence_counts_stay() -> None:
    count = e.Mul(X, s.Reshape(e.Cast(s.Iota(S), "f32"), (1, S, 1)))
    other = Graph("g", (X,), (("y", count),))
    assert UsePositions().run(other, Report()) is other
    other = Graph("g", (TOKENS,), (("y", s.Iota(S)),))
    assert UsePositions().run(other, Report()) is other
    free = symbol("S", 2)
    places = given("positions", 1, free)
    graph = Graph("g", (places,), (("y", s.Iota(free)),))
    assert UsePositions().run(graph, Report()) is graph
    static = Graph("g", (given("positions", 1, 5),), (("y", s.Iota(5)),))
    assert UsePositions().run(static, Report()) is static


# whole-sequence

HIDDEN = Embed(param("table", 9, 6), TOKENS)


def whole(outputs: tuple[tuple[str, Value], ...], inputs: tuple[Input, ...], sequences: bool = False) -> Graph:
    return WholeSequence(sequences).run(Graph("g", inputs, outputs), Report())


def test_only_logits_of_a_sequence_become_rows() -> None:
    after = whole((("logits", HIDDEN), ("hidden", HIDDEN)), (TOKENS,))
    assert [value.name for value in after.inputs] == ["ids", "rows"] and after.output("hidden") is HIDDEN
    assert [str(dim) for dim in after.output("logits").shape] == ["R", "6"]
    flat = s.Reshape(HIDDEN, (S, 6))
    for outputs, inputs in (
        ((("hidden", HIDDEN),), (TOKENS,)),
        ((("logits", flat),), (TOKENS,)),
        ((("logits", s.Reshape(HIDDEN, (1, 1, S, 6))),), (TOKENS,)),
        ((("logits", HIDDEN),), (TOKENS, given("rows", R))),
    ):
        graph = Graph("g", inputs, outputs)
        assert WholeSequence().run(graph, Report()) is graph


def test_an_encoder_s_outputs_lose_the_axis_of_its_one_sequence() -> None:
    values: dict[str, tuple[Value, tuple[object, ...]]] = {
        "hidden": (HIDDEN, (S, 6)),
        "per token": (s.Sum(HIDDEN, (2,), False), (S,)),
        "pooled": (s.Mean(HIDDEN, (1,)), (1, 1, 6)),
        "flat": (s.Reshape(HIDDEN, (S, 6)), (S, 6)),
        "vector": (s.Reshape(s.Sum(HIDDEN, (2,), False), (S,)), (S,)),
        "spread": (s.Broadcast(HIDDEN, (2, S, 6)), (2, S, 6)),
    }
    outputs = tuple((name, value) for name, (value, _) in values.items())
    graph, report = Graph("g", (TOKENS,), outputs), Report()
    after = WholeSequence(sequences=True).run(graph, report)
    assert [value.shape for _, value in after.outputs] == [shape for _, shape in values.values()]
    hint = given("hint", 4)
    beside = Graph("g", (hint, TOKENS), (("hidden", HIDDEN), ("hint", e.Neg(hint))))
    assert [value.shape for _, value in WholeSequence(sequences=True).run(beside, Report()).outputs] == [(S, 6), (4,)]
    assert report.refusals == [
        ("the graph", "it was not flattened to tokens: every step takes one sequence"),
    ] and report.hits == {"graph": 1}
    for ids in (given("ids", S), given("tokens", 1, S)):
        other = Graph("g", (ids,), (("hidden", e.Neg(ids)),))
        assert WholeSequence(sequences=True).run(other, Report()) is other


# select-rows

EMBEDDED = Embed(param("table", 9, 6), IDS)
HEAD = param("head", 9, 6)


def selected(value: Value, *others: tuple[str, Value]) -> tuple[list[tuple[str, str]], Report]:
    """(name, first size) of each op, constants left out."""
    report = Report()
    after = SelectRows().run(Graph("g", (IDS, POSITIONS), (("logits", value), *others)), report)
    found = [(op.name, str(op.shape[0])) for op in after.ops if not isinstance(op, e.Constant) and op.rank]
    return found, report


def norm(value: Value) -> Value:
    return RMSNorm(value, param("w", 6), 1e-6)


GATHERED = ("t.gather", "R")
EMBED = ("llm.embed", "R")
ROW_ONLY: dict[str, tuple[Value, list[tuple[str, str]]]] = {
    "norm and head": (Linear(norm(EMBEDDED), HEAD), [GATHERED, EMBED, ("llm.rms_norm", "R"), ("llm.linear", "R")]),
    "elements": (e.Mul(EMBEDDED, param("w", 6)), [GATHERED, EMBED, ("t.mul", "R")]),
    "a value a token beside": (
        e.Mul(EMBEDDED, s.Reshape(e.Cast(POSITIONS, "f32"), (T, 1))),
        [GATHERED, EMBED, GATHERED, ("t.cast", "R"), ("t.reshape", "R"), ("t.mul", "R")],
    ),
    "channels cut and put together": (
        s.Concat((s.Slice(EMBEDDED, 1, 0, 2), s.Slice(EMBEDDED, -1, 4, 6)), 1),
        [GATHERED, EMBED, ("t.slice", "R"), ("t.slice", "R"), ("t.concat", "R")],
    ),
    "along channels": (s.Softmax(EMBEDDED, 1), [GATHERED, EMBED, ("t.softmax", "R")]),
    "along tokens": (s.Softmax(EMBEDDED, 0), [("llm.embed", "T"), ("t.softmax", "T"), GATHERED]),
    "a transpose of channels": (
        s.Reshape(s.Transpose(s.Reshape(EMBEDDED, (T, 2, 3)), (0, 2, 1)), (T, 6)),
        [GATHERED, EMBED, ("t.reshape", "R"), ("t.transpose", "R"), ("t.reshape", "R")],
    ),
    "all tokens": (s.Slice(EMBEDDED, 0, 0, T), [("llm.embed", "T"), ("t.slice", "T"), GATHERED]),
    "all tokens, by a negative axis": (s.Slice(EMBEDDED, -2, 0, T), [("llm.embed", "T"), ("t.slice", "T"), GATHERED]),
    "each token beside each": (
        e.Add(s.Reshape(IDS, (T, 1)), POSITIONS),
        [("t.reshape", "T"), ("t.add", "T"), GATHERED],
    ),
    "a product with a matrix": (s.Matmul(EMBEDDED, param("m", 6, 4)), [GATHERED, EMBED, ("t.matmul", "R")]),
    "a product within a token": (
        s.Reshape(s.Matmul(s.Reshape(EMBEDDED, (T, 2, 3)), s.Reshape(EMBEDDED, (T, 3, 2))), (T, 4)),
        [
            ("llm.embed", "T"), ("t.reshape", "T"), ("t.reshape", "T"), ("t.matmul", "T"), GATHERED, ("t.reshape", "T"),
        ],
    ),
    "a product of each token's rows by one matrix": (
        s.Reshape(s.Matmul(s.Reshape(EMBEDDED, (T, 2, 3)), param("m", 3, 2)), (T, 4)),
        [("llm.embed", "T"), ("t.reshape", "T"), ("t.matmul", "T"), ("t.reshape", "T"), GATHERED],
    ),
    "tokens by tokens": (
        s.Sum(e.Neg(s.Matmul(EMBEDDED, s.Transpose(EMBEDDED, (1, 0)))), (1,)),
        [("llm.embed", "T"), ("t.transpose", "6"), ("t.matmul", "T"), ("t.neg", "T"), ("t.sum", "T"), GATHERED],
    ),
    "tokens on the last axis": (
        s.Transpose(e.Neg(s.Transpose(EMBEDDED, (1, 0))), (1, 0)),
        [("llm.embed", "T"), ("t.transpose", "6"), ("t.neg", "6"), ("t.transpose", "T"), GATHERED],
    ),
    "a norm over all tokens": (
        e.Mul(EMBEDDED, s.Reshape(RMSNorm(e.Cast(IDS, "f32"), None, 1e-6), (T, 1))),
        [
            GATHERED, EMBED, ("t.cast", "T"), ("llm.rms_norm", "T"), ("t.reshape", "T"), GATHERED, ("t.mul", "R"),
        ],
    ),
    "a rotation": (
        s.Reshape(Rope(s.Reshape(EMBEDDED, (T, 1, 6)), s.Reshape(EMBEDDED, (T, 2, 3))), (T, 6)),
        [GATHERED, EMBED, ("t.reshape", "R"), ("t.reshape", "R"), ("llm.rope", "R"), ("t.reshape", "R")],
    ),
    "a mean over all tokens": (
        e.Add(EMBEDDED, s.Mean(EMBEDDED, (0,))),
        [("llm.embed", "T"), ("t.mean", "1"), GATHERED, ("t.add", "R")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROW_ONLY)
def test_what_only_logits_need_is_computed_for_their_rows(name: str) -> None:
    value, expected = ROW_ONLY[name]
    found, report = selected(value)
    assert sorted(found) == sorted(expected) and report.refusals == []


def test_a_reshape_in_front_is_gathered_behind() -> None:
    found, _ = selected(norm(s.Reshape(s.Softmax(s.Reshape(EMBEDDED, (T, 2, 3)), 0), (T, 6))))
    assert found[-2:] == [GATHERED, ("llm.rms_norm", "R")] and ("t.reshape", "T") in found


def test_outputs_that_are_wanted_whole_are_computed_whole() -> None:
    hidden = norm(EMBEDDED)
    found, _ = selected(Linear(hidden, HEAD), ("hidden", hidden))
    whole_too = Graph("g", (IDS,), (("hidden", hidden), ("logits", Linear(hidden, HEAD)), ("more", EMBEDDED)))
    after = SelectRows().run(whole_too, Report())
    assert [str(value.shape[0]) for _, value in after.outputs] == ["T", "R", "T"]
    assert [(symbol.name, symbol.low) for symbol in after.symbols if symbol.name == "R"] == [("R", 1)]
    assert found == [("llm.embed", "T"), ("llm.rms_norm", "T"), GATHERED, ("llm.linear", "R")]
    found, report = selected(EMBEDDED, ("same", EMBEDDED))
    assert found == [("llm.embed", "T"), GATHERED] and report.hits == {"gather": 1}


@pytest.mark.parametrize(
    ("output", "value", "reason"),
    [
        ("other", EMBEDDED, "there is no such tensor; outputs: logits"),
        ("logits", s.Reshape(EMBEDDED, (T, 2, 3)), "needs [T, vocabulary], not tensor<[T, 2, 3], f32>: flatten-tokens"),
        ("logits", param("table", 9, 6), "needs [T, vocabulary], not tensor<[9, 6], f32>: flatten-tokens is first"),
    ],
)
def test_what_has_no_rows_is_refused(output: str, value: Value, reason: str) -> None:
    graph, report = Graph("g", (IDS,), (("logits", value),)), Report()
    assert SelectRows(output).run(graph, report) is graph
    assert [what for what, _ in report.refusals] == [f"output {output}"] and reason in report.refusals[0][1]


FIRST = first_rows(STARTS)
NORMED, NEGATED = norm(EMBEDDED), e.Neg(EMBEDDED)
PICKED: dict[str, tuple[tuple[Value, ...], list[tuple[str, str]]]] = {  # what is left of tokens and sequences
    "a norm": ((Gather(NORMED, FIRST, 0),), [("t.gather", "B"), ("llm.embed", "B"), ("llm.rms_norm", "B")]),
    "counted from the end": (
        (Gather(NORMED, FIRST, -2),), [("t.gather", "B"), ("llm.embed", "B"), ("llm.rms_norm", "B")]
    ),
    "an output": ((Gather(NORMED, FIRST, 0), NORMED), [("llm.embed", "T"), ("llm.rms_norm", "T"), ("t.gather", "B")]),
    "used by two": (
        (Gather(NORMED, FIRST, 0), e.Neg(NORMED)),
        [("llm.embed", "T"), ("llm.rms_norm", "T"), ("t.gather", "B"), ("t.neg", "T")],
    ),
    "of channels": ((Gather(NORMED, FIRST, 1),), [("llm.embed", "T"), ("llm.rms_norm", "T"), ("t.gather", "T")]),
    "by a table of rows": (
        (Gather(NORMED, s.Reshape(FIRST, (SEQUENCES, 1)), 0),),
        [("llm.embed", "T"), ("llm.rms_norm", "T"), ("t.reshape", "B"), ("t.gather", "B")],
    ),
    "by other rows": ((Gather(NORMED, ROWS, 0),), [("llm.embed", "T"), ("llm.rms_norm", "T"), ("t.gather", "R")]),
    "of a table": (
        (Gather(e.Neg(param("table", 9, 6)), FIRST, 0), Gather(NORMED, FIRST, 0)),
        [("t.neg", "9"), ("t.gather", "B"), ("t.gather", "B"), ("llm.embed", "B"), ("llm.rms_norm", "B")],
    ),
    "of what tokens decide together": (
        (Gather(s.Softmax(EMBEDDED, 0), FIRST, 0),), [("llm.embed", "T"), ("t.softmax", "T"), ("t.gather", "B")]
    ),
    "one that stays and one that moves": (
        (Gather(NEGATED, FIRST, 0), Gather(s.Softmax(NORMED, 1), FIRST, 0), NEGATED),
        [
            ("llm.embed", "T"), ("t.neg", "T"), ("t.gather", "B"), ("t.gather", "B"),
            ("llm.rms_norm", "B"), ("t.softmax", "B"),
        ],
    ),
    "two that move": (
        (Gather(e.Neg(e.Cast(IDS, "f32")), FIRST, 0), Gather(e.Abs(e.Cast(POSITIONS, "f32")), FIRST, 0)),
        [("t.gather", "B"), ("t.cast", "B"), ("t.neg", "B"), ("t.gather", "B"), ("t.cast", "B"), ("t.abs", "B")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKED)
def test_rows_that_sequences_pick_are_computed_alone(name: str) -> None:
    values, expected = PICKED[name]
    outputs = tuple((f"out{i}", value) for i, value in enumerate(values))
    after = SelectRows(sequences=True).run(Graph("g", (IDS, POSITIONS, ROWS, STARTS), outputs), Report())
    found = [(op.name, str(op.shape[0])) for op in after.ops if op is not FIRST]
    assert sorted(found) == sorted(expected)
    assert [value.type for _, value in after.outputs] == [value.type for value in values]
