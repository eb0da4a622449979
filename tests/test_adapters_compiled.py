"""Steps with adapters beside their numpy meaning: kernels, the driver's guards and what lies where, in every scheme."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from program_harness import CompiledGraph
from small_decoder import VOCABULARY, of_modules, small_decoder
from test_passes_adapt_linears import tables_of
from tiny_encoders import make_encoder

import llmc
from llmc.compiler.ir.adapters import LowRank
from llmc.compiler.ir.encoded import Encoded, Pages
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.structural import Reshape
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.adapt_linears import AdaptLinears
from llmc.compiler.passes.manager import Report
from llmc.compiler.pipeline import run_pipeline
from llmc.compiler.scenario import prompt_inputs, random_params
from llmc.errors import CompileError
from llmc.targets import lower, machine_named

LENGTHS = (7, 1, 31, 33, 9)
OWNERS = (1, 0, 2, 0, 1)  # adapters of these texts
SCHEMES = ("none", "bf16", "int8", "int4")


def limit(scheme: str) -> float:
    """Of the largest logit. Sums of f32 in another order, by which a few activations may round to the next step (3e-5
    were seen); tile registers keep bf16 where numpy rounds to int8, and f32 where it rounds to bf16."""
    if scheme == "none":
        return 2e-5
    return 2e-2 if machine_named("native").has("amx-tile") else 2e-3


@cache
def compiled(scheme: str) -> tuple[CompiledGraph, Graph]:
    source = of_modules(small_decoder("head"))
    load = random_params(source, 3)
    options = CompileOptions(quantization=scheme, group_size=16)
    graph = AdaptLinears(2, 3).run(run_pipeline(source, options, load=load).graph, Report())
    params = {param.name: load(param.name) for param in graph.params}
    return CompiledGraph(graph, machine_named("native"), params, largest=128), graph


def inputs_of(graph: Graph, adapters: tuple[int, ...]) -> dict[str, np.ndarray | Encoded | Pages]:
    texts = [np.arange(length, dtype=np.int32) * 5 % VOCABULARY for length in LENGTHS]
    numbers = np.repeat(np.array(adapters, np.int32), LENGTHS)
    return {**prompt_inputs(graph, *texts), **tables_of(graph), "adapters": numbers}


@pytest.mark.parametrize("adapters", [OWNERS, (0,) * 5, (2,) * 5])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_is_what_its_ops_mean(scheme: str, adapters: tuple[int, ...]) -> None:
    program, graph = compiled(scheme)
    inputs = inputs_of(graph, adapters)
    load = random_params(of_modules(small_decoder("head")), 3)
    expected = evaluate(graph, inputs, load)["logits"]
    assert isinstance(expected, np.ndarray)
    found, _ = program.run(inputs)
    again, _ = program.run(inputs, splits=1, threads=1)
    assert np.array_equal(found, again)
    assert np.abs(found - expected).max() <= limit(scheme) * np.abs(expected).max()


def test_a_model_without_a_cache_is_refused_before_anything_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.compiler.pipeline.near_choice", lambda *_: pytest.fail("it was rounded first"))
    with pytest.raises(CompileError, match="--adapters needs a model that continues texts"):
        llmc.compile(make_encoder("bert", tmp_path / "bert"), tmp_path / "model.so", adapters=1)


def test_an_operand_that_is_changed_in_place_has_no_other_reader() -> None:
    _, graph = compiled("none")
    op = next(op for op in graph.ops if isinstance(op, LowRank))
    for value in (op.y, Reshape(op.y, op.y.shape)):
        assert isinstance(value, Op)
        outputs = (*graph.outputs, ("sums", value))
        with pytest.raises(CompileError, match=r"llm\.low_rank .* changes y in place, which something else reads too"):
            lower(Graph(graph.name, graph.inputs, outputs), machine_named("native"))
