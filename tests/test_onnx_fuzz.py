"""Damaged ONNX files: one clear error, or a model that is right; never a crash, a hang or memory without bound.

The files are made and read in a process of its own that handles many, under a limit on its memory; the seeds are fixed.
Where a graph of plain tensors comes out and onnxruntime takes the file too, both must compute the same.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
QUICK, SLOW = range(150), range(150, 2150)


def verdicts(seeds: range, folder: Path) -> dict[int, str]:
    """What became of the file of each seed. A worker that dies is named with the seed that it died of."""
    found: dict[int, str] = {}
    left = list(seeds)
    while left:
        worker = subprocess.run(
            [sys.executable, str(TESTS / "onnx_fuzz_worker.py"), str(folder)],
            input="".join(f"{seed}\n" for seed in left), capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        for line in worker.stdout.splitlines():
            seed, _, text = line.partition(" ")
            found[int(seed)] = text
        left = [seed for seed in left if seed not in found]
        if left:
            found[left[0]] = f"BAD the worker ended with {worker.returncode}: {worker.stderr[-400:]}"
            left = left[1:]
    return found


def check(seeds: range, folder: Path) -> None:
    found = verdicts(seeds, folder)
    bad = {seed: text for seed, text in found.items() if not text.startswith(("refused: ", "lifted"))}
    assert bad == {}
    # The damage is neither always deadly nor never: both ways of the frontend are walked.
    lifted = sum(text.startswith("lifted") for text in found.values())
    assert len(found) == len(seeds) and 0.1 < lifted / len(seeds) < 0.6


def test_a_damaged_file_is_an_error_or_a_model(tmp_path: Path) -> None:
    check(QUICK, tmp_path)


@pytest.mark.slow
def test_two_thousand_damaged_files(tmp_path: Path) -> None:
    check(SLOW, tmp_path)


def test_the_models_that_are_damaged_are_whole(tmp_path: Path) -> None:
    from onnx_mutations import seeds

    from llmc.frontends.onnx import lift

    tasks = []
    for number, model in enumerate(seeds()):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        tasks.append(lift(path).task)
    assert tasks == ["run"] * 5 + ["generate", "run"]
