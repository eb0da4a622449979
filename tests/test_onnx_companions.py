"""What lies beside an ONNX text model, how long its texts may be, and what the file itself says of that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx_files import write
from onnx_graphs import Nodes

from llmc.errors import FrontendError
from llmc.frontends import lift
from llmc.frontends.lifted import Lifted
from llmc.frontends.onnx.text import Companions, model_name

RNG = np.random.default_rng(29)
VOCABULARY, WIDTH = 40, 8


def beside(tmp_path: Path, folder: str = "", **config: object) -> Companions:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / folder).mkdir(exist_ok=True)
    return Companions(tmp_path / folder / "model.onnx")


@pytest.mark.parametrize("folder", ["onnx", "openvino", "model"])
def test_a_config_lies_in_the_folder_above_an_exporters_own(folder: str, tmp_path: Path) -> None:
    found = beside(tmp_path, folder, model_type="bert")
    assert found.architecture == "bert"
    assert found.find("config.json") == tmp_path / "config.json"
    assert found.find("nothing.json") is None


def test_a_config_in_any_other_folder_above_is_not_the_models(tmp_path: Path) -> None:
    assert beside(tmp_path, "other", model_type="bert").architecture is None


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 512, "n_positions": 77}, 512), ({"n_positions": 77}, 77),
        ({"max_seq_len": 77}, 77), ({"seq_length": 77}, 77), ({"seq_length": 2}, 2), ({"seq_length": 1}, None),
        ({"max_position_embeddings": -1, "n_positions": 77}, 77), ({"n_positions": 0}, None),
        ({"n_positions": True}, None), ({"n_positions": 77.0}, None), ({"n_positions": "77"}, None),
        ({"n_positions": 1 << 28}, 1 << 28), ({"n_positions": (1 << 28) + 1}, None), ({}, None),
    ],
)  # fmt: skip
def test_positions_that_a_model_was_made_for(config: dict[str, object], positions: int | None, tmp_path: Path) -> None:
    assert beside(tmp_path, **config).max_positions == positions


@pytest.mark.parametrize(
    ("config", "layers"),
    [({"num_hidden_layers": 6}, 6), ({"n_layer": 1}, 1), ({"num_layers": 3}, 3), ({"n_layers": 0}, None), ({}, None)],
)
def test_layers(config: dict[str, object], layers: int | None, tmp_path: Path) -> None:
    assert beside(tmp_path, **config).layers == layers


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ({"0": "no", "1": "yes"}, ["no", "yes"]), ({"1": "yes", "0": "no"}, ["no", "yes"]), ({"0": "one"}, ["one"]),
        ({"1": "yes", "2": "more"}, None), ({"0": "no", "1": 1}, None), ({}, None), (["no"], None), (None, None),
    ],
)  # fmt: skip
def test_labels(names: object, labels: list[str] | None, tmp_path: Path) -> None:
    assert beside(tmp_path, id2label=names).labels == labels


@pytest.mark.parametrize(
    ("config", "width", "expected"),
    [
        ({}, 1, "sigmoid"), ({}, 2, "softmax"), ({"problem_type": "regression"}, 1, "none"),
        ({"problem_type": "regression"}, 3, "none"), ({"problem_type": "multi_label_classification"}, 3, "sigmoid"),
        ({"problem_type": "single_label_classification"}, 3, "softmax"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, 3, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 1, "none"),
        ({"sbert_ce_default_activation_function": "torch.nn.Sigmoid"}, 3, "sigmoid"),
        ({"sbert_ce_default_activation_function": "torch.nn.Identity"}, 1, "none"),
        ({"sentence_transformers": "odd"}, 1, "sigmoid"), ({"sentence_transformers": {}}, 3, "none"),
    ],
)  # fmt: skip
def test_what_makes_scores_of_logits(config: dict[str, object], width: int, expected: str, tmp_path: Path) -> None:
    assert beside(tmp_path, **config).activation_of_scores(width, None) == expected


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (3, 3), (True, None), ("3", None), (None, None)])
def test_the_token_of_padding(value: object, expected: int | None, tmp_path: Path) -> None:
    assert beside(tmp_path, pad_token_id=value).pad_id == expected


@pytest.mark.parametrize(
    ("kind", "expected"), [("bert", "bert"), ("", None), ("x" * 64, "x" * 64), ("x" * 65, None), (3, None)]
)
def test_the_name_of_an_architecture(kind: object, expected: str | None, tmp_path: Path) -> None:
    assert beside(tmp_path, model_type=kind).architecture == expected


def test_a_folder_that_is_none_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match=r"there is no directory .*nowhere: --tokenizer takes one that holds"):
        Companions(tmp_path / "model.onnx", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("gpt/model.onnx", "gpt"), ("gpt/onnx/model_q4.onnx", "gpt"), ("gpt/decoder_model.onnx", "gpt"),
        ("gpt/onnx/encoder.onnx", "gpt"), ("gpt/models.onnx", "models"), ("gpt/own.onnx", "own"),
        ("gpt/own/model.onnx", "own"),
    ],
)  # fmt: skip
def test_the_name_of_a_model(path: str, name: str, tmp_path: Path) -> None:
    assert model_name(tmp_path / path) == name


# How long a text may be


def positioned(tmp_path: Path, rows: int | None, first: int = 0, sliced: bool = False, **config: object) -> Path:
    """Logits of words with a row for each position, the first of them at row `first`. rows: None for no such table."""
    g = Nodes({"input_ids": ("int64", ["batch", "seq"])})
    x = g.add("Gather", RNG.standard_normal((VOCABULARY, WIDTH)).astype(np.float32), "input_ids")
    if rows is not None:
        table = RNG.standard_normal((rows, WIDTH)).astype(np.float32)
        length = g.add("Gather", g.add("Shape", "input_ids"), np.int64(1))
        end = g.add("Add", length, np.int64(first))
        if sliced:
            own = g.add("Slice", table, np.array([first]), g.add("Unsqueeze", end, np.array([0])), np.array([0]))
        else:
            own = g.add("Gather", table, g.add("Range", np.int64(first), end, np.int64(1)))
        x = g.add("Add", x, own)
    logits = g.add("MatMul", x, RNG.standard_normal((WIDTH, VOCABULARY)).astype(np.float32))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OwnForCausalLM"], **config}))
    return write(g.model(logits), tmp_path / "m.onnx")


def context(lifted: Lifted) -> tuple[int, bool, bool]:
    """Tokens at most; whether that is for the tables' end; whether it is more than the model was made for."""
    return (
        lifted.max_context,
        any("tables of positions end there" in note for note in lifted.notes),
        any("may make no sense" in note for note in lifted.notes),
    )


@pytest.mark.parametrize("first", [0, 2])
def test_a_text_is_as_long_as_the_tables_of_positions(first: int, tmp_path: Path) -> None:
    path = positioned(tmp_path, 20, first)
    assert context(lift(path)) == (20 - first, False, False)
    assert context(lift(path, max_context=7)) == (7, False, False)
    assert context(lift(path, max_context=20 - first)) == (20 - first, False, False)
    assert context(lift(path, max_context=21 - first)) == (20 - first, True, False)


def test_a_text_is_as_long_as_was_declared(tmp_path: Path) -> None:
    path = positioned(tmp_path, None, n_positions=30)
    assert context(lift(path)) == (30, False, False)
    assert context(lift(path, max_context=30)) == (30, False, False)
    assert context(lift(path, max_context=31)) == (31, False, True)
    assert context(lift(positioned(tmp_path, 20, n_positions=30))) == (20, False, False)
    assert context(lift(positioned(tmp_path, 40, n_positions=30))) == (30, False, False)


def test_a_text_of_a_model_that_says_nothing_has_some_length(tmp_path: Path) -> None:
    assert context(lift(positioned(tmp_path, None))) == (2048, False, False)


def test_a_table_of_which_a_slice_is_taken(tmp_path: Path) -> None:
    assert context(lift(positioned(tmp_path, 20, sliced=True)))[0] == 20
    assert context(lift(positioned(tmp_path, 20, 2, sliced=True)))[0] == 18


@pytest.mark.parametrize("rows", [3, 5, 7])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_table_of_very_few_positions(sliced: bool, rows: int, tmp_path: Path) -> None:
    """Of a slice it cannot be told before that it ends; then --max-context says it, as the error asks for."""
    path = positioned(tmp_path, rows, sliced=sliced)
    if sliced:
        with pytest.raises(FrontendError, match=f"an axis of {rows} depends on the input; bound it with --max-context"):
            lift(path)
    else:
        assert context(lift(path)) == (rows, False, False)
    assert context(lift(path, max_context=rows)) == (rows, False, False)
    assert context(lift(positioned(tmp_path, 8, sliced=sliced))) == (8, False, False)


def test_what_a_text_model_is_asked_for(tmp_path: Path) -> None:
    path = positioned(tmp_path, 20)
    with pytest.raises(FrontendError, match="max context is 1: at least 2 tokens are needed"):
        lift(path, max_context=1)
    assert lift(path, max_context=2).max_context == 2
    with pytest.raises(FrontendError, match="'seq' is no size of a text model: --max-context bounds it"):
        lift(path, max_dims={"seq": 9})
    with pytest.raises(FrontendError, match="'batch' is no size of a text model"):
        lift(path, dims={"batch": 1})
