"""qemu's user mode emulation of another architecture: how programs for it are run on this computer."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmc.errors import CompileError


def emulator_command(architecture: str, model: str = "max") -> list[str]:
    """What a program for this architecture is started with. model: the CPU, as qemu names it.

    CompileError where there is no emulator, or no system library of that architecture to load programs with.
    """
    if not architecture.replace("_", "").isalnum():  # a file says it, and it becomes a command and a path
        raise CompileError(f"there is no emulator for {architecture!r:.40}")
    names = (f"qemu-{architecture}", f"qemu-{architecture}-static")
    emulator = next(filter(None, map(shutil.which, names)), None)
    root = system_root(architecture)
    if emulator is not None and root is not None:
        return [emulator, "-cpu", model, "-L", str(root)]
    package = architecture.replace("_", "-")
    missing = "no emulator" if emulator is None else "no system library"
    raise CompileError(
        f"there is {missing} here for {architecture}: install qemu-user and a system library for it "
        f"(Debian, Ubuntu: apt install qemu-user libc6-{_debian(package)}-cross)"
    )


def system_root(architecture: str) -> Path | None:
    """The folder whose lib/ has the system library of an architecture, as Debian's cross packages install it."""
    root = Path("/usr") / f"{architecture}-linux-gnu"
    return root if any(root.glob("lib*/ld-linux*.so.*")) else None


def _debian(architecture: str) -> str:
    """Debian's name of it."""
    return {"aarch64": "arm64", "x86-64": "amd64"}.get(architecture, architecture)
