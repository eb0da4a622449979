"""The comparison as a picture: bars for each engine, whiskers from least to most, ticks at the machine's limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from .metrics import METRICS, SECONDS, limit_of
from .variants import CLASSES, PEERS

_COLOURS = dict(zip(PEERS, ("#0b6e4f", "#7a7a7a", "#3b6fb6", "#c77b30", "#8d5fa8", "#b5484a"), strict=True))

_FARTHEST = 2.5  # a limit farther out than so many bars is written down instead, for it would flatten the bars


def draw(report: dict[str, Any], path: Path) -> None:
    """One column of charts for each metric, one line of them for each model and class."""
    shown = [metric for metric in METRICS if any(metric in row["metrics"] for row in report["rows"])]
    groups = [
        (model, precision, rows)
        for model in report["models"]
        for precision in CLASSES
        if (rows := [row for row in report["rows"] if row["model"] == model and row["class"] == precision])
    ]
    if not shown or not groups:
        return
    heights = [len(rows) + 1.5 for *_, rows in groups]
    figure, charts = pyplot.subplots(
        len(groups), len(shown), squeeze=False, layout="constrained",
        figsize=(3.4 * len(shown) + 2, 0.32 * sum(heights) + 1), gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for line, (model, precision, rows) in zip(charts, groups, strict=True):
        for chart, metric in zip(line, shown, strict=True):
            _chart(chart, metric, rows, report, named=chart is line[0])
        line[0].set_title(f"{model}, {precision}", loc="left", fontsize=9, fontweight="bold")
    machine = report["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads: medians, least to most; | is the limit", size=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _chart(chart: Axes, metric: str, rows: list[dict[str, Any]], report: dict[str, Any], named: bool) -> None:
    longest = max((row["metrics"][metric]["most"] for row in rows if metric in row["metrics"]), default=1.0)
    unit = "s (less is better)" if metric in SECONDS else "tokens/s"
    outside = set()
    for height, row in enumerate(rows):
        found = row["metrics"].get(metric)
        if found is None:
            continue
        median = found["median"]
        spread = [[median - found["least"]], [found["most"] - median]]
        chart.barh(height, median, 0.75, color=_COLOURS[row["peer"]], xerr=spread, error_kw={"lw": 0.8})
        text = f" {median:,.3g}" if median < 100 else f" {median:,.0f}"
        chart.text(found["most"], height, text, va="center", fontsize=6)
        limit = limit_of(metric, row, report)
        if limit is not None and limit < _FARTHEST * longest:
            chart.plot([limit], [height], marker="|", color="black", markersize=9)
        elif limit is not None:
            outside.add(f"{limit:,.0f}")
    if outside:
        unit += f" (limit {', '.join(sorted(outside))})"
    chart.set_yticks(range(len(rows)), [row["label"] for row in rows] if named else [""] * len(rows), fontsize=7)
    chart.set_ylim(len(rows) - 0.4, -0.6)
    chart.margins(x=0.18)
    chart.tick_params(axis="x", labelsize=6)
    chart.set_xlabel(f"{metric}, {unit}", fontsize=7)
    chart.spines[["top", "right"]].set_visible(False)
