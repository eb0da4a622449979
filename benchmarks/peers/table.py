"""The comparison as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from .metrics import METRICS, SECONDS, best_peers
from .variants import US


def show(console: Console, report: dict[str, Any]) -> None:
    """One table for each model and class, then the machine's limits and what was left out."""
    groups = dict.fromkeys((row["model"], row["class"]) for row in report["rows"])
    for model, precision in groups:
        rows = [row for row in report["rows"] if (row["model"], row["class"]) == (model, precision)]
        console.print(_table(f"{model}, {precision}, {report['machine']['threads']} threads", rows, report))
    limits = ", ".join(f"{name} {_span(found, 1e-9)} G/s" for name, found in report["limits"].items())
    console.print(f"limits of this machine: {limits or 'not measured'}", highlight=False, soft_wrap=True)
    for skip in report["skipped"]:
        console.print(
            f"skipped: {skip['model']}, {skip['label']} {skip['workload']}: {skip['reason']}",
            markup=False,
            soft_wrap=True,
        )


def _table(title: str, rows: list[dict[str, Any]], report: dict[str, Any]) -> Table:
    found = Table(title=title, title_justify="left")
    found.add_column("engine", min_width=24)
    measured = [metric for metric in METRICS if any(metric in row["metrics"] for row in rows)]
    for metric in measured:
        found.add_column(f"{metric}\n{'s' if metric in SECONDS else 'tokens/s'}", justify="right")
    for name in ("file\nMB", "read a token\nMB", "decode reads\nGB/s"):
        found.add_column(name, justify="right")
    for row in rows:
        cells = [_cell(row["metrics"].get(metric)) for metric in measured]
        rate = read_rate(row)
        share = percent_of(report, "read", rate)
        cells += [f"{row['file_bytes'] / 1e6:.0f}", f"{row['bytes_per_token'] / 1e6:.0f}"]
        cells.append("" if rate is None else f"{rate / 1e9:.1f}{share}")
        found.add_row(row["label"], *cells)
    best = best_peers(rows, US)
    if best:
        found.add_section()
        found.add_row("the best peer", *(_best(best.get(metric)) for metric in measured))
    return found


def _best(found: tuple[str, Mapping[str, Any]] | None) -> str:
    return "" if found is None else f"{found[0]}\n{_cell(found[1])}"


def read_rate(row: dict[str, Any]) -> float | None:
    """Weight bytes that decoding reads a second."""
    decode = row["metrics"].get("decode")
    return None if decode is None else float(decode["median"] * row["bytes_per_token"])


def percent_of(report: dict[str, Any], limit: str, rate: float | None) -> str:
    found = report["limits"].get(limit)
    return "" if found is None or rate is None else f" ({100 * rate / found['median']:.0f}%)"


def _cell(found: Mapping[str, Any] | None) -> str:
    """Median, spread, and in the second line how many times as fast llmc is."""
    if found is None:
        return "-"
    ratio = found.get("llmc_times_as_fast")
    return _span(found) + ("" if ratio is None else f"\nllmc x{_span(ratio)}")


def _span(found: Mapping[str, Any], scale: float = 1.0) -> str:
    median, least, most = (_number(found[name] * scale) for name in ("median", "least", "most"))
    return median if found["runs"] == 1 else f"{median} ({least}..{most})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
