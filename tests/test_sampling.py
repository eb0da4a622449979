"""Sampling: the filters keep what their definitions say, at any size, and draws follow the probabilities."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from importlib import resources
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.host import Host
from llmc.runtime.library import Choice, Library
from llmc.runtime.sampling import Chooser, Sampler, SamplingOptions

LOGITS = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0, 9.0])
)
RNG = np.random.default_rng(1)


@cache
def chooser(vocab: int, threads: int = 2) -> Chooser:
    path = fake_artifact.library()
    device = Host(threads)
    device.use(Library(path, str(path)))
    return Chooser(device, Library(path, str(path)).choose_bytes(vocab), vocab)


def choose(logits: np.ndarray, sampler: Sampler) -> int:
    place = sampler.device.upload(logits)
    try:
        return sampler.choose(place)
    finally:
        assert sampler.device.fetch(place, logits.shape, np.uint32).tolist() == logits.view(np.uint32).tolist()


def kept(logits: np.ndarray, threads: int = 2, seen: tuple[int, ...] = (), **options: float) -> dict[int, float]:
    """{id: probability} of the tokens that may come next."""
    place = chooser(len(logits), threads)
    sampler = Sampler(SamplingOptions(seed=0, **options), place)  # type: ignore[arg-type]
    sampler.observe(seen)
    assert not sampler.options.greedy
    assert place.weights[choose(logits, sampler)] > 0
    weights = place.weights.astype(np.float64)
    ids = np.flatnonzero(weights)
    return dict(zip(ids.tolist(), (weights[ids] / weights.sum()).tolist(), strict=True))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def test_the_struct_is_that_of_the_header(tmp_path: Path) -> None:
    lines = [f'printf("%zu ", offsetof(LlmcChoice, {name}));' for name, _ in Choice._fields_]
    includes = '#include <stddef.h>\n#include <stdio.h>\n#include "choose.h"\n'
    (tmp_path / "print.c").write_text(includes + f"int main(void) {{ {' '.join(lines)} return 0; }}\n")
    include = f"-I{resources.files('llmc.runtime.csrc')}"
    command = ["gcc", include, str(tmp_path / "print.c"), "-o", str(tmp_path / "print")]
    subprocess.run(command, check=True)
    printed = subprocess.run([str(tmp_path / "print")], check=True, capture_output=True, text=True).stdout.split()
    assert [int(word) for word in printed] == [getattr(Choice, name).offset for name, _ in Choice._fields_]
    assert ctypes.sizeof(Choice) == 11 * 8


def reference(logits: np.ndarray, options: SamplingOptions) -> dict[int, float]:
    """Top-k, top-p and min-p one after the other over the whole vocabulary, each as it is defined: {id: probability}.

    Of equal logits at the edge of top-p either may stay; so ids with equal logits are compared as a group. What is less
    likely than the likeliest by a factor that f32 cannot hold is left out.
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
    return {int(i): float(probabilities[i]) for i in np.flatnonzero(scores > scores.max() - 86.9)}


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
    expected = reference(logits, options)
    if options.greedy:
        assert logits[choose(logits, Sampler(options, chooser(len(logits))))] == logits.max()
        return
    found = kept(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # Which of several equal logits stays is not defined: compare the logits that stay.
    assert np.sort(logits[list(found)]).tolist() == np.sort(logits[list(expected)]).tolist()
    np.testing.assert_allclose(np.sort(list(found.values())), np.sort(list(expected.values())), atol=1e-6)


@pytest.mark.parametrize("vocab", [1000, 1025, 8193, 151_936])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.999},
        {"top_p": 0.5},
        {"min_p": 1e-4},
        {"top_k": 40, "top_p": 0.9},
        {"top_k": 900},
        {"top_k": 990},
        {},
    ],
)
def test_filters_at_the_size_of_a_real_vocabulary(vocab: int, options: dict[str, float]) -> None:
    """Flat and peaked distributions: the search for the edge must go as deep as it lies."""
    for scale in (1e-3, 1.0, 8.0):
        logits = (RNG.standard_normal(vocab) * scale).astype(np.float32)
        expected = reference(logits, SamplingOptions(temperature=1.0, **options))  # type: ignore[arg-type]
        for threads in (1, 2):
            found = kept(logits, threads, temperature=1.0, **options)
            # One token more or less where the sum passes `top_p` within the rounding of f32 weights.
            wrong = set(found) ^ set(expected)
            assert len(wrong) <= ("top_p" in options)
            both = [i for i in found if i in expected]
            np.testing.assert_allclose([found[i] for i in both], [expected[i] for i in both], rtol=1e-5)


def test_equal_logits_that_top_k_cannot_tell_apart_all_stay() -> None:
    logits = np.zeros(151_936, np.float32)
    logits[7] = 1
    found = kept(logits, temperature=1.0, top_k=5)
    assert len(found) == len(logits)
    assert max(found.values()) == found[7]


def test_of_equal_logits_at_the_edge_of_top_p_the_first_stay() -> None:
    logits = np.zeros(10_000, np.float32)
    assert list(kept(logits, temperature=1.0, top_p=0.25)) == list(range(2500))


def test_logits_that_are_minus_infinity_are_never_chosen() -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[17, 4321]] = (3.0, 2.0)
    for options in ({}, {"top_k": 10}, {"top_p": 0.9999999}, {"min_p": 1e-9}, {"top_k": 4999, "top_p": 0.99999}):
        assert list(kept(logits, temperature=1.0, **options)) == [17, 4321]  # type: ignore[arg-type]


@given(LOGITS, st.floats(0.2, 5), st.data())
@settings(deadline=None)
def test_repetition_penalty_lowers_what_was_seen_and_nothing_else(
    logits: np.ndarray, penalty: float, draw: st.DataObject
) -> None:
    seen = tuple(draw.draw(st.lists(st.integers(0, len(logits) - 1))))
    before = logits.copy()
    found = kept(logits, seen=seen, temperature=1.0, repetition_penalty=penalty)
    assert (logits == before).all()
    changed = logits.copy()
    for i in set(seen):
        changed[i] = logits[i] * np.float32(penalty) if logits[i] < 0 else logits[i] / np.float32(penalty)
    assert list(found) == list(reference(changed, SamplingOptions(temperature=1.0)))
    np.testing.assert_allclose(list(found.values()), softmax(changed.astype(np.float64)), rtol=1e-5)
    best = choose(logits, greedy := Sampler(SamplingOptions(repetition_penalty=penalty), chooser(len(logits))))
    greedy.observe(seen)
    assert logits[best] == logits.max()
    assert changed[choose(logits, greedy)] == changed.max()


def test_draws_follow_the_probabilities() -> None:
    """Counts of 10,000 draws are within five standard deviations of what the probabilities say."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for options in ({}, {"min_p": 1e-9}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}):
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=3, **options), chooser(4))  # type: ignore[arg-type]
        counts = np.bincount([choose(logits, sampler) for _ in range(10_000)], minlength=4)
        expected = reference(logits, SamplingOptions(temperature=1.0, **options))  # type: ignore[arg-type]
        for i in range(4):
            p = expected.get(i, 0.0)
            assert abs(counts[i] - 10_000 * p) <= 5 * np.sqrt(10_000 * p * (1 - p))


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 7.0]), min_size=1, max_size=4000).filter(any),
    st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None)
def test_a_draw_is_the_inverse_of_the_running_sum(weights: list[float], uniform: float) -> None:
    array = np.array(weights)
    with np.errstate(divide="ignore"):
        logits = np.log(array).astype(np.float32)
    place = chooser(len(logits))
    given = place.device.upload(logits)
    choice = Choice(given.number, 0, place.scratch.number, len(logits), 0, 0, 1.0, 1.0, 1.0, 0.0, uniform)
    chosen = place.device.choose(choice)
    assert array[chosen] > 0
    low, high = array[:chosen].sum() / array.sum(), array[: chosen + 1].sum() / array.sum()
    assert low - 1e-6 <= uniform <= high + 1e-6


@given(LOGITS)
@settings(deadline=None)
def test_greedy_is_the_largest(logits: np.ndarray) -> None:
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1e-3, "min_p": 1.0, "seed": 0},
    ):
        chosen = choose(logits, Sampler(SamplingOptions(**options), chooser(len(logits))))  # type: ignore[arg-type]
        assert logits[chosen] == logits.max()


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = RNG.standard_normal(1000).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.95, seed=seed), chooser(1000))
        return [choose(logits, sampler) for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
def test_broken_logits_are_an_error(value: float, options: dict[str, float]) -> None:
    logits = np.full(9, value, np.float32)
    logits[5:] = 0 if value > 0 or np.isnan(value) else value
    with pytest.raises(RuntimeStateError, match="not finite"):
        choose(logits, Sampler(SamplingOptions(**options), chooser(9)))  # type: ignore[arg-type]


def test_a_penalty_that_breaks_logits_is_named() -> None:
    """The artifact is not said to be broken."""
    sampler = Sampler(SamplingOptions(repetition_penalty=1e-300), chooser(9))
    sampler.observe([3])
    with pytest.raises(RuntimeStateError, match="the settings make logits infinite"):
        choose(np.ones(9, np.float32), sampler)


def test_very_hot_and_very_cold_stay_finite() -> None:
    logits = np.array([-1e30, -5, 0, 88, 1e4], np.float32)
    for temperature in (1e-300, 1e-30, 1e-6, 1e6, 1e30, 1e300):
        for options in ({}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.5}):
            found = kept(logits, temperature=temperature, **options)
            assert sum(found.values()) == pytest.approx(1)
            assert found[4] == max(found.values())


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
        options = {"temperature": 0.8, "top_k": 60, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}
        found = kept(logits, seen=tuple(seen.tolist()), **options)
        assert list(found) == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(list(found.values()), expected[list(found)], rtol=1e-5)
