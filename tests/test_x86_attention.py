"""Paged attention on x86: against f64 numpy, and the properties that hold whatever the numbers are.

The cache holds numbers rounded to its dtype, and so does the reference, so f16 needs no wider tolerance than f32:
results are averages of values, off by rounding in scores of a few units (1e-5 of the greatest value).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from kernel_harness import Compiled, aligned
from x86_machines import each_machine

from llmc.targets.machine import Machine
from llmc.targets.x86.attention import AttentionPlan, attention_plan

PAGE, TILE = 32, 16
MACHINES = [param for param in each_machine() if param.id in ("avx2", "avx512vnni")]


@dataclass(frozen=True)
class Case:
    """One kernel's parameters; head counts and sizes are awkward on purpose."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    cache_dtype: str = "float16"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def plan(self, machine: Machine) -> AttentionPlan:
        return attention_plan(machine, scale=self.scale, **vars(self))


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


@dataclass(frozen=True)
class Batch:
    """Sequences in a paged cache and the query rows of one step."""

    case: Case
    keys: list[np.ndarray]  # a sequence's [length, kv_heads, head_dim]
    values: list[np.ndarray]
    key_pages: np.ndarray
    value_pages: np.ndarray
    block_table: np.ndarray
    tiles: np.ndarray
    query: np.ndarray
    sinks: np.ndarray
    slopes: np.ndarray

    def expected(self) -> np.ndarray:
        """Softmax attention in f64, one row and head at a time."""
        case = self.case
        out = np.zeros((len(self.query), case.heads, case.value_dim))
        for sequence, first, count, position in self.tiles:
            for row in range(count):
                last = position + row
                seen = slice(max(0, last - case.window + 1) if case.window else 0, last + 1)
                for head in range(case.heads):
                    kv = head * case.kv_heads // case.heads
                    scores = self.keys[sequence][seen, kv].astype(float) @ self.query[first + row, head].astype(float)
                    scores *= case.scale
                    if case.softcap:
                        scores = case.softcap * np.tanh(scores / case.softcap)
                    if case.alibi:
                        scores += self.slopes[head] * (np.arange(seen.start, seen.stop) - last)
                    top = max(scores.max(), self.sinks[head]) if case.sinks else scores.max()
                    weights = np.exp(scores - top)
                    total = weights.sum() + (np.exp(self.sinks[head] - top) if case.sinks else 0)
                    out[first + row, head] = weights @ self.values[sequence][seen, kv].astype(float) / total
        return out

    def run(self, machine: Machine, splits: int = 1, cuts: tuple[float, ...] = ()) -> np.ndarray:
        """The kernels' result, the work units cut into ranges at these fractions."""
        case, plan = self.case, self.case.plan(machine)
        tokens = len(self.query)
        out = aligned(np.full((tokens, case.heads, case.value_dim), np.nan, np.float32))
        state = aligned(np.full(plan.state_elements(tokens, splits), np.nan, np.float32))
        partial = aligned(np.full(max(1, plan.partial_elements(tokens, splits)), np.nan, np.float32))
        args = [self.query, self.key_pages, self.value_pages, self.tiles, self.block_table]
        args += [self.sinks] * case.sinks + [self.slopes] * case.alibi
        arrays = [*(aligned(a) for a in args), out, state, partial]
        tile = Compiled(plan.tile, machine)
        for begin, end in reversed(ranges(plan.tile_units(len(self.tiles), splits), cuts)):
            tile(*arrays, self.block_table.shape[1], splits, begin, end)
        if splits > 1:
            combine = Compiled(plan.combine, machine)
            for begin, end in reversed(ranges(plan.combine_units(tokens), cuts)):
                combine(state, partial, out, splits, begin, end)
        return out


def ranges(units: int, cuts: tuple[float, ...]) -> list[tuple[int, int]]:
    return list(pairwise([0, *(int(units * cut) for cut in cuts), units]))


def tiles_of(new: list[int], lengths: list[int], most: int) -> np.ndarray:
    """Tiles of at most `most` rows for the last `new[i]` tokens of each sequence."""
    tiles, row = [], 0
    for sequence, (count, length) in enumerate(zip(new, lengths, strict=True)):
        for start in range(length - count, length, most):
            rows = min(most, length - start)
            tiles.append((sequence, row, rows, start))
            row += rows
    return np.array(tiles, np.int32)


def make_batch(case: Case, lengths: list[int], new: list[int], *, seed: int = 0, most: int = TILE) -> Batch:
    """Random sequences of which the last `new` tokens are queries. Slots that hold no token are NaN."""
    rng = np.random.default_rng(seed)
    needed = [-(-length // PAGE) for length in lengths]
    pages = sum(needed) + 2
    order = rng.permutation(pages)
    table = np.full((len(lengths), max(needed) + 1), order[-1], np.int32)
    key_pages = np.full((pages, case.kv_heads, case.head_dim, PAGE), np.nan, case.cache_dtype)
    value_pages = np.full((pages, case.kv_heads, PAGE, case.value_dim), np.nan, case.cache_dtype)
    keys, values = [], []
    for sequence, length in enumerate(lengths):
        keys.append(rng.standard_normal((length, case.kv_heads, case.head_dim)).astype(case.cache_dtype))
        values.append(rng.standard_normal((length, case.kv_heads, case.value_dim)).astype(case.cache_dtype))
        for number in range(needed[sequence]):
            page, order = order[0], order[1:]
            table[sequence, number] = page
            block = slice(number * PAGE, (number + 1) * PAGE)
            filled = len(keys[-1][block])
            key_pages[page, :, :, :filled] = keys[-1][block].transpose(1, 2, 0)
            value_pages[page, :, :filled] = values[-1][block].transpose(1, 0, 2)
    query = (2 * rng.standard_normal((sum(new), case.heads, case.head_dim))).astype(np.float32)
    sinks = rng.standard_normal(case.heads).astype(np.float32)
    slopes = (0.5 ** np.arange(1, case.heads + 1)).astype(np.float32)
    tiles = tiles_of(new, lengths, most)
    return Batch(case, keys, values, key_pages, value_pages, table, tiles, query, sinks, slopes)


# Prefills of 1, 7, 33 and 129 tokens, a chunk in the middle of a page, and decodes with contexts of 31 and 200.
LENGTHS, NEW = [1, 7, 33, 129, 70, 31, 200, 32], [1, 7, 33, 129, 19, 1, 1, 1]


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
    for most in (1, 5):
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
