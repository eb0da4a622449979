"""The C compiler that compiles an artifact's own C code and links it: the system's, or one for another architecture."""

from __future__ import annotations

import functools
import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

from llmc.errors import CompileError
from llmc.runtime import cpu
from llmc.targets.machine import Machine

# The system library that artifacts for other architectures are linked against, where the linker brings any: all
# distributions that are in use since 2014 have it or a later one.
LEAST_GLIBC = "2.17"


def compiler_command(machine: Machine) -> list[str]:
    """The C compiler that links for this machine: $CC, or the system's, or a cross compiler. CompileError without."""
    is_own = machine.architecture == cpu.architecture()
    named = os.environ.get("CC", "").split()
    if named and not shutil.which(named[0]):
        raise CompileError(f"there is no C compiler {named[0]}, which the environment variable CC names: unset it")
    if named and (is_own or _makes(tuple(named), machine.architecture)):
        return [*named, *machine.compiler_options]
    command = _system_compiler() if is_own else _cross_compiler(machine)
    return [*command, *machine.compiler_options]


def _system_compiler() -> list[str]:
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C compiler found: install gcc or clang, or name one in the environment variable CC")


def _cross_compiler(machine: Machine) -> list[str]:
    """zig's, which brings all versions of the system library, or gcc's, which links against the one that it came with.

    Docs: https://ziglang.org/learn/overview, "Zig is also a C compiler".
    """
    architecture = machine.architecture
    zig = _zig()
    if zig is not None:
        return [str(zig), "cc", "-target", f"{architecture}-linux-gnu.{LEAST_GLIBC}"]
    gcc = f"{architecture}-linux-gnu-gcc"
    if shutil.which(gcc):
        return [gcc]
    package = f"gcc-{architecture.replace('_', '-')}-linux-gnu"
    raise CompileError(
        f"nothing here links for {machine.name}, which is {architecture}: pip install 'llmc[cross]', or install "
        f"{gcc} (Debian, Ubuntu: apt install {package})"
    )


def _zig() -> Path | None:
    """The program in the package `ziglang`. `python -m ziglang` would run what the current folder has of that name."""
    folders = [folder for folder in sys.path if folder and Path(folder).resolve() != Path.cwd()]
    spec = importlib.machinery.PathFinder.find_spec("ziglang", folders)
    found = Path(spec.origin).with_name("zig") if spec is not None and spec.origin else None
    return found if found is not None and found.is_file() else None


@functools.cache
def _makes(command: tuple[str, ...], architecture: str) -> bool:
    """Whether a compiler says that it makes code for this architecture, under Linux with glibc."""
    try:
        shown = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    made = shown.stdout.strip()
    is_linux = "linux" in made and not any(other in made for other in ("musl", "android", "elf"))
    return shown.returncode == 0 and made.startswith(f"{architecture}-") and is_linux
