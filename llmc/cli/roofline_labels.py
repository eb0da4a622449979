"""Where the texts of a roofline stand, so that no two overlap. Places are pixels of the drawn picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

_NAME_SIZE = 7.5  # points, as all sizes of text and offsets below
_LIMIT_SIZE = 8
_MARGIN = 16.0  # from the frame to the names of the ceilings


@dataclass(frozen=True)
class Point:
    """A kernel in the picture: x operations a byte, y and its ceiling in 10^9 operations a second, area in points
    squared."""

    name: str
    x: float
    y: float
    ceiling: float | None
    area: float
    share_percent: float
    colour: str


def spread_apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in the order of `wanted`, near those, at least `gap` apart: what is too near moves up and down alike."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[list[int]] = []

    def start(group: list[int]) -> float:
        """Where the lowest of a group stands if the group has its middle where its members want to be."""
        return sum(wanted[index] for index in group) / len(group) - gap * (len(group) - 1) / 2

    for index in order:
        groups.append([index])
        while len(groups) > 1 and start(groups[-2]) + gap * len(groups[-2]) > start(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    places = [0.0] * len(wanted)
    for group in groups:
        for rank, index in enumerate(group):
            places[index] = start(group) + gap * rank
    return places


def name_ceilings(axes: Axes, canvas: FigureCanvasAgg, peaks: Mapping[str, float]) -> None:
    """Names right of the frame, each with a line to its ceiling. Lays the picture out, which then stays as it is."""
    names = [
        axes.annotate(
            name, (1, peak), (_MARGIN, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            va="center", fontsize=_LIMIT_SIZE,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0},
        )
        for name, peak in peaks.items()
    ]  # fmt: skip
    canvas.draw()
    canvas.figure.set_layout_engine("none")
    if not names:
        return
    scale = canvas.figure.dpi / 72  # pixels a point
    heights = [axes.transData.transform((1.0, peak))[1] for peak in peaks.values()]
    tallest = max(name.get_window_extent(canvas.get_renderer()).height for name in names)
    for name, height, place in zip(names, heights, spread_apart(heights, 1.1 * tallest), strict=True):
        name.xyann = (_MARGIN, (place - height) / scale)


def place_legend(axes: Axes, canvas: FigureCanvasAgg, points: Sequence[Point], title: str) -> Bbox:
    """The legend in the first corner in which it hides no point, else in the first of all; returns its box."""
    boxes = _point_boxes(axes, canvas, points)
    box: Bbox | None = None
    for corner in ("upper left", "lower right", "lower left", "upper right", "upper left"):
        legend = axes.legend(loc=corner, fontsize=9, title=title, title_fontsize=8)
        canvas.draw()
        box = legend.get_window_extent(canvas.get_renderer())
        if not any(box.overlaps(other) for other in boxes):
            break
    assert box is not None
    return box


def name_memory(
    axes: Axes, canvas: FigureCanvasAgg, text: str, bandwidth: float, points: Sequence[Point], legend: Bbox
) -> Bbox:
    """The memory's name along its slope, where it hides no point and not the legend; returns its box."""
    taken = [legend, *_point_boxes(axes, canvas, points)]
    low, _ = axes.get_xlim()
    (x0, y0), (x1, y1) = axes.transData.transform([(low, low * bandwidth), (10 * low, 10 * low * bandwidth)])
    slope = math.degrees(math.atan2(y1 - y0, x1 - x0))
    name = axes.annotate(
        text, (low, low * bandwidth), (0, 4), textcoords="offset points", rotation=slope, rotation_mode="anchor",
        fontsize=_LIMIT_SIZE,
    )  # fmt: skip
    frame = axes.get_window_extent(canvas.get_renderer())
    first: Bbox | None = None
    for step in range(16):
        start = low * 1.6 * 1.25**step
        name.xy = (start, start * bandwidth)
        box = name.get_window_extent(canvas.get_renderer())
        first = first or box
        if _inside(box, frame) and not any(box.overlaps(other) for other in taken):
            return box
    name.xy = (low * 1.6, low * 1.6 * bandwidth)
    assert first is not None
    return first


def name_points(
    axes: Axes, canvas: FigureCanvasAgg, named: Sequence[Point], points: Sequence[Point], taken: Sequence[Bbox]
) -> int:
    """Names beside `named`, the largest first, each at the nearest place where it hides neither a point nor what is
    `taken`; returns how many found no place."""
    renderer = canvas.get_renderer()
    scale = canvas.figure.dpi / 72  # pixels a point
    frame = axes.get_window_extent(renderer)
    used = [*taken, *_point_boxes(axes, canvas, points)]
    left = 0
    for point in sorted(named, key=lambda point: -point.share_percent):
        measured = axes.text(point.x, point.y, point.name, fontsize=_NAME_SIZE)
        extent = measured.get_window_extent(renderer)
        measured.remove()
        x, y = axes.transData.transform((point.x, point.y))
        for right, up in _places():
            box = _box(x + right * scale - (extent.width if right < 0 else 0), y + up * scale, extent)
            if _inside(box, frame) and not any(box.overlaps(other) for other in used):
                used.append(box)
                _name(axes, point, right, up)
                break
        else:
            left += 1
    return left


def _name(axes: Axes, point: Point, right: float, up: float) -> None:
    """A name so many points from its point, with a line to it."""
    line = {
        "arrowstyle": "-", "color": point.colour, "linewidth": 0.6, "relpos": (float(right < 0), 0.5), "shrinkA": 0,
    }  # fmt: skip
    axes.annotate(
        point.name,
        (point.x, point.y),
        (right, up),
        textcoords="offset points",
        fontsize=_NAME_SIZE,
        color=point.colour,
        ha="right" if right < 0 else "left",
        va="center",
        zorder=4,
        arrowprops=line,
        bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.4},
    )


def _point_boxes(axes: Axes, canvas: FigureCanvasAgg, points: Sequence[Point]) -> list[Bbox]:
    """Squares around the dots."""
    from matplotlib.transforms import Bbox

    boxes = []
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        radius = math.sqrt(point.area / math.pi) * canvas.figure.dpi / 72
        boxes.append(Bbox([[x - radius, y - radius], [x + radius, y + radius]]))
    return boxes


def _box(start: float, middle: float, extent: Bbox) -> Bbox:
    """The box of a text that begins at `start`, with room for the frame of its background."""
    from matplotlib.transforms import Bbox

    return Bbox(
        [[start - 2, middle - extent.height / 2 - 2], [start + extent.width + 2, middle + extent.height / 2 + 2]]
    )


def _inside(box: Bbox, frame: Bbox) -> bool:
    return bool(frame.x0 + 4 < box.x0 and box.x1 < frame.x1 - 4 and frame.y0 < box.y0 and box.y1 < frame.y1)


def _places() -> Iterator[tuple[float, float]]:
    """Where a name may stand from its point, in points: in rings, to the right first."""
    angles = [step * math.pi / 12 for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 12, 11, 13, 10, 14, 9, 15, 8, 16)]
    for radius, angle in itertools.product(range(14, 250, 12), angles):
        yield radius * math.cos(angle), radius * math.sin(angle)
