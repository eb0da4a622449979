"""The call of a step: its struct, the memory that the step works in, and what its calls took."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.library import Library, Step
from llmc.runtime.memory import address, reserve
from llmc.runtime.profile import StepSizes

if TYPE_CHECKING:
    from llmc.runtime.weights import Weights


class StepCaller:
    """What every kind of step needs, allocated once; `step` points to it. One thread at a time."""

    def __init__(self, artifact: Artifact, library: Library, weights: int, threads: int) -> None:
        self.facts = artifact.manifest.step
        self.library = library
        self.threads = threads
        self.source: Weights | None = None  # where the weights are, if that may change from one step to the next
        self.arena = reserve((self.facts.arena_bytes,), np.uint8, huge_pages=True)
        self.profile = np.zeros(len(self.facts.calls), np.int64)
        self.profiled: list[StepSizes] = []
        self.taken: list[NDArray[np.int64]] = []
        self.profiling = False
        self.step = Step(arena=address(self.arena), arena_bytes=self.arena.nbytes, weights=weights)
        self._address = ctypes.addressof(self.step)

    def set_profiling(self, on: bool) -> None:
        """Whether steps add the time of each of their calls to `profile` (nanoseconds, in `calls` order), and append it
        to `taken` and their sizes to `profiled`. All three start anew."""
        self.profile[:] = 0
        self.profiled, self.taken = [], []
        self.profiling = on and len(self.profile) > 0
        self.step.profile = address(self.profile) if self.profiling else None

    def settle(self) -> None:
        """Takes up what loading has done since the last step. Raises what `Weights.settle` does."""
        if self.source is not None and self.source.pending:
            self.step.weights = self.source.settle()

    def call(self) -> None:
        """Runs the step that the struct describes. `StepError` says what its inputs made impossible."""
        self._call(self.library.run, self._address)

    def _call(self, run: Callable[[int, int], None], place: int) -> None:
        """Runs a step by the library's `run`, which takes the address of what describes it."""
        self.settle()
        if not self.profiling:
            run(place, self.threads)
            return
        before = self.profile.copy()
        run(place, self.threads)
        self.taken.append(self.profile - before)


def int32(shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Zeros for a step to read, page-aligned."""
    array: NDArray[np.int32] = reserve(shape, np.int32)  # type: ignore[assignment]
    return array
