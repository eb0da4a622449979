"""Quantized checkpoints whose settings or tensors are changed at random: the right weights, or one clear refusal."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from stored_models import Array, f8
from test_stored_awq import gemm
from test_stored_awq import layer as awq_layer
from test_stored_compressed_tensors import CASES, Tensors
from test_stored_floats import halves, hqq, in_blocks, write_bytes
from test_stored_gptq import layer as gptq_layer

from llmc.errors import FrontendError
from llmc.frontends.hf.checkpoint import ModelWeights
from llmc.frontends.hf.stored import open_stored, quantization_of

LAYER = "model.layers.0.mlp.down_proj"
ROWS, INPUTS = 32, 192


@cache
def model() -> Any:
    """A model of one layer on the meta device, whose down_proj is [ROWS, INPUTS]."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=ROWS, intermediate_size=INPUTS, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@cache
def others() -> dict[str, Array]:
    """Its other weights."""
    shapes = {name: tuple(value.shape) for name, value in model().state_dict().items()}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items() if not name.startswith(LAYER)}


@cache
def checkpoints() -> dict[str, tuple[dict[str, object], dict[str, Array]]]:
    """For each format, settings and the tensors of down_proj."""
    w = np.random.default_rng(0).standard_normal((ROWS, INPUTS)).astype(np.float32)
    found: dict[str, tuple[dict[str, object], dict[str, Array]]] = {
        "gptq": (
            {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": 64,
                "sym": False,
                "desc_act": True,
                "true_sequential": True,
            },
            gptq_layer(4, 64, True, True, INPUTS, ROWS)[0],
        ),
        "awq": (
            {
                "quant_method": "awq",
                "bits": 4,
                "group_size": 32,
                "version": "gemm",
                "modules_to_not_convert": ["lm_head"],
            },
            gemm(*awq_layer(INPUTS, ROWS, 32)),
        ),
        "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 64]}, in_blocks(w, 16, 64)[0]),
        "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, write_bytes("", w)[0]),
        "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, halves(w, "nf4", True)[0]),
        "hqq": ({"quant_method": "hqq", "quant_config": {}}, hqq(w, 4, 64)[0]),
    }
    for name in ("4 bits, ordered", "4 bits, asymmetric", "bytes, asymmetric", "floats in blocks"):
        found[name] = (CASES[name].settings(), CASES[name].tensors(w)[0])
    return found


def load(directory: Path, settings: object, tensors: Mapping[str, Array]) -> Array:
    """The weight, through all that reading a model asks of it."""
    quantization = quantization_of(directory, {"model_type": "llama", "quantization_config": settings})
    named = {f"{LAYER}.{part}": array for part, array in tensors.items()}
    file = Tensors({**others(), **named})
    source = file if quantization is None else open_stored(quantization, file)[0]
    return ModelWeights(model(), source).load(f"{LAYER}.weight")


JUNK = (
    None, True, False, 0, -1, 1, 3, 5, 16, 2**31, 2**70, 1.5, float("nan"), float("inf"), "", "x", "4", "gptq_v2",
    "GEMV", [], [1], ["x", 7], {}, {"": 1}, [[[]]], {"a": {"b": [1]}},
)  # fmt: skip


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one place of it replaced, left out or put twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.25:
            return {**value, rng.choice(["format", "bits", "group_size", "weights", "x"]): rng.choice(JUNK)}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        return [changed(value[0], rng), *value[1:]] if rng.random() < 0.5 else value + value
    return rng.choice(JUNK)


def damaged(array: Array, rng: random.Random) -> Array | None:
    """A tensor of another shape, dtype or content; None: left out."""
    kind = rng.randrange(8)
    if kind == 0:
        return None
    if kind == 1:
        with np.errstate(all="ignore"):
            return array.astype(rng.choice([np.int32, np.float32, np.float16, np.uint8, np.int64]))
    if kind == 2:
        return array.reshape(-1)
    if kind == 3:
        return array[: len(array) // 2] if array.ndim else array
    if kind == 4:
        return np.concatenate([array, array]) if array.ndim else array
    if kind == 5:
        return np.ascontiguousarray(array.T)
    if kind == 6:
        return array[None]
    noise = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, array.nbytes).astype(np.uint8)
    return np.frombuffer(noise.tobytes(), array.dtype).reshape(array.shape)


# Settings that say what the same tensors mean: with other values, other weights are right.
MEANINGS = ("checkpoint_format", "format", "sym", "version", "quant_method", "pack_dtype")


def attempt(seed: int, directory: Path) -> str:
    """One mutation; what came of it. Fails for an exception of another kind, a long message or a wrong weight."""
    rng = random.Random(seed)
    name = rng.choice(sorted(checkpoints()))
    settings, tensors = checkpoints()[name]
    of_settings = rng.random() < 0.6
    after: Any = settings
    given: dict[str, Array] = dict(tensors)
    if of_settings:
        for _ in range(rng.choice([1, 1, 2, 3])):
            after = changed(after, rng)
    else:
        part = rng.choice(sorted(given))
        found = damaged(given.pop(part), rng)
        given |= {} if found is None else {part: found}
    try:
        weight = load(directory, after, given)
    except FrontendError as error:
        assert "\n" not in str(error) and len(str(error)) < 900, str(error)
        return "refused"
    same = isinstance(after, dict) and all(after.get(key) == settings.get(key) for key in MEANINGS)
    if of_settings and same:
        np.testing.assert_array_equal(weight, load(directory, settings, tensors), err_msg=f"{seed}: {name} {after}")
    assert np.isfinite(weight.astype(np.float32)).all() and weight.shape == (ROWS, INPUTS)
    return "read"


def test_checkpoints_are_read_before_they_are_changed(tmp_path: Path) -> None:
    for name, (settings, tensors) in checkpoints().items():
        assert load(tmp_path, settings, tensors).shape == (ROWS, INPUTS), name


@pytest.mark.parametrize("seeds", [range(2000), pytest.param(range(2000, 22000), marks=pytest.mark.slow)])
def test_changed_checkpoints_are_right_or_refused(seeds: range, tmp_path: Path) -> None:
    outcomes = [attempt(seed, tmp_path) for seed in seeds]
    # Neither is rare: the changes are neither harmless nor all noticed at once.
    assert min(outcomes.count("read"), outcomes.count("refused")) > len(outcomes) // 10


def test_a_weight_of_f8_alone_is_no_weight(tmp_path: Path) -> None:
    file = Tensors({**others(), f"{LAYER}.weight": f8(np.ones((ROWS, INPUTS)))})
    with pytest.raises(FrontendError, match=f"{LAYER}.weight holds f8_e4m3, not floats"):
        ModelWeights(model(), file)
