"""Machines and how ops run on them. The only room that imports tvm; nothing outside it knows a machine's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmc.compiler.ir.graph import Graph
    from llmc.targets.lowering import Program, Rules
    from llmc.targets.machine import Machine


def machine_names() -> list[str]:
    """Every name that `machine_named` takes."""
    from llmc.targets.x86 import detect

    return detect.names()


def machine_named(name: str) -> Machine:
    """A machine by name, `native` for this one; CompileError lists the names there are."""
    from llmc.targets.x86 import detect

    return detect.machine(name)


def rules_for(machine: Machine) -> Rules:
    """The lowering rules of a machine's architecture."""
    from llmc.targets.cpu import rules

    return rules.RULES


def lower(graph: Graph, machine: Machine) -> Program:
    """Choose kernels for every op of a graph."""
    from llmc.targets.lowering import lower_graph

    return lower_graph(graph, rules_for(machine), machine)
