"""Perplexity, divergence and speed against their definitions, on a model whose logits are known."""

from __future__ import annotations

import math
from pathlib import Path

import fake_artifact
import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.runtime import bandwidth
from llmc.runtime.limits import Limits
from llmc.runtime.measure import bench, weight_bytes_per_token
from llmc.runtime.measure_steps import _profiled
from llmc.runtime.perplexity import evaluate, log_softmax, windows_of
from llmc.runtime.profile import KernelTime, Sample
from llmc.runtime.runtime import Runtime

SHARP = fake_artifact.STEP.replace(">> 48", ">> 60")  # logits of 0..15


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    path = fake_artifact.write(tmp_path_factory.mktemp("measure") / "fake.so", SHARP)
    return Runtime.load(path, 1)


def entropy_terms(logits: np.ndarray) -> np.ndarray:
    """log softmax in f64, as a textbook has it."""
    wide = logits.astype(np.float64)
    return (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )


def test_log_softmax_is_that_of_the_textbook() -> None:
    logits = (np.random.default_rng(1).normal(size=(7, 1001)) * 30).astype(np.float32)
    np.testing.assert_allclose(log_softmax(logits), entropy_terms(logits), rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(-1), 1, atol=1e-5)


def test_windows_join_to_the_text_and_start_with_bos(tmp_path: Path) -> None:
    facts = {**dict(fake_artifact.manifest()["tokenizer"]), "bos_id": 7, "add_bos": True}  # type: ignore[call-overload]
    runtime = Runtime.load(fake_artifact.write(tmp_path / "bos.so", tokenizer_facts=facts), 1)
    text = "the rain in spain stays mainly in the plain " * 5
    tokens = runtime.tokenizer.encode(text, add_special=False)
    for size in (2, 7, 33):
        windows = windows_of(runtime, text, size)
        assert all(len(window) == size and window[0] == 7 for window in windows)
        joined = np.concatenate([window[1:] for window in windows])
        assert joined.tolist() == tokens[: len(joined)]
        assert len(tokens) - len(joined) < size - 1  # only what fills no window is left out
    assert len(windows_of(runtime, text, 7, 3)) == 3
    assert len(windows_of(runtime, "ab c", 64)) == 1  # a short text is one short window


def test_without_bos_windows_are_the_text_itself(runtime: Runtime) -> None:
    tokens = runtime.tokenizer.encode("nine tailed cats and dogs", add_special=False)
    windows = windows_of(runtime, "nine tailed cats and dogs", 5)
    assert np.concatenate(windows).tolist() == tokens[: 5 * len(windows)]


@pytest.mark.parametrize(("text", "size"), [("", 8), ("a", 8), ("abc", 1), ("abc", 100_000)])
def test_what_cannot_be_measured_is_refused(runtime: Runtime, text: str, size: int) -> None:
    with pytest.raises(LlmcError):
        windows_of(runtime, text, size)


def test_a_window_beyond_the_context_is_told_what_there_is_room_for(runtime: Runtime) -> None:
    most = runtime.max_context
    with pytest.raises(LlmcError, match=f"the context of {most}: give --window {most} or less"):
        windows_of(runtime, "abc", most + 1)


def test_perplexity_is_its_definition_whatever_the_chunks(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = windows_of(runtime, "a text of some length that is cut into windows", 11)
    loss, count = 0.0, 0
    for ids in windows:
        terms = entropy_terms(runtime.forward(ids)[:-1])
        loss -= terms[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    whole = evaluate(runtime, windows)
    assert whole.tokens == count
    assert whole.perplexity == pytest.approx(math.exp(loss / count), rel=1e-6)
    monkeypatch.setattr("llmc.runtime.perplexity._MOST_LOGITS", 3 * runtime.vocab_size)  # three rows at a time
    assert evaluate(runtime, windows).perplexity == pytest.approx(whole.perplexity, rel=1e-9)


def test_a_model_agrees_with_itself(runtime: Runtime) -> None:
    found = evaluate(runtime, windows_of(runtime, "compare me with myself, please", 9), runtime.forward)
    assert found.mean_kl_divergence == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1
    assert found.reference_perplexity == found.perplexity


def test_divergence_is_its_definition(runtime: Runtime) -> None:
    """Against uniform logits: KL(uniform || p) = -log V - mean of log p over the vocabulary."""
    windows = windows_of(runtime, "compare me with a model that knows nothing", 9)
    found = evaluate(runtime, windows, lambda ids: np.zeros((len(ids), runtime.vocab_size), np.float32))
    expected = np.mean(
        [(-math.log(runtime.vocab_size) - entropy_terms(runtime.forward(ids)[:-1]).mean(-1)) for ids in windows]
    )
    assert found.mean_kl_divergence == pytest.approx(float(expected), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(runtime.vocab_size, rel=1e-5)


def test_bench_counts_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtime.limits.memory_bandwidth", lambda threads: 1e10)
    monkeypatch.setattr("llmc.runtime.limits.cache_bytes", lambda: fake_artifact.VOCAB - 1)
    path = fake_artifact.write(tmp_path / "fake.so")
    steps = []
    found = bench(path, 70, 5, batch=3, threads=1, repeats=2, tell=lambda phase, count: steps.append((phase, count)))
    assert sum(count for phase, count in steps if not phase) == 2 * 5
    assert found.weight_bytes_per_token == fake_artifact.VOCAB
    # Three sequences read the weights once between them.
    per_second = found.weight_bytes_per_token * found.decode_tokens_per_second / 3
    assert found.gigabytes_per_second == pytest.approx(per_second / 1e9)
    assert found.bandwidth_percent == pytest.approx(100 * per_second / 1e10)
    assert found.peak_memory_bytes > 1 << 20


def test_weights_in_the_cache_are_no_share_of_the_memory_bandwidth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.runtime.limits.memory_bandwidth", lambda threads: 1e10)
    monkeypatch.setattr("llmc.runtime.limits.cache_bytes", lambda: fake_artifact.VOCAB)
    assert bench(fake_artifact.write(tmp_path / "fake.so"), 7, 5, threads=1, repeats=1).bandwidth_percent is None


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (None, 100),
        ({}, 100),
        ({"weight_bytes_per_token": 40}, 40),
        ({"weight_bytes_per_token": 400}, 100),
        ({"weight_bytes_per_token": "x"}, 100),
    ],
)
def test_bytes_per_token_are_the_manifests_or_all(said: object, read: int) -> None:
    assert weight_bytes_per_token({"memory": said}, 100) == read


def test_bandwidth_reads_all_of_a_small_buffer_with_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SECONDS", 0.0)
    read: list[int] = []

    def watched(part: np.ndarray) -> object:
        read.append(part.nbytes)
        return part.sum()

    monkeypatch.setattr(bandwidth, "_READS", (watched,))
    assert bandwidth.memory_bandwidth(3, 8 * 1000) > 0
    assert sum(read) == 8000
    assert len(read) == 3


def test_a_run_of_an_encoder_or_of_arrays_is_one_sample_however_many_steps_it_takes() -> None:
    class Stand:
        """A runtime whose runs take two steps each, of one kernel."""

        steps = 0

        def set_profiling(self, on: bool) -> None: ...

        def profiled_steps(self) -> int:
            return self.steps

        def profile_kernels(self) -> list[KernelTime]:
            return [KernelTime("op", "k", (), "", "f32", tuple(Sample(1, 0.25, 1.0, 2.0) for _ in range(self.steps)))]

        def measure_limits(self) -> Limits:
            return Limits(1, 1e9)

        def once(self) -> float:
            self.steps += 2
            return 1.0

    stand = Stand()
    found = _profiled(stand, "encode", stand.once, 3, 7, lambda *_: None)  # type: ignore[arg-type]
    phase = found.phases["encode"]
    assert (phase.samples, phase.tokens, phase.wall_seconds.median) == (3, 7, 1.0)
    assert (phase.kernels[0].calls, phase.kernels[0].seconds.median, phase.bytes) == (2, 0.5, 2.0)
