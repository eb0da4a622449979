"""The standard's Attention (since opset 23): one `llm.attention`, and where asked for the scores beside it."""

from __future__ import annotations

import math

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.dims import Dim, exact_division
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Broadcast, Matmul, Max, Pad, Softmax
from llmc.compiler.ir.structural import split_exact as split
from llmc.frontends.onnx.forms import (
    along,
    broadcast,
    cast,
    concat,
    iota,
    like,
    reshape,
    size_scalar,
    transpose,
    unsqueeze,
)
from llmc.frontends.onnx.translation import Item, Node, Result, SizeUnknown, Translation, Unsupported, handles

BY_HEAD = (0, 2, 1, 3)  # [B, S, heads, dim] <-> [B, heads, S, dim]
RAW, CAPPED, BIASED, SHARES = range(4)  # what the fourth output is


@handles("Attention", since=23)
def attention(
    t: Translation,
    node: Node,
    query: Item,
    key: Item,
    value: Item,
    mask: Item | None = None,
    past_key: Item | None = None,
    past_value: Item | None = None,
    lengths: Item | None = None,
) -> Result:
    """Q [B, heads, Q, dim] or [B, Q, heads * dim], K and V alike; a mask of bools or floats that broadcasts to scores.

    lengths: i64[B], how many of the keys count. Outputs: the result in Q's layout; keys and values [B, heads, P + K,
    dim], the past's in front; the scores or probabilities [B, heads, Q, P + K].
    """
    heads, kv_heads = node.get("q_num_heads"), node.get("kv_num_heads")
    q = _tokens_first(query.value, heads)
    k, v = _tokens_first(key.value, kv_heads), _tokens_first(value.value, kv_heads)
    past: int | Dim = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = concat((transpose(past_key.value, BY_HEAD), k), 1), concat((transpose(past_value.value, BY_HEAD), v), 1)
    elif past_key is not None or past_value is not None:
        raise Unsupported("past_key and past_value come together or not at all")
    dim = q.shape[3]
    if not isinstance(dim, int):
        raise SizeUnknown(f"the heads' size {dim} must be known when compiling")
    given = node.get("scale")
    scale = 1 / math.sqrt(dim) if given is None else float(given)
    softcap = max(0.0, float(node.get("softcap", 0.0)))
    seen = _Visible(node, q.shape[1], k.shape[1], past, lengths)
    bias = seen.bias(None if mask is None else _mask(mask.value, k.shape[1], q.dtype, node.version), q.dtype)
    found = Attention(q, k, v, None, None, bias, scale=scale, causal=seen.causal, window=seen.window, softcap=softcap)
    result = transpose(found, BY_HEAD)
    if query.rank != 4:
        result = reshape(found, (*query.shape[:2], q.shape[2] * v.shape[3]))
    outputs = [result, transpose(k, BY_HEAD), transpose(v, BY_HEAD)]
    if len(node.outputs) > 3 and node.outputs[3]:
        outputs.append(_scores(found, int(node.get("qk_matmul_output_mode", RAW))))
    return outputs


def _tokens_first(x: Value, heads: int | None) -> Value:
    """[B, heads, S, dim] or [B, S, heads * dim] as [B, S, heads, dim]."""
    if x.rank == 4:
        return transpose(x, BY_HEAD)
    if heads is None:
        raise Unsupported("inputs of three axes need the attributes q_num_heads and kv_num_heads")
    return reshape(x, (*x.shape[:2], heads, split(x.shape[2], heads)))


def _mask(mask: Value, keys: int | Dim, dtype: str, version: int) -> Value:
    """What a mask adds to scores: bools choose between 0 and -inf; keys beyond it are hidden (since opset 24)."""
    if mask.dtype == "bool":
        mask = e.Where(mask, e.constant(0.0, dtype), e.constant(-math.inf, dtype))
    mask = cast(mask, dtype)
    if mask.rank == 0 or mask.shape[-1] == keys or version < 24:
        return mask
    missing = keys - mask.shape[-1]
    if isinstance(missing, int):
        none = (0,) * (mask.rank - 1)
        return Pad(mask, (*none, 0), (*none, missing), -math.inf)
    hidden = broadcast(e.constant(-math.inf, dtype), (*mask.shape[:-1], missing))
    return concat((mask, hidden), mask.rank - 1)


class _Visible:
    """Which keys the attributes and lengths let a query see: by `causal` and `window`, or by a bias of 0 and -inf."""

    def __init__(self, node: Node, queries: int | Dim, keys: int | Dim, past: int | Dim, lengths: Item | None) -> None:
        self.queries, self.keys, self.past, self.lengths = queries, keys, past, lengths
        self.is_causal = bool(node.get("is_causal", 0))
        self.left, self.right = (int(node.get(f"{side}_window_size", -1)) for side in ("left", "right"))
        # `llm.attention` puts the last query at the last key.
        aligned = lengths is None and past + queries == keys
        one_sided = self.is_causal or self.right == 0
        self.causal = aligned and one_sided
        said = one_sided or self.left == self.right
        self.window = self.left + 1 if aligned and self.left >= 0 and said else 0
        self.is_said = self.causal or bool(self.window)

    def bias(self, mask: Value | None, dtype: str) -> Value | None:
        """What is added to scores [B, heads, Q, K]: the mask, and what `causal` and `window` do not say."""
        conditions = [] if self.is_said else self._conditions()
        if self.lengths is not None:
            conditions.append(e.Less(self._keys(), self._by_sequence(cast(self.lengths.value, "i64"))))
        for condition in conditions:
            hidden = e.Where(condition, e.constant(0.0, dtype), e.constant(-math.inf, dtype))
            mask = hidden if mask is None else e.Add(mask, hidden)
        return mask

    def _by_sequence(self, numbers: Value) -> Value:
        """[B] as [B, 1, 1, 1]."""
        return reshape(numbers, (numbers.shape[0], 1, 1, 1))

    def _keys(self) -> Value:
        return along(iota(self.keys), 1, 2)

    def _conditions(self) -> list[Value]:
        """[..., Q, K]: where a key is near enough to a query's position."""
        at: Value = along(iota(self.queries), 0, 2)
        if self.lengths is not None:
            first = e.Sub(cast(self.lengths.value, "i64"), size_scalar(self.queries))
            at = e.Add(at, self._by_sequence(first))
        elif self.past != 0:
            at = e.Add(at, size_scalar(self.past))
        ahead = e.Sub(self._keys(), at)
        found: list[Value] = []
        if self.is_causal or self.right >= 0:
            found.append(e.LessEqual(ahead, like(0 if self.is_causal else self.right, ahead)))
        if self.left >= 0:
            found.append(e.GreaterEqual(ahead, like(-self.left, ahead)))
        return found


def _scores(op: Attention, mode: int) -> Value:
    """The scores [B, heads, Q, K] of an attention as far as `mode` says, or their softmax."""
    rank = op.q.rank
    q, k = transpose(op.q, BY_HEAD), transpose(op.k, BY_HEAD)
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    if heads != kv_heads:
        group = exact_division(heads, kv_heads)
        assert group is not None  # or it would be no attention
        shared = Broadcast(unsqueeze(k, 2), (batch, kv_heads, group, *k.shape[2:]))
        k = reshape(shared, (batch, heads, *k.shape[2:]))
    scores: Value = e.Mul(Matmul(q, transpose(k, (0, 1, 3, 2))), like(op.scale, q))
    if mode == RAW:
        return scores
    if op.softcap:
        cap = like(op.softcap, scores)
        scores = e.Mul(e.Tanh(e.Div(scores, cap)), cap)
    if mode == CAPPED:
        return scores
    if op.bias is not None:
        scores = e.Add(scores, op.bias)
    if op.causal or op.window:
        at = e.Add(along(iota(op.q.shape[1]), 0, 2), size_scalar(op.k.shape[1] - op.q.shape[1]))
        back = e.Sub(at, along(iota(op.k.shape[1]), 1, 2))
        visible: Value = e.GreaterEqual(back, like(0, back)) if op.causal else e.LessEqual(back, back)
        if op.window:
            visible = e.And(visible, e.Less(e.Abs(back), like(op.window, back)))
        scores = e.Where(visible, scores, like(-math.inf, scores))
    if mode == BIASED:
        return scores
    seen = e.Greater(Max(scores, (rank - 1,)), like(-math.inf, scores))
    zero = like(0.0, scores)
    return e.Where(seen, Softmax(e.Where(seen, scores, zero), rank - 1), zero)
