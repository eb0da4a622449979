"""Functions of the ONNX standard, expanded to the small operators that define them, are one op again after the passes.

The cases are the standard's own node tests whose models are such expansions. Each is translated, recognised, and
evaluated: the op is there, what it was made of is gone from what the first output needs, and all outputs are right.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
from onnx_node_cases import NodeCase, lifted_case, node_cases

from llmc.compiler import passes as _registered  # noqa: F401
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.passes.manager import Report, parse_pipeline, run_passes
from llmc.compiler.pipeline import RECOGNISE

# The function -> the op, and the ops that it is made of, which must not be left.
FUNCTIONS: dict[str, tuple[str, frozenset[str]]] = {
    "attention": ("llm.attention", frozenset({"t.softmax", "t.exp", "t.matmul", "t.max"})),
    "rotary_embedding": ("llm.rope", frozenset({"t.mul", "t.sub", "t.add", "t.slice"})),
    "rms_normalization": ("llm.rms_norm", frozenset({"t.mean", "t.sqrt", "t.rsqrt", "t.mul"})),
    "layer_normalization": ("llm.layer_norm", frozenset({"t.mean", "t.sqrt", "t.rsqrt", "t.mul", "t.sub"})),
}
COUNTS = {"attention": 93, "rotary_embedding": 8, "rms_normalization": 19, "layer_normalization": 38}

# Cases that are left as they are, and what the pass says about them: their fourth output is the softmax itself.
LEFT = dict.fromkeys(
    (
        "test_attention_3d_with_past_and_present_qk_matmul_softmax_expanded",
        "test_attention_4d_with_qk_matmul_softmax_expanded",
        "test_attention_23_fullymasked_qk_matmul_output_mode3_zero_expanded",
        "test_attention_24_fullymasked_qk_matmul_output_mode3_zero_expanded",
        "test_attention_24_qk_matmul_output_mode3_softmax_precision_expanded",
        "test_attention_local_window_gqa_rank4_mask_expanded",
    ),
    "its probabilities are an output of the graph",
)


def cases_of(function: str) -> list[NodeCase]:
    return [c for c in node_cases() if c.name.startswith(f"test_{function}_") and "_expanded" in c.name]


@functools.cache
def recognised(function: str) -> list[tuple[NodeCase, Graph, list[Report]]]:
    """Every case of a function after the recognising passes, and what these did."""
    passes = parse_pipeline(RECOGNISE)
    return [(case, *run_passes(lifted_case(case), passes)) for case in cases_of(function)]


def needed(graph: Graph) -> set[str]:
    """The names of the ops that the first output needs."""
    return {op.name for op in graph.replace_outputs(graph.outputs[:1]).ops}


def differences(case: NodeCase, graph: Graph) -> Iterator[str]:
    """How the outputs of a graph are other than the case expects."""
    found = evaluate(graph, {v.name: np.asarray(case.inputs[v.name]) for v in graph.inputs}, _no_params)
    for name, wanted in case.outputs.items():
        result, expected = np.asarray(found[name]), np.asarray(wanted)
        if (result.shape, result.dtype) != (expected.shape, expected.dtype):
            yield f"{name}: {result.dtype}{list(result.shape)}, not {expected.dtype}{list(expected.shape)}"
            continue
        # One op rounds once, its expansion at every step: of halves two units in the last place.
        steps = {"float16": 2**-9, "bfloat16": 2**-6}.get(expected.dtype.name, 0.0)
        result, expected = result.astype(np.float64), expected.astype(np.float64)
        if not np.allclose(result, expected, rtol=max(case.rtol, steps), atol=case.atol):
            yield f"{name}: {result.reshape(-1)[:4]} ..., not {expected.reshape(-1)[:4]} ..."


def _no_params(name: str) -> np.ndarray:
    raise AssertionError(name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_case_is_there(function: str) -> None:
    assert len(cases_of(function)) == COUNTS[function]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_expansion_is_one_op_again(function: str) -> None:
    op, parts = FUNCTIONS[function]
    wrong = []
    for case, graph, reports in recognised(function):
        names = needed(graph)
        if (op in names and not names & parts) == (case.name in LEFT):
            why = [reason for report in reports for _, reason in report.refusals]
            wrong.append(f"{case}: {sorted(names)} {why}")
    assert not wrong, "\n".join([f"{len(wrong)} cases", *wrong])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_one_op_gives_what_the_case_expects(function: str) -> None:
    wrong = [f"{case}: {text}" for case, graph, _ in recognised(function) for text in differences(case, graph)]
    assert not wrong, "\n".join([f"{len(wrong)} outputs", *wrong])


def test_what_is_left_as_it_is_is_explained() -> None:
    said = {
        case.name: [reason for report in reports for _, reason in report.refusals]
        for case, _, reports in recognised("attention")
    }
    assert {name: reasons for name, reasons in said.items() if reasons} == {n: [why] for n, why in LEFT.items()}


def test_attention_with_its_scores_as_outputs_computes_them_beside_it() -> None:
    """The first three modes of the fourth output: scores, capped scores, scores with the mask."""
    beside = [graph for case, graph, _ in recognised("attention") if "qk_matmul" in case.name and case.name not in LEFT]
    assert len(beside) == 12
    for graph in beside:
        kinds = [op.name for op in graph.ops]
        assert kinds.count("llm.attention") == 1 and kinds.count("t.matmul") == 1 and "t.softmax" not in kinds
