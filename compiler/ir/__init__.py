"""The intermediate representation: values, ops, graphs, and their text and meaning in numpy."""

from llmc.compiler.ir import elementwise, integers, kernels, llm, ragged, structural
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import REGISTRY, Input, Op, Param, Value

__all__ = [
    "REGISTRY",
    "Graph",
    "Input",
    "Op",
    "Param",
    "Value",
    "elementwise",
    "integers",
    "kernels",
    "llm",
    "ragged",
    "structural",
]
