"""Models without values: what they compute instead of storing is there, and their frequencies follow a length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from llmc.errors import FrontendError
from llmc.frontends.hf.classes import ModelClass, choose_class
from llmc.frontends.hf.model import MetaModel, _choose_experts, build

SIZES = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIRS, TRAINED, LIMIT = 8, 16, 32  # of heads of 16 channels; the lengths before and after scaling
SCALINGS: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "dynamic of another length": {"factor": 2.0, "original_max_position_embeddings": TRAINED},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": TRAINED,
    },
    "longrope": {
        "short_factor": [1 + 0.1 * i for i in range(PAIRS)], "long_factor": [2 + 0.5 * i for i in range(PAIRS)],
        "original_max_position_embeddings": TRAINED, "factor": 2.0,
    },
}  # fmt: skip


def llama(rope: dict[str, object] | None = None, **more: object) -> Any:
    rope = {"rope_type": "default", "rope_theta": 100.0, **(rope or {})}
    return tf.LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=rope, **more)


def scaling(kind: str) -> dict[str, object]:
    return {"rope_type": kind.partition(" ")[0], **SCALINGS[kind]}


def gemma(full: str, sliding: str = "default") -> Any:
    """A model with frequencies for each kind of layer."""
    rope = {
        "full_attention": {"rope_theta": 100.0, **scaling(full)},
        "sliding_attention": {"rope_theta": 50.0, **scaling(sliding)},
    }
    return tf.Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 2}, head_dim=16, max_position_embeddings=LIMIT, rope_parameters=rope,
        layer_types=list(rope),
    )  # fmt: skip


def made(config: Any, context: int = LIMIT) -> MetaModel:
    return build(choose_class(config, "m"), config, "eager", context)


def computed(meta: MetaModel) -> Any:
    """The model's rotary module with its values."""
    for name, value in meta.buffers.items():
        path, _, leaf = name.rpartition(".")
        meta.model.get_submodule(path)._buffers[leaf] = torch.from_numpy(value.copy())
    return meta.model.model.rotary_emb


def angles(module: Any, length: int, *more: str) -> list[torch.Tensor]:
    """cos and sin for a sequence of that length."""
    return list(module(torch.zeros(1, length, 32), torch.arange(length)[None], *more))


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("context", [TRAINED, LIMIT, 80])
def test_frequencies_are_those_of_transformers_at_every_length(kind: str, context: int) -> None:
    """Of a fresh module: transformers keeps the frequencies of the longest sequence so far. Shorter ones may follow."""
    config = llama(scaling(kind))
    meta = made(config, context)
    ours = computed(meta)
    for length in (80, 64, 33, 32, 31, 17, 16, 15, 3, 1, 17):
        if length <= context:
            theirs = type(ours)(config)
            for got, want in zip(angles(ours, length), angles(theirs, length), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert meta.stretches is ("dynamic" in kind and context == 80)
    assert not any("inv_freq" in name for name in meta.model.state_dict())
    assert [path for path, module in meta.model.named_modules() if hasattr(module, "rope_type")] == ["model.rotary_emb"]
    long = {name for name in meta.buffers if "long_inv_freq" in name}
    assert long == ({"model.rotary_emb.long_inv_freq"} if kind == "longrope" and context > TRAINED else set())


@pytest.mark.parametrize(
    ("full", "sliding"),
    [("default", "default"), ("linear", "default"), ("dynamic", "default"), ("default", "dynamic"),
     ("longrope", "default"), ("linear", "longrope"), ("dynamic", "longrope")],
)  # fmt: skip
def test_layers_of_each_kind_have_frequencies_of_their_own(full: str, sliding: str) -> None:
    config = gemma(full, sliding)
    meta = made(config, 80)
    ours = computed(meta)
    for length in (80, 33, 17, 16, 3):
        for layer in ("full_attention", "sliding_attention"):
            theirs = type(ours)(config)
            for got, want in zip(angles(ours, length, layer), angles(theirs, length, layer), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert meta.stretches is ("dynamic" in (full, sliding))


def test_a_law_of_lengths_leaves_the_module_as_it_was() -> None:
    """Also where the module fails."""
    module = computed(made(llama({"rope_type": "dynamic", "factor": 2.0}), 80))
    own = module._buffers["inv_freq"]
    angles(module, 80)
    assert module._buffers["inv_freq"] is own
    with pytest.raises(AttributeError):
        module(None, torch.arange(80)[None])
    assert module._buffers["inv_freq"] is own


CONFIGS = {
    "llama": llama,
    "bert": lambda: tf.BertConfig(**SIZES, max_position_embeddings=7),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=9, hidden_size=8, num_layers=1, num_heads=1, attention_types=[[["global"], 1]],
        max_position_embeddings=6, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_model_computes_instead_of_storing_is_there(kind: str) -> None:
    """As in a model that is built with values; the one without them stays without."""
    config = CONFIGS[kind]()
    meta = made(config)
    whole = choose_class(config, "m").build(config, "eager")
    expected = dict(whole.named_non_persistent_buffers())
    assert meta.buffers.keys() == expected.keys() and expected
    for name, value in expected.items():
        np.testing.assert_array_equal(meta.buffers[name], value.numpy())
    assert {value.device.type for value in meta.model.state_dict(keep_vars=True).values()} == {"meta"}
    assert {value.device.type for value in meta.model.buffers()} == {"meta"}
    assert not any(module.training for module in meta.model.modules())


def test_a_model_says_what_its_forward_takes() -> None:
    decoder, encoder = made(llama()), made(CONFIGS["bert"]())
    assert decoder.takes("position_ids") and not decoder.takes("token_type_ids")
    assert encoder.takes("token_type_ids") and not encoder.takes("cache_position")


def test_experts_are_products_over_gathered_weights() -> None:
    config = tf.MixtralConfig(**SIZES, num_local_experts=2)
    assert made(config).model.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("error", [ValueError, KeyError, AttributeError])
def test_a_model_may_have_its_own_way_with_experts(error: type[Exception]) -> None:
    asked: list[str] = []

    def refuse(way: str) -> None:
        asked.append(way)
        raise error(way)

    _choose_experts(SimpleNamespace(set_experts_implementation=refuse))  # type: ignore[arg-type]
    assert asked == ["batched_mm"]


def test_frequencies_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(
        FrontendError, match=r"rotary frequencies model\.rotary_emb\.\w+ are not finite: are rope_theta"
    ):
        made(llama({"rope_theta": 0.0}))


class Wide(tf.BertModel):
    """A buffer of one byte more than a GiB, which nothing allocates."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("wide", torch.zeros((1 << 29) + 1, dtype=torch.int16), persistent=False)


def test_a_buffer_of_more_than_a_gib_is_refused() -> None:
    kind = ModelClass("encode", "base", Wide, False)
    with pytest.raises(FrontendError, match=f"buffer wide of the model has {(1 << 30) + 2} bytes: is max_position"):
        build(kind, CONFIGS["bert"](), "eager", 7)
