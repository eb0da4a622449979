"""gpt-oss: experts with biases whose gates and values lie in turn, and attention with sinks."""

from __future__ import annotations

from llmc.frontends.gguf.architectures.llama import ATTENTION, OUTSIDE
from llmc.frontends.gguf.description import Description, Plan, architecture
from llmc.frontends.gguf.rows import Interleaved, Turned


@architecture("gpt-oss")
def _gpt_oss(model: Description) -> Plan:
    settings = model.settings
    rope = model.rope()
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # of the model's own config; files do not say it
    config = model.decoder(
        model_type="gpt_oss",
        intermediate_size=settings.integer("expert_feed_forward_length"),
        rope_parameters=rope,
        hidden_act="silu",
        sliding_window=settings.integer("attention.sliding_window"),
        layer_types=model.sliding(2),
        num_local_experts=settings.integer("expert_count"),
        num_experts_per_tok=settings.integer("expert_used_count"),
        attention_bias=model.in_layers("attn_q.bias"),
    )
    settings.expect("expert_gating_func", (1, 3))
    inside = ATTENTION | {
        "self_attn.sinks": "attn_sinks.weight",
        "post_attention_layernorm": "post_attention_norm",
        "mlp.router": "ffn_gate_inp",
        "mlp.experts.gate_up_proj": "ffn_gate_exps.weight ffn_up_exps.weight",
        "mlp.experts.gate_up_proj_bias": "ffn_gate_exps.bias ffn_up_exps.bias",
        "mlp.experts.down_proj": "ffn_down_exps.weight",
        "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    }
    # The model keeps experts' weights as [experts, inputs, outputs].
    turned = dict.fromkeys(("ffn_gate_exps.weight", "ffn_down_exps.weight"), Turned())
    weights = model.weights(OUTSIDE, inside, rows={"ffn_gate_exps": Interleaved()}, values=turned)
    return Plan(config, weights)
