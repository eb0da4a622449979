"""Opening a GGUF model: everything in its file is used, harmless, or refused; what the user is told of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf_files import blocks_of, described, write
from transformers.models.bert import modeling_bert  # noqa: F401  what takes long is done when tests are collected
from transformers.models.llama import modeling_llama  # noqa: F401

from llmc.errors import FrontendError, LlmcError
from llmc.frontends import lift
from llmc.frontends.gguf.lift import open_model
from llmc.frontends.gguf.pooled import plan_pooled
from llmc.frontends.hf.classes import ModelClass
from llmc.frontends.hf.lift import Opened
from llmc.frontends.lifted import Text

BERT = {"position_embd.weight": (64, 32), "token_types.weight": (2, 32)}


def opened(
    folder: Path,
    settings: dict[str, object],
    tensors: dict[str, object],
    more: dict[str, object] | None = None,
    name: str = "llama",
    weights: str = "checkpoint",
) -> Opened:
    """A file without a tokenizer. llama reads no epsilon of LayerNorms."""
    given = {"attention.layer_norm_epsilon": None, **settings} if name == "llama" else settings
    return open_model(described(folder, name, given, tensors, more).path, weights)


def test_what_is_told_of_a_file(tmp_path: Path) -> None:
    assert opened(tmp_path, {}, {}).notes == ("the file's tensors: 1 F32",)
    row = np.ones((64, 32), np.float32)
    tensors: dict[str, object] = {
        "blk.0.attn_q.weight": ("IQ4_NL", blocks_of("IQ4_NL", row)), "blk.0.ffn_up.weight": ("Q4_0", row),
        "blk.1.attn_q.weight": ("IQ4_NL", blocks_of("IQ4_NL", row)), "blk.1.attn_k.weight": ("IQ4_NL", row),
        "blk.2.nextn.weight": ("F16", row),
    }  # fmt: skip
    more = {"who.knows": 1, "x": 2, "llamas.x": 3, "split.x": 1, "general.x": 1, "GGUF.x": 1, "tokenizer.x": 1}
    drafting = {"block_count": 3, "nextn_predict_layers": 1}
    assert opened(tmp_path, drafting, tensors, more).notes == (
        "1 layers that draft tokens are left out",
        "metadata that is not known, and has no effect: who.knows, x, llamas.x",
        "the file's tensors: 3 IQ4_NL, 1 F32, 1 Q4_0, 1 F16",
        "no encoding holds the integers of some weights: -q rounds them anew, 3 IQ4_NL to int5 at least (--override "
        "decides)",
    )


@pytest.mark.parametrize(
    ("file", "said", "name"),
    [
        ("m.gguf", "tiny", "m"), ("m-00001-of-00002.gguf", "tiny", "m"), ("sha256-00", "A tiny-1.5 b", "A tiny-1.5 b"),
        ("sha256-00", "../x", "sha256-00"), ("sha256-00", "", "sha256-00"), ("sha256-00", 7, "sha256-00"),
        ("sha256-00", "x" * 100, "sha256-00"), ("a-blob", "tiny", "tiny"), ("m.bin", "tiny", "tiny"),
    ],
)  # fmt: skip
def test_a_model_is_called_after_its_file_or_itself(tmp_path: Path, file: str, said: object, name: str) -> None:
    path = described(tmp_path, "llama", {"attention.layer_norm_epsilon": None}, {}, {"general.name": said}).path
    assert open_model(path.rename(tmp_path / file)).name == name


def test_a_decoder_and_an_encoder(tmp_path: Path) -> None:
    decoder = opened(tmp_path, {}, {})
    assert (
        decoder.plan is None
        and decoder.weights is not None
        and list(decoder.weights.names) == ["model.embed_tokens.weight"]
    )
    assert decoder.kind.task == "generate" and decoder.config.vocab_size == 40
    assert opened(tmp_path, {}, {}, weights="random").weights is None
    settings = {"attention.causal": False, "pooling_type": 0, "attention.layer_norm_rms_epsilon": None}
    encoder = opened(tmp_path, settings, BERT, name="bert")
    assert encoder.plan is not None and encoder.kind.task == "encode"


REFUSED: list[tuple[str, dict[str, object], dict[str, object], str]] = [
    ("llama", {}, {"general.type": "vocab"}, "is a vocab, not a model of text"),
    ("llama", {}, {"general.type": "adapter"}, "is an adapter: merge it"),
    ("llama", {}, {"general.architecture": 7}, "has no general.architecture"),
    ("llama", {"block_count": 0}, {}, "block_count is 0"),
    ("llama", {"block_count": 513}, {}, "block_count is 513"),
    ("llama", {"block_count": 1044, "nextn_predict_layers": 3}, {}, "block_count is 1044"),
    ("llama", {"block_count": 2, "nextn_predict_layers": 2}, {}, "block_count is 2"),
    ("llama", {"block_count": 30, "nextn_predict_layers": 17}, {}, r"nextn_predict_layers is 17, outside 0\.\.16"),
    ("llama", {"nextn_predict_layers": -1}, {}, r"nextn_predict_layers is -1, outside"),
    ("mpt", {"embedding_length": 0, "attention.max_alibi_bias": 8.0}, {}, "a size in its metadata is 0"),
]


@pytest.mark.parametrize(("name", "settings", "more", "said"), REFUSED)
def test_what_is_no_model_of_text_is_refused(
    tmp_path: Path, name: str, settings: dict[str, object], more: dict[str, object], said: str
) -> None:
    with pytest.raises(FrontendError, match=said):
        opened(tmp_path, settings, {}, more, name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": None}, "no general.architecture"),
        ({"general.architecture": "made-up"}, r"'made-up' is not supported; those that are: .*llama"),
        ({"general.type": "adapter"}, "an adapter"),
        ({"general.type": "mmproj"}, "vision"),
        ({}, "llama.block_count is missing"),
        ({"llama.block_count": 0}, "block_count is 0"),
        ({"llama.block_count": "many"}, "must be an integer"),
    ],
)
def test_models_are_refused_in_one_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    metadata = {key: value for key, value in {"general.architecture": "llama", **change}.items() if value is not None}
    with pytest.raises(LlmcError, match=said) as error:
        lift(write(tmp_path / "m.gguf", metadata, {}))
    assert "\n" not in str(error.value)


def test_layers_with_windows_rotate_as_the_file_says(tmp_path: Path) -> None:
    """Where settings are by kind of layer, each kind gets the file's."""
    settings = {"rope.freq_base": 12345.0, "attention.sliding_window": 32, "attention.layer_norm_epsilon": None}
    config = opened(tmp_path, settings, {}, name="olmo2").config
    assert {kind["rope_theta"] for kind in config.rope_parameters.values()} == {12345.0}
    assert set(config.rope_parameters) == {"full_attention", "sliding_attention"}


def test_a_model_in_parts_is_what_its_first_one_says(tmp_path: Path) -> None:
    settings = {"split.count": 2, "split.no": 0, "general.sampling.temp": 0.5}
    whole = described(tmp_path, "llama", {"attention.layer_norm_epsilon": None}, {}, settings)
    first = whole.path.rename(tmp_path / "m-00001-of-00002.gguf")
    write(
        tmp_path / "m-00002-of-00002.gguf",
        {"split.count": 2, "split.no": 1},
        {"output.weight": ("F16", np.ones((40, 32)))},
    )
    model = open_model(first)
    assert model.weights is not None and set(model.weights.names) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert model.text().generation["temperature"] == 0.5


def test_models_may_have_many_layers(tmp_path: Path) -> None:
    assert opened(tmp_path, {"block_count": 512}, {}).config.num_hidden_layers == 512
    config = opened(tmp_path, {"block_count": 17, "nextn_predict_layers": 16}, {}).config
    assert config.num_hidden_layers == 1


@pytest.mark.parametrize("count", [1, 6, 7, 9])
def test_what_is_not_known_is_named(tmp_path: Path, count: int) -> None:
    names = [f"x{number}" for number in range(count)]
    rest = f" and {count - 6} more" if count > 6 else ""
    listed = ", ".join(f"llama.{name}" for name in names[:6])
    with pytest.raises(FrontendError, match=f"settings that llama is not known to have: {listed}{rest}: they may"):
        opened(tmp_path, dict.fromkeys(names, 1), {})
    listed = ", ".join(names[:6])
    with pytest.raises(FrontendError, match=f"tensors that llama is not known to have: {listed}{rest}: they may"):
        opened(tmp_path, {}, dict.fromkeys(names, (32,)))


def test_how_tokens_become_one_vector(tmp_path: Path) -> None:
    """None, by llama.cpp's numbers of kinds; the tokens around a text come from the tokenizer alone."""
    kind, config = ModelClass("encode", "base", None, False), SimpleNamespace()
    for facts in (None, {"add_bos": True, "eos_token": "x"}):
        text = Text({}, facts, notes=("a note",))
        plan = plan_pooled(kind, config, text, 0, tmp_path)  # type: ignore[arg-type]
        assert (plan.modules, plan.sentence, plan.token_types) == ((), None, False)
        assert plan.notes[0] == "a note" and "outputs are those of all tokens" in plan.notes[1]
        assert (config.output_hidden_states, config.output_attentions) == (False, False)
        for number, mode in ((1, "mean"), (2, "cls"), (3, "lasttoken")):
            plan = plan_pooled(kind, config, text, number, tmp_path)  # type: ignore[arg-type]
            (module,) = plan.modules
            assert module.modes == (mode,) and plan.notes == ("a note",) and not plan.token_types  # type: ignore[attr-defined]
            assert plan.sentence is not None and plan.sentence.modules == plan.modules and not plan.sentence.lower_case
            given = plan.text
            assert (given.longest, given.types, given.several) == (None, False, False)
            expected = facts and {"add_bos": False, "eos_token": "x", "token_types": 0}
            assert given.text.facts == expected
        for number, said in ((4, "scores of pairs of texts"), (5, "pooling_type 5"), (-1, "pooling_type -1")):
            with pytest.raises(FrontendError, match=f"it makes {said}, which is not supported"):
                plan_pooled(kind, config, text, number, tmp_path)  # type: ignore[arg-type]
