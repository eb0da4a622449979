"""Integers in groups along the input dimension, with one f16 scale (and minimum) a group.

`q4g64`: w = scale * q with q in [-8, 7]; `q8g64`: q in [-127, 127], and -128 where another tool chose the integers;
`q4g64a` (asymmetric): w = scale * q + minimum with q in [0, 15]; `q6g64`: w = scale * level(q) with q in [-32, 31],
see `levels.py`. Scales are rounded to f16 before the integers are chosen, so that the integers fit the scales in use.
A last group that the input dimension does not fill is rounded as the shorter group that it is.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llmc.compiler.encodings.levels import BENT_BITS, bend
from llmc.compiler.encodings.search import Rounding, round_asymmetric, round_symmetric
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.types import Array, Encoding, Tensor, is_precise, itemsize, register_encoding
from llmc.errors import CompileError, IRError

BLOCK = 1 << 17  # weights rounded at a time: the temporaries of a block stay in the second-level cache
_NAME = re.compile(r"q(\d+)g(\d+)(a?)\Z")


@dataclass(frozen=True)
class GroupQuantized(Encoding):
    """`bits`-bit integers, one f16 scale (asymmetric: and one f16 minimum) for every `group` inputs of a row.

    Parts of an `Encoded` of shape [..., K], with G = ceil(K / group): q i8 (asymmetric: u8) [..., K], scales f16
    [..., G] and, asymmetric, minimums f16 [..., G].
    """

    bits: int
    group: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 6, 8):
            raise IRError(f"no encoding with {self.bits} bits: 4, 6 or 8")
        if self.bits == BENT_BITS and not self.symmetric:
            raise IRError(f"no encoding with {self.bits} bits and minimums: 4 or 8 bits")
        if self.group < 8 or self.group % 8:
            raise IRError(f"no encoding with groups of {self.group}: a positive multiple of 8 (32, 64 or 128)")

    @property
    def name(self) -> str:
        return f"q{self.bits}g{self.group}{'' if self.symmetric else 'a'}"

    @property
    def lowest(self) -> int:
        """The smallest integer in use."""
        if not self.symmetric:
            return 0
        return -127 if self.bits == 8 else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest integer in use."""
        return (1 << self.bits) - 1 if not self.symmetric else (1 << (self.bits - 1)) - 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales included, where groups are full."""
        return self.bits + (16 if self.symmetric else 32) / self.group


@register_encoding
def _parse(name: str) -> Encoding | None:
    found = _NAME.match(name)
    if found is None:
        return None
    encoding = GroupQuantized(int(found[1]), int(found[2]), not found[3])
    return encoding if encoding.name == name else None


def grouped(encoding: Encoding) -> GroupQuantized:
    """The encoding as a `GroupQuantized`; IRError for another family."""
    if not isinstance(encoding, GroupQuantized):
        raise IRError(f"{encoding} is not a group-quantized encoding")
    return encoding


def widen(w: Array) -> NDArray[np.float32]:
    """The array in f32."""
    if w.dtype == ml_dtypes.bfloat16:  # f32's upper half; a shift is several times faster than a conversion
        bits = np.left_shift(w.view(np.uint16), np.uint32(16), dtype=np.uint32, casting="unsafe")
        return bits.view(np.float32)
    return w.astype(np.float32, copy=False)


def encode(encoding: Encoding, w: Array, *, search: bool = True, threads: int | None = None) -> Encoded:
    """Round a float array [..., K] to an encoding.

    search: per group, the scale with the least squared error among a few candidates (never worse than without);
    otherwise the scale that just covers the largest weight. threads: default, the cores this process may use, at
    most 8. CompileError where a weight is not finite or needs a scale beyond f16.
    """
    kind = grouped(encoding)
    if w.ndim == 0 or w.dtype.kind not in "fV":
        raise CompileError(f"cannot round a {w.dtype} array of shape {list(w.shape)} to {encoding}: needs float rows")
    inputs = w.shape[-1]
    rows = w.reshape(-1, inputs) if w.size else w.reshape(math.prod(w.shape[:-1]), inputs)
    groups = -(-inputs // kind.group)
    parts = empty_parts(kind, len(rows), inputs)
    step = max(1, BLOCK // max(1, inputs))

    def one_block(start: int) -> None:
        part = slice(start, start + step)
        found = _round_rows(kind, rows[part], search)
        parts["q"][part] = found.q.reshape(len(found.q), -1)[:, :inputs] if groups else 0
        parts["scales"][part] = found.scales
        if found.minimums is not None:
            parts["minimums"][part] = found.minimums

    each_block(one_block, range(0, len(rows), step) if groups else (), threads)
    return Encoded(
        encoding, w.shape, {name: part.reshape(*w.shape[:-1], part.shape[1]) for name, part in parts.items()}
    )


def empty_parts(kind: GroupQuantized, rows: int, inputs: int) -> dict[str, Array]:
    """Room for the parts of an encoded [rows, inputs]."""
    groups = -(-inputs // kind.group)
    parts: dict[str, Array] = {
        "q": np.empty((rows, inputs), np.int8 if kind.symmetric else np.uint8),
        "scales": np.empty((rows, groups), np.float16),
    }
    if not kind.symmetric:
        parts["minimums"] = np.empty((rows, groups), np.float16)
    return parts


def each_block(work: Callable[[int], None], starts: Sequence[int], threads: int | None) -> None:
    """Call `work` on every start, on several threads (numpy lets go of the interpreter's lock inside its loops)."""
    workers = min(threads or min(8, len(os.sched_getaffinity(0))), len(starts))
    if workers <= 1:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, starts):
            pass


def _round_rows(kind: GroupQuantized, rows: Array, search: bool) -> Rounding:
    """Integers [N, K], scales and minimums [N, G] of some rows [N, K]: full groups at once, then the short last one."""
    w = widen(rows)
    count, inputs = w.shape
    full = inputs - inputs % kind.group
    rounding = round_symmetric if kind.symmetric else round_asymmetric
    pieces = []
    if full:
        whole = np.ascontiguousarray(w[:, :full]).reshape(-1, kind.group)
        pieces.append(rounding(whole, kind.bits, search))
    if full < inputs:
        pieces.append(rounding(np.ascontiguousarray(w[:, full:]), kind.bits, search))
    q = np.concatenate([piece.q.reshape(count, -1) for piece in pieces], axis=1)
    scales = np.concatenate([piece.scales.reshape(count, -1) for piece in pieces], axis=1)
    minimums = [piece.minimums.reshape(count, -1) for piece in pieces if piece.minimums is not None]
    return Rounding(q, scales, np.concatenate(minimums, axis=1) if minimums else None)


def decode(encoded: Encoded) -> Array:
    """The logical values, f32; f64 inside `precise()`, where they are exact."""
    kind = grouped(encoded.encoding)
    wide = np.dtype(np.float64 if is_precise() else np.float32)
    inputs = encoded.shape[-1]
    q = encoded.parts["q"].reshape(-1, inputs) if encoded.parts["q"].size else encoded.parts["q"]
    if q.size == 0:
        return np.zeros(encoded.shape, wide)
    values = np.empty(q.shape, wide)
    scales = encoded.parts["scales"].reshape(len(q), -1).astype(wide)
    minimums = None if kind.symmetric else encoded.parts["minimums"].reshape(len(q), -1).astype(wide)
    for index, start in enumerate(range(0, inputs, kind.group)):
        part = slice(start, start + kind.group)
        if kind.bits == BENT_BITS:
            values[:, part] = q[:, part]
            bend(values[:, part])
            values[:, part] *= scales[:, index, None]
        else:
            np.multiply(q[:, part], scales[:, index, None], out=values[:, part])
        if minimums is not None:
            values[:, part] += minimums[:, index, None]
    return values.reshape(encoded.shape)


def stored_bytes(encoding: Encoding, shape: Sequence[int]) -> int:
    """Bytes of packed integers, scales and minimums for a logical shape [..., K]; the last group counts in full."""
    kind = grouped(encoding)
    groups = -(-shape[-1] // kind.group)
    per_row = groups * (kind.group * kind.bits // 8 + (2 if kind.symmetric else 4))
    return math.prod(shape[:-1]) * per_row


def storage_bytes(kind: Tensor) -> int:
    """Bytes that values of a type occupy in an artifact, before a target pads them; IRError for a symbolic shape."""
    shape = [dim for dim in kind.shape if isinstance(dim, int)]
    if len(shape) != kind.rank:
        raise IRError(f"{kind} has no known size")
    return math.prod(shape) * itemsize(kind.dtype) if kind.encoding is None else stored_bytes(kind.encoding, shape)
