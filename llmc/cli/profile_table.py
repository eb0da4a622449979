"""A profile as tables: one a phase, one line a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.cli import output

if TYPE_CHECKING:
    from llmc.runtime.limits import Limits
    from llmc.runtime.profile import KernelProfile, PhaseProfile, Profile

HEADER = ("kernel", "shape", "calls", "ms", "share %", "MB", "GB/s", "GOPS", "limit", "% of it")


def print_profile(profile: Profile) -> None:
    """The limits, then a table for each phase: averages of a step, the longest kernels first."""
    limits = profile.limits
    print(f"\nlimits, {output.count(limits.threads, 'thread')}: {limits_line(limits)}")
    for name, phase in profile.phases.items():
        what = f"{name} of {output.count(phase.tokens, 'token')}" if phase.tokens else name
        print(f"\n{what}, mean of {output.count(phase.steps, 'step')}")
        output.table([*map(_row, phase.kernels), *_totals(phase)], HEADER)


def limits_line(limits: Limits) -> str:
    """`memory 34.1 GB/s, int8 1,360 GOPS, ...`"""
    peaks = [f"{name.replace('_', ' ')} {rate / 1e9:,.0f} GOPS" for name, rate in limits.peaks().items()]
    return ", ".join([f"memory {limits.read_bytes_per_second / 1e9:.1f} GB/s", *peaks])


def _row(item: KernelProfile) -> tuple[str, ...]:
    calls = f"{item.calls:.0f}" if item.calls == int(item.calls) else f"{item.calls:.1f}"
    return (
        item.kernel,
        item.shape,
        calls,
        f"{1e3 * item.seconds:.3f}",
        f"{item.share_percent:.1f}",
        _number(item.bytes / 1e6, 1),
        _number(item.gigabytes_per_second, 1),
        _number(item.gops, 1),
        item.limit or "",
        "" if item.limit_percent is None else f"{item.limit_percent:.1f}",
    )


def _totals(phase: PhaseProfile) -> list[tuple[str, ...]]:
    wall = phase.wall_seconds
    outside = ("outside kernels", "", "", f"{1e3 * phase.outside_seconds:.3f}")
    whole = "" if phase.limit_percent is None else f"{phase.limit_percent:.1f}"
    return [
        (*outside, f"{100 * phase.outside_seconds / wall:.1f}", "", "", "", "", ""),
        (
            "whole step", "", "", f"{1e3 * wall:.3f}", "100.0", _number(phase.bytes / 1e6, 1),
            _number(phase.bytes / wall / 1e9, 1), _number(phase.operations / wall / 1e9, 1), "", whole,
        ),
    ]  # fmt: skip


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if value else ""
