"""x86-64 as a target: what `llmc.targets` and the CPU templates ask its folder."""

from __future__ import annotations

from llmc.targets.machine import Machine
from llmc.targets.x86 import amx


def matrix_unit(machine: Machine) -> amx.Amx | None:
    """AMX, where the machine has it."""
    return amx.matrix_unit(machine)
