"""Checkpoints of floats of 8 bits: DeepSeek's blocks of rows and columns, and one scale a row or a weight.

A layer has weight f8 [outputs, inputs] and weight_scale_inv (DeepSeek's name; what the weight is multiplied by) or
weight_scale: one number for each block of `weight_block_size`, the last ones cut off; one a row; or one. Experts may be
one tensor, `gate_up_proj` beside `gate_up_proj_scale_inv`.
"""

from __future__ import annotations

from llmc.errors import FrontendError
from llmc.frontends.hf.stored.packing import Module
from llmc.frontends.hf.stored.scaled_floats import scaled_floats
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredWeights

_BLOCK = (128, 128)  # of transformers, where the settings have none
_ENDINGS = ("_scale_inv", "_scale")
_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale")


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of a checkpoint of floats of 8 bits."""
    block = _block(settings)
    names = frozenset(file.names)
    floats: dict[str, Part] = {}
    parts: list[str] = []
    for scale in sorted(names):
        path, _, leaf = scale.rpartition(".")
        ending = next((e for e in _ENDINGS if leaf.endswith(e)), None)
        if leaf in _ACTIVATIONS:
            parts.append(scale)
        elif ending is not None and (weight := scale.removesuffix(ending)) in names:
            module = Module(file, path, names)
            inverse = ending == "_scale_inv"
            floats[weight] = scaled_floats(module, weight.rpartition(".")[2], leaf, block if inverse else None)
            parts += [scale, weight]
    if not floats:
        raise FrontendError(
            f"{settings.where} says {settings.text('quant_method')}, but no weight of the checkpoint has a scale"
        )
    notes = (
        f"{len(floats)} weights of the checkpoint are floats of 8 bits: -q rounds what they stand for",
        "what the checkpoint says of activations and the KV cache has no effect: llmc rounds them as its options say",
    )
    return StoredWeights(file, {}, floats, parts), notes


def _block(settings: Settings) -> tuple[int, int]:
    """Rows and columns of a block."""
    found = settings.values.get("weight_block_size")
    if found is None:
        return _BLOCK
    sizes = isinstance(found, list) and len(found) == 2 and all(type(n) is int and 1 <= n < 1 << 24 for n in found)
    if not sizes or not isinstance(found, list):
        raise settings.wrong("weight_block_size", "two positive whole numbers")
    return found[0], found[1]
