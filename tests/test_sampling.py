"""Sampling: the filters keep what their definitions say, at any size, and draws follow the probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.sampling import (
    Sampler,
    SamplingOptions,
    apply_repetition_penalty,
    candidates,
    draw,
    largest,
    softmax,
)

LOGITS = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0, 9.0])
)
RNG = np.random.default_rng(1)


def reference(logits: np.ndarray, options: SamplingOptions) -> dict[int, float]:
    """Top-k, top-p and min-p one after the other over the whole vocabulary, each as it is defined: {id: probability}.

    Of equal logits at the edge of top-p either may stay; so ids with equal logits are compared as a group.
    """
    scores = logits.astype(np.float64) / options.temperature
    if options.top_k:
        kth = np.sort(scores)[::-1][min(options.top_k, len(scores)) - 1]
        scores[scores < kth] = -np.inf
    if options.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        before = np.cumsum(softmax(scores)[order]) - softmax(scores)[order]
        scores[order[before >= options.top_p - 1e-12]] = -np.inf
    if options.min_p:
        probabilities = softmax(scores)
        scores[probabilities < options.min_p * probabilities.max() * (1 - 1e-12)] = -np.inf
    probabilities = softmax(scores)
    return {int(i): float(probabilities[i]) for i in np.flatnonzero(probabilities)}


@given(
    LOGITS,
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 70),
    st.sampled_from([0.0513, 0.3071, 0.9137, 0.99913, 1.0]),
    st.sampled_from([0.0, 0.03, 0.47, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_filters_keep_what_their_definitions_keep(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    options = SamplingOptions(temperature, top_k, top_p, min_p)
    ids, probabilities = candidates(logits, options)
    expected = reference(logits, options)
    assert len(set(ids.tolist())) == len(ids) == len(expected)
    # Which of several equal logits stays is not defined: compare the logits that stay.
    assert np.sort(logits[ids]).tolist() == np.sort(logits[list(expected)]).tolist()
    np.testing.assert_allclose(np.sort(probabilities), np.sort(list(expected.values())), atol=2e-6)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("vocab", [1000, 151_936])
@pytest.mark.parametrize(
    "options", [{"top_p": 0.999}, {"min_p": 1e-4}, {"top_k": 40, "top_p": 0.9}, {"top_k": 5000}, {}]
)
def test_filters_at_the_size_of_a_real_vocabulary(vocab: int, options: dict[str, float]) -> None:
    """Flat and peaked distributions: the search for candidates must widen until nothing is missed."""
    for scale in (0.1, 1.0, 5.0):
        logits = (RNG.standard_normal(vocab) * scale).astype(np.float32)
        full = SamplingOptions(temperature=1.0, **options)  # type: ignore[arg-type]
        ids, probabilities = candidates(logits, full)
        expected = reference(logits, full)
        assert set(ids.tolist()) == set(expected)
        np.testing.assert_allclose(probabilities, [expected[i] for i in ids.tolist()], rtol=1e-5)


@given(LOGITS, st.integers(1, 70))
@settings(deadline=None)
def test_largest_are_the_largest_in_order(logits: np.ndarray, count: int) -> None:
    ids = largest(logits, count)
    assert len(set(ids.tolist())) == min(count, len(logits))
    assert logits[ids].tolist() == np.sort(logits)[::-1][:count].tolist()


def test_equal_logits_that_top_k_cannot_tell_apart_all_stay() -> None:
    logits = np.zeros(151_936, np.float32)
    logits[7] = 1
    ids, probabilities = candidates(logits, SamplingOptions(temperature=1.0, top_k=5))
    assert len(ids) == len(logits)
    assert probabilities.max() == probabilities[ids.tolist().index(7)]


@given(LOGITS, st.floats(0.2, 5), st.data())
@settings(deadline=None)
def test_repetition_penalty_lowers_what_was_seen_and_nothing_else(
    logits: np.ndarray, penalty: float, draw: st.DataObject
) -> None:
    seen = np.array(sorted(draw.draw(st.sets(st.integers(0, len(logits) - 1)))), np.int64)
    before = logits.copy()
    out = apply_repetition_penalty(logits, seen, penalty)
    assert (logits == before).all()
    others = np.setdiff1d(np.arange(len(logits)), seen)
    assert (out[others] == logits[others]).all()
    for i in seen.tolist():
        expected = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty
        assert out[i] == pytest.approx(expected, rel=1e-6)


def test_draws_follow_the_probabilities() -> None:
    """Counts of 10,000 draws are within five standard deviations of what the probabilities say."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for options in ({}, {"min_p": 1e-9}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}):
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=3, **options), 4)  # type: ignore[arg-type]
        counts = np.bincount([sampler.choose(logits) for _ in range(10_000)], minlength=4)
        expected = reference(logits, SamplingOptions(temperature=1.0, **options))  # type: ignore[arg-type]
        for i in range(4):
            p = expected.get(i, 0.0)
            assert abs(counts[i] - 10_000 * p) <= 5 * np.sqrt(10_000 * p * (1 - p))


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 7.0]), min_size=1, max_size=2000).filter(any),
    st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None)
def test_a_draw_is_the_inverse_of_the_running_sum(weights: list[float], uniform: float) -> None:
    array = np.array(weights)
    chosen = draw(array, uniform)
    assert array[chosen] > 0
    low, high = array[:chosen].sum() / array.sum(), array[: chosen + 1].sum() / array.sum()
    assert low - 1e-9 <= uniform <= high + 1e-9


@given(LOGITS)
@settings(deadline=None)
def test_greedy_is_the_largest(logits: np.ndarray) -> None:
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1e-3, "min_p": 1.0, "seed": 0},
    ):
        chosen = Sampler(SamplingOptions(**options), len(logits)).choose(logits)  # type: ignore[arg-type]
        assert logits[chosen] == logits.max()


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = RNG.standard_normal(1000).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.95, seed=seed), 1000)
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
def test_broken_logits_are_an_error(value: float, options: dict[str, float]) -> None:
    logits = np.full(9, value, np.float32)
    logits[5:] = 0 if value > 0 or np.isnan(value) else value
    with pytest.raises(RuntimeStateError, match="not finite"):
        Sampler(SamplingOptions(**options), 9).choose(logits)  # type: ignore[arg-type]


def test_very_hot_and_very_cold_stay_finite() -> None:
    logits = np.array([-1e30, -5, 0, 88, 1e4], np.float32)
    for temperature in (1e-6, 1e6):
        ids, probabilities = candidates(logits, SamplingOptions(temperature=temperature, top_p=0.5))
        assert np.isfinite(probabilities).all()
        assert probabilities.sum() == pytest.approx(1)
        assert ids[0] == 4


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": -0.01},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(RuntimeStateError, match=next(iter(bad))):
        SamplingOptions(**bad)  # type: ignore[arg-type]


def test_the_order_is_that_of_transformers() -> None:
    """The same logits through transformers' own processors, in the order that its generate() puts them in."""
    torch = pytest.importorskip("torch")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    for _ in range(20):
        logits = (RNG.standard_normal(400) * 3).astype(np.float32)
        seen = np.unique(RNG.integers(0, 400, 30))
        scores = torch.from_numpy(logits.copy())[None]
        tokens = torch.from_numpy(seen)[None]
        for step in (
            logits_process.RepetitionPenaltyLogitsProcessor(1.3),
            logits_process.TemperatureLogitsWarper(0.8),
            logits_process.TopKLogitsWarper(60),
            logits_process.TopPLogitsWarper(0.9),
            logits_process.MinPLogitsWarper(0.05),
        ):
            scores = step(tokens, scores)
        expected = torch.softmax(scores.double(), -1)[0].numpy()
        penalized = apply_repetition_penalty(logits, seen, 1.3)
        ids, probabilities = candidates(penalized, SamplingOptions(0.8, 60, 0.9, 0.05))
        assert set(ids.tolist()) == set(np.flatnonzero(expected).tolist())
        np.testing.assert_allclose(probabilities, expected[ids], rtol=1e-5)
