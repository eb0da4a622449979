"""What each architecture makes of a file: the settings of transformers' model, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf_files import described

from llmc.errors import FrontendError
from llmc.frontends.gguf.description import Plan, architectures
from llmc.frontends.gguf.weights import GgufWeights

EXPERTS = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 16}
LATENT = {
    **EXPERTS, "expert_group_count": 2, "rope.dimension_count": 4, "attention.key_length": 12,
    "attention.value_length": 8, "attention.kv_lora_rank": 16,
}  # fmt: skip
HALF = {"rope.dimension_count": 4}
POSITIONS = {"position_embd.weight": (64, 32)}
BERT = {**POSITIONS, "token_types.weight": (2, 32)}
WINDOW = {"attention.sliding_window": 16, "block_count": 8}
FAR, NEAR = "full_attention", "sliding_attention"


def planned(
    folder: Path, name: str, settings: Mapping[str, object], tensors: Mapping[str, object] | None = None
) -> Plan:
    return architectures()[name](described(folder, name, settings, tensors or {}))


SETTINGS: list[tuple[str, dict[str, object], dict[str, object], dict[str, object]]] = [
    ("llama", {}, {}, {"model_type": "llama"}),
    ("llama", {"attention.sliding_window": 16}, {}, {"model_type": "mistral", "sliding_window": 16}),
    ("llama", EXPERTS, {}, {"model_type": "mixtral", "num_local_experts": 8, "sliding_window": None}),
    ("llama", {**EXPERTS, "attention.sliding_window": 16}, {}, {"model_type": "mixtral", "sliding_window": 16}),
    ("qwen2", {}, {}, {"use_sliding_window": False}),
    ("qwen3", {}, {}, {"use_sliding_window": False}),
    ("qwen2moe", EXPERTS, {}, {
        "norm_topk_prob": False, "use_sliding_window": False, "decoder_sparse_step": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 128,
    }),
    ("qwen2moe", {**EXPERTS, "expert_shared_feed_forward_length": 24}, {}, {"shared_expert_intermediate_size": 24}),
    ("qwen3moe", {**EXPERTS, "expert_feed_forward_length": None}, {}, {
        "norm_topk_prob": True, "use_sliding_window": False, "decoder_sparse_step": 1, "moe_intermediate_size": 128,
    }),
    ("qwen3moe", {**EXPERTS, "expert_weights_scale": 0.0, "expert_group_count": 0, "expert_group_used_count": 0}, {}, {
        "num_experts": 8,
    }),
    ("qwen3moe", {**EXPERTS, "expert_weights_scale": 1.0, "expert_group_count": 1, "expert_group_used_count": 1}, {}, {
        "num_experts": 8,
    }),
    ("qwen3moe", {**EXPERTS, "expert_gating_func": 1}, {}, {"num_experts": 8}),
    ("olmoe", EXPERTS, {}, {"norm_topk_prob": False, "clip_qkv": None}),
    ("olmoe", {**EXPERTS, "attention.clamp_kqv": 8.0}, {}, {"clip_qkv": 8.0}),
    ("gemma", {}, {}, {"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"}),
    ("gemma2", {"block_count": 4}, {}, {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
        "layer_types": [NEAR, FAR, NEAR, FAR], "query_pre_attn_scalar": 8,
    }),
    ("gemma2", {"block_count": 46, "attention.key_length": 16, "attention.value_length": 16}, {}, {
        "query_pre_attn_scalar": 8, "head_dim": 16,
    }),
    ("gemma2", {"block_count": 45, "attention.key_length": 16, "attention.value_length": 16}, {}, {
        "query_pre_attn_scalar": 16,
    }),
    ("gemma2", {"block_count": 47, "attention.key_length": 16, "attention.value_length": 16}, {}, {
        "query_pre_attn_scalar": 16,
    }),
    ("gemma3", {}, {}, {
        "rope_parameters": {
            FAR: {"rope_type": "default", "rope_theta": 1e6}, NEAR: {"rope_type": "default", "rope_theta": 10000.0}
        },
        "final_logit_softcapping": None, "sliding_window": 64, "layer_types": [FAR, FAR], "query_pre_attn_scalar": 8,
        "use_bidirectional_attention": False,
    }),
    ("gemma3", {**WINDOW, "final_logit_softcapping": 30.0}, {}, {
        "layer_types": [*[NEAR] * 5, FAR, NEAR, NEAR], "sliding_window": 16, "final_logit_softcapping": 30.0,
    }),
    ("gemma3", {"block_count": 62, "attention.key_length": 16, "attention.value_length": 16}, {}, {
        "query_pre_attn_scalar": 8,
    }),
    ("gemma3", {"block_count": 61, "attention.key_length": 16, "attention.value_length": 16}, {}, {
        "query_pre_attn_scalar": 16,
    }),
    ("gemma3", {"block_count": 63, "attention.key_length": 16, "attention.value_length": 16}, {}, {
        "query_pre_attn_scalar": 16,
    }),
    ("gpt-oss", {**EXPERTS, **WINDOW, "block_count": 4, "expert_gating_func": 1}, {}, {
        "layer_types": [NEAR, FAR, NEAR, FAR], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    ("gpt-oss", {**EXPERTS, **WINDOW, "expert_gating_func": 3}, {}, {"sliding_window": 16, "intermediate_size": 16}),
    ("granite", {}, {}, {
        "attention_multiplier": 8**-0.5, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    }),
    ("granite", {"attention.scale": 0.5, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0}, {}, {
        "attention_multiplier": 0.5, "embedding_multiplier": 12.0, "residual_multiplier": 0.25, "logits_scaling": 8.0,
    }),
    ("granitemoe", EXPERTS, {}, {"model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 2}),
    ("granitemoe", {**EXPERTS, "expert_weights_norm": True, "expert_shared_feed_forward_length": 24}, {}, {
        "model_type": "granitemoeshared", "shared_intermediate_size": 24,
    }),
    ("smollm3", {"block_count": 8}, {}, {
        "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0], "layer_types": [FAR] * 8, "use_sliding_window": False,
    }),
    ("olmo", {}, {}, {"clip_qkv": None}),
    ("olmo", {"attention.clamp_kqv": 8.0}, {}, {"clip_qkv": 8.0}),
    ("olmo2", {"rope.scaling.factor": 4.0}, {}, {"model_type": "olmo2"}),
    ("olmo2", {**WINDOW, "rope.freq_base_swa": 10000.0}, {}, {
        "model_type": "olmo3", "layer_types": [NEAR, NEAR, NEAR, FAR] * 2, "sliding_window": 16,
    }),
    ("exaone4", {}, {}, {"sliding_window": None, "layer_types": [FAR] * 2}),
    ("exaone4", WINDOW, {}, {"sliding_window": 16, "layer_types": [NEAR, NEAR, NEAR, FAR] * 2}),
    ("chatglm", HALF, {}, {"attention_bias": False}),
    ("chatglm", HALF, {"blk.0.attn_q.bias": (32,)}, {"attention_bias": True}),
    ("chatglm", HALF, {"blk.0.attn_qkv.bias": (96,)}, {"attention_bias": True}),
    ("phi3", {}, {}, {"sliding_window": None, "original_max_position_embeddings": 64}),
    ("phi3", {"attention.sliding_window": 16, "rope.scaling.original_context_length": 32}, {}, {
        "sliding_window": 16, "original_max_position_embeddings": 32,
    }),
    ("starcoder2", {}, {}, {"sliding_window": None}),
    ("starcoder2", {"attention.sliding_window": 16}, {}, {"sliding_window": 16}),
    ("stablelm", {"use_parallel_residual": True}, {}, {"use_parallel_residual": True, "qk_layernorm": False}),
    ("stablelm", {}, {"blk.1.ffn_norm.weight": (32,)}, {"use_parallel_residual": False}),
    ("cohere2", {**WINDOW, "logit_scale": 0.25}, {}, {"layer_types": [NEAR, NEAR, NEAR, FAR] * 2, "logit_scale": 0.25}),
    ("gpt2", {}, POSITIONS, {"n_positions": 64, "n_inner": 128}),
    ("starcoder", {"attention.head_count_kv": 1}, POSITIONS, {"multi_query": True, "scale_attn_weights": True}),
    ("gptneox", {}, {}, {"use_parallel_residual": True, "rotary_pct": 1.0}),
    ("gptneox", {"use_parallel_residual": False}, {}, {"use_parallel_residual": False}),
    ("falcon", {}, {}, {
        "num_kv_heads": 1, "multi_query": True, "new_decoder_architecture": False, "num_ln_in_parallel_attn": 1,
        "parallel_attn": True, "alibi": False, "bias": False,
    }),
    ("falcon", {"attention.head_count_kv": 2}, {"blk.0.attn_norm_2.weight": (32,)}, {
        "num_kv_heads": 2, "multi_query": False, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2,
    }),
    ("falcon", {"attention.head_count_kv": 4}, {}, {"num_kv_heads": 4}),
    ("mpt", {"attention.max_alibi_bias": 8.0, "feed_forward_length": 96}, {}, {
        "expansion_ratio": 3, "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None},
    }),
    ("mpt", {"attention.max_alibi_bias": 1.0, "attention.clamp_kqv": 6.0}, {}, {
        "attn_config": {"alibi": True, "alibi_bias_max": 1, "clip_qkv": 6.0},
    }),
    ("phi2", {}, {}, {"qk_layernorm": False}),
    ("bert", {"attention.causal": False}, BERT, {"max_position_embeddings": 64, "type_vocab_size": 2}),
    ("deepseek2", LATENT, {}, {
        "model_type": "deepseek_v2", "n_shared_experts": None, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
        "norm_topk_prob": False, "n_group": 2, "topk_group": 1, "q_lora_rank": None, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "topk_method": "group_limited_greedy", "num_key_value_heads": 4,
    }),
    ("deepseek2", {**LATENT, "expert_group_count": 1, "expert_gating_func": 1, "attention.head_count_kv": 1}, {}, {
        "model_type": "deepseek_v2", "topk_method": "greedy",
    }),
    ("deepseek2", {**LATENT, "expert_gating_func": 2, "expert_weights_norm": True, "attention.q_lora_rank": 24}, {}, {
        "model_type": "deepseek_v3", "rope_interleave": True, "norm_topk_prob": True, "q_lora_rank": 24,
    }),
    ("deepseek2", {**LATENT, "expert_shared_count": 3, "attention.key_length_mla": 10}, {}, {
        "n_shared_experts": 3, "qk_nope_head_dim": 6,
    }),
    ("deepseek2", {**LATENT, "rope.dimension_count": 2}, {}, {"qk_rope_head_dim": 2, "qk_nope_head_dim": 10}),
    ("glm4moe", {**EXPERTS, **HALF, "expert_group_count": 1, "expert_gating_func": 2}, {}, {"n_group": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "tensors", "expected"), SETTINGS)
def test_settings_become_those_of_the_model(
    tmp_path: Path, name: str, settings: dict[str, object], tensors: dict[str, object], expected: dict[str, object]
) -> None:
    config = planned(tmp_path, name, settings, tensors).config
    assert {key: config.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", ["chatglm", "glm4", "phi3", "stablelm", "nemotron", "gptneox", "phi2", "glm4moe"])
def test_a_part_of_a_head_may_be_rotated(tmp_path: Path, name: str) -> None:
    more = {**EXPERTS, "expert_group_count": 1, "expert_gating_func": 2} if name == "glm4moe" else {}
    config = planned(tmp_path, name, {**HALF, **more}).config
    rope = config["rope_parameters"]
    assert isinstance(rope, dict) and rope["partial_rotary_factor"] == 0.5
    assert name != "gptneox" or config["rotary_pct"] == 0.5


def test_how_tokens_become_one_vector_may_be_said(tmp_path: Path) -> None:
    for said, expected in ((None, 0), (0, 0), (2, 2)):
        settings = {"attention.causal": False, "pooling_type": said}
        assert planned(tmp_path, "bert", settings, BERT).pooling == expected


def test_gpt_oss_does_not_round_what_yarn_keeps(tmp_path: Path) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    rope = planned(tmp_path, "gpt-oss", {**EXPERTS, **WINDOW, **yarn}).config["rope_parameters"]
    assert isinstance(rope, dict) and rope["truncate"] is False


REFUSED: list[tuple[str, dict[str, object], dict[str, object], str]] = [
    ("qwen3moe", {**EXPERTS, "expert_gating_func": 2}, {}, "expert_gating_func is 2"),
    ("qwen3moe", {**EXPERTS, "expert_weights_norm": False}, {}, "expert_weights_norm is False"),
    ("qwen3moe", {**EXPERTS, "expert_weights_scale": 2.5}, {}, "expert_weights_scale is 2.5"),
    ("qwen3moe", {**EXPERTS, "expert_group_count": 2}, {}, "expert_group_count is 2"),
    ("qwen3moe", {**EXPERTS, "expert_group_used_count": 2}, {}, "expert_group_used_count is 2"),
    ("qwen2moe", {**EXPERTS, "expert_weights_norm": True}, {}, "expert_weights_norm is True"),
    ("qwen2moe", {**EXPERTS, "feed_forward_length": None}, {}, "feed_forward_length is missing"),
    ("olmoe", {**EXPERTS, "attention.layer_norm_rms_epsilon": 1e-6}, {}, "layer_norm_rms_epsilon is"),
    ("olmo", {"attention.layer_norm_epsilon": 1e-6}, {}, "layer_norm_epsilon is"),
    ("olmo2", {**WINDOW, "rope.freq_base_swa": 20000.0}, {}, "freq_base_swa is 20000"),
    ("olmo2", {**WINDOW, "rope.scaling.factor": 4.0}, {}, "makes 'linear' beside windows"),
    ("gpt-oss", {**EXPERTS, **WINDOW, "expert_gating_func": 2}, {}, "expert_gating_func is 2"),
    ("stablelm", {"use_parallel_residual": False}, {}, "use_parallel_residual is False"),
    ("gpt2", {}, {}, r"table of positions, \[0\]"),
    ("gpt2", {}, {"position_embd.weight": (64,)}, r"table of positions, \[64\]"),
    ("gpt2", {}, {"position_embd.weight": (64, 1, 32)}, r"table of positions, \[64, 1, 32\]"),
    ("gpt2", {"context_length": 63}, POSITIONS, "table of positions"),
    ("gpt2", {"context_length": 65}, POSITIONS, "table of positions"),
    ("gpt2", {"attention.head_count_kv": 1}, POSITIONS, "head_count_kv is 1"),
    ("starcoder", {"attention.head_count_kv": 2}, POSITIONS, "head_count_kv is 2"),
    ("bloom", {"feed_forward_length": 96}, {}, "feed_forward_length is 96"),
    ("falcon", {"feed_forward_length": 96}, {}, "feed_forward_length is 96"),
    ("falcon", {"attention.head_count_kv": 3}, {}, "no multiple of 3 key heads"),
    ("falcon", {"attention.head_count_kv": 0}, {}, "no multiple of 0 key heads"),
    ("falcon", {"attention.head_count_kv": -2}, {}, "no multiple of -2 key heads"),
    ("mpt", {}, {}, "max_alibi_bias is 0: without"),
    ("mpt", {"attention.max_alibi_bias": 0.0}, {}, "max_alibi_bias is 0: without"),
    ("mpt", {"attention.max_alibi_bias": -8.0}, {}, "max_alibi_bias is -8: without"),
    ("mpt", {"attention.max_alibi_bias": 7.5}, {}, "max_alibi_bias is 7.5"),
    ("mpt", {"attention.max_alibi_bias": 8.0, "feed_forward_length": 100}, {}, "100, no multiple of 32"),
    ("bert", {"context_length": 65, "attention.causal": False}, BERT, "more than the 64 rows"),
    ("bert", {"attention.causal": True}, BERT, "causal is True"),
    ("deepseek2", {**LATENT, "expert_gating_func": 3}, {}, "expert_gating_func is 3"),
    ("deepseek2", {**LATENT, "expert_gating_func": 0}, {}, "expert_gating_func is 0"),
    ("deepseek2", {**LATENT, "expert_weights_norm": 1}, {}, "expert_weights_norm must be true or false"),
    ("deepseek2", {**LATENT, "expert_weights_norm": True}, {}, "expert_weights_norm is True"),
    ("deepseek2", {**LATENT, "rope.dimension_count": 0}, {}, "is 0, no even number below 12"),
    ("deepseek2", {**LATENT, "rope.dimension_count": 12}, {}, "is 12, no even number below 12"),
    ("deepseek2", {**LATENT, "rope.dimension_count": 5}, {}, "is 5, no even number below 12"),
    ("deepseek2", {**LATENT, "attention.head_count_kv": 2}, {}, "head_count_kv is 2"),
    ("deepseek2", {**LATENT, "expert_group_count": None}, {}, "expert_group_count is missing"),
    ("glm4moe", {**EXPERTS, **HALF, "expert_group_count": 1, "expert_gating_func": 1}, {}, "expert_gating_func is 1"),
    ("granitemoe", {**EXPERTS, "expert_weights_norm": False}, {}, "expert_weights_norm is False"),
    ("granite", {"rope.scaling.finetuned": False}, {}, "it means that there are no rotary embeddings"),
    ("arcee", HALF, {}, "4 of 8 channels"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "tensors", "said"), REFUSED)
def test_what_a_model_cannot_be_told_is_refused(
    tmp_path: Path, name: str, settings: dict[str, object], tensors: dict[str, object], said: str
) -> None:
    with pytest.raises(FrontendError, match=said):
        planned(tmp_path, name, settings, tensors)


def loaded(
    folder: Path, name: str, settings: Mapping[str, object], tensors: Mapping[str, object]
) -> dict[str, np.ndarray]:
    """The weights by transformers' names, each in the shape that was said before."""
    model = described(folder, name, settings, tensors)
    plan = architectures()[name](model)
    assert not model.left_over(plan.weights)
    source = GgufWeights(model.tensors, plan.weights)
    arrays = {each: source.load(each) for each in source.names}
    assert {each: array.shape for each, array in arrays.items()} == {each: source.shape(each) for each in source.names}
    return arrays


def numbered(rows: int, inputs: int = 32) -> np.ndarray:
    """A matrix whose rows say which they are."""
    return np.repeat(np.arange(rows, dtype=np.float32)[:, None], inputs, axis=1)


@pytest.mark.parametrize("name", ["chatglm", "phi2"])
def test_queries_keys_and_values_of_one_tensor_are_three_weights(tmp_path: Path, name: str) -> None:
    tensors = {
        f"blk.{at}.attn_qkv.{suffix}": values + 100 * at
        for at in range(2)
        for suffix, values in (("weight", numbered(64)), ("bias", np.arange(64, dtype=np.float32)))
    }
    found = loaded(tmp_path, name, {"attention.head_count_kv": 2}, tensors)
    for at in range(2):
        for part, begin, end in (("q", 0, 32), ("k", 32, 48), ("v", 48, 64)):
            expected = 100 * at + np.arange(begin, end)
            module = f"model.layers.{at}.self_attn.{part}_proj"
            assert found[f"{module}.weight"][:, 0].tolist() == found[f"{module}.bias"].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "queries", "groups", "weight"),
    [
        ("bloom", 1, 4, "transformer.h.1.self_attention.query_key_value"),
        ("gptneox", 1, 4, "gpt_neox.layers.1.attention.query_key_value"),
        ("falcon", 2, 2, "transformer.h.1.self_attention.query_key_value"),
        ("falcon", 4, 1, "transformer.h.1.self_attention.query_key_value"),
    ],
)
def test_a_key_head_s_queries_key_and_value_lie_together(
    tmp_path: Path, name: str, queries: int, groups: int, weight: str
) -> None:
    """Files have all queries, then all keys, then all values. A head is named by what it is, and its number."""
    stored = [f"q{head}" for head in range(queries * groups)] + [f"{kind}{at}" for kind in "kv" for at in range(groups)]
    rows = np.repeat(np.arange(len(stored)), 8).astype(np.float32) + np.tile(np.arange(8) / 10, len(stored))
    settings = {} if queries == 1 else {"attention.head_count_kv": groups}
    tensors = {"blk.1.attn_qkv.weight": numbered(1, 32) + rows[:, None], "blk.1.attn_qkv.bias": rows}
    found = loaded(tmp_path, name, settings, tensors)
    expected = [
        head
        for at in range(groups)
        for head in (*(f"q{at * queries + query}" for query in range(queries)), f"k{at}", f"v{at}")
    ]
    for values in (found[f"{weight}.weight"][:, 0], found[f"{weight}.bias"]):
        assert [stored[int(value)] for value in values[::8]] == expected
        assert np.allclose(values.reshape(-1, 8) % 1, np.arange(8) / 10, atol=1e-5)


@pytest.mark.parametrize(("name", "norms"), [("gemma", 3), ("gemma2", 5), ("gemma3", 7), ("nemotron", 3)])
def test_norms_that_are_stored_as_1_plus_w(tmp_path: Path, name: str, norms: int) -> None:
    stored = ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm", "blk.0.post_attention_norm", "blk.0.post_ffw_norm"]
    stored += ["blk.0.attn_q_norm", "blk.0.attn_k_norm"]
    found = loaded(tmp_path, name, {}, {f"{each}.weight": np.full(32, 1.25) for each in stored[:norms]})
    others = [each for each in found if each != "model.embed_tokens.weight"]
    assert len(others) == norms and all(np.all(found[each] == 0.25) for each in others)


def test_the_norms_of_heads_are_modules_of_their_own(tmp_path: Path) -> None:
    norms = {"attn_q_norm": numbered(4, 8), "attn_k_norm": numbered(2, 8) + 10}
    tensors = {f"blk.{at}.{each}.weight": values for at in range(2) for each, values in norms.items()}
    settings = {"attention.head_count_kv": 2}
    found = loaded(tmp_path, "stablelm", settings, tensors)
    for at in range(2):
        for kind, heads, first in (("q", 4, 0), ("k", 2, 10)):
            module = f"model.layers.{at}.self_attn.{kind}_layernorm.norms"
            assert [found[f"{module}.{head}.weight"].tolist() for head in range(heads)] == [
                [first + head] * 8 for head in range(heads)
            ]
    for wrong in ({"blk.1.attn_k_norm.weight": numbered(4, 8)}, {"blk.1.attn_k_norm.weight": numbered(1, 8)}):
        with pytest.raises(FrontendError, match=r"blk\.1\.attn_k_norm\.weight has not one row for each of 2 heads"):
            planned(tmp_path, "stablelm", settings, tensors | wrong)
    del tensors["blk.0.attn_q_norm.weight"]
    with pytest.raises(FrontendError, match=r"blk\.0\.attn_q_norm\.weight has not one row"):
        planned(tmp_path, "stablelm", settings, tensors)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("llama", "model.layers.0.mlp.experts.gate_up_proj"),
        ("qwen3moe", "model.layers.0.mlp.experts.gate_up_proj"),
        ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight"),
    ],
)
def test_gates_and_values_of_an_expert_lie_one_after_the_other(tmp_path: Path, name: str, weight: str) -> None:
    gates = np.stack([numbered(16) + 100 * expert for expert in range(8)])
    tensors = {"blk.0.ffn_gate_exps.weight": gates, "blk.0.ffn_up_exps.weight": gates + 50}
    found = loaded(tmp_path, name, EXPERTS, tensors)[weight]
    for expert in range(8):
        assert found[expert, :, 0].tolist() == [100 * expert + at for at in (*range(16), *range(50, 66))]


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Rows of gates and values in turn, inputs first; so their biases, in turn too."""
    gates = np.stack([numbered(16) + 100 * expert for expert in range(8)])
    tensors = {
        "blk.0.ffn_gate_exps.weight": gates, "blk.0.ffn_up_exps.weight": gates + 50,
        "blk.0.ffn_gate_exps.bias": gates[:, :, 0], "blk.0.ffn_up_exps.bias": gates[:, :, 0] + 50,
        "blk.0.ffn_down_exps.weight": np.stack([numbered(32, 16)] * 8), "blk.0.ffn_down_exps.bias": numbered(8),
    }  # fmt: skip
    found = loaded(tmp_path, "gpt-oss", {**EXPERTS, **WINDOW}, tensors)
    module = "model.layers.0.mlp.experts"
    both, bias, down = (found[f"{module}.{each}"] for each in ("gate_up_proj", "gate_up_proj_bias", "down_proj"))
    assert both.shape == (8, 32, 32) and down.shape == (8, 16, 32) and down[3, 0].tolist() == list(range(32))
    for expert in range(8):
        expected = [100 * expert + at + more for at in range(16) for more in (0, 50)]
        assert both[expert, 7].tolist() == bias[expert].tolist() == expected
    assert found[f"{module}.down_proj_bias"].tolist() == numbered(8).tolist()


def test_one_expert_for_all_tokens(tmp_path: Path) -> None:
    """The vector of its gate is a matrix of one row; its gate and values are one matrix in Granite."""
    gate = {"blk.0.ffn_gate_inp_shexp.weight": np.arange(32)}
    found = loaded(tmp_path, "qwen2moe", EXPERTS, gate)["model.layers.0.mlp.shared_expert_gate.weight"]
    assert found.tolist() == [list(range(32))]
    both = {"blk.0.ffn_gate_shexp.weight": numbered(24), "blk.0.ffn_up_shexp.weight": numbered(24) + 50}
    settings = {**EXPERTS, "expert_shared_feed_forward_length": 24}
    found = loaded(tmp_path, "granitemoe", settings, both)["model.layers.0.shared_mlp.input_linear.weight"]
    assert found[:, 0].tolist() == [*range(24), *range(50, 74)]


def test_keys_and_values_made_of_latent_ones(tmp_path: Path) -> None:
    """Keys [heads, latent, channels] and values [heads, channels, latent] are rows of a head: its keys, its values."""
    keys = np.arange(4 * 16 * 8).reshape(4, 16, 8)
    values = 1000 + np.arange(4 * 8 * 16).reshape(4, 8, 16)
    tensors = {"blk.0.attn_k_b.weight": keys, "blk.0.attn_v_b.weight": values}
    found = loaded(tmp_path, "deepseek2", LATENT, tensors)["model.layers.0.self_attn.kv_b_proj.weight"]
    assert found.shape == (4 * 16, 16)
    for head in range(4):
        for channel in range(8):
            assert found[16 * head + channel].tolist() == keys[head, :, channel].tolist()
            assert found[16 * head + 8 + channel].tolist() == values[head, channel].tolist()


@pytest.mark.parametrize("name", ["llama", "granite", "smollm3", "arcee", "olmo"])
def test_rotated_pairs_become_halves_of_a_head(tmp_path: Path, name: str) -> None:
    tensors = {"blk.0.attn_q.weight": numbered(32), "blk.0.attn_k.weight": numbered(16)}
    found = loaded(tmp_path, name, {"attention.head_count_kv": 2}, tensors)
    for kind, heads in (("q", 4), ("k", 2)):
        rows = found[f"model.layers.0.self_attn.{kind}_proj.weight"][:, 0]
        assert rows.tolist() == [8 * head + at for head in range(heads) for at in (0, 2, 4, 6, 1, 3, 5, 7)]


def test_a_layer_of_falcon_has_one_norm_or_two(tmp_path: Path) -> None:
    name, layer = "falcon", "transformer.h.0."
    one, two = {"blk.0.attn_norm.weight": np.full(32, 1.0)}, {"blk.0.attn_norm_2.weight": np.full(32, 2.0)}
    found = loaded(tmp_path, name, {}, one)
    assert found[f"{layer}input_layernorm.weight"].tolist() == [1.0] * 32
    found = loaded(tmp_path, name, {"attention.head_count_kv": 2}, one | two)
    assert (
        found[f"{layer}ln_mlp.weight"].tolist() == [1.0] * 32 and found[f"{layer}ln_attn.weight"].tolist() == [2] * 32
    )
