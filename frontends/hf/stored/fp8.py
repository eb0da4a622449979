"""Checkpoints of floats of 8 bits: DeepSeek's blocks of rows and columns, and one scale a row or a weight.

A layer has weight f8 [outputs, inputs] and weight_scale_inv (DeepSeek's name; what the weight is multiplied by) or
weight_scale: one number for each block of `weight_block_size`, the last ones cut off; one a row; or one. Experts may be
one tensor, `gate_up_proj` beside `gate_up_proj_scale_inv`.
"""

from __future__ import annotations

from llmc.errors import FrontendError
from llmc.frontends.hf.stored.activations import activations_note
from llmc.frontends.hf.stored.packing import Module
from llmc.frontends.hf.stored.scaled_floats import scaled_floats
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredWeights

_BLOCK = (128, 128)  # of transformers, where the settings have none
_ENDINGS = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale")
_ACTIVATIONS = (*_OF_ACTIVATIONS, "k_scale", "v_scale")


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of a checkpoint of floats of 8 bits."""
    block = _block(settings)
    _check(settings)
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
    left_out = sum(name.rpartition(".")[2] in _OF_ACTIVATIONS for name in parts)
    notes = [
        f"{len(floats)} weights of the checkpoint are floats of 8 bits: -q rounds what they stand for",
        activations_note(_made_for(settings, block), left_out),
    ]
    if "kv_cache_scheme" in settings or any(name.endswith((".k_scale", ".v_scale")) for name in parts):
        notes.append("the checkpoint's precision of the KV cache (kv_cache_scheme) is not used")
    return StoredWeights(file, {}, floats, parts), tuple(notes)


def _check(settings: Settings) -> None:
    """FrontendError for what changes more than how weights are stored."""
    settings.expect("fmt", "e4m3", "e5m2")  # as the tensors have it
    settings.expect("scale_fmt", "float", "ue8m0")  # so are the scales
    settings.expect("expert_dtype", "fp8", why="experts of 4 bits are not read")
    settings.ignore("modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize", "kv_cache_scheme")


def _made_for(settings: Settings, block: tuple[int, int]) -> str:
    """How the checkpoint's own programs round activations."""
    limit = settings.get("activation_scale_ub")
    if settings.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static":
        return "in floats of 8 bits, by scales fixed in the checkpoint"
    if settings.text("quant_method").lower() == "fp8" and "weight_block_size" in settings:
        return f"in floats of 8 bits, {block[1]} inputs of a token by a scale that is found while the model runs"
    cut = f", numbers above activation_scale_ub ({limit!r:.20}) cut off, which none are here" if limit else ""
    return f"in floats of 8 bits, each token by a scale that is found while the model runs{cut}"


def _block(settings: Settings) -> tuple[int, int]:
    """Rows and columns of a block."""
    found = settings.get("weight_block_size")
    if found is None:
        return _BLOCK
    sizes = isinstance(found, list) and len(found) == 2 and all(type(n) is int and 1 <= n < 1 << 24 for n in found)
    if not sizes or not isinstance(found, list):
        raise settings.wrong("weight_block_size", "two positive whole numbers")
    return found[0], found[1]
