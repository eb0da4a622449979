"""Reading ONNX files: what stands in them comes out, and what makes no sense is one clear error."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import FLOAT, INT64, mlp, model_of, value, write

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.op import Param
from llmc.compiler.ir.text import parse, print_graph
from llmc.compiler.ir.types import NUMPY_DTYPES
from llmc.errors import FrontendError
from llmc.frontends import lift as lift_any
from llmc.frontends.onnx import lift
from llmc.frontends.onnx.initializers import OnnxWeights, TensorReader, unpacked
from llmc.frontends.onnx.model import OnnxModel
from llmc.frontends.onnx.protobuf import parse as parse_file
from llmc.frontends.onnx.recognition import replaceable
from llmc.frontends.onnx.translation import Body, Item, Node, Reference


def main_of(model: onnx.ModelProto, tmp_path: Path) -> Body:
    return OnnxModel(write(model, tmp_path / "model.onnx")).bodies().main


def one_node(node: onnx.NodeProto, tmp_path: Path) -> Node:
    model = model_of([node], [value("x", [2])], [value(node.output[0], [2])])
    return main_of(model, tmp_path).nodes[0]


# Graphs of plain tensors.


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("width", [1, 7, 31])
def test_a_small_model_computes_what_onnxruntime_does(tmp_path: Path, width: int, batch: int) -> None:
    path = write(mlp(width), tmp_path / "model.onnx")
    lifted = lift(path)
    assert lifted.task == "run" and [str(value.type) for value in lifted.graph.inputs] == [
        f"tensor<[batch, {width}], f32>"
    ]
    x = np.random.default_rng(1).standard_normal((batch, width)).astype(np.float32)
    found = evaluate(lifted.graph, {"x": x}, lifted.load)["y"]
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)  # of values to 50: rounding of f32
    assert print_graph(parse(print_graph(lifted.graph))) == print_graph(lifted.graph)


def test_large_floats_are_params_and_small_ones_are_known(tmp_path: Path) -> None:
    lifted = lift(write(mlp(7, 70), tmp_path / "model.onnx"))
    assert [param.name for param in lifted.graph.params] == ["first", "second"]
    assert lifted.parameters == 2 * 7 * 70
    assert sorted(lifted.weights.names) == ["first", "second"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_plain_graph_keeps_its_dtypes(tmp_path: Path, dtype: type) -> None:
    lifted = lift(write(mlp(dtype=dtype), tmp_path / "model.onnx"))
    assert np.dtype(dtype).name == {"f16": "float16", "f64": "float64"}[lifted.graph.output("y").dtype]


def test_free_sizes_are_symbols_with_bounds(tmp_path: Path) -> None:
    inputs = [value("a", ["batch", "some size + 1", None]), value("b", ["batch", 3, "N"]), value("c.1", [None])]
    nodes = [helper.make_node("Identity", [name], [f"{name}_"]) for name in ("a", "b", "c.1")]
    path = write(model_of(nodes, inputs, [value(f"{n}_", [1]) for n in ("a", "b", "c.1")]), tmp_path / "m.onnx")
    graph = lift(path, max_dims={"some_size_1": 5}).graph
    assert [str(v.type) for v in graph.inputs] == [
        "tensor<[batch, some_size_1, a_2], f32>", "tensor<[batch, 3, N], f32>", "tensor<[c_1_0], f32>",
    ]  # fmt: skip
    bounds = {s.name: (s.low, s.high) for s in graph.symbols}
    assert bounds == {"batch": (1, 8), "some_size_1": (1, 5), "a_2": (1, 1024), "N": (1, 8), "c_1_0": (1, 1024)}
    with pytest.raises(FrontendError, match="no size 'height': its free sizes are batch, some_size_1"):
        lift(path, max_dims={"height": 5})
    with pytest.raises(FrontendError, match="within 1"):
        lift(path, max_dims={"batch": 0})


# What stands in a file comes out.


ATTRIBUTES: list[tuple[str, object]] = [
    ("an_int", -(1 << 62)), ("a_float", 0.5), ("a_string", "naïve"), ("ints", [1, -2, 3]), ("floats", [0.5, -1.0]),
    ("strings", ["a", "é"]), ("no_ints", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what"), ATTRIBUTES)
def test_attributes_are_python_values(tmp_path: Path, name: str, what: object) -> None:
    node = helper.make_node("Any", ["x"], ["y"])
    kind = onnx.AttributeProto.INTS if what == [] else None
    node.attribute.append(helper.make_attribute(name, what, attr_type=kind))
    assert one_node(node, tmp_path).attributes == {name: what}


def test_tensors_and_graphs_among_attributes(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "inner", [], [value("z", [2])])
    node = helper.make_node("Any", ["x"], ["y"], tensor=numpy_helper.from_array(array), branch=branch)
    found = one_node(node, tmp_path)
    assert isinstance(found.attributes["tensor"], Item)
    np.testing.assert_array_equal(found.attributes["tensor"].numbers, array)
    body = found.attributes["branch"]
    assert isinstance(body, Body) and body.outputs == ("z",) and body.nodes[0].inputs == ("x",)


def test_nodes_have_names_of_their_own(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["x"], [f"y{i}"], name=name) for i, name in enumerate(["", "a", "a", "a#2", ""])]
    body = main_of(model_of(nodes, [value("x", [2])], [value("y4", [2])]), tmp_path)
    names = [node.name for node in body.nodes]
    assert len(set(names)) == 5 and all(names) and names[:2] == ["Neg_y0", "a"]


def test_nodes_are_put_in_order_of_use(tmp_path: Path) -> None:
    chain = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(5)]
    for order in itertools.islice(itertools.permutations(chain), 0, None, 7):
        body = main_of(model_of(order, [value("t0", [2])], [value("t5", [2])]), tmp_path)
        assert [node.name for node in body.nodes] == [f"n{i}" for i in range(5)]


def test_functions_with_references_and_defaults(tmp_path: Path) -> None:
    inner = helper.make_node("LeakyRelu", ["a"], ["b"])
    inner.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    function = helper.make_function(
        "own", "Leaky", ["a"], ["b"], [inner], [helper.make_opsetid("", 21)],
        attribute_protos=[helper.make_attribute("slope", 0.25)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Leaky", ["x"], ["one"], domain="own"),
        helper.make_node("Leaky", ["x"], ["two"], domain="own", slope=0.5),
    ]
    model = model_of(nodes, [value("x", [2])], [value("one", [2]), value("two", [2])], functions=[function],
                     domains=["own"])  # fmt: skip
    path = write(model, tmp_path / "model.onnx")
    functions = OnnxModel(path).bodies().functions
    assert functions["own", "Leaky"].nodes[0].attributes == {"alpha": Reference("slope", 0.25)}
    graph = lift(path).graph
    found = evaluate(graph, {"x": np.float32([-1, 1])}, lambda name: np.zeros(0))
    np.testing.assert_array_equal(found["one"], np.float32([-0.25, 1]))
    np.testing.assert_array_equal(found["two"], np.float32([-0.5, 1]))


STORED = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dtype", STORED)
def test_every_dtype_in_both_forms(tmp_path: Path, dtype: type, raw: bool) -> None:
    array = np.random.default_rng(0).integers(0, 2 if dtype is np.bool_ else 100, (3, 5, 7)).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    vals = array.tobytes() if raw else array.astype(np.float64).ravel().tolist()
    if not raw and array.dtype.kind in "iub":
        vals = array.astype(np.int64).ravel().tolist()
    tensor = helper.make_tensor("t", kind, array.shape, vals, raw=raw)
    found = TensorReader(tmp_path / "model.onnx").stored(tensor, "t").read()
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("count", [1, 7, 31, 32, 33])
@pytest.mark.parametrize(("bits", "signed"), [(4, True), (4, False), (2, True), (2, False)])
def test_elements_of_less_than_a_byte(tmp_path: Path, bits: int, signed: bool, count: int) -> None:
    low = -(1 << (bits - 1)) if signed else 0
    numbers = np.random.default_rng(count).integers(low, low + (1 << bits), count)
    kind = getattr(TensorProto, f"{'' if signed else 'U'}INT{bits}")
    tensor = helper.make_tensor("t", kind, [count], numbers.tolist())
    raw = numpy_helper.from_array(numpy_helper.to_array(tensor), "t")
    for form in (tensor, raw):
        stored = TensorReader(tmp_path / "model.onnx").stored(form, "t")
        found = stored.read()
        assert found.dtype == (np.int8 if signed else np.uint8) == NUMPY_DTYPES[stored.dtype]
        np.testing.assert_array_equal(found, numbers)
    np.testing.assert_array_equal(unpacked(np.frombuffer(raw.raw_data, np.uint8), count, bits, signed), numbers)


@pytest.mark.parametrize("kind", ["STRING", "COMPLEX64", "FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT4E2M1"])
def test_other_dtypes_are_refused_by_name_where_they_are_used(tmp_path: Path, kind: str) -> None:
    model = model_of([helper.make_node("Identity", ["odd"], ["y"])], [value("x", [2])], [value("y", [2])])
    model.graph.initializer.add(name="odd", data_type=getattr(TensorProto, kind), dims=[2])
    model.graph.initializer.add(name="unused", data_type=getattr(TensorProto, kind), dims=[2])
    with pytest.raises(FrontendError, match=f"'odd'.*{kind.lower()}"):
        main_of(model, tmp_path)
    model.graph.node[0].input[0] = "x"
    assert not main_of(model, tmp_path).initializers


def test_raw_bytes_stay_in_the_file(tmp_path: Path) -> None:
    """Nothing of a large tensor is in the parsed message; it is a view of the mapped file."""
    parsed = parse_file(write(mlp(7, 999), tmp_path / "model.onnx"))
    large = {t.name: span for t, span in zip(parsed.message.graph.initializer, parsed.raw, strict=True)}
    assert parsed.message.ByteSize() < 1000
    assert all(
        span is not None and span.end - span.begin == (4 if n == "bias" else 28) * 999 for n, span in large.items()
    )
    weights = OnnxModel(tmp_path / "model.onnx").bodies().weights
    assert isinstance(weights, OnnxWeights)
    original = {t.name: numpy_helper.to_array(t) for t in mlp(7, 999).graph.initializer}
    for name in weights.names:
        np.testing.assert_array_equal(weights.load(name), original[name])


def test_random_weights_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    arrays = {t.name: numpy_helper.to_array(t) for t in mlp(7, 70).graph.initializer}
    text = model_of(
        [helper.make_node("Gather", ["table", "input_ids"], ["x"]), *mlp(7, 70).graph.node],
        [value("input_ids", ["batch", "sequence"], INT64)], [value("y", ["batch", "sequence", 7])],
        arrays | {"table": np.ones((99, 7), np.float32)},
    )  # fmt: skip
    lifted = lift(write(text, tmp_path / "model.onnx"), weights="random", seed=3)
    again = lift(tmp_path / "model.onnx", weights="random", seed=3)
    zero, unsaid = (lift_any(tmp_path / "model.onnx", weights="random", **seed) for seed in ({"seed": 0}, {}))
    assert lifted.task == "encode" and lifted.vocab_size == 99
    assert isinstance(next(v for v in lifted.graph.params if v.name == "first"), Param)
    for name in ("first", "second", "table"):
        assert 0 < np.abs(lifted.load(name)).max() < 0.2
        np.testing.assert_array_equal(lifted.load(name), again.load(name))
        np.testing.assert_array_equal(zero.load(name), unsaid.load(name))
        assert (zero.load(name) != lifted.load(name)).any()
    np.testing.assert_array_equal(lift(tmp_path / "model.onnx", weights="random").load("first"), zero.load("first"))


def test_random_weights_are_matrices_and_tables(tmp_path: Path) -> None:
    """A number for each token is no weight that noise may stand for: it may be a length or a place."""
    vector = np.arange(5000, dtype=np.float32)
    nodes = [helper.make_node("Gather", [name, "i"], [f"{name}_"]) for name in ("vector", "table")]
    outputs = [value("vector_", ["N"]), value("table_", ["N", 7])]
    stored = {"vector": vector, "table": np.ones((5000, 7), np.float32)}
    path = write(model_of(nodes, [value("i", ["N"], INT64)], outputs, stored), tmp_path / "model.onnx")
    graph = lift(path).graph
    assert replaceable(graph) == {"table": "f32"}
    assert {param.name for param in graph.params} == {"vector", "table"}


# What makes no sense is one clear error.


def _mutate(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = mlp()
    change(model)
    return model


def _set(target: object, name: str, to: object) -> None:
    setattr(target, name, to)


def _dims(model: onnx.ModelProto, *dims: int) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)


BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "no output": (lambda m: m.graph.ClearField("output"), "no graph with outputs"),
    "cycle": (lambda m: m.graph.node[0].input.__setitem__(0, "positive"), "cycle"),
    "missing input": (lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"), "'nowhere', which nothing computes"),
    "missing output": (lambda m: _set(m.graph.output[0], "name", "nowhere"), "output 'nowhere' of the graph"),
    "two producers": (lambda m: m.graph.node[1].output.__setitem__(0, "product"), "computes 'product' twice"),
    "a node computes an initializer": (lambda m: m.graph.node[0].output.__setitem__(0, "bias"), "twice"),
    "two initializers": (lambda m: _set(m.graph.initializer[0], "name", "bias"), "two initializers"),
    "two inputs": (lambda m: m.graph.input.add().CopyFrom(m.graph.input[0]), "two inputs"),
    "two outputs": (lambda m: m.graph.output.add().CopyFrom(m.graph.output[0]), "two outputs"),
    "opset of the future": (lambda m: _set(m.opset_import[0], "version", 1 << 40), "opset 1099511627776"),
    "opset of the past": (lambda m: _set(m.opset_import[0], "version", 1), "opset 1"),
    "negative opset": (lambda m: _set(m.opset_import[0], "version", -3), "version -3"),
    "huge dims": (lambda m: _dims(m, 1 << 62, 1 << 62), "which no tensor has"),
    "negative dims": (lambda m: _dims(m, -7, -70), "which no tensor has"),
    "dims beyond the data": (lambda m: _dims(m, 7, 71), "1960 bytes, but f32"),
    "too many axes": (lambda m: _dims(m, *[1] * 30), "which no tensor has"),
    "dtype": (lambda m: _set(m.graph.initializer[0], "data_type", 77), "number 77"),
    "unknown op": (lambda m: _set(m.graph.node[2], "op_type", "Frobnicate"), "Frobnicate"),
    "two attributes": (lambda m: [m.graph.node[2].attribute.add(name="a", type=2) for _ in "ab"], "two attributes 'a'"),
    "attribute of no type": (lambda m: m.graph.node[2].attribute.add(name="a", i=1), "not supported"),
    "sequence input": (lambda m: m.graph.input[0].type.sequence_type.SetInParent(), "only tensors"),
    "unknown rank": (lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"), "has no shape"),
    "segment": (lambda m: _set(m.graph.initializer[0].segment, "begin", 0), "segments"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_one_clear_error(tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    path = write(_mutate(change), tmp_path / "model.onnx")
    with pytest.raises(FrontendError, match=message) as raised:
        lift(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_functions_that_never_end_are_refused(tmp_path: Path) -> None:
    def function(name: str, *calls: str) -> onnx.FunctionProto:
        nodes = [helper.make_node(call, ["a"], [f"b{i}"], domain="own") for i, call in enumerate(calls)]
        nodes.append(helper.make_node("Neg", ["a"], ["b"]))
        return helper.make_function("own", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 21)])

    def model(*functions: onnx.FunctionProto) -> Path:
        node = helper.make_node("F0", ["x"], ["y"], domain="own")
        made = model_of([node], [value("x", [2])], [value("y", [2])], functions=functions, domains=["own"])
        return write(made, tmp_path / "model.onnx")

    with pytest.raises(FrontendError, match="calls itself"):
        lift(model(function("F0", "F1"), function("F1", "F0")))
    with pytest.raises(FrontendError, match="when its functions are written out"):
        lift(model(*(function(f"F{i}", f"F{i + 1}", f"F{i + 1}") for i in range(40)), function("F40")))
    with pytest.raises(FrontendError, match="64 deep"):
        lift(model(*(function(f"F{i}", f"F{i + 1}") for i in range(70)), function("F70")))
    with pytest.raises(FrontendError, match="two functions"):
        lift(model(function("F0"), function("F0")))


def test_branches_in_branches_end(tmp_path: Path) -> None:
    """4,000 branches, twelve deep: work grows with their number, not with what lies inside each."""
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "inner", [], [value("z", [2])])
    for _ in range(11):
        node = helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
        body = helper.make_graph([node], "inner", [], [value("z", [2])])
    model = model_of(body.node, [value("x", [2]), value("c", [], TensorProto.BOOL)], [value("z", [2])])
    started = time.process_time()
    graph = lift(write(model, tmp_path / "model.onnx")).graph
    assert time.process_time() - started < 60  # about 0.5; with what lies inside each, years
    found = evaluate(graph, {"x": np.float32([1, 2]), "c": np.array(True)}, lambda name: np.zeros(0))["z"]
    np.testing.assert_array_equal(found, np.float32([-1, -2]))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"\xff" * 100, b"hello world, this is text", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
     b"\x3a\x05\x2a\xff\xff\xff\xff", b"\x0b" * 64, b"\x3a" * 10_000, b"\x08" + b"\x80" * 30],
)  # fmt: skip
def test_what_is_no_model_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FrontendError, match=r"no ONNX file|is empty|no graph") as raised:
        lift(write(data, tmp_path / "model.onnx"))
    assert "\n" not in str(raised.value)


def test_every_truncation_is_one_clear_error(tmp_path: Path) -> None:
    data = mlp(3, 5).SerializeToString()
    for length in range(0, len(data), 3):
        with pytest.raises(FrontendError):
            lift(write(data[:length], tmp_path / "model.onnx"))


def test_names_that_are_not_text(tmp_path: Path) -> None:
    data = mlp().SerializeToString().replace(b"positive", b"pos\xff\xfeive")
    with pytest.raises(FrontendError, match="UTF-8"):
        lift(write(data, tmp_path / "model.onnx"))


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match="there is no file"):
        lift(tmp_path / "nothing.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(FrontendError, match="not a file"):
        lift(tmp_path / "folder.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(FrontendError, match="not a file"):
        lift(tmp_path / "pipe.onnx")


@pytest.mark.parametrize("name", ["past_key_values.0.encoder.key", "past_key_cross_0", "cross_past.0.key"])
def test_keys_of_another_model_are_given_and_no_empty_past(tmp_path: Path, name: str) -> None:
    """A decoder that attends to an encoder is a graph of arrays: as a text without a past it would see nothing."""
    inputs = [value("input_ids", ["batch", "S"], INT64), value(name, ["batch", 2, "source", 4])]
    nodes = [helper.make_node("Cast", ["input_ids"], ["y"], to=FLOAT), helper.make_node("Relu", [name], ["z"])]
    outputs = [value("y", ["batch", "S"]), value("z", ["batch", 2, "source", 4])]
    lifted = lift(write(model_of(nodes, inputs, outputs), tmp_path / "model.onnx"))
    assert lifted.task == "run" and name in lifted.notes[0]
    assert [v.name for v in lifted.graph.inputs] == ["input_ids", name]


def test_text_of_a_fixed_length_is_a_plain_graph_and_says_so(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["input_ids"], ["y"], to=FLOAT)
    lifted = lift(
        write(model_of([node], [value("input_ids", [1, 9], INT64)], [value("y", [1, 9])]), tmp_path / "m.onnx")
    )
    assert lifted.task == "run" and "fixed length of 9" in lifted.notes[0]
