"""FlexAttention, a preview in the standard: attention with graphs of the model that change scores and probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import split_exact
from llmc.frontends.onnx.forms import broadcast, cast, dtype_named, like, reshape, transpose, unsqueeze
from llmc.frontends.onnx.translation import Body, Item, Node, SizeUnknown, Translation, handles


@handles("FlexAttention", domain="ai.onnx.preview")
def _flex_attention(t: Translation, node: Node, query: Item, key: Item, value: Item) -> Value:
    """Q [B, heads, Q, dim], K [B, kv_heads, K, dim], V [B, kv_heads, K, value_dim] -> [B, heads, Q, value_dim]."""
    heads, dim = query.shape[1], query.shape[3]
    if not isinstance(heads, int) or not isinstance(key.shape[1], int) or not isinstance(dim, int):
        raise SizeUnknown("the numbers and sizes of heads must be known when compiling")
    around = t.around
    given = node.get("softmax_precision")
    precision = t.dtype(dtype_named(given) if given else "f64" if query.dtype == "f64" else "f32")
    shared = split_exact(heads, key.shape[1])
    assert isinstance(shared, int)
    keys, values = (_repeated(item.value, shared) for item in (key, value))
    scale = node.get("scale", 1 / math.sqrt(dim))
    scores = s.Matmul(cast(query.value, precision), transpose(cast(keys, precision), (0, 1, 3, 2)))
    changed = _changed(t, node, "score_mod", e.Mul(scores, like(scale, scores)), around)
    shares = _changed(t, node, "prob_mod", s.Softmax(changed, 3), around)
    return cast(s.Matmul(shares, cast(values, precision)), query.dtype)


def _repeated(x: Value, times: int) -> Value:
    """Each head `times` times, one after another."""
    batch, heads, rows, dim = x.shape
    repeated = broadcast(unsqueeze(x, 2), (batch, heads, times, rows, dim))
    return reshape(repeated, (batch, heads * times, rows, dim))


def _changed(t: Translation, node: Node, name: str, x: Value, around: Mapping[str, Item | None]) -> Value:
    body: Body | None = node.get(name)
    return x if body is None else t.run(body, {**around, body.inputs[0]: Item(x)})[0].value
