"""What a machine can do at most: small kernels of ours, one a limit, that go into every artifact.

A limit kernel does nothing but read memory, or multiply and add numbers that stay in the first-level cache. It is an
ordinary kernel: the artifact exports it, the manifest says what one of its work units amounts to, and the runtime times
it on the very machine and with the very instructions that the model's own kernels have (`runtime/limits.py`).
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import CompileError
from llmc.runtime import cpu
from llmc.runtime.limits import Limits, load_functions, measure_limits
from llmc.runtime.manifest import LimitFacts
from llmc.targets.cpu.kernel_cache import compile_kernels
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine


@dataclass(frozen=True)
class LimitKernel:
    """A kernel (input, output; begin, end) and what it measures.

    name: "read" (bytes from memory), or what is multiplied and how: "int8", "f32", "bf16" by vector instructions,
    "tile_int8", "tile_bf16" by a matrix unit. amount: bytes, or operations (a multiply-add is two), of one work unit.
    input_bytes: what all units read, over and over; 0: unit u reads `amount` bytes from u * `amount` on.
    """

    name: str
    kernel: Kernel
    amount: int
    input_bytes: int = 0

    @property
    def facts(self) -> LimitFacts:
        """As the manifest has it."""
        return LimitFacts(self.name, self.kernel.symbol, self.amount, self.input_bytes)


def limit_kernels(machine: Machine) -> list[LimitKernel]:
    """The limit kernels of a machine: those whose instructions it has."""
    module = importlib.import_module("llmc.targets.cpu.limit_kernels")
    found: list[LimitKernel] = module.limit_kernels(machine)
    return found


def measure(machine: Machine, threads: int, cache: Path | None = None) -> Limits:
    """The limits of this computer, seen as `machine`, with so many threads; takes about 0.3 s a limit.

    cache: the kernel cache; by default kernels are compiled anew, which takes a second. Raises CompileError.
    """
    from llmc.targets.cpu.c_compiler import compiler_command
    from llmc.targets.cpu.library import link_options

    missing = machine.features - cpu.features()  # which also asks the system for registers that it gives on request
    if missing:
        raise CompileError(
            f"this computer has no {', '.join(sorted(missing))}: it cannot be measured as {machine.name}"
        )
    kernels = limit_kernels(machine)
    cache = cache or Path(tempfile.gettempdir()) / "llmc-limits"
    objects = compile_kernels([item.kernel for item in kernels], machine, cache)
    with tempfile.TemporaryDirectory(prefix="llmc-limits-") as folder:
        library = Path(folder) / "limits.so"
        linking = link_options([item.kernel.symbol for item in kernels], Path(folder))
        command = [*compiler_command(machine), "-o", str(library), *map(str, objects), *linking]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise CompileError(f"the C compiler could not link the limit kernels: {result.stderr.strip()[:300]}")
        functions = load_functions(ctypes.CDLL(str(library)), [item.facts for item in kernels])
        return measure_limits(functions, threads)
