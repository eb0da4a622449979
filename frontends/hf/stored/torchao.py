"""What safetensors files hold of torchao's tensors: integers and floats of 8 bits with scales.

A weight `layer.weight` is stored as layer._weight_qdata [outputs, inputs], layer._weight_scale and, of some kinds,
layer._weight_zero_point; the file's metadata say of which kind it is. w = (qdata - zero_point) * scale, a scale for
each row and `block_size` inputs. Kinds that are laid out for a GPU's kernels are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError
from llmc.frontends.hf.stored.activations import activations_note
from llmc.frontends.hf.stored.packing import Module, modules_with
from llmc.frontends.hf.stored.scaled_floats import scaled_floats
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredIntegers, StoredWeights

_QDATA, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_INTEGERS, _FLOATS = ("Int8Tensor", "IntxUnpackedToInt8Tensor"), ("Float8Tensor",)


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of a checkpoint of torchao's tensors."""
    settings.ignore(
        "modules_to_not_convert", "include_input_output_embeddings", "include_embedding", "untie_embedding_weights",
        "quant_type_kwargs",
    )  # fmt: skip
    metadata = getattr(file, "metadata", {})
    integers: dict[str, StoredIntegers] = {}
    floats: dict[str, Part] = {}
    parts: list[str] = []
    for module in modules_with(file, _QDATA):
        name = f"{module.name}.weight"
        kind = _kind(module, metadata.get(name))
        if kind in _INTEGERS:
            integers[name] = _integers(module)
        else:
            floats[name] = scaled_floats(module, _QDATA, _SCALE)
        for part in ("_weight_act_pre_scale", "_weight_act_quant_scale"):
            if module.has(part):
                raise module.wrong(f"it scales its activations ({part}), which is not read")
        parts += [f"{module.name}.{part}" for part in (_QDATA, _SCALE, _ZERO) if module.has(part)]
    if not integers and not floats:
        raise FrontendError(
            f"{settings.where} says torchao, but the checkpoint has no tensor {_QDATA}: torch's own files of quantized "
            "tensors are not read; save the model as safetensors, or compile the original that it was made from"
        )
    notes = [f"{len(floats)} weights of the checkpoint are floats of 8 bits: -q rounds what they stand for"] * bool(
        floats
    )
    kinds = sorted(kind for kind in _kinds(settings.get("quant_type")) if "Activation" in kind)
    notes += [activations_note(f"rounded as torchao's {kind:.80} says") for kind in kinds]
    return StoredWeights(file, integers, floats, parts), tuple(notes)


def _kinds(described: object) -> set[str]:
    """The names of torchao's classes in its settings, which say how the tensors were made and how activations are
    rounded. What the tensors are they say themselves, in the file's metadata."""
    if isinstance(described, Mapping):
        own = described.get("_type", "")
        inner = set[str]().union(*(_kinds(value) for value in described.values()))
        return inner | ({own} if isinstance(own, str) else set())
    return {described} if isinstance(described, str) else set()


def _kind(module: Module, described: object) -> str:
    """Of which of torchao's classes a weight is."""
    try:
        values = json.loads(described) if isinstance(described, str) else None
    except (ValueError, RecursionError):
        values = None
    kind = values.get("_type") if isinstance(values, Mapping) else None
    if kind not in (*_INTEGERS, *_FLOATS):
        known = ", ".join((*_INTEGERS, *_FLOATS))
        raise module.wrong(f"the file's metadata say that it is {kind!r:.40}, of torchao's kinds {known} are read")
    return str(kind)


def _integers(module: Module) -> StoredIntegers:
    module.require(_QDATA, (-1, -1), "i8")
    outputs, inputs = module.shape(_QDATA)
    module.require(_SCALE, (-1,) * len(module.shape(_SCALE)), "f32", "bf16", "f16")
    shape = module.shape(_SCALE)
    wide = shape if len(shape) == 2 else (outputs, 1) if shape == (outputs,) else (1, 1)
    groups = wide[1]
    if math.prod(wide) != math.prod(shape) or wide[0] not in (1, outputs) or inputs % groups:
        raise module.wrong(f"its {_SCALE} of {list(shape)} does not fit its {_QDATA} of [{outputs}, {inputs}]")
    scales = Part((wide[0], groups), module.dtype(_SCALE), module.later(_SCALE, lambda s: s.reshape(wide)))
    zeros: Part | None = None
    if module.has(_ZERO):
        module.require(_ZERO, shape, "i8", "i32", "i64", "f32", "bf16", "f16")

        def points(values: Array) -> Array:
            return values.reshape(wide)

        zeros = Part(scales.shape, module.dtype(_ZERO), module.later(_ZERO, points))
        zeros = zeros if zeros.load().astype(bool).any() else None
    return StoredIntegers(
        q=Part((outputs, inputs), "i8", module.later(_QDATA, lambda q: q)),
        scales=scales,
        zeros=zeros,
        block=0 if groups == 1 else inputs // groups,
        bits=8,
        what="8 bits or less (torchao)",
    )
