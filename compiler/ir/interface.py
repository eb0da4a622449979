"""How a step orders the sizes of a graph and its outputs, for driver, manifest and runtime alike."""

from __future__ import annotations

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import KV


def size_names(graph: Graph) -> list[str]:
    """The symbols of a graph whose sizes have names of their own, in the order of the step's `dims`."""
    return sorted({symbol.name for symbol in graph.symbols})


def output_values(graph: Graph) -> list[tuple[str, Value]]:
    """The outputs that the step writes, in the order of its `outputs`: all but the caches, which change in place."""
    return [(name, value) for name, value in graph.outputs if not isinstance(value.type, KV)]
