"""Indices from outside: any number reads a row of the table, and those in range read the one they name."""

from __future__ import annotations

import numpy as np
import pytest
from pass_harness import run_checked
from program_harness import CompiledGraph

from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.elementwise import Add
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import Gather, GatherElements
from llmc.compiler.ir.types import Tensor
from llmc.targets import machine_named

N, R = symbol("n", 1, 300), symbol("rows", 1, 64)
WILD = np.array([0, 1, 4, 5, -1, -5, -6, 7, 1000, -1000, 2**31 - 1, -(2**31)])


def lookup(kind: str, dtype: str, rows: int | Dim = 5) -> Graph:
    indices = Input("indices", Tensor((N,), dtype))
    table: Value = Param("table", Tensor((5, 7), "f32")) if rows == 5 else Input("table", Tensor((rows, 7), "f32"))
    op: Op = Embed(table, indices) if kind == "embed" else Gather(table, indices, 0)
    inputs = (indices,) if rows == 5 else (indices, table)
    return Graph("g", inputs, (("out", Add(op, op)),))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind, rows", [("embed", 5), ("gather", 5), ("gather", R)])
@pytest.mark.parametrize("dtype", ["i32", "i64"])
def test_any_index_reads_a_row(kind: str, rows: int | Dim, dtype: str) -> None:
    graph = lookup(kind, dtype, rows)
    bounded, reports = run_checked(graph, "bound-indices,canonicalize,fold,cse")
    assert sum(reports[0].hits.values()) == 1
    table = np.random.default_rng(0).standard_normal((5, 7), np.float32)
    program = CompiledGraph(bounded, machine_named("native"), {"table": table}, task="run")
    wild = WILD.astype({"i32": np.int32, "i64": np.int64}[dtype])
    if dtype == "i64":
        wild = np.append(wild, [2**62, -(2**62)])
    inputs = {"indices": wild, "table": table}
    found = program.run_arrays({value.name: inputs[value.name] for value in graph.inputs})["out"]
    at = np.clip(np.where(wild < 0, wild + 5, wild), 0, 4)
    np.testing.assert_array_equal(found, 2 * table[at])


def test_indices_that_are_known_stay() -> None:
    """Those that the compiler computes, and those along other axes, whose kernels look after them."""
    x, table = Input("x", Tensor((4, R), "f32")), Param("table", Tensor((5, 7), "f32"))
    chosen = Param("chosen", Tensor((3,), "i64"))
    picked = Input("picked", Tensor((4, R), "i64"))
    graph = Graph("g", (x, picked), (("a", Gather(table, chosen, 0)), ("b", GatherElements(x, picked, 1))))
    after, reports = run_checked(graph, "bound-indices")
    assert after is graph and not reports[0].hits


def test_in_range_nothing_changes() -> None:
    """The numpy meaning of a graph of many lookups is the same."""
    graph = lookup("gather", "i32", R)
    after, _ = run_checked(graph, "bound-indices")
    table = np.arange(21, dtype=np.float32).reshape(3, 7)
    inputs = {"indices": np.array([0, 2, -1, -3], np.int32), "table": table}
    for name, array in evaluate(graph, inputs, {}.__getitem__).items():
        np.testing.assert_array_equal(np.asarray(evaluate(after, inputs, {}.__getitem__)[name]), np.asarray(array))
