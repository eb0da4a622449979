"""The node tests of the ONNX standard, on the evaluator: every case passes, or the table below says why it cannot.

Each case runs in its own dtypes and is held to its own tolerances; nothing that evaluates may warn.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
from onnx_node_cases import NodeCase, lifted_case, node_cases

from llmc.compiler import passes as _passes  # noqa: F401  (registers all passes)
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.text import print_graph
from llmc.compiler.passes.manager import parse_pipeline, run_passes
from llmc.errors import LlmcError
from llmc.frontends.onnx.supported import supported_ops

# Why cases are left out -> patterns of their names. Every pattern names a case, and no case that would pass.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "floats of 8 and 4 bits are no dtypes of the IR": (
        "*FLOAT8*",
        "*FLOAT4E2M1*",
        "test_*quantizelinear_e4m3fn*",
        "test_*quantizelinear_e5m2",
        "test_*quantizelinear_float4e2m1",
    ),
    "integers of 4 and 2 bits are dtypes of stored weights only, not of a graph's inputs and outputs": (
        "*INT4*",
        "*INT2*",
        "test_*quantizelinear_*int4",
        "test_*quantizelinear_*int2",
    ),
    "text is no tensor": (
        "test_ai_onnx_ml_label_encoder_*",
        "test_equal_string*",
        "test_regex_full_match_*",
        "test_string_*",
        "test_strnormalizer_*",
    ),
    "sequences and optional values are no tensors": (
        "test_if_opt",
        "test_if_seq",
        "test_loop13_seq",
        "test_loop16_seq_none",
        "test_optional_*",
        "test_sequence_*",
        "test_split_to_sequence_*",
        "test_identity_opt",
        "test_identity_sequence",
    ),
    "the result's shape depends on values": ("test_nonmaxsuppression_*", "test_unique_*"),
    "the result is random": (
        "test_bernoulli*",
        "test_training_dropout",
        "test_training_dropout_default",
        "test_training_dropout_default_mask",
        "test_training_dropout_mask",
    ),
    "it trains a model": ("test_adagrad*", "test_adam*", "test_momentum*", "test_nesterov_momentum"),
    "it is no part of a network": (
        "test_ai_onnx_ml_binarizer",
        "test_ai_onnx_ml_tree_ensemble_*",
        "test_image_decoder_*",
        "test_tfidfvectorizer_*",
    ),
    "signal processing and geometry have no translations": (
        "test_det_*",
        "test_dft*",
        "test_stft*",
        "test_melweightmatrix",
        "test_gridsample*",
        "test_roialign_*",
        "test_*deform_conv_*",
    ),
    "it counts a fraction of an element, where the standard's text, onnxruntime and torch count whole ones": (
        "test_resize_downsample_scales_cubic_align_corners",
        "test_resize_downsample_scales_linear_align_corners",
    ),
    "Scan before opset 9 scanned each batch by itself": ("test_scan_sum",),
}

# f16 results of a product: the reference rounds each partial sum, the evaluator once. One unit in the last place.
HALF_PRODUCTS = ("test_attention_4d_causal_fp16_expanded",)


def check(case: NodeCase, change: Callable[[Graph], Graph] = lambda graph: graph, rtol: float = 0.0) -> None:
    """Lift the case and evaluate it; AssertionError where a result differs, LlmcError where it has no translation.

    change: what is done to the graph before. rtol: a tolerance larger than the case's own.
    """
    graph = change(lifted_case(case))
    found = evaluate(graph, {value.name: np.asarray(case.inputs[value.name]) for value in graph.inputs}, _no_params)
    assert list(found) == list(case.outputs)
    for name, wanted in case.outputs.items():
        result, expected = np.asarray(found[name]), np.asarray(wanted)
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        tolerance = max(rtol, case.rtol)
        if expected.dtype.name == "bfloat16":
            # As onnx.backend.test.runner does: numpy cannot compare these, and their last place is 2^-7.
            result, expected, tolerance = result.astype(np.float32), expected.astype(np.float32), 2**-6
        elif case.name in HALF_PRODUCTS:
            tolerance = 2**-9
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=max(case.atol, rtol * 1e-3))


def _no_params(name: str) -> np.ndarray:
    raise AssertionError(name)


def reason_for(name: str) -> str | None:
    """Why a case is left out."""
    found = [why for why, patterns in LEFT_OUT.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    assert len(found) <= 1, f"{name} is left out for more than one reason: {found}"
    return found[0] if found else None


@functools.cache
def outcomes() -> dict[str, str]:
    """What is wrong with each case, by name; "" for one that passes."""
    found = {}
    for case in node_cases():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                check(case)
            found[case.name] = ""
        except (LlmcError, AssertionError, ValueError, TypeError, Warning) as error:  # noqa: PERF203
            found[case.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


def test_every_case_passes_unless_the_table_says_why_not() -> None:
    failed = [f"{name}: {why}" for name, why in outcomes().items() if why and reason_for(name) is None]
    assert not failed, "\n".join([f"{len(failed)} cases fail", *failed])


def test_no_case_of_the_table_would_pass() -> None:
    passing = [name for name, why in outcomes().items() if not why and reason_for(name) is not None]
    assert not passing, f"take these off the table: {passing}"


def test_every_pattern_of_the_table_names_a_case() -> None:
    unused = [p for patterns in LEFT_OUT.values() for p in patterns if not fnmatch.filter(outcomes(), p)]
    assert not unused


@pytest.mark.slow
def test_passes_change_no_case() -> None:
    """Canonical forms and recognition keep every case's result; a product of floats may round elsewhere."""
    passes = parse_pipeline("canonicalize,fold,cse,fuse-activation,fuse-norm,canonicalize,fold,cse")
    failed = []
    for case in node_cases():
        if outcomes()[case.name]:
            continue
        try:
            check(case, lambda graph: run_passes(graph, passes, [])[0], 2e-3)
        except (LlmcError, AssertionError) as error:
            failed.append(f"{case.name}: {' '.join(str(error).split())[:300]}")
    assert not failed, "\n".join(failed)


def leaving_out() -> Mapping[tuple[str, str], NodeCase]:
    """The smallest case of one node that leaves out an attribute which has a default; by op and attribute."""
    found: dict[tuple[str, str], list[NodeCase]] = {}
    for case in node_cases():
        if len(case.model.graph.node) == 1 and reason_for(case.name) is None:
            node = case.model.graph.node[0]
            present = {attribute.name for attribute in node.attribute}
            for name, attribute in schema_of(case).attributes.items():
                if name not in present and attribute.default_value.type:
                    found.setdefault((node.op_type, name), []).append(case)
    return {key: min(cases, key=elements) for key, cases in found.items()}


def elements(case: NodeCase) -> int:
    return sum(np.asarray(array).size for array in case.inputs.values())


def schema_of(case: NodeCase) -> onnx.defs.OpSchema:
    node = case.model.graph.node[0]
    version = next(entry.version for entry in case.model.opset_import if entry.domain == node.domain)
    return onnx.defs.get_schema(node.op_type, version, node.domain)


def printed(case: NodeCase) -> str:
    """The case's graph, its numbers to six digits: a file holds attributes as floats of 32 bits."""
    text = print_graph(lifted_case(case))
    return re.sub(r"\d+\.\d+(e[-+]?\d+)?|\d+e[-+]?\d+", lambda match: f"{float(match[0]):.6g}", text)


def test_an_attribute_left_out_is_the_standards_default() -> None:
    wrong = []
    for (op, name), case in leaving_out().items():
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.graph.node[0].attribute.append(schema_of(case).attributes[name].default_value)
        if printed(case) != printed(dataclasses.replace(case, model=model)):
            wrong.append(f"{op}: {name}, as in {case.name}")
    assert not wrong


def test_most_of_the_standard_is_covered() -> None:
    passed = [case for case in node_cases() if not outcomes()[case.name]]
    count, ops = len(passed), len(frozenset[str]().union(*(case.ops for case in passed)))
    assert count >= 1564
    assert ops >= 170


def test_ops_that_pass_are_listed_as_supported() -> None:
    used = frozenset[str]().union(*(case.ops for case in node_cases() if not outcomes()[case.name]))
    assert used <= set(supported_ops())


def test_a_wrong_translation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.compiler.ir import elementwise
    from llmc.frontends.onnx.translation import HANDLERS

    case = next(case for case in node_cases() if case.name == "test_add")
    check(case)
    monkeypatch.setitem(HANDLERS, ("", "Add"), [(1, lambda t, node, a, b: elementwise.Sub(a.value, b.value))])
    with pytest.raises(AssertionError):
        check(case)
