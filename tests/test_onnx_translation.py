"""Bodies of nodes: which handler a node gets, what functions and branches read, and what is missing or too much."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper
from onnx_files import model_of, value, write
from onnx_graphs import Nodes

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Value
from llmc.errors import FrontendError
from llmc.frontends.onnx import lift
from llmc.frontends.onnx.ordering import require_bounded
from llmc.frontends.onnx.translation import HANDLERS, Body, Node, Translation, handler_of, handles

node = helper.make_node
X = np.float32([-3, 0, 2])
BOOL = TensorProto.BOOL


def lifted(
    nodes: Sequence[NodeProto],
    tmp_path: Path,
    outputs: Sequence[str] = ("y",),
    functions: Sequence[onnx.FunctionProto] = (),
) -> Graph:
    """A graph from x f32 [3] and c bool [] to outputs f32 [3]. Functions are of the domain `own`."""
    inputs = [value("x", [3]), value("c", [], BOOL)]
    model = model_of(nodes, inputs, [value(name, [3]) for name in outputs], functions=functions, domains=["own"])
    return lift(write(model, tmp_path / "model.onnx")).graph


def computed(graph: Graph, c: bool = True) -> list[np.ndarray]:
    found = evaluate(graph, {"x": X, "c": np.array(c)}, lambda name: np.zeros(0))
    return [np.asarray(found[name]) for name, _ in graph.outputs]


def branch(nodes: Sequence[NodeProto], output: str) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [value(output, [3])])


def own(name: str, inputs: Sequence[str], nodes: Sequence[NodeProto], domain: str = "own") -> onnx.FunctionProto:
    """A function with the output b."""
    return helper.make_function(domain, name, list(inputs), ["b"], list(nodes), [helper.make_opsetid("", 21)])


# Handlers


def test_a_node_gets_the_newest_handler_that_its_version_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("First", "Second"):  # no others know of these, and they go after the test
        monkeypatch.setitem(HANDLERS, ("own", op), [])

    def handler(t: Translation, node: Node) -> Value:
        raise AssertionError

    since = {version: lambda t, node, version=version: version for version in (1, 7, 3)}
    for version, function in since.items():
        handles("First", "Second", domain="own", since=version)(function)
    with pytest.raises(ValueError, match=r"two functions handle own\.Second since 3"):
        handles("Second", domain="own", since=3)(handler)
    for op in ("First", "Second"):
        for version, expected in ((1, 1), (2, 1), (3, 3), (6, 3), (7, 7), (99, 7)):
            assert handler_of(Node(op, "own", version, "n", (), ())) is since[expected]
    assert handler_of(Node("Third", "own", 1, "n", (), ())) is None
    assert handler_of(Node("First", "", 1, "n", (), ())) is None


def test_ops_without_a_handler_are_listed(tmp_path: Path) -> None:
    """Up to three nodes of each, and that there are more."""
    names = {"Few": ["a" * 200, "b", "c"], "Many": ["d", "e", "f", "g"], "Unused": ["h"]}
    nodes = [node(op, ["x"], [f"{n[:1]}_out"], name=n, domain="own") for op, of in names.items() for n in of]
    with pytest.raises(FrontendError) as raised:
        lifted(nodes, tmp_path, [f"{n[0]}_out" for op in ("Few", "Many") for n in names[op]])
    listed = f"own.Few (3x: {'a' * 160}, b, c); own.Many (4x: d, e, f, ...)"
    assert str(raised.value) == f"the model uses operations that are not supported: {listed}"


def test_an_op_with_a_handler_is_taken_as_such_though_the_file_defines_it(tmp_path: Path) -> None:
    """ONNX leaves the choice to those who read a file. Passes know the op, not what it was made of."""
    function = own("QuickGelu", ["a"], [node("Neg", ["a"], ["b"])], domain="com.microsoft")
    graph = lifted([node("QuickGelu", ["x"], ["y"], domain="com.microsoft")], tmp_path, functions=[function])
    (found,) = computed(graph)
    np.testing.assert_allclose(found, X / (1 + np.exp(-1.702 * X)), rtol=1e-6)


# Inputs and outputs


def test_an_output_that_an_op_does_not_have_is_not_taken_to_be_left_out(tmp_path: Path) -> None:
    """Else Clip would have no lower bound."""
    nodes = Nodes({"x": ("float32", (3,))})
    _, second = nodes.many("Relu", "x", outputs=2)
    with pytest.raises(FrontendError, match=r"Clip \(node_1\) reads 'relu_0_1', which is not computed"):
        nodes.graph(nodes.add("Clip", "x", second))
    with pytest.raises(FrontendError, match="nothing computes the output 'relu_0_1'"):
        nodes.graph(second)


def test_outputs_without_a_name_are_left_away(tmp_path: Path) -> None:
    nodes = [node("Split", ["x"], ["", "", "part"], num_outputs=3), node("Clip", ["x", "", "part"], ["y"])]
    np.testing.assert_array_equal(computed(lifted(nodes, tmp_path)), [np.minimum(X, 2)])


def test_the_last_inputs_of_a_function_may_be_left_away(tmp_path: Path) -> None:
    """In branches inside it too."""
    clip = node("Clip", ["a", "low", "high"], ["b"])
    chosen = node("If", ["when"], ["b"], then_branch=branch([node("Clip", ["a", "low", "high"], ["z"])], "z"),
                  else_branch=branch([node("Neg", ["a"], ["z"])], "z"))  # fmt: skip
    functions = [own("Clipped", ["a", "low", "high"], [clip]), own("Chosen", ["when", "a", "low", "high"], [chosen])]
    zero = node("Constant", [], ["zero"], value=onnx.numpy_helper.from_array(np.float32(0)))
    calls = [
        node("Clipped", ["x"], ["none"], domain="own"),
        node("Clipped", ["x", "zero"], ["low"], domain="own"),
        node("Clipped", ["x", "", "zero"], ["high"], domain="own"),
        node("Chosen", ["c", "x", "zero"], ["if"], domain="own"),
    ]
    graph = lifted([zero, *calls], tmp_path, ["none", "low", "high", "if"], functions)
    for c, last in ((True, np.maximum(X, 0)), (False, -X)):
        found = computed(graph, c)
        np.testing.assert_array_equal(found, [X, np.maximum(X, 0), np.minimum(X, 0), last])


def test_a_function_takes_no_more_inputs_than_it_has(tmp_path: Path) -> None:
    functions = [own("Negative", ["a"], [node("Neg", ["a"], ["b"])])]
    with pytest.raises(FrontendError, match=r"own\.Negative \(n\) has 2 inputs, but its function takes 1"):
        lifted([node("Negative", ["x", "x"], ["y"], name="n", domain="own")], tmp_path, functions=functions)


# Names


def test_a_name_inside_a_branch_is_not_the_same_name_around_it(tmp_path: Path) -> None:
    """ONNX has each name once; should a file have one twice, the nearest is meant."""
    inner = branch([node("Neg", ["x"], ["h"])], "h")
    nodes = [
        node("Abs", ["x"], ["h"]), node("If", ["c"], ["z"], then_branch=inner, else_branch=inner),
        node("Add", ["z", "h"], ["y"]),
    ]  # fmt: skip
    np.testing.assert_array_equal(computed(lifted(nodes, tmp_path)), [np.abs(X) - X])


def test_what_a_branch_reads_is_computed_before_it(tmp_path: Path) -> None:
    inner = branch([node("Neg", ["later"], ["z"])], "z")
    nodes = [node("If", ["c"], ["y"], then_branch=inner, else_branch=inner), node("Abs", ["x"], ["later"])]
    np.testing.assert_array_equal(computed(lifted(nodes, tmp_path)), [-np.abs(X)])


def test_a_node_that_reads_what_it_computes_is_a_cycle(tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match=r"cycle: Add \(n\) waits for itself"):
        lifted([node("Add", ["x", "y"], ["y"], name="n")], tmp_path)


def test_a_node_that_many_need_is_translated_once(tmp_path: Path) -> None:
    """Sixty sums of a value with itself: followed anew from each user, they would take years."""
    nodes = [node("Add", [f"t{i}", f"t{i}"], [f"t{i + 1}"]) for i in range(60)]
    started = time.process_time()
    graph = lifted([node("Identity", ["x"], ["t0"]), *nodes], tmp_path, ["t60"])
    assert time.process_time() - started < 10  # about 0.05
    np.testing.assert_array_equal(computed(graph), [X * np.float32(2**60)])


# How much


def body(*ops: str, inner: Body | None = None) -> Body:
    nodes = [Node(op, "own", 1, op, (), ()) for op in ops]
    nodes += [] if inner is None else [Node("If", "", 1, "if", (), (), {"then_branch": inner})]
    return Body((), (), tuple(nodes))


def test_nodes_are_counted_with_all_calls_and_branches() -> None:
    functions = {("own", "F"): body("A", "B", inner=body("C")), ("own", "G"): body("F", "F")}
    main = body("G", "D", inner=body("F", "E"))
    # F has A, B, If and C; G two calls of F; the main body G, D, If, F and E.
    count = 5 + (2 + 2 * 4) + 4
    require_bounded(main, functions, count)
    with pytest.raises(FrontendError, match=f"more than {count - 1} nodes when its functions are written out"):
        require_bounded(main, functions, count - 1)


def test_functions_call_each_other_64_deep_at_most() -> None:
    functions = {("own", f"F{i}"): body(f"F{i + 1}") for i in range(64)}
    require_bounded(body("F0"), functions, 1000)
    with pytest.raises(FrontendError, match="more than 64 deep"):
        require_bounded(body("F0"), {**functions, ("own", "F64"): body("F65")}, 1000)
