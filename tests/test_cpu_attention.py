"""Paged attention on x86: against f64 numpy, and the properties that hold whatever the numbers are.

The cache holds numbers rounded to its dtype, and so does the reference, so f16 needs no wider tolerance than f32:
results are averages of values, off by rounding in scores of a few units (1e-5 of the greatest value).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_batches import LENGTHS, NEW, Batch, Case, make_batch, tiles_of
from kernel_harness import Compiled, aligned, default_kernel
from x86_machines import machines_of

from llmc.compiler.ir.attention import MOST_PARTS, PART
from llmc.runtime import cpu
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_query import QueryRows
from llmc.targets.cpu.rope_append import RopeAppend, rope_problem
from llmc.targets.machine import Machine
from llmc.targets.x86 import detect

MACHINES = machines_of("avx2", "avx512vnni")
SAPPHIRE = detect.machine("sapphirerapids")
TILES = pytest.param(
    SAPPHIRE,
    id="amx",
    marks=pytest.mark.skipif(not cpu.features() >= SAPPHIRE.features, reason="this computer has no tile registers"),
)

CASES = {
    "grouped": Case(4, 2, 64, 64),
    "one head each, f32 cache": Case(3, 3, 80, 80, cache_dtype="float32"),
    "group of seven, window": Case(7, 1, 96, 96, window=40),
    "window of one page": Case(2, 1, 16, 16, window=32, cache_dtype="float32"),
    "softcap, tiny odd heads": Case(4, 2, 12, 20, softcap=3.0),
    "sinks and window": Case(8, 2, 8, 8, window=7, sinks=True),
    "alibi": Case(5, 5, 20, 12, alibi=True),
    "many heads share one": Case(40, 1, 16, 16, softcap=5.0, sinks=True, alibi=True),
}


def tolerance(batch: Batch) -> float:
    return 1e-5 * max(float(np.abs(v).max()) for v in batch.values)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("machine", MACHINES)
def test_any_number_of_splits_gives_the_reference(machine: Machine, name: str) -> None:
    """Contexts of one to three parts; the number of splits and the cut into tiles change no bit."""
    lengths, new = [*LENGTHS, 1100, 600, 1537], [*NEW, 1, 3, 70]
    batch = make_batch(CASES[name], lengths, new)
    found = batch.run(machine)
    assert np.abs(found - batch.expected()).max() < tolerance(batch)
    for splits in (2, 3, 4, 16):
        assert np.array_equal(found, batch.run(machine, splits)), splits
    for most in (1, 16, 64):
        other = replace(batch, tiles=tiles_of(new, lengths, most))
        for splits in (1, 4):
            assert np.array_equal(found, other.run(machine, splits)), (most, splits)


@pytest.mark.parametrize("name", ["grouped", "sinks and window"])
@pytest.mark.parametrize("machine", MACHINES)
def test_parts_of_a_long_context_are_longer(machine: Machine, name: str) -> None:
    """Rows on both sides of where parts double."""
    end = PART * MOST_PARTS
    case = replace(CASES[name], heads=2, kv_heads=1, head_dim=8, value_dim=8)
    batch = make_batch(case, [end + 40, end, end + 1], [80, 1, 1], most=64)
    found = batch.run(machine)
    assert np.abs(found - batch.expected()).max() < tolerance(batch)
    for splits in (9, 16):
        assert np.array_equal(found, batch.run(machine, splits))
    single = replace(batch, tiles=tiles_of([80, 1, 1], [end + 40, end, end + 1], 1))
    assert np.array_equal(found, single.run(machine, 16))


@pytest.mark.parametrize("machine", MACHINES)
def test_the_cut_of_the_units_does_not_change_a_bit(machine: Machine) -> None:
    batch = make_batch(CASES["grouped"], LENGTHS, NEW)
    for splits in (1, 3):
        whole = batch.run(machine, splits)
        assert np.array_equal(whole, batch.run(machine, splits, cuts=(0.1, 0.37, 0.9)))


@pytest.mark.parametrize("machine", MACHINES)
def test_any_cut_of_the_tokens_into_tiles_gives_the_same(machine: Machine) -> None:
    batch = make_batch(CASES["group of seven, window"], LENGTHS, NEW)
    whole = batch.run(machine)
    for most in (1, 5, 100):
        other = replace(batch, tiles=tiles_of(NEW, LENGTHS, most))
        assert np.array_equal(other.run(machine), whole)


@pytest.mark.parametrize("machine", MACHINES)
def test_where_pages_lie_does_not_change_a_bit(machine: Machine) -> None:
    batch = make_batch(CASES["grouped"], LENGTHS, NEW)
    order = np.random.default_rng(1).permutation(len(batch.key_pages))
    place = np.argsort(order).astype(np.int32)
    moved = replace(
        batch,
        key_pages=batch.key_pages[order],
        value_pages=batch.value_pages[order],
        block_table=place[batch.block_table],
    )
    assert np.array_equal(moved.run(machine), batch.run(machine))


@pytest.mark.parametrize("machine", MACHINES)
def test_extreme_scores_pick_one_value(machine: Machine) -> None:
    """Scores of thousands leave one key: no overflow, no NaN, whatever the order in which keys come."""
    batch = make_batch(CASES["one head each, f32 cache"], LENGTHS, NEW)
    batch = replace(batch, query=batch.query * 1000)
    expected = batch.expected()
    # Two keys may come within a rounding error of each other; such a row is a coin toss, the others are exact.
    for splits in (1, 4):
        error = np.abs(batch.run(machine, splits) - expected).max(axis=2)
        assert np.isfinite(error).all()
        assert np.mean(error < tolerance(batch)) > 0.95


def test_a_plan_refuses_what_no_kernel_does() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        AttentionProblem(heads=3, kv_heads=2, head_dim=8, value_dim=8, scale=1.0)
    with pytest.raises(ValueError, match="float16 or float32"):
        AttentionProblem(heads=2, kv_heads=2, head_dim=8, value_dim=8, scale=1.0, cache_dtype="bfloat16")


@pytest.mark.parametrize("machine", [*MACHINES, TILES])
@pytest.mark.parametrize(
    ("pairs", "interleaved", "norm_eps"), [(0, False, None), (24, False, None), (7, True, 1e-6), (0, False, 1e-5)]
)
def test_queries_are_turned_and_normalised_where_they_lie(
    machine: Machine, pairs: int, interleaved: bool, norm_eps: float | None
) -> None:
    """Columns of wider rows, changed on the way: as if `rope_append` had written them as rows of their own before."""
    case = Case(7, 1, 48, 48)
    batch = make_batch(case, LENGTHS, NEW)
    rng, (tokens, heads, dim) = np.random.default_rng(5), batch.query.shape
    wide = np.concatenate(
        [np.full((tokens, 3), np.nan), batch.query.reshape(tokens, -1), np.full((tokens, 9), np.nan)], 1
    )
    rows = QueryRows(wide.shape[1], 3, pairs, interleaved, norm_eps, 1.0)
    angles = rng.standard_normal((tokens, 2, max(1, pairs))).astype(np.float32)
    weight = rng.standard_normal(dim).astype(np.float32)
    extras = [aligned(angles)] * bool(pairs) + [aligned(weight)] * (norm_eps is not None)
    problem = rope_problem(
        heads=heads,
        kv_heads=0,
        head_dim=dim,
        pairs=pairs,
        interleaved=interleaved,
        query_rows=(rows.stride, rows.offset, dim),
        norm_eps=norm_eps,
        norm_offset=1.0,
    )
    wide = aligned(wide.astype(np.float32))
    turned = aligned(np.zeros_like(batch.query))
    Compiled(default_kernel(RopeAppend, problem, machine), machine)(wide, *extras, turned, 0, tokens)
    before = replace(batch, query=turned)
    for splits in (1, 3):
        found = replace(batch, query=wide).run(machine, splits, query=rows, extras=extras)
        assert np.abs(found - before.run(machine, splits)).max() < tolerance(batch)
