"""Who reads and writes which form: whatever ops state, each reads what somebody has written, at every size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Add, Cast
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Linear, QuantizeActivations
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.errors import CompileError
from llmc.targets.agreement import Agreement, Guard, Reading, Statement, Way, Writing, either, unrounded
from llmc.targets.forms import Array, Buffer, Converted, OwnRows, RowCount, Writer
from llmc.targets.kernel import Range
from llmc.targets.template import Chooser

WIDTH = 32
T = symbol("T", 1, 4096)
X = Input("x", Tensor((T, WIDTH), "f32"))
OWN = OwnRows(WIDTH)
SIZES = [(tokens, prompt) for tokens in (1, 16, 17, 32, 33, 48, 49, 500) for prompt in (0, 1)]


@dataclass(frozen=True)
class Fake(Converted):
    """A form of which only the name counts."""

    name: str = "tiles"

    def buffers(self, rows: RowCount) -> tuple[Buffer, ...]:
        return (Buffer("data", "uint8", (rows, self.features)),)

    def encode(self, x: Array) -> dict[str, Array]:
        raise NotImplementedError

    def decode(self, arrays: Mapping[str, Array], rows: int) -> Array:
        raise NotImplementedError

    def writer(self, chooser: Chooser, **norm: Any) -> Writer:
        raise NotImplementedError


TILES, BYTES = Fake(WIDTH), Fake(WIDTH, "bytes")


def from_on(tokens: int) -> Guard:
    return (Range("T", tokens),)


def up_to(tokens: int) -> Guard:
    return (Range("T", 1, tokens),)


def holds(when: Guard, tokens: int, prompt: int = 0) -> bool:
    sizes = {"T": tokens, "PROMPT": prompt}
    return all(
        item.low <= sizes[item.symbol] and (item.high is None or sizes[item.symbol] <= item.high) for item in when
    )


def linear(x: Value, name: str, residual: Value | None = None) -> Linear:
    return Linear(x, Param(name, Tensor((WIDTH, WIDTH), "f32")), residual=residual)


def rounded(x: Value) -> Cast:
    return Cast(Cast(x, "bf16"), "f32")


def own_or_tiles(op: Linear, low: int, cost: float = 0.5, form: Converted = TILES) -> Statement:
    """Reads own rows of few rows (or bytes, if the graph rounds to them), and can read and write tiles of many."""
    value = op.x if isinstance(op.x, QuantizeActivations) else unrounded(op.x)
    few = BYTES if value is op.x and isinstance(value, QuantizeActivations) else OWN
    many = Way((Reading(few, up_to(low - 1)), Reading(form, from_on(low))), cost, (Writing(form, from_on(low)),))
    return Statement(value, op.x, (Way((Reading(few, ()),)), many))


def agreed(*outputs: Value, low: int = 17, **lows: int) -> Agreement:
    """Of the linear ops in front of these outputs; lows: by the names of their weights."""
    graph = Graph("g", (X,), tuple((f"y{i}", value) for i, value in enumerate(outputs)))
    ops = [op for op in graph.ops if isinstance(op, Linear)]
    return Agreement(graph, {op: own_or_tiles(op, lows.get(op.w.name, low)) for op in ops})  # type: ignore[attr-defined]


def test_the_first_reader_writes_what_nobody_computes() -> None:
    a, b = linear(X, "a"), linear(X, "b")
    agreement = agreed(a, b)
    assert agreement.converts(a) == [Writing(TILES, from_on(17))] and agreement.converts(b) == []


def test_readers_may_change_forms_at_different_numbers_of_rows() -> None:
    """Each form is written for all rows that anybody reads it for; in between both are."""
    rounds = QuantizeActivations(X, 32)
    agreement = agreed(linear(rounds, "a"), linear(rounds, "b"), a=17, b=33)
    assert agreement.writes_of(rounds) == [Writing(BYTES, up_to(32)), Writing(TILES, from_on(17))]


@pytest.mark.parametrize("between", [lambda x: x, rounded, lambda x: QuantizeActivations(x, 32)])
def test_who_computes_it_writes_it_where_all_read_it_so(between) -> None:
    a = linear(X, "a")
    seen = between(a)
    b, c = linear(seen, "b"), linear(seen, "c")
    ((value, writing),) = agreed(b, c).writes_instead(a)
    assert value is (seen if isinstance(seen, QuantizeActivations) else a) and writing == Writing(TILES, from_on(17))
    agreement = agreed(b, c)
    assert agreement.converts(b) == [] and writing not in agreement.writes_of(value)


@pytest.mark.parametrize(
    "case",
    ["an output", "read at another number of rows", "a residual", "a residual of a rounded one", "read by another op"],
)
def test_own_rows_are_written_where_somebody_needs_them(case: str) -> None:
    a = linear(X, "a")
    b = linear(a, "b")
    outputs, lows = {
        "an output": ((b, a), {}),
        "read at another number of rows": ((b, linear(a, "c")), {"c": 33}),
        "a residual": ((linear(a, "b", residual=a),), {}),
        "a residual of a rounded one": ((linear(rounded(a), "b", residual=a),), {}),
        "read by another op": ((b, Add(a, a)), {}),
    }[case]
    agreement = agreed(*outputs, **lows)
    assert agreement.writes_instead(a) == []
    reader = next(op for op in agreement.statements if op is not a)
    assert [writing.form for writing in agreement.converts(reader)] == [TILES]


def test_the_least_cost_is_taken_and_of_equal_ones_what_others_read() -> None:
    a, b = linear(X, "a"), linear(X, "b")
    graph = Graph("g", (X,), (("a", a), ("b", b)))

    def way_of_b(cost_of_a: float, cost_of_b: float) -> int:
        stated = {a: own_or_tiles(a, 17, cost_of_a), b: own_or_tiles(b, 17, cost_of_b)}
        return stated[b].ways.index(Agreement(graph, stated).way(b))

    assert way_of_b(1.5, 0.5) == 1 and way_of_b(0.5, 1.5) == 0
    own = Statement(X, X, (Way((Reading(BYTES, ()),)), Way((Reading(TILES, ()),))))
    tiles = Statement(X, X, (Way((Reading(TILES, ()),)),))
    assert Agreement(graph, {a: tiles, b: own}).way(b) is own.ways[1]


def test_guards_are_joined_to_what_holds_for_either() -> None:
    rng = np.random.default_rng(0)

    def some() -> Guard:
        ranges = []
        for name, most in (("T", 60), ("PROMPT", 1)):
            low, high = sorted(rng.integers(0, most + 1, 2).tolist())
            if rng.random() < 0.7:
                ranges.append(Range(name, low, high if rng.random() < 0.7 else None))
        return tuple(ranges)

    for _ in range(300):
        guards = [some() for _ in range(rng.integers(1, 4))]
        whole = either(guards)
        for tokens, prompt in SIZES:
            assert holds(whole, tokens, prompt) >= any(holds(guard, tokens, prompt) for guard in guards)
    assert either([up_to(16), from_on(9)]) == (Range("T", 1),) and either([up_to(3), up_to(5)]) == up_to(5)
    assert either([up_to(16), ()]) == () == either([(Range("PROMPT", 0, 0),), (Range("PROMPT", 1),)])


def random_graph(rng: np.random.Generator) -> tuple[Graph, dict[Op, Statement]]:
    """Linear ops over results, roundings and sums of each other, with statements of all kinds."""
    values: list[Value] = [X]
    ops: list[Linear] = []
    for i in range(rng.integers(2, 9)):
        x = values[rng.integers(max(0, len(values) - 3), len(values))]
        x = (x, rounded(x), QuantizeActivations(x, 32))[rng.integers(3)] if rng.random() < 0.8 else Add(x, x)
        residual = values[rng.integers(len(values))] if rng.random() < 0.2 else None
        ops.append(linear(x, f"w{i}", residual))
        values.append(ops[-1])
    used = {operand for op in ops for operand in (op.x, unrounded(op.x), op.residual)}
    outputs = [op for op in ops if op not in used or rng.random() < 0.1]
    graph = Graph("g", (X,), tuple((f"y{i}", op) for i, op in enumerate(outputs)))
    forms = (TILES, Fake(WIDTH, "other tiles"))
    stated: dict[Op, Statement] = {}
    for op in graph.ops:
        if isinstance(op, Linear):
            low, cost = int(rng.choice([17, 17, 17, 33, 49])), float(rng.choice([0.5, 0.5, 1.0, 1.5]))
            stated[op] = own_or_tiles(op, low, cost, forms[rng.random() < 0.2])
    return graph, stated


def test_whatever_is_read_is_written_before_and_once() -> None:
    instead = 0
    for seed in range(300):
        graph, stated = random_graph(np.random.default_rng(seed))
        agreement = Agreement(graph, stated)
        for tokens, prompt in SIZES:
            written: set[tuple[Value, str]] = {(X, OWN.name)}

            def write(value: Value, name: str, written: set[tuple[Value, str]] = written) -> None:
                assert (value, name) not in written
                written.add((value, name))

            for op in graph.ops:
                if isinstance(op, QuantizeActivations):
                    for writing in agreement.writes_of(op):
                        if holds(writing.when, tokens, prompt):
                            assert (op.x, OWN.name) in written, seed
                            write(op, writing.form.name)
                if isinstance(op, Add):
                    assert {(operand, OWN.name) for operand in op.operands} <= written, seed
                    write(op, OWN.name)
                if not isinstance(op, Linear):
                    continue
                for writing in agreement.converts(op):
                    if holds(writing.when, tokens, prompt):
                        assert (stated[op].value, OWN.name) in written, seed
                        write(stated[op].value, writing.form.name)
                assert op.residual is None or (op.residual, OWN.name) in written, seed
                now = [reading.form for reading in agreement.way(op).reads if holds(reading.when, tokens, prompt)]
                assert len(now) == 1 and (stated[op].value, now[0].name) in written, seed
                results = [(of, w.form.name) for of, w in agreement.writes_instead(op) if holds(w.when, tokens, prompt)]
                instead += len(results)
                write(*(results or [(op, OWN.name)])[0])
            assert all((value, OWN.name) in written for _, value in graph.outputs), seed
    assert instead > 100  # the property was tried


def test_a_writer_that_is_not_in_the_program_is_an_error() -> None:
    a, b = linear(X, "a"), linear(X, "b")
    agreement = agreed(a, b)
    agreement.check({a, b}.__contains__)
    agreement.check(set[Value]().__contains__)
    with pytest.raises(CompileError, match=r"read as tiles, which no op"):
        agreement.check({b}.__contains__)
