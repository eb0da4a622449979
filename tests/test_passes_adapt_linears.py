"""Room for adapters in a graph: which linear ops get it, what its tables are for, and that the model is the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from pass_harness import S, param
from small_decoder import HEADS, VOCABULARY, WIDTH, of_modules, small_decoder

from llmc.compiler.check import Checker
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.adapters import Activated, LowRank
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.encoded import Encoded, Pages
from llmc.compiler.ir.evaluate import LoadParam, evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import GatedLinear, Linear, Quantize
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.text import parse
from llmc.compiler.ir.types import Tensor
from llmc.compiler.ir.verify import verify
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.adapt_linears import AdapterTable, AdaptLinears, Part
from llmc.compiler.passes.manager import Report
from llmc.compiler.pipeline import run_pipeline
from llmc.compiler.scenario import prompt_inputs, random_params
from llmc.errors import CompileError

T = symbol("T", 1)
LAYER = ["qkv", "o", "gate up", "down"]


def decoder(scheme: str = "none", head: str = "head") -> tuple[Graph, LoadParam]:
    source = of_modules(small_decoder(head))
    load = random_params(source, 3)
    return run_pipeline(source, CompileOptions(quantization=scheme), load=load).graph, load


def adapted(graph: Graph, count: int = 2, rank: int = 3) -> tuple[Graph, tuple[AdapterTable, ...], Report]:
    report = Report()
    after, tables = AdaptLinears(count, rank).adapted(graph, report, {})
    verify(after)
    return after, tables, report


def modules(table: AdapterTable) -> list[str]:
    return [part.module for part in table.parts]


@pytest.mark.parametrize("scheme", ["none", "bf16", "int8", "int4"])
def test_each_linear_op_gets_tables_with_a_part_for_each_module(scheme: str) -> None:
    graph, _ = decoder(scheme)
    after, tables, report = adapted(graph)
    assert [modules(table) for table in tables] == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"], ["head"]]
    assert report.hits == {"linear": 5} and not report.refusals
    for table in tables:
        assert [part.rows for part in table.parts] == [((0, part.outputs),) for part in table.parts]
    ops = [op for op in after.ops if isinstance(op, LowRank)]
    assert [op.columns for op in ops] == [(16, 24, 32), (12,), (7, 14), (12,), (VOCABULARY,)]
    assert [(table.inputs, table.outputs) for table in tables] == [(op.x.shape[1], op.y.shape[1]) for op in ops]
    assert all(op.a.shape == (3, len(op.columns), 3, op.x.shape[1]) for op in ops)
    assert all(op.x.tensor.encoding is None for op in ops)  # activations that nothing has rounded
    assert sum(isinstance(op, Activated) for op in after.ops) == 1
    assert not any(isinstance(op, GatedLinear) for op in after.ops)
    names = [value.name for value in after.inputs[len(graph.inputs) :]]
    assert names == ["adapters", *(f"adapter.{n}.{name}" for n in range(5) for name in ("a", "b", "ranks"))]
    assert str(parse(str(after))) == str(after)


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_tokens_without_an_adapter_are_computed_as_before(scheme: str) -> None:
    graph, load = decoder(scheme)
    checker = Checker(load, lengths=(5, 2, 40))
    item = AdaptLinears(2, 3)
    report = Report()
    checker(item, graph, item.run(graph, report), report)
    assert checker.differences and max(difference.relative for difference in checker.differences) < 1e-12


def tables_of(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tables: adapter 1 has all ranks, adapter 2 has none in some parts."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for value in graph.inputs:
        if value.name.endswith((".a", ".b")):
            found[value.name] = (rng.standard_normal(value.shape) * 0.3).astype(np.float32)  # type: ignore[arg-type]
        elif value.name.endswith(".ranks"):
            ranks = rng.integers(0, 4, value.shape)  # type: ignore[arg-type]
            ranks[0], ranks[1] = 0, 3
            found[value.name] = ranks.astype(np.int32)
    return found


@pytest.mark.parametrize("adapter", [0, 1, 2])
def test_a_token_with_an_adapter_is_computed_by_merged_weights(adapter: int) -> None:
    """W + B A in the place of W, for every module, gives the same logits."""
    graph, load = decoder()
    after, tables, _ = adapted(graph)
    given = tables_of(after)
    ids = np.arange(9, dtype=np.int32) % VOCABULARY
    inputs: dict[str, np.ndarray | Encoded | Pages] = {
        **prompt_inputs(graph, ids), **given, "adapters": np.full(9, adapter, np.int32),
    }  # fmt: skip
    merged: dict[str, np.ndarray] = {}
    for number, table in enumerate(tables):
        a, b, ranks = (given[f"adapter.{number}.{name}"][adapter] for name in ("a", "b", "ranks"))
        end = 0
        for p, part in enumerate(table.parts):
            begin, end = end, end + part.outputs
            merged[f"{part.module}.weight"] = b[: ranks[p], begin:end].T @ a[p, : ranks[p]]

    def changed(name: str) -> np.ndarray:
        return load(name) + merged[name].reshape(load(name).shape) if name in merged else load(name)

    expected = evaluate(graph, {v.name: inputs[v.name] for v in graph.inputs}, changed)["logits"]
    found = evaluate(after, inputs, load)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    plain = evaluate(graph, {v.name: inputs[v.name] for v in graph.inputs}, load)["logits"]
    assert (np.abs(found - plain).max() > 0.1) == (adapter > 0)


def test_a_table_of_embeddings_is_no_module() -> None:
    graph, _ = decoder(head="embed")
    _, tables, report = adapted(graph)
    assert ["head"] not in [modules(table) for table in tables] and len(tables) == 4
    ((_, why),) = report.refusals
    assert why == "no adapter can change it: its weight embed.weight is the table of embeddings too"


def graph_of(weight: Value, x: Value | None = None) -> Graph:
    """A linear op over tokens, with the inputs that a decoder has."""
    ids, rows = Input("ids", Tensor((T,), "i32")), Input("rows", Tensor((symbol("R", 1),), "i32"))
    given = Input("x", Tensor((T, WIDTH), "f32"))
    return Graph("g", (ids, rows, given), (("y", Linear(given if x is None else x, weight)),))


W = param("w.weight", 6, WIDTH)
ROWS: Mapping[str, tuple[Value, list[Part]]] = {
    "as it is": (W, [Part("w", 6, ((0, 6),))]),
    "turned": (s.Transpose(param("w.weight", WIDTH, 6), (1, 0)), [Part("w", 6, ((0, 6),))]),
    "a part": (s.Slice(W, 0, 2, 5), [Part("w", 6, ((2, 5),))]),
    "every second row": (s.Slice(W, 0, 1, 6, 2), [Part("w", 6, ((1, 2), (3, 4), (5, 6)))]),
    "halves": (s.Concat((s.Slice(W, 0, 3, 6), s.Slice(W, 0, 0, 3)), 0), [Part("w", 6, ((3, 6), (0, 3)))]),
    "interleaved": (
        s.Reshape(s.Slice(s.Reshape(W, (2, 3, WIDTH)), 1, 1, 2), (2, WIDTH)), [Part("w", 6, ((1, 2), (4, 5)))],
    ),
    "moved": (s.Reshape(s.Transpose(s.Reshape(W, (2, 3, WIDTH)), (1, 0, 2)), (6, WIDTH)),
              [Part("w", 6, tuple((n, n + 1) for n in (0, 3, 1, 4, 2, 5)))]),
    "two": (
        s.Concat((W, s.Transpose(param("v.weight", WIDTH, 2), (1, 0))), 0),
        [Part("w", 6, ((0, 6),)), Part("v", 2, ((0, 2),))],
    ),
    "rounded": (Quantize(e.Cast(param("w.weight", 64, 64, dtype="bf16"), "f32"), "q4g32"), [Part("w", 64, ((0, 64),))]),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_followed_to_the_module_that_they_are_of(case: str) -> None:
    weight, parts = ROWS[case]
    x = Input("x", Tensor((T, weight.shape[1]), "f32")) if case == "rounded" else None
    graph = graph_of(weight, x)
    if x is not None:
        graph = Graph("g", (*graph.inputs[:2], x), graph.outputs)
    _, (table,), _ = adapted(graph)
    assert list(table.parts) == parts


def _x(*shape: int) -> Input:
    return Input("x", Tensor((T, *shape), "f32"))


def refused(weight: Value, x: Value | None = None) -> str:
    """Why one op has no room, beside another one that has."""
    graph = graph_of(W)
    other = Linear(graph.inputs[2] if x is None else x, weight)
    given = tuple(v for v in ((x,) if isinstance(x, Input) else ()) if v not in graph.inputs)
    _, tables, report = adapted(Graph("g", (*graph.inputs, *given), (*graph.outputs, ("z", other))))
    assert len(tables) == 1
    ((_, why),) = report.refusals
    return why.removeprefix("no adapter can change it: ")


def test_near_misses_say_why() -> None:
    scaled = e.Mul(param("w2.weight", 6, WIDTH), e.constant(2.0, "f32"))
    assert refused(scaled) == "its weight is computed by t.mul, and not as the checkpoint has it"
    assert refused(param("experts", 6, WIDTH)) == "its weight experts is that of no module"
    columns = s.Concat((param("a.weight", 6, 5), param("b.weight", 6, WIDTH - 5)), 1)
    assert refused(columns) == "its weight is computed by t.concat, and not as the checkpoint has it"
    assert refused(s.Reshape(param("w2.weight", WIDTH, 6), (6, WIDTH))).startswith(
        "its weight is computed by t.reshape"
    )
    deep = Input("deep", Tensor((T, 2, WIDTH), "f32"))
    assert "are no rows of tokens" in refused(param("w2.weight", 6, WIDTH), deep)
    half = Input("half", Tensor((T, WIDTH), "f16"))
    assert refused(param("w2.weight", 6, WIDTH), half) == "its activations are f16, not f32"
    order = e.constant(np.arange(WIDTH)[::-1].copy(), "i32")
    ordered = s.Gather(Input("x2", Tensor((T, WIDTH), "f32")), order, 1)
    graph = graph_of(W)
    graph = Graph(
        "g", (*graph.inputs, ordered.x), (*graph.outputs, ("z", Linear(ordered, param("w2.weight", 6, WIDTH))))
    )  # type: ignore[arg-type]
    _, tables, report = adapted(graph)
    assert len(tables) == 1 and "an order of the file's own" in report.refusals[0][1]


def test_graphs_without_tokens_are_refused_in_one_line() -> None:
    for graph, why in (
        (small_decoder(), "--adapters needs a decoder with a KV cache"),
        (graph_of(param("experts", 6, WIDTH)), "so that none is adapted"),
    ):
        with pytest.raises(CompileError, match=why) as error:
            adapted(graph)
        assert "\n" not in str(error.value)
    assert S and HEADS  # of the graph that is used here
