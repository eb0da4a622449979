"""Where an artifact's weights lie while it is used: in the mapped file, or copied into memory of the device.

Decoding reads every weight once a token, which is as fast as memory only if address translation keeps up. A mapped
file mostly has pages of 4 KiB, whose translations no cache holds for weights of this size; with pages of 2 MiB decoding
is 5 to 20% faster (docs/adr/0005). So weights are copied where memory is plentiful, and used in place elsewhere.

Steps begin in the mapped file, and go on in the copy once it is there (docs/adr/0014). On a device that cannot read the
mapped file they begin when the copy is there, which is made in the same way. What is checked when is said in
SECURITY.md.
"""

from __future__ import annotations

import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import cpu, verified
from llmc.runtime.artifact import WEIGHTS, Artifact, damaged
from llmc.runtime.device import Buffer, Code, Device, Place, Use
from llmc.runtime.errors import ArtifactError, RuntimeStateError
from llmc.runtime.loading import Hash, Loading, Source

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Less than this is translated by the second-level TLB (1,500 to 2,000 pages of 4 KiB) or nearly so.
LEAST_BYTES = 16 << 20
# Less than this is hashed and copied before the first step: at some gigabytes a second nobody waits for it.
LEAST_LATER = 64 << 20
_READ_BYTES = 32 << 20  # one read call


class Weights:
    """The weights of a loaded model, and what is still to be done about them.

    Invariant: `place` is where the `nbytes` bytes lie that steps read, page-aligned and not to be written to; it
    changes in `settle` and `close` only, which are called between steps. Where `pending` is false, nothing is left to
    do: the weights may be used for ever.
    """

    def __init__(
        self, place: Place, nbytes: int, whole: bool, source: Source | None = None, loading: Loading | None = None
    ) -> None:
        self.place, self.nbytes = place, nbytes
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

    def settle(self) -> Place:
        """Where the next step reads from: the copy, once it is there. Waits for it where there is nothing else.

        Raises `ArtifactError` where the weights turned out to be damaged, and `RuntimeStateError` after `close`.
        """
        if self._closed:
            raise RuntimeStateError("this model was closed: load it again")
        loading = self._loading
        if loading is not None and loading.is_lost:
            loading.restart()
        if loading is not None and loading.used is None:
            loading.join()
        if loading is not None and loading.done:
            if loading.failure:
                raise ArtifactError(loading.failure)
            self._whole = self.verified
            if loading.copy is not None:
                self._move_to(loading.copy)
            self._loading, self.pending = None, False
        return self.place

    def _move_to(self, copy: Buffer) -> None:
        self.place = copy.at()
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
        self.place, self.nbytes = Buffer(0, 0, np.zeros(0, np.uint8), None).at(), 0
        self._closed = self.pending = True
        if loading is not None:
            loading.cancel()
            loading.join()


def load_weights(
    artifact: Artifact,
    device: Device,
    code: Code,
    external: Path | None,
    verify: bool | None = None,
    share: bool | None = None,
) -> Weights:
    """The weights of an artifact, in the mapped file or in a copy. code: the artifact's, which hashes them.

    external: the file that has them, for an artifact that was compiled without. verify: True to check their hash now,
    on the bytes that will be used; False to check nothing; None to check them beside the first steps, unless this file
    was checked before and is unchanged. share: True to use the mapped file, which all processes that load it share;
    False to copy it now; None: to copy it beside the first steps where that is worth it. Raises `ArtifactError`.
    """
    source = _source(artifact, external)
    if source is None:
        return Weights(device.reserve(1, Use.DENSE).at(), 1, True)
    wanted, size = artifact.manifest.weights_bytes, len(source.mapped)
    checking, known, now = source.expected is not None and verify is not False, None, verify is True
    if size < LEAST_LATER:
        now = True
    elif checking and verify is None:
        known = verified.recall(source.facts)
        checking = not known
        # What was damaged before is looked at again; numbers that steps use as indices are, before any step.
        now = checking and (known is False or artifact.manifest.has_indices)
    hash_of = code.hash if checking else None
    if not device.reads_in_place(source.mapped):
        copy = device.reserve(size, Use.DENSE)
        weights = Weights(copy.at(), wanted, bool(known), source, Loading(source, device, None, copy, hash_of))
        if now:
            weights.join()
            weights.settle()
        return weights
    if now:
        return Weights(_checked(source, device, hash_of, share), wanted, checking, source)
    place, used = _copied(source, device) if share is False else (device.upload(source.mapped), source.mapped)
    room = _room(size, device) if share is None and worth_copying(size) else None
    return Weights(place, wanted, bool(known), source, Loading(source, device, used, room, hash_of))


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
        if os.fstat(descriptor).st_size != wanted:  # of other weights, which may be larger
            raise ValueError(f"{path} has another size")
        mapping = mmap.mmap(descriptor, wanted, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} does not hold the {wanted} bytes of weights that {artifact.path} needs") from error
    return Source.of(path, descriptor, mapping, 0, wanted, artifact.manifest.weights_hash)


def _checked(source: Source, device: Device, hash_of: Hash | None, share: bool | None) -> Place:
    """Where the weights lie, in the mapped file or copied where that is wanted or worth it, checked before this
    returns."""
    size = len(source.mapped)
    source.read_ahead(source.descriptor)
    copying = share is False or (share is None and worth_copying(size))
    place, data = _copied(source, device) if copying else (device.upload(source.mapped), source.mapped)
    if hash_of is not None:
        whole = source.is_whole(hash_of(data, device.threads))
        if size >= LEAST_LATER:
            source.remember(source.descriptor, whole)
        if not whole:
            raise damaged(source.path, WEIGHTS)
    return place


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


def _room(nbytes: int, device: Device) -> Buffer | None:
    """Huge pages for a copy; None where a limit on address space forbids it."""
    try:
        return device.reserve(nbytes, Use.DENSE)
    except RuntimeStateError:
        return None


def _copied(source: Source, device: Device) -> tuple[Place, NDArray[np.uint8]]:
    """A copy in the host's memory by several threads at once; what is mapped, where there is no room for one."""
    copy = _room(len(source.mapped), device)
    if copy is None:
        return device.upload(source.mapped), source.mapped
    data = copy.host
    assert data is not None

    def read(start: int) -> None:
        source.read_into(source.descriptor, data[start : start + _READ_BYTES], start)

    with ThreadPoolExecutor(max(1, device.threads)) as readers:
        for _ in readers.map(read, range(0, len(data), _READ_BYTES)):
            pass
    data.setflags(write=False)
    return copy.at(), data
