"""A profile as a roofline: operations a second over operations a byte, below what memory and multipliers allow.

A kernel left of the ridge is bound by memory, one to the right of it by a multiplier; how far it lies below the roof
is what could be gained. A dotted line leads from each kernel to its own ceiling: that of the memory, or of what it
multiplies. Kernels that move no bytes from memory, or multiply nothing, have no place in it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import output
from llmc.cli.profile_table import IN_CACHE, MEASURED_LOW, percent_text
from llmc.cli.roofline_labels import Point, name_ceilings, name_memory, name_points, place_legend
from llmc.cli.step_sizes import sizes_text
from llmc.errors import LlmcError
from llmc.files import OutputFile, refusal, write_all, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmc.runtime.limits import Limits
    from llmc.runtime.profile import KernelProfile, PhaseProfile, Profile

FORMATS = (".png", ".svg", ".pdf")
COLOURS = ("#1f6fb4", "#d95f02", "#1b9e77", "#7570b3")  # a phase each; told apart without red and green too
_LABELLED_PERCENT = 1.0  # the share of the time from which a kernel is worth a name
_MOST_AREA = 900.0  # points squared, of a kernel that takes all the time
_LEAST_AREA = 12.0


def check_roofline(path: Path) -> None:
    """Refuses what could not be drawn, before anything is measured: LlmcError."""
    if path.suffix.lower() not in FORMATS:
        raise LlmcError(f"--roofline {path}: the name must end in {', '.join(FORMATS)}")
    why = refusal(path)
    if why is not None:
        raise LlmcError(f"cannot write --roofline {path}: {why}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LlmcError("--roofline needs matplotlib: python -m pip install matplotlib") from error


def draw_roofline(profile: Profile, path: Path, title: str) -> None:
    """Draws all phases into one picture, whose type is that of the file's suffix. All or nothing; raises LlmcError."""
    drawn = io.BytesIO()
    roofline_figure(profile, title).savefig(drawn, format=path.suffix.lower().removeprefix("."))
    with writing(path, LlmcError), OutputFile(path) as file:
        write_all(file.descriptor, drawn.getbuffer())


def roofline_figure(profile: Profile, title: str) -> Figure:
    """The picture; no two of its texts overlap, and each is inside of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    limits = profile.limits
    points = [
        _point(item, phase, colour, limits)
        for colour, phase in zip(COLOURS, profile.phases.values(), strict=False)
        for item in phase.kernels
        if item.bytes and item.operations
    ]
    _frame(axes, profile.limits, points)
    axes.set_xlabel("\n".join(["intensity: operations per byte from memory", *_notes(profile, points)]))
    title = f"{title}, {output.count(limits.threads, 'thread')}"
    axes.set_title(title, fontsize=11)
    _draw_roof(axes, limits)
    for colour, (name, phase) in zip(COLOURS, profile.phases.items(), strict=False):
        _draw_points(axes, [point for point in points if point.colour == colour], _phase_text(name, phase))
    peaks = {f"{name.replace('_', ' ')} {rate / 1e9:,.0f}": rate / 1e9 for name, rate in limits.peaks().items()}
    name_ceilings(axes, canvas, peaks)  # fixes the layout: what follows is placed by pixels
    legend = place_legend(axes, canvas, points, "area: share of the time; dotted: to the kernel's own ceiling")
    bandwidth = limits.read_bytes_per_second / 1e9
    memory = name_memory(axes, canvas, f"memory {bandwidth:.1f} GB/s", bandwidth, points, legend)
    named = [point for point in points if point.share_percent >= _LABELLED_PERCENT]
    left = name_points(axes, canvas, named, points, [legend, memory])
    if left:
        axes.set_title(f"{title} (no room for the names of {output.count(left, 'kernel')})", fontsize=11)
    return figure


def _point(item: KernelProfile, phase: PhaseProfile, colour: str, limits: Limits) -> Point:
    """Where a kernel lies, what it is called, and the ceiling above it: none where memory would be it, but all is in
    the cache."""
    intensity = item.operations / item.bytes
    near = percent_text(item.limit, item.limit_percent, phase.in_cache)
    ceiling = None
    if near != IN_CACHE:
        assert item.limit is not None
        ceiling = limits.read_bytes_per_second * intensity if item.limit == "memory" else limits.peak(item.limit)
        near = f"{near.partition('.')[0]}% of {item.limit}"
    rows = sizes_text(item.serves)
    served = f" ({rows} {'row' if rows == '1' else 'rows'})" if rows else ""
    return Point(
        name=f"{item.kernel} {item.shape}{served}: {near}",
        x=intensity,
        y=item.gops,
        ceiling=None if ceiling is None else ceiling / 1e9,
        area=max(_LEAST_AREA, _MOST_AREA * item.share_percent / 100),
        share_percent=item.share_percent,
        colour=colour,
    )


def _notes(profile: Profile, points: list[Point]) -> list[str]:
    """Why points lie above the roof, where some do."""
    notes = []
    if any(point.ceiling is None for point in points):
        size = output.size(profile.limits.cache_bytes)
        notes.append(
            f"{IN_CACHE}: a sample reads less than the last cache ({size}) holds, so that memory is no ceiling"
        )
    if any(point.ceiling is not None and point.y > point.ceiling for point in points):
        notes.append(f"above its ceiling: {MEASURED_LOW}")
    return notes


def _phase_text(name: str, phase: PhaseProfile) -> str:
    return f"{name}, {output.count(phase.tokens, 'token')} in {1e3 * phase.wall_seconds.median:.2f} ms"


def _frame(axes: Axes, limits: Limits, points: list[Point]) -> None:
    """Axes that hold every kernel and every ridge."""
    bandwidth = limits.read_bytes_per_second
    peaks = limits.peaks().values()
    across = [*(point.x for point in points), *(peak / bandwidth for peak in peaks), 1.0]
    up = [*(point.y for point in points), *(peak / 1e9 for peak in peaks), bandwidth / 1e9]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(across) / 2.5, max(across) * 6)
    axes.set_ylim(min(up) / 3, max(up) * 4)
    axes.set_ylabel("speed: 10⁹ operations per second")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=0)


def _draw_roof(axes: Axes, limits: Limits) -> None:
    """The memory's slope and a ceiling for each multiplier."""
    low, high = axes.get_xlim()
    bandwidth = limits.read_bytes_per_second / 1e9
    peaks = [rate / 1e9 for rate in limits.peaks().values()]
    top = max(peaks, default=bandwidth * high)
    axes.plot([low, top / bandwidth], [low * bandwidth, top], color="black", linewidth=1.4, zorder=2)
    for peak in peaks:
        axes.plot([peak / bandwidth, high], [peak, peak], color="black", linewidth=1.0, zorder=2)


def _draw_points(axes: Axes, points: list[Point], label: str) -> None:
    """The kernels of a phase, each with a dotted line to its own ceiling."""
    for point in points:
        if point.ceiling is not None:
            ends = [point.y, point.ceiling]
            axes.plot([point.x] * 2, ends, color=point.colour, linestyle=":", linewidth=0.9, zorder=2)
            axes.plot([point.x], ends[1:], color=point.colour, marker="_", markersize=7, zorder=2)
    axes.scatter(
        [point.x for point in points],
        [point.y for point in points],
        s=[point.area for point in points],
        color=points[0].colour if points else None,
        alpha=0.65,
        linewidths=0,
        label=label,
        zorder=3,
    )
