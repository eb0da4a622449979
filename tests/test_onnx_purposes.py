"""What an ONNX encoder is for, by the names and shapes of its outputs and the config beside it. Nothing is compiled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx_files import write
from onnx_graphs import Nodes

from llmc.frontends import lift
from llmc.frontends.lifted import Lifted

VOCABULARY, WIDTH = 40, 8
RNG = np.random.default_rng(31)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def lifted(tmp_path: Path, outputs: dict[str, str], **config: object) -> Lifted:
    """A model with outputs of some kinds: "rows" a token, "text" (their mean), either with a width, or "both"."""
    g = Nodes({"input_ids": ("int64", ["batch", "seq"])})
    rows = g.add("Gather", weight(VOCABULARY, WIDTH), "input_ids")
    mean = g.add("ReduceMean", rows, np.array([1]), keepdims=0)
    for name, kind in outputs.items():
        base, _, width = kind.partition(" ")
        value = {"rows": rows, "text": mean}[base]
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
