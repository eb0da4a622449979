"""Locks that `fork` waits for, so that a child never finds one held by a thread that it does not have.

A child of `fork` has one thread, and the memory as it was at that moment: a lock that another thread held then would
stay locked for ever, and what it guards would be half done. So before a fork every lock is taken, which waits for the
step under way; after it all are given back, in the parent and in the child. The pool's workers, which hold none of
these, start over in the child (`restart_in_child` in pool.c).
"""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType

from llmc.runtime.errors import RuntimeStateError

# The order in which threads take them, so that waiting for all of them ends.
STEPS, TOKENIZER, LIBRARIES = range(3)


class ForkLock:
    """A reentrant lock that a fork waits for. rank: one of those above; a thread that holds one takes none before it.

    Threads that take turns at a lock of rank `STEPS` would leave a fork no gap to get in, so they let it go first.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        self._lost = False
        with _registry:
            _locks.add(self)

    def __enter__(self) -> None:
        fork = _fork
        if fork is not None and self.rank == STEPS and self._owner != threading.get_ident():
            fork.wait()
        self.acquire()
        if self._lost:
            self.release()
            raise RuntimeStateError(
                "this process was forked in the middle of a step of another thread: load the model again in it"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this thread holds it."""
        return self._owner == threading.get_ident()

    def acquire(self) -> None:
        """Waits until no other thread holds it."""
        self._lock.acquire()
        self._owner = threading.get_ident()
        self._depth += 1

    def release(self) -> None:
        """Gives back what one `acquire` took."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    def lose(self) -> None:
        """In a child whose fork did not get it: nothing that it guards may be used."""
        self._lock = threading.RLock()
        self._owner, self._depth, self._lost = None, 0, True


_registry = threading.RLock()
_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()
_turn = threading.RLock()  # one fork at a time
_held: list[ForkLock] = []
_fork: threading.Event | None = None  # of a fork that waits or is under way; set when it is over


def _before() -> None:
    global _fork
    _turn.acquire()
    _fork = threading.Event()
    _registry.acquire()
    for lock in sorted(_locks, key=lambda lock: lock.rank):
        lock.acquire()
        _held.append(lock)


def _after() -> None:
    global _fork
    while _held:
        _held.pop().release()
    _registry.release()
    fork, _fork = _fork, None
    if fork is not None:
        fork.set()
    _turn.release()


def _after_in_child() -> None:
    held = set(_held)
    for lock in list(_locks):
        if lock not in held:  # an error, such as Ctrl-C, ended the waiting
            lock.lose()
    _after()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
