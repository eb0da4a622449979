"""fuse-attention where a mask is no function of positions: batches, masks as inputs, static sizes, relative biases."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.ragged import span_of
from llmc.compiler.ir.types import Array, Tensor, precise
from llmc.compiler.passes.distance_tables import table_of
from llmc.compiler.passes.distances import Distances
from llmc.compiler.passes.fuse_attention import FuseAttention
from llmc.compiler.passes.manager import Report
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.pair_functions import PairReader
from llmc.compiler.passes.probe import Probe

B, S = symbol("B", 1, 8), symbol("S", 1, 512)
HEADS, KV_HEADS, DIM = 4, 2, 8
Size = int | Dim
MaskOf = Callable[[Value], Value]
LEAST = float(np.finfo(np.float32).min)


def inputs(batch: Size, queries: Size, keys: Size, kv_heads: int = KV_HEADS) -> tuple[Input, Input, Input]:
    """q [B, heads, Q, dim], k and v [B, kv_heads, K, dim]."""
    shapes = ((batch, HEADS, queries, DIM), (batch, kv_heads, keys, DIM), (batch, kv_heads, keys, DIM))
    q, k, v = (Input(name, Tensor(shape, "f32")) for name, shape in zip("qkv", shapes, strict=True))
    return q, k, v


def repeated(x: Value) -> Value:
    """[B, kv_heads, K, dim] -> [B, heads, K, dim]"""
    batch, heads, *rest = x.shape
    group = HEADS // KV_HEADS
    wide = s.Broadcast(s.Reshape(x, (batch, heads, 1, *rest)), (batch, heads, group, *rest))
    return s.Reshape(wide, (batch, HEADS, *rest))


def scores(q: Value, k: Value) -> Value:
    half = e.constant(DIM**-0.25)
    return s.Matmul(e.Mul(q, half), e.Mul(s.Transpose(k, (0, 1, 3, 2)), half))


def attention_graph(batch: Size, queries: Size, keys: Size, mask: MaskOf, *extra: Input) -> Graph:
    """Grouped attention of static or free sizes, with `mask` between the products and the softmax."""
    q, k, v = inputs(batch, queries, keys)
    shares = s.Softmax(mask(scores(q, repeated(k))), 3)
    return Graph("main", (q, k, v, *extra), (("out", s.Matmul(shares, repeated(v))),))


def fused(graph: Graph) -> tuple[Graph, Report]:
    report = Report()
    return FuseAttention().run(graph, report), report


def the_attention(graph: Graph) -> Attention:
    """The one attention of a graph in which nothing is left of what it was made of."""
    found = [op for op in graph.ops if isinstance(op, Attention)]
    assert len(found) == 1 and not any(isinstance(op, (s.Softmax, s.Matmul)) for op in graph.ops)
    return found[0]


def arrays_for(graph: Graph, sizes: dict[str, int], seed: int = 0) -> dict[str, Array]:
    """Random inputs; masks of 0 and 1 for integers and bools. At least the first key is seen."""
    generator = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for value in graph.inputs:
        shape = tuple(dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape)
        if value.dtype == "f32":
            found[value.name] = generator.standard_normal(shape)
        else:
            seen = generator.random(shape) < 0.6
            seen[..., 0] = True
            found[value.name] = seen.astype(value.dtype.replace("i64", "int64"))
    return found


def assert_same(before: Graph, after: Graph, **sizes: int) -> None:
    given = arrays_for(before, sizes)

    def weights(name: str) -> Array:
        param = next(p for p in before.params if p.name == name)
        return np.random.default_rng(len(name)).standard_normal(tuple(int(d) for d in param.shape))

    with precise():
        expected, found = (np.asarray(evaluate(graph, given, weights)["out"]) for graph in (before, after))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def padding(mask: Value) -> MaskOf:
    """A mask i64 [B, K] of ones and zeros, as BERT adds it."""
    batch, keys = mask.shape
    hidden = e.Mul(e.Sub(e.constant(1.0), e.Cast(s.Reshape(mask, (batch, 1, 1, keys)), "f32")), e.constant(-1e4))
    return lambda x: e.Add(x, hidden)


@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(B, S, S), (3, S, S), (B, 7, 7), (3, 5, 9), (1, 1, 33)], ids=str
)
def test_a_padding_mask_is_a_bias(batch: Size, queries: Size, keys: Size) -> None:
    mask = Input("mask", Tensor((batch, keys), "i64"))
    before = attention_graph(batch, queries, keys, padding(mask), mask)
    after, report = fused(before)
    op = the_attention(after)
    assert report.hits == {"attention with a bias": 1} and not report.refusals
    assert not op.causal and op.window == 0 and op.scale == pytest.approx(DIM**-0.5, rel=1e-6)
    assert op.bias is not None and op.bias.shape == (batch, 1, 1, keys), "the bias is as small as the mask"
    assert op.k.shape == op.v.shape == (batch, keys, KV_HEADS, DIM), "key heads are shared, not repeated"
    assert_same(before, after, B=3, S=9)


SHAPES = [(5, 9), (1, 9), (HEADS, 5, 9), (HEADS, 1, 1), (3, 1, 5, 9), (3, HEADS, 5, 9), (9,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bool", "f32"])
def test_masks_that_are_inputs_broadcast_in_any_way(shape: tuple[int, ...], dtype: str) -> None:
    mask = Input("mask", Tensor(shape, dtype))

    def masked(x: Value) -> Value:
        return e.Add(x, mask) if dtype == "f32" else e.Where(mask, x, e.constant(-math.inf))

    before = attention_graph(3, 5, 9, masked, mask)
    after, _ = fused(before)
    bias = the_attention(after).bias
    assert bias is not None and bias.shape == shape
    assert_same(before, after)


def test_products_over_a_batch_of_heads_are_attention_too() -> None:
    """baddbmm: [B * heads, Q, dim] with a free batch."""
    q, k, v = inputs(B, S, S, HEADS)
    flat = [s.Reshape(x, (B * HEADS, S, DIM)) for x in (q, k, v)]
    mask = Input("mask", Tensor((B, S), "i64"))
    raw = s.Matmul(flat[0], s.Transpose(flat[1], (0, 2, 1)))
    added = padding(mask)(s.Reshape(raw, (B, HEADS, S, S)))
    out = s.Matmul(s.Softmax(s.Reshape(added, (B * HEADS, S, S)), 2), flat[2])
    before = Graph("main", (q, k, v, mask), (("out", s.Reshape(out, (B, HEADS, S, DIM))),))
    after, _ = fused(before)
    the_attention(after)
    assert_same(before, after, B=3, S=7)


def stored(visible: Array, hidden: float = -math.inf) -> MaskOf:
    bias = e.constant(np.where(visible, 0.0, hidden), "f32")
    return lambda x: e.Add(x, bias)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 9), (1, 6), (31, 33)])
@pytest.mark.parametrize("hidden", [-math.inf, LEAST, -1e4], ids=str)
def test_known_masks_of_static_sizes_are_known_by_what_they_mean(queries: int, keys: int, hidden: float) -> None:
    """The last query stands at the last key; a mask that starts in the other corner stays a bias."""
    back = np.arange(queries)[:, None] + keys - queries - np.arange(keys)
    near = 3
    wanted = {
        (False, 0): np.ones(back.shape, bool),
        (queries + keys > 2 and queries > 1, 0): back >= 0,
        (True, near): (back >= 0) & (back < near),
    }
    for (causal, window), visible in wanted.items():
        before = attention_graph(2, queries, keys, stored(visible, hidden))
        after, _ = fused(before)
        op = the_attention(after)
        assert (op.causal, op.window, op.bias) == (causal or not visible.all(), window, None)
    corner = attention_graph(2, 5, 9, stored(np.tril(np.ones((5, 9), bool)), hidden))
    after, _ = fused(corner)
    assert the_attention(after).bias is not None
    assert_same(corner, after)


def test_a_row_that_sees_nothing_keeps_the_mask_a_bias() -> None:
    visible = np.tril(np.ones((5, 5), bool))
    visible[2] = False
    after, _ = fused(attention_graph(2, 5, 5, stored(visible)))
    assert the_attention(after).bias is not None


@pytest.mark.parametrize("width", [1, 4, 65])
def test_a_window_on_both_sides(width: int) -> None:
    def near(x: Value) -> Value:
        at = s.Iota(S)
        apart = e.Abs(e.Sub(s.Reshape(at, (1, S)), s.Reshape(at, (S, 1))))
        return e.Where(e.LessEqual(apart, e.constant(width)), x, e.constant(LEAST))

    before = attention_graph(B, S, S, near)
    after, _ = fused(before)
    op = the_attention(after)
    assert (op.causal, op.window, op.bias) == (False, width + 1, None)
    assert_same(before, after, B=2, S=9)


def distances() -> Value:
    at = s.Iota(S)
    return e.Sub(s.Reshape(at, (1, S)), s.Reshape(at, (S, 1)))


def bucketed(distance: Value) -> Value:
    """Raffel et al. (2020): near distances each have a bucket of 8 on each side, far ones share them by their log."""
    size = e.Abs(distance)
    ratio = e.Log(e.Div(e.Cast(e.Maximum(size, e.constant(1)), "f32"), e.constant(4.0)))
    far = e.Minimum(e.constant(7), e.Add(e.constant(4), e.Cast(e.Mul(ratio, e.constant(4 / math.log(32))), "i64")))
    side = e.Mul(e.Cast(e.Greater(distance, e.constant(0)), "i64"), e.constant(8))
    return e.Add(side, e.Where(e.Less(size, e.constant(4)), size, far))


def relative(x: Value) -> Value:
    table = Param("table", Tensor((16, HEADS), "f32"))
    return e.Add(x, s.Reshape(s.Transpose(s.Gather(table, bucketed(distances()), 0), (2, 0, 1)), (1, HEADS, S, S)))


def test_a_relative_bias_of_weights_is_a_bias_and_a_table() -> None:
    before = attention_graph(1, S, S, relative)
    after, _ = fused(before)
    op = the_attention(after)
    assert op.bias is not None and op.bias.shape == (1, HEADS, S, S)
    assert_same(before, after, S=150)
    probe = Probe(after, S)
    reader = PairReader(probe, 200, size=S)
    distances = Distances(reader)
    table = table_of(distances, distances.by_distance(reader.pair(op.bias)), HEADS)
    span = span_of(table)
    assert table.shape == (HEADS, 2 * span - 1) and 200 <= span < 200 + PAGE
    found, dense = probe.evaluate([table, op.bias], 200, stand_ins=True)
    at = np.arange(200)
    np.testing.assert_array_equal(found[:, at[None] - at[:, None] + span - 1], dense[0])


def test_what_depends_on_places_is_no_table() -> None:
    def placed(x: Value) -> Value:
        at = e.Cast(s.Iota(S), "f32")
        return e.Add(x, e.Mul(s.Reshape(at, (1, S)), s.Reshape(at, (S, 1))))

    after, _ = fused(attention_graph(1, S, S, placed))
    op = the_attention(after)
    reader = PairReader(Probe(after, S), 50, size=S)
    assert op.bias is not None and isinstance(Distances(reader).found_by_distance(reader.pair(op.bias)), Unrecognised)


def guarded(condition: Callable[[Value], Value]) -> Graph:
    """Attention with a mask [Q, K] as an input, whose shares are zero where a condition of the scores holds."""
    q, k, v = inputs(2, 5, 7)
    mask = Input("mask", Tensor((5, 7), "bool"))
    masked = e.Where(mask, scores(q, repeated(k)), e.constant(-math.inf))
    shares = s.Softmax(masked, 3)
    kept = e.Where(condition(masked), e.constant(0.0), shares)
    return Graph("main", (q, k, v, mask), (("out", s.Matmul(kept, repeated(v))),))


def test_a_guard_for_rows_that_see_nothing_vanishes() -> None:
    before = guarded(lambda x: e.Equal(s.Max(x, (3,)), e.constant(-math.inf)))
    after, report = fused(before)
    the_attention(after)
    assert not report.refusals
    given = arrays_for(before, {})
    given["mask"][2] = False
    with precise(), np.errstate(invalid="ignore"):
        expected, found = (np.asarray(evaluate(g, given, lambda name: given[name])["out"]) for g in (before, after))
    assert not expected[:, :, 2].any()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_other_guards_are_refused() -> None:
    for condition in (
        lambda x: e.Less(s.Max(x, (3,)), e.constant(0.5)),
        lambda x: e.Equal(s.Min(x, (3,)), e.constant(-math.inf)),
    ):
        after, report = fused(guarded(condition))
        assert not any(isinstance(op, Attention) for op in after.ops)
        assert "set to zero in rows that see keys" in report.refusals[0][1]


def test_a_guard_for_what_is_not_a_number_vanishes() -> None:
    q, k, v = inputs(2, 5, 7)
    shares = s.Softmax(scores(q, repeated(k)), 3)
    kept = e.Where(e.NotEqual(shares, shares), e.constant(0.0), shares)
    before = Graph("main", (q, k, v), (("out", s.Matmul(kept, repeated(v))),))
    after, _ = fused(before)
    the_attention(after)
    assert_same(before, after)


def test_shares_that_are_an_output_are_refused() -> None:
    before = attention_graph(2, 5, 7, lambda x: x)
    shares = next(op for op in before.ops if isinstance(op, s.Softmax))
    after, report = fused(before.replace_outputs((*before.outputs, ("shares", shares))))
    assert not any(isinstance(op, Attention) for op in after.ops)
    assert report.refusals[0][1] == "its probabilities are an output of the graph"


def test_a_scale_that_is_an_input_is_refused() -> None:
    scale = Input("scale", Tensor((1, 1, 5, 7), "f32"))
    _, report = fused(attention_graph(2, 5, 7, lambda x: e.Mul(x, scale), scale))
    assert "scale differs from place to place" in report.refusals[0][1]


@pytest.mark.parametrize("size", [S, 7], ids=str)
def test_slopes_of_a_batch_are_not_those_of_heads(size: Size) -> None:
    """As many sequences as heads, each with a slope of its own."""
    at = s.Iota(size)
    back = e.Cast(e.Sub(s.Reshape(at, (1, size)), s.Reshape(at, (size, 1))), "f32")
    numbers = [0.5, 0.25, 0.125, 0.0625]
    for shape, known in (((HEADS, 1, 1, 1), False), ((1, HEADS, 1, 1), True)):
        slopes = e.constant(np.reshape(numbers, shape), "f32")
        before = attention_graph(HEADS, size, size, lambda x: e.Add(x, e.Mul(slopes, back)))  # noqa: B023
        after, _ = fused(before)
        op = the_attention(after)
        assert (op.slopes is not None) == known == (op.bias is None)
        assert_same(before, after, S=9)


def test_a_mask_that_is_spread_over_a_batch_is_a_mask() -> None:
    at = s.Iota(S)
    seen = e.LessEqual(s.Reshape(at, (1, S)), s.Reshape(at, (S, 1)))
    for batch in (B, 3):
        spread = s.Broadcast(seen, (batch, 1, S, S))
        before = attention_graph(batch, S, S, lambda x: e.Where(spread, x, e.constant(LEAST)))  # noqa: B023
        after, _ = fused(before)
        op = the_attention(after)
        assert op.causal and op.bias is None
        assert_same(before, after, S=9, B=2)


@pytest.mark.parametrize("number", [-1e4, -1e9, LEAST], ids=str)
def test_a_row_that_hides_every_key_by_a_number_sees_all_of_them_alike(number: float) -> None:
    mask = Input("mask", Tensor((5, 7), "bool"))
    before = attention_graph(2, 5, 7, lambda x: e.Where(mask, x, e.constant(number)), mask)
    after, _ = fused(before)
    the_attention(after)
    given = arrays_for(before, {})
    given["mask"][2] = False
    with precise():
        expected, found = (np.asarray(evaluate(g, given, lambda name: given[name])["out"]) for g in (before, after))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("number", "known"), [(-1e4, False), (-1e9, False), (LEAST, True), (-math.inf, True)])
def test_a_number_that_hides_beside_another_mask_must_absorb_every_score(number: float, known: bool) -> None:
    """Where all keys are hidden by one of the two, it would matter by which."""
    mask = Input("mask", Tensor((5, 7), "bool"))
    more = Input("more", Tensor((5, 7), "f32"))
    before = attention_graph(2, 5, 7, lambda x: e.Add(e.Where(mask, x, e.constant(number)), more), mask, more)
    after, report = fused(before)
    assert any(isinstance(op, Attention) for op in after.ops) == known
    assert known or "a query which sees no key" in report.refusals[0][1]
    assert_same(before, after)


def test_a_number_that_does_not_hide_is_refused() -> None:
    mask = Input("mask", Tensor((5, 7), "bool"))
    for number in (0.0, -100.0, math.nan):
        _, report = fused(attention_graph(2, 5, 7, lambda x: e.Where(mask, x, e.constant(number)), mask))  # noqa: B023
        assert "does not hide" in report.refusals[0][1]


@pytest.mark.parametrize("size", [8, S])
@pytest.mark.parametrize("mask_of", [
    lambda back, count: e.Where(e.Less(back, count), e.constant(0.0), e.constant(-1e30)),
    lambda back, count: e.Mul(e.Cast(e.Abs(back), "f32"), e.Neg(e.Cast(count, "f32"))),
])  # fmt: skip
def test_a_mask_that_the_size_of_a_batch_decides_stays_a_bias(
    size: Size, mask_of: Callable[[Value, Value], Value]
) -> None:
    at = s.Iota(size, "i64")
    back = e.Sub(s.Reshape(at, (size, 1)), s.Reshape(at, (1, size)))
    count = s.Slice(s.Iota(B + 1), 0, B, B + 1)  # as a number: a size of the batch
    before = attention_graph(B, size, size, lambda raw: e.Add(raw, mask_of(back, count)))
    report = Report()
    after = FuseAttention().run(before, report)
    for batch in (1, 2, 3, 7):
        given = arrays_for(before, {"B": batch, "S": 8})
        found, expected = (evaluate(graph, given, {}.__getitem__) for graph in (after, before))
        np.testing.assert_allclose(found["out"], expected["out"], atol=1e-5)
