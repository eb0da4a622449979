"""Sources of weights that no file is behind: arrays in memory, random numbers, two sources as one."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np

from llmc.compiler.ir.types import NUMPY_DTYPES, Array, dtype_of
from llmc.frontends.lifted import WeightSource


class ArrayWeights:
    """Arrays in memory as a source."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)

    @property
    def names(self) -> Iterable[str]:
        return self._arrays.keys()

    def dtype(self, name: str) -> str:
        return dtype_of(self._arrays[name].dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def load(self, name: str) -> Array:
        return self._arrays[name]


class RandomWeights:
    """normal(0, 0.02) for matrices, ones for norm weights, zeros for other vectors; the same for the same seed.

    For tests, tuning and size estimates: a block of a million numbers is drawn once and repeated from an offset that
    the name decides, so that billions of parameters take no time.
    """

    _BLOCK = 1 << 20

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str = "f32", seed: int = 0) -> None:
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._seed = seed
        block = np.random.default_rng(seed).standard_normal(self._BLOCK, dtype=np.float32) * np.float32(0.02)
        # Twice, so that a block from any offset is one slice.
        self._numbers = np.concatenate([block, block]).astype(NUMPY_DTYPES[dtype])

    @property
    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def dtype(self, name: str) -> str:
        return self._dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str) -> Array:
        shape = self._shapes[name]
        if len(shape) < 2:
            make = np.zeros if name.endswith("bias") else np.ones
            ones: Array = make(shape, NUMPY_DTYPES[self._dtype])
            return ones
        offset = zlib.crc32(f"{self._seed} {name}".encode()) % self._BLOCK
        count = int(np.prod(shape, dtype=np.int64))
        values = np.empty(count, NUMPY_DTYPES[self._dtype])
        for start in range(0, count, self._BLOCK):
            piece = values[start : start + self._BLOCK]
            piece[:] = self._numbers[offset : offset + len(piece)]
        return values.reshape(shape)


class LayeredWeights:
    """Two sources as one; the first wins."""

    def __init__(self, upper: WeightSource, lower: WeightSource) -> None:
        self._upper, self._lower = upper, lower
        self._names = set(upper.names)

    @property
    def names(self) -> list[str]:
        return [*self._upper.names, *(name for name in self._lower.names if name not in self._names)]

    def _of(self, name: str) -> WeightSource:
        return self._upper if name in self._names else self._lower

    def dtype(self, name: str) -> str:
        return self._of(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def load(self, name: str) -> Array:
        return self._of(name).load(name)
