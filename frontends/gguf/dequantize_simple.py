"""Types with one scale a block of 32 weights, and their integers, which the encodings of llmc may hold as they are.

Q4_0: f16 scale, nibbles minus 8. Q4_1: f16 scale and minimum, nibbles. Q5_0, Q5_1: the same with a fifth bit in a u32.
Q8_0: f16 scale, i8. IQ4_NL: as Q4_0, with nibbles that are indices into a table. MXFP4: an exponent, nibbles that are
E2M1 floats. In a block of nibbles, the low ones are the first 16 weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmc.frontends.gguf.dequantize import Bytes, Floats, dequantizes, fields, half, words

IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# E2M1, doubled: the scale is half of what the exponent says.
_FP4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _nibbles(blocks: Bytes, at: int) -> Bytes:
    return fields(blocks[:, at:], (0, 4), 4, 16)


def five_bits(blocks: Bytes, at: int) -> Bytes:
    """Integers of Q5_0 and Q5_1, u8 from 0 on: their fifth bits in four bytes from `at` on, then nibbles."""
    fifth = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")
    return _nibbles(blocks, at + 4) | fifth << np.uint8(4)


@dequantizes("Q4_0")
def _q4_0(blocks: Bytes) -> Floats:
    return half(blocks, 0) * (_nibbles(blocks, 2).astype(np.float32) - np.float32(8))


@dequantizes("Q4_1")
def _q4_1(blocks: Bytes) -> Floats:
    return half(blocks, 0) * _nibbles(blocks, 4).astype(np.float32) + half(blocks, 2)


@dequantizes("Q5_0")
def _q5_0(blocks: Bytes) -> Floats:
    return half(blocks, 0) * (five_bits(blocks, 2).astype(np.float32) - np.float32(16))


@dequantizes("Q5_1")
def _q5_1(blocks: Bytes) -> Floats:
    return half(blocks, 0) * five_bits(blocks, 4).astype(np.float32) + half(blocks, 2)


@dequantizes("Q8_0")
def _q8_0(blocks: Bytes) -> Floats:
    return words(blocks, 2, 34, "<i1").astype(np.float32) * half(blocks, 0)


@dequantizes("IQ4_NL")
def _iq4_nl(blocks: Bytes) -> Floats:
    return half(blocks, 0) * IQ4_LEVELS[_nibbles(blocks, 2)]


@dequantizes("MXFP4")
def _mxfp4(blocks: Bytes) -> Floats:
    return _half_exponents(blocks[:, :1]) * _FP4_LEVELS[_nibbles(blocks, 1)]


def _half_exponents(exponents: Bytes) -> Floats:
    """2^(e - 128): half of what an E8M0 exponent means, down to f32's subnormal numbers."""
    e = exponents.astype(np.uint32)
    bits = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (np.maximum(e, 1) - 1) << np.uint32(23))
    floats: NDArray[np.float32] = bits.astype(np.uint32).view(np.float32)
    return floats
