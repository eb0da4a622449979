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

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from llmc.compiler.encodings.levels import TableLevels, table_levels

Arrays = dict[str, tuple[tuple[int, ...], np.dtype]]

# Bits of a stored integer, lowest first, by the planes that hold them: 6 bits are half bytes, then quarters.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_CHUNK = 1 << 20  # weights packed at a time: the temporaries stay in the second-level cache


@dataclass(frozen=True)
class WeightTiles:
    """How all instruction sets of an architecture find weights in memory.

    rows: of a tile, as many as its widest vector has 32-bit lanes. signed_bytes: weights of 8 bits are stored signed.
    """

    rows: int
    signed_bytes: bool = False

    def offset(self, bits: int, symmetric: bool) -> int:
        """What is added to an integer to store it."""
        if bits == 8 and self.signed_bytes:
            return 0 if symmetric else -128
        return 1 << bits - 1 if symmetric else 0

    @functools.cache  # noqa: B019  (an architecture has one of these, and a model few layouts)
    def quantized(
        self, bits: int, group: int, symmetric: bool, table: bool = False, gated: bool = False, in_steps: bool = False,
        per_row: bool = False,
    ) -> QuantizedLayout:  # fmt: skip
        """The layout of weights of 2 to 6 or 8 bits. table: integers stand for levels of a table. in_steps: minimums
        count steps of the scale. per_row: groups of a row share one scale. ValueError where there is none."""
        levels, zero = table_levels(bits) if table else None, 0
        if levels is not None and not self.signed_bytes:
            zero = 128 if min(levels.bytes) == -128 else -min(levels.bytes)
        offset = self.offset(bits, symmetric)
        return QuantizedLayout(bits, group, symmetric, self.rows, offset, gated, levels, zero, in_steps, per_row)

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
    """Integers of 2 to 6 or 8 bits with an f16 scale (and minimum, when asymmetric) a row and group.

    A *quad* is four consecutive inputs of a row: of 8 bits it fills a 32-bit lane. Quad v of a group of all rows of a
    tile makes a vector of bytes, byte 4 * row + i for input 4 * v + i, plus `offset` (see `WeightTiles.offset`).
    data u8 [tiles, groups, vectors, tile_rows * 4]. Of 8-bit weights, vector v holds quad v. Others share vectors: a
    *bundle* of quads is as many as share one vector of the narrowest of `PLANES`. It has the vectors of one plane after
    those of another, and a vector holds successive quads, the first in the lowest bits of its bytes. So of 4-bit
    weights, a vector holds quads 2v and 2v + 1; of 6-bit ones, three vectors hold quads 4v to 4v + 3: the low four bits
    of the first two and of the other two, and the high two bits of all four.
    scales, minimums f16 [tiles, groups, tile_rows]; per_row: scales [tiles, 1, tile_rows], which all groups share.

    levels: what integers stand for, where they are not multiplied themselves but the bytes of a table. zero: what is
    added to those bytes before they are multiplied. in_steps: minimums count steps of the scale.
    """

    bits: int
    group: int
    symmetric: bool
    tile_rows: int
    offset: int
    gated: bool = False
    levels: TableLevels | None = None
    zero: int = 0
    in_steps: bool = False
    per_row: bool = False

    def __post_init__(self) -> None:
        known = self.group > 0 and (self.group % 32 == 0 or self.group == 16) and self.bits in PLANES
        if not known or self.group % (4 * self.bundle_quads):
            raise ValueError(
                f"no layout for {self.bits}-bit weights in groups of {self.group}: multiples of 32, or 16 where they "
                "have 2, 4, 6 or 8 bits"
            )

    def groups(self, k: int) -> int:
        """Groups of k inputs."""
        return -(-k // self.group)

    def scale_groups(self, k: int) -> int:
        """Scales of a row of k inputs."""
        return 1 if self.per_row else self.groups(k)

    @property
    def packed(self) -> bool:
        """Whether quads are taken apart before they are multiplied."""
        return self.bits < 8

    @property
    def bundle_quads(self) -> int:
        """Quads of a bundle."""
        return 8 // min(PLANES[self.bits])

    @property
    def bundle_vectors(self) -> int:
        """The vectors of a bundle."""
        return self.bundle_quads * self.bits // 8

    def fields(self, place: int) -> list[tuple[int, int, int, int]]:
        """Where the bits of quad `place` of a bundle are, lowest first: (vector of the bundle, lowest bit there, how
        many, the lowest of them in the integer)."""
        found, first, below = [], 0, 0
        for width in PLANES[self.bits]:
            found.append((first + place * width // 8, place * width % 8, width, below))
            first, below = first + self.bundle_quads * width // 8, below + width
        return found

    @property
    def byte_offset(self) -> int:
        """What the bytes that are multiplied have more than they stand for: `sum w*a = dot(bytes, a) - this * sum a`,
        in units of `unit`."""
        return self.offset if self.levels is None else self.zero

    @property
    def byte_bits(self) -> int:
        """Bits of the bytes that are multiplied: of unsigned ones, their width."""
        if self.levels is None:
            return self.bits
        return (max(self.levels.bytes) + self.zero).bit_length() if self.zero else 8

    @property
    def unit(self) -> float:
        """What one counts of the bytes that are multiplied, beside the scale."""
        return 1.0 if self.levels is None else self.levels.unit

    @property
    def table(self) -> tuple[int, ...] | None:
        """The bytes that stored integers stand for, in order, as they are multiplied."""
        return None if self.levels is None else tuple(byte + self.zero for byte in self.levels.bytes)

    @property
    def signed(self) -> bool:
        """Whether the bytes that are multiplied may be below zero."""
        if self.table is not None:
            return min(self.table) < 0
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
            "scales": ((tiles, self.scale_groups(k), self.tile_rows), np.dtype(np.float16)),
        }
        return found if self.symmetric else found | {"minimums": found["scales"]}

    def pack(self, q: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Logical parts to bytes.

        q: i8 (symmetric) or u8 [n, k]; scales, minimums: f16 [n, `scale_groups(k)`]. ValueError where they do not fit.
        """
        n, k = q.shape
        if (minimums is None) != self.symmetric:
            raise ValueError("minimums go with asymmetric weights, and only with them")
        per_group = {"scales": scales} if minimums is None else {"scales": scales, "minimums": minimums}
        for name, values in per_group.items():
            if values.shape != (n, self.scale_groups(k)):
                raise ValueError(f"{name} are {values.shape}, the weight needs {(n, self.scale_groups(k))}")
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
        if self.packed:
            quads = self._pack_quads(quads)
        vectors = np.ascontiguousarray(quads.transpose(0, 2, 1))
        return vectors.view(np.uint8).reshape(len(rows), -1, self.vectors, self.tile_rows * 4)

    def unpack(self, arrays: Mapping[str, np.ndarray], n: int, k: int) -> dict[str, np.ndarray]:
        """The inverse of `pack`: q (i8 or u8) [n, k], scales and minimums f16 [n, groups]."""
        data = arrays["data"]
        quads = data.reshape(data.shape[0], -1, self.tile_rows * 4).view(np.uint32).transpose(0, 2, 1)
        if self.packed:
            quads = self._unpack_quads(quads)
        stored = np.ascontiguousarray(quads).view(np.uint8) - np.uint8(self.offset % 256)
        q = self._from_tiles(stored, n)[:, :k]
        parts = {"q": q.view(np.int8) if self.symmetric else q}
        for name in arrays:
            if name != "data":
                parts[name] = self._from_tiles(arrays[name].transpose(0, 2, 1), n)
        return parts

    def _pack_quads(self, quads: np.ndarray) -> np.ndarray:
        """Quads [..., Q] that share vectors to those vectors, both as u32."""
        vectors = np.zeros((self.bundle_vectors, *quads.shape[:-1], quads.shape[-1] // self.bundle_quads), np.uint32)
        for place in range(self.bundle_quads):
            quad = quads[..., place :: self.bundle_quads]
            for vector, bit, width, below in self.fields(place):
                vectors[vector] |= ((quad >> np.uint32(below)) & _in_each_byte(width)) << np.uint32(bit)
        return np.moveaxis(vectors, 0, -1).reshape(*quads.shape[:-1], -1)

    def _unpack_quads(self, packed: np.ndarray) -> np.ndarray:
        """The inverse of `_pack_quads`."""
        bundles = packed.shape[-1] // self.bundle_vectors
        quads = np.zeros((*packed.shape[:-1], bundles, self.bundle_quads), np.uint32)
        for place in range(self.bundle_quads):
            for vector, bit, width, below in self.fields(place):
                field = (packed[..., vector :: self.bundle_vectors] >> np.uint32(bit)) & _in_each_byte(width)
                quads[..., place] |= field << np.uint32(below)
        return quads.reshape(*packed.shape[:-1], -1)


def _in_each_byte(width: int) -> np.uint32:
    """The lowest bits of the bytes of a quad."""
    return np.uint32(0x01010101 * ((1 << width) - 1))


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
