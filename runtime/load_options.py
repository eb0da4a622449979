"""What `Runtime.load` may be given."""

from __future__ import annotations

import os

from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.settings import is_integer

_MOST_THREADS = 1024  # of csrc/pool.c


def check_options(
    path: object, threads: object, verify: object, kv_memory: object, weights: object, share_weights: object
) -> None:
    """`RuntimeStateError` names the first option that is of the wrong kind, or out of range."""
    if threads is not None and not _is_count(threads, _MOST_THREADS):
        raise RuntimeStateError(f"threads must be an integer from 1 to {_MOST_THREADS}, not {threads!r:.40}")
    if kv_memory is not None and not _is_count(kv_memory, 1 << 62):
        raise RuntimeStateError(f"kv_memory must be a number of bytes, not {kv_memory!r:.40}")
    for name, choice in (("verify", verify), ("share_weights", share_weights)):
        if choice is not None and not isinstance(choice, bool):
            raise RuntimeStateError(f"{name} must be True, False or None, not {choice!r:.40}")
    for name, given in (("path", path), ("weights", weights)):
        if not isinstance(given, str | os.PathLike) and not (name == "weights" and given is None):
            raise RuntimeStateError(f"{name} must be a file's path, not {given!r:.40}")


def _is_count(value: object, most: int) -> bool:
    return is_integer(value) and 1 <= int(value) <= most
