"""The passes of an encoder: each leaves what it computes, and a mixture of sequences is computed like each alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pass_harness import c, param
from small_encoder import (
    DIM,
    HEADS,
    HEADS_OF_MODELS,
    LONGEST,
    VOCABULARY,
    WIDTH,
    S,
    alone,
    everything,
    first,
    linear,
    mean,
    small_encoder,
)

from llmc.compiler.check import Checker
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.attention import Attention, KVAppend, PagedAttention
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.ragged import PoolTokens, RelativeBias
from llmc.compiler.ir.types import KV, Array, precise
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.manager import Report, parse_pipeline, run_passes
from llmc.compiler.pipeline import pipeline_text
from llmc.compiler.scenario import random_params
from llmc.compiler.step_sizes import ENCODE

FLATTEN = "flatten-tokens{max-step=192,sequences=true}"
CACHE = "insert-kv-cache{scratch=true}"
WHOLE = pipeline_text(CompileOptions(quantization="none"), ENCODE)


def run_checked(graph: Graph, pipeline: str, lengths: tuple[int, ...] = (7, 2, 33, 5)) -> tuple[Graph, list[Report]]:
    """The graph after the passes; each pass must leave the outputs of a mixture of sequences as those of each alone."""
    return run_passes(graph, parse_pipeline(pipeline), [Checker(seed=1, lengths=lengths)])


def refusals(reports: list[Report]) -> list[str]:
    """Why passes left something as it was, but for weights that stay in f32."""
    return [reason for report in reports if report.name != "quantize" for _, reason in report.refusals]


def added(q: Value, k: Value, v: Value, bias: Value, **attributes: object) -> Value:
    return Attention(q, k, v, None, None, bias, scale=DIM**-0.5, causal=False, **attributes)  # type: ignore[arg-type]


def bucketed(q: Value, k: Value, v: Value, layer: int) -> Value:
    """A bias a head from a table by how far a key is, as far as 5 tokens, the same for every layer."""
    at = s.Iota(S)
    distance = e.Sub(s.Reshape(at, (1, S)), s.Reshape(at, (S, 1)))
    near = e.Add(e.Minimum(e.Maximum(distance, e.constant(-5, "i64")), e.constant(5, "i64")), e.constant(5, "i64"))
    bias = s.Transpose(s.Gather(param("distances", 11, HEADS, dtype="f32"), near, 0), (2, 0, 1))
    return added(q, k, v, s.Reshape(bias, (1, HEADS, S, S)))


def alternating(q: Value, k: Value, v: Value, layer: int) -> Value:
    """Layers that see all tokens, and layers that see those less than 4 away."""
    return Attention(q, k, v, scale=DIM**-0.5, causal=False, window=4 if layer % 2 else 0)


def looking_back(q: Value, k: Value, v: Value, layer: int) -> Value:
    return Attention(q, k, v, scale=DIM**-0.5)


def capped(q: Value, k: Value, v: Value, layer: int) -> Value:
    return Attention(q, k, v, param("sinks", HEADS, dtype="f32"), scale=1.0, causal=False, softcap=2.0, window=9)


ATTENTION = {"bias by distance": bucketed, "windows": alternating, "causal": looking_back, "sinks and softcap": capped}


@pytest.mark.parametrize("head", HEADS_OF_MODELS)
def test_every_pass_keeps_what_a_mixture_of_sequences_computes(head: str) -> None:
    after, reports = run_checked(small_encoder(HEADS_OF_MODELS[head]), WHOLE)
    assert refusals(reports) == []
    assert {value.name for value in after.inputs} >= {"ids", "positions", "token_types", "starts", "slots", "cache.0"}
    assert not any(isinstance(value.type, KV) for _, value in after.outputs)
    assert sum(isinstance(op, PagedAttention) for op in after.ops) == 3


@pytest.mark.parametrize("kind", ATTENTION)
def test_each_kind_of_attention_reads_its_own_sequence(kind: str) -> None:
    after, reports = run_checked(small_encoder(everything, ATTENTION[kind]), WHOLE)
    assert refusals(reports) == []
    paged = [op for op in after.ops if isinstance(op, PagedAttention)]
    assert len(paged) == 3
    assert all(op.causal == (kind == "causal") and (op.starts is None) == op.causal for op in paged)
    assert all((op.bias is not None) == (kind == "bias by distance") for op in paged)


def test_layers_share_the_scratch_that_the_layer_before_has_read() -> None:
    after, _ = run_checked(small_encoder(), WHOLE)
    assert [value.name for value in after.inputs if isinstance(value.type, KV)] == ["cache.0"]
    appends = [op for op in after.ops if isinstance(op, KVAppend)]
    assert [a.cache for a in appends[1:]] == appends[:-1]


def test_layers_side_by_side_have_a_scratch_each() -> None:
    """Two attentions over one layer's input: no order of the appends would let both read their own keys."""

    def split(q: Value, k: Value, v: Value, layer: int) -> Value:
        other = Attention(q, linear_heads(k), v, scale=0.1, causal=False)
        return e.Add(Attention(q, k, v, scale=0.3, causal=False), other)

    def linear_heads(x: Value) -> Value:
        return e.Mul(x, c(0.5))

    after, _ = run_checked(small_encoder(everything, split), WHOLE)
    assert [value.name for value in after.inputs if isinstance(value.type, KV)] == ["cache.0", "cache.1"]


def test_keys_that_are_read_again_later_are_appended_again() -> None:
    """The first layer's keys serve the last layer too, after another has overwritten them."""
    kept: list[Value] = []

    def again(q: Value, k: Value, v: Value, layer: int) -> Value:
        kept.extend((k, v))
        return Attention(q, *(kept[:2] if layer == 2 else (k, v)), scale=0.3, causal=False)

    after, _ = run_checked(small_encoder(everything, again), WHOLE)
    assert sum(isinstance(op, KVAppend) for op in after.ops) == 3


def test_a_table_of_distances_is_computed_when_compiling() -> None:
    after, _ = run_checked(small_encoder(everything, bucketed), WHOLE)
    tables = {op.bias for op in after.ops if isinstance(op, PagedAttention)}
    (table,) = tables
    assert table is not None and table in after.constants
    assert table.shape == (HEADS, 2 * 160 - 1)  # 150 tokens at most, in whole pages


def test_a_bias_that_distance_does_not_decide_is_refused() -> None:
    def absolute(q: Value, k: Value, v: Value, layer: int) -> Value:
        row = s.Reshape(param("row", LONGEST, dtype="f32"), (1, LONGEST))
        return added(q, k, v, s.Gather(s.Reshape(row, (LONGEST,)), s.Broadcast(s.Iota(S), (S, S)), 0))

    after, reports = run_checked(small_encoder(everything, absolute), WHOLE)
    assert any("not decided by the distance" in reason for reason in refusals(reports))
    assert any("every step takes one sequence" in reason for reason in refusals(reports))
    assert after.input("ids").rank == 2 and len(after.output("last_hidden_state").shape) == 2


def test_a_bias_by_token_is_refused() -> None:
    def by_token(q: Value, k: Value, v: Value, layer: int) -> Value:
        keys = s.Reshape(s.Sum(k, (2, 3), False), (1, 1, 1, S))
        return added(q, k, v, s.Broadcast(keys, (1, HEADS, S, S)))

    _, reports = run_checked(small_encoder(everything, by_token), WHOLE)
    assert any("token ids decide" in reason for reason in refusals(reports))


Build = Callable[[Value], Value]


def count() -> Value:
    """S as a value, as frontends spell it."""
    return e.Cast(s.Slice(s.Iota(S + 1), 0, S, S + 1), "f32")


def weighted(x: Value) -> Value:
    """Attention pooling: weights that sum to one over the tokens, as a product of matrices."""
    scores = e.Sigmoid(linear(x, "scores", 2))
    return s.Matmul(s.Transpose(scores, (0, 2, 1)), x)


def by_count(x: Value) -> Value:
    """torch.gather with an index made of the number of tokens."""
    index = e.Sub(s.Slice(s.Iota(S + 1), 0, S, S + 1), e.constant(1, "i64"))
    return s.GatherElements(x, s.Broadcast(s.Reshape(index, (1, 1, 1)), (1, 1, WIDTH)), 1)


PER_SEQUENCE: dict[str, Build] = {
    "mean that keeps its axis": lambda x: s.Mean(x, (1,)),
    "mean without a batch axis": lambda x: s.Mean(s.Reshape(x, (S, WIDTH)), (0,), False),
    "mean over tokens and channels": lambda x: s.Mean(x, (1, 2), False),
    "mean over batch and tokens": lambda x: s.Mean(x, (0, 1), False),
    "max over tokens, then channels": lambda x: s.Max(s.Max(x, (1,)), (2,)),
    "smallest": lambda x: s.Min(x, (1,), False),
    "sum of heads": lambda x: s.Sum(s.Transpose(s.Reshape(x, (1, S, HEADS, DIM)), (0, 2, 1, 3)), (2,), False),
    "sum over the number of tokens": lambda x: e.Div(s.Sum(x, (1,), False), count()),
    "size in arithmetic": lambda x: e.Mul(s.Max(x, (1,), False), e.Sub(e.Mul(count(), c(2.0)), c(1.0))),
    "whole numbers": lambda x: s.Sum(e.Cast(e.Greater(x, c(0.0)), "i32"), (1,), False),
    "constant over tokens": lambda x: e.Add(s.Mean(x, (1,)), s.Mean(s.Broadcast(c(3.0), (1, S, WIDTH)), (1,))),
    "ones are counted": lambda x: e.Div(s.Mean(x, (1,), False), s.Sum(s.Broadcast(c(1.0), (1, S, 1)), (1,), False)),
    "first by index": lambda x: s.Gather(x, e.constant([0], "i64"), 1),
    "last by slice": lambda x: s.Slice(x, 1, S - 1, S),
    "last by count": by_count,
    "last by an index of its own": lambda x: s.Gather(x, e.Cast(e.Sub(count(), c(1.0)), "i64"), 1),
    "second to last": lambda x: s.Gather(x, e.Cast(e.Mul(e.Div(count(), count()), c(-2.0)), "i64"), 1),
    "product of matrices": weighted,
    "first and mean side by side": lambda x: s.Concat((s.Slice(x, 1, 0, 1), s.Mean(x, (1,))), 2),
    "first and mean as a stack": lambda x: s.Concat((s.Slice(x, 1, 0, 1), s.Mean(x, (1,))), 1),
    "norm of a mean": lambda x: e.Div(s.Mean(x, (1,)), e.Sqrt(s.Sum(e.Pow(s.Mean(x, (1,)), c(2.0)), (2,)))),
    "matrix of a mean": lambda x: s.Matmul(s.Mean(x, (1,)), param("m", WIDTH, 5, dtype="f32")),
    "matrices a head": lambda x: s.Matmul(
        s.Reshape(s.Mean(x, (1,)), (HEADS, 1, DIM)), param("m", HEADS, DIM, 5, dtype="f32")
    ),
    "mean by itself": lambda x: s.Matmul(s.Reshape(s.Mean(x, (1,)), (WIDTH, 1)), s.Mean(x, (1,))),
    "softmax of labels": lambda x: s.Softmax(linear(s.Mean(x, (1,), False), "labels", 5), 1),
    "one label as a vector": lambda x: s.Reshape(linear(s.Mean(x, (1,), False), "label", 1), (1,)),
    "one label as a number": lambda x: s.Reshape(linear(s.Mean(x, (1,), False), "label", 1), ()),
    "where and slices": lambda x: s.Pad(
        s.Slice(e.Where(e.Greater(s.Mean(x, (1,)), c(0.0)), s.Max(x, (1,)), c(-1.0)), 2, 1, 20, 3), (0, 0, 1), (0, 0, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PER_SEQUENCE)
def test_what_becomes_of_all_tokens_is_a_row_a_sequence(name: str) -> None:
    graph = small_encoder(lambda x: {"y": PER_SEQUENCE[name](x)}, layers=1)
    after, reports = run_checked(graph, f"canonicalize,fold,cse,{FLATTEN},canonicalize,fold,cse,{CACHE}")
    assert refusals(reports) == []
    assert str(after.output("y").shape[0]) == "B"


MIXING: dict[str, tuple[Build, str]] = {
    "a mean that is added to tokens": (lambda x: e.Add(x, s.Mean(x, (1,))), "one value of all tokens"),
    "second token": (lambda x: s.Slice(x, 1, 1, 2), "neither the first nor the last"),
    "third token": (lambda x: s.Gather(x, e.constant(2, "i64"), 1), "neither the first nor the last"),
    "two tokens": (lambda x: s.Gather(x, e.constant([0, 1], "i64"), 1), "several tokens"),
    "softmax over tokens": (lambda x: s.Mean(s.Softmax(x, 1), (1,)), "token axis"),
    "greatest token": (lambda x: s.Argmax(x, 1), "one value of all tokens"),
    "count of tokens": (lambda x: e.Add(x, s.Reshape(e.Cast(s.Iota(S), "f32"), (1, S, 1))), "counts tokens"),
    "tokens by tokens": (lambda x: s.Matmul(x, s.Transpose(x, (0, 2, 1))), "count tokens"),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_has_no_row_of_its_own_is_refused(name: str) -> None:
    build, reason = MIXING[name]
    graph = small_encoder(lambda x: {"y": build(x)}, layers=1)
    after, reports = run_passes(graph, parse_pipeline(FLATTEN))
    assert after is graph and len(refusals(reports)) == 1 and reason in refusals(reports)[0]


def test_a_refused_value_that_nobody_needs_refuses_nothing() -> None:
    """The reason of one output says nothing about another graph that lacks it."""
    graph = small_encoder(lambda x: {"y": s.Mean(x, (1,)), "z": s.Softmax(x, 1)}, layers=1)
    assert run_checked(graph, FLATTEN)[0] is graph
    kept = graph.replace_outputs([("y", graph.output("y"))])
    assert str(run_checked(kept, FLATTEN)[0].output("y").shape[0]) == "B"


def test_only_rows_that_are_picked_run_behind_the_last_attention() -> None:
    after, _ = run_checked(small_encoder(first), WHOLE)
    last = max(i for i, op in enumerate(after.ops) if isinstance(op, PagedAttention))
    linears = [op for op in after.ops[last:] if isinstance(op, Linear)]
    assert len(linears) == 4 and {str(op.shape[0]) for op in linears} == {"B"}


def test_rows_that_another_output_needs_run_for_all_tokens() -> None:
    after, _ = run_checked(small_encoder(everything), WHOLE)
    assert str(after.output("last_hidden_state").shape[0]) == "T"


def test_pooled_tokens_are_pooled_over_their_own_rows() -> None:
    after, _ = run_checked(small_encoder(mean), WHOLE)
    (pool,) = (op for op in after.ops if isinstance(op, PoolTokens))
    assert (str(pool.shape[0]), pool.kind) == ("B", "mean")


def test_the_table_means_what_its_gather_means() -> None:
    rng = np.random.default_rng(0)
    table = e.constant(rng.standard_normal((2, 13)))
    bias = RelativeBias(table, 5)
    graph = Graph("g", (), (("a", bias), ("b", bias.decompose())))
    with precise():
        found = evaluate(graph, {}, lambda name: np.zeros(0))
    np.testing.assert_array_equal(np.asarray(found["a"]), np.asarray(found["b"]))
    assert np.asarray(found["a"])[1, 4, 0] == table.value.array[1, 6 - 4]


def test_pooling_in_numpy_is_what_each_sequence_gives_alone() -> None:
    rng = np.random.default_rng(0)
    x, starts = rng.standard_normal((10, 3)).astype(np.float32), np.asarray([0, 1, 8, 10], np.int32)
    functions: dict[str, Callable[..., Array]] = {"mean": np.mean, "max": np.max, "sum": np.sum}
    for kind, function in functions.items():
        pool = PoolTokens(e.constant(x, "f32"), e.constant(starts, "i32"), kind)
        expected = [function(x[a:b], axis=0) for a, b in ((0, 1), (1, 8), (8, 10))]
        np.testing.assert_allclose(pool.evaluate(x, starts), expected, rtol=1e-6)


def test_the_checker_compares_with_each_sequence_alone() -> None:
    """What the other tests rest on: the scenario's rows are those of the lifted graph, one sequence at a time."""
    graph = small_encoder()
    checker = Checker(seed=1, lengths=(7, 2))
    run_passes(graph, parse_pipeline(WHOLE), [checker])
    load = random_params(graph, 1)
    scenario = checker._scenario
    assert scenario is not None
    for index, ids in enumerate(scenario.sequences):
        types = [int(2 * i >= len(ids)) for i in range(len(ids))]
        with precise():
            expected = alone(graph, load, ids.tolist(), types)
        rows = slice(scenario.row(index, 0), scenario.row(index, len(ids)))
        np.testing.assert_allclose(
            checker._outputs["last_hidden_state"][rows], expected["last_hidden_state"], atol=1e-9
        )
        np.testing.assert_allclose(checker._outputs["logits"][index], expected["logits"][0], atol=1e-9)
    assert max(int(ids.max()) for ids in scenario.sequences) < VOCABULARY
