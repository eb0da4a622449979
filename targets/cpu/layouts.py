"""How weights of linear ops lie in memory, so that kernels read each byte once and in order.

Output rows are cut into *tiles* of `tile_rows` rows, one row a 32-bit lane, and every tile is one contiguous stream
over the input dimension. How many rows a tile has, and how integers are stored, is the architecture's to say
(`WeightTiles`): all its instruction sets read the same bytes, and those with fewer lanes read a tile in slices
(`tile_slices.py`). Rows are padded to whole tiles and inputs to whole groups, with zeros. In a *gated* layout the
logical weight is `[2F, K]`, gate rows then up rows, and gate and up tiles alternate, so that the same work unit holds a
gate and the up that it multiplies.

Every layout has
    row_multiple                  rows that may be packed on their own
    arrays(n, k)                  name -> (shape, dtype) of what `pack` yields for a logical [n, k]
    pack(...) / unpack(...)       from and to the logical parts
Packing a block of `row_multiple` rows yields exactly the bytes that the whole would have there, so blocks may be
concatenated along the first axis. For a gated layout a block is gate rows a..b followed by up rows a..b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Arrays = dict[str, tuple[tuple[int, ...], np.dtype]]

_CHUNK = 1 << 20  # weights packed at a time: the temporaries stay in the second-level cache


@dataclass(frozen=True)
class WeightTiles:
    """How all instruction sets of an architecture find weights in memory.

    rows: of a tile, as many as its widest vector has 32-bit lanes. signed_bytes: weights of 8 bits are stored signed.
    """

    rows: int
    signed_bytes: bool = False

    def offset(self, bits: int, symmetric: bool) -> int:
        """What is added to a logical weight to store it: `sum q*a = dot(stored, a) - offset * sum a`."""
        if bits == 8 and self.signed_bytes:
            return 0 if symmetric else -128
        return 1 << bits - 1 if symmetric else 0

    def quantized(self, bits: int, group: int, symmetric: bool, gated: bool = False) -> QuantizedLayout:
        """The layout of weights of 4 or 8 bits. ValueError where there is none."""
        return QuantizedLayout(bits, group, symmetric, self.rows, self.offset(bits, symmetric), gated)

    def floats(self, dtype: str, gated: bool = False) -> FloatLayout:
        """The layout of weights of `dtype` "f32", "f16" or "bf16". ValueError for another."""
        return FloatLayout(dtype, self.rows, gated)


class _Tiled:
    """What layouts share: cutting rows into tiles, and gate/up interleaving."""

    tile_rows: int
    gated: bool

    @property
    def row_multiple(self) -> int:
        """Rows (of each half, when gated) that may be packed on their own."""
        return self.tile_rows

    def tiles(self, n: int) -> int:
        """Tiles of n logical rows."""
        return 2 * -(-(n // 2) // self.tile_rows) if self.gated else -(-n // self.tile_rows)

    def arrays(self, n: int, k: int) -> Arrays:
        raise AttributeError("every layout says what it yields")

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of all packed arrays of a logical [n, k]."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays(n, k).values())

    def _in_tiles(self, rows: np.ndarray) -> np.ndarray:
        """[n, ...] -> [tiles, tile_rows, ...]: a view where no padding is needed and nothing interleaves."""
        if self.gated:
            if rows.shape[0] % 2:
                raise ValueError(f"a gated weight has as many gate rows as up rows, not {rows.shape[0]} in all")
            half = rows.shape[0] // 2
            halves = [self._cut(rows[:half]), self._cut(rows[half:])]
            return np.stack(halves, axis=1).reshape(-1, *halves[0].shape[1:])
        return self._cut(rows)

    def _cut(self, rows: np.ndarray) -> np.ndarray:
        missing = -rows.shape[0] % self.tile_rows
        if missing:
            rows = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
        return rows.reshape(-1, self.tile_rows, *rows.shape[1:])

    def _from_tiles(self, tiled: np.ndarray, n: int) -> np.ndarray:
        """The inverse of `_in_tiles`, without padding."""
        if self.gated:
            halves = tiled.reshape(-1, 2, *tiled.shape[1:])
            return np.concatenate([halves[:, i].reshape(-1, *tiled.shape[2:])[: n // 2] for i in (0, 1)])
        return tiled.reshape(-1, *tiled.shape[2:])[:n]


def _pad_inputs(values: np.ndarray, multiple: int) -> np.ndarray:
    missing = -values.shape[-1] % multiple
    if not missing:
        return values
    return np.concatenate([values, np.zeros((*values.shape[:-1], missing), values.dtype)], axis=-1)


@dataclass(frozen=True)
class QuantizedLayout(_Tiled):
    """Integers of 4 or 8 bits with an f16 scale (and minimum, when asymmetric) a row and group.

    data u8 [tiles, groups, vectors, tile_rows * 4]: byte 4 * row + i of vector v holds input 4 * v + i of the group,
    plus `offset` (see `WeightTiles.offset`). Of 4-bit weights, vector v holds quads 2v (low nibbles) and 2v + 1 (high).
    scales, minimums f16 [tiles, groups, tile_rows].
    """

    bits: int
    group: int
    symmetric: bool
    tile_rows: int
    offset: int
    gated: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group % 32:
            raise ValueError(f"no layout for {self.bits}-bit weights in groups of {self.group} (4, 8; multiples of 32)")

    def groups(self, k: int) -> int:
        """Groups of k inputs."""
        return -(-k // self.group)

    @property
    def signed(self) -> bool:
        """Whether stored integers may be below zero."""
        return (-(1 << self.bits - 1) if self.symmetric else 0) + self.offset < 0

    @property
    def vectors(self) -> int:
        """Vectors of one group of one tile."""
        return self.group * self.bits // 32

    def arrays(self, n: int, k: int) -> Arrays:
        """name -> (shape, dtype) for a logical [n, k]."""
        tiles, groups = self.tiles(n), self.groups(k)
        found: Arrays = {
            "data": ((tiles, groups, self.vectors, self.tile_rows * 4), np.dtype(np.uint8)),
            "scales": ((tiles, groups, self.tile_rows), np.dtype(np.float16)),
        }
        return found if self.symmetric else found | {"minimums": found["scales"]}

    def pack(self, q: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Logical parts to bytes.

        q: i8 (symmetric) or u8 [n, k]; scales, minimums: f16 [n, ceil(k / group)]. ValueError where they do not fit.
        """
        n, k = q.shape
        if (minimums is None) != self.symmetric:
            raise ValueError("minimums go with asymmetric weights, and only with them")
        per_group = {"scales": scales} if minimums is None else {"scales": scales, "minimums": minimums}
        for name, values in per_group.items():
            if values.shape != (n, self.groups(k)):
                raise ValueError(f"{name} are {values.shape}, the weight needs {(n, self.groups(k))}")
        rows = self._in_tiles(q)
        shape, dtype = self.arrays(n, k)["data"]
        data = np.empty(shape, dtype)
        step = max(1, _CHUNK // max(1, self.tile_rows * k))
        for start in range(0, shape[0], step):
            data[start : start + step] = self._pack_tiles(rows[start : start + step])
        packed = {"data": data}
        for name, values in per_group.items():
            tiled = self._in_tiles(values.astype(np.float16, copy=False))
            packed[name] = np.ascontiguousarray(tiled.transpose(0, 2, 1))
        return packed

    def _pack_tiles(self, rows: np.ndarray) -> np.ndarray:
        """[tiles, tile_rows, k] logical integers -> [tiles, groups, vectors, tile_rows * 4]."""
        padded = np.ascontiguousarray(_pad_inputs(rows, self.group))
        stored = padded.view(np.uint8) + np.uint8(self.offset % 256)
        quads = stored.view(np.uint32)
        if self.bits == 4:
            quads = quads[..., 0::2] | (quads[..., 1::2] << np.uint32(4))
        vectors = np.ascontiguousarray(quads.transpose(0, 2, 1))
        return vectors.view(np.uint8).reshape(len(rows), -1, self.vectors, self.tile_rows * 4)

    def unpack(self, arrays: Mapping[str, np.ndarray], n: int, k: int) -> dict[str, np.ndarray]:
        """The inverse of `pack`: q (i8 or u8) [n, k], scales and minimums f16 [n, groups]."""
        data = arrays["data"]
        quads = data.reshape(data.shape[0], -1, self.tile_rows * 4).view(np.uint32).transpose(0, 2, 1)
        if self.bits == 4:
            low, high = quads & np.uint32(0x0F0F0F0F), (quads >> np.uint32(4)) & np.uint32(0x0F0F0F0F)
            quads = np.stack([low, high], axis=-1).reshape(*quads.shape[:2], -1)
        stored = np.ascontiguousarray(quads).view(np.uint8) - np.uint8(self.offset % 256)
        q = self._from_tiles(stored, n)[:, :k]
        parts = {"q": q.view(np.int8) if self.symmetric else q}
        for name in arrays:
            if name != "data":
                parts[name] = self._from_tiles(arrays[name].transpose(0, 2, 1), n)
        return parts


_FLOAT = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class FloatLayout(_Tiled):
    """Floating-point weights, `dtype` "f32", "f16" or "bf16".

    data [tiles, k, tile_rows] for f32 and f16; for bf16 u16 [tiles, ceil(k / 2), tile_rows, 2]: two consecutive inputs
    share a 32-bit lane, which is what `Bf16Dots` multiply and what a shift and a mask take apart.
    """

    dtype: str
    tile_rows: int
    gated: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _FLOAT:
            raise ValueError(f"no layout for {self.dtype} weights; known: {', '.join(_FLOAT)}")

    def arrays(self, n: int, k: int) -> Arrays:
        """name -> (shape, dtype) for a logical [n, k]."""
        tiles = self.tiles(n)
        if self.dtype == "bf16":
            return {"data": ((tiles, -(-k // 2), self.tile_rows, 2), np.dtype(np.uint16))}
        return {"data": ((tiles, k, self.tile_rows), _FLOAT[self.dtype])}

    def pack(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """values [n, k] in the layout's dtype (bf16: ml_dtypes.bfloat16) to bytes. ValueError for another dtype."""
        if values.dtype != _FLOAT[self.dtype]:
            raise ValueError(f"the layout holds {self.dtype}, the weight is {values.dtype}")
        shape, dtype = self.arrays(*values.shape)["data"]
        rows = self._in_tiles(values)
        data = np.empty(shape, dtype)
        step = max(1, _CHUNK // max(1, self.tile_rows * values.shape[1]))
        for start in range(0, shape[0], step):
            part = rows[start : start + step]
            if self.dtype == "bf16":
                pairs = np.ascontiguousarray(_pad_inputs(part, 2)).view(np.uint32).transpose(0, 2, 1)
                part = np.ascontiguousarray(pairs).view(np.uint16).reshape(len(part), *shape[1:])
                data[start : start + step] = part
            else:
                data[start : start + step] = part.transpose(0, 2, 1)
        return {"data": data}

    def unpack(self, arrays: Mapping[str, np.ndarray], n: int, k: int) -> dict[str, np.ndarray]:
        """The inverse of `pack`: values [n, k]."""
        data = arrays["data"]
        if self.dtype == "bf16":
            pairs = data.view(np.uint32).reshape(data.shape[:3]).transpose(0, 2, 1)
            tiled = np.ascontiguousarray(pairs).view(ml_dtypes.bfloat16)
        else:
            tiled = data.transpose(0, 2, 1)
        return {"values": np.ascontiguousarray(self._from_tiles(tiled, n)[:, :k])}
