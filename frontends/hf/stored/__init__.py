"""Checkpoints of weights that another tool has quantized: one file a format, chosen by what config.json says.

A format's `read(settings, file)` gives the weights that the file's tensors stand for, and notes for the user. Every
setting is obeyed, known to change nothing, or refused by name. Which layers are quantized is read off the tensors, as
are their bits, groups and orders wherever they show them: lists of layers and rules by name then say nothing more.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from llmc.errors import FrontendError
from llmc.frontends.hf.config import read_json
from llmc.frontends.hf.stored.settings import ADVICE, Settings
from llmc.frontends.lifted import WeightSource

# quant_method of config.json: the module of this package that reads it.
FORMATS = {
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed_tensors",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp4": "mxfp4",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
    "torchao": "torchao",
}
# Where config.json keeps a quantization; MLX writes "quantization", some compressed-tensors files the last one.
_KEYS = ("quantization_config", "quantization", "compression_config")
# Files of older tools beside config.json, and the method that each is of.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def quantization_of(directory: Path, config: Mapping[str, object]) -> Settings | None:
    """What a model directory says of its weights' quantization; None where they are as they were.

    FrontendError for a method that is not read.
    """
    path = directory / "config.json"
    places = [(config, str(path))]
    inner = config.get("text_config")
    if isinstance(inner, dict):
        places.append((inner, f"{path}: text_config"))
    for values, where in places:
        for key in _KEYS:
            described = values.get(key)
            if described:
                return _known(described, where, key)
    if config.get("quantization_bit"):
        raise FrontendError(
            f"{path}: the checkpoint is already quantized (quantization_bit, as ChatGLM's are), in a way that is not "
            "read: its layers exist only as code of its own, which llmc never runs. Compile a GLM of transformers' "
            "(model type glm) or a GGUF file of it"
        )
    for name, method in _BESIDE.items():
        if (directory / name).exists():
            described = read_json(directory / name)
            return _known({"quant_method": method, **described}, str(directory / name), "")
    return None


def _known(described: object, where: str, key: str) -> Settings:
    method = described.get("quant_method") if isinstance(described, dict) else None
    if not isinstance(described, dict) or not isinstance(method, str) or method.lower() not in FORMATS:
        name = method if isinstance(method, str) else key
        raise FrontendError(
            f"{where}: the checkpoint is already quantized ({name:.40}), in a way that is not read: {ADVICE}"
        )
    return Settings(described, f"{where}: {key}" if key else where)


def open_stored(settings: Settings, file: WeightSource) -> tuple[WeightSource, tuple[str, ...]]:
    """The weights that a quantized checkpoint's tensors stand for, and notes. Settings in a file of their own may have
    been left there: they count only where there are integers."""
    if Path(settings.where).name in _BESIDE and not any(name.endswith(".qweight") for name in file.names):
        return file, ()
    module = importlib.import_module(f"llmc.frontends.hf.stored.{FORMATS[settings.text('quant_method').lower()]}")
    settings.ignore("quant_method")
    settings.expect("method", settings.get("quant_method"), why="it names another format than quant_method")
    found: tuple[WeightSource, tuple[str, ...]] = module.read(settings, file)
    settings.require_known()
    return found
