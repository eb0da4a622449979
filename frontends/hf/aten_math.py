"""aten ops that compute: arithmetic, comparisons, nonlinearities, reductions, products, norms, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.llm import Attention, LayerNorm, RMSNorm
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import FLOATS
from llmc.errors import FrontendError
from llmc.frontends.hf.aten import (
    Meaning,
    Scalar,
    Translation,
    axis,
    broadcast,
    cast,
    dtype_name,
    handles,
    promoted,
    reshape,
)

Node = torch.fx.Node


def _arithmetic(make: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    def handler(t: Translation, node: Node, a: Meaning, b: Meaning, alpha: Scalar = 1) -> Value:
        # The result's dtype is the one computed in: torch lets a scalar tensor follow the other operand.
        dtype = t.dtype(node)
        first, second = t.tensor(a, dtype), t.tensor(b, dtype)
        if alpha != 1:
            second = e.Mul(second, e.constant(alpha, dtype))
        return make(first, second)

    return handler


handles("add")(_arithmetic(e.Add))
handles("sub")(_arithmetic(e.Sub))
handles("mul")(_arithmetic(e.Mul))
handles("maximum")(_arithmetic(e.Maximum))
handles("minimum")(_arithmetic(e.Minimum))
handles("remainder")(_arithmetic(e.Mod))
handles("floor_divide")(_arithmetic(e.FloorDivide))


@handles("rsub")
def _rsub(t: Translation, node: Node, a: Meaning, b: Meaning, alpha: Scalar = 1) -> Value:
    first, second = t.tensor(a, t.dtype(node)), t.tensor(b, t.dtype(node))
    return e.Sub(second, first if alpha == 1 else e.Mul(first, e.constant(alpha, first.dtype)))


@handles("div")
def _div(t: Translation, node: Node, a: Meaning, b: Meaning, rounding_mode: str | None = None) -> Value:
    first, second = t.pair(a, b)
    if rounding_mode == "floor":
        return e.FloorDivide(first, second)
    if rounding_mode == "trunc":
        if first.dtype in FLOATS:
            raise FrontendError(f"{node.name}: float division rounded towards zero is not supported")
        return e.Div(first, second)
    return e.Div(cast(first, t.dtype(node)), cast(second, t.dtype(node)))


def _comparison(make: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    def handler(t: Translation, node: Node, a: Meaning, b: Meaning) -> Value:
        given = [arg.meta.get("val") for arg in node.args[:2] if isinstance(arg, Node)]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        if len(tensors) == 2:
            # A scalar tensor follows the other operand here, too: it is rounded to it before they are compared.
            dtype = dtype_name(torch.result_type(*tensors))
            return make(t.tensor(a, dtype), t.tensor(b, dtype))
        return make(*t.pair(a, b))

    return handler


for _names, _make in (
    (("eq",), e.Equal),
    (("ne",), e.NotEqual),
    (("lt", "less"), e.Less),
    (("le", "less_equal"), e.LessEqual),
    (("gt", "greater"), e.Greater),
    (("ge", "greater_equal"), e.GreaterEqual),
):
    handles(*_names)(_comparison(_make))


def _logical(make: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    def handler(t: Translation, node: Node, a: Meaning, b: Meaning) -> Value:
        if "logical" not in str(node.target) and promoted(a, b) != "bool":
            raise FrontendError(f"{node.name}: bitwise operations on integers are not supported")
        return make(_truth(t, a), _truth(t, b))

    return handler


def _truth(t: Translation, value: Meaning) -> Value:
    return t.tensor(value, "bool")  # a number is true where it is not 0


handles("logical_and", "bitwise_and", "__and__")(_logical(e.And))
handles("logical_or", "bitwise_or", "__or__")(_logical(e.Or))
handles("logical_xor", "bitwise_xor", "__xor__")(_logical(e.NotEqual))
handles("logical_not", "bitwise_not")(lambda t, node, x: e.Not(_truth(t, x)))


def _unary(make: Callable[[Value], Value]) -> Callable[..., Value]:
    return lambda t, node, x: make(cast(x, t.dtype(node)))


for _name, _one in (
    ("exp", e.Exp), ("log", e.Log), ("sqrt", e.Sqrt), ("rsqrt", e.Rsqrt), ("reciprocal", e.Reciprocal),
    ("tanh", e.Tanh), ("sigmoid", e.Sigmoid), ("erf", e.Erf), ("sin", e.Sin), ("cos", e.Cos), ("floor", e.Floor),
    ("round", e.Round), ("neg", e.Neg), ("abs", e.Abs), ("relu", e.Relu),
):  # fmt: skip
    handles(_name)(_unary(_one))
handles("silu")(_unary(lambda x: e.Activation(x, "silu")))
handles("square")(_unary(lambda x: e.Mul(x, x)))
handles("expm1")(_unary(lambda x: e.Sub(e.Exp(x), e.constant(1.0, x.dtype))))
handles("ceil")(_unary(lambda x: e.Neg(e.Floor(e.Neg(x))) if x.dtype in FLOATS else x))
handles("log1p")(_unary(lambda x: e.Log(e.Add(x, e.constant(1.0, x.dtype)))))


@handles("sign", "sgn")
def _sign(t: Translation, node: Node, x: Value) -> Value:
    x = cast(x, t.dtype(node))
    zero, one = (e.Cast(e.constant(number), x.dtype) for number in (0, 1))
    # 0 where it is neither above nor below, which torch has for what is no number, too.
    return e.Where(e.Greater(x, zero), one, e.Where(e.Less(x, zero), e.Sub(zero, one), zero))


@handles("leaky_relu")
def _leaky_relu(t: Translation, node: Node, x: Value, negative_slope: float = 0.01) -> Value:
    wide = cast(x, "f32")  # as torch does: a half is rounded once, at the end
    slope, zero = e.constant(float(negative_slope)), e.constant(0.0)
    return cast(e.Where(e.Greater(wide, zero), wide, e.Mul(wide, slope)), x.dtype)


@handles("gelu")
def _gelu(t: Translation, node: Node, x: Value, approximate: str = "none") -> Value:
    return e.Activation(x, "gelu_tanh" if approximate == "tanh" else "gelu")


@handles("softplus")
def _softplus(t: Translation, node: Node, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    x = cast(x, "f32")  # as torch does: a half is rounded once, at the end
    scaled = e.Mul(x, e.constant(float(beta)))
    # log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), which cannot overflow.
    tail = e.Log(e.Add(e.Exp(e.Neg(e.Abs(scaled))), e.constant(1.0)))
    soft: Value = e.Mul(e.Add(e.Relu(scaled), tail), e.constant(1 / beta))
    # From 20 on, torch's own threshold, the tail is less than a rounding: only a lower one shows.
    if threshold < 20:
        soft = e.Where(e.Greater(scaled, e.constant(float(threshold))), x, soft)
    return cast(soft, t.dtype(node))


@handles("clamp", "clamp_min", "clamp_max", "clip")
def _clamp(t: Translation, node: Node, x: Value, low: Meaning = None, high: Meaning = None, **named: Meaning) -> Value:
    name = str(node.target)
    if "clamp_max" in name:
        low, high = None, low
    low, high = named.get("min", low), named.get("max", high)
    dtype = t.dtype(node)
    x = cast(x, dtype)
    if low is not None:
        x = e.Maximum(x, t.tensor(low, dtype))
    return x if high is None else e.Minimum(x, t.tensor(high, dtype))


@handles("pow")
def _pow(t: Translation, node: Node, base: Meaning, exponent: Meaning) -> Value:
    base = t.tensor(base, t.dtype(node))
    if not isinstance(exponent, (Value, Dim)):
        if exponent == 2:
            return e.Mul(base, base)
        if exponent == 3:
            return e.Mul(e.Mul(base, base), base)
        if exponent in (0.5, -0.5):
            return (e.Sqrt if exponent > 0 else e.Rsqrt)(base)
    return e.Pow(base, t.tensor(exponent, base.dtype))


@handles("where")
def _where(t: Translation, node: Node, condition: Value, a: Meaning, b: Meaning) -> Value:
    dtype = t.dtype(node)
    return e.Where(_truth(t, condition), t.tensor(a, dtype), t.tensor(b, dtype))


@handles("masked_fill")
def _masked_fill(t: Translation, node: Node, x: Value, mask: Value, value: Meaning) -> Value:
    return e.Where(mask, t.tensor(value, x.dtype), x)


# Reductions.


def _axes(x: Value, dims: object) -> tuple[int, ...]:
    if dims is None or dims == []:
        return tuple(range(x.rank))
    return tuple(axis(x, d) for d in ([dims] if isinstance(dims, int) else dims))  # type: ignore[attr-defined]


def _reduction(make: Callable[..., Value]) -> Callable[..., Value]:
    def handler(
        t: Translation, node: Node, x: Value, dim: object = None, keepdim: bool = False, dtype: object = None
    ) -> Value:
        return make(cast(x, t.dtype(node)), _axes(x, dim), keepdim)

    return handler


handles("mean")(_reduction(s.Mean))
handles("sum")(_reduction(s.Sum))
handles("amax")(_reduction(s.Max))
handles("amin")(_reduction(s.Min))
handles("any")(_reduction(s.Any))
handles("all")(_reduction(s.All))


@handles("max.dim", "max.default")
def _max(t: Translation, node: Node, x: Value, dim: int | None = None, keepdim: bool = False) -> Meaning:
    if dim is None:
        return s.Max(x, tuple(range(x.rank)), False)
    index = axis(x, dim)
    indices: Value = s.Argmax(x, index)
    if keepdim:
        indices = reshape(indices, (*x.shape[:index], 1, *x.shape[index + 1 :]))
    return s.Max(x, (index,), keepdim), indices


@handles("max.other")
def _max_other(t: Translation, node: Node, a: Value, b: Value) -> Value:
    return e.Maximum(*t.pair(a, b))


@handles("min.other")
def _min_other(t: Translation, node: Node, a: Value, b: Value) -> Value:
    return e.Minimum(*t.pair(a, b))


@handles("argmax")
def _argmax(t: Translation, node: Node, x: Value, dim: int, *_: object) -> Value:
    return reshape(s.Argmax(x, axis(x, dim)), t.shape(node))


@handles("topk")
def _topk(
    t: Translation, node: Node, x: Value, k: int, dim: int = -1, largest: bool = True, *_: object
) -> tuple[Value, Value]:
    if not isinstance(k, int):
        raise FrontendError(f"{node.name}: topk needs a fixed k")
    index = axis(x, dim)
    indices = s.TopK(x, k, index, largest)
    return s.GatherElements(x, indices, index), indices


@handles("cumsum")
def _cumsum(t: Translation, node: Node, x: Value, dim: int, dtype: object = None) -> Value:
    return s.Cumsum(cast(x, t.dtype(node)), axis(x, dim))


@handles("softmax", "_softmax")
def _softmax(t: Translation, node: Node, x: Value, dim: int, dtype: object = None) -> Value:
    return s.Softmax(cast(x, t.dtype(node)), axis(x, dim))


@handles("log_softmax", "_log_softmax")
def _log_softmax(t: Translation, node: Node, x: Value, dim: int, dtype: object = None) -> Value:
    x, along = cast(x, t.dtype(node)), (axis(x, dim),)
    shifted = e.Sub(x, s.Max(x, along))  # exp cannot overflow
    return e.Sub(shifted, e.Log(s.Sum(e.Exp(shifted), along)))


@handles("var", "var_mean")
def _var(
    t: Translation, node: Node, x: Value, dim: object = None, unbiased: bool = True, keepdim: bool = False,
    correction: float | None = None,
) -> Meaning:  # fmt: skip
    axes = _axes(x, dim)
    centred = e.Sub(x, s.Mean(x, axes))
    less = correction if correction is not None else float(unbiased)
    variance: Value = s.Mean(e.Mul(centred, centred), axes, keepdim)
    if less:
        count = product(tuple(x.shape[i] for i in axes))
        if not isinstance(count, int):
            raise FrontendError(f"{node.name}: an unbiased variance over the tokens is not supported")
        if count <= less:
            raise FrontendError(f"{node.name}: a variance of {count} elements, corrected by {less}, is not a number")
        variance = e.Mul(variance, e.constant(count / (count - less)))
    return (variance, s.Mean(x, axes, keepdim)) if "var_mean" in str(node.target) else variance


# Products.


@handles("matmul", "bmm", "mm")
def _matmul(t: Translation, node: Node, a: Value, b: Value) -> Value:
    first = reshape(a, (1, *a.shape)) if a.rank == 1 else a
    second = reshape(b, (*b.shape, 1)) if b.rank == 1 else b
    return reshape(s.Matmul(first, second), t.shape(node))


@handles("linear")
def _linear(t: Translation, node: Node, x: Value, w: Value, bias: Value | None = None) -> Value:
    rows = reshape(x, (1, *x.shape)) if x.rank == 1 else x
    y: Value = reshape(s.Matmul(rows, s.Transpose(w, (1, 0))), t.shape(node))
    return y if bias is None else e.Add(y, bias)


@handles("addmm", "baddbmm")
def _addmm(t: Translation, node: Node, c: Value, a: Value, b: Value, beta: Scalar = 1, alpha: Scalar = 1) -> Value:
    y: Value = s.Matmul(a, b)
    if alpha != 1:
        y = e.Mul(y, e.constant(float(alpha)))
    if beta == 0:
        return y
    return e.Add(y, c if beta == 1 else e.Mul(c, e.constant(float(beta))))


@handles("outer")
def _outer(t: Translation, node: Node, a: Value, b: Value) -> Value:
    first, second = t.pair(a, b)
    return e.Mul(reshape(first, (*first.shape, 1)), second)


@handles("einsum")
def _einsum(t: Translation, node: Node, equation: str, operands: list[Value], path: object = None) -> Value:
    """Two operands, every letter at most once in each: transposes, a matmul over the summed letters, a transpose."""
    sides, _, result = equation.replace(" ", "").partition("->")
    names = sides.split(",")
    if len(names) != 2 or any(len(set(n)) != len(n) for n in names):
        raise FrontendError(f"{node.name}: einsum {equation!r} is not supported")
    (first, second), (a, b) = names, t.pair(*operands)
    sizes = dict(zip(first + second, a.shape + b.shape, strict=True))
    batch = [n for n in first if n in second and n in result]
    summed = [n for n in first if n in second and n not in result]
    left, right = ([n for n in name if n not in batch + summed] for name in (first, second))
    if set(batch + left + right) != set(result):
        raise FrontendError(f"{node.name}: einsum {equation!r} is not supported")

    def matrices(x: Value, name: str, *groups: list[str]) -> Value:
        order = [n for group in groups for n in group]
        x = s.Transpose(x, tuple(name.index(n) for n in order))
        return reshape(x, (*(sizes[n] for n in groups[0]), *(product(tuple(sizes[n] for n in g)) for g in groups[1:])))

    y: Value = s.Matmul(matrices(a, first, batch, left, summed), matrices(b, second, batch, summed, right))
    order = batch + left + right
    y = reshape(y, tuple(sizes[n] for n in order))
    return s.Transpose(y, tuple(order.index(n) for n in result))


# Norms and attention, in the form that `llm` ops decompose to.


def _decomposed(op: Op) -> Value:
    value = op.decompose()
    assert value is not None
    return value


@handles("layer_norm", "native_layer_norm")
def _layer_norm(
    t: Translation, node: Node, x: Value, shape: list[int], w: Value | None = None, b: Value | None = None,
    eps: float = 1e-5, *_: object,
) -> Meaning:  # fmt: skip
    if len(shape) != 1:
        raise FrontendError(f"{node.name}: a norm over {len(shape)} axes is not supported")
    y = _decomposed(LayerNorm(x, w, b, eps))
    return (y,) if "native" in str(node.target) else y


@handles("rms_norm")
def _rms_norm(
    t: Translation, node: Node, x: Value, shape: list[int], w: Value | None = None, eps: float | None = None
) -> Value:
    if len(shape) != 1:
        raise FrontendError(f"{node.name}: a norm over {len(shape)} axes is not supported")
    return _decomposed(RMSNorm(x, w, torch.finfo(torch.float32).eps if eps is None else eps))


@handles("linalg_vector_norm")
def _vector_norm(
    t: Translation, node: Node, x: Value, order: float = 2, dim: object = None, keepdim: bool = False,
    dtype: object = None,
) -> Value:  # fmt: skip
    if order != 2:
        raise FrontendError(f"{node.name}: a norm of order {order} is not supported")
    return e.Sqrt(s.Sum(e.Mul(x, x), _axes(x, dim), keepdim))


@handles("scaled_dot_product_attention")
def _sdpa(
    t: Translation, node: Node, q: Value, k: Value, v: Value, mask: Value | None = None, dropout: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **_: object,
) -> Value:  # fmt: skip
    if dropout:
        raise FrontendError(f"{node.name}: attention that drops {dropout} of its probabilities is not supported")
    width = q.shape[-1]
    assert isinstance(width, int)
    scale = width**-0.5 if scale is None else scale
    swap = (*range(q.rank - 3), q.rank - 2, q.rank - 3, q.rank - 1)
    queries, keys = q.shape[-2], k.shape[-2]
    if is_causal and queries != keys:
        # torch's first query stands at the first key, whatever their numbers; ours stand at the end.
        mask = e.LessEqual(s.Iota(keys), reshape(s.Iota(queries), (queries, 1)))
    if mask is None:
        q, k, v = (s.Transpose(x, swap) for x in (q, k, v))
        return s.Transpose(Attention(q, k, v, scale=scale, causal=is_causal), swap)
    if q.shape[-3] != k.shape[-3]:
        k, v = (_repeat_heads(x, q.shape[-3]) for x in (k, v))
    last = (*range(k.rank - 2), k.rank - 1, k.rank - 2)
    scores: Value = e.Mul(s.Matmul(q, s.Transpose(k, last)), e.constant(float(scale)))
    scores = e.Where(mask, scores, e.constant(-math.inf, "f32")) if mask.dtype == "bool" else e.Add(scores, mask)
    return s.Matmul(s.Softmax(scores, scores.rank - 1), v)


def _repeat_heads(x: Value, heads: int | Dim) -> Value:
    *leading, kv_heads, tokens, width = x.shape
    assert isinstance(kv_heads, int)
    groups = s.split_exact(heads, kv_heads)
    grown = broadcast(reshape(x, (*leading, kv_heads, 1, tokens, width)), (*leading, kv_heads, groups, tokens, width))
    return reshape(grown, (*leading, heads, tokens, width))


@dataclass(frozen=True)
class Mask:
    """What a captured mask means. It has no tensor: only attention can use it."""

    causal: bool
    window: int


@handles("llmc::mask")
def _mask(t: Translation, node: Node, like: Value, queries: object, keys: object, causal: bool, window: int) -> Mask:
    return Mask(causal, window)


@handles("llmc::attention")
def _attention(
    t: Translation, node: Node, q: Value, k: Value, v: Value, mask: Mask | None, sinks: Value | None,
    scale: float, causal: bool, window: int, softcap: float,
) -> Value:  # fmt: skip
    if mask is not None:
        if mask.causal and not mask.window and not causal:
            raise FrontendError(
                f"{node.name}: the model's mask hides tokens ahead, and its layers say that they see them (is_causal): "
                "transformers' own kinds of attention differ there, so it is refused. In config.json, say is_causal: "
                "false if they are to be seen; if not, take out what says so (use_bidirectional_attention)"
            )
        # transformers' plain attention knows windows from its masks alone.
        causal, window = mask.causal, mask.window
    elif not causal and window:
        raise FrontendError(f"{node.name}: a window without causality is not supported")
    q, k, v = (s.Transpose(x, (0, 2, 1, 3)) for x in (q, k, v))
    if sinks is not None:
        sinks = reshape(sinks, (q.shape[2],))
    return Attention(q, k, v, sinks, scale=scale, causal=causal, window=window, softcap=softcap)
