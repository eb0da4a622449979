"""One sequence of tokens and its pages in the KV cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Ids
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.layer import SequenceView
from llmc.runtime.settings import is_integer

if TYPE_CHECKING:
    from llmc.runtime.runtime import Runtime


class Sequence:
    """Tokens that the model has seen, with their keys and values in the cache.

    It stands for a sequence of the session layer (csrc/sequence.c), which has its tokens and counts its pages. Between
    calls these are exactly the pages that `length` tokens need, all computed in `regime` (`StepFacts.regimes`: a model
    for long contexts may compute every token differently once there are many). Made by `Runtime.sequence()`. Use it
    from one thread at a time; close it, or use it in a `with` block, so that its pages can serve others.
    """

    def __init__(self, runtime: Runtime, place: int) -> None:
        """place: where the layer has it."""
        self.closed = False
        self.runtime = runtime
        self.place = place
        self._layer = runtime.layer
        self._view = SequenceView.from_address(place)

    def __del__(self) -> None:
        # May run at any moment, in the middle of a step of this thread; and before `close`, where both are called.
        if not getattr(self, "closed", True):
            self.closed = True
            self.runtime.orphans.append(self.place)

    def __len__(self) -> int:
        return self.length

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self._view.length if self._is_there else 0

    @property
    def expected(self) -> int:
        """Tokens that it will have at least: it is computed in their regime from the start."""
        return self._view.expected if self._is_there else 0

    @property
    def regime(self) -> int:
        """The regime that its tokens are computed in."""
        return self._view.regime if self._is_there else 0

    @property
    def page_count(self) -> int:
        """Pages of the cache that it has, alone or with others."""
        return self._view.page_count if self._is_there else 0

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The tokens so far, int32 [length]; a copy."""
        return self._numbers(self.length, "tokens")

    @property
    def pages(self) -> NDArray[np.int32]:
        """The ids of its pages in order, int32 [page_count]; a copy."""
        return self._numbers(self.page_count, "page_ids")

    @property
    def _is_there(self) -> bool:
        return not self.closed and self._layer.is_open

    def _numbers(self, count: int, name: str) -> NDArray[np.int32]:
        found = np.zeros(count, np.int32)
        if count:
            ctypes.memmove(found.ctypes.data, getattr(self._view, name), found.nbytes)
        return found

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, ids: Ids[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Runs the model over more tokens; returns the logits after the last, float32 [vocab]."""
        logits: NDArray[np.float32] = self.runtime.step([(self, ids, "last")])[0]
        return logits

    def adopt_prefix(self, ids: Ids[int] | NDArray[np.integer]) -> int:
        """Takes over cached pages that hold the start of `ids`, and returns how many tokens they cover.

        Only for an empty sequence. At least one token of `ids` is left over, so that there is something to run.
        """
        if self.length:
            raise RuntimeStateError("adopt_prefix() needs an empty sequence")
        self.check_open()
        tokens = self.runtime.check_ids(ids)[: self.runtime.max_context]
        with self.runtime.lock:
            self.runtime.collect_orphans()
            return self._layer.adopt(self.place, tokens)

    def fork(self) -> Sequence:
        """A second sequence with the same tokens. Pages are shared until one of the two writes to them."""
        self.check_open()
        with self.runtime.lock:
            return Sequence(self.runtime, self._layer.fork(self.place))

    def rollback(self, count: int) -> None:
        """Forgets the last `count` tokens."""
        self.check_open()
        if not is_integer(count) or not 0 <= count <= self.length:
            raise RuntimeStateError(f"rollback({count!r:.40}) of a sequence of {self.length} tokens")
        with self.runtime.lock:
            self._layer.rollback(self.place, int(count))

    def close(self) -> None:
        """Gives the pages back. Full pages stay findable as a prefix for as long as there is room.

        May be called at any moment by the collection of garbage, such as a stream's, in the middle of a step: so where
        this thread has the lock, the sequence is only noted down for the next step.
        """
        if self.closed:
            return
        self.closed = True
        runtime = self.runtime
        if runtime.lock.held:
            runtime.orphans.append(self.place)
            return
        with runtime.lock:
            self._layer.end(self.place)

    def changes_regime(self, count: int) -> bool:
        """Whether `count` more tokens make those in the cache useless: they are to be computed anew."""
        length = self.length
        return length > 0 and self.runtime.manifest.step.regime(max(length + count, self.expected)) != self.regime

    def check_open(self) -> None:
        """RuntimeStateError where it was closed."""
        if self.closed:
            raise RuntimeStateError("this sequence is closed")
