"""What llama.cpp's converters do to rows and values of weights, undone (`Rows` and `Values` of `weights.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.types import Array


@dataclass(frozen=True)
class PairsToHalves:
    """Rows of each head from pairs (0, n/2, 1, n/2 + 1, ...), as llama.cpp rotates them, to halves (0, 1, ...).

    heads: of the tensor's rows.
    """

    heads: int

    def __call__(self, parts: list[Array]) -> Array:
        (rows,) = parts
        if rows.shape[0] % (2 * self.heads):
            raise ValueError(f"{rows.shape[0]} rows are not {self.heads} heads of pairs")
        pairs = rows.reshape(self.heads, rows.shape[0] // self.heads // 2, 2, *rows.shape[1:])
        return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class Joined:
    """Several tensors one after another along an axis: 0 for rows, 1 for rows of each expert."""

    axis: int = 0

    def __call__(self, parts: list[Array]) -> Array:
        return np.concatenate(parts, axis=self.axis)


@dataclass(frozen=True)
class Interleaved:
    """Rows of two tensors in turn, in each expert: [experts, rows, K] twice to [experts, 2 * rows, K]."""

    def __call__(self, parts: list[Array]) -> Array:
        first, second = parts
        if first.shape != second.shape or first.ndim != 3:
            raise ValueError("they are no two of one shape")
        experts, rows, inner = first.shape
        return np.stack([first, second], axis=2).reshape(experts, 2 * rows, inner)


@dataclass(frozen=True)
class Row:
    """One row of a matrix, as a vector."""

    index: int

    def shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        return shapes[0][-1:]

    def __call__(self, *parts: Array) -> Array:
        (values,) = parts
        found: Array = values.reshape(-1, values.shape[-1])[self.index]
        return found


@dataclass(frozen=True)
class Groups:
    """All queries, all keys, all values to one group after another: its queries, its key, its value.

    groups: key heads. queries: of each group.
    """

    groups: int
    queries: int

    def __call__(self, parts: list[Array]) -> Array:
        (rows,) = parts
        each = self.queries + 2
        if rows.shape[0] % (self.groups * each):
            raise ValueError(f"{rows.shape[0]} rows are not {self.groups} groups of {each} heads")
        dim = rows.shape[0] // (self.groups * each)
        kinds, begin = [], 0
        for heads in (self.queries, 1, 1):
            end = begin + self.groups * heads * dim
            kinds.append(rows[begin:end].reshape(self.groups, heads, dim, *rows.shape[1:]))
            begin = end
        return np.concatenate(kinds, axis=1).reshape(rows.shape)


@dataclass(frozen=True)
class Taken:
    """Some rows of a tensor that holds several weights one after another."""

    begin: int
    end: int

    def __call__(self, parts: list[Array]) -> Array:
        (rows,) = parts
        if self.end > rows.shape[0]:
            raise ValueError(f"it has {rows.shape[0]} rows, not {self.end}")
        return rows[self.begin : self.end]


@dataclass(frozen=True)
class KeyValueHeads:
    """What makes keys and values of latent ones, from two tensors: keys [heads, latent, dim] and values [heads, dim,
    latent] to rows of each head's key and value [heads * (dim + dim), latent]."""

    def shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        keys, values = shapes
        if len(keys) != 3 or len(values) != 3 or keys[0] != values[0] or keys[1] != values[2]:
            return ()
        return (keys[0] * (keys[2] + values[1]), keys[1])

    def __call__(self, *parts: Array) -> Array:
        keys, values = parts
        both = np.concatenate([np.swapaxes(keys, 1, 2), values], axis=1)
        return both.reshape(-1, both.shape[2])


@dataclass(frozen=True)
class Plus:
    """A number added to all values: norms that a converter has stored as 1 + w."""

    number: float

    def shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        return shapes[0]

    def __call__(self, *parts: Array) -> Array:
        (values,) = parts
        found: Array = values.astype(np.float32) + np.float32(self.number)
        return found


@dataclass(frozen=True)
class Turned:
    """The last two axes exchanged: weights that the model keeps as [inputs, outputs]."""

    def shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        (shape,) = shapes
        return (*shape[:-2], *shape[:-3:-1])

    def __call__(self, *parts: Array) -> Array:
        (values,) = parts
        found: Array = np.swapaxes(values, -1, -2) if values.ndim > 1 else values
        return found


@dataclass(frozen=True)
class Shaped:
    """Axes of 1 put in, or taken out: of small tensors whose numbers stay as they are."""

    to: tuple[int, ...]

    def shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        return self.to if math.prod(shapes[0]) == math.prod(self.to) else ()

    def __call__(self, *parts: Array) -> Array:
        (values,) = parts
        found: Array = values.reshape(self.to)
        return found
