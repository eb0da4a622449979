"""Common subexpressions: values that are computed alike become one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.compiler.ir.elementwise import Binary, Compare
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.passes.manager import Pass, Report


def _key(op: Op) -> tuple[object, ...]:
    """Equal for two ops exactly when they are sure to compute the same value."""
    operands: list[Any] = []
    for _, value in op.named_operands():
        operands.append(tuple(id(item) for item in value) if isinstance(value, tuple) else id(value))
    if isinstance(op, (Binary, Compare)) and op.commutative:
        operands.sort()  # the ids of two values
    # repr tells 0.0 from -0.0 and True from 1, which compare equal.
    attributes = tuple(repr(v) if isinstance(v, float) else v for v in op.attributes().values())
    return (type(op), *operands, *attributes)


@dataclass(frozen=True)
class CSE(Pass, name="cse"):
    """One value for each (op, operands, attributes), and one for each param name.

    Linear in the graph: operands come before users, so a value's operands are unique before it is looked up.
    """

    def run(self, graph: Graph, report: Report) -> Graph:
        params: dict[str, Param] = {}
        merged: dict[Value, Value] = {}
        for param in graph.params:
            first = params.setdefault(param.name, param)
            if first is not param and first.type == param.type:
                merged[param] = first
                report.hit("param")
        # Rewritten ops are kept alive by `seen`, so that no id is reused.
        seen: dict[tuple[object, ...], Op] = {}

        def rule(op: Op) -> Value | None:
            first = seen.setdefault(_key(op), op)
            if first is op:
                return None
            report.hit(op.name)
            return first

        return substitute_values(graph, merged, rule)
