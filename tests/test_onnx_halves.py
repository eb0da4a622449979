"""ONNX texts that cast to halves: with f32 weights they round where they say so, with half weights they mean f32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx_graphs import Nodes
from scored_models import Scored, Scores, softmax, write_scored

from llmc.compiler.ir.attention import Attention, PagedAttention
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Param
from llmc.compiler.ir.types import Tensor
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.frontends import lift
from llmc.frontends.onnx.ops_defined import body_of
from llmc.frontends.onnx.translation import Item, Translation

HALVES = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def rounded(g: Scored, x: str, dtype: str) -> str:
    return g.floats(g.add("Cast", x, to=HALVES[dtype]))


def rounds(graph: Graph) -> set[str]:
    """The halves that something is cast to."""
    return {op.to for op in graph.ops if isinstance(op, Cast)} & set(HALVES)


def in_scores(dtype: str) -> tuple[Scores, Scores]:
    return lambda g, raw: g.causal(rounded(g, g.scaled(raw), dtype)), softmax


def in_probabilities(dtype: str) -> tuple[Scores, Scores]:
    return lambda g, raw: g.causal(g.scaled(raw)), lambda g, scores: rounded(g, softmax(g, scores), dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("where", [in_scores, in_probabilities], ids=["scores", "probabilities"])
def test_f32_attention_that_rounds_is_kept_as_it_is(where: object, dtype: str, tmp_path: Path) -> None:
    scores, shares = where(dtype)  # type: ignore[operator]
    lifted = lift(write_scored(tmp_path / "model.onnx", scores, shares=shares), max_context=64)
    assert rounds(lifted.graph) == {dtype}
    compiled = run_pipeline(lifted.graph, CompileOptions(quantization="none"), load=lifted.load, task=lifted.task)
    assert not any(isinstance(op, (Attention, PagedAttention)) for op in compiled.graph.ops)
    assert rounds(compiled.graph) == {dtype}
    (report,) = [report for report in compiled.reports if report.name == "fuse-attention"]
    assert f"are rounded to {dtype}" in report.refusals[0][1]


@pytest.mark.parametrize("weights", HALVES)
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_of_a_model_in_halves_are_f32(dtype: str, weights: str, tmp_path: Path) -> None:
    path = write_scored(tmp_path / "model.onnx", in_scores(dtype)[0])
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
            array = numpy_helper.to_array(tensor)
            half = onnx.helper.tensor_dtype_to_np_dtype(HALVES[weights])
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(array, half), tensor.name))
    onnx.save(model, path)
    lifted = lift(path, max_context=64)
    assert not rounds(lifted.graph)
    compiled = run_pipeline(lifted.graph, CompileOptions(quantization="none"), load=lifted.load, task=lifted.task)
    assert any(isinstance(op, PagedAttention) for op in compiled.graph.ops)


def test_in_a_model_of_halves_places_are_rounded_and_features_are_not() -> None:
    """Halves count to 2,048 only: a place beyond is another one. What comes from tokens and weights means f32."""
    nodes = Nodes({"positions": ("int64", ("S",)), "x": ("float32", ("S",)), "w": ("float32", (1,))})
    far = nodes.add("Mul", "positions", np.int64(2049))
    angles = nodes.add("Mul", nodes.add("Cast", far, to=TensorProto.FLOAT), np.float32(0.3))
    mixed = [nodes.add("Mul", angles, other) for other in ("x", "w")]
    halves = [nodes.add("Cast", value, to=TensorProto.FLOAT16) for value in (far, angles, "x", *mixed)]
    _, inputs = nodes.items("x")
    given = {value.name: Item(value) for value in inputs}
    given["w"] = Item(Param("w", Tensor((1,), "f32")))
    found = Translation(wide_floats=frozenset({"f16"})).run(body_of(nodes.model(*halves).graph, {"": 21}), given)
    outputs = tuple((name, item.value) for name, item in zip(halves, found, strict=True))
    graph = Graph("g", tuple(value for value in inputs if value.name != "w"), outputs)
    places, x, w = np.arange(1, 8), np.linspace(0.1, 0.9, 7, dtype=np.float32), np.array([0.7], np.float32)
    values = evaluate(graph, {"positions": places, "x": x}, lambda name: w)
    angle = (places * 2049).astype(np.float32) * np.float32(0.3)
    expected = [(places * 2049).astype(np.float16), angle.astype(np.float16), x, angle * x, angle * w]
    for name, wanted in zip(halves, expected, strict=True):
        assert values[name].dtype == np.float32
        np.testing.assert_array_equal(values[name], wanted.astype(np.float32))
