"""Buffers for compiled code: zeroed, page-aligned, and backed by memory only where they are touched."""

from __future__ import annotations

import math
import mmap

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc.runtime.errors import RuntimeStateError

_ALIGNMENT = 64
_NORESERVE = 0x4000  # Linux: address space is not counted as used memory


def reserve(shape: tuple[int, ...], dtype: DTypeLike, huge_pages: bool = False) -> NDArray[np.generic]:
    """Zeros of this shape, 4096-byte aligned. The system gives memory page by page, when first written."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    nbytes = max(1, count * kind.itemsize)
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, OverflowError) as error:
        raise RuntimeStateError(
            f"{nbytes / 2**20:.0f} MiB of address space could not be reserved: lower kv_memory or the process's limits"
        ) from error
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, kind, count).reshape(shape)


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
    """An array that a step may write to: 64-byte aligned, with an address also where it has no element."""
    kind = np.dtype(dtype)
    count = math.prod(shape)
    try:
        data = np.empty(count * kind.itemsize + _ALIGNMENT, np.uint8)
    except (MemoryError, ValueError) as error:
        raise RuntimeStateError(f"there is no memory for an array of {count * kind.itemsize:,} bytes") from error
    start = -address(data) % _ALIGNMENT
    return np.ndarray(shape, kind, data.data, start)


def address(array: NDArray[np.generic]) -> int:
    """Where an array's first byte lies."""
    return int(array.__array_interface__["data"][0])
