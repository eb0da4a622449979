"""Attention over the paged key-value cache: the plan (which kernels, on how many units) and the merge of splits.

`attention_plan` gives the calls to make. `AttentionTile` (attention_tile.py), or a template of the matrix unit's, does
one query tile for one key-value head, over one part of the context or all of them; `AttentionCombine` here merges the
parts that several units did (attention_parts.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.targets.cpu.attention_parts import fused, merge_weights
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_tile import AttentionTile
from llmc.targets.cpu.builder import either, let, loop, scratch, when
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.matrix_unit import matrix_unit
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for
from llmc.targets.cpu.vectors import for_pieces, load, permute, range_kernel, splat, store
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Chooser, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

    from llmc.compiler.ir.dims import Dim


@dataclass(frozen=True)
class AttentionPlan:
    """How to run one attention op. Sizes and units are functions of ints or symbolic dims (only + - * are used).

    tile: call it with `tile_units(Q, S)` units (query tiles, splits), grain 1.
    combine: after it, with `combine_units(T)` units, only where S >= 2; `combine_grain` of them are worth a thread.
    Arguments: the problems' docstrings.
    """

    tile: Kernel
    combine: Kernel
    combine_grain: int
    heads: int
    kv_heads: int
    value_dim: int

    @property
    def by_kind(self) -> bool:
        """Whether `tile` computes rows of prompts otherwise than rows that decode: it has the size PROMPT behind S."""
        return not isinstance(self.tile.template, AttentionTile)

    @property
    def arithmetic(self) -> str:
        """What `tile` multiplies for many rows: the limit that it is compared with."""
        return "bf16" if self.by_kind else "f32"

    def tile_units(self, tiles: int | Dim, splits: int | Dim) -> int | Dim:
        return tiles * splits * self.kv_heads

    def combine_units(self, tokens: int | Dim) -> int | Dim:
        return tokens * self.heads

    def state_elements(self, tokens: int | Dim, splits: int | Dim) -> int | Dim:
        """f32 elements of the scratch `state` [T, heads, S, 2]; none is touched where S == 1."""
        return tokens * splits * (2 * self.heads)

    def partial_elements(self, tokens: int | Dim, splits: int | Dim) -> int | Dim:
        """f32 elements of the scratch `partial` [T, heads, S - 1, value_dim]."""
        return tokens * (splits - 1) * (self.heads * self.value_dim)


def attention_plan(chooser: Chooser, problem: AttentionProblem) -> AttentionPlan | str:
    """Kernels for attention, or why there are none."""
    machine, merged = chooser.machine, CombineProblem(problem.value_dim)
    unit = matrix_unit(machine)
    on_unit = None if unit is None else unit.attention(problem.value_dim, problem.cache_dtype)
    tile, combine = chooser.choose(on_unit or AttentionTile, problem), chooser.choose(AttentionCombine, merged)
    if isinstance(tile, str):
        return tile
    if isinstance(combine, str):
        return combine
    made = tile.kernel(problem, machine), combine.kernel(merged, machine)
    return AttentionPlan(*made, combine.grain(merged), problem.heads, problem.kv_heads, problem.value_dim)


@dataclass(frozen=True)
class CombineProblem(Problem):
    """Merge the parts of a context. One unit is one row of one head, u = token * heads + head. Arguments:

        state f32[units, S, 2], partial f32[units, S - 1, value_dim], out f32[units, value_dim], S

    state holds each part's greatest score m and its denominator l (0: no part); out holds the weighted values of the
    first and is replaced by sum_s exp(m_s - M) acc_s / sum_s exp(m_s - M) l_s, merged one by one. state is used up.
    """

    value_dim: int


@dataclass(frozen=True)
class AttentionCombine(CpuTemplate[CombineProblem], name="attention_combine"):
    """Reads bound it: 4 S bytes a value. least: values that are worth a thread. The order of parts is fixed
    (docs/adr/0017)."""

    least: int = knob(512, 1024, 2048, 4096, 8192, code=False)

    @classmethod
    def default(cls, problem: CombineProblem, machine: Machine, rows: Rows = ANY_ROWS) -> AttentionCombine:
        return cls(least=2048)

    def grain(self, problem: CombineProblem) -> int:
        return max(1, self.least // problem.value_dim)

    def stack_bytes(self, problem: CombineProblem, machine: Machine) -> int:
        return arrays(*[4 * isa_for(machine).lanes] * 8)

    def build(self, problem: CombineProblem, machine: Machine) -> PrimFunc:
        return _combine(isa_for(machine), problem.value_dim)


def _combine(isa: VectorIsa, value_dim: int) -> PrimFunc:
    lanes = isa.lanes

    def unit(a: SimpleNamespace, u: Expr) -> None:
        from tvm import tirx

        base = let(u * a.S * 2)
        peak, total = scratch(1, "float32"), scratch(1, "float32")
        store(peak, 0, load(a.state, base))
        store(total, 0, load(a.state, base + 1))
        with loop(a.S - 1) as s:
            at = let(base + 2 + s * 2)
            denominator = let(load(a.state, at + 1))

            def join(at: Expr = at, denominator: Expr = denominator) -> None:
                both = (splat(load(each, where), lanes) for each, where in ((peak, 0), (a.state, at)))
                top, older, newer = (let(permute([value], [0])) for value in merge_weights(isa, *both))
                store(total, 0, fused(load(total, 0), older, denominator * newer))
                store(peak, 0, top)
                store(a.state, at, older)
                store(a.state, at + 1, newer)

            def skip(at: Expr = at) -> None:
                store(a.state, at, splat(-1.0, 1))

            either(denominator == tirx.const(0.0, "float32"), skip, join)
        inverse = let(tirx.const(1.0, "float32") / load(total, 0))

        def merge(offset: Expr | int, width: int) -> None:
            sum_ = scratch(width, "float32")
            row = u * value_dim + offset
            store(sum_, 0, load(a.out, row, width))
            with loop(a.S - 1) as s:
                at = let(base + 2 + s * 2)
                with when(load(a.state, at) >= tirx.const(0.0, "float32")):
                    part = load(a.partial, (u * (a.S - 1) + s) * value_dim + offset, width)
                    older, newer = (splat(load(a.state, at + i), width) for i in range(2))
                    store(sum_, 0, fused(load(sum_, 0, width), older, part * newer))
            store(a.out, row, load(sum_, 0, width) * inverse)

        for_pieces(value_dim, lanes, merge)

    pointers = [("state", "float32"), ("partial", "float32"), ("out", "float32")]
    return range_kernel(pointers, ["S"], unit)
