"""llmc beside other engines on this machine, in one interleaved run, with the machine's limits next to them."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from peers import metrics, table, variants
from peers.metrics import Results, Summary, Workload
from peers.processes import AdapterError, Adapters
from peers.variants import CLASSES, PEERS, US, Variant
from rich.console import Console

EXAMPLE = """Example:

python benchmarks/compare.py models/qwen2.5-0.5b --threads 2 --rounds 3 --classes int4,int8
--peers llama.cpp,openvino --python peers/bin/python --json out.json --plot out.png
"""
console = Console(stderr=True)
app = typer.Typer(add_completion=False, rich_markup_mode="rich")


class Comparison:
    """One run: converts, measures in rounds, and keeps what it has as JSON after every round."""

    def __init__(self, adapters: Adapters, models: list[Path], rows: list[Variant], threads: int, work: Path) -> None:
        self.adapters = adapters
        self.models = {model.name: model for model in models}
        self.rows = rows
        self.threads = threads
        self.work = work
        self.results = Results()
        self.versions: dict[str, dict[str, object]] = {}
        self.files: dict[tuple[str, str], dict[str, object]] = {}
        self.skipped: dict[tuple[str, str, str], str] = {}
        self.limits: dict[str, list[float]] = {}
        self.earlier: dict[str, Any] = {"models": {}, "rows": []}

    def prepare(self, describe: bool) -> None:
        """Asks the engines for their versions and converts the models. Whatever fails becomes a skipped row."""
        for name in dict.fromkeys(row.peer for row in self.rows):
            self._check(name)
        for model, folder in self.models.items():
            for row in self.rows:
                if row.peer in self.versions:
                    self._prepare_row(model, folder, row, describe)

    def _check(self, name: str) -> None:
        try:
            self.versions[name] = self.adapters.check(name)
        except AdapterError as error:
            reason = f"{error}; to install: {PEERS[name].install}"
            for model in self.models:
                for row in self.rows:
                    if row.peer == name:
                        self._skip(model, row, "", reason)

    def _prepare_row(self, model: str, folder: Path, row: Variant, describe: bool) -> None:
        out = self.work / folder.name / row.key(folder, str(self.versions[row.peer]["version"]))
        facts = out / "facts.json"
        try:
            if not facts.exists():
                console.print(f"converting {model} for {row.label}", highlight=False, soft_wrap=True)
                found = self.adapters.convert(row, folder, out)
                facts.write_text(json.dumps(found), encoding="utf-8")
            found = json.loads(facts.read_text(encoding="utf-8"))
            said = found.pop("uses", {})
            if describe and row.label not in said:
                said[row.label] = self.adapters.describe(row, folder, str(found["file"]), self.threads)
                facts.write_text(json.dumps({**found, "uses": said}), encoding="utf-8")
            self.files[model, row.label] = {**found, "uses": said.get(row.label, "")}
        except AdapterError as error:
            self._skip(model, row, "", str(error))

    def run(self, workloads: list[Workload], rounds: int, save: Path | None) -> None:
        """Round-robin: in each round every row of every model once, one process each, and the machine's limits."""
        first = self.results.next_round()
        for turn in range(first, first + rounds):
            self._measure_limits()
            for model, folder in self.models.items():
                for workload in workloads:
                    for index in metrics.order(len(self.rows), turn):
                        self._measure(turn, model, folder, workload, self.rows[index])
                    if save is not None:
                        save.write_text(json.dumps(self.report(), indent=1), encoding="utf-8")

    def _measure_limits(self) -> None:
        try:
            found = self.adapters.limits(self.threads)
        except AdapterError as error:
            console.print(
                f"the machine's limits are not measured: {error}", markup=False, highlight=False, soft_wrap=True
            )
            return
        for name, rate in found.items():
            self.limits.setdefault(name, []).append(rate)

    def _measure(self, turn: int, model: str, folder: Path, workload: Workload, row: Variant) -> None:
        prepared = self.files.get((model, row.label))
        if prepared is None or (model, row.label, workload.name) in self.skipped:
            return
        longest = longest_context(folder)
        if workload.context > longest:
            self._skip(model, row, workload.name, f"the model's context is {longest} tokens")
            return
        try:
            answer = self.adapters.measure(row, folder, str(prepared["file"]), workload, self.threads)
        except AdapterError as error:
            self._skip(model, row, workload.name, str(error))
            return
        self.results.add(model, row.label, workload, turn, answer)
        shown = ", ".join(f"{metric} {float(str(answer[name])):,.3g}" for metric, name in workload.rates)
        console.print(f"round {turn + 1}: {model}, {row.label}: {shown}", highlight=False, soft_wrap=True)

    def _skip(self, model: str, row: Variant, workload: str, reason: str) -> None:
        console.print(
            f"skipped: {model}, {row.label} {workload}: {reason}", markup=False, highlight=False, soft_wrap=True
        )
        self.skipped[model, row.label, workload] = reason

    def restore(self, report: dict[str, Any]) -> None:
        """Goes on from an earlier report: its rows and measurements stay, and what failed is tried again."""
        self.earlier = report
        self.results.restore(report["rows"])
        self.limits = {name: found["values"] for name, found in report["limits"].items()}

    def report(self) -> dict[str, object]:
        """Everything, for JSON."""
        rows = []
        for model in self.models:
            for row in self.rows:
                facts = self.files.get((model, row.label))
                if facts is None:
                    continue
                found = self.results.row(model, row.label, self._reference(row))
                rows.append({"model": model, "class": row.precision, "peer": row.peer, "label": row.label,
                             "settings": {**row.convert, **row.measure}, **facts, "metrics": found})  # fmt: skip
        present = {(row["model"], row["label"]) for row in rows}
        rows += [row for row in self.earlier["rows"] if (row["model"], row["label"]) not in present]
        weights = {model: {"matrix_weights": metrics.matrix_weights(folder)} for model, folder in self.models.items()}
        return {
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cpu": cpu_name(), "system": platform.platform(), "threads": self.threads},
            "limits": {name: {**vars(Summary.of(rates)), "values": rates} for name, rates in self.limits.items()},
            "models": {**self.earlier["models"], **weights},
            "peers": {**self.earlier.get("peers", {}), **self.versions},
            "rows": rows,
            "skipped": [{"model": model, "label": label, "workload": workload, "reason": reason}
                        for (model, label, workload), reason in self.skipped.items()],
        }  # fmt: skip

    def _reference(self, row: Variant) -> str:
        """The row of ours that a row is compared with: the first of its class."""
        return next(other.label for other in self.rows if other.peer == US and other.precision == row.precision)


def longest_context(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings", 2048))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def interpreters(texts: list[str]) -> dict[str, str]:
    """ "PATH" is for all peers but llmc, "PEER=PATH" for one."""
    found = dict.fromkeys(PEERS, sys.executable)
    for text in sorted(texts, key=lambda text: "=" in text):
        name, equals, path = text.partition("=")
        if not equals:
            found |= {peer: text for peer in PEERS if peer not in (US, "torch")}
        elif name in PEERS:
            found[name] = path
        else:
            raise typer.BadParameter(f"{name!r} is no peer: choose from {', '.join(PEERS)}", param_hint="--python")
    return found


@app.command(epilog=EXAMPLE)
def compare(
    models: Annotated[list[Path], typer.Argument(help="Hugging Face directories.", exists=True, file_okay=False)],
    threads: Annotated[int, typer.Option(min=1, help="Threads for every engine.")] = 2,
    rounds: Annotated[int, typer.Option(min=0, help="Processes for each number; 0 only converts.")] = 3,
    classes: Annotated[str, typer.Option(help=f"Of {', '.join(CLASSES)}.")] = ",".join(CLASSES),
    peers: Annotated[str, typer.Option(help=f"Of {', '.join(name for name in PEERS if name != US)}.")] = ",".join(
        name for name in PEERS if name != US
    ),
    workloads: Annotated[
        str, typer.Option(help="one (prefill 512, decode 128), eight (sequences), long (decode at 4,096).")
    ] = "one,eight,long",
    python: Annotated[
        list[str] | None,
        typer.Option(metavar="[PEER=]PATH", help="The interpreter that has the peers, or one of them, installed."),
    ] = None,
    work: Annotated[Path, typer.Option(help="Where converted models are kept.")] = Path("build/compare"),
    wrap: Annotated[str, typer.Option(help="A command to put before each measured process: taskset, nice ...")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that one process may take.")] = 600,
    describe: Annotated[bool, typer.Option(help="Also ask each engine which kernels it chose.")] = True,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
    add: Annotated[bool, typer.Option(help="Add rounds to what the --json file has already.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw them here (PNG; needs matplotlib).")] = None,
) -> None:
    """Measure llmc beside other engines: the same models, prompts and threads, one process a number, in turns.

    A peer that is not installed is left out, with the reason and the command that installs it.
    """
    if plot is not None:
        from peers import plots
    try:
        rows = variants.chosen(split(classes), split(peers))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    known = {workload.name: workload for workload in metrics.WORKLOADS}
    unknown = [name for name in split(workloads) if name not in known]
    if unknown:
        raise typer.BadParameter(f"no workload {', '.join(unknown)}: choose from {', '.join(known)}")
    adapters = Adapters(interpreters(python or []), shlex.split(wrap), timeout)
    comparison = Comparison(adapters, [model.resolve() for model in models], rows, threads, work.resolve())
    if add and as_json is not None and as_json.exists():
        comparison.restore(json.loads(as_json.read_text(encoding="utf-8")))
    comparison.prepare(describe)
    comparison.run([known[name] for name in split(workloads)], rounds, as_json)
    report = comparison.report()
    if as_json is not None:
        as_json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    table.show(Console(width=None if sys.stdout.isatty() else 160), report)
    if plot is not None:
        plots.draw(report, plot)


if __name__ == "__main__":
    app()
