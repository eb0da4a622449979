"""What the kernels of some steps cost and took, and how near that is to the machine's limits.

A kernel can take no less than its bytes at the memory's speed, and no less than its operations at the multipliers'.
Bytes are those that must come from memory: weights, once a call, and the keys and values of the context, once a
sequence. Activations are not counted, as they are written and read again within a step and mostly stay in caches; a
kernel that does nothing else has no limit here, and its percentage is None. A sample that reads less than the
machine's last cache holds finds it all there from the second time on: memory is no limit then, and percentages of it
are None.

A sample is one step, or the several steps of a long prompt or a large batch together.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import truediv
from typing import TypeAlias

import numpy as np

from llmc.runtime.limits import Limits
from llmc.runtime.manifest import CallCost, Polynomial

_SEEN = re.compile(r"(KEYS|PAIRS)(\d*)")


@dataclass(frozen=True)
class StepSizes:
    """One step: its sizes in the order of step.h, and (first position, tokens) of each sequence's run; or those sizes
    that have names of the model's own."""

    sizes: tuple[int, ...] = ()
    runs: tuple[tuple[int, int], ...] = ()
    named: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        """The value of a symbol of the costs."""
        if name in self.named:
            return self.named[name]
        if name in _PLACES:
            return self.sizes[_PLACES[name]]
        found = _SEEN.fullmatch(name)
        assert found is not None, name
        count = keys_seen if found[1] == "KEYS" else pairs_seen
        return sum(count(start, tokens, int(found[2] or 0)) for start, tokens in self.runs)


_PLACES = {"T": 0, "S": 0, "Q": 1, "B": 2, "M": 3, "R": 4, "SPLITS": 5, "PROMPT": 6, "ADAPTED": 7}


def keys_seen(start: int, tokens: int, window: int) -> int:
    """Keys that some row of a run sees: positions up to the last row's, from the first row's window on."""
    return start + tokens - (max(0, start - window + 1) if window else 0)


def pairs_seen(start: int, tokens: int, window: int) -> int:
    """Pairs of a row of a run and a key that it sees: position p sees p + 1 keys, or `window` of them."""
    growing = min(max(0, window - start), tokens) if window else tokens
    return growing * start + growing * (growing + 1) // 2 + (tokens - growing) * window


def evaluate(polynomial: Polynomial, step: StepSizes) -> float:
    """The value of a polynomial for one step."""
    total = 0.0
    for names, factor in polynomial:
        for name in names:
            factor *= step[name]
        total += factor
    return total


def _is_made(cost: CallCost, step: StepSizes) -> bool:
    """Whether the step makes these calls: their guards hold."""
    return all(low <= step[name] and (high is None or step[name] <= high) for name, low, high in cost.when)


Serves: TypeAlias = tuple[tuple[str, int, "int | None"], ...]


@dataclass(frozen=True)
class Sample:
    """What the calls of one kernel took and cost, in one step or several: seconds, bytes from memory, operations."""

    calls: int = 0
    seconds: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Sample) -> Sample:
        return Sample(
            self.calls + other.calls,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            self.operations + other.operations,
        )


@dataclass(frozen=True)
class KernelTime:
    """Calls of one kernel for one op and shape, in some samples.

    serves: (size, low, high) guards of the calls, high None: no limit; "rows" are of all tokens, or of those whose
    logits are wanted. arithmetic: what it multiplies, "f32" for instance. samples: also those without a call.
    """

    op: str
    kernel: str
    serves: Serves
    shape: str
    arithmetic: str
    samples: tuple[Sample, ...]

    @property
    def total(self) -> Sample:
        """All samples together."""
        return sum(self.samples, Sample())


def kernel_times(
    labels: Sequence[str], taken: Sequence[Sequence[int]], costs: Iterable[CallCost], steps: Sequence[StepSizes]
) -> list[KernelTime]:
    """Calls with the same label and guards together; one sample for each step.

    taken: nanoseconds of each call, for each step. Calls that no step made are left out.
    """
    merged: dict[tuple[str, Serves], KernelTime] = {}
    for cost in costs:
        made = [_is_made(cost, step) for step in steps]
        if not any(made):
            continue
        spent = [
            (evaluate(cost.bytes, step), evaluate(cost.operations, step)) if ran else (0.0, 0.0)
            for ran, step in zip(made, steps, strict=True)
        ]
        serves = tuple(("rows" if name in _ROWS else name, low, high) for name, low, high in cost.when)
        for index in cost.calls:
            key = labels[index], serves
            samples = tuple(
                Sample(int(ran), int(times[index]) / 1e9, moved, operations) if ran else Sample()
                for ran, times, (moved, operations) in zip(made, taken, spent, strict=True)
            )
            old = merged.get(key)
            if old is not None:
                samples = tuple(one + other for one, other in zip(old.samples, samples, strict=True))
            known = old is not None and not any(operations for _, operations in spent)
            op, kernel, shape = _split(labels[index])
            arithmetic = old.arithmetic if known and old is not None else cost.arithmetic
            merged[key] = KernelTime(op, kernel, serves, shape, arithmetic, samples)
    return list(merged.values())


_ROWS = ("T", "S", "R")


def merge_steps(times: Sequence[KernelTime], ends: Sequence[int]) -> list[KernelTime]:
    """One sample of several steps each. ends: how many steps there had been at the end of each."""
    bounds = list(itertools.pairwise((0, *ends)))
    return [
        replace(item, samples=tuple(sum(item.samples[begin:end], Sample()) for begin, end in bounds)) for item in times
    ]


def _split(label: str) -> tuple[str, str, str]:
    """Op, kernel and shape of a label of the manifest."""
    op, _, rest = label.partition(" ")
    kernel, _, shape = rest.partition(" ")
    return op, kernel, shape


@dataclass(frozen=True)
class Spread:
    """The median of some values, and the quartiles that half of them lie between."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; quartiles between two values are interpolated."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return Spread(median, low, high)


@dataclass(frozen=True)
class KernelProfile:
    """One kernel of a phase.

    calls, bytes, operations: of a sample, on average. seconds: of the samples that called it; rates are the medians of
    these. share_percent: of a sample's time, on average (an unusually slow one counts no more than others). limit: what
    bounds it, "memory" or what it multiplies ("int8", "f32", "bf16"). limit_percent: the least time that this limit
    allows, of the time taken, the median; above 100 the limit was measured too low. Both None where no bytes and no
    operations are known of, the percentage also where the limit is memory but all lies in the cache.
    """

    op: str
    kernel: str
    serves: Serves
    shape: str
    calls: float
    seconds: Spread
    share_percent: float
    bytes: float
    operations: float
    gigabytes_per_second: float
    gops: float
    limit: str | None
    limit_percent: float | None


@dataclass(frozen=True)
class PhaseProfile:
    """What a sample of a phase takes: wall time, and how much of it within kernels and outside them.

    bytes, operations: of a sample, on average. in_cache: what a sample reads fits into the machine's last cache.
    limit_percent: the least time that its kernels' limits allow, of the wall time; in a cache memory's do not count.
    """

    samples: int
    tokens: int
    wall_seconds: Spread
    kernel_seconds: Spread
    outside_seconds: Spread
    outside_percent: float
    bytes: float
    operations: float
    in_cache: bool
    limit_percent: float | None
    kernels: tuple[KernelProfile, ...]


@dataclass(frozen=True)
class Profile:
    """Phases by name ("prefill", "decode"), and the limits that were measured in the same run."""

    limits: Limits
    phases: Mapping[str, PhaseProfile]


def profile_phase(times: Sequence[KernelTime], limits: Limits, walls: Sequence[float], tokens: int) -> PhaseProfile:
    """A profile of samples that took `walls` seconds. tokens: of one sample."""
    samples = len(walls)
    within = [sum(item.samples[index].seconds for item in times) for index in range(samples)]
    outside = [taken - inside for taken, inside in zip(walls, within, strict=True)]
    moved = sum(item.total.bytes for item in times) / samples
    in_cache = 0 < moved <= limits.cache_bytes
    least = [sum(_least(item.samples[index], item, limits, in_cache) for item in times) for index in range(samples)]
    kernels = [_kernel_profile(item, limits, walls, in_cache) for item in times]
    return PhaseProfile(
        samples=samples,
        tokens=tokens,
        wall_seconds=spread(walls),
        kernel_seconds=spread(within),
        outside_seconds=spread(outside),
        outside_percent=_share(outside, walls),
        bytes=moved,
        operations=sum(item.total.operations for item in times) / samples,
        in_cache=in_cache,
        limit_percent=100 * spread(list(map(truediv, least, walls))).median if any(least) else None,
        kernels=tuple(sorted(kernels, key=lambda item: -item.share_percent)),
    )


def _share(seconds: Sequence[float], walls: Sequence[float]) -> float:
    """Percent of a sample's wall time, the mean of all samples."""
    return 100 * float(np.mean(list(map(truediv, seconds, walls))))


def _kernel_profile(item: KernelTime, limits: Limits, walls: Sequence[float], in_cache: bool) -> KernelProfile:
    total, samples = item.total, len(item.samples)
    # A call that is shorter than the clock's step takes no time at all.
    called = [replace(sample, seconds=max(sample.seconds, 1e-9)) for sample in item.samples if sample.calls]
    limit = max(_bounds(total, item, limits), default=None)
    known = limit is not None and not (in_cache and limit[1] == "memory")
    percents = [100 * _least(sample, item, limits, in_cache) / sample.seconds for sample in called]
    return KernelProfile(
        op=item.op,
        kernel=item.kernel,
        serves=item.serves,
        shape=item.shape,
        calls=total.calls / samples,
        seconds=spread([sample.seconds for sample in called]),
        share_percent=_share([sample.seconds for sample in item.samples], walls),
        bytes=total.bytes / samples,
        operations=total.operations / samples,
        gigabytes_per_second=spread([sample.bytes / sample.seconds for sample in called]).median / 1e9,
        gops=spread([sample.operations / sample.seconds for sample in called]).median / 1e9,
        limit=limit[1] if limit else None,
        limit_percent=spread(percents).median if known else None,
    )


def _bounds(sample: Sample, item: KernelTime, limits: Limits) -> list[tuple[float, str]]:
    """The least seconds that each limit allows, and its name."""
    bounds = []
    if sample.bytes:
        bounds.append((sample.bytes / limits.read_bytes_per_second, "memory"))
    peak = limits.peak(item.arithmetic)
    if sample.operations and peak:
        bounds.append((sample.operations / peak, item.arithmetic))
    return bounds


def _least(sample: Sample, item: KernelTime, limits: Limits, in_cache: bool) -> float:
    """The least seconds of a sample by the limit that takes longest; 0 where that is a memory that is not needed."""
    seconds, name = max(_bounds(sample, item, limits), default=(0.0, ""))
    return 0.0 if in_cache and name == "memory" else seconds
