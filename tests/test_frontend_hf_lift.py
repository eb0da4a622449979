"""What is decided around a model's trace: contexts, weights, names and notes. No model is traced here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_models import tiny

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param
from llmc.compiler.ir.types import Tensor, dtype_of
from llmc.errors import FrontendError
from llmc.frontends.hf import lift as lifting
from llmc.frontends.hf.classes import BASE, CAUSAL, SEQUENCES, ModelClass
from llmc.frontends.hf.lift import Opened, check_options, lift, lift_opened
from llmc.frontends.hf.pooling import SENTENCE, TOKEN_EMBEDDINGS, LayerNormalize, Pooling
from llmc.frontends.hf.trace import Traced
from llmc.frontends.lifted import ENCODE, GENERATE, Lifted, Text, WeightSource
from llmc.frontends.stored_integers import Part, StoredIntegers
from llmc.frontends.weight_sources import ArrayWeights, RandomWeights

X, W, B = Input("x", Tensor((2,), "f32")), Param("w", Tensor((2,), "f32")), Param("b", Tensor((2,), "f32"))


@pytest.mark.parametrize(
    ("context", "weights", "message"),
    [
        (2, "random", "max context is 2: at least 3 tokens are needed"),
        (-3, "checkpoint", "max context is -3"),
        (None, "none", "weights must be 'checkpoint' or 'random', not 'none'"),
    ],
)
def test_options_that_make_no_sense_are_refused(context: int | None, weights: str, message: str) -> None:
    with pytest.raises(FrontendError, match=message):
        check_options(context, weights)
    with pytest.raises(FrontendError, match=message):
        lift("no model is asked for", max_context=context, weights=weights)


def test_the_least_that_may_be_asked_for() -> None:
    check_options(3, "random")
    check_options(None, "checkpoint")


# What is read before a model is built.


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `lift` has read when it would build the model."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(lifting, "lift_opened", lambda *given: found.append(given))
    return found


def test_a_directorys_files_are_read_first(opened: list[tuple[Any, ...]]) -> None:
    directory = tiny("llama")
    lift(directory, max_context=64, seed=3)
    lift(directory, weights="random")
    (first, context, seed), (second, other_context, other_seed) = opened
    assert (context, seed, other_context, other_seed) == (64, 3, None, 0)
    assert (first.kind.task, first.plan, first.name, first.notes) == (GENERATE, None, "llama", ())
    assert "model.norm.weight" in first.weights.names and second.weights is None
    assert first.text().facts["eos_token"] == "</s>"


LIBRARY = "sentence_transformers.models."


@pytest.mark.parametrize(
    ("task", "modules", "head"), [("feature-extraction", 1, BASE), ("sequence-classification", 0, SEQUENCES)]
)
def test_a_sentence_model_is_without_a_head_unless_it_scores(
    task: str, modules: int, head: str, opened: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 9}
    entries = [("Transformer", ""), ("Pooling", "1_Pooling")][: 1 + modules]
    (tmp_path / "1_Pooling").mkdir()
    for name, content in (
        ("config.json", config), ("sentence_bert_config.json", {"transformer_task": task}),
        ("1_Pooling/config.json", {}),
        ("modules.json", [{"type": LIBRARY + kind, "path": path} for kind, path in entries]),
    ):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    lift(tmp_path, weights="random")
    ((made, _, _),) = opened
    assert (made.kind.task, made.kind.head, len(made.plan.modules)) == (ENCODE, head, modules)


def test_random_weights_are_those_of_the_model_that_was_quantized(
    opened: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "vocab_size": 9, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lift(tmp_path, weights="random")
    ((made, _, _),) = opened
    assert made.weights is None and made.notes == ()


def test_adapters_are_merged_into_weights_that_there_are(opened: list[tuple[Any, ...]], tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match="--lora changes the checkpoint's weights, and not --weights random"):
        lift(tiny("llama"), weights="random", lora=[tmp_path])
    with pytest.raises(FrontendError, match=r"adapter_config\.json"):
        lift(tiny("llama"), lora=[tmp_path])
    assert not opened


@pytest.mark.parametrize(
    ("source", "name"),
    [("org/name", "name"), ("org/name@revision", "name"), ("name", "name"), ("org/name@v1/2", "name")],
)
def test_a_model_of_the_hub_has_its_own_name(source: str, name: str, tmp_path: Path) -> None:
    assert lifting._name(source, tmp_path / "0123abcd") == name


def test_a_directory_gives_its_name_through_links(tmp_path: Path) -> None:
    (tmp_path / "model@1").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model@1")
    for source in (tmp_path / "model@1", str(tmp_path / "link")):
        assert lifting._name(source, Path(source)) == "model@1"


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len", "seq_length"])
def test_a_models_positions_by_any_name(name: str) -> None:
    def positions(**settings: object) -> int | None:
        text = SimpleNamespace(**settings)
        config: Any = SimpleNamespace(get_text_config=lambda decoder: text if decoder else None)
        return lifting._max_positions(config)

    assert positions(**{name: 2}) == 2 and positions(**{name: 77}) == 77
    for number in (1, 0, -1, True, 77.0, "77", None):
        assert positions(**{name: number}) is None
        assert positions(**{"seq_length": 9, name: number}) == (None if name == "seq_length" else 9)
    assert positions() is None
    assert positions(max_position_embeddings=5, n_positions=6, max_seq_len=7, seq_length=8) == 5


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f32"), (torch.float64, "f32"), (None, "f32"),
        ({"": torch.bfloat16, "vision": torch.float16}, "bf16"), ({"vision": torch.float16}, "f32"),
    ],
)  # fmt: skip
def test_random_weights_have_the_checkpoints_dtype(dtype: object, name: str) -> None:
    assert lifting._checkpoint_dtype(SimpleNamespace(dtype=dtype)) == name  # type: ignore[arg-type]
    assert lifting._checkpoint_dtype(SimpleNamespace()) == "f32"  # type: ignore[arg-type]


# Building.


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = (torch.nn.Parameter(torch.empty(2, device="meta")) for _ in range(2))


def text(note: str) -> Text:
    return Text(notes=(note,))


class Building:
    """Stands for building, tracing and translating a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.longest, self.room, self.stretches = 1 << 30, None, False
        self.traced: list[tuple[Any, ...]] = []
        self.graph = Graph("model", (X,), (("logits", W), ("other", B)))
        self.stored: list[Any] = []
        monkeypatch.setattr(
            transformers.GPT2Config, "get_text_config", lambda config, decoder=False: config if decoder else None
        )
        monkeypatch.setattr(lifting, "trace", self.trace)
        monkeypatch.setattr(lifting, "translate", self.translate)
        monkeypatch.setattr(lifting, "ModelWeights", self.weights)

    def weights(self, model: torch.nn.Module, checkpoint: WeightSource, partly: bool) -> Any:
        self.stored.append(
            SimpleNamespace(
                notes=["of weights"], missing=["b"] if partly else [], untied=frozenset("w"), names=["w", "b"],
                integers=lambda name: None, turned=(), merged_integers=0, model=model, checkpoint=checkpoint,
            )
        )  # fmt: skip
        return self.stored[-1]

    def trace(
        self, kind: Any, config: Any, context: int, *options: Any, untied: Callable[[Any], Any] | None = None
    ) -> Traced:
        model = Model()
        untied = untied or options[-1]
        assert untied is not None
        self.traced.append((kind, context, options[:-1], untied(model), untied(model)))
        config.dtype = torch.float32  # as building a model does
        exported = SimpleNamespace(longest=min(self.longest, context))
        return Traced(SimpleNamespace(model=model, stretches=self.stretches), exported, self.room, ("of the trace",))  # type: ignore[arg-type]

    def translate(
        self, traced: Traced, source: WeightSource, context: int, finish: object
    ) -> tuple[Graph, WeightSource]:
        self.source, self.context, self.finish = source, context, finish
        return self.graph, source


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> Building:
    return Building(monkeypatch)


DECODER = ModelClass(GENERATE, CAUSAL, None, True)
CHECKPOINT = ArrayWeights({"w": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})


def built(
    positions: int | None = 64, context: int | None = None, weights: WeightSource | None = CHECKPOINT, plan: Any = None
) -> Lifted:
    config = transformers.GPT2Config(n_positions=positions or 1, vocab_size=9, n_layer=3, dtype="bfloat16")
    task = GENERATE if plan is None else ENCODE
    kind = ModelClass(task, CAUSAL, None, True)
    opened = Opened(config, kind, weights, "tiny", lambda: text("of text"), plan, ("of files",), {"w": "int8"})
    return lift_opened(opened, context, 5)


@pytest.mark.parametrize(
    ("positions", "asked", "room", "longest", "context", "most", "notes"),
    [
        (64, None, None, 999, 64, 64, ()),  # the model's own limit
        (None, None, None, 9999, 2048, 2048, ()),
        (None, 100, None, 999, 100, 100, ()),
        (64, 32, None, 999, 32, 64, ()),
        (64, None, None, 63, 63, 64, ("63 tokens at most",)),
        (None, None, None, 63, 63, 63, ("63 tokens at most",)),
        (64, 100, None, 63, 63, 64, ("63 tokens at most",)),
        (64, 100, None, 999, 100, 64, ("made for 64 positions: of 100, the later",)),
        (66, None, 64, 64, 64, 64, ()),  # a table with less room than the config says
        (66, 66, 64, 64, 64, 64, ("64 tokens at most",)),
        (66, None, 64, 63, 63, 64, ("63 tokens at most",)),
        (None, None, 64, 64, 64, 64, ()),
        (64, None, 70, 64, 64, 64, ()),
    ],
)
def test_how_many_tokens_a_model_is_compiled_for(
    positions: int | None, asked: int | None, room: int | None, longest: int, context: int, most: int,
    notes: tuple[str, ...], building: Building,
) -> None:  # fmt: skip
    building.longest, building.room = longest, room  # type: ignore[assignment]
    lifted = built(positions, asked)
    assert (lifted.max_context, building.context, lifted.max_positions) == (context, context, most)
    own = [note for note in lifted.notes if not note.startswith("of ")]
    assert len(own) == len(notes) and all(said in note for said, note in zip(notes, own, strict=True))


def test_a_model_whose_frequencies_stretch_makes_sense_of_more_positions(building: Building) -> None:
    building.stretches = True
    lifted = built(64, 100)
    assert (lifted.max_context, lifted.max_positions) == (100, 64)
    assert not any("made for" in note for note in lifted.notes)


def test_facts_and_notes_of_a_decoder(building: Building) -> None:
    lifted = built()
    assert (lifted.name, lifted.architecture, lifted.task, lifted.encoder) == ("tiny", "gpt2", GENERATE, None)
    assert (lifted.vocab_size, lifted.layers, lifted.parameters, lifted.least) == (9, 3, 4, {"w": "int8"})
    assert lifted.notes == ("of files", "of the trace", "of weights", "of text")
    assert lifted.config["n_layer"] == 3 and lifted.text == text("of text")
    assert lifted.graph is building.graph and building.finish is None
    # The weights are those of the model that was built last.
    assert lifted.weights is building.source is building.stored[-1]
    ((kind, context, options, first, second),) = building.traced
    assert (kind.task, context, options, first, second) == (GENERATE, 64, (), frozenset("w"), frozenset("w"))


def test_random_weights_are_of_the_models_shapes_and_dtype(building: Building) -> None:
    """The dtype is the config's own, which building the model changes."""
    lifted = built(weights=None)
    assert isinstance(lifted.weights, RandomWeights) and not building.stored
    assert {name: (lifted.weights.shape(name), lifted.weights.dtype(name)) for name in lifted.weights.names} == {
        "w": ((2,), "bf16"), "b": ((2,), "bf16"),
    }  # fmt: skip
    assert lifted.notes == ("of files", "of the trace", "of text")
    assert building.traced[0][3] == frozenset()


MODULE = LayerNormalize("1_LayerNorm", Path(), SENTENCE, SENTENCE, {"1_LayerNorm.norm.weight": (7,)})
PLAN: Any = SimpleNamespace(
    token_types=True, outputs=("a",), finish=lambda *given: {},
    modules=(Pooling("", Path(), TOKEN_EMBEDDINGS, SENTENCE),),
    text=SimpleNamespace(text=text("of the encoder's text")), notes=("of the plan",),
    facts=lambda config, outputs, context: {"outputs": list(outputs), "most": context},
)  # fmt: skip


def test_facts_and_notes_of_an_encoder(building: Building) -> None:
    """Outputs whose weights its checkpoint lacks are left out."""
    lifted = built(plan=PLAN)
    assert lifted.encoder == {"outputs": ["logits"], "most": 64} and lifted.task == ENCODE
    assert lifted.notes == ("of files", "of the trace", "of weights", "of the plan")
    assert lifted.text == PLAN.text.text and building.finish is PLAN.finish
    assert building.traced[0][2] == (True, ("a",)) and lifted.parameters == 4


def test_modules_bring_parameters(building: Building, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ArrayWeights({"1_LayerNorm.norm.weight": np.ones(7, np.float32)})
    monkeypatch.setattr(LayerNormalize, "weights", lambda self: own)
    monkeypatch.setattr(PLAN, "modules", (*PLAN.modules, MODULE))
    lifted = built(plan=PLAN)
    assert lifted.parameters == 4 + 7
    np.testing.assert_array_equal(lifted.load("1_LayerNorm.norm.weight"), np.ones(7))
    made = built(plan=PLAN, weights=None).weights
    assert set(made.names) == {"w", "b", "1_LayerNorm.norm.weight"} and made.shape("1_LayerNorm.norm.weight") == (7,)


# Weights that are stored as integers.


def part(array: np.ndarray) -> Part:
    return Part(array.shape, dtype_of(array.dtype), lambda: array)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("merged", [0, 3])
def test_weights_that_are_integers_stay_integers(turned: bool, merged: int) -> None:
    """Of the checkpoint's weights alone; other params, such as modules' own, have no integers."""
    q, scales = np.array([[1, -2, 3], [4, 5, -6]], np.int8), np.array([[0.5], [2.0]], np.float32)
    integers = StoredIntegers(part(q), part(scales), None, 0, 8, "of 8 bits")
    shape = (3, 2) if turned else (2, 3)
    wide, own = Param("wide", Tensor(shape, "f32")), Param("own", Tensor((2,), "f32"))
    graph = Graph("g", (), (("wide", wide), ("w", W), ("own", own)))
    stored: Any = SimpleNamespace(
        names=["wide", "w"], integers={"wide": integers, "w": None}.__getitem__,
        turned=("wide",) if turned else (), merged_integers=merged,
    )  # fmt: skip
    source = ArrayWeights({name: np.ones(2, np.float32) for name in ("w", "own")})
    made, weights, notes = lifting._with_integers(graph, source, stored)
    found = evaluate(made, {}, weights.load)
    want = q * scales
    np.testing.assert_array_equal(np.asarray(found["wide"]), want.T if turned else want)
    assert {param.name for param in made.params} >= {"w", "own"} and "wide" not in {param.name for param in made.params}
    assert "1 weight of the checkpoint are integers: of 8 bits" in notes[0]
    assert len(notes) == 1 + bool(merged) and all(
        "3 weights of the checkpoint are integers" in note for note in notes[1:]
    )
