"""Runs adapters as processes of their own, and reads the one line that they answer."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .metrics import Workload
from .protocol import MARK
from .variants import HERE, PEERS, US, Variant

Facts = dict[str, object]

_TAIL = 600  # characters of an engine's last words in an error


class AdapterError(Exception):
    """What an adapter answered instead of a result, or how it died."""


@dataclass(frozen=True)
class Adapters:
    """pythons: the interpreter of each peer. wrap: put before measured processes only. timeout: seconds for one."""

    pythons: Mapping[str, str]
    wrap: Sequence[str] = ()
    timeout: float = 600

    def check(self, peer: str) -> Facts:
        """The engine's version and what it says about this machine."""
        return self._ask([self.pythons[peer], str(PEERS[peer].script), "check"])

    def convert(self, row: Variant, model: Path, out: Path) -> Facts:
        request = {"model": str(model), "out": str(out), "options": row.convert}
        return self._ask([self.pythons[row.peer], str(PEERS[row.peer].script), "convert", json.dumps(request)], 3600)

    def measure(self, row: Variant, model: Path, file: str, workload: Workload, threads: int) -> Facts:
        return self._run("measure", row, model, file, threads, asdict(workload), self.wrap)

    def describe(self, row: Variant, model: Path, file: str, threads: int) -> object:
        """Which kernels the engine chose, in its own words."""
        small = {"prompt_tokens": 64, "new_tokens": 2, "batch": 1}
        return self._run("describe", row, model, file, threads, small, ())["uses"]

    def limits(self, threads: int) -> dict[str, float]:
        """What the machine can do at most: bytes and operations a second."""
        request = json.dumps({"threads": threads})
        command = [*self.wrap, self.pythons[US], str(HERE / "limits_adapter.py"), "measure", request]
        return {name: float(str(rate)) for name, rate in self._ask(command).items()}

    def _run(
        self, command: str, row: Variant, model: Path, file: str, threads: int, work: Facts, wrap: Sequence[str]
    ) -> Facts:
        sizes = {name: work[name] for name in ("prompt_tokens", "new_tokens", "batch")}
        request = {"file": file, "model": str(model), "threads": threads, **sizes, "options": row.measure}
        script = str(PEERS[row.peer].script)
        return self._ask([*wrap, self.pythons[row.peer], script, command, json.dumps(request)])

    def _ask(self, command: list[str], timeout: float | None = None) -> Facts:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout or self.timeout,
                env=environment, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise AdapterError(f"no answer within {error.timeout:.0f} s") from error
        except OSError as error:
            raise AdapterError(f"{command[0]} does not start: {error}") from error
        answer = last_answer(done.stdout)
        if answer is None:
            words = (done.stderr.strip() or done.stdout.strip())[-_TAIL:]
            raise AdapterError(f"it ended with status {done.returncode} and no answer: {words}")
        if "error" in answer:
            raise AdapterError(str(answer["error"]))
        return answer


def last_answer(text: str) -> Facts | None:
    """The last marked line of what an adapter printed; engines print before, after and without line ends."""
    for line in reversed(text.splitlines()):
        if line.startswith(MARK):
            found = json.loads(line.removeprefix(MARK))
            return found if isinstance(found, dict) else None
    return None
