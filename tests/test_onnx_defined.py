"""Ops of ONNX that the standard defines by others, FlexAttention and RotaryEmbedding: what node tests leave out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import helper
from onnx_graphs import Draws, Nodes, compare, evaluated

from llmc.compiler.ir.graph import Graph
from llmc.errors import FrontendError
from llmc.frontends.onnx.ops_defined import body_of
from llmc.frontends.onnx.translation import Item, Translation

RNG = np.random.default_rng(23)
floats = Draws(RNG).floats


@pytest.mark.parametrize("op", ["HannWindow", "HammingWindow", "BlackmanWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
def test_a_definition_holds_in_later_versions(op: str, periodic: int) -> None:
    for opset in (17, 21):
        nodes = Nodes({}, opset)
        compare(nodes, [nodes.add(op, np.int64(9), periodic=periodic)], {})


def test_an_op_is_not_defined_before_the_standard_had_it() -> None:
    nodes = Nodes({}, 16)
    with pytest.raises(FrontendError, match=r"operations that are not supported: HannWindow \(1x: node_0\)"):
        nodes.graph(nodes.add("HannWindow", np.int64(9)))


def test_what_has_no_definition_is_named() -> None:
    nodes = Nodes({"q": ("float32", (4,))}, 27)
    with pytest.raises(FrontendError, match=r"LinearAttention \(node_0\) cannot be translated: the standard has no"):
        nodes.graph(nodes.many("LinearAttention", "q", outputs=2)[0])


def flexed(dtype: str, shapes: dict[str, tuple[int | str, ...]], **attributes: object) -> Graph:
    """FlexAttention of q, k and v."""
    node = helper.make_node("FlexAttention", list("qkv"), ["y"], name="flex", domain="ai.onnx.preview", **attributes)
    graph = helper.make_graph([node], "g", [], [])
    graph.output.add(name="y")
    free = Nodes({name: (dtype, shape) for name, shape in shapes.items()})
    _, inputs = free.items(free.add("Identity", "q"))
    body = body_of(graph, {"": 21, "ai.onnx.preview": 1})
    (item,) = Translation().run(body, {value.name: Item(value) for value in inputs})
    return Graph("g", inputs, (("y", item.value),))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-14)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_share_keys_in_groups(dtype: str, tolerance: float, kv_heads: int) -> None:
    """f64 stays f64 within the softmax."""
    shapes = {"q": (2, 4, 3, 6), "k": (2, kv_heads, 5, 6), "v": (2, kv_heads, 5, 7)}
    given = {name: RNG.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    (found,) = evaluated(flexed(dtype, shapes), given)
    k, v = given["k"].repeat(4 // kv_heads, 1), given["v"].repeat(4 // kv_heads, 1)
    scores = given["q"].astype(np.float64) @ k.swapaxes(2, 3) / math.sqrt(6)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(found, shares / shares.sum(-1, keepdims=True) @ v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "sizes", [("H", 2, 6, 6), (4, "H", 6, 6), (4, 2, "D", "D"), ("H", "H", 6, 6), (4, "H", "D", "D")], ids=str
)
def test_numbers_and_sizes_of_heads_are_known(sizes: tuple[int | str, ...]) -> None:
    heads, kv_heads, dim, key_dim = sizes
    shapes = {"q": (2, heads, 3, dim), "k": (2, kv_heads, "K", key_dim), "v": (2, kv_heads, "K", 7)}
    with pytest.raises(FrontendError, match="the numbers and sizes of heads must be known when compiling"):
        flexed("float32", shapes)


def test_the_number_of_keys_may_be_any() -> None:
    assert flexed("float32", {"q": (2, 4, "Q", 6), "k": (2, 4, "K", 6), "v": (2, 4, "K", 7)}).outputs[0][1].rank == 4


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("positioned", [False, True])
@pytest.mark.parametrize("options", [{}, {"interleaved": 1}, {"rotary_embedding_dim": 4}], ids=str)
def test_rotations_of_each_layout(flat: bool, positioned: bool, options: dict[str, int]) -> None:
    x = floats(2, 3, 24) if flat else floats(2, 4, 3, 6)
    pairs = options.get("rotary_embedding_dim", 6) // 2
    angles = floats(9, pairs) if positioned else floats(2, 3, pairs)
    places = [RNG.integers(0, 9, (2, 3))] if positioned else []
    nodes = Nodes({"x": ("float32", x.shape)}, 23)
    heads = {"num_heads": 4} if flat else {}
    output = nodes.add("RotaryEmbedding", "x", np.cos(angles), np.sin(angles), *places, **heads, **options)
    compare(nodes, [output], {"x": x})


@pytest.mark.parametrize(
    ("shape", "tables", "places", "message"),
    [
        ((2, 3, 24), (2, 3, 3), None, "an input of three axes needs the attribute num_heads"),
        ((2, 4, 3, 6), (2, 5, 3), None, r"caches or positions of \[2, 5\] for tokens \[2, 3\]"),
        ((2, 4, 3, 6), (9, 3), (1, 3), r"caches or positions of \[1, 3\] for tokens \[2, 3\]"),
    ],
)
def test_rotations_that_do_not_fit(
    shape: tuple[int, ...], tables: tuple[int, ...], places: tuple[int, ...] | None, message: str
) -> None:
    nodes = Nodes({"x": ("float32", shape)}, 23)
    given = [] if places is None else [np.zeros(places, np.int64)]
    with pytest.raises(FrontendError, match=message):
        nodes.graph(nodes.add("RotaryEmbedding", "x", floats(*tables), floats(*tables), *given))
