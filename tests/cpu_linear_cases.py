"""Running a linear plan, and the exact value of a linear op with the size of what was summed to get it."""

from __future__ import annotations

import itertools
import math

import numpy as np
from kernel_harness import Compiled, aligned

from llmc.targets.cpu.variants import LinearPlan, Variant
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.machine import Machine

_ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def wide(per_group: np.ndarray, group: int, k: int) -> np.ndarray:
    """[rows, groups] -> f64 [rows, k], each value over its group."""
    return np.repeat(per_group.astype(np.float64), group, axis=1)[:, :k]


def activation_sums(machine: Machine, q: np.ndarray) -> np.ndarray:
    """i32 [T, groups] of q [T, groups, group]: sums, or as `VectorIsa.pair_sums` says two i16 sums in one number."""
    if not isa_for(machine).pair_sums(q.shape[2]):
        return q.sum(2, dtype=np.int32)
    fours = q.reshape(*q.shape[:2], -1, 4).sum(2, dtype=np.int16)
    return np.ascontiguousarray(fours[..., 0::2] + fours[..., 1::2]).view(np.int32)[..., 0]


class Case:
    """One linear op: its plan, its arrays by argument name, `expected` in f64, and `terms`, which errors relate to.

    x, weight: exact f64 [T, k] and [n, k]. magnitude: |weight|, or what its parts add up to without their signs.
    """

    def __init__(
        self,
        machine: Machine,
        plan: LinearPlan,
        arrays: dict[str, np.ndarray],
        x: np.ndarray,
        weight: np.ndarray,
        magnitude: np.ndarray | None = None,
        *,
        gated: bool = False,
        activation: str = "none",
        bias: bool = False,
        residual: bool = False,
    ) -> None:
        self.machine, self.plan, self.arrays, self.tokens = machine, plan, dict(arrays), len(x)
        n = len(weight)
        rng = np.random.default_rng(n)
        features = n // 2 if gated else n
        sums, terms = x @ weight.T, np.abs(x) @ (np.abs(weight) if magnitude is None else magnitude).T
        if bias:
            self.arrays["bias"] = rng.standard_normal(n).astype(np.float32)
            sums, terms = sums + self.arrays["bias"], terms + np.abs(self.arrays["bias"])
        self.expected, self.terms = ACTIVATIONS[activation](sums[:, :features]), terms[:, :features]
        if activation != "none":
            # No activation steepens an error by more than 1.2; its own error is an ulp of 1 or of the value.
            self.terms = 1.2 * self.terms + 1
        if gated:  # A product's error: each factor's, times the other.
            up = sums[:, features:]
            self.terms = self.terms * np.abs(up) + terms[:, features:] * np.abs(self.expected)
            self.expected = self.expected * up
        if residual:
            self.arrays["residual"] = rng.standard_normal((self.tokens, features)).astype(np.float32)
            self.expected = self.expected + self.arrays["residual"]
            self.terms = self.terms + np.abs(self.arrays["residual"])
        self.aligned = {name: aligned(values) for name, values in self.arrays.items()}

    def run(self, variant: Variant, pieces: int = 1) -> np.ndarray:
        """The result, computed in `pieces` ranges of units, last first; what lies behind it must stay untouched."""
        out = aligned(np.full(self.expected.size + 16, np.nan, np.float32))
        compiled = Compiled(variant.kernel, self.machine)
        arguments = [out if name == "out" else self.aligned[name] for name in self.plan.names(variant)]
        bounds = [variant.units(self.tokens) * i // pieces for i in range(pieces + 1)]
        for begin, end in reversed(list(itertools.pairwise(bounds))):
            compiled(*arguments, self.tokens, begin, end)
        assert np.isnan(out[self.expected.size :]).all()
        return out[: self.expected.size].reshape(self.expected.shape)

    def check(self, variant: Variant, pieces: int = 1, tolerance: float = 1e-6) -> None:
        """Every element's error is below `tolerance` of the terms that were summed (f32 rounds by 6e-8)."""
        error = np.abs(self.run(variant, pieces) - self.expected) / np.maximum(self.terms, 1e-30)
        assert error.max() < tolerance, variant.kernel.describe()
