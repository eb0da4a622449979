"""One sequence of tokens and its pages in the KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import ContextError, RuntimeStateError
from llmc.runtime.kv_cache import ROOT

if TYPE_CHECKING:
    from llmc.runtime.runtime import Runtime


_STAMPS = itertools.count()


@dataclass(frozen=True)
class _State:
    """What a sequence is before it is computed anew."""

    length: int
    regime: int
    pages: NDArray[np.int32]
    chain: list[int]


class Sequence:
    """Tokens that the model has seen, with their keys and values in the cache.

    Invariant: between calls, `pages` holds exactly the pages that `length` tokens need, each with this sequence as one
    of its users, and all of them computed in `regime` (`StepFacts.regimes`: a model for long contexts may compute every
    token differently once there are many). Made by `Runtime.sequence()`. Use it from one thread at a time; close it, or
    use it in a `with` block, so that its pages can serve others.
    """

    def __init__(self, runtime: Runtime, expected: int = 0) -> None:
        self.runtime = runtime
        self.length = 0
        self.expected = expected  # tokens that it will have at least: it is computed in their regime from the start
        self.regime = 0
        self.page_count = 0
        self.closed = False
        self.reading = True  # no token of its own has run: what comes is the rest of a prompt, even if it is one token
        self._tokens: NDArray[np.int32] = np.zeros(64, np.int32)
        self._pages: NDArray[np.int32] = np.zeros(8, np.int32)
        self.stamp = next(_STAMPS)  # another one whenever `pages` changes, and no two sequences have the same
        self._chain: list[int] = []  # serials of the full pages, as far as they are registered
        self._before: _State | None = None  # what `restart` put aside, until the first of its tokens is in the cache

    def __del__(self) -> None:
        # May run at any moment, in the middle of the pool's own work; and before `close`, where both are called.
        if not self.closed:
            self.closed = True
            self._note_down()

    def __len__(self) -> int:
        return self.length

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The tokens so far, int32 [length]; a view."""
        return self._tokens[: self.length]

    @property
    def pages(self) -> NDArray[np.int32]:
        """The ids of its pages in order, int32 [page_count]; a view."""
        return self._pages[: self.page_count]

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
        self._check_open()
        runtime = self.runtime
        if not runtime.paged:
            return 0
        tokens = np.asarray(ids, np.int32)
        page_size = runtime.page
        self.regime = self.regime_of(len(tokens))
        parent = ROOT - self.regime
        with runtime.lock:
            runtime.collect_orphans()
            while self.length + page_size < len(tokens):
                piece = tokens[self.length : self.length + page_size]
                found = runtime.pool.find(parent, piece.tobytes())
                if found is None:
                    break
                page, parent = found
                runtime.pool.share(page)
                self._add_page(page)
                self._chain.append(parent)
                self._write_tokens(piece)
                self.length += page_size
        return self.length

    def fork(self) -> Sequence:
        """A second sequence with the same tokens. Pages are shared until one of the two writes to them."""
        self._check_open()
        other = Sequence(self.runtime, self.expected)
        other.regime = self.regime
        other._tokens = self._tokens.copy()
        with self.runtime.lock:
            for page in self.pages.tolist():
                self.runtime.pool.share(page)
            other._pages = self._pages.copy()
            other.page_count = self.page_count
        other.length, other.reading = self.length, self.reading
        other._chain = self._chain.copy()
        return other

    def rollback(self, count: int) -> None:
        """Forgets the last `count` tokens."""
        self._check_open()
        if not 0 <= count <= self.length:
            raise RuntimeStateError(f"rollback({count}) of a sequence of {self.length} tokens")
        with self.runtime.lock:
            self.length -= count
            self._release_surplus()

    def close(self) -> None:
        """Gives the pages back. Full pages stay findable as a prefix for as long as there is room.

        May be called at any moment by the collection of garbage, such as a stream's, in the middle of the pool's own
        work: so where this thread has the lock, the pages are only noted down for the next step.
        """
        if self.closed:
            return
        self.closed = True
        runtime = self.runtime
        if runtime.lock.held:
            self._note_down()
            return
        with runtime.lock:
            self.length = 0
            self._release_surplus()

    def _note_down(self) -> None:
        """Leaves the pages to whoever collects orphans next."""
        if self.page_count:
            self.runtime.orphans.append(self.pages.tolist())
        self.length = self.page_count = 0
        self._chain = []

    def regime_of(self, length: int) -> int:
        """The regime that it is computed in when it has so many tokens."""
        return self.runtime.manifest.step.regime(max(length, self.expected))

    def decodes(self, count: int) -> bool:
        """Whether the next `count` tokens decode: one token behind those that it has run. Others are a prompt's."""
        return count == 1 and self.length > 0 and not self.reading

    def changes_regime(self, count: int) -> bool:
        """Whether `count` more tokens make those in the cache useless: they are to be computed anew."""
        return self.length > 0 and self.regime_of(self.length + count) != self.regime

    def restart(self, count: int) -> NDArray[np.int32]:
        """Makes the sequence an empty one of another regime, that of `count` more tokens, and returns the tokens that
        it had, int32 [length]. Called under the runtime's lock, before `prepare` of these and the new tokens.

        Pages that are its own alone are written again, and those that are shared are left to the others. `abandon`
        undoes it as long as nothing was committed.
        """
        self._check_open()
        self._check_context(self.length + count)
        tokens = self.tokens.copy()
        regime = self.regime_of(self.length + count)
        self._before = _State(self.length, self.regime, self.pages.copy(), self._chain)
        pool = self.runtime.pool
        if self.runtime.paged:
            kept = 0
            try:
                for index, page in enumerate(self.pages.tolist()):
                    if pool.is_shared(page):
                        self._pages[index] = pool.allocate()
                    kept = index + 1
            except BaseException:
                self.page_count = kept
                self.abandon()
                raise
            for page in self.pages.tolist():
                pool.forget(page)
        self.length, self.regime, self._chain, self.stamp = 0, regime, [], next(_STAMPS)
        return tokens

    def prepare(self, ids: NDArray[np.int32]) -> None:
        """Makes room for `ids` behind the tokens there are. Called under the runtime's lock, before a step; the
        tokens count only from `commit` on. When there is no room, nothing has changed."""
        self._check_open()
        end = self.length + len(ids)
        self._check_context(end)
        self._write_tokens(ids)
        if self.length == 0 or not self.runtime.paged:
            self.regime = self.regime_of(end)
        if self.runtime.paged and len(ids):
            self._add_pages(end)

    def prepare_token(self, token: int) -> None:
        """`prepare` for one token and a cache: what decoding pays for every token."""
        self._check_open()
        end = self.length + 1
        self._check_context(end)
        if end > len(self._tokens):
            self._grow_tokens(end)
        self._tokens[self.length] = token
        self._add_pages(end)

    def _check_context(self, end: int) -> None:
        if end > self.runtime.max_context:
            raise ContextError(
                f"{end} tokens are more than the context of {self.runtime.max_context} tokens that the artifact was "
                "compiled for: shorten the prompt, or compile with a larger --max-context"
            )

    def _add_pages(self, end: int) -> None:
        """Makes pages for tokens up to `end`, and the one that the first of them goes to this sequence's own."""
        runtime = self.runtime
        page_size, pool = runtime.page, runtime.pool
        try:
            if self.length % page_size:
                # The first token goes into a page that is partly filled: it must be ours alone, and unknown to others.
                index = self.length // page_size
                page = int(self._pages[index])
                if pool.is_shared(page):
                    own = pool.allocate()
                    runtime.buffers.copy(page, own)
                    pool.release(page)
                    self._pages[index] = own
                    self.stamp = next(_STAMPS)
                else:
                    pool.forget(page)
            while self.page_count * page_size < end:
                self._add_page(pool.allocate())
        except BaseException:
            self.abandon()
            raise

    def commit(self, count: int) -> None:
        """`count` prepared tokens are in the cache now. Called under the runtime's lock, after a step."""
        self.length += count
        self.reading = False
        runtime = self.runtime
        if self._before is not None:
            self._release_shared(self._before)
        if not runtime.paged:
            return
        page_size = runtime.page
        full = self.length // page_size
        while len(self._chain) < full:
            index = len(self._chain)
            parent = self._chain[-1] if self._chain else ROOT - self.regime
            piece = self._tokens[index * page_size : (index + 1) * page_size]
            self._chain.append(runtime.pool.register(int(self._pages[index]), parent, piece.tobytes()))

    def abandon(self) -> None:
        """Undoes `prepare` and `restart`: the step did not happen. Called under the runtime's lock."""
        before, self._before = self._before, None
        if before is not None:
            own = set(before.pages.tolist())
            for page in reversed(self.pages.tolist()):
                if page not in own:
                    self.runtime.pool.release(page)
            self._pages[: len(before.pages)] = before.pages
            self.page_count, self.stamp = len(before.pages), next(_STAMPS)
            self.length, self.regime, self._chain = before.length, before.regime, before.chain
        self._release_surplus()

    def _release_shared(self, before: _State) -> None:
        """Gives up the shared pages that `restart` put others in place of."""
        self._before = None
        own = set(self.pages.tolist())
        for page in reversed(before.pages.tolist()):
            if page not in own:
                self.runtime.pool.release(page)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeStateError("this sequence is closed")

    def _release_surplus(self) -> None:
        """Gives back the pages beyond `length`, the last first: so the tail of a prefix is evicted before its head."""
        if not self.runtime.paged:
            return
        page_size = self.runtime.page
        needed = -(-self.length // page_size)
        if self.page_count > needed:
            self.stamp = next(_STAMPS)
        while self.page_count > needed:
            self.page_count -= 1
            self.runtime.pool.release(int(self._pages[self.page_count]))
        del self._chain[self.length // page_size :]

    def _add_page(self, page: int) -> None:
        if self.page_count == len(self._pages):
            self._pages = np.concatenate([self._pages, np.zeros_like(self._pages)])
        self._pages[self.page_count] = page
        self.page_count += 1
        self.stamp = next(_STAMPS)

    def _write_tokens(self, ids: NDArray[np.int32]) -> None:
        end = self.length + len(ids)
        if end > len(self._tokens):
            self._grow_tokens(end)
        self._tokens[self.length : end] = ids

    def _grow_tokens(self, end: int) -> None:
        grown = np.zeros(max(end, 2 * len(self._tokens)), np.int32)
        grown[: self.length] = self._tokens[: self.length]
        self._tokens = grown
