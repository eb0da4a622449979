"""Values of encoded tensors and of KV caches while a graph is evaluated in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.ir.types import KV, Array, Encoding, numpy_dtype

PAGE = 32  # tokens a page of the KV cache


@dataclass(frozen=True)
class Encoded:
    """An encoded tensor: its parts (such as integers and scales) by name, as `encoding` defines them."""

    encoding: Encoding
    shape: tuple[int, ...]
    parts: Mapping[str, Array] = field(default_factory=dict)

    def decode(self) -> Array:
        """The logical values, f32 (f64 inside `precise()`)."""
        from llmc.compiler.encodings import decode

        return decode(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts as they are stored, before a target packs them."""
        from llmc.compiler.encodings import stored_bytes

        return stored_bytes(self.encoding, self.shape)


def decoded(value: Array | Encoded) -> Array:
    """Logical values of a weight, encoded or not."""
    return value.decode() if isinstance(value, Encoded) else value


@dataclass(frozen=True)
class Pages:
    """A layer's cache: keys [pages, heads, key_dim, PAGE] and values [pages, heads, PAGE, value_dim]."""

    keys: Array
    values: Array

    @classmethod
    def empty(cls, kind: KV, pages: int) -> Pages:
        dtype = numpy_dtype(kind.dtype)
        return cls(
            np.zeros((pages, kind.heads, kind.key_dim, PAGE), dtype),
            np.zeros((pages, kind.heads, PAGE, kind.value_dim), dtype),
        )

    def append(self, keys: Array, values: Array, slots: Array) -> Pages:
        """A copy with tokens' keys [T, heads, key_dim] and values [T, heads, value_dim] at `slots` [T]."""
        new_keys, new_values = self.keys.copy(), self.values.copy()
        page, offset = slots // PAGE, slots % PAGE
        new_keys[page, :, :, offset] = keys
        new_values[page, :, offset, :] = values
        return Pages(new_keys, new_values)

    def sequence(self, block_table: Array, length: int) -> tuple[Array, Array]:
        """Keys [length, heads, key_dim] and values [length, heads, value_dim] of one sequence."""
        used = block_table[: -(-length // PAGE)]
        keys = self.keys[used].transpose(0, 3, 1, 2).reshape(-1, *self.keys.shape[1:3])
        values = self.values[used].transpose(0, 2, 1, 3).reshape(-1, self.values.shape[1], self.values.shape[3])
        return keys[:length], values[:length]
