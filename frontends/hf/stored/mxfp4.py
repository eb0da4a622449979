"""Experts in MXFP4, as gpt-oss is published: 32 floats of 4 bits (E2M1) share a power of two.

For a weight `name` [experts, inputs, outputs]: name_blocks u8 [experts, outputs, inputs / 32, 16], two floats a byte,
the low half first; name_scales u8 [experts, outputs, inputs / 32], exponents with 127 added. OCP Microscaling Formats
(MX) specification 1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.types import NUMPY_DTYPES, Array
from llmc.errors import FrontendError
from llmc.frontends.hf.stored.packing import Module
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredWeights

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_NAN = 255  # an exponent that stands for no number


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of a checkpoint with experts in MXFP4."""
    settings.ignore("modules_to_not_convert", "dequantize")
    names = frozenset(file.names)
    floats: dict[str, Part] = {}
    parts: list[str] = []
    for blocks in sorted(name for name in names if name.endswith("_blocks")):
        weight = blocks.removesuffix("_blocks")
        path, _, leaf = weight.rpartition(".")
        floats[weight] = _experts(Module(file, path, names), leaf)
        parts += [blocks, f"{weight}_scales"]
    if not floats:
        raise FrontendError(f"{settings.where} says mxfp4, but no tensor of the checkpoint is named _blocks")
    note = f"{len(floats)} weights of the checkpoint are in MXFP4: they are used as the floats that they stand for"
    return StoredWeights(file, {}, floats, parts), (note,)


def _experts(module: Module, leaf: str) -> Part:
    blocks, scales = f"{leaf}_blocks", f"{leaf}_scales"
    module.require(blocks, (-1, -1, -1, 16), "u8")
    experts, outputs, groups, _ = module.shape(blocks)
    module.require(scales, (experts, outputs, groups), "u8")

    def load() -> Array:
        """[experts, inputs, outputs]; bf16 holds a float of 4 bits times a power of two exactly."""
        exponents = module.load(scales)
        if (exponents == _NAN).any():
            raise module.wrong(f"its {scales} hold an exponent of 255, which stands for no number: it is damaged")
        found = np.empty((experts, groups * 32, outputs), NUMPY_DTYPES["bf16"])
        for expert, packed in enumerate(module.load(blocks)):
            halves = np.stack([packed & 15, packed >> 4], axis=-1)
            values = E2M1[halves].reshape(outputs, groups, 32)
            powers = exponents[expert].astype(np.int32) - 127
            found[expert] = np.ldexp(values, powers[..., None]).reshape(outputs, groups * 32).T
        return found

    return Part((experts, groups * 32, outputs), "bf16", load)
