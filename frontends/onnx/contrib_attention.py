"""Attention as ONNX Runtime's optimiser and generative exporters fuse it (domain com.microsoft).

A source with one attention becomes one `llm.attention`. Text models are translated with an empty past; a past of some
length is read as `llm.attention` reads keys, the newest tokens last.
"""

from __future__ import annotations

import math

from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Add, And, GreaterEqual, Less, Where, constant
from llmc.compiler.ir.llm import RMSNorm
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Concat, Iota, Matmul, Reshape, Slice, Softmax, Transpose
from llmc.frontends.onnx.contrib_parts import (
    MICROSOFT,
    all_ones,
    given,
    in_dtype,
    known,
    part,
    refuse_attributes,
    refuse_inputs,
    require,
    scaled,
    split,
    sum_of,
)
from llmc.frontends.onnx.contrib_rope import cache_rows, rotate
from llmc.frontends.onnx.translation import Item, Node, Result, Translation, Unsupported, handles

HEADS_OUT = (0, 2, 1, 3)  # [B, S, heads, dim] <-> [B, heads, S, dim]


def heads_of(x: Value, heads: int, what: str) -> Value:
    """[B, S, heads * dim] -> [B, S, heads, dim]"""
    return Reshape(x, (*x.shape[:-1], heads, split(x.shape[-1], heads, what)))


def merged(x: Value) -> Value:
    """[B, S, heads, dim] -> [B, S, heads * dim]"""
    batch, tokens, heads, dim = x.shape
    return Reshape(x, (batch, tokens, heads * dim))


def kept(past: Value | None) -> Value | None:
    """A past [B, heads, P, dim]; None where it is left out, or holds nothing."""
    return None if past is None or past.shape[2] == 0 else past


def with_past(past: Value | None, new: Value) -> Value:
    """Keys or values [B, P + S, heads, dim] of a past [B, heads, P, dim] and new ones [B, S, heads, dim]."""
    old = kept(past)
    return new if old is None else Concat((Transpose(old, HEADS_OUT), new), 1)


@handles(
    "GroupQueryAttention",
    domain=MICROSOFT,
    attributes=(
        "num_heads", "kv_num_heads", "scale", "softcap", "smooth_softmax", "local_window_size", "causal",
        "do_rotary", "rotary_interleaved", "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon", "qk_output",
        "k_quant_type", "v_quant_type", "kv_cache_bit_width", "sliding_window_cache",
    ),
)  # fmt: skip
def group_query_attention(
    t: Translation,
    node: Node,
    query: Item,
    key: Item | None,
    value: Item | None,
    past_key: Item | None = None,
    past_value: Item | None = None,
    seqlens_k: Item | None = None,
    total_sequence_length: Item | None = None,
    cos_cache: Item | None = None,
    sin_cache: Item | None = None,
    position_ids: Item | None = None,
    attention_bias: Item | None = None,
    head_sink: Item | None = None,
    k_scale: Item | None = None,
    v_scale: Item | None = None,
    q_norm_weight: Item | None = None,
    k_norm_weight: Item | None = None,
) -> Result:
    """Causal attention of num_heads query heads over kv_num_heads key heads, rotated by position where asked for.

    Outputs: [B, S, num_heads * dim], the keys and values [B, kv_num_heads, S, dim]. The past must be empty: then
    seqlens_k and total_sequence_length say nothing that the shapes do not say (rows of padding aside).
    """
    heads, kv_heads = int(node.attributes["num_heads"]), int(node.attributes["kv_num_heads"])
    refuse_attributes(node, qk_output=0, k_quant_type="NONE", v_quant_type="NONE", kv_cache_bit_width=0, causal=1)
    refuse_attributes(node, sliding_window_cache=0)
    refuse_inputs(node, k_scale=k_scale, v_scale=v_scale)
    if kept(given(past_key)) is not None or kept(given(past_value)) is not None:
        raise Unsupported("a past of some length: only graphs whose past is empty at the first step are supported")
    if key is None or value is None:
        require(key is None and value is None, "key and value come together or not at all")
        dim = split(query.shape[-1], heads + 2 * kv_heads, "packed query, key and value")
        cuts = [0, heads * dim, (heads + kv_heads) * dim, query.shape[-1]]
        q, k, v = (part(query.value, -1, cuts[i], cuts[i + 1]) for i in range(3))
    else:
        q, k, v = query.value, key.value, value.value
    q, k, v = heads_of(q, heads, "query"), heads_of(k, kv_heads, "key"), heads_of(v, kv_heads, "value")
    if q_norm_weight is not None and k_norm_weight is not None:
        both = node.get("qk_norm_epsilon", 1e-6)
        q = RMSNorm(q, q_norm_weight.value, float(node.get("q_norm_epsilon", both)))
        k = RMSNorm(k, k_norm_weight.value, float(node.get("k_norm_epsilon", both)))
    else:
        alone = q_norm_weight is not None or k_norm_weight is not None
        require(not alone, "query and key are normalised together or not at all")
    if node.get("do_rotary", 0):
        if cos_cache is None or sin_cache is None:
            raise Unsupported("do_rotary=1 needs cos_cache and sin_cache")
        cos, sin = (
            cache_rows(cache.value, given(position_ids), q.shape[1], q.dtype) for cache in (cos_cache, sin_cache)
        )
        interleaved = bool(node.get("rotary_interleaved", 0))
        q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    window = int(node.get("local_window_size", -1))
    require(window != 0, "local_window_size=0: a token would not even see itself. Without a window it is -1")
    sinks = given(head_sink)
    if sinks is None and node.get("smooth_softmax") == 1:
        sinks = constant([0.0] * heads, q.dtype)
    bias = None if attention_bias is None else in_dtype(attention_bias.value, q.dtype)
    found = Attention(
        q, k, v, sinks, None, bias,
        scale=_scale(node, q), causal=True, window=max(0, window), softcap=float(node.get("softcap", 0.0)),
    )  # fmt: skip
    return [merged(found), Transpose(k, HEADS_OUT), Transpose(v, HEADS_OUT)]


def _scale(node: Node, q: Value) -> float:
    """The attribute, or 1 / sqrt(dim) for queries [..., dim]."""
    return float(node.get("scale", 0.0)) or 1 / math.sqrt(known(q.shape[-1], "the heads' size"))


@handles(
    "MultiHeadAttention", domain=MICROSOFT, attributes=("num_heads", "scale", "mask_filter_value", "unidirectional")
)
def multi_head_attention(
    t: Translation,
    node: Node,
    query: Item,
    key: Item | None = None,
    value: Item | None = None,
    bias: Item | None = None,
    key_padding_mask: Item | None = None,
    attention_bias: Item | None = None,
    past_key: Item | None = None,
    past_value: Item | None = None,
    past_sequence_length: Item | None = None,
    cache_indirection: Item | None = None,
) -> Result:
    """Attention with as many key heads as query heads; q, k and v in any of the operation's layouts.

    query [B, S, heads * dim], or packed with key and value [B, S, heads, 3, dim]; key and value [B, K, heads * dim],
    packed as key [B, K, heads, 2, dim], or whole pasts [B, heads, K, dim].
    Outputs: [B, S, heads * dim], keys and values [B, heads, P + K, dim].
    """
    heads = int(node.attributes["num_heads"])
    refuse_inputs(node, past_sequence_length=past_sequence_length, cache_indirection=cache_indirection)
    require(len(node.outputs) < 4 or not node.outputs[3], "its output qk is not supported")
    q, k, v = _queries_keys_values(query, key, value, heads)
    if bias is not None:
        size = q.shape[2] * q.shape[3]  # of queries and of keys
        cuts: list[int | Dim] = [0, size, 2 * size, bias.shape[0]]
        parts = [part(bias.value, 0, cuts[i], cuts[i + 1]) for i in range(3)]
        q, k, v = (_biased(x, in_dtype(b, x.dtype)) for x, b in zip((q, k, v), parts, strict=True))
    k, v = with_past(given(past_key), k), with_past(given(past_value), v)
    terms = [
        padding_bias(key_padding_mask, node, q, k.shape[1]),
        None if attention_bias is None else in_dtype(attention_bias.value, q.dtype),
    ]
    found = _attend(node, q, k, v, terms)
    return [merged(found), Transpose(k, HEADS_OUT), Transpose(v, HEADS_OUT)]


def _queries_keys_values(query: Item, key: Item | None, value: Item | None, heads: int) -> tuple[Value, Value, Value]:
    """q [B, S, heads, dim], k and v [B, K, heads, dim]."""
    if query.rank == 5:
        require(key is None and value is None, "a packed query comes without key and value")
        require(query.shape[2:4] == (heads, 3), f"a packed query of {list(query.shape)}: needs [B, S, heads, 3, dim]")
        return _unpacked(query.value, 0), _unpacked(query.value, 1), _unpacked(query.value, 2)
    if key is None:
        raise Unsupported("a query without a key")
    q = heads_of(query.value, heads, "query")
    if key.rank == 5:
        require(value is None, "a packed key comes without a value")
        require(key.shape[2:4] == (heads, 2), f"a packed key of {list(key.shape)}: needs [B, K, heads, 2, dim]")
        return q, _unpacked(key.value, 0), _unpacked(key.value, 1)
    if value is None:
        raise Unsupported("a key without a value")
    if key.rank == 4:
        return q, Transpose(key.value, HEADS_OUT), Transpose(value.value, HEADS_OUT)
    return q, heads_of(key.value, heads, "key"), heads_of(value.value, heads, "value")


def _biased(x: Value, bias: Value) -> Value:
    """[B, S, heads, dim] + bias [heads * dim], where x is the result of a projection if it comes of one."""
    if isinstance(x, Reshape) and x.x.rank == 3:
        return Reshape(Add(x.x, bias), x.shape)
    return Add(x, Reshape(bias, x.shape[2:]))


def _unpacked(x: Value, index: int) -> Value:
    """Part `index` of [B, S, heads, parts, dim] as [B, S, heads, dim]."""
    return Reshape(part(x, 3, index, index + 1), (*x.shape[:3], x.shape[4]))


def padding_bias(mask: Item | None, node: Node, q: Value, keys: int | Dim) -> Value | None:
    """What a mask adds to scores [B, heads, S, K]: 0 where it is 1, mask_filter_value where it is 0.

    mask: [B, K]; [B, S, K]; [B]: how many keys of each sequence count; [2 B]: ends, then starts. None for a mask that
    hides nothing.
    """
    if mask is None or all_ones(mask.value):
        return None
    batch, queries = q.shape[:2]
    x = mask.value
    if mask.rank == 1:
        at = Reshape(Iota(keys, "i32"), (1, keys))
        x = in_dtype(x, "i32")
        (numbers,) = mask.shape
        if numbers not in (batch, 2 * batch):
            raise Unsupported(f"a mask of {list(mask.shape)} for {batch} sequences: only [B] and [2 B] of one axis")
        visible: Value = Less(at, Reshape(part(x, 0, 0, batch), (batch, 1)))
        if numbers != batch:
            starts = Reshape(part(x, 0, batch, 2 * batch), (batch, 1))
            visible = And(visible, GreaterEqual(at, starts))
        shape: tuple[int | Dim, ...] = (batch, 1, 1, keys)
    elif mask.rank == 2:
        visible, shape = in_dtype(x, "bool"), (mask.shape[0], 1, 1, keys)
    elif mask.rank == 3:
        visible, shape = in_dtype(x, "bool"), (mask.shape[0], 1, queries, keys)
    else:
        raise Unsupported(f"a mask of {list(mask.shape)}: only masks of one to three axes")
    filter_value = float(node.get("mask_filter_value", -10000.0))
    hidden, shown = constant(filter_value, q.dtype), constant(0.0, q.dtype)
    return Where(Reshape(visible, shape), shown, hidden)


def _attend(node: Node, q: Value, k: Value, v: Value, terms: list[Value | None]) -> Value:
    """Attention of q [B, S, heads, dim]; terms: what is added to the scores.

    With such terms it is written out, for the passes that tell masks from biases as they do in any graph.
    """
    causal, scale = bool(node.get("unidirectional", 0)), _scale(node, q)
    found = [term for term in terms if term is not None]
    if not found:
        return Attention(q, k, v, scale=scale, causal=causal)
    queries, keys = q.shape[1], k.shape[1]
    heads_first, last = Transpose(q, HEADS_OUT), 3
    scores = scaled(Matmul(heads_first, Transpose(k, (0, 2, 3, 1))), scale)
    scores = Add(scores, sum_of(*found))
    if causal:
        # The last query stands at the last key.
        key_at, query_at = Iota(keys), Slice(Iota(keys), 0, keys - queries, keys)
        visible = GreaterEqual(Reshape(query_at, (queries, 1)), Reshape(key_at, (1, keys)))
        scores = Where(visible, scores, constant(-math.inf, q.dtype))
    return Transpose(Matmul(Softmax(scores, last), Transpose(v, HEADS_OUT)), HEADS_OUT)


@handles(
    "Attention",
    domain=MICROSOFT,
    attributes=(
        "num_heads", "scale", "mask_filter_value", "unidirectional", "qkv_hidden_sizes", "do_rotary",
        "rotary_embedding_dim", "past_present_share_buffer",
    ),
)  # fmt: skip
def attention(
    t: Translation,
    node: Node,
    x: Item,
    weights: Item,
    bias: Item | None = None,
    mask_index: Item | None = None,
    past: Item | None = None,
    attention_bias: Item | None = None,
    past_sequence_length: Item | None = None,
) -> Result:
    """Projections of x [B, S, inputs] by weights [inputs, q + k + v] and attention over them.

    Outputs: [B, S, v], and the keys and values [2, B, heads, P + S, dim].
    """
    heads = int(node.attributes["num_heads"])
    refuse_attributes(node, do_rotary=0, past_present_share_buffer=0)
    refuse_inputs(node, past_sequence_length=past_sequence_length)
    total = weights.shape[-1]
    sizes = [int(size) for size in node.get("qkv_hidden_sizes") or [split(total, 3, "weights")] * 3]
    cuts: list[int | Dim] = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    require(cuts[3] == total, f"qkv_hidden_sizes={sizes} do not add up to the {total} columns of the weights")
    projected = Matmul(x.value, weights.value)
    if bias is not None:
        projected = Add(projected, bias.value)  # type: ignore[assignment]
    q, k, v = (
        heads_of(part(projected, -1, cuts[i], cuts[i + 1]), heads, what)
        for i, what in enumerate(("query", "key", "value"))
    )
    if past is not None:
        k, v = (with_past(Reshape(part(past.value, 0, i, i + 1), past.shape[1:]), new) for i, new in enumerate((k, v)))
    terms = [
        padding_bias(mask_index, node, q, k.shape[1]),
        None if attention_bias is None else in_dtype(attention_bias.value, q.dtype),
    ]
    found = _attend(node, q, k, v, terms)
    results: list[Value] = [merged(found)]
    if any(node.outputs[1:]):
        require(k.shape == v.shape, "keys and values of different sizes in one output")
        both = tuple(Reshape(y, (1, *y.shape)) for y in (Transpose(k, HEADS_OUT), Transpose(v, HEADS_OUT)))
        results.append(Concat(both, 0))
    return results


@handles("QAttention", domain=MICROSOFT)
def quantized_attention(t: Translation, node: Node, *items: Item | None) -> Result:
    """Refused: integers alone do not say which operations it fuses."""
    raise Unsupported(
        "fused integer attention: quantize the model without ONNX Runtime's fusions, or take a float model"
    )


@handles("FusedMatMul", domain=MICROSOFT, attributes=("alpha", "transA", "transB", "transBatchA", "transBatchB"))
def fused_matmul(t: Translation, node: Node, a: Item, b: Item) -> Result:
    """alpha * a' @ b': transA, transB turn the last two axes; transBatchA, transBatchB rotate all but the last."""
    left, right = (
        _turned(item.value, bool(node.get(f"transBatch{name}", 0)), bool(node.get(f"trans{name}", 0)))
        for name, item in (("A", a), ("B", b))
    )
    require(left.rank >= 2 and right.rank >= 2, "factors without two axes")
    return scaled(Matmul(left, right), float(node.get("alpha", 1.0)))


def _turned(x: Value, batch: bool, last: bool) -> Value:
    axes = list(range(x.rank))
    if batch:  # rows come first: [m, d0, d1, ..., k]
        axes = [*axes[1:-1], axes[0], axes[-1]]
    if last:
        axes[-2], axes[-1] = axes[-1], axes[-2]
    return x if axes == list(range(x.rank)) else Transpose(x, tuple(axes))


@handles("RelativePositionBias", domain=MICROSOFT, attributes=("is_bidirectional", "max_distance"))
def relative_position_bias(t: Translation, node: Node, table: Item, queries: Item, keys: Item) -> Result:
    """T5's bias [1, heads, Q, K] from a table [buckets, heads] (Raffel et al. 2020)."""
    from llmc.frontends.onnx.contrib_buckets import bucketed_bias

    sizes = []
    for name, item in (("query_length", queries), ("key_length", keys)):
        if item.known is None:
            raise Unsupported(f"{name} is not known when compiling")
        sizes.append(item.known.flat[0])
    bidirectional = bool(node.get("is_bidirectional", 0))
    return bucketed_bias(table.value, sizes[0], sizes[1], int(node.attributes["max_distance"]), bidirectional)
