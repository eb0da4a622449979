"""Memory of the host for compiled code: zeroed, page-aligned, and backed by memory only where it is touched."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc.runtime.device import ALIGNMENT
from llmc.runtime.errors import RuntimeStateError

_NORESERVE = 0x4000  # Linux: address space is not counted as used memory


def reserve(nbytes: int, huge_pages: bool = False) -> NDArray[np.uint8]:
    """Zeros, uint8 [nbytes], 4096-byte aligned. The system gives memory page by page, when first written."""
    try:
        mapping = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, OverflowError) as error:
        raise RuntimeStateError(
            f"{nbytes / 2**20:.0f} MiB of address space could not be reserved: lower kv_memory or the process's limits"
        ) from error
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8, nbytes)


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array that a step may write to: 64-byte aligned, with an address also where it has no element."""
    kind = np.dtype(dtype)
    count = math.prod(shape)
    try:
        data = np.empty(count * kind.itemsize + ALIGNMENT, np.uint8)
    except (MemoryError, ValueError) as error:
        raise RuntimeStateError(f"there is no memory for an array of {count * kind.itemsize:,} bytes") from error
    start = -address(data) % ALIGNMENT
    return np.ndarray(shape, kind, data.data, start)


def address(array: NDArray[np.generic]) -> int:
    """Where an array's first byte lies."""
    return int(array.__array_interface__["data"][0])
