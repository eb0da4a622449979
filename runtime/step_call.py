"""The call of a step: its struct, the memory that the step works in, and what its calls took."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.library import Library, Step
from llmc.runtime.memory import address, reserve
from llmc.runtime.profile import StepSizes

if TYPE_CHECKING:
    from llmc.runtime.layer import Layer
    from llmc.runtime.weights import Weights


class StepCaller:
    """What every kind of step needs, allocated once; `step` points to it. One thread at a time."""

    def __init__(self, artifact: Artifact, library: Library, weights: int, threads: int) -> None:
        self.facts = artifact.manifest.step
        self.library = library
        self.threads = threads
        self.layer: Layer | None = None  # what runs the steps, where it is not `call`
        self.tables: dict[str, NDArray[np.int32]] = {}
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
        self.settle()
        before = self.profile.copy() if self.profiling else None
        self.library.run(self._address, self.threads)
        if before is not None:
            self.taken.append(self.profile - before)

    def make_tables(self, context: int) -> dict[str, NDArray[np.int32]]:
        """The int32 tables of a step of several sequences of `context` tokens at most, where the struct says."""
        most = self.facts.max_step
        columns = -(-context // max(1, self.facts.page))
        shapes = {"starts": (most + 1,), "tiles": (most, 4), "block_table": (most * max(1, columns),)}
        for name in ("ids", "positions", "slots", "lengths", "rows", "tiles", "starts", "token_types", "block_table"):
            self.tables[name] = int32(shapes.get(name, (most,)))
            setattr(self.step, name, address(self.tables[name]))
        return self.tables

    @property
    def is_watched(self) -> bool:
        """Whether steps are run from here, one by one: they are timed, or something stands in for the library."""
        return self.profiling or type(self.library) is not Library

    @contextlib.contextmanager
    def calling(self) -> Iterator[Layer]:
        """The session layer, ready for a call that runs steps. Those that are watched are run from here, and all others
        by C."""
        assert self.layer is not None
        self.settle()
        if not self.is_watched:
            yield self.layer
            return
        self.layer.hook(self._run_profiled if self.profiling else self.library.run)
        try:
            yield self.layer
        finally:
            self.layer.hook(None)  # it would keep this object alive

    def _run_profiled(self, step: int, threads: int) -> None:
        before = self.profile.copy()
        self.library.run(step, threads)
        self.taken.append(self.profile - before)
        self.profiled.append(StepSizes(tuple(self.step.sizes), self._places()))

    def _places(self) -> tuple[tuple[int, int], ...]:
        """(first position, tokens) of each sequence of the step."""
        tiles = self.tables["tiles"][: self.step.sizes[1]]
        starts = np.full(self.step.sizes[2], np.iinfo(np.int32).max, np.int64)
        counts = np.zeros(len(starts), np.int64)
        np.minimum.at(starts, tiles[:, 0], tiles[:, 3])
        np.add.at(counts, tiles[:, 0], tiles[:, 2])
        return tuple(zip(starts.tolist(), counts.tolist(), strict=True))


def int32(shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Zeros for a step to read, page-aligned."""
    array: NDArray[np.int32] = reserve(shape, np.int32)  # type: ignore[assignment]
    return array
