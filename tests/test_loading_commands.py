"""Commands on large weights: none that succeeds has used damaged ones, however short it was."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from large_weights import NBYTES, Gate, flip, load_later, place_of, write

from llmc.cli import run as command
from llmc.runtime.runtime import Runtime


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    load_later(monkeypatch, tmp_path)
    return write(tmp_path / "model.so")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.opened.set()


@pytest.mark.parametrize(
    "arguments", [["run", "MODEL", "hello", "-n", "2"], ["run", "MODEL", "hello", "-n", "2", "--json"]]
)
def test_a_command_ends_with_the_check(
    path: Path, arguments: list[str], gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    """However short the text: a file that was not known is known after it, or the command failed."""
    gate.opened.set()
    given = [str(path) if argument == "MODEL" else argument for argument in arguments]
    assert command(given) == 0
    assert Runtime.load(path, threads=1).verified
    capsys.readouterr()
    time.sleep(0.05)
    flip(path, place_of(path)[0] + NBYTES // 2)
    gate.opened.clear()
    threading.Timer(0.5, gate.opened.set).start()  # long after the text
    assert command(given) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "status"), [("--verify", 1), ("--no-verify", 0)])
def test_a_command_may_say_when(
    path: Path, option: str, status: int, capsys: pytest.CaptureFixture[str], gate: Gate
) -> None:
    flip(path, place_of(path)[0] + NBYTES // 2)
    assert command(["run", str(path), "hello", "-n", "2", option]) == status
    assert gate.pieces == 0
    shown = capsys.readouterr()
    assert ("is damaged" in shown.err) == bool(status)
    assert bool(shown.out) == (not status)


def test_bench_waits_before_it_measures(
    path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[bool] = []
    real = Runtime.finish_loading
    monkeypatch.setattr(Runtime, "finish_loading", lambda runtime: (real(runtime), waited.append(runtime.verified)))
    gate.opened.set()
    arguments = ["bench", str(path), "--prompt-tokens", "4", "--gen-tokens", "2", "--repeats", "1", "--threads", "1"]
    assert command(arguments) in (0, 1)  # the fake artifact measures no limits
    capsys.readouterr()
    assert waited == [True]


def test_a_chat_ends_with_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is no error of a line, behind which the talk could go on; and with --json there is one object."""
    flip(path, place_of(path)[0] + NBYTES // 2)
    real = Runtime.load

    def load(*given: object, **named: object) -> Runtime:
        runtime = real(*given, **named)  # type: ignore[arg-type]
        runtime._weights.join()
        return runtime

    monkeypatch.setattr(Runtime, "load", load)
    for index, lines in enumerate((b"hello\nagain\n", b"")):
        monkeypatch.setenv("LLMC_CACHE_DIR", str(path.with_name(f"cache{index}")))
        read, write_end = os.pipe()
        os.write(write_end, lines)
        os.close(write_end)
        with os.fdopen(read) as text:
            monkeypatch.setattr(sys, "stdin", text)
            assert command(["chat", str(path), "-n", "1", "--json"]) == 1
        shown = capfd.readouterr()
        found = json.loads(shown.out)
        assert "left out" not in shown.err
        assert list(found) == ["error"]
        assert "is damaged" in found["error"]
