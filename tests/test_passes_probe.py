"""What passes know of a value's sources: token ids, positions, the sequence's length, weights."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import (
    Add,
    Cast,
    FloorDivide,
    Greater,
    Maximum,
    Minimum,
    Mul,
    Sub,
    Where,
    constant,
)
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import RMSNorm
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.structural import (
    Broadcast,
    CheckedIndex,
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
from llmc.errors import IRError

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
    "products of as many as are known": Matmul(
        Broadcast(Reshape(Cast(POSITIONS, "f32"), (1, S, 1)), (4, S, 6)), constant(np.ones((4, 6, 2)), "f32")
    ),
    "rows of groups": Reshape(Broadcast(Reshape(POSITIONS, (1, S, 1)), (4, S, 6)), (2, 2, S, 6)),
    "padding of channels": Pad(Reshape(POSITIONS, (S, 1)), (0, 0), (0, 2)),
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
    "channels read as rows": Reshape(
        Transpose(Broadcast(Reshape(POSITIONS, (1, S, 1)), (4, S, 6)), (0, 2, 1)), (4, S, 6)
    ),
    "rows read as channels": Reshape(Broadcast(Reshape(POSITIONS, (1, S, 1)), (4, S, 6)), (4, 6, S)),
    "a norm of all": RMSNorm(Cast(POSITIONS, "f32"), None, 1e-5),
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


COUNT = Iota(S, "i32")
LESS = Sub(COUNT, constant(1, "i32"))
INDICES: dict[str, tuple[Value, bool]] = {  # and whether one may be negative, which counts from the end
    "ids": (IDS, False),
    "positions": (POSITIONS, False),
    "another input": (Input("other", Tensor((1, S), "i32")), True),
    "a count": (COUNT, False),
    "one less": (LESS, True),
    "constants": (constant(np.array([0, 2]), "i32"), False),
    "constants, one below 0": (constant(np.array([1, -1]), "i32"), True),
    "a larger and one less": (Maximum(LESS, constant(0, "i32")), False),
    "a count or one less": (Maximum(COUNT, LESS), False),
    "two that are one less": (Maximum(LESS, LESS), True),
    "the smaller of two counts": (Minimum(COUNT, Reshape(POSITIONS, (S,))), False),
    "the smaller of a count and one less": (Minimum(COUNT, LESS), True),
    "a sum": (Add(COUNT, Reshape(POSITIONS, (S,))), False),
    "a sum with one less": (Add(COUNT, LESS), True),
    "a product": (Mul(COUNT, constant(2, "i32")), False),
    "a product with one less": (Mul(LESS, COUNT), True),
    "a whole quotient": (FloorDivide(COUNT, constant(2, "i32")), False),
    "a whole quotient of one less": (FloorDivide(LESS, constant(2, "i32")), True),
    "in another shape": (Reshape(Cast(COUNT, "i64"), (S, 1)), False),
    "one less in another shape": (Reshape(Cast(LESS, "i64"), (S, 1)), True),
    "a piece": (Slice(COUNT, 0, 0, 1), False),
    "spread": (Broadcast(COUNT, (2, S)), False),
    "two pieces": (Concat((constant([0], "i32"), COUNT), 0), False),
    "two pieces, one below 0": (Concat((constant([-1], "i32"), COUNT), 0), True),
    "entries of a table": (Gather(constant(np.array([3, 1, 2] * 30), "i32"), POSITIONS, 0), False),
    "entries below 0": (Gather(constant(np.array([3, -1, 2] * 30), "i32"), POSITIONS, 0), True),
    "a check": (CheckedIndex(LESS, None, 64), False),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_may_count_from_the_end_depends_on_the_length(name: str) -> None:
    index, negative = INDICES[name]
    value = Gather(COUNT, index, 0)
    inputs = (IDS, POSITIONS, *((index,) if isinstance(index, Input) and negative else ()))
    assert Probe(Graph("main", inputs, (("y", value),))).depends_on_length(value) == negative
    table = Gather(constant(np.arange(64), "i32"), index, 0)  # a table of a known size has one end
    assert not Probe(Graph("main", inputs, (("y", table),))).depends_on_length(table)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "counts"),
    [
        ("positions", (1, S), "i32", True), ("positions", (1, 7), "i32", True), ("positions", (S,), "i32", False),
        ("positions", (2, S), "i32", False), ("positions", (1, S), "i64", False), ("places", (1, S), "i32", False),
        ("positions", (1, 1, S), "i32", False), ("positions", (0, S), "i32", False),
    ],
)  # fmt: skip
def test_positions_are_an_input_of_one_form(name: str, shape: tuple[object, ...], dtype: str, counts: bool) -> None:
    given = Input(name, Tensor(shape, dtype))  # type: ignore[arg-type]
    probe = Probe(Graph("main", (IDS, given), (("y", given),)))
    assert probe.positions is (given if counts else None)


def test_sizes_that_count_no_tokens_are_small_numbers_that_they_may_be() -> None:
    sizes = [symbol("A", 1, 9), symbol("B", 3, 5), symbol("C", 1, 1), symbol("D", 0), symbol("E", 2)]
    inputs = tuple(Input(f"x{i}", Tensor((size, 4), "f32")) for i, size in enumerate(sizes))
    probe = Probe(Graph("main", (*inputs, IDS), (("y", IDS), *((f"y{i}", x) for i, x in enumerate(inputs)))))
    assert probe.size == S and probe.longest == 64
    assert probe.binding(7) == {"S": 7, "A": 2, "B": 3, "C": 1, "D": 2, "E": 2}
    assert probe.shape(inputs[1], 7) == (3, 4) and probe.shape(IDS, 7) == (1, 7)
    other = Probe(probe.graph, symbol("B", 3, 5))
    assert other.binding(4)["B"] == 4 and other.binding(4)["S"] == 2 and other.longest == 5
    both = symbol("P", 0, 30) + symbol("Q", 1, 40)
    assert Probe(probe.graph, both).longest == 30
    assert Probe(probe.graph, symbol("P", 0) + symbol("Q", 1, 40)).longest is None
    assert Probe(Graph("main", inputs[:1], (("y", inputs[0]),))).longest is None


def test_what_no_size_is_in_does_not_depend_on_one() -> None:
    fixed = Input("fixed", Tensor((3, 6), "f32"))
    value = RMSNorm(fixed, None, 1e-5)
    probe = Probe(Graph("main", (IDS, fixed), (("y", value),)))
    assert probe.sources[value] == {"fixed"} and not probe.decided_by(S.symbols())


def test_a_checked_index_depends_on_the_length_that_it_counts_back_from() -> None:
    for index, size, depends in ((LESS, S, True), (COUNT, S, False), (LESS, 64, False), (COUNT, 64, False)):
        value = CheckedIndex(index, None, size)
        assert probe_of(value).depends_on_length(value) == depends


def test_values_that_a_size_decides_and_those_made_of_them() -> None:
    other = symbol("P", 0, 9)
    past = Input("past", Tensor((other,), "i32"))
    size = Sum(Broadcast(constant(1, "i32"), (other,)), (0,))
    moved, still = Add(COUNT, size), Mul(COUNT, COUNT)
    probe = Probe(Graph("main", (IDS, past), (("y", moved), ("z", still), ("past", past))))
    assert probe.decided_by(other.symbols()) == {size, moved}
    assert probe.decided_by(S.symbols()) == set()


def test_values_are_evaluated_exactly_and_of_known_weights_unless_asked_otherwise() -> None:
    value = Cast(COUNT, "f32")
    probe = probe_of(value)
    for exact, dtype in (({}, "float64"), ({"exact": True}, "float64"), ({"exact": False}, "float32")):
        (found,) = probe.evaluate([value], 3, **exact)  # type: ignore[arg-type]
        ((other,),) = probe.at_lengths([value], [3], **exact)  # type: ignore[arg-type]
        assert found.dtype == other.dtype == dtype
    tables = [Param("a", Tensor((2, 3), "f32")), Param("table", Tensor((64, 3), "f32"))]
    probe = Probe(Graph("main", (IDS,), tuple((param.name, param) for param in tables)))
    for param in tables:
        with pytest.raises(IRError, match=f"it depends on the weight {param.name}"):
            probe.evaluate([param], 3)
        with pytest.raises(IRError, match=f"it depends on the weight {param.name}"):
            next(probe.at_lengths([param], [3]))
    found = probe.evaluate(tables, 3, stand_ins=True)
    assert [array.shape for array in found] == [(2, 3), (64, 3)] and np.std(found[1]) > 0
    assert all(np.array_equal(*pair) for pair in zip(found, probe.evaluate(tables, 3, stand_ins=True), strict=True))
