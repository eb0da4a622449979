"""Products of small matrices in registers: what attention multiplies by on machines without tile registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmc.targets.cpu.builder import let, loop, scratch
from llmc.targets.cpu.vector_isa import VectorIsa
from llmc.targets.cpu.vectors import load, pieces, store

if TYPE_CHECKING:
    from tvm.tirx import Expr


def multiply(
    isa: VectorIsa,
    accumulators: int,
    rows: int,
    columns: int,
    depth: Expr | int,
    left: Callable[[int, Expr | int], Expr],
    right: Callable[[Expr | int, int, int], Expr],
    start: Callable[[int, int, int], Expr],
    finish: Callable[[int, int, int, Expr], None],
    ahead: Callable[[Expr | int, int, int], None] | None = None,
) -> None:
    """out[r, c] = start(r, c) + sum_k left(r, k) * right(k, c): `rows` by `columns`, in register blocks of so many
    accumulators at most.

    left(r, k) is a scalar; right(k, offset, width), start(r, offset, width) and finish(r, offset, width, value) deal in
    vectors of `width` columns from `offset` on. Terms are added in the order of k, for any number of rows, so that a
    row has the same bits in every block. ahead(k, offset, width) is emitted beside the k-th term of a block of columns:
    for prefetches.
    """
    columns_cut = pieces(columns, isa.lanes)
    step = max(1, accumulators // rows)
    blocks = -(-len(columns_cut) // step)
    step = -(-len(columns_cut) // blocks)
    for first in range(0, len(columns_cut), step):
        block = columns_cut[first : first + step]
        _multiply_block(rows, block, depth, left, right, start, finish, ahead)


def _multiply_block(
    rows: int,
    block: Sequence[tuple[int, int]],
    depth: Expr | int,
    left: Callable[[int, Expr | int], Expr],
    right: Callable[[Expr | int, int, int], Expr],
    start: Callable[[int, int, int], Expr],
    finish: Callable[[int, int, int, Expr], None],
    ahead: Callable[[Expr | int, int, int], None] | None,
) -> None:
    sums = [[scratch(width, "float32") for _, width in block] for _ in range(rows)]
    for r in range(rows):
        for j, (offset, width) in enumerate(block):
            store(sums[r][j], 0, start(r, offset, width))
    with loop(depth) as k:
        if ahead is not None:
            ahead(k, block[0][0], sum(width for _, width in block))
        vectors = [let(right(k, offset, width)) for offset, width in block]
        for r in range(rows):
            scalar = let(left(r, k))
            for j, (_, width) in enumerate(block):
                store(sums[r][j], 0, scalar * vectors[j] + load(sums[r][j], 0, width))
    for r in range(rows):
        for j, (offset, width) in enumerate(block):
            finish(r, offset, width, load(sums[r][j], 0, width))
