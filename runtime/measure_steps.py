"""`llmc bench` of encoders and of graphs of arrays: texts a second, and the time of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.arrays import BFLOAT16, describe
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.limits import Limits
from llmc.runtime.measure import Tell, peak_memory
from llmc.runtime.profile import Profile, merge_steps, profile_phase
from llmc.runtime.runtime import Runtime
from llmc.runtime.sizes import value_of

_LEAST_SECONDS = 0.2  # of one run of a graph that takes less: it is repeated


@dataclass(frozen=True)
class EncoderBench:
    """Texts and tokens a second, of `texts` texts of `least_tokens` to `most_tokens` tokens each (of token ids: nothing
    is tokenized). tokens: all together. peak_memory_bytes: the process's, mapped weights included."""

    texts_per_second: float
    tokens_per_second: float
    seconds: float
    texts: int
    tokens: int
    least_tokens: int
    most_tokens: int
    load_seconds: float
    peak_memory_bytes: int
    threads: int
    profile: Profile | None = None


@dataclass(frozen=True)
class ArrayBench:
    """Seconds of a call: the median, and the least. sizes: of what the model names."""

    seconds: float
    least_seconds: float
    calls: int
    load_seconds: float
    peak_memory_bytes: int
    threads: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    profile: Profile | None = None


def bench_encoder(
    path: Path, least_tokens: int = 16, most_tokens: int = 128, texts: int = 64, threads: int | None = None,
    repeats: int = 3, weights: Path | None = None, tell: Tell | None = None, profile: bool = False,
) -> EncoderBench:  # fmt: skip
    """Loads an encoder and times it on random texts whose lengths are spread evenly: the median of `repeats` runs."""
    for name, value in (("tokens", least_tokens), ("texts", texts)):
        if value < 1:
            raise RuntimeStateError(f"{name} must be 1 or more, not {value}")
    say = tell or (lambda _phase, _total: None)
    runtime, load_seconds = _load(path, threads, weights, say)
    if most_tokens > runtime.max_tokens:
        raise RuntimeStateError(
            f"{most_tokens} tokens are more than the {runtime.max_tokens} that the artifact takes: give fewer"
        )
    least_tokens = min(least_tokens, most_tokens)
    random = np.random.default_rng(0)
    lengths = np.linspace(least_tokens, most_tokens, texts).round().astype(int)
    random.shuffle(lengths)
    batch = [random.integers(0, runtime.vocab_size, length, np.int32) for length in lengths]

    def once() -> float:
        start = time.perf_counter()
        runtime.encode(batch)
        return time.perf_counter() - start

    once()  # memory is touched for the first time
    seconds = []
    for repeat in range(repeats):
        say(f"run {repeat + 1} of {repeats}", texts)
        seconds.append(once())
        say("", texts)
    peak = peak_memory()
    tokens = int(lengths.sum())
    found = _profiled(runtime, "encode", once, repeats, tokens, say) if profile else None
    middle = statistics.median(seconds)
    return EncoderBench(
        texts / middle, tokens / middle, middle, texts, tokens, least_tokens, most_tokens, load_seconds, peak,
        runtime.threads, found,
    )  # fmt: skip


def bench_arrays(
    path: Path, sizes: Mapping[str, int], threads: int | None = None, repeats: int = 3, weights: Path | None = None,
    tell: Tell | None = None, profile: bool = False,
) -> ArrayBench:  # fmt: skip
    """Loads a graph of any kind and times it on random inputs. sizes: of what the model names; the most, if not given.

    Floats are normal, integers 0 or 1: they may be places in a table.
    """
    say = tell or (lambda _phase, _total: None)
    runtime, load_seconds = _load(path, threads, weights, say)
    symbols = {symbol.name: symbol for symbol in runtime.manifest.symbols}
    for name, size in sizes.items():
        if name not in symbols:
            raise RuntimeStateError(f"{path} has no size {name}; it has {', '.join(symbols) or 'none'}")
        if not symbols[name].low <= size <= symbols[name].high:
            raise RuntimeStateError(f"{name} is {symbols[name].low} to {symbols[name].high} in {path}, not {size}")
    chosen = {name: sizes.get(name, symbol.high) for name, symbol in symbols.items()}
    inputs = _random_inputs(runtime, chosen)

    def once() -> float:
        start = time.perf_counter()
        runtime.run(inputs)
        return time.perf_counter() - start

    once()
    say("running", 0)
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < _LEAST_SECONDS:
        seconds.append(once())
    peak = peak_memory()
    found = _profiled(runtime, "run", once, repeats, 0, say) if profile else None
    return ArrayBench(
        statistics.median(seconds), min(seconds), len(seconds), load_seconds, peak, runtime.threads, chosen, found
    )


def _load(path: Path, threads: int | None, weights: Path | None, say: Tell) -> tuple[Runtime, float]:
    """A model that has nothing left to do before it is as fast as it will be, and the seconds until its first step
    could have run."""
    start = time.perf_counter()
    runtime = Runtime.load(path, threads, weights=weights)
    seconds = time.perf_counter() - start
    say("checking and copying weights", 0)
    runtime.finish_loading()
    return runtime, seconds


def _random_inputs(runtime: Runtime, sizes: Mapping[str, int]) -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(0)
    inputs: dict[str, NDArray[np.generic]] = {}
    for facts in runtime.manifest.inputs:
        shape = tuple(value_of(size, sizes) for size in facts.shape)
        if min(shape, default=0) < 0:
            raise RuntimeStateError(f"these sizes are too small for input {describe(facts)}")
        dtype = np.dtype(np.float32 if facts.dtype == BFLOAT16 else facts.dtype)
        if dtype.kind == "f":
            inputs[facts.name] = random.standard_normal(shape, np.float32).astype(dtype)
        else:
            inputs[facts.name] = random.integers(0, 2, shape).astype(dtype)
    return inputs


def _profiled(runtime: Runtime, phase: str, once: Callable[[], float], repeats: int, tokens: int, say: Tell) -> Profile:
    """Kernel times of `repeats` more runs of `tokens` tokens each, beside the machine's limits."""
    say("profiling", 0)
    runtime.set_profiling(True)
    seconds, ends = [], []
    try:
        for _ in range(repeats):
            seconds.append(once())
            ends.append(runtime.profiled_steps())
        times = merge_steps(runtime.profile_kernels(), ends)
    finally:
        runtime.set_profiling(False)
    say("measuring the machine", 0)
    limits: Limits = runtime.measure_limits()
    return Profile(limits, {phase: profile_phase(times, limits, seconds, tokens)})
