"""Read safetensors files (https://github.com/huggingface/safetensors) of which nothing is trusted.

A file is 8 bytes of length, a JSON header of that length, and the tensors' bytes. Every number in the header is
compared with the file's size before anything is read by it, and only the tensors that are asked for are read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import AdapterError

_MOST_HEADER = 32 << 20
_MOST_AXES = 8
_BITS_OF_BF16 = "BF16"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", _BITS_OF_BF16: "<u2"}


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a file. begin: of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsFile:
    """The floats of a file. AdapterError where it is none; use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self.tensors: Mapping[str, TensorFacts] = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _broken(self, why: str) -> AdapterError:
        return AdapterError(f"{self._path} is no safetensors file that can be read: {why}. Save or download it again")

    def _header(self) -> dict[str, TensorFacts]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._read(0, 8), "little")
        if not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise self._broken(f"its header has {length} bytes, the file {size}")
        try:
            header = json.loads(self._read(8, length))
        except (ValueError, RecursionError):
            raise self._broken("its header is no JSON") from None
        if not isinstance(header, dict):
            raise self._broken("its header is no JSON object")
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = self._tensor(name, entry, 8 + length, size)
        return found

    def _tensor(self, name: str, entry: object, start: int, size: int) -> TensorFacts:
        values = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise self._broken(f"tensor {name!r:.100} is {dtype!r:.20}, not of {', '.join(_DTYPES)}")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or not all(type(each) is int and 0 <= each <= size for each in numbers):
                raise self._broken(f"tensor {name!r:.100} has a shape or place that cannot be")
        assert isinstance(shape, list) and isinstance(offsets, list)
        if len(shape) > _MOST_AXES or len(offsets) != 2 or start + offsets[1] > size:
            raise self._broken(f"tensor {name!r:.100} lies beyond the file's {size} bytes")
        nbytes = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise self._broken(f"tensor {name!r:.100} of {shape} has {offsets[1] - offsets[0]} bytes")
        return TensorFacts(dtype, tuple(shape), start + offsets[0], nbytes)

    def load(self, name: str) -> NDArray[np.float32]:
        """A tensor as f32, which holds every f16 and bf16; f64 is rounded. AdapterError where it is not finite."""
        facts = self.tensors[name]
        stored = np.frombuffer(self._read(facts.begin, facts.nbytes), _DTYPES[facts.dtype]).reshape(facts.shape)
        with np.errstate(over="ignore"):
            if facts.dtype == _BITS_OF_BF16:
                found = (stored.astype(np.uint32) << 16).view(np.float32)
            else:
                found = stored.astype(np.float32)
        if not np.isfinite(found).all():
            raise AdapterError(f"{self._path}: tensor {name!r:.100} holds NaN or infinity")
        return found

    def _read(self, offset: int, nbytes: int) -> bytes:
        try:
            self._file.seek(offset)
            data = self._file.read(nbytes)
        except OSError as error:
            raise AdapterError(f"{self._path} cannot be read: {error.strerror}") from error
        if len(data) != nbytes:
            raise self._broken("it ends too early")
        return data
