"""Tiny random transformers models in a directory, as a user would have them: config, safetensors, tokenizer.

    directory = make_tiny("llama", tmp_path / "llama", num_hidden_layers=3)

The same family, seed and options always give the same bytes. Weights are scaled so that logits have a spread of about
one and greedy decoding wanders; norm weights and biases are perturbed so that a lost one shows.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

VOCAB = 320
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_WINDOW = {"sliding_window": 5}
_ODD = {"hidden_size": 36, "intermediate_size": 93, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}

# Our name of a variant: the transformers model type, and what differs from BASE (None: the key is left out).
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", BASE),
    "llama_odd": ("llama", BASE | _ODD | {"vocab_size": 333, "num_hidden_layers": 3}),
    "llama_tied": ("llama", BASE | {"tie_word_embeddings": True}),
    "llama_bias": ("llama", BASE | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", BASE),
    "qwen2_tied": ("qwen2", BASE | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", BASE | {"head_dim": 32}),
    "mistral": ("mistral", BASE | _WINDOW),
    "mistral_odd": ("mistral", BASE | _ODD | {"sliding_window": 3}),
    "gemma": ("gemma", BASE | {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", BASE | _WINDOW | {"head_dim": 32, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}),
    "gemma3_text": (
        "gemma3_text",
        BASE | _WINDOW | {"head_dim": 32, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "phi": ("phi", BASE),
    "phi3": ("phi3", BASE | {"sliding_window": None, "original_max_position_embeddings": 64}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neo": (
        "gpt_neo",
        {k: v for k, v in BASE.items() if k not in ("num_attention_heads", "num_hidden_layers", "num_key_value_heads")}
        | {"num_layers": 2, "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 1]]}
        | {"tie_word_embeddings": True},
    ),
    "gpt_neox": ("gpt_neox", BASE | {"rotary_pct": 0.25, "num_key_value_heads": None}),
    "gpt_neox_sequential": ("gpt_neox", BASE | {"use_parallel_residual": False, "num_key_value_heads": None}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2 | {"multi_query": True}),
    "opt": ("opt", BASE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": None}),
    "opt_projected": ("opt", BASE | {"ffn_dim": 96, "word_embed_proj_dim": 48, "do_layer_norm_before": False,
                                     "num_key_value_heads": None}),
    "olmo": ("olmo", BASE | {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", BASE),
    "falcon": ("falcon", BASE | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False,
                                 "num_key_value_heads": None}),
    "falcon_multi_query": ("falcon", BASE | {"new_decoder_architecture": False, "multi_query": True, "alibi": False,
                                             "parallel_attn": True, "bias": False, "num_key_value_heads": None}),
    "falcon_alibi": ("falcon", BASE | {"new_decoder_architecture": False, "multi_query": False, "alibi": True,
                                       "parallel_attn": False, "bias": True, "num_key_value_heads": None}),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 8, "tie_word_embeddings": False}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0,
                        "eos_token_id": 1}),
    "codegen": ("codegen", _GPT2 | {"rotary_dim": 8, "tie_word_embeddings": False}),
    "mpt": ("mpt", {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128,
                    "bos_token_id": 0, "eos_token_id": 1}),
    "biogpt": ("biogpt", BASE | {"num_key_value_heads": None}),
    "xglm": ("xglm", {"vocab_size": VOCAB, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4,
                      "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}),
    "stablelm": ("stablelm", BASE | {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", BASE | _WINDOW | {"use_bias": True, "tie_word_embeddings": True}),
    "cohere": ("cohere", BASE | {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", BASE | _WINDOW | {"logit_scale": 0.25, "tie_word_embeddings": True,
                                             "layer_types": ["sliding_attention", "full_attention"]}),
    "granite": ("granite", BASE | {"embedding_multiplier": 1.5, "logits_scaling": 2.0, "residual_multiplier": 0.5,
                                   "attention_multiplier": 0.2}),
    "smollm3": ("smollm3", BASE | {"no_rope_layers": [1, 0]}),
    "persimmon": ("persimmon", BASE | {"num_key_value_heads": None}),
    "nemotron": ("nemotron", BASE | {"head_dim": 16}),
    "glm": ("glm", BASE | {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", BASE | {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "helium": ("helium", BASE | {"head_dim": 16}),
    "exaone4": ("exaone4", BASE | _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "ministral": ("ministral", BASE | _WINDOW | {"head_dim": 16}),
    "olmo3": ("olmo3", BASE | _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "arcee": ("arcee", BASE),
    "ernie4_5": ("ernie4_5", BASE),
    "seed_oss": ("seed_oss", BASE | {"head_dim": 16}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", BASE | {"head_dim": 16}),
    "apertus": ("apertus", BASE),
    "mixtral": ("mixtral", BASE | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", BASE | _EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "olmoe": ("olmoe", BASE | {"num_experts": 5, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", BASE | _WINDOW | {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16,
                                             "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2_moe": ("qwen2_moe", BASE | _EXPERTS | {"shared_expert_intermediate_size": 32, "sliding_window": None}),
    "deepseek_v2": ("deepseek_v2", BASE | _LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1,
                                                     "topk_group": 1, "n_shared_experts": 1}),
    "deepseek_v3": ("deepseek_v3", BASE | _LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2,
                                                     "topk_group": 1, "n_shared_experts": 1}),
    "minicpm3": ("minicpm3", BASE | _LATENT),
    "glm4_moe": ("glm4_moe", BASE | _EXPERTS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "head_dim": 16}),
    "gemma4_text": ("gemma4_text", BASE | {"head_dim": 16, "global_head_dim": 16, "vocab_size_per_layer_input": VOCAB,
                                           "hidden_size_per_layer_input": 8, "tie_word_embeddings": True}),
}  # fmt: skip

# The families that the project promises; the others show how far the frontend reaches.
PROMISED = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "olmo2", "falcon",
    "falcon_alibi", "gptj", "bloom",
)  # fmt: skip

# Seeds with which greedy decoding wanders, for families where the first one repeats a token.
_SEEDS = {"bloom": 2, "gemma2": 4, "gemma3_text": 4, "codegen": 2, "xglm": 1}

_TEXT = (
    "def greet(name):\n    return 'hello, ' + name\n\nclass Point:\n    def __init__(self, x, y):\n"
    "        self.x = x\n        self.y = y\n\nfor index in range(10):\n    print(index, greet('world'))\n"
)
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny(
    family: str, directory: Path, *, seed: int | None = None, dtype: str = "float32", **config: object
) -> Path:
    """Write a model of `family` (a key of FAMILIES) into `directory` and return it; `config` overrides its settings.

    dtype: the checkpoint's: float32, float16 or bfloat16.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = FAMILIES[family]
    seed = _SEEDS.get(family, 0) if seed is None else seed
    merged = {key: value for key, value in {**settings, **config}.items() if value is not None}
    # Here None is a setting of its own: no window, no padding.
    merged |= {key: None for key in ("sliding_window", "pad_token_id") if {**settings, **config}.get(key, 0) is None}
    loaded = AutoConfig.for_model(model_type, **merged)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(loaded, dtype=torch.float32).eval()
    randomize(model, seed)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    write_tokenizer(directory, int(loaded.get_text_config().vocab_size))
    return directory


def randomize(model: object, seed: int = 0) -> None:
    """Give every parameter of a torch module values from its name and the seed: spread, but not degenerate."""
    import torch

    # A tied head gives every token a logit for itself; a small table lets the blocks' output decide instead.
    head = model.get_output_embeddings()  # type: ignore[attr-defined]
    tied = head is not None and head.weight is model.get_input_embeddings().weight  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                table = "emb" in name or "wte" in name or "wpe" in name
                spread = (0.06 if tied else 0.5) if table else (2.5 if tied else 1.5) / math.sqrt(parameter.shape[-1])
                parameter.copy_(noise * spread)
            else:
                parameter.add_(noise * 0.1)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE with `<s>` 0, `</s>` 1, all bytes and a few merges; never more entries than `vocab_size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, VOCAB),
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
