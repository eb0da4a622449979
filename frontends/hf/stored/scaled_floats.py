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

    block: rows and columns of a block; the last ones may be smaller. None: only one scale, or one a row or column.
    """
    module.require(weight, (-1,) * len(module.shape(weight)), *FLOATS_OF_8)
    shape = module.shape(weight)
    if len(shape) not in (2, 3):
        raise module.wrong(f"its {weight} has {len(shape)} axes: a matrix is read, or one for each expert")
    module.require(scale, module.shape(scale), "f32", "bf16", "f16", "f8_e8m0")
    rows, columns = shape[-2:]
    grid = _grid(module.shape(scale), shape)
    size = None if grid is None else _size(grid[-2:], (rows, columns), block)
    if grid is None or size is None:
        raise module.wrong(f"its {scale} of {list(module.shape(scale))} does not fit its {weight} of {list(shape)}")

    def load() -> Array:
        scales = module.load(scale).astype(np.float32).reshape(grid)
        wide = np.repeat(np.repeat(scales, size[0], axis=-2), size[1], axis=-1)[..., :rows, :columns]
        return np.asarray(module.load(weight).astype(np.float32) * wide)

    return Part(shape, "f32", load)


def _grid(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """The scale's shape with all axes of the weight, or with the last two where it is one number for all; None where
    its first axes are not the weight's."""
    if math.prod(scale) == 1:
        return (1, 1)
    grid = (*scale, *(1,) * (len(weight) - len(scale)))  # what is left out are last axes of one
    return grid if len(grid) == len(weight) and grid[:-2] == weight[:-2] else None


def _size(grid: tuple[int, ...], matrix: tuple[int, int], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of a block; None where such blocks do not make the matrix."""
    found = []
    for axis, (count, whole) in enumerate(zip(grid, matrix, strict=True)):
        if count == 1:
            found.append(whole)
        elif count == whole:
            found.append(1)
        elif block is not None:
            found.append(block[axis])
        else:
            return None  # where the blocks end is not known
        if -(-whole // found[-1]) != count:
            return None
    return found[0], found[1]
