"""Directories of adapters as PEFT writes them, made of random numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Sizes = Mapping[str, tuple[int, int]]  # (inputs, outputs) by module


def write_adapter(
    folder: Path,
    sizes: Sizes,
    modules: Iterable[str] | None = None,
    rank: int = 4,
    seed: int = 0,
    dtype: str = "float32",
    ranks: Mapping[str, int] | None = None,
    **settings: object,
) -> Path:
    """An adapter of some modules, by default all; ranks: of those that have another one than `rank`."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module in sorted(sizes if modules is None else modules):
        inputs, outputs = sizes[module]
        own = (ranks or {}).get(module, rank)
        a, b = rng.standard_normal((own, inputs)) / np.sqrt(inputs), rng.standard_normal((outputs, own)) * 0.3
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(dtype)
    return write_tensors(folder, tensors, r=rank, **settings)


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], **settings: object) -> Path:
    """An adapter of these tensors. A setting that is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    said: dict[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder
