"""Norms, embeddings and activations of ONNX Runtime's own: each translation gives what ONNX Runtime gives."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_contrib_tools import MICROSOFT, Case, Fixed, Model, compare, normal
from test_onnx_contrib import S_AND_BATCH, S, choice, refused

from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Param


@pytest.mark.parametrize("size", [1, 33, 129])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip_shape", [(3, 7), (1, 7), (7,)])
def test_skip_norms(size: int, bias: bool, skip_shape: tuple[int, ...]) -> None:
    x, skip, gamma = normal(3, 7, size), normal(*skip_shape, size, seed=1), Fixed(normal(size, seed=2))
    extra = [Fixed(normal(size, seed=4))] if bias else []
    # In a row of one element its difference from the mean is rounding, which a small eps would blow up.
    layer = Case("SkipLayerNormalization", [x, skip, gamma, Fixed(normal(size, seed=3)), *extra], {"epsilon": 1e-2}, 4)
    simple = Case("SkipSimplifiedLayerNormalization", [x, skip, gamma, *extra], {"epsilon": 1e-5}, 4)
    for case in (layer, simple):
        case.symbols = Case("", [], symbols=S_AND_BATCH).symbols if size not in S_AND_BATCH else {}
        compare(case, outputs=[0, 3])


def test_skip_norms_without_beta_and_with_the_epsilon_of_the_standard() -> None:
    x, skip, gamma = normal(1, 7, 33), normal(1, 7, 33, seed=1), Fixed(normal(33, seed=2))
    compare(Case("SkipLayerNormalization", [x, skip, gamma, None, Fixed(normal(33))], {}, 1, symbols=S))
    compare(Case("SkipSimplifiedLayerNormalization", [x, skip, gamma], {}, 1, symbols=S))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_statistics_of_skip_norms_are_those_of_the_sum(dtype: type) -> None:
    """ONNX Runtime's CPU kernels leave these outputs empty, so numpy says what they are: in f32, of halves too."""
    x, skip, gamma = normal(2, 7, 33, dtype=dtype), normal(2, 7, 33, seed=1, dtype=dtype), Fixed(np.ones(33, dtype))
    total = (x + skip).astype(np.float64)
    _, mean, inverse, _ = Case("SkipLayerNormalization", [x, skip, gamma], {"epsilon": 1e-3}, 4).translated()
    assert mean.dtype == inverse.dtype == np.float32
    np.testing.assert_allclose(mean, total.mean(-1, keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inverse, 1 / np.sqrt(total.var(-1, keepdims=True) + 1e-3), rtol=1e-5)
    case = Case("SkipSimplifiedLayerNormalization", [x, skip, gamma], {"epsilon": 1e-3}, 4)
    np.testing.assert_allclose(case.translated()[2], 1 / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-3), rtol=1e-5)


@pytest.mark.parametrize("axis", [-1, 2])
def test_simplified_layer_norm_is_rms_norm(axis: int) -> None:
    case = Case(
        "SimplifiedLayerNormalization",
        [normal(3, 7, 31), Fixed(normal(31))],
        {"epsilon": 1e-5, "axis": axis, "stash_type": 1},
        2,
        domain="",
        symbols=S_AND_BATCH,
    )
    compare(case)


@pytest.mark.parametrize("attributes", [{}, {"axis": 1}])
@pytest.mark.parametrize("scale", [(31,), (1, 31)])
def test_simplified_layer_norm_of_rows_alone(attributes: dict[str, int], scale: tuple[int, ...]) -> None:
    compare(Case("SimplifiedLayerNormalization", [normal(7, 31), Fixed(normal(*scale))], attributes, 2, "", symbols=S))


@pytest.mark.parametrize("product", ["x", "skip"])
@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_the_bias_of_a_skip_norm_belongs_to_the_product(op: str, product: str) -> None:
    """Optimisers take it from there; put back, both are one linear op."""
    node, other, w = normal(1, 7, 9), normal(1, 7, 33, seed=1), normal(9, 33, seed=2)
    norms = [helper.make_node("MatMul", ["a", "w"], ["m"])]
    sides = ["m", "b"] if product == "x" else ["b", "m"]
    beta = [""] if op == "SkipLayerNormalization" else []
    norms.append(helper.make_node(op, [*sides, "gamma", *beta, "bias"], ["y"], domain=MICROSOFT))
    values = [helper.make_tensor_value_info(n, 1, x.shape) for n, x in (("a", node), ("b", other))]
    stored = [("w", w), ("gamma", normal(33)), ("bias", normal(33, seed=3))]
    weights = [onnx.numpy_helper.from_array(x, n) for n, x in stored]
    graph = helper.make_graph(norms, "g", values, [helper.make_tensor_value_info("y", 1, [1, 7, 33])], weights)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = Model(helper.make_model(graph, opset_imports=imports, ir_version=10))
    passed, _ = model.passed("canonicalize,fuse-linear")
    (linear,) = (op for op in passed.ops if isinstance(op, Linear))
    assert isinstance(linear.bias, Param) and linear.bias.name == "bias"
    given = {"a": node, "b": other}
    expected, found = model.onnxruntime(given)["y"], model.evaluated(passed, given)["y"]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("op", ["Gelu", "FastGelu", "QuickGelu"])
def test_activations(op: str) -> None:
    compare(Case(op, [3 * normal(3, 7, 33)], symbols=S_AND_BATCH), tolerance=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5, 1.702])
def test_quick_gelu_has_an_alpha(alpha: float) -> None:
    compare(Case("QuickGelu", [3 * normal(3, 7, 33)], {"alpha": alpha}), tolerance=1e-6)


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu"])
def test_activations_of_a_sum_with_a_bias(op: str) -> None:
    compare(Case(op, [normal(3, 7, 33), Fixed(normal(33))], symbols=S_AND_BATCH), tolerance=1e-6)


def test_bias_split_gelu_gates_its_left_half_with_its_right() -> None:
    """ONNX Runtime has no CPU kernel of it."""
    from math import erf, sqrt

    x, bias = normal(3, 7, 34), normal(34, seed=1)
    left, right = np.split((x + bias).astype(np.float64), 2, axis=-1)
    expected = left * right / 2 * (1 + np.vectorize(erf)(right / sqrt(2)))
    [found] = Case("BiasSplitGelu", [x, Fixed(bias)], symbols=S_AND_BATCH).translated()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_embed_layer_norm(segments: bool, mask: bool, positions: bool) -> None:
    lengths = np.array([7, 4, 1])
    inputs = [
        choice(3, 7, high=50).astype(np.int32),
        choice(3, 7, high=2, seed=1).astype(np.int32) if segments else None,
        Fixed(normal(50, 33)),
        Fixed(normal(20, 33, seed=1)),
        Fixed(normal(2, 33, seed=2)) if segments else None,
        Fixed(normal(33, seed=3)),
        Fixed(normal(33, seed=4)),
        (np.arange(7)[None] < lengths[:, None]).astype(np.int32) if mask else None,
        choice(3, 7, high=20, seed=2).astype(np.int32) if positions else None,
    ]
    compare(
        Case("EmbedLayerNormalization", inputs, {"epsilon": 1e-6, "mask_index_type": int(mask)}, 3, symbols=S_AND_BATCH)
    )


@pytest.mark.parametrize("attributes", [{}, {"mask_index_type": 1}])
def test_ones_of_a_mask_are_counted(attributes: dict[str, int]) -> None:
    """Whatever else stands in it."""
    tables = [Fixed(normal(50, 33)), Fixed(normal(20, 33)), None, Fixed(normal(33)), Fixed(normal(33))]
    ids = choice(3, 7, high=50).astype(np.int32)
    for mask in (choice(3, 7, high=3).astype(np.int32), None):
        inputs = [ids, None, *tables, *([] if mask is None else [mask])]
        compare(Case("EmbedLayerNormalization", inputs, attributes, 2, symbols=S_AND_BATCH))


def test_embed_layer_norm_refuses_other_kinds_of_masks() -> None:
    tables = [Fixed(normal(50, 33)), Fixed(normal(20, 33)), None, Fixed(normal(33)), Fixed(normal(33))]
    ids = choice(3, 7, high=50).astype(np.int32)
    case = Case("EmbedLayerNormalization", [ids, None, *tables, np.ones((3, 7), np.int32)], {"mask_index_type": 2}, 2)
    refused(case, "mask_index_type=2 is not supported")


# What is left out


def test_epsilons_that_are_left_out() -> None:
    """Numbers so small that the epsilon decides."""
    x, skip, gamma = 1e-3 * normal(1, 7, 33), 1e-3 * normal(1, 7, 33, seed=1), Fixed(normal(33, seed=2))
    compare(Case("SimplifiedLayerNormalization", [x, gamma], {"axis": -1, "stash_type": 1}, 2, domain=""))
    tiny, other = x * np.float32(1e-3), skip * np.float32(1e-3)
    compare(Case("SkipLayerNormalization", [tiny, other, gamma, gamma], {}, 1))
    compare(Case("SkipSimplifiedLayerNormalization", [tiny, other, gamma], {}, 1))
    tables = [Fixed(1e-6 * normal(50, 33)), Fixed(1e-6 * normal(20, 33, seed=1))]
    ids = choice(1, 7, high=50).astype(np.int32)
    compare(Case("EmbedLayerNormalization", [ids, None, *tables, None, gamma, gamma], {}, 2), outputs=[0])


def test_embeddings_without_a_mask_have_no_ends() -> None:
    tables = [Fixed(normal(50, 33)), Fixed(normal(20, 33)), None, Fixed(normal(33)), Fixed(normal(33))]
    ids = choice(3, 7, high=50).astype(np.int32)
    compare(Case("EmbedLayerNormalization", [ids, None, *tables], {}, 3, symbols=S_AND_BATCH))
