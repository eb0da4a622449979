"""Gemma 1 to 3: norms whose weights llama.cpp's converter has stored as 1 + w, and the embedding is the output."""

from __future__ import annotations

from llmc.frontends.gguf.architectures.llama import GATED_MLP, LLAMA, OUTSIDE
from llmc.frontends.gguf.architectures.qwen import HEAD_NORMS
from llmc.frontends.gguf.description import Config, Description, Plan, architecture
from llmc.frontends.gguf.rows import Plus

_NORMS = (
    "output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm",
)  # fmt: skip
_LESS_ONE = dict.fromkeys(_NORMS, Plus(-1.0))
_SANDWICH = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
} | GATED_MLP
# Scores are divided by the root of the width of a head, but in the 27B models, of the width divided by the heads, which
# files do not say: llama.cpp knows these models by their number of layers.
_WIDE_2, _WIDE_3 = 46, 62


def _activation() -> Config:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


@architecture("gemma")
def _gemma(model: Description) -> Plan:
    config = model.decoder(model_type="gemma", rope_parameters=model.rope(), **_activation())
    return Plan(config, model.weights(OUTSIDE, LLAMA, values=_LESS_ONE))


@architecture("gemma2")
def _gemma2(model: Description) -> Plan:
    settings = model.settings
    scalar = model.hidden // model.heads if model.layers == _WIDE_2 else model.head_dim
    config = model.decoder(
        model_type="gemma2",
        rope_parameters=model.rope(),
        attn_logit_softcapping=settings.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=settings.number("final_logit_softcapping", 30.0),
        sliding_window=settings.integer("attention.sliding_window", 4096),
        layer_types=model.sliding(2),
        query_pre_attn_scalar=scalar,
        **_activation(),
    )
    return Plan(config, model.weights(OUTSIDE, _SANDWICH, values=_LESS_ONE))


@architecture("gemma3")
def _gemma3(model: Description) -> Plan:
    settings = model.settings
    scalar = model.hidden // model.heads if model.layers == _WIDE_3 else model.head_dim
    window = settings.integer("attention.sliding_window", 0)
    near: Config = {"rope_type": "default", "rope_theta": settings.number("rope.freq_base_swa", 10000.0)}
    kinds = model.sliding(6) if window else ["full_attention"] * model.layers
    settings.ignore("attention.sliding_window_pattern")
    softcap = settings.number("final_logit_softcapping", 0.0)
    config = model.decoder(
        model_type="gemma3_text",
        rope_parameters={"full_attention": model.rope(base=1e6), "sliding_attention": near},
        final_logit_softcapping=softcap or None,
        attn_logit_softcapping=None,
        sliding_window=window or settings.integer("context_length"),
        layer_types=kinds,
        query_pre_attn_scalar=scalar,
        use_bidirectional_attention=False,
        **_activation(),
    )
    return Plan(config, model.weights(OUTSIDE, _SANDWICH | HEAD_NORMS, values=_LESS_ONE))
