"""Llama and those like it: RMSNorm, gated MLP, rotary embeddings whose pairs llama.cpp has side by side."""

from __future__ import annotations

from collections.abc import Mapping

from llmc.frontends.gguf.description import Config, Description, Plan, architecture
from llmc.frontends.gguf.rows import Joined, PairsToHalves
from llmc.frontends.gguf.weights import Rows

OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
GATED_MLP = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_exps.weight ffn_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
JOINED_EXPERTS: Mapping[str, Rows] = {"ffn_gate_exps": Joined(1)}
LLAMA = ATTENTION | GATED_MLP


def paired(model: Description) -> dict[str, Rows]:
    """Queries and keys in llama.cpp's order of rotated pairs."""
    return {"attn_q": PairsToHalves(model.heads), "attn_k": PairsToHalves(model.kv_heads)}


@architecture("llama")
def _llama(model: Description) -> Plan:
    """Llama, and Mistral and Mixtral, which llama.cpp has under the same name."""
    settings = model.settings
    experts = settings.integer("expert_count", 0)
    window = settings.integer("attention.sliding_window", 0)
    settings.ignore("tensor_data_layout")
    more: Config = {"rope_parameters": model.rope(), "hidden_act": "silu"}
    if experts:
        more |= {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": settings.integer("expert_used_count"),
            "sliding_window": window or None,
        }
    elif window:
        more |= {"model_type": "mistral", "sliding_window": window}
    else:
        more |= {
            "model_type": "llama",
            "attention_bias": model.in_layers("attn_q.bias"),
            "mlp_bias": model.in_layers("ffn_up.bias"),
        }
    rows = {**paired(model), **JOINED_EXPERTS}
    inside = ATTENTION | EXPERTS if experts else LLAMA
    return Plan(model.decoder(**more), model.weights(OUTSIDE, inside, rows=rows))
