"""BERT and RoBERTa, which llama.cpp has as one: encoders of texts, whose file says how a text becomes one vector."""

from __future__ import annotations

from llmc.frontends.gguf.description import Config, Description, Plan, architecture

_OUTSIDE = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_INSIDE = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


@architecture("bert")
def _bert(model: Description) -> Plan:
    settings = model.settings
    settings.expect("attention.causal", (False,))
    settings.expect("attention.head_count_kv", (model.heads,))
    settings.ignore("vocab_size")
    positions, types = model.rows("position_embd.weight"), model.rows("token_types.weight")
    if settings.integer("context_length") > positions:
        raise settings.error("context_length", f"is more than the {positions} rows of the table of positions")
    config: Config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": settings.integer("feed_forward_length"),
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": settings.number("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "pad_token_id": None,
    }
    weights = model.weights(_OUTSIDE, _INSIDE, layers="encoder.layer")
    return Plan(config, weights, pooling=settings.integer("pooling_type", 0))
