"""A device whose memory the runtime cannot address: what a GPU is to the runtime, on the host.

Its places are numbers far from any address, so that whoever follows one crashes; a number that belongs to no buffer, or
to one that was given back, is an error that says so. Tables are copied when `run` and `choose` are called, and only
then; the device's own memory is never the host's, and what was fetched from memory that steps write again is spoiled at
the next step. Memory that is not promised to be zero is full of NaN.

`pytest --device apart` runs any test on it in place of the host; `test_device.py` compares the two.
"""

from __future__ import annotations

import bisect
import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.device import Buffer, Place, Use
from llmc.runtime.host import Host
from llmc.runtime.library import Choice, Library, Step

FIRST = 1 << 60  # no address of x86-64 or ARM
_GAP = 1 << 20  # between buffers: a number beyond the end of one is of no other
_POINTERS = frozenset(name for name, kind in Step._fields_ if kind is ctypes.c_void_p)
_OF_NUMBERS = ("cache", "inputs", "outputs", "adapter_tables")  # tables of numbers


class Memory:
    """A buffer as the device has it. array: its real bytes, aligned; table: the host's side of a TABLE."""

    def __init__(self, host: Host, number: int, nbytes: int, use: Use) -> None:
        self.number, self.nbytes, self.use = number, nbytes, use
        self.inner = host.reserve(max(64, nbytes), Use.SPARSE)
        assert self.inner.host is not None
        self.array = self.inner.host
        self.table = np.zeros(nbytes, np.uint8) if use is Use.TABLE else None
        if use is Use.RESULT:
            self.array[:] = 0xFF


class Apart:
    """See `Device`. calls: how often each verb was used."""

    def __init__(self, threads: int, cpus: frozenset[int] | None = None) -> None:
        self.threads = threads
        self.in_process = False
        self.calls: dict[str, int] = {}
        self._host = Host(threads, cpus)
        self._next = FIRST
        self._numbers: list[int] = []  # of the buffers there are, ascending
        self._memories: dict[int, Memory] = {}
        self._fetched: list[tuple[weakref.ref[NDArray[np.generic]], NDArray[np.generic]]] = []

    def _count(self, verb: str) -> None:
        self.calls[verb] = self.calls.get(verb, 0) + 1

    def open(self, artifact: Artifact) -> Library:
        self._count("open")
        return self._host.open(artifact)

    def reserve(self, nbytes: int, use: Use) -> Buffer:
        self._count("reserve")
        number, self._next = self._next, self._next + -(-(nbytes + _GAP) // 4096) * 4096
        memory = Memory(self._host, number, nbytes, use)
        self._memories[number] = memory
        self._numbers.append(number)
        buffer = Buffer(number, nbytes, memory.table, None)
        weakref.finalize(buffer, self._free, number).atexit = False
        return buffer

    def _free(self, number: int) -> None:
        self._memories.pop(number).array[:64] = 0xFF
        self._numbers.remove(number)

    def _memory(self, number: int, nbytes: int = 1) -> tuple[Memory, int]:
        """The buffer that a number is in, and how far behind its begin."""
        at = bisect.bisect_right(self._numbers, number) - 1
        memory = self._memories[self._numbers[at]] if at >= 0 else None
        if memory is None or number + nbytes > memory.number + max(64, memory.nbytes):
            raise AssertionError(f"{number:#x} (+{nbytes}) is no place of this device, or no longer")
        return memory, number - memory.number

    def _real(self, number: int | None) -> int | None:
        """The address that the device's code sees. Tables are brought there."""
        if not number:
            return None
        memory, offset = self._memory(number)
        if memory.table is not None:
            memory.array[: memory.nbytes] = memory.table
        return memory.inner.number + offset

    def reads_in_place(self, data: NDArray[np.generic]) -> bool:
        return False

    def upload(self, data: NDArray[np.generic], target: Place | None = None) -> Place:
        self._count("upload")
        place = target or self.reserve(data.nbytes, Use.RESULT).at()
        memory, offset = self._memory(place.number, data.nbytes)
        assert memory.table is None, "the host fills tables itself"
        memory.array[offset : offset + data.nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return place

    def copy(self, source: Place, target: Place, nbytes: int) -> None:
        self._count("copy")
        (first, begin), (second, start) = self._memory(source.number, nbytes), self._memory(target.number, nbytes)
        second.array[start : start + nbytes] = first.array[begin : begin + nbytes]

    def fetch(self, place: Place, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
        self._count("fetch")
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if nbytes == 0:
            return np.zeros(shape, dtype)
        memory, offset = self._memory(place.number, nbytes)
        assert memory.table is None, "the host has its tables"
        found = memory.array[offset : offset + nbytes].copy().view(dtype).reshape(shape)
        if memory.use is not Use.RESULT:
            self._fetched.append((weakref.ref(found), found.reshape(-1).view(np.uint8)))
        return found

    def _spoil(self) -> None:
        """What was fetched and may be written by a step is of no use from now on."""
        for alive, data in self._fetched:
            if alive() is not None:
                data[:] = 0xFF
        self._fetched = []

    def run(self, step: Step) -> None:
        self._count("run")
        self._spoil()
        with self._translated(step) as real:
            self._host.run(real)

    @contextmanager
    def _translated(self, step: Step) -> Iterator[Step]:
        """The step with addresses in place of numbers, also in tables of numbers."""
        real = Step.from_buffer_copy(step)
        for name in _POINTERS:
            setattr(real, name, self._real(getattr(step, name)))
        for name in _OF_NUMBERS:
            if getattr(real, name):
                memory, _ = self._memory(getattr(step, name))
                numbers = memory.array[: memory.nbytes].view(np.uint64)
                numbers[:] = [self._real(int(number)) or 0 for number in numbers]
        yield real

    def choose(self, choice: Choice) -> int:
        self._count("choose")
        real = Choice.from_buffer_copy(choice)
        for name in ("logits", "seen", "scratch"):
            setattr(real, name, self._real(getattr(choice, name)))
        return self._host.choose(real)


def use_apart(patch: Callable[[dict[str, tuple[str, str]], str, tuple[str, str]], None]) -> None:
    """From now on models are loaded on this device. patch: `monkeypatch.setitem`."""
    from llmc.runtime import devices

    patch(devices.KINDS, "host", (__name__, Apart.__name__))
