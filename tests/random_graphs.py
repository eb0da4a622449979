"""Hypothesis strategies: random sizes, random graphs of plain tensor ops over awkward shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.errors import IRError

SYMBOLS = {"S": symbol("S", 2, 40), "T": symbol("T", 1, 512), "U": symbol("U", 0, None)}


@dataclass(frozen=True)
class Sized:
    """A size with what it should be, computed in plain integers."""

    value: int | Dim
    number: Callable[[Mapping[str, int]], int]


def _leaf() -> st.SearchStrategy[Sized]:
    constants = st.integers(-7, 40).map(lambda n: Sized(n, lambda _: n))
    symbols = st.sampled_from(sorted(SYMBOLS)).map(lambda name: Sized(SYMBOLS[name], lambda binding: binding[name]))
    return st.one_of(constants, symbols, symbols)


def _grow(inner: st.SearchStrategy[Sized]) -> st.SearchStrategy[Sized]:
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs.map(lambda p: Sized(p[0].value + p[1].value, lambda b: p[0].number(b) + p[1].number(b))),
        pairs.map(lambda p: Sized(p[0].value - p[1].value, lambda b: p[0].number(b) - p[1].number(b))),
        pairs.map(lambda p: Sized(p[0].value * p[1].value, lambda b: p[0].number(b) * p[1].number(b))),
        st.tuples(inner, st.integers(1, 9)).map(lambda p: Sized(p[0].value // p[1], lambda b: p[0].number(b) // p[1])),
    )


sizes: st.SearchStrategy[Sized] = st.recursive(_leaf(), _grow, max_leaves=7)
bindings: st.SearchStrategy[dict[str, int]] = st.fixed_dictionaries(
    {"S": st.integers(2, 40), "T": st.integers(1, 512), "U": st.integers(0, 1000)}
)

_UNARY = (e.Neg, e.Abs, e.Relu, e.Tanh, e.Sigmoid, e.Sin, e.Cos, e.Erf, e.Floor, e.Round)
_BINARY = (e.Add, e.Sub, e.Mul, e.Maximum, e.Minimum)
_CONSTANTS = (0.0, 1.0, -1.0, 2.0, 0.5, 4.0, 3.0, 0.1)
_EXPONENTS = (0.0, 1.0, 2.0, 3.0)


@st.composite
def graphs(draw: st.DrawFn, steps: int = 14) -> Graph:
    """Float graphs of up to `steps` ops over inputs [1, S, 6] and [S], a weight and constants; finite everywhere."""
    size = SYMBOLS["S"]
    inputs = (Input("x", Tensor((1, size, 6), "f32")), Input("y", Tensor((size,), "f32")))
    weight = Param("w", Tensor((6,), "bf16"))
    values: list[Value] = [*inputs, e.Cast(weight, "f32")]
    for _ in range(draw(st.integers(1, steps))):
        try:
            made = _next(draw, values)
        except IRError:
            continue
        values.append(made)
    count = draw(st.integers(1, 2))
    chosen = [values[-1], *draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))]
    return Graph("random", inputs, tuple((f"out{i}", value) for i, value in enumerate(chosen)))


def _next(draw: st.DrawFn, values: list[Value]) -> Value:
    """One more op over values so far; IRError where the drawn operands do not fit."""
    x = draw(st.sampled_from(values))
    kind = draw(st.sampled_from(("unary", "binary", "constant", "power", "divide", "norm", "move", "reduce", "cut")))
    number = e.constant(draw(st.sampled_from(_CONSTANTS)), "f32")
    if kind == "unary":
        return draw(st.sampled_from(_UNARY))(x)
    if kind == "binary":
        return draw(st.sampled_from(_BINARY))(x, draw(st.sampled_from(values)))
    if kind == "constant":
        a, b = (x, number) if draw(st.booleans()) else (number, x)
        return draw(st.sampled_from(_BINARY))(a, b)
    if kind == "power":
        return e.Pow(x, e.constant(draw(st.sampled_from(_EXPONENTS)), "f32"))
    if kind == "divide":
        # 1 + |y| is never 0.
        return e.Div(x, e.Add(e.Abs(draw(st.sampled_from(values))), e.constant(1.0, "f32")))
    if kind == "norm":
        root = e.Sqrt(e.Add(e.Mul(x, x), e.constant(1.0, "f32")))
        return draw(
            st.sampled_from((e.Div(x, root), e.Mul(x, e.Reciprocal(root)), e.Div(e.constant(1.0, "f32"), root)))
        )
    if kind == "reduce" and x.rank:
        axes = (draw(st.integers(-x.rank, x.rank - 1)),)
        return draw(st.sampled_from((s.Sum, s.Mean, s.Max, s.Min)))(x, axes, draw(st.booleans()))
    return _moved(draw, x) if kind == "move" else _cut(draw, x, values)


def _moved(draw: st.DrawFn, x: Value) -> Op:
    kind = draw(st.sampled_from(("transpose", "flatten", "unsqueeze", "broadcast", "same")))
    if kind == "transpose":
        return s.Transpose(x, tuple(draw(st.permutations(range(x.rank)))))
    if kind == "flatten" and x.rank >= 2:
        return s.Reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))
    if kind == "unsqueeze":
        axis = draw(st.integers(0, x.rank))
        return s.Reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))
    if kind == "broadcast":
        return s.Broadcast(x, (draw(st.integers(1, 2)), *x.shape))
    return s.Reshape(x, x.shape)


def _cut(draw: st.DrawFn, x: Value, values: list[Value]) -> Op:
    if x.rank == 0:
        return s.Reshape(x, (1,))
    axis = draw(st.integers(-x.rank, x.rank - 1))
    if draw(st.booleans()):
        return s.Concat((x, draw(st.sampled_from(values))), axis)
    start = draw(st.integers(0, 1))
    size = x.shape[axis]
    return s.Slice(x, axis, start, size if draw(st.booleans()) else size - 1)


def data_for(graph: Graph, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a random graph for S = `sequence`, f32."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((1, sequence, 6)).astype(np.float32),
        "y": rng.standard_normal(sequence).astype(np.float32),
    }


def weight(name: str) -> np.ndarray:
    """The one weight of a random graph."""
    assert name == "w"
    return np.linspace(-1, 1, 6)
