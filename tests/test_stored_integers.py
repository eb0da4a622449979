"""Weights that a source holds as integers: in a graph they mean the same numbers, and passes keep the integers."""

from __future__ import annotations

import numpy as np
import pytest
from program_harness import CompiledGraph
from x86_machines import MACHINES

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.llm import Embed, Linear
from llmc.compiler.ir.op import Input, Param
from llmc.compiler.ir.structural import Gather, Matmul, Transpose
from llmc.compiler.ir.types import Array, Tensor, dtype_of
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.manager import parse_pipeline, run_passes
from llmc.compiler.passes.probe import reading
from llmc.compiler.pipeline import pipeline_text
from llmc.errors import FrontendError
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredIntegers, StoredWeights, keep_stored, stored_notes
from llmc.frontends.weight_sources import ArrayWeights

T = symbol("T", 1, 40)


def part(array: Array) -> Part:
    return Part(array.shape, dtype_of(array.dtype), lambda: array)


def stored(
    rows: int, inputs: int, bits: int, block: int, zeros: str = "middle", ordered: bool = False, dtype: str = "f16"
) -> StoredIntegers:
    rng = np.random.default_rng([rows, inputs, bits, block])
    blocks = -(-inputs // block) if block else 1
    q = rng.integers(0, 1 << bits, (rows, inputs)).astype(np.uint8)
    q[0, :2] = 0, (1 << bits) - 1
    scales = ((rng.random((rows, blocks)) + 0.5) / (1 << bits)).astype(np.float16 if dtype == "f16" else np.float32)
    points = {
        "none": None,
        "middle": 1 << (bits - 1),
        "each": part(rng.integers(0, 1 << bits, (rows, blocks)).astype(np.uint8)),
    }[zeros]
    order = part(rng.permutation(inputs).astype(np.int32)) if ordered else None
    return StoredIntegers(part(q), part(scales), points, block, bits, f"{bits} bits (test)", order)


def meaning(weight: StoredIntegers) -> Array:
    """Element by element, in f64."""
    rows, inputs = weight.shape
    q, scales = weight.q.load(), weight.scales.load()
    zeros = weight.zeros.load() if isinstance(weight.zeros, Part) else np.full(scales.shape, weight.zeros or 0)
    order = np.arange(inputs) if weight.order is None else weight.order.load()
    found = np.zeros((rows, inputs))
    for r in range(rows):
        for j in range(inputs):
            g = j // weight.block if weight.block else 0
            found[r, order[j]] = (float(q[r, j]) - float(zeros[r, g])) * float(scales[r, g])
    return found


def linear_graph(weight: StoredIntegers, dtype: str = "f32") -> tuple[Graph, WeightSource]:
    x = Input("x", Tensor((T, weight.shape[1]), "f32"))
    w = Param("w", Tensor(weight.shape, dtype))
    y = Matmul(x, Transpose(w if dtype == "f32" else Cast(w, "f32"), (1, 0)))
    return keep_stored(Graph("g", (x,), (("y", y),)), ArrayWeights({}), {"w": weight})


CASES = [(1, 32, 4, 0), (7, 33, 4, 16), (31, 129, 2, 64), (33, 96, 3, 32), (5, 100, 8, 128), (4, 7, 4, 0)]


@pytest.mark.parametrize("zeros", ["none", "middle", "each"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "bits", "block"), CASES)
def test_the_graph_means_what_the_integers_stand_for(
    rows: int, inputs: int, bits: int, block: int, ordered: bool, zeros: str
) -> None:
    weight = stored(rows, inputs, bits, block, zeros, ordered)
    want = meaning(weight)
    np.testing.assert_array_equal(weight.dequantized(), want.astype(np.float32))
    graph, source = linear_graph(weight)
    assert {f"w.{p}" for p in ("q", "scales")} <= set(source.names)
    x = np.eye(inputs, dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(evaluate(graph, {"x": x}, source.load)["y"]).T, want.astype(np.float32))


def passed(graph: Graph, source: WeightSource, scheme: str = "none") -> Graph:
    options = CompileOptions(quantization=scheme, activations="f32")
    with reading(source.load):
        after, _ = run_passes(graph, parse_pipeline(pipeline_text(options, "run")))
    return after


@pytest.mark.parametrize(
    ("bits", "block", "zeros", "encoding"),
    [(2, 64, "middle", "q4g64"), (3, 32, "none", "q4g32"), (3, 32, "each", "q4g32z"),
     (4, 128, "middle", "q4g64"), (4, 32, "each", "q4g32z"),
     (4, 0, "middle", "q4g64"), (8, 64, "middle", "q8g64"), (8, 64, "each", "q8g64z")],
)  # fmt: skip
@pytest.mark.parametrize("ordered", [False, True])
def test_integers_and_their_order_are_kept(bits: int, block: int, zeros: str, encoding: str, ordered: bool) -> None:
    weight = stored(12, 192, bits, block, zeros, ordered)
    graph, source = linear_graph(weight)
    after = passed(graph, source, "int4")
    [packed] = [op for op in after.ops if isinstance(op, PackGroups)]
    assert packed.encoding == encoding
    [linear] = [op for op in after.ops if isinstance(op, Linear)]
    assert isinstance(linear.x, Gather) == ordered
    x = np.random.default_rng(1).standard_normal((7, 192)).astype(np.float32)
    want = x.astype(np.float64) @ meaning(weight).T
    found = np.asarray(evaluate(after, {"x": x}, source.load)["y"])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())  # f32 sums


@pytest.mark.parametrize("ordered", [False, True])
def test_compiled_integers_give_what_they_stand_for(ordered: bool) -> None:
    weight = stored(33, 160, 4, 32, "middle", ordered)
    graph, source = linear_graph(weight)
    program = CompiledGraph(
        passed(graph, source), MACHINES["avx2"], {n: source.load(n) for n in source.names}, task="run"
    )
    for tokens in (1, 7, 33):
        x = np.random.default_rng(tokens).standard_normal((tokens, 160)).astype(np.float32)
        want = x.astype(np.float64) @ meaning(weight).T
        np.testing.assert_allclose(program.run_arrays({"x": x})["y"], want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_layers_of_one_order_share_it_and_merge() -> None:
    one, other = stored(12, 64, 4, 32, ordered=True), stored(20, 64, 4, 32, ordered=True)
    assert one.order is not None
    other = StoredIntegers(other.q, other.scales, other.zeros, 32, 4, other.what, part(one.order.load().copy()))
    x = Input("x", Tensor((T, 64), "f32"))
    outputs = tuple((n, Matmul(x, Transpose(Param(n, Tensor(w.shape, "f32")), (1, 0)))) for n, w in
                    (("a", one), ("b", other)))  # fmt: skip
    graph, source = keep_stored(Graph("g", (x,), outputs), ArrayWeights({}), {"a": one, "b": other})
    assert sum(name.endswith(".places") for name in source.names) == 1
    after = passed(graph, source)
    assert [op.w.shape for op in after.ops if isinstance(op, Linear)] == [(32, 64)]


def test_a_turned_weight_and_a_table() -> None:
    weight = stored(12, 64, 4, 32)
    x, ids = Input("x", Tensor((T, 64), "f32")), Input("ids", Tensor((symbol("U", 1, 12),), "i64"))
    w, table = Param("w", Tensor((64, 12), "f32")), Param("t", Tensor((12, 64), "f32"))
    outputs = (("y", Matmul(x, w)), ("e", Gather(table, ids, 0)))
    graph, source = keep_stored(Graph("g", (x, ids), outputs), ArrayWeights({}), {"w": weight, "t": weight}, ["w"])
    after = passed(graph, source)
    assert [op.w.tensor.encoding.name for op in after.ops if isinstance(op, Linear)] == ["q4g32"]
    assert [op.table.tensor.encoding.name for op in after.ops if isinstance(op, Embed)] == ["q4g32"]
    given = {"x": np.eye(64, dtype=np.float32), "ids": np.arange(12)}
    found = evaluate(after, given, source.load)
    np.testing.assert_array_equal(np.asarray(found["y"]).T, np.asarray(found["e"]))


def test_parts_that_do_not_fit_are_refused() -> None:
    weight = stored(12, 64, 4, 32)
    for changes, why in (
        ({"scales": part(np.zeros((12, 3), np.float16))}, r"scales are f16 \[12, 3\]"),
        ({"zeros": part(np.zeros((2, 12), np.uint8))}, r"zero points are u8 \[2, 12\]"),
        ({"order": part(np.zeros(64, np.int64))}, "the order of inputs is i64"),
        ({"q": part(np.zeros((12, 64), np.int32))}, "integers of 4 bits as i32"),
        ({"bits": 9}, "integers of 9 bits"),
    ):
        with pytest.raises(FrontendError, match=why):
            StoredIntegers(**{**vars(weight), **changes})
    twice = StoredIntegers(**{**vars(weight), "order": part(np.zeros(64, np.int32))})
    with pytest.raises(FrontendError, match="weight w: the order of its inputs does not name each of them once"):
        linear_graph(twice)
    damaged = StoredIntegers(**{**vars(weight), "scales": part(np.full((12, 2), np.nan, np.float16))})
    graph, source = linear_graph(damaged)
    with pytest.raises(FrontendError, match=r"weight w: its scales.*NaN"):
        evaluate(graph, {"x": np.zeros((1, 64), np.float32)}, source.load)
    with pytest.raises(FrontendError, match=r"weight w is stored as \[12, 64\], not \[64, 12\]"):
        keep_stored(
            Graph("g", (), (("w", Param("w", Tensor((64, 12), "f32"))),)), ArrayWeights({}), {"w": weight}
        )  # fmt: skip


def test_a_source_of_stored_weights() -> None:
    weight = stored(12, 64, 4, 32)
    file = ArrayWeights({"a.qweight": np.zeros((2, 2), np.int32), "b": np.ones(3, np.float32)})
    floats = Part((2, 2), "f32", lambda: np.ones((2, 2), np.float32))
    source = StoredWeights(file, {"a.weight": weight}, {"c.weight": floats}, ["a.qweight"])
    assert list(source.names) == ["b", "a.weight", "c.weight"]
    assert [source.dtype(n) for n in source.names] == ["f32"] * 3
    assert [source.shape(n) for n in source.names] == [(3,), (12, 64), (2, 2)]
    assert [source.load(n).shape for n in source.names] == [(3,), (12, 64), (2, 2)]
    assert source.integers("a.weight") is weight and source.integers("b") is None
    with pytest.raises(FrontendError, match="holds weight 'b' twice"):
        StoredWeights(file, {"b": weight}, {}, [])


def test_notes_say_what_is_kept() -> None:
    notes = stored_notes([stored(4, 64, 4, 32), stored(4, 64, 4, 32), stored(4, 64, 8, 0, ordered=True)])
    assert notes[0].startswith("2 weights of the checkpoint are integers: 4 bits (test), blocks of 32 inputs.")
    assert notes[1].startswith("1 weight of the checkpoint are integers: 8 bits (test), a scale for each output")
