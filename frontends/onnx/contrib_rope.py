"""Rotary position embedding by caches of cosines and sines [positions, pairs] (domain com.microsoft)."""

from __future__ import annotations

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Add, Mul, Sub
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Broadcast, Concat, Gather, Iota, Reshape, Transpose
from llmc.frontends.onnx.contrib_parts import MICROSOFT, in_dtype, known, part, refuse_attributes, require, split
from llmc.frontends.onnx.forms import concat
from llmc.frontends.onnx.translation import Item, Node, Result, Translation, handles


def cache_rows(cache: Value, positions: Value | None, tokens: int | Dim, dtype: str) -> Value:
    """The rows of a cache [positions, pairs] as [B or 1, S, 1, pairs]. positions: i64 [B or 1, S]; None: 0, 1, ..."""
    if positions is None:
        positions = Reshape(Iota(tokens), (1, tokens))
    rows = in_dtype(Gather(cache, positions, 0), dtype)
    return Reshape(rows, (*positions.shape, 1, cache.shape[1]))


def rotate(x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    """x [B, S, heads, dim] turned by cos, sin [B or 1, S, 1, pairs]; channels past 2 * pairs pass.

    Channel i pairs with i + pairs, or 2 i with 2 i + 1 where interleaved.
    """
    pairs, dim = known(cos.shape[-1], "the number of rotated pairs"), known(x.shape[-1], "the heads' size")
    require(2 * pairs <= dim, f"a cache of {pairs} pairs for heads of {dim}")
    turned, last = part(x, -1, 0, 2 * pairs), x.rank - 1
    a: Value
    b: Value
    if interleaved:
        apart = Reshape(turned, (*x.shape[:-1], pairs, 2))
        a, b = (Reshape(part(apart, -1, i, i + 1), (*x.shape[:-1], pairs)) for i in (0, 1))
    else:
        a, b = part(turned, -1, 0, pairs), part(turned, -1, pairs, 2 * pairs)
    first, second = Sub(Mul(a, cos), Mul(b, sin)), Add(Mul(b, cos), Mul(a, sin))
    if interleaved:
        columns = tuple(Reshape(y, (*y.shape, 1)) for y in (first, second))
        parts: tuple[Value, ...] = (Reshape(Concat(columns, last + 1), turned.shape),)
    else:
        parts = (first, second)
    if dim != 2 * pairs:
        parts = (*parts, part(x, -1, 2 * pairs, dim))
    return concat(parts, last)


@handles(
    "RotaryEmbedding",
    domain=MICROSOFT,
    attributes=("interleaved", "is_packed_batching", "num_heads", "rotary_embedding_dim", "scale"),
)
def rotary_embedding(
    t: Translation, node: Node, x: Item, position_ids: Item, cos_cache: Item, sin_cache: Item
) -> Result:
    """x [B, S, heads * dim] or [B, heads, S, dim] turned by position. position_ids: [B, S], or [1]: the first one."""
    refuse_attributes(node, is_packed_batching=0, scale=1.0)
    require(x.rank in (3, 4), f"x of rank {x.rank}: needs [B, S, heads * dim] or [B, heads, S, dim]")
    pairs, given_heads = cos_cache.shape[1], int(node.get("num_heads", 0))
    rotary = int(node.get("rotary_embedding_dim", 0))
    require(rotary in (0, 2 * known(pairs, "pairs")), f"rotary_embedding_dim={rotary} for a cache of {pairs} pairs")
    value = x.value
    if x.rank == 4:
        value = Transpose(value, (0, 2, 1, 3))
    else:
        heads = given_heads or split(x.shape[-1], 2 * pairs, "the last axis")
        value = Reshape(value, (*x.shape[:-1], heads, split(x.shape[-1], heads, "the last axis")))
    tokens = value.shape[1]
    at = position_ids.value
    if position_ids.rank == 1:
        at = Reshape(Add(Iota(tokens, at.dtype), Broadcast(at, (tokens,))), (1, tokens))
    cos, sin = (cache_rows(cache.value, at, tokens, value.dtype) for cache in (cos_cache, sin_cache))
    turned = rotate(value, cos, sin, bool(node.get("interleaved", 0)))
    return Transpose(turned, (0, 2, 1, 3)) if x.rank == 4 else Reshape(turned, x.shape)
