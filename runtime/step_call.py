"""The call of a step: its struct, the memory that the step works in, and what its calls took."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.device import Buffer, Device, Place, Use
from llmc.runtime.library import Step
from llmc.runtime.profile import StepSizes

if TYPE_CHECKING:
    from llmc.runtime.layer import Layer
    from llmc.runtime.weights import Weights


class StepCaller:
    """What every kind of step needs, allocated once; `step` points to it. One thread at a time.

    tables: the buffers that the host fills for steps, by the field of `Step` that has their number.
    """

    def __init__(self, artifact: Artifact, device: Device, weights: Place) -> None:
        self.facts = artifact.manifest.step
        self.device = device
        self.threads = device.threads
        self.layer: Layer | None = None  # what runs the steps, where it is not `call`
        self.source: Weights | None = None  # where the weights are, if that may change from one step to the next
        self.arena = device.reserve(self.facts.arena_bytes, Use.DENSE)
        self.tables: dict[str, Buffer] = {}
        self.profiled: list[StepSizes] = []
        self.taken: list[NDArray[np.int64]] = []
        self.profiling = False
        self._times = device.reserve(8 * len(self.facts.calls), Use.DENSE)
        self.step = Step(arena=self.arena.number, arena_bytes=self.arena.nbytes, weights=weights.number)

    def table(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.int32) -> NDArray[np.generic]:
        """A new table of zeros for steps to read: that of the step's field `name`, if it has such a field."""
        buffer = self.device.reserve(math.prod(shape) * np.dtype(dtype).itemsize, Use.TABLE)
        self.tables[name] = buffer
        if hasattr(Step, name):
            setattr(self.step, name, buffer.number)
        return buffer.table(shape, dtype)

    def int32(self, name: str, shape: tuple[int, ...]) -> NDArray[np.int32]:
        """`table` of int32 numbers."""
        array: NDArray[np.int32] = self.table(name, shape)  # type: ignore[assignment]
        return array

    def results(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[DTypeLike]) -> list[Place]:
        """New memory for the next step's outputs, of these shapes and dtypes."""
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        return [self.device.reserve(nbytes, Use.RESULT).at() for nbytes in sizes]

    @property
    def profile(self) -> NDArray[np.int64]:
        """Nanoseconds of each of a step's calls, in the order of `calls`, added up since `set_profiling(True)`."""
        shape = (len(self.facts.calls),)
        return self.device.fetch(self._times.at(), shape, np.int64).astype(np.int64)  # a copy

    def set_profiling(self, on: bool) -> None:
        """Whether steps add the time of each of their calls to `profile`, and append it to `taken` and their sizes to
        `profiled`. All three start anew."""
        count = len(self.facts.calls)
        self.device.upload(np.zeros(count, np.int64), self._times.at())
        self.profiled, self.taken = [], []
        self.profiling = on and count > 0
        self.step.profile = self._times.number if self.profiling else None

    def settle(self) -> None:
        """Takes up what loading has done since the last step. Raises what `Weights.settle` does."""
        if self.source is not None and self.source.pending:
            self.step.weights = self.source.settle().number

    def call(self) -> None:
        """Runs the step that the struct describes. `StepError` says what its inputs made impossible."""
        self.settle()
        if not self.profiling:
            self.device.run(self.step)
            return
        before = self.profile
        self.device.run(self.step)
        self.taken.append(self.profile - before)

    def make_tables(self, context: int) -> dict[str, NDArray[np.int32]]:
        """The int32 tables of a step of several sequences of `context` tokens at most, where the struct says."""
        most = self.facts.max_step
        columns = -(-context // max(1, self.facts.page))
        shapes = {"starts": (most + 1,), "tiles": (most, 4), "block_table": (most * max(1, columns),)}
        names = (
            "ids", "positions", "slots", "lengths", "rows", "tiles", "starts", "token_types", "block_table", "adapters",
        )  # fmt: skip
        made = {name: self.int32(name, shapes.get(name, (most,))) for name in names}
        self._tiles = made["tiles"]
        return made

    @property
    def is_watched(self) -> bool:
        """Whether steps are run from here, one by one: they are timed, or the artifact's own code may not."""
        return self.profiling or not self.device.in_process

    @contextlib.contextmanager
    def calling(self) -> Iterator[Layer]:
        """The session layer, ready for a call that runs steps. Those that are watched are run from here, and all others
        by C."""
        assert self.layer is not None
        self.settle()
        if not self.is_watched:
            yield self.layer
            return
        self.layer.hook(self._run_one)
        try:
            yield self.layer
        finally:
            self.layer.hook(None)  # it would keep this object alive

    def _run_one(self) -> None:
        if not self.profiling:
            self.device.run(self.step)
            return
        before = self.profile
        self.device.run(self.step)
        self.taken.append(self.profile - before)
        self.profiled.append(StepSizes(tuple(self.step.sizes), self._places()))

    def _places(self) -> tuple[tuple[int, int], ...]:
        """(first position, tokens) of each sequence of the step."""
        tiles = self._tiles[: self.step.sizes[1]]
        starts = np.full(self.step.sizes[2], np.iinfo(np.int32).max, np.int64)
        counts = np.zeros(len(starts), np.int64)
        np.minimum.at(starts, tiles[:, 0], tiles[:, 3])
        np.add.at(counts, tiles[:, 0], tiles[:, 2])
        return tuple(zip(starts.tolist(), counts.tolist(), strict=True))
