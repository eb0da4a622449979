"""The host as a device: the artifact's code runs on this process's threads, in this process's memory.

Places are addresses, so nothing is brought anywhere: weights are used in the file that is mapped, tables and inputs
where they are, and what is fetched is the memory itself.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc.runtime import topology
from llmc.runtime.artifact import Artifact
from llmc.runtime.device import ALIGNMENT, Buffer, Place, Use
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.library import Choice, Library, Step
from llmc.runtime.memory import address, aligned_empty, reserve

_NO_CHOICE = -2  # of choose.h


class Host:
    """The threads and the memory of this process; see `Device`. cpus: what the threads keep to, None: any."""

    def __init__(self, threads: int, cpus: frozenset[int] | None = None) -> None:
        self.threads = threads
        self.in_process = True
        self._cpus = cpus

    def open(self, artifact: Artifact) -> Library:
        library = Library.load(artifact)
        if self._cpus is not None:
            with topology.confined(self._cpus):  # workers inherit it
                library.start_threads(self.threads)
        self.use(library)
        return library

    def use(self, library: Library) -> None:
        """Takes code that is loaded already."""
        self._library = library
        self._run, self._choose = library.run, library.choose

    def reserve(self, nbytes: int, use: Use) -> Buffer:
        return _buffer(aligned_empty(nbytes) if use is Use.RESULT else reserve(nbytes, use is Use.DENSE))

    def reads_in_place(self, data: NDArray[np.generic]) -> bool:
        return data.flags.c_contiguous and data.size > 0 and address(data) % ALIGNMENT == 0

    def upload(self, data: NDArray[np.generic], target: Place | None = None) -> Place:
        if target is None:
            if self.reads_in_place(data):
                return _buffer(data.reshape(-1).view(np.uint8)).at()
            target = self.reserve(data.nbytes, Use.RESULT).at()
        memory = target.buffer.host
        assert memory is not None
        if data.nbytes and address(data) != target.number:
            there = np.ndarray(data.shape, data.dtype, memory.data, target.offset)
            there[...] = data
        return target

    def copy(self, source: Place, target: Place, nbytes: int) -> None:
        ctypes.memmove(target.number, source.number, nbytes)

    def run(self, step: Step) -> None:
        code = self._run(step, self.threads)
        if code:
            raise self._library.failure(code)

    def fetch(self, place: Place, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
        memory = place.buffer.host
        assert memory is not None
        return np.ndarray(shape, dtype, memory.data, place.offset)

    def choose(self, choice: Choice) -> int:
        token: int = self._choose(choice, self.threads)
        if token == _NO_CHOICE:
            raise RuntimeStateError("a choice that cannot be: an option, a seen token id or a pointer is out of range")
        return token


def _buffer(array: NDArray[np.uint8]) -> Buffer:
    return Buffer(address(array), array.nbytes, array, array)
