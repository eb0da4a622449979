"""What lies beside an ONNX text model, how long its texts may be, and what the file itself says of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_files import write
from onnx_graphs import Nodes

from llmc.compiler.ir.dims import symbols_of
from llmc.errors import FrontendError
from llmc.frontends import lift
from llmc.frontends.lifted import Lifted
from llmc.frontends.onnx.initializers import OnnxWeights
from llmc.frontends.onnx.position_tables import longest_sequence
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


@pytest.mark.parametrize(("length", "positions"), [(77, 77), (2, 2), (1, None), ("77", None), (None, None)])
def test_positions_that_the_settings_of_generation_name(length: object, positions: int | None, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"context_length": length}}))
    assert beside(tmp_path).max_positions == positions
    assert beside(tmp_path, n_positions=5).max_positions == 5


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 6}, 6), ({"n_layer": 1}, 1), ({"num_layers": 3}, 3), ({"n_layers": 0}, None),
        ({"n_layers": -1}, None), ({}, None),
    ],
)  # fmt: skip
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


def test_scores_of_a_kind_that_is_not_known_are_an_error_of_the_file(tmp_path: Path) -> None:
    beside(tmp_path, sbert_ce_default_activation_function="torch.nn.Frobnicate")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(FrontendError, match=rf"^{tmp_path / 'config.json'}:? .*Frobnicate"):
        Companions(tmp_path / "onnx" / "model.onnx").activation_of_scores(3, None)


def test_where_no_folder_holds_a_tokenizer_it_is_looked_for_beside_the_model(tmp_path: Path) -> None:
    found = beside(tmp_path, "onnx")
    assert found.tokenizer_folder() == tmp_path / "onnx"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert found.tokenizer_folder() == tmp_path


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


def last(n: Nodes) -> str:
    """S as a vector."""
    return n.add("Shape", "positions", start=1)


def table(rows: int, width: int = 3) -> np.ndarray:
    return np.ones((rows, width), np.float32)


def numbers(rows: int) -> np.ndarray:
    return np.arange(rows, dtype=np.int32)


TABLES: dict[str, tuple[Callable[[Nodes], str], int | None]] = {
    "rows of positions": (lambda n: n.add("Gather", table(20), "positions"), 20),
    "from a later row on": (lambda n: n.add("Gather", table(20), n.add("Add", "positions", np.int32(2))), 18),
    "from the last row on": (lambda n: n.add("Gather", table(3), n.add("Add", "positions", np.int32(2))), 1),
    "from behind the last row on": (lambda n: n.add("Gather", table(2), n.add("Add", "positions", np.int32(2))), None),
    "one row": (lambda n: n.add("Gather", table(1), "positions"), 1),
    "columns": (lambda n: n.add("Gather", table(20, 5), "positions", axis=1), 5),
    "distances": (
        lambda n: n.add("Gather", table(19), n.add("Add", np.int32(9), n.add(
            "Sub", n.add("Unsqueeze", "positions", np.array([2])), n.add("Unsqueeze", "positions", np.array([1]))))),
        10,
    ),
    "positions of a table": (
        lambda n: n.add("Gather", table(30), n.add("Gather", numbers(12), "positions")), 12,
    ),
    "kinds of tokens": (lambda n: n.add("Gather", table(2), n.add("Mul", "positions", np.int32(0))), None),
    "buckets": (lambda n: n.add("Gather", table(8), n.add("Min", "positions", np.int32(7))), None),
    "words": (lambda n: n.add("Gather", table(20), "ids"), None),
    "words at positions": (lambda n: n.add("Gather", table(20), n.add("Add", "ids", "positions")), None),
    "the first rows": (lambda n: n.add("Slice", table(70), np.array([0]), last(n)), 70),
    "later rows": (
        lambda n: n.add("Slice", table(70), np.array([2]), n.add("Add", last(n), np.array([2]))), 68,
    ),
    "twice as many rows": (
        lambda n: n.add("Slice", table(130), np.array([0]), n.add("Mul", last(n), np.array([2]))), None,
    ),
    "fixed rows": (lambda n: n.add("Slice", table(20), np.array([0]), np.array([5])), None),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_end_bound_a_sequence(name: str) -> None:
    """Alone, and beside one with 15 rows."""
    build, expected = TABLES[name]
    nodes = Nodes({"ids": ("int32", (1, "S")), "positions": ("int32", (1, "S"))})
    output, other = build(nodes), nodes.add("Gather", table(15), "positions")
    (size,) = symbols_of(nodes.items(output)[1][0].shape[1])
    assert longest_sequence(nodes.graph(output), size, OnnxWeights()) == expected
    both = longest_sequence(nodes.graph(output, other), size, OnnxWeights())
    assert both == min(15, expected if expected is not None else 15)


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
