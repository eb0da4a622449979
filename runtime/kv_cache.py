"""The KV cache: what the session layer knows of its pages, and the buffers the pages lie in.

A page holds PAGE consecutive tokens of one sequence, over all layers. Pages are counted: forks and equal prefixes
share them, and a page is written only while one sequence has it. A full page that is registered under its tokens, and
those of all pages before it, is found again by the next prompt that starts the same; when no sequence has it any more,
it is kept until its room is needed, the longest unused first. All of that is `csrc/pages.c`'s.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc.runtime.device import Device, Use
from llmc.runtime.layer import Layer
from llmc.runtime.manifest import LayerCache


class PagePool:
    """How many pages there are, and in which state. A page is in exactly one: free; used (by some sequences); or kept
    (by none, registered). Look at it while no step runs."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self.capacity: int = layer.pages.capacity

    @property
    def available(self) -> int:
        """Pages that a sequence could get, those kept for their content included."""
        pages = self._layer.pages
        return int(pages.free_count + pages.kept_count + pages.capacity - pages.fresh)

    @property
    def kept(self) -> int:
        """Pages that no sequence uses and that still hold a prefix."""
        return int(self._layer.pages.kept_count)

    @property
    def users(self) -> dict[int, int]:
        """How many sequences have each of the pages that some have."""
        users = self._array("users")
        return {page: int(users[page]) for page in np.flatnonzero(users).tolist()}

    def drop_kept(self) -> None:
        """Frees all pages that are only kept."""
        self._layer.drop_kept()

    def check(self) -> None:
        """Asserts the invariants; for tests."""
        pages = self._layer.pages
        users, serials = self._array("users"), self._array("serials", np.int64)
        free = self._array("free")[: pages.free_count].tolist()
        used, registered = np.flatnonzero(users), np.flatnonzero(serials)
        kept, page, older = [], pages.newest, self._array("older")
        while page:
            kept.append(page - 1)
            page = int(older[page - 1])
        states = [*free, *used.tolist(), *kept]
        assert sorted(states) == list(range(pages.fresh))
        assert pages.kept_count == len(kept)
        assert set(kept) <= set(registered.tolist()) <= {*used.tolist(), *kept}
        assert (users >= 0).all()
        parents = self._array("parents", np.int64)
        tokens = self._array("tokens", count=self.capacity * pages.tokens_per_page).reshape(self.capacity, -1)
        keys = {(int(parents[page]), tokens[page].tobytes()) for page in registered}
        assert len(keys) == len(registered) == len({int(serials[page]) for page in registered})

    def _array(self, name: str, dtype: DTypeLike = np.int32, count: int | None = None) -> NDArray[np.integer]:
        """A copy of one of the layer's arrays, [capacity] or [count]."""
        found: NDArray[np.integer] = np.zeros(self.capacity if count is None else count, dtype)
        ctypes.memmove(found.ctypes.data, getattr(self._layer.pages, name), found.nbytes)
        return found


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
