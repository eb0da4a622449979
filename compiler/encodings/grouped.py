"""Integers in groups along the input dimension, with one f16 scale (and minimum) a group.

`q4g64`: w = scale * q with q in [-8, 7]; `q8g64`: q in [-127, 127], and -128 where another tool chose the integers;
`q4g64a` (asymmetric): w = scale * q + minimum with q in [0, 15]; `q4g64z`: w = scale * (q + minimum), for integers with
zero points that another tool chose: f16 holds these where it does not hold their products with scales; `t4g64`:
w = scale * level(q) with q in [-8, 7] and the levels of a table, see `levels.py`. So for the other numbers of bits.
`q8g64r`, `t4g64r`: one scale for all inputs of a row (an output channel); groups of 64 are those of the activations.
Scales are rounded to f16 before the integers are chosen, so that the integers fit the scales in use. A last group that
the input dimension does not fill is rounded as the shorter group that it is.
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

from llmc.compiler.encodings.levels import TABLE_BITS, EvenLevels, Levels, even_levels, table_levels
from llmc.compiler.encodings.search import Rounding, round_asymmetric, round_symmetric
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.types import Array, Encoding, Tensor, is_precise, itemsize, register_encoding
from llmc.errors import CompileError, IRError

BLOCK = 1 << 17  # weights rounded at a time: the temporaries of a block stay in the second-level cache
EVEN_BITS = (2, 3, 4, 5, 6, 8)
HALF = 16  # inputs that 3 or 5 bits of each fill half a vector of a tile with
_NAME = re.compile(r"([qt])(\d+)g(\d+)([azr]?)\Z")


@dataclass(frozen=True)
class GroupQuantized(Encoding):
    """`bits`-bit integers, one f16 scale (asymmetric: and one f16 minimum) for every `group` inputs of a row.

    Parts of an `Encoded` of shape [..., K], with G = ceil(K / group): q i8 (asymmetric: u8) [..., K], scales f16
    [..., G] and, asymmetric, minimums f16 [..., G]. table: integers stand for the levels of a table. in_steps: minimums
    count steps of the scale. per_row: all groups of a row share one scale, G = 1; what kernels round activations in is
    the group still.
    """

    bits: int
    group: int
    symmetric: bool = True
    table: bool = False
    in_steps: bool = False
    per_row: bool = False

    def __post_init__(self) -> None:
        known = TABLE_BITS if self.table else EVEN_BITS
        if self.bits not in known:
            what = "a table of levels" if self.table else "even steps"
            raise IRError(f"no encoding with {self.bits} bits and {what}: {' or '.join(map(str, known))}")
        if self.table and not self.symmetric:
            raise IRError("no encoding with a table of levels and minimums")
        if self.in_steps and self.symmetric:
            raise IRError("no encoding without minimums has them in steps")
        if self.per_row and not self.symmetric:
            raise IRError("no encoding with one scale a row and minimums")
        if self.group < 8 or self.group % 8:
            raise IRError(f"no encoding with groups of {self.group}: a positive multiple of 8 (16, 32, 64 or 128)")

    @property
    def name(self) -> str:
        minimums = ("r" if self.per_row else "") if self.symmetric else "z" if self.in_steps else "a"
        return f"{'t' if self.table else 'q'}{self.bits}g{self.group}{minimums}"

    @property
    def levels(self) -> Levels:
        """What the integers stand for; those of minimums, above them."""
        return table_levels(self.bits) if self.table else even_levels(self.bits, self.symmetric)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales included, where groups are full and rows long."""
        return self.bits if self.per_row else self.bits + (16 if self.symmetric else 32) / self.group

    def scaled(self, inputs: int) -> int:
        """How many of so many inputs share a scale."""
        return max(1, inputs) if self.per_row else self.group

    def scales(self, inputs: int) -> int:
        """Scales of a row of so many inputs."""
        return min(1, inputs) if self.per_row else -(-inputs // self.group)


def fits(bits: int, group: int) -> bool:
    """Whether integers of so many bits in groups of so many inputs share no vector of a tile with the next group."""
    return group != HALF or bits not in (3, 5)


@register_encoding
def _parse(name: str) -> Encoding | None:
    found = _NAME.match(name)
    if found is None:
        return None
    symmetric, table, in_steps, per_row = found[4] in ("", "r"), found[1] == "t", found[4] == "z", found[4] == "r"
    encoding = GroupQuantized(int(found[2]), int(found[3]), symmetric, table, in_steps, per_row)
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
    if kind.in_steps:
        raise CompileError(f"{encoding} is for integers that another tool chose: nothing is rounded to it")
    if w.ndim == 0 or w.dtype.kind not in "fV":
        raise CompileError(f"cannot round a {w.dtype} array of shape {list(w.shape)} to {encoding}: needs float rows")
    inputs = w.shape[-1]
    rows = w.reshape(-1, inputs) if w.size else w.reshape(math.prod(w.shape[:-1]), inputs)
    groups = kind.scales(inputs) if inputs else 0
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
    groups = kind.scales(inputs)
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
    group = kind.scaled(inputs)
    full = inputs - inputs % group
    pieces = []
    if full:
        pieces.append(round_groups(kind, np.ascontiguousarray(w[:, :full]).reshape(-1, group), search))
    if full < inputs:
        pieces.append(round_groups(kind, np.ascontiguousarray(w[:, full:]), search))
    q = np.concatenate([piece.q.reshape(count, -1) for piece in pieces], axis=1)
    scales = np.concatenate([piece.scales.reshape(count, -1) for piece in pieces], axis=1)
    minimums = [piece.minimums.reshape(count, -1) for piece in pieces if piece.minimums is not None]
    return Rounding(q, scales, np.concatenate(minimums, axis=1) if minimums else None)


def round_groups(
    kind: GroupQuantized, w: NDArray[np.float32], search: bool, importance: NDArray[np.float32] | None = None
) -> Rounding:
    """Groups [M, G], each by itself. importance: see `round_symmetric`; no matter where there are minimums."""
    levels = kind.levels
    if not kind.symmetric:
        assert isinstance(levels, EvenLevels)
        return round_asymmetric(w, levels, search)
    return round_symmetric(w, levels, search, importance)


def decode(encoded: Encoded) -> Array:
    """The logical values, f32; f64 inside `precise()`, where they are exact."""
    kind = grouped(encoded.encoding)
    wide = np.dtype(np.float64 if is_precise() else np.float32)
    inputs = encoded.shape[-1]
    q = encoded.parts["q"].reshape(-1, inputs) if encoded.parts["q"].size else encoded.parts["q"]
    if q.size == 0:
        return np.zeros(encoded.shape, wide)
    values = np.empty(q.shape, wide)
    if kind.table:
        levels = table_levels(kind.bits)
        q = levels.values.astype(wide)[q.astype(np.intp) - levels.lowest]
    scales = encoded.parts["scales"].reshape(len(q), -1).astype(wide)
    minimums = None if kind.symmetric else encoded.parts["minimums"].reshape(len(q), -1).astype(wide)
    if minimums is not None and kind.in_steps:
        minimums *= scales
    group = kind.scaled(inputs)
    for index, start in enumerate(range(0, inputs, group)):
        part = slice(start, start + group)
        np.multiply(q[:, part], scales[:, index, None], out=values[:, part])
        if minimums is not None:
            values[:, part] += minimums[:, index, None]
    return values.reshape(encoded.shape)


def stored_bytes(encoding: Encoding, shape: Sequence[int]) -> int:
    """Bytes of packed integers, scales and minimums for a logical shape [..., K]; the last group counts in full."""
    kind = grouped(encoding)
    data = -(-shape[-1] // kind.group) * kind.group * kind.bits // 8
    return math.prod(shape[:-1]) * (data + kind.scales(shape[-1]) * (2 if kind.symmetric else 4))


def storage_bytes(kind: Tensor) -> int:
    """Bytes that values of a type occupy in an artifact, before a target pads them; IRError for a symbolic shape."""
    shape = [dim for dim in kind.shape if isinstance(dim, int)]
    if len(shape) != kind.rank:
        raise IRError(f"{kind} has no known size")
    return math.prod(shape) * itemsize(kind.dtype) if kind.encoding is None else stored_bytes(kind.encoding, shape)
