"""Types with super-blocks of 256 weights: scales of small groups are integers, times an f16 of the super-block.

Q2_K: 16 groups of 16, 4-bit scales and minimums. Q3_K: 16 groups, 6-bit scales. Q4_K, Q5_K: 8 groups of 32, 6-bit
scales and minimums. Q6_K: 16 groups, i8 scales. Q8_K: one f32 scale. IQ4_XS: 8 groups, 6-bit scales, indices into
IQ4_NL's table. TQ1_0, TQ2_0: -1, 0 or 1 times one scale, five in a byte in base 3, or four in 2 bits each.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.frontends.gguf.dequantize import Bytes, Floats, dequantizes, fields, half, words
from llmc.frontends.gguf.dequantize_simple import IQ4_LEVELS
from llmc.frontends.gguf.tensor_types import K


def _grouped(q: Array, scales: Floats, minimums: Floats | None = None) -> Floats:
    """scale * q - minimum, with scales [n, groups] and q [n, 256]."""
    values = scales[..., None] * q.astype(np.float32).reshape(len(q), scales.shape[1], -1)
    if minimums is not None:
        values -= minimums[..., None]
    return values.reshape(len(q), K)


def small_scales_and_minimums(blocks: Bytes) -> tuple[Floats, Floats]:
    """Of Q2_K: f32 [n, 16] each; a weight is scale * q - minimum."""
    packed = blocks[:, :16]
    return half(blocks, 80) * (packed & 15).astype(np.float32), half(blocks, 82) * (packed >> 4).astype(np.float32)


@dequantizes("Q2_K")
def _q2_k(blocks: Bytes) -> Floats:
    return _grouped(fields(blocks[:, 16:80], (0, 2, 4, 6), 2, 32), *small_scales_and_minimums(blocks))


def scales_of_q3_k(blocks: Bytes) -> Floats:
    """f32 [n, 16]."""
    low = fields(blocks[:, 96:104], (0, 4), 4, 8)
    high = fields(blocks[:, 104:108], (0, 2, 4, 6), 2, 4)
    found: Floats = half(blocks, 108) * ((low | high << 4).astype(np.float32) - np.float32(32))
    return found


def three_bits_of_k(blocks: Bytes) -> Array:
    """Integers of Q3_K, i8 around 0."""
    third = fields(blocks[:, :32], tuple(range(8)), 1, 32)  # a bit that is 1 takes nothing away
    found: Array = fields(blocks[:, 32:96], (0, 2, 4, 6), 2, 32).astype(np.int8) - ((third ^ 1) << 2).astype(np.int8)
    return found


@dequantizes("Q3_K")
def _q3_k(blocks: Bytes) -> Floats:
    return _grouped(three_bits_of_k(blocks), scales_of_q3_k(blocks))


def six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 8 scales and 8 minimums in 12 bytes: the first four have 6 bits of a byte; of the others, 4 low bits lie
    together, and the 2 high ones above those of the first."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, rest & 15 | first >> 2 & 48], axis=1)
    minimums = np.concatenate([second & 63, rest >> 4 | second >> 2 & 48], axis=1)
    return scales, minimums


def scales_and_minimums(blocks: Bytes) -> tuple[Floats, Floats]:
    """Of Q4_K and Q5_K: f32 [n, 8] each; a weight is scale * q - minimum."""
    scales, minimums = six_bit_pairs(blocks[:, 4:16])
    return half(blocks, 0) * scales.astype(np.float32), half(blocks, 2) * minimums.astype(np.float32)


@dequantizes("Q4_K")
def _q4_k(blocks: Bytes) -> Floats:
    return _grouped(fields(blocks[:, 16:], (0, 4), 4, 32), *scales_and_minimums(blocks))


def five_bits_of_k(blocks: Bytes) -> Bytes:
    """Integers of Q5_K, u8 from 0 on."""
    fifth = fields(blocks[:, 16:48], tuple(range(8)), 1, 32)
    found: Bytes = fields(blocks[:, 48:], (0, 4), 4, 32) | fifth << np.uint8(4)
    return found


@dequantizes("Q5_K")
def _q5_k(blocks: Bytes) -> Floats:
    return _grouped(five_bits_of_k(blocks), *scales_and_minimums(blocks))


def scales_of_q6_k(blocks: Bytes) -> Floats:
    """f32 [n, 16]."""
    found: Floats = half(blocks, 208) * words(blocks, 192, 208, "<i1").astype(np.float32)
    return found


def six_bits_of_k(blocks: Bytes) -> Array:
    """Integers of Q6_K, i8 around 0."""
    low = fields(blocks[:, :128], (0, 4), 4, 64)
    high = fields(blocks[:, 128:192], (0, 2, 4, 6), 2, 32)
    found: Array = (low | high << 4).astype(np.int8) - np.int8(32)
    return found


@dequantizes("Q6_K")
def _q6_k(blocks: Bytes) -> Floats:
    return _grouped(six_bits_of_k(blocks), scales_of_q6_k(blocks))


@dequantizes("Q8_K")
def _q8_k(blocks: Bytes) -> Floats:
    return words(blocks, 0, 4, "<f4") * words(blocks, 4, 260, "<i1").astype(np.float32)


@dequantizes("IQ4_XS")
def _iq4_xs(blocks: Bytes) -> Floats:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = words(blocks, 2, 4, "<u2") >> (2 * np.arange(8, dtype=np.uint16)) & 3
    scales = half(blocks, 0) * ((low | high << 4).astype(np.float32) - np.float32(32))
    return _grouped(IQ4_LEVELS[fields(blocks[:, 8:], (0, 4), 4, 16)], scales)


@dequantizes("TQ1_0")
def _tq1_0(blocks: Bytes) -> Floats:
    parts = [
        _base_three(blocks[:, :32], 5, 32),
        _base_three(blocks[:, 32:48], 5, 16),
        _base_three(blocks[:, 48:52], 4, 4),
    ]
    return half(blocks, 52) * (np.concatenate(parts, axis=1).astype(np.float32) - np.float32(1))


def _base_three(data: Bytes, digits: int, run: int) -> Array:
    """Digits of bytes that hold ceil(256 * n / 243): the first digit of all bytes of a run, then the second."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:digits].reshape(1, 1, -1, 1)
    shifted = data.reshape(len(data), -1, 1, run) * powers  # modulo 256: the digits before fall away
    return (shifted.astype(np.uint16) * np.uint16(3) >> np.uint16(8)).reshape(len(data), -1)


@dequantizes("TQ2_0")
def _tq2_0(blocks: Bytes) -> Floats:
    q = fields(blocks[:, :64], (0, 2, 4, 6), 2, 32)
    return half(blocks, 64) * (q.astype(np.float32) - np.float32(1))
