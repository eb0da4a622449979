"""Integers of ONNX graphs and what they stand for: QuantizeLinear, DequantizeLinear and their relatives.

Stored integers become `llm.scale_integers`, of which the passes keep the integers where a linear op or an embedding
reads them. Rounded activations are rounded as the source rounds them, unless a pass finds the whole product.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.elementwise import (
    Cast,
    Constant,
    Div,
    Equal,
    Maximum,
    Minimum,
    Mul,
    Neg,
    Relu,
    Round,
    Sigmoid,
    Sub,
    Where,
    constant,
)
from llmc.compiler.ir.integers import RoundToIntegers, ScaleIntegers, UnpackNibbles, repeat_blocks
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.structural import Gather, Matmul, Max, Min, Reshape, Softmax, Transpose
from llmc.compiler.ir.types import FLOATS, INTEGERS
from llmc.frontends.onnx.contrib_parts import MICROSOFT, given, in_dtype, known, refuse_attributes, require, sum_of
from llmc.frontends.onnx.forms import along, cut, dtype_named, reshape
from llmc.frontends.onnx.translation import Item, Node, Result, Translation, Unsupported, handles


def is_stored(value: Value) -> bool:
    """Whether a value is known when compiling."""
    pending, seen = [value], {value}
    while pending:
        found = pending.pop()
        if isinstance(found, (Param, Constant)):
            continue
        if not isinstance(found, Op) or not found.operands:
            return False
        pending.extend(operand for operand in found.operands if operand not in seen)
        seen.update(found.operands)
    return True


def _along(node: Node, x: Value, values: Value) -> tuple[Value, int, int]:
    """Scales or zero points as they broadcast to x, the axis, and the block size (0: they do broadcast)."""
    axis = int(node.get("axis", 1))
    block = int(node.get("block_size", 0))
    if values.shape in ((), (1,)):
        return reshape(values, ()), 0, 0
    require(-x.rank <= axis < x.rank, f"axis {axis} of {x.type}")
    axis %= x.rank
    if block and values.rank == x.rank:
        return values, axis, block
    require(values.rank == 1, f"scales of {list(values.shape)} for {list(x.shape)}: one a tensor, an axis or a block")
    return along(values, axis, x.rank), axis, 0


@handles("DequantizeLinear")
@handles("DequantizeLinear", domain=MICROSOFT, attributes=("axis", "block_size", "output_dtype"))
def dequantize_linear(t: Translation, node: Node, q: Item, scale: Item, zero: Item | None = None) -> Result:
    """(q - zero) * scale; one scale a tensor, an index of an axis, or a block of an axis."""
    integers = q.value
    require(integers.dtype in INTEGERS, f"the data are {integers.dtype}, not integers")
    wanted = int(node.get("output_dtype", 0))
    dtype = t.dtype(dtype_named(wanted)) if wanted else scale.dtype
    if t.wide_floats and isinstance(integers, RoundToIntegers):
        whole = _unrounded(integers, scale, zero)
        if whole is not None:
            return in_dtype(whole, dtype)
    if isinstance(integers, Gather) and is_stored(integers.x) and scale.rank == 0:
        # Rows of an integer table, one scale for all: the same as rows of what the table stands for.
        table = _scaled(node, integers.x, scale.value, given(zero))
        return in_dtype(Gather(table, integers.indices, integers.axis), dtype)
    return in_dtype(_scaled(node, integers, scale.value, given(zero)), dtype)


def _unrounded(rounded: RoundToIntegers, scale: Item, zero: Item | None) -> Value | None:
    """Activations that are rounded by calibrated scales and scaled back, as they were; None where the scales differ.

    For text models, where a rounding is the lowest precision that kernels may use. Quantizers leave out a relu in front
    of integers that begin at 0: it is put back, unless nothing there is negative.
    """
    if zero is None or rounded.zero is None or not (_same(rounded.scale, scale) and _same(rounded.zero, zero)):
        return None
    lowest, _ = rounded.limits
    x = rounded.x
    if zero.numbers is None or not bool((zero.numbers == lowest).all()) or isinstance(x, (Softmax, Sigmoid, Relu)):
        return x
    return Relu(x)


def _same(value: Value, item: Item) -> bool:
    """Whether a value is an item's, or the same known numbers."""
    while isinstance(value, Reshape):
        value = value.x
    if value is item.value:
        return True
    known = value.evaluate() if isinstance(value, Constant) else None
    numbers = item.numbers
    return known is not None and numbers is not None and np.array_equal(known.reshape(-1), numbers.reshape(-1))


def _scaled(node: Node, q: Value, scale: Value, zero: Value | None) -> Value:
    scales, axis, block = _along(node, q, scale)
    zeros = None
    if zero is not None:
        zeros, *other = _along(node, q, zero)
        require(other == [axis, block], "the zero points are not shaped like the scales")
    found = ScaleIntegers(q, scales, zeros, axis, block)
    if is_stored(found):
        return found
    simple = found.decompose()
    assert simple is not None
    return simple


@handles("QuantizeLinear")
@handles("QuantizeLinear", domain=MICROSOFT, attributes=("axis", "block_size", "output_dtype", "precision", "saturate"))
def quantize_linear(t: Translation, node: Node, x: Item, scale: Item, zero: Item | None = None) -> Result:
    """clip(round(x / scale) + zero); the zero point's dtype, or output_dtype, or u8."""
    refuse_attributes(node, precision=0)
    wanted = int(node.get("output_dtype", 0))
    dtype = zero.dtype if zero is not None else dtype_named(wanted) if wanted else "u8"
    require(dtype in INTEGERS, f"rounding to {dtype} is not supported, only to integers")
    parts = []
    for value in (scale.value, given(zero)):
        if value is not None:
            values, axis, block = _along(node, x.value, value)
            value = repeat_blocks(values, axis, block, x.shape[axis]) if block else values
        parts.append(value)
    assert parts[0] is not None
    return RoundToIntegers(x.value, parts[0], parts[1], dtype)


@handles("DynamicQuantizeLinear")
def dynamic_quantize_linear(t: Translation, node: Node, x: Item) -> Result:
    """x as u8 by its own range, which takes in 0; outputs: the integers, their scale f32, their zero point u8."""
    value = x.value
    axes, zero = tuple(range(value.rank)), constant(0.0, value.dtype)
    highest = Maximum(Max(value, axes, False), zero)
    lowest = Minimum(Min(value, axes, False), zero)
    width = Div(Sub(highest, lowest), constant(255.0, value.dtype))
    scale = Where(Equal(width, zero), constant(1.0, value.dtype), width)
    start = Minimum(Maximum(Round(Div(Neg(lowest), scale)), zero), constant(255.0, value.dtype))
    middle = Cast(start, "u8")
    return [RoundToIntegers(value, scale, middle, "u8"), scale, middle]


def integer_product(
    a: Value, b: Value, a_scale: Value, b_scale: Value, a_zero: Value | None, b_zero: Value | None
) -> Value:
    """(a - a_zero) @ (b - b_zero) in i32, times both scales; those of b are one, or one a column."""
    sides = []
    for x, zero in ((a, a_zero), (b, b_zero)):
        wide: Value = Cast(x, "i32")
        sides.append(wide if zero is None else Sub(wide, Cast(zero, "i32")))
    return Mul(Cast(Matmul(*sides), "f32"), Mul(a_scale, b_scale))


@handles("MatMulIntegerToFloat", domain=MICROSOFT, attributes=())
def matmul_integer_to_float(
    t: Translation,
    node: Node,
    a: Item,
    b: Item,
    a_scale: Item,
    b_scale: Item,
    a_zero: Item | None = None,
    b_zero: Item | None = None,
    bias: Item | None = None,
) -> Result:
    """The product of what integers stand for, plus a bias."""
    require(a_scale.rank == 0 or a_scale.shape == (1,), f"a scale of {list(a_scale.shape)} for a: only one")
    found = integer_product(a.value, b.value, a_scale.value, b_scale.value, given(a_zero), given(b_zero))
    return sum_of(found, given(bias))


@handles("DynamicQuantizeMatMul", domain=MICROSOFT, attributes=())
def dynamic_quantize_matmul(
    t: Translation, node: Node, a: Item, b: Item, b_scale: Item, b_zero: Item | None = None, bias: Item | None = None
) -> Result:
    """a, rounded by its own range, times what the integers b stand for, plus a bias."""
    rounded = dynamic_quantize_linear(t, node, a)
    assert isinstance(rounded, list)
    x, scale, zero = rounded
    return sum_of(integer_product(x, b.value, scale, b_scale.value, zero, given(b_zero)), given(bias))


@handles(
    "MatMulNBits", domain=MICROSOFT, attributes=("N", "K", "bits", "block_size", "accuracy_level", "weight_prepacked")
)
def matmul_n_bits(
    t: Translation,
    node: Node,
    x: Item,
    packed: Item,
    scales: Item,
    zeros: Item | None = None,
    g_idx: Item | None = None,
    bias: Item | None = None,
) -> Result:
    """x @ w^T + bias, w [N, K] of 4 or 8 bits in blocks along K: (q - zero) * scale.

    packed: u8 [N, blocks, bytes]; scales: [N, blocks]; zeros: as integers packed like them [N, bytes] (the middle of
    their range where left out), or floats [N, blocks].
    """
    rows, inputs, bits = int(node.attributes["N"]), int(node.attributes["K"]), int(node.get("bits", 4))
    block = int(node.attributes["block_size"])
    require(bits in (4, 8), f"bits={bits}: only 4 and 8 bits are supported")
    require(block >= 16 and block & (block - 1) == 0, f"block_size={block}: a power of two from 16 on")
    refuse_attributes(node, weight_prepacked=0)
    require(g_idx is None, "g_idx (inputs in another order) is not supported: export without act_order")
    require(packed.dtype == "u8", f"packed weights are {packed.dtype}, not u8")
    blocks = -(-inputs // block)
    flat = Reshape(packed.value, (rows, blocks * block * bits // 8))
    q = cut(UnpackNibbles(flat) if bits == 4 else flat, 1, 0, inputs)
    w = ScaleIntegers(q, Reshape(scales.value, (rows, blocks)), _zeros(zeros, rows, blocks, bits), 1, block)
    y = Matmul(x.value, Transpose(in_dtype(w, x.dtype), (1, 0)))
    return sum_of(y, given(bias))


def _zeros(zeros: Item | None, rows: int, blocks: int, bits: int) -> Value:
    """Zero points [rows, blocks], or [1, 1] for the middle of the range."""
    if zeros is None:
        return constant([[1 << (bits - 1)]], "u8")
    if bits == 8:
        require(zeros.dtype == "u8", f"zero points are {zeros.dtype}: with 8 bits only uint8 is supported")
    elif zeros.dtype not in FLOATS:
        require(zeros.dtype == "u8", f"zero points are {zeros.dtype}: only uint8 and floats are supported")
        return cut(UnpackNibbles(Reshape(zeros.value, (rows, -(-blocks // 2)))), 1, 0, blocks)
    return Reshape(zeros.value, (rows, blocks))


@handles("GatherBlockQuantized", domain=MICROSOFT, attributes=("bits", "block_size", "gather_axis", "quantize_axis"))
def gather_block_quantized(
    t: Translation, node: Node, data: Item, indices: Item, scales: Item, zeros: Item | None = None
) -> Result:
    """Rows of a table [.., K] of 4 or 8 bits in blocks along its last axis."""
    bits, block = int(node.get("bits", 4)), int(node.get("block_size", 128))
    require(bits in (4, 8), f"bits={bits}: only 4 and 8 bits are supported")
    require(data.dtype == "u8", f"the table is {data.dtype}: only uint8 is supported")
    require(data.rank == 2 and node.get("gather_axis", 0) in (0, -2), "only rows of a matrix are looked up")
    require(node.get("quantize_axis", 1) in (1, -1), "only blocks along the last axis are supported")
    rows = known(data.shape[0], "the table's rows")
    q: Value = UnpackNibbles(data.value) if bits == 4 else data.value
    if zeros is not None and zeros.dtype != "u8":
        raise Unsupported(f"zero points are {zeros.dtype}: only uint8 is supported")
    points = _zeros(zeros, rows, known(scales.shape[1], "the number of blocks"), bits)
    return Gather(ScaleIntegers(q, scales.value, points, 1, block), indices.value, 0)
