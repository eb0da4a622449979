"""Rotary embedding and append on x86: against f64 numpy, for every style, and into the right slots only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from kernel_harness import Compiled, aligned, default_kernel
from x86_machines import machines_of

from llmc.targets.cpu.rope_append import RopeAppend, rope_problem
from llmc.targets.machine import Machine

MACHINES = machines_of("avx2", "avx512vnni")
PAGE, PAGES, TOKENS = 32, 4, 33


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    pairs: int
    interleaved: bool = False
    norm_eps: float | None = None
    norm_offset: float = 0.0
    cache_dtype: str = "float16"


CASES = {
    "half": Case(4, 2, 64, 64, 32),
    "half, partial": Case(3, 3, 80, 80, 16),
    "half, awkward": Case(2, 1, 20, 12, 7),
    "interleaved": Case(4, 4, 64, 64, 32, interleaved=True),
    "interleaved, partial, awkward": Case(2, 2, 33, 7, 7, interleaved=True, cache_dtype="float32"),
    "normalised": Case(4, 2, 128, 128, 64, norm_eps=1e-6),
    "normalised, offset weights, interleaved": Case(2, 1, 24, 24, 12, True, norm_eps=1e-6, norm_offset=1.0),
    "append only": Case(0, 2, 31, 31, 0),
    "queries only": Case(3, 0, 48, 48, 24, cache_dtype="float32"),
}


def turned(x: np.ndarray, weight: np.ndarray, angles: np.ndarray, case: Case) -> np.ndarray:
    """x [T, heads, dim], angles [T, 2, pairs], in f64."""
    wide = x.astype(np.float64)
    if case.norm_eps is not None:
        wide = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + case.norm_eps)
        wide = wide * (weight + case.norm_offset)
    if not case.pairs:
        return wide
    cos, sin = angles[:, None, 0].astype(np.float64), angles[:, None, 1].astype(np.float64)
    end = 2 * case.pairs
    first, second = (
        (slice(0, end, 2), slice(1, end, 2)) if case.interleaved else (slice(case.pairs), slice(case.pairs, end))
    )
    out = wide.copy()
    out[..., first] = wide[..., first] * cos - wide[..., second] * sin
    out[..., second] = wide[..., second] * cos + wide[..., first] * sin
    return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("machine", MACHINES)
def test_queries_turn_and_keys_and_values_reach_their_slots(machine: Machine, name: str) -> None:
    case = CASES[name]
    rng = np.random.default_rng(0)
    # q, k and v are columns of one merged buffer with a margin around them.
    widths = [case.heads * case.head_dim, case.kv_heads * case.head_dim, case.kv_heads * case.value_dim]
    starts = np.cumsum([3, *widths])
    merged = aligned(rng.standard_normal((TOKENS, int(starts[-1]) + 5)).astype(np.float32))
    stride = merged.shape[1]
    problem = rope_problem(
        **vars(case),
        query_rows=(stride, int(starts[0]), case.head_dim),
        key_rows=(stride, int(starts[1]), case.head_dim),
        value_rows=(stride, int(starts[2]), case.value_dim),
    )
    angles = aligned(rng.standard_normal((TOKENS, 2, max(1, case.pairs))).astype(np.float32))
    slots = aligned(rng.permutation(PAGES * PAGE)[:TOKENS].astype(np.int32))
    weights = [aligned(rng.standard_normal(case.head_dim).astype(np.float32)) for _ in range(2)]
    out = aligned(np.full((TOKENS, case.heads, case.head_dim), np.nan, np.float32)) if case.heads else None
    keys = aligned(np.full((PAGES, case.kv_heads, case.head_dim, PAGE), 9, case.cache_dtype))
    values = aligned(np.full((PAGES, case.kv_heads, PAGE, case.value_dim), 9, case.cache_dtype))
    args = [merged] * (bool(case.heads) + 2 * bool(case.kv_heads))
    if case.pairs:
        args += [angles]
    args += [slots] * bool(case.kv_heads)
    if case.norm_eps is not None:
        args += [weights[0]] * bool(case.heads) + [weights[1]] * bool(case.kv_heads)
    args += [out] if out is not None else []
    args += [keys, values] if case.kv_heads else []
    run = Compiled(default_kernel(RopeAppend, problem, machine), machine)
    for begin, end in reversed(list(pairwise((0, 1, 20, problem.units(TOKENS))))):
        run(*args, begin, end)

    q, k, v = (merged[:, starts[i] : starts[i + 1]] for i in range(3))
    if out is not None:
        expected = turned(q.reshape(TOKENS, case.heads, -1), weights[0], angles, case)
        assert np.abs(out - expected).max() < 3e-6 * np.abs(expected).max()
    if case.kv_heads:
        page, offset = slots // PAGE, slots % PAGE
        expected = turned(k.reshape(TOKENS, case.kv_heads, -1), weights[1], angles, case)
        # Rounded to the cache's dtype: half a unit in the last place of f16, on top of the arithmetic.
        unit = 2.0**-11 if case.cache_dtype == "float16" else 0.0
        error = np.abs(keys[page, :, :, offset] - expected)
        assert (error <= unit * np.abs(expected) + 3e-6 * np.abs(expected).max()).all()
        assert np.array_equal(values[page, :, offset], v.reshape(TOKENS, case.kv_heads, -1).astype(case.cache_dtype))
        untouched = np.ones((PAGES, PAGE), bool)
        untouched[page, offset] = False
        assert (keys.transpose(0, 3, 1, 2)[untouched] == 9).all()
        assert (values.transpose(0, 2, 1, 3)[untouched] == 9).all()


def test_a_kernel_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rope_problem(heads=1, kv_heads=1, head_dim=8, pairs=5)
