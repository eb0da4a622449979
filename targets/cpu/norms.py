"""Normalisation of rows: rms_norm and layer_norm, with a residual addition in front if wanted.

A row is read from memory once and stays in L1 for the second pass; writing it back is the limit (8 bytes an element, 16
with the residual). Statistics are f32 sums over some accumulators of a vector each.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.targets.cpu.builder import let
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.row_norm import RowNorm
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import for_pieces, load, range_kernel, remainder, store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc


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
    norm = RowNorm(problem.kind, features, problem.eps, problem.weight_offset)

    def row(a: SimpleNamespace, u: Expr) -> None:
        base = let(u * features)
        source = a.x
        if problem.residual:
            source = a.total
            _add_rows(a, base, features, lanes)
        row_norm = norm.statistics(lambda offset, width: load(source, base + offset, width), lanes, chains)
        parameters = let(remainder(u, problem.groups) * features) if problem.groups > 1 else 0

        def normalise(offset: Expr | int, width: int) -> None:
            weight = load(a.weight, parameters + offset, width) if problem.weight else None
            bias = load(a.bias, parameters + offset, width) if problem.bias else None
            store(a.out, base + offset, row_norm.normalise(load(source, base + offset, width), weight, bias))

        for_pieces(features, lanes, normalise)

    return range_kernel([(name, "float32") for name in names], [], row)


def _add_rows(a: SimpleNamespace, base: Expr, features: int, lanes: int) -> None:
    """total = x + addend, a row."""

    def piece(offset: Expr | int, width: int) -> None:
        at = base + offset
        store(a.total, at, load(a.x, at, width) + load(a.addend, at, width))

    for_pieces(features, lanes, piece)
