"""Comparisons of token ids with the padding's: answered where it is known which id that is, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Cumsum, Reshape
from llmc.compiler.ir.types import Array, Tensor
from llmc.frontends.padding import without_padding

S = symbol("S", 1, 64)
IDS, OTHER, LATER = (Input(name, Tensor((1, S), "i32")) for name in ("ids", "a", "z"))
PAD = 3
TOKENS = np.array([[0, 7, PAD, 1, 5, PAD, PAD]], np.int32)


def number(value: int, dtype: str = "i32") -> Value:
    return e.constant(value, dtype)


def graph_of(value: Value) -> Graph:
    return Graph("g", (IDS, OTHER, LATER), (("out", value),))


def found(graph: Graph) -> Array:
    def no_params(name: str) -> Array:
        raise AssertionError(name)

    return np.asarray(evaluate(graph, {"ids": TOKENS, "a": TOKENS, "z": TOKENS}, no_params)["out"])


COMPARED: dict[str, tuple[Value, bool]] = {
    "equal": (e.Equal(IDS, number(PAD)), False),
    "unequal": (e.NotEqual(IDS, number(PAD)), True),
    "the other way round": (e.NotEqual(number(PAD), IDS), True),
    "wider": (e.Equal(e.Cast(IDS, "i64"), number(PAD, "i64")), False),
    "moved": (e.Equal(Reshape(e.Cast(IDS, "i64"), (S, 1)), number(PAD, "i64")), False),
}


@pytest.mark.parametrize("name", COMPARED)
def test_no_token_is_the_paddings(name: str) -> None:
    value, answer = COMPARED[name]
    graph, pad = without_padding(graph_of(value), PAD)
    assert pad == PAD and (found(graph) == answer).all()
    assert graph.output("out").type == value.type


KEPT: dict[str, Value] = {
    "a smaller id": e.Equal(IDS, number(PAD - 1)),
    "a greater id": e.NotEqual(IDS, number(PAD + 1)),
    "an order": e.Less(IDS, number(PAD)),
    "other tokens": e.Equal(OTHER, number(PAD)),
    "later tokens": e.Equal(number(PAD), LATER),
    "two inputs": e.Equal(IDS, OTHER),
    "computed": e.Equal(e.Add(IDS, number(1)), number(PAD)),
    "no tokens": e.Equal(number(PAD), number(PAD)),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("pad", [PAD, None])
def test_other_comparisons_stay(name: str, pad: int | None) -> None:
    graph = graph_of(KEPT[name])
    assert without_padding(graph, pad) == (graph, None)


def test_an_id_of_0_is_an_id() -> None:
    graph, pad = without_padding(graph_of(e.Equal(IDS, number(0))), 0)
    assert pad == 0 and not found(graph).any()


MASK = e.Cast(e.NotEqual(IDS, number(PAD)), "i32")
SUMS = Cumsum(MASK, 1)
COUNTED = e.Mul(SUMS, MASK)
WIDE = e.Cast(e.Not(e.Equal(e.Cast(IDS, "i64"), number(PAD, "i64"))), "i64")
TWICE = e.Cast(e.Not(e.Not(e.NotEqual(IDS, number(PAD)))), "i32")
SAME = e.Cast(e.Not(e.NotEqual(IDS, number(PAD))), "i32")

# Positions as RoBERTa's code and its exports count them.
POSITIONS: dict[str, Value] = {
    "plain": e.Add(COUNTED, number(PAD)),
    "the other way round": e.Add(number(PAD), e.Mul(MASK, SUMS)),
    "wider at the end": e.Add(e.Cast(COUNTED, "i64"), number(PAD, "i64")),
    "after a past": e.Add(e.Mul(e.Add(SUMS, number(0)), MASK), number(PAD)),
    "as another dtype": e.Add(e.Mul(e.Cast(Cumsum(e.Cast(MASK, "i64"), 1), "i32"), MASK), number(PAD)),
    "not equal": e.Add(e.Mul(Cumsum(WIDE, 1), WIDE), number(PAD, "i64")),
    "not what is not unequal": e.Add(e.Mul(Cumsum(TWICE, 1), TWICE), number(PAD)),
    "moved": e.Add(Reshape(COUNTED, (S,)), number(PAD)),
    "moved between": e.Add(e.Mul(Reshape(SUMS, (S,)), Reshape(MASK, (S,))), number(PAD)),
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("pad", [PAD, None])
def test_positions_are_counted_around_the_padding(name: str, pad: int | None) -> None:
    graph, around = without_padding(graph_of(POSITIONS[name]), pad)
    assert around == PAD
    assert found(graph).reshape(-1).tolist() == [PAD + 1 + at for at in range(TOKENS.size)]


NO_POSITIONS: dict[str, Value] = {
    "a mask": MASK,
    "sums alone": e.Add(SUMS, number(PAD)),
    "sums of something else": e.Add(e.Mul(Cumsum(OTHER, 1), MASK), number(PAD)),
    "sums and the mask": e.Add(e.Add(SUMS, MASK), number(PAD)),
    "times something else": e.Add(e.Mul(SUMS, OTHER), number(PAD)),
    "where it is the id": e.Add(e.Mul(Cumsum(SAME, 1), SAME), number(PAD)),
    "sums where it is the id": e.Add(e.Mul(Cumsum(SAME, 1), MASK), number(PAD)),
    "times where it is the id": e.Add(e.Mul(SUMS, SAME), number(PAD)),
    "times the sums": e.Add(e.Mul(SUMS, SUMS), number(PAD)),
    "from another number on": e.Add(COUNTED, number(PAD + 1)),
    "from 0 on": COUNTED,
    "less a number": e.Sub(COUNTED, number(PAD)),
    "times a number": e.Mul(COUNTED, number(PAD)),
    "changed before": e.Add(e.Mul(e.Neg(SUMS), MASK), number(PAD)),
    "changed after": e.Add(e.Neg(COUNTED), number(PAD)),
    "of another mask": e.Add(e.Mul(Cumsum(e.Neg(MASK), 1), MASK), number(PAD)),
}


@pytest.mark.parametrize("name", NO_POSITIONS)
def test_what_is_not_counted_around_an_id_does_not_say_that_it_is_the_paddings(name: str) -> None:
    graph = graph_of(NO_POSITIONS[name])
    assert without_padding(graph, None) == (graph, None)
