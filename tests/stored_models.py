"""Tiny models written as other tools write quantized checkpoints, each beside the model that its integers stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hf_models import tiny
from kernel_harness import CACHE
from safetensors.numpy import load_file
from tiny_models import make_tiny
from tokenizers import Tokenizer

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.frontends.hf.stored import open_stored, quantization_of
from llmc.frontends.hf.weights import open_checkpoint
from llmc.frontends.lifted import WeightSource
from llmc.runtime.runtime import Runtime

Array = np.ndarray
# A layer's name and weight [outputs, inputs], to the tensors that stand for it, by what follows the name, and its
# values.
Write = Callable[[str, Array], tuple[Mapping[str, Array], Array]]
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """directory: the quantized model. reference: the same in floats, as transformers loads it."""

    directory: Path
    reference: Path


def save_tensors(tensors: Mapping[str, Array], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, of any dtype that the format has."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    data, position = [], 0
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + len(raw)],
        }
        data.append(raw)
        position += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def slow(*values: object) -> object:
    """A test's parameters that only the full sweep tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


def is_layer(name: str) -> bool:
    """Whether a tensor's name is that of a linear layer inside of a block."""
    inside = ".layers." in name or ".h." in name
    return inside and name.endswith(".weight") and not any(other in name for other in ("norm", "ln_", ".gate."))


def write_pair(
    family: str,
    folder: Path,
    write: Write,
    settings: Mapping[str, object] | None,
    chosen: Callable[[str], bool] = is_layer,
    turned: bool = False,
    key: str = "quantization_config",
    **config: object,
) -> Pair:
    """A tiny model of a family with the chosen weights written by `write`. settings: what config.json gets as `key`.

    turned: the model's own weights are [inputs, outputs].
    """
    plain = make_tiny(family, folder / "plain", **config)  # type: ignore[arg-type]
    stored: dict[str, Array] = {}
    floats: dict[str, Array] = {}
    for name, array in load_file(plain / "model.safetensors").items():
        stored[name] = floats[name] = array
        if array.ndim == 2 and chosen(name):
            del stored[name]
            layer = name.removesuffix(".weight")
            parts, values = write(layer, np.ascontiguousarray(array.T) if turned else array)
            stored |= {f"{layer}.{part}" if part else name: value for part, value in parts.items()}
            floats[name] = np.ascontiguousarray(values.T if turned else values, np.float32)
    described = json.loads((plain / "config.json").read_text())
    for directory, tensors in ((folder / "stored", stored), (folder / "floats", floats)):
        directory.mkdir()
        for file in plain.iterdir():
            if file.suffix != ".safetensors":
                (directory / file.name).write_bytes(file.read_bytes())
        save_tensors(tensors, directory / "model.safetensors")
    if settings is not None:
        (folder / "stored" / "config.json").write_text(json.dumps(described | {key: settings}))
    return Pair(folder / "stored", folder / "floats")


def packed_words(integers: Array, bits: int) -> Array:
    """i32 [..., W] of integers [..., n]: lowest bits first, one behind the other, bit by bit."""
    each = (integers[..., None].astype(np.int64) >> np.arange(bits)) & 1
    flat = each.astype(np.uint8).reshape(*integers.shape[:-1], -1)
    rest = -flat.shape[-1] % 32
    flat = np.concatenate([flat, np.zeros((*flat.shape[:-1], rest), np.uint8)], axis=-1)
    return np.packbits(flat, axis=-1, bitorder="little").view(np.int32)


def rounded(
    w: Array, bits: int, group_of: Array, symmetric: bool, dtype: object = np.float16
) -> tuple[Array, Array, Array]:
    """Integers 0 to 2^bits - 1 [N, K], scales and zero points [N, groups] of a weight [N, K] whose input i is in group
    group_of[i]."""
    groups, most = int(group_of.max()) + 1, (1 << bits) - 1
    q = np.zeros(w.shape, np.int64)
    scales, zeros = np.zeros((len(w), groups), dtype), np.zeros((len(w), groups), np.int64)
    for group in range(groups):
        at = np.flatnonzero(group_of == group)
        part = w[:, at].astype(np.float64)
        if symmetric:
            scale = np.abs(part).max(axis=1) / max(1, most // 2)
        else:
            scale = (np.maximum(part.max(axis=1), 0) - np.minimum(part.min(axis=1), 0)) / most
        scales[:, group] = np.maximum(scale, 1e-4)
        exact = scales[:, group].astype(np.float64)
        middle = np.full(len(w), 1 << (bits - 1))
        zeros[:, group] = middle if symmetric else np.clip(np.round(-part.min(axis=1) / exact), 1, most)
        q[:, at] = np.clip(np.round(part / exact[:, None]) + zeros[:, group, None], 0, most)
    return q, scales, zeros


def values_of(q: Array, scales: Array, zeros: Array, group_of: Array) -> Array:
    """(q - zero) * scale, f32."""
    exact = scales.astype(np.float32)[:, group_of]
    return np.asarray((q - zeros[:, group_of]).astype(np.float32) * exact)


def groups_of(inputs: int, size: int) -> Array:
    """The group of each input, in order; size -1: one group."""
    return np.arange(inputs) // (inputs if size < 0 else size)


def artifact(directory: Path, path: Path, scheme: str = "none", **options: object) -> Runtime:
    """The model compiled and loaded, activations in f32 unless `options` say otherwise."""
    given = {"activations": "f32", "max_step": 64, "kernel_cache": CACHE, **options}
    compile_model(str(directory), path, CompileOptions(quantization=scheme, **given))  # type: ignore[arg-type]
    return Runtime.load(path, threads=2)


def read_stored(directory: Path) -> tuple[WeightSource, tuple[str, ...]]:
    """The weights of a quantized checkpoint, and the format's notes, without the model."""
    settings = quantization_of(directory, json.loads((directory / "config.json").read_text()))
    assert settings is not None
    return open_stored(settings, open_checkpoint(directory))


def greedy(model: torch.nn.Module, directory: Path, text: str, count: int) -> str:
    """What transformers writes behind a text, by the likeliest token each time."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.no_grad():
        found = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
        )
    return str(tokenizer.decode(found[0, ids.shape[1] :].tolist()))


def f8(array: Array) -> Array:
    """Rounded to float8 e4m3."""
    return np.clip(array, -448, 448).astype(ml_dtypes.float8_e4m3fn)


__all__ = [
    "Pair", "artifact", "f8", "greedy", "groups_of", "is_layer", "packed_words", "read_stored", "rounded",
    "save_tensors", "slow", "tiny", "values_of", "write_pair",
]  # fmt: skip
