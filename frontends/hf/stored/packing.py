"""Integers of a few bits in words of 32, and what every format of packed integers checks about its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError
from llmc.frontends.lifted import WeightSource

Change = Callable[[Array], Array]
PACKED_BITS = (2, 3, 4, 8)


def unpack(words: Array, bits: int, count: int) -> Array:
    """u8 [..., count] of i32 or u32 [..., W]: integers of 2, 3, 4 or 8 bits, lowest bits first, each behind the one
    before, across the ends of words too. ValueError where the words do not hold so many."""
    held = words.shape[-1] * 32 // bits
    if bits not in PACKED_BITS or count > held:
        raise ValueError(f"{words.shape[-1]} words do not hold {count} integers of {bits} bits")
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data[..., :count]
    # So many bytes hold a whole number of integers: 3 bytes have 8 of 3 bits.
    size = 3 if bits == 3 else 1
    rest = -data.shape[-1] % size
    if rest:
        data = np.concatenate([data, np.zeros((*data.shape[:-1], rest), np.uint8)], axis=-1)
    whole: Array = data[..., 0::size].astype(np.uint32 if size > 1 else np.uint8)
    for index in range(1, size):
        whole = whole | data[..., index::size].astype(np.uint32) << np.uint32(8 * index)
    shifts = (np.arange(8 * size // bits) * bits).astype(whole.dtype)
    found: Array = ((whole[..., None] >> shifts) & whole.dtype.type((1 << bits) - 1)).astype(np.uint8)
    return found.reshape(*data.shape[:-1], math.prod(found.shape[-2:]))[..., :count]


def pack(integers: Array, bits: int) -> Array:
    """i32 [..., W] of u8 [..., n] below 2^bits: what `unpack` takes apart. Zeros fill the last word."""
    if bits not in PACKED_BITS:
        raise ValueError(f"integers of {bits} bits are not packed")
    size = 3 if bits == 3 else 1  # bytes that hold a whole number of integers
    count = 8 * size // bits
    each = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, -integers.shape[-1] % (32 * size // bits))])
    each = each.reshape(*each.shape[:-1], -1, count).astype(np.uint32 if size > 1 else np.uint8)
    shifts = (np.arange(count) * bits).astype(each.dtype)
    whole = np.bitwise_or.reduce(each << shifts, axis=-1)
    data = np.stack([(whole >> whole.dtype.type(8 * at)).astype(np.uint8) for at in range(size)], axis=-1)
    words = np.ascontiguousarray(data.reshape(*integers.shape[:-1], -1)).view(np.int32)
    return words[..., : -(-integers.shape[-1] * bits // 32)]


@dataclass(frozen=True)
class Module:
    """The tensors of a quantized layer: `name.qweight` and so on. None of them is read before it is asked for."""

    file: WeightSource
    name: str
    names: frozenset[str] = field(repr=False)  # of all of the file's tensors

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.names

    def shape(self, part: str) -> tuple[int, ...]:
        return self.file.shape(self._found(part))

    def dtype(self, part: str) -> str:
        return self.file.dtype(self._found(part))

    def load(self, part: str) -> Array:
        return self.file.load(self._found(part))

    def _found(self, part: str) -> str:
        if not self.has(part):
            raise self.wrong(f"its {part} is missing")
        return f"{self.name}.{part}"

    def later(self, part: str, change: Change) -> Callable[[], Array]:
        """A tensor when it is asked for, changed."""
        return lambda: change(self.load(part))

    def wrong(self, why: str) -> FrontendError:
        """What to raise for a layer whose tensors do not fit."""
        return FrontendError(f"the checkpoint's layer {self.name:.100}: {why}")

    def require(self, part: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """FrontendError for a tensor that is missing, or of another dtype or shape (-1: any size)."""
        found, dtype = self.shape(part), self.dtype(part)
        if 0 in found:
            raise self.wrong(f"its {part} is {list(found)}, with nothing in it")
        fits = len(found) == len(shape) and all(b in (-1, a) for a, b in zip(found, shape, strict=True))
        if not fits or dtype not in dtypes:
            expected = f"{' or '.join(dtypes)} [{', '.join('any' if d < 0 else str(d) for d in shape)}]"
            raise self.wrong(f"its {part} is {dtype} {list(found)}, expected {expected}")


def modules_with(file: WeightSource, part: str) -> list[Module]:
    """Every layer that has a tensor of this name."""
    ending, names = f".{part}", frozenset(file.names)
    return [Module(file, name.removesuffix(ending), names) for name in sorted(names) if name.endswith(ending)]


def blocks_of(module: Module, group_of: Array, groups: int) -> tuple[int, Array | None]:
    """How many inputs each group has, 0 if they differ; the inputs in the order of their groups, None if they come so.

    group_of: the group of each input, below `groups`. FrontendError where a group has no input or an input no group.
    """
    if not 1 <= groups <= len(group_of):
        raise module.wrong(f"it has {groups} groups for {len(group_of)} inputs")
    if group_of.min() < 0 or group_of.max() >= groups:
        raise module.wrong(f"its g_idx names groups {group_of.min()} to {group_of.max()}, of {groups}")
    counts = np.bincount(group_of, minlength=groups)
    if (counts == 0).any():
        raise module.wrong(f"no input is in group {int(np.argmin(counts))} of its {groups} groups: it is damaged")
    block = int(counts[0])
    if (counts[:-1] != block).any() or counts[-1] > block:
        return 0, None
    order = np.argsort(group_of, kind="stable").astype(np.int32)
    return block, None if bool((order[1:] > order[:-1]).all()) else order
