"""A lifted encoder computes what transformers computes, for every family and head that we know how to make."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from tiny_encoders import ENCODERS, HEADS, VOCAB, make_encoder
from tiny_models import BASE, randomize

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.llm import Attention, PagedAttention
from llmc.compiler.ir.structural import GatherElements
from llmc.compiler.ir.types import precise
from llmc.compiler.ir.verify import verify
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.errors import FrontendError
from llmc.frontends.hf.lift import lift
from llmc.frontends.hf.sentence import activation_of_scores
from llmc.frontends.lifted import ENCODE, Lifted
from llmc.runtime.encoding import activated

Array = np.ndarray
# Two f32 evaluations of values of size about 1, whose products are summed in different orders.
TOLERANCE = 2e-5
EXACT = 1e-5  # in f64; what a model itself does in f32, such as rotary angles, remains
# The shortest, odd ones, and beyond every window.
SIZES = (2, 7, 33, 129)


@cache
def directory_of(family: str, head: str = "") -> Path:
    return make_encoder(family, hf_models._root / f"encoder-{family}-{head}", head)


@cache
def lifted_encoder(family: str, head: str = "") -> Lifted:
    return lift(directory_of(family, head))


@cache
def reference(family: str, head: str = "") -> torch.nn.Module:
    auto = getattr(transformers, f"AutoModelFor{head}") if head else transformers.AutoModel
    model: torch.nn.Module = auto.from_pretrained(directory_of(family, head), dtype=torch.float32).eval()
    return model


def inputs_of(lifted: Lifted, size: int) -> dict[str, Array]:
    """A sequence of random ids, padding's own among them, of two texts where the model tells texts apart."""
    ids = np.random.default_rng(size).integers(0, VOCAB, (1, size)).astype(np.int32)
    ids[ids == lifted.config.get("pad_token_id")] = VOCAB - 1
    found = {"ids": ids, "positions": np.arange(size, dtype=np.int32)[None]}
    if any(value.name == "token_types" for value in lifted.graph.inputs):
        found["token_types"] = (np.arange(size, dtype=np.int32) > size // 2).astype(np.int32)[None]
    return found


def outputs_of(model: torch.nn.Module, inputs: dict[str, Array]) -> dict[str, Array]:
    """What transformers returns, by name."""
    arguments = {"ids": "input_ids", "token_types": "token_type_ids"}
    given = {arguments[name]: torch.from_numpy(value).long() for name, value in inputs.items() if name in arguments}
    with torch.no_grad():
        returned = model(**given)
    return {name: value.numpy() for name, value in returned.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("family", ENCODERS)
def test_outputs_are_transformers(family: str) -> None:
    check(family)


@pytest.mark.parametrize("head", HEADS[1:])
def test_outputs_of_heads_are_transformers(head: str) -> None:
    check("distilbert", head)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("family", ENCODERS)
def test_outputs_of_every_head_are_transformers(family: str, head: str) -> None:
    check(family, head)


def check(family: str, head: str = "") -> None:
    """Both sides in f64, so that the orders of their sums do not matter."""
    lifted, model = lifted_encoder(family, head), copy.deepcopy(reference(family, head)).double()
    verify(lifted.graph)
    assert lifted.task == ENCODE
    for size in SIZES:
        inputs = inputs_of(lifted, size)
        expected = outputs_of(model, inputs)
        if not head:
            expected["embedding"] = expected["last_hidden_state"].mean(axis=1)
        with precise():
            found = evaluate(lifted.graph, inputs, lifted.load)
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=EXACT, rtol=EXACT, err_msg=f"{name}, {size}")
            assert value.std() > 0.02  # a wrong lift must not pass because all values are alike


@pytest.mark.parametrize("family", sorted(set(ENCODERS) - {"mpnet"}))
def test_attention_is_captured_and_sees_both_sides(family: str) -> None:
    lifted = lifted_encoder(family)
    captured = [op for op in lifted.graph.ops if isinstance(op, Attention)]
    assert len(captured) == lifted.layers
    assert not any(op.causal for op in captured)
    assert not any("attention" in note for note in lifted.notes)


@pytest.mark.parametrize("family", ENCODERS)
def test_tokens_of_any_mixture_of_texts_are_one_step(family: str) -> None:
    """Every family goes through the passes to attention over its own tokens, MPNet's too, which is not captured."""
    lifted = lifted_encoder(family)
    options = CompileOptions(quantization="none")
    graph = run_pipeline(lifted.graph, options, load=lifted.load, task=ENCODE).graph
    attention = [op for op in graph.ops if isinstance(op, PagedAttention)]
    assert len(attention) == lifted.layers and not any(op.causal for op in attention)
    assert {str(dict(graph.outputs)[name].shape[0]) for name in ("last_hidden_state", "embedding")} == {"T", "B"}
    assert not any(isinstance(op, GatherElements) for op in graph.ops)  # token types that are all 0 cost nothing


def test_windows_reach_to_both_sides() -> None:
    """ModernBERT's local layers see `local_attention` / 2 tokens before and behind; its third layer sees all."""
    captured = [op for op in lifted_encoder("modernbert").graph.ops if isinstance(op, Attention)]
    assert [op.window for op in captured] == [0, 5, 5]


@pytest.mark.parametrize(("family", "most"), [("bert", 160), ("roberta", 160), ("mpnet", 160), ("modernbert", 160)])
def test_a_table_of_positions_says_how_long_a_text_may_be(family: str, most: int) -> None:
    """RoBERTa's and MPNet's tables of 162 rows begin with two that no token of a text has."""
    lifted = lifted_encoder(family)
    (symbol,) = lifted.graph.symbols
    assert (symbol.low, symbol.high, lifted.max_context) == (2, most, most)
    assert not any("at most" in note for note in lifted.notes)


def test_a_context_beyond_the_table_is_cut_and_noted() -> None:
    lifted = lift(directory_of("roberta"), max_context=500)
    assert lifted.max_context == 160
    assert any("160 tokens at most" in note for note in lifted.notes)


def test_token_types_are_an_input_where_the_model_has_several() -> None:
    inputs = {name: [v.name for v in lifted_encoder(name).graph.inputs] for name in ("bert", "roberta", "distilbert")}
    assert inputs == {
        "bert": ["ids", "positions", "token_types"],
        "roberta": ["ids", "positions"],
        "distilbert": ["ids", "positions"],
    }


def test_a_tokenizer_without_token_types_leaves_the_model_its_own(tmp_path: Path) -> None:
    """transformers then gives the model none, which means zeros, for the second text of a pair too."""
    path = make_encoder("bert", tmp_path / "m")
    change(path / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    lifted = lift(path)
    assert [value.name for value in lifted.graph.inputs] == ["ids", "positions"]
    assert lifted.text.facts is not None and lifted.text.facts["token_types"] == 0
    inputs = inputs_of(lifted, 9)
    found = evaluate(lifted.graph, inputs, lifted.load)["last_hidden_state"]
    expected = outputs_of(reference("bert"), inputs)["last_hidden_state"]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("head", ["", "TokenClassification", "MaskedLM", "QuestionAnswering", "NextSentencePrediction"])
def test_token_types_do_not_depend_on_the_head(head: str) -> None:
    """Also for a head whose output has no use that llmc knows: a pair has its types all the same."""
    facts = lifted_encoder("bert", head).text.facts
    assert facts is not None and facts["token_types"] == 2


def test_facts_of_a_classifier(tmp_path: Path) -> None:
    labels = {0: "bad", 1: "so so", 2: "good"}
    path = make_encoder("bert", tmp_path / "m", "SequenceClassification", id2label=labels, num_labels=3)
    assert lift(path).encoder == {
        "kind": "classification",
        "output": "logits",
        "labels": ["bad", "so so", "good"],
        "multi_label": False,
        "plain_scores": False,
        "max_tokens": 160,
        "prompts": {},
        "default_prompt": None,
        "normalized": False,
    }


def test_facts_of_other_heads() -> None:
    tokens = lifted_encoder("distilbert", "TokenClassification").encoder
    assert tokens is not None
    assert (tokens["kind"], tokens["labels"]) == ("tokens", ["LABEL_0", "LABEL_1"])
    assert lifted_encoder("distilbert", "MaskedLM").encoder is None
    bare = lifted_encoder("distilbert").encoder
    assert bare is not None and (bare["kind"], bare["output"], bare["normalized"]) == ("embedding", "embedding", False)


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        *((kind, width) for kind in (None, "regression", "multi_label_classification") for width in (1, 3)),
        ("single_label_classification", 3),
    ],
)
def test_scores_are_those_of_the_pipeline(kind: str | None, width: int) -> None:
    config = transformers.BertConfig(num_labels=width, problem_type=kind)
    logits = np.linspace(-1, 2, width, dtype=np.float32)
    pipeline: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    outputs = {"logits": torch.from_numpy(logits)[None]}
    scores = transformers.TextClassificationPipeline.postprocess(pipeline, outputs, top_k=None, _legacy=False)
    found = activated(logits, activation_of_scores(vars(config), width, "config.json"))
    assert sorted(entry["score"] for entry in scores) == pytest.approx(sorted(found.tolist()), abs=1e-6)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("named", [None, "Sigmoid", "Identity"])
@pytest.mark.parametrize("old", [False, True])
def test_scores_are_those_of_the_cross_encoder(named: str | None, old: bool, width: int) -> None:
    """Without modules.json: where config.json is one of that library."""
    full = None if named is None else f"torch.nn.modules.activation.{named}"
    config: dict[str, Any] = {"sentence_transformers": {"version": "5", **({"activation_fn": full} if full else {})}}
    if old and full:
        config = {"sbert_ce_default_activation_function": full}
    own: Any = SimpleNamespace(
        config=SimpleNamespace(**config),
        num_labels=width,
        _resolve_activation_fn=lambda path: getattr(torch.nn, named)(),
    )
    wanted = sentence_transformers.CrossEncoder.get_default_activation_fn(own)
    found = activation_of_scores(config, width, "config.json")
    logits = torch.linspace(-1, 2, width)
    np.testing.assert_allclose(activated(logits.numpy(), found), wanted(logits).numpy(), atol=1e-6)


def test_an_activation_of_scores_that_is_not_known_is_refused() -> None:
    for key in ("activation_fn", "sbert_ce_default_activation_function"):
        config = (
            {key: "torch.nn.Tanh"} if key.startswith("sbert") else {"sentence_transformers": {key: "torch.nn.Tanh"}}
        )
        with pytest.raises(FrontendError, match=r"config\.json: the activation 'torch\.nn\.Tanh'"):
            activation_of_scores(config, 1, "config.json")


def test_without_architectures_a_model_with_a_masked_head_is_an_encoder(tmp_path: Path) -> None:
    path = make_encoder("bert", tmp_path / "m")
    change(path / "config.json", architectures=None)
    assert [name for name, _ in lift(path).graph.outputs] == ["last_hidden_state", "pooler_output", "embedding"]


def test_a_checkpoint_without_the_pooler_has_the_other_outputs(tmp_path: Path) -> None:
    """As of a masked language model: the pooler's weights would be noise."""
    path = make_encoder("bert", tmp_path / "m", "MaskedLM")
    change(path / "config.json", architectures=["BertModel"])
    lifted = lift(path)
    assert [name for name, _ in lifted.graph.outputs] == ["last_hidden_state", "embedding"]
    expected = outputs_of(transformers.AutoModel.from_pretrained(path).eval(), inputs_of(lifted, 7))
    found = evaluate(lifted.graph, inputs_of(lifted, 7), lifted.load)
    np.testing.assert_allclose(found["last_hidden_state"], expected["last_hidden_state"], atol=TOLERANCE)


def test_a_checkpoint_without_the_head_is_refused(tmp_path: Path) -> None:
    path = make_encoder("bert", tmp_path / "m")
    change(path / "config.json", architectures=["BertForSequenceClassification"])
    with pytest.raises(FrontendError, match=r"missing: classifier\.bias, classifier\.weight"):
        lift(path)


def test_a_classifier_of_decoder_layers(tmp_path: Path) -> None:
    """Its logits are those of the last token, whatever padding the config names."""
    settings = {key: value for key, value in BASE.items() if key != "pad_token_id"}
    config = transformers.AutoConfig.for_model("llama", **settings, num_labels=3, pad_token_id=4)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    lifted = lift(tmp_path)
    assert lifted.task == ENCODE and all(op.causal for op in lifted.graph.ops if isinstance(op, Attention))
    for size in SIZES[:-1]:
        inputs = inputs_of(lifted, size)
        inputs["ids"][inputs["ids"] == 4] = 5
        found = evaluate(lifted.graph, inputs, lifted.load)["logits"]
        np.testing.assert_allclose(found, outputs_of(model, inputs)["logits"], atol=TOLERANCE, rtol=TOLERANCE)


def test_several_choices_are_refused(tmp_path: Path) -> None:
    path = make_encoder("bert", tmp_path / "m", "MultipleChoice")
    with pytest.raises(FrontendError, match="several texts a question"):
        lift(path)


def change(path: Path, **settings: object) -> None:
    """Write settings into a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.mark.parametrize("parts", [["c2p"], ["p2c", "c2p"]])
def test_distances_in_buckets_are_deberta_s(parts: list[str], tmp_path: Path) -> None:
    """DeBERTa 3: far distances share a bucket, by a logarithm that is rounded up."""
    settings = {"position_buckets": 16, "relative_attention": True, "share_att_key": True, "pos_att_type": parts}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.DebertaV2Config(
        vocab_size=VOCAB, max_position_embeddings=64, type_vocab_size=0, position_biased_input=False,
        norm_rel_ebd="layer_norm", **shape, **settings,
    )  # fmt: skip
    model = transformers.DebertaV2Model(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    lifted = lift(tmp_path)
    for size in (1, 9, 33, 64):
        inputs = inputs_of(lifted, size)
        found = evaluate(lifted.graph, inputs, lifted.load)["last_hidden_state"]
        np.testing.assert_allclose(found, outputs_of(model, inputs)["last_hidden_state"], atol=TOLERANCE)


@pytest.mark.parametrize(("family", "first"), [("roberta", 2), ("bert", 0)])
def test_where_a_decoder_of_an_encoder_s_kind_begins_to_count_is_told(family: str, first: int, tmp_path: Path) -> None:
    """transformers' generate gives it positions from 0, whatever it does by itself."""
    path = make_encoder(family, tmp_path / "m", "CausalLM", is_decoder=True)
    lifted, model = lift(path), transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    told = [note for note in lifted.notes if "positions begin at 0" in note]
    assert told == ([f"positions begin at 0, as in transformers' generate: the model by itself counts from {first}"]
                    if first else [])  # fmt: skip
    ids = np.arange(5, 12, dtype=np.int32)[None]
    positions = np.arange(7, dtype=np.int32)[None]
    found = evaluate(lifted.graph, {"ids": ids, "positions": positions}, lifted.load)["logits"]
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids).long(), position_ids=torch.from_numpy(positions).long()).logits
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
