"""Older decoders: one projection for queries, keys and values, LayerNorm, and an MLP without a gate."""

from __future__ import annotations

from llmc.errors import FrontendError
from llmc.frontends.gguf.architectures.dense import unfused
from llmc.frontends.gguf.description import Config, Description, Plan, architecture
from llmc.frontends.gguf.rows import Groups

_GPT = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GPT_OUTSIDE = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


def _epsilon(model: Description) -> float:
    return model.settings.number("attention.layer_norm_epsilon")


def _gpt(model: Description) -> Config:
    model.common()
    table = model.tensors["position_embd.weight"].shape if "position_embd.weight" in model.tensors else (0,)
    if len(table) != 2 or table[0] != model.settings.integer("context_length"):
        raise model.settings.error("context_length", f"is not the length of the table of positions, {list(table)}")
    return {
        "vocab_size": model.vocabulary,
        "n_positions": table[0],
        "n_embd": model.hidden,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.settings.integer("feed_forward_length"),
        "layer_norm_epsilon": _epsilon(model),
        "tie_word_embeddings": model.tied,
    }


@architecture("gpt2")
def _gpt2(model: Description) -> Plan:
    model.settings.expect("attention.head_count_kv", (model.heads,))
    config = _gpt(model) | {"model_type": "gpt2", "activation_function": "gelu_new"}
    return Plan(config, model.weights(_GPT_OUTSIDE, _GPT, layers="transformer.h"))


@architecture("starcoder")
def _starcoder(model: Description) -> Plan:
    """One key head for all queries."""
    model.settings.expect("attention.head_count_kv", (1,))
    config = _gpt(model) | {"model_type": "gpt_bigcode", "activation_function": "gelu_pytorch_tanh"}
    config |= {"multi_query": True, "scale_attn_weights": True}
    return Plan(config, model.weights(_GPT_OUTSIDE, _GPT, layers="transformer.h"))


@architecture("bloom")
def _bloom(model: Description) -> Plan:
    model.common()
    model.settings.expect("attention.head_count_kv", (model.heads,))
    model.settings.expect("feed_forward_length", (4 * model.hidden,))
    outside = {
        "transformer.word_embeddings": "token_embd",
        "transformer.word_embeddings_layernorm": "token_embd_norm",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    }
    inside = {
        "input_layernorm": "attn_norm",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    }
    config: Config = {
        "model_type": "bloom",
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "n_layer": model.layers,
        "n_head": model.heads,
        "seq_length": model.settings.integer("context_length"),
        "layer_norm_epsilon": _epsilon(model),
        "tie_word_embeddings": model.tied,
    }
    rows = {"attn_qkv": Groups(model.heads, 1)}
    return Plan(config, model.weights(outside, inside, layers="transformer.h", rows=rows))


@architecture("gptneox")
def _gpt_neox(model: Description) -> Plan:
    model.common()
    model.settings.expect("attention.head_count_kv", (model.heads,))
    outside = {
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "embed_out": "output",
    }
    inside = {
        "input_layernorm": "attn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    }
    rope = model.rope(partial=True)
    config: Config = {
        "model_type": "gpt_neox",
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.settings.integer("feed_forward_length"),
        "max_position_embeddings": model.settings.integer("context_length"),
        "layer_norm_eps": _epsilon(model),
        "rope_parameters": rope,
        "rotary_pct": rope["partial_rotary_factor"],
        "hidden_act": "gelu",
        "use_parallel_residual": model.settings.flag("use_parallel_residual", True),
        "tie_word_embeddings": model.tied,
    }
    rows = {"attn_qkv": Groups(model.heads, 1)}
    return Plan(config, model.weights(outside, inside, layers="gpt_neox.layers", rows=rows))


@architecture("falcon")
def _falcon(model: Description) -> Plan:
    """The 7B, with one key head and one norm a layer, and the larger ones, with groups and one or two norms."""
    model.common()
    model.settings.expect("tensor_data_layout", ("jploski",))
    model.settings.expect("feed_forward_length", (4 * model.hidden,))
    groups = model.settings.integer("attention.head_count_kv", 1)
    if groups < 1 or model.heads % groups:
        raise FrontendError(f"{model.path}: {model.heads} heads are no multiple of {groups} key heads")
    norms = 2 if model.in_layers("attn_norm_2.weight") else 1
    outside = {
        "transformer.word_embeddings": "token_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    }
    inside = {
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    }
    inside |= {"ln_attn": "attn_norm_2", "ln_mlp": "attn_norm"} if norms == 2 else {"input_layernorm": "attn_norm"}
    config: Config = {
        "model_type": "falcon",
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": groups > 1,
        "num_ln_in_parallel_attn": norms,
        "parallel_attn": True,
        "alibi": False,
        "bias": model.in_layers("attn_qkv.bias"),
        "layer_norm_epsilon": _epsilon(model),
        "max_position_embeddings": model.settings.integer("context_length"),
        "rope_parameters": model.rope(),
        "tie_word_embeddings": model.tied,
    }
    rows = {"attn_qkv": Groups(groups, model.heads // groups)}
    return Plan(config, model.weights(outside, inside, layers="transformer.h", rows=rows))


@architecture("mpt")
def _mpt(model: Description) -> Plan:
    settings = model.settings
    model.common()
    settings.expect("attention.head_count_kv", (model.heads,))
    slope = settings.number("attention.max_alibi_bias", 0.0)
    if slope <= 0:
        raise settings.error("attention.max_alibi_bias", f"is {slope:g}: without ALiBi it is not supported")
    if slope % 1:
        raise settings.error("attention.max_alibi_bias", f"is {slope:g}, no whole number")
    outside = {
        "transformer.wte": "token_embd",
        "transformer.norm_f": "output_norm",
        "lm_head": "output",
    }
    inside = {
        "norm_1": "attn_norm",
        "attn.Wqkv": "attn_qkv",
        "attn.out_proj": "attn_output",
        "norm_2": "ffn_norm",
        "ffn.up_proj": "ffn_up",
        "ffn.down_proj": "ffn_down",
    }
    wide = settings.integer("feed_forward_length")
    if wide % model.hidden:
        raise settings.error("feed_forward_length", f"is {wide}, no multiple of {model.hidden}")
    config: Config = {
        "model_type": "mpt",
        "vocab_size": model.vocabulary,
        "d_model": model.hidden,
        "n_layers": model.layers,
        "n_heads": model.heads,
        "expansion_ratio": wide // model.hidden,
        "max_seq_len": settings.integer("context_length"),
        "layer_norm_epsilon": _epsilon(model),
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(slope),
            "clip_qkv": settings.number("attention.clamp_kqv", 0.0) or None,
        },
        "tie_word_embeddings": model.tied,
    }
    return Plan(config, model.weights(outside, inside, layers="transformer.blocks"))


@architecture("phi2")
def _phi2(model: Description) -> Plan:
    outside = {"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"}
    inside = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.dense": "attn_output",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    }
    config = model.decoder(
        model_type="phi",
        rope_parameters=model.rope(partial=True),
        hidden_act="gelu_new",
        layer_norm_eps=_epsilon(model),
        qk_layernorm=False,
    )
    return Plan(config, model.weights(outside, inside) | unfused(model, "model.layers"))
