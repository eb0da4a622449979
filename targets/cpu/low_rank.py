"""What adapters add to linear ops: two thin products for each token that has an adapter, and nothing for others.

The first streams the rows of A that the adapter has, against the token's activations; the second those of B, into the
token's sums, where they lie. Tables are f32, which holds what adapters are stored in (f32, f16, bf16) as it is; for one
token the memory is the limit: 4 bytes a number of A and B, of the ranks that there are. A token's sums are added up in
one order whatever its company.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for
from llmc.targets.cpu.vector_math import activation
from llmc.targets.cpu.vectors import add, divide, integer, load, range_kernel, reduce, remainder, splat, store
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc


@dataclass(frozen=True)
class InnerProblem(Problem):
    """inner[t, p, r] = a[s, p, r] . x[t] for r below ranks[s, p], with s = adapters[t]. Arguments:

    x f32[T, k], adapters i32[T], a f32[entries, parts, rank, k], ranks i32[entries, parts], inner f32[T, parts, rank],
    of which the rest holds anything. A unit is some ranks of a part of a token, u = (t * parts + p) * blocks + block.
    """

    k: int
    parts: int
    rank: int


@dataclass(frozen=True)
class LowRankInner(CpuTemplate[InnerProblem], name="low_rank_inner"):
    """rows: of A, that a unit multiplies at once, so that activations are read as often. chains: sums of a vector each,
    for each of these rows. least: bytes of A that are worth a thread."""

    rows: int = knob(1, 2, 4, 8)
    chains: int = knob(1, 2, 4, exact=False)
    least: int = knob(1 << 12, 1 << 14, 1 << 16, code=False)

    @classmethod
    def default(cls, problem: InnerProblem, machine: Machine, rows: Rows = ANY_ROWS) -> LowRankInner:
        return cls(rows=4, chains=2, least=1 << 14)

    def blocks(self, problem: InnerProblem) -> int:
        """Units of a part of a token."""
        return -(-problem.rank // self.rows)

    def grain(self, problem: InnerProblem) -> int:
        return max(1, self.least // (4 * self.rows * problem.k))

    def stack_bytes(self, problem: InnerProblem, machine: Machine) -> int:
        return arrays(*[4 * isa_for(machine).lanes] * (self.rows * self.chains))

    def build(self, problem: InnerProblem, machine: Machine) -> PrimFunc:
        return _inner(problem, isa_for(machine), self.rows, self.chains, self.blocks(problem))


def _inner(p: InnerProblem, isa: VectorIsa, rows: int, chains: int, blocks: int) -> PrimFunc:
    from tvm import tirx

    lanes, step = isa.lanes, isa.lanes * chains

    def unit(a: SimpleNamespace, u: Expr) -> None:
        block, place = b.let(remainder(u, blocks)), b.let(divide(u, blocks))  # place: t * parts + p
        token, part = b.let(divide(place, p.parts)), b.let(remainder(place, p.parts))
        entry = b.let(integer(load(a.adapters, token)) * p.parts + part)
        first = b.let(block * rows)
        with b.when(first < integer(load(a.ranks, entry))):
            # Rows past the last one are it once more: a rank of the table, if not of the adapter.
            starts = [b.let((entry * p.rank + tirx.Min(first + i, b.index(p.rank - 1))) * p.k) for i in range(rows)]
            x = b.let(token * p.k)
            sums = b.Registers(rows * chains, isa.f32)
            for number in range(rows * chains):
                sums[number] = splat(0.0, lanes)

            def multiply(offset: Expr | int, chain: int, count: int | None) -> None:
                values = b.let(load(a.x, x + offset, lanes, count))
                for i, start in enumerate(starts):
                    number = i * chains + chain
                    sums[number] = isa.fma(load(a.a, start + offset, lanes, count), values, sums[number])

            if p.k >= step:
                with b.loop(p.k // step) as turn:
                    for chain in range(chains):
                        multiply(turn * step + chain * lanes, chain, None)
            for chain, offset in enumerate(range(p.k // step * step, p.k, lanes)):
                multiply(offset, chain, p.k - offset if p.k - offset < lanes else None)
            for i in range(rows):
                parts = [sums[i * chains + chain] for chain in range(chains)]
                while len(parts) > 1:
                    parts = [one + other for one, other in zip(parts[::2], parts[1::2], strict=True)]
                total = reduce(parts[0], add)
                with b.when(first + i < p.rank):
                    store(a.inner, place * p.rank + first + i, total)

    pointers = [("x", "float32"), ("adapters", "int32"), ("a", "float32"), ("ranks", "int32"), ("inner", "float32")]
    return range_kernel(pointers, [], unit)


@dataclass(frozen=True)
class OuterProblem(Problem):
    """y[t, columns of p] += inner[t, p, :r] @ b[s, :r, columns of p] with s = adapters[t], r = ranks[s, p]. Arguments:

    inner f32[T, parts, rank], adapters i32[T], b f32[entries, rank, n], ranks i32[entries, parts], y f32[T, n]. Part p
    ends at columns[p], the last one at n. A unit is a block of columns of a part of a token.
    """

    columns: tuple[int, ...]
    rank: int

    @property
    def n(self) -> int:
        return self.columns[-1]


@dataclass(frozen=True)
class LowRankOuter(CpuTemplate[OuterProblem], name="low_rank_outer"):
    """vectors: of columns that a unit adds to at once. least: numbers of y that are worth a thread."""

    vectors: int = knob(1, 2, 4, 8)
    least: int = knob(128, 512, 2048, code=False)

    @classmethod
    def default(cls, problem: OuterProblem, machine: Machine, rows: Rows = ANY_ROWS) -> LowRankOuter:
        return cls(vectors=4, least=512)

    def blocks(self, problem: OuterProblem, machine: Machine) -> list[int]:
        """Units of each part of a token."""
        width = self.vectors * isa_for(machine).lanes
        return [-(-(end - begin) // width) for begin, end in itertools.pairwise((0, *problem.columns))]

    def grain(self, problem: OuterProblem) -> int:
        return max(1, self.least // (16 * self.vectors))

    def stack_bytes(self, problem: OuterProblem, machine: Machine) -> int:
        return arrays(*[4 * isa_for(machine).lanes] * (self.vectors * len(problem.columns)))

    def build(self, problem: OuterProblem, machine: Machine) -> PrimFunc:
        return _outer(problem, isa_for(machine), self.vectors, self.blocks(problem, machine))


def _outer(p: OuterProblem, isa: VectorIsa, vectors: int, blocks: list[int]) -> PrimFunc:
    from tvm import tirx

    parts, width = len(p.columns), vectors * isa.lanes
    ends = list(itertools.accumulate(blocks))

    def unit(a: SimpleNamespace, u: Expr) -> None:
        block, token = b.let(remainder(u, ends[-1])), b.let(divide(u, ends[-1]))
        adapter = integer(load(a.adapters, token))

        def part(number: int, begin: int, end: int) -> None:
            """The unit, if it is one of this part's."""
            column = b.let((block - (ends[number] - blocks[number])) * width + begin)
            rank = integer(load(a.ranks, adapter * parts + number))
            inner, table = b.let((token * parts + number) * p.rank), b.let(adapter * (p.rank * p.n) + column)
            tail = (end - begin) % width
            with b.when(rank > 0):
                if tail == 0:
                    add_to(token * p.n + column, inner, table, rank, [None] * vectors)
                    return
                counts = [b.let(tirx.Min(end - column - i * isa.lanes, b.index(isa.lanes))) for i in range(vectors)]
                b.either(
                    column + width <= end,
                    lambda: add_to(token * p.n + column, inner, table, rank, [None] * vectors),
                    lambda: add_to(token * p.n + column, inner, table, rank, counts),
                )

        def add_to(at: Expr, inner: Expr, table: Expr, rank: Expr, counts: list[Expr | None]) -> None:
            sums = b.Registers(vectors, isa.f32)
            for i, count in enumerate(counts):
                sums[i] = load(a.y, at + i * isa.lanes, isa.lanes, count)
            with b.loop(rank) as r:
                factor = b.let(splat(load(a.inner, inner + r), isa.lanes))
                for i, count in enumerate(counts):
                    row = load(a.b, table + r * p.n + i * isa.lanes, isa.lanes, count)
                    sums[i] = isa.fma(factor, row, sums[i])
            for i, count in enumerate(counts):
                store(a.y, at + i * isa.lanes, sums[i], count)

        for number, (begin, end) in enumerate(itertools.pairwise((0, *p.columns))):
            if parts == 1:
                part(number, begin, end)
            else:
                with b.when(tirx.all(block >= ends[number] - blocks[number], block < ends[number])):
                    part(number, begin, end)

    pointers = [("inner", "float32"), ("adapters", "int32"), ("b", "float32"), ("ranks", "int32"), ("y", "float32")]
    return range_kernel(pointers, [], unit)


@dataclass(frozen=True)
class ActivatedProblem(Problem):
    """out = act(y) + residual, or gated act(y[:, :features]) * y[:, features:] + residual. Arguments, all f32:

    y [T, features, or twice as many], [residual [T, features]], out [T, features]. A unit is a block of a row.
    """

    features: int
    activation: str
    gated: bool
    residual: bool


@dataclass(frozen=True)
class ActivatedRows(CpuTemplate[ActivatedProblem], name="activated_rows"):
    """Memory is the limit: 8 or 12 bytes a number. vectors: of a unit. least: numbers that are worth a thread."""

    vectors: int = knob(8, 16, 32, 64)
    least: int = knob(1024, 2048, 4096, 8192, code=False)

    @classmethod
    def default(cls, problem: ActivatedProblem, machine: Machine, rows: Rows = ANY_ROWS) -> ActivatedRows:
        return cls(vectors=32, least=4096)

    def blocks(self, problem: ActivatedProblem, machine: Machine) -> int:
        """Units of a row."""
        return -(-problem.features // (self.vectors * isa_for(machine).lanes))

    def grain(self, problem: ActivatedProblem) -> int:
        return max(1, self.least // min(problem.features, 16 * self.vectors))

    def build(self, problem: ActivatedProblem, machine: Machine) -> PrimFunc:
        return _activated(problem, isa_for(machine), self.vectors, self.blocks(problem, machine))


def _activated(p: ActivatedProblem, isa: VectorIsa, vectors: int, blocks: int) -> PrimFunc:
    from tvm import tirx

    lanes, columns = isa.lanes, p.features * (2 if p.gated else 1)

    def unit(a: SimpleNamespace, u: Expr) -> None:
        row, first = b.let(divide(u, blocks)), b.let(remainder(u, blocks) * (vectors * lanes))
        source, target = b.let(row * columns + first), b.let(row * p.features + first)
        left = b.let(tirx.Min(p.features - first, b.index(vectors * lanes)))

        def vector(offset: Expr, count: Expr | None) -> None:
            value = activation(isa, p.activation, b.let(load(a.y, source + offset, lanes, count)))
            if p.gated:
                value = value * load(a.y, source + p.features + offset, lanes, count)
            if p.residual:
                value = value + load(a.residual, target + offset, lanes, count)
            store(a.out, target + offset, value, count)

        whole = b.let(divide(left, lanes))
        with b.loop(whole) as number:
            vector(b.let(number * lanes), None)
        if p.features % lanes:
            with b.when(whole * lanes < left):
                vector(b.let(whole * lanes), left - whole * lanes)

    names = ["y", *["residual"] * p.residual, "out"]
    return range_kernel([(name, "float32") for name in names], [], unit)
