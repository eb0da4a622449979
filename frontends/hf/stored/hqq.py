"""HQQ's form of a checkpoint: bytes of packed integers, with a scale and a zero point in floats for each group.

A layer has W_q u8, scale and zero in floats, and its settings as tensors: nbits, group_size, axis, shape, packing. The
flat weight [outputs * inputs] in rows of a group (axis 1), or in columns of one (axis 0), is cut into as many parts as
integers a byte holds; byte j has the j-th of each part, the first part's in the highest bits. w = (q - zero) * scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError
from llmc.frontends.hf.stored.packing import Change, Module, modules_with
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredIntegers, StoredWeights

_BITS = (2, 4, 8)
_FLOATS = ("f16", "bf16", "f32")
# Every other tensor that a layer has: its settings.
_SETTINGS = (
    "nbits", "group_size", "axis", "shape", "packing", "view_as_float", "unpack_view_dtype", "compute_dtype",
    "channel_wise", "quant_scale", "quant_zero", "optimize", "round_zero", "offload_meta",
    "encoded_state_dict", "stores_quant_config",
)  # fmt: skip
_QUANTIZED = ("scale_q", "zero_q", "zero_scale", "meta_scale", "meta_zero")


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of a checkpoint of HQQ."""
    _check(settings)
    integers: dict[str, StoredIntegers] = {}
    floats: dict[str, Part] = {}
    parts: list[str] = []
    for module in modules_with(file, "W_q"):
        made = _layer(module)
        target: dict[str, StoredIntegers] | dict[str, Part] = integers if isinstance(made, StoredIntegers) else floats
        target[f"{module.name}.weight"] = made  # type: ignore[assignment]
        parts += [f"{module.name}.{part}" for part in ("W_q", "scale", "zero", *_SETTINGS) if module.has(part)]
    if not integers and not floats:
        raise FrontendError(f"{settings.where} says hqq, but the checkpoint has no layer with a W_q")
    notes: tuple[str, ...] = ()
    if floats:
        notes = (f"{len(floats)} weights have groups across rows (HQQ's axis 0): -q rounds what they stand for",)
    return StoredWeights(file, integers, floats, parts), notes


def _check(settings: Settings) -> None:
    """FrontendError for what changes more than how weights are stored. Each layer has its own settings as tensors."""
    settings.ignore("skip_modules", "offload_meta")
    groups = [settings]
    whole = settings.inner("quant_config")
    if whole is not None:
        one = {"weight_quant_params", "scale_quant_params", "zero_quant_params"} & set(whole.values)
        groups += [whole] if one else [rule for _, rule in settings.each("quant_config")]
    groups += [rule for _, rule in settings.each("dynamic_config")]
    for group in groups:
        group.ignore("nbits", "group_size", "axis", "view_as_float", "offload_meta")
        for part in ("scale_quant_params", "zero_quant_params", "quant_scale", "quant_zero"):
            group.refuse(part, "quantizes the scales or zero points themselves")
        weights = group.inner("weight_quant_params")
        if weights is not None:
            weights.ignore("nbits", "group_size", "axis", "view_as_float", "channel_wise", "optimize", "round_zero")


def _number(module: Module, part: str, default: int | None = None) -> int:
    """A setting that a layer has as a tensor of one number."""
    if not module.has(part) and default is not None:
        return default
    if not module.has(part) or math.prod(module.shape(part)) != 1 or module.dtype(part)[0] not in "iub":
        raise module.wrong(f"its setting {part} is no tensor of one whole number")
    return int(module.load(part).reshape(-1)[0])


def _layer(module: Module) -> StoredIntegers | Part:
    for part in _QUANTIZED:
        if module.has(part):
            raise module.wrong(f"its scales are quantized themselves ({part}), which is not read")
    bits, size, axis = _number(module, "nbits"), _number(module, "group_size"), _number(module, "axis", 1)
    if bits not in _BITS or axis not in (0, 1):
        raise module.wrong(f"it has {bits} bits along axis {axis}: 2, 4 and 8 bits along 0 or 1 are read")
    if _number(module, "view_as_float", 0):
        raise module.wrong("its integers are stored as floats (view_as_float), which is not read")
    if not module.has("shape") or math.prod(module.shape("shape")) != 2 or module.dtype("shape")[0] not in "iu":
        raise module.wrong("its setting shape is no tensor of two numbers")
    outputs, inputs = (int(n) for n in module.load("shape").reshape(-1))
    each = 8 // bits
    if min(outputs, inputs) < 1 or size < 1 or inputs % size or (outputs * inputs // size) % each or size % each:
        raise module.wrong(f"[{outputs}, {inputs}] of {bits} bits are no whole groups of {size}")
    groups = outputs * inputs // size
    grid = (groups, size) if axis else (size, groups)
    module.require("W_q", (grid[0] // each, grid[1]), "u8")
    for part in ("scale", "zero"):
        module.require(part, (groups, 1) if axis else (1, groups), *_FLOATS)

    def integers(packed: Array) -> Array:
        """u8, in the grid of groups."""
        mask = np.uint8((1 << bits) - 1)
        return np.concatenate([(packed >> np.uint8(8 - bits * (i + 1))) & mask for i in range(each)])

    if axis == 0:
        return _across(module, (outputs, inputs), integers)
    per_row = (outputs, inputs // size)
    found: Mapping[str, Part] = {
        part: Part(per_row, module.dtype(part), module.later(part, lambda values: values.reshape(per_row)))
        for part in ("scale", "zero")
    }
    return StoredIntegers(
        q=Part((outputs, inputs), "u8", module.later("W_q", lambda q: integers(q).reshape(outputs, inputs))),
        scales=found["scale"],
        zeros=found["zero"],
        block=0 if per_row[1] == 1 else size,
        bits=bits,
        what=f"{bits} bits (hqq)",
    )


def _across(module: Module, shape: tuple[int, int], integers: Change) -> Part:
    def load() -> Array:
        q = integers(module.load("W_q")).astype(np.float32)
        zero, scale = (module.load(part).astype(np.float32) for part in ("zero", "scale"))
        return np.asarray(((q - zero) * scale).reshape(shape))

    return Part(shape, "f32", load)
