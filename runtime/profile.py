"""What the kernels of some steps cost and took, and how near that is to the machine's limits.

A kernel can take no less than its bytes at the memory's speed, and no less than its operations at the multipliers'.
Bytes are those that must come from memory: weights, once a call, and the keys and values of the context, once a
sequence. Activations are not counted, as they are written and read again within a step and mostly stay in caches; a
kernel that does nothing else has no limit here, and its percentage is None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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


_PLACES = {"T": 0, "S": 0, "Q": 1, "B": 2, "M": 3, "R": 4, "SPLITS": 5, "PROMPT": 6}


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


@dataclass(frozen=True)
class KernelTime:
    """Calls of one kernel for one op and shape, over some steps. arithmetic: what it multiplies, "f32" for instance."""

    op: str
    kernel: str
    shape: str
    calls: int
    seconds: float
    bytes: float
    operations: float
    arithmetic: str


def kernel_times(
    labels: Sequence[str], nanoseconds: Sequence[int], costs: Iterable[CallCost], steps: Sequence[StepSizes]
) -> list[KernelTime]:
    """Calls with the same label together, the longest first. Those that no step made are left out."""
    merged: dict[str, KernelTime] = {}
    for cost in costs:
        ran = [step for step in steps if _is_made(cost, step)]
        moved = sum(evaluate(cost.bytes, step) for step in ran)
        operations = sum(evaluate(cost.operations, step) for step in ran)
        for index in cost.calls:
            if not ran:
                continue
            label = labels[index]
            old = merged.get(label) or KernelTime(*_split(label), 0, 0.0, 0.0, 0.0, cost.arithmetic)
            merged[label] = KernelTime(
                old.op,
                old.kernel,
                old.shape,
                old.calls + len(ran),
                old.seconds + nanoseconds[index] / 1e9,
                old.bytes + moved,
                old.operations + operations,
                cost.arithmetic if operations else old.arithmetic,
            )
    return sorted(merged.values(), key=lambda item: -item.seconds)


def _split(label: str) -> tuple[str, str, str]:
    """Op, kernel and shape of a label of the manifest."""
    op, _, rest = label.partition(" ")
    kernel, _, shape = rest.partition(" ")
    return op, kernel, shape


@dataclass(frozen=True)
class KernelProfile:
    """One kernel of a phase, per step.

    limit: what bounds it, "memory" or what it multiplies ("int8", "f32", "bf16"); limit_percent: the least time that
    this limit allows, of the time taken. Both None where no bytes from memory and no operations are known of.
    """

    op: str
    kernel: str
    shape: str
    calls: float
    seconds: float
    share_percent: float
    bytes: float
    operations: float
    gigabytes_per_second: float
    gops: float
    limit: str | None
    limit_percent: float | None


@dataclass(frozen=True)
class PhaseProfile:
    """What a step of a phase takes, on average over `steps` steps: wall time, and how much of it within kernels."""

    steps: int
    tokens: int
    wall_seconds: float
    kernel_seconds: float
    outside_seconds: float
    bytes: float
    operations: float
    limit_percent: float | None
    kernels: tuple[KernelProfile, ...]


@dataclass(frozen=True)
class Profile:
    """Phases by name ("prefill", "decode"), and the limits that were measured in the same run."""

    limits: Limits
    phases: Mapping[str, PhaseProfile]


def profile_phase(
    times: Sequence[KernelTime], limits: Limits, wall_seconds: float, steps: int, tokens: int
) -> PhaseProfile:
    """Kernel times of `steps` steps, together `wall_seconds` long, as averages a step. tokens: of one step."""
    total = sum(item.seconds for item in times)
    kernels = []
    least = 0.0
    for item in times:
        bound = _bound(item, limits)
        least += bound[1] if bound else 0.0
        seconds = max(item.seconds, 1e-9)
        kernels.append(
            KernelProfile(
                op=item.op,
                kernel=item.kernel,
                shape=item.shape,
                calls=item.calls / steps,
                seconds=item.seconds / steps,
                share_percent=100 * item.seconds / wall_seconds,
                bytes=item.bytes / steps,
                operations=item.operations / steps,
                gigabytes_per_second=item.bytes / seconds / 1e9,
                gops=item.operations / seconds / 1e9,
                limit=bound[0] if bound else None,
                limit_percent=100 * bound[1] / seconds if bound else None,
            )
        )
    return PhaseProfile(
        steps=steps,
        tokens=tokens,
        wall_seconds=wall_seconds / steps,
        kernel_seconds=total / steps,
        outside_seconds=(wall_seconds - total) / steps,
        bytes=sum(item.bytes for item in times) / steps,
        operations=sum(item.operations for item in times) / steps,
        limit_percent=100 * least / wall_seconds if least else None,
        kernels=tuple(kernels),
    )


def _bound(item: KernelTime, limits: Limits) -> tuple[str, float] | None:
    """What bounds a kernel, and the least seconds that it allows."""
    bounds = []
    if item.bytes:
        bounds.append(("memory", item.bytes / limits.read_bytes_per_second))
    peak = limits.peak(item.arithmetic)
    if item.operations and peak:
        bounds.append((item.arithmetic, item.operations / peak))
    return max(bounds, key=lambda bound: bound[1], default=None)
