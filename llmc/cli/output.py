"""Printing: results to stdout, everything else to stderr; progress as bars on a terminal, as lines in a log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

from llmc.cli.streams import is_unicode, silence
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.progress import Progress

_QUIET_SECONDS = 2.0  # a log hears of work that takes longer, and then after twice as long each time


def line(text: str) -> None:
    """One line on stderr. A stderr that cannot be written to is no reason to stop."""
    sys.stdout.flush()
    try:
        print(f"llmc: {text}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr.fileno())


class _Json:
    """Where a command's one JSON object goes, and whether it is there."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.printed = False


_json: _Json | None = None  # of the command that runs, if it has --json


@contextmanager
def json_only() -> Iterator[None]:
    """Only `print_json` prints to stdout, and only once; what anything else prints goes to stderr."""
    global _json
    _json = _Json(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json = None


def print_json(value: object) -> None:
    """The one JSON object of a command with --json; an error after it is said on stderr only."""
    stream = sys.stdout if _json is None else _json.stream
    try:
        text = json.dumps(value, ensure_ascii=not is_unicode(stream), allow_nan=False, indent=2, default=_plain)
    except ValueError as error:
        raise LlmcError("the results have infinite numbers or NaN, which JSON has not: leave --json away") from error
    if _json is not None:
        if _json.printed:
            return
        _json.printed = True
    print(text, file=stream, flush=True)


def print_error(message: str) -> None:
    """The object of a command with --json that failed, unless it had printed its own before."""
    if _json is not None:
        print_json({"error": message})


def _plain(value: object) -> object:
    """Numbers of other libraries, paths and sets as JSON has them."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
    """Rows in aligned columns on stdout; numbers to the right. Cells may be blank."""
    cells = [[str(cell) for cell in row] for row in [*([header] if header else []), *rows]]
    if not cells:
        return
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    shown = [[row[column] for row in rows if row[column] != ""] for column in range(len(widths))]
    numeric = [bool(column) and all(map(_is_number, column)) for column in shown]
    for row in cells:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        print("  ".join(padded).rstrip())


def _is_number(cell: object) -> bool:
    return isinstance(cell, (int, float)) or str(cell).split(" ")[0].replace(",", "").replace(".", "").isdigit()


def facts(values: Mapping[str, object]) -> None:
    """`name  value` lines on stdout."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")


def count(number: int, what: str) -> str:
    """`1 token`, `512 tokens`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def size(count: float) -> str:
    """Bytes for people: 4.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class LineProgress:
    """Progress for a log: a line when a phase has taken two seconds, then after four, eight, sixteen and so on."""

    def __init__(self) -> None:
        self._phase = ""
        self._total: int | None = None
        self._done = 0
        self._started = time.monotonic()
        self._silence = _QUIET_SECONDS

    def start(self, phase: str, total: int | None = None, unit: str = "") -> None:
        self.finish()
        self._phase, self._total, self._done = phase, total, 0
        self._started = time.monotonic()
        self._silence = _QUIET_SECONDS

    def advance(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._started >= self._silence:
            self._silence *= 2
            part = f" {100 * self._done / self._total:.0f}%" if self._total else ""
            line(f"{self._phase}{part}")

    def note(self, text: str) -> None:
        line(text)

    def finish(self) -> None:
        """Says how long the phase took, if it took long."""
        seconds = time.monotonic() - self._started
        if self._phase and seconds >= _QUIET_SECONDS:
            line(f"{self._phase}: {seconds:.1f} s")
        self._phase = ""


class BarProgress:
    """Progress for a person: a bar a phase, which stays when the phase has ended."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task: int | None = None
        self._bars.start()

    def start(self, phase: str, total: int | None = None, unit: str = "") -> None:
        self._end_phase()
        self._task = self._bars.add_task(phase, total=total)

    def advance(self, count: int = 1) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _end_phase(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[-1]
            total = task.total or 1
            self._bars.update(task.id, total=total, completed=total)
        self._task = None

    def finish(self) -> None:
        """Ends the last phase and gives the terminal back."""
        self._end_phase()
        self._bars.stop()


Advance = Callable[[int, int], None]  # how many are done, of how many


@contextmanager
def counted(phase: str, total: int) -> Iterator[Advance]:
    """Progress of one phase, for functions that tell how many are done."""
    with progress() as shown:
        shown.start(phase, total)
        before = 0

        def advance(done: int, _total: int) -> None:
            nonlocal before
            shown.advance(done - before)
            before = done

        yield advance


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars where stderr is a terminal, lines elsewhere."""
    shown = BarProgress() if sys.stderr.isatty() else LineProgress()
    try:
        yield shown
        shown.finish()
    except BaseException:
        if isinstance(shown, BarProgress):
            shown._bars.stop()
        raise
