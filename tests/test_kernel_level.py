"""The k level: what lowering chose, as a graph that prints, parses and obeys the rules of its level."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_decoder import small_decoder

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.kernels import RunKernels
from llmc.compiler.ir.text import parse, print_graph
from llmc.compiler.ir.verify import verify
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import lower_to_kernels, run_pipeline

GOLDEN = Path(__file__).parent / "golden" / "kernels"


def lowered(quantization: str, target: str) -> Graph:
    options = CompileOptions(quantization=quantization, target=target, group_size=32, max_step=64)
    graph = run_pipeline(small_decoder(), options).graph
    return lower_to_kernels(graph, options, 128)


@pytest.mark.parametrize(("quantization", "target"), [("int4", "x86-64-v3"), ("none", "icelake-server")])
def test_golden(quantization: str, target: str, update_golden: bool) -> None:
    path = GOLDEN / f"{quantization}-{target}.llmc"
    found = print_graph(lowered(quantization, target))
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text(), "a change of lowering: if it is meant, run pytest --update-golden, read the diff"


@pytest.mark.parametrize("quantization", ["none", "bf16", "int8", "int4"])
def test_only_kernel_calls_are_left_at_run_time(quantization: str) -> None:
    graph = lowered(quantization, "x86-64-v3")
    verify(graph)
    assert print_graph(parse(print_graph(graph))) == print_graph(graph)
    run_time = [op for op in graph.ops if op not in graph.constants]
    assert {op.name for op in run_time} <= {"k.run", "t.reshape"}
    calls = [call for op in run_time if isinstance(op, RunKernels) for call in op.calls]
    assert len(calls) > 10
    assert all(symbol.startswith("llmc_") for symbol, *_ in calls)
