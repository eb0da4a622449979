"""Facts about a model that its lifted graph shows: vocabulary, token types, weights."""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.elementwise import Cast, constant
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.structural import Broadcast, Gather, Matmul, Transpose
from llmc.compiler.ir.types import FLOATS


def token_rows(graph: Graph) -> int:
    """The rows of the table that token ids index: the vocabulary; 0 where there is none."""
    for op in graph.ops:
        if isinstance(op, Gather) and op.x in graph.constants and op.axis == 0:
            rows, indices = op.x.shape[0], op.indices
            while isinstance(indices, Cast):
                indices = indices.x
            if isinstance(indices, Input) and indices.name == "ids" and isinstance(rows, int):
                return rows
    return 0


def without_token_types(graph: Graph, types: Input) -> Graph:
    """The graph for single texts, whose token types are all 0."""
    return substitute_values(graph, {types: Broadcast(constant(np.zeros((1, 1)), types.dtype), types.shape)})


def replaceable(graph: Graph) -> dict[str, str]:
    """The weights that noise may stand for, with their dtypes: factors of products and tables of floats."""
    found: dict[str, str] = {}

    def mark(value: Value) -> None:
        while isinstance(value, (Cast, Transpose)):
            value = value.x
        if isinstance(value, Param) and value.dtype in FLOATS and value.rank > 1:
            found[value.name] = value.dtype

    for op in graph.ops:
        if isinstance(op, Matmul):
            for operand in op.operands:
                mark(operand)
        elif isinstance(op, Gather):
            mark(op.x)
    return found
