"""Write an artifact: a shared library with the manifest, the tokenizer and the weights appended as ELF sections.

The loadable part is an ordinary `.so` and stays byte for byte what the linker made, but for the three fields of its
header that say where the section table is. Everything else is appended: data, a new table of section names, a new
section table, and last a *seal*. `dlopen` never looks at any of it; `readelf -S` shows it.

The file is a row of parts without gaps, each named with its place and hash in the seal:

    library | .llmc.weights | .llmc.tokenizer | .llmc.manifest | section table | seal

    seal = JSON {"schema": 1, "parts": [{"name", "offset", "bytes", "extent", "hash"}, ...]}
           + SHA-256 of that JSON (32 bytes) + its length (u64, little endian) + "LLMCSEAL"

`bytes` is the content, `extent` the content and the padding behind it. A part's hash covers its extent: SHA-256 for
all parts but the weights, which have SHA-256 of their chunk hashes (`WeightHash`), because they must be checked at
every load in a few milliseconds. That finds damage, not malice.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from llmc.errors import ArtifactError
from llmc.files import OutputFile, not_written, write_all

SEAL_SCHEMA = 1
SEAL_MAGIC = b"LLMCSEAL"
MANIFEST = ".llmc.manifest"
TOKENIZER = ".llmc.tokenizer"
WEIGHTS = ".llmc.weights"
SEAL = ".llmc.seal"
PAGE = 65536  # the largest page of memory that systems have; weights are mapped, and start on one

HASH_CHUNK = 4 << 20
HASH_LANES = 1024
_BLOCK = 8 * HASH_LANES
_LANE_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FOLD_FACTOR = 0xD6E8FEB86659FD93
_MASK = (1 << 64) - 1

_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, align, entry
_SHT_PROGBITS = 1
_SHT_STRTAB = 3


def hash_chunk(data: bytes | memoryview) -> int:
    """The 64-bit hash of at most HASH_CHUNK bytes: the same as `hash_chunk` in runtime/csrc/hash.c.

    1024 lanes each take every 1024th word; then the lanes are folded into one. Every step is a bijection of the word
    it takes in, so one changed word always changes the result.
    """
    count = len(data)
    padded = np.frombuffer(data, np.uint8)
    if count % _BLOCK:
        padded = np.concatenate([padded, np.zeros(-count % _BLOCK, np.uint8)])
    lanes = np.arange(HASH_LANES, dtype=np.uint64)
    high = np.empty_like(lanes)
    shift = np.uint64(32)
    for words in padded.view("<u8").reshape(-1, HASH_LANES):
        np.bitwise_xor(lanes, words, out=lanes)
        np.multiply(lanes, _LANE_FACTOR, out=lanes)
        np.right_shift(lanes, shift, out=high)
        np.bitwise_xor(lanes, high, out=lanes)
    total = count
    for lane in lanes.tolist():
        total = ((total ^ lane) * _FOLD_FACTOR) & _MASK
        total ^= total >> 32
    return total


class WeightHash:
    """The hash of the weights as they stream by: SHA-256 of the 64-bit hashes of their 4 MiB chunks."""

    def __init__(self) -> None:
        self._chunk = bytearray(HASH_CHUNK)
        self._filled = 0
        self._digest = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        while len(data):
            count = min(HASH_CHUNK - self._filled, len(data))
            self._chunk[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == HASH_CHUNK:
                self._flush()

    def _flush(self) -> None:
        self._digest.update(struct.pack("<Q", hash_chunk(memoryview(self._chunk)[: self._filled])))
        self._filled = 0

    def hexdigest(self) -> str:
        """Ends the stream."""
        if self._filled:
            self._flush()
        return self._digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """A named run of bytes. hash: known for the weights; the small parts are hashed at the end."""

    name: str
    offset: int
    bytes: int
    align: int = 8
    hash: str | None = None


class ArtifactWriter:
    """Writes one artifact, all or nothing.

    What was at `path` stays as it is until the `with` block ends without an error: see `llmc.files.OutputFile`.

        with ArtifactWriter(path, library) as writer:
            writer.begin_weights()
            offset = writer.append(array)        # as often as needed; the array may be freed at once
            writer.add_tokenizer(data)
            writer.add_manifest({...})
    """

    def __init__(self, path: Path | str, library: Path | str) -> None:
        self.path = Path(path)
        self.library = Path(library)
        self._sections: list[_Part] = []
        self._file = OutputFile(self.path)
        self._position = 0
        self._weights_start: int | None = None
        self._weights_hash: WeightHash | None = None
        self._parts: list[_Part] = []
        self._end = 0  # of all parts: where the seal is
        # Called with the finished file; a manifest that it returns takes the place of the one that is there.
        self.revise: Callable[[Path], Mapping[str, object] | None] | None = None
        # Called with the finished file before it takes the place of `path`; what it raises leaves `path` as it was.
        self.inspect: Callable[[Path], None] | None = None

    def __enter__(self) -> ArtifactWriter:
        with self._clear_errors():
            loadable = self.library.read_bytes()
            _check_library(loadable, self.library)
        try:
            with self._clear_errors():
                self._file.open()
            self._loadable = loadable
            self._write(loadable)
            self._pad(8)
        except BaseException:
            self._file.discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._clear_errors():
                    self._finish()
                if self.revise is not None:
                    self._replace_manifest(self.revise(self._file.place))
                if self.inspect is not None:
                    self.inspect(self._file.place)
                with self._clear_errors():
                    self._file.commit()
        finally:
            self._file.discard()

    def begin_weights(self) -> None:
        """Starts the weights: `append` may follow, until another section or the end of the `with` block."""
        if self._weights_start is not None or any(section.name == WEIGHTS for section in self._sections):
            raise ArtifactError("an artifact has one weights section")
        self._pad(PAGE)
        self._weights_start = self._position
        self._weights_hash = WeightHash()

    def append(self, array: NDArray[np.generic] | bytes, align: int = 64) -> int:
        """Appends an array's bytes to the weights at a multiple of `align`; returns their offset in the section."""
        if self._weights_start is None:
            raise ArtifactError("append() before begin_weights()")
        if align < 1 or PAGE % align:
            raise ArtifactError(f"weights can be aligned to a divisor of {PAGE}, not to {align}")
        data = array if isinstance(array, bytes) else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._write(bytes(-(self._position - self._weights_start) % align))
        offset = self._position - self._weights_start
        self._write(data)
        return offset

    def end_weights(self) -> int:
        """Ends the weights and returns their size in bytes."""
        start = self._weights_start
        if start is None or self._weights_hash is None:
            raise ArtifactError("end_weights() before begin_weights()")
        size = self._position - start
        self._pad(8)
        digest = self._weights_hash.hexdigest()
        self._weights_hash = None
        self._weights_start = None
        self._sections.append(_Part(WEIGHTS, start, size, PAGE, digest))
        return size

    def add_section(self, name: str, data: bytes) -> None:
        """Appends a section of `data`."""
        if self._weights_start is not None:
            self.end_weights()
        if not name.startswith(".llmc.") or any(section.name == name for section in self._sections):
            raise ArtifactError(f"a section needs a new name that starts with .llmc., not {name!r}")
        start = self._position
        self._write(data)
        self._pad(8)
        self._sections.append(_Part(name, start, len(data)))

    def add_tokenizer(self, tokenizer: bytes) -> None:
        """Appends a tokenizer.json, compressed: less than half of it is left."""
        self.add_section(TOKENIZER, gzip.compress(tokenizer, 6, mtime=0))

    def add_manifest(self, manifest: Mapping[str, object], like: Mapping[str, object] | None = None) -> None:
        """Appends the manifest: plain JSON values, no NaN; `runtime/manifest.py` says which. like: one that is at least
        as long as what `revise` may put in its place."""
        data = _encoded(manifest)
        self.add_section(MANIFEST, data if like is None else data.ljust(len(_encoded(like))))

    def _replace_manifest(self, manifest: Mapping[str, object] | None) -> None:
        """Another manifest into a finished file, if there is one, in the room of the first: nothing else moves, and the
        library keeps its bytes, as it may be loaded."""
        if manifest is None:
            return
        part = next(section for section in self._sections if section.name == MANIFEST)
        data = _encoded(manifest)
        if len(data) > part.bytes:
            raise ArtifactError(f"a manifest of {len(data)} bytes does not fit the room of {part.bytes}")
        with self._clear_errors():
            os.pwrite(self._file.descriptor, data.ljust(part.bytes), part.offset)
            self._seal()

    def _finish(self) -> None:
        if self._weights_start is not None:
            self.end_weights()
        self._parts = self._write_section_table()
        self._end = self._position
        self._seal()

    def _seal(self) -> None:
        """Writes the seal, which has the same size whatever the hashes are."""
        os.lseek(self._file.descriptor, self._end, os.SEEK_SET)
        self._write(_seal(self._parts, self._end, self._hash_of))

    def _hash_of(self, part: _Part, extent: int) -> str:
        """SHA-256 of a part as it lies in the file."""
        return part.hash or hashlib.sha256(os.pread(self._file.descriptor, extent, part.offset)).hexdigest()

    def _write_section_table(self) -> list[_Part]:
        """Writes the table of names and the section table, and enters them in the header. Returns all parts.

        The seal comes last but has an entry here, so its size is needed before its hashes are known: it depends on
        the names, offsets and sizes of the parts only.
        """
        old, names_index = _read_section_table(self._loadable)
        names = bytearray(_section_data(self._loadable, old[names_index]) if old else b"\0")
        offsets = []
        for name in [*(section.name for section in self._sections), SEAL]:
            offsets.append(len(names))
            names += name.encode() + b"\0"
        if not old:  # a library without a section table: the empty first entry, and a table of names
            names_index, offset = 1, len(names)
            names += b".shstrtab\0"
            old = [(0,) * 10, (offset, _SHT_STRTAB, 0, 0, 0, 0, 0, 0, 1, 0)]
        names += bytes(-len(names) % 8)
        names_start = self._position
        self._write(names)

        table_start = self._position
        count = len(old) + len(self._sections) + 1
        end = table_start + count * _SECTION_HEADER.size
        parts = [
            _Part("library", 0, len(self._loadable)),
            *self._sections,
            _Part("section table", names_start, end - names_start),
        ]
        old[names_index] = (*old[names_index][:4], names_start, len(names), *old[names_index][6:])
        seal = _Part(SEAL, end, len(_seal(parts, end, lambda part, extent: "0" * 64)), align=1)
        for part, offset in zip([*self._sections, seal], offsets, strict=True):
            old.append((offset, _SHT_PROGBITS, 0, 0, part.offset, part.bytes, 0, 0, part.align, 0))
        self._write(b"".join(_SECTION_HEADER.pack(*header) for header in old))
        os.pwrite(self._file.descriptor, struct.pack("<Q", table_start), 0x28)
        os.pwrite(self._file.descriptor, struct.pack("<HHH", _SECTION_HEADER.size, count, names_index), 0x3A)
        return parts

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        if self._file.descriptor < 0:
            raise ArtifactError("the artifact's writer is not open: use it in a `with` block")
        view = memoryview(data)
        if self._weights_hash is not None:
            self._weights_hash.update(view)
        with self._clear_errors():
            write_all(self._file.descriptor, view)
        self._position += len(view)

    def _pad(self, align: int) -> None:
        self._write(bytes(-self._position % align))

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.filename is not None and Path(error.filename) == self.library:
                said = f"the linked library {self.library} cannot be read: {error.strerror}"
                raise ArtifactError(f"cannot write {self.path}: {said}. What was there before is unchanged.") from error
            raise ArtifactError(not_written(self.path, error)) from error


def _encoded(manifest: Mapping[str, object]) -> bytes:
    return json.dumps(manifest, ensure_ascii=False, allow_nan=False, indent=1).encode()


def _seal(parts: list[_Part], end: int, hash_of: Callable[[_Part, int], str]) -> bytes:
    """The seal of parts that fill [0, end): the padding behind a part belongs to it."""
    entries = []
    for part, following in zip(parts, [*(part.offset for part in parts[1:]), end], strict=True):
        extent = following - part.offset
        entry = {"name": part.name, "offset": part.offset, "bytes": part.bytes, "extent": extent}
        entries.append({**entry, "hash": hash_of(part, extent)})
    text = json.dumps({"schema": SEAL_SCHEMA, "parts": entries}).encode()
    return text + hashlib.sha256(text).digest() + struct.pack("<Q", len(text)) + SEAL_MAGIC


def _check_library(data: bytes, path: Path) -> None:
    if len(data) < 64 or data[:4] != b"\x7fELF" or data[4:6] != b"\x02\x01":
        raise ArtifactError(f"{path} is not a 64-bit little-endian ELF library; the linker did not make what it should")


def _read_section_table(data: bytes) -> tuple[list[tuple[int, ...]], int]:
    """All section headers, and which of them is the table of names. Empty when the library has none."""
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    if start == 0 or count == 0:
        return [], 0
    if size != _SECTION_HEADER.size or start + size * count > len(data) or names_index >= count:
        raise ArtifactError("the linked library has a section table that cannot be read")
    return [_SECTION_HEADER.unpack_from(data, start + index * size) for index in range(count)], names_index


def _section_data(data: bytes, header: tuple[int, ...]) -> bytes:
    return data[header[4] : header[4] + header[5]]
