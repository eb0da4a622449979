"""Qwen 2 and 3, with or without experts."""

from __future__ import annotations

from llmc.frontends.gguf.architectures.llama import ATTENTION, EXPERTS, JOINED_EXPERTS, LLAMA, OUTSIDE
from llmc.frontends.gguf.description import Config, Description, Plan, architecture
from llmc.frontends.gguf.rows import Shaped

HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_SHARED = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


@architecture("qwen2")
def _qwen2(model: Description) -> Plan:
    more: Config = {"rope_parameters": model.rope(), "hidden_act": "silu", "use_sliding_window": False}
    return Plan(model.decoder(model_type="qwen2", **more), model.weights(OUTSIDE, LLAMA))


@architecture("qwen3")
def _qwen3(model: Description) -> Plan:
    bias = model.in_layers("attn_q.bias")
    more: Config = {"rope_parameters": model.rope(), "hidden_act": "silu", "use_sliding_window": False}
    config = model.decoder(model_type="qwen3", attention_bias=bias, **more)
    return Plan(config, model.weights(OUTSIDE, LLAMA | HEAD_NORMS))


def routed(model: Description, *, normed: bool) -> Config:
    """Settings of experts. normed: whether the weights of those that are chosen are made to add up to 1."""
    settings = model.settings
    settings.expect("expert_gating_func", (1,))  # softmax
    settings.expect("expert_weights_norm", (normed,))
    settings.expect("expert_weights_scale", (0.0, 1.0))
    settings.expect("expert_group_count", (0, 1))
    settings.expect("expert_group_used_count", (0, 1))
    wide = settings.integer("feed_forward_length")
    return {
        "num_experts": settings.integer("expert_count"),
        "num_experts_per_tok": settings.integer("expert_used_count"),
        "norm_topk_prob": normed,
        "moe_intermediate_size": settings.integer("expert_feed_forward_length", wide),
    }


@architecture("qwen2moe")
def _qwen2_moe(model: Description) -> Plan:
    more = routed(model, normed=False) | {
        "rope_parameters": model.rope(),
        "hidden_act": "silu",
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "shared_expert_intermediate_size": model.settings.integer(
            "expert_shared_feed_forward_length", model.settings.integer("feed_forward_length")
        ),
    }
    values = {"ffn_gate_inp_shexp": Shaped((1, model.hidden))}
    weights = model.weights(OUTSIDE, ATTENTION | EXPERTS | _SHARED, rows=JOINED_EXPERTS, values=values)
    return Plan(model.decoder(model_type="qwen2_moe", **more), weights)


@architecture("qwen3moe")
def _qwen3_moe(model: Description) -> Plan:
    more = routed(model, normed=True) | {
        "rope_parameters": model.rope(),
        "hidden_act": "silu",
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": model.in_layers("attn_q.bias"),
    }
    weights = model.weights(OUTSIDE, ATTENTION | EXPERTS | HEAD_NORMS, rows=JOINED_EXPERTS)
    return Plan(model.decoder(model_type="qwen3_moe", **more), weights)


@architecture("olmoe")
def _olmoe(model: Description) -> Plan:
    model.settings.expect("attention.layer_norm_rms_epsilon", (1e-5,))
    more = routed(model, normed=False) | {
        "rope_parameters": model.rope(),
        "hidden_act": "silu",
        "clip_qkv": model.settings.number("attention.clamp_kqv", 0.0) or None,
    }
    weights = model.weights(OUTSIDE, ATTENTION | EXPERTS | HEAD_NORMS, rows=JOINED_EXPERTS)
    return Plan(model.decoder(model_type="olmoe", **more), weights)
