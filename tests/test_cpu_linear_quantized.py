"""Quantized linear ops equal exact arithmetic on the dequantized operands, at any size, split and number of tokens."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from cpu_linear_cases import ACTIVATIONS, Case, activation_sums, wide
from kernel_harness import Compiled, aligned
from x86_machines import MACHINES, each_machine, each_machine_and_tiles, runnable

from llmc.compiler.encodings.levels import table_levels
from llmc.runtime import cpu
from llmc.targets.cpu.linear_plan import quantized_linear_plan
from llmc.targets.cpu.linear_problem import QuantizedProblem
from llmc.targets.cpu.linear_quantized import QuantizedBlocks, QuantizedRows
from llmc.targets.cpu.variants import LinearPlan, Variant
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser
from llmc.targets.x86 import detect


def quantized_activations(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """xq i8 [T, groups, group], xscales f32 [T, groups], as the activation kernel makes them."""
    tokens, k = x.shape
    grouped = np.zeros((tokens, -(-k // group) * group), np.float32)
    grouped[:, :k] = x
    grouped = grouped.reshape(tokens, -1, group)
    scales = np.abs(grouped).max(2) / np.float32(127)
    q = np.rint(grouped / np.where(scales == 0, 1, scales)[..., None]).astype(np.int8)
    return q, scales.astype(np.float32)


def quantized_case(
    machine: Machine,
    tokens: int,
    n: int,
    k: int,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    table: bool = False,
    in_steps: bool = False,
    per_row: bool = False,
    activations: str = "i8",
    **fused: object,
) -> Case:
    """Random weights whose results are around 1, in every scheme."""
    problem = QuantizedProblem(
        n=n, k=k, bits=bits, group=group, symmetric=symmetric, table=table, in_steps=in_steps, per_row=per_row, **fused
    )
    shared = k if per_row else group  # inputs of a scale
    plan = quantized_linear_plan(Chooser(machine), problem, activations)
    rng = np.random.default_rng(n * 7 + k)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if symmetric else (0, 1 << bits)  # -128 comes from other tools
    q = rng.integers(low, high, (n, k)).astype(np.int8 if symmetric else np.uint8)
    spread = 1 / (high * math.sqrt(k))
    parts = {"q": q, "scales": ((rng.random((n, -(-k // shared))) + 0.5) * spread).astype(np.float16)}
    weight = (table_levels(bits).values[q + high].astype(np.float64) if table else q) * wide(parts["scales"], shared, k)
    magnitude = np.abs(weight)
    if not symmetric:
        share = -rng.random(parts["scales"].shape) * high
        parts["minimums"] = (np.round(share) if in_steps else share * spread).astype(np.float16)
        minimums = wide(parts["minimums"], group, k) * (wide(parts["scales"], group, k) if in_steps else 1)
        weight, magnitude = weight + minimums, magnitude + np.abs(minimums)
    x = rng.standard_normal((tokens, k)).astype(np.float32) * 2
    packed = plan.layout.pack(**parts)
    if activations != "i8":
        return Case(machine, plan, {"x": x, **packed}, x.astype(np.float64), weight, magnitude, **fused)
    grouped, xscales = quantized_activations(x, group)
    xq = grouped.reshape(tokens, -1)
    exact = xq[:, :k] * wide(xscales, group, k)
    arrays = {"xq": xq, "xscales": xscales, "xsums": activation_sums(machine, grouped), **packed}
    return Case(machine, plan, arrays, exact, weight, magnitude, **fused)


def variant_for(plan: LinearPlan, tokens: int) -> Variant:
    (found,) = [v for v in plan.variants if v.low <= tokens and (v.high is None or tokens <= v.high)]
    return found


def slow(*values: object) -> object:
    """Parameters that only the full sweep tries: what they cover, others cover in part."""
    return pytest.param(*values, marks=pytest.mark.slow)


EVEN, MINIMUMS, TABLE = {"symmetric": True}, {"symmetric": False}, {"symmetric": True, "table": True}
STEPS = {"symmetric": False, "in_steps": True}
ROW, ROW_TABLE = {"symmetric": True, "per_row": True}, {"symmetric": True, "table": True, "per_row": True}
SCHEMES = [
    (4, STEPS), slow(8, STEPS), slow(4, MINIMUMS), slow(8, EVEN), (8, MINIMUMS), (4, TABLE), (6, TABLE),
    (3, MINIMUMS), slow(5, TABLE), slow(2, TABLE), slow(5, EVEN), slow(4, EVEN),
]  # fmt: skip
SIZES = [
    (4, EVEN, 129, 129, 64),
    (4, MINIMUMS, 1030, 70, 32),  # 65 tiles: enough that kernels take two at a time
    (4, STEPS, 129, 70, 32),
    (8, EVEN, 31, 129, 64),
    (8, STEPS, 31, 70, 32),
    (8, MINIMUMS, 1, 31, 32),
    (4, TABLE, 129, 33, 32),
    slow(4, TABLE, 1030, 300, 128),
    (6, TABLE, 31, 129, 64),
    (2, TABLE, 33, 70, 32),
    (3, MINIMUMS, 31, 129, 64),
    (5, EVEN, 7, 33, 32),
    (8, ROW, 31, 129, 64),
    (4, ROW_TABLE, 129, 70, 32),
    (4, TABLE, 129, 70, 16),
    (6, EVEN, 31, 129, 16),
    (2, MINIMUMS, 33, 33, 16),
    slow(8, EVEN, 129, 31, 16),
    slow(4, STEPS, 1030, 70, 16),
    slow(6, TABLE, 7, 31, 16),
    slow(2, MINIMUMS, 1030, 129, 64),
    slow(3, TABLE, 1030, 300, 256),
    slow(5, TABLE, 1030, 129, 64),
    slow(5, MINIMUMS, 33, 300, 128),
    slow(6, EVEN, 129, 33, 32),
    slow(6, TABLE, 1030, 70, 32),
    slow(4, EVEN, 33, 33, 32),
    slow(4, MINIMUMS, 7, 300, 128),
    slow(8, EVEN, 1030, 300, 128),
    slow(6, TABLE, 1, 7, 128),
]


@pytest.mark.parametrize("machine", each_machine_and_tiles())
@pytest.mark.parametrize(("bits", "levels", "n", "k", "group"), SIZES)
def test_every_variant_at_awkward_sizes(
    machine: Machine, bits: int, levels: dict[str, bool], n: int, k: int, group: int
) -> None:
    """Every kernel is right for any T, so a plan may move its thresholds freely."""
    for tokens in (1, 7, 31):
        case = quantized_case(machine, tokens, n, k, bits=bits, group=group, **levels)
        for variant in case.plan.variants:
            case.check(variant)


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("bits", "levels"), [
    (4, EVEN), (4, MINIMUMS), (4, TABLE), (6, TABLE), (5, MINIMUMS), (5, TABLE), (3, EVEN), (2, TABLE),
])  # fmt: skip
def test_the_largest_integer_sums_are_exact(machine: Machine, bits: int, levels: dict[str, bool]) -> None:
    """Weights and activations at both ends of their ranges: every i16 sum is as far from zero as it can be."""
    group, k, n, tokens = 64, 128, 4 * 16, 9
    problem = QuantizedProblem(n=n, k=k, bits=bits, group=group, **levels)
    plan, symmetric = quantized_linear_plan(Chooser(machine), problem), levels["symmetric"]
    half = 1 << bits - 1
    ends = np.array([-half, half - 1] if symmetric else [0, 2 * half - 1])
    q = np.repeat(ends, n // 2)[:, None].repeat(k, 1).astype(np.int8 if symmetric else np.uint8)
    q[1::2, k // 2 :] = ends[0]
    ones = np.ones((n, k // group), np.float16)
    parts = {"q": q, "scales": ones} if symmetric else {"q": q, "scales": ones, "minimums": 0 * ones}
    xq = np.where(np.arange(tokens)[:, None] % 3 == 0, 127, -127).repeat(k, 1).astype(np.int8)
    xq[2::3, 2::4] = 127
    xsums = activation_sums(machine, xq.reshape(tokens, -1, group))
    scales = np.ones((tokens, k // group), np.float32)
    arrays = {"xq": xq, "xscales": scales, "xsums": xsums, **plan.layout.pack(**parts)}
    weight = table_levels(bits).values[q + half] if levels.get("table") else q
    case = Case(machine, plan, arrays, xq.astype(np.float64), weight.astype(np.float64))
    for variant in plan.variants:
        np.testing.assert_array_equal(case.run(variant), case.expected)


@pytest.mark.parametrize("machine", each_machine_and_tiles())
@pytest.mark.parametrize("activation", ["gelu", *(slow(name) for name in ACTIVATIONS if name != "gelu")])
def test_epilogues(machine: Machine, activation: str) -> None:
    fused = {"bits": 4, "symmetric": True, "group": 32, "activation": activation, "bias": True, "residual": True}
    case = quantized_case(machine, 17, 31, 64, **fused)
    for variant in (case.plan.variants[0], case.plan.variants[-2], case.plan.variants[-1]):
        case.check(variant)


@pytest.mark.parametrize("machine", each_machine_and_tiles())
@pytest.mark.parametrize(
    ("half", "levels", "bits"), [(33, MINIMUMS, 4), (70, EVEN, 8), (33, TABLE, 4), (70, TABLE, 6), slow(16, EVEN, 4)]
)
def test_gate_and_up_meet_in_one_unit(machine: Machine, half: int, levels: dict[str, bool], bits: int) -> None:
    fused = {
        **levels,
        "bits": bits,
        "group": 64,
        "activation": "silu",
        "gated": True,
        "bias": True,
        "residual": True,
    }
    case = quantized_case(machine, 5, 2 * half, 129, **fused)
    for variant in case.plan.variants:
        case.check(variant)


@pytest.mark.parametrize("machine", each_machine_and_tiles())
def test_any_split_of_the_units_gives_the_same_bits(machine: Machine) -> None:
    case = quantized_case(machine, 131, 200, 129, bits=4, symmetric=True, group=32)
    for variant in case.plan.variants:
        np.testing.assert_array_equal(case.run(variant, pieces=5), case.run(variant))
    case.check(variant_for(case.plan, 131), pieces=3)


@pytest.mark.parametrize(
    ("bits", "levels", "group"),
    [(4, EVEN, 96), (4, MINIMUMS, 128), (8, EVEN, 32), (8, MINIMUMS, 64), (4, TABLE, 64), (6, TABLE, 32),
     (5, TABLE, 64), (3, MINIMUMS, 32), (2, TABLE, 128)],
)  # fmt: skip
def test_tiles_give_the_bits_of_the_vector_units(bits: int, levels: dict[str, bool], group: int) -> None:
    """Integer sums are exact, and scaled in the same order: where rows come as 3, 8 or 16 + 5 makes no difference."""
    machine = detect.machine("sapphirerapids")
    if not machine.features <= cpu.features():
        pytest.skip("this computer has no tile registers, or the system does not lend them")
    for tokens in (3, 8, 21):
        case = quantized_case(machine, tokens, 200, 300, bits=bits, group=group, **levels)
        expected = case.run(case.plan.variants[0])
        tiled = [variant for variant in case.plan.variants if "tile" in variant.kernel.name]
        assert [(variant.low, variant.high) for variant in tiled] == [(5, 8), (9, 16)]
        for variant in tiled:
            np.testing.assert_array_equal(case.run(variant, pieces=3), expected)


@pytest.mark.parametrize("name", [name for name in MACHINES if runnable(name)])
def test_residual_may_be_the_result(name: str) -> None:
    case = quantized_case(MACHINES[name], 20, 40, 64, bits=4, symmetric=True, group=32, residual=True)
    for variant in case.plan.variants:
        separate = case.run(variant)
        buffer = aligned(case.arrays["residual"])
        arguments = [buffer if name in ("out", "residual") else case.aligned[name] for name in case.plan.names(variant)]
        Compiled(variant.kernel, case.machine)(*arguments, 20, 0, variant.units(20))
        np.testing.assert_array_equal(buffer, separate)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_plans_cover_every_number_of_tokens_once(machine: Machine) -> None:
    plan = quantized_linear_plan(Chooser(machine), QuantizedProblem(n=64, k=64, bits=4, group=32, symmetric=True))
    assert plan.variants[0].low == 1 and plan.variants[-1].high is None
    for before, after in itertools.pairwise(plan.variants):
        assert after.low == before.high + 1
    assert len({variant.kernel.symbol for variant in plan.variants}) == len(plan.variants)


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("bits", "levels"), SCHEMES)
def test_f32_activations_are_not_rounded(machine: Machine, bits: int, levels: dict[str, bool]) -> None:
    """Sums of f32 products over 129 inputs: a rounding of 6e-8 each, growing with the root of their number."""
    fused = {"activation": "silu", "gated": True, "bias": True} if bits == 4 else {"residual": True}
    case = quantized_case(machine, 9, 66, 129, bits=bits, group=32, activations="f32", **levels, **fused)
    for variant in case.plan.variants:
        case.check(variant)


def test_a_group_of_16_has_four_quads() -> None:
    machine, problem = MACHINES["avx2"], QuantizedProblem(n=33, k=64, bits=4, group=16, symmetric=True)
    for template in (QuantizedRows, QuantizedBlocks):
        made = template.default(problem, machine)
        assert made.unroll == 4 and made.refuse(problem, machine) == ""
        assert "4 quads is no whole number of 8" in dataclasses.replace(made, unroll=8).refuse(problem, machine)
