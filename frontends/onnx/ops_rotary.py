"""RotaryEmbedding of the standard (since opset 23): one `llm.rope`."""

from __future__ import annotations

from llmc.compiler.ir.llm import Rope
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Gather, split_exact
from llmc.frontends.onnx.forms import cast, concat, cut, reshape, transpose
from llmc.frontends.onnx.translation import Item, Node, Result, Translation, Unsupported, handles

BY_HEAD = (0, 2, 1, 3)  # [B, heads, S, dim] <-> [B, S, heads, dim]


@handles("RotaryEmbedding", since=23)
def rotary_embedding(
    t: Translation, node: Node, x: Item, cos_cache: Item, sin_cache: Item, position_ids: Item | None = None
) -> Result:
    """x [B, heads, S, dim] or [B, S, heads * dim], turned by angles whose cosines and sines the caches have.

    Caches: [positions, pairs] with position_ids [B, S], else [B, S, pairs]. They may have more pairs than are turned.
    """
    value = x.value
    if x.rank == 4:
        value = transpose(value, BY_HEAD)
    else:
        heads = int(node.get("num_heads", 0))
        if not heads:
            raise Unsupported("an input of three axes needs the attribute num_heads")
        value = reshape(value, (*x.shape[:2], heads, split_exact(x.shape[2], heads)))
    batch, tokens, heads_here, dim = value.shape
    turned = int(node.get("rotary_embedding_dim", 0)) or dim
    pairs = split_exact(turned, 2)
    flat = reshape(value, (batch * tokens, heads_here, dim))

    def angles(cache: Value) -> Value:
        """[B * S, 1, pairs]"""
        rows = cache if position_ids is None else Gather(cache, position_ids.value, 0)
        if rows.shape[:2] != (batch, tokens):
            raise Unsupported(f"caches or positions of {list(rows.shape[:2])} for tokens {[batch, tokens]}")
        return reshape(cut(cast(rows, "f32"), 2, 0, pairs), (batch * tokens, 1, pairs))

    both = concat((angles(cos_cache.value), angles(sin_cache.value)), 1)
    found = reshape(Rope(flat, both, bool(node.get("interleaved", 0))), value.shape)
    return transpose(found, BY_HEAD) if x.rank == 4 else reshape(found, x.shape)
