"""ARM machines for kernel tests, one for each instruction set: run under an emulator (`emulation.py`)."""

from __future__ import annotations

import pytest

from llmc.targets.arm import detect

MACHINES = {
    "neon": detect.machine("aarch64"),
    "dotprod": detect.machine("aarch64+dotprod"),
    "i8mm": detect.machine("aarch64+bf16"),  # which has both
}


def each_emulated() -> list[object]:
    """pytest parameters for tests of all kernels, which `make test-all` runs."""
    return [pytest.param(machine, id=name, marks=pytest.mark.slow) for name, machine in MACHINES.items()]
