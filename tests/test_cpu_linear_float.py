"""Float linear ops are as exact as f32 sums are, for every weight type, size and number of tokens."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cpu_linear_cases import Case
from kernel_harness import Compiled, aligned
from x86_machines import MACHINES, each_machine, each_machine_and_tiles, runnable

from llmc.targets.cpu.codegen import build_module
from llmc.targets.cpu.linear_float import FloatRows
from llmc.targets.cpu.linear_plan import float_linear_plan
from llmc.targets.cpu.linear_problem import FloatProblem
from llmc.targets.forms import Converted
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser

TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def float_case(
    machine: Machine, tokens: int, n: int, k: int, dtype: str, activations: str = "f32", **fused: object
) -> Case:
    problem = FloatProblem(n=n, k=k, dtype=dtype, pairs=activations == "bf16", **fused)
    plan = float_linear_plan(Chooser(machine), problem)
    rng = np.random.default_rng(n * 7 + k)
    weight = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(TYPES[dtype])
    x = rng.standard_normal((tokens, k)).astype(np.float32)
    exact = x.astype(np.float64)
    if plan.arithmetic == "bf16":
        exact = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    arrays = {"x": x, **plan.layout.pack(weight)}
    for form in {variant.form for variant in plan.variants}:
        if isinstance(form, Converted):
            for buffer in form.buffers(tokens):
                room = buffer.empty()
                room.reshape(-1).view(np.uint8)[:] = 0xFF  # NaN behind the last row
                arrays[buffer.name] = aligned(room)
            written = [arrays[buffer.name] for buffer in form.buffers(tokens)]
            Compiled(form.writer(Chooser(machine)).kernel, machine)(aligned(x), *written, 0, tokens)
    return Case(machine, plan, arrays, exact, weight.astype(np.float64), **fused)


@pytest.mark.parametrize("machine", each_machine_and_tiles())
@pytest.mark.parametrize(
    ("dtype", "n", "k"), [("f32", 1, 1), ("f32", 33, 129), ("f16", 129, 33), ("bf16", 31, 129), ("bf16", 7, 64)]
)
def test_every_variant_at_awkward_sizes(machine: Machine, dtype: str, n: int, k: int) -> None:
    for tokens in (1, 7, 33):  # 33: two full blocks of tile registers and one row
        case = float_case(machine, tokens, n, k, dtype)
        for variant in case.plan.variants:
            # k roundings of 6e-8 in a row would be the worst; they average out to their root.
            case.check(variant, tolerance=5e-7)


@pytest.mark.parametrize("machine", each_machine())
def test_long_sums_lose_no_more_than_a_blocked_sgemm(machine: Machine) -> None:
    case = float_case(machine, 9, 40, 4864, "f32")
    numpy_error = np.abs(case.arrays["x"] @ _weight(case, 40, 4864).T - case.expected).max()
    for variant in case.plan.variants:
        # numpy's sgemm keeps several partial sums; one running sum loses a few times more.
        assert np.abs(case.run(variant) - case.expected).max() < 8 * numpy_error + 1e-6


def _weight(case: Case, n: int, k: int) -> np.ndarray:
    return case.plan.layout.unpack({"data": case.arrays["data"]}, n, k)["values"]


@pytest.mark.parametrize("machine", each_machine_and_tiles())
@pytest.mark.parametrize(("activation", "dtype"), [("none", "f32"), ("gelu", "bf16")])
def test_gate_bias_and_residual(machine: Machine, activation: str, dtype: str) -> None:
    case = float_case(machine, 13, 62, 40, dtype, activation=activation, bias=True, residual=True, gated=True)
    for variant in case.plan.variants:
        case.check(variant, pieces=2)


@pytest.mark.parametrize("name", [n for n, m in MACHINES.items() if m.has("avx512bf16") and runnable(n)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 131)])
def test_bf16_pairs(name: str, n: int, k: int) -> None:
    """vdpbf16ps rounds each of two additions, and flushes denormals; the products are exact."""
    for tokens in (1, 7, 31):
        case = float_case(MACHINES[name], tokens, n, k, "bf16", activations="bf16")
        assert case.plan.arithmetic == "bf16"
        for variant in case.plan.variants:
            case.check(variant, tolerance=5e-7)
    assert "vdpbf16ps" in build_module(case.plan.variants[0].kernel, case.machine).inspect_source("asm")


@pytest.mark.parametrize("machine", each_machine_and_tiles())
@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_of_rows_has_one_kernel(machine: Machine, dtype: str) -> None:
    low = 1
    for variant in float_linear_plan(Chooser(machine), FloatProblem(n=48, k=40, dtype=dtype)).variants:
        assert variant.low == low
        low = variant.high + 1 if variant.high is not None else 0
    assert low == 0


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_bf16_activations_fall_back_where_they_gain_nothing(name: str) -> None:
    for dtype in ("bf16", "f16"):
        problem = FloatProblem(n=8, k=8, dtype=dtype, pairs=True)
        assert float_linear_plan(Chooser(MACHINES[name]), problem).arithmetic == "f32"
        reason, machine = Chooser(MACHINES[name]).choose(FloatRows, problem, (1, 1)), MACHINES[name]
        assert (
            reason == f"bf16 activations need bf16 weights and products of their pairs, not {dtype} on {machine.name}"
        )
