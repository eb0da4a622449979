"""Lengths of checks: beyond everything that a position is compared with, and no longer than can be afforded."""

from __future__ import annotations

import numpy as np
import pytest
from pass_harness import param

from llmc.compiler.check_sizes import (
    FEW,
    LEAST,
    MIDDLE,
    array_draws,
    beyond_constants,
    choose_sizes,
    cost_of,
    longest_of,
)
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.attention import TILE, Attention
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.evaluate import bind_symbols
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import Tensor
from llmc.errors import IRError

S = symbol("S", 2, 4096)
IDS, POSITIONS = (Input(name, Tensor((1, S), "i32")) for name in ("ids", "positions"))
AT = e.Cast(POSITIONS, "f32")
DISTANCE = e.Sub(s.Reshape(s.Iota(S), (S, 1)), s.Reshape(s.Iota(S), (1, S)))


def graph_of(value: Value) -> Graph:
    return Graph("g", (IDS, POSITIONS), (("logits", value),))


def no_weights(name: str) -> np.ndarray:
    raise IRError(name)


def number(value: object, dtype: str = "f32") -> e.Constant:
    return e.constant(value, dtype)


@pytest.mark.parametrize(
    ("value", "at"),
    [
        (e.Less(DISTANCE, number(700, "i64")), 700),
        (e.Less(AT, number(700.0)), 700),
        (e.Less(DISTANCE, number(np.array([16, 640]).reshape(2, 1, 1), "i64")), 640),
        (e.Less(AT, number(np.array([16.0, 640.0]).reshape(2, 1))), 640),
        (e.Less(e.Sub(e.FloorDivide(AT, number(32.0)), number(1.0)), number(20.0)), 640),
        (e.Less(e.Div(AT, number(320.0)), number(2.0)), 640),
        (e.Less(e.Mul(AT, number(1 / 512)), number(1.0)), 512),
        (e.Greater(e.Mod(AT, number(500.0)), number(3.0)), 500),
        (e.Maximum(e.Div(e.Log(AT), number(float(np.log(777)))), number(1.0)), 777),
        (s.Gather(param("table", 600, 3), e.Minimum(POSITIONS, number(2, "i32")), 0), 600),
        (Attention(*(e.Cast(s.Broadcast(s.Reshape(IDS, (1, S, 1, 1)), (1, S, 2, 4)), "f32"),) * 3, window=900), 900),
        (e.Add(AT, number(10000.0)), 0),  # beyond the context: nothing changes below it
        (e.Mul(AT, number(np.array([0.1, 0.01, 0.002]).reshape(3, 1))), 0),  # frequencies are no thresholds
        (e.Pow(number(1000.0), e.Mul(AT, number(0.3))), 0),
        (e.Less(e.Cast(IDS, "f32"), number(900.0)), 0),  # nothing that positions meet
    ],
)  # fmt: skip
def test_lengths_lie_beyond_what_positions_meet(value: Value, at: int) -> None:
    found = beyond_constants(graph_of(value), 4096, no_weights)
    assert found >= at + 2 if at else found == 0
    sizes = choose_sizes(graph_of(value), 4096, no_weights, budget=1e12)
    assert max(sizes.lengths) == max(LEAST, found) and not sizes.reason


def test_there_are_several_pages_and_tiles_and_short_sequences_too() -> None:
    sizes = choose_sizes(graph_of(AT), 4096, no_weights, budget=1e12)
    assert set(sizes.lengths) == {FEW, LEAST, MIDDLE}
    assert LEAST > 2 * TILE and LEAST > 2 * PAGE and MIDDLE > PAGE


def test_no_sequence_is_longer_than_the_context_or_a_table_of_positions() -> None:
    table = s.Gather(param("table", 37, 3), POSITIONS, 0)
    assert longest_of(graph_of(table)) == 37
    assert max(choose_sizes(graph_of(table), 4096, no_weights, 1e12).lengths) == 37
    assert max(choose_sizes(graph_of(e.Less(AT, number(300.0))), 99, no_weights, 1e12).lengths) == 99


def test_what_does_not_fit_the_budget_is_said() -> None:
    wide = s.Matmul(s.Gather(param("embed", 9, 512), IDS, 0), s.Transpose(param("w", 512, 512), (1, 0)))
    graph = graph_of(e.Add(wide, s.Reshape(e.Cast(e.Less(AT, number(2000.0)), "f32"), (1, S, 1))))
    whole = choose_sizes(graph, 4096, no_weights, budget=1e13, runs=16)
    cut = choose_sizes(graph, 4096, no_weights, budget=5e9, runs=16)
    assert max(whole.lengths) == whole.wanted == 2033 and "not of" not in str(whole)
    assert max(cut.lengths) < cut.wanted == 2033 and 16 * cost_of(graph, cut.lengths) <= 5e9
    assert str(cut).endswith("(not of 2,033: evaluating that many takes too long)")


def test_arrays_are_small_awkward_and_as_large_as_they_may_be() -> None:
    batch, n = symbol("batch", 1, 8), symbol("n", 1, 512)
    x = Input("x", Tensor((batch, n), "f32"))
    graph = Graph("g", (x,), (("y", e.Less(e.Cast(s.Iota(n), "f32"), e.constant(300.0, "f32"))), ("z", e.Add(x, x))))
    draws, words = array_draws(graph, 3, budget=1e9, runs=16)
    sizes = [bind_symbols(graph, draw) for draw in draws]
    assert sizes[0]["n"] <= 9 and sizes[1]["n"] >= 129 and sizes[2] == {"batch": 8, "n": 512}
    assert "seed 3" in words[-1] and "batch=8, n=512" in words[-1]
    draws, words = array_draws(graph, 3, budget=1e3, runs=16)
    assert len(draws) == 1 and "takes too long" in words[-1]
