"""64-bit ARM as a target: what `llmc.targets` and the CPU templates ask its folder."""

from __future__ import annotations

from llmc.targets.arm.detect import ARCHITECTURE, machine, names, native
from llmc.targets.cpu.library import build_library, check_tools, device
from llmc.targets.cpu.rules import RULES
from llmc.targets.lowering import Rules
from llmc.targets.machine import Machine

__all__ = [
    "architecture",
    "build_library",
    "check_tools",
    "device",
    "machine",
    "matrix_unit",
    "names",
    "native",
    "rules",
]


def architecture() -> str:
    """As `runtime.cpu.architecture` says it."""
    return ARCHITECTURE


def rules() -> Rules:
    """The templates of targets/cpu."""
    return RULES


def matrix_unit(machine: Machine) -> None:
    """None: SME is not used. What multiplies two rows by two (`smmla`) is a vector instruction (`isa.py`)."""
    return
