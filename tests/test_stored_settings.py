"""Settings of quantized checkpoints: each is obeyed, known to change nothing, or refused by name."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from stored_models import Array
from test_stored_awq import gemm
from test_stored_awq import layer as awq_layer
from test_stored_compressed_tensors import CASES, Case, Tensors
from test_stored_floats import in_blocks, write_bytes
from test_stored_gptq import layer as gptq_layer
from test_stored_mutations import JUNK, ROWS, checkpoints

from llmc.errors import FrontendError
from llmc.frontends.hf.stored import open_stored
from llmc.frontends.hf.stored.settings import Settings

W = np.random.default_rng(3).standard_normal((ROWS, 64)).astype(np.float32)
# All that each format's tools write, with tensors that fit.
GPTQ: dict[str, object] = {
    "quant_method": "gptq", "method": "gptq", "checkpoint_format": "gptq", "format": "gptq", "bits": 4,
    "group_size": 64, "sym": False, "desc_act": True, "pack_dtype": "int32", "lm_head": False, "damp_percent": 0.1,
    "true_sequential": True, "static_groups": False, "meta": {"quantizer": ["gptqmodel:7.7.0"], "mse": 0.0},
    "dynamic": {"-:.*gate.*": {}, "+:.*down.*": {"bits": 4, "group_size": 64, "sym": False, "desc_act": True}},
    "model_file_base_name": "model", "is_marlin_format": False, "act_group_aware": False, "backend": "auto",
}  # fmt: skip
AWQ: dict[str, object] = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True, "do_fuse": False,
    "modules_to_not_convert": ["lm_head"], "backend": "autoawq",
}  # fmt: skip
HQQ: dict[str, object] = {
    "quant_method": "hqq", "skip_modules": ["lm_head"],
    "quant_config": {
        "offload_meta": False, "scale_quant_params": None, "zero_quant_params": None,
        "weight_quant_params": {
            "nbits": 4, "group_size": 64, "axis": 1, "view_as_float": False, "channel_wise": True, "optimize": True,
            "round_zero": True,
        },
    },
}  # fmt: skip
FP8: dict[str, object] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 64], "fmt": "e4m3",
    "scale_fmt": "float", "modules_to_not_convert": ["lm_head"], "dequantize": False,
}  # fmt: skip
BYTES: dict[str, object] = {
    "quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "_load_in_8bit": True,
    "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None, "llm_int8_has_fp16_weight": False,
    "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


def compressed(case: Case) -> dict[str, object]:
    """Settings with all that compressed-tensors writes."""
    found = copy.deepcopy(case.settings())
    group: Any = found["config_groups"]["group_0"]  # type: ignore[index]
    group["weights"] |= {"observer": "minmax", "observer_kwargs": {"averaging": 0.1}, "scale_dtype": None}
    group["output_activations"] = None
    return found | {"global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.20"}


def full() -> dict[str, tuple[dict[str, object], dict[str, Array]]]:
    found = {
        "gptq": (GPTQ, gptq_layer(4, 64, True, True, 192, ROWS)[0]),
        "awq": (AWQ, gemm(*awq_layer(64, ROWS, 32))),
        "fp8": (FP8, in_blocks(W, 16, 64)[0]),
        "int8": (BYTES, write_bytes("", W)[0]),
        "hqq": (HQQ, checkpoints()["hqq"][1]),
    }
    for name in ("4 bits, ordered", "4 bits, asymmetric", "bytes", "floats in blocks"):
        found[name] = (compressed(CASES[name]), CASES[name].tensors(W)[0])
    return found


# Settings that say what the same tensors stand for, beside what others decide: another value may be another weight.
LABELS = ("checkpoint_format", "format", "version")


def read(settings: Mapping[str, object], tensors: Mapping[str, Array]) -> tuple[Array, tuple[str, ...]]:
    file = Tensors({f"m.{part}": array for part, array in tensors.items()})
    source, notes = open_stored(Settings(settings, "config.json: quantization_config"), file)
    return source.load("m.weight"), notes


def paths(value: object, below: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of an object and of the objects in it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*below, key)
            yield from paths(inner, (*below, key))


def changed(settings: dict[str, object], path: tuple[str, ...], value: object) -> dict[str, object]:
    found: Any = copy.deepcopy(settings)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", full())
def test_a_setting_that_is_changed_alone_is_refused_or_changes_nothing(name: str) -> None:
    settings, tensors = full()[name]
    want, _ = read(settings, tensors)
    outcomes: set[str] = set()
    for path in paths(settings):
        for value in (*JUNK, "float", "nf4", ["re:.*"], {"default": {"bits": 2}}):
            if path == ("quant_method",):
                continue
            try:
                weight, _ = read(changed(settings, path, value), tensors)
            except FrontendError as error:
                outcomes.add("refused")
                assert "\n" not in str(error) and len(str(error)) < 700, error
                continue
            outcomes.add("read")
            if path[-1] not in LABELS:
                np.testing.assert_array_equal(weight, want, err_msg=f"{path}: {value}")
    assert outcomes == {"refused", "read"}


FREE = {"meta", "observer_kwargs", "dynamic", "config_groups"}  # objects whose keys are names, or that nothing reads


@pytest.mark.parametrize("name", full())
def test_a_setting_that_nobody_knows_is_refused_by_name(name: str) -> None:
    settings, tensors = full()[name]
    objects = {(), *(path[:-1] for path in paths(settings))}
    for path in objects:
        if path and path[-1] in FREE:
            continue
        for value in (True, 0, "x", {}):
            with pytest.raises(FrontendError, match="'turned_inputs' is not known, and may change"):
                read(changed(settings, (*path, "turned_inputs"), value), tensors)
        read(changed(settings, (*path, "turned_inputs"), None), tensors)  # left out


REFUSED: list[tuple[str, tuple[str, ...], object, str]] = [
    ("gptq", ("rotation",), "hadamard", "rotation turns activations while the model runs, which is not read"),
    ("gptq", ("adapter",), {"name": "lora", "rank": 8}, "adapter adds a low-rank product"),
    ("gptq", ("dynamic", "+:.*down.*", "adapter"), {"rank": 8}, r"dynamic: \+:.*down.*: adapter adds"),
    ("gptq", ("format",), "gptq_v2", "format is 'gptq_v2', expected 'gptq', as checkpoint_format says"),
    ("gptq", ("method",), "qqq", "method is 'qqq', expected 'gptq': it names another format"),
    ("gptq", ("is_marlin_format",), True, "is_marlin_format is True, expected False: Marlin's layout is not read"),
    ("gptq", ("act_bits",), 4, "act_bits is 4, expected 16 or 32: rounded activations of AutoRound"),
    ("awq", ("backend",), "llm-awq", "backend is 'llm-awq', expected 'autoawq': the layout of llm-awq is not read"),
    ("awq", ("desc_act",), True, "desc_act is True, expected False: AWQ's layers have no order"),
    ("fp8", ("expert_dtype",), "fp4", "expert_dtype is 'fp4', expected 'fp8': experts of 4 bits are not read"),
    ("hqq", ("quant_config", "scale_quant_params"), {"nbits": 8}, "scale_quant_params quantizes the scales"),
    ("bytes", ("moe_sparsity_config",), {"method": "prune"}, "moe_sparsity_config takes experts away"),
    ("bytes", ("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparse weights are not read"),
    ("bytes", ("transform_config",), {"config_groups": {"a": {}}}, "transform_config turns activations"),
    ("bytes", ("config_groups", "group_0", "weights", "dynamic"), True, "weights have scales in the file"),
    ("bytes", ("config_groups", "group_0", "weights", "strategy"), "tensor_group", "strategy is 'tensor_group'"),
    ("bytes", ("config_groups", "group_0", "weights", "symmetric"), False, "it has no weight_zero_point, but"),
    ("4 bits, asymmetric", ("config_groups", "group_0", "weights", "symmetric"), True, "zero points that are not 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "value", "why"), REFUSED, ids=[f"{r[0]}, {r[1][-1]}" for r in REFUSED])
def test_settings_that_change_more_than_weights_are_refused(
    name: str, path: tuple[str, ...], value: object, why: str
) -> None:
    settings, tensors = full()[name]
    with pytest.raises(FrontendError, match=why):
        read(changed(settings, path, value), tensors)


NOTED: list[tuple[str, tuple[str, ...], object, str]] = [
    ("gptq", ("activation",), {"mode": "w4afp8"}, "rounded as GPTQModel's `activation` says, {'mode': 'w4afp8'}; here"),
    ("gptq", ("desc_act",), False, "1 weights have inputs in an order of their own .* though desc_act is false"),
    ("fp8", ("activation_scheme",), "dynamic", "in floats of 8 bits, 64 inputs of a token by a scale that is found"),
    ("fp8", ("activation_scheme",), "static", "in floats of 8 bits, by scales fixed in the checkpoint"),
    ("fp8", ("kv_cache_scheme",), {"num_bits": 8}, "precision of the KV cache"),
    ("int8", ("llm_int8_threshold",), 5.0, "in int8, each token by its largest, columns with numbers above 5.0 kept"),
    ("bytes", ("kv_cache_scheme",), {"num_bits": 8}, "precision of the KV cache"),
    ("bytes", ("config_groups", "group_0", "input_activations", "num_bits"), 4, "in integers of 4 bits, each token by"),
    ("bytes", ("config_groups", "group_0", "output_activations"), {"dynamic": False}, "8 bits .of outputs., all by"),
    ("bytes", ("config_groups", "INT8"), ["Linear"], "as the preset 'INT8' says"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "value", "note"), NOTED, ids=[f"{n[0]}, {n[1][-1]}" for n in NOTED])
def test_what_a_checkpoint_says_of_activations_is_told(
    name: str, path: tuple[str, ...], value: object, note: str
) -> None:
    settings, tensors = full()[name]
    want, _ = read(settings, tensors)
    given = {key: inner for key, inner in settings.items() if not (path == ("desc_act",) and key == "dynamic")}
    weight, notes = read(changed(given, path, value), tensors)
    np.testing.assert_array_equal(weight, want)
    assert any(re.search(note, each) for each in notes), notes


def test_scales_of_activations_that_are_left_out_are_counted() -> None:
    case = Case(bits=8, group=0, form="int-quantized", dynamic=False)
    _, notes = read(case.settings(), case.tensors(W)[0])
    assert any(
        "fixed in the checkpoint; here" in note and "1 tensors with scales of activations" in note for note in notes
    )


def test_act_order_needs_its_order() -> None:
    """Layers in order have the weight that they would have without the setting; which it is nobody can say."""
    tensors, _ = gptq_layer(4, 64, False, True, 192, ROWS)
    del tensors["g_idx"]
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}
    assert math.isfinite(float(read(settings, tensors)[0].sum()))
    with pytest.raises(FrontendError, match="desc_act is True, expected false: some layers have no g_idx"):
        read({**settings, "desc_act": True}, tensors)


def test_settings_of_other_kinds_are_refused() -> None:
    values = {"n": True, "x": "4", "half": 0.5, "whole": 2.0, "null": None, "a": {"b": {"c": 1}, "d": None}, "list": []}
    settings = Settings(values, "config.json")
    for name in ("n", "x", "half", "a", "list"):
        with pytest.raises(FrontendError, match=rf"config\.json: {name} is .*, expected a whole number, 0 to 8"):
            settings.integer(name, 0, 0, 8)
    assert settings.integer("whole", 0, 2, 2) == 2 and settings.integer("null", 3, 0, 8) == 3
    with pytest.raises(FrontendError, match="null is None, expected a whole number"):
        settings.integer("null", None, 0, 8)


def test_objects_of_an_object_are_given_by_their_names() -> None:
    """But no null, and none of what is left out."""
    settings = Settings({"a": {"b": {"c": 1}, "d": None, "e": {}}, "list": []}, "config.json")
    assert [(name, dict(inner.values)) for name, inner in settings.each("a")] == [("b", {"c": 1}), ("e", {})]
    assert list(settings.each("nothing")) == []
    with pytest.raises(FrontendError, match=r"config\.json: list is .*, expected a JSON object"):
        list(settings.each("list"))
    with pytest.raises(FrontendError, match=r"config\.json: a: b: 'c' is not known"):
        settings.require_known()
