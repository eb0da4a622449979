"""A text in the making as C writes it (csrc/write.c): its tokens, its stops, its draws, and how many tokens a call is
for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import layer
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.memory import address
from llmc.runtime.sampling import BROKEN, INFINITE

if TYPE_CHECKING:
    from llmc.runtime.batch import StepRunner
    from llmc.runtime.sampling import Sampler

MOST = 256  # tokens of one call
# How long a call goes on, so that an interrupt, a fork, and other threads' texts wait no longer.
NANOSECONDS = 20_000_000


class Draft:
    """The tokens of one text, as far as C writes them. The sampler has to be a plain one (`Sampler.is_plain`)."""

    def __init__(self, place: int, sampler: Sampler, stop_ids: Iterable[int] = ()) -> None:
        """place: of its sequence (`Sequence.place`)."""
        self._sampler = sampler
        self._stops = np.array(sorted(stop_ids), np.int32)
        self._tokens = np.zeros(MOST + 1, np.int32)
        self._draws: NDArray[np.float64] | None = None
        self.text = layer.Text(
            sequence=place, choice=sampler.choice, known=sampler.known, stops=address(self._stops),
            stop_count=len(self._stops), tokens=address(self._tokens),
        )  # fmt: skip

    def begin(self, last: int, most: int) -> None:
        """The next call feeds this token, and chooses up to so many."""
        most = min(most, MOST)
        self._tokens[0] = last
        self.text.count, self.text.most = 1, most + 1
        self._draws = self._sampler.draws(most)
        if self._draws is not None:  # those of the first token, which is not drawn, would stand before them
            self.text.uniforms = address(self._draws) - self._draws.itemsize

    def take(self) -> list[int]:
        """The tokens that were chosen."""
        chosen: list[int] = self._tokens[1 : self.text.count].tolist()
        self._sampler.drawn(len(chosen))
        return chosen

    @property
    def error(self) -> RuntimeStateError | None:
        """Why no token could be chosen after them, if that is so."""
        if self.text.end == layer.NOT_FINITE:
            return RuntimeStateError(BROKEN)
        return RuntimeStateError(INFINITE) if self.text.end == layer.NO_CHOICE else None


def write(
    runner: StepRunner, drafts: Sequence[Draft], end_time: float | None = None, times: NDArray[np.int64] | None = None
) -> BaseException | None:
    """Writes drafts side by side, until one ends or it is time to look at other things, or at end_time (seconds of
    `time.perf_counter`). Returns the error of a step, which ended it. times: int64 [MOST], takes up when each of their
    tokens was chosen, in nanoseconds of `time.monotonic_ns`."""
    deadline = time.monotonic_ns() + NANOSECONDS
    if end_time is not None:
        deadline = min(deadline, time.monotonic_ns() + int(1e9 * (end_time - time.perf_counter())))
    return runner.write([draft.text for draft in drafts], deadline, times)
