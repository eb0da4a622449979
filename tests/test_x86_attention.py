"""Paged attention on x86: against f64 numpy, and the properties that hold whatever the numbers are.

The cache holds numbers rounded to its dtype, and so does the reference, so f16 needs no wider tolerance than f32:
results are averages of values, off by rounding in scores of a few units (1e-5 of the greatest value).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_batches import LENGTHS, NEW, Batch, Case, make_batch, tiles_of
from x86_machines import each_machine

from llmc.targets.machine import Machine
from llmc.targets.x86.attention import attention_plan

MACHINES = [param for param in each_machine() if param.id in ("avx2", "avx512vnni")]

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
    batch = make_batch(CASES[name], LENGTHS, NEW)
    expected = batch.expected()
    for splits in (1, 2, 5):
        assert np.abs(batch.run(machine, splits) - expected).max() < tolerance(batch), splits


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
        assert np.abs(other.run(machine) - whole).max() < tolerance(batch)


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
    machine = MACHINES[0].values[0]
    with pytest.raises(ValueError, match="no multiple"):
        attention_plan(machine, heads=3, kv_heads=2, head_dim=8, scale=1.0)
    with pytest.raises(ValueError, match="float16 or float32"):
        attention_plan(machine, heads=2, kv_heads=2, head_dim=8, scale=1.0, cache_dtype="bfloat16")
