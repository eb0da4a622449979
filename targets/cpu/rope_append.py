"""Rotary embedding of heads, and the append of keys and values to the paged cache, in one pass over their rows.

Every element is read once and written once. Keys are stored transposed in their page, so a token's key is scattered to
head_dim lines of the cache; work should be split into runs of consecutive tokens, which share those lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.compiler.ir.encoded import PAGE
from llmc.targets.cpu.builder import index, let, loop, scratch, when
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.row_norm import RowNorm
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import (
    copy,
    divide,
    for_pieces,
    integer,
    load,
    permute,
    range_kernel,
    remainder,
    splat,
    store,
)
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

    from llmc.compiler.ir.dims import Dim

HeadRows = tuple[int, int, int]
"""Where heads lie in a buffer: element stride of a token, offset of head 0, stride of a head."""

CHAINS = 1  # sums of a head's norm: heads are short


@dataclass(frozen=True)
class RopeProblem(Problem):
    """One unit is a key head of a token, u = token * kv_heads + head, or all of a token where there are none; the first
    of a token has its queries too. Arguments, in this order, those in brackets only where the problem calls for them:

        [q f32] (heads), [k f32, v f32] (kv_heads),
        [angles f32[T, 2, pairs]: cosines, then sines] (pairs), [slots i32[T]] (kv_heads),
        [q_weight f32[head_dim]] (norm and heads), [k_weight f32[head_dim]] (norm and kv_heads),
        [out f32[T, heads, head_dim]] (heads), [keys cache[pages, kv_heads, head_dim, 32],
        values cache[pages, kv_heads, 32, value_dim]] (kv_heads)

    With norm_eps each head of q and k is first rms-normalised: x / sqrt(mean(x^2) + eps) * (norm_offset + weight). Then
    channel i turns with i + pairs, or (interleaved) 2i with 2i + 1: a' = a cos - b sin, b' = b cos + a sin. Channels
    from 2 * pairs on pass. q goes to out, k and v to the cache, rounded to its dtype.

    heads = 0 leaves the queries alone, kv_heads = 0 the cache; pairs = 0 turns nothing (a pure append). Rows default to
    dense [T, heads, dim] buffers of their own; q, k and v may be the same buffer with different offsets.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    pairs: int
    interleaved: bool
    query_rows: HeadRows
    key_rows: HeadRows
    value_rows: HeadRows
    norm_eps: float | None
    norm_offset: float
    cache_dtype: str

    def units(self, tokens: int | Dim) -> int | Dim:
        """Units of so many tokens."""
        return tokens * max(1, self.kv_heads)

    def rotation(self, lanes: int) -> Rotation:
        """What happens to each head."""
        return Rotation(lanes, self.head_dim, self.pairs, self.interleaved, self.norm_eps, self.norm_offset)


def rope_problem(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    pairs: int = 0,
    interleaved: bool = False,
    query_rows: HeadRows | None = None,
    key_rows: HeadRows | None = None,
    value_rows: HeadRows | None = None,
    norm_eps: float | None = None,
    norm_offset: float = 0.0,
    cache_dtype: str = "float16",
) -> RopeProblem:
    """A problem whose rows are dense where nothing else is said; ValueError where no kernel can be for it."""
    values = head_dim if value_dim is None else value_dim
    if 2 * pairs > head_dim:
        raise ValueError(f"rope: {pairs} pairs do not fit heads of {head_dim} channels")
    if cache_dtype not in ("float16", "float32"):
        raise ValueError(f"rope: cache_dtype must be float16 or float32, not {cache_dtype!r}")
    return RopeProblem(
        heads,
        kv_heads,
        head_dim,
        values,
        pairs,
        interleaved,
        query_rows or (heads * head_dim, 0, head_dim),
        key_rows or (kv_heads * head_dim, 0, head_dim),
        value_rows or (kv_heads * values, 0, values),
        norm_eps,
        float(norm_offset),
        cache_dtype,
    )


@dataclass(frozen=True)
class RopeAppend(CpuTemplate[RopeProblem], name="rope_append"):
    """least: tokens that are worth a thread; decoded ones write to head_dim lines from memory each. The norm of a head
    is summed in one vector: heads are short."""

    least: int = knob(1, 2, 4, 8, 16, code=False)

    @classmethod
    def default(cls, problem: RopeProblem, machine: Machine, rows: Rows = ANY_ROWS) -> RopeAppend:
        return cls(least=4)

    def grain(self, problem: RopeProblem) -> int:
        return self.least * max(1, problem.kv_heads)

    def stack_bytes(self, problem: RopeProblem, machine: Machine) -> int:
        turned = problem.head_dim * (2 if problem.cache_dtype == "float16" else 4)
        return arrays(turned, *[4 * isa_for(machine).lanes] * 2)

    def build(self, problem: RopeProblem, machine: Machine) -> PrimFunc:
        return _rope_append(problem, isa_for(machine).lanes)


def _rope_append(p: RopeProblem, lanes: int) -> PrimFunc:
    style = p.rotation(lanes)
    pointers = [("q", "float32")] * bool(p.heads) + [("k", "float32"), ("v", "float32")] * bool(p.kv_heads)
    pointers += [("angles", "float32")] * bool(p.pairs)
    pointers += [("slots", "int32")] * bool(p.kv_heads)
    if p.norm_eps is not None:
        pointers += [("q_weight", "float32")] * bool(p.heads) + [("k_weight", "float32")] * bool(p.kv_heads)
    pointers += [("out", "float32")] * bool(p.heads)
    pointers += [("keys", p.cache_dtype), ("values", p.cache_dtype)] * bool(p.kv_heads)

    def unit(a: SimpleNamespace, u: Expr) -> None:
        token = let(divide(u, p.kv_heads)) if p.kv_heads else u
        head = let(remainder(u, p.kv_heads)) if p.kv_heads else index(0)
        turn: tuple[Buffer, Expr] | None = None
        if p.pairs:
            turn = (a.angles, let(token * (2 * p.pairs)))
        if p.heads:
            with when(head == 0), loop(p.heads) as query:
                source = let(token * p.query_rows[0] + (query * p.query_rows[2] + p.query_rows[1]))
                target = let((token * p.heads + query) * p.head_dim)
                weight = a.q_weight if p.norm_eps is not None else None
                style.head(a.q, source, weight, turn, a.out, target)
        if p.kv_heads:
            slot = integer(load(a.slots, token))
            page, offset = let(divide(slot, PAGE)), let(remainder(slot, PAGE))
            # Rounded here, so that the scattered stores below move finished elements.
            turned = scratch(p.head_dim, p.cache_dtype)
            source = let(token * p.key_rows[0] + (head * p.key_rows[2] + p.key_rows[1]))
            weight = a.k_weight if p.norm_eps is not None else None
            style.head(a.k, source, weight, turn, turned, 0)
            column = let((page * p.kv_heads + head) * (p.head_dim * PAGE) + offset)
            with loop(p.head_dim) as channel:
                store(a.keys, column + channel * PAGE, load(turned, channel))
            values = let(token * p.value_rows[0] + (head * p.value_rows[2] + p.value_rows[1]))
            slot_row = let(((page * p.kv_heads + head) * PAGE + offset) * p.value_dim)
            copy(style.lanes, a.v, values, a.values, slot_row, p.value_dim)

    return range_kernel(pointers, [], unit)


@dataclass(frozen=True)
class Rotation:
    """What happens to one head of q or k on its way."""

    lanes: int
    head_dim: int
    pairs: int
    interleaved: bool
    norm_eps: float | None
    norm_offset: float

    def head(
        self,
        source: Buffer,
        start: Expr,
        weight: Buffer | None,
        turn: tuple[Buffer, Expr] | None,
        target: Buffer,
        at: Expr | int,
    ) -> None:
        """target[at:] = the turned (and normalised) head at source[start:]."""
        read = self._reader(source, start, weight)
        if turn is not None and self.interleaved:
            for_pieces(
                self.pairs, self.lanes // 2, lambda i, width: self._interleaved(read, turn, target, at, i, width)
            )
        elif turn is not None:
            for_pieces(self.pairs, self.lanes, lambda i, width: self._half(read, turn, target, at, i, width))
        passed = 2 * self.pairs
        for_pieces(
            self.head_dim - passed,
            self.lanes,
            lambda i, width: store(target, at + passed + i, read(passed + i, width)),
        )

    def _reader(self, source: Buffer, start: Expr, weight: Buffer | None) -> Callable[[Expr | int, int], Expr]:
        """Channels of the head as f32 vectors, normalised if wanted."""
        if weight is None or self.norm_eps is None:
            return lambda i, width: load(source, start + i, width)
        norm = RowNorm("rms", self.head_dim, self.norm_eps, self.norm_offset)
        head = norm.statistics(lambda i, width: load(source, start + i, width), self.lanes, CHAINS, unrolled=True)
        return lambda i, width: head.normalise(load(source, start + i, width), load(weight, i, width))

    def _angles(self, turn: tuple[Buffer, Expr], i: Expr | int, width: int) -> tuple[Expr, Expr]:
        buffer, start = turn
        return let(load(buffer, start + i, width)), let(load(buffer, start + self.pairs + i, width))

    def _half(
        self,
        read: Callable[[Expr | int, int], Expr],
        turn: tuple[Buffer, Expr],
        target: Buffer,
        at: Expr | int,
        i: Expr | int,
        width: int,
    ) -> None:
        """Pairs (i, i + pairs)."""
        cos, sin = self._angles(turn, i, width)
        a, b = let(read(i, width)), let(read(i + self.pairs, width))
        store(target, at + i, a * cos - b * sin)
        store(target, at + self.pairs + i, b * cos + a * sin)

    def _interleaved(
        self,
        read: Callable[[Expr | int, int], Expr],
        turn: tuple[Buffer, Expr],
        target: Buffer,
        at: Expr | int,
        i: Expr | int,
        width: int,
    ) -> None:
        """Pairs (2i, 2i + 1), `width` in one vector: x * [c0 c0 c1 c1 ...] + [-x1 x0 -x3 x2 ...] * [s0 s0 ...]."""
        cos, sin = self._angles(turn, i, width)
        twice = [lane // 2 for lane in range(2 * width)]
        cos, sin = (splat(v, 2) if width == 1 else permute([v, v], twice) for v in (cos, sin))
        x = let(read(i * 2, 2 * width))
        negated = let(0.0 - x)
        order = [lane - 1 if lane % 2 else 2 * width + lane + 1 for lane in range(2 * width)]
        store(target, at + i * 2, x * cos + permute([x, negated], order) * sin)
