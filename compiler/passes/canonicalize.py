"""Bring a graph to canonical form, so that each recogniser meets one spelling of what it looks for.

The forms: no identities; constants on the right; x - c is x + (-c); x / sqrt(y) is x * rsqrt(y); x * (1 / y) is x / y;
powers by 2, 3, 1/2, -1/2 and -1 are spelled out; sums over n divided by n are means; operands are not broadcast where
the op broadcasts anyway; reshapes, transposes, slices and concats are merged; elements move before they are widened.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.passes.canonical_elementwise import ELEMENTWISE_RULES
from llmc.compiler.passes.canonical_structural import STRUCTURAL_RULES, Rule
from llmc.compiler.passes.manager import Pass, Report
from llmc.errors import CompileError

_RULES = (*ELEMENTWISE_RULES, *STRUCTURAL_RULES)
_LIMIT = 50  # each rule makes the graph simpler; more rewrites than this are a cycle of rules
_rules_of: dict[type[Op], tuple[Rule, ...]] = {}


def rules_for(kind: type[Op]) -> tuple[Rule, ...]:
    """The rules that apply to ops of a class, in the order in which they are tried."""
    if kind not in _rules_of:
        _rules_of[kind] = tuple(rule for base, rule in _RULES if issubclass(kind, base))
    return _rules_of[kind]


def canonical(op: Op, report: Report) -> Value:
    """The canonical form of an op over canonical operands."""
    value: Value = op
    for _ in range(_LIMIT):
        if not isinstance(value, Op):
            return value
        for rule in rules_for(type(value)):
            simpler = rule(value)
            if simpler is None:
                continue
            if simpler.type != value.type:
                raise CompileError(f"canonicalize: rule {rule.__name__} turned {value!r} into {simpler.type}")
            report.hit(rule.__name__)
            value = simpler
            break
        else:
            return value
    raise CompileError(f"canonicalize: no canonical form of {op!r} after {_LIMIT} steps: two rules undo each other")


@dataclass(frozen=True)
class Canonicalize(Pass, name="canonicalize"):
    """Apply the rules from inputs to outputs until none applies any more."""

    def run(self, graph: Graph, report: Report) -> Graph:
        for _ in range(_LIMIT):
            simpler = rewrite(graph, lambda op: canonical(op, report))
            if simpler is graph:
                return graph
            graph = simpler
        raise CompileError(f"canonicalize: still changing after {_LIMIT} sweeps: two rules undo each other")
