"""What is measured, and how runs become medians, spreads and ratios."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Facts = Mapping[str, object]


@dataclass(frozen=True)
class Workload:
    """One process: `batch` prompts of `prompt_tokens`, and `new_tokens` written after each.

    rates: (metric, field of the adapter's answer) pairs that this workload gives.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    rates: tuple[tuple[str, str], ...]

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.new_tokens


_DECODE = "decode_tokens_per_second"
WORKLOADS = (
    Workload("one", 512, 129, 1, (("prefill", "prefill_tokens_per_second"), ("decode", _DECODE),
                                  ("first token", "first_token_seconds"), ("load", "load_seconds"))),
    Workload("eight", 32, 129, 8, (("eight", _DECODE),)),
    Workload("long", 4096, 65, 1, (("decode at 4096", _DECODE),)),
)  # fmt: skip
METRICS = tuple(metric for workload in WORKLOADS for metric, _ in workload.rates)
_ARITHMETIC = {"int4": "int8", "int8": "int8", "float": "bf16"}
SECONDS = ("first token", "load")  # less is better; the others are tokens a second


@dataclass(frozen=True)
class Summary:
    """Of the rounds' values: the median, and the least and the greatest."""

    median: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        return cls(statistics.median(values), min(values), max(values), len(values))


def speedups(metric: str, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Summary | None:
    """How many times as fast we are, from the rounds that both have: the host's speed changes between rounds."""
    rounds = sorted(set(ours) & set(theirs))
    if not rounds:
        return None
    pairs = [(theirs[r], ours[r]) if metric in SECONDS else (ours[r], theirs[r]) for r in rounds]
    return Summary.of([top / bottom for top, bottom in pairs])


class Results:
    """Every measurement by (model, row, metric, round)."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], dict[str, dict[int, float]]] = {}

    def add(self, model: str, label: str, workload: Workload, turn: int, answer: Facts) -> None:
        for metric, name in workload.rates:
            value = answer[name]
            assert isinstance(value, (int, float))
            self._values.setdefault((model, label), {}).setdefault(metric, {})[turn] = float(value)

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes back what `row` gave, of an earlier report."""
        for row in rows:
            kept = self._values.setdefault((row["model"], row["label"]), {})
            for metric, found in row["metrics"].items():
                kept[metric] = {int(turn): value for turn, value in found["values"].items()}

    def next_round(self) -> int:
        """The first round that nothing is known of."""
        turns = [turn for row in self._values.values() for found in row.values() for turn in found]
        return max(turns, default=-1) + 1

    def rounds(self, model: str, label: str, metric: str) -> dict[int, float]:
        return self._values.get((model, label), {}).get(metric, {})

    def row(self, model: str, label: str, reference: str) -> dict[str, dict[str, object]]:
        """For each metric measured: median, spread, the runs by round, and how many times as fast the reference is."""
        row: dict[str, dict[str, object]] = {}
        for metric in METRICS:
            found = self.rounds(model, label, metric)
            if not found:
                continue
            row[metric] = {**asdict(Summary.of(list(found.values()))), "values": {str(t): v for t, v in found.items()}}
            ratio = speedups(metric, self.rounds(model, reference, metric), found)
            if label != reference and ratio is not None:
                row[metric]["llmc_times_as_fast"] = asdict(ratio)
        return row


def best_peers(rows: Iterable[Mapping[str, Any]], us: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """For each metric, of the rows of one model and class: the peer's row with the best median, and what it measured.

    An engine's settings are rows of their own, so the best prompt speed and the best decode speed may be of two rows.
    """
    best: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for row in rows:
        for metric, found in row["metrics"].items():
            sign = -1 if metric in SECONDS else 1
            known = best.get(metric)
            if row["peer"] != us and (known is None or sign * found["median"] > sign * known[1]["median"]):
                best[metric] = row["label"], found
    return best


def order(count: int, turn: int) -> list[int]:
    """Round `turn`'s order of the rows: rotated, so that nobody always runs after the same neighbour."""
    shift = turn * max(1, count // 3) % count if count else 0
    return [*range(shift, count), *range(shift)]


def matrix_weights(model: Path) -> int:
    """Weights of the linear layers inside the blocks: each multiplies once for every token of a prompt."""
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            shape = entry.get("shape", ())
            if len(shape) == 2 and ".layers." in name:
                total += shape[0] * shape[1]
    return total


def limit_of(metric: str, row: dict[str, Any], report: dict[str, Any]) -> float | None:
    """Tokens a second that the machine's measured limits allow a row, or None where that is not so simple.

    Decode: every weight byte is read once a token. Prefill: each weight of the blocks is multiplied once, at the peak
    of the arithmetic that the class is named after.
    """
    limits = report["limits"]
    if metric == "decode" and "read" in limits:
        return float(limits["read"]["median"] / row["bytes_per_token"])
    kind = _ARITHMETIC[row["class"]]
    peak = max((limits[name]["median"] for name in (kind, f"tile_{kind}") if name in limits), default=None)
    weights = report["models"][row["model"]]["matrix_weights"]
    return float(peak / (2 * weights)) if metric == "prefill" and peak and weights else None
