"""What loading leaves for later: weights are hashed, and copied into memory of the device, beside the first steps.

Both read every byte, which takes seconds for a file of some gigabytes, and neither is needed for the first token. So a
thread of its own goes through the weights piece by piece: it copies a piece, where there is to be a copy, and hashes it
while it is in the cache. It holds no lock, takes no turn of the pool, and gives way to the threads of steps.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import verified
from llmc.runtime.artifact import HASH_CHUNK, WEIGHTS, damaged
from llmc.runtime.device import Buffer, Device
from llmc.runtime.errors import ArtifactError

Hash = Callable[[NDArray[np.uint8], int], NDArray[np.uint64]]  # `Code.hash`

# The scheduler's weight of such a thread is a tenth of another's (110 of 1024): beside steps that keep every core busy,
# it gets so much of one core, and all of a core that is idle. Less would leave damage unseen for minutes.
_NICENESS = 10


@dataclass(frozen=True)
class Source:
    """Weights as they lie in a file: `mapped`, uint8 [n], begins at `offset` of the file, and of `mapping`.

    expected: the hash that they should have; None where nobody knows it. descriptor: open while the file is loaded.
    facts: what `verified` knows these bytes by, taken before any of them was read. settled: whether a later change of
    the file shows in its facts.
    """

    path: Path
    descriptor: int
    mapping: mmap.mmap
    mapped: NDArray[np.uint8]
    offset: int
    expected: str | None
    facts: str
    settled: bool

    @classmethod
    def of(
        cls, path: Path, descriptor: int, mapping: mmap.mmap, offset: int, nbytes: int, expected: str | None
    ) -> Source:
        """`nbytes` bytes of weights from `offset` of an open file that is mapped whole."""
        mapped: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8, nbytes, offset)
        facts = verified.facts_of(descriptor, offset, nbytes, expected or "")
        return cls(path, descriptor, mapping, mapped, offset, expected, facts, verified.is_settled(descriptor))

    def remember(self, descriptor: int, whole: bool) -> None:
        """Writes down what all bytes of the file were found to be, unless it changed meanwhile, or could have."""
        now = verified.facts_of(descriptor, self.offset, len(self.mapped), self.expected or "")
        if self.settled and now == self.facts:
            verified.remember(self.facts, whole)

    def read_ahead(self, descriptor: int) -> None:
        """Asks the system to read them, if they are not in memory: from a slow disk this is twice as fast as reading
        on demand."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, self.offset, len(self.mapped), os.POSIX_FADV_WILLNEED)

    def read_into(self, descriptor: int, out: NDArray[np.uint8], start: int) -> None:
        """Reads the bytes from `start` on. Read, not copied from the mapping: so its pages never count as this
        process's memory, and a file that got shorter is an error and no signal."""
        done, bytes_of = 0, out.data
        while done < len(out):
            count = os.preadv(descriptor, [bytes_of[done:]], self.offset + start + done)
            if count == 0:
                raise ArtifactError(f"{self.path} became shorter while it was read: load it again")
            done += count

    def is_whole(self, hashes: NDArray[np.uint64]) -> bool:
        """Whether these are the hashes of chunks that were written."""
        return hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest() == self.expected


class Loading:
    """The work on one model's weights that goes on after `Runtime.load` returned.

    Invariant: `done` is set last. Until then only the thread changes what is here, and afterwards nobody; `failure` is
    empty, or says why no step may use the weights. A child of `fork` has no such thread: `is_lost` tells, and `restart`
    begins anew.
    """

    def __init__(
        self, source: Source, device: Device, used: NDArray[np.uint8] | None, copy: Buffer | None, hash_of: Hash | None
    ) -> None:
        """used: the weights that steps read meanwhile; None: steps wait for the copy. copy: where they are to be, if
        not there. hash_of: None where nothing is to be checked."""
        self.failure = ""
        self.whole = False  # the hash was found right
        self.done = False
        self.copy = copy
        self.checking = hash_of is not None
        self.used = used
        self._source, self._device, self._hash_of = source, device, hash_of
        self._descriptor = os.dup(source.descriptor)
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        self._cancelled = False
        self._thread: threading.Thread | None = None
        self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work_aside, name="llmc-loading", daemon=True)
        self._thread = thread
        _under_way.add(self)
        try:
            thread.start()
        except RuntimeError:  # no thread is to be had: a limit, or the interpreter ends
            self._thread = None
            self._work()

    @property
    def is_lost(self) -> bool:
        """Whether nobody works on it any more: its thread is that of the process this one was forked from."""
        gone = self._thread is None or not self._thread.is_alive()
        return gone and not self.done

    def restart(self) -> None:
        """Begins anew in a child of `fork`: without a copy that is not needed, as children share what is mapped."""
        if self.used is not None:
            self.copy = None
        self._start()

    def cancel(self) -> None:
        """Ends the work after the piece that is under way, in some milliseconds; does not wait for it."""
        self._cancelled = True

    def join(self) -> None:
        """Waits until the work is over, or was cancelled."""
        if self._thread is not None:
            self._thread.join()

    def _work_aside(self) -> None:
        with contextlib.suppress(OSError):
            os.nice(_NICENESS)  # on Linux, of the calling thread alone
        self._work()

    def _work(self) -> None:
        try:
            self._run()
        except ArtifactError as error:
            self.failure = str(error)
        except Exception as error:  # whatever it is, the next step says it
            reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
            self.failure = f"the weights of {self._source.path} could not be read and checked: {reason:.200}"
        self.done = True

    def _run(self) -> None:
        source, descriptor, hash_of, copy = self._source, self._descriptor, self._hash_of, self.copy
        source.read_ahead(descriptor)
        data = self.used if copy is None else copy.host
        if copy is None and hash_of is None:
            return
        hashes = np.zeros(-(-len(source.mapped) // HASH_CHUNK), np.uint64)
        room = np.zeros(HASH_CHUNK if data is None else 0, np.uint8)
        for index in range(len(hashes)):
            if self._cancelled:
                raise ArtifactError(f"{source.path} was given up before its weights were checked and copied")
            start = index * HASH_CHUNK
            end = min(start + HASH_CHUNK, len(source.mapped))
            piece = room[: end - start] if data is None else data[start:end]
            if copy is not None:
                source.read_into(descriptor, piece, start)
            if hash_of is not None:
                hashes[index] = hash_of(piece, 0)[0]
            if copy is not None:
                self._device.upload(piece, copy.at(start))
        if copy is not None and copy.host is not None:
            copy.host.setflags(write=False)
        if hash_of is not None:
            self.whole = source.is_whole(hashes)
            source.remember(descriptor, self.whole)
            if not self.whole:
                raise damaged(source.path, WEIGHTS)


_under_way: weakref.WeakSet[Loading] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """No thread is in the artifact's code or memory when the interpreter takes them down."""
    under_way = list(_under_way)
    for one in under_way:
        one.cancel()
    for one in under_way:
        one.join()
