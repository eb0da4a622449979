"""The IQ types whose weights are points of a grid: eight or four at a time share one index.

IQ2 and IQ3: magnitudes from a grid, with signs beside them. Where 7 bits say the signs of eight weights, their number
of minuses is even. IQ1: values -1, 0 or 1 from a grid, moved by an eighth up or down.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.frontends.gguf.dequantize import Bytes, Floats, dequantizes, half, words
from llmc.frontends.gguf.grids import grid

_SEVEN = np.arange(128)
_EVEN = (_SEVEN | (np.bitwise_count(_SEVEN) & 1) << 7).astype(np.uint8)  # seven signs, and the eighth that they imply
_DELTA = np.float32(0.125)


def _signs(packed: Bytes) -> Floats:
    """1, or -1 where a bit is set [n, bytes * 8]."""
    bits = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")
    return np.where(bits == 0, np.float32(1), np.float32(-1))


def _signed(scales: Floats, points: Floats, signs: Floats) -> Floats:
    """scale * magnitude * sign, with scales [n, groups]."""
    count = len(scales)
    values = scales[..., None] * points.reshape(count, scales.shape[1], -1)
    values *= signs.reshape(values.shape)
    return values.reshape(count, -1)


def _nibble_pairs(packed: Bytes) -> Bytes:
    """The low and the high half of each byte, one after the other."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _word_scales(blocks: Bytes, packed: Array, factor: float) -> Floats:
    """The scales in the upper 4 bits of u32s: d * (1/2 + s) * factor."""
    return half(blocks, 0) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(factor)


def _word_signs(packed: Array) -> Floats:
    """The signs in the lower 28 bits of u32s, seven for eight weights."""
    sevens = packed[..., None] >> np.array([0, 7, 14, 21], np.uint32) & np.uint32(127)
    return _signs(_EVEN[sevens].reshape(len(packed), -1))


@dequantizes("IQ2_XXS")
def _iq2_xxs(blocks: Bytes) -> Floats:
    pairs = words(blocks, 2, 66, "<u4").reshape(len(blocks), -1, 2)
    indices = np.ascontiguousarray(pairs[..., 0]).view(np.uint8)
    rest = np.ascontiguousarray(pairs[..., 1])
    return _signed(_word_scales(blocks, rest, 0.25), grid("IQ2_XXS")[indices], _word_signs(rest))


@dequantizes("IQ3_XXS")
def _iq3_xxs(blocks: Bytes) -> Floats:
    rest = words(blocks, 66, 98, "<u4")
    return _signed(_word_scales(blocks, rest, 0.5), grid("IQ3_XXS")[blocks[:, 2:66]], _word_signs(rest))


def _nibble_scales(blocks: Bytes, begin: int, end: int) -> Floats:
    return half(blocks, 0) * (np.float32(0.5) + _nibble_pairs(blocks[:, begin:end])) * np.float32(0.25)


@dequantizes("IQ2_XS")
def _iq2_xs(blocks: Bytes) -> Floats:
    packed = words(blocks, 2, 66, "<u2")
    return _signed(_nibble_scales(blocks, 66, 74), grid("IQ2_XS")[packed & 511], _signs(_EVEN[packed >> 9]))


@dequantizes("IQ2_S")
def _iq2_s(blocks: Bytes) -> Floats:
    high = blocks[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    indices = blocks[:, 2:34].astype(np.uint16) | high.reshape(len(blocks), -1).astype(np.uint16) << 8
    return _signed(_nibble_scales(blocks, 74, 82), grid("IQ2_S")[indices], _signs(blocks[:, 34:66]))


@dequantizes("IQ3_S")
def _iq3_s(blocks: Bytes) -> Floats:
    high = np.unpackbits(np.ascontiguousarray(blocks[:, 66:74]), axis=1, bitorder="little")
    indices = blocks[:, 2:66].astype(np.uint16) | high.astype(np.uint16) << 8
    scales = half(blocks, 0) * (1 + 2 * _nibble_pairs(blocks[:, 106:110])).astype(np.float32)
    return _signed(scales, grid("IQ3_S")[indices], _signs(blocks[:, 74:106]))


def _moved(scales: Floats, points: Floats, downwards: Array) -> Floats:
    """scale * (value + delta), with scales [n, groups] and one direction for a run of points [n, runs]."""
    count, runs = downwards.shape
    delta = np.where(downwards, -_DELTA, _DELTA)
    values = (points.reshape(count, runs, -1) + delta[..., None]).reshape(count, scales.shape[1], -1)
    return (scales[..., None] * values).reshape(count, -1)


@dequantizes("IQ1_S")
def _iq1_s(blocks: Bytes) -> Floats:
    high = words(blocks, 34, 50, "<u2")
    scales = half(blocks, 0) * (2 * (high >> 12 & 7) + 1).astype(np.float32)
    upper = (high[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(blocks), -1)
    return _moved(scales, grid("IQ1_S")[blocks[:, 2:34].astype(np.uint16) | upper << 8], high & 0x8000 != 0)


@dequantizes("IQ1_M")
def _iq1_m(blocks: Bytes) -> Floats:
    packed = words(blocks, 48, 56, "<u2")
    # The f16 scale lies in the upper 4 bits of four u16s.
    d = np.bitwise_or.reduce((packed & 0xF000) >> np.array([12, 8, 4, 0], np.uint16), axis=1)
    groups = packed[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    scales = d.view(np.float16).astype(np.float32)[:, None] * (2 * groups + 1).reshape(len(blocks), -1).astype(
        np.float32
    )
    high = _nibble_pairs(blocks[:, 32:48])
    indices = blocks[:, :32].astype(np.uint16) | (high & 7).astype(np.uint16) << 8
    return _moved(scales, grid("IQ1_S")[indices], high & 8 != 0)
