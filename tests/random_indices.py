"""Hypothesis strategies: indices that are computed in every way, of inputs that hold anything."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.ranges import Range
from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Tensor
from llmc.errors import LlmcError

N = symbol("n", 1, 9)
IDS, WILD, WHOLE = (
    Input("ids", Tensor((N,), "i32")),
    Input("wild", Tensor((N,), "i64")),
    Input("whole", Tensor((N,), "u8")),
)
NUMBERS = Input("x", Tensor((N,), "f32"))
GIVEN = {IDS: Range(0, 63)}
_BINARY = (
    e.Add, e.Sub, e.Mul, e.Div, e.FloorDivide, e.Mod, e.Fmod, e.Maximum, e.Minimum, e.BitAnd, e.BitOr, e.BitXor,
    e.ShiftLeft, e.ShiftRight, e.Pow,
)  # fmt: skip
_FLOAT_BINARY = (e.Add, e.Sub, e.Mul, e.Div, e.Maximum, e.Minimum, e.Mod)
_COMPARE = (e.Less, e.LessEqual, e.Greater, e.GreaterEqual, e.Equal, e.NotEqual)
_NUMBERS = (-(2**62), -(2**31), -700, -9, -2, -1, 0, 1, 2, 3, 7, 64, 255, 2**31 - 1, 2**62)
_DTYPES = ("i64", "i32", "i16", "i8", "u8", "u32", "u64", "bool", "f32", "f16")


@st.composite
def indices(draw: st.DrawFn, steps: int = 8) -> Value:
    """A vector [n], or a scalar, of integers or floats that is computed of wild and of tame inputs."""
    pool: list[Value] = [IDS, WILD, WHOLE, NUMBERS, s.Iota(N), s.Slice(s.Iota(N + 1), 0, N, N + 1)]
    for _ in range(draw(st.integers(1, steps))):
        a = draw(st.sampled_from(pool))
        kind = draw(st.sampled_from(("binary", "number", "cast", "where", "unary", "reduce", "table", "index")))
        try:
            pool.append(_grown(draw, kind, a, pool))
        except LlmcError:
            continue
    return pool[-1]


def _number(draw: st.DrawFn, dtype: str) -> Value:
    number = draw(st.sampled_from(_NUMBERS))
    if dtype in FLOATS:
        return e.constant(float(number % 1000) / 2, dtype)
    return e.constant(np.array(number).astype(NUMPY_DTYPES[dtype]), dtype)


def _grown(draw: st.DrawFn, kind: str, a: Value, pool: list[Value]) -> Value:
    same = [value for value in pool if value.dtype == a.dtype]
    other = draw(st.sampled_from(same)) if kind != "number" else _number(draw, a.dtype)
    if kind in ("binary", "number"):
        operands = (a, other) if draw(st.booleans()) else (other, a)
        kinds = _FLOAT_BINARY if a.dtype in FLOATS else _BINARY
        return draw(st.sampled_from(kinds))(*operands)
    if kind == "cast":
        return e.Cast(a, draw(st.sampled_from(_DTYPES)))
    if kind == "where":
        condition = draw(st.sampled_from(_COMPARE))(a, _number(draw, a.dtype))
        shifted = e.Add(a, _number(draw, a.dtype))
        branches = [shifted, a] if draw(st.booleans()) else [a, other]
        return e.Where(e.Not(condition) if draw(st.booleans()) else condition, *branches)
    if kind == "unary":
        floats = (e.Floor, e.Round, e.Sqrt) if a.dtype in FLOATS else ()
        return draw(st.sampled_from((e.Neg, e.Abs, e.Relu, *floats)))(a)
    if kind == "reduce" and a.rank == 1:
        return draw(
            st.sampled_from(
                (
                    lambda x: s.Cumsum(x, 0),
                    lambda x: s.Sum(x, (0,)),
                    lambda x: s.Max(x, (0,)),
                    lambda x: s.Min(x, (0,)),
                    lambda x: s.Argmax(x, 0),
                    lambda x: s.TopK(x, 1, 0),
                    lambda x: s.Pad(x, (1,), (0,), 3.0),
                )
            )
        )(a)
    if kind == "index" and a.dtype in ("i32", "i64"):
        return s.CheckedIndex(e.Mod(a, e.constant(5, a.dtype)), None, 7)
    table = e.constant(np.array([3, -5, 40, 2, 9]), "i64")
    return s.Gather(table, e.Mod(a, e.constant(5, a.dtype)), 0)


def wild_inputs(rng: np.random.Generator, count: int) -> dict[Value, np.ndarray]:
    """Inputs of [count]: ids in their range, everything else anything at all, ends of the dtypes included."""
    odd = rng.choice([np.nan, np.inf, -np.inf, 1e38, 0.0, -0.5], count)
    return {
        IDS: rng.choice([0, 63, *rng.integers(0, 64, 4)], count).astype(np.int32),
        WILD: rng.choice([0, -1, 69, 70, 2**63 - 1, -(2**63), 2**32, *rng.integers(-99, 99, 4)], count).astype(
            np.int64
        ),
        WHOLE: rng.choice([0, 255, 128], count).astype(np.uint8),
        NUMBERS: np.where(rng.random(count) < 0.5, odd, 100 * rng.standard_normal(count)).astype(np.float32),
    }
