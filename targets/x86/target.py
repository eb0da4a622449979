"""x86-64 as a target: what `llmc.targets` and the CPU templates ask its folder."""

from __future__ import annotations

from llmc.targets.cpu.library import build_library, check_tools, device
from llmc.targets.cpu.rules import RULES
from llmc.targets.lowering import Rules
from llmc.targets.x86.amx import matrix_unit
from llmc.targets.x86.detect import machine, names, native

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
    return "x86_64"


def rules() -> Rules:
    """The templates of targets/cpu; AMX comes in through `matrix_unit`."""
    return RULES
