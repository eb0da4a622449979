"""What the runtime asks of a device, whose memory it may not be able to address.

A device is opened for one model: `open` loads its code, and from then on the runtime only moves bytes to and from it
(`reserve`, `upload`, `copy`, `fetch`) and lets it work on them (`run`, `choose`). `runtime/devices.py` has the kinds
there are; the host is the first (`runtime/host.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from llmc.runtime.artifact import Artifact
    from llmc.runtime.library import Choice, Step
    from llmc.runtime.limits import Limits
    from llmc.runtime.manifest import LimitFacts


ALIGNMENT = 64  # of every pointer that a step follows


class Use(Enum):
    """What a buffer is for, which decides where a device puts it.

    SPARSE: touched a part at a time, and zero where it was not: memory is taken as it is first written, if the device
    can. DENSE: read or written whole by steps, zero at first. TABLE: the host fills it, also between steps, and
    `run` and `choose` read it; zero at first. RESULT: steps write all that is fetched of it; holds anything at first.
    """

    SPARSE = "sparse"
    DENSE = "dense"
    TABLE = "table"
    RESULT = "result"


class Buffer:
    """Memory of a device, given back when nothing refers to it any more.

    number: what the device's code knows the first byte by, and `number + n` byte n: a multiple of 64, 4096 unless it is
    a RESULT. An address in the device's memory, which need not be one in this process. host: its bytes, uint8 [nbytes],
    of a TABLE on every device; of others where the device works in the host's memory, for whoever fills them with
    `upload`; else None. keep: what keeps the memory.
    """

    __slots__ = ("__weakref__", "host", "keep", "nbytes", "number")

    def __init__(self, number: int, nbytes: int, host: NDArray[np.uint8] | None, keep: object) -> None:
        self.number, self.nbytes, self.host, self.keep = number, nbytes, host, keep

    def at(self, offset: int = 0) -> Place:
        """The place of its byte number `offset`."""
        return Place(self, offset)

    def table(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
        """The elements of a TABLE, to be filled."""
        assert self.host is not None
        return np.ndarray(shape, dtype, self.host.data)


class Place:
    """Where bytes lie in a buffer. number: what the device's code knows the place by."""

    __slots__ = ("buffer", "number", "offset")

    def __init__(self, buffer: Buffer, offset: int) -> None:
        self.buffer, self.offset = buffer, offset
        self.number = buffer.number + offset

    def __add__(self, nbytes: int) -> Place:
        return Place(self.buffer, self.offset + nbytes)


class Code(Protocol):
    """An artifact's code beside its steps: what runs on the host, whatever the device. handle: its functions."""

    @property
    def handle(self) -> ctypes.CDLL: ...

    def hash(self, data: NDArray[np.uint8], threads: int) -> NDArray[np.uint64]:
        """The 64-bit hashes of the 4 MiB chunks of bytes in the host's memory; see `Library.hash`."""

    def choose_bytes(self, count: int) -> int:
        """Bytes of scratch that a choice among `count` tokens needs."""

    def measure_limits(self, facts: Sequence[LimitFacts], threads: int) -> Limits:
        """What the device can do at most, by the functions that `facts` tell of."""


class Device(Protocol):
    """Runs one artifact's steps. One thread at a time, but for `reserve`, `upload` and `fetch`.

    threads: how many units of work it does at once; steps are divided accordingly. in_process: whether places are
    addresses in this process, and the artifact's code may run steps and choose tokens by itself there, without `run`
    and `choose`.

    Verbs take effect in the order of the calls, whatever they overlap. What a table or an array holds when a verb is
    called is what the device reads: when the verb returns, it may be changed.
    """

    threads: int
    in_process: bool

    def open(self, artifact: Artifact) -> Code:
        """Loads the code of an artifact that was checked. Once, before anything else. Raises `ArtifactError`."""

    def reserve(self, nbytes: int, use: Use) -> Buffer:
        """A new buffer. Raises `RuntimeStateError` where there is no room for it."""

    def reads_in_place(self, data: NDArray[np.generic]) -> bool:
        """Whether `upload` leaves these bytes where they are, for nothing."""

    def upload(self, data: NDArray[np.generic], target: Place | None = None) -> Place:
        """Brings an array's bytes to `target`, where `data` may lie already (`Buffer.host`). Without a target: to
        wherever the device wants them, which may be where they are: then they stay as they are while the place is
        used, and it keeps them."""

    def copy(self, source: Place, target: Place, nbytes: int) -> None:
        """Copies bytes within the device's memory; the two ranges do not overlap."""

    def run(self, step: Step) -> None:
        """Runs a step, whose pointers are numbers of places. Raises `StepError` where its inputs are impossible, with
        what the manifest's `failures` say of it."""

    def fetch(self, place: Place, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
        """The elements at a place: a copy, or the memory itself. So they are good until a verb writes there, and are
        not to be written to, unless they are a RESULT that is given to no other step."""

    def choose(self, choice: Choice) -> int:
        """Chooses a token (csrc/choose.h); -1 where logits are not finite. Raises `RuntimeStateError` for a choice that
        cannot be made."""
