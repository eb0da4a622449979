"""Ops over the tokens of several sequences, one after another, without padding: rows starts[s] to starts[s + 1]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Add, Sub, constant
from llmc.compiler.ir.op import Op, Tokens, Value
from llmc.compiler.ir.shapes import require
from llmc.compiler.ir.structural import Gather, Iota, Reshape, Slice
from llmc.compiler.ir.types import Array, Tensor, numpy_dtype

POOLINGS = ("mean", "max", "sum")


class PoolTokens(Op, name="llm.pool_tokens"):
    """[B, ...] from x [T, ...]: the mean, the greatest or the sum of each sequence's tokens, element by element.

    starts i32[B + 1]: the first row of each sequence, then T; no sequence is empty. Sums are f32 (or x's, if wider).
    """

    tokens = Tokens.MIXES

    x: Value
    starts: Value
    kind: str = "mean"

    def infer(self) -> Tensor:
        require(self.kind in POOLINGS, f"unknown kind {self.kind!r}; known: {', '.join(POOLINGS)}")
        require(self.x.rank >= 1, "needs tokens on axis 0")
        require(self.starts.rank == 1 and self.starts.dtype == "i32", "starts must be i32[B + 1]")
        return Tensor((self.starts.shape[0] - 1, *self.x.shape[1:]), self.x.dtype)

    def evaluate(self, x: Array, starts: Array) -> Array:
        wide = x.astype(np.promote_types(x.dtype, numpy_dtype("f32")), copy=False)
        functions: dict[str, Callable[..., Array]] = {"mean": np.mean, "max": np.max, "sum": np.sum}
        spans = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        return np.stack([functions[self.kind](wide[low:high], axis=0) for low, high in spans]).astype(x.dtype)


class RelativeBias(Op, name="llm.relative_bias"):
    """[heads, size, size] from a table f32[heads, 2 * span - 1] by key - query + span - 1: what scores are added."""

    tokens = Tokens.MIXES

    table: Value
    size: int | Dim

    def infer(self) -> Tensor:
        require(self.table.rank == 2, "the table must be a matrix")
        span_of(self.table)
        return Tensor((self.table.shape[0], self.size, self.size), self.table.dtype)

    def evaluate(self, table: Array) -> Array:
        assert isinstance(self.size, int)
        at = np.arange(self.size)
        return table[:, at[None, :] - at[:, None] + table.shape[1] // 2]

    def decompose(self) -> Value:
        at = Iota(self.size)
        distance = Sub(Reshape(at, (1, self.size)), Reshape(at, (self.size, 1)))
        return Gather(self.table, Add(distance, constant(span_of(self.table) - 1, "i64")), 1)


def span_of(table: Value) -> int:
    """How far apart tokens of a table of relative positions [heads, 2 * span - 1] may be, plus 1."""
    size = table.shape[-1]
    require(isinstance(size, int) and size % 2 == 1, "the table needs a middle: 2 * span - 1 columns")
    assert isinstance(size, int)
    return (size + 1) // 2


def first_rows(starts: Value) -> Value:
    """i32[B]: the row of each sequence's first token."""
    return Slice(starts, 0, 0, starts.shape[0] - 1)


def end_rows(starts: Value) -> Value:
    """i32[B]: the row after each sequence's last token."""
    return Slice(starts, 0, 1, starts.shape[0])


def last_rows(starts: Value) -> Value:
    """i32[B]: the row of each sequence's last token."""
    return Sub(end_rows(starts), constant(1, "i32"))


def token_counts(starts: Value) -> Value:
    """i32[B]: how many tokens each sequence has."""
    return Sub(end_rows(starts), first_rows(starts))
