"""A profile as tables: one a phase, one line a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.cli import output
from llmc.cli.step_sizes import sizes_text

if TYPE_CHECKING:
    from llmc.runtime.limits import Limits
    from llmc.runtime.profile import KernelProfile, PhaseProfile, Profile, Spread

HEADER = (
    "op", "kernel", "rows", "shape", "calls", "ms", "25-75%", "share %", "MB", "GB/s", "GOPS", "limit", "% of it",
)  # fmt: skip
IN_CACHE, ABOVE = "in cache", ">100"
MEASURED_LOW = "the limit was measured low, most likely as other programs used the machine"
UNITS = """
rows: the rows of a step that the kernel serves. ms: the median of all samples, then the middle half of them.
MB, GB: 10^6, 10^9 bytes from memory (weights, keys, values). GOPS: 10^9 operations a second; a multiply-add is two."""


def print_profile(profile: Profile) -> None:
    """The limits, then a table for each phase: what a sample takes, the longest kernels first. Units and words last."""
    limits = profile.limits
    print(f"\nlimits, {output.count(limits.threads, 'thread')}: {limits_line(limits)}")
    cells: set[str] = set()
    for name, phase in profile.phases.items():
        what = f"{name} of {output.count(phase.tokens, 'token')}" if phase.tokens else name
        print(f"\n{what}, median of {output.count(phase.samples, 'sample')}")
        rows = [*(_row(item, phase) for item in phase.kernels), *_totals(phase)]
        cells.update(row[-1] for row in rows)
        width = max(len(row[-1]) for row in (*rows, HEADER))
        output.table([(*row[:-1], row[-1].rjust(width)) for row in rows], (*HEADER[:-1], HEADER[-1].rjust(width)))
    print(UNITS)
    if IN_CACHE in cells:
        size = output.size(limits.cache_bytes)
        print(f"{IN_CACHE}: all that a sample reads fits into the last cache ({size}), so that memory is no limit.")
    if ABOVE in cells:
        print(f"{ABOVE}: {MEASURED_LOW}. Measure again when it is idle.")


def limits_line(limits: Limits) -> str:
    """`memory 34.1 GB/s, int8 1,360 GOPS, ...`"""
    peaks = [f"{name.replace('_', ' ')} {rate / 1e9:,.0f} GOPS" for name, rate in limits.peaks().items()]
    return ", ".join([f"memory {limits.read_bytes_per_second / 1e9:.1f} GB/s", *peaks])


def percent_text(limit: str | None, percent: float | None, in_cache: bool) -> str:
    """How near to its limit something is: a number up to 100, or the words for why there is none."""
    if percent is None:
        return IN_CACHE if in_cache and limit == "memory" else ""
    return f"{percent:.1f}" if percent <= 100 else ABOVE


def _row(item: KernelProfile, phase: PhaseProfile) -> tuple[str, ...]:
    calls = f"{item.calls:.0f}" if item.calls == int(item.calls) else f"{item.calls:.1f}"
    return (
        item.op.partition(".")[2] or item.op,
        item.kernel,
        sizes_text(item.serves) or "any",
        item.shape,
        calls,
        *_milliseconds(item.seconds),
        f"{item.share_percent:.1f}",
        _number(item.bytes / 1e6, 1),
        _number(item.gigabytes_per_second, 1),
        _number(item.gops, 1),
        item.limit or "",
        percent_text(item.limit, item.limit_percent, phase.in_cache),
    )


def _milliseconds(seconds: Spread) -> tuple[str, str]:
    return f"{1e3 * seconds.median:.3f}", f"{1e3 * seconds.low:.3f}-{1e3 * seconds.high:.3f}"


def _totals(phase: PhaseProfile) -> list[tuple[str, ...]]:
    wall = phase.wall_seconds
    rates = (phase.bytes / wall.median / 1e9, phase.operations / wall.median / 1e9)
    whole = percent_text("memory", phase.limit_percent, phase.in_cache)
    outside = f"{phase.outside_percent:.1f}"
    return [
        ("outside kernels", "", "", "", "", *_milliseconds(phase.outside_seconds), outside, "", "", "", "", ""),
        (
            "in all", "", "", "", "", *_milliseconds(wall), "100.0", _number(phase.bytes / 1e6, 1),
            _number(rates[0], 1), _number(rates[1], 1), "", whole,
        ),
    ]  # fmt: skip


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if value else ""
