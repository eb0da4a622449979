"""The arithmetic of rms_norm and layer_norm, for every kernel that normalises rows or heads, on its own or on the way.

Statistics are f32 sums over some vectors each, added up by halves; what a tail is cut into is part of that order. So a
row has the same bits wherever it is normalised, as long as the number of these sums is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from llmc.targets.cpu.builder import let, loop, scratch
from llmc.targets.cpu.vectors import add, load, pieces, reduce, splat, store

if TYPE_CHECKING:
    from tvm.tirx import Expr

    Read: TypeAlias = Callable[[Expr | int, int], Expr]  # (offset, width) -> `width` numbers of the row, f32


@dataclass(frozen=True)
class RowNorm:
    """Of rows of `features` numbers. kind "rms": x / sqrt(mean(x^2) + eps); "layer": (x - mean(x)) / sqrt(variance(x) +
    eps); then `* (weight + weight_offset) + bias`, as far as present."""

    kind: str
    features: int
    eps: float
    weight_offset: float = 0.0

    def statistics(self, read: Read, lanes: int, chains: int, unrolled: bool = False) -> Statistics:
        """Emit those of a row. chains: independent sums of a vector each, a power of two. unrolled: of a short row."""
        from tvm import tirx

        def total(term: Callable[[Expr], Expr]) -> Expr:
            return _row_sum(read, self.features, lanes, chains, unrolled, term)

        mean = let(total(lambda v: v) * (1.0 / self.features)) if self.kind == "layer" else None

        def square(value: Expr) -> Expr:
            centred = let(value if mean is None else value - mean)
            return centred * centred

        variance = total(square) * (1.0 / self.features)
        scale = let(tirx.const(1.0, "float32") / tirx.sqrt(variance + tirx.const(self.eps, "float32")))
        return Statistics(self, mean, scale)


@dataclass(frozen=True)
class Statistics:
    """A row's mean (None where it is not taken), and what its centred numbers are multiplied by: f32 scalars."""

    norm: RowNorm
    mean: Expr | None
    scale: Expr

    def normalise(self, value: Expr, weight: Expr | None, bias: Expr | None = None) -> Expr:
        """Some of the row's numbers, with the weights and biases of the same places."""
        if self.mean is not None:
            value = value - self.mean
        value = value * self.scale
        if weight is not None:
            offset = self.norm.weight_offset
            value = value * (weight + float(offset) if offset else weight)
        return value if bias is None else value + bias


def _row_sum(read: Read, features: int, lanes: int, chains: int, unrolled: bool, term: Callable[[Expr], Expr]) -> Expr:
    """The sum of term(x) over one row, in `chains` vector accumulators."""
    sums = [scratch(lanes, "float32") for _ in range(chains)]
    for chain in sums:
        store(chain, 0, splat(0.0, lanes))
    stride = lanes * chains
    rounds = 0 if unrolled else features // stride
    if rounds:
        with loop(rounds) as number:
            for i, chain in enumerate(sums):
                value = term(read(number * stride + i * lanes, lanes))
                store(chain, 0, load(chain, 0, lanes) + value)
    done = rounds * stride
    for i, (offset, width) in enumerate(pieces(features - done, lanes)):
        chain = sums[i % chains]
        store(chain, 0, load(chain, 0, width) + term(read(done + offset, width)))
    parts = [load(chain, 0, lanes) for chain in sums]
    while len(parts) > 1:
        parts = [one + other for one, other in zip(parts[::2], parts[1::2], strict=True)]
    return reduce(parts[0], add)
