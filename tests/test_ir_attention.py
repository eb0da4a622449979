"""`llm.attention` with a bias and with windows on both sides: against one query, one key, one head at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmc.compiler.ir.attention import PART, TILE
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import constant
from llmc.compiler.ir.encoded import PAGE, Pages
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import topological
from llmc.compiler.ir.llm import Attention, PagedAttention
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Max
from llmc.compiler.ir.types import KV, Array, Tensor, precise
from llmc.errors import IRError

RNG = np.random.default_rng(11)
HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 2, 5, 3


def operands(batch: tuple[int, ...], queries: int, keys: int) -> tuple[Array, Array, Array]:
    sizes = ((queries, HEADS, DIM), (keys, KV_HEADS, DIM), (keys, KV_HEADS, VALUE_DIM))
    q, k, v = (RNG.standard_normal((*batch, *size)) for size in sizes)
    return q, k, v


def by_hand(q: Array, k: Array, v: Array, bias: Array, causal: bool, window: int, scale: float) -> Array:
    """[..., Q, heads, value_dim]; bias [..., heads, Q, K]. Sums over what a query sees, in plain loops."""
    result = np.zeros((*q.shape[:-1], v.shape[-1]))
    for place in np.ndindex(q.shape[:-1]):
        *batch, query, head = place
        at = k.shape[-3] - q.shape[-3] + query
        total, row = 0.0, np.zeros(v.shape[-1])
        for key in range(k.shape[-3]):
            own = (*batch, key, head // (HEADS // KV_HEADS))
            near = not window or abs(at - key) < window
            if near and not (causal and key > at):
                weight = math.exp(scale * float(q[place] @ k[own]) + bias[(*batch, head, query, key)])
                total, row = total + weight, row + weight * v[own]
        result[place] = row / total if total else row
    return result


def both_ways(op: Attention, inputs: dict[Value, Array]) -> list[Array]:
    """The op evaluated, and its decomposition evaluated, in f64."""

    def no_params(name: str) -> Array:
        raise AssertionError(name)

    decomposed = op.decompose()
    assert decomposed.type == op.type
    with precise(), np.errstate(invalid="raise"):
        found = evaluate_values([op, decomposed], inputs, no_params, {})
    return [np.asarray(found["0"]), np.asarray(found["1"])]


def attention(arrays: tuple[Array, ...], bias: Array | None, **options: object) -> tuple[Attention, dict[Value, Array]]:
    values = [Input(name, Tensor(a.shape, "f32")) for name, a in zip("qkv", arrays, strict=True)]
    inputs: dict[Value, Array] = dict(zip(values, arrays, strict=True))
    given: Value | None = None
    if bias is not None:
        given = Input("bias", Tensor(bias.shape, "f32"))
        inputs[given] = bias
    return Attention(*values, None, None, given, scale=0.4, **options), inputs  # type: ignore[arg-type]


def test_parts_of_a_context_hold_whole_tiles_and_pages() -> None:
    assert PART % TILE == PART % PAGE == 0
    assert TILE & (TILE - 1) == 0  # so that tiles of half the size, and half of that, end where parts do


SIZES = [(1, 1), (1, 7), (7, 7), (7, 1), (31, 33), (33, 31)]


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (False, 1), (False, 4), (True, 4), (True, 0)])
def test_windows_look_back_and_where_not_causal_ahead(queries: int, keys: int, causal: bool, window: int) -> None:
    arrays = operands((), queries, keys)
    none = np.zeros((HEADS, queries, keys))
    expected = by_hand(*arrays, none, causal, window, 0.4)
    for found in both_ways(*attention(arrays, None, causal=causal, window=window)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


BIASES = [(7, 9), (1, 9), (7, 1), (HEADS, 1, 9), (HEADS, 7, 9), (3, 1, 1, 9), (3, HEADS, 7, 9), (1, HEADS, 1, 1), ()]


@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_is_added_however_it_broadcasts(shape: tuple[int, ...], causal: bool) -> None:
    arrays, bias = operands((3,), 7, 9), RNG.standard_normal(shape)
    expected = by_hand(*arrays, np.broadcast_to(bias, (3, HEADS, 7, 9)), causal, 3 * causal, 0.4)
    for found in both_ways(*attention(arrays, bias, causal=causal, window=3 * causal)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_attention_without_options_is_causal_and_neither_scaled_nor_cut() -> None:
    arrays = operands((), 33, 33)
    expected = by_hand(*arrays, np.zeros((HEADS, 33, 33)), True, 0, 1.0)
    q, k, v = (Input(name, Tensor(x.shape, "f32")) for name, x in zip("qkv", arrays, strict=True))
    given: dict[Value, object] = dict(zip((q, k, v), arrays, strict=True))
    for found in both_ways(Attention(q, k, v), given):  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    kind = KV(KV_HEADS, DIM, VALUE_DIM, "f32")
    cache, tiles, table = Input("cache", kind), constant([[0, 0, 33, 0]], "i32"), constant([[1, 0]], "i32")
    slots = (np.arange(33) + PAGE) % (2 * PAGE)
    op = PagedAttention(q, cache, tiles, table)
    with precise():
        given[cache] = Pages.empty(kind, 2).append(arrays[1], arrays[2], slots)
        found = np.asarray(evaluate_values([op], given, lambda name: np.zeros(0), {})["0"])  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(2,), (2, 1), (1, 2, 3)], ids=str)
def test_a_batch_of_any_rank_is_each_of_its_sequences(batch: tuple[int, ...]) -> None:
    arrays = operands(batch, 3, 5)
    expected = by_hand(*arrays, np.zeros((*batch, HEADS, 3, 5)), True, 0, 0.4)
    for found in both_ways(*attention(arrays, None)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("queries", "keys", "options", "plain"),
    [
        (7, 7, {}, True),
        (7, 7, {"window": 3}, True),
        (7, 9, {"causal": False}, True),
        (9, 7, {"causal": False}, True),
        (9, 7, {}, False),
        (9, 7, {"causal": False, "window": 3}, False),
    ],
)
def test_rows_without_a_key_are_looked_for_where_there_may_be_some(
    queries: int, keys: int, options: dict[str, object], plain: bool
) -> None:
    op, _ = attention(operands((), queries, keys), None, **options)
    assert any(isinstance(value, Max) for value in topological([op.decompose()])) != plain


def test_a_bias_that_hides_every_key_gives_zeros() -> None:
    arrays, bias = operands((), 7, 9), np.zeros((7, 9))
    bias[2, :4], bias[4] = -np.inf, -np.inf
    expected = by_hand(*arrays, np.broadcast_to(bias, (HEADS, 7, 9)), False, 0, 0.4)
    assert not expected[4].any() and expected[2].all()
    for found in both_ways(*attention(arrays, bias, causal=False)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [1, 2])
def test_heads_share_keys_in_groups_of_any_size(shared: int) -> None:
    arrays = operands((2,), 7, 9)
    q = np.concatenate(arrays[:1] * shared, axis=-2)[..., : 2 * shared, :]
    for found in both_ways(*attention((q, *arrays[1:]), None)):
        for head in range(2 * shared):
            alone = (q[..., head : head + 1, :], *(x[..., head // shared : head // shared + 1, :] for x in arrays[1:]))
            np.testing.assert_allclose(
                found[..., head, :], both_ways(*attention(alone, None))[0][..., 0, :], rtol=1e-12
            )


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_scores_far_from_0_are_shared_as_those_near_it(shift: float) -> None:
    arrays = operands((), 7, 9)
    plain = both_ways(*attention(arrays, None))[0]
    for found in both_ways(*attention(arrays, np.full((7, 9), shift))):
        # Scores of 1000 have steps of 1e-13.
        np.testing.assert_allclose(found, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtypes", [("f32", "f16", "f16"), ("f16", "f32", "f32"), ("f32", "f32", "bf16")], ids=str)
def test_keys_and_values_of_another_dtype_than_queries(dtypes: tuple[str, str, str]) -> None:
    arrays = operands((), 7, 9)
    values = [Input(n, Tensor(x.shape, d)) for n, x, d in zip("qkv", arrays, dtypes, strict=True)]
    sinks, slopes, bias = (
        Input(n, Tensor((HEADS, *more), "bf16")) for n, more in (("s", ()), ("l", ()), ("b", (7, 9)))
    )
    given = (*arrays, *(RNG.standard_normal(x.shape) for x in (sinks, slopes, bias)))
    op = Attention(*values, sinks, slopes, bias, scale=0.4, window=4)
    first, second = both_ways(op, dict(zip((*values, sinks, slopes, bias), given, strict=True)))
    np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-12)


def test_a_capped_score_is_capped_before_the_bias() -> None:
    arrays, bias = operands((), 7, 9), RNG.standard_normal((HEADS, 7, 9))
    bias[:, :, 3] = -np.inf
    op, inputs = attention(arrays, bias, causal=False, softcap=0.5)
    first, second = both_ways(op, inputs)
    np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-12)
    without = {**inputs, op.v: inputs[op.v].copy()}
    without[op.v][3] += 100  # a hidden key's value does not matter
    np.testing.assert_array_equal(both_ways(op, without)[0], first)


def test_a_bias_of_a_symbolic_size_fits() -> None:
    size = symbol("S", 2, 64)
    q, k, v = (Input(n, Tensor((1, size, h, DIM), "f32")) for n, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
    bias = Input("bias", Tensor((HEADS, size, size), "f32"))
    op = Attention(q, k, v, None, None, bias, causal=False)
    assert op.decompose().type == op.type == Tensor((1, size, HEADS, DIM), "f32")


@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (7, 0), (3, 2)])
@pytest.mark.parametrize("window", [0, 3])
def test_queries_of_a_symbolic_size_stand_at_the_last_keys(queries: int, keys: int, window: int) -> None:
    """`keys` more than there are queries."""
    t, s = symbol("T", 1), symbol("S", 0)
    arrays = operands((), queries, queries + keys)
    values = [
        Input(n, Tensor((size, *x.shape[1:]), "f32"))
        for n, x, size in zip("qkv", arrays, (t, t + s, t + s), strict=True)
    ]
    op = Attention(*values, scale=0.4, window=window)
    expected = by_hand(*arrays, np.zeros((HEADS, queries, queries + keys)), True, window, 0.4)
    given: dict[Value, Array] = dict(zip(values, arrays, strict=True))
    with precise():
        found = evaluate_values([op, op.decompose()], given, lambda name: np.zeros(0), {"T": queries, "S": keys})
    for one in found.values():
        np.testing.assert_allclose(np.asarray(one), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_paged_attention_to_both_sides_is_attention_over_each_sequence(biased: bool) -> None:
    """Sequences of 37 and 3 tokens, in tiles of 16 at most, at pages in no order; a bias by distance up to 40."""
    lengths, span = (37, 3), 40
    parts = [operands((), n, n) for n in lengths]
    kind = KV(KV_HEADS, DIM, VALUE_DIM, "f32")
    table, starts = np.array([[2, 0], [1, 0]], np.int32), np.array([0, *np.cumsum(lengths)], np.int32)
    bias = RNG.standard_normal((HEADS, 2 * span - 1)) if biased else None
    with precise():
        pages = Pages.empty(kind, 3)
        for i, (_, k, v) in enumerate(parts):
            at = np.arange(lengths[i])
            pages = pages.append(k, v, table[i, at // PAGE] * PAGE + at % PAGE)
    tiles = [(i, starts[i] + p, min(16, n - p), p) for i, n in enumerate(lengths) for p in range(0, n, 16)]
    arrays = [np.concatenate([q for q, _, _ in parts]), np.array(tiles, np.int32), table, starts]
    names = [Input(n, Tensor(x.shape, d)) for n, x, d in zip("qtbs", arrays, ("f32", "i32", "i32", "i32"), strict=True)]
    cache, added = Input("cache", kind), Input("bias", Tensor((HEADS, 2 * span - 1), "f32"))
    q, tile, block_table, rows = names
    op = PagedAttention(
        q, cache, tile, block_table, starts=rows, bias=added if biased else None, scale=0.4, causal=False
    )
    given: dict[Value, object] = {**dict(zip(names, arrays, strict=True)), cache: pages, added: bias}
    with precise():
        found = np.asarray(evaluate_values([op], given, lambda name: np.zeros(0), {})["0"])  # type: ignore[arg-type]
    for i, n in enumerate(lengths):
        distance = np.arange(n)[None, :] - np.arange(n)[:, None] + span - 1
        expected = by_hand(*parts[i], np.zeros((HEADS, n, n)) if bias is None else bias[:, distance], False, 0, 0.4)
        np.testing.assert_allclose(found[starts[i] : starts[i + 1]], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 7, 9), (7, 8), (1, 3, HEADS, 7, 9), (2, HEADS, 7, 9)], ids=str)
def test_a_bias_that_does_not_fit_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(IRError, match="broadcast"):
        attention(operands((3,), 7, 9), np.zeros(shape))


def test_a_bias_of_bools_is_an_error() -> None:
    q, k, v = (Input(n, Tensor((7, HEADS, DIM), "f32")) for n in "qkv")
    with pytest.raises(IRError, match="must be floats"):
        Attention(q, k, v, None, None, constant(np.ones((7, 7), bool), "bool"))
