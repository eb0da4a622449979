"""What passes know of a value's sources: token ids, positions, the sequence's length, weights."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Add, Cast, Greater, Mul, Sub, Where, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.structural import (
    Broadcast,
    Concat,
    Cumsum,
    Gather,
    Iota,
    Matmul,
    Max,
    Pad,
    Reshape,
    Slice,
    Softmax,
    Sum,
    Transpose,
)
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.probe import LENGTH, WEIGHTS, Probe

S = symbol("S", 2, 64)
IDS = Input("ids", Tensor((1, S), "i32"))
POSITIONS = Input("positions", Tensor((1, S), "i32"))
ONES = Broadcast(constant(np.ones((1, 1)), "i32"), (1, S))
SIZE = Slice(Iota(S + 1, "i32"), 0, S, S + 1)  # how frontends write a size as a number
TABLE = Param("table", Tensor((64, 3), "f32"))
GRID = Sub(Reshape(POSITIONS, (S, 1)), POSITIONS)


def probe_of(value: Value) -> Probe:
    return Probe(Graph("main", (IDS, POSITIONS), (("y", value),)))


BY_POSITION: dict[str, Value] = {
    "the input": POSITIONS,
    "a count": Iota(S),
    "a running sum": Cumsum(ONES, 1),
    "the first rows of a count": Slice(Iota(S + 1), 0, 0, S),
    "ones, one a token": ONES,
    "a table's rows": Gather(constant(np.arange(64), "i32"), POSITIONS),
    "distances": GRID,
    "a reduction of channels": Sum(Mul(Reshape(POSITIONS, (S, 1)), constant(np.ones((1, 4)), "i32")), (1,)),
    "angles": Matmul(Cast(Reshape(POSITIONS, (S, 1)), "f32"), constant(np.ones((1, 4)), "f32")),
    "rows of four, flat": Reshape(Broadcast(Reshape(POSITIONS, (S, 1)), (S, 4)), (4 * S,)),
    "one before": Concat((constant([7], "i32"), Reshape(POSITIONS, (S,))), 0),
    "a count looked up by position": Gather(Iota(S), POSITIONS),
}
BY_LENGTH: dict[str, Value] = {
    "a size": SIZE,
    "a choice by size": Where(Greater(SIZE, constant(5, "i32")), constant(1.0, "f32"), constant(2.0, "f32")),
    "the largest position": Max(POSITIONS, (1,)),
    "how many ones": Sum(ONES, (1,)),
    "the largest distance": Max(GRID, (0, 1)),
}
BY_BOTH: dict[str, Value] = {
    "tokens from the end": Sub(SIZE, POSITIONS),
    "the last rows of a count": Slice(Iota(2 * S), 0, S, 2 * S),  # type: ignore[operator]
    "a count read backwards": Gather(Iota(S), Sub(Sub(SIZE, constant(1, "i32")), Iota(S, "i32"))),
    "a count rolled by one": Gather(Iota(S), Sub(Iota(S, "i32"), constant(1, "i32"))),
    "one after": Concat((Reshape(POSITIONS, (S,)), constant([7], "i32")), 0),
    "padding after": Pad(Reshape(POSITIONS, (S,)), (0,), (1,)),
    "shares": Softmax(Cast(POSITIONS, "f32"), 1),
    "columns read as rows": Reshape(Transpose(Broadcast(Reshape(POSITIONS, (S, 1)), (S, 4)), (1, 0)), (S, 4)),
}


def values_at(value: Value, length: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    return np.asarray(next(probe_of(value).at_lengths([value], [length]))[0])


@pytest.mark.parametrize("value", BY_POSITION.values(), ids=BY_POSITION)
def test_a_value_of_positions_is_the_same_in_a_longer_sequence(value: Value) -> None:
    probe = probe_of(value)
    assert probe.sources[value] <= {"positions"}
    short, long = values_at(value, 7), values_at(value, 31)
    assert np.array_equal(short, long[tuple(slice(size) for size in short.shape)])


@pytest.mark.parametrize("value", (BY_LENGTH | BY_BOTH).values(), ids=BY_LENGTH | BY_BOTH)
def test_a_value_of_the_length_is_told_from_one_of_positions(value: Value) -> None:
    """Each of these does differ, so that none of them is called so for nothing."""
    probe = probe_of(value)
    assert probe.depends_on_length(value) and not probe.depends_on_tokens(value)
    short, long = values_at(value, 3), values_at(value, 31)
    assert not np.array_equal(short, long[tuple(slice(size) for size in short.shape)])


@pytest.mark.parametrize("value", BY_LENGTH.values(), ids=BY_LENGTH)
def test_one_number_of_all_positions_is_a_length_and_no_position(value: Value) -> None:
    assert probe_of(value).sources[value] == {LENGTH}


def test_sources_add_up() -> None:
    looked_up = Gather(TABLE, POSITIONS)
    probe = Probe(Graph("main", (IDS, POSITIONS), (("y", Slice(looked_up, 2, 0, 1)), ("z", SIZE))))
    assert probe.sources[looked_up] == {"positions", WEIGHTS} and probe.sources[SIZE] == {LENGTH}
    assert probe.longest == 64
    ids = Add(IDS, SIZE)
    assert probe_of(ids).sources[ids] == {"ids", LENGTH} and probe_of(ids).depends_on_tokens(ids)
