"""Decoders of separate projections that differ from Llama in norms, activations, biases or factors."""

from __future__ import annotations

from llmc.errors import FrontendError
from llmc.frontends.gguf.architectures.llama import ATTENTION, GATED_MLP, JOINED_EXPERTS, LLAMA, OUTSIDE, paired
from llmc.frontends.gguf.architectures.qwen import HEAD_NORMS, routed
from llmc.frontends.gguf.description import Config, Description, Plan, architecture
from llmc.frontends.gguf.rows import Joined, Plus, Row, Taken
from llmc.frontends.gguf.weights import Weight

_PLAIN_MLP = {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_PROJECTIONS = {name: tensor for name, tensor in ATTENTION.items() if name.startswith("self_attn")}
# Norms behind attention and MLP, and none before them.
_BEHIND = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}


def _granite_factors(model: Description) -> Config:
    settings = model.settings
    # llama.cpp has this key for something else here: whether there are rotary embeddings at all.
    settings.expect("rope.scaling.finetuned", (True,), "it means that there are no rotary embeddings")
    return {
        "rope_parameters": model.rope(),
        "hidden_act": "silu",
        "attention_multiplier": settings.number("attention.scale", model.head_dim**-0.5),
        "embedding_multiplier": settings.number("embedding_scale", 1.0),
        "residual_multiplier": settings.number("residual_scale", 1.0),
        "logits_scaling": settings.number("logit_scale", 1.0),
        "attention_bias": model.in_layers("attn_q.bias"),
    }


@architecture("granite")
def _granite(model: Description) -> Plan:
    more = _granite_factors(model) | {"mlp_bias": model.in_layers("ffn_up.bias")}
    return Plan(model.decoder(model_type="granite", **more), model.weights(OUTSIDE, LLAMA, rows=paired(model)))


@architecture("granitemoe")
def _granite_moe(model: Description) -> Plan:
    shared = model.settings.integer("expert_shared_feed_forward_length", 0)
    experts = routed(model, normed=True)
    more = _granite_factors(model) | {
        "num_local_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
        "shared_intermediate_size": shared,
    }
    inside = ATTENTION | {
        "block_sparse_moe.router.layer": "ffn_gate_inp",
        "block_sparse_moe.input_linear.weight": "ffn_gate_exps.weight ffn_up_exps.weight",
        "block_sparse_moe.output_linear": "ffn_down_exps",
        "shared_mlp.input_linear.weight": "ffn_gate_shexp.weight ffn_up_shexp.weight",
        "shared_mlp.output_linear": "ffn_down_shexp",
    }
    rows = {**paired(model), **JOINED_EXPERTS, "ffn_gate_shexp": Joined(0)}
    kind = "granitemoeshared" if shared else "granitemoe"
    return Plan(model.decoder(model_type=kind, **more), model.weights(OUTSIDE, inside, rows=rows))


@architecture("smollm3")
def _smollm3(model: Description) -> Plan:
    """Every fourth layer has no rotary embedding, as llama.cpp knows without the file saying so."""
    config = model.decoder(
        model_type="smollm3",
        rope_parameters=model.rope(),
        hidden_act="silu",
        no_rope_layers=[int((layer + 1) % 4 != 0) for layer in range(model.layers)],
        layer_types=["full_attention"] * model.layers,
        use_sliding_window=False,
        attention_bias=model.in_layers("attn_q.bias"),
        mlp_bias=model.in_layers("ffn_up.bias"),
    )
    return Plan(config, model.weights(OUTSIDE, LLAMA, rows=paired(model)))


@architecture("arcee")
def _arcee(model: Description) -> Plan:
    config = model.decoder(
        model_type="arcee",
        rope_parameters=model.rope(),
        hidden_act="relu2",
        attention_bias=model.in_layers("attn_q.bias"),
        mlp_bias=model.in_layers("ffn_up.bias"),
    )
    return Plan(config, model.weights(OUTSIDE, ATTENTION | _PLAIN_MLP, rows=paired(model)))


@architecture("seed_oss")
def _seed(model: Description) -> Plan:
    config = model.decoder(
        model_type="seed_oss",
        rope_parameters=model.rope(),
        hidden_act="silu",
        attention_bias=model.in_layers("attn_q.bias"),
        attention_out_bias=model.in_layers("attn_output.bias"),
        mlp_bias=model.in_layers("ffn_up.bias"),
    )
    return Plan(config, model.weights(OUTSIDE, LLAMA | {"post_attention_layernorm": "post_attention_norm"}))


@architecture("ernie4_5")
def _ernie(model: Description) -> Plan:
    config = model.decoder(
        model_type="ernie4_5",
        rope_parameters=model.rope(),
        hidden_act="silu",
        use_bias=model.in_layers("attn_q.bias"),
    )
    return Plan(config, model.weights(OUTSIDE, LLAMA))


@architecture("hunyuan-dense")
def _hunyuan(model: Description) -> Plan:
    norms = {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"}
    config = model.decoder(
        model_type="hunyuan_v1_dense",
        rope_parameters=model.rope(),
        hidden_act="silu",
        attention_bias=model.in_layers("attn_q.bias"),
    )
    return Plan(config, model.weights(OUTSIDE, LLAMA | norms))


@architecture("olmo")
def _olmo(model: Description) -> Plan:
    """Norms without weights."""
    model.settings.expect("attention.layer_norm_epsilon", (1e-5,))
    config = model.decoder(
        model_type="olmo",
        rope_parameters=model.rope(),
        hidden_act="silu",
        clip_qkv=model.settings.number("attention.clamp_kqv", 0.0) or None,
    )
    return Plan(config, model.weights(OUTSIDE, _PROJECTIONS | GATED_MLP, rows=paired(model)))


@architecture("olmo2")
def _olmo2(model: Description) -> Plan:
    """Olmo 2, and Olmo 3, which is the same with windows."""
    window = model.settings.integer("attention.sliding_window", 0)
    rope = model.rope()
    more: Config = {"rope_parameters": rope, "hidden_act": "silu"}
    if window:
        each = {kind: dict(rope) for kind in ("full_attention", "sliding_attention")}
        more |= {"model_type": "olmo3", "sliding_window": window, "layer_types": model.sliding(4)}
        more["rope_parameters"] = each
        model.settings.expect("rope.freq_base_swa", (model.settings.number("rope.freq_base", 10000.0),))
        if rope["rope_type"] != "default":
            raise model.settings.error(
                "rope.scaling.type", f"makes {rope['rope_type']!r:.40} beside windows, which is not supported"
            )
    else:
        model.settings.ignore("attention.sliding_window_pattern")
        more |= {"model_type": "olmo2"}
    inside = _PROJECTIONS | GATED_MLP | HEAD_NORMS | _BEHIND
    return Plan(model.decoder(**more), model.weights(OUTSIDE, inside))


@architecture("exaone4")
def _exaone4(model: Description) -> Plan:
    """With windows, layers that see everything have no rotary embedding."""
    window = model.settings.integer("attention.sliding_window", 0)
    more: Config = {"sliding_window": window or None, "layer_types": ["full_attention"] * model.layers}
    if window:
        more["layer_types"] = model.sliding(4)
    else:
        model.settings.ignore("attention.sliding_window_pattern")
    config = model.decoder(model_type="exaone4", rope_parameters=model.rope(), hidden_act="silu", **more)
    return Plan(config, model.weights(OUTSIDE, _PROJECTIONS | GATED_MLP | HEAD_NORMS | _BEHIND))


@architecture("chatglm")
def _glm(model: Description) -> Plan:
    """GLM as transformers has it (GLM-4-9B and its kin)."""
    inside = ATTENTION | {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    config = model.decoder(
        model_type="glm",
        rope_parameters=model.rope(partial=True),
        hidden_act="silu",
        attention_bias=model.in_layers("attn_q.bias") or model.in_layers("attn_qkv.bias"),
    )
    return Plan(config, model.weights(OUTSIDE, inside) | unfused(model, "model.layers"))


def unfused(model: Description, layers: str) -> dict[str, Weight]:
    """Queries, keys and values of files that have them in one tensor."""
    ends, found = [0], {}
    for heads in (model.heads, model.kv_heads, model.kv_heads):
        ends.append(ends[-1] + heads * model.head_dim)
    for layer in range(model.layers):
        for suffix in ("weight", "bias"):
            tensor = f"blk.{layer}.attn_qkv.{suffix}"
            for part, begin, end in zip("qkv", ends, ends[1:], strict=False):
                if tensor in model.tensors:
                    found[f"{layers}.{layer}.self_attn.{part}_proj.{suffix}"] = Weight((tensor,), Taken(begin, end))
    return found


@architecture("glm4")
def _glm4(model: Description) -> Plan:
    inside = ATTENTION | {
        "post_self_attn_layernorm": "post_attention_norm",
        "post_mlp_layernorm": "post_ffw_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    config = model.decoder(
        model_type="glm4",
        rope_parameters=model.rope(partial=True),
        hidden_act="silu",
        attention_bias=model.in_layers("attn_q.bias"),
    )
    return Plan(config, model.weights(OUTSIDE, inside))


@architecture("phi3")
def _phi3(model: Description) -> Plan:
    inside = {
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    context = model.settings.integer("context_length")
    config = model.decoder(
        model_type="phi3",
        rope_parameters=model.rope(partial=True),
        hidden_act="silu",
        sliding_window=model.settings.integer("attention.sliding_window", 0) or None,
        original_max_position_embeddings=model.settings.integer("rope.scaling.original_context_length", context),
    )
    return Plan(config, model.weights(OUTSIDE, inside))


@architecture("starcoder2")
def _starcoder2(model: Description) -> Plan:
    config = model.decoder(
        model_type="starcoder2",
        rope_parameters=model.rope(),
        hidden_act="gelu_pytorch_tanh",
        norm_epsilon=model.settings.number("attention.layer_norm_epsilon"),
        use_bias=model.in_layers("attn_q.bias"),
        sliding_window=model.settings.integer("attention.sliding_window", 0) or None,
    )
    return Plan(config, model.weights(OUTSIDE, ATTENTION | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}))


@architecture("stablelm")
def _stablelm(model: Description) -> Plan:
    norms = model.in_layers("attn_q_norm.weight")
    parallel = not model.in_layers("ffn_norm.weight")
    model.settings.expect("use_parallel_residual", (parallel,))
    config = model.decoder(
        model_type="stablelm",
        rope_parameters=model.rope(partial=True),
        hidden_act="silu",
        layer_norm_eps=model.settings.number("attention.layer_norm_epsilon"),
        use_qkv_bias=model.in_layers("attn_q.bias"),
        use_parallel_residual=parallel,
        qk_layernorm=norms,
    )
    weights = model.weights(OUTSIDE, LLAMA)
    for layer in range(model.layers) if norms else ():  # one norm a head, each a module of its own
        for ours, theirs, heads in (("q", "attn_q_norm", model.heads), ("k", "attn_k_norm", model.kv_heads)):
            stored = f"blk.{layer}.{theirs}.weight"
            if stored not in model.tensors or model.tensors[stored].shape[:1] != (heads,):
                raise FrontendError(f"{model.path}: {stored} has not one row for each of {heads} heads")
            for head in range(heads):
                name = f"model.layers.{layer}.self_attn.{ours}_layernorm.norms.{head}.weight"
                weights[name] = Weight((stored,), values=Row(head))
    return Plan(config, weights)


@architecture("nemotron")
def _nemotron(model: Description) -> Plan:
    """LayerNorms whose weights are stored as 1 + w."""
    norms = ("output_norm.weight", "attn_norm.weight", "ffn_norm.weight")
    config = model.decoder(
        model_type="nemotron",
        rope_parameters=model.rope(partial=True),
        hidden_act="relu2",
        norm_eps=model.settings.number("attention.layer_norm_epsilon"),
        attention_bias=model.in_layers("attn_q.bias"),
        mlp_bias=model.in_layers("ffn_up.bias"),
    )
    values = dict.fromkeys(norms, Plus(-1.0))
    return Plan(config, model.weights(OUTSIDE, ATTENTION | _PLAIN_MLP, values=values))


def _cohere(model: Description, **more: object) -> Config:
    return model.decoder(
        rope_parameters=model.rope(),
        hidden_act="silu",
        layer_norm_eps=model.settings.number("attention.layer_norm_epsilon"),
        logit_scale=model.settings.number("logit_scale"),
        attention_bias=model.in_layers("attn_q.bias"),
        **more,
    )


@architecture("command-r")
def _command_r(model: Description) -> Plan:
    """Attention and MLP read one norm."""
    config = _cohere(model, model_type="cohere", use_qk_norm=model.in_layers("attn_q_norm.weight"))
    return Plan(config, model.weights(OUTSIDE, LLAMA | HEAD_NORMS))


@architecture("cohere2")
def _cohere2(model: Description) -> Plan:
    window = model.settings.integer("attention.sliding_window")
    config = _cohere(model, model_type="cohere2", sliding_window=window, layer_types=model.sliding(4))
    return Plan(config, model.weights(OUTSIDE, LLAMA))
