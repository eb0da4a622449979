"""Work in forked copies of this process, some at a time, each with a folder of its own and a time limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Child:
    """A copy of this process: its folder, when it is too late, and who hears of its end."""

    folder: Path
    deadline: float
    done: Callable[[int | None, Path], None]


class Forks:
    """At most `jobs` copies of this process at a time."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.children: dict[int, Child] = {}

    def start(self, work: Callable[[Path], int], seconds: float, done: Callable[[int | None, Path], None]) -> None:
        """Runs `work(folder)` in a copy as soon as there is room; `done` gets what it returned, None if it was late,
        and the folder before it goes."""
        while len(self.children) >= self.jobs:
            self.wait()
        folder = Path(tempfile.mkdtemp(prefix="llmc-mutation-"))
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            status = 2
            try:
                os.setpgid(0, 0)
                quiet = os.open(os.devnull, os.O_RDWR)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                status = work(folder)
            finally:
                os._exit(status)
        self.children[process] = Child(folder, time.monotonic() + seconds, done)

    def wait(self) -> None:
        """Waits for one copy to end, or ends one that is late."""
        while self.children:
            for process, child in list(self.children.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if not ended and time.monotonic() < child.deadline:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)  # with all that it has started
                if not ended:
                    os.waitpid(process, 0)
                del self.children[process]
                child.done(os.waitstatus_to_exitcode(status) if ended else None, child.folder)
                shutil.rmtree(child.folder, ignore_errors=True)
                return
            time.sleep(0.01)

    def finish(self) -> None:
        """Waits for all copies."""
        while self.children:
            self.wait()
