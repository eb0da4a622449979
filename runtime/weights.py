"""Where an artifact's weights lie in memory while it is used: in the mapped file, or copied into huge pages.

Decoding reads every weight once a token, which is as fast as memory only if address translation keeps up. A mapped
file mostly has pages of 4 KiB, whose translations no cache holds for weights of this size; with pages of 2 MiB decoding
is 5 to 20% faster (docs/adr/0005). So weights are copied where memory is plentiful, and used in place elsewhere.

Steps begin in the mapped file, and go on in the copy once it is there (docs/adr/0014). What is checked when is said in
SECURITY.md.
"""

from __future__ import annotations

import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import cpu, verified
from llmc.runtime.artifact import WEIGHTS, Artifact, damaged
from llmc.runtime.errors import ArtifactError, RuntimeStateError
from llmc.runtime.library import Library
from llmc.runtime.loading import Loading, Source
from llmc.runtime.memory import address, reserve

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Less than this is translated by the second-level TLB (1,500 to 2,000 pages of 4 KiB) or nearly so.
LEAST_BYTES = 16 << 20
# Less than this is hashed and copied before the first step: at some gigabytes a second nobody waits for it.
LEAST_LATER = 64 << 20
_READ_BYTES = 32 << 20  # one read call


class Weights:
    """The weights of a loaded model, and what is still to be done about them.

    Invariant: `array`, uint8 [weights_bytes], holds the bytes that steps read, page-aligned and not to be written to;
    it changes in `settle` and `close` only, which are called between steps. Where `pending` is false, nothing is left
    to do: the weights may be used for ever.
    """

    def __init__(self, array: NDArray[np.uint8], whole: bool, source: Source | None, loading: Loading | None) -> None:
        self.array = array
        self._whole, self._source, self._loading = whole, source, loading
        self._closed = False
        self.pending = loading is not None
        if loading is not None:
            weakref.finalize(self, loading.cancel).atexit = False  # `loading` sees to that itself

    @property
    def verified(self) -> bool:
        """Whether they are known to be what was written: hashed in this process, or before and unchanged since."""
        return self._whole or (self._loading is not None and self._loading.done and self._loading.whole)

    @property
    def bytes_to_come(self) -> int:
        """Memory that a copy will take, which is free at present."""
        loading = self._loading
        return 0 if loading is None or loading.done or loading.copy is None else loading.copy.nbytes

    @property
    def verifying(self) -> bool:
        """Whether a check of them is under way."""
        return self._loading is not None and self._loading.checking and not self._loading.done

    def settle(self) -> int:
        """The address that the next step reads from: that of the copy, once it is there.

        Raises `ArtifactError` where the weights turned out to be damaged, and `RuntimeStateError` after `close`.
        """
        if self._closed:
            raise RuntimeStateError("this model was closed: load it again")
        loading = self._loading
        if loading is not None and loading.is_lost:
            loading.restart()
        if loading is not None and loading.done:
            if loading.failure:
                raise ArtifactError(loading.failure)
            self._whole = self.verified
            if loading.copy is not None:
                self._move_to(loading.copy)
            self._loading, self.pending = None, False
        return address(self.array)

    def _move_to(self, copy: NDArray[np.uint8]) -> None:
        self.array = copy[: len(self.array)]
        if self._source is not None:  # what steps touched of the mapping would count as this process's memory
            self._source.mapping.madvise(mmap.MADV_DONTNEED, self._source.offset, len(self._source.mapped))

    def join(self) -> None:
        """Waits for the work that is left. `settle` says what came of it."""
        loading = self._loading
        if loading is not None:
            loading.join()

    def close(self) -> None:
        """Ends the work that is left, and gives the weights up: every later step is an error."""
        loading, self._loading, self._source = self._loading, None, None
        self.array = np.zeros(0, np.uint8)
        self._closed = self.pending = True
        if loading is not None:
            loading.cancel()
            loading.join()


def load_weights(
    artifact: Artifact,
    library: Library,
    external: Path | None,
    threads: int,
    verify: bool | None = None,
    share: bool | None = None,
) -> Weights:
    """The weights of an artifact, in the mapped file or in a copy.

    external: the file that has them, for an artifact that was compiled without. verify: True to check their hash now,
    on the bytes that will be used; False to check nothing; None to check them beside the first steps, unless this file
    was checked before and is unchanged. share: True to use the mapped file, which all processes that load it share;
    False to copy it now; None: to copy it beside the first steps where that is worth it. Raises `ArtifactError`.
    """
    source = _source(artifact, external)
    if source is None:
        return Weights(np.zeros(1, np.uint8), True, None, None)
    wanted, size = artifact.manifest.weights_bytes, len(source.mapped)
    checking, known, now = source.expected is not None and verify is not False, None, verify is True
    if size < LEAST_LATER:
        now = True
    elif checking and verify is None:
        known = verified.recall(source.facts)
        checking = not known
        # What was damaged before is looked at again; numbers that steps use as indices are, before any step.
        now = checking and (known is False or artifact.manifest.has_indices)
    if now:
        return Weights(_checked(source, library, threads, checking, share)[:wanted], checking, source, None)
    used = source.mapped if share is not False else _copied(source, threads)
    copy = _room(size) if share is None and worth_copying(size) else None
    loading = Loading(source, used, copy, library.hash if checking else None)
    return Weights(used[:wanted], bool(known), source, loading)


def _source(artifact: Artifact, external: Path | None) -> Source | None:
    """Where the weights are; None where the model has none."""
    part = artifact.parts.get(WEIGHTS)
    wanted = artifact.manifest.weights_bytes
    if part is not None and part.bytes == 0:
        part = None
    if external is not None:
        return _external(artifact, external, wanted) if wanted else None
    if part is None:
        if not wanted:
            return None
        raise ArtifactError(
            f"{artifact.path} was compiled without weights: load it with weights=FILE, or compile with --weights embed"
        )
    if part.bytes != wanted:
        raise ArtifactError(
            f"{artifact.path} has {part.bytes} bytes of weights; its manifest says {wanted}. Compile it again"
        )
    return Source.of(artifact.path, artifact.descriptor, artifact.mapping, part.offset, part.extent, part.hash)


def _external(artifact: Artifact, path: Path, wanted: int) -> Source:
    """Weights in a file of their own, whose descriptor is closed with the artifact's."""
    try:
        descriptor = artifact.open_beside(path)
        mapping = mmap.mmap(descriptor, wanted, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} does not hold the {wanted} bytes of weights that {artifact.path} needs") from error
    return Source.of(path, descriptor, mapping, 0, wanted, artifact.manifest.weights_hash)


def _checked(source: Source, library: Library, threads: int, checking: bool, share: bool | None) -> NDArray[np.uint8]:
    """The weights, copied where that is wanted or worth it, and checked, before this returns."""
    size = len(source.mapped)
    source.read_ahead(source.descriptor)
    copying = share is False or (share is None and worth_copying(size))
    data = _copied(source, threads) if copying else source.mapped
    if checking:
        whole = source.is_whole(library.hash(data, threads))
        if size >= LEAST_LATER:
            source.remember(source.descriptor, whole)
        if not whole:
            raise damaged(source.path, WEIGHTS)
    return data


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


def _room(nbytes: int) -> NDArray[np.uint8] | None:
    """Huge pages for a copy; None where a limit on address space forbids it."""
    try:
        return reserve((nbytes,), np.uint8, huge_pages=True)  # type: ignore[return-value]
    except RuntimeStateError:
        return None


def _copied(source: Source, threads: int) -> NDArray[np.uint8]:
    """A copy by several threads at once; what is mapped, where there is no room for one."""
    copy = _room(len(source.mapped))
    if copy is None:
        return source.mapped

    def read(start: int) -> None:
        source.read_into(source.descriptor, copy[start : start + _READ_BYTES], start)

    with ThreadPoolExecutor(max(1, threads)) as readers:
        for _ in readers.map(read, range(0, len(copy), _READ_BYTES)):
            pass
    copy.setflags(write=False)
    return copy
