"""Which bits are worth most: each weight of a model gets more or fewer of them than was asked for, by what it costs.

What the model loses by one weight alone is measured with the weight rounded as it was asked for (`sensitivity.py`), and
goes with the square of what the layer's outputs are off by, which rounding knows for all other numbers of bits. The sum
over all weights stands for what the model loses. Where that was not measured, what outputs are off by counts alike in
all layers, and no weight gets fewer bits.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
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
from llmc.errors import CompileError

MORE = 0.1  # bits a weight, over all weights, that are spent where nobody says how many
STEPS, FEWER = 2, 1  # numbers of bits above and below its own that a weight is tried with
PARTS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
_NAME = re.compile(r"[\w.-]+")  # of params that an override can name

Kept = Mapping[Quantize, Sequence[Rounded]]  # first as it was asked for, then otherwise
Losses = Mapping[Quantize, float]  # of the model, by each weight alone as it was asked for


@dataclass(frozen=True)
class Choice:
    """One way to store a weight. bits: in all. noise: what the model loses by it."""

    bits: int
    noise: float


@dataclass(frozen=True)
class Matrix:
    """Some rows of a weight that other rows have been merged with, or all. key: what they are made of."""

    key: Hashable
    names: tuple[str, ...]
    rows: slice


def others(kind: GroupQuantized) -> tuple[GroupQuantized, ...]:
    """What a weight may be rounded to instead of an encoding, from few bits to many: one number of bits fewer, where
    there are levels of a table, and two that are more. None where it is good enough."""
    more = [bits for bits in (*TABLE_BITS, 8) if bits > kind.bits and fits(bits, kind.group)][:STEPS]
    fewer = [bits for bits in TABLE_BITS if bits < kind.bits and fits(bits, kind.group)][-FEWER:]
    found = (*(fewer if more and kind.table else ()), *more)
    return tuple(GroupQuantized(bits, kind.group, table=bits in TABLE_BITS, per_row=kind.per_row) for bits in found)


def usable(weights: Iterable[Quantize], overrides: Overrides) -> list[Quantize]:
    """Those of the weights that may get other bits: the user has asked for nothing of their own, and each of their
    params can be named, and is in no other weight. What passes have merged stays in one encoding."""
    weights = list(weights)
    taken = Counter(name for weight in weights for name in _names(weight))
    return [
        weight for weight in weights
        if (names := _names(weight))
        and all(_NAME.fullmatch(name) and taken[name] == 1 and not overrides.of([name]) for name in names)
    ]  # fmt: skip


def saved(weights: Iterable[Quantize], overrides: Overrides) -> int:
    """Bits that these weights could do without."""
    bits = 0
    for weight in usable(weights, overrides):
        own = grouped(weight.tensor.encoding)  # type: ignore[arg-type]
        sizes = [_bits(kind, weight.shape) for kind in (own, *others(own))]
        bits += sizes[0] - min(sizes)
    return bits


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


def spent_on(kept: Kept, most: float, overrides: Overrides, losses: Losses | None) -> dict[str, str]:
    """Schemes, by names of params, of weights that get other bits than they were asked for: `most` more in all.
    overrides: what the user has asked for, which stays. losses: None where they were not measured; a weight without
    one stays as it was asked for. CompileError where weights take more bits in any case."""
    free = [weight for weight in usable(kept, overrides) if losses is None or weight in losses]
    choices = [_choices(kept[weight], None if losses is None else losses[weight]) for weight in free]
    left = most
    for weight, each in zip(free, choices, strict=True):
        own = next(choice for choice, rounded in each if rounded is kept[weight][0])
        left += own.bits - each[0][0].bits
    if left < 0:
        raise CompileError(
            "--bits-per-weight: the weights of this model cannot be rounded to so few bits; give more, or less to some "
            "(--embedding int4, --head int4)"
        )
    taken = spend([[choice for choice, _ in each] for each in choices], left)
    return {
        name: f"int{grouped(each[number][1].encoded.encoding).bits}"
        for weight, each, number in zip(free, choices, taken, strict=True)
        if each[number][1] is not kept[weight][0]
        for name in sorted(_names(weight))
    }


def budgets(kept: Kept, least: float) -> list[float]:
    """Bits to spend that are tried in turn where it has to be found how many do: the least, and parts of what all
    matrices take in their finest encoding."""
    sizes = [[_bits(grouped(each.encoded.encoding), each.encoded.shape) for each in found] for found in kept.values()]
    most = float(sum(max(size) - size[0] for size in sizes))
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


def _names(weight: Quantize) -> frozenset[str]:
    """The params that a weight is made of."""
    return frozenset(name for matrix in matrices(weight) for name in matrix.names)


def _choices(found: Sequence[Rounded], loss: float | None) -> list[tuple[Choice, Rounded]]:
    """What a weight may become, from few bits to many. loss: the model's, by the first of them."""
    parts = [float(each.errors.sum()) / (float(each.powers.sum()) or 1.0) for each in found]
    unit = 1.0 if loss is None else loss / parts[0] if parts[0] > 0 else 0.0
    choices = [
        (Choice(_bits(grouped(each.encoded.encoding), each.encoded.shape), unit * part), each)
        for each, part in zip(found, parts, strict=True)
    ]
    fewest = choices[0][0].bits if loss is None else 0
    return sorted((each for each in choices if each[0].bits >= fewest), key=lambda each: each[0].bits)


def _bits(kind: GroupQuantized, shape: Sequence[object]) -> int:
    rows, inputs = shape
    assert isinstance(rows, int) and isinstance(inputs, int)
    return 8 * stored_bytes(kind, (rows, inputs))
