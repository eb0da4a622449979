"""The intermediate representation: values, ops, graphs, and their text and meaning in numpy."""

from llmc.compiler.ir import adapters, elementwise, integers, kernels, llm, ragged, structural
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import REGISTRY, Input, Op, Param, Value

__all__ = [
    "REGISTRY",
    "Graph",
    "Input",
    "Op",
    "Param",
    "Value",
    "adapters",
    "elementwise",
    "integers",
    "kernels",
    "llm",
    "ragged",
    "structural",
]
