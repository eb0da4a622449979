"""LayerNormalization and RMSNormalization of the standard: over the last axes, as norms over one."""

from __future__ import annotations

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.llm import LayerNorm, RMSNorm
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.shapes import axis_of
from llmc.compiler.ir.structural import Mean
from llmc.frontends.onnx.forms import broadcast, cast, dtype_named, like, reshape
from llmc.frontends.onnx.translation import Item, Node, Result, Translation, handles


@handles("LayerNormalization", since=17)
def layer_normalization(t: Translation, node: Node, x: Item, scale: Item, bias: Item | None = None) -> Result:
    """Outputs: (x - mean) / deviation * scale + bias; mean and 1 / deviation, in stash_type, over axes kept as 1."""
    axis = axis_of(node.get("axis", -1), x.rank)
    epsilon = float(node.get("epsilon", 1e-5))
    rows = _rows(x.value, axis)
    weights = [None if item is None else _vector(item.value, x.shape[axis:], rows) for item in (scale, bias)]
    found = reshape(LayerNorm(rows, weights[0], weights[1], epsilon), x.shape)
    wide = cast(rows, t.dtype(dtype_named(node.get("stash_type", 1))))
    last = (rows.rank - 1,)
    mean = Mean(wide, last)
    apart = e.Sub(wide, mean)
    inverse = e.Rsqrt(e.Add(Mean(e.Mul(apart, apart), last), like(epsilon, wide)))
    kept = (*x.shape[:axis], *(1,) * (x.rank - axis))
    return [found, reshape(mean, kept), reshape(inverse, kept)]


@handles("RMSNormalization", since=23)
def rms_normalization(t: Translation, node: Node, x: Item, scale: Item) -> Result:
    """x / root mean square * scale, in the scale's dtype."""
    axis = axis_of(node.get("axis", -1), x.rank)
    rows = _rows(cast(x.value, scale.dtype), axis)
    weight = _vector(scale.value, x.shape[axis:], rows)
    return reshape(RMSNorm(rows, weight, float(node.get("epsilon", 1e-5))), x.shape)


def _rows(x: Value, axis: int) -> Value:
    """The axes from `axis` on as one."""
    return reshape(x, (*x.shape[:axis], product(x.shape[axis:])))


def _vector(weight: Value, shape: tuple[int | Dim, ...], rows: Value) -> Value:
    """A weight that broadcasts to the last axes, as one number a column."""
    return reshape(broadcast(cast(weight, rows.dtype), shape), rows.shape[-1:])
