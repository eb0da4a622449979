"""Machines and how ops run on them. The only room that imports tvm; nothing outside it knows a machine's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from llmc.compiler.ir.graph import Graph
    from llmc.compiler.progress import Progress
    from llmc.targets.lowering import Program
    from llmc.targets.machine import Machine
    from llmc.targets.target import Addresses, Library


def machine_names() -> list[str]:
    """Every name that `machine_named` takes."""
    from llmc.targets.target import all_names

    return all_names()


def machine_named(name: str) -> Machine:
    """A machine by name, `native` for this one; CompileError lists the names there are."""
    from llmc.targets.target import find_machine

    return find_machine(name)


def check_tools(machine: Machine) -> None:
    """CompileError where a tool is missing that `build_library` takes for this machine."""
    from llmc.targets.target import target_named

    target_named(machine.arch).check_tools(machine)


def lower(graph: Graph, machine: Machine) -> Program:
    """Choose kernels for every op of a graph."""
    from llmc.targets.lowering import lower_graph
    from llmc.targets.target import target_named

    return lower_graph(graph, target_named(machine.arch).rules(), machine)


def build_library(
    program: Program, addresses: Addresses, cache: Path, folder: Path, progress: Progress, jobs: int = 1
) -> Library:
    """The loadable part of an artifact, from a program: kernels and their driver, linked in `folder`."""
    from llmc.targets.target import target_named

    return target_named(program.machine.arch).build_library(program, addresses, cache, folder, progress, jobs)
