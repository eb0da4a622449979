"""What an encoder's tokenizer, config and sentence-transformers directory make of its manifest, without its model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tiny_encoders import write_encoder_tokenizer
from tokenizers import normalizers, processors

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.hf.classes import BASE, OTHER, SEQUENCES, TOKENS, ModelClass
from llmc.frontends.hf.encoder import EncoderPlan, EncoderText, plan_encoder, read_encoder_text
from llmc.frontends.hf.pooling import SENTENCE, TOKEN_EMBEDDINGS, Normalize, Pooling
from llmc.frontends.hf.sentence import EMBED, SCORE, Sentence
from llmc.frontends.lifted import ENCODE, Text
from llmc.frontends.weight_sources import ArrayWeights

CONFIG = transformers.BertConfig(vocab_size=320)


def written(directory: Path, kind: str = "bert", around: Any = None, **settings: object) -> Path:
    """A tokenizer's directory. around: another post-processor. settings: of its tokenizer_config.json; None: none."""
    directory.mkdir(exist_ok=True)
    write_encoder_tokenizer(directory, kind)
    if around is not None:
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.post_processor = around
        tokenizer.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    merged = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))
    return directory


def encoded(text: EncoderText, *texts: str) -> list[list[int]]:
    tokenizer = text.text.tokenizer()
    return [tokenizer.encode(one).ids for one in texts]


# The tokenizer.


@pytest.mark.parametrize(("kind", "types"), [("bert", True), ("distilbert", False), ("mpnet", False), ("bpe", False)])
def test_a_tokenizer_says_what_it_gives_the_model(kind: str, types: bool, tmp_path: Path) -> None:
    found = read_encoder_text(written(tmp_path, kind), CONFIG)
    assert (found.types, found.several, found.longest) == (types, types, 160)
    assert found.text.facts is not None and found.text.facts["add_bos"] is False
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert encoded(found, "A cat", "") == [theirs("A cat")["input_ids"], theirs("")["input_ids"]]


@pytest.mark.parametrize(
    ("single", "pair", "several"),
    [
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", False),
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]:1", True),
        ("[CLS]:1 $A:1 [SEP]", "[CLS] $A [SEP] $B [SEP]", True),
    ],
)
def test_types_that_are_all_0_are_not_several(single: str, pair: str, several: bool, tmp_path: Path) -> None:
    special = [("[CLS]", 2), ("[SEP]", 3)]
    around = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    found = read_encoder_text(written(tmp_path, around=around), CONFIG)
    assert (found.types, found.several) == (True, several)
    facts = [found.with_types(count).text.facts for count in (0, 2)]
    assert [one and one["token_types"] for one in facts] == [0, 2 if several else 0]


@pytest.mark.parametrize(
    ("limit", "longest"),
    [(None, None), (1, None), (2, 2), ((1 << 28) - 1, (1 << 28) - 1), (1 << 28, None), (512.0, None), (0, None)],
)
def test_how_long_a_tokenizers_texts_may_be(limit: object, longest: int | None, tmp_path: Path) -> None:
    assert read_encoder_text(written(tmp_path, model_max_length=limit), CONFIG).longest == longest


def test_without_a_tokenizer_token_types_are_the_models(tmp_path: Path) -> None:
    found = read_encoder_text(tmp_path, CONFIG)
    assert (found.longest, found.types, found.several, found.text.facts) == (None, True, False, None)
    assert found.text.notes == ("no tokenizer: the artifact takes token ids only",)
    assert found.with_types(2) is found


CASED = normalizers.BertNormalizer(lowercase=False)
NORMALIZERS = {
    "none": None,
    "one": CASED,
    "several": normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("B", "a")]),
    "one that does": normalizers.Lowercase(),
    "one of several": normalizers.Sequence([normalizers.Replace("B", "a"), normalizers.Lowercase()]),
}


@pytest.mark.parametrize("case", NORMALIZERS)
def test_letters_are_made_small_before_all_else(case: str, tmp_path: Path) -> None:
    """Once, as in sentence-transformers, and behind the tokenizer's own steps where one of these does it."""
    written(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.normalizer = NORMALIZERS[case]
    tokenizer.save(str(path))
    large, small = read_encoder_text(tmp_path, CONFIG), read_encoder_text(tmp_path, CONFIG, lower_case=True)
    (cat,) = encoded(small, "CAT SAT")
    assert [cat] == encoded(small, "cat sat") == encoded(large, "cat sat")
    normalizer = json.loads(small.text.files["tokenizer.json"])["normalizer"]
    parts = [part["type"] for part in normalizer.get("normalizers", [normalizer])]
    assert parts.count("Lowercase") == 1
    own = json.loads(path.read_text())["normalizer"] or {"type": "Lowercase"}
    given = [part["type"] for part in own.get("normalizers", [own])]
    assert parts == given if "Lowercase" in given else parts == ["Lowercase", *given]


# How a model is lifted.


def kind(head: str, looks_back: bool = False) -> ModelClass:
    return ModelClass(ENCODE, head, None, looks_back)


def pooled(*modules: type) -> tuple[Any, ...]:
    return tuple(
        module("", Path(), TOKEN_EMBEDDINGS if module is Pooling else SENTENCE, SENTENCE) for module in modules
    )


def sentence(task: str = EMBED, **said: Any) -> Sentence:
    plain = Sentence(Path(), pooled(Pooling), task, None, False, {}, None, notes=("from the directory",))
    return replace(plain, **said)


@pytest.mark.parametrize("known", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("tokenizer", ["bert", "distilbert", ""])
def test_token_types_are_given_where_tokenizer_and_model_have_several(
    tokenizer: str, known: int | None, tmp_path: Path
) -> None:
    config: Any = transformers.DistilBertConfig(vocab_size=320)  # which knows nothing of types
    if known is not None:
        config = transformers.BertConfig(vocab_size=320, type_vocab_size=known)
    config.output_hidden_states = config.output_attentions = True
    directory = written(tmp_path, tokenizer) if tokenizer else tmp_path
    plan = plan_encoder(kind(OTHER), config, directory)
    wanted = tokenizer != "distilbert" and (known or 0) > 1
    assert plan.token_types is wanted
    facts = plan.text.text.facts
    assert (facts is None) == (not tokenizer)
    assert facts is None or facts["token_types"] == (known if wanted else 0)
    assert not config.output_hidden_states and not config.output_attentions


@pytest.mark.parametrize("looks_back", [False, True])
def test_a_model_of_decoder_layers_looks_for_no_padding(looks_back: bool, tmp_path: Path) -> None:
    """Nor does the decoder that is a part of it."""
    part = SimpleNamespace(pad_token_id=5)
    config: Any = SimpleNamespace(pad_token_id=4, get_text_config=lambda decoder: part if decoder else config)
    plan_encoder(kind(SEQUENCES, looks_back), config, tmp_path)
    assert (config.pad_token_id, part.pad_token_id) == ((None, None) if looks_back else (4, 5))


@pytest.mark.parametrize(
    ("known", "head", "padding", "found"),
    [
        (transformers.LlamaForSequenceClassification, SEQUENCES, 5, 5),
        (transformers.LlamaForSequenceClassification, SEQUENCES, None, None),
        (transformers.LlamaForSequenceClassification, SEQUENCES, 320, None),
        (transformers.LlamaForTokenClassification, OTHER, 5, None),
        (transformers.XLNetForSequenceClassification, SEQUENCES, 5, None),  # which takes the last token, whatever it is
    ],
)
def test_padding_at_the_end_of_a_text_is_no_part_of_it(
    known: type, head: str, padding: int | None, found: int | None, tmp_path: Path
) -> None:
    config: Any = transformers.LlamaConfig(vocab_size=320, pad_token_id=padding, num_labels=2)
    plan = plan_encoder(ModelClass(ENCODE, head, known, True), config, tmp_path)
    assert plan.padding == found
    facts = plan.facts(config, {"logits": None}, 99) or {}  # type: ignore[dict-item]
    assert facts.get("padding") == found
    assert plan_encoder(ModelClass(ENCODE, head, known, False), config, tmp_path).padding is None
    config.pad_token_id, config.is_causal = padding, False
    notes = plan_encoder(ModelClass(ENCODE, head, known, True), config, tmp_path).text.text.notes
    assert any("although tokens would see it" in note for note in notes) == (found is not None)


NOTE = "no tokenizer: the artifact takes token ids only"


def test_a_base_model_alone_embeds_by_the_mean(tmp_path: Path) -> None:
    plan = plan_encoder(kind(BASE), CONFIG, tmp_path)
    (module,) = plan.modules
    assert isinstance(module, Pooling) and (module.modes, module.reads) == (("mean",), TOKEN_EMBEDDINGS)
    assert (plan.outputs, plan.sentence, plan.kind) == (None, None, kind(BASE))
    assert plan.notes == (NOTE, "embedding is the mean over tokens: the model does not say how one is made")


@pytest.mark.parametrize("head", [SEQUENCES, TOKENS, OTHER])
def test_a_model_with_a_head_keeps_its_outputs(head: str, tmp_path: Path) -> None:
    plan = plan_encoder(kind(head), CONFIG, tmp_path)
    assert (plan.outputs, plan.modules, plan.sentence, plan.notes) == (None, (), None, (NOTE,))


def test_a_sentence_model_has_its_modules_embedding(tmp_path: Path) -> None:
    own = sentence()
    plan = plan_encoder(kind(BASE), CONFIG, tmp_path, own)
    assert (plan.outputs, plan.modules, plan.sentence) == (("last_hidden_state",), own.modules, own)
    assert plan.notes == (NOTE, "from the directory")


def test_a_cross_encoder_scores_sequences(tmp_path: Path) -> None:
    own = sentence(SCORE, modules=())
    plan = plan_encoder(kind(SEQUENCES), CONFIG, tmp_path, own)
    assert (plan.outputs, plan.modules, plan.sentence, plan.notes) == (None, (), own, (NOTE, "from the directory"))
    for head in (BASE, TOKENS):
        with pytest.raises(FrontendError, match="a cross encoder needs a model class that classifies sequences"):
            plan_encoder(kind(head), CONFIG, tmp_path, own)


@pytest.mark.parametrize("lower_case", [False, True])
def test_a_sentence_model_says_whether_letters_are_made_small(lower_case: bool, tmp_path: Path) -> None:
    plan = plan_encoder(kind(BASE), CONFIG, written(tmp_path, "bpe"), sentence(lower_case=lower_case))
    upper, lower = encoded(plan.text, "CAT", "cat")
    assert (upper == lower) is lower_case


# Outputs and facts.


def plan_of(
    head: str = OTHER, own: Sentence | None = None, modules: Any = (), longest: int | None = None
) -> EncoderPlan:
    return EncoderPlan(kind(head), EncoderText(Text(), longest, False, False), False, None, modules, own, ())


HIDDEN = Input("x", Tensor((1, 3, 2), "f32"))
POSITIONS = Input("positions", Tensor((1, 3), "i32"))
OUTPUTS: Any = {"last_hidden_state": HIDDEN, "pooler_output": POSITIONS}


def test_modules_make_one_embedding_of_the_hidden_states() -> None:
    assert plan_of().finish(OUTPUTS, POSITIONS, ArrayWeights({})) is OUTPUTS
    for own, names in ((None, [*OUTPUTS, "embedding"]), (sentence(), ["embedding"])):
        made = plan_of(BASE, own, pooled(Pooling)).finish(OUTPUTS, POSITIONS, ArrayWeights({}))
        assert list(made) == names
    x = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    graph = Graph("m", (HIDDEN, POSITIONS), (("y", made["embedding"]),))
    given = {"x": x, "positions": np.arange(3, dtype=np.int32)[None]}
    np.testing.assert_array_equal(np.asarray(evaluate(graph, given, lambda name: x)["y"]), x.mean(1))


def facts(plan: EncoderPlan, config: Any = CONFIG, context: int = 100) -> dict[str, Any] | None:
    return plan.facts(config, {**OUTPUTS, "logits": HIDDEN}, context)


def test_what_an_embedding_says() -> None:
    plain = {"kind": "embedding", "output": "embedding", "labels": None, "multi_label": False, "plain_scores": False}
    rest = {"max_tokens": 100, "prompts": {}, "default_prompt": None, "normalized": False}
    assert facts(plan_of(BASE, None, pooled(Pooling))) == plain | rest
    prompts = {"prompts": {"query": "q: "}, "default_prompt": "query"}
    modules = pooled(Pooling, Normalize)
    assert facts(plan_of(BASE, sentence(modules=modules, **prompts), modules)) == (
        plain | rest | prompts | {"normalized": True}
    )


@pytest.mark.parametrize(
    ("said", "longest", "most"),
    [(None, None, 100), (None, 50, 50), (None, 200, 100), (40, 50, 40), (60, 50, 60), (200, 50, 100), (40, None, 40)],
)
def test_the_most_tokens_of_a_text(said: int | None, longest: int | None, most: int) -> None:
    """The directory's number counts more than the tokenizer's, and none more than the context."""
    found = facts(plan_of(BASE, sentence(max_tokens=said), pooled(Pooling), longest))
    assert found is not None and found["max_tokens"] == most
    alone = facts(plan_of(BASE, None, pooled(Pooling), longest))
    assert alone is not None and alone["max_tokens"] == min(longest or 100, 100)


def test_heads_without_a_known_use_say_nothing() -> None:
    assert facts(plan_of(OTHER)) is None
    for head in (SEQUENCES, TOKENS):
        assert plan_of(head).facts(CONFIG, OUTPUTS, 100) is None


@pytest.mark.parametrize(
    ("settings", "own", "multi", "plain"),
    [
        ({"num_labels": 3}, None, False, False),
        ({"num_labels": 1}, None, True, False),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, None, True, False),
        ({"num_labels": 3, "problem_type": "regression"}, None, False, True),
        ({"num_labels": 3}, sentence(SCORE, modules=(), activation="Sigmoid"), True, False),
        ({"num_labels": 3}, sentence(SCORE, modules=()), False, True),
    ],
)
def test_what_a_classifier_says(settings: dict[str, Any], own: Sentence | None, multi: bool, plain: bool) -> None:
    config = transformers.BertConfig(**settings)
    found = facts(plan_of(SEQUENCES, own), config)
    labels = [f"LABEL_{number}" for number in range(settings["num_labels"])]
    assert found is not None
    assert (found["kind"], found["output"], found["labels"]) == ("classification", "logits", labels)
    assert (found["multi_label"], found["plain_scores"]) == (multi, plain)
    tokens = facts(plan_of(TOKENS, own), config)
    assert tokens is not None and (tokens["kind"], tokens["labels"]) == ("tokens", labels)
    assert (tokens["multi_label"], tokens["plain_scores"]) == (False, False)


def test_labels_have_the_configs_names() -> None:
    config: Any = transformers.BertConfig(id2label={0: "bad", 1: "good"})
    found = facts(plan_of(TOKENS), config)
    assert found is not None and found["labels"] == ["bad", "good"]
    config.id2label = {1: "good"}
    assert config.num_labels == 1
    assert facts(plan_of(TOKENS), config)["labels"] == ["LABEL_0"]  # type: ignore[index]
    config.id2label = None
    assert facts(plan_of(TOKENS), config)["labels"] == []  # type: ignore[index]
