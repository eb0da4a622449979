"""Encoders with outputs of any names and shapes: what is compiled can be loaded, and gives what the file gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_harness import CACHE
from onnx import NodeProto, TensorProto, helper

import llmc
from llmc.errors import CompileError
from llmc.frontends import lift
from llmc.runtime.runtime import Runtime

VOCABULARY, WIDTH = 40, 8
node = helper.make_node
LAST, TOKENS = ["last"], ["tokens"]
MEAN = node("ReduceMean", ["rows", *TOKENS], ["mean"], keepdims=0)

# Nodes after `rows` [batch, tokens, 8], the outputs, and what the model is said to be for.
CASES: dict[str, tuple[list[NodeProto], list[str], str | None]] = {
    "start and end": (
        [node("MatMul", ["rows", "two"], ["both"]), node("Split", ["both"], ["a", "b"], axis=-1, num_outputs=2),
         node("Squeeze", ["a", *LAST], ["start_logits"]), node("Squeeze", ["b", *LAST], ["end_logits"])],
        ["start_logits", "end_logits"], None,
    ),
    "a number a token": (
        [node("MatMul", ["rows", "one"], ["a"]), node("Squeeze", ["a", *LAST], ["logits"])], ["logits"], None,
    ),
    "a class a token": ([node("ArgMax", ["rows"], ["tags"], axis=-1, keepdims=0)], ["tags"], None),
    "token by token": (
        [node("Transpose", ["rows"], ["turned"], perm=[0, 2, 1]), node("MatMul", ["rows", "turned"], ["alike"])],
        ["alike"], None,
    ),
    "one number": ([node("ReduceMean", ["rows"], ["mean"], keepdims=0)], ["mean"], None),
    "a number a text": (
        [MEAN, node("MatMul", ["mean", "one"], ["a"]), node("Squeeze", ["a", *LAST], ["score"])], ["score"], None,
    ),
    "labels": ([node("MatMul", ["rows", "two"], ["logits"])], ["logits"], "tokens"),
    "classes": ([MEAN, node("MatMul", ["mean", "two"], ["logits"])], ["logits"], "classification"),
    "features and a constant": (
        [node("Tanh", ["rows"], ["hidden"]), node("Identity", TOKENS, ["constant"])], ["hidden", "constant"],
        "embedding",
    ),
    "two of features": (
        [node("MatMul", ["rows", "two"], ["scores"]), node("Tanh", ["rows"], ["other"])], ["scores", "other"],
        "embedding",
    ),
}  # fmt: skip


def write(path: Path, name: str) -> Path:
    nodes, outputs, _ = CASES[name]
    nodes = [node("Gather", ["table", "input_ids"], ["rows"]), *nodes]
    rng = np.random.default_rng(0)
    stored = {
        "table": rng.standard_normal((VOCABULARY, WIDTH), np.float32),
        "one": rng.standard_normal((WIDTH, 1), np.float32),
        "two": rng.standard_normal((WIDTH, 2), np.float32),
        "last": np.array([-1]),
        "tokens": np.array([1]),
    }
    used = {operand for item in nodes for operand in item.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [onnx.ValueInfoProto(name=output) for output in outputs],
        [onnx.numpy_helper.from_array(array, key) for key, array in stored.items() if key in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_what_outputs_are_for(name: str, tmp_path: Path) -> None:
    facts = lift(write(tmp_path / "model.onnx", name)).encoder
    assert (facts and facts["kind"]) == CASES[name][2]


@pytest.mark.parametrize(
    ("shape", "name", "said"),
    [
        ([-1, 1, 1, WIDTH], "attentions.0", "left out of the outputs, which are a row a token or a text: attentions.0"),
        ([-1, 1, 1, WIDTH], "present.0.key", None),
        ([1, -1, WIDTH], "attentions.0", None),
    ],
)
def test_outputs_that_are_left_out_are_named(shape: list[int], name: str, said: str | None, tmp_path: Path) -> None:
    """Not keys and values: it is plain that an artifact has its own."""
    model = onnx.load(write(tmp_path / "model.onnx", "two of features"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape), "shape"))
    model.graph.node.append(node("Reshape", ["other", "shape"], [name]))
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "model.onnx")
    lifted = lift(tmp_path / "model.onnx")
    assert [note for note in lifted.notes if "left out" in note] == ([] if said is None else [said])
    assert (name in dict(lifted.graph.outputs)) == (len(shape) == 3)


def test_a_decoder_names_what_it_gives_besides_logits(tmp_path: Path) -> None:
    CASES["decoder"] = (
        [node("MatMul", ["rows", "head"], ["logits"]), *CASES["two of features"][0]],
        ["logits", "scores", "other"],
        None,
    )
    model = onnx.load(write(tmp_path / "model.onnx", "decoder"))
    del CASES["decoder"]
    head = np.random.default_rng(1).standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(head, "head"))
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"architectures": ["SomeForCausalLM"]}')
    lifted = lift(tmp_path / "model.onnx")
    assert "left out of the outputs, which are a decoder's logits: scores, other" in lifted.notes


@pytest.mark.parametrize("outputs", [("start_logits", "end_logits"), ("select", "select_1")])
def test_starts_and_ends_of_answers_are_called_so(outputs: tuple[str, str], tmp_path: Path) -> None:
    """Also beside a configuration that names a class with a head, where an exporter may have numbered them."""
    model = onnx.load(write(tmp_path / "model.onnx", "start and end"))
    for item, output in zip(model.graph.output, outputs, strict=True):
        node = next(node for node in model.graph.node if item.name in node.output)
        node.output[0] = item.name = output
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"architectures": ["BertForQuestionAnswering"], "model_type": "bert"}')
    lifted = lift(tmp_path / "model.onnx")
    assert [name for name, _ in lifted.graph.outputs] == ["start_logits", "end_logits"] and lifted.encoder is None


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("start and end", "labels") else pytest.mark.slow) for name in CASES],
)
def test_outputs_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", name)
    llmc.compile(path, tmp_path / "model.so", dtype="f32", kernel_cache=CACHE)
    runtime = Runtime.load(tmp_path / "model.so", threads=1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    texts = [np.arange(1, 32), np.array([7])]
    found = runtime.encode(texts)
    assert isinstance(found, list)
    for ids, outputs in zip(texts, found, strict=True):
        expected = dict(zip(CASES[name][1], session.run(None, {"input_ids": ids[None]}), strict=True))
        for output, array in expected.items():
            # Sums of up to 31 numbers of size 1, in another order.
            np.testing.assert_allclose(outputs[output].ravel(), array.ravel(), rtol=1e-5, atol=1e-6)


def test_a_file_that_could_not_be_loaded_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own reader is asked before: whatever a frontend says of a model."""
    from llmc.compiler import manifest

    made = manifest.build_manifest

    def wrong(*arguments: object) -> dict[str, object]:
        found = made(*arguments)  # type: ignore[arg-type]
        assert isinstance(found["encoder"], dict)
        return {**found, "encoder": {**found["encoder"], "labels": ["a", "b", "c"]}}

    monkeypatch.setattr(manifest, "build_manifest", wrong)
    path = write(tmp_path / "model.onnx", "labels")
    with pytest.raises(CompileError, match=r"cannot become an artifact.*encoder.labels must be a list of 2"):
        llmc.compile(path, tmp_path / "model.so", dtype="f32", kernel_cache=CACHE)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx"}


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_the_last_token_of_each_text_is_found_in_any_company(batch_dims: int, tmp_path: Path) -> None:
    """By GatherND, as exporters write `hidden[range(batch), lengths - 1]`: texts of one step do not see each other."""
    nodes = [
        node("Transpose", ["rows"], ["keys"], perm=[0, 2, 1]),
        node("MatMul", ["rows", "keys"], ["scores"]),
        node("Softmax", ["scores"], ["shares"], axis=-1),
        node("MatMul", ["shares", "rows"], ["seen"]),
        node("ReduceSum", ["attention_mask", *TOKENS], ["counts"], keepdims=1),
        node("Add", ["counts", *LAST], ["place"]),
        node("Identity", ["place"], ["chosen"]),
    ]
    if not batch_dims:
        nodes[-1:] = [
            node("Shape", ["input_ids"], ["batch"], start=0, end=1),
            node("Squeeze", ["batch"], ["texts"]),
            node("Range", ["zero", "texts", "step"], ["places"]),
            node("Unsqueeze", ["places", *TOKENS], ["column"]),
            node("Concat", ["column", "place"], ["chosen"], axis=1),
        ]
    nodes.append(node("GatherND", ["seen", "chosen"], ["sentence_embedding"], batch_dims=batch_dims))
    CASES["last token"] = (nodes, ["sentence_embedding"], None)
    model = onnx.load(write(tmp_path / "model.onnx", "last token"))
    del CASES["last token"]
    for name, number in (("zero", 0), ("step", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(number), name))
    model.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"]))
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "model.onnx")
    llmc.compile(tmp_path / "model.onnx", tmp_path / "model.so", dtype="f32", kernel_cache=CACHE)
    runtime = Runtime.load(tmp_path / "model.so", threads=1)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    texts = [np.arange(1, 32), np.array([7]), np.array([9, 8, 8])]
    for ids, found in zip(texts, runtime.embed(texts), strict=True):
        (expected,) = session.run(None, {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)})
        np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-5)
