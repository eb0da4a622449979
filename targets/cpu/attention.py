"""Attention over the paged key-value cache: the plan (which kernels, on how many units) and the merge of splits.

`attention_plan` gives the calls to make. `attention_tile` (attention_tile.py), or a template of the matrix unit's, does
one query tile for one key-value head, over one part of the context or all of them; `attention_combine` here merges the
parts that several units did (attention_parts.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.compiler.ir.encoded import PAGE
from llmc.targets.cpu.attention_parts import fused, merge_weights
from llmc.targets.cpu.attention_query import QueryRows
from llmc.targets.cpu.attention_tile import attention_tile
from llmc.targets.cpu.builder import either, let, loop, scratch, when
from llmc.targets.cpu.matrix_unit import matrix_unit
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import for_pieces, load, permute, pin, range_kernel, splat, store
from llmc.targets.kernel import Kernel, Param, kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

    from llmc.compiler.ir.dims import Dim


@dataclass(frozen=True)
class AttentionPlan:
    """How to run one attention op. Sizes and units are functions of ints or symbolic dims (only + - * are used).

    tile: call it with `tile_units(Q, S)` units (query tiles, splits), grain 1.
    combine: after it, with `combine_units(T)` units, only where S >= 2. Arguments: the kernels' docstrings.
    """

    tile: Kernel
    combine: Kernel
    heads: int
    kv_heads: int
    value_dim: int

    @property
    def by_kind(self) -> bool:
        """Whether `tile` computes rows of prompts otherwise than rows that decode: it has the size PROMPT behind S."""
        return self.tile.template is not attention_tile

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


def attention_plan(
    machine: Machine,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    alibi: bool = False,
    cache_dtype: str = "float16",
    causal: bool = True,
    span: int = 0,
    query: QueryRows | None = None,
) -> AttentionPlan:
    """Kernels for attention with `heads` query heads over `kv_heads` key-value heads.

    window: how many keys a row sees, itself included (0: all). softcap c: scores become c * tanh(score / c) (0: off).
    sinks: a logit a head joins the softmax's denominator. alibi: slope * (key position - query position) is added to
    the scaled score. cache_dtype: float16 or float32. causal: rows see keys up to their own position; else the whole
    sequence, or what is less than `window` away on both sides. span: a table of what to add by distance (0: none).
    query: where queries lie and what happens to them first; by default they are [T, heads, head_dim] as they should be.
    """
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are no multiple of {kv_heads} key-value heads")
    if cache_dtype not in ("float16", "float32"):
        raise ValueError(f"attention: cache_dtype must be float16 or float32, not {cache_dtype!r}")
    if span % PAGE:
        raise ValueError(f"attention: a table of distances spans whole pages of {PAGE} tokens, not {span}")
    values = head_dim if value_dim is None else value_dim
    # A kernel without one of these has no such parameter, and so the name that it always had.
    others: dict[str, Param] = {} if causal else {"causal": False}
    others |= {"span": span} if span else {}
    others |= {"query": query.params()} if query not in (None, QueryRows(heads * head_dim)) else {}
    unit = matrix_unit(machine)
    on_unit = None if unit is None else unit.attention(values, cache_dtype)
    tile = kernel(
        on_unit or attention_tile,
        machine.key,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=values,
        scale=float(scale),
        window=window,
        softcap=float(softcap),
        sinks=sinks,
        alibi=alibi,
        cache_dtype=cache_dtype,
        **others,
    )
    combine = kernel(attention_combine, machine.key, value_dim=values)
    return AttentionPlan(tile, combine, heads, kv_heads, values)


def attention_combine(machine: Machine, *, value_dim: int) -> PrimFunc:
    """Merge the parts of a context. One unit is one row of one head, u = token * heads + head. Arguments:

        state f32[units, S, 2], partial f32[units, S - 1, value_dim], out f32[units, value_dim], S

    state holds each part's greatest score m and its denominator l (0: no part); out holds the weighted values of the
    first and is replaced by sum_s exp(m_s - M) acc_s / sum_s exp(m_s - M) l_s, merged one by one. state is used up.
    Reads bound it: 4 S bytes a value.
    """
    isa = isa_for(machine)
    lanes = isa.lanes

    def unit(a: SimpleNamespace, u: Expr) -> None:
        from tvm import tirx

        base = pin(u * a.S * 2)
        peak, total = scratch(1, "float32"), scratch(1, "float32")
        store(peak, 0, load(a.state, base, 1), 1)
        store(total, 0, load(a.state, base + 1, 1), 1)
        with loop(a.S - 1) as s:
            at = pin(base + 2 + s * 2)
            denominator = let(load(a.state, at + 1, 1))

            def join(at: Expr = at, denominator: Expr = denominator) -> None:
                both = (splat(load(each, where, 1), lanes) for each, where in ((peak, 0), (a.state, at)))
                top, older, newer = (let(permute([value], [0])) for value in merge_weights(isa, *both))
                store(total, 0, fused(load(total, 0, 1), older, denominator * newer), 1)
                store(peak, 0, top, 1)
                store(a.state, at, older, 1)
                store(a.state, at + 1, newer, 1)

            def skip(at: Expr = at) -> None:
                store(a.state, at, splat(-1.0, 1), 1)

            either(denominator == tirx.const(0.0, "float32"), skip, join)
        inverse = let(tirx.const(1.0, "float32") / load(total, 0, 1))

        def merge(offset: Expr | int, width: int) -> None:
            sum_ = scratch(width, "float32")
            row = u * value_dim + offset
            store(sum_, 0, load(a.out, row, width), width)
            with loop(a.S - 1) as s:
                at = pin(base + 2 + s * 2)
                with when(load(a.state, at, 1) >= tirx.const(0.0, "float32")):
                    part = load(a.partial, (u * (a.S - 1) + s) * value_dim + offset, width)
                    older, newer = (splat(load(a.state, at + i, 1), width) for i in range(2))
                    store(sum_, 0, fused(load(sum_, 0, width), older, part * newer), width)
            store(a.out, row, load(sum_, 0, width) * splat(inverse, width), width)

        for_pieces(value_dim, lanes, merge)

    pointers = [("state", "float32"), ("partial", "float32"), ("out", "float32")]
    return range_kernel(pointers, ["S"], unit)
