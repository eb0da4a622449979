"""What an ONNX encoder is for, by the names and shapes of its outputs and the config beside it. Nothing is compiled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx_files import write
from onnx_graphs import Nodes
from safetensors.numpy import save_file
from tiny_encoders import VOCAB, write_encoder_tokenizer

from llmc.compiler.ir.evaluate import evaluate
from llmc.errors import FrontendError
from llmc.frontends import lift
from llmc.frontends.lifted import Lifted

VOCABULARY, WIDTH = 40, 8
RNG = np.random.default_rng(31)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def lifted(tmp_path: Path, outputs: dict[str, str], **config: object) -> Lifted:
    """A model with outputs of some kinds: "rows" a token, "text" (their mean), either with a width; "pairs" of rows."""
    tmp_path.mkdir(exist_ok=True)
    g = Nodes({"input_ids": ("int64", ["batch", "seq"])})
    rows = g.add("Gather", weight(VOCABULARY, WIDTH), "input_ids")
    mean = g.add("ReduceMean", rows, np.array([1]), keepdims=0)
    pairs = g.add("MatMul", rows, g.add("Transpose", rows, perm=[0, 2, 1]))
    for name, kind in outputs.items():
        base, _, width = kind.partition(" ")
        value = {"rows": rows, "text": mean, "pairs": pairs}[base]
        made = g.add("MatMul", value, weight(WIDTH, int(width))) if width not in ("", "1 squeezed") else value
        if width == "1 squeezed":
            made = g.add("Squeeze", g.add("MatMul", value, weight(WIDTH, 1)), np.array([-1]))
        g.add("Identity", made)
        g.nodes[-1].output[0] = name
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = lift(write(g.model(*outputs), tmp_path / "m.onnx"))
    return found if found.otherwise is None else found.otherwise()


def facts(found: Lifted) -> tuple[object, object] | None:
    return None if found.encoder is None else (found.encoder["kind"], found.encoder["output"])


def names(found: Lifted) -> list[str]:
    return [name for name, _ in found.graph.outputs]


MEAN = "embedding is the mean over tokens"
CLASSES = {"architectures": ["OwnForSequenceClassification"]}


@pytest.mark.parametrize("name", ["sentence_embedding", "embedding", "embeddings", "text_embeds", "dense_vecs"])
def test_an_output_that_is_called_an_embedding_is_one(name: str, tmp_path: Path) -> None:
    found = lifted(tmp_path, {"last_hidden_state": "rows", name: "text"})
    assert facts(found) == ("embedding", name)
    assert not any(MEAN in note for note in found.notes)


def test_what_is_called_an_embedding_of_each_token_is_pooled(tmp_path: Path) -> None:
    found = lifted(tmp_path, {"embeddings": "rows"})
    assert facts(found) == ("embedding", "embedding")
    assert any(MEAN in note for note in found.notes)


@pytest.mark.parametrize("name", ["last_hidden_state", "token_embeddings", "hidden_state"])
def test_features_of_tokens_are_pooled(name: str, tmp_path: Path) -> None:
    found = lifted(tmp_path, {"other": "rows 3", name: "rows", "pooler_output": "text"})
    assert facts(found) == ("embedding", "embedding")
    assert found.graph.output("embedding").shape == (1, WIDTH)
    assert names(found) == ["other", name, "pooler_output", "embedding"]


@pytest.mark.parametrize(
    ("outputs", "config", "expected"),
    [
        ({"a": "rows", "b": "text"}, {"architectures": ["OwnModel"]}, ["last_hidden_state", "pooler_output"]),
        ({"a": "text", "b": "rows"}, {"architectures": ["OwnModel"]}, ["pooler_output", "last_hidden_state"]),
        ({"a": "rows", "b": "rows"}, {"architectures": ["OwnModel"]}, ["last_hidden_state", "b"]),
        ({"a": "rows"}, {}, ["a"]),
        ({"a": "text 3"}, CLASSES, ["logits"]),
        ({"a": "text 3", "b": "rows"}, CLASSES, ["logits", "b"]),
        ({"logits": "text 3", "b": "rows"}, CLASSES, ["logits", "b"]),
        ({"own_logits": "text 3"}, CLASSES, ["own_logits"]),
        ({"a": "rows 1 squeezed", "b": "rows 1 squeezed"}, {"architectures": ["OwnForQuestionAnswering"]},
         ["start_logits", "end_logits"]),
        ({"a": "rows 1 squeezed"}, {"architectures": ["OwnForQuestionAnswering"]}, ["logits"]),
    ],
)  # fmt: skip
def test_outputs_that_an_exporter_numbered_get_names(
    outputs: dict[str, str], config: dict[str, object], expected: list[str], tmp_path: Path
) -> None:
    found = lifted(tmp_path, outputs, **config)
    assert [name for name in names(found) if name != "embedding"] == expected


@pytest.mark.parametrize(
    ("outputs", "config", "expected"),
    [
        ({"logits": "text 3"}, {}, ("classification", "logits")),
        ({"logits": "rows 3"}, {}, ("tokens", "logits")),
        ({"logits": "rows 1"}, {}, ("tokens", "logits")),
        ({"logits": "rows 39"}, {}, ("tokens", "logits")),
        ({"logits": "rows 40"}, {"architectures": ["OwnForMaskedLM"]}, None),
        ({"logits": "rows 1 squeezed"}, {}, None),
        ({"a": "text 3"}, {"id2label": {"0": "x", "1": "y", "2": "z"}}, ("classification", "a")),
        ({"a": "text 3"}, {}, ("embedding", "a")),
        ({"a": "rows 3"}, {}, ("embedding", "embedding")),
        ({"a": "rows 3"}, {"id2label": {"0": "x", "1": "y", "2": "z"}}, ("tokens", "a")),
        ({"a": "rows 3"}, {"id2label": {"0": "x"}}, ("tokens", "a")),
        ({"a": "rows 3", "b": "text"}, {"id2label": {"0": "x"}}, None),
        ({"a": "rows 3", "b": "text"}, {"id2label": {"0": "x", "1": "y", "2": "z"}}, ("tokens", "a")),
        ({"start_logits": "rows 1 squeezed", "end_logits": "rows 1 squeezed"}, {}, None),
    ],
)  # fmt: skip
def test_purposes(
    outputs: dict[str, str], config: dict[str, object], expected: tuple[str, str] | None, tmp_path: Path
) -> None:
    assert facts(lifted(tmp_path, outputs, **config)) == expected


@pytest.mark.parametrize(
    ("outputs", "width"),
    [({"a": "rows 3", "b": "rows"}, 3), ({"a": "rows", "b": "rows 3"}, WIDTH), ({"a": "rows 3", "b": "pairs"}, 3),
     ({"a": "pairs", "b": "rows 3"}, 3)],
)  # fmt: skip
def test_the_first_features_of_tokens_are_pooled(outputs: dict[str, str], width: int, tmp_path: Path) -> None:
    """What has no width, such as a number for each two tokens, are no features."""
    found = lifted(tmp_path, outputs)
    assert facts(found) == ("embedding", "embedding")
    assert found.graph.output("embedding").shape == (1, width)


@pytest.mark.parametrize("takes", [True, False])
def test_a_model_that_takes_token_types_knows_those_of_two_texts(takes: bool, tmp_path: Path) -> None:
    """The tokenizer gives type 1 to the second text of a pair, whatever the model takes."""
    write_encoder_tokenizer(tmp_path)
    inputs = {name: ("int64", ["batch", "seq"]) for name in ("input_ids", "token_type_ids")[: 1 + takes]}
    g = Nodes(inputs)
    rows = g.add("Gather", weight(VOCAB, WIDTH), "input_ids")
    rows = g.add("Add", rows, g.add("Gather", weight(2, WIDTH), "token_type_ids")) if takes else rows
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OwnModel"]}))
    found = lift(write(g.model(rows), tmp_path / "m.onnx"))
    found = found if found.otherwise is None else found.otherwise()
    assert found.text.facts is not None and found.text.facts["token_types"] == (2 if takes else 0)


# In a directory of sentence-transformers


def sentence_directory(tmp_path: Path, *modules: tuple[str, dict[str, object]], **settings: object) -> Path:
    """Settings of the whole, and modules by their class and settings, behind a Transformer; none has weights yet."""
    kinds = ["Transformer", *(kind for kind, _ in modules)]
    paths = ["", *(f"{number}_{kind}" for number, (kind, _) in enumerate(modules, 1))]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    for path, (_, own) in zip(paths[1:], modules, strict=True):
        (tmp_path / path).mkdir()
        (tmp_path / path / "config.json").write_text(json.dumps(own))
    return tmp_path


POOLING = ("Pooling", {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True})


def dense(inputs: int, outputs: int) -> tuple[str, dict[str, object]]:
    activation = "torch.nn.modules.linear.Identity"
    return "Dense", {"in_features": inputs, "out_features": outputs, "activation_function": activation}


def test_modules_bring_weights_of_their_own(tmp_path: Path) -> None:
    directory = sentence_directory(tmp_path, POOLING, dense(WIDTH, 3), dense(3, 5))
    stored = {}
    for number, (inputs, outputs) in ((2, (WIDTH, 3)), (3, (3, 5))):
        stored[number] = weight(outputs, inputs), weight(outputs)
        named = dict(zip(("linear.weight", "linear.bias"), stored[number], strict=True))
        save_file(named, directory / f"{number}_Dense" / "model.safetensors")
    found = lifted(tmp_path, {"last_hidden_state": "rows"})
    assert names(found) == ["embedding"]
    inputs = {"ids": np.array([[3, 1, 4]], np.int32), "positions": np.arange(3, dtype=np.int32)[None]}
    given = {value.name: inputs[value.name] for value in found.graph.inputs}
    plain = evaluate(lifted(tmp_path / "plain", {"embedding": "text"}).graph, given, found.load)["embedding"]
    (w, b), (w_2, b_2) = stored[2], stored[3]
    want = (plain @ w.T + b) @ w_2.T + b_2
    np.testing.assert_allclose(evaluate(found.graph, given, found.load)["embedding"], want, rtol=1e-5, atol=1e-5)


def test_modules_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = sentence_directory(tmp_path, POOLING, dense(WIDTH + 1, 3))
    named = {"linear.weight": weight(3, WIDTH + 1), "linear.bias": weight(3)}
    save_file(named, directory / "2_Dense" / "model.safetensors")
    with pytest.raises(FrontendError, match="2_Dense does not fit what stands before it: "):
        lifted(tmp_path, {"last_hidden_state": "rows"})


@pytest.mark.parametrize(("said", "most"), [({"max_seq_length": 17}, 17), ({"max_seq_length": 4000}, 2048), ({}, 2048)])
def test_the_directory_says_how_long_texts_may_be(said: dict[str, int], most: int, tmp_path: Path) -> None:
    (sentence_directory(tmp_path, POOLING) / "sentence_bert_config.json").write_text(json.dumps(said))
    encoder = lifted(tmp_path, {"last_hidden_state": "rows"}).encoder
    assert encoder is not None and encoder["max_tokens"] == most


@pytest.mark.parametrize(("outputs", "width"), [({"sentence_embedding": "text"}, 2), ({"logits": "text 3"}, 3)])
def test_embeddings_are_cut_and_classes_are_not(outputs: dict[str, str], width: int, tmp_path: Path) -> None:
    sentence_directory(tmp_path, POOLING, truncate_dim=2)
    found = lifted(tmp_path, outputs)
    assert found.graph.output(next(iter(outputs))).shape == (1, width)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"0": "no", "1": "yes", "2": "so"}, ["no", "yes", "so"]),
        ({"0": "no", "1": "yes"}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (None, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_labels_of_classes(labels: dict[str, str] | None, expected: list[str], tmp_path: Path) -> None:
    encoder = lifted(tmp_path, {"logits": "text 3"}, id2label=labels).encoder
    assert encoder is not None and encoder["labels"] == expected and encoder["multi_label"] is False


def test_one_class_is_a_probability_of_its_own(tmp_path: Path) -> None:
    encoder = lifted(tmp_path, {"logits": "text 1"}).encoder
    assert encoder is not None and encoder["multi_label"] is True
    tagged = lifted(tmp_path, {"logits": "rows 3"}, problem_type="multi_label_classification").encoder
    assert tagged is not None and tagged["multi_label"] is False
    features = lifted(tmp_path, {"last_hidden_state": "rows"}).encoder
    assert features is not None and features["labels"] is None and features["normalized"] is False
