"""What the integers of an encoding stand for: themselves, or levels of a table whose steps are small in the middle.

Most weights of a group are small beside its largest, and even steps spend half of the integers on few weights. Levels
are whole numbers of a byte, so that kernels look a byte up and multiply it as they multiply any other.

- 4 bits: 16 levels, a little more densely spaced than normal weights want, as error feedback and heavier tails like it.
  No level is 0. The end of -68 lies further out than that of 58: the sign of the scale turns the table, so that the
  largest weight of a group meets the end that suits the others.
- 2, 3 and 5 bits: the levels of least squared error (Lloyd's) of normal weights and of heavy tails, half each, in
  groups of 64 that are scaled by their largest weight, which is positive.
- 6 bits: level q is the whole number next to q * (32 + |q|) / 16, whose steps grow from 2 in the middle to 6 at the
  ends. In groups of 64 this leaves 0.81 of the squared error of even steps with normal weights, 0.59 with heavy tails
  (Student's t of 5 degrees), and 0.65 in the embedding of the example model, whose features differ in size.

A level counts `unit`, so that a scale is about what it is with even steps, and as far from f16's ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TABLE_BITS = (2, 3, 4, 5, 6)
_BYTES: dict[int, tuple[int, ...]] = {
    2: (-72, -24, 11, 53),
    3: (-68, -40, -23, -9, 3, 16, 32, 54),
    4: (-68, -54, -43, -33, -25, -18, -11, -5, 1, 7, 13, 20, 27, 35, 45, 58),
    5: (
        -67,
        -60,
        -53,
        -47,
        -43,
        -39,
        -35,
        -32,
        -28,
        -25,
        -22,
        -18,
        -15,
        -12,
        -9,
        -5,
        -2,
        1,
        4,
        7,
        10,
        13,
        17,
        20,
        23,
        27,
        30,
        34,
        38,
        43,
        50,
        59,
    ),
    6: tuple(round(q * (32 + abs(q)) / 16) for q in range(-32, 32)),
}
_UNITS = {2: 1 / 32, 3: 1 / 16, 4: 1 / 8, 5: 1 / 4, 6: 1 / 2}


class Levels(ABC):
    """What integers from `lowest` to `highest` stand for."""

    lowest: int
    highest: int

    @abstractmethod
    def level(self, q: int) -> float:
        """The level of one integer."""

    @abstractmethod
    def gaps(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far it is from the level of each integer to the further one of its neighbours."""

    @abstractmethod
    def apply(self, q: Floats) -> None:
        """Integers to their levels, in place and exact."""

    @abstractmethod
    def find(self, values: Floats) -> None:
        """Numbers to the integers of the levels nearest to them, in place."""


@dataclass(frozen=True)
class EvenLevels(Levels):
    """Integers stand for themselves."""

    lowest: int
    highest: int

    def level(self, q: int) -> float:
        return float(q)

    def gaps(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.ones_like(q)

    def apply(self, q: Floats) -> None:
        pass

    def find(self, values: Floats) -> None:
        np.rint(values, out=values)
        np.clip(values, self.lowest, self.highest, out=values)


@dataclass(frozen=True)
class TableLevels(Levels):
    """Integers stand for bytes of a table, in order: bytes[i] * unit = values[i] is the level of lowest + i.

    The units are powers of two: every level is exact in f16 and wider.
    """

    lowest: int
    bytes: tuple[int, ...]
    unit: float
    values: Floats = field(init=False, repr=False, compare=False)
    _nearest: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = np.array(self.bytes)
        object.__setattr__(self, "values", (numbers * self.unit).astype(np.float32))
        # Between multiples of 1/2 one byte is the nearest of all: what is halfway between two is such a multiple.
        middles = np.arange(2 * numbers[0], 2 * numbers[-1]) / 2 + 1 / 4
        nearest = np.abs(middles[:, None] - numbers).argmin(axis=1) + self.lowest
        object.__setattr__(self, "_nearest", nearest.astype(np.float32))

    @property
    def highest(self) -> int:  # type: ignore[override]
        return self.lowest + len(self.bytes) - 1

    def level(self, q: int) -> float:
        return self.bytes[q - self.lowest] * self.unit

    def gaps(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        steps = np.diff(self.values.astype(np.float64))
        wider = np.maximum(np.append(steps, steps[-1]), np.insert(steps, 0, steps[0]))
        return np.asarray(wider[q.astype(np.intp) - self.lowest])

    def apply(self, q: Floats) -> None:
        np.take(self.values, (q - self.lowest).astype(np.intp), out=q, mode="clip")

    def find(self, values: Floats) -> None:
        halves = values * np.float32(2 / self.unit) - np.float32(2 * self.bytes[0])
        np.clip(halves, 0, np.float32(len(self._nearest) - 1), out=halves)
        np.take(self._nearest, halves.astype(np.intp), out=values, mode="clip")


def even_levels(bits: int, symmetric: bool) -> EvenLevels:
    """Of integers of that many bits, asymmetric ones from 0; of 8 bits from -127."""
    if not symmetric:
        return EvenLevels(0, (1 << bits) - 1)
    half = 1 << (bits - 1)
    return EvenLevels(1 - half if bits == 8 else -half, half - 1)


_TABLES = {bits: TableLevels(-(1 << (bits - 1)), found, _UNITS[bits]) for bits, found in _BYTES.items()}


def table_levels(bits: int) -> TableLevels:
    """Of integers of TABLE_BITS bits."""
    return _TABLES[bits]
