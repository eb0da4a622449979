"""Norms on x86: against f64 numpy at awkward widths, and what must not depend on how the work is cut.

Sums of n squares in f32 with 32 or more independent terms are off by a few units in the last place: 2e-6 relative.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from kernel_harness import Compiled, aligned, default_kernel
from x86_machines import machines_of

from llmc.targets.cpu.forms import Bf16Pairs, integer_groups
from llmc.targets.cpu.norms import Norm, NormProblem
from llmc.targets.cpu.rope_append import CHAINS, RopeAppend, rope_problem
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser

MACHINES = machines_of("avx2", "avx512vnni")
EPS = 1e-5
ROWS = 7


def norm_kernel(machine: Machine, **facts: Any) -> Kernel:
    return default_kernel(Norm, NormProblem(**facts), machine)


def reference(kind: str, x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, offset: int) -> np.ndarray:
    wide = x.astype(np.float64)
    if kind == "layer":
        wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + EPS)
    wide = wide if weight is None else wide * (weight.astype(np.float64) + offset)
    return wide if bias is None else wide + bias


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return aligned(rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("features", [1, 7, 31, 33, 129, 896])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("machine", MACHINES)
def test_rows_match_the_reference(machine: Machine, kind: str, features: int) -> None:
    rng = np.random.default_rng(features)
    x, weight = normal(rng, ROWS, features), normal(rng, features)
    out = aligned(np.full((ROWS, features), np.nan, np.float32))
    Compiled(norm_kernel(machine, kind=kind, features=features, eps=EPS), machine)(x, weight, out, 0, ROWS)
    expected = reference(kind, x, weight, None, 0)
    assert np.abs(out - expected).max() <= 2e-6 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("machine", MACHINES)
def test_residual_bias_and_offset_weights(machine: Machine) -> None:
    """The sum is exact, the norm is of the sum, and any cut of the rows gives the same bits."""
    rng, features = np.random.default_rng(0), 100
    x, addend, weight, bias = normal(rng, ROWS, features), normal(rng, ROWS, features), *normal(rng, 2, features)
    kernel = norm_kernel(machine, kind="layer", features=features, eps=EPS, bias=True, weight_offset=1, residual=True)
    run, results = Compiled(kernel, machine), []
    for cuts in ((0, ROWS), (0, 2, 3, ROWS)):
        total, out = aligned(np.zeros_like(x)), aligned(np.zeros_like(x))
        for begin, end in pairwise(cuts):
            run(x, addend, total, aligned(weight), aligned(bias), out, begin, end)
        assert np.array_equal(total, x + addend)
        results.append(out)
    assert np.array_equal(*results)
    assert np.abs(results[0] - reference("layer", x + addend, weight, bias, 1)).max() < 1e-5


@pytest.mark.parametrize("machine", MACHINES)
def test_a_row_may_be_normalised_in_place(machine: Machine) -> None:
    rng, features = np.random.default_rng(0), 77
    x, addend = normal(rng, ROWS, features), normal(rng, ROWS, features)
    expected = reference("rms", x + addend, None, None, 0)
    kernel = norm_kernel(machine, kind="rms", features=features, eps=EPS, weight=False, residual=True)
    out = aligned(np.zeros_like(x))
    Compiled(kernel, machine)(x, addend, addend, out, 0, ROWS)
    assert np.abs(out - expected).max() < 1e-5
    plain = norm_kernel(machine, kind="rms", features=features, eps=EPS, weight=False)
    Compiled(plain, machine)(addend, addend, 0, ROWS)
    assert np.array_equal(addend, out)


@pytest.mark.parametrize("machine", MACHINES)
def test_heads_may_have_weights_of_their_own(machine: Machine) -> None:
    rng, heads, dim = np.random.default_rng(0), 3, 20
    x, weight = normal(rng, ROWS, heads, dim), normal(rng, heads, dim)
    out = aligned(np.zeros_like(x))
    kernel = norm_kernel(machine, kind="rms", features=dim, eps=EPS, groups=heads)
    Compiled(kernel, machine)(x, weight, out, 0, ROWS * heads)
    assert np.abs(out - reference("rms", x, weight, None, 0)).max() < 1e-5


@pytest.mark.parametrize("machine", MACHINES)
def test_a_layer_norm_is_not_upset_by_a_large_mean(machine: Machine) -> None:
    """The variance is of centred values, not a difference of squares: 1000 +- 1 keeps three digits more."""
    features = 256
    x = aligned((1000 + np.random.default_rng(0).standard_normal((ROWS, features))).astype(np.float32))
    out = aligned(np.zeros_like(x))
    kernel = norm_kernel(machine, kind="layer", features=features, eps=EPS, weight=False)
    Compiled(kernel, machine)(x, out, 0, ROWS)
    # The mean of the f32 inputs is known to about 6e-5 (an ulp of 1000).
    assert np.abs(out - reference("layer", x, None, None, 0)).max() < 2e-4


@pytest.mark.parametrize("features", [1, 7, 31, 33, 129, 300])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_norm_on_the_way_to_bytes_or_bf16_has_the_bits_of_one_of_its_own(
    machine: Machine, kind: str, features: int
) -> None:
    """So it changes nothing that a norm is done where its result is read."""
    rng, chooser = np.random.default_rng(features), Chooser(machine)
    x, weight, bias = normal(rng, ROWS, features), normal(rng, features), normal(rng, features)
    weights = (weight, bias) if kind == "layer" else (weight,)
    facts = {"eps": EPS, "weight_offset": 1}
    alone = norm_kernel(machine, kind=kind, features=features, bias=kind == "layer", **facts)
    normed = aligned(np.full((ROWS, features), np.nan, np.float32))
    Compiled(alone, machine)(x, *weights, normed, 0, ROWS)
    for form in (integer_groups(machine, features, 32), Bf16Pairs(features)):
        together = form.writer(chooser, norm=kind, norm_bias=kind == "layer", **facts).kernel
        once, twice = ([aligned(buffer.empty()) for buffer in form.buffers(ROWS)] for _ in range(2))
        Compiled(together, machine)(x, *weights, *once, 0, ROWS)
        Compiled(form.writer(chooser).kernel, machine)(normed, *twice, 0, ROWS)
        for one, other in zip(once, twice, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dim", [1, 7, 31, 33, 129])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_head_is_normalised_as_a_row_is(machine: Machine, dim: int) -> None:
    """Where it is turned by nothing, and a row's sums are as many as a head's."""
    rng, heads = np.random.default_rng(dim), 3
    x, weight = normal(rng, ROWS, heads, dim), normal(rng, dim)
    row = NormProblem("rms", dim, EPS, weight_offset=1)
    head = rope_problem(heads=heads, kv_heads=0, head_dim=dim, norm_eps=EPS, norm_offset=1)
    found = []
    kernels = [(Norm(CHAINS, 1).kernel(row, machine), ROWS * heads), (default_kernel(RopeAppend, head, machine), ROWS)]
    for kernel, units in kernels:
        found.append(aligned(np.full(x.shape, np.nan, np.float32)))
        Compiled(kernel, machine)(x, weight, found[-1], 0, units)
    np.testing.assert_array_equal(*found)
