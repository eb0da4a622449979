"""Rotations by any law of position and length: right at every one of them below the context, or refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from attention_harness import DIM, HEADS, S, apply_half, frequencies, half_cos_sin, random_weights, weight

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import (
    Activation,
    Add,
    Cast,
    Cos,
    Div,
    Floor,
    Greater,
    Less,
    Log,
    Maximum,
    Mul,
    Neg,
    Pow,
    Sin,
    Sub,
    Where,
    constant,
)
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, Rope, RopeAngles
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import (
    Broadcast,
    Concat,
    Gather,
    Iota,
    Matmul,
    Max,
    Reshape,
    Slice,
    Softmax,
    Sum,
    Transpose,
)
from llmc.compiler.ir.types import Array, Tensor, precise
from llmc.compiler.passes import lengths, rope_angles
from llmc.compiler.passes.canonicalize import Canonicalize
from llmc.compiler.passes.element_numbers import ElementNumbers
from llmc.compiler.passes.fuse_rope import FuseRope
from llmc.compiler.passes.lengths import Unsettled, length_regimes, regimes
from llmc.compiler.passes.manager import Report, run_passes
from llmc.compiler.passes.probe import Probe

LONGEST = 64  # tokens of the harness' sequences
SWITCH = 37  # a position, and a length, at which laws change: neither near the start nor a power of two
PAIRS = DIM // 2
SLOW = frequencies(PAIRS)
SIZE = Slice(Iota(S + 1, "i32"), 0, S, S + 1)
ONES = Broadcast(constant(np.ones((1, 1)), "i32"), (1, S))

Form = Callable[[Value, Input], Value]


@pytest.fixture(autouse=True, params=[7, 1 << 14], ids=["in-chunks", "at-once"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions and lengths are evaluated some at a time."""
    monkeypatch.setattr(rope_angles, "_CHUNK", request.param)
    monkeypatch.setattr(lengths, "_CHUNK", request.param)


def column(positions: Value) -> Value:
    return Reshape(Cast(positions, "f32"), (1, S, 1))


def by_angles(x: Value, angles: Value) -> Value:
    both = Concat((angles, angles), 2)
    return apply_half(x, Cos(both), Sin(both))


def row(values: Array) -> Value:
    return constant(np.asarray(values).reshape(1, 1, -1), "f32")


def looked_up(values: Array, positions: Value) -> Value:
    """[1, S, columns] of a stored table."""
    return Gather(constant(np.asarray(values, np.float32), "f32"), positions, 0)


def steps(later: float) -> Array:
    return np.where(np.arange(LONGEST) < SWITCH, 1.0, later)[:, None]


# By position


def scaled_by_table(x: Value, positions: Input) -> Value:
    cos, sin = half_cos_sin(positions, SLOW)
    scale = looked_up(steps(0.5), positions)
    return apply_half(x, Mul(cos, scale), Mul(sin, scale))


def frequency_by_table(x: Value, positions: Input) -> Value:
    return by_angles(x, Mul(Mul(column(positions), row(SLOW)), looked_up(steps(0.25), positions)))


def frequency_by_comparison(x: Value, positions: Input) -> Value:
    at = column(positions)
    near = Less(at, constant(float(SWITCH), "f32"))
    return by_angles(x, Where(near, Mul(at, row(SLOW)), Mul(at, row(SLOW / 4))))


def stored_pairs(later: float) -> Form:
    """A table of cosines and sines whose halves are the two channels of the pairs: equal up to SWITCH, then apart."""

    def form(x: Value, positions: Input) -> Value:
        angles = np.arange(LONGEST)[:, None] * SLOW[None]
        other = np.where(np.arange(LONGEST)[:, None] < SWITCH, angles, angles * later)
        both = np.concatenate([angles, other], axis=1)
        return apply_half(x, *(looked_up(function(both), positions) for function in (np.cos, np.sin)))

    return form


def second_half_of_a_table(x: Value, positions: Input) -> Value:
    """The table's first half is what a few positions cannot tell from its second, which is used."""
    angles = np.arange(LONGEST)[:, None] * SLOW[None]
    far = np.where(np.arange(LONGEST)[:, None] < 4, angles, angles / 4)
    wide = [np.concatenate([f(a) for a in (angles, angles, far, far)], axis=1) for f in (np.cos, np.sin)]
    return apply_half(x, *(Slice(looked_up(table, positions), 2, DIM, 2 * DIM) for table in wide))


def rounded_positions(x: Value, positions: Input) -> Value:
    """Positions that pass through bf16, which holds eight bits of them: no law of f64 shows this."""
    at = Mul(column(positions), constant(1000.0, "f32"))
    return by_angles(x, Mul(Cast(Cast(at, "bf16"), "f32"), row(SLOW / 1000)))


def rounded_cosines(x: Value, positions: Input) -> Value:
    """Cosines and sines that pass through bf16 and multiply in f32."""
    cos, sin = (Cast(Cast(part, "bf16"), "f32") for part in half_cos_sin(positions, SLOW))
    return apply_half(x, cos, sin)


def wrapped_in_i32(x: Value, positions: Input) -> Value:
    """Multiples of positions that i32 holds up to SWITCH, and that are negative from there on."""
    step = (2**31 - 1) // SWITCH
    at = Mul(positions, constant(np.int32(step), "i32"))
    return by_angles(x, Mul(column(at), row(SLOW / step)))


def signed_sines(x: Value, positions: Input) -> Value:
    """The sign of rotate_half in the sines: (-sin, sin)."""
    cos, sin = half_cos_sin(positions, SLOW)
    half = Slice(sin, 2, 0, PAIRS)
    turned = Concat((Slice(x, 3, PAIRS, DIM), Slice(x, 3, 0, PAIRS)), 3)
    shape = (1, 1, S, DIM)
    return Add(Mul(x, Reshape(cos, shape)), Mul(turned, Reshape(Concat((Neg(half), half), 2), shape)))


def negated_sines(x: Value, positions: Input) -> Value:
    """The sines are negative, and so are the other channels."""
    cos, sin = (Reshape(value, (1, 1, S, DIM)) for value in half_cos_sin(positions, SLOW))
    turned = Concat((Slice(x, 3, PAIRS, DIM), Neg(Slice(x, 3, 0, PAIRS))), 3)
    return Add(Mul(x, cos), Mul(turned, Neg(sin)))


def stretched(x: Value, positions: Input) -> Value:
    """Linear scaling: position / 4 times frequency."""
    return by_angles(x, Mul(Div(column(positions), constant(4.0, "f32")), row(SLOW)))


def by_a_third(x: Value, positions: Input) -> Value:
    return by_angles(x, Mul(Mul(column(positions), constant(np.float32(1 / 3), "f32")), row(SLOW)))


def shifted(x: Value, positions: Input) -> Value:
    """Position plus one: no multiple of the position."""
    return by_angles(x, Mul(Add(column(positions), constant(1.0, "f32")), row(SLOW)))


def nearly_linear(x: Value, positions: Input) -> Value:
    """A frequency that grows by two roundings of f32 on the way: f64 shows it, and f32 hardly."""
    growth = constant(np.where(np.arange(LONGEST) < SWITCH, 1.0, 1.0 + 2.0**-22)[:, None], "f64")
    return by_angles(x, Mul(Mul(column(positions), row(SLOW)), Cast(Gather(growth, positions, 0), "f32")))


def rest_by_position(x: Value, positions: Input) -> Value:
    """Half of the channels turn, and the others do not pass: they are scaled."""
    turned = by_angles(Slice(x, 3, 0, PAIRS), Mul(column(positions), row(SLOW[: PAIRS // 2])))
    scale = Reshape(Cos(column(positions)), (1, 1, S, 1))
    return Concat((turned, Mul(Slice(x, 3, PAIRS, DIM), scale)), 3)


def by_the_token_before(x: Value, positions: Input) -> Value:
    """Angles of the position before, and of the first one twice: pieces of a sequence do not show this."""
    late = Concat((Slice(positions, 1, 0, 1), Slice(positions, 1, 0, S - 1)), 1)
    return by_angles(x, Mul(column(late), row(SLOW)))


def by_positions_and_a_count(x: Value, positions: Input) -> Value:
    """Half the position and half a count of tokens."""
    count = Reshape(Cast(Iota(S), "f32"), (1, S, 1))
    return by_angles(x, Mul(Add(column(positions), count), row(SLOW / 2)))


BY_POSITION: dict[str, tuple[Form, int]] = {  # and how many `llm.rope_angles` it becomes
    "scale by table": (scaled_by_table, 0),
    "frequency by table": (frequency_by_table, 0),
    "frequency by comparison": (frequency_by_comparison, 0),
    "two equal halves": (stored_pairs(1.0), 0),
    "second half of a table": (second_half_of_a_table, 0),
    "rounded positions": (rounded_positions, 0),
    "signed sines": (signed_sines, 1),
    "negated sines": (negated_sines, 1),
    "position / 4": (stretched, 1),
    "position * (1 / 3)": (by_a_third, 1),
    "position + 1": (shifted, 0),
    "nearly linear": (nearly_linear, 0),
    "the token before": (by_the_token_before, 0),
    "positions that wrap": (wrapped_in_i32, 0),
    "rounded cosines": (rounded_cosines, 0),
    "positions and a count": (by_positions_and_a_count, 1),
    "the rest by position": (rest_by_position, 1),
}


# By length


def switched(longer: Value) -> Form:
    """Frequencies a quarter where `longer`."""

    def form(x: Value, positions: Input) -> Value:
        return by_angles(x, Mul(column(positions), Where(Reshape(longer, (1, 1, 1)), row(SLOW / 4), row(SLOW))))

    return form


def longest_position(x: Value, positions: Input) -> Value:
    return switched(Greater(Max(positions, (0, 1)), constant(SWITCH - 1, "i32")))(x, positions)


def last_position(x: Value, positions: Input) -> Value:
    last = Slice(positions, 1, S - 1, S)
    return switched(Greater(last, constant(SWITCH - 1, "i32")))(x, positions)


def stepwise(x: Value, positions: Input) -> Value:
    """Qwen's dynamic NTK: the base grows with each doubling of the length beyond 8."""
    ratio = Div(Log(Div(Cast(SIZE, "f32"), constant(8.0, "f32"))), constant(np.log(2.0), "f32"))
    alpha = Maximum(Floor(Add(ratio, constant(1.5, "f32"))), constant(1.0, "f32"))
    base = Mul(constant(100.0, "f32"), Reshape(alpha, (1, 1, 1)))
    return by_angles(x, Mul(column(positions), Pow(base, row(-np.arange(PAIRS) / PAIRS))))


def there_and_back(x: Value, positions: Input) -> Value:
    """Other frequencies for lengths of 20 to 40 only; and cosines that are scaled beyond 50."""
    size = Reshape(SIZE, (1, 1, 1))
    far = Where(Greater(size, constant(40, "i32")), row(SLOW), row(SLOW / 4))
    chosen = Where(Greater(size, constant(19, "i32")), far, row(SLOW))
    scale = Where(Greater(size, constant(50, "i32")), constant(1.25, "f32"), constant(1.0, "f32"))
    both = Concat((Mul(column(positions), chosen),) * 2, 2)
    return apply_half(x, Mul(Cos(both), scale), Mul(Sin(both), scale))


BY_LENGTH: dict[str, tuple[Form, tuple[int, ...]]] = {  # and the last length of each regime but one
    "by size": (switched(Greater(SIZE, constant(SWITCH, "i32"))), (SWITCH,)),
    "by the largest position": (longest_position, (SWITCH,)),
    "by the last position": (last_position, (SWITCH,)),
    "by a sum of ones": (switched(Greater(Sum(ONES, (0, 1)), constant(SWITCH, "i32"))), (SWITCH,)),
    "from the second token on": (switched(Greater(SIZE, constant(1, "i32"))), (1,)),
    "for the longest sequence": (switched(Greater(SIZE, constant(LONGEST - 1, "i32"))), (LONGEST - 1,)),
    "stepwise": (stepwise, (11, 22, 45)),
    "there and back": (there_and_back, (19, 40, 50)),
    "beyond the context only": (switched(Greater(SIZE, constant(LONGEST, "i32"))), ()),
}


def rotation(form: Form) -> Graph:
    x = Input("x", Tensor((1, HEADS, S, DIM), "f32"))
    positions = Input("positions", Tensor((1, S), "i32"))
    return Graph("main", (x, positions), (("y", form(x, positions)),))


def run(graph: Graph, length: int, exact: bool = True) -> Array:
    """The graph for a whole sequence of so many tokens; what asks for `lengths` is told of it."""
    inputs = {
        "x": np.random.default_rng(length).standard_normal((1, HEADS, length, DIM)).astype("f8" if exact else "f4"),
        "positions": np.arange(length, dtype=np.int32)[None],
        "lengths": np.full((1, length), length, np.int32),
    }
    given = {value.name: inputs[value.name] for value in graph.inputs}
    if not exact:
        return np.asarray(evaluate(graph, given, random_weights(graph))["y"])
    with precise():
        return np.asarray(evaluate(graph, given, random_weights(graph))["y"])


@pytest.mark.parametrize("canonical", [False, True], ids=["as-lifted", "canonical"])
@pytest.mark.parametrize("name", BY_POSITION)
def test_a_law_of_position_is_kept_at_every_position(name: str, canonical: bool) -> None:
    form, expected = BY_POSITION[name]
    before, _ = run_passes(rotation(form), [Canonicalize()] if canonical else [])
    after, (report,) = run_passes(before, [FuseRope()])
    assert report.refusals == [] and sum(isinstance(op, Rope) for op in after.ops) == 1
    assert sum(isinstance(op, RopeAngles) for op in after.ops) == expected
    # In f64 the law is the same; in f32 an angle below 64 may be rounded otherwise. bf16 counts as f64 in the former.
    np.testing.assert_allclose(run(after, LONGEST), run(before, LONGEST), rtol=0, atol=1e-6)
    np.testing.assert_allclose(run(after, LONGEST, False), run(before, LONGEST, False), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_law_of_the_length_is_kept_at_every_length(name: str) -> None:
    form, last = BY_LENGTH[name]
    before = rotation(form)
    after, (report,) = run_passes(before, [FuseRope()])
    assert report.refusals == [] and sum(isinstance(op, Rope) for op in after.ops) == 1
    assert any(value.name == "lengths" for value in after.inputs) == bool(last)
    assert length_regimes(after, LONGEST) == last
    assert sum(isinstance(op, RopeAngles) for op in after.ops) == len({*last, 0}) - (name == "there and back")
    for length in range(1, LONGEST + 1):
        # The frequencies of a length are settled in f32, as the source computes them.
        np.testing.assert_allclose(run(after, length, False), run(before, length, False), rtol=0, atol=5e-5)


def growing(x: Value, positions: Input) -> Value:
    """Dynamic NTK: a base for every length beyond 8."""
    grown = Maximum(Div(Cast(SIZE, "f32"), constant(8.0, "f32")), constant(1.0, "f32"))
    base = Mul(constant(100.0, "f32"), Reshape(grown, (1, 1, 1)))
    return by_angles(x, Mul(column(positions), Pow(base, row(-np.arange(PAIRS) / PAIRS))))


def from_the_end(x: Value, positions: Input) -> Value:
    return by_angles(x, Mul(column(Sub(SIZE, positions)), row(SLOW)))


def heads_of_their_own(x: Value, positions: Input) -> Value:
    """Each head turns by frequencies of its own."""
    own = constant(np.outer(np.arange(1, HEADS + 1), SLOW).reshape(1, HEADS, 1, PAIRS), "f32")
    angles = Mul(Reshape(Cast(positions, "f32"), (1, 1, S, 1)), own)
    both = Concat((angles, angles), 3)
    turned = Concat((Neg(Slice(x, 3, PAIRS, DIM)), Slice(x, 3, 0, PAIRS)), 3)
    return Add(Mul(x, Cos(both)), Mul(turned, Sin(both)))


def neighbours(x: Value, positions: Input) -> Value:
    """The second channel of each pair is that of the token before."""
    cos, sin = (Reshape(v, (1, 1, S, DIM)) for v in half_cos_sin(positions, SLOW))
    before = Concat((Slice(x, 2, 0, 1), Slice(x, 2, 0, S - 1)), 2)
    turned = Concat((Neg(Slice(before, 3, PAIRS, DIM)), Slice(before, 3, 0, PAIRS)), 3)
    return Add(Mul(x, cos), Mul(turned, sin))


def tokens_read_as_heads(x: Value, positions: Input) -> Value:
    """The other channels pass through a reshape that takes [heads, S] for [S, heads]: one token shows nothing."""
    cos, sin = (Reshape(v, (1, 1, S, DIM)) for v in half_cos_sin(positions, SLOW))
    turned = Concat((Neg(Slice(x, 3, PAIRS, DIM)), Slice(x, 3, 0, PAIRS)), 3)
    mixed = Transpose(Reshape(turned, (1, S, HEADS, DIM)), (0, 2, 1, 3))
    return Add(Mul(x, cos), Mul(mixed, sin))


def one_token_late(x: Value, positions: Input) -> Value:
    """The second channels turn by the angle of the token before: of the first token, by the same."""
    late = Concat((Slice(positions, 1, 0, 1), Slice(positions, 1, 0, S - 1)), 1)
    both = Concat(tuple(Mul(column(at), row(SLOW)) for at in (positions, late)), 2)
    return apply_half(x, Cos(both), Sin(both))


def signs_that_differ(x: Value, positions: Input) -> Value:
    """Half of the sines are negative, and what they multiply is too: columns of no one scale."""
    cos, sin = (Reshape(value, (1, 1, S, DIM)) for value in half_cos_sin(positions, SLOW))
    low, high = Slice(sin, 3, 0, PAIRS // 2), Neg(Slice(sin, 3, PAIRS // 2, PAIRS))
    a, b, c, d = (Slice(x, 3, i, i + PAIRS // 2) for i in range(0, DIM, PAIRS // 2))
    turned = Concat((Neg(c), d, a, Neg(b)), 3)
    return Add(Mul(x, cos), Mul(turned, Concat((low, high, low, high), 3)))


def scales_that_differ(x: Value, positions: Input) -> Value:
    """Half of the pairs are scaled, behind what they are multiplied by."""
    cos, sin = (Reshape(value, (1, 1, S, DIM)) for value in half_cos_sin(positions, SLOW))
    scale = constant(np.tile([1.0, 1.0, 2.0, 2.0], 2).reshape(1, 1, 1, DIM), "f32")
    turned = Concat((Neg(Slice(x, 3, PAIRS, DIM)), Slice(x, 3, 0, PAIRS)), 3)
    return Add(Mul(Mul(x, cos), scale), Mul(Mul(turned, sin), scale))


def spread_over_heads(x: Value, positions: Input) -> Value:
    cos, sin = (Reshape(value, (1, 1, S, DIM)) for value in half_cos_sin(positions, SLOW))
    cos, sin = (Broadcast(value, (1, HEADS, S, DIM)) for value in (cos, sin))
    turned = Concat((Neg(Slice(x, 3, PAIRS, DIM)), Slice(x, 3, 0, PAIRS)), 3)
    return Add(Mul(x, cos), Mul(turned, sin))


def times_another_size(x: Value, positions: Input) -> Value:
    other = symbol("P", 0, 5)
    return by_angles(x, Mul(column(positions), Mul(row(SLOW), Slice(Iota(other + 1, "f32"), 0, other, other + 1))))


ONE_VALUE = "what it multiplies by is not one value by position"
REFUSED: dict[str, tuple[Form, str]] = {
    "signs that differ": (signs_that_differ, ONE_VALUE),
    "scales that differ": (scales_that_differ, ONE_VALUE),
    "spread over heads": (spread_over_heads, ONE_VALUE),
    "another size": (times_another_size, "its angles depend on sizes beside the number of tokens"),
    "every length its own": (growing, "as a sequence grows; --max-context 8 keeps"),
    "from the end": (from_the_end, "as a sequence grows"),
    "halves that part": (stored_pairs(0.5), f"no rotation at position {SWITCH}"),
    "heads of their own": (heads_of_their_own, ""),
    "neighbours": (neighbours, ""),
    "one token late": (one_token_late, "no rotation at position 1"),
    "tokens read as heads": (tokens_read_as_heads, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rope_can_say_stays_as_it_is(name: str) -> None:
    form, reason = REFUSED[name]
    before, report = rotation(form), Report()
    after = FuseRope().run(before, report)
    assert after.ops == before.ops and after.inputs == before.inputs
    assert [why for _, why in report.refusals if reason in why] if reason else report.refusals == []
    assert len(report.refusals) <= 1


def test_layers_share_the_angles_of_a_regime() -> None:
    x, positions = Input("x", Tensor((1, HEADS, S, DIM), "f32")), Input("positions", Tensor((1, S), "i32"))
    form = BY_LENGTH["by size"][0]
    outputs = (("q", form(x, positions)), ("k", form(Mul(x, constant(2.0, "f32")), positions)))
    graph = Graph("main", (x, positions), outputs)
    after, _ = run_passes(graph, [Canonicalize(), FuseRope()])
    kinds = [type(op) for op in after.ops]
    assert kinds.count(Rope) == 2 and kinds.count(RopeAngles) == 2 and kinds.count(Where) == 1
    assert [value.name for value in after.inputs] == ["x", "positions", "lengths"]


def test_a_table_that_ends_before_the_context_is_believed_up_to_its_end() -> None:
    def short(rows: int) -> Form:
        angles = np.arange(rows)[:, None] * SLOW[None]
        tables = [np.concatenate([function(angles)] * 2, axis=1) for function in (np.cos, np.sin)]
        return lambda x, positions: apply_half(x, *(looked_up(table, positions) for table in tables))

    before = rotation(short(41))
    after, (report,) = run_passes(before, [FuseRope()])
    assert report.hits["half"] == 1 and report.refusals == []
    assert sum(isinstance(op, Embed) for op in after.ops) == 0  # two tables: kept as they are
    np.testing.assert_allclose(run(after, 41), run(before, 41), rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", [0, 13, 39, 40])
def test_a_table_that_ends_before_the_context_is_looked_at_to_its_end(row: int) -> None:
    """Its two halves differ in one row."""
    angles = np.arange(41)[:, None] * SLOW[None] + 1
    other = np.where(np.arange(41)[:, None] == row, -angles, angles)
    tables = [np.concatenate([function(angles), function(other)], axis=1) for function in (np.cos, np.sin)]
    before = rotation(lambda x, positions: apply_half(x, *(looked_up(table, positions) for table in tables)))
    report = Report()
    assert FuseRope().run(before, report).ops == before.ops
    assert f"no rotation at position {row}" in report.refusals[0][1]


def test_weights_are_compared_by_what_the_graph_does_with_them_alone() -> None:
    """Halves of one stored table are two sets of numbers; one half used twice is one."""

    def learned(twice: bool) -> Form:
        def form(x: Value, positions: Input) -> Value:
            rows = [Gather(weight(name, LONGEST, DIM), positions, 0) for name in ("cos", "sin")]
            halves = [Slice(value, 2, 0, PAIRS) for value in rows]
            return apply_half(x, *(Concat((h, h), 2) if twice else r for h, r in zip(halves, rows, strict=True)))

        return form

    assert FuseRope().run(rotation(learned(True)), report := Report()) is not None and report.hits["half"] == 1
    before, report = rotation(learned(False)), Report()
    assert FuseRope().run(before, report).ops == before.ops and "weights decide" in report.refusals[0][1]


LENGTH_VALUES: dict[str, Value] = {
    "a size": SIZE,
    "twice a size, and one": Slice(Iota(2 * S + 2), 0, 2 * S + 1, 2 * S + 2),
    "half a size": Slice(Iota(S + 1), 0, S // 2, S // 2 + 1),
    "a largest position": Max(Input("positions", Tensor((1, S), "i32")), (1,)),
    "a sum over two axes": Sum(Broadcast(constant(np.ones((1, 1, 1)), "i32"), (1, S, 3)), (1, 2)),
    "a matrix product": Matmul(Reshape(Cast(SIZE, "f32"), (1, 1)), constant(np.arange(1, 4).reshape(1, 3), "f32")),
    "a row of several": Concat((Cast(SIZE, "f32"), constant([2.0, 3.0], "f32")), 0),
    "a table's row": Gather(constant(np.arange(200).reshape(100, 2), "i32"), SIZE, 0),
    "a piece of it": Slice(Gather(constant(np.arange(200).reshape(100, 2), "i32"), SIZE, 0), 1, 1, 2),
}


@pytest.mark.parametrize("name", LENGTH_VALUES)
def test_what_the_length_decides_is_known_for_every_length_at_once(name: str) -> None:
    value = LENGTH_VALUES[name]
    positions = next((v for v in Graph("g", (), (("y", value),)).ops for v in v.operands if isinstance(v, Input)), None)
    inputs = (Input("ids", Tensor((1, S), "i32")), positions or Input("positions", Tensor((1, S), "i32")))
    probe = Probe(Graph("main", inputs, (("y", value),)))
    table = lengths._by_length(probe, [value], np.arange(1, LONGEST + 1))[0]
    expected = [found[0] for found in probe.at_lengths([value], range(1, LONGEST + 1), exact=False)]
    np.testing.assert_array_equal(table, np.stack(expected))
    with pytest.raises(Unsettled, match="as a sequence grows"):
        regimes(probe, [value])


def test_equal_numbers_are_equal_elements() -> None:
    x, positions = Input("x", Tensor((1, S, DIM), "f32")), Input("positions", Tensor((1, S), "i32"))
    angles = Mul(column(positions), row(SLOW))
    both = Concat((angles, angles), 2)
    scaled = Mul(Cos(both), constant(2.0, "f32"))
    values: list[Value] = [
        both, Cos(both), Sin(both), scaled, Mul(constant(2.0, "f32"), Cos(angles)), Neg(Sin(angles)), row([1.0, -1.0]),
        Mul(Neg(Sin(angles)), constant(-2.0, "f32")), Mul(Sin(both), constant(2.0, "f32")), Add(x, both), Sub(x, both),
        Matmul(column(positions), row(SLOW)), Gather(both, constant([5, 1], "i64"), 2),
        Activation(both, "silu"), Activation(both, "gelu"), Softmax(both, 2), Softmax(both, 1),
    ]  # fmt: skip
    numbers = ElementNumbers({"S": 3})
    graph = Graph("main", (x, positions), tuple((str(i), value) for i, value in enumerate(values)))
    given = {"x": np.random.default_rng(0).standard_normal((1, 3, DIM)), "positions": np.array([[5, 2, 7]])}
    with precise():
        found = evaluate(graph, given, random_weights(graph))
    seen: dict[int, float] = {}
    count = 0
    for index, value in enumerate(values):
        data = np.asarray(found[str(index)])
        assert numbers.of(value).shape == data.shape
        for number, element in zip(numbers.of(value).reshape(-1).tolist(), data.reshape(-1).tolist(), strict=True):
            count += 1
            expected = seen.setdefault(abs(number), element if number > 0 else -element)
            assert (element if number > 0 else -element) == pytest.approx(expected, rel=1e-15)
    assert count > 1.5 * len(seen), "many elements are written several times"
    assert np.array_equal(numbers.of(scaled)[..., :PAIRS], numbers.of(values[4]))
    assert np.array_equal(numbers.of(values[7]), numbers.of(values[8])[..., :PAIRS])
    assert np.array_equal(numbers.of(angles), numbers.of(values[11]))
