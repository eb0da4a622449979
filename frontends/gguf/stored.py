"""Types whose weights llmc keeps as the integers that they are, and how finely the others are rounded at least.

Kept, with one scale for 32 inputs: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 bit for bit; Q4_K and Q5_K, and with one for 16
Q2_K, Q3_K and Q6_K, as integers whose scales and minimums, products of 15 to 19 bits in the file, are rounded to f16
(`keep-integers` refuses where that matters).
Blocks of one value have a scale of 0 in the file: they become integer 0, a scale of that value and a zero point of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.types import Array
from llmc.frontends.gguf.dequantize import Bytes, Floats, fields, half, words
from llmc.frontends.gguf.dequantize_simple import five_bits
from llmc.frontends.gguf.dequantize_super import (
    five_bits_of_k,
    scales_and_minimums,
    scales_of_q3_k,
    scales_of_q6_k,
    six_bits_of_k,
    small_scales_and_minimums,
    three_bits_of_k,
)
from llmc.frontends.gguf.tensor_types import TENSOR_TYPES, TensorType


@dataclass(frozen=True)
class Kind:
    """A type's integers. bits: of each. zero: the zero point of all, or None where each block has its own. q: of blocks
    u8 [n, bytes of a block], the integers [n, weights of a block]. ranges: their scales and minimums f32 [n, groups of
    `group` inputs]; a weight is scale * q + minimum, or scale * (q - zero)."""

    bits: int
    zero: int | None
    q: Callable[[Bytes], Array]
    ranges: Callable[[Bytes], tuple[Floats, Floats | None]]
    group: int = 32


def _with_minimum(blocks: Bytes) -> tuple[Floats, Floats | None]:
    return half(blocks, 0), half(blocks, 2)


def _of_super_blocks(blocks: Bytes) -> tuple[Floats, Floats | None]:
    scales, minimums = scales_and_minimums(blocks)
    return scales, -minimums


def _of_small_groups(blocks: Bytes) -> tuple[Floats, Floats | None]:
    scales, minimums = small_scales_and_minimums(blocks)
    return scales, -minimums


def _scale(blocks: Bytes) -> tuple[Floats, Floats | None]:
    return half(blocks, 0), None


KINDS: dict[str, Kind] = {
    "Q4_0": Kind(4, 8, lambda blocks: fields(blocks[:, 2:], (0, 4), 4, 16), _scale),
    "Q4_1": Kind(4, None, lambda blocks: fields(blocks[:, 4:], (0, 4), 4, 16), _with_minimum),
    "Q5_0": Kind(5, 16, lambda blocks: five_bits(blocks, 2), _scale),
    "Q5_1": Kind(5, None, lambda blocks: five_bits(blocks, 4), _with_minimum),
    "Q8_0": Kind(8, 0, lambda blocks: words(blocks, 2, 34, "<i1"), _scale),
    "Q4_K": Kind(4, None, lambda blocks: fields(blocks[:, 16:], (0, 4), 4, 32), _of_super_blocks),
    "Q5_K": Kind(5, None, five_bits_of_k, _of_super_blocks),
    "Q2_K": Kind(2, None, lambda blocks: fields(blocks[:, 16:80], (0, 2, 4, 6), 2, 32), _of_small_groups, 16),
    "Q3_K": Kind(3, 0, three_bits_of_k, lambda blocks: (scales_of_q3_k(blocks), None), 16),
    "Q6_K": Kind(6, 0, six_bits_of_k, lambda blocks: (scales_of_q6_k(blocks), None), 16),
}


def integers(kind: TensorType, rows: Bytes) -> Array:
    """The integers of rows u8 [n, bytes of a row]: u8 or i8 [n, weights of a row]."""
    known, blocks = KINDS[kind.name], rows.reshape(-1, kind.size)
    q = known.q(blocks)
    if known.zero is None:
        scales, _ = known.ranges(blocks)
        q = q * np.repeat(scales != 0, known.group, axis=1)
    return q.reshape(len(rows), -1)


def scales(kind: TensorType, rows: Bytes) -> NDArray[np.floating]:
    """[n, blocks of a row], in f16 where the file has them so."""
    known = KINDS[kind.name]
    with np.errstate(all="ignore"):  # numbers that are not finite are refused by who asks for the scales
        found, minimums = known.ranges(rows.reshape(-1, kind.size))
    if minimums is not None:
        found = np.where(found == 0, minimums, found)
    found = found.reshape(len(rows), -1)
    return found if kind.block > known.group else found.astype(np.float16)


def zeros(kind: TensorType, rows: Bytes) -> Floats:
    """Zero points f32 [n, blocks of a row], where each block has its own: -minimum / scale."""
    found, minimums = KINDS[kind.name].ranges(rows.reshape(-1, kind.size))
    assert minimums is not None
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        points = np.where(found == 0, np.float32(-1), -minimums / found)
    return points.reshape(len(rows), -1)


def least_scheme(name: str, kept: bool | None = None) -> str | None:
    """How finely weights of a type that is not kept are rounded anew at least, so that they keep no fewer bits than
    they had; None for types of floats, and those that are kept. kept: whether this weight is, where not its type
    decides."""
    kind = next(kind for kind in TENSOR_TYPES.values() if kind.name == name)
    if kind.dtype is not None or (name in KINDS if kept is None else kept):
        return None
    return next((f"int{bits}" for bits in (4, 5, 6) if kind.bits <= bits), "int8")
