"""GGUF files for tests: a writer of its own, types that it can round to, and models of several architectures.

    path = write_model("llama", tmp_path / "m.gguf", kind="Q4_0")

The writer and the names are told here anew, in the direction of llama.cpp's converters (transformers' names and order
of rows to llama.cpp's), so that a mistake in the frontend is not one here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llmc.frontends.gguf.description import Description
from llmc.frontends.gguf.reader import GgufFile
from llmc.frontends.gguf.settings import Settings
from llmc.frontends.gguf.weights import Tensors

Array = np.ndarray
U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
# number, weights of a block, bytes of a block
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "BF16": (30, 1, 2), "F64": (28, 1, 8), "IQ4_NL": (20, 32, 18),
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: object) -> bytes:
    """A value of the metadata: its type and its bytes."""
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<Ii", I32, value) if value < 0 else struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    assert isinstance(value, list) and value
    item = value[0]
    head = struct.pack("<I", ARRAY)
    if isinstance(item, str):
        return head + struct.pack("<IQ", STRING, len(value)) + b"".join(text(one) for one in value)
    kind, code = (BOOL, "B") if isinstance(item, bool) else (I32, "i") if isinstance(item, int) else (F32, "f")
    return head + struct.pack(f"<IQ{len(value)}{code}", kind, len(value), *value)


def header(metadata: Mapping[str, object], tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Magic, version, counts, metadata and the table. tensors: name to (type, shape, offset)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key) + typed(value)
    for name, (kind, shape, offset) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += struct.pack("<IQ", TYPES[kind][0], offset)
    return out


def write(path: Path, metadata: Mapping[str, object], tensors: Mapping[str, tuple[str, Array]]) -> Path:
    """A file. tensors: name to its type and its values, or its blocks where these are bytes [..., bytes of a row]."""
    table, parts, offset = {}, [], 0
    for name, (kind, values) in tensors.items():
        data, shape = encoded(kind, values)
        table[name] = (kind, shape, offset)
        parts.append(data + bytes(-len(data) % 32))
        offset += len(parts[-1])
    head = header(metadata, table)
    path.write_bytes(head + bytes(-len(head) % 32) + b"".join(parts))
    return path


def encoded(kind: str, values: Array) -> tuple[bytes, tuple[int, ...]]:
    """The bytes of a tensor and its shape."""
    _, block, size = TYPES[kind]
    if values.dtype == np.uint8:
        return values.tobytes(), (*values.shape[:-1], values.shape[-1] // size * block)
    if kind == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes(), values.shape
    floats = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    if kind in floats:
        return values.astype(floats[kind]).tobytes(), values.shape
    return blocks_of(kind, values).tobytes(), values.shape


def blocks_of(kind: str, values: Array, seed: int = 0) -> Array:
    """Blocks of about these values u8 [..., bytes of a row]. Q4_0, Q4_1, Q8_0: rounded; others: random blocks of their
    size, which are as good for tests of reading."""
    _, block, size = TYPES[kind]
    rows = values.astype(np.float32).reshape(-1, block)
    if kind in ("Q4_0", "Q8_0"):
        most = 7 if kind == "Q4_0" else 127
        scale = (np.abs(rows).max(1, keepdims=True) / most).astype(np.float16)
        q = np.rint(rows / np.maximum(scale.astype(np.float32), 1e-8)).clip(-most - 1, most)
        packed = nibbles(q + 8) if kind == "Q4_0" else q.astype(np.int8).view(np.uint8)
        out = np.concatenate([scale.view(np.uint8), packed], axis=1)
    elif kind == "Q4_1":
        low = rows.min(1, keepdims=True).astype(np.float16)
        scale = ((rows.max(1, keepdims=True) - low) / 15).astype(np.float16)
        q = np.rint((rows - low) / np.maximum(scale.astype(np.float32), 1e-8)).clip(0, 15)
        out = np.concatenate([scale.view(np.uint8), low.view(np.uint8), nibbles(q)], axis=1)
    else:
        out = random_blocks(kind, len(rows), float(np.abs(values).mean()), seed)
    return out.reshape(*values.shape[:-1], values.shape[-1] // block * size)


def nibbles(q: Array) -> Array:
    q = q.astype(np.uint8)
    return q[:, :16] | q[:, 16:] << 4


# Where the f16 numbers of a block lie, and what a weight of scale 1 is about: random blocks get weights of wanted size.
HALVES = {"Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
          "Q6_K": (208,), "IQ4_NL": (0,)}  # fmt: skip
SIZES = {"Q5_0": 9, "Q5_1": 16, "Q2_K": 12, "Q3_K": 32, "Q4_K": 250, "Q5_K": 500, "Q6_K": 1000, "IQ4_NL": 60}


def random_blocks(kind: str, count: int, size: float, seed: int) -> Array:
    """Blocks of random bits u8 [count, bytes], whose weights are about `size`."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 256, (count, TYPES[kind][2]), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = (size / SIZES[kind] * rng.uniform(0.5, 1.5, (count, 1))).astype(np.float16)
        out[:, at : at + 2] = scale.view(np.uint8)
    return out


# --- models ---------------------------------------------------------------------------------------------------------

Change = Callable[[Array, object], Array]


def paired(heads: str) -> Change:
    """Rows of a head from halves to pairs, as llama.cpp's converter has them."""

    def change(w: Array, config: object) -> Array:
        n = getattr(config, heads)
        return w.reshape(n, 2, len(w) // n // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    return change


def plus_one(w: Array, config: object) -> Array:
    return w + 1


def turned(w: Array, config: object) -> Array:
    return w.T if w.ndim == 2 else w


def first_half(w: Array, config: object) -> Array:
    return w[:, : w.shape[1] // 2]


def second_half(w: Array, config: object) -> Array:
    return w[:, w.shape[1] // 2 :]


def _llama_like(
    query: Change | None = None, key: Change | None = None, norm: Change | None = None
) -> dict[str, tuple[str, Change | None]]:
    """GGUF's module to transformers' and the change; `*` is the layer."""
    return {
        "token_embd": ("model.embed_tokens", None), "output_norm": ("model.norm", norm), "output": ("lm_head", None),
        "blk.*.attn_norm": ("model.layers.*.input_layernorm", norm),
        "blk.*.attn_q": ("model.layers.*.self_attn.q_proj", query),
        "blk.*.attn_k": ("model.layers.*.self_attn.k_proj", key),
        "blk.*.attn_v": ("model.layers.*.self_attn.v_proj", None),
        "blk.*.attn_output": ("model.layers.*.self_attn.o_proj", None),
        "blk.*.ffn_norm": ("model.layers.*.post_attention_layernorm", norm),
        "blk.*.ffn_gate": ("model.layers.*.mlp.gate_proj", None),
        "blk.*.ffn_up": ("model.layers.*.mlp.up_proj", None),
        "blk.*.ffn_down": ("model.layers.*.mlp.down_proj", None),
    }  # fmt: skip


_HEAD_NORMS = {
    "blk.*.attn_q_norm": ("model.layers.*.self_attn.q_norm", None),
    "blk.*.attn_k_norm": ("model.layers.*.self_attn.k_norm", None),
}
_EXPERTS = {
    "blk.*.ffn_gate_inp": ("model.layers.*.mlp.gate", None),
    "blk.*.ffn_gate_exps.weight": ("model.layers.*.mlp.experts.gate_up_proj", first_half),
    "blk.*.ffn_up_exps.weight": ("model.layers.*.mlp.experts.gate_up_proj", second_half),
    "blk.*.ffn_down_exps.weight": ("model.layers.*.mlp.experts.down_proj", None),
}
_LLAMA = _llama_like(paired("num_attention_heads"), paired("num_key_value_heads"))
_GPT = {
    "token_embd": ("transformer.wte", None), "position_embd": ("transformer.wpe", None),
    "output_norm": ("transformer.ln_f", None),
    "blk.*.attn_norm": ("transformer.h.*.ln_1", None), "blk.*.attn_qkv": ("transformer.h.*.attn.c_attn", turned),
    "blk.*.attn_output": ("transformer.h.*.attn.c_proj", turned), "blk.*.ffn_norm": ("transformer.h.*.ln_2", None),
    "blk.*.ffn_up": ("transformer.h.*.mlp.c_fc", turned), "blk.*.ffn_down": ("transformer.h.*.mlp.c_proj", turned),
}  # fmt: skip
_GEMMA2 = _llama_like(norm=plus_one) | {
    "blk.*.post_attention_norm": ("model.layers.*.post_attention_layernorm", plus_one),
    "blk.*.ffn_norm": ("model.layers.*.pre_feedforward_layernorm", plus_one),
    "blk.*.post_ffw_norm": ("model.layers.*.post_feedforward_layernorm", plus_one),
}
_PHI3 = {name: entry for name, entry in _llama_like().items() if name[-2:] not in ("_q", "_k", "_v", "te", "up")} | {
    "blk.*.attn_qkv": ("model.layers.*.self_attn.qkv_proj", None),
    "blk.*.ffn_up": ("model.layers.*.mlp.gate_up_proj", None),
}
# architecture -> (family of tiny_models, settings that differ, modules, settings of the file beside the common ones)
ARCHITECTURES: dict[str, tuple[str, dict[str, object], dict[str, tuple[str, Change | None]], dict[str, str]]] = {
    "llama": ("llama", {}, _LLAMA, {"rope.dimension_count": "head_dim"}),
    "qwen2": ("qwen2", {}, _llama_like(), {}),
    "qwen3": ("qwen3", {}, _llama_like() | _HEAD_NORMS, {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}, _GEMMA2, {
        "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }),
    "phi3": ("phi3", {}, _PHI3, {"rope.scaling.original_context_length": "original_max_position_embeddings"}),
    "gpt2": ("gpt2", {}, _GPT, {}),
    "qwen3moe": ("qwen3_moe", {}, _llama_like() | _HEAD_NORMS | _EXPERTS, {
        "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }),
}  # fmt: skip
_COMMON = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip


def settings_of(architecture: str, config: object) -> dict[str, object]:
    """The metadata below the architecture's name."""
    found: dict[str, object] = {}
    more = ARCHITECTURES[architecture][3]
    for key, name in {**_COMMON, **more}.items():
        value = getattr(config, name, None)
        if value is not None:
            found[f"{architecture}.{key}"] = value
    if architecture == "gpt2":
        found["gpt2.feed_forward_length"] = 4 * config.n_embd  # type: ignore[attr-defined]
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if theta is not None:
        found[f"{architecture}.rope.freq_base"] = float(theta)
    return found


def tokenizer_of(directory: Path) -> dict[str, object]:
    """The vocabulary of a tiny model's tokenizer.json, which is byte-level."""
    import json

    state = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(vocabulary) - 2), "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip


def model_parts(
    architecture: str, directory: Path, kind: str = "F32", **config: object
) -> tuple[dict[str, object], dict[str, tuple[str, Array]]]:
    """Metadata and tensors of a tiny model, which is written into `directory` as transformers has it. kind: of
    matrices; the rest is F32."""
    import torch
    from tiny_models import make_tiny
    from transformers import AutoModelForCausalLM

    family, settings, modules, _ = ARCHITECTURES[architecture]
    make_tiny(family, directory, **{**settings, **config})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    metadata = {"general.architecture": architecture, "general.name": "tiny"}
    metadata |= settings_of(architecture, model.config) | tokenizer_of(directory)
    tensors: dict[str, tuple[str, Array]] = {}
    for layer in range(model.config.num_hidden_layers):
        for theirs, (ours, change) in modules.items():
            whole = theirs.endswith(".weight")
            for suffix in [""] if whole else [".weight", ".bias"]:
                name, source = f"{theirs}{suffix}".replace("*", str(layer)), f"{ours}{suffix}".replace("*", str(layer))
                if source not in state or name in tensors:
                    continue
                if ours == "lm_head" and model.config.tie_word_embeddings:
                    continue
                values = state[source] if change is None else change(state[source], model.config)
                small = values.ndim < 2 or values.shape[-1] % TYPES[kind][1] or theirs in ("position_embd",)
                tensors[name] = ("F32" if small else kind, np.ascontiguousarray(values))
    return metadata, tensors


def write_model(architecture: str, path: Path, kind: str = "F32", **config: object) -> Path:
    """A tiny model as a file at `path`, and as transformers has it in a directory beside it of the same stem."""
    return write(path, *model_parts(architecture, path.with_suffix(""), kind, **config))


# Four heads of eight channels, and as many key heads where a test says nothing else.
SMALL: dict[str, object] = {
    "block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 128,
    "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip


def described(
    folder: Path,
    name: str,
    settings: Mapping[str, object],
    tensors: Mapping[str, object],
    more: Mapping[str, object] | None = None,
) -> Description:
    """A file of small sizes with other settings (None: without it) and tensors: their shape, or F32 values, or their
    type and values. more: of the metadata, by whole keys."""
    metadata: dict[str, object] = {"general.architecture": name}
    metadata |= {f"{name}.{key}": value for key, value in {**SMALL, **settings}.items() if value is not None}
    stored: dict[str, tuple[str, Array]] = {}
    for key, given in {"token_embd.weight": (40, 32), **tensors}.items():
        if isinstance(given, tuple) and isinstance(given[0], str):
            stored[key] = given
        else:
            stored[key] = ("F32", np.zeros(given) if isinstance(given, tuple) else np.asarray(given))
    file = GgufFile(write(folder / "m.gguf", metadata | dict(more or {}), stored))
    return Description(file.path, name, Settings(file.path, file.metadata, name), Tensors([file]))
