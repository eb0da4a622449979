"""fuse-norm and fuse-activation: the spellings that models use, in f64 against the fused op, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from pass_harness import S, c, graph_of, names, param, run_checked, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import llm
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.types import NUMPY_DTYPES
from llmc.compiler.passes.manager import Report

NORM = "canonicalize,fold,cse,fuse-norm"
WIDTHS = (1, 6, 31, 33, 129)
N = symbol("N", 1, 9)


def fused(value: Value, pipeline: str, tolerance: float = 1e-6) -> tuple[Op, Report]:
    """The op at the root after the passes, and the last pass's report."""
    after, reports = run_checked(graph_of(value), pipeline, tolerance=tolerance)
    found = after.output("out0")
    assert isinstance(found, Op)
    return found, reports[-1]


def mean_of_squares(v: Value) -> Value:
    return s.Mean(e.Pow(v, c(2)), (-1,))


# x * rsqrt(mean(x^2) + eps) in every order.
CORES: dict[str, Callable[[Value], Value]] = {
    "rsqrt": lambda v: e.Mul(v, e.Rsqrt(e.Add(mean_of_squares(v), c(1e-5)))),
    "rsqrt first": lambda v: e.Mul(e.Rsqrt(e.Add(c(1e-5), mean_of_squares(v))), v),
    "divided by sqrt": lambda v: e.Div(v, e.Sqrt(e.Add(s.Mean(e.Mul(v, v), (-1,)), c(1e-5)))),
    "power": lambda v: e.Mul(v, e.Pow(e.Add(mean_of_squares(v), c(1e-5)), c(-0.5))),
    "one over sqrt": lambda v: e.Mul(v, e.Div(c(1), e.Sqrt(e.Add(mean_of_squares(v), c(1e-5))))),
    "sum over n": lambda v: e.Mul(v, e.Rsqrt(e.Add(e.Div(s.Sum(e.Mul(v, v), (2,)), c(v.shape[2])), c(1e-5)))),  # type: ignore[arg-type]
    "expanded": lambda v: e.Mul(v, s.Broadcast(e.Rsqrt(e.Add(mean_of_squares(v), c(1e-5))), v.shape)),
    "without keep": lambda v: e.Mul(
        v, e.Rsqrt(e.Add(s.Reshape(s.Mean(e.Mul(v, v), (-1,), False), (*v.shape[:-1], 1)), c(1e-5)))
    ),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_rms_norm_in_every_order(core: Callable[[Value], Value], width: int) -> None:
    op, _ = fused(e.Mul(param("w", width), core(x(1, S, width))), NORM)
    assert isinstance(op, llm.RMSNorm) and isinstance(op.w, Param) and op.offset == 0
    assert op.eps == pytest.approx(1e-5)


WEIGHTS: dict[str, tuple[Callable[[], Value], float]] = {
    "plain": (lambda: param("w", 6), 0.0),
    "reshaped": (lambda: s.Reshape(param("w", 6), (1, 1, 6)), 0.0),
    "one plus w": (lambda: e.Add(c(1), param("w", 6)), 1.0),
    "w plus one, reshaped": (lambda: s.Reshape(e.Add(param("w", 6), c(1)), (1, 1, 6)), 1.0),
    "w minus a half": (lambda: e.Sub(param("w", 6), c(0.5)), -0.5),
    "f32": (lambda: param("w", 6, dtype="f32"), 0.0),
}


@pytest.mark.parametrize(("weight", "offset"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_with_and_without_an_offset(weight: Callable[[], Value], offset: float) -> None:
    op, _ = fused(e.Mul(CORES["rsqrt"](x()), weight()), NORM)
    assert isinstance(op, llm.RMSNorm) and op.offset == offset
    assert op.w is not None and {p.name for p in graph_of(op).params} == {"w"}


def test_a_norm_without_weight_and_one_a_head() -> None:
    op, _ = fused(CORES["rsqrt"](x()), NORM)
    assert isinstance(op, llm.RMSNorm) and op.w is None
    op, _ = fused(e.Mul(param("w", 8), CORES["rsqrt"](x(1, S, 3, 8))), NORM)
    assert isinstance(op, llm.RMSNorm) and op.shape == (1, S, 3, 8)


def test_a_norm_of_bf16_rows_is_accumulated_in_f32_anyway() -> None:
    rows = x(1, S, 6, name="h", dtype="bf16")
    wide = e.Cast(rows, "f32")
    op, _ = fused(e.Cast(CORES["rsqrt"](wide), "bf16"), NORM)
    assert isinstance(op, llm.RMSNorm) and op.x.dtype == "bf16" and op.dtype == "bf16"


def centred(v: Value) -> Value:
    return e.Sub(v, s.Mean(v, (-1,)))


def variance(v: Value) -> Value:
    return s.Mean(e.Mul(centred(v), centred(v)), (-1,))


LAYERS: dict[str, Callable[[Value], Value]] = {
    "textbook": lambda v: e.Div(centred(v), e.Sqrt(e.Add(variance(v), c(1e-5)))),
    "rsqrt": lambda v: e.Mul(e.Rsqrt(e.Add(variance(v), c(1e-5))), centred(v)),
    "expanded variance": lambda v: e.Mul(
        centred(v),
        e.Rsqrt(e.Add(e.Sub(mean_of_squares(v), e.Pow(s.Mean(v, (-1,)), c(2))), c(1e-5))),
    ),
    "sums": lambda v: e.Div(
        e.Sub(v, e.Div(s.Sum(v, (-1,)), c(6))),
        e.Sqrt(e.Add(e.Div(s.Sum(e.Pow(centred(v), c(2)), (-1,)), c(6)), c(1e-5))),
    ),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layer_norm_in_its_forms(layer: Callable[[Value], Value]) -> None:
    core = layer(x())
    bare, _ = fused(core, NORM)
    assert isinstance(bare, llm.LayerNorm) and bare.w is None and bare.b is None
    scaled, _ = fused(e.Mul(core, param("w", 6)), NORM)
    assert isinstance(scaled, llm.LayerNorm) and isinstance(scaled.w, Param) and scaled.b is None
    full, report = fused(e.Add(param("b", 6), e.Mul(param("w", 6), core)), NORM)
    assert isinstance(full, llm.LayerNorm) and isinstance(full.w, Param) and isinstance(full.b, Param)
    assert report.hits["layer-norm"] == 1


def test_a_rounding_inside_a_norm_is_kept() -> None:
    """(x * rsqrt(..)) rounded to bf16 and then scaled is not one norm in f32."""
    rounded = e.Cast(e.Cast(CORES["rsqrt"](x()), "bf16"), "f32")
    op, _ = fused(e.Mul(rounded, param("w", 6)), NORM)
    assert isinstance(op, e.Mul)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("given", [False, True], ids=["params", "inputs"])
def test_norms_over_several_last_axes_of_known_sizes(count: int, given: bool) -> None:
    """They are norms over one axis between reshapes; weights may be known when compiling or not."""
    v = x(2, 3, 5, 7)
    axes, shape = tuple(range(4 - count, 4)), v.shape[4 - count :]
    w, b = (x(*shape, name=n) if given else param(n, *shape) for n in "wb")  # type: ignore[arg-type]
    mean = s.Mean(e.Mul(v, v), axes)
    rms, _ = fused(e.Mul(e.Div(v, e.Sqrt(e.Add(mean, c(1e-5)))), w), NORM)
    apart = e.Sub(v, s.Mean(v, axes))
    spread = s.Mean(e.Mul(apart, apart), axes)
    layer, _ = fused(e.Add(e.Mul(e.Div(apart, e.Sqrt(e.Add(spread, c(1e-5)))), w), b), NORM)
    for op, kind in ((rms, llm.RMSNorm), (layer, llm.LayerNorm)):
        assert isinstance(op, s.Reshape) and isinstance(op.x, kind) and op.x.w is not None
        assert op.x.shape == (*v.shape[: 4 - count], int(np.prod(shape)))  # type: ignore[arg-type]
        assert not any(isinstance(node, s.Mean) for node in graph_of(op).ops)
    assert isinstance(layer.x, llm.LayerNorm) and layer.x.b is not None  # type: ignore[attr-defined]


def test_a_norm_over_an_axis_of_one_besides() -> None:
    v = x(2, 3, 5, 1)
    op, _ = fused(e.Mul(v, e.Rsqrt(e.Add(s.Mean(e.Mul(v, v), (2, 3)), c(1e-5)))), "fuse-norm")
    assert isinstance(op, s.Reshape) and isinstance(op.x, llm.RMSNorm) and op.shape == v.shape


@pytest.mark.parametrize("shape", [(5, 3, 1), (15, 1, 1), (5, 1, 3), (3, 5, 3, 1)])
def test_as_many_numbers_over_other_axes_are_no_weight(shape: tuple[int, ...]) -> None:
    v = x(*(15 if shape[0] == 15 else 5, 3, 15 if shape == (5, 1, 3) else 5))
    v = x(5, 3, 3) if shape == (5, 1, 3) else v
    core = e.Mul(v, e.Rsqrt(e.Add(s.Mean(e.Mul(v, v), (1, 2)), c(1e-5))))
    op, _ = fused(e.Mul(core, param("w", *shape)), NORM)
    assert isinstance(op, e.Mul)


def test_a_weight_and_an_offset_are_told_apart() -> None:
    for offset, expected in ((None, "weight"), (1.0, "weight-with-offset"), (-0.5, "weight-with-offset")):
        weight = param("w", 6) if offset is None else e.Add(param("w", 6), c(offset))
        _, report = fused(e.Mul(CORES["rsqrt"](x()), weight), NORM)
        assert report.hits == {"rms-norm": 1, expected: 1}


def test_a_bias_with_more_axes_stays_outside() -> None:
    rows = x(N, 6, name="rows")
    op, _ = fused(e.Add(LAYERS["rsqrt"](rows), param("b", 1, 1, 6)), NORM)
    assert isinstance(op, e.Add) and isinstance(op.a, llm.LayerNorm)


def test_what_multiplies_each_row_is_no_weight() -> None:
    op, report = fused(e.Mul(CORES["rsqrt"](x(2, 3, 6)), x(2, 3, 6, name="gate")), NORM)
    assert isinstance(op, e.Mul) and report.refusals == []


NOT_NORMS: dict[str, tuple[Value, str]] = {
    "another axis": (e.Mul(x(), e.Rsqrt(e.Add(s.Mean(e.Mul(x(), x()), (1,)), c(1e-5)))), "not over the last"),
    "the last axis, of unknown size": (
        e.Mul(x(1, 3, S), e.Rsqrt(e.Add(s.Mean(e.Mul(x(1, 3, S), x(1, 3, S)), (2,)), c(1e-5)))),
        "not over the last",
    ),
    "an axis of unknown size": (
        e.Mul(x(), e.Rsqrt(e.Add(s.Mean(e.Mul(x(), x()), (1, 2)), c(1e-5)))),
        "not over the last",
    ),
    "another value": (e.Mul(x(name="y"), e.Rsqrt(e.Add(mean_of_squares(x()), c(1e-5)))), "of another value"),
    "a matrix as weight": (e.Mul(CORES["rsqrt"](x(1, 3, 6)), param("w", 3, 6)), "no vector of 6"),
}


@pytest.mark.parametrize(("value", "reason"), NOT_NORMS.values(), ids=NOT_NORMS)
def test_near_misses_are_refused_with_a_reason(value: Value, reason: str) -> None:
    op, report = fused(value, NORM)
    assert isinstance(op, e.Mul)
    assert any(reason in why for _, why in report.refusals), report.refusals


def test_an_unbiased_variance_is_no_layer_norm() -> None:
    v = x()
    unbiased = e.Div(s.Sum(e.Mul(centred(v), centred(v)), (-1,)), c(5))
    op, _ = fused(e.Mul(centred(v), e.Rsqrt(e.Add(unbiased, c(1e-5)))), NORM)
    assert isinstance(op, e.Mul)


def test_a_scale_by_a_number_stays_outside() -> None:
    op, report = fused(e.Mul(CORES["rsqrt"](x()), c(3)), NORM)
    assert isinstance(op, e.Mul) and isinstance(op.a, llm.RMSNorm) and op.a.w is None
    assert not report.refusals


def test_a_second_bias_stays_outside() -> None:
    biased = e.Add(LAYERS["rsqrt"](x()), param("b", 6))
    op, _ = fused(e.Add(biased, param("other", 6)), NORM)
    assert isinstance(op, e.Add) and isinstance(op.a, llm.LayerNorm)


def test_rows_rounded_in_front_of_a_norm_stay_rounded() -> None:
    """f64 evaluation sees no rounding, so the graph itself must show it."""
    rows = e.Cast(x(), "bf16")
    op, _ = fused(e.Cast(llm.RMSNorm(rows, None, 1e-5), "f32"), "fuse-norm")
    assert isinstance(op, e.Cast) and isinstance(op.x, llm.RMSNorm) and op.x.x is rows


ROOT = math.sqrt(2 / math.pi)


def cube(v: Value) -> Value:
    return e.Mul(v, e.Mul(v, v))


# Spellings found in models' own code, by the kind that they are.
FORMULAS: list[tuple[str, str, Callable[[Value], Value]]] = [
    ("silu", "sigmoid", lambda v: e.Mul(e.Sigmoid(v), v)),
    ("silu", "quotient", lambda v: e.Div(v, e.Add(c(1), e.Exp(e.Neg(v))))),
    ("quick_gelu", "sigmoid", lambda v: e.Mul(v, e.Sigmoid(e.Mul(c(1.702), v)))),
    ("gelu", "erf", lambda v: e.Mul(e.Mul(v, c(0.5)), e.Add(c(1), e.Erf(e.Div(v, c(math.sqrt(2))))))),
    ("gelu", "erf last", lambda v: e.Mul(v, e.Mul(c(0.5), e.Add(e.Erf(e.Mul(v, c(math.sqrt(0.5)))), c(1))))),
    ("gelu", "halves", lambda v: e.Mul(v, e.Add(e.Mul(e.Erf(e.Div(v, c(1.41421356))), c(0.5)), c(0.5)))),
    ("gelu_tanh", "pow 3", lambda v: e.Mul(
        e.Mul(c(0.5), v), e.Add(c(1), e.Tanh(e.Mul(c(ROOT), e.Add(v, e.Mul(c(0.044715), e.Pow(v, c(3)))))))
    )),
    ("gelu_tanh", "cube", lambda v: e.Mul(
        e.Mul(v, e.Add(e.Tanh(e.Mul(e.Add(v, e.Mul(cube(v), c(0.044715))), c(ROOT))), c(1))), c(0.5)
    )),
    ("gelu_tanh", "factored, eight digits", lambda v: e.Mul(
        e.Mul(v, c(0.5)),
        e.Add(c(1), e.Tanh(e.Mul(e.Mul(c(0.79788456), v), e.Add(c(1), e.Mul(e.Mul(c(0.044715), v), v))))),
    )),
    ("gelu_tanh", "multiplied out", lambda v: e.Mul(
        e.Mul(v, c(0.5)),
        e.Add(e.Tanh(e.Add(e.Mul(v, c(ROOT)), e.Mul(e.Mul(v, e.Mul(v, v)), c(ROOT * 0.044715)))), c(1)),
    )),
    ("gelu_tanh", "sigmoid", lambda v: e.Mul(
        v, e.Sigmoid(e.Mul(c(2 * ROOT), e.Add(v, e.Mul(c(0.044715), cube(v)))))
    )),
    ("relu", "relu", e.Relu),
    ("relu", "maximum", lambda v: e.Maximum(c(0), v)),
    ("relu2", "pow", lambda v: e.Pow(e.Relu(v), c(2))),
    ("relu2", "product", lambda v: e.Mul(e.Relu(v), e.Relu(v))),
]  # fmt: skip
ACTIVATE = "canonicalize,fold,cse,fuse-activation"


@pytest.mark.parametrize(("kind", "spelling", "formula"), FORMULAS, ids=[f"{k}-{n}" for k, n, _ in FORMULAS])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_activations_by_formula(kind: str, spelling: str, formula: Callable[[Value], Value], scale: float) -> None:
    v = e.Mul(x(), c(scale)) if scale != 1 else x()
    op, report = fused(formula(v), ACTIVATE)
    assert isinstance(op, e.Activation) and op.kind == kind, report.refusals
    assert {o.name for o in graph_of(op).ops} <= {"t.activation", "t.mul", "t.constant"}


def test_every_kind_that_is_a_formula_is_found() -> None:
    assert {kind for kind, _, _ in FORMULAS} == set(e.ACTIVATIONS) - {"sigmoid", "tanh"}


def test_a_gate_keeps_its_other_factor() -> None:
    gate, up = x(), x(name="up")
    op, _ = fused(e.Mul(FORMULAS[6][2](gate), up), ACTIVATE)
    assert isinstance(op, e.Mul) and {type(operand) for operand in op.operands} == {e.Activation, type(up)}


def test_a_scaled_activation_keeps_its_scale() -> None:
    """tanh gelu without its half is twice the activation."""
    v = x()
    op, _ = fused(e.Mul(v, e.Add(c(1), e.Erf(e.Mul(v, c(math.sqrt(0.5)))))), ACTIVATE)
    assert isinstance(op, e.Mul) and isinstance(op.a, e.Activation)


NOT_ACTIVATIONS: list[tuple[str, Callable[[Value], Value]]] = [
    ("another constant", lambda v: e.Mul(v, e.Sigmoid(e.Mul(c(1.6), v)))),
    ("another cube", lambda v: e.Mul(
        e.Mul(c(0.5), v), e.Add(c(1), e.Tanh(e.Mul(c(ROOT), e.Add(v, e.Mul(c(0.05), cube(v))))))
    )),
    ("a minus", lambda v: e.Mul(
        e.Mul(c(0.5), v), e.Add(c(1), e.Tanh(e.Mul(c(ROOT), e.Sub(v, e.Mul(c(0.044715), cube(v))))))
    )),
    ("one less", lambda v: e.Mul(e.Mul(c(0.5), v), e.Add(c(1.01), e.Erf(e.Mul(v, c(math.sqrt(0.5))))))),
    ("another argument", lambda v: e.Mul(v, e.Sigmoid(x(name="y")))),
    ("a root of five digits", lambda v: e.Mul(e.Mul(v, c(0.5)), e.Add(c(1), e.Erf(e.Div(v, c(1.4142)))))),
    ("capped scores", lambda v: e.Mul(e.Tanh(e.Div(v, c(30))), c(30))),
]  # fmt: skip


@pytest.mark.parametrize(("why", "formula"), NOT_ACTIVATIONS, ids=[why for why, _ in NOT_ACTIVATIONS])
def test_other_formulas_are_left(why: str, formula: Callable[[Value], Value]) -> None:
    after, _ = run_checked(graph_of(formula(x())), ACTIVATE)
    assert "t.activation" not in names(after)


def test_a_near_miss_shows_its_polynomial() -> None:
    _, report = fused(e.Mul(x(), e.Sigmoid(e.Mul(c(1.6), x()))), ACTIVATE)
    assert report.refusals[0][1] == "x * t.sigmoid(p(x)) with p(x) = 1.6 x^1, which is no known activation"


def test_integers_are_clamped_not_activated() -> None:
    after, _ = run_checked(graph_of(e.Relu(x(S, dtype="i64"))), ACTIVATE)
    assert names(after) == ["t.relu"]


def test_formulas_with_printed_constants_are_meant() -> None:
    """Some sources write sqrt(2) as 1.4142, which is gelu to 5e-6 of its results: not exactly, so in its own pass."""
    v = x()
    formula = e.Mul(e.Mul(v, c(0.5)), e.Add(c(1), e.Erf(e.Div(v, c(1.4142)))))
    op, _ = fused(formula, f"{ACTIVATE},fuse-half-activation", tolerance=5e-6)
    assert isinstance(op, e.Activation) and op.kind == "gelu"


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_formulas_with_rounded_constants_are_meant(dtype: str) -> None:
    """Models in halves have sqrt(2) = 1.4140625 and the like; x * sigmoid(1.7 x) in f32 is no quick_gelu."""

    def k(value: float) -> Value:
        return c(float(NUMPY_DTYPES[dtype].type(value)))

    v = x()
    erf = e.Mul(e.Mul(v, c(0.5)), e.Add(e.Erf(e.Div(v, k(math.sqrt(2)))), c(1)))
    cube = e.Add(v, e.Mul(k(0.044715), e.Pow(v, c(3))))
    tanh = e.Mul(e.Mul(v, c(0.5)), e.Add(e.Tanh(e.Mul(cube, k(math.sqrt(2 / math.pi)))), c(1)))
    quick = e.Mul(v, e.Sigmoid(e.Mul(v, k(1.702))))
    for formula, kind in ((erf, "gelu"), (tanh, "gelu_tanh"), (quick, "quick_gelu")):
        op, _ = fused(formula, f"{ACTIVATE},fuse-half-activation", tolerance=1e-2)
        assert isinstance(op, e.Activation) and op.kind == kind
    other, _ = fused(e.Mul(v, e.Sigmoid(e.Mul(v, c(1.7)))), f"{ACTIVATE},fuse-half-activation")
    assert isinstance(other, e.Mul)
