"""Normalisation of rows: rms_norm and layer_norm, with a residual addition in front if wanted.

A row is read from memory once and stays in L1 for the second pass; writing it back is the limit (8 bytes an element, 16
with the residual). Statistics are f32 sums over some accumulators of a vector each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.targets.cpu.builder import let, loop, scratch
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import (
    add,
    for_pieces,
    load,
    pieces,
    pin,
    range_kernel,
    reciprocal_root,
    reduce_lanes,
    remainder,
    splat,
    store,
)
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc


@dataclass(frozen=True)
class NormProblem(Problem):
    """One unit is one row of `features` numbers. All f32:

        x [units, features], [addend [units, features], total [units, features]], [weight [groups, features]],
        [bias [groups, features]], out [units, features]

    kind "rms": x / sqrt(mean(x^2) + eps); "layer": (x - mean(x)) / sqrt(variance(x) + eps); then `* (weight_offset +
    weight) + bias`, as far as present. With `residual`, x + addend takes the place of x and is written to `total`.
    `total` may be the same buffer as x or addend, `out` the same as x.

    For a norm over each head of [T, heads, D]: features = D, and `groups` = heads only if every head has its own
    weights (weight [heads, D]); with one weight vector for all heads it is 1, and there are T * heads units.
    """

    kind: str
    features: int
    eps: float
    weight: bool = True
    bias: bool = False
    weight_offset: int = 0
    residual: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"norm: kind must be 'rms' or 'layer', not {self.kind!r}")


@dataclass(frozen=True)
class Norm(CpuTemplate[NormProblem], name="norm"):
    """A row at a time. chains: independent sums of a vector each, since an addition takes some cycles. least: numbers
    in a call that are worth a thread."""

    chains: int = knob(1, 2, 4, 8, exact=False)
    least: int = knob(1024, 2048, 4096, 8192, 16384, code=False)

    @classmethod
    def default(cls, problem: NormProblem, machine: Machine, rows: Rows = ANY_ROWS) -> Norm:
        return cls(chains=4, least=4096)

    def stack_bytes(self, problem: NormProblem, machine: Machine) -> int:
        sums = self.chains * (1 + (problem.kind == "layer"))
        return arrays(*[4 * isa_for(machine).lanes] * sums)

    def grain(self, problem: NormProblem) -> int:
        return max(1, self.least // problem.features)

    def build(self, problem: NormProblem, machine: Machine) -> PrimFunc:
        return _norm(problem, isa_for(machine).lanes, self.chains)


def _norm(problem: NormProblem, lanes: int, chains: int) -> PrimFunc:
    features = problem.features
    names = ["x"] + ["addend", "total"] * problem.residual + ["weight"] * problem.weight + ["bias"] * problem.bias
    names.append("out")

    def row(a: SimpleNamespace, u: Expr) -> None:
        base = pin(u * features)
        source = a.x
        if problem.residual:
            source = a.total
            _add_rows(a, base, features, lanes)

        def total(term: Callable[[Expr], Expr]) -> Expr:
            return _row_sum(source, base, features, lanes, chains, term)

        mean = let(total(lambda v: v) * (1.0 / features)) if problem.kind == "layer" else None
        scale = reciprocal_root(_centred_squares(total, mean), features, problem.eps)
        parameters = pin(remainder(u, problem.groups) * features) if problem.groups > 1 else 0

        def normalise(offset: Expr | int, width: int) -> None:
            value = load(source, base + offset, width)
            if mean is not None:
                value = value - splat(mean, width)
            value = value * splat(scale, width)
            if problem.weight:
                factor = load(a.weight, parameters + offset, width)
                extra = problem.weight_offset
                value = value * (factor + splat(float(extra), width) if extra else factor)
            if problem.bias:
                value = value + load(a.bias, parameters + offset, width)
            store(a.out, base + offset, value, width)

        for_pieces(features, lanes, normalise)

    return range_kernel([(name, "float32") for name in names], [], row)


def _add_rows(a: SimpleNamespace, base: Expr, features: int, lanes: int) -> None:
    """total = x + addend, a row."""

    def piece(offset: Expr | int, width: int) -> None:
        at = base + offset
        store(a.total, at, load(a.x, at, width) + load(a.addend, at, width), width)

    for_pieces(features, lanes, piece)


def _centred_squares(total: Callable[[Callable[[Expr], Expr]], Expr], mean: Expr | None) -> Expr:
    """Sum of (x - mean)^2 over the row."""

    def square(value: Expr) -> Expr:
        width = int(value.ty.dtype.lanes)
        centred = let(value if mean is None else value - splat(mean, width))
        return centred * centred

    return total(square)


def _row_sum(source: Buffer, base: Expr, features: int, lanes: int, chains: int, term: Callable[[Expr], Expr]) -> Expr:
    """The sum of term(x) over one row, in `chains` vector accumulators."""
    sums = [scratch(lanes, "float32") for _ in range(chains)]
    for chain in sums:
        store(chain, 0, splat(0.0, lanes), lanes)
    stride = lanes * chains
    if features // stride:
        with loop(features // stride) as number:
            for i, chain in enumerate(sums):
                value = term(load(source, base + number * stride + i * lanes, lanes))
                store(chain, 0, load(chain, 0, lanes) + value, lanes)
    done = features // stride * stride
    for i, (offset, width) in enumerate(pieces(features - done, lanes)):
        chain = sums[i % chains]
        store(chain, 0, load(chain, 0, width) + term(load(source, base + done + offset, width)), width)
    parts = [load(chain, 0, lanes) for chain in sums]
    while len(parts) > 1:
        parts = [one + other for one, other in zip(parts[::2], parts[1::2], strict=True)]
    return reduce_lanes(parts[0], lanes, add)
