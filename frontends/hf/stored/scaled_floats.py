"""Weights in floats of 8 bits with scales: one, one a row, or one for each block of rows and columns."""

from __future__ import annotations

import math

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.frontends.hf.stored.packing import Module
from llmc.frontends.stored_integers import Part

FLOATS_OF_8 = ("f8_e4m3", "f8_e5m2")


def scaled_floats(module: Module, weight: str, scale: str, block: tuple[int, int] | None = None) -> Part:
    """weight * scale, f32. The last two axes of the scale have one number a block of rows and columns of the weight.

    block: rows and columns of a block; the last ones may be smaller. None: as many as the shapes say.
    """
    module.require(weight, (-1,) * len(module.shape(weight)), *FLOATS_OF_8)
    shape = module.shape(weight)
    if len(shape) not in (2, 3):
        raise module.wrong(f"its {weight} has {len(shape)} axes: a matrix is read, or one for each expert")
    module.require(scale, module.shape(scale), "f32", "bf16", "f16", "f8_e8m0")
    found = module.shape(scale)
    grid = (1, 1) if math.prod(found) == 1 else (found[0], 1) if len(found) == 1 else found[-2:]
    # A scale for each expert may stand as [experts], [experts, 1] or [experts, 1, 1].
    each = found[:1] if len(shape) == 3 and found[0] == shape[0] and math.prod(found) > 1 else ()
    if each and len(found) < 3:
        grid = (found[1], 1) if len(found) == 2 else (1, 1)
    rows, columns = shape[-2:]
    size = block or (-(-rows // max(1, grid[0])), -(-columns // max(1, grid[1])))
    size = (size[0] if grid[0] > 1 else max(1, rows), size[1] if grid[1] > 1 else max(1, columns))
    fits = (-(-rows // size[0]), -(-columns // size[1])) == grid and math.prod(found) == math.prod((*each, *grid))
    if block is None and (rows % size[0] or columns % size[1]):
        fits = False  # which columns the blocks end at is not known
    if not fits or (len(shape) == 3 and math.prod(found) > 1 and not each):
        raise module.wrong(f"its {scale} of {list(found)} does not fit its {weight} of {list(shape)}")

    def load() -> Array:
        scales = module.load(scale).astype(np.float32).reshape(*each, *grid)
        wide = np.repeat(np.repeat(scales, size[0], axis=-2), size[1], axis=-1)[..., :rows, :columns]
        return np.asarray(module.load(weight).astype(np.float32) * wide)

    return Part(shape, "f32", load)
