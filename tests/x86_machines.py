"""Machines built by hand, for kernel tests: one for each instruction set, and whether this computer runs it.

Tests of all machines have those of ARM among them, which are emulated: slow ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from arm_machines import each_emulated

from llmc.runtime import cpu
from llmc.targets.machine import Machine
from llmc.targets.x86 import detect

_BASE = {"avx2", "fma", "f16c"}
_WIDE = _BASE | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}

MACHINES = {
    "avx2": Machine("x86-64-v3", "x86", "x86-64-v3", frozenset(_BASE), 256),
    "avxvnni": Machine("alderlake", "x86", "alderlake", frozenset(_BASE | {"avxvnni"}), 256),
    "avx512": Machine("x86-64-v4", "x86", "x86-64-v4", frozenset(_WIDE), 512),
    "avx512vnni": Machine(
        "znver4", "x86", "znver4", frozenset(_WIDE | {"avx512vnni", "avx512vbmi", "avx512bf16"}), 512
    ),
}


def runnable(name: str) -> bool:
    """Whether this computer has every feature of the machine (Linux spells some of them otherwise)."""
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    linux = {"avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
    return flags.issuperset({linux.get(feature, feature) for feature in MACHINES[name].features})


def each_machine() -> list[object]:
    """pytest parameters: every machine, skipped where this computer lacks its features."""
    missing = pytest.mark.skip(reason="this computer lacks the instruction set")
    own = [pytest.param(m, id=name, marks=[] if runnable(name) else missing) for name, m in MACHINES.items()]
    return [*own, *each_emulated()]


def machines_of(*names: str) -> list[object]:
    """Those of `each_machine` with these names, and plain NEON: what multiplies no bytes is the same on all of ARM."""
    return [param for param in each_machine() if param.id in (*names, "neon")]


def each_machine_and_tiles() -> list[object]:
    """The same, and one with tile registers."""
    machine = detect.machine("sapphirerapids")
    missing = pytest.mark.skip(reason="this computer has no tile registers, or the system does not lend them")
    return [
        *each_machine(),
        pytest.param(machine, id="tiles", marks=[] if machine.features <= cpu.features() else missing),
    ]
