"""From a graph to kernel calls: rules, what they chose and what they refused.

A rule lowers one op (and may absorb ops in front of it that nobody else needs) to calls of kernels. Rules are tried
from the highest priority down; the first whose ISA features the machine has and which does not refuse wins; two that
would win at one priority are an error. An op without a rule of its own is decomposed into simpler ops, which plain
rules at priority 0 serve, so that everything runs.

    @lower(PagedAttention, priority=10, needs=missing_vectors)
    def paged_attention(op, context):
        return Lowered(calls=(...,))       # or a string: why not
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Reshape
from llmc.errors import CompileError
from llmc.targets.agreement import Agreement, Statement
from llmc.targets.forms import Converted, Form, RowCount
from llmc.targets.kernel import CachePart, Call, Kernel, Scratch
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser, describe_space


@dataclass(frozen=True)
class Lowered:
    """What a rule gives: the calls, in order, and what else they do.

    computes: other ops that the calls compute with this one (effects such as an append to a cache).
    reads: values that the calls read without naming them as arguments (they read the value's named scratches).
    """

    calls: tuple[Call, ...]
    computes: tuple[Op, ...] = ()
    reads: tuple[Value, ...] = ()
    reason: str = ""


RuleFunction = Callable[[Op, "Context"], "Lowered | str"]
StateFunction = Callable[[Op, "Context"], "Statement | None"]
# What a rule needs: features, or a function that says which of those it needs a machine lacks.
Needs = tuple[str, ...] | Callable[[Machine], tuple[str, ...]]


@dataclass(frozen=True)
class Rule:
    """One way to lower an op."""

    function: RuleFunction
    priority: int
    needs: Needs

    @property
    def name(self) -> str:
        return self.function.__name__

    def missing(self, machine: Machine) -> tuple[str, ...]:
        """What the machine lacks of what the rule needs."""
        if callable(self.needs):
            return self.needs(machine)
        return tuple(feature for feature in self.needs if not machine.has(feature))


class Rules:
    """A target's table of rules."""

    def __init__(self) -> None:
        self.table: dict[type[Op], list[Rule]] = {}
        self._states: dict[type[Op], StateFunction] = {}

    def lower(self, *kinds: type[Op], priority: int, needs: Needs = ()) -> Callable[[RuleFunction], RuleFunction]:
        """Register a rule for some ops."""

        def register(function: RuleFunction) -> RuleFunction:
            for kind in kinds:
                self.table.setdefault(kind, []).append(Rule(function, priority, needs))
            return function

        return register

    def states(self, *kinds: type[Op]) -> Callable[[StateFunction], StateFunction]:
        """Register what says which forms of an activation some ops can read: `agreement.Statement`, or None."""

        def register(function: StateFunction) -> StateFunction:
            for kind in kinds:
                self._states[kind] = function
            return function

        return register

    def state(self, op: Op, context: Context) -> Statement | None:
        """An op's statement; None: it reads its operands' own rows."""
        function = self._states.get(type(op))
        return None if function is None else function(op, context)

    def has(self, op: Op) -> bool:
        """Whether any rule is for this kind of op."""
        return type(op) in self.table

    def choose(self, op: Op, context: Context) -> tuple[Lowered, Choice] | Choice:
        """The winning rule's result with the record of the choice; the record alone when every rule refused."""
        rejected: list[tuple[str, str]] = []
        winner: tuple[Rule, Lowered] | None = None
        for rule in sorted(self.table.get(type(op), ()), key=lambda r: -r.priority):
            missing = rule.missing(context.machine)
            if winner is not None:
                if (
                    rule.priority == winner[0].priority
                    and not missing
                    and not isinstance(rule.function(op, context), str)
                ):
                    raise CompileError(f"{op.name}: rules {winner[0].name} and {rule.name} tie at {rule.priority}")
                continue
            if missing:
                rejected.append((rule.name, f"the machine has no {', '.join(missing)}"))
                continue
            result = rule.function(op, context)
            if isinstance(result, str):
                rejected.append((rule.name, result))
                continue
            winner = rule, result
        choice = Choice(op.name, str(op.type), winner[0].name if winner else "", tuple(rejected))
        if winner is None:
            return choice
        choice.reason = winner[1].reason
        return winner[1], choice


@dataclass(frozen=True, eq=False)
class Context(Chooser):
    """What a rule may look at, and ask."""

    graph: Graph
    rules: Rules = field(default_factory=lambda: Rules())

    def only_user(self, value: Value) -> Op | None:
        """The one op that uses `value`, if it is the only use and no output is."""
        users = self.graph.users.get(value, ())
        if len(users) != 1 or any(out is value for _, out in self.graph.outputs):
            return None
        return users[0]

    def scratch_name(self, value: Value, part: str) -> str:
        """The name of a scratch that belongs to a value, the same for all ops that read it."""
        return f"@{self.numbers[value]}.{part}"

    @cached_property
    def numbers(self) -> dict[Value, int]:
        """Each op's place in the graph; inputs come behind."""
        return {value: index for index, value in enumerate((*self.graph.ops, *self.graph.inputs))}

    def known(self, value: Value) -> bool:
        """Whether the value is computed when compiling."""
        return value in self.graph.constants

    @cached_property
    def agreement(self) -> Agreement:
        """Which form of an activation each op reads, and who writes it."""
        stated = {
            op: statement
            for op in self.graph.ops
            if op not in self.graph.constants and (statement := self.rules.state(op, self)) is not None
        }
        return Agreement(self.graph, stated)

    def buffers(self, value: Value, form: Form) -> dict[str, object]:
        """What calls pass as a form of an activation, by the names of the form's buffers: room for as many rows as the
        form is read for."""
        if not isinstance(form, Converted):
            return {buffer.name: value for buffer in form.buffers(1)}
        rows: RowCount = product(value.shape[:-1])
        bounds = [item.high for item in self.agreement.when(value, form) if item.symbol == str(rows)]
        rows = rows if not bounds or bounds[0] is None else bounds[0]
        return {
            buffer.name: Scratch(self.scratch_name(value, f"{form.name}.{buffer.name}"), buffer.dtype, buffer.elements)
            for buffer in form.buffers(rows)
        }


@dataclass
class Choice:
    """Which rule lowered an op, and why those of higher priority did not."""

    op: str
    type: str
    rule: str
    rejected: tuple[tuple[str, str], ...]
    reason: str = ""


@dataclass(frozen=True)
class LoweredOp:
    """An op of the program: its calls, in order, and the choice behind them."""

    op: Op
    calls: tuple[Call, ...]
    choice: Choice


@dataclass
class Program:
    """The k level: calls in execution order over buffers. `aliases` maps a value to the one whose buffer it shares."""

    graph: Graph
    machine: Machine
    ops: list[LoweredOp] = field(default_factory=list)
    aliases: dict[Value, Value] = field(default_factory=dict)
    decomposed: list[Choice] = field(default_factory=list)
    _spaces: dict[Kernel, dict[str, object] | None] = field(default_factory=dict)

    def buffer_of(self, value: Value) -> Value:
        """The value that owns the bytes."""
        while value in self.aliases:
            value = self.aliases[value]
        return value

    def space_of(self, kernel: Kernel) -> dict[str, object] | None:
        """Its template's knobs and how many of them there may be, for manifests; None where none are declared."""
        if kernel not in self._spaces:
            self._spaces[kernel] = describe_space(kernel, self.machine)
        return self._spaces[kernel]


def values_of(call: Call) -> list[Value]:
    """The run-time and compile-time values that a call's arguments name."""
    found = []
    for argument in call.args:
        if isinstance(argument, Value):
            found.append(argument)
        elif isinstance(argument, CachePart) and isinstance(argument.value, Value):
            found.append(argument.value)
    return found


def decompose_unsupported(graph: Graph, rules: Rules, machine: Machine) -> tuple[Graph, list[Choice]]:
    """Replace run-time ops that no rule takes by their decompositions, until every op has a rule."""
    choices: list[Choice] = []
    for _ in range(8):
        context = Context(machine, graph, rules)
        refused: dict[Op, Choice] = {}
        for op in graph.ops:
            if op in graph.constants or isinstance(op, Reshape):
                continue
            result = rules.choose(op, context) if rules.has(op) else Choice(op.name, str(op.type), "", ())
            if isinstance(result, Choice):
                refused[op] = result
        if not refused:
            return graph, choices
        graph = _expand(graph, refused, machine)
        choices += refused.values()
    raise CompileError("ops kept decomposing into ops without rules")


def _expand(graph: Graph, refused: dict[Op, Choice], machine: Machine) -> Graph:
    """The graph with refused ops in simpler ones; CompileError where an op has no simpler form."""
    new: dict[Value, Value] = {}
    for op in graph.ops:
        rebuilt: Value = op.map_operands(lambda value: new.get(value, value))
        choice = refused.get(op)
        if choice is not None:
            assert isinstance(rebuilt, Op)
            simpler = rebuilt.decompose()
            if simpler is None:
                reasons = "; ".join(f"{name}: {why}" for name, why in choice.rejected) or "no rule is for it"
                raise CompileError(f"{op.name} : {op.type} cannot be compiled for {machine.name}: {reasons}")
            choice.reason = "decomposed into simpler ops"
            rebuilt = simpler
        if rebuilt is not op:
            new[op] = rebuilt
    return substitute_values(graph, new) if new else graph


def changed_operand(op: Op, context: Context) -> Value:
    """The operand whose memory becomes the result's; CompileError where anything else may read that memory."""
    value: Value = getattr(op, op.in_place)
    if context.only_user(value) is not op or not isinstance(value, Op) or isinstance(value, Reshape):
        raise CompileError(f"{op.name} : {op.type} changes {op.in_place} in place, which something else reads too")
    return value


def lower_graph(graph: Graph, rules: Rules, machine: Machine) -> Program:
    """The program of a graph. Users are lowered before what they use, so that rules can absorb operands."""
    graph, decomposed = decompose_unsupported(graph, rules, machine)
    context = Context(machine, graph, rules)
    program = Program(graph, machine, decomposed=decomposed)
    needed: set[Value] = {value for _, value in graph.outputs}
    done: set[Value] = set()
    reverse: list[LoweredOp] = []
    for op in reversed(graph.ops):
        if op not in needed or op in done or op in graph.constants:
            continue
        if isinstance(op, Reshape):
            program.aliases[op] = op.x
            needed.add(op.x)
            continue
        result = rules.choose(op, context)
        assert not isinstance(result, Choice)
        if op.in_place:
            program.aliases[op] = changed = changed_operand(op, context)
            needed.add(changed)
        lowered, choice = result
        done.update(lowered.computes)
        needed.update(lowered.reads)
        for call in lowered.calls:
            needed.update(values_of(call))
        reverse.append(LoweredOp(op, lowered.calls, choice))
    program.ops = reverse[::-1]
    context.agreement.check({lowered.op for lowered in program.ops}.__contains__)
    return program
