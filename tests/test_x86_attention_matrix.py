"""Paged attention on tile registers: against f64 numpy with and without its roundings, and what holds whatever the
numbers are.

With the same bf16 queries, keys and values the kernel differs from f64 by relative errors of its weights of at most
e = 2^-8 (1 + ln 2), and by sums in f32. A row's weights are summed as they were rounded, so that its error is at most
e / (1 - e) times the average distance of its values from their average.
"""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from attention_batches import LENGTHS, NEW, Batch, Case, make_batch, tiles_of
from kernel_harness import Compiled, aligned
from x86_machines import MACHINES

from llmc.runtime import cpu
from llmc.targets.cpu.attention import AttentionPlan, attention_plan
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.builder import let
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.cpu.vectors import load, maximum, range_kernel, store
from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser, space
from llmc.targets.x86.attention_matrix import (
    BIAS,
    FIXED,
    AttentionMatrix,
    excess,
    fits,
    load_bytes,
    power_pairs,
    reduce_rows,
)
from llmc.targets.x86.detect import machine
from llmc.targets.x86.isa import X86Bf16Dots

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

MACHINE = machine("sapphirerapids")
FEW = 8  # rows of a unit that the kernel leaves to the f32 kernel
ROUNDING = 2.0**-8  # of a number to bf16

needs_tiles = pytest.mark.skipif(not cpu.features() >= MACHINE.features, reason="this computer has no tile registers")

CASES = {
    "grouped": Case(4, 2, 64, 64),
    "one head each": Case(3, 3, 80, 80),
    "group of seven, window": Case(7, 1, 96, 96, window=40),
    "window of one page": Case(2, 1, 16, 16, window=32),
    "softcap, odd heads": Case(4, 2, 11, 20, softcap=3.0),
    "sinks and window": Case(8, 2, 128, 24, window=7, sinks=True),
    "alibi": Case(5, 5, 20, 17, alibi=True),
    "many heads share one": Case(40, 1, 16, 16, softcap=5.0, sinks=True, alibi=True),
    "wide": Case(2, 1, 256, 144),
}


def errors(batch: Batch, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Error over bound against the rounded and against the exact operands; each is at most 1 where the kernel is right.

    Against exact ones: a score moves by less than (2 u + u^2) sum |query * key|, u = 2^-8, and values by u.
    """
    values = np.stack([np.abs(v).max() for v in batch.values]).max()
    weights = ROUNDING * (1 + np.log(2))
    expected, spread, _ = batch.reference(FEW)
    sums = 1e-5 * values
    rounded = np.abs(found - expected) / (weights / (1 - weights) * spread + sums)
    expected, spread, exponent = batch.reference()
    moved = (1 + weights) * np.exp((2 * ROUNDING + ROUNDING**2) * exponent) - 1
    vague = moved < 0.5  # else the bound says nothing
    bound = np.where(vague, moved / (1 - np.minimum(moved, 0.5)), np.inf) * spread + ROUNDING * values + sums
    return rounded, np.abs(found - expected) / bound


@needs_tiles
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_splits_gives_the_reference(name: str) -> None:
    batch = make_batch(CASES[name], LENGTHS, NEW)
    for splits in (1, 2, 5):
        rounded, loose = errors(batch, batch.run(MACHINE, splits))
        assert rounded.max() < 1, splits
        assert loose.max() < 1, splits


@needs_tiles
@pytest.mark.parametrize("most", [1, 5, 64, 300])
def test_any_cut_of_the_tokens_into_tiles_gives_the_reference(most: int) -> None:
    """Tiles of more rows than are held at once included; the longest sequence spans several steps of pages."""
    for name in ("group of seven, window", "grouped"):
        batch = make_batch(CASES[name], [*LENGTHS, 301], [*NEW, 290], most=most)
        assert errors(batch, batch.run(MACHINE, splits=2))[0].max() < 1, name


@needs_tiles
@pytest.mark.parametrize("name", CASES)
def test_splits_and_tiles_do_not_change_a_bit(name: str) -> None:
    """Contexts of one to three parts, in tiles of any size that end at its multiples."""
    lengths, new = [*LENGTHS, 1100, 1537], [*NEW, 1, 70]
    batch = make_batch(CASES[name], lengths, new)
    whole = batch.run(MACHINE)
    for most in (16, 32, 64):
        other = replace(batch, tiles=tiles_of(new, lengths, most))
        for splits in (1, 2, 4):
            assert np.array_equal(whole, other.run(MACHINE, splits)), (most, splits)


@needs_tiles
@pytest.mark.parametrize("name", ["grouped", "group of seven, window", "softcap, odd heads", "wide"])
def test_any_knobs_give_the_reference_and_exact_ones_the_same_bits(name: str) -> None:
    case, bits = CASES[name], {}
    problem = AttentionProblem(scale=case.scale, **{k: v for k, v in vars(case).items() if k != "member"})
    members = list(space(AttentionMatrix, problem, MACHINE))
    default = AttentionMatrix.default(problem, MACHINE)
    for member in [default, *random.Random(0).sample(members, 6)]:
        found = make_batch(replace(case, member=member), [*LENGTHS, 301], [*NEW, 290]).run(MACHINE, splits=2)
        if member.few == default.few:  # the reference rounds groups of more than those
            assert errors(make_batch(case, [*LENGTHS, 301], [*NEW, 290]), found)[0].max() < 1, member
        assert bits.setdefault((member.few, member.step_pages), found.tobytes()) == found.tobytes(), member


@needs_tiles
def test_the_cut_of_the_units_does_not_change_a_bit() -> None:
    batch = make_batch(CASES["grouped"], LENGTHS, NEW)
    for splits in (1, 3):
        whole = batch.run(MACHINE, splits)
        assert np.array_equal(whole, batch.run(MACHINE, splits, cuts=(0.1, 0.37, 0.9)))


@needs_tiles
def test_where_pages_lie_does_not_change_a_bit() -> None:
    batch = make_batch(CASES["grouped"], LENGTHS, NEW)
    order = np.random.default_rng(1).permutation(len(batch.key_pages))
    place = np.argsort(order).astype(np.int32)
    moved = replace(
        batch,
        key_pages=batch.key_pages[order],
        value_pages=batch.value_pages[order],
        block_table=place[batch.block_table],
    )
    assert np.array_equal(moved.run(MACHINE), batch.run(MACHINE))


@needs_tiles
def test_what_later_tokens_hold_does_not_change_a_bit() -> None:
    """A row's result depends on nothing behind it: later keys and values may be anything."""
    case = CASES["grouped"]
    first = make_batch(case, [129], [129], seed=3)
    later = make_batch(case, [129], [129], seed=4)
    seen = 70
    sequence_pages = first.block_table[0]
    key_pages, value_pages = first.key_pages.copy(), first.value_pages.copy()
    for position in range(seen, 129):
        page, slot = sequence_pages[position // 32], position % 32
        key_pages[page, :, :, slot] = 100 * later.keys[0][position]
        value_pages[page, :, slot] = 100 * later.values[0][position]
    changed = replace(first, key_pages=key_pages, value_pages=value_pages).run(MACHINE)
    assert np.array_equal(changed[:seen], first.run(MACHINE)[:seen])
    assert not np.array_equal(changed, first.run(MACHINE))


@needs_tiles
def test_extreme_scores_pick_one_value() -> None:
    """Scores of thousands leave one key: no overflow, no NaN, whatever the order in which keys come."""
    batch = make_batch(CASES["one head each"], LENGTHS, NEW)
    batch = replace(batch, query=batch.query * 1000)
    expected, _, _ = batch.reference(FEW)
    greatest = max(float(np.abs(v).max()) for v in batch.values)
    # Two keys may come within a rounding error of each other; such a row is a coin toss.
    for splits in (1, 4):
        error = np.abs(batch.run(MACHINE, splits) - expected).max(axis=2)
        assert np.isfinite(error).all()
        assert np.mean(error < 1e-4 * greatest) > 0.95


@needs_tiles
def test_powers_are_as_near_as_they_say_and_rows_reduce() -> None:
    def template(machine: Machine) -> PrimFunc:
        isa = isa_for(machine)

        def unit(a: SimpleNamespace, u: Expr) -> None:
            rows = [let(load(a.x, r * 16, 16)) for r in range(16)]
            store(a.out, 0, reduce_rows(rows, maximum))
            table = [let(load_bytes(a.table, half * 16)) for half in range(2)]
            for r in range(0, 16, 2):
                low, high = (let(row + (FIXED + BIAS)) for row in rows[r : r + 2])
                pairs = let(power_pairs(isa, low, high, table))
                for half in range(2):
                    store(a.out, 16 + (r + half) * 16, isa.bf16_pair_to_f32(pairs, odd=half == 1))

        pointers = [("x", "float32"), ("table", "int32"), ("out", "float32")]
        return range_kernel(pointers, [], unit, X86Bf16Dots(isa.lanes).helper)

    x = -np.abs(np.random.default_rng(0).standard_normal((16, 16)) * 20).astype(np.float32)
    x[3, :6] = 0, -1e30, -200, -127, -126, -1 / 256
    x[4] = -np.arange(16) / 16
    out = aligned(np.zeros((17, 16), np.float32))
    table = aligned(np.array(excess(), np.uint8).view(np.int32))
    Compiled(kernel(template, MACHINE.key), MACHINE)(aligned(x), table, out, 0, 1)
    assert np.array_equal(out[0], x.max(axis=1))
    exact = np.exp2(x.astype(float))
    assert out[1 + 3, 0] == 1
    assert (out[1 + 3, 1:4] == 0).all()
    assert (np.abs(out[1:] - exact) <= ROUNDING * (1 + np.log(2)) * exact + 2.0**-126).all()


def test_tiles_serve_f16_caches_where_the_machine_has_them() -> None:
    def chosen(machine: Machine, value_dim: int = 64, cache_dtype: str = "float16") -> str:
        problem = AttentionProblem(4, 2, 64, value_dim, 1.0, cache_dtype=cache_dtype)
        plan = attention_plan(Chooser(machine), problem)
        assert isinstance(plan, AttentionPlan)
        return plan.tile.name

    assert fits(MACHINE, 64, "float16")
    assert chosen(MACHINE) == "attention_matrix"
    assert chosen(MACHINE, cache_dtype="float32") == "attention_tile"
    assert chosen(MACHINE, value_dim=8) == "attention_tile"
    assert chosen(MACHINES["avx512vnni"]) == "attention_tile"
