"""What an adapter is: four commands that print one JSON line each, and one way to measure every engine.

    python ADAPTER check                      {"version": ..., "machine": ...}
    python ADAPTER convert  '{"model": ..., "out": ..., "options": {...}}'
                                              {"file": ..., "file_bytes": ..., "bytes_per_token": ...}
    python ADAPTER measure  '{"file": ..., "threads": ..., ...}' (the fields of `Task`)
                                              {"load_seconds": ..., "first": [...], "rest": [...], ...}
    python ADAPTER describe '{...}' (the same)
                                              {"uses": "what the engine says about the kernels that it chose"}

An adapter runs in its engine's own Python environment, so it imports the standard library, numpy, and that engine. What
fails prints {"error": ...} and ends with status 1. Engines print what they like: only the last line that starts with
the marker counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

MARK = "llmc-compare:"

Options = dict[str, "str | int | bool"]
Facts = dict[str, "str | int | float | list[float]"]


class PeerError(Exception):
    """An engine cannot do what was asked; the message says why, and what would help."""


@dataclass(frozen=True)
class Task:
    """One measurement: `batch` prompts of `prompt_tokens` each, and `new_tokens` tokens written after each of them.

    The first new token ends the prefill; the other new_tokens - 1 are the decode steps. context: the tokens that each
    sequence may hold. repeats: how often it is done in the process after one warm-up, with other prompts each time.
    """

    file: str
    model: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    repeats: int = 1
    options: Options = field(default_factory=dict)

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Timing:
    """first: seconds until every sequence has its first new token. rest: seconds of all the other decode steps."""

    first: float
    rest: float


class Engine(Protocol):
    """A loaded model."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Greedily writes exactly `new_tokens` tokens after each prompt, all sequences together in each step."""
        ...

    def uses(self) -> str:
        """Which of the engine's kernels, attention or precision it chose here, where that can be known; or ""."""
        ...


class Adapter(Protocol):
    """What each adapter module provides."""

    def check(self) -> Facts:
        """Versions, and which instructions the engine says it uses. Raises ImportError where it is not installed."""
        ...

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        """Writes the Hugging Face directory `model` in the engine's format: `out` is a folder to fill."""
        ...

    def load(self, task: Task) -> Engine: ...


def main(adapter: Adapter) -> None:
    """The command line of an adapter."""
    arguments = argparse.ArgumentParser(description="An adapter of benchmarks/compare.py: run that instead.")
    arguments.add_argument("command", choices=("check", "convert", "measure", "describe"))
    arguments.add_argument("request", nargs="?", default="{}", help="a JSON object")
    given = arguments.parse_args()
    request = json.loads(given.request)
    try:
        if given.command == "check":
            answer = adapter.check()
        elif given.command == "convert":
            out = Path(request["out"])
            out.mkdir(parents=True, exist_ok=True)
            answer = adapter.convert(Path(request["model"]), out, request["options"])
        elif given.command == "describe":
            answer = describe(adapter, Task(**request))
        else:
            answer = measure(adapter, Task(**request))
    except Exception as error:
        if not isinstance(error, (PeerError, ImportError)):
            traceback.print_exc()
        say({"error": f"{error}" if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"})
        leave(1)
    say(answer)
    leave(0)


def say(answer: Facts) -> None:
    print(f"\n{MARK} {json.dumps(answer)}", flush=True)


def leave(status: int) -> None:
    """Ends the process without the engines' destructors: some hang or crash there, after everything is measured."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def measure(adapter: Adapter, task: Task) -> Facts:
    """Loads, warms up, and times `task.repeats` runs. Seconds; first and rest have one entry a run."""
    start = time.perf_counter()
    engine = adapter.load(task)
    load = time.perf_counter() - start
    random = np.random.default_rng(0)
    words = vocabulary(task)
    runs = []
    for repeat in range(task.repeats + 1):
        # New prompts each time: an engine that remembers prefixes must not find them again.
        prompts = random.integers(0, words, (task.batch, task.prompt_tokens)).tolist()
        runs.append(engine.generate(prompts, task.new_tokens if repeat else min(4, task.new_tokens)))
    runs = runs[1:]
    first = statistics.median(run.first for run in runs)
    rest = statistics.median(run.rest for run in runs)
    return {
        "load_seconds": load,
        "first": [run.first for run in runs],
        "rest": [run.rest for run in runs],
        "prefill_tokens_per_second": task.batch * task.prompt_tokens / first,
        "decode_tokens_per_second": task.batch * (task.new_tokens - 1) / rest,
        "first_token_seconds": first,
        "peak_memory_bytes": peak_memory(),
    }


def describe(adapter: Adapter, task: Task) -> Facts:
    """What the engine tells about itself after it has run."""
    engine = adapter.load(task)
    engine.generate([[1] * task.prompt_tokens] * task.batch, task.new_tokens)
    return {"uses": engine.uses()}


def vocabulary(task: Task) -> int:
    """How many token ids may be used: none of the special ones, which stand last in most vocabularies."""
    size = config_of(Path(task.model))["vocab_size"]
    assert isinstance(size, int)
    return max(2, size * 3 // 4)


def config_of(model: Path) -> dict[str, object]:
    try:
        found = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PeerError(f"{model} is not a Hugging Face directory: {error}") from error
    text = found.get("text_config")
    return {**found, **text} if isinstance(text, dict) else dict(found)


def folder_bytes(folder: Path, *endings: str) -> int:
    """Bytes of the files in `folder` whose names end so."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name.endswith(endings))


def peak_memory() -> int:
    """The most bytes that this process has had resident; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


class Clock:
    """Marks the first token's time, then the end's."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = self._start

    def first(self) -> None:
        self._first = time.perf_counter()

    def done(self) -> Timing:
        return Timing(self._first - self._start, time.perf_counter() - self._first)
