"""Kernels of another architecture, called under qemu as if they were functions of this process.

Without qemu or a cross compiler the tests that need them are skipped, by name; not where LLMC_EMULATION=required is
set, as in CI: there a machine without them is a failure.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from llmc.errors import CompileError
from llmc.runtime import cpu
from llmc.targets.cpu.c_compiler import compiler_command
from llmc.targets.emulator import emulator_command
from llmc.targets.machine import Machine

PROGRAM = Path(__file__).parent / "emulated_kernels.c"
ROOM_BYTES = 256 << 20  # of the arrays of one call


def is_foreign(machine: Machine) -> bool:
    """Whether this computer cannot run the machine's code but under an emulator."""
    return machine.architecture != cpu.architecture()


@cache
def missing(machine: Machine) -> str:
    """What is not installed that emulating a machine needs; empty where all is there."""
    try:
        compiler_command(machine)
        emulator_command(machine.architecture)
    except CompileError as error:
        return str(error)
    return ""


def require(machine: Machine) -> None:
    """Skips the test where machine's code cannot be emulated here, or fails, where that is required."""
    reason = missing(machine)
    if reason and os.environ.get("LLMC_EMULATION") == "required":
        pytest.fail(f"LLMC_EMULATION=required: {reason}")
    if reason:
        pytest.skip(reason)


class _Process:
    """One emulated process, which calls kernels on arrays in a file that both map."""

    def __init__(self, program: Path, command: list[str]) -> None:
        folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
        self.file = tempfile.NamedTemporaryFile(dir=folder)  # noqa: SIM115  (it lives as long as the process)
        self.file.truncate(ROOM_BYTES)
        self.memory: np.memmap = np.memmap(self.file.name, np.uint8, "r+")
        self.process = subprocess.Popen(
            [*command, str(program), self.file.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip

    def call(self, library: Path, symbol: str, words: Sequence[str]) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ".join((str(library), symbol, *words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer == "done", f"{symbol}: {answer or 'the emulated process ended'} ({self.process.poll()})"

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self.file.close()


@cache
def _process(architecture: str, compiler: tuple[str, ...], model: str) -> _Process:
    """One for all kernels of an architecture; the program that calls them is compiled for it."""
    folder = tempfile.TemporaryDirectory(prefix="llmc-emulated-")
    binary = Path(folder.name) / "emulated_kernels"
    subprocess.run([*compiler, "-O1", "-o", str(binary), str(PROGRAM), "-ldl"], check=True)
    found = _Process(binary, emulator_command(architecture, model))
    atexit.register(folder.cleanup)
    atexit.register(found.end)
    return found


def call(machine: Machine, library: Path, symbol: str, args: Sequence[np.ndarray | int], model: str = "max") -> None:
    """Call a kernel; arrays are changed in place. model: the CPU that is emulated."""
    process = _process(machine.architecture, tuple(compiler_command(machine)), model)
    places: list[tuple[np.ndarray, int]] = []
    words, size = [], 0
    for arg in args:
        if isinstance(arg, np.ndarray):
            assert arg.flags.c_contiguous
            places.append((arg, size))
            words.append(f"p{size}")
            size += -(-max(arg.nbytes, 1) // 64) * 64 + 64  # and room behind, so that nothing lies end to end
        else:
            words.append(f"i{int(arg)}")
    assert size <= ROOM_BYTES
    for array, start in places:
        process.memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    process.call(library, symbol, words)
    for array, start in places:
        array.reshape(-1).view(np.uint8)[:] = process.memory[start : start + array.nbytes]


def link(machine: Machine, objects: Sequence[Path], library: Path) -> None:
    """A shared library of object files. gcc's linker is quicker than zig, if there are both."""
    folder = tempfile.mkdtemp(dir=library.parent)
    made = Path(folder) / library.name
    linker = shutil.which(f"{machine.architecture}-linux-gnu-ld")
    command = [linker] if linker else [*compiler_command(machine), "-nostdlib"]
    subprocess.run([*command, "-shared", "-o", str(made), *map(str, objects)], check=True)
    made.rename(library)
    shutil.rmtree(folder)
