"""Attention: over whole sequences (`llm.attention`), and over a paged cache that steps append to."""

from __future__ import annotations

import math

import numpy as np

from llmc.compiler.ir.dims import Dim, exact_division
from llmc.compiler.ir.elementwise import (
    Abs,
    Add,
    And,
    Cast,
    Div,
    Greater,
    Less,
    LessEqual,
    Mul,
    Sub,
    Tanh,
    Where,
    constant,
)
from llmc.compiler.ir.encoded import Pages
from llmc.compiler.ir.op import Op, Tokens, Value
from llmc.compiler.ir.shapes import broadcast_shapes, require
from llmc.compiler.ir.structural import Broadcast, Concat, Iota, Matmul, Max, Reshape, Slice, Softmax, Transpose
from llmc.compiler.ir.types import FLOATS, KV, Array, Shape, Tensor, numpy_dtype

TILE = 64  # tokens of a query tile at most; the runtime makes smaller ones where that keeps every thread busy
# Attention takes a context in parts of PART tokens, or of twice as many, four times, ... where those are more than
# MOST_PARTS: they begin at multiples of that. Query tiles end at multiples of their size, so that a tile's rows have
# the same parts.
PART, MOST_PARTS = 512, 16


def visible_keys(queries: int, keys: int, first: int, causal: bool, window: int) -> Array:
    """bool[queries, keys]: which keys 0, 1, ... each query sees; the queries are at `first`, first + 1, ...

    causal: keys up to the query's own position, the last `window` of them (0: all). Not causal: all keys, or those
    less than `window` away on either side.
    """
    distance = first + np.arange(queries)[:, None] - np.arange(keys)[None, :]
    visible = np.ones(distance.shape, bool)
    if causal:
        visible &= distance >= 0
    if window:
        visible &= np.abs(distance) < window
    return visible


def attend(
    q: Array,
    k: Array,
    v: Array,
    first: int,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Array | None,
    slopes: Array | None,
    bias: Array | None = None,
) -> Array:
    """One sequence: queries [n, heads, dim] at positions first... over keys and values [S, kv_heads, dim].

    bias: [heads, n, S], or what broadcasts to it. A query that sees no key gives zeros.
    """
    wide = numpy_dtype("f32")
    group = q.shape[1] // k.shape[1]
    keys = np.repeat(k.astype(wide), group, axis=1)
    values = np.repeat(v.astype(wide), group, axis=1)
    scores = q.astype(wide).transpose(1, 0, 2) @ keys.transpose(1, 2, 0) * wide.type(scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if slopes is not None:
        query_at = first + np.arange(q.shape[0])[:, None]
        scores = scores + slopes.astype(wide)[:, None, None] * (np.arange(k.shape[0])[None, :] - query_at)
    if bias is not None:
        scores = scores + bias.astype(wide)
    scores = np.where(visible_keys(q.shape[0], k.shape[0], first, causal, window), scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks.astype(wide)[:, None, None])
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(scores - top)
    total = e.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.astype(wide)[:, None, None] - top)
    shares = e / np.where(total == 0, 1, total)
    return np.asarray((shares @ values.transpose(1, 0, 2)).transpose(1, 0, 2), q.dtype)


class Attention(Op, name="llm.attention"):
    """Softmax attention of q [..., Q, heads, dim] over k, v [..., K, kv_heads, dim]; heads share key heads in groups.

    softmax(scale * q k (capped: softcap * tanh(s / softcap)) + slope * (key - query position) + bias) v, where the
    last query stands at the last key. causal and window: see `visible_keys`. sinks [heads]: logits that join the
    denominator only. bias: broadcasts to [..., heads, Q, K]; -inf hides a key. A query that sees no key gives zeros.
    """

    tokens = Tokens.MIXES
    vectors = ("sinks", "slopes")

    q: Value
    k: Value
    v: Value
    sinks: Value | None = None
    slopes: Value | None = None
    bias: Value | None = None
    scale: float = 1.0
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    @property
    def scores_shape(self) -> Shape:
        """[..., heads, Q, K]"""
        return (*self.q.shape[:-3], self.q.shape[-2], self.q.shape[-3], self.k.shape[-3])

    def infer(self) -> Tensor:
        require(self.q.rank == self.k.rank == self.v.rank >= 3, "needs q, k, v of one rank, at least 3")
        require(self.q.shape[-1] == self.k.shape[-1], "queries and keys have different sizes")
        require(self.k.shape[:-1] == self.v.shape[:-1], "keys and values have different shapes")
        require(self.q.shape[:-3] == self.k.shape[:-3], "queries and keys have different leading sizes")
        heads, kv_heads = self.q.shape[-2], self.k.shape[-2]
        require(exact_division(heads, kv_heads) is not None, f"{heads} heads over {kv_heads} key heads")
        if self.bias is not None:
            shape = self.scores_shape
            require(self.bias.dtype in FLOATS, f"the bias must be floats, not {self.bias.dtype}")
            fits = broadcast_shapes(self.bias.shape, shape) == shape
            require(fits, f"a bias of {list(self.bias.shape)} does not broadcast to scores {list(shape)}")
        return Tensor((*self.q.shape[:-1], self.v.shape[-1]), self.q.dtype)

    def evaluate(
        self, q: Array, k: Array, v: Array, sinks: Array | None, slopes: Array | None, bias: Array | None
    ) -> Array:
        flat_q = q.reshape(-1, *q.shape[-3:])
        flat_k = k.reshape(-1, *k.shape[-3:])
        flat_v = v.reshape(-1, *v.shape[-3:])
        scores = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
        biases = [None] * len(flat_q) if bias is None else np.broadcast_to(bias, scores).reshape(-1, *scores[-3:])
        rows = [
            attend(
                a, b, c, b.shape[0] - a.shape[0],
                scale=self.scale, causal=self.causal, window=self.window, softcap=self.softcap,
                sinks=sinks, slopes=slopes, bias=d,
            )
            for a, b, c, d in zip(flat_q, flat_k, flat_v, biases, strict=True)
        ]  # fmt: skip
        return np.asarray(rows, q.dtype).reshape(*q.shape[:-1], v.shape[-1])

    def decompose(self) -> Value:
        rank = self.q.rank
        queries, heads = self.q.shape[-3:-1]
        keys, kv_heads = self.k.shape[-3:-1]
        group = exact_division(heads, kv_heads)
        assert group is not None
        leading = self.q.shape[:-3]
        swap = (*range(rank - 3), rank - 2, rank - 3, rank - 1)

        def per_head(x: Value) -> Value:
            """[..., K, kv_heads, d] -> [..., heads, K, d]"""
            x = Transpose(x, swap)
            if group == 1:
                return x
            size = x.shape[-1]
            x = Reshape(x, (*leading, kv_heads, 1, keys, size))
            return Reshape(Broadcast(x, (*leading, kv_heads, group, keys, size)), (*leading, heads, keys, size))

        k, v = per_head(self.k), per_head(self.v)
        q: Value = Transpose(self.q, swap)
        turned = Transpose(k if k.dtype == q.dtype else Cast(k, q.dtype), (*range(rank - 2), rank - 1, rank - 2))
        scores: Value = Mul(Matmul(q, turned), constant(self.scale, q.dtype))
        if self.softcap:
            cap = constant(self.softcap, q.dtype)
            scores = Mul(Tanh(Div(scores, cap)), cap)
        key_at = Reshape(Iota(keys), (1, keys))
        query_at = Add(Reshape(Iota(queries), (queries, 1)), Reshape(_last_difference(keys, queries), (1, 1)))
        if self.slopes is not None:
            slopes = Reshape(Cast(self.slopes, q.dtype), (heads, 1, 1))
            scores = Add(scores, Mul(slopes, Cast(Sub(key_at, query_at), q.dtype)))
        if self.bias is not None:
            scores = Add(scores, self.bias if self.bias.dtype == q.dtype else Cast(self.bias, q.dtype))
        visible: Value | None = LessEqual(key_at, query_at) if self.causal else None
        if self.window:
            width = constant(self.window, "i64")
            near = Greater(key_at, Sub(query_at, width)) if self.causal else Less(Abs(Sub(key_at, query_at)), width)
            visible = near if visible is None else And(visible, near)
        if visible is not None:
            scores = Where(visible, scores, constant(-math.inf, q.dtype))
        if self.sinks is None:
            return self._weighted(self._shares(scores), v, swap)
        sinks: Value = self.sinks if self.sinks.dtype == q.dtype else Cast(self.sinks, q.dtype)
        column = Broadcast(Reshape(sinks, (heads, 1, 1)), (*leading, heads, queries, 1))
        shares = Slice(Softmax(Concat((scores, column), rank - 1), rank - 1), rank - 1, 0, keys)
        return self._weighted(shares, v, swap)

    def _weighted(self, shares: Value, v: Value, swap: tuple[int, ...]) -> Value:
        """The sum of values weighted by probabilities, in the values' dtype; the result has the queries' dtype."""
        if v.dtype == self.q.dtype:
            return Transpose(Matmul(shares, v), swap)
        return Cast(Transpose(Matmul(Cast(shares, v.dtype), v), swap), self.q.dtype)

    def _shares(self, scores: Value) -> Value:
        """The softmax of scores [..., heads, Q, K]; zeros in a row that sees no key, where there may be one."""
        last = scores.rank - 1
        queries, keys = scores.shape[-2:]
        if self.bias is None and (queries == keys or not (self.causal or self.window)):
            return Softmax(scores, last)
        seen = Greater(Max(scores, (last,)), constant(-math.inf, scores.dtype))
        zero = constant(0.0, scores.dtype)
        return Where(seen, Softmax(Where(seen, scores, zero), last), zero)


def _last_difference(keys: int | Dim, queries: int | Dim) -> Value:
    """keys - queries as an i64 tensor of one element: the first query's position."""
    difference = keys - queries
    if isinstance(difference, int):
        return Reshape(constant(difference, "i64"), (1,))
    return Slice(Iota(difference + 1), 0, difference, difference + 1)


class KVAppend(Op, name="llm.kv_append"):
    """The next version of a cache, with keys [T, heads, dim] and values [T, heads, dim] at slots [T]."""

    tokens = Tokens.MIXES

    cache: Value
    k: Value
    v: Value
    slots: Value

    def infer(self) -> KV:
        kind = self.cache.kv
        require(self.k.shape[1:] == (kind.heads, kind.key_dim), f"keys of {self.k.shape} for {kind}")
        require(self.v.shape[1:] == (kind.heads, kind.value_dim), f"values of {self.v.shape} for {kind}")
        require(self.slots.shape == self.k.shape[:1] == self.v.shape[:1], "one slot a token")
        return kind

    def evaluate(self, cache: Pages, k: Array, v: Array, slots: Array) -> Pages:
        return cache.append(k, v, slots)


class PagedAttention(Op, name="llm.paged_attention"):
    """Attention of q [T, heads, dim] over a paged cache, each token over its own sequence.

    tiles i32[Q, 4]: (sequence, first row, rows, position of the first row); block_table i32[B, M]: pages of each
    sequence. causal: a token sees its sequence up to itself. Not causal: all of it, the tokens from row starts[s] to
    starts[s + 1], from position 0 on. bias f32[heads, 2 * span - 1]: a table of what is added to scores, after the
    softcap, by key - query + span - 1; no sequence is longer than span. The other parts are `llm.attention`'s.
    """

    tokens = Tokens.MIXES
    vectors = ("sinks", "slopes")

    q: Value
    cache: Value
    tiles: Value
    block_table: Value
    sinks: Value | None = None
    slopes: Value | None = None
    starts: Value | None = None
    bias: Value | None = None
    scale: float = 1.0
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    def infer(self) -> Tensor:
        kind = self.cache.kv
        require(self.q.rank == 3 and self.q.shape[2] == kind.key_dim, f"queries of {self.q.shape} for {kind}")
        require(exact_division(self.q.shape[1], kind.heads) is not None, "heads do not split over key heads")
        require(self.causal or self.starts is not None, "attention that is not causal needs starts")
        if self.bias is not None:
            rows, columns = self.bias.shape if self.bias.rank == 2 else (None, None)
            fits = rows == self.q.shape[1] and isinstance(columns, int) and columns % 2 == 1
            require(fits, f"the bias must be [heads, 2 * span - 1], not {list(self.bias.shape)}")
        return Tensor((*self.q.shape[:2], kind.value_dim), self.q.dtype)

    def evaluate(
        self,
        q: Array,
        cache: Pages,
        tiles: Array,
        block_table: Array,
        sinks: Array | None,
        slopes: Array | None,
        starts: Array | None,
        bias: Array | None,
    ) -> Array:
        out = np.zeros((*q.shape[:2], cache.values.shape[3]), q.dtype)
        for sequence, row, count, position in tiles.tolist():
            length = position + count
            if not self.causal:
                assert starts is not None
                length = int(starts[sequence + 1] - starts[sequence])
            k, v = cache.sequence(block_table[sequence], length)
            added = None
            if bias is not None:
                distance = np.arange(length)[None, :] - np.arange(position, position + count)[:, None]
                added = bias[:, distance + bias.shape[1] // 2]
            out[row : row + count] = attend(
                q[row : row + count], k, v, position,
                scale=self.scale, causal=self.causal, window=self.window, softcap=self.softcap, sinks=sinks,
                slopes=slopes, bias=added,
            )  # fmt: skip
        return out
