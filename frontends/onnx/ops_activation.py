"""Nonlinearities, and the functions that are built of exp, log and the like.

log(1 + x) and exp(x) - 1 near zero follow W. Kahan's trick (as in Higham, Accuracy and Stability of Numerical
Algorithms, 1.14.1): what rounding does to 1 + x is undone by dividing by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.op import Value
from llmc.frontends.onnx.forms import broadcast, like, numbers, require_floats
from llmc.frontends.onnx.translation import Handler, Item, Node, Translation, Unsupported, handles


def log1p(x: Value) -> Value:
    """log(1 + x), exact to rounding for small x."""
    one = like(1, x)
    grown = e.Add(one, x)
    exact = e.Mul(x, e.Div(e.Log(grown), e.Sub(grown, one)))
    # Beyond the largest float grown is infinite, and so is its logarithm.
    return e.Where(e.Equal(grown, one), x, e.Where(e.Equal(grown, like(math.inf, x)), grown, exact))


def expm1(x: Value) -> Value:
    """exp(x) - 1, exact to rounding for small x."""
    one, power = like(1, x), e.Exp(x)
    less = e.Sub(power, one)
    exact = e.Mul(less, e.Div(x, e.Log(power)))
    far = e.Or(e.Equal(less, like(-1, x)), e.Equal(power, like(math.inf, x)))
    return e.Where(e.Equal(power, one), x, e.Where(far, less, exact))


def _halved(x: Value) -> Value:
    return e.Mul(x, like(0.5, x))


def _sinh(x: Value) -> Value:
    # (g + g / (g + 1)) / 2 with g = e^|x| - 1; away from zero (e^|x| - e^-|x|) / 2, by halves so as not to overflow.
    size = e.Abs(x)
    grown = expm1(size)
    near = _halved(e.Add(grown, e.Div(grown, e.Add(grown, like(1, x)))))
    half = e.Exp(_halved(size))
    far = e.Sub(e.Mul(_halved(half), half), e.Div(like(0.5, x), e.Mul(half, half)))
    found = e.Where(e.Less(size, like(8, x)), near, far)
    return e.Where(e.Less(x, like(0, x)), e.Neg(found), e.Where(e.Equal(x, like(0, x)), x, found))


def _cosh(x: Value) -> Value:
    half = e.Exp(_halved(e.Abs(x)))
    return e.Add(e.Mul(_halved(half), half), e.Div(like(0.5, x), e.Mul(half, half)))


def _asinh(x: Value) -> Value:
    # log(|x| + sqrt(x^2 + 1)) = log1p(|x| + x^2 / (1 + sqrt(x^2 + 1)))
    size, square = e.Abs(x), e.Mul(x, x)
    root = e.Sqrt(e.Add(square, like(1, x)))
    near = log1p(e.Add(size, e.Div(square, e.Add(root, like(1, x)))))
    found = e.Where(e.Equal(square, like(math.inf, x)), _log_of_twice(size), near)
    return e.Where(e.Less(x, like(0, x)), e.Neg(found), found)


def _acosh(x: Value) -> Value:
    # log(x + sqrt(x^2 - 1)) = log1p(y + sqrt(y) sqrt(x + 1)) with y = x - 1, of which there is no root below 1.
    one = like(1, x)
    above = e.Sub(x, one)
    grown = e.Add(above, e.Mul(e.Sqrt(above), e.Sqrt(e.Add(x, one))))
    return e.Where(e.Equal(grown, like(math.inf, x)), _log_of_twice(x), log1p(grown))


def _log_of_twice(x: Value) -> Value:
    """log(2 x), where 2 x may overflow."""
    return e.Add(e.Log(x), like(math.log(2), x))


def _atanh(x: Value) -> Value:
    size = e.Abs(x)
    found = _halved(log1p(e.Div(e.Add(size, size), e.Sub(like(1, x), size))))
    return e.Where(e.Less(x, like(0, x)), e.Neg(found), found)


def _asin(x: Value) -> Value:
    one = like(1, x)
    return e.Atan(e.Div(x, e.Sqrt(e.Mul(e.Sub(one, x), e.Add(one, x)))))


def _acos(x: Value) -> Value:
    one = like(1, x)
    return e.Mul(e.Atan(e.Sqrt(e.Div(e.Sub(one, x), e.Add(one, x)))), like(2, x))


def softplus(x: Value) -> Value:
    """log(1 + exp(x)), which never overflows."""
    return e.Add(e.Maximum(x, like(0, x)), log1p(e.Exp(e.Neg(e.Abs(x)))))


def _floats(make: Callable[[Value], Value]) -> Handler:
    def handler(t: Translation, node: Node, x: Item) -> Value:
        require_floats(x.value)
        return make(x.value)

    return handler


for _name, _make in (
    ("Sinh", _sinh), ("Cosh", _cosh), ("Asinh", _asinh), ("Acosh", _acosh), ("Atanh", _atanh), ("Asin", _asin),
    ("Acos", _acos), ("Atan", e.Atan), ("Softplus", softplus),
    ("Tan", lambda x: e.Div(e.Sin(x), e.Cos(x))),
    ("Softsign", lambda x: e.Div(x, e.Add(like(1, x), e.Abs(x)))),
    ("Mish", lambda x: e.Mul(x, e.Tanh(softplus(x)))),
):  # fmt: skip
    handles(_name)(_floats(_make))


def _positive(x: Value) -> Value:
    return e.Greater(x, like(0, x))


@handles("LeakyRelu")
def _leaky_relu(t: Translation, node: Node, x: Item) -> Value:
    value = x.value
    scaled = e.Mul(value, like(node.get("alpha", 0.01), value))
    return e.Where(e.Less(value, like(0, value)), scaled, value)


@handles("ThresholdedRelu")
def _thresholded_relu(t: Translation, node: Node, x: Item) -> Value:
    value = x.value
    return e.Where(e.Greater(value, like(node.get("alpha", 1.0), value)), value, like(0, value))


@handles("Elu")
def _elu(t: Translation, node: Node, x: Item) -> Value:
    value = x.value
    return e.Where(_positive(value), value, e.Mul(expm1(value), like(node.get("alpha", 1.0), value)))


@handles("Celu")
def _celu(t: Translation, node: Node, x: Item) -> Value:
    value, alpha = x.value, node.get("alpha", 1.0)
    below = e.Mul(expm1(e.Div(value, like(alpha, value))), like(alpha, value))
    return e.Add(e.Maximum(value, like(0, value)), e.Minimum(below, like(0, value)))


@handles("Selu")
def _selu(t: Translation, node: Node, x: Item) -> Value:
    """Klambauer et al., Self-Normalizing Neural Networks (2017)."""
    value = x.value
    alpha, gamma = node.get("alpha", 1.6732631921768188), node.get("gamma", 1.0507010221481323)
    chosen = e.Where(_positive(value), value, e.Mul(expm1(value), like(alpha, value)))
    return e.Mul(chosen, like(gamma, value))


@handles("HardSigmoid")
def _hard_sigmoid(t: Translation, node: Node, x: Item) -> Value:
    return _hard(x.value, node.get("alpha", 0.2), node.get("beta", 0.5))


@handles("HardSwish")
def _hard_swish(t: Translation, node: Node, x: Item) -> Value:
    return e.Mul(x.value, _hard(x.value, 1 / 6, 0.5))


def _hard(x: Value, slope: float, offset: float) -> Value:
    """A line cut off at 0 and 1."""
    line = e.Add(e.Mul(x, like(slope, x)), like(offset, x))
    return e.Minimum(e.Maximum(line, like(0, x)), like(1, x))


@handles("Shrink")
def _shrink(t: Translation, node: Node, x: Item) -> Value:
    value, threshold, bias = x.value, node.get("lambd", 0.5), node.get("bias", 0.0)
    below = e.Where(e.Less(value, like(-threshold, value)), e.Add(value, like(bias, value)), like(0, value))
    return e.Where(e.Greater(value, like(threshold, value)), e.Sub(value, like(bias, value)), below)


@handles("Swish")
def _swish(t: Translation, node: Node, x: Item) -> Value:
    return swish(x.value, node.get("alpha", 1.0))


def swish(x: Value, alpha: float) -> Value:
    """x * sigmoid(alpha * x)"""
    return e.Activation(x, "silu") if alpha == 1 else e.Mul(x, e.Sigmoid(e.Mul(x, like(alpha, x))))


@handles("SwiGLU")
def _swiglu(t: Translation, node: Node, gate: Item, up: Item) -> Value:
    return e.Mul(swish(gate.value, node.get("alpha", 1.0)), up.value)


@handles("Gelu")
def _gelu(t: Translation, node: Node, x: Item) -> Value:
    kinds = {"none": "gelu", "tanh": "gelu_tanh"}
    form = node.get("approximate", "none")
    if form not in kinds:
        raise Unsupported(f"approximate={form!r} is neither of {', '.join(kinds)}")
    return e.Activation(x.value, kinds[form])


@handles("Dropout")
def _dropout(
    t: Translation, node: Node, x: Item, ratio: Item | None = None, training: Item | None = None
) -> list[Item | Value]:
    """Nothing is dropped outside training: the input, and a mask of ones."""
    dropping = training is not None and numbers(training, "whether it trains").any()
    if dropping and (ratio is None or numbers(ratio, "how much is dropped").any()):
        raise Unsupported("dropout while training is random; export the model for inference")
    # Before opset 12 the mask is not filled outside training: who uses it is told that nothing computes it.
    return [x] if node.version < 12 else [x, broadcast(e.constant(True), x.shape)]
