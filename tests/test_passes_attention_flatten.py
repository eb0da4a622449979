"""flatten-tokens op by op, select-rows and insert-kv-cache on their own: same values, or a reason for refusing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from attention_harness import (
    DIM,
    HEADS,
    HIDDEN,
    VOCABULARY,
    S,
    decoder,
    random_weights,
    run_sequence,
    run_steps,
    weight,
)

from llmc.compiler.ir.elementwise import Add, Cast, Greater, Maximum, Minimum, Mul, Sub, Where, constant
from llmc.compiler.ir.encoded import Pages
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention, KVAppend, LayerNorm, Linear, PagedAttention, QuantizeActivations, Rope
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import (
    Argmax,
    Broadcast,
    Concat,
    Cumsum,
    Gather,
    GatherElements,
    Iota,
    Matmul,
    Max,
    Mean,
    Pad,
    Reshape,
    Slice,
    Softmax,
    Sum,
    Transpose,
)
from llmc.compiler.ir.types import KV, Tensor, precise
from llmc.compiler.passes.flatten_tokens import FlattenTokens
from llmc.compiler.passes.insert_kv_cache import InsertKVCache
from llmc.compiler.passes.manager import Report, run_passes
from llmc.compiler.passes.select_rows import SelectRows
from llmc.errors import CompileError

CLOSE = {"rtol": 0, "atol": 1e-12}
Build = Callable[[Value], Value]


def graph_of(build: Build) -> Graph:
    """A graph whose output is `build` of embedded tokens [1, S, HIDDEN]."""
    ids = Input("ids", Tensor((1, S), "i32"))
    positions = Input("positions", Tensor((1, S), "i32"))
    return Graph("main", (ids, positions), (("y", build(Gather(weight("embed", VOCABULARY, HIDDEN), ids, 0))),))


def heads(x: Value) -> Value:
    """[1, heads, S, dim]"""
    return Transpose(Reshape(x, (1, S, HEADS, DIM)), (0, 2, 1, 3))


def scores(x: Value) -> Value:
    return Linear(x, weight("router", 5, HIDDEN))


def per_token_matrices(x: Value) -> Value:
    """Each token's heads times each other: [S, heads, dim] x [S, dim, heads]."""
    x = Reshape(x, (S, HEADS, DIM))
    return Matmul(x, Transpose(x, (0, 2, 1)))


def chosen_rows(x: Value) -> Value:
    """A row of a table for the best of five scores, as a router does."""
    best = Argmax(scores(x), 2)
    return Gather(weight("experts", 5, 7), best, 0)


def by_distance() -> Value:
    """What is added to scores [heads, S, S]: of a table by how far apart two tokens are, up to 3."""
    at = Iota(S)
    distance = Sub(Reshape(at, (1, S)), Reshape(at, (S, 1)))
    near = Minimum(Maximum(distance, constant(-3, "i64")), constant(3, "i64"))
    return Transpose(Gather(weight("distances", 7, HEADS), Add(near, constant(3, "i64")), 0), (2, 0, 1))


TOKEN_WISE: dict[str, Build] = {
    "elementwise with a broadcast weight": lambda x: Mul(Add(x, weight("b", HIDDEN)), weight("c", 1, 1, HIDDEN)),
    "weight that broadcasts over tokens in the middle": lambda x: Mul(heads(x), weight("c", HEADS, 1, DIM)),
    "weight with a lower rank in the middle": lambda x: Add(heads(x), weight("c", 1, DIM)),
    "where": lambda x: Where(Greater(x, constant(0.0)), x, constant(-1.0)),
    "cast": lambda x: Cast(Cast(x, "i32"), "f32"),
    "transpose and back": lambda x: Reshape(Transpose(heads(x), (0, 2, 1, 3)), (1, S, HIDDEN)),
    "transpose of other axes": lambda x: Transpose(heads(x), (3, 2, 1, 0)),
    "mean": lambda x: Mul(x, Mean(x, (2,))),
    "sum that drops its axis": lambda x: Sum(heads(x), (1,), False),
    "max over heads and channels": lambda x: Max(heads(x), (1, 3)),
    "reduce over the batch axis": lambda x: Sum(x, (0,), False),
    "norm": lambda x: LayerNorm(heads(x), weight("w", DIM), None, 1e-5),
    "slice of channels": lambda x: Slice(x, 2, 3, 29, 2),
    "slice of one head": lambda x: Slice(heads(x), 1, 2, 3),
    "concat": lambda x: Concat((x, Slice(x, 2, 0, 5)), 2),
    "concat along the batch axis": lambda x: Concat((heads(x), heads(x)), 0),
    "pad": lambda x: Pad(x, (0, 0, 1), (0, 0, 2), 3.0),
    "softmax of channels": lambda x: Softmax(x, 2),
    "softmax of heads": lambda x: Softmax(heads(x), 1),
    "running sum of channels": lambda x: Cumsum(x, 2),
    "argmax": lambda x: Argmax(x, 2),
    "gather of channels": lambda x: Gather(x, constant([[3, 1], [0, 7]]), 2),
    "gather of rows by token": chosen_rows,
    "elements by token": lambda x: GatherElements(x, Reshape(Argmax(scores(x), 2), (1, S, 1)), 2),
    "matmul with a matrix": lambda x: Matmul(x, weight("w", HIDDEN, 6)),
    "matmul with a matrix a head": lambda x: Matmul(heads(x), weight("w", HEADS, DIM, 6)),
    "matrix by tokens": lambda x: Matmul(weight("w", 6, HEADS), Reshape(x, (S, HEADS, DIM))),
    "matmul within tokens": per_token_matrices,
    "linear of heads": lambda x: Linear(heads(x), weight("w", 3, DIM), weight("b", 3)),
    "broadcast": lambda x: Broadcast(Reshape(x, (1, S, 1, HIDDEN)), (1, S, 3, HIDDEN)),
    "broadcast of a weight over tokens": lambda x: Add(x, Broadcast(weight("b", HIDDEN), (1, S, HIDDEN))),
    "tokens without a batch axis": lambda x: Reshape(
        Linear(Reshape(x, (S, HIDDEN)), weight("w", 3, HIDDEN)), (1, S, 3)
    ),
    "attention": lambda x: Attention(*(Reshape(x, (1, S, HEADS, DIM)),) * 3),
    "attention under several ones": lambda x: Attention(*(Reshape(x, (1, 1, 1, S, HEADS, DIM)),) * 3),
    "attention with a bias by distance, without a batch axis": lambda x: Attention(
        *(Reshape(x, (S, HEADS, DIM)),) * 3, bias=by_distance()
    ),
    "attention without a batch axis": lambda x: Attention(*(Reshape(x, (S, HEADS, DIM)),) * 3),
    "a number a token for each head": lambda x: Mul(heads(x), Reshape(Sum(x, (2,)), (S, 1))),
    "a weight of more axes": lambda x: Add(x, weight("b", 1, 1, 1, 3, 1, HIDDEN)),
    "a weight of several in front": lambda x: Add(x, weight("b", 3, 1, HIDDEN)),
    "a weight with a one for the tokens": lambda x: Add(Reshape(x, (S, HIDDEN)), weight("b", 1, HIDDEN)),
    "a choice by weights": lambda x: Where(Greater(weight("c", 1, HIDDEN), constant(0.0)), x, weight("b", HIDDEN)),
    "columns of a table by token": lambda x: Gather(weight("columns", 7, 5), Argmax(scores(x), 2), 1),
    "elements of a table by token": lambda x: GatherElements(
        weight("rows", 5, 1), Reshape(Argmax(scores(x), 2), (S, 1)), 0
    ),
    "elements of a wide table by token": lambda x: GatherElements(
        weight("rows", 1, 5), Reshape(Argmax(scores(x), 2), (1, S)), 1
    ),
    "elements of a table of several columns by token": lambda x: GatherElements(
        weight("several", 1, 5, 4), Broadcast(Reshape(Argmax(scores(x), 2), (1, S, 1)), (1, S, 4)), 1
    ),
    "elements of heads by token": lambda x: GatherElements(
        heads(x), Broadcast(Reshape(Argmax(scores(x), 2), (1, 1, S, 1)), (1, HEADS, S, 2)), 3
    ),
    "softmax of the last axis, counted from the end": lambda x: Softmax(heads(x), -1),
    "mean of axes counted from the end": lambda x: Mean(heads(x), (-1, -3)),
    "sum of the batch axis and channels": lambda x: Sum(x, (0, -1)),
    "gather along the batch axis": lambda x: Gather(x, constant([0, 0, 0]), 0),
    "slice of the batch axis": lambda x: Slice(x, 0, 0, 1),
    "pad the batch axis and channels": lambda x: Pad(heads(x), (1, 2, 0, 0), (0, 0, 0, 1), -1.0),
    "concat with one of several": lambda x: Concat((x, Broadcast(x, (3, S, HIDDEN))), 0),
    "concat along an axis from the end": lambda x: Concat((heads(x), heads(x)), -3),
    "matmul without a batch axis": lambda x: Matmul(Reshape(x, (S, HIDDEN)), weight("w", HIDDEN, 6)),
    "matmul with a matrix under ones": lambda x: Matmul(x, weight("w", 1, 1, HIDDEN, 6)),
    "matmul of heads in front with a matrix a head": lambda x: Matmul(
        Reshape(heads(x), (HEADS, S, DIM)), weight("w", HEADS, DIM, 6)
    ),
    "matmul with several matrices": lambda x: Matmul(x, weight("w", 3, HIDDEN, 6)),
    "matmul of heads with one matrix": lambda x: Matmul(heads(x), weight("w", DIM, 6)),
    "matmul of tokens in front with a matrix": lambda x: Matmul(Reshape(x, (S, HEADS, DIM)), weight("w", DIM, 6)),
    "matmul of tokens in front with several": lambda x: Matmul(Reshape(x, (S, 1, HEADS, DIM)), weight("w", 3, DIM, 6)),
    "matmul of a token with another token's shape": lambda x: Matmul(
        Reshape(x, (1, S, HEADS, DIM)), Transpose(Reshape(x, (S, HEADS, DIM)), (0, 2, 1))
    ),
    "transpose of ones": lambda x: Transpose(Reshape(x, (1, S, 1, HIDDEN)), (2, 1, 0, 3)),
    "transpose without a batch axis": lambda x: Transpose(Reshape(x, (S, HEADS, DIM)), (2, 0, 1)),
    "broadcast of the batch axis": lambda x: Broadcast(x, (3, S, HIDDEN)),
    "reshape that takes the batch axis": lambda x: Reshape(x, (S, 1, HEADS, DIM)),
}


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_a_token_wise_op_gives_each_token_the_same_row(name: str) -> None:
    before = graph_of(TOKEN_WISE[name])
    after, reports = run_passes(before, [FlattenTokens()])
    assert reports[0].refusals == [] and [str(s) for s in after.symbols] == ["T"]
    value = before.output("y")
    axis = next(i for i, dim in enumerate(value.shape) if dim == S)
    others = [dim for i, dim in enumerate(value.shape) if i != axis and (i or dim != 1)]
    assert [str(dim) for dim in after.output("y").shape] == ["T", *map(str, others)]
    load = random_weights(before)
    for count in (2, 7):
        ids = np.random.default_rng(count).integers(0, VOCABULARY, count)
        inputs = {"ids": ids.astype(np.int32), "positions": np.arange(count, dtype=np.int32)}
        with precise():
            expected = evaluate(before, {key: array[None] for key, array in inputs.items()}, load)["y"]
            found = evaluate(after, inputs, load)["y"]
        rows = np.moveaxis(np.asarray(expected), axis, 0)
        np.testing.assert_allclose(np.asarray(found).reshape(rows.shape), rows, **CLOSE)


def test_axes_of_one_are_not_moved_and_no_stack_is_made_of_one_matrix() -> None:
    for name, kind in TOKEN_WISE.items():
        after, _ = run_passes(graph_of(kind), [FlattenTokens()])
        if name in ("transpose of ones", "transpose and back"):
            assert not any(isinstance(op, Transpose) for op in after.ops)
        if name in ("matmul with a matrix", "matmul with a matrix under ones", "matmul without a batch axis"):
            (product,) = (op for op in after.ops if isinstance(op, Matmul))
            assert product.a.rank == product.b.rank == 2
    after, _ = run_passes(graph_of(lambda x: Add(heads(x), weight("c", DIM))), [FlattenTokens()])
    (added,) = (op for op in after.ops if isinstance(op, Add))
    assert added.b.shape == (DIM,), "it broadcasts as it is"


MIXING: dict[str, tuple[Build, str]] = {
    "sum over tokens": (lambda x: Add(x, Sum(x, (1,))), "one value of all tokens"),
    "softmax over tokens": (lambda x: Softmax(x, 1), "token axis 1"),
    "running sum over tokens": (lambda x: Cumsum(x, 1), "token axis 1"),
    "last token": (lambda x: Slice(x, 1, 1, 2), "one value of all tokens"),
    "all but the first": (lambda x: Slice(x, 1, 1, S), "token axis 1"),
    "shifted": (lambda x: Pad(x, (0, 1, 0), (0, 0, 0)), "pads the token axis"),
    "tokens by tokens": (lambda x: Matmul(x, Transpose(x, (0, 2, 1))), "count tokens"),
    "tokens folded into channels": (lambda x: Reshape(x, (1, S * HIDDEN)), "not one element a token"),
    "reinterpreted": (lambda x: Reshape(heads(x), (1, S, HIDDEN)), "moves elements between tokens"),
    "mixed by a matrix of tokens": (lambda x: Concat((x, x), 1), "token axis 1"),
    "tokens of two axes": (lambda x: Add(Reshape(x, (S, 1, HIDDEN)), Reshape(x, (1, S, HIDDEN))), "count tokens"),
    "counted": (lambda x: Add(x, Reshape(Cast(Iota(S), "f32"), (1, S, 1))), "counts tokens"),
    "gathered along tokens": (lambda x: Gather(x, constant([0, 0]), 1), "one value of all tokens"),
    "gathered by token": (
        lambda x: Gather(Reshape(x, (S, HIDDEN)), Argmax(Linear(x, weight("r", 2, HIDDEN)), 2), 0),
        "gathers tokens by token",
    ),
    "elements of one place": (
        lambda x: GatherElements(x, Broadcast(constant(np.zeros((1, 1, 1)), "i64"), (1, S, HIDDEN)), 1),
        "along the token axis",
    ),
    "summed by a matrix": (
        lambda x: Matmul(Transpose(x, (0, 2, 1)), Broadcast(weight("w", 1, 5), (S, 5))),
        "one value of all tokens",
    ),
    "two texts of attention": (
        lambda x: Attention(*(Broadcast(Reshape(x, (1, S, HEADS, DIM)), (2, S, HEADS, DIM)),) * 3),
        "tensor<[2, S, 4, 8], f32> holds 2 sequences, not one",
    ),
    "no text of attention": (
        lambda x: Attention(*(Slice(Reshape(x, (1, S, HEADS, DIM)), 0, 0, 0),) * 3),
        "tensor<[0, S, 4, 8], f32> holds 0 sequences, not one",
    ),
    "attention of texts of one token": (
        lambda x: Attention(*(Reshape(x, (S, 1, HEADS, DIM)),) * 3),
        "the tokens of tensor<[S, 1, 4, 8], f32> are not on axis 1",
    ),
    "rows of tokens": (
        lambda x: QuantizeActivations(Transpose(x, (0, 2, 1)), 8),
        "it works along the token axis of tensor<[1, 32, S], f32>",
    ),
    "rotated heads": (
        lambda x: Rope(Reshape(heads(x), (HEADS, S, DIM)), weight("angles", HEADS, 2, 3)),
        "the tokens of tensor<[4, S, 8], f32> are not on axis 0",
    ),
    "slices that depend on the size": (
        lambda x: Slice(Broadcast(Reshape(x, (1, S, 1, HIDDEN)), (1, S, S, HIDDEN)), 2, 0, 1),
        "count tokens",
    ),
    "attention of what is mixed": (
        lambda x: Attention(*(Reshape(Softmax(x, 1), (1, S, HEADS, DIM)),) * 3),
        "works along the token axis 1",
    ),
    "pads behind": (lambda x: Pad(x, (0, 0, 0), (0, 1, 0)), "pads the token axis"),
    "attention of channels": (
        lambda x: Attention(*(Transpose(Reshape(x, (1, S, HEADS, DIM)), (0, 2, 1, 3)),) * 3),
        "the tokens of tensor<[1, 4, S, 8], f32> are not on axis 1",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_refused_with_the_reason(name: str) -> None:
    build, reason = MIXING[name]
    before = graph_of(build)
    report = Report()
    assert FlattenTokens().run(before, report) is before
    assert len(report.refusals) == 1 and reason in report.refusals[0][1]


@pytest.mark.parametrize(
    ("options", "high"),
    [
        (FlattenTokens(max_step=16), 16), (FlattenTokens(max_step=100), 100), (FlattenTokens(), 512),
        (FlattenTokens(max_step=16, sequences=True), 64), (FlattenTokens(max_step=100, sequences=True), 100),
    ],
)  # fmt: skip
def test_the_range_of_tokens_is_the_option_and_what_is_not_cut_fits(options: FlattenTokens, high: int) -> None:
    after, _ = run_passes(graph_of(lambda x: x), [options])
    sequences = [("B", 1, None)] if options.sequences else []
    assert [(s.name, s.low, s.high) for s in after.symbols] == [*sequences, ("T", 1, high)]
    assert [value.name for value in after.inputs] == ["ids", "positions", *(["starts"] if sequences else [])]


def of_inputs(*inputs: tuple[str, tuple[object, ...]]) -> Graph:
    values = [Input(name, Tensor(shape, "i32")) for name, shape in inputs]  # type: ignore[arg-type]
    return Graph("main", tuple(values), (("y", Cast(values[0], "f32")),))


NEEDS = "needs inputs ids and positions and token_types and lengths of one shape [1, S]"
INPUTS: dict[str, tuple[Graph, tuple[str, str] | None]] = {
    "all": (of_inputs(*((name, (1, S)) for name in ("ids", "positions", "token_types", "lengths"))), None),
    "no ids": (of_inputs(("positions", (1, S))), ("input ids", "needs ids: [1, S] with a symbolic S")),
    "flat ids": (of_inputs(("ids", (S,))), ("input ids", "needs ids: [1, S] with a symbolic S")),
    "a known number": (of_inputs(("ids", (1, 7))), ("input ids", "needs ids: [1, S] with a symbolic S")),
    "several": (of_inputs(("ids", (2, S))), ("input ids", NEEDS)),
    "another input": (of_inputs(("ids", (1, S)), ("mask", (1, S)), ("more", (1, S))), ("input mask", NEEDS)),
    "another shape": (of_inputs(("ids", (1, S)), ("positions", (S, 1))), ("input positions", NEEDS)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_text_has_inputs_of_one_shape(name: str) -> None:
    before, refusal = INPUTS[name]
    report = Report()
    after = FlattenTokens().run(before, report)
    assert report.refusals == ([refusal] if refusal else []) and (after is before) == bool(refusal)


FLAT, _ = run_passes(decoder(), [FlattenTokens()])
LOAD = random_weights(FLAT)


@pytest.mark.parametrize("rows", [[8], [0, 8], [3, 3, 1], list(range(9))])
def test_selected_rows_are_the_rows_of_all_logits(rows: list[int]) -> None:
    after, _ = run_passes(FLAT, [SelectRows()])
    inputs = {"ids": np.arange(9, dtype=np.int32), "positions": np.arange(9, dtype=np.int32)}
    with precise():
        expected = np.asarray(evaluate(FLAT, inputs, LOAD)["logits"])[rows]
        found = evaluate(after, {**inputs, "rows": np.asarray(rows, np.int32)}, LOAD)["logits"]
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_nothing_after_the_last_attention_runs_for_rows_that_nobody_asked_for() -> None:
    after, _ = run_passes(FLAT, [SelectRows()])
    last = max(i for i, op in enumerate(after.ops) if isinstance(op, Attention))
    per_token = [op for op in after.ops[last + 1 :] if "T" in {str(dim) for dim in op.shape}]
    # The attention's result, its heads side by side.
    assert [type(op) for op in per_token] == [Reshape]
    assert sum(isinstance(op, Gather) and op.shape[0] != FLAT.inputs[0].shape[0] for op in after.ops) == 2


def test_an_output_that_is_wanted_whole_is_computed_whole() -> None:
    hidden = FLAT.output("logits").x  # type: ignore[attr-defined]
    after, _ = run_passes(FLAT.replace_outputs([*FLAT.outputs, ("hidden", hidden)]), [SelectRows()])
    assert str(after.output("hidden").shape[0]) == "T" and str(after.output("logits").shape[0]) == "R"


def test_an_op_along_tokens_runs_before_rows_are_selected() -> None:
    mixed = Softmax(FLAT.output("logits"), 0)
    before = FLAT.replace_outputs([("logits", mixed)])
    after, _ = run_passes(before, [SelectRows()])
    inputs = {"ids": np.arange(9, dtype=np.int32), "positions": np.arange(9, dtype=np.int32)}
    with precise():
        expected = np.asarray(evaluate(before, inputs, LOAD)["logits"])[[4, 0]]
        found = evaluate(after, {**inputs, "rows": np.asarray([4, 0], np.int32)}, LOAD)["logits"]
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("output", ["logits", "nothing"])
def test_select_rows_refuses_what_has_no_rows(output: str) -> None:
    before = decoder()
    report = Report()
    assert SelectRows(output=output).run(before, report) is before and len(report.refusals) == 1


def test_a_cache_in_f16_rounds_keys_and_values_only() -> None:
    after, _ = run_passes(FLAT, [InsertKVCache(kv_dtype="f16"), SelectRows()])
    assert {str(v.type) for v in after.inputs if isinstance(v.type, KV)} == {f"kv<2, {DIM}, {DIM}, f16>"}
    kind = next(v.type for v in after.inputs if isinstance(v.type, KV))
    assert Pages.empty(kind, 2).keys.dtype == np.float16
    own = list(range(9))
    (found,) = run_steps(after, LOAD, [own], [[(0, 9)]])
    np.testing.assert_allclose(found, run_sequence(decoder(), LOAD, own), rtol=0, atol=1e-11)  # precise: f64


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_attention_in_halves_is_kept_in_f32(dtype: str) -> None:
    """The cache holds halves exactly, and what reads it gives halves again."""

    def in_halves(q: Value, k: Value, v: Value, positions: Input) -> Value:
        return Cast(Attention(*(Cast(Transpose(x, (0, 2, 1, 3)), dtype) for x in (q, k, v))), "f32")

    source = decoder(attend=in_halves, layers=1)
    after, _ = run_passes(source, [FlattenTokens(), InsertKVCache(kv_dtype="f32"), SelectRows()])
    (append,) = (op for op in after.ops if isinstance(op, KVAppend))
    assert append.k.dtype == append.v.dtype == "f32"
    load = random_weights(source)
    (found,) = run_steps(after, load, [list(range(9))], [[(0, 4)], [(0, 5)]])
    np.testing.assert_allclose(found, run_sequence(source, load, list(range(9))), rtol=0, atol=1e-11)


def test_two_attentions_over_the_same_keys_share_a_cache() -> None:
    def twice(q: Value, k: Value, v: Value, positions: Input) -> Value:
        q, k, v = (Transpose(x, (0, 2, 1, 3)) for x in (q, k, v))
        return Add(Attention(q, k, v), Attention(Mul(q, constant(2.0)), k, v, window=3))

    source = decoder(attend=twice, layers=1)
    after, _ = run_passes(source, [FlattenTokens(), InsertKVCache(), SelectRows()])
    kinds = [type(op) for op in after.ops]
    assert kinds.count(KVAppend) == 1 and kinds.count(PagedAttention) == 2
    load = random_weights(source)
    (found,) = run_steps(after, load, [list(range(9))], [[(0, 4)], [(0, 5)]])
    np.testing.assert_allclose(found, run_sequence(source, load, list(range(9))), rtol=0, atol=1e-11)


def test_attention_that_sees_later_tokens_gets_no_cache() -> None:
    def both_ways(q: Value, k: Value, v: Value, positions: Input) -> Value:
        return Attention(*(Transpose(x, (0, 2, 1, 3)) for x in (q, k, v)), causal=False)

    before, _ = run_passes(decoder(attend=both_ways), [FlattenTokens()])
    report = Report()
    assert InsertKVCache().run(before, report) is before
    assert all("not causal" in reason for _, reason in report.refusals) and len(report.refusals) == 2


def test_a_graph_over_sequences_gets_no_cache() -> None:
    before, report = decoder(), Report()
    assert InsertKVCache().run(before, report) is before and "flatten-tokens comes first" in report.refusals[0][1]


def test_an_unknown_cache_dtype_is_an_error() -> None:
    with pytest.raises(CompileError, match="known: f16, f32"):
        InsertKVCache(kv_dtype="q4").run(FLAT, Report())
