"""Integers as bits."""

from __future__ import annotations

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.op import Value
from llmc.frontends.onnx.forms import dtype_named, highest, like
from llmc.frontends.onnx.translation import Item, Node, Translation, handles


@handles("BitShift")
def _bit_shift(t: Translation, node: Node, a: Item, b: Item) -> Value:
    return (e.ShiftLeft if node.get("direction") == "LEFT" else e.ShiftRight)(a.value, b.value)


handles("BitwiseAnd")(lambda t, node, a, b: e.BitAnd(a.value, b.value))
handles("BitwiseOr")(lambda t, node, a, b: e.BitOr(a.value, b.value))
handles("BitwiseXor")(lambda t, node, a, b: e.BitXor(a.value, b.value))


@handles("BitwiseNot")
def _bitwise_not(t: Translation, node: Node, x: Item) -> Value:
    # Against a number of which every bit is set.
    return e.BitXor(x.value, like(highest(x.dtype) if x.dtype.startswith("u") else -1, x.value))


@handles("BitCast")
def _bit_cast(t: Translation, node: Node, x: Item) -> Value:
    return e.Bitcast(x.value, dtype_named(node.attributes["to"]))
