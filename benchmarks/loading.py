"""How long an artifact takes to load, to the first token and until nothing is left to do, in the ways it may be loaded.

    python benchmarks/loading.py MODEL.so [--threads 2] [--rounds 5] [--weights FILE] [--json out.json]

The ways, each in a process of its own, all in turn every round:

- new: a file that was never loaded; its weights are checked, and copied where that is worth it, beside the first steps
- known: the file was found right before and is unchanged; its weights are copied only
- mapped: known, and used where it lies (`share_weights=True`)
- verify: everything is checked and copied before the first step (`verify=True`)

The file is read once before, so that it lies in the page cache. Seconds: `load` until `Runtime.load` returns, `token`
until the first token (of a prompt of one), `ready` until nothing is left to do. Milliseconds of a decoded token:
`beside` while that goes on, `after` behind it. What is printed is the median over rounds, and for seconds the median
over rounds of the ratio to `verify` in the same round. For models that write text; others have `load` and `ready` only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("new", "known", "mapped", "verify")
TIMES = ("load", "token", "ready")
MARK = "llmc-loading:"
STEPS_AFTER = 16
MOST_STEPS = 200  # beside the work: as far as the context goes

Numbers = dict[str, float]


def measure(path: Path, way: str, threads: int | None, weights: Path | None) -> Numbers:
    """Loads once, in this process."""
    from llmc.runtime.runtime import Runtime

    choices: dict[str, dict[str, bool]] = {"verify": {"verify": True}, "mapped": {"share_weights": True}}
    start = time.perf_counter()
    runtime = Runtime.load(path, threads, weights=weights, **choices.get(way, {}))
    found = {"load": time.perf_counter() - start}
    if way in ("known", "mapped") and not runtime.verified:
        raise SystemExit(f"{path} was not remembered: is it younger than three seconds?")
    if runtime.task != "generate":
        runtime.finish_loading()
        return {**found, "ready": time.perf_counter() - start}
    with runtime.sequence() as sequence:
        sequence.append([0])
        found["token"] = time.perf_counter() - start

        def step() -> float:
            begin = time.perf_counter()
            runtime.decode([sequence], [0])
            return 1e3 * (time.perf_counter() - begin)

        beside: list[float] = []
        room = min(MOST_STEPS, runtime.max_context - STEPS_AFTER - 2)
        while runtime.is_loading and len(beside) < room:
            beside.append(step())
        runtime.finish_loading()
        found["ready"] = time.perf_counter() - start
        step()
        found["after"] = statistics.median(step() for _ in range(STEPS_AFTER))
        if beside:
            found["beside"] = statistics.median(beside)
    return found


def in_a_process(arguments: argparse.Namespace, way: str, cache: str) -> Numbers:
    """`measure` in a fresh process with this cache folder."""
    command = [sys.executable, __file__, str(arguments.artifact), "--one", way]
    for name in ("threads", "weights"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    shown = subprocess.run(
        command, env={**os.environ, "LLMC_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True
    )
    line = next(line for line in shown.stdout.splitlines() if line.startswith(MARK))
    found: Numbers = json.loads(line.removeprefix(MARK))
    return found


def compare(arguments: argparse.Namespace) -> dict[str, list[Numbers]]:
    """The numbers of every way, a round each."""
    for file in (arguments.artifact, arguments.weights):
        if file is not None:
            with file.open("rb") as data:
                while data.read(1 << 24):
                    pass
    results: dict[str, list[Numbers]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as known:
        in_a_process(arguments, "verify", known)
        for number in range(arguments.rounds):
            for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                with tempfile.TemporaryDirectory() as empty:
                    results[way].append(in_a_process(arguments, way, known if way in ("known", "mapped") else empty))
    return results


def show(results: dict[str, list[Numbers]]) -> None:
    """A row a way: seconds, their ratios to `verify`, and milliseconds of a token."""
    print(f"{'':8}" + "".join(f"{name + ' s':>10}{'':>8}" for name in TIMES) + f"{'beside ms':>11}{'after ms':>11}")
    for way, rounds in results.items():
        cells = f"{way:8}"
        for name in TIMES:
            if name not in rounds[0]:
                cells += f"{'-':>10}{'':>8}"
                continue
            ratios = [one[name] / base[name] for one, base in zip(rounds, results["verify"], strict=True)]
            seconds = statistics.median(one[name] for one in rounds)
            cells += f"{seconds:10.3f}{f'x{statistics.median(ratios):.3f}':>8}"
        for name in ("beside", "after"):
            values = [one[name] for one in rounds if name in one]
            cells += f"{statistics.median(values):11.2f}" if values else f"{'-':>11}"
        print(cells)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(MARK + json.dumps(measure(arguments.artifact, arguments.one, arguments.threads, arguments.weights)))
        return
    results = compare(arguments)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
