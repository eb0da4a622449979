"""Products of small matrices in registers: what attention multiplies by on machines without tile registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmc.targets.cpu.builder import let, loop, scratch
from llmc.targets.cpu.vector_isa import VectorIsa
from llmc.targets.cpu.vectors import load, pieces, splat, store

if TYPE_CHECKING:
    from tvm.tirx import Expr


def block_rows(isa: VectorIsa) -> int:
    """Query rows of a register block: with two or three vectors each, accumulators fill most of the registers."""
    return 8 if isa.registers == 32 else 4


def block_vectors(isa: VectorIsa, rows: int) -> int:
    """Vectors a row of a register block: at most 24 of 32, or 12 of 16, registers are accumulators."""
    return int(max(1, (isa.registers * 3 // 4) // rows))


def multiply(
    isa: VectorIsa,
    rows: int,
    columns: int,
    depth: Expr | int,
    left: Callable[[int, Expr | int], Expr],
    right: Callable[[Expr | int, int, int], Expr],
    start: Callable[[int, int, int], Expr],
    finish: Callable[[int, int, int, Expr], None],
    ahead: Callable[[Expr | int, int, int], None] | None = None,
) -> None:
    """out[r, c] = start(r, c) + sum_k left(r, k) * right(k, c): `rows` by `columns`, in register blocks.

    left(r, k) is a scalar; right(k, offset, width), start(r, offset, width) and finish(r, offset, width, value) deal in
    vectors of `width` columns from `offset` on. Few rows split the sum over k into several chains to hide latency; the
    number of terms must then be known. ahead(k, offset, width) is emitted beside the k-th term of a block of
    columns: for prefetches.
    """
    columns_cut = pieces(columns, isa.lanes)
    step = block_vectors(isa, rows)
    blocks = -(-len(columns_cut) // step)
    step = -(-len(columns_cut) // blocks)
    for first in range(0, len(columns_cut), step):
        block = columns_cut[first : first + step]
        chains = max(1, 8 // (rows * len(block))) if isinstance(depth, int) else 1
        _multiply_block(isa, rows, block, depth, chains, left, right, start, finish, ahead)


def _multiply_block(
    isa: VectorIsa,
    rows: int,
    block: Sequence[tuple[int, int]],
    depth: Expr | int,
    chains: int,
    left: Callable[[int, Expr | int], Expr],
    right: Callable[[Expr | int, int, int], Expr],
    start: Callable[[int, int, int], Expr],
    finish: Callable[[int, int, int, Expr], None],
    ahead: Callable[[Expr | int, int, int], None] | None,
) -> None:
    sums = [[[scratch(width, "float32") for _, width in block] for _ in range(rows)] for _ in range(chains)]
    for chain in range(chains):
        for r in range(rows):
            for j, (offset, width) in enumerate(block):
                store(sums[chain][r][j], 0, start(r, offset, width) if chain == 0 else splat(0.0, width), width)

    def term(k: Expr | int, chain: int) -> None:
        if ahead is not None:
            ahead(k, block[0][0], sum(width for _, width in block))
        vectors = [let(right(k, offset, width)) for offset, width in block]
        for r in range(rows):
            scalar = let(left(r, k))
            for j, (_, width) in enumerate(block):
                sum_ = sums[chain][r][j]
                store(sum_, 0, splat(scalar, width) * vectors[j] + load(sum_, 0, width), width)

    if isinstance(depth, int) and chains > 1:
        if depth // chains:
            with loop(depth // chains) as number:
                for chain in range(chains):
                    term(number * chains + chain, chain)
        for k in range(depth // chains * chains, depth):
            term(k, k % chains)
    else:
        with loop(depth) as k:
            term(k, 0)
    for r in range(rows):
        for j, (offset, width) in enumerate(block):
            value = load(sums[0][r][j], 0, width)
            for chain in range(1, chains):
                value = value + load(sums[chain][r][j], 0, width)
            finish(r, offset, width, value)
