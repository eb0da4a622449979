"""Check that a graph obeys the IR's rules: types re-infer, inputs are declared, levels are legal, caches are linear."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.op import REGISTRY, Input
from llmc.compiler.ir.types import KV
from llmc.errors import IRError


def verify(graph: Graph, levels: Iterable[str] = ("t", "llm", "k")) -> None:
    """Raise IRError naming the first op or input that breaks a rule. `levels`: op prefixes that may appear."""
    allowed = frozenset(levels)
    declared = set(graph.inputs)
    names = [value.name for value in graph.inputs]
    if len(set(names)) != len(names):
        raise IRError(f"graph {graph.name}: two inputs have one name")
    output_names = [name for name, _ in graph.outputs]
    if len(set(output_names)) != len(output_names):
        raise IRError(f"graph {graph.name}: two outputs have one name")
    for op in graph.ops:
        if REGISTRY.get(op.name) is not type(op):
            raise IRError(f"{op.name} is not a registered op")
        if op.level not in allowed:
            raise IRError(f"{op.name} is not legal here: only {', '.join(sorted(allowed))} ops are")
        if op.infer() != op.type:
            raise IRError(f"{op.name} says it gives {op.type}, its operands make that {op.infer()}")
        for operand in op.operands:
            if isinstance(operand, Input) and operand not in declared:
                raise IRError(f"{op.name} uses input {operand.name}, which graph {graph.name} does not declare")
    _verify_caches(graph)


def _verify_caches(graph: Graph) -> None:
    """A cache is one buffer: each version is appended to at most once, and whoever reads it has done so by then.

    Who reads a version that an append overwrites must be among what the append is computed from: that order holds
    however the ops are sorted. An overwritten version is no output either.
    """
    outputs = {value for _, value in graph.outputs}
    for value, users in graph.users.items():
        if not isinstance(value.type, KV):
            continue
        appends = [op for op in users if isinstance(op.type, KV)]
        if len(appends) > 1:
            raise IRError(f"a cache version of type {value.type} is appended to {len(appends)} times: branches")
        if not appends:
            continue
        (append,) = appends
        if value in outputs:
            raise IRError(f"a cache version of type {value.type} is an output, and is overwritten by {append.name}")
        readers = [op for op in users if op is not append]
        needed = set(topological(append.operands)) if readers else set()
        for reader in readers:
            if reader not in needed:
                raise IRError(
                    f"{reader.name} : {reader.type} reads a cache version that {append.name} overwrites, "
                    "and nothing says that it does so before"
                )
