"""One good model and one good artifact for all tests of bad input, and commands that are run and judged."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiny_models import make_tiny

from llmc import cli

# How the good artifact is compiled: weights are rounded for themselves, which takes a fraction of the time.
QUICK = ("--calibrate", "none")
CACHE = Path(tempfile.gettempdir()) / "llmc-test-cache"
ENVIRONMENT = {"LLMC_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}


@functools.cache
def root() -> Path:
    """A folder that goes away with this process."""
    folder = Path(tempfile.mkdtemp(prefix="llmc-bad-input-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def model() -> Path:
    """A whole model of one layer; tests must not change it."""
    return make_tiny("llama", root() / "model", num_hidden_layers=1)


@functools.cache
def artifact() -> Path:
    """What `model()` is compiled into; tests must not change it."""
    path = root() / "good.so"
    ended = start("compile", model(), *QUICK, "-o", path)
    _, err = ended.communicate(timeout=600)
    assert ended.returncode == 0, err
    return path


def copy_of(path: Path, to: Path) -> Path:
    """A copy of a file or folder."""
    shutil.copytree(path, to) if path.is_dir() else shutil.copyfile(path, to)
    return to


def start(*arguments: object, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """`llmc ARGUMENTS` as a process of its own. before: Python code that runs first, to stop it at a chosen moment."""
    # Tests may run in the background of a shell, where Ctrl-C is ignored, and that is handed down.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}\n{before}\nfrom llmc.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """`llmc ARGUMENTS` in this process: exit status, stdout, stderr."""
    status = cli.run([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return status, out, err


def judge(status: int, out: str, err: str, said: str) -> None:
    """Not 0, nothing on stdout, one line of error on stderr, the last, that says `said`; before it only progress."""
    lines = err.splitlines()
    assert status in (1, 2), (status, out, err)
    assert out == ""
    assert all(line.startswith("llmc: ") for line in lines), err
    assert [line.startswith("llmc: error: ") for line in lines] == [False] * (len(lines) - 1) + [True], err
    assert "a bug in llmc" not in err
    assert re.search(said, lines[-1]), (said, lines[-1])


def refused(capfd: pytest.CaptureFixture[str], said: str, *arguments: object) -> None:
    """The command is refused, and `said` is a pattern of the reason."""
    judge(*run(capfd, *arguments), said)
