"""Graphs: immutable webs of values with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from llmc.compiler.ir.dims import Dim, Symbol, symbols_of
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Tensor


@dataclass(frozen=True)
class Graph:
    """A function of its inputs and of the model's params. Only what the outputs need is part of it.

    `ops` is in an order where operands come before users; it is derived, so a graph has no dead code.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, Value], ...]

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        return tuple(value for value in topological(value for _, value in self.outputs) if isinstance(value, Op))

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """The weights that the graph reads, in first-use order."""
        return tuple(value for value in topological(v for _, v in self.outputs) if isinstance(value, Param))

    @cached_property
    def users(self) -> dict[Value, tuple[Op, ...]]:
        """For each value, the ops that use it (one entry a use)."""
        found: dict[Value, list[Op]] = {}
        for op in self.ops:
            for operand in op.operands:
                found.setdefault(operand, []).append(op)
        return {value: tuple(ops) for value, ops in found.items()}

    @cached_property
    def symbols(self) -> tuple[Symbol, ...]:
        """Every symbol in the inputs' types and in ops' attributes, by name."""
        found: set[Symbol] = set()
        for value in self.inputs:
            if isinstance(value.type, Tensor):
                _collect_symbols(value.type.shape, found)
        for op in self.ops:
            for attribute in op.attributes().values():
                _collect_symbols(attribute, found)
        return tuple(sorted(found, key=lambda s: s.name))

    @cached_property
    def constants(self) -> frozenset[Value]:
        """Values that depend on params and constants only, not on a symbolic size: computed when compiling."""
        known: set[Value] = set(self.params)
        for op in self.ops:
            if all(operand in known for operand in op.operands) and not _mentions_a_symbol(op.attributes().values()):
                known.add(op)
        return frozenset(known)

    def output(self, name: str) -> Value:
        """An output by name."""
        return dict(self.outputs)[name]

    def input(self, name: str) -> Input:
        """An input by name."""
        return {value.name: value for value in self.inputs}[name]

    def replace_outputs(self, outputs: Iterable[tuple[str, Value]]) -> Graph:
        """The graph that computes other values from the same inputs."""
        return Graph(self.name, self.inputs, tuple(outputs))

    def __str__(self) -> str:
        from llmc.compiler.ir.text import print_graph

        return print_graph(self)


def _mentions_a_symbol(values: Iterable[object]) -> bool:
    return any(isinstance(v, Dim) or (isinstance(v, tuple) and _mentions_a_symbol(v)) for v in values)


def _collect_symbols(attribute: object, found: set[Symbol]) -> None:
    if isinstance(attribute, Dim):
        found |= symbols_of(attribute)
    elif isinstance(attribute, tuple):
        for item in attribute:
            _collect_symbols(item, found)


def topological(roots: Iterable[Value], known: Iterable[Value] = ()) -> list[Value]:
    """Every value that the roots need, operands first, without those `known` and what only they need; deterministic."""
    order: list[Value] = []
    done = {id(value) for value in known}
    for root in roots:
        stack: list[tuple[Value, bool]] = [(root, False)]
        while stack:
            value, expanded = stack.pop()
            if id(value) in done:
                continue
            if expanded or not isinstance(value, Op):
                done.add(id(value))
                order.append(value)
                continue
            stack.append((value, True))
            stack.extend((operand, False) for operand in reversed(value.operands) if id(operand) not in done)
    return order


Rule = Callable[[Op], Value | None]


def rewrite(graph: Graph, rule: Rule) -> Graph:
    """Rebuild the graph from its inputs to its outputs, offering each op (over already rewritten operands) to `rule`.

    The rule returns a value to use instead, or None to keep the op. Result types may change: users are inferred anew.
    """
    return substitute_values(graph, {}, rule)


def substitute_values(graph: Graph, mapping: dict[Value, Value], rule: Rule | None = None) -> Graph:
    """Replace values by others (`mapping`: old to new), then apply `rule` as `rewrite` does."""
    new: dict[Value, Value] = dict(mapping)
    for op in graph.ops:
        if op in new:
            continue
        rebuilt: Value = op.map_operands(lambda value: new.get(value, value))
        if rule is not None and isinstance(rebuilt, Op):
            replacement = rule(rebuilt)
            if replacement is not None:
                rebuilt = replacement
        if rebuilt is not op:
            new[op] = rebuilt
    outputs = tuple((name, new.get(value, value)) for name, value in graph.outputs)
    inputs = tuple(value for value in graph.inputs if value not in mapping)
    if all(a is b for (_, a), (_, b) in zip(outputs, graph.outputs, strict=True)) and inputs == graph.inputs:
        return graph
    return Graph(graph.name, inputs, outputs)
