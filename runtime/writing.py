"""A text in the making as C writes it (csrc/write.c): its tokens, its stops, its draws, and how many tokens a call is
for."""

from __future__ import annotations

import ctypes
import math
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
        self._stops = np.array([stop for stop in sorted(stop_ids) if 0 <= stop < 1 << 31], np.int32)
        self._tokens = np.zeros(MOST + 1, np.int32)
        self._view = self._tokens.data  # plain integers go through this in a fraction of the time that numpy takes
        self.text = layer.Text(
            sequence=place, choice=ctypes.addressof(sampler.choice), seen=sampler.seen, known=sampler.known,
            stops=address(self._stops),
            stop_count=len(self._stops), tokens=address(self._tokens),
        )  # fmt: skip
        self.alone = layer.Writing(texts=ctypes.addressof(self.text), number=1)  # for a call of this text only

    def begin(self, last: int, most: int) -> None:
        """The next call feeds this token, and chooses up to so many."""
        most = min(most, MOST)
        text, draws = self.text, self._sampler.draws(most)
        self._view[0] = last
        text.count, text.most = 1, most + 1
        if draws is not None:  # those of the first token, which is not drawn, would stand before them
            text.uniforms = draws - 8

    def take(self) -> list[int]:
        """The tokens that were chosen."""
        chosen = self._view[1 : self.text.count].tolist()
        self._sampler.drawn(len(chosen))
        return chosen

    @property
    def error(self) -> RuntimeStateError | None:
        """Why no token could be chosen after them, if that is so."""
        if self.text.end < layer.NOT_FINITE:
            return None
        return RuntimeStateError(BROKEN if self.text.end == layer.NOT_FINITE else INFINITE)


def write(
    runner: StepRunner, drafts: Sequence[Draft], end_time: float | None = None, times: NDArray[np.int64] | None = None
) -> BaseException | None:
    """Writes drafts side by side, until one ends or it is time to look at other things, or at end_time (seconds of
    `time.perf_counter`). Returns the error of a step, which ended it. times: int64 [MOST], takes up when each of their
    tokens was chosen, in nanoseconds of `time.monotonic_ns`."""
    left = math.inf if end_time is None else 1e9 * (end_time - time.perf_counter())
    deadline = time.monotonic_ns() + int(min(left, NANOSECONDS))
    if len(drafts) == 1:
        writing = drafts[0].alone
    else:
        texts = (layer.Text * len(drafts))(*(draft.text for draft in drafts))
        writing = layer.Writing(texts=ctypes.addressof(texts), number=len(drafts))
    writing.deadline, writing.times = deadline, None if times is None else address(times)
    error = runner.write(writing)
    if len(drafts) > 1:
        for draft, text in zip(drafts, texts, strict=True):
            draft.text.count, draft.text.end = text.count, text.end
    return error
