"""The KV cache: pages of tokens that sequences share, and the buffers the pages lie in.

A page holds PAGE consecutive tokens of one sequence, over all layers. Pages are counted: forks and equal prefixes
share them, and a page is written only while one sequence has it. A full page that is registered under its tokens, and
those of all pages before it, is found again by the next prompt that starts the same; when no sequence has it any more,
it is kept until its room is needed, the longest unused first.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.device import Device, Use
from llmc.runtime.errors import CacheFullError
from llmc.runtime.manifest import LayerCache

ROOT = 0  # the parent of a sequence's first page


class PagePool:
    """Which pages are free, used (by how many) and kept for their content. All operations take constant time.

    A page is in exactly one state: free; used (count > 0); or kept (count 0, registered). A registered page is known by
    a serial number that is never used twice, so that a child can name its parent even after that is gone.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._fresh = 0  # pages from here on have never been used: their memory is untouched
        self._free: list[int] = []
        self._count: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[tuple[int, bytes], int] = {}
        self._key_of: dict[int, tuple[int, bytes]] = {}
        self._serial_of: dict[int, int] = {}
        self._last_serial = ROOT

    @property
    def available(self) -> int:
        """Pages that `allocate` could give, those kept for their content included."""
        return self.capacity - len(self._count)

    @property
    def kept(self) -> int:
        """Pages that no sequence uses and that still hold a prefix."""
        return len(self._kept)

    def allocate(self) -> int:
        """A page with one user: a free one, or else the one kept longest."""
        if self._free:
            page = self._free.pop()
        elif self._fresh < self.capacity:
            page = self._fresh
            self._fresh += 1
        elif self._kept:
            page = self._kept.popitem(last=False)[0]
            self._forget(page)
        else:
            raise CacheFullError(
                f"the KV cache is full: all {self.capacity} pages are in use. Close sequences, or load with a larger "
                "kv_memory"
            )
        self._count[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more user."""
        count = self._count.get(page, 0)
        if count == 0:
            del self._kept[page]
        self._count[page] = count + 1

    def release(self, page: int) -> None:
        """One user less; the last one leaves a registered page kept, and any other free."""
        count = self._count[page] - 1
        if count:
            self._count[page] = count
            return
        del self._count[page]
        if page in self._key_of:
            self._kept[page] = None
        else:
            self._free.append(page)

    def is_shared(self, page: int) -> bool:
        return self._count[page] > 1

    def find(self, parent: int, tokens: bytes) -> tuple[int, int] | None:
        """(page, serial) of the registered page with these tokens after that parent. It gains no user by this."""
        page = self._page_of.get((parent, tokens))
        return None if page is None else (page, self._serial_of[page])

    def register(self, page: int, parent: int, tokens: bytes) -> int:
        """Makes a full page findable and returns its serial, or that of the page already known by this content."""
        known = self.find(parent, tokens)
        if known is not None:
            return known[1]
        self._last_serial += 1
        self._page_of[parent, tokens] = page
        self._key_of[page] = (parent, tokens)
        self._serial_of[page] = self._last_serial
        return self._last_serial

    def forget(self, page: int) -> None:
        """A used page is about to change: from now on no prompt finds it by its old content."""
        if page in self._key_of:
            self._forget(page)

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        del self._serial_of[page]

    def drop_kept(self) -> None:
        """Frees all pages that are only kept."""
        while self._kept:
            page = self._kept.popitem()[0]
            self._forget(page)
            self._free.append(page)

    def check(self) -> None:
        """Asserts the invariants; for tests."""
        free, used, kept = set(self._free), set(self._count), set(self._kept)
        assert len(free) == len(self._free)
        assert not (free & used or free & kept or used & kept)
        assert free | used | kept == set(range(self._fresh))
        assert kept <= set(self._key_of) <= used | kept
        assert set(self._serial_of) == set(self._key_of)
        assert {key: page for page, key in self._key_of.items()} == self._page_of
        assert all(count > 0 for count in self._count.values())


class CacheBuffers:
    """The memory of all pages: for each layer keys [pages, kv_heads, head_dim, page] and values
    [pages, kv_heads, page, value_dim]. Reserved whole, and where the device can, taken only as pages are written."""

    def __init__(self, device: Device, layers: tuple[LayerCache, ...], pages: int, page: int) -> None:
        self.pages = pages
        self._device = device
        self._shapes: list[tuple[tuple[int, ...], np.dtype[np.generic]]] = []
        for layer in layers:
            self._shapes.append(((pages, layer.kv_heads, layer.head_dim, page), np.dtype(layer.dtype)))
            self._shapes.append(((pages, layer.kv_heads, page, layer.value_dim), np.dtype(layer.dtype)))
        # Each with the bytes of a page in it.
        self._buffers = [
            (device.reserve(math.prod(shape) * dtype.itemsize, Use.SPARSE), math.prod(shape[1:]) * dtype.itemsize)
            for shape, dtype in self._shapes
        ]
        self._table = device.reserve(8 * max(1, len(self._buffers)), Use.TABLE)
        self._table.table((len(self._buffers),), np.uint64)[:] = [buffer.number for buffer, _ in self._buffers]

    @property
    def number(self) -> int:
        """Of the table that a step finds them by."""
        return self._table.number

    @property
    def arrays(self) -> list[NDArray[np.generic]]:
        """All layers' keys and values as they are now: for checks."""
        pairs = zip(self._buffers, self._shapes, strict=True)
        return [self._device.fetch(buffer.at(), shape, dtype) for (buffer, _), (shape, dtype) in pairs]

    def copy(self, source: int, target: int) -> None:
        """Copies one page in every layer."""
        for buffer, nbytes in self._buffers:
            self._device.copy(buffer.at(source * nbytes), buffer.at(target * nbytes), nbytes)
