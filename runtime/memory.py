"""Memory of the host for compiled code: zeroed, page-aligned, and backed by memory only where it is touched."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

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


def aligned_empty(nbytes: int) -> NDArray[np.uint8]:
    """Bytes that a step may write to: 64-byte aligned, with an address also where there is none."""
    try:
        data = np.empty(nbytes + ALIGNMENT, np.uint8)
    except (MemoryError, ValueError) as error:
        raise RuntimeStateError(f"there is no memory for an array of {nbytes:,} bytes") from error
    # A slice of no elements would begin where `data` does.
    return np.ndarray((nbytes,), np.uint8, data.data, -address(data) % ALIGNMENT)


def address(array: NDArray[np.generic]) -> int:
    """Where an array's first byte lies."""
    return int(array.__array_interface__["data"][0])
