"""Compile one kernel to a shared library and call it on numpy arrays, for kernel tests and micro-benchmarks."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import emulation
import numpy as np

from llmc.runtime import cpu
from llmc.targets.cpu.kernel_cache import compile_kernels
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine
from llmc.targets.template import Problem, Template

CACHE = Path(tempfile.gettempdir()) / "llmc-test-kernels"


def aligned(array: np.ndarray, alignment: int = 64) -> np.ndarray:
    """A copy of `array` whose first byte is `alignment`-byte aligned."""
    flat = np.zeros(array.nbytes + alignment, np.uint8)
    start = -flat.ctypes.data % alignment
    out: np.ndarray = np.ndarray(array.shape, array.dtype, flat.data, start)  # at `start` also where it is empty
    out[...] = array
    return out


def default_kernel(template: type[Template], problem: Problem, machine: Machine) -> Kernel:
    """The kernel of a template's default knobs, which have to be legal."""
    chosen = template.default(problem, machine)
    assert not chosen.refuse(problem, machine)
    return chosen.kernel(problem, machine)


def skip_unless_runnable(machine: Machine) -> None:
    """Code of a machine that this computer is not would end the process: the test is skipped. That of another
    architecture is emulated."""
    if emulation.is_foreign(machine):
        emulation.require(machine)
        return
    missing = machine.features - cpu.features()
    if missing:
        import pytest

        pytest.skip(f"this computer lacks {', '.join(sorted(missing))}")


class Compiled:
    """A kernel as a Python callable: arrays become pointers, ints become int64."""

    def __init__(self, kernel: Kernel, machine: Machine) -> None:
        skip_unless_runnable(machine)  # before the code is compiled, which takes longer than to run it
        (obj,) = compile_kernels([kernel], machine, CACHE)
        shared = obj.with_suffix(".so")
        self.machine, self.library, self.symbol = machine, shared, kernel.symbol
        if emulation.is_foreign(machine):
            if not shared.exists():
                emulation.link(machine, [obj], shared)
            return
        if not shared.exists():
            temporary = tempfile.mktemp(dir=CACHE, suffix=".so")
            subprocess.run(["gcc", "-shared", "-o", temporary, str(obj), "-lm"], check=True)
            Path(temporary).rename(shared)
        self.function = getattr(ctypes.CDLL(str(shared)), kernel.symbol)
        self.function.restype = None

    def __call__(self, *args: np.ndarray | int) -> None:
        """Run over args; the last two are begin and end of the work-unit range."""
        if emulation.is_foreign(self.machine):
            emulation.call(self.machine, self.library, self.symbol, args)
            return
        values = []
        for arg in args:
            if isinstance(arg, np.ndarray):
                assert arg.flags.c_contiguous
                assert arg.ctypes.data % 64 == 0, "use aligned()"
                values.append(ctypes.c_void_p(arg.ctypes.data))
            else:
                values.append(ctypes.c_int64(int(arg)))
        self.function(*values)
