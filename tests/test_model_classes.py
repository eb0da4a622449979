"""Which class a config is for: the one that it names where that takes text, else its type's; decoder or encoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf

from llmc.errors import FrontendError
from llmc.frontends.hf import classes
from llmc.frontends.hf.classes import ModelClass, choose_class

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}


def bert(*names: object, **more: object) -> tf.PreTrainedConfig:
    return tf.BertConfig(architectures=list(names), **SMALL, **more)


def llama(*names: object) -> tf.PreTrainedConfig:
    return tf.LlamaConfig(architectures=list(names), **SMALL)


def with_names(names: object) -> tf.PreTrainedConfig:
    config = bert()
    config.architectures = names
    return config


# A config: the task, what stands on the last layer, the class (empty: transformers' causal one), whether it looks back.
CHOSEN: dict[str, tuple[Callable[[], tf.PreTrainedConfig], tuple[str, str, str, bool]]] = {
    "an encoder": (lambda: bert("BertModel"), ("encode", "base", "BertModel", False)),
    "one that scores texts": (
        lambda: bert("BertForSequenceClassification"),
        ("encode", "sequences", "BertForSequenceClassification", False),
    ),
    "one that scores tokens": (
        lambda: bert("BertForTokenClassification"),
        ("encode", "tokens", "BertForTokenClassification", False),
    ),
    "one of another head": (lambda: bert("BertForMaskedLM"), ("encode", "other", "BertForMaskedLM", False)),
    "the first of two names": (
        lambda: bert("BertForMaskedLM", "BertModel"),
        ("encode", "other", "BertForMaskedLM", False),
    ),
    "no name": (bert, ("encode", "base", "BertModel", False)),
    "no list of names": (lambda: with_names("BertForMaskedLM"), ("encode", "base", "BertModel", False)),
    "no names at all": (lambda: with_names(None), ("encode", "base", "BertModel", False)),
    "a number for a name": (lambda: with_names([7]), ("encode", "base", "BertModel", False)),
    "a name that nobody knows": (lambda: bert("BertForNothing"), ("encode", "base", "BertModel", False)),
    "a name of no class": (lambda: bert("a-b"), ("encode", "base", "BertModel", False)),
    "a name of a module": (lambda: bert("models"), ("encode", "base", "BertModel", False)),
    "a name of no model": (lambda: bert("BertConfig"), ("encode", "base", "BertModel", False)),
    "a private name": (lambda: bert("__version__"), ("encode", "base", "BertModel", False)),
    "a model of another type": (lambda: bert("RobertaForMaskedLM"), ("encode", "base", "BertModel", False)),
    "a type of both kinds that never says which it is": (
        lambda: tf.XLMConfig(architectures=["XLMWithLMHeadModel"]),
        ("encode", "other", "XLMWithLMHeadModel", False),
    ),
    "a decoder of both kinds": (
        lambda: bert("BertLMHeadModel", is_decoder=True),
        ("generate", "causal", "", True),
    ),
    "a decoder without a head": (lambda: bert("BertModel", is_decoder=True), ("encode", "base", "BertModel", True)),
    "a decoder": (lambda: llama("LlamaForCausalLM"), ("generate", "causal", "", True)),
    "a decoder that is not named": (llama, ("generate", "causal", "", True)),
    "a decoder that scores": (
        lambda: llama("LlamaForSequenceClassification"),
        ("encode", "sequences", "LlamaForSequenceClassification", True),
    ),
    "a decoder that finds answers": (
        lambda: llama("LlamaForQuestionAnswering"),
        ("encode", "other", "LlamaForQuestionAnswering", True),
    ),
    "a decoder's layers": (lambda: llama("LlamaModel"), ("encode", "base", "LlamaModel", True)),
    "the second class of a type": (
        lambda: tf.FunnelConfig(architectures=["FunnelBaseModel"]),
        ("encode", "base", "FunnelBaseModel", False),
    ),
    "the encoder of a pair": (
        lambda: tf.T5Config(architectures=["T5EncoderModel"], is_encoder_decoder=False),
        ("encode", "base", "T5EncoderModel", False),
    ),
    "the encoder of a pair, with the config of both": (
        lambda: tf.MT5Config(architectures=["MT5EncoderModel"]),
        ("encode", "base", "MT5EncoderModel", False),
    ),
}


def shown(found: ModelClass) -> tuple[str, str, str, bool]:
    return found.task, found.head, found.known.__name__ if found.known else "", found.looks_back


@pytest.mark.parametrize("case", CHOSEN)
def test_the_class_that_a_config_is_for(case: str) -> None:
    make, expected = CHOSEN[case]
    assert shown(choose_class(make(), "m")) == expected


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: bert("BertForMaskedLM"), ("encode", "base", "BertModel", False)),
        (lambda: bert("BertForTokenClassification"), ("encode", "base", "BertModel", False)),
        (lambda: llama("LlamaForCausalLM"), ("encode", "base", "LlamaModel", True)),
        (
            lambda: tf.FunnelConfig(architectures=["FunnelBaseModel"]),
            ("encode", "base", "FunnelBaseModel", False),
        ),
        (lambda: tf.T5Config(architectures=["T5Model"]), ("encode", "base", "T5EncoderModel", False)),
    ],
)
def test_the_class_without_a_head(
    make: Callable[[], tf.PreTrainedConfig], expected: tuple[str, str, str, bool]
) -> None:
    assert shown(choose_class(make(), "m", base_only=True)) == expected


REFUSED: dict[str, tuple[Callable[[], tf.PreTrainedConfig], str]] = {
    "a pair": (lambda: tf.T5Config(), "m: model type 't5' has an encoder and a decoder, which is not supported yet"),
    "choices": (
        lambda: bert("BertForMultipleChoice"),
        "m: BertForMultipleChoice takes several texts a question, which is not supported yet",
    ),
    "pictures": (lambda: tf.ViTConfig(), "m: ViTModel takes pixel_values, not text alone"),
    "sound": (lambda: tf.Wav2Vec2Config(), "m: Wav2Vec2Model takes input_values, not text alone"),
    "features of sound": (lambda: tf.ASTConfig(), "m: ASTModel takes input_values, not text alone"),
    "pictures and text": (lambda: tf.CLIPConfig(), "m: CLIPModel takes pixel_values, not text alone"),
    "features": (lambda: tf.ClapConfig(), "m: ClapModel takes input_features, not text alone"),
    "parts of a model": (
        lambda: tf.BlipTextConfig(),
        "m: model type 'blip_text_model' has no model class that takes text",
    ),
    "numbers": (lambda: tf.TimeSeriesTransformerConfig(is_encoder_decoder=False), "not text alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_of_anything_else_is_refused(case: str) -> None:
    make, said = REFUSED[case]
    with pytest.raises(FrontendError) as caught:
        choose_class(make(), "m")
    assert said in str(caught.value)


class NoText(tf.BertModel):
    """A class whose text goes by another name."""

    config_class = tf.BertConfig
    main_input_name = "words"

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return words


def test_a_class_that_calls_its_text_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.NoText", NoText, raising=False)
    with pytest.raises(FrontendError, match="m: NoText takes words, not text alone"):
        choose_class(bert("NoText"), "m")
    monkeypatch.setattr(NoText, "main_input_name", "input_ids")
    with pytest.raises(FrontendError, match="m: NoText takes input_ids, not text alone"):
        choose_class(bert("NoText"), "m")


class Mixed(tf.BertModel):
    """A class whose text goes by the usual name, beside other things."""

    config_class = tf.BertConfig

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, input_features: torch.Tensor) -> None: ...


def test_a_class_that_takes_more_than_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first of its arguments that is none, or by its main one."""
    monkeypatch.setattr("transformers.Mixed", Mixed, raising=False)
    with pytest.raises(FrontendError, match="m: Mixed takes pixel_values, not text alone"):
        choose_class(bert("Mixed"), "m")
    monkeypatch.setattr(tf.BertForMaskedLM, "main_input_name", "words")
    with pytest.raises(FrontendError, match="m: BertForMaskedLM takes words, not text alone"):
        choose_class(bert("BertForMaskedLM"), "m")


def test_a_decoder_is_built_without_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_config", lambda config, **options: asked.append(options))
    choose_class(llama(), "m").build(llama(), "eager")
    assert asked == [{"attn_implementation": "eager", "dtype": torch.float32, "trust_remote_code": False}]


@pytest.mark.parametrize("config", [bert("BertForMaskedLM", dtype="bfloat16"), llama("LlamaForCausalLM")])
def test_a_model_is_built_in_f32_with_the_attention_that_is_asked_for(config: tf.PreTrainedConfig) -> None:
    for implementation in ("eager", "sdpa"):
        with torch.device("meta"):
            model = choose_class(config, "m").build(config, implementation)
        assert type(model).__name__ == config.architectures[0]
        assert {(value.dtype, value.device.type) for value in model.parameters()} == {(torch.float32, "meta")}
        assert model.config._attn_implementation == implementation


def test_a_class_is_looked_for_without_a_word_from_transformers(caplog: pytest.LogCaptureFixture) -> None:
    choose_class(bert("BertModel"), "m")
    assert caplog.text == ""
    assert {classes.CAUSAL, classes.BASE, classes.SEQUENCES, classes.TOKENS, classes.OTHER} == {
        "causal", "base", "sequences", "tokens", "other",
    }  # fmt: skip
