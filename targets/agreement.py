"""Which op reads which form of an activation for which rows, and who writes it: decided here, once for a graph.

Every op that can read an activation in other forms than its own rows makes a `Statement`: what it reads, and *ways* to
read it. A way says which form is read for which rows, what that costs, and which forms the op could then write its own
result in. A target says how ops make statements (`Rules.states`). From these `Agreement` takes

- for each op the way that costs least (where that is the same: one whose forms others read as well);
- for each form that somebody reads, the rows that anybody reads it for, so that readers need not change from one form
  to another at the same number of rows;
- for each form, who writes it: the op that computes the activation, instead of its own rows, if all who read it for
  those rows read this form; else an op that only rounds; else the first op that reads it, in front of its kernels.

Rules ask it which forms to read and write, and decide nothing of the kind themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import QuantizeActivations
from llmc.compiler.ir.op import Op, Value
from llmc.errors import CompileError
from llmc.targets.forms import Converted, Form
from llmc.targets.kernel import Range

Guard = tuple[Range, ...]  # conditions on a step's sizes, all of which hold; none: always


@dataclass(frozen=True)
class Reading:
    """A form, and the steps in which it is read."""

    form: Form
    when: Guard


@dataclass(frozen=True)
class Writing:
    """A form other than own rows, and the steps in which it is written."""

    form: Converted
    when: Guard


@dataclass(frozen=True)
class Way:
    """One way to read an activation.

    reads: forms by the rows they are read for; no two of them for the same rows. cost: time that many rows take, what
    writing the forms takes included, against the op's way that every machine has. writes: forms in which an op that
    reads so could write its result instead of its own rows, and when.
    """

    reads: tuple[Reading, ...]
    cost: float = 1.0
    writes: tuple[Writing, ...] = ()


@dataclass(frozen=True)
class Statement:
    """What an op reads, and its ways to do so: at least one.

    value: the activation. operand: the op's own operand that stands for it, which is `value` or what it is rounded to.
    """

    value: Value
    operand: Value
    ways: tuple[Way, ...]


def unrounded(value: Value) -> Value:
    """What a value is but for a rounding: of what it is to int8, or to bf16 and back. A rounding in the graph says how
    coarse a kernel may be: it may keep what would be dropped."""
    if isinstance(value, QuantizeActivations):
        return value.x
    if isinstance(value, Cast) and isinstance(value.x, Cast) and value.dtype == value.x.x.dtype == "f32":
        return value.x.x if value.x.dtype == "bf16" else value
    return value


def either(guards: Iterable[Guard]) -> Guard:
    """What holds wherever one of the guards does, and perhaps elsewhere: the least and greatest size of each symbol."""
    first, *others = guards
    for other in others:
        by_symbol = {item.symbol: item for item in other}
        first = tuple(
            Range(item.symbol, min(item.low, again.low), None if None in highs else max(highs))  # type: ignore[type-var]
            for item in first
            if (again := by_symbol.get(item.symbol)) and (highs := (item.high, again.high))
        )
    return tuple(item for item in first if item.low > 0 or item.high is not None)


class Agreement:
    """The forms of a graph's activations. `statements`: in the graph's order."""

    def __init__(self, graph: Graph, statements: Mapping[Op, Statement]) -> None:
        self._graph, self._outputs = graph, {value for _, value in graph.outputs}
        self.statements = dict(statements)
        self._readers: dict[Value, list[Op]] = {}
        for op, statement in self.statements.items():
            self._readers.setdefault(statement.value, []).append(op)
        self._ways: dict[Op, Way] = {}
        for op in self.statements:
            self._ways[op] = self._least(op)
        # Of each activation, the forms that are read; and of each op, what it writes instead of its own rows.
        self._forms = {value: self._read_of(value) for value in self._readers}
        self._instead: dict[Op, list[tuple[Value, Writing]]] = {}
        for value, writings in self._forms.items():
            for writing in writings:
                writer = self._computes(value, writing)
                if writer is not None:
                    self._instead.setdefault(writer, []).append((value, writing))

    def _least(self, op: Op) -> Way:
        """The way of an op that costs least; of several, the one with most forms that are read anyway."""
        statement = self.statements[op]
        others = [self._ways[other] for other in self._readers[statement.value] if other in self._ways]
        there = {reading.form for way in others for reading in way.reads}
        return min(statement.ways, key=lambda way: (way.cost, sum(each.form not in there for each in way.reads)))

    def _read_of(self, value: Value) -> list[Writing]:
        guards: dict[Converted, list[Guard]] = {}
        for reader in self._readers[value]:
            for reading in self._ways[reader].reads:
                if isinstance(reading.form, Converted):
                    guards.setdefault(reading.form, []).append(reading.when)
        return [Writing(form, either(each)) for form, each in guards.items()]

    def _computes(self, value: Value, writing: Writing) -> Op | None:
        """The op that computes an activation (or what is rounded to it) and writes this form itself, if one can, and
        nobody needs its own rows then."""
        source = unrounded(value) if isinstance(value, QuantizeActivations) else value
        way = self._ways.get(source) if isinstance(source, Op) else None
        if way is None or writing not in way.writes:
            return None
        assert isinstance(source, Op)
        return source if self._alone(source, value, writing) else None

    def _alone(self, source: Value, value: Value, writing: Writing) -> bool:
        """Whether all that reads `source`, or what it is rounded to, reads this form of `value` where it is written."""
        users = self._graph.users.get(source, ())
        if not users or source in self._outputs:
            return False
        for user in users:
            statement = self.statements.get(user)
            if statement is None:
                if not isinstance(user, Cast | QuantizeActivations) or not self._alone(user, value, writing):
                    return False
            elif statement.value is not value or statement.operand is not source or users.count(user) > 1:
                return False  # such as a residual
            elif [each.when for each in self._ways[user].reads if each.form == writing.form] != [writing.when]:
                return False
        return True

    def way(self, op: Op) -> Way:
        """How an op reads its activation."""
        return self._ways[op]

    def when(self, value: Value, form: Form) -> Guard:
        """The steps in which anybody reads this form of an activation: somebody does."""
        return next(writing.when for writing in self._forms[value] if writing.form == form)

    def writes_instead(self, op: Op) -> list[tuple[Value, Writing]]:
        """The forms that an op writes instead of its own rows: of which activation (its result, or what that is rounded
        to), and when."""
        return self._instead.get(op, [])

    def writes_of(self, value: Value) -> list[Writing]:
        """The forms of an activation that are to be made of its own rows."""
        instead = [writing for each in self._instead.values() for of, writing in each if of is value]
        return [writing for writing in self._forms.get(value, []) if writing not in instead]

    def converts(self, op: Op) -> list[Writing]:
        """The forms that an op has to write of what it reads, in front of its own kernels: it is the first reader of an
        activation that no op rounds."""
        value = self.statements[op].value
        first = self._readers[value][0]
        return self.writes_of(value) if op is first and not isinstance(value, QuantizeActivations) else []

    def check(self, lowered: Callable[[Value], bool]) -> None:
        """CompileError where a form is read that is never written: the op that is to write it is not in the program."""
        for value, readers in self._readers.items():
            writer = value if isinstance(value, QuantizeActivations) else readers[0]
            if self.writes_of(value) and any(map(lowered, readers)) and not lowered(writer):
                names = ", ".join(writing.form.name for writing in self.writes_of(value))
                raise CompileError(f"{value.type} is read as {names}, which no op of the program writes")
