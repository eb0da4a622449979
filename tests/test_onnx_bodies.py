"""ONNX files as bodies of nodes: constants, versions, functions and names; and how large everything may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import FLOAT, mlp, model_of, value, write

from llmc.compiler.ir.evaluate import evaluate
from llmc.errors import FrontendError
from llmc.frontends.onnx import lift, model
from llmc.frontends.onnx.model import NEWEST_OPSET, OLDEST_OPSET, Bodies, OnnxModel

X, Y = value("x", [2]), value("y", [2])
NEG = helper.make_node("Neg", ["x"], ["y"])


def bodies_of(made: onnx.ModelProto, tmp_path: Path) -> Bodies:
    return OnnxModel(write(made, tmp_path / "model.onnx")).bodies()


def result(made: onnx.ModelProto, tmp_path: Path) -> np.ndarray:
    """y for x = [1, 2]."""
    lifted = lift(write(made, tmp_path / "model.onnx"))
    return np.asarray(evaluate(lifted.graph, {"x": np.float32([1, 2])}, lifted.load)["y"])


def refused(made: onnx.ModelProto, tmp_path: Path, message: str) -> None:
    with pytest.raises(FrontendError, match=message) as raised:
        lift(write(made, tmp_path / "model.onnx"))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def function(name: str, *nodes: onnx.NodeProto, opset: int | None = 21, attributes: tuple[str, ...] = (),
             inputs: tuple[str, ...] = ("a",)) -> onnx.FunctionProto:  # fmt: skip
    """A function of domain "own" with the output b. opset: None for no imports."""
    imports = [helper.make_opsetid("", opset)] if opset is not None else []
    return helper.make_function("own", name, list(inputs), ["b"], list(nodes), imports, list(attributes))


# Constants


def constant(array: np.ndarray, output: str = "c") -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], value=numpy_helper.from_array(array))


def test_a_constant_is_what_an_initializer_is(tmp_path: Path) -> None:
    """A large one is a weight of its own name; one that nothing uses may have any dtype."""
    array = np.arange(200, dtype=np.float32).reshape(2, 100)
    nodes = [helper.make_node("MatMul", ["x", "c"], ["y"]), constant(array), constant(np.array(["text"]), "unused")]
    lifted = lift(write(model_of(nodes, [X], [value("y", [100])]), tmp_path / "model.onnx"))
    assert list(lifted.weights.names) == [param.name for param in lifted.graph.params] == ["c"]
    np.testing.assert_array_equal(lifted.load("c"), array)


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_a_constant_by_both_names_of_the_domain(domain: str, tmp_path: Path) -> None:
    node = constant(np.float32([10, 20]))
    node.domain = domain
    assert result(model_of([node, helper.make_node("Add", ["x", "c"], ["y"])], [X], [Y]), tmp_path).tolist() == [11, 22]


@pytest.mark.parametrize("given", [{"value_floats": [10.0, 20.0]}, {"value_float": 10.0}])
def test_constants_that_are_no_tensors(given: dict[str, object], tmp_path: Path) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], **given), helper.make_node("Add", ["x", "c"], ["y"])]
    expected = [11, 22] if "value_floats" in given else [11, 12]
    assert result(model_of(nodes, [X], [Y]), tmp_path).tolist() == expected


def test_what_is_no_constant(tmp_path: Path) -> None:
    add, good = helper.make_node("Add", ["x", "c"], ["y"]), constant(np.float32([10, 20]))

    def changed(op: str = "Constant", **fields: list[object]) -> onnx.ModelProto:
        kept = {"output": ["c"], "attribute": list(good.attribute), **fields}
        return model_of([onnx.NodeProto(op_type=op, **kept), add], [X], [Y])  # type: ignore[arg-type]

    refused(changed(input=["x"]), tmp_path, r"Constant .* its input 1 \('x'\) is not known: it has 0 at most")
    refused(changed(attribute=[]), tmp_path, "a constant given by nothing is not supported")
    two = [*good.attribute, helper.make_attribute("value_float", 1.0)]
    refused(changed(attribute=two), tmp_path, "a constant given by value, value_float is not supported")
    refused(model_of([good, good, add], [X], [Y]), tmp_path, "the graph computes 'c' twice")
    for op in ("Abacus", "Frobnicate"):
        refused(changed(op), tmp_path, f"not supported: {op}")


def test_a_function_may_be_called_constant(tmp_path: Path) -> None:
    """What it gives is its own affair; an attribute of it may be what a Constant in it is."""
    inner = helper.make_node("Constant", [], ["given"])
    inner.attribute.add(name="value", ref_attr_name="value", type=onnx.AttributeProto.TENSOR)
    own = function("Constant", inner, helper.make_node("Neg", ["given"], ["b"]), attributes=("value",), inputs=())
    call = constant(np.float32([10, 20]))
    call.domain = "own"
    nodes = [call, helper.make_node("Add", ["x", "c"], ["y"])]
    made = model_of(nodes, [X], [Y], functions=[own], domains=["own"])
    assert result(made, tmp_path).tolist() == [-9, -18]


def test_sparse_constants_are_refused_by_name(tmp_path: Path) -> None:
    made = mlp()
    made.graph.sparse_initializer.add().values.name = "few"
    refused(made, tmp_path, r"the graph has sparse initializers \('few'\), which are not supported")
    node = helper.make_node("Neg", ["x"], ["y"])
    node.attribute.add(name="odd", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.dims[:] = [2]
    refused(model_of([node], [X], [Y]), tmp_path, r"Neg \(Neg_y\): attribute 'odd' is of a kind that is not supported")


# Weights and constants


@pytest.mark.parametrize(
    ("shape", "is_weight"),
    [
        ((4096,), False), ((4097,), True), ((1, 4096), False), ((8, 8), True), ((2, 32), True), ((7, 9), False),
        ((1, 64), False), ((64, 1, 1), False), ((1, 2, 1, 32), True), ((0, 99), False),
    ],
)  # fmt: skip
def test_matrices_and_what_is_large_are_weights(shape: tuple[int, ...], is_weight: bool, tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    node = helper.make_node("Mul", ["w", "x"], ["y"])
    lifted = lift(write(model_of([node], [value("x", [1])], [value("y", shape)], {"w": array}), tmp_path / "m.onnx"))
    assert [param.name for param in lifted.graph.params] == ["w"] * is_weight
    found = evaluate(lifted.graph, {"x": np.float32([3])}, lifted.load)["y"]
    np.testing.assert_array_equal(np.asarray(found), array * np.float32(3))


def test_integers_are_weights_where_they_are_large(tmp_path: Path) -> None:
    for count, names in ((4096, []), (4160, ["w"])):
        array = np.arange(count).reshape(64, -1)
        made = model_of([helper.make_node("Identity", ["w"], ["y"])], [], [value("y", array.shape)], {"w": array})
        assert list(bodies_of(made, tmp_path).weights.names) == names


def test_weights_of_one_name_in_several_branches_are_told_apart(tmp_path: Path) -> None:
    arrays = [np.full((8, 8), number, np.float32) for number in (1, 2, 3)]

    def branch(array: np.ndarray) -> onnx.GraphProto:
        nodes = [helper.make_node("Identity", ["w"], ["z"])]
        return helper.make_graph(nodes, "b", [], [value("z", [8, 8])], [numpy_helper.from_array(array, "w")])

    node = helper.make_node("If", ["c"], ["chosen"], then_branch=branch(arrays[0]), else_branch=branch(arrays[1]))
    nodes = [node, helper.make_node("Add", ["chosen", "w"], ["y"])]
    inputs = [value("c", [], TensorProto.BOOL)]
    lifted = lift(write(model_of(nodes, inputs, [value("y", [8, 8])], {"w": arrays[2]}), tmp_path / "m.onnx"))
    assert sorted(lifted.weights.names) == sorted(param.name for param in lifted.graph.params) == ["w", "w#2", "w#3"]
    for flag, number in ((True, 4), (False, 5)):
        found = evaluate(lifted.graph, {"c": np.array(flag)}, lifted.load)["y"]
        assert (np.asarray(found) == number).all()


@pytest.mark.parametrize("raw", [True, False])
def test_any_byte_but_zero_is_true(raw: bool, tmp_path: Path) -> None:
    made = model_of([helper.make_node("Identity", ["w"], ["y"])], [], [value("y", [4], TensorProto.BOOL)])
    numbers = bytes([0, 1, 2, 255]) if raw else [0, 1, 2, 255]
    made.graph.initializer.append(helper.make_tensor("w", TensorProto.BOOL, [4], numbers, raw=raw))
    lifted = lift(write(made, tmp_path / "m.onnx"))
    found = evaluate(lifted.graph, {}, lifted.load)["y"]
    assert np.asarray(found).tolist() == [False, True, True, True]


# Versions


def imports(*versions: tuple[str, int]) -> onnx.ModelProto:
    made = model_of([NEG], [X], [Y])
    del made.opset_import[:]
    made.opset_import.extend(onnx.OperatorSetIdProto(domain=domain, version=version) for domain, version in versions)
    return made


def test_the_oldest_and_the_newest_opset(tmp_path: Path) -> None:
    for version in (7, OLDEST_OPSET, NEWEST_OPSET):
        assert result(imports(("", version)), tmp_path).tolist() == [-1, -2]
    said = rf"7 to {NEWEST_OPSET} are read. onnx.version_converter changes a model's opset"
    for version in (6, NEWEST_OPSET + 1):
        refused(imports(("", version)), tmp_path, f"uses opset {version}; {said}")


@pytest.mark.parametrize(("domain", "said"), [("", "ONNX"), ("ai.onnx", "ONNX"), ("own", "own")])
def test_versions_that_make_no_sense(domain: str, said: str, tmp_path: Path) -> None:
    for versions in ((20, 21), (21, 20)):
        made = imports(*((domain, version) for version in versions))
        refused(made, tmp_path, f"imports two versions of the operators of {said}$")
    assert result(imports((domain, 21), (domain, 21)), tmp_path).tolist() == [-1, -2]
    for version in (0, -1):
        refused(imports((domain, version)), tmp_path, f"imports version {version} of the operators of {said}$")


def test_a_domain_that_is_not_imported(tmp_path: Path) -> None:
    """Some exporters forget one: then its first version is meant, and of the standard the newest."""
    nodes = [helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft"), helper.make_node("Neg", ["z"], ["y"])]
    made = model_of(nodes, [X], [Y])
    assert [node.version for node in bodies_of(made, tmp_path).main.nodes] == [1, 21]
    del made.opset_import[:]
    assert [node.version for node in bodies_of(made, tmp_path).main.nodes] == [1, NEWEST_OPSET]


@pytest.mark.parametrize(("opset", "version"), [(13, 13), (None, 21)])
def test_functions_have_versions_of_their_own(opset: int | None, version: int, tmp_path: Path) -> None:
    own = function("F", helper.make_node("Neg", ["a"], ["b"]), opset=opset)
    made = model_of([helper.make_node("F", ["x"], ["y"], domain="own")], [X], [Y], functions=[own], domains=["own"])
    assert [node.version for node in bodies_of(made, tmp_path).functions["own", "F"].nodes] == [version]


# Functions and names


def test_functions_of_one_name_are_told_apart_by_their_overload(tmp_path: Path) -> None:
    functions, nodes = [], []
    for overload, op in (("", "Neg"), ("one", "Exp"), ("two", "Abs")):
        own = function("F", helper.make_node(op, ["a"], ["b"]))
        own.overload = overload
        functions.append(own)
        nodes.append(helper.make_node("F", ["x"], [f"y{overload}"], domain="own", overload=overload))
    made = model_of(nodes, [X], [value(f"y{name}", [2]) for name in ("", "one", "two")], functions=functions,
                    domains=["own"])  # fmt: skip
    lifted = lift(write(made, tmp_path / "model.onnx"))
    x = np.float32([-1, 2])
    found = evaluate(lifted.graph, {"x": x}, lifted.load)
    for name, expected in (("y", -x), ("yone", np.exp(x)), ("ytwo", np.abs(x))):
        np.testing.assert_allclose(np.asarray(found[name]), expected, rtol=1e-6)  # a rounding of f32


def test_an_overload_chooses_among_functions_only(tmp_path: Path) -> None:
    node = helper.make_node("Neg", ["x"], ["y"], overload="one")
    assert result(model_of([node], [X], [Y]), tmp_path).tolist() == [-1, -2]


def test_an_output_that_nothing_computes_is_named_with_its_function(tmp_path: Path) -> None:
    """Also where nobody calls it."""
    own = function("F", helper.make_node("Neg", ["a"], ["c"]))
    made = model_of([NEG], [X], [Y], functions=[own], domains=["own"])
    refused(made, tmp_path, r"nothing computes the output 'b' of function own\.F")


def renamed(old: str, new: str) -> onnx.ModelProto:
    """mlp() with another name for an input, an output of a node or an op."""
    made = mlp()
    for info in made.graph.input:
        info.name = new if info.name == old else info.name
    for node in made.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    return made


@pytest.mark.parametrize(
    ("old", "said"),
    [("x", "input 'n+: a name that long"), ("positive", r"Relu \(Relu_n{195}\) has a name of 4097 characters")],
)
def test_how_long_a_name_may_be(old: str, said: str, tmp_path: Path) -> None:
    bodies_of(renamed(old, "n" * 4096), tmp_path)
    refused(renamed(old, "n" * 4097), tmp_path, said)


@pytest.mark.parametrize("field", ["op_type", "domain"])
def test_how_long_a_name_of_an_op_may_be(field: str, tmp_path: Path) -> None:
    made = mlp()
    setattr(made.graph.node[2], field, "n" * 4096)
    refused(made, tmp_path, "operations that are not supported: n+")
    setattr(made.graph.node[2], field, "n" * 4097)
    refused(made, tmp_path, "has a name of 4097 characters")


@pytest.mark.parametrize("field", ["op_type", "domain"])
def test_an_op_has_a_name_that_can_be_printed(field: str, tmp_path: Path) -> None:
    made = mlp()
    setattr(made.graph.node[2], field, "bell\a")
    refused(made, tmp_path, r"has the op '\w+(\\x07)?' of '\w*(\\x07)?', which is no name")


def test_names_of_nodes_are_shown_as_far_as_they_can_be(tmp_path: Path) -> None:
    made = mlp()
    made.graph.node[2].name = "a\nb" + "n" * 5000
    made.graph.node[2].attribute.extend(helper.make_attribute("twice", 1) for _ in range(2))
    refused(made, tmp_path, rf"Relu \(a\?b{'n' * 197}\) has two attributes 'twice'")


def test_inputs_have_names(tmp_path: Path) -> None:
    made = mlp()
    made.graph.input.append(value("", [1]))
    refused(made, tmp_path, "the model has an input without a name$")
    made = mlp()
    made.graph.output.append(value("", [1]))
    refused(made, tmp_path, "the model has an output without a name$")


# Sizes


def test_sizes_of_inputs_that_files_leave_open(tmp_path: Path) -> None:
    """0 and less stand for any size, 1 for itself."""
    made = model_of([NEG], [value("x", [0, -1, 1, 2, None, "n"])], [value("y", [1])])
    shape = lift(write(made, tmp_path / "m.onnx")).graph.inputs[0].shape
    assert [str(size) for size in shape] == ["x_0", "x_1", "1", "2", "x_4", "n"]


def of_axes(*dims: int | str) -> onnx.ModelProto:
    return model_of([NEG], [value("x", dims)], [Y])


def with_weight(*dims: int) -> onnx.ModelProto:
    made = model_of([helper.make_node("Identity", ["w"], ["y"])], [], [Y])
    made.graph.initializer.append(helper.make_tensor("w", FLOAT, dims, np.zeros(np.prod(dims, dtype=int))))
    return made


@pytest.mark.parametrize("dim", [1, "n"])
def test_how_many_axes_a_tensor_may_have(dim: int | str, tmp_path: Path) -> None:
    lift(write(of_axes(*[dim] * 16), tmp_path / "m.onnx"))
    for count in (17, 18):
        refused(of_axes(*[dim] * count), tmp_path, f"input 'x' has {count} axes")


def test_how_many_axes_and_elements_a_weight_may_have(tmp_path: Path) -> None:
    for dims in ([1] * 16, [0, 3], [1, 0, 1 << 40]):
        assert result_shape(with_weight(*dims), tmp_path) == tuple(dims)
    said = r"tensor 'w' has dims \[.*\], which no tensor has"
    for dims in ([1] * 17, [0, (1 << 40) + 1]):
        refused(with_weight(*dims), tmp_path, said)
    made = with_weight(1, 1)
    made.graph.initializer[0].dims[:] = [1, -1]
    refused(made, tmp_path, said)


def result_shape(made: onnx.ModelProto, tmp_path: Path) -> tuple[object, ...]:
    return lift(write(made, tmp_path / "m.onnx")).graph.output("y").shape


def test_how_many_elements_an_input_may_have(tmp_path: Path) -> None:
    for dims in ((1 << 40, 1), (1 << 20, 1, 1 << 20), (1 << 40, "n")):
        lift(write(of_axes(*dims), tmp_path / "m.onnx"))
    for dims in (((1 << 40) + 1,), (1 << 20, (1 << 20) + 1), ((1 << 40) + 1, "n")):
        refused(of_axes(*dims), tmp_path, r"input 'x' has dims \[.*\], which no tensor has")


def called(calls: int) -> onnx.ModelProto:
    """A function of 499 nodes, called some times one after another."""
    own = function("F", *(helper.make_node("Neg", ["a"], ["b" if i == 0 else f"b{i}"]) for i in range(499)))
    nodes = [helper.make_node("F", ["x"], ["y" if i == 0 else f"y{i}"], domain="own") for i in range(calls)]
    return model_of(nodes, [X], [Y], functions=[own], domains=["own"])


def test_how_many_nodes_a_model_may_have_with_its_functions_written_out(tmp_path: Path) -> None:
    bodies_of(called(500), tmp_path)
    made = called(500)
    made.graph.node.append(helper.make_node("Neg", ["x"], ["z"]))
    refused(made, tmp_path, "more than 250000 nodes when its functions are written out")


def test_how_many_nodes_a_graph_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller limit: as many as it says take seconds to be read."""
    monkeypatch.setattr(model, "_MOST_NODES", 4)
    bodies_of(mlp(), tmp_path)
    made = mlp()
    made.graph.node.append(helper.make_node("Neg", ["x"], ["z"]))
    refused(made, tmp_path, "the graph has 5 nodes; at most 4 are read")
