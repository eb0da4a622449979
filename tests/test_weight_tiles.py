"""All instruction sets of an architecture read the same bytes of a weight, and make the same bits of them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cpu_linear_cases import Case, activation_sums
from x86_machines import MACHINES, runnable

from llmc.compiler.encodings.levels import table_levels
from llmc.targets.cpu.forms import IntegerGroups
from llmc.targets.cpu.linear_plan import float_linear_plan, quantized_linear_plan
from llmc.targets.cpu.linear_problem import FloatProblem, QuantizedProblem
from llmc.targets.cpu.variants import LinearPlan
from llmc.targets.cpu.vector_isa import isa_for, weight_tiles
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser
from llmc.targets.x86 import detect

GROUP = 32
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
INTEGERS = [
    (4, "even"),
    (4, "minimums"),
    (8, "even"),
    (8, "minimums"),
    (4, "table"),
    (6, "table"),
    (5, "table"),
    (3, "minimums"),
    (2, "even"),
]
SCHEMES = [*INTEGERS, *FLOATS]
ALL = [*MACHINES.values(), *(detect.machine(name) for name in detect.names())]
RUNNABLE = {name: machine for name, machine in MACHINES.items() if runnable(name)}
# Eight lanes with VNNI, where this computer has it in AVX-512's coding only.
_features = MACHINES["avx512vnni"].features
NARROW = Machine("narrow", "x86", "znver4", _features, 256)
if "avx512vnni" in RUNNABLE:
    RUNNABLE["vnni on 8 lanes"] = NARROW


def problem_of(scheme: Any, n: int, k: int, gated: bool = False) -> QuantizedProblem | FloatProblem:
    if isinstance(scheme, str):
        return FloatProblem(n=n, k=k, dtype=scheme, gated=gated)
    bits, levels = scheme
    kind = {"symmetric": levels != "minimums", "table": levels == "table"}
    return QuantizedProblem(n=n, k=k, bits=bits, group=GROUP, gated=gated, **kind)


def parts_of(scheme: Any, n: int, k: int) -> list[np.ndarray]:
    """A random weight, as its layout packs it: both ends of the range are among the integers."""
    rng = np.random.default_rng(n + k)
    if isinstance(scheme, str):
        return [rng.standard_normal((n, k)).astype(FLOATS[scheme])]
    bits, symmetric = scheme[0], scheme[1] != "minimums"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)
    q = rng.integers(low, high + 1, (n, k))
    q.ravel()[::5], q.ravel()[1::5] = low, high
    scales = ((0.5 + rng.random((n, -(-k // GROUP)))) / high).astype(np.float16)
    minimums = [] if symmetric else [(-rng.random(scales.shape)).astype(np.float16)]
    return [q.astype(np.int8 if symmetric else np.uint8), scales, *minimums]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_is_packed_alike_for_every_machine(scheme: Any, gated: bool) -> None:
    n, k = 66, 129
    packed = [problem_of(scheme, n, k, gated).layout(machine).pack(*parts_of(scheme, n, k)) for machine in ALL]
    for other in packed[1:]:
        assert other.keys() == packed[0].keys()
        for name, array in packed[0].items():
            assert array.dtype == other[name].dtype
            np.testing.assert_array_equal(array, other[name])


def test_the_widest_vectors_fill_a_tile_and_narrower_ones_divide_it() -> None:
    lanes = {isa_for(machine).lanes for machine in ALL}
    (rows,) = {weight_tiles(machine).rows for machine in ALL}
    assert len(lanes) > 1 and rows == max(lanes) and all(rows % each == 0 for each in lanes)


def fma(a: float, b: float, c: float) -> np.float32:
    """a * b + c of f32, rounded once, to nearest even."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))  # rounded twice: it, or one beside it
    beside = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    return min((near, *beside), key=lambda f: (abs(Fraction(float(f)) - exact), int(f.view(np.uint32)) & 1))


def in_order(scheme: Any, x: dict[str, np.ndarray], parts: list[np.ndarray]) -> np.ndarray:
    """What kernels compute, addition by addition: over the inputs, or over groups of them whose sums are exact."""
    rows, n = len(next(iter(x.values()))), len(parts[0])
    out = np.zeros((rows, n), np.float32)
    for row, column in np.ndindex(rows, n):
        total = np.float32(0)
        if isinstance(scheme, str):
            for a, w in zip(x["x"][row], parts[0][column].astype(np.float32), strict=True):
                total = fma(a, w, total)
        else:
            q = np.zeros(x["xq"].shape[1], np.int64)
            q[: parts[0].shape[1]] = parts[0][column]
            unit = np.float32(1)
            if scheme[1] == "table":
                levels = table_levels(scheme[0])
                q, unit = np.array(levels.bytes)[q - levels.lowest], np.float32(levels.unit)
            for g, scale in enumerate(x["xscales"][row]):
                inside = slice(g * GROUP, (g + 1) * GROUP)
                a = x["xq"][row, inside].astype(np.int64)
                total = fma(np.float32((q[inside] * a).sum()), np.float32(parts[1][column, g]) * (scale * unit), total)
                if len(parts) == 3:
                    total = fma(np.float32(parts[2][column, g]), scale * np.float32(a.sum()), total)
        out[row, column] = total
    return out


def plan_of(scheme: Any, n: int, k: int, machine: Machine) -> LinearPlan:
    problem, chooser = problem_of(scheme, n, k), Chooser(machine)
    if isinstance(problem, FloatProblem):
        return float_linear_plan(chooser, problem)
    return quantized_linear_plan(chooser, problem)


@pytest.mark.parametrize(("tokens", "n", "k"), [(9, 40, 70), pytest.param(7, 33, 129, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_instruction_set_makes_the_same_bits_of_the_same_bytes(scheme: Any, tokens: int, n: int, k: int) -> None:
    """Also of half a tile, and of rows of zeros that fill it; whatever kernel serves the tokens."""
    rng = np.random.default_rng(k)
    activations = rng.standard_normal((tokens, k)).astype(np.float32)
    x = {"x": activations}
    if not isinstance(scheme, str):
        x = IntegerGroups(k, GROUP).encode(activations)
    parts = parts_of(scheme, n, k)
    expected = in_order(scheme, x, parts)
    packed = problem_of(scheme, n, k).layout(MACHINES["avx2"]).pack(*parts)
    for machine in RUNNABLE.values():
        given = dict(x)
        if "xsums" in given:
            given["xsums"] = activation_sums(machine, given["xq"].reshape(tokens, -1, GROUP))
        case = Case(machine, plan_of(scheme, n, k, machine), given | packed, activations, np.zeros((n, k)))
        for variant in case.plan.variants:
            found = case.run(variant)
            np.testing.assert_array_equal(found, expected, err_msg=f"{machine.name}: {variant.kernel.describe()}")
