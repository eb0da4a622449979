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
from llmc.targets.cpu.builder import let, loop, scratch
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import (
    add,
    copy,
    copy_element,
    divide,
    for_pieces,
    integer,
    load,
    load_raw,
    permute,
    pieces,
    pin,
    range_kernel,
    reduce_lanes,
    remainder,
    splat,
    store,
)
from llmc.targets.kernel import Kernel, kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

GRAIN = 4  # tokens worth handing to a thread together: decoded ones write to head_dim lines from memory each

Rows = tuple[int, int, int]
"""Where heads lie in a buffer: element stride of a token, offset of head 0, stride of a head."""


def rope_append_kernel(
    machine: Machine,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    pairs: int = 0,
    interleaved: bool = False,
    query_rows: Rows | None = None,
    key_rows: Rows | None = None,
    value_rows: Rows | None = None,
    norm_eps: float | None = None,
    norm_offset: float = 0.0,
    cache_dtype: str = "float16",
) -> Kernel:
    """The kernel; see `rope_append` for its arguments. Units: T tokens, grain GRAIN.

    heads = 0 leaves the queries alone, kv_heads = 0 the cache; pairs = 0 turns nothing (a pure append). Rows default to
    dense [T, heads, dim] buffers of their own; q, k and v may be the same buffer with different offsets.
    """
    values = head_dim if value_dim is None else value_dim
    if 2 * pairs > head_dim:
        raise ValueError(f"rope: {pairs} pairs do not fit heads of {head_dim} channels")
    if cache_dtype not in ("float16", "float32"):
        raise ValueError(f"rope: cache_dtype must be float16 or float32, not {cache_dtype!r}")
    return kernel(
        rope_append,
        machine.key,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=values,
        pairs=pairs,
        interleaved=interleaved,
        query_rows=query_rows or (heads * head_dim, 0, head_dim),
        key_rows=key_rows or (kv_heads * head_dim, 0, head_dim),
        value_rows=value_rows or (kv_heads * values, 0, values),
        norm_eps=norm_eps,
        norm_offset=float(norm_offset),
        cache_dtype=cache_dtype,
    )


def rope_append(
    machine: Machine,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    pairs: int,
    interleaved: bool,
    query_rows: Rows,
    key_rows: Rows,
    value_rows: Rows,
    norm_eps: float | None,
    norm_offset: float,
    cache_dtype: str,
) -> PrimFunc:
    """One unit is one token. Arguments, in this order, those in brackets only where the parameters call for them:

        [q f32] (heads), [k f32, v f32] (kv_heads),
        [angles f32[T, 2, pairs]: cosines, then sines] (pairs), [slots i32[T]] (kv_heads),
        [q_weight f32[head_dim]] (norm and heads), [k_weight f32[head_dim]] (norm and kv_heads),
        [out f32[T, heads, head_dim]] (heads), [keys cache[pages, kv_heads, head_dim, 32],
        values cache[pages, kv_heads, 32, value_dim]] (kv_heads)

    With norm_eps each head of q and k is first rms-normalised: x / sqrt(mean(x^2) + eps) * (norm_offset + weight). Then
    channel i turns with i + pairs, or (interleaved) 2i with 2i + 1: a' = a cos - b sin, b' = b cos + a sin. Channels
    from 2 * pairs on pass. q goes to out, k and v to the cache, rounded to its dtype.
    """
    style = Rotation(isa_for(machine).lanes, head_dim, pairs, interleaved, norm_eps, norm_offset)
    pointers = [("q", "float32")] * bool(heads) + [("k", "float32"), ("v", "float32")] * bool(kv_heads)
    pointers += [("angles", "float32")] * bool(pairs)
    pointers += [("slots", "int32")] * bool(kv_heads)
    if norm_eps is not None:
        pointers += [("q_weight", "float32")] * bool(heads) + [("k_weight", "float32")] * bool(kv_heads)
    pointers += [("out", "float32")] * bool(heads)
    pointers += [("keys", cache_dtype), ("values", cache_dtype)] * bool(kv_heads)

    def unit(a: SimpleNamespace, token: Expr) -> None:
        turn: tuple[Buffer, Expr] | None = None
        if pairs:
            turn = (a.angles, pin(token * (2 * pairs)))
        if heads:
            with loop(heads) as head:
                source = pin(token * query_rows[0] + (head * query_rows[2] + query_rows[1]))
                target = pin((token * heads + head) * head_dim)
                weight = a.q_weight if norm_eps is not None else None
                style.head(a.q, source, weight, turn, a.out, target)
        if kv_heads:
            slot = integer(load_raw(a.slots, token, 1))
            page, offset = pin(divide(slot, PAGE)), pin(remainder(slot, PAGE))
            # Rounded here, so that the scattered stores below move finished elements.
            turned = scratch(head_dim, cache_dtype)
            with loop(kv_heads) as head:
                source = pin(token * key_rows[0] + (head * key_rows[2] + key_rows[1]))
                weight = a.k_weight if norm_eps is not None else None
                style.head(a.k, source, weight, turn, turned, 0)
                column = pin((page * kv_heads + head) * (head_dim * PAGE) + offset)
                with loop(head_dim) as channel:
                    copy_element(turned, channel, a.keys, column + channel * PAGE)
                values = pin(token * value_rows[0] + (head * value_rows[2] + value_rows[1]))
                slot_row = pin(((page * kv_heads + head) * PAGE + offset) * value_dim)
                copy(style.lanes, a.v, values, a.values, slot_row, value_dim)

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
            lambda i, width: store(target, at + passed + i, read(passed + i, width), width),
        )

    def _reader(self, source: Buffer, start: Expr, weight: Buffer | None) -> Callable[[Expr | int, int], Expr]:
        """Channels of the head as f32 vectors, normalised if wanted."""
        from tvm import tirx

        if weight is None or self.norm_eps is None:
            return lambda i, width: load(source, start + i, width)
        total = scratch(self.lanes, "float32")
        store(total, 0, splat(0.0, self.lanes), self.lanes)
        for i, width in pieces(self.head_dim, self.lanes):
            value = let(load(source, start + i, width))
            store(total, 0, load(total, 0, width) + value * value, width)
        mean = reduce_lanes(load(total, 0, self.lanes), self.lanes, add) * (1.0 / self.head_dim)
        scale = let(tirx.const(1.0, "float32") / tirx.sqrt(mean + tirx.const(self.norm_eps, "float32")))

        def read(i: Expr | int, width: int) -> Expr:
            factor = load(weight, i, width)
            if self.norm_offset:
                factor = factor + splat(self.norm_offset, width)
            return load(source, start + i, width) * splat(scale, width) * factor

        return read

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
        store(target, at + i, a * cos - b * sin, width)
        store(target, at + self.pairs + i, b * cos + a * sin, width)

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
        negated = let(splat(0.0, 2 * width) - x)
        order = [lane - 1 if lane % 2 else 2 * width + lane + 1 for lane in range(2 * width)]
        store(target, at + i * 2, x * cos + permute([x, negated], order) * sin, 2 * width)
