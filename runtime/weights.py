"""Where an artifact's weights lie in memory while it is used: in the mapped file, or copied into huge pages.

Decoding reads every weight once a token, which is as fast as memory only if address translation keeps up. A mapped
file mostly has pages of 4 KiB, whose translations no cache holds for weights of this size; with pages of 2 MiB decoding
is 5 to 20% faster (docs/adr/0005). So weights are copied where memory is plentiful, and used in place elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import cpu
from llmc.runtime.artifact import WEIGHTS, Artifact, damaged
from llmc.runtime.errors import ArtifactError, RuntimeStateError
from llmc.runtime.library import Library
from llmc.runtime.memory import reserve

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Less than this is translated by the second-level TLB (1,500 to 2,000 pages of 4 KiB) or nearly so.
LEAST_BYTES = 16 << 20
_READ_BYTES = 32 << 20  # one read call


def load_weights(
    artifact: Artifact, library: Library, external: Path | None, threads: int, verify: bool, share: bool | None = None
) -> NDArray[np.uint8]:
    """The weights, uint8 [weights_bytes], page-aligned and not to be written to.

    external: the file that has them, for an artifact that was compiled without. verify: check their hash, on the
    bytes that will be used. share: True to use the mapped file, which all processes that load it share; False to
    copy it; None: copy where that is worth it. Raises `ArtifactError`.
    """
    part = artifact.parts.get(WEIGHTS)
    wanted = artifact.manifest.weights_bytes
    if part is not None and part.bytes == 0:
        part = None
    if part is None and wanted and external is None:
        raise ArtifactError(
            f"{artifact.path} was compiled without weights: load it with weights=FILE, or compile with --weights embed"
        )
    if external is not None:
        path, expected = external, artifact.manifest.weights_hash
        extent = _external(artifact, external, wanted, threads, share)
    elif part is not None:
        path, expected = artifact.path, part.hash
        if part.bytes != wanted:
            raise ArtifactError(
                f"{path} has {part.bytes} bytes of weights; its manifest says {wanted}. Compile it again"
            )
        mapped: NDArray[np.uint8] = artifact.view[part.offset : part.offset + part.extent]
        extent = _copied(path, artifact.descriptor, part.offset, mapped, threads, share)
    else:
        return np.zeros(1, np.uint8)
    if verify and expected is not None:
        hashes = library.hash(extent, threads)
        if hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest() != expected:
            raise damaged(path, WEIGHTS)
    return extent[:wanted]


def _external(artifact: Artifact, path: Path, wanted: int, threads: int, share: bool | None) -> NDArray[np.uint8]:
    if not wanted:
        return np.zeros(0, np.uint8)
    try:
        with path.open("rb") as file:
            mapped: NDArray[np.uint8] = np.memmap(file, np.uint8, "r", shape=(wanted,))
            return _copied(path, file.fileno(), 0, mapped, threads, share)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} does not hold the {wanted} bytes of weights that {artifact.path} needs") from error


def worth_copying(nbytes: int) -> bool:
    """Whether huge pages would help, the system has them, and another process could take as much memory again."""
    if nbytes < LEAST_BYTES:
        return False
    try:
        if "[never]" in HUGE_PAGES.read_text():
            return False
    except OSError:
        return False
    return cpu.available_memory() >= 2 * nbytes


def _copied(
    path: Path, descriptor: int, offset: int, mapped: NDArray[np.uint8], threads: int, share: bool | None
) -> NDArray[np.uint8]:
    """What is mapped from `offset` of a file, copied if that is worth it. Read, not copied from the mapping: so its
    pages never count as this process's memory, and a file that got shorter is an error and no signal."""
    if not len(mapped) or share is True or (share is None and not worth_copying(len(mapped))):
        return mapped
    try:
        copy: NDArray[np.uint8] = reserve((len(mapped),), np.uint8, huge_pages=True)  # type: ignore[assignment]
    except RuntimeStateError:
        return mapped  # a limit on address space
    bytes_of = copy.data

    def read(start: int) -> None:
        end = min(start + _READ_BYTES, len(mapped))
        while start < end:
            count = os.preadv(descriptor, [bytes_of[start:end]], offset + start)
            if count == 0:
                raise ArtifactError(f"{path} became shorter while it was read: load it again")
            start += count

    with ThreadPoolExecutor(max(1, threads)) as readers:
        for _ in readers.map(read, range(0, len(mapped), _READ_BYTES)):
            pass
    copy.setflags(write=False)
    return copy
