"""How fast an artifact runs here, and how near that is to what the machine's memory allows: `llmc bench`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.runtime.device import Place
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.limits import Limits
from llmc.runtime.profile import Profile, merge_steps, profile_phase
from llmc.runtime.runtime import Runtime
from llmc.runtime.sampling import Sampler, SamplingOptions
from llmc.runtime.sequence import Sequence
from llmc.runtime.writing import MOST, Draft

Tell = Callable[[str, int], None]


@dataclass(frozen=True)
class Bench:
    """Tokens a second are summed over the batch. gigabytes_per_second: weight bytes read a second while decoding.

    bandwidth_percent: that, of the memory bandwidth measured in this run with as many threads; None where the weights
    fit into the machine's last cache, as memory is no limit then. Above 100 the bandwidth was measured too low.
    load_seconds: until the first step could run; what loading leaves for later is over before anything else is timed.
    peak_memory_bytes: the process's, mapped weights included.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes_per_token: int
    gigabytes_per_second: float
    memory_gigabytes_per_second: float
    bandwidth_percent: float | None
    load_seconds: float
    peak_memory_bytes: int
    threads: int
    batch: int
    prompt_tokens: int
    gen_tokens: int
    profile: Profile | None = None


def bench(
    path: Path, prompt_tokens: int = 512, gen_tokens: int = 128, batch: int = 1, threads: int | None = None,
    repeats: int = 3, weights: Path | None = None, tell: Tell | None = None, profile: bool = False,
) -> Bench:  # fmt: skip
    """Loads an artifact and times it: the median of `repeats` prefills and of the decode steps of as many texts.

    profile: runs as many more, with every kernel timed, and measures all limits of the machine.
    """
    for name, value in (("prompt tokens", prompt_tokens), ("generated tokens", gen_tokens), ("batch", batch)):
        if value < 1:
            raise RuntimeStateError(f"{name} must be 1 or more, not {value}")
    say = tell or (lambda _phase, _total: None)
    start = time.perf_counter()
    runtime = Runtime.load(path, threads, weights=weights)
    load_seconds = time.perf_counter() - start
    say("checking and copying weights", 0)
    runtime.finish_loading()
    total = prompt_tokens + gen_tokens
    if total > runtime.max_context:
        raise RuntimeStateError(
            f"{prompt_tokens} + {gen_tokens} tokens are more than the artifact's context of {runtime.max_context}: "
            "give smaller --prompt-tokens and --gen-tokens, or compile with a larger --max-context"
        )
    prefills: list[float] = []
    steps: list[float] = []
    for repeat in range(repeats):
        say(f"run {repeat + 1} of {repeats}", gen_tokens)
        prefill, decode = _run_once(runtime, prompt_tokens, gen_tokens, batch, repeat, say)
        prefills.append(prefill)
        steps += decode
    peak = peak_memory()
    profiled = _profile(runtime, prompt_tokens, gen_tokens, batch, repeats, say) if profile else None
    say("measuring the machine", 0)
    limits = runtime.measure_limits(memory_only=not profile)
    limit = limits.read_bytes_per_second
    step = statistics.median(steps)
    read = weight_bytes_per_token(runtime.manifest.raw, runtime.manifest.weights_bytes)
    return Bench(
        prefill_tokens_per_second=batch * prompt_tokens / statistics.median(prefills),
        decode_tokens_per_second=batch / step,
        weight_bytes_per_token=read,
        gigabytes_per_second=read / step / 1e9,
        memory_gigabytes_per_second=limit / 1e9,
        bandwidth_percent=None if read <= limits.cache_bytes else 100 * read / step / limit,
        load_seconds=load_seconds,
        peak_memory_bytes=peak,
        threads=runtime.threads,
        batch=batch,
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        profile=profiled(limits) if profiled else None,
    )


def _profile(
    runtime: Runtime, prompt_tokens: int, gen_tokens: int, batch: int, repeats: int, say: Tell
) -> Callable[[Limits], Profile]:
    """Times the kernels of `repeats` prefills and of one text's decode steps: a profile, once the limits are known."""
    if not runtime.manifest.step.costs:
        raise RuntimeStateError(
            f"{runtime.artifact.path} does not say what its kernels cost: compile the model again with this llmc"
        )
    say("profiling", gen_tokens)

    def count() -> None:
        runtime.set_profiling(True)

    try:
        count()
        prefills, ends = [], []
        for seed in range(repeats):
            prefills.append(_run_once(runtime, prompt_tokens, 0, batch, seed, say)[0])
            ends.append(runtime.profiled_steps())
        prefill = merge_steps(runtime.profile_kernels(), ends)
        _, steps = _run_once(runtime, prompt_tokens, gen_tokens, batch, 0, say, before_decoding=count)
        decode = runtime.profile_kernels()
    finally:
        runtime.set_profiling(False)
    return lambda limits: Profile(
        limits,
        {
            "prefill": profile_phase(prefill, limits, prefills, batch * prompt_tokens),
            "decode": profile_phase(decode, limits, steps, batch),
        },
    )


def _run_once(
    runtime: Runtime,
    prompt_tokens: int,
    gen_tokens: int,
    batch: int,
    seed: int,
    say: Tell,
    before_decoding: Callable[[], None] = lambda: None,
) -> tuple[float, list[float]]:
    """Seconds of one prefill of the whole batch, and of each decode step."""
    random = np.random.default_rng(seed)
    prompts = random.integers(0, runtime.vocab_size, (batch, prompt_tokens), np.int32)
    sequences = [runtime.sequence() for _ in range(batch)]
    try:
        start = time.perf_counter()
        following = _likeliest(runtime, lambda: runtime.step_last(list(zip(sequences, prompts, strict=True))))
        prefill = time.perf_counter() - start
        before_decoding()
        return prefill, decode_greedily(runtime, sequences, following, gen_tokens, say) if gen_tokens else []
    finally:
        for sequence in sequences:
            sequence.close()


def decode_greedily(
    runtime: Runtime, sequences: list[Sequence], first: list[int], count: int, say: Tell = lambda _phase, _total: None
) -> list[float]:
    """Writes so many greedy tokens behind the first of each sequence, as `generate` does. Seconds of each step."""
    greedy = Sampler(SamplingOptions(), runtime.chooser)
    drafts = [Draft(sequence.place, greedy) for sequence in sequences]
    seconds: list[float] = []
    while len(seconds) < count:
        for draft, token in zip(drafts, first, strict=True):
            draft.begin(token, count - len(seconds))
        ends = np.zeros(MOST + 1, np.int64)
        ends[0] = time.monotonic_ns()
        error = runtime.write(sequences, drafts, times=ends[1:])
        if error is not None:
            raise error
        written = [draft.take() for draft in drafts]
        first = [tokens[-1] for tokens in written]
        seconds += (np.diff(ends[: 1 + len(written[0])]) / 1e9).tolist()
        for _ in written[0]:
            say("", 1)
    return seconds


def _likeliest(runtime: Runtime, step: Callable[[], list[Place]]) -> list[int]:
    """The most likely next token after each row of a step."""
    with runtime.lock:
        return [runtime.chooser.likeliest(place) for place in step()]


def weight_bytes_per_token(manifest: Mapping[str, object], all_bytes: int) -> int:
    """Weight bytes that one decode step reads; all of them where the manifest does not say it more precisely."""
    memory = manifest.get("memory")
    read = memory.get("weight_bytes_per_token") if isinstance(memory, dict) else None
    return read if isinstance(read, int) and 0 < read <= all_bytes else all_bytes


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes; 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0
