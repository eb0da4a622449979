"""Experts behind a few dense layers, chosen by sigmoid or softmax scores in groups: DeepSeek 2 and 3, GLM 4.5.

DeepSeek's keys and values are made of latent ones; files hold what makes them as one tensor, or as two.
"""

from __future__ import annotations

from llmc.frontends.gguf.architectures.llama import ATTENTION, EXPERTS, GATED_MLP, JOINED_EXPERTS, OUTSIDE
from llmc.frontends.gguf.architectures.qwen import HEAD_NORMS
from llmc.frontends.gguf.description import Config, Description, Plan, architecture
from llmc.frontends.gguf.rows import KeyValueHeads

_SOFTMAX, _SIGMOID = 1, 2
_EXPERTS = EXPERTS | {
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_LATENT = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.kv_b_proj.weight": "attn_k_b.weight attn_v_b.weight",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}


def _experts(model: Description) -> Config:
    settings = model.settings
    groups = settings.integer("expert_group_count")  # of files that do not say it, it cannot be known
    return {
        "n_routed_experts": settings.integer("expert_count"),
        "num_experts_per_tok": settings.integer("expert_used_count"),
        "n_shared_experts": settings.integer("expert_shared_count", 0) or None,
        "moe_intermediate_size": settings.integer("expert_feed_forward_length"),
        "first_k_dense_replace": settings.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": settings.number("expert_weights_scale", 1.0),
        "norm_topk_prob": settings.flag("expert_weights_norm", False),
        "n_group": groups,
        "topk_group": settings.integer("expert_group_used_count", 1),
        "hidden_act": "silu",
    }


@architecture("glm4moe")
def _glm4_moe(model: Description) -> Plan:
    model.settings.expect("expert_gating_func", (_SIGMOID,))
    more = _experts(model) | {
        "model_type": "glm4_moe",
        "rope_parameters": model.rope(partial=True),
        "attention_bias": model.in_layers("attn_q.bias"),
        "use_qk_norm": model.in_layers("attn_q_norm.weight"),
    }
    inside = ATTENTION | GATED_MLP | _EXPERTS | HEAD_NORMS | {"post_attention_layernorm": "post_attention_norm"}
    return Plan(model.decoder(**more), model.weights(OUTSIDE, inside, rows=JOINED_EXPERTS))


@architecture("deepseek2")
def _deepseek(model: Description) -> Plan:
    """DeepSeek 2 scores experts by softmax, DeepSeek 3 by sigmoid."""
    settings = model.settings
    sigmoid = settings.integer("expert_gating_func", _SOFTMAX) == _SIGMOID
    settings.expect("expert_gating_func", (_SOFTMAX, _SIGMOID))
    rotary = settings.integer("rope.dimension_count")
    whole = settings.integer("attention.key_length_mla", settings.integer("attention.key_length"))
    value = settings.integer("attention.value_length_mla", settings.integer("attention.value_length"))
    if not 0 < rotary < whole or rotary % 2:
        raise settings.error("rope.dimension_count", f"is {rotary}, no even number below {whole} channels")
    settings.expect("attention.head_count_kv", (1, model.heads))
    more = _experts(model) | {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_key_value_heads": model.heads,
        "head_dim": rotary,
        "q_lora_rank": settings.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": settings.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": whole - rotary,
        "v_head_dim": value,
        "rope_parameters": model.rope(latent=True),
        "attention_bias": model.in_layers("attn_q_a.bias"),
    }
    if sigmoid:
        more["rope_interleave"] = True
    else:
        settings.expect("expert_weights_norm", (False,))  # transformers' model does not know it
        more["topk_method"] = "greedy" if more["n_group"] == 1 else "group_limited_greedy"
    weights = model.weights(
        OUTSIDE, _LATENT | GATED_MLP | _EXPERTS, rows=JOINED_EXPERTS, values={"attn_k_b.weight": KeyValueHeads()}
    )
    return Plan(model.decoder(**more), weights)
