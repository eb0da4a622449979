"""How fast this machine can read memory, which limits how fast single tokens are generated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import cpu

_LEAST_BYTES = 128 << 20
_MOST_BYTES = 1 << 30
_SECONDS = 0.6  # how long to try: the best round counts, as others share the machine
# Reductions that numpy vectorises; which one is fastest depends on the CPU.
_READS: tuple[Callable[[NDArray[np.uint64]], object], ...] = (np.add.reduce, np.bitwise_or.reduce)


def memory_bandwidth(threads: int, nbytes: int | None = None) -> float:
    """Bytes a second that `threads` threads together read from a buffer of `nbytes` bytes, the best of some rounds.

    By default the buffer is twice the last cache where memory allows, so that this is the speed of memory.
    """
    size = nbytes or buffer_bytes()
    # Written once, so that pages are really there: untouched ones all share one page of zeros.
    words: NDArray[np.uint64] = np.full(max(threads, size // 8), 1, np.uint64)
    parts = np.array_split(words, threads)
    best = 0.0
    end = time.perf_counter() + _SECONDS
    rounds = 0
    while time.perf_counter() < end or rounds < len(_READS):
        seconds = _read_once(parts, _READS[rounds % len(_READS)])
        best = max(best, words.nbytes / seconds)
        rounds += 1
    return best


def _read_once(parts: list[NDArray[np.uint64]], read: Callable[[NDArray[np.uint64]], object]) -> float:
    """Seconds that reading all parts takes, one thread a part."""
    helpers = [threading.Thread(target=read, args=(part,)) for part in parts[1:]]
    start = time.perf_counter()
    for helper in helpers:
        helper.start()
    read(parts[0])
    for helper in helpers:
        helper.join()
    return time.perf_counter() - start


def buffer_bytes() -> int:
    """How much to read so that it comes from memory: twice the last cache, where there is memory for it."""
    return min(max(_LEAST_BYTES, 2 * cache_bytes()), _MOST_BYTES, max(1 << 20, cpu.available_memory() // 4))


def cache_bytes() -> int:
    """Bytes of the largest cache that the system shows; 0 when it shows none."""
    return max(map(_size_in, Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")), default=0)


def _size_in(path: Path) -> int:
    try:
        text = path.read_text().strip()
        return int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    except (OSError, ValueError):
        return 0
