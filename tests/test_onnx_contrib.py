"""ONNX Runtime's own attention, rotations and products: each translation gives what ONNX Runtime gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_contrib_tools import Case, Fixed, compare, normal
from transformers.models.t5.modeling_t5 import T5Attention

from llmc.errors import FrontendError

S = {7: "S"}
S_AND_BATCH = {7: "S", 3: "B"}


def choice(*shape: int, high: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).integers(0, high, shape)


# Rotary embedding


def caches(pairs: int) -> list[Fixed]:
    angles = np.arange(40)[:, None] / 100.0 ** (np.arange(pairs) / pairs)[None]
    return [Fixed(np.cos(angles).astype(np.float32)), Fixed(np.sin(angles).astype(np.float32))]


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("layout", ["merged", "heads first", "partial"])
@pytest.mark.parametrize("first", [False, True])
def test_rotary_embedding(interleaved: int, layout: str, first: bool) -> None:
    attributes: dict[str, object] = {"interleaved": interleaved}
    x, pairs = normal(3, 7, 4 * 16), 8
    if layout == "heads first":
        x = normal(3, 4, 7, 16)
    if layout == "partial":
        pairs = 3
        attributes |= {"num_heads": 4, "rotary_embedding_dim": 6}
    at = np.array([5]) if first else choice(3, 7, high=40)
    compare(Case("RotaryEmbedding", [x, at, *caches(pairs)], attributes, symbols=S_AND_BATCH))


@pytest.mark.parametrize(("pairs", "dim"), [(3, 8), (4, 12), (1, 3), (8, 16)])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_the_channels_behind_the_pairs_stay(pairs: int, dim: int, interleaved: int) -> None:
    inputs = [normal(3, 7, 4 * dim), choice(3, 7, high=40), *caches(pairs)]
    attributes = {"interleaved": interleaved, "num_heads": 4, "rotary_embedding_dim": 2 * pairs}
    compare(Case("RotaryEmbedding", inputs, attributes, symbols=S_AND_BATCH))


def test_rotary_embedding_refuses_packed_batches_and_scales() -> None:
    inputs = [normal(1, 7, 64), choice(1, 7, high=40), *caches(8)]
    refused(Case("RotaryEmbedding", inputs, {"is_packed_batching": 1}), "is_packed_batching=1 is not supported, only 0")
    refused(Case("RotaryEmbedding", inputs, {"scale": 2.0}), "scale=2.0 is not supported, only 1.0")
    partly = {"num_heads": 4, "rotary_embedding_dim": 8}
    refused(Case("RotaryEmbedding", inputs, partly), "rotary_embedding_dim=8 for a cache of 8 pairs")


# Grouped-query attention


def grouped_query(
    packed: bool = False,
    batch: int = 1,
    past: int = 0,
    positions: bool = False,
    bias: bool = False,
    sink: bool = False,
    dim: int = 16,
    norms: bool = False,
    tokens: int = 7,
    heads: int = 4,
    kv_heads: int = 2,
    **attributes: object,
) -> Case:
    """Heads of `dim` channels, 16 of which are rotated."""
    q = normal(batch, tokens, heads * dim)
    k, v = (normal(batch, tokens, kv_heads * dim, seed=i) for i in (1, 2))
    rotary = bool(attributes.get("do_rotary"))
    inputs: list[np.ndarray | Fixed | None] = [np.concatenate([q, k, v], 2), None, None] if packed else [q, k, v]
    empty = np.zeros((batch, kv_heads, past, dim), np.float32)
    inputs += [empty, empty, Fixed(np.full(batch, tokens - 1, np.int32)), Fixed(np.array([tokens], np.int32))]
    inputs += caches(8) if rotary else [None, None]
    inputs.append(np.arange(2, 2 + tokens)[None].repeat(batch, 0) if positions else None)
    inputs.append(normal(1, 1, tokens, tokens, seed=5) if bias else None)
    inputs.append(Fixed(normal(heads, seed=6)) if sink else None)
    inputs += [None, None, *([Fixed(normal(dim)), Fixed(normal(dim, seed=1))] if norms else [])]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, **attributes}
    symbols = {tokens: "S"} if tokens == 7 else {}
    return Case("GroupQueryAttention", inputs, attributes, 3, symbols=symbols)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotary", ["", "half", "interleaved", "partial", "positions"])
def test_grouped_query_attention(packed: bool, rotary: str) -> None:
    compare(
        grouped_query(
            packed=packed,
            positions=rotary == "positions",
            dim=32 if rotary == "partial" else 16,
            do_rotary=int(bool(rotary)),
            rotary_interleaved=int(rotary == "interleaved"),
        )
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1), (7, 7)])
def test_packed_heads_are_told_apart(heads: int, kv_heads: int) -> None:
    compare(grouped_query(packed=True, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("window", [-1, 1, 2, 6, 7, 100])
@pytest.mark.parametrize("tokens", [1, 7, 31])
def test_windows_count_the_newest_keys(window: int, tokens: int) -> None:
    compare(grouped_query(tokens=tokens, local_window_size=window))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.4},
        {"softcap": 1.5},
        {"smooth_softmax": 1},
        {"sink": True},
        {"bias": True},
        {"batch": 3},
        {"sink": True, "softcap": 2.0, "scale": 0.7, "local_window_size": 3, "do_rotary": 1, "packed": True},
        {"bias": True, "softcap": 2.0, "local_window_size": 2},
    ],
    ids=str,
)
def test_grouped_query_attention_options(options: dict[str, object]) -> None:
    compare(grouped_query(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attributes", "epsilons"),
    [
        ({"qk_norm_epsilon": 1e-3}, (1e-3, 1e-3)),
        ({"qk_norm_epsilon": 1e-3, "q_norm_epsilon": 0.5}, (0.5, 1e-3)),
        ({"k_norm_epsilon": 0.25}, (1e-6, 0.25)),
    ],
    ids=str,
)
def test_queries_and_keys_may_be_normalised(attributes: dict[str, float], epsilons: tuple[float, float]) -> None:
    """ONNX Runtime has no CPU kernel for this: the same as normalised inputs."""
    case = grouped_query(norms=True, **attributes)
    plain = grouped_query()
    for index, epsilon in enumerate(epsilons):
        x = plain.inputs[index]
        weight = case.inputs[14 + index]
        assert isinstance(x, np.ndarray) and isinstance(weight, Fixed)
        rows = x.reshape(1, 7, -1, 16)
        rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + epsilon) * weight.array
        plain.inputs[index] = rows.reshape(x.shape).astype(np.float32)
    for expected, found in zip(plain.onnxruntime(), case.translated(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (grouped_query(past=4), "a past of some length: only graphs whose past is empty at the first step"),
        (grouped_query(qk_output=1), "qk_output=1 is not supported, only 0"),
        (grouped_query(k_quant_type="PER_TENSOR"), "k_quant_type=PER_TENSOR is not supported"),
        (grouped_query(kv_num_heads=3), "key: 32 does not split into 3 parts"),
        (grouped_query(local_window_size=0), "local_window_size=0: a token would not even see itself"),
    ],
    ids=["past", "scores", "quantized cache", "heads", "window"],
)
def test_grouped_query_attention_refuses(case: Case, why: str) -> None:
    refused(case, why)


# Multi-head attention


def multi_head(
    layout: str = "apart",
    bias: bool = False,
    mask: np.ndarray | None = None,
    attention_bias: tuple[int, int] | None = None,
    past: int = 0,
    keys: int = 7,
    value_dim: int = 16,
    **attributes: object,
) -> Case:
    """3 sequences, 2 heads of 16; `keys` of each sequence."""
    batch, tokens, heads, dim = 3, 7, 2, 16
    total = past + keys
    inputs: list[np.ndarray | Fixed | None] = [None] * 8
    if layout == "packed":
        inputs[0] = normal(batch, tokens, heads, 3, dim)
    elif layout == "packed keys":
        inputs[:2] = [normal(batch, tokens, heads * dim), normal(batch, keys, heads, 2, dim, seed=1)]
    elif layout == "whole":
        inputs[0] = normal(batch, tokens, heads * dim)
        inputs[1:3] = [normal(batch, heads, keys, dim, seed=i) for i in (1, 2)]
    else:
        inputs[0] = normal(batch, tokens, heads * dim)
        inputs[1:3] = [normal(batch, keys, heads * d, seed=i) for i, d in ((1, dim), (2, value_dim))]
    inputs[3] = Fixed(normal(heads * (2 * dim + value_dim), seed=3)) if bias else None
    inputs[4] = mask
    inputs[5] = None if attention_bias is None else normal(*attention_bias, tokens, total, seed=4)
    if past:
        inputs[6:8] = [normal(batch, heads, past, dim, seed=i) for i in (5, 6)]
    while inputs[-1] is None:
        inputs.pop()
    outputs = 3 if past else 1
    symbols = {} if past else S_AND_BATCH  # a sum of sizes is no symbol of its own
    return Case("MultiHeadAttention", inputs, {"num_heads": heads, **attributes}, outputs, symbols=symbols)


LENGTHS = np.array([7, 4, 1], np.int32)
VISIBLE = (np.arange(7)[None] < LENGTHS[:, None]).astype(np.int32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "whole", "keys": 9},
        {"keys": 9},
        {"bias": True},
        {"value_dim": 5},
        {"value_dim": 5, "bias": True},
        {"unidirectional": 1},
        {"scale": 0.3},
        {"attention_bias": (1, 1)},
        {"attention_bias": (1, 2)},
        {"attention_bias": (3, 2)},
        {"mask": VISIBLE},
        {"mask": LENGTHS},
        {"mask": VISIBLE, "mask_filter_value": -5.0},
        {"mask": np.tril(np.ones((3, 7, 7), np.int32))},
        {"mask": VISIBLE, "attention_bias": (1, 2), "unidirectional": 1, "bias": True},
        {"past": 5},
        {"past": 5, "unidirectional": 1},
        {"past": 5, "bias": True, "attention_bias": (3, 1)},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_multi_head_attention(options: dict[str, object]) -> None:
    compare(multi_head(**options))  # type: ignore[arg-type]


def test_packed_inputs_are_the_same_inputs_side_by_side() -> None:
    """ONNX Runtime has no CPU kernel for packed inputs."""
    apart = multi_head(keys=7)
    q, k, v = (x.reshape(3, 7, 2, 16) for x in apart.inputs[:3] if isinstance(x, np.ndarray))
    packed, packed_keys = multi_head(layout="packed"), multi_head(layout="packed keys")
    packed.inputs[0] = np.stack([q, k, v], axis=3)
    packed_keys.inputs[:2] = [q.reshape(3, 7, 32), np.stack([k, v], axis=3)]
    [expected] = apart.onnxruntime()
    for case in (packed, packed_keys):
        case.symbols = {}
        np.testing.assert_allclose(case.translated()[0], expected, rtol=2e-5, atol=2e-5)


def test_biases_of_packed_inputs_are_those_of_inputs_apart() -> None:
    apart = multi_head(keys=7, bias=True)
    q, k, v = (x.reshape(3, 7, 2, 16) for x in apart.inputs[:3] if isinstance(x, np.ndarray))
    packed, whole = multi_head(layout="packed", bias=True), multi_head(layout="whole", bias=True)
    packed.inputs[0] = np.stack([q, k, v], axis=3)
    whole.inputs[:3] = [q.reshape(3, 7, 32), k.swapaxes(1, 2).copy(), v.swapaxes(1, 2).copy()]
    [expected] = apart.onnxruntime()
    for case in (packed, whole):
        case.symbols = {}
        np.testing.assert_allclose(case.translated()[0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["of keys and values", "of both"])
def test_a_past_that_holds_nothing_adds_nothing(kind: str) -> None:
    if kind == "of both":
        case, without = projected(), projected()
        case.inputs += [None, np.zeros((2, 3, 2, 0, 16), np.float32)]
        case.names += ["", "in4"]
    else:
        case, without = multi_head(), multi_head()
        case.inputs += [None, None, None, *[np.zeros((3, 2, 0, 16), np.float32)] * 2]
        case.names += ["", "", "", "in6", "in7"]
    case.outputs = without.outputs = 2
    assert [op.name for op in case.graph().ops if "past" not in op.name] == [op.name for op in without.graph().ops]
    for expected, found in zip(without.translated(), case.translated(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_mask_of_ones_adds_nothing() -> None:
    case = multi_head()
    case.inputs += [None, Fixed(np.ones((3, 7), np.int32))]
    case.names += ["", "in4"]
    case.symbols = {}
    attention = next(op for op in case.graph().ops if op.name == "llm.attention")
    assert attention.bias is None  # type: ignore[attr-defined]
    compare(case)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (multi_head(mask=np.ones(10, np.int32)), "only [B] and [2 B] of one axis"),
        (multi_head(mask=np.ones((3, 1, 7, 7), np.int32)), "only masks of one to three axes"),
        (Case("MultiHeadAttention", [normal(3, 7, 32)], {"num_heads": 2}), "a query without a key"),
        (multi_head(num_heads=3), "query: 32 does not split into 3 parts"),
    ],
    ids=["lengths", "axes", "no key", "heads"],
)
def test_multi_head_attention_refuses(case: Case, why: str) -> None:
    refused(case, why)


# Attention with its projections


def projected(
    mask: np.ndarray | None = None,
    attention_bias: bool = False,
    bias: bool = True,
    past: int = 0,
    sizes: tuple[int, int, int] = (32, 32, 32),
    **attributes: object,
) -> Case:
    inputs: list[np.ndarray | Fixed | None] = [normal(3, 7, 20), Fixed(normal(20, sum(sizes)) / 4)]
    inputs.append(Fixed(normal(sum(sizes))) if bias else None)
    inputs.append(mask)
    inputs.append(normal(2, 3, 2, past, 16, seed=5) if past else None)
    inputs.append(normal(3, 2, 7, 7 + past, seed=6) if attention_bias else None)
    while inputs[-1] is None:
        inputs.pop()
    if sizes != (32, 32, 32):
        attributes["qkv_hidden_sizes"] = list(sizes)
    symbols = {} if past or (mask is not None and mask.size == 6) else S_AND_BATCH
    return Case("Attention", inputs, {"num_heads": 2, **attributes}, 2 if past else 1, symbols=symbols)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unidirectional": 1},
        {"scale": 0.3},
        {"sizes": (32, 32, 10)},
        {"mask": VISIBLE},
        {"mask": LENGTHS},
        {"mask": np.concatenate([LENGTHS, np.array([0, 2, 0], np.int32)])},
        {"mask": np.tril(np.ones((3, 7, 7), np.int32)), "mask_filter_value": -20.0},
        {"attention_bias": True},
        {"past": 5},
        {"past": 5, "unidirectional": 1},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_attention(options: dict[str, object]) -> None:
    compare(projected(**options))  # type: ignore[arg-type]


def test_attention_without_a_bias_is_attention_with_zeros() -> None:
    """ONNX Runtime crashes without one."""
    zeros = projected()
    zeros.inputs[2] = Fixed(np.zeros(96, np.float32))
    [expected], [found] = zeros.onnxruntime(), projected(bias=False).translated()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_attention_refuses() -> None:
    refused(projected(do_rotary=1), "do_rotary=1 is not supported, only 0")
    refused(projected(past_present_share_buffer=1), "past_present_share_buffer=1 is not supported")
    wrong = projected()
    wrong.attributes["qkv_hidden_sizes"] = [16, 16, 16]
    refused(wrong, "do not add up to the 96 columns")
    refused(Case("QAttention", [normal(1)], {"num_heads": 2}), "fused integer attention: quantize the model without")


# Products and tables


@pytest.mark.parametrize("flags", range(16))
def test_fused_matmul(flags: int) -> None:
    names = [name for bit, name in enumerate(("transA", "transB", "transBatchA", "transBatchB")) if flags >> bit & 1]
    a, b = normal(3, 5, 7, 9), normal(3, 5, 9, 11, seed=1)
    if "transA" in names:
        a = a.swapaxes(2, 3)
    if "transB" in names:
        b = b.swapaxes(2, 3)
    if "transBatchA" in names:
        a = np.moveaxis(a, -2, 0)
    if "transBatchB" in names:
        b = np.moveaxis(b, -2, 0)
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    compare(Case("FusedMatMul", [a, b], {**dict.fromkeys(names, 1), "alpha": 0.3}))


@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.0}, {"alpha": 1.0}])
@pytest.mark.parametrize(("a", "b"), [((7, 9), (9, 11)), ((3, 7, 9), (9, 11)), ((7, 9), (3, 9, 11))])
def test_fused_matmul_scales_as_it_is_told(
    a: tuple[int, ...], b: tuple[int, ...], attributes: dict[str, float]
) -> None:
    compare(Case("FusedMatMul", [normal(*a), normal(*b, seed=1)], attributes, symbols=S))


@pytest.mark.parametrize("bidirectional", [None, 0, 1])
@pytest.mark.parametrize(
    ("queries", "keys", "buckets", "distance"),
    [(1, 1, 32, 128), (7, 7, 8, 20), (150, 150, 32, 128), (3, 7, 8, 20), (7, 3, 8, 20), (9, 9, 4, 3), (40, 40, 7, 12)],
)
def test_relative_position_bias(
    bidirectional: int | None, queries: int, keys: int, buckets: int, distance: int
) -> None:
    """ONNX Runtime has no CPU kernel of it: the buckets are T5's. One direction, where nothing else is said."""
    lengths = [Fixed(np.array([size], np.int64)) for size in (queries, keys)]
    attributes = {"max_distance": distance}
    if bidirectional is not None:
        attributes["is_bidirectional"] = bidirectional
    table = normal(buckets, 3)
    [found] = Case("RelativePositionBias", [Fixed(table), *lengths], attributes).translated()
    at = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    bucket = T5Attention._relative_position_bucket(
        at, bidirectional=bool(bidirectional), num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(found, table[bucket.numpy()].transpose(2, 0, 1)[None])


# What is left out


def test_hidden_keys_have_ten_thousand_less() -> None:
    """Scores of those that are seen are made as low: all keys count alike then."""
    case = multi_head(mask=VISIBLE, attention_bias=(3, 1))
    case.inputs[5] = np.where(VISIBLE, np.float32(-1e4), np.float32(0))[:, None, None].repeat(7, 2)
    compare(case, tolerance=1e-3)  # a score near 1e4 is rounded to 1e-3


def test_norms_of_queries_have_a_small_epsilon() -> None:
    case = grouped_query(norms=True)
    for index in (0, 1):
        case.inputs[index] = 1e-3 * normal(1, 7, (4, 2)[index] * 16, seed=index)
    exact = grouped_query(norms=True, qk_norm_epsilon=1e-6)
    exact.inputs = case.inputs
    for expected, found in zip(exact.translated(), case.translated(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_one_number_of_a_mask_hides_keys() -> None:
    """Ones but for one zero are no mask of ones."""
    mask = np.ones((3, 7), np.int32)
    mask[1, 2] = 0
    case = multi_head(mask=mask)
    case.inputs[4] = Fixed(mask)
    case.symbols = {}
    compare(case)


def test_a_mask_for_one_sequence_or_two_numbers_each() -> None:
    """[2 B] ends and starts: with one sequence too."""
    for mask in ([5], [5, 2]):
        inputs = [normal(1, 7, 20), Fixed(normal(20, 96) / 4), Fixed(normal(96)), np.array(mask, np.int32)]
        compare(Case("Attention", inputs, {"num_heads": 2}))


def refused(case: Case, why: str) -> None:
    """The translation is refused in one line that says why and where."""
    with pytest.raises(FrontendError) as error:
        case.graph()
    assert why in str(error.value) and "the_node" in str(error.value) and "\n" not in str(error.value)
