"""Indices: proved to be in range, or looked at by the step, which ends with an error and reads nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_harness import run_checked
from program_harness import CompiledGraph
from random_indices import IDS, NUMBERS, WHOLE, WILD, indices, wild_inputs

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, concrete, symbol
from llmc.compiler.ir.evaluate import evaluate, evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import CheckedIndex, Gather, GatherElements, Scatter
from llmc.compiler.ir.types import INTEGERS, NUMPY_DTYPES, Tensor
from llmc.compiler.passes.manager import parse_pipeline, run_passes
from llmc.errors import IRError, LlmcError
from llmc.targets import machine_named

C, R = symbol("c", 1, 300), symbol("rows", 1, 64)


def bounded(graph: Graph, options: str = "") -> tuple[Graph, dict[str, int]]:
    after, reports = run_passes(graph, parse_pipeline(f"bound-indices{options}"))
    return after, dict(reports[0].hits)


def lookup(kind: str, dtype: str, rows: int | Dim = 5) -> Graph:
    indices = Input("indices", Tensor((C,), dtype))
    table: Value = Param("table", Tensor((5, 7), "f32")) if rows == 5 else Input("table", Tensor((rows, 7), "f32"))
    op: Op = Embed(table, indices) if kind == "embed" else Gather(table, indices, 0)
    inputs = (indices,) if rows == 5 else (indices, table)
    return Graph("g", inputs, (("out", e.Add(op, op)),))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind, dtype, rows", [("embed", "i64", 5), ("gather", "i32", 5), ("gather", "i64", R)])
def test_the_step_reads_the_row_or_fails(kind: str, dtype: str, rows: int | Dim) -> None:
    graph, hits = bounded(lookup(kind, dtype, rows))
    assert hits == {"checked": 1}
    table = np.random.default_rng(0).standard_normal((5, 7), np.float32)
    program = CompiledGraph(graph, machine_named("native"), {"table": table}, task="run")
    given = {value.name: table for value in graph.inputs}

    def run(at: list[int]) -> np.ndarray | int:
        given["indices"] = np.array(at, NUMPY_DTYPES[dtype])
        return program.run_or_code({value.name: given[value.name] for value in graph.inputs}, "out")

    right = [0, 4, -1, -5, 3, 2, 1, -2]
    np.testing.assert_array_equal(run(right), 2 * table[right])
    ends = (-(2**63), 2**63 - 1, 2**32) if dtype == "i64" else (-(2**31), 2**31 - 1)
    for wrong in (5, -6, 7, 1000, -1000, *ends):
        for place in (0, 7, 256):
            many = [0] * 257
            many[place] = wrong
            assert run(many) == 1
    np.testing.assert_array_equal(run(right), 2 * table[right])  # the one after is as if nothing had happened


def test_each_index_may_have_a_size_of_its_own() -> None:
    at, sizes = Input("at", Tensor((C,), "i32")), Input("sizes", Tensor((C,), "i32"))
    graph = Graph("g", (at, sizes), (("out", CheckedIndex(at, sizes, what="the text")),))
    program = CompiledGraph(graph, machine_named("native"), {}, task="run")

    def run(index: list[int], limit: list[int]) -> np.ndarray | int:
        return program.run_or_code({"at": np.array(index, np.int32), "sizes": np.array(limit, np.int32)}, "out")

    np.testing.assert_array_equal(run([0, -1, 3, -4], [1, 7, 4, 4]), [0, 6, 3, 0])
    for index, limit in (([0, 1], [1, 1]), ([0, -2], [9, 1]), ([0, 0], [1, 0])):
        assert run(index, limit) == 1
        with pytest.raises(IRError, match="index out of range: the text"):
            evaluate(graph, {"at": np.array(index, np.int32), "sizes": np.array(limit, np.int32)}, {}.__getitem__)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_dtype_fails_where_numpy_does(dtype: str) -> None:
    at = Input("at", Tensor((C,), dtype))
    graph = Graph("g", (at,), (("out", CheckedIndex(at, None, 100)),))
    program = CompiledGraph(graph, machine_named("native"), {}, task="run")
    limits = np.iinfo(NUMPY_DTYPES[dtype])
    for number in {0, 99, 100, -1, -100, -101, int(limits.min), int(limits.max)}:
        if not limits.min <= number <= limits.max:
            continue
        found = program.run_or_code({"at": np.array([0, number], NUMPY_DTYPES[dtype])}, "out")
        if -100 <= number < 100:
            np.testing.assert_array_equal(found, [0, number % 100])
        else:
            assert isinstance(found, int) and found == 1


def lookups_of(graph: Graph) -> list[tuple[Op, Value, int | Dim]]:
    return [(op, getattr(op, item.field), item.size) for op in graph.ops for item in op.lookups()]


@st.composite
def looking_up(draw: st.DrawFn) -> Graph:
    """Tables that are read, or written, at random computed indices."""
    outputs: list[Value] = []
    for _ in range(draw(st.integers(1, 3))):
        index = draw(indices().filter(lambda value: value.dtype in INTEGERS))
        rows = draw(st.sampled_from((1, 7, 64, 300)))
        table: Value = e.constant(np.arange(float(rows)), "f32")
        kind = draw(st.sampled_from(("gather", "elements", "scatter")))
        if kind == "gather":
            outputs.append(Gather(table, index, 0))
        elif index.rank == 1 and kind == "elements":
            outputs.append(GatherElements(table, index, 0))
        elif index.rank == 1:
            outputs.append(Scatter(table, index, s.Broadcast(e.constant(-1.0, "f32"), index.shape)))
    return Graph("g", (IDS, WILD, WHOLE, NUMBERS), tuple((str(i), value) for i, value in enumerate(outputs)))


@settings(max_examples=200, deadline=None)
@given(looking_up(), st.integers(1, 9), st.integers(0, 1 << 30))
def test_no_op_ever_gets_an_index_that_is_outside(graph: Graph, count: int, seed: int) -> None:
    """For any inputs: every index of every op lies in its table, or the step ends with an error before it is used; and
    an error comes only of an index that really is outside."""
    after, _ = bounded(graph)
    inputs = wild_inputs(np.random.default_rng(seed), count)
    wrong = False
    for _, index, size in lookups_of(graph):
        try:
            found = np.asarray(evaluate_values([index], inputs, {}.__getitem__, {"n": count})["0"]).astype(object)
        except LlmcError:
            return  # an index of an index, or a negative power
        wrong |= any(not -int(size) <= x < int(size) for x in found.reshape(-1))  # type: ignore[arg-type]
    failed = False
    for _, index, size in lookups_of(after):
        try:
            found = np.asarray(evaluate_values([index], inputs, {}.__getitem__, {"n": count})["0"])
        except IRError as error:
            assert "index out of range" in str(error)
            failed = True
            continue
        assert all(0 <= int(x) < concrete(size, {"n": count}) for x in found.reshape(-1))
    assert failed == wrong


TOKENS = symbol("T", 1, 512)


def text_graph(index: str, rows: int) -> Graph:
    ids, positions = (Input(name, Tensor((TOKENS,), "i32")) for name in ("ids", "positions"))
    made = {
        "ids": ids,
        "positions": positions,
        "late positions": e.Add(positions, e.constant(2, "i32")),
        "mod": e.Mod(e.Mul(positions, e.constant(3, "i32")), e.constant(699, "i32")),
        "both": e.Add(ids, positions),
        "from the end": e.Sub(positions, e.constant(512, "i32")),
        "through floats": e.Cast(e.Mul(e.Cast(positions, "f32"), e.constant(0.5, "f32")), "i32"),
        "root": e.Cast(e.Sqrt(e.Cast(positions, "f32")), "i32"),  # kernels may round otherwise than numpy
    }[index]
    return Graph("g", (ids, positions), (("y", Embed(Param("table", Tensor((rows, 3), "f32")), made)),))


@pytest.mark.parametrize(
    "index, rows, checked",
    [
        ("ids", 64, False), ("ids", 63, True), ("positions", 512, False), ("positions", 511, True),
        ("late positions", 514, False), ("late positions", 513, True), ("mod", 699, False), ("mod", 697, False),
        ("mod", 696, True), ("both", 575, False), ("both", 574, True), ("from the end", 512, True),
        ("through floats", 257, False), ("through floats", 200, True), ("root", 100, True),
    ],
)  # fmt: skip
def test_text_is_checked_only_where_the_runtime_does_not(index: str, rows: int, checked: bool) -> None:
    """Of 64 ids and 512 positions. 3 * position % 699 is 696 at most: that takes trying all positions to see."""
    graph, hits = bounded(text_graph(index, rows), "{text=true,vocabulary=64,context=512}")
    assert any(isinstance(op, CheckedIndex) for op in graph.ops) == checked
    assert hits == ({"checked": 1} if checked else {})


def test_without_limits_ids_are_those_of_the_table_and_positions_anything() -> None:
    for index, checked in (("ids", 0), ("positions", 1)):
        _, hits = bounded(text_graph(index, 64), "{text=true}")
        assert hits.get("checked", 0) == checked


def test_inputs_of_a_graph_of_arrays_are_anything_whatever_they_are_called() -> None:
    _, hits = bounded(text_graph("ids", 64))
    assert hits == {"checked": 1}


def test_a_check_that_holds_goes_away() -> None:
    at = e.Mod(WILD, e.constant(7, "i64"))
    graph = Graph("g", (WILD,), (("y", CheckedIndex(at, None, 7)), ("z", CheckedIndex(at, None, 6))))
    after, hits = bounded(graph)
    assert hits == {"proved": 1}
    assert after.output("y") is at and isinstance(after.output("z"), CheckedIndex)
    small = e.Mod(Input("small", Tensor((3,), "u8")), e.constant(7, "u8"))
    after, hits = bounded(Graph("g", (small.a,), (("y", CheckedIndex(small, None, 7)),)))  # type: ignore[arg-type]
    found = after.output("y")
    assert hits == {"proved": 1} and isinstance(found, e.Cast) and found.x is small and found.dtype == "i64"


def test_in_range_nothing_changes() -> None:
    """The numpy meaning of a graph of lookups is the same; stored indices that are in range are left alone."""
    table = e.constant(np.arange(21.0).reshape(7, 3), "f32")
    chosen = e.constant(np.array([6, 0, 2]), "i64")
    graph = Graph(
        "g", (IDS,), (("a", Gather(table, chosen, 0)), ("b", Gather(table, e.Mod(IDS, e.constant(7, "i32")))))
    )
    after, reports = run_checked(graph, "bound-indices")
    assert after is graph and not reports[0].hits
