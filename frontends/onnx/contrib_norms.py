"""Normalisations, embeddings and activations that ONNX Runtime's optimiser fuses (domain com.microsoft)."""

from __future__ import annotations

from llmc.compiler.ir.elementwise import Activation, Add, Cast, Equal, Mul, Sigmoid, constant
from llmc.compiler.ir.llm import LayerNorm, RMSNorm
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Broadcast, Gather, Iota, Matmul, Reshape, Sum
from llmc.frontends.onnx.contrib_parts import (
    MICROSOFT,
    given,
    part,
    refuse_attributes,
    require,
    scaled,
    split,
    statistics,
    sum_of,
)
from llmc.frontends.onnx.forms import reshape
from llmc.frontends.onnx.translation import Item, Node, Result, Translation, handles

SKIP_EPSILON = 1e-12


@handles("SimplifiedLayerNormalization")
@handles("SimplifiedLayerNormalization", domain=MICROSOFT, attributes=("axis", "epsilon", "stash_type"))
def simplified_layer_normalization(t: Translation, node: Node, x: Item, scale: Item) -> Result:
    """RMS norm over the last axis; outputs: the result, 1 / root mean square."""
    require(node.get("axis", -1) in (-1, x.rank - 1), f"axis={node.get('axis')} of rank {x.rank}: only the last axis")
    eps = float(node.get("epsilon", 1e-5))
    weight = reshape(scale.value, x.shape[-1:])
    return [RMSNorm(x.value, weight, eps), statistics(x.value, eps, False)[1]]


def _with_skip(x: Value, skip: Value, bias: Value | None) -> Value:
    """x + skip + bias, where the bias joins the product that it belongs to, if one of them is one."""
    return sum_of(sum_of(x, bias), skip) if isinstance(x, Matmul) else sum_of(x, sum_of(skip, bias))


@handles("SkipLayerNormalization", domain=MICROSOFT, attributes=("epsilon",))
def skip_layer_normalization(
    t: Translation, node: Node, x: Item, skip: Item, gamma: Item, beta: Item | None = None, bias: Item | None = None
) -> Result:
    """Layer norm of x + skip + bias; outputs: the result, mean, 1 / deviation, the sum."""
    eps = float(node.get("epsilon", SKIP_EPSILON))
    total = _with_skip(x.value, skip.value, given(bias))
    result = LayerNorm(total, gamma.value, given(beta), eps)
    return [result, *statistics(total, eps, True), total]


@handles("SkipSimplifiedLayerNormalization", domain=MICROSOFT, attributes=("epsilon",))
def skip_simplified_layer_normalization(
    t: Translation, node: Node, x: Item, skip: Item, gamma: Item, bias: Item | None = None
) -> Result:
    """RMS norm of x + skip + bias; outputs: the result, mean, 1 / root mean square, the sum."""
    eps = float(node.get("epsilon", SKIP_EPSILON))
    total = _with_skip(x.value, skip.value, given(bias))
    return [RMSNorm(total, gamma.value, eps), *statistics(total, eps, False), total]


@handles("EmbedLayerNormalization", domain=MICROSOFT, attributes=("epsilon", "mask_index_type"))
def embed_layer_normalization(
    t: Translation,
    node: Node,
    ids: Item,
    segments: Item | None,
    words: Item,
    positions: Item,
    segment_table: Item | None,
    gamma: Item,
    beta: Item,
    mask: Item | None = None,
    position_ids: Item | None = None,
) -> Result:
    """Layer norm of the word, position and segment embeddings of ids [B, S].

    Outputs: the result [B, S, features]; i32 [B], how many ones the mask has (zeros without a mask); the sum.
    """
    batch, tokens = ids.shape
    if position_ids is None:
        at: Value = Reshape(Iota(tokens), (1, tokens))
    else:
        at = position_ids.value
    total: Value = Add(Gather(words.value, ids.value, 0), Gather(positions.value, at, 0))
    if segments is not None and segment_table is not None:
        total = Add(total, Gather(segment_table.value, segments.value, 0))
    else:
        alone = segments is not None or segment_table is not None
        require(not alone, "segment ids and their table come together or not at all")
    result = LayerNorm(total, gamma.value, beta.value, float(node.get("epsilon", SKIP_EPSILON)))
    if mask is None:
        ends: Value = Broadcast(constant(0, "i32"), (batch,))
    else:
        refuse_attributes(node, mask_index_type=1)
        ones = Equal(mask.value, constant(1, mask.dtype))
        ends = Cast(Sum(Cast(ones, "i64"), (1,), False), "i32")
    return [result, ends, total]


@handles("Gelu", domain=MICROSOFT, attributes=())
def gelu(t: Translation, node: Node, x: Item) -> Result:
    """x / 2 * (1 + erf(x / sqrt(2)))"""
    return Activation(x.value, "gelu")


@handles("BiasGelu", domain=MICROSOFT, attributes=())
def bias_gelu(t: Translation, node: Node, x: Item, bias: Item) -> Result:
    """gelu(x + bias)"""
    return Activation(sum_of(x.value, bias.value), "gelu")


@handles("FastGelu", domain=MICROSOFT, attributes=())
def fast_gelu(t: Translation, node: Node, x: Item, bias: Item | None = None) -> Result:
    """gelu of x + bias by tanh."""
    return Activation(sum_of(x.value, given(bias)), "gelu_tanh")


@handles("QuickGelu", domain=MICROSOFT, attributes=("alpha",))
def quick_gelu(t: Translation, node: Node, x: Item) -> Result:
    """x * sigmoid(alpha * x)"""
    return Mul(x.value, Sigmoid(scaled(x.value, float(node.get("alpha", 1.702)))))


@handles("BiasSplitGelu", domain=MICROSOFT, attributes=())
def bias_split_gelu(t: Translation, node: Node, x: Item, bias: Item) -> Result:
    """left * gelu(right) for the halves of x + bias along the last axis."""
    total = sum_of(x.value, bias.value)
    half = split(total.shape[-1], 2, "the last axis")
    left, right = part(total, -1, 0, half), part(total, -1, half, total.shape[-1])
    return Mul(left, Activation(right, "gelu"))
