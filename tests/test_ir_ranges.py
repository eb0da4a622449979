"""Ranges: no element that is computed lies outside, whatever the inputs are; and they are as tight as needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_indices import GIVEN, IDS, NUMBERS, WILD, N, indices, wild_inputs

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import concrete
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import topological
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.ranges import FloatRange, Range, Ranges
from llmc.compiler.ir.types import Tensor
from llmc.errors import LlmcError


def require_inside(found: np.ndarray, value: Value, kind: object, binding: dict[str, int]) -> None:
    if isinstance(kind, FloatRange):
        numbers = found.astype(np.float64)
        assert kind.nan or not np.isnan(numbers).any(), value
        numbers = numbers[~np.isnan(numbers)]
        assert (numbers >= kind.low).all() and (numbers <= kind.high).all(), value
        return
    assert isinstance(kind, Range)
    low, high = concrete(kind.low, binding), concrete(kind.high, binding)
    assert all(low <= int(x) <= high for x in found.reshape(-1)), (value, low, high, found)


@settings(max_examples=300, deadline=None)
@given(indices(), st.integers(1, 9), st.integers(0, 1 << 30))
def test_every_element_is_inside(value: Value, count: int, seed: int) -> None:
    ranges = Ranges(GIVEN)
    inputs = wild_inputs(np.random.default_rng(seed), count)
    for made in topological([value]):
        if not isinstance(made, Op) or made.level != "t":
            continue
        try:
            found = evaluate_values([made], inputs, lambda name: inputs[IDS], {"n": count})["0"]
        except LlmcError:
            continue  # an index out of range, a negative power
        require_inside(np.asarray(found), made, ranges.of(made), {"n": count})


POSITIONS = Input("positions", Tensor((N,), "i32"))
SIZE = s.Slice(s.Iota(N + 1), 0, N, N + 1)


def c(number: int, dtype: str = "i32") -> Value:
    return e.constant(number, dtype)


PROVED = {
    "itself": (IDS, 64),
    "add": (e.Add(IDS, c(2)), 66),
    "mod of anything": (e.Mod(WILD, c(70, "i64")), 70),
    "clip": (e.Minimum(e.Maximum(WILD, c(0, "i64")), c(9, "i64")), 10),
    "absolute distance": (e.Minimum(e.Abs(e.Sub(IDS, POSITIONS)), c(31)), 32),
    "from the end": (e.Where(e.Less(IDS, c(0)), e.Add(IDS, c(64)), IDS), 64),
    "from the end of anything in range": (
        e.Where(e.Less(e.Sub(IDS, c(64)), c(0)), e.Add(e.Sub(IDS, c(64)), c(64)), e.Sub(IDS, c(64))), 64,
    ),
    "half": (e.FloorDivide(IDS, c(2)), 32),
    "count": (s.Iota(N), N),
    "reversed": (e.Sub(e.Sub(SIZE, c(1, "i64")), s.Iota(N)), N),
    "largest": (s.Argmax(NUMBERS, 0), N),
    "best": (s.TopK(NUMBERS, 1, 0), N),
    "mask": (e.Cast(e.Less(NUMBERS, e.constant(0.0, "f32")), "i64"), 2),
    "stored": (s.Gather(e.constant(np.array([0, 3, 1]), "i64"), IDS, 0), 4),
    "low bits": (e.BitAnd(WILD, c(15, "i64")), 16),
    "through floats": (e.Cast(e.Cast(IDS, "f32"), "i64"), 64),
    "checked": (s.CheckedIndex(WILD, None, 12), 12),
}  # fmt: skip
NOT_PROVED = {
    "one less": (IDS, 63),
    "wraps around": (e.Mul(e.Cast(IDS, "i8"), c(4, "i8")), 253),
    "mod by what may be 0": (e.Mod(IDS, IDS), 64),
    "remainder has the sign": (e.Fmod(WILD, c(70, "i64")), 70),
    "int32 overflow": (e.FloorDivide(e.Add(e.Mul(IDS, c(1 << 26)), c(1 << 30)), c(1 << 26)), 80),
    "least has no absolute value": (e.Abs(e.Cast(WILD, "i8")), 128),
    "not a number": (e.Cast(e.Maximum(NUMBERS, e.constant(0.0, "f32")), "i64"), 1 << 40),
    "a size less": (s.Iota(N), N - 1),
    "narrowed otherwise": (e.Where(e.Less(IDS, c(0)), IDS, e.Add(IDS, c(64))), 64),
}


@pytest.mark.parametrize("name", PROVED)
def test_is_proved(name: str) -> None:
    value, size = PROVED[name]
    assert Ranges({**GIVEN, POSITIONS: Range(0, 511)}).integers(value).within(0, size - 1)


@pytest.mark.parametrize("name", NOT_PROVED)
def test_is_not_proved(name: str) -> None:
    value, size = NOT_PROVED[name]
    assert not Ranges({**GIVEN, POSITIONS: Range(0, 511)}).integers(value).within(0, size - 1)


def test_a_long_chain_needs_no_deep_stack() -> None:
    value: Value = IDS
    for _ in range(5000):
        value = e.Minimum(e.Add(value, c(1)), c(99))
    assert Ranges(GIVEN).integers(value).within(0, 99)
