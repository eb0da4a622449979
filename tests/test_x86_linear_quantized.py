"""Quantized linear ops equal exact arithmetic on the dequantized operands, at any size, split and number of tokens."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from kernel_harness import Compiled, aligned
from x86_machines import MACHINES, each_machine, runnable

from llmc.targets.machine import Machine
from llmc.targets.x86.linear_plan import LinearPlan, Variant, quantized_linear_plan

_ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def quantized_activations(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """xq i8 [T, padded], xscales f32 [T, groups], xsums i32 [T, groups], as the activation kernel makes them."""
    tokens, k = x.shape
    grouped = np.zeros((tokens, -(-k // group) * group), np.float32)
    grouped[:, :k] = x
    grouped = grouped.reshape(tokens, -1, group)
    scales = np.abs(grouped).max(2) / np.float32(127)
    q = np.rint(grouped / np.where(scales == 0, 1, scales)[..., None]).astype(np.int8)
    return q.reshape(tokens, -1), scales.astype(np.float32), q.sum(2, dtype=np.int32)


class Case:
    """Random operands of one linear op, its plan, and the exact result with the size of the terms summed."""

    def __init__(self, machine: Machine, tokens: int, n: int, k: int, **params: object) -> None:
        self.machine, self.tokens = machine, tokens
        self.plan: LinearPlan = quantized_linear_plan(machine, n=n, k=k, **params)
        rng = np.random.default_rng(n * 7 + k)
        bits, group = params["bits"], params["group"]
        low, high = (-(1 << bits - 1) + (bits == 8), 1 << bits - 1) if params["symmetric"] else (0, 1 << bits)
        q = rng.integers(low, high, (n, k)).astype(np.int8 if params["symmetric"] else np.uint8)
        groups = -(-k // group)
        spread = 1 / (high * math.sqrt(k))
        scales = ((rng.random((n, groups)) + 0.5) * spread).astype(np.float16)
        parts = {"q": q, "scales": scales}
        weight = q * self._wide(scales, group, k)
        magnitude = np.abs(weight)
        if not params["symmetric"]:
            parts["minimums"] = (-rng.random((n, groups)) * spread * high).astype(np.float16)
            weight = weight + self._wide(parts["minimums"], group, k)
            magnitude = magnitude + np.abs(self._wide(parts["minimums"], group, k))
        x = rng.standard_normal((tokens, k)).astype(np.float32) * 2
        xq, xscales, xsums = quantized_activations(x, group)
        exact = xq[:, :k] * self._wide(xscales, group, k)
        self.arrays = {"xq": xq, "xscales": xscales, "xsums": xsums, **self.plan.layout.pack(**parts)}
        sums, self.terms = exact @ weight.T, np.abs(exact) @ magnitude.T
        gated = params.get("gated", False)
        features = n // 2 if gated else n
        if params.get("bias"):
            self.arrays["bias"] = rng.standard_normal(n).astype(np.float32)
            sums, self.terms = sums + self.arrays["bias"], self.terms + np.abs(self.arrays["bias"])
        function = ACTIVATIONS[params.get("activation", "none")]
        self.expected = function(sums[:, :features])
        if gated:
            up = sums[:, features:]
            # A product's error: each factor's, times the other. No activation steepens an error by more than 1.2.
            self.terms = 1.2 * self.terms[:, :features] * np.abs(up) + self.terms[:, features:] * np.abs(self.expected)
            self.expected = self.expected * up
        elif function is not ACTIVATIONS["none"]:
            self.terms = 1.2 * self.terms + 1
        if params.get("residual"):
            self.arrays["residual"] = rng.standard_normal((tokens, features)).astype(np.float32)
            self.expected = self.expected + self.arrays["residual"]
            self.terms = self.terms + np.abs(self.arrays["residual"])
        self.aligned = {name: aligned(values) for name, values in self.arrays.items()}

    @staticmethod
    def _wide(per_group: np.ndarray, group: int, k: int) -> np.ndarray:
        return np.repeat(per_group.astype(np.float64), group, axis=1)[:, :k]

    def run(self, variant: Variant, pieces: int = 1) -> np.ndarray:
        """The result, computed in `pieces` ranges of units, last first; bytes around it must stay untouched."""
        out = aligned(np.full(self.expected.size + 16, np.nan, np.float32))
        compiled = Compiled(variant.kernel, self.machine)
        arguments = [out if name == "out" else self.aligned[name] for name in self.plan.arguments]
        bounds = [variant.units(self.tokens) * i // pieces for i in range(pieces + 1)]
        for begin, end in reversed(list(itertools.pairwise(bounds))):
            compiled(*arguments, self.tokens, begin, end)
        assert np.isnan(out[self.expected.size :]).all()
        return out[: self.expected.size].reshape(self.expected.shape)

    def check(self, variant: Variant, pieces: int = 1) -> None:
        # Integer sums are exact; each group adds a few f32 roundings (6e-8) of terms no larger than `terms`.
        error = np.abs(self.run(variant, pieces) - self.expected) / np.maximum(self.terms, 1e-30)
        assert error.max() < 1e-6, variant.kernel.describe()


def variant_for(plan: LinearPlan, tokens: int) -> Variant:
    (found,) = [v for v in plan.variants if v.low <= tokens and (v.high is None or tokens <= v.high)]
    return found


SCHEMES = [(4, True), (4, False), (8, True), (8, False)]


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("bits", "symmetric"), SCHEMES)
@pytest.mark.parametrize(("n", "k", "group"), [(33, 33, 32), (129, 129, 64), (7, 300, 128)])
def test_every_variant_at_awkward_sizes(
    machine: Machine, bits: int, symmetric: bool, n: int, k: int, group: int
) -> None:
    """Every kernel is right for any T, so a plan may move its thresholds freely."""
    for tokens in (1, 7, 31):
        case = Case(machine, tokens, n, k, bits=bits, symmetric=symmetric, group=group)
        for variant in case.plan.variants:
            case.check(variant)


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(machine: Machine, activation: str) -> None:
    fused = {"bits": 4, "symmetric": True, "group": 32, "activation": activation, "bias": True, "residual": True}
    case = Case(machine, 17, 31, 64, **fused)
    for variant in case.plan.variants:
        case.check(variant)


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("half", "symmetric", "bits"), [(33, True, 4), (16, False, 4), (70, True, 8)])
def test_gate_and_up_meet_in_one_unit(machine: Machine, half: int, symmetric: bool, bits: int) -> None:
    fused = {
        "bits": bits,
        "symmetric": symmetric,
        "group": 64,
        "activation": "silu",
        "gated": True,
        "bias": True,
        "residual": True,
    }
    case = Case(machine, 5, 2 * half, 129, **fused)
    for variant in case.plan.variants:
        case.check(variant)


@pytest.mark.parametrize("machine", each_machine())
def test_any_split_of_the_units_gives_the_same_bits(machine: Machine) -> None:
    case = Case(machine, 131, 200, 129, bits=4, symmetric=True, group=32)
    for variant in case.plan.variants:
        np.testing.assert_array_equal(case.run(variant, pieces=5), case.run(variant))
    case.check(variant_for(case.plan, 131), pieces=3)


@pytest.mark.parametrize("name", [name for name in MACHINES if runnable(name)])
def test_residual_may_be_the_result(name: str) -> None:
    case = Case(MACHINES[name], 20, 40, 64, bits=4, symmetric=True, group=32, residual=True)
    for variant in case.plan.variants:
        separate = case.run(variant)
        buffer = aligned(case.arrays["residual"])
        arguments = [buffer if name in ("out", "residual") else case.aligned[name] for name in case.plan.arguments]
        Compiled(variant.kernel, case.machine)(*arguments, 20, 0, variant.units(20))
        np.testing.assert_array_equal(buffer, separate)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_plans_cover_every_number_of_tokens_once(machine: Machine) -> None:
    plan = quantized_linear_plan(machine, n=64, k=64, bits=4, group=32, symmetric=True)
    assert plan.variants[0].low == 1 and plan.variants[-1].high is None
    for before, after in itertools.pairwise(plan.variants):
        assert after.low == before.high + 1
    assert len({variant.kernel.symbol for variant in plan.variants}) == len(plan.variants)
