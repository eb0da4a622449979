"""ONNX text models as one sequence: what each input is for it, whether the model decodes, and the facts about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto
from onnx_files import write
from onnx_graphs import Nodes

from llmc.compiler.ir.evaluate import evaluate
from llmc.errors import FrontendError
from llmc.frontends import lift
from llmc.frontends.lifted import Lifted

VOCABULARY, WIDTH = 40, 8
RNG = np.random.default_rng(37)
IDS = {"input_ids": ("int64", ["rows", "seq"])}
PAST = {
    f"past_key_values.{n}.{part}": ("float32", ["rows", 2, "past", 4]) for n in range(3) for part in ("key", "value")
}
TABLE = RNG.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)


def named(g: Nodes, x: str, name: str) -> str:
    """The value under a name of its own."""
    g.add("Identity", x)
    g.nodes[-1].output[0] = name
    return name


def saved(tmp_path: Path, g: Nodes, *outputs: str, **config: object) -> Path:
    """The model beside a config, if there is anything to say in it."""
    (tmp_path / "config.json").unlink(missing_ok=True)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return write(g.model(*outputs), tmp_path / "m.onnx")


def require_same(path: Path, given: Callable[[int], dict[str, np.ndarray]], types: Sequence[int] = ()) -> Lifted:
    """The lifted graph gives what onnxruntime gives for some texts. given: the model's inputs besides its token ids.

    types: of the first tokens, where the model has types of tokens; those of the others are 0.
    """
    lifted = lift(path)
    lifted = lifted if lifted.otherwise is None else lifted.otherwise()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output = session.get_outputs()[0].name
    for size in (1, 7, 31):
        ids = np.random.default_rng(size).integers(0, VOCABULARY, (1, size))
        (expected,) = session.run([output], {"input_ids": ids, **given(size)})
        own = {"ids": ids, "positions": np.arange(size)[None], "token_types": np.resize([*types, 0], (1, size))}
        arrays = {value.name: own[value.name].astype(np.int32) for value in lifted.graph.inputs}
        found = evaluate(lifted.graph, arrays, lifted.load)[output]
        # One sum of numbers of size 100 at most: a rounding of f32.
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6, atol=1e-6)
    return lifted


# Inputs


def positions(size: int) -> np.ndarray:
    return np.arange(size)


# By name and shape: the dtype, and what the input is for a text of some tokens.
ARRAYS: list[tuple[str, str, list[int | str], Callable[[int], object]]] = [
    ("attention_mask", "int64", ["rows", "seq"], lambda size: np.ones((1, size))),
    ("attention_mask", "float32", ["rows", "total"], lambda size: np.ones((1, size))),
    ("position_ids", "int32", ["rows", "seq"], lambda size: positions(size)[None]),
    ("position_ids", "int64", [1, "seq"], lambda size: positions(size)[None]),
    ("cache_position", "int64", ["seq"], positions),
    ("position_ids", "int64", [3, "rows", "seq"], lambda size: np.resize(positions(size), (3, 1, size))),
    ("token_type_ids", "int64", ["rows", "seq"], lambda size: np.resize([1, 0], (1, size))),
    ("total_sequence_length", "int32", [], lambda size: size),
    ("total_sequence_length", "int64", [1], lambda size: [size]),
    ("seqlens_k", "int32", ["rows"], lambda size: [size - 1]),
    ("seqlens_k", "int32", ["rows", 1], lambda size: [[size - 1]]),
    ("past_sequence_length", "int32", [1], lambda size: [0]),
    ("use_cache_branch", "bool", [1], lambda size: [False]),
    ("logits_to_keep", "int64", [], lambda size: 0),
]


@pytest.mark.parametrize(("name", "dtype", "shape", "array"), ARRAYS, ids=[f"{n} {s}" for n, _, s, _ in ARRAYS])
def test_inputs_are_what_they_are_for_one_text(
    name: str, dtype: str, shape: list[int | str], array: Callable[[int], object], tmp_path: Path
) -> None:
    g = Nodes({**IDS, name: (dtype, shape)})  # type: ignore[dict-item]
    read = g.add("Cast", name, to=TensorProto.FLOAT)
    if len(shape) == 3:
        read = g.add("Einsum", np.float32([1, 10, 100]), read, equation="k,kbs->bs")
    if len(shape) > 1 or name == "cache_position":
        read = g.add("Unsqueeze", read, np.array([1 if len(shape) == 1 else 2]))
    x = named(g, g.add("Add", g.add("Gather", TABLE, "input_ids"), read), "last_hidden_state")
    types = [number % 2 for number in range(1, 32)] if name == "token_type_ids" else []
    lifted = require_same(saved(tmp_path, g, x), lambda size: {name: np.array(array(size), dtype)}, types)
    assert [value.name for value in lifted.graph.inputs][2:] == (["token_types"] if types else [])


@pytest.mark.parametrize("shape", [[], ["kinds", "rows", "seq"], [1, 1, "rows", "seq"], None])
def test_positions_of_other_shapes_are_given_as_any_array(shape: list[int | str] | None, tmp_path: Path) -> None:
    g = Nodes({**IDS, "position_ids": ("int64", shape or [])})  # type: ignore[dict-item]
    model = g.model(g.add("Identity", "position_ids"), g.add("Gather", TABLE, "input_ids"))
    if shape is None:
        model.graph.input[1].type.tensor_type.ClearField("shape")
        with pytest.raises(FrontendError, match="'position_ids' has no shape"):
            lift(write(model, tmp_path / "m.onnx"))
        return
    lifted = lift(write(model, tmp_path / "m.onnx"))
    assert lifted.task == "run" and "'position_ids' has no meaning that is known for text" in lifted.notes[0]


def test_a_past_is_empty_whatever_stands_before_the_ids(tmp_path: Path) -> None:
    """Its batch is called as that of the ids; the mask's has another name."""
    past = "past_key_values.0.key"
    g = Nodes({"attention_mask": ("int64", ["other", "total"]), **IDS, past: PAST[past]})  # type: ignore[dict-item]
    length = g.add("Cast", g.add("Gather", g.add("Shape", past), np.int64(2)), to=TensorProto.FLOAT)
    mean = g.add("Unsqueeze", g.add("Cast", "attention_mask", to=TensorProto.FLOAT), np.array([-1]))
    x = g.add("Add", g.add("Add", g.add("Gather", TABLE, "input_ids"), length), mean)
    path = saved(tmp_path, g, named(g, x, "last_hidden_state"))
    empty = np.zeros((1, 2, 0, 4), np.float32)
    require_same(path, lambda size: {"attention_mask": np.ones((1, size), np.int64), past: empty})


def test_a_model_of_keys_and_values_alone_computes_nothing(tmp_path: Path) -> None:
    g = Nodes({**IDS, **PAST})  # type: ignore[dict-item]
    with pytest.raises(FrontendError, match="no output but keys and values"):
        lift(saved(tmp_path, g, named(g, "past_key_values.0.key", "present.0.key")))


def test_a_decoder_has_no_types_of_tokens(tmp_path: Path) -> None:
    """A text that goes on is one piece: the types of its tokens are 0, and are no input."""
    g = Nodes({**IDS, "token_type_ids": ("int64", ["rows", "seq"])})  # type: ignore[dict-item]
    x = g.add("Add", g.add("Gather", TABLE, "input_ids"), g.add("Gather", TABLE[:2] + 1, "token_type_ids"))
    x = g.add("MatMul", x, RNG.standard_normal((WIDTH, VOCABULARY)).astype(np.float32))
    path = saved(tmp_path, g, named(g, x, "logits"), architectures=["OwnForCausalLM"])
    lifted = require_same(path, lambda size: {"token_type_ids": np.zeros((1, size), np.int64)})
    assert lifted.task == "generate" and [value.name for value in lifted.graph.inputs] == ["ids", "positions"]


# Decoders and encoders


def decoder_or_not(
    tmp_path: Path, widths: dict[str, int], classes: Sequence[str] = (), past: bool = False, rows: int = VOCABULARY,
    last: bool = False, alone: bool = False,
) -> Lifted:  # fmt: skip
    """A model with rows of some widths.

    rows: of its table of words. last: of the last token only. alone: without an axis of tokens.
    """
    g = Nodes({**IDS, **(PAST if past else {})})  # type: ignore[dict-item]
    x = g.add("Gather", RNG.standard_normal((rows, WIDTH)).astype(np.float32), "input_ids")
    if last:
        x = g.add("Slice", x, np.array([-1]), np.array([1 << 40]), np.array([1]))
    if alone:
        x = g.add("Squeeze", x, np.array([1]))
    outputs = [
        named(g, g.add("MatMul", x, RNG.standard_normal((WIDTH, width)).astype(np.float32)), name)
        for name, width in widths.items()
    ]
    return lift(saved(tmp_path, g, *outputs, **({"architectures": list(classes)} if classes else {})))


@pytest.mark.parametrize("name", ["OwnForCausalLM", "OwnLMHeadModel"])
@pytest.mark.parametrize("width", [VOCABULARY, VOCABULARY + 24])
def test_a_decoder_by_its_class(name: str, width: int, tmp_path: Path) -> None:
    lifted = decoder_or_not(tmp_path, {"logits": width}, ["OwnModel", name])
    assert (lifted.task, lifted.vocab_size, lifted.otherwise) == ("generate", width, None)


@pytest.mark.parametrize("classes", [(), ("OwnForMaskedLM",)])
def test_a_decoder_by_its_cache(classes: Sequence[str], tmp_path: Path) -> None:
    lifted = decoder_or_not(tmp_path, {"logits": VOCABULARY}, classes, past=True)
    assert (lifted.task, lifted.otherwise) == ("generate", None)


@pytest.mark.parametrize("name", ["OwnForMaskedLM", "OwnForPreTraining"])
def test_an_encoder_by_its_class(name: str, tmp_path: Path) -> None:
    lifted = decoder_or_not(tmp_path, {"logits": VOCABULARY}, [name])
    assert (lifted.task, lifted.otherwise) == ("encode", None)


@pytest.mark.parametrize("classes", [(), ("OwnModel",)])
@pytest.mark.parametrize("output", ["logits", "scores"])
def test_where_the_files_do_not_say_it_may_be_an_encoder(output: str, classes: Sequence[str], tmp_path: Path) -> None:
    lifted = decoder_or_not(tmp_path, {output: VOCABULARY}, classes)
    assert lifted.task == "generate" and lifted.otherwise is not None
    other = lifted.otherwise()
    assert (other.task, other.otherwise, other.vocab_size) == ("encode", None, VOCABULARY)


@pytest.mark.parametrize("widths", [{"logits": VOCABULARY - 1}, {"scores": VOCABULARY, "logits": 3}])
def test_a_row_that_is_narrower_than_the_vocabulary_is_no_next_token(widths: dict[str, int], tmp_path: Path) -> None:
    assert decoder_or_not(tmp_path, widths, ["OwnForCausalLM"]).task == "encode"
    assert decoder_or_not(tmp_path, widths, past=True).task == "encode"


def test_the_next_token_is_no_first_output_perhaps(tmp_path: Path) -> None:
    lifted = decoder_or_not(tmp_path, {"features": 3, "scores": VOCABULARY}, ["OwnForCausalLM"])
    assert (lifted.task, lifted.graph.output("logits").shape[2]) == ("generate", VOCABULARY)


def test_a_vocabulary_of_one_token(tmp_path: Path) -> None:
    lifted = decoder_or_not(tmp_path, {"logits": 1}, ["OwnForCausalLM"], rows=1)
    assert (lifted.task, lifted.vocab_size) == ("generate", 1)


def test_the_next_token_after_some_tokens_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match=r"gives logits \[1, 1, 40\] of some tokens only: export the model with"):
        decoder_or_not(tmp_path, {"logits": VOCABULARY}, past=True, last=True)
    assert decoder_or_not(tmp_path, {"logits": VOCABULARY}, last=True).task == "encode"
    assert decoder_or_not(tmp_path, {"logits": VOCABULARY - 1}, past=True, last=True).task == "encode"
    assert decoder_or_not(tmp_path, {"scores": VOCABULARY}, past=True, last=True).task == "encode"
    assert decoder_or_not(tmp_path, {"logits": VOCABULARY}, past=True, last=True, alone=True).task == "encode"


def test_rows_of_nothing_are_no_next_token(tmp_path: Path) -> None:
    """Where no table says how many words there are."""
    g = Nodes(IDS)  # type: ignore[arg-type]
    x = g.add("Unsqueeze", g.add("Cast", "input_ids", to=TensorProto.FLOAT), np.array([-1]))
    nothing = g.add("MatMul", x, np.zeros((1, 0), np.float32))
    path = saved(tmp_path, g, named(g, nothing, "logits"), architectures=["OwnForCausalLM"])
    assert lift(path).task == "encode"


# Facts


def test_what_the_config_says_of_a_model(tmp_path: Path) -> None:
    g = Nodes(IDS)  # type: ignore[arg-type]
    x = named(g, g.add("Gather", TABLE, "input_ids"), "last_hidden_state")
    path = saved(tmp_path, g, x, model_type="own", n_layer=5, n_positions=30)
    lifted = lift(path, max_context=7)
    assert (lifted.architecture, lifted.layers, lifted.max_positions, lifted.max_context) == ("own", 5, 30, 7)
    lifted = lift(saved(tmp_path, g, x), max_context=7)
    assert (lifted.architecture, lifted.layers, lifted.max_positions, lifted.max_context) == ("onnx", 0, 7, 7)


@pytest.mark.parametrize(("softmaxes", "past", "layers"), [(0, False, 0), (2, False, 2), (0, True, 3), (2, True, 2)])
def test_layers_are_counted_where_no_config_says(softmaxes: int, past: bool, layers: int, tmp_path: Path) -> None:
    g = Nodes({**IDS, **(PAST if past else {})})  # type: ignore[dict-item]
    x = g.add("Gather", TABLE, "input_ids")
    for _ in range(softmaxes):
        x = g.add("Softmax", x, axis=-1)
    assert lift(saved(tmp_path, g, named(g, x, "last_hidden_state"))).layers == layers


def test_that_padding_is_a_token_like_any_other_is_said(tmp_path: Path) -> None:
    g = Nodes(IDS)  # type: ignore[arg-type]
    there = g.add("Cast", g.add("Not", g.add("Equal", "input_ids", np.int64(1))), to=TensorProto.FLOAT)
    x = g.add("Mul", g.add("Gather", TABLE, "input_ids"), g.add("Unsqueeze", there, np.array([-1])))
    x = named(g, x, "last_hidden_state")
    notes = " ".join(lift(saved(tmp_path, g, x, pad_token_id=1)).notes)
    assert "token 1 is padding to this model, and texts are computed without padding" in notes
    assert "padding" not in " ".join(lift(saved(tmp_path, g, x, pad_token_id=2)).notes)


def test_a_graph_of_arrays_has_no_facts_of_texts(tmp_path: Path) -> None:
    g = Nodes({"x": ("float32", ["n", 3])})
    lifted = lift(saved(tmp_path, g, g.add("Relu", "x")))
    assert lifted.task == "run" and lifted.notes == () and lifted.architecture == "onnx"
    assert (lifted.vocab_size, lifted.layers, lifted.max_positions, lifted.max_context) == (0, 0, 0, 0)
