"""Attention kernels of encoders: rows that see their whole sequence, windows on both sides, tables of distances.

Tolerances are those of test_cpu_attention.py (f32: rounding in scores of a few units) and of
test_x86_attention_matrix.py (tile registers: bounds from the roundings to bf16).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attention_batches import LENGTHS, NEW, Batch, Case, make_batch, tiles_of
from kernel_harness import default_kernel
from test_cpu_attention import MACHINES as VECTOR_MACHINES
from test_cpu_attention import tolerance
from test_x86_attention_matrix import MACHINE, errors, needs_tiles

from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_tile import AttentionTile
from llmc.targets.machine import Machine

SPAN = 224  # whole pages, more than the longest sequence
WHOLE = [1, 7, 31, 32, 33, 129, 64, 200]  # lengths of sequences that are encoded at once

CASES = {
    "all": Case(4, 4, 32, 32, causal=False),
    "all, f32 cache": Case(3, 3, 64, 64, causal=False, cache_dtype="float32"),
    "window": Case(4, 2, 24, 40, causal=False, window=9),
    "window of pages": Case(2, 2, 16, 16, causal=False, window=64, cache_dtype="float32"),
    "window of one": Case(2, 2, 16, 16, causal=False, window=1),
    "table": Case(3, 3, 32, 32, causal=False, span=SPAN),
    "table, window, f32 cache": Case(4, 1, 20, 24, causal=False, span=SPAN, window=33, cache_dtype="float32"),
    "table and causal": Case(4, 2, 16, 16, span=SPAN),
    "softcap, sinks, table": Case(6, 2, 16, 16, causal=False, softcap=3.0, sinks=True, span=SPAN),
    "alibi both ways": Case(5, 5, 20, 16, causal=False, alibi=True),
}


def encoded(case: Case, most: int = 16, seed: int = 0) -> Batch:
    """Whole sequences, every token of them a query."""
    return make_batch(case, WHOLE, WHOLE, most=most, seed=seed)


def each_on_a_machine() -> list[object]:
    """Every case on every machine of vectors; one of them in turn where tests are to be quick."""
    machines = [param.values[0] for param in VECTOR_MACHINES]
    return [
        pytest.param(machine, name, marks=() if i % len(machines) == j else pytest.mark.slow)
        for i, name in enumerate(CASES)
        for j, machine in enumerate(machines)
    ]


@pytest.mark.parametrize(("machine", "name"), each_on_a_machine())
def test_rows_see_what_they_should_on_vectors(machine: Machine, name: str) -> None:
    batch = encoded(CASES[name])
    expected = batch.expected()
    for splits in (1, 3):
        assert np.abs(batch.run(machine, splits) - expected).max() < tolerance(batch), splits


@needs_tiles
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cache_dtype == "float16"])
def test_rows_see_what_they_should_on_tiles(name: str) -> None:
    for most in (64, 16):
        batch = encoded(CASES[name], most)
        for splits in (1, 3):
            rounded, loose = errors(batch, batch.run(MACHINE, splits))
            assert rounded.max() < 1, (most, splits)
            assert loose.max() < 1, (most, splits)


@needs_tiles
def test_more_rows_than_are_held_at_once() -> None:
    for name in ("all", "window", "table"):
        case = CASES[name]
        long = replace(case, span=320) if case.span else case
        batch = make_batch(long, [301, 5], [301, 5], most=300)
        assert errors(batch, batch.run(MACHINE, splits=2))[0].max() < 1, name


@pytest.mark.parametrize("machine", VECTOR_MACHINES)
def test_rows_of_a_part_of_a_sequence_see_all_of_it(machine: Machine) -> None:
    batch = make_batch(CASES["all"], LENGTHS, NEW)
    assert np.abs(batch.run(machine, 2) - batch.expected()).max() < tolerance(batch)


@pytest.mark.parametrize("name", ["all", "window", "table"])
def test_a_sequence_alone_gives_the_same_bits(name: str) -> None:
    """What stands beside a sequence in a step changes nothing of it, whatever its length."""
    machines = [param.values[0] for param in VECTOR_MACHINES]
    for machine in machines:
        batch = encoded(CASES[name])
        whole = batch.run(machine)
        row = 0
        for sequence, length in enumerate(WHOLE):
            one = replace(
                batch, keys=batch.keys[sequence : sequence + 1], values=batch.values[sequence : sequence + 1],
                block_table=batch.block_table[sequence : sequence + 1], query=batch.query[row : row + length],
                tiles=tiles_of([length], [length], 16),
            )  # fmt: skip
            assert np.array_equal(one.run(machine), whole[row : row + length]), length
            row += length


@pytest.mark.parametrize("machine", VECTOR_MACHINES)
def test_later_tokens_count_and_slots_behind_the_sequence_do_not(machine: Machine) -> None:
    batch = encoded(CASES["all"])
    before = batch.run(machine)
    value_pages = batch.value_pages.copy()
    page = batch.block_table[4][1]  # of the sequence of 33 tokens: its last token, then slots without one
    value_pages[page, :, 1:] = 1000
    assert np.array_equal(replace(batch, value_pages=value_pages).run(machine), before)
    value_pages[page, :, 0] += 1
    rows = slice(batch.starts[4], batch.starts[5])
    changed = replace(batch, value_pages=value_pages).run(machine)
    assert (np.abs(changed - before).max(axis=(1, 2))[rows] > 0).all()
    assert np.array_equal(np.delete(changed, np.r_[rows], axis=0), np.delete(before, np.r_[rows], axis=0))


def test_a_decoder_has_the_kernel_that_it_had() -> None:
    """A kernel that is not causal is another instance."""
    machine = VECTOR_MACHINES[0].values[0]
    plain, other = (default_kernel(AttentionTile, problem(causal=causal), machine) for causal in (True, False))
    assert plain.symbol != other.symbol


def test_a_table_of_broken_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="whole pages"):
        problem(span=40)


def problem(**facts: Any) -> AttentionProblem:
    return AttentionProblem(heads=4, kv_heads=2, head_dim=64, value_dim=64, scale=1.0, **facts)
