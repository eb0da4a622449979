"""A profile as a roofline: operations a second over operations a byte, below what memory and multipliers allow.

A kernel left of the ridge is bound by memory, one to the right of it by a multiplier; how far it lies below the roof
is what could be gained. Kernels that move no bytes from memory, or multiply nothing, have no place in it.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import output
from llmc.errors import LlmcError
from llmc.files import OutputFile, refusal, write_all, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    from llmc.runtime.profile import KernelProfile, Profile

FORMATS = (".png", ".svg", ".pdf")
COLOURS = ("#1f6fb4", "#d95f02", "#1b9e77", "#7570b3")  # a phase each; told apart without red and green too
_LABELLED_PERCENT = 1.0  # the share of a step's time from which a kernel is worth a name
_MOST_AREA = 900.0  # points squared, of a kernel that takes the whole step
_LEAST_AREA = 12.0
_NAME_SIZE = 7.5  # points


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    placed = {
        phase: [item for item in found.kernels if item.bytes and item.operations]
        for phase, found in profile.phases.items()
    }
    _frame(axes, profile, [item for items in placed.values() for item in items])
    axes.set_title(f"{title}, {output.count(profile.limits.threads, 'thread')}", fontsize=11)
    taken = _roof(axes, profile, canvas)
    for colour, (phase, items) in zip(COLOURS, placed.items(), strict=False):
        found = profile.phases[phase]
        axes.scatter(
            [_intensity(item) for item in items],
            [item.gops for item in items],
            s=[_area(item) for item in items],
            color=colour,
            alpha=0.65,
            linewidths=0,
            label=f"{phase}, {output.count(found.tokens, 'token')} in {1e3 * found.wall_seconds.median:.2f} ms",
            zorder=3,
        )
    axes.legend(
        loc="upper left", fontsize=9, title="area: share of the time; percent: of the roof's speed", title_fontsize=8
    )
    _name_points(axes, canvas, list(zip(COLOURS, placed.values(), strict=False)), taken)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.lower().removeprefix("."))
    with writing(path, LlmcError), OutputFile(path) as file:
        write_all(file.descriptor, drawn.getbuffer())


def _intensity(item: KernelProfile) -> float:
    return item.operations / item.bytes


def _area(item: KernelProfile) -> float:
    """Points squared of a kernel's dot: by its share of the time."""
    return max(_LEAST_AREA, _MOST_AREA * item.share_percent / 100)


def _frame(axes: Axes, profile: Profile, items: list[KernelProfile]) -> None:
    """Axes that hold every kernel and every ridge."""
    bandwidth = profile.limits.read_bytes_per_second
    peaks = profile.limits.peaks().values()
    across = [*map(_intensity, items), *(peak / bandwidth for peak in peaks), 1.0]
    up = [*(item.gops for item in items), *(peak / 1e9 for peak in peaks), bandwidth / 1e9]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(across) / 2.5, max(across) * 6)
    axes.set_ylim(min(up) / 3, max(up) * 4)
    axes.set_xlabel("intensity: operations per byte from memory")
    axes.set_ylabel("speed: 10⁹ operations per second")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=0)


def _roof(axes: Axes, profile: Profile, canvas: FigureCanvasAgg) -> list[Bbox]:
    """The memory's slope and a ceiling for each multiplier; returns where their names stand."""
    low, high = axes.get_xlim()
    bandwidth = profile.limits.read_bytes_per_second / 1e9
    peaks = {name: rate / 1e9 for name, rate in profile.limits.peaks().items()}
    top = max(peaks.values(), default=bandwidth * high)
    axes.plot([low, top / bandwidth], [low * bandwidth, top], color="black", linewidth=1.4, zorder=2)
    names = []
    for name, peak in peaks.items():
        axes.plot([peak / bandwidth, high], [peak, peak], color="black", linewidth=1.0, zorder=2)
        text = f"{name.replace('_', ' ')} {peak:,.0f}"
        names.append(axes.annotate(text, (high, peak), (-4, 3), textcoords="offset points", ha="right", fontsize=8))
    canvas.draw()
    slope = _angle(axes, low, bandwidth)
    start = low * 1.6
    text = f"memory {bandwidth:.1f} GB/s"
    names.append(
        axes.annotate(
            text, (start, start * bandwidth), (0, 4), textcoords="offset points",
            rotation=slope, rotation_mode="anchor", fontsize=8,
        )
    )  # fmt: skip
    return [name.get_window_extent(canvas.get_renderer()) for name in names]


def _angle(axes: Axes, low: float, bandwidth: float) -> float:
    """How steep the memory's line looks, in degrees."""
    (x0, y0), (x1, y1) = axes.transData.transform([(low, low * bandwidth), (10 * low, 10 * low * bandwidth)])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _name_points(
    axes: Axes, canvas: FigureCanvasAgg, groups: list[tuple[str, list[KernelProfile]]], taken: list[Bbox]
) -> None:
    """Names beside the points that matter, the largest first, each at the nearest place that is still free."""
    from matplotlib.transforms import Bbox

    canvas.draw()
    renderer = canvas.get_renderer()
    scale = canvas.figure.dpi / 72  # pixels a point
    legend, frame = axes.get_legend(), axes.get_window_extent(renderer)
    assert legend is not None
    taken = [*taken, legend.get_window_extent(renderer)]
    points = [(item, colour) for colour, items in groups for item in items]
    for item, _ in points:
        x, y = axes.transData.transform((_intensity(item), item.gops))
        radius = math.sqrt(_area(item) / math.pi) * scale
        taken.append(Bbox([[x - radius, y - radius], [x + radius, y + radius]]))
    for item, colour in sorted(points, key=lambda point: -point[0].share_percent):
        if item.share_percent < _LABELLED_PERCENT:
            continue
        name = f"{item.kernel} {item.shape}: {item.limit_percent or 0:.0f}%"
        place = (_intensity(item), item.gops)
        x, y = axes.transData.transform(place)
        measured = axes.text(*place, name, fontsize=_NAME_SIZE)
        extent = measured.get_window_extent(renderer)
        measured.remove()
        for right, up in _places():
            start = x + right * scale - (extent.width if right < 0 else 0)
            middle = y + up * scale
            box = Bbox([[start, middle - extent.height / 2], [start + extent.width, middle + extent.height / 2]])
            inside = frame.x0 + 4 < box.x0 and box.x1 < frame.x1 - 4 and frame.y0 < box.y0 and box.y1 < frame.y1
            if not inside or any(box.overlaps(other) for other in taken):
                continue
            taken.append(box)
            axes.annotate(
                name,
                place,
                (right, up),
                textcoords="offset points",
                fontsize=_NAME_SIZE,
                color=colour,
                ha="right" if right < 0 else "left",
                va="center",
                zorder=4,
                arrowprops={
                    "arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (float(right < 0), 0.5),
                    "shrinkA": 0,
                },
                bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.4},
            ).set_in_layout(False)  # fmt: skip
            break


def _places() -> list[tuple[float, float]]:
    """Where a name may stand from its point, in points: in rings, to the right first."""
    turns = [step * math.pi / 12 for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 12, 11, 13, 10, 14, 9, 15, 8, 16)]
    return [(ring * math.cos(turn), ring * math.sin(turn)) for ring in range(14, 190, 12) for turn in turns]
