"""fuse-attention and masks: every way of writing attention becomes llm.attention of the same meaning, or is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from attention_harness import (
    DIM,
    HEADS,
    KV_HEADS,
    Attend,
    S,
    decoder,
    half_rotation,
    random_weights,
    repeat_kv,
    run_sequence,
    run_steps,
    weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.elementwise import (
    Add,
    And,
    Cast,
    Div,
    Equal,
    Exp,
    Greater,
    LessEqual,
    Mul,
    Reciprocal,
    Sub,
    Tanh,
    Where,
    constant,
)
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention, PagedAttention
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import (
    Broadcast,
    Concat,
    Cumsum,
    Iota,
    Matmul,
    Max,
    Reshape,
    Slice,
    Softmax,
    Sum,
    Transpose,
)
from llmc.compiler.passes.canonicalize import Canonicalize
from llmc.compiler.passes.flatten_tokens import FlattenTokens
from llmc.compiler.passes.fuse_attention import FuseAttention
from llmc.compiler.passes.fuse_rope import FuseRope
from llmc.compiler.passes.insert_kv_cache import InsertKVCache
from llmc.compiler.passes.manager import Report, run_passes
from llmc.compiler.passes.masks import Mask, Unrecognised, describe_mask
from llmc.compiler.passes.probe import reading
from llmc.compiler.passes.select_rows import SelectRows

GROUPS = HEADS // KV_HEADS
SCALE = DIM**-0.5
SLOPES = np.asarray([0.5, 0.25, 0.125, 0.3125])
SINKS = np.asarray([0.5, -1.0, 2.0, 0.0])


def query_positions() -> Value:
    return Reshape(Iota(S), (S, 1))


def causal() -> Value:
    """bool [S, S]"""
    return LessEqual(Reshape(Iota(S), (1, S)), query_positions())


def window(size: int) -> Value:
    """bool [S, S]: key > query - size"""
    return Greater(Reshape(Iota(S), (1, S)), Sub(query_positions(), constant(size)))


def additive(seen: Value, low: float = -3.4028234663852886e38) -> Value:
    return Where(seen, constant(0.0), constant(low))


def keys(k: Value) -> Value:
    """[..., S, dim] -> [..., dim, S]"""
    return Transpose(k, (*range(k.rank - 2), k.rank - 1, k.rank - 2))


def finish(probabilities: Value, v: Value) -> Value:
    return Transpose(Matmul(probabilities, v), (0, 2, 1, 3))


def written(
    scores: Callable[[Value], Value] = lambda s: Mul(s, constant(SCALE)),
    mask: Callable[[Value], Value] = lambda s: Add(s, additive(causal())),
    softmax: Callable[[Value], Value] = lambda s: Softmax(s, 3),
) -> Attend:
    """Attention with repeated key heads and the given steps between the two products."""

    def attend(q: Value, k: Value, v: Value, positions: Input) -> Value:
        k, v = repeat_kv(k, GROUPS), repeat_kv(v, GROUPS)
        return finish(softmax(mask(scores(Matmul(q, keys(k))))), v)

    return attend


def scaled_before(q: Value, k: Value, v: Value, positions: Input) -> Value:
    half = constant(float(np.sqrt(SCALE)))
    k, v = repeat_kv(Mul(k, half), GROUPS), repeat_kv(v, GROUPS)
    return finish(Softmax(Add(Matmul(Mul(q, half), keys(k)), additive(causal())), 3), v)


def by_position_input(q: Value, k: Value, v: Value, positions: Input) -> Value:
    k, v = repeat_kv(k, GROUPS), repeat_kv(v, GROUPS)
    seen = LessEqual(Reshape(positions, (1, 1, 1, S)), Reshape(positions, (1, 1, S, 1)))
    return finish(Softmax(Add(Mul(Matmul(q, keys(k)), constant(SCALE)), additive(seen, -np.inf)), 3), v)


def softcapped(s: Value) -> Value:
    return Mul(Tanh(Div(Mul(s, constant(SCALE)), constant(3.0))), constant(3.0))


def raw_softmax(s: Value) -> Value:
    e = Exp(Sub(s, Max(s, (3,))))
    return Div(e, Sum(e, (3,)))


def reciprocal_softmax(s: Value) -> Value:
    e = Exp(s)
    return Mul(Reciprocal(Sum(e, (3,))), e)


def alibi_by_key(s: Value) -> Value:
    at = Cast(Iota(S), "f32")
    bias = Mul(constant(SLOPES.reshape(1, HEADS, 1, 1)), Reshape(at, (1, 1, 1, S)))
    return Add(Add(s, bias), additive(causal()))


def alibi_by_distance(s: Value) -> Value:
    """Built from a running sum of ones, as Falcon's is."""
    at = Cast(Sub(Cumsum(Broadcast(constant(1), (S,)), 0), constant(1)), "f32")
    distance = Sub(Reshape(at, (1, 1, 1, S)), Reshape(at, (1, 1, S, 1)))
    return Where(causal(), Add(s, Mul(constant(SLOPES.reshape(1, HEADS, 1, 1)), distance)), constant(-np.inf))


def triangle_table(s: Value) -> Value:
    """A stored triangle, sliced to the sequence."""
    table = constant(np.tril(np.ones((1, 1, 64, 64), bool)), "bool")
    return Where(Slice(Slice(table, 2, 0, S), 3, 0, S), s, constant(-1e4))


def stored_band(s: Value) -> Value:
    """A stored triangle of the last 40 keys: a window that the first few positions do not show."""
    at = np.arange(64)
    seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - 40)
    table = constant(seen.reshape(1, 1, 64, 64), "bool")
    return Where(Slice(Slice(table, 2, 0, S), 3, 0, S), s, constant(-1e9))


def flat_heads(q: Value, k: Value, v: Value, positions: Input) -> Value:
    """[heads, S, dim] products, as Bloom's."""
    k, v = repeat_kv(k, GROUPS), repeat_kv(v, GROUPS)
    q, k, v = (Reshape(x, (HEADS, S, DIM)) for x in (q, k, v))
    scores = Reshape(Mul(Matmul(q, keys(k)), constant(SCALE)), (1, HEADS, S, S))
    weights = Reshape(Softmax(Add(scores, additive(causal())), 3), (HEADS, S, S))
    return Transpose(Reshape(Matmul(weights, v), (1, HEADS, S, DIM)), (0, 2, 1, 3))


def grouped_products(q: Value, k: Value, v: Value, positions: Input) -> Value:
    """Products over [1, kv_heads, group, S, dim], keys broadcast by the product."""
    q = Reshape(q, (1, KV_HEADS, GROUPS, S, DIM))
    k, v = (Reshape(x, (1, KV_HEADS, 1, S, DIM)) for x in (k, v))
    scores = Add(Mul(Matmul(q, keys(k)), constant(SCALE)), additive(causal()))
    return Transpose(Reshape(Matmul(Softmax(scores, 4), v), (1, HEADS, S, DIM)), (0, 2, 1, 3))


def rotated_after_repeating(q: Value, k: Value, v: Value, positions: Input) -> Value:
    """Falcon's order: keys are repeated, then rotated."""
    k, v = repeat_kv(k, GROUPS), repeat_kv(v, GROUPS)
    scores = Matmul(half_rotation(q, positions), keys(half_rotation(k, positions)))
    return finish(Softmax(Add(Mul(scores, constant(SCALE)), additive(causal())), 3), v)


def with_sinks(q: Value, k: Value, v: Value, positions: Input) -> Value:
    k, v = repeat_kv(k, GROUPS), repeat_kv(v, GROUPS)
    scores = Add(Mul(Matmul(q, keys(k)), constant(SCALE)), additive(causal()))
    column = Broadcast(Reshape(constant(SINKS, "f32"), (1, HEADS, 1, 1)), (1, HEADS, S, 1))
    both = Concat((scores, column), 3)
    both = Sub(both, Max(both, (3,)))
    return finish(Slice(Softmax(both, 3), 3, 0, S), v)


PLAIN = Mask(True, 0, None)
Expected = tuple[Attend, Mask, float]
FORMS: dict[str, Expected] = {
    "plain": (written(), PLAIN, 0.0),
    "divided": (written(scores=lambda s: Div(s, constant(DIM**0.5))), PLAIN, 0.0),
    "scaled before": (scaled_before, PLAIN, 0.0),
    "scaled after the mask": (
        written(lambda s: Add(s, additive(causal())), lambda s: Mul(s, constant(SCALE))),
        PLAIN,
        0.0,
    ),
    "filled": (written(mask=lambda s: Where(causal(), s, constant(-np.inf))), PLAIN, 0.0),
    "by position input": (by_position_input, PLAIN, 0.0),
    "triangle table": (written(mask=triangle_table), PLAIN, 0.0),
    "triangle table with a far window": (written(mask=stored_band), Mask(True, 40, None), 0.0),
    "raw exponentials": (written(softmax=raw_softmax), PLAIN, 0.0),
    "reciprocal": (written(softmax=reciprocal_softmax), PLAIN, 0.0),
    "window": (written(mask=lambda s: Add(s, additive(And(causal(), window(5))))), Mask(True, 5, None), 0.0),
    "window of 1": (written(mask=lambda s: Add(s, additive(And(causal(), window(1))))), Mask(True, 1, None), 0.0),
    # No query of so short a sequence is as far from a key.
    "far window": (written(mask=lambda s: Add(s, additive(And(causal(), window(4096))))), PLAIN, 0.0),
    "softcap": (written(softcapped), PLAIN, 3.0),
    "softcap and window": (
        written(softcapped, lambda s: Add(s, additive(And(causal(), window(3))))),
        Mask(True, 3, None),
        3.0,
    ),
    "ALiBi by key": (written(mask=alibi_by_key), Mask(True, 0, tuple(SLOPES)), 0.0),
    "ALiBi by distance": (written(mask=alibi_by_distance), Mask(True, 0, tuple(SLOPES)), 0.0),
    "flat heads": (flat_heads, PLAIN, 0.0),
    "grouped products": (grouped_products, PLAIN, 0.0),
    "rotated after repeating": (rotated_after_repeating, PLAIN, 0.0),
    "sinks": (with_sinks, PLAIN, 0.0),
    "sees everything": (written(mask=lambda s: s), Mask(False, 0, None), 0.0),
}


def assert_same(before: Graph, after: Graph) -> None:
    load = random_weights(before)
    for length in (2, 9, 33, 57):
        tokens = np.random.default_rng(length).integers(0, 29, length).tolist()
        found, expected = (run_sequence(graph, load, tokens) for graph in (after, before))
        # f64 in another order; constants such as 1/sqrt(8) are f32 on both sides.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("canonical", [False, True], ids=["as-lifted", "canonical"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_attention(name: str, canonical: bool) -> None:
    attend, mask, softcap = FORMS[name]
    before = decoder(attend=attend)
    if canonical:
        before, _ = run_passes(before, [Canonicalize()])
    after, reports = run_passes(before, [FuseRope(), FuseAttention()])
    assert reports[1].refusals == []
    attentions = [op for op in after.ops if isinstance(op, Attention)]
    assert len(attentions) == 2 and not any(isinstance(op, (Softmax, Matmul, Exp)) for op in after.ops)
    for op in attentions:
        assert op.k.shape == op.v.shape == (1, S, KV_HEADS, DIM)
        assert (op.causal, op.window) == (mask.causal, mask.window)
        assert op.scale == pytest.approx(SCALE, rel=1e-6) and op.softcap == pytest.approx(softcap, rel=1e-6)
        assert (op.slopes is None) == (mask.slopes is None) and (op.sinks is None) == (name != "sinks")
        if mask.slopes is not None:
            assert op.slopes.value.array.tolist() == list(mask.slopes)  # type: ignore[union-attr]
    assert_same(before, after)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "sees everything"])
def test_the_paged_graph_of_every_form_means_the_same(name: str) -> None:
    before = decoder(attend=FORMS[name][0])
    passes = [FuseRope(), FuseAttention(), FlattenTokens(), InsertKVCache(), SelectRows()]
    after, _ = run_passes(before, passes)
    assert sum(isinstance(op, PagedAttention) for op in after.ops) == 2
    load = random_weights(before)
    sequences = [np.random.default_rng(i).integers(0, 29, length).tolist() for i, length in enumerate((57, 7))]
    found = run_steps(after, load, sequences, [[(1, 1), (0, 33)], [(0, 23), (1, 5)], [(1, 1), (0, 1)]])
    for own, logits in zip(sequences, found, strict=True):
        np.testing.assert_allclose(logits, run_sequence(before, load, own), rtol=0, atol=1e-11)


def test_multi_query_products_broadcast_one_key_head() -> None:
    def attend(q: Value, k: Value, v: Value, positions: Input) -> Value:
        return finish(Softmax(Add(Mul(Matmul(q, keys(k)), constant(SCALE)), additive(causal())), 3), v)

    before = decoder(attend=attend, kv_heads=1)
    after, _ = run_passes(before, [FuseAttention()])
    assert [op.k.shape for op in after.ops if isinstance(op, Attention)] == [(1, S, 1, DIM)] * 2
    assert_same(before, after)


@pytest.mark.parametrize("values", ["in the same order", "in groups"])
def test_heads_that_are_shared_in_another_order_are_not_taken_for_groups(values: str) -> None:
    def tiled(x: Value) -> Value:
        """Key heads 0, 1, 0, 1 where groups are 0, 0, 1, 1."""
        return Reshape(
            Broadcast(Reshape(x, (1, 1, KV_HEADS, S, DIM)), (1, GROUPS, KV_HEADS, S, DIM)), (1, HEADS, S, DIM)
        )

    def grouped(x: Value) -> Value:
        return Reshape(
            Broadcast(Reshape(x, (1, KV_HEADS, 1, S, DIM)), (1, KV_HEADS, GROUPS, S, DIM)), (1, HEADS, S, DIM)
        )

    def attend(q: Value, k: Value, v: Value, positions: Input) -> Value:
        scores = Mul(Matmul(q, keys(tiled(k))), constant(SCALE))
        shared = tiled(v) if values == "in the same order" else grouped(v)
        return finish(Softmax(Add(scores, additive(causal())), 3), shared)

    before = decoder(attend=attend)
    after, _ = run_passes(before, [FuseAttention()])
    assert [op.k.shape for op in after.ops if isinstance(op, Attention)] == [(1, S, HEADS, DIM)] * 2
    assert_same(before, after)


def refusal(attend: Attend) -> str:
    """The reason for leaving the attention of a decoder alone; the graph must be untouched."""
    before = decoder(attend=attend)
    report = Report()
    after = FuseAttention().run(before, report)
    assert after.ops == before.ops and len(report.refusals) == 2
    return report.refusals[0][1]


def test_a_bias_that_depends_on_places_is_refused_with_its_first_pair() -> None:
    def curved(s: Value) -> Value:
        at = Cast(Iota(S), "f32")
        places = Mul(Reshape(at, (1, 1, 1, S)), Reshape(at, (1, 1, S, 1)))
        return Add(Add(s, Mul(places, constant(0.01))), additive(causal()))

    assert "no slope times a distance" in refusal(written(mask=curved))


def test_a_mask_that_is_not_causal_is_refused_with_its_first_pair() -> None:
    def hole(s: Value) -> Value:
        not_key_2 = Equal(Equal(Reshape(Iota(S), (1, S)), constant(2)), constant(False))
        return Add(s, additive(And(causal(), not_key_2)))

    assert "the mask is not causal" in refusal(written(mask=hole))


def test_a_mask_from_weights_is_refused_unless_they_may_be_read() -> None:
    def stored(s: Value) -> Value:
        table = weight("bias", 1, 1, 64, 64)
        return Where(Greater(Slice(Slice(table, 2, 0, S), 3, 0, S), constant(0.5)), s, constant(-1e9))

    assert "weight bias" in refusal(written(mask=stored))
    before = decoder(attend=written(mask=stored))
    with reading(lambda name: np.tril(np.ones((1, 1, 64, 64), np.float32))):
        after = FuseAttention().run(before, Report())
    assert sum(isinstance(op, Attention) and op.causal for op in after.ops) == 2


def test_probabilities_that_are_used_twice_are_refused() -> None:
    def attend(q: Value, k: Value, v: Value, positions: Input) -> Value:
        k, v = repeat_kv(k, GROUPS), repeat_kv(v, GROUPS)
        p = Softmax(Add(Mul(Matmul(q, keys(k)), constant(SCALE)), additive(causal())), 3)
        return finish(p, Add(v, Matmul(p, v)))

    assert "used 2 times" in refusal(attend)


def test_a_bias_that_is_made_of_tokens_is_refused() -> None:
    def attend(q: Value, k: Value, v: Value, positions: Input) -> Value:
        k, v = repeat_kv(k, GROUPS), repeat_kv(v, GROUPS)
        scores = Mul(Matmul(q, keys(k)), constant(SCALE))
        return finish(Softmax(Add(Add(scores, Max(q, (3,))), additive(causal())), 3), v)

    assert "t.max" in refusal(attend)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    window=st.integers(0, 45),
    slopes=st.lists(st.sampled_from([0.0, 0.5, 0.25, 1.0 / 3.0]), min_size=1, max_size=3),
    shift=st.floats(-3, 3),
)
def test_masks_are_what_they_are_made_of(size: int, window: int, slopes: list[float], shift: float) -> None:
    at = np.arange(size)
    seen = at[None] <= at[:, None]
    if window:
        seen &= at[None] > at[:, None] - window
    bias = np.where(seen, np.asarray(slopes)[:, None, None] * at[None, None] + shift * at[:, None], -np.inf)
    mask = describe_mask(bias, at)
    assert mask.window == (window if 0 < window < size else 0)
    assert mask.causal == (size > 1)
    # One visible key a query says nothing about slopes.
    if size > 1 and window != 1:
        expected = tuple(slopes) if any(slopes) else (0.0,) * len(slopes)
        assert (mask.slopes or (0.0,) * len(slopes)) == pytest.approx(expected, abs=1e-12)


def test_heads_with_different_masks_are_refused() -> None:
    at = np.arange(4)
    bias = np.where(at[None] <= at[:, None], 0.0, -np.inf)
    with pytest.raises(Unrecognised, match="head 1 and head 0 differ"):
        describe_mask(np.stack([bias, np.zeros((4, 4))]), at)


def test_a_mask_is_a_value() -> None:
    assert dataclasses.replace(PLAIN, window=3) == Mask(True, 3, None)
