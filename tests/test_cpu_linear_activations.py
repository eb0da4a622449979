"""Quantized activations are the nearest multiples of their scales, after the norm that was asked for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cpu_linear_cases import activation_sums
from kernel_harness import Compiled, aligned
from x86_machines import each_machine

from llmc.targets.cpu.forms import Bf16Pairs, integer_groups
from llmc.targets.cpu.quantize_activations import BytesProblem, padded
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser

SIZES = [(1, 1, 32), (3, 31, 32), (2, 33, 32), (2, 129, 64), (1, 300, 128), (2, 512, 64)]


def run(machine: Machine, x: np.ndarray, group: int, weights: tuple[np.ndarray, ...] = (), **params: object):
    tokens, k = x.shape
    size = padded(k, group)
    # Poisoned results: every byte must be written, and nothing past them.
    xq = aligned(np.full(tokens * size + 1, 55, np.int8))
    scales = aligned(np.full((tokens, size // group), np.nan, np.float32))
    sums = aligned(np.full((tokens, size // group), 1 << 30, np.int32))
    compiled = Compiled(integer_groups(machine, k, group).writer(Chooser(machine), **params).kernel, machine)
    compiled(aligned(x), *map(aligned, weights), xq, scales, sums, 0, tokens)
    assert xq[-1] == 55
    q = xq[:-1].reshape(tokens, -1, group).astype(np.int64)
    np.testing.assert_array_equal(sums, activation_sums(machine, q))
    return q, scales.astype(np.float64), sums


def check(
    x: np.ndarray,
    group: int,
    q: np.ndarray,
    scales: np.ndarray,
    _: np.ndarray,
    error: float = 1e-6,
    terms: np.ndarray | None = None,
) -> None:
    """x: the exact f64 activations. error: relative to a group's largest, what computing x in f32 may have cost; or
    relative to the group's largest of `terms`, the sizes of what adds up to x and may cancel."""

    def in_groups(values: np.ndarray) -> np.ndarray:
        grouped = np.zeros((len(x), padded(x.shape[1], group)))
        grouped[:, : x.shape[1]] = values
        return grouped.reshape(q.shape)

    grouped = in_groups(x)
    largest, allowed = (np.abs(in_groups(each)).max(2) for each in (x, x if terms is None else terms))
    assert (np.abs(scales * 127 - largest) <= allowed * error).all()
    assert np.abs(q).max() <= 127
    # Half a step, and what f32 rounding adds to it.
    assert (np.abs(q * scales[..., None] - grouped) <= (scales * 0.5 + allowed * 2 * error)[..., None]).all()


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("tokens", "k", "group"), SIZES)
def test_rounds_to_the_nearest_step(machine: Machine, tokens: int, k: int, group: int) -> None:
    x = np.random.default_rng(k).standard_normal((tokens, k)).astype(np.float32) * 10
    check(x, group, *run(machine, x, group))


@pytest.mark.parametrize("machine", each_machine())
def test_zero_and_tiny_groups_have_scale_zero(machine: Machine) -> None:
    x = np.zeros((2, 96), np.float32)
    x[0, 32:64], x[1, 64:] = 1e-38, -2e-20
    q, scales, sums = run(machine, x, 32)
    assert (q[0] == 0).all() and (scales[0] == 0).all() and (sums[0] == 0).all()
    assert (q[1, 2] == -127).all()


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("tokens", "k", "group"), SIZES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_rms_norm(machine: Machine, tokens: int, k: int, group: int, weight_offset: float) -> None:
    rng = np.random.default_rng(k)
    x, w = rng.standard_normal((tokens, k)).astype(np.float32), rng.standard_normal(k).astype(np.float32)
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * (w.astype(np.float64) + weight_offset)
    check(exact, group, *run(machine, x, group, (w,), norm="rms", eps=1e-5, weight_offset=weight_offset))


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("tokens", "k", "group"), SIZES[1:])
@pytest.mark.parametrize("norm_bias", [False, True])
def test_layer_norm(machine: Machine, tokens: int, k: int, group: int, norm_bias: bool) -> None:
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((tokens, k)) + 3).astype(np.float32)  # a mean that must be taken off first
    w, shift = (rng.standard_normal(k).astype(np.float32) for _ in range(2))
    mean = x.mean(1, keepdims=True, dtype=np.float64)
    factor = w / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + 1e-5)
    exact = (x - mean) * factor + shift * norm_bias
    terms = (np.abs(x) + np.abs(mean)) * np.abs(factor) + np.abs(shift) * norm_bias
    weights = (w, shift) if norm_bias else (w,)
    found = run(machine, x, group, weights, norm="layer", eps=1e-5, norm_bias=norm_bias)
    # Half a dozen roundings of 2^-24 each: the mean cancels a digit of x, and the bias may cancel what is left.
    check(exact, group, *found, error=4e-7, terms=terms)


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize("k", [1, 7, 33, 129])
def test_bf16_is_rounded_to_nearest_even(machine: Machine, k: int) -> None:
    x = np.random.default_rng(k).standard_normal((3, k)).astype(np.float32)
    x.view(np.uint32)[0, 0] = 0x3F808000  # a tie, to the even 0x3F80
    x.view(np.uint32)[1, 0] = 0x3F818000  # a tie, to the even 0x3F82
    x[2, -1] = np.nan
    width = k + k % 2
    xh = aligned(np.full(3 * width + 1, 7, np.uint16))
    Compiled(Bf16Pairs(k).writer(Chooser(machine)).kernel, machine)(aligned(x), xh, 0, 3)
    assert xh[-1] == 7
    found = xh[:-1].reshape(3, width)
    expected = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.isnan(found[2, k - 1 : k].view(ml_dtypes.bfloat16).astype(np.float32)).all()
    np.testing.assert_array_equal(found[:, :k].ravel()[:-1], expected.ravel()[:-1])
    assert (found[:, k:] == 0).all()
    assert found[0, 0] == 0x3F80 and found[1, 0] == 0x3F82


@pytest.mark.parametrize("machine", each_machine())
def test_bf16_after_a_norm(machine: Machine) -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((2, 33)).astype(np.float32), rng.standard_normal(33).astype(np.float32)
    xh = aligned(np.zeros((2, 34), np.uint16))
    Compiled(Bf16Pairs(33).writer(Chooser(machine), norm="rms", eps=1e-5).kernel, machine)(
        aligned(x), aligned(w), xh, 0, 2
    )
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * w
    # bf16 keeps 8 bits: half a step is at most 2^-8 of the value.
    np.testing.assert_allclose(xh.view(ml_dtypes.bfloat16)[:, :33].astype(np.float64), exact, rtol=2.0**-8 * 1.001)


def test_unknown_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="known: none, rms, layer"):
        BytesProblem(k=32, group=32, norm="batch")
