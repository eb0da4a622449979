"""From a program to the loadable part of an artifact: object files and the step driver, linked by the C compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmc.compiler.progress import Progress
from llmc.errors import CompileError
from llmc.targets.codegen import compile_kernels
from llmc.targets.driver import Addresses, generate_step
from llmc.targets.kernel import Kernel
from llmc.targets.lowering import Program
from llmc.targets.machine import Machine


@dataclass(frozen=True)
class Library:
    """A linked library: its path, what each profile slot measures, and the driver's source."""

    path: Path
    calls: list[str]
    source: str


def kernels_of(program: Program) -> list[Kernel]:
    """Every kernel that a program calls, once, in first-use order."""
    found: dict[str, Kernel] = {}
    for lowered in program.ops:
        for call in lowered.calls:
            found.setdefault(call.kernel.symbol, call.kernel)
    return list(found.values())


def compiler_command(machine: Machine) -> list[str]:
    """The C compiler that links for this machine: $CC, or the system's."""
    named = os.environ.get("CC")
    if named:
        return named.split()
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C compiler found: install gcc or clang, or name one in the environment variable CC")


def build_library(
    program: Program, addresses: Addresses, cache: Path, folder: Path, progress: Progress, jobs: int = 1
) -> Library:
    """Compile what the cache does not have, generate the driver and link; `folder` holds the intermediate files."""
    kernels = kernels_of(program)
    progress.start("compiling kernels", len(kernels), "kernels")
    objects = compile_kernels(kernels, program.machine, cache, lambda _done, _total: progress.advance(), jobs)
    progress.start("linking")
    source, calls = generate_step(program, addresses)
    driver = folder / "step.c"
    driver.write_text(source)
    output = folder / "library.so"
    runtime = Path(__file__).parent.parent / "runtime"
    if not (runtime / "pool.c").exists():  # installed as a package
        import llmc.runtime

        runtime = Path(llmc.runtime.__path__[0])
    # The objects go through a response file: a long command line may be refused.
    with tempfile.NamedTemporaryFile("w", suffix=".txt", dir=folder, delete=False) as listing:
        listing.write("\n".join(f'"{path}"' for path in objects))
    command = [
        *compiler_command(program.machine),
        *("-shared", "-fPIC", "-O2", "-std=gnu11", "-pthread", f"-I{runtime}", "-o", str(output)),
        *(str(driver), *(str(path) for path in sorted(runtime.glob("*.c"))), f"@{listing.name}", "-lm"),
        *("-Wl,--build-id=none", "-Wl,-z,noexecstack"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[-300:])
        raise CompileError(f"linking failed ({command[0]} exited with {result.returncode}): {reason}")
    return Library(output, calls, source)
