"""bitsandbytes' forms of a checkpoint: NF4 and FP4 in blocks, and bytes with a scale a row (LLM.int8()).

Of 4 bits, beside weight u8 [bytes, 1], two numbers a byte, the high half first: weight.quant_map f32 [16], what each
of the 16 stands for; weight.absmax, one scale a block of the flat weight: f32, or u8 of weight.nested_quant_map f32
[256] times weight.nested_absmax f32, one a block of those; and weight.quant_state.bitsandbytes__nf4 (or fp4), JSON in
bytes: shape, blocksize, nested_blocksize, nested_offset. Of 8 bits: weight i8 [outputs, inputs] and SCB f32 [outputs],
the greatest magnitude of each row: w = q * SCB / 127.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError
from llmc.frontends.hf.stored.activations import activations_note
from llmc.frontends.hf.stored.packing import Module, modules_with
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredIntegers, StoredWeights

_KINDS = ("nf4", "fp4")
_STATE = "weight.quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MOST_STATE = 1 << 16  # bytes of a weight's JSON


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of a checkpoint of bitsandbytes. Tensors say which of its kinds each layer has, and all of that."""
    settings.ignore(
        "_load_in_8bit", "_load_in_4bit", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage",
    )  # fmt: skip
    if settings.flag("load_in_8bit", False) and settings.flag("load_in_4bit", False):
        raise settings.wrong("load_in_4bit", "false, as load_in_8bit is true")
    settings.flag("load_in_4bit", False)
    settings.choice("bnb_4bit_quant_type", _KINDS, "fp4")
    threshold = settings.get("llm_int8_threshold")
    integers: dict[str, StoredIntegers] = {}
    floats: dict[str, Part] = {}
    parts: list[str] = []
    for module in modules_with(file, "SCB"):
        integers[f"{module.name}.weight"] = _bytes(module)
        parts += [f"{module.name}.{part}" for part in ("weight", "SCB", "weight_format") if module.has(part)]
    for kind in _KINDS:
        for module in modules_with(file, f"{_STATE}{kind}"):
            floats[f"{module.name}.weight"] = _halves(module, kind)
            parts += [f"{module.name}.weight", f"{module.name}.{_STATE}{kind}"]
            parts += [f"{module.name}.weight.{part}" for part in _PARTS if module.has(f"weight.{part}")]
    if not integers and not floats:
        raise FrontendError(
            f"{settings.where} says bitsandbytes, but the checkpoint holds no weight that it has rounded: rounded on "
            "loading, it is compiled as it is after taking the setting away"
        )
    notes = []
    if floats:
        notes.append(
            f"{len(floats)} weights of the checkpoint are in bitsandbytes' 4 bits, which no encoding of llmc holds: -q "
            "rounds what they stand for"
        )
    if integers:
        apart = f", columns with numbers above {threshold!r:.20} kept in 16 bits" if threshold else ""
        notes.append(activations_note(f"in int8, each token by its largest{apart}"))
    return StoredWeights(file, integers, floats, parts), tuple(notes)


def _bytes(module: Module) -> StoredIntegers:
    module.require("weight", (-1, -1), "i8")
    outputs, inputs = module.shape("weight")
    module.require("SCB", (outputs,), "f32")
    if module.has("weight_format") and module.load("weight_format").reshape(-1).tolist() != [0]:
        raise module.wrong("its weight_format is not row by row: save the model with a newer bitsandbytes")
    return StoredIntegers(
        q=Part((outputs, inputs), "i8", module.later("weight", lambda q: q)),
        scales=Part((outputs, 1), "f32", module.later("SCB", lambda scb: (scb / np.float32(127))[:, None])),
        zeros=None,
        block=0,
        bits=8,
        what="8 bits (bitsandbytes)",
    )


@dataclass(frozen=True)
class _State:
    """What a weight's JSON says. nested: numbers of absmax that share one of nested_absmax, 0 where it has none."""

    shape: tuple[int, ...]
    blocksize: int
    nested: int
    offset: float


def _state(module: Module, kind: str) -> _State:
    part = f"{_STATE}{kind}"
    module.require(part, (-1,), "u8")
    if module.shape(part)[0] > _MOST_STATE:
        raise module.wrong(f"its {part} has {module.shape(part)[0]} bytes")
    try:
        values = json.loads(module.load(part).tobytes().decode())
    except (ValueError, RecursionError):
        raise module.wrong(f"its {part} is no JSON") from None
    if not isinstance(values, dict):
        raise module.wrong(f"its {part} is no JSON object")
    described = Settings(values, f"the checkpoint's layer {module.name:.100}: {part}")
    shape = values.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
        raise described.wrong("shape", "a list of positive whole numbers")
    nested = described.integer("nested_blocksize", 256, 1, 1 << 24) if module.has("weight.nested_absmax") else 0
    offset = values.get("nested_offset", 0.0)
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise described.wrong("nested_offset", "a number")
    return _State(tuple(shape), described.integer("blocksize", None, 1, 1 << 24), nested, float(offset))


def _halves(module: Module, kind: str) -> Part:
    state = _state(module, kind)
    count = math.prod(state.shape)
    blocks = -(-count // state.blocksize)
    packed = -(-count // 2)
    if not module.has("weight") or module.dtype("weight") != "u8" or math.prod(module.shape("weight")) != packed:
        raise module.wrong(f"its weight is not u8 [{packed}, 1], which its shape {list(state.shape)} needs")
    module.require("weight.quant_map", (16,), "f32")
    module.require("weight.absmax", (blocks,), "u8" if state.nested else "f32")
    if state.nested:
        module.require("weight.nested_absmax", (-(-blocks // state.nested),), "f32")
        module.require("weight.nested_quant_map", (256,), "f32")

    def scales() -> Array:
        """f32 [blocks]."""
        found = module.load("weight.absmax")
        if not state.nested:
            return found
        wide = np.repeat(module.load("weight.nested_absmax"), state.nested)[:blocks]
        return np.asarray(module.load("weight.nested_quant_map")[found] * wide + np.float32(state.offset))

    def load() -> Array:
        data = module.load("weight").reshape(-1)
        numbers = module.load("weight.quant_map")[np.stack([data >> 4, data & 15], axis=-1).reshape(-1)[:count]]
        numbers *= np.repeat(scales(), state.blocksize)[:count]
        return np.asarray(numbers.reshape(state.shape), np.float32)

    return Part(state.shape, "f32", load)
