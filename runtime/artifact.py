"""Open an artifact file, and trust nothing in it before it has been checked.

The layout is that of `compiler/artifact.py`: an ELF library, appended sections, and a seal at the end of the file that
gives every part's place and hash. Everything that says no does so here, before any of the file's code runs.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
import os
import shlex
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import cpu, manifest
from llmc.runtime.errors import ArtifactError
from llmc.runtime.manifest import Manifest

SEAL_SCHEMA = 1
SEAL_MAGIC = b"LLMCSEAL"
LIBRARY = "library"
MANIFEST = ".llmc.manifest"
TOKENIZER = ".llmc.tokenizer"
WEIGHTS = ".llmc.weights"
HASH_CHUNK = 4 << 20

_TRAILER = struct.Struct("<32sQ8s")  # SHA-256 of the seal, its length, the magic
_GZIP_MAGIC = b"\x1f\x8b"
_ELF_MACHINE = {"x86_64": 62, "aarch64": 183}
_MOST_SEAL_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """A range of the file: `bytes` of content, `extent` with the padding behind it, and the hash of the extent."""

    name: str
    offset: int
    bytes: int
    extent: int
    hash: str


class Artifact:
    """An open artifact. Made by `Artifact.open`; holds the file descriptor and the mapping until `close`."""

    def __init__(self, path: Path, descriptor: int, mapping: mmap.mmap, parts: dict[str, Part]) -> None:
        self.path = path
        self.descriptor = descriptor
        self.mapping = mapping
        self.parts = parts
        self._beside: list[int] = []
        self.view: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        data = self._checked(MANIFEST)
        try:
            self.manifest: Manifest = manifest.parse(data)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error

    @classmethod
    def open(cls, path: Path | str) -> Artifact:
        """Opens a file, checks its form, its seal and its manifest. The other parts are checked by `check_*`."""
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: no such file; `llmc compile MODEL -o {path}` makes one") from error
        except OSError as error:
            raise ArtifactError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            if path.is_dir():
                raise ArtifactError(
                    f"{path} is a folder, not an artifact; `llmc compile {path}` compiles a model in it"
                )
            size = os.fstat(descriptor).st_size
            if size == 0:
                raise ArtifactError(f"{path} is empty: compile the model again, or copy the file again")
            mapping = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            parts = _read_seal(path, mapping)
            return cls(path, descriptor, mapping, parts)
        except OSError as error:
            os.close(descriptor)
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
        except BaseException:
            os.close(descriptor)
            raise

    def open_beside(self, path: Path) -> int:
        """Opens a file that belongs to it, such as its weights' own; `close` closes it. Raises `OSError`."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._beside.append(descriptor)
        return descriptor

    def close(self) -> None:
        """Closes the descriptors. The mapping lives for as long as arrays on it do."""
        for descriptor in (self.descriptor, *self._beside):
            os.close(descriptor)

    def _checked(self, name: str) -> bytes:
        """The content of a part whose hash is right."""
        part = self.parts.get(name)
        if part is None:
            raise ArtifactError(f"{self.path} has no {name} section: it is not a whole artifact. Compile it again")
        extent = self.mapping[part.offset : part.offset + part.extent]
        if hashlib.sha256(extent).hexdigest() != part.hash:
            raise damaged(self.path, name)
        return extent[: part.bytes]

    def check_library(self) -> None:
        """Checks every byte that `dlopen` could look at, and the section table."""
        self._checked(LIBRARY)
        self._checked("section table")

    def check_tokenizer(self) -> None:
        """Checks the tokenizer, and that it is there if the manifest tells of one."""
        if self.manifest.text is not None:
            self._checked(TOKENIZER)

    def tokenizer(self) -> bytes | None:
        """The bytes of tokenizer.json, checked; None when the artifact has none. Older files have it uncompressed."""
        if TOKENIZER not in self.parts:
            return None
        data = self._checked(TOKENIZER)
        if not data.startswith(_GZIP_MAGIC):
            return data
        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(self.path, TOKENIZER) from error

    def check_machine(self) -> None:
        """Refuses an artifact that this machine cannot run, and says which command makes one that it can."""
        target = self.manifest.target
        rebuild = self.rebuild_command()
        here = cpu.architecture()
        if target.arch != here:
            raise ArtifactError(f"{self.path} is for {target.arch}, and this machine is {here}. Run: {rebuild}")
        machine = struct.unpack_from("<H", self.mapping, 18)[0]
        if machine != _ELF_MACHINE.get(here, machine):
            raise ArtifactError(f"{self.path} holds code for another kind of machine (ELF {machine}). Run: {rebuild}")
        glibc = cpu.glibc()
        if glibc and _version(target.glibc) > _version(glibc):
            raise ArtifactError(f"{self.path} needs glibc {target.glibc}, and this system has {glibc}. Run: {rebuild}")
        missing = sorted(target.features - cpu.features())
        if missing:
            raise ArtifactError(
                f"{self.path} was compiled for {target.name} and needs {', '.join(missing)}, "
                f"which this CPU does not have. Run: {rebuild}"
            )

    def rebuild_command(self) -> str:
        """The command that makes this artifact for this machine."""
        source = self.manifest.model.source or "MODEL"
        return f"llmc compile {shlex.quote(source)} --target native -o {shlex.quote(str(self.path))}"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def damaged(path: Path, name: str) -> ArtifactError:
    """The error for a part whose hash is wrong."""
    return ArtifactError(f"{path} is damaged: {name} is not what was written. Copy the file again, or compile it again")


def _read_seal(path: Path, mapping: mmap.mmap) -> dict[str, Part]:
    size = len(mapping)
    if mapping[:4] != b"\x7fELF":
        raise ArtifactError(f"{path} is not an artifact: it is not an ELF library. `llmc compile MODEL -o F` makes one")
    if size < 64 + _TRAILER.size or mapping[4:6] != b"\x02\x01":
        raise ArtifactError(f"{path} is damaged: its ELF header is cut off or wrong. Copy or compile it again")
    digest, length, magic = _TRAILER.unpack(mapping[size - _TRAILER.size :])
    start = size - _TRAILER.size - length
    if magic != SEAL_MAGIC:
        table = struct.unpack_from("<Q", mapping, 0x28)[0]
        if table >= size or SEAL_MAGIC[:4] in mapping[max(0, size - 64) :]:
            raise ArtifactError(f"{path} is cut short or damaged at its end. Copy the file again, or compile it again")
        raise ArtifactError(
            f"{path} is a library that llmc did not make, or its end is missing. Compile the model again"
        )
    if start < 64 or length > _MOST_SEAL_BYTES:
        raise damaged(path, "the seal (.llmc.seal)")
    text = mapping[start : start + length]
    if hashlib.sha256(text).digest() != digest:
        raise damaged(path, "the seal (.llmc.seal)")
    return _parse_seal(path, text, start)


def _parse_seal(path: Path, text: bytes, end: int) -> dict[str, Part]:
    """The parts, which must cover [0, end) without gaps: no byte of the file is outside of some hash."""
    try:
        seal = json.loads(text)
        schema = seal["schema"]
        if schema != SEAL_SCHEMA:
            raise ArtifactError(
                f"{path} has file format {schema!r:.20}, and this llmc reads {SEAL_SCHEMA}: compile again"
            )
        parts = [
            Part(
                name=str(entry["name"]),
                offset=int(entry["offset"]),
                bytes=int(entry["bytes"]),
                extent=int(entry["extent"]),
                hash=str(entry["hash"]),
            )
            for entry in seal["parts"]
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path} has a seal that cannot be read ({error!r:.80}). Compile it again") from error
    position = 0
    for part in parts:
        if part.offset != position or not 0 <= part.bytes <= part.extent or part.extent > end - position:
            raise ArtifactError(f"{path} has a seal whose parts do not cover the file. Compile it again")
        position += part.extent
    names = [part.name for part in parts]
    if position != end or len(set(names)) != len(names) or LIBRARY not in names or "section table" not in names:
        raise ArtifactError(f"{path} has a seal whose parts do not cover the file. Compile it again")
    for part in parts:
        if part.name == WEIGHTS and part.offset % mmap.PAGESIZE:
            raise ArtifactError(
                f"{path} has weights that do not start on a page, of {mmap.PAGESIZE} bytes here. Compile it again"
            )
    return {part.name: part for part in parts}
