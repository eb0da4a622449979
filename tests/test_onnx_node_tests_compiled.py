"""The node tests of the ONNX standard, compiled: every case that has a translation gives the standard's outputs.

All of them go through the passes and the kernels, call by call, in two parts of each call's units. A case of
every operator goes through the real driver as well, all of them as one graph, and through an older machine's kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from onnx_node_cases import NodeCase, lifted_case, node_cases
from program_batch import ProgramBatch
from program_harness import CompiledGraph
from test_onnx_node_tests import reason_for

from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.errors import LlmcError
from llmc.targets import machine_named
from llmc.targets.cpu.plain_builder import FORMS
from llmc.targets.lowering import Program

# Cases that have a translation and no kernels -> why.
NOT_COMPILED: dict[str, str] = {}

# Whose products the reference rounds to f16 after each sum, and kernels once: a unit in the last place, 2^-10.
HALF_PRODUCTS = ("test_attention_4d_causal_fp16", "test_attention_4d_causal_fp16_expanded")


@dataclass(frozen=True)
class Lifted:
    """A case, and its graph after all passes."""

    case: NodeCase
    graph: Graph

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {value.name: np.asarray(self.case.inputs[value.name]) for value in self.graph.inputs}


@functools.cache
def translated() -> tuple[Lifted, ...]:
    """The cases that have a translation (test_onnx_node_tests.py has a table of the others)."""
    graphs = [(case, _translation(case)) for case in node_cases() if reason_for(case.name) is None]
    return tuple(Lifted(case, graph) for case, graph in graphs if graph is not None)


def _translation(case: NodeCase) -> Graph | None:
    try:
        graph = lifted_case(case)
    except (LlmcError, ValueError, TypeError):  # the latter two: its inputs are no arrays
        return None
    return run_pipeline(graph, CompileOptions(quantization="none"), task="run").graph


def problem_with(case: NodeCase, found: Mapping[str, np.ndarray]) -> str:
    """What is wrong with a case's results; "" for nothing."""
    try:
        assert list(found) == list(case.outputs)
        for name, wanted in case.outputs.items():
            result, expected = np.asarray(found[name]), np.asarray(wanted)
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
            rtol = 2**-9 if case.name in HALF_PRODUCTS else case.rtol
            if expected.dtype.name == "bfloat16":  # as the standard's own runner: the last place is 2^-7
                result, expected, rtol = result.astype(np.float32), expected.astype(np.float32), 2**-6
            np.testing.assert_allclose(result, expected, rtol=rtol, atol=case.atol)
    except AssertionError as error:
        return f"{case.name}: {' '.join(str(error).split())[:300]}"
    return ""


def run_all(cases: Iterable[Lifted], machine: str) -> tuple[list[str], list[Lifted]]:
    """What fails, and the cases that pass, of those that are not on the table."""
    batch = ProgramBatch(machine_named(machine))
    lowered = [(item, _lowered(batch, item)) for item in cases]
    batch.build()
    failed, passed = [], []
    for item, program in lowered:
        if isinstance(program, str):
            failed += [program] * (item.case.name not in NOT_COMPILED)
            continue
        problem = problem_with(item.case, batch.run(program, item.inputs))
        if problem:
            failed.append(problem)
        else:
            passed.append(item)
    return failed, passed


def _lowered(batch: ProgramBatch, item: Lifted) -> Program | str:
    try:
        return batch.add(item.graph)
    except LlmcError as error:
        return f"{item.case.name}: {error}"


@functools.cache
def outcomes() -> tuple[list[str], list[Lifted]]:
    return run_all(translated(), "native")


def test_every_case_passes() -> None:
    failed, _ = outcomes()
    assert not failed, "\n".join([f"{len(failed)} cases fail", *failed])


def test_no_case_of_the_table_would_pass() -> None:
    assert not set(NOT_COMPILED) & {item.case.name for item in outcomes()[1]}
    assert set(NOT_COMPILED) <= {item.case.name for item in translated()}


def test_most_of_the_standard_is_covered() -> None:
    _, passed = outcomes()
    assert len(passed) >= 1350
    assert len(frozenset[str]().union(*(item.case.ops for item in passed))) >= 155


def sample(per_operator: int) -> list[Lifted]:
    """The first cases of every operator that no case before has, in order of their names."""
    seen: dict[str, int] = {}
    chosen = []
    for item in translated():
        if item.case.name in NOT_COMPILED or all(seen.get(op, 0) >= per_operator for op in item.case.ops):
            continue
        chosen.append(item)
        for op in item.case.ops:
            seen[op] = seen.get(op, 0) + 1
    return chosen


def test_an_older_machine_agrees() -> None:
    cases = sample(1)
    assert len(cases) >= 100
    failed, _ = run_all(cases, "x86-64-v3")
    assert not failed, "\n".join(failed)


def test_the_driver_runs_a_graph_of_every_operator() -> None:
    """One graph of many cases: the plan of the arena, the generated C, and the pool."""
    cases = sample(1)
    inputs: list[Input] = []
    outputs: list[tuple[str, Value]] = []
    data: dict[str, np.ndarray] = {}
    for item in cases:
        renamed = {value: Input(f"{item.case.name}/{value.name}", value.type) for value in item.graph.inputs}
        own = Graph("case", tuple(renamed.values()), substitute_values(item.graph, dict(renamed)).outputs)
        inputs += own.inputs
        outputs += [(f"{item.case.name}/{name}", value) for name, value in own.outputs]
        data.update({f"{item.case.name}/{name}": array for name, array in item.inputs.items()})
    compiled = CompiledGraph(Graph("cases", tuple(inputs), tuple(outputs)), machine_named("native"), {}, task="run")
    results = compiled.run_arrays(data)
    failed = []
    for item in cases:
        found = {name: results[f"{item.case.name}/{name}"] for name, _ in item.graph.outputs}
        failed.append(problem_with(item.case, found))
    assert not any(failed), "\n".join(problem for problem in failed if problem)


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(item for item in translated() if item.case.name == "test_add")
    assert run_all([case], "native") == ([], [case])
    monkeypatch.setitem(FORMS, "t.add", FORMS["t.sub"])
    failed, passed = run_all([case], "native")
    assert failed and not passed
