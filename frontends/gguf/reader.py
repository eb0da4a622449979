"""A bounded reader of GGUF files: every count, length and offset is checked before it is used.

Source: docs/gguf.md of ggml. A file is a header (magic, version, counts), metadata (keys and typed values), a table of
tensors (name, dimensions, type, offset), and, aligned, their data. Versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.errors import FrontendError
from llmc.frontends.gguf.tensor_types import TENSOR_TYPES, UNREAD_TYPES, TensorType

MAGIC = b"GGUF"
Scalar = int | float | bool | str
MetadataValue = Scalar | list[int] | list[float] | list[bool] | list[str]

# No model comes near these. They bound memory and time, whatever a header claims.
_MOST_HEADER_BYTES = 512 << 20
_MOST_KEYS = 1 << 14
_MOST_TENSORS = 1 << 17
_MOST_ITEMS = 1 << 23  # of all arrays of a file
_MOST_NAME_BYTES = 1 << 10
_MOST_KEY_BYTES = (1 << 16) - 1
_MOST_DIMS = 4
_MOST_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), _BOOL: np.dtype("<u1"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file. shape: outermost axis first (the file has it the other way round); begin, end:
    byte offsets from the file's start."""

    name: str
    kind: TensorType
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """One file, mapped. `metadata` by key; `tensors` by name. FrontendError names the file and what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 24:
                    raise FrontendError(f"{path} is no GGUF file: it has {size} bytes")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FrontendError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # of mmap, where the file shrinks meanwhile
            raise FrontendError(f"{path} cannot be read: {error}") from error
        header = _Header(path, self._bytes, size)
        self.version = header.version
        self.metadata: dict[str, MetadataValue] = header.metadata
        self.tensors: dict[str, StoredTensor] = header.tensors
        self._loaded: StoredTensor | None = None

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor [rows, blocks of a row * bytes of a block], a read-only view of the file."""
        tensor = self.tensors[name]
        self._release()
        self._loaded = tensor
        flat = np.frombuffer(self._bytes, np.uint8, tensor.end - tensor.begin, tensor.begin)
        inner = tensor.shape[-1] // tensor.kind.block * tensor.kind.size
        return flat.reshape(-1, inner)

    def _release(self) -> None:
        """Give back the pages of the tensor before: a whole model passes through, one tensor at a time."""
        if self._loaded is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = self._loaded.begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._bytes.madvise(mmap.MADV_DONTNEED, begin, self._loaded.end - begin)


class _Header:
    """Reads a header from its start to its end; `_at` is where the next value begins."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._end = min(size, _MOST_HEADER_BYTES)
        self._at = len(MAGIC)
        self._items = _MOST_ITEMS
        if bytes(data[:4]) != MAGIC:
            raise self._error(f"it begins with {bytes(data[:4])!r}, not {MAGIC!r}: it is no GGUF file")
        self.version = self._version()
        tensors, keys = self._count("tensors", _MOST_TENSORS), self._count("keys", _MOST_KEYS)
        self.metadata = self._metadata(keys)
        alignment = self._alignment()
        table = [self._tensor_entry() for _ in range(tensors)]
        start = -(-self._at // alignment) * alignment
        self.tensors = self._places(table, start, alignment)

    def _error(self, what: str) -> FrontendError:
        return FrontendError(f"{self._path}: {what}")

    def _version(self) -> int:
        (version,) = struct.unpack("<I", self._take(4, "its version"))
        if version in (2, 3):
            return int(version)
        if version & 0xFFFF == 0 and version:
            raise self._error("it is big endian, which is not supported: convert it with gguf_convert_endian.py")
        if version == 1:
            raise self._error("it is of GGUF version 1, which is not supported: convert the model anew")
        raise self._error(f"it is of GGUF version {version}, which is unknown: versions 2 and 3 are read")

    def _take(self, count: int, what: str) -> bytes:
        """The next bytes; FrontendError where the file, or the most that is read as a header, ends before."""
        if count > self._end - self._at:
            raise self._error(f"it ends within {what}: it is truncated or damaged")
        found = bytes(self._data[self._at : self._at + count])
        self._at += count
        return found

    def _u32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _u64(self, what: str) -> int:
        return int.from_bytes(self._take(8, what), "little")

    def _count(self, what: str, most: int) -> int:
        found = self._u64(f"the number of its {what}")
        if found > most:
            raise self._error(f"it claims to have {found} {what}; at most {most} are read")
        return found

    def _string(self, what: str, most: int = _MOST_HEADER_BYTES) -> str:
        length = self._u64(what)
        if length > min(most, self._end - self._at):
            raise self._error(f"{what} claims a length of {length} bytes: the file is truncated or damaged")
        data = self._take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{what} is not UTF-8 (byte {error.start})") from None

    def _metadata(self, keys: int) -> dict[str, MetadataValue]:
        found: dict[str, MetadataValue] = {}
        for index in range(keys):
            key = self._string(f"key {index} of its metadata", _MOST_KEY_BYTES)
            if key in found:
                raise self._error(f"key {key!r:.80} stands in its metadata twice")
            found[key] = self._value(f"metadata {key!r:.80}", self._u32(f"metadata {key!r:.80}"))
        return found

    def _value(self, what: str, kind: int) -> MetadataValue:
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            raise self._error(f"{what} has the unknown type {kind}")
        dtype = _SCALARS[kind]
        number: Scalar = np.frombuffer(self._take(dtype.itemsize, what), dtype).item()
        return bool(number) if kind == _BOOL else number

    def _array(self, what: str) -> MetadataValue:
        kind, length = self._u32(what), self._u64(what)
        item = 8 if kind == _STRING else _SCALARS[kind].itemsize if kind in _SCALARS else 0
        if not item:
            nested = " of arrays" if kind == _ARRAY else f" of the unknown type {kind}"
            raise self._error(f"{what} is an array{nested}, which is not read")
        if length > min(self._items, (self._end - self._at) // item):
            raise self._error(f"{what} claims to have {length} items: the file is truncated or damaged")
        self._items -= length
        if kind == _STRING:
            return [self._string(what) for _ in range(length)]
        numbers: list[int] = np.frombuffer(self._take(length * item, what), _SCALARS[kind]).tolist()
        return [bool(number) for number in numbers] if kind == _BOOL else numbers

    def _alignment(self) -> int:
        found = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        is_size = isinstance(found, int) and not isinstance(found, bool) and 0 < found <= _MOST_ALIGNMENT
        if not is_size or not isinstance(found, int) or found & (found - 1):
            raise self._error(f"general.alignment must be a power of two up to {_MOST_ALIGNMENT}, and is {found!r:.40}")
        return found

    def _tensor_entry(self) -> tuple[str, TensorType, tuple[int, ...], int]:
        name = self._string("the name of a tensor", _MOST_NAME_BYTES)
        what = f"tensor {name!r:.100}"
        rank = self._u32(what)
        if not 1 <= rank <= _MOST_DIMS:
            raise self._error(f"{what} has {rank} dimensions: 1 to {_MOST_DIMS} are read")
        dims = struct.unpack(f"<{rank}Q", self._take(8 * rank, what))
        kind, offset = self._u32(what), self._u64(what)
        if kind not in TENSOR_TYPES:
            known = UNREAD_TYPES.get(kind, "unknown")
            raise self._error(f"{what} is of type {kind} ({known}), which is not read")
        if min(dims) < 1 or math.prod(dims) >= 1 << 48:
            raise self._error(f"{what} has the dimensions {list(dims)}")
        if dims[0] % TENSOR_TYPES[kind].block:
            block = f"{TENSOR_TYPES[kind].name} has blocks of {TENSOR_TYPES[kind].block}"
            raise self._error(f"{what} has rows of {dims[0]} weights, and {block}")
        return name, TENSOR_TYPES[kind], dims[::-1], offset

    def _places(
        self, table: list[tuple[str, TensorType, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, StoredTensor]:
        """The tensors by name, each in the file, aligned, and apart from the others."""
        found: dict[str, StoredTensor] = {}
        for name, kind, shape, offset in table:
            what = f"tensor {name!r:.100}"
            if name in found:
                raise self._error(f"{what} stands in its table twice")
            if offset % alignment:
                raise self._error(f"{what} begins at byte {offset} of the data, which is no multiple of {alignment}")
            size = math.prod(shape) // kind.block * kind.size
            if start + offset + size > self._size:
                raise self._error(f"{what} lies outside the file: it is truncated or damaged")
            found[name] = StoredTensor(name, kind, shape, start + offset, start + offset + size)
        reached = start
        for tensor in sorted(found.values(), key=lambda tensor: (tensor.begin, tensor.end)):
            if tensor.begin < reached:
                raise self._error(f"tensor {tensor.name!r:.100} overlaps another one")
            reached = tensor.end
        return found


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False
