"""A Hugging Face directory of a Llama or Qwen2 model as a GGUF file with the weights as they are.

The tokenizer stays out (llama.cpp calls that "no_vocab"), as prompts are given as token ids: the file is smaller than a
usual one by the vocabulary's text. Needs the `gguf` package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from protocol import PeerError, config_of

# Source dtype -> what numpy reads it as. bf16 is read as bits, which numpy has no type for.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Path, out: Path) -> None:
    """Matrices keep their dtype; vectors (norms, biases) become f32, as llama.cpp wants them."""
    import gguf

    config = config_of(model)
    architecture = config.get("model_type")
    if architecture not in ("llama", "qwen2"):
        raise PeerError(f"{model} is a {architecture} model: this writer knows llama and qwen2")
    heads = _integer(config, "num_attention_heads")
    kv_heads = _integer(config, "num_key_value_heads")
    hidden = _integer(config, "hidden_size")
    rope = config.get("rope_parameters")
    rope_base = (rope if isinstance(rope, dict) else config).get("rope_theta", 10000.0)
    writer = gguf.GGUFWriter(str(out), architecture)
    writer.add_context_length(_integer(config, "max_position_embeddings"))
    writer.add_embedding_length(hidden)
    writer.add_block_count(_integer(config, "num_hidden_layers"))
    writer.add_feed_forward_length(_integer(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(float(str(config["rms_norm_eps"])))
    writer.add_rope_freq_base(float(rope_base))
    writer.add_vocab_size(_integer(config, "vocab_size"))
    writer.add_tokenizer_model("no_vocab")
    if architecture == "llama":
        head_size = config.get("head_dim") or hidden // heads
        assert isinstance(head_size, int)
        writer.add_rope_dimension_count(head_size)
    for name, dtype, values in tensors(model):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if architecture == "llama" and re.search(r"\.self_attn\.[qk]_proj\.", name):
            values = interleave_halves(values, heads if ".q_proj." in name else kv_heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), _as_float32(dtype, values))
        elif dtype == "BF16":
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values).view(np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """The name that llama.cpp has for a Hugging Face weight."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _INSIDE:
        raise PeerError(f"{name}: llama.cpp's {', '.join(sorted(_INSIDE.values()))} have no such weight")
    return f"blk.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"


def interleave_halves(values: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Rows of each head in the order 0, n/2, 1, n/2 + 1, ...: llama.cpp rotates neighbours where HF rotates halves."""
    rows = values.shape[0] // heads
    split = values.reshape(heads, 2, rows // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def tensors(model: Path) -> Iterator[tuple[str, str, NDArray[np.generic]]]:
    """(name, dtype as safetensors calls it, values) of every tensor; bf16 values as their 16 bits."""
    paths = sorted(model.glob("*.safetensors"))
    if not paths:
        raise PeerError(f"{model} has no .safetensors file")
    for path in paths:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = np.memmap(path, np.uint8, "r", 8 + size)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = entry["dtype"]
            if dtype not in _DTYPES:
                raise PeerError(f"{path}: {name} is stored as {dtype}; this writer reads {', '.join(_DTYPES)}")
            start, end = entry["data_offsets"]
            yield name, dtype, data[start:end].view(_DTYPES[dtype]).reshape(entry["shape"])


def _as_float32(dtype: str, values: NDArray[np.generic]) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _integer(config: dict[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise PeerError(f"config.json: {key} is {value!r}, not an integer")
    return value
