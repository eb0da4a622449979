"""Where more bits are worth most: of all matrices of a model, the few whose rounding disturbs their layers most.

What a layer's outputs lose is counted against the outputs themselves, and the sum over all layers stands for what the
model loses. In the example model this orders matrices nearly as the divergence of the whole model does when each of
them alone is rounded (one of 57 has a sixth of all of it), and it costs nothing: rounding knows it already.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.compiler.encodings.feedback import Rounded
from llmc.compiler.encodings.grouped import GroupQuantized, fits, grouped, stored_bytes
from llmc.compiler.encodings.levels import TABLE_BITS
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.structural import Concat
from llmc.compiler.passes.rewriting import uncast
from llmc.compiler.passes.schemes import Overrides, param_names

MORE = 0.1  # bits a weight, over all weights, that are spent where nobody says how many
STEPS = 2  # numbers of bits beyond its own that a weight is tried with
PARTS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
_NAME = re.compile(r"[\w.-]+")  # of params that an override can name

Kept = Mapping[Quantize, Sequence[Rounded]]  # from few bits to many


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix. bits: in all. noise: the mean square by which the outputs of its layer change, as a
    part of their own."""

    bits: int
    noise: float


@dataclass(frozen=True)
class Matrix:
    """Some rows of a weight that other rows have been merged with, or all. key: what they are made of."""

    key: Hashable
    names: tuple[str, ...]
    rows: slice


@dataclass(frozen=True)
class Unit:
    """Matrices of a weight that have one encoding in common. names: of their params; none where no override can tell
    them from others."""

    weight: Quantize
    names: frozenset[str]
    rows: tuple[slice, ...]


def finer(kind: GroupQuantized) -> tuple[GroupQuantized, ...]:
    """What a matrix that needs more bits than an encoding has may be rounded to instead, from few bits to many; none
    where it is good enough."""
    more = [bits for bits in (*TABLE_BITS, 8) if bits > kind.bits and fits(bits, kind.group)][:STEPS]
    return tuple(GroupQuantized(bits, kind.group, table=bits in TABLE_BITS, per_row=kind.per_row) for bits in more)


def spend(units: Sequence[Sequence[Choice]], most: float) -> list[int]:
    """Which choice of each unit is taken: the first of each at least, and then, while no more than `most` bits more are
    used, the next one wherever a bit removes most noise. Choices of a unit go from few bits to many."""
    taken, left = [0] * len(units), most
    steps: list[tuple[float, int]] = []  # what a bit gains, negative, and for which unit

    def offer(unit: int) -> None:
        if taken[unit] + 1 < len(units[unit]):
            before, after = units[unit][taken[unit] : taken[unit] + 2]
            heapq.heappush(steps, ((after.noise - before.noise) / max(1, after.bits - before.bits), unit))

    for unit in range(len(units)):
        offer(unit)
    while steps:
        gain, unit = heapq.heappop(steps)
        before, after = units[unit][taken[unit] : taken[unit] + 2]
        if gain < 0 and after.bits - before.bits <= left:
            left -= after.bits - before.bits
            taken[unit] += 1
            offer(unit)
    return taken


def spent_on(kept: Kept, together: Collection[Quantize], most: float, overrides: Overrides) -> dict[str, str]:
    """Schemes, by names of params, that `most` bits more go to. together: weights whose matrices stay in one encoding.
    overrides: what the user has asked for, which stays."""
    units = list(_units(kept, together, overrides))
    taken = spend([[_choice(unit, each) for each in kept[unit.weight][: None if unit.names else 1]] for unit in units],
                  most)  # fmt: skip
    return {
        name: f"int{grouped(kept[unit.weight][number].encoded.encoding).bits}"
        for unit, number in zip(units, taken, strict=True)
        if number
        for name in sorted(unit.names)
    }


def budgets(kept: Kept, least: float) -> list[float]:
    """Bits to spend that are tried in turn where it has to be found how many do: the least, and parts of what all
    matrices take in their finest encoding."""
    sizes = [[8 * stored_bytes(each.encoded.encoding, each.encoded.shape) for each in found] for found in kept.values()]
    most = float(sum(size[-1] - size[0] for size in sizes))
    return [least, *(part * most for part in PARTS if part * most > least)]


@dataclass(frozen=True)
class Assembly:
    """A weight put together of rows of weights that were rounded. pieces: where they are, in order."""

    weight: Quantize
    pieces: Sequence[tuple[Encoded, slice]]

    def encoded(self) -> Encoded:
        """What the weight becomes; made anew each time, as all weights may not fit the memory."""
        first = self.pieces[0][0]
        parts = {
            name: np.concatenate([encoded.parts[name][rows] for encoded, rows in self.pieces]) for name in first.parts
        }
        return Encoded(first.encoding, parts["q"].shape, parts)


def assemblies(weights: Iterable[Quantize], kept: Kept) -> list[Assembly]:
    """Weights that may be merged and encoded otherwise than those that were rounded. KeyError where a matrix was not
    rounded in the encoding that it has now."""
    found = {
        (matrix.key, str(each.encoded.encoding)): (each.encoded, matrix.rows)
        for weight, choices in kept.items()
        for matrix in matrices(weight)
        for each in choices
    }
    return [Assembly(weight, [found[matrix.key, weight.encoding] for matrix in matrices(weight)]) for weight in weights]


def matrices(weight: Quantize) -> list[Matrix]:
    """What a weight is merged of, in order."""
    return merged(weight.w)


def merged(weight: Value) -> list[Matrix]:
    """What a weight that is not rounded is merged of, in order."""
    base = uncast(weight)
    found, start = [], 0
    for each in base.xs if isinstance(base, Concat) and base.axis == 0 else (base,):
        rows = each.shape[0]
        assert isinstance(rows, int)
        found.append(Matrix(_made_of(uncast(each)), param_names(each), slice(start, start + rows)))
        start += rows
    return found


def _made_of(value: Value) -> Hashable:
    """The same for values that are computed alike from the same params."""
    if isinstance(value, Param):
        return value.name
    assert isinstance(value, Op)
    return value.name, tuple(value.attributes().items()), tuple(map(_made_of, value.operands))


def _units(kept: Kept, together: Collection[Quantize], overrides: Overrides) -> Iterator[Unit]:
    users = Counter(name for weight in kept for matrix in matrices(weight) for name in matrix.names)
    for weight in kept:
        parts = matrices(weight)
        apart = weight not in together and all(users[name] == 1 for part in parts for name in part.names)
        for group in [[part] for part in parts] if apart else [parts]:
            names = frozenset(name for part in group for name in part.names)
            here = Counter(name for part in group for name in part.names)
            usable = names and all(
                _NAME.fullmatch(name) and users[name] == here[name] and not overrides.of([name]) for name in names
            )
            yield Unit(weight, names if usable else frozenset(), tuple(part.rows for part in group))


def _choice(unit: Unit, found: Rounded) -> Choice:
    encoding, inputs = found.encoded.encoding, found.encoded.shape[-1]
    bits = sum(8 * stored_bytes(encoding, (rows.stop - rows.start, inputs)) for rows in unit.rows)
    errors, powers = (sum(float(each[rows].sum()) for rows in unit.rows) for each in (found.errors, found.powers))
    return Choice(bits, errors / powers if powers > 0 else 0.0)
