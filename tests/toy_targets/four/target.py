"""A target that the project does not have: all that a folder must say for the CPU templates to run on it."""

from __future__ import annotations

from llmc.targets.cpu.library import build_library, check_tools, device
from llmc.targets.cpu.rules import RULES
from llmc.targets.lowering import Rules
from llmc.targets.machine import Machine

__all__ = ["build_library", "check_tools", "device"]


def architecture() -> str:
    return "x86_64"


def names() -> list[str]:
    return ["four-lanes"]


def machine(name: str) -> Machine:
    return Machine(name, "four", "x86-64-v3", frozenset({"avx2", "fma", "f16c"}), 128)


def native() -> None:
    return None


def rules() -> Rules:
    return RULES


def matrix_unit(machine: Machine) -> None:
    return None
