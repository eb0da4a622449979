"""Model directories that are broken, lying or hostile: what is done to a good one, and what the refusal must say."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

Damage = Callable[[Path], object]

WEIGHTS = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def config(**changes: object) -> Damage:
    """Other settings in config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def weight_bytes(change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes in the weights' file."""

    def apply(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return apply


def header(change: Callable[[dict[str, dict[str, object]]], object]) -> Damage:
    """Another header before the same tensors' bytes."""

    def apply(data: bytes) -> bytes:
        (length,) = struct.unpack_from("<Q", data)
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return weight_bytes(apply)


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Other tensors, in a file that is right in itself."""

    def apply(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        found = {name: value.copy() for name, value in load_file(folder / WEIGHTS).items()}
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return apply


def number(value: float, name: str = QUERY) -> Damage:
    """One number of one tensor."""
    return tensors(lambda found: found[name].reshape(-1).__setitem__(5, value))


def sharded(file: str) -> Damage:
    """An index whose every tensor is said to lie in `file`."""

    def apply(folder: Path) -> None:
        from safetensors.numpy import load_file

        names = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return apply


class Exploit:
    """Unpickled, it makes a file `harm` in the working directory."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("touch harm",)


def torch_file(write: Callable[[Path], object]) -> Damage:
    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        write(folder / "pytorch_model.bin")

    return apply


def _torch_exploit(path: Path) -> None:
    import torch

    torch.save({QUERY: Exploit()}, path)


def _pickle_exploit(path: Path) -> None:
    path.write_bytes(pickle.dumps({QUERY: Exploit()}, protocol=4))


_DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "max_position_embeddings")
_WRONG_SIZES: dict[str, tuple[Damage, str]] = {
    f"{name} {value!r}": (config(**{name: value}), rf"config\.json.*{name}")
    for name in _SIZES
    for value in ("abc", -1, 0, 10**12, 2.5, True, [64])
}

# name: (what is done to a good model, what the one line of the refusal matches)
MODELS: dict[str, tuple[Damage, str]] = {
    "config missing": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "config not JSON": (content("config.json", b"{not json"), r"config\.json is not valid JSON"),
    "config empty": (content("config.json", b""), r"config\.json is not valid JSON"),
    "config binary": (content("config.json", b"\xff\xfe\0\1"), r"config\.json is not valid JSON"),
    "config a list": (content("config.json", b"[1]"), r"config\.json must hold a JSON object"),
    "config huge": (content("config.json", b'{"a": "' + b"x" * (5 << 20) + b'"}'), r"config\.json has \d+ bytes"),
    "config deep": (content("config.json", _DEEP), r"config\.json.*nested too deep"),
    **_WRONG_SIZES,
    "heads that do not divide": (config(num_attention_heads=5), r"config\.json.*attention heads"),
    "layers that are not there": (config(num_hidden_layers=7), r"missing: model\.layers\.1\."),
    "another width": (config(intermediate_size=32), r"down_proj\.weight is \[64, 96\], the config wants \[64, 32\]"),
    "eps NaN": (config(rms_norm_eps=float("nan")), r"config\.json: rms_norm_eps is nan"),
    "eps negative": (config(rms_norm_eps=-1.0), r"config\.json: rms_norm_eps is -1"),
    "no such activation": (config(hidden_act="nothing"), r"config\.json.*nothing"),
    "rope base zero": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        r"config\.json: rope_theta is 0",
    ),
    "rope scaled by zero": (
        config(rope_parameters={"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}),
        r"config\.json: factor is 0",
    ),
    "no such rope": (config(rope_parameters={"rope_type": "odd", "rope_theta": 1e4}), r"config\.json.*odd"),
    "type missing": (content("config.json", b"{}"), r"config\.json has no model_type"),
    "type unknown": (config(model_type="nothing"), r"config\.json: model type 'nothing' is unknown.*pip install"),
    "remote code": (
        config(model_type="nothing", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        r"config\.json.*remote code, which llmc never runs",
    ),
    "said to be quantized": (config(quantization_config={"quant_method": "gptq"}), "gptq, but .* no layer"),
    "t5": (config(model_type="t5"), r"config\.json: model type 't5' has an encoder.*not supported yet"),
    "vit": (config(model_type="vit"), r"config\.json: ViTModel takes pixel_values, not text"),
    "bart": (config(model_type="bart"), r"config\.json: model type 'bart' has an encoder.*not supported yet"),
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights: expected model.safetensors"),
    "weights empty": (weight_bytes(lambda data: b""), r"model\.safetensors is no safetensors file"),
    "weights cut in the header": (weight_bytes(lambda data: data[:100]), r"model\.safetensors is truncated"),
    "weights cut in half": (weight_bytes(lambda data: data[: len(data) // 2]), r"safetensors: tensor '.*truncated"),
    "weights cut by a byte": (weight_bytes(lambda data: data[:-1]), r"safetensors: tensor '.*truncated"),
    "header longer than the file": (
        weight_bytes(lambda data: struct.pack("<Q", 2 * len(data)) + data[8:]),
        r"model\.safetensors is truncated or no safetensors file",
    ),
    "header of 2^63 bytes": (
        weight_bytes(lambda data: struct.pack("<Q", 1 << 63) + data[8:]),
        r"model\.safetensors is truncated or no safetensors file",
    ),
    "header not JSON": (weight_bytes(lambda data: data[:8] + b"x" * 20 + data[28:]), r"model\.safetensors: its header"),
    "tensors overlap": (
        header(lambda entries: entries.update({QUERY: entries["lm_head.weight"]})),
        r"model\.safetensors: tensor '.*' overlaps",
    ),
    "tensor outside": (
        header(lambda entries: entries[QUERY].update(data_offsets=[1 << 40, (1 << 40) + 64 * 64 * 4])),
        rf"model\.safetensors: tensor '{QUERY}' lies at bytes.*outside the file",
    ),
    "shape and bytes disagree": (
        header(lambda entries: entries[QUERY].update(shape=[64, 65])),
        rf"tensor '{QUERY}' takes 16384 bytes, but F32 \[64, 65\] needs 16640",
    ),
    "no such dtype": (header(lambda entries: entries[QUERY].update(dtype="F7")), rf"'{QUERY}' has dtype 'F7'"),
    "tensor missing": (tensors(lambda found: found.pop(QUERY)), rf"missing: {QUERY}"),
    "tensor too many": (
        tensors(lambda found: found.update({"model.norm.extra": np.zeros((3, 3), np.float32)})),
        r"unexpected: model\.norm\.extra",
    ),
    "tensor of another shape": (
        tensors(lambda found: found.update({QUERY: found[QUERY][:-1].copy()})),
        rf"{QUERY} is \[63, 64\], the config wants \[64, 64\]",
    ),
    "tensor of integers": (
        tensors(lambda found: found.update({QUERY: found[QUERY].astype(np.int8)})),
        rf"{QUERY} holds i8, not floats",
    ),
    "NaN": (number(float("nan")), rf"weight {QUERY} holds NaN or infinity.*download"),
    "infinity": (number(float("-inf")), rf"weight {QUERY} holds NaN or infinity"),
    "NaN in a norm": (number(float("nan"), "model.norm.weight"), r"weight model\.norm\.weight holds NaN"),
    "beyond f16": (number(3e38), rf"{QUERY}.*scale.*give this weight the scheme bf16 or none"),
    "shard missing": (sharded("model-00002.safetensors"), r"index\.json lists 'model-00002.*missing: download"),
    "shard outside": (sharded("../model.safetensors"), r"index\.json names a file outside its directory: '\.\./"),
    "shard absolute": (sharded("/etc/passwd"), r"index\.json names a file outside its directory: '/etc/passwd'"),
    "pickle with code": (torch_file(_pickle_exploit), r"pytorch_model\.bin.*could run code.*Use a safetensors"),
    "torch file with code": (torch_file(_torch_exploit), r"pytorch_model\.bin.*could run code.*Use a safetensors"),
    "torch file of junk": (torch_file(lambda path: path.write_bytes(b"junk" * 20)), r"pytorch_model\.bin is damaged"),
    "tokenizer empty": (content("tokenizer.json", b"{}"), "its tokenizer cannot be read"),
    "tokenizer settings not JSON": (content("tokenizer_config.json", b"[1"), r"tokenizer_config\.json"),
    "template binary": (content("chat_template.jinja", b"\xff\xfe"), r"chat_template\.jinja cannot be read"),
    "generation settings not JSON": (content("generation_config.json", b"no"), r"generation_config\.json is not valid"),
}  # fmt: skip
