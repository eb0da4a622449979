"""fuse-rope: conditions of its parts that few graphs reach, each by a graph in which it decides."""

from __future__ import annotations

import numpy as np
import pytest
from attention_harness import DIM, HEADS, S, apply_half, half_cos_sin, rotate_half, weight
from pass_harness import graph_of, run_checked
from test_passes_rope_forms import PAIRS, T, given, half, picked, ropes, tables, text, wide
from test_passes_rope_laws import LONGEST, SIZE, SLOW, SWITCH, Form, by_angles, column, looked_up, rotation, row, run

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Add, Cast, Cos, Greater, Mul, Neg, Sin, Sub, Where, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, RopeAngles
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Gather, GatherElements, Reshape, Slice, Transpose
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.passes import rope_angles
from llmc.compiler.passes.fuse_rope import FuseRope
from llmc.compiler.passes.manager import Report, run_passes

BIG = constant(float(2**24), "f32")
ANGLES = np.arange(LONGEST + 1)[:, None] * SLOW
COLUMNS = np.concatenate([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)


def rounded_to_even(x: Value) -> Value:
    """Whole numbers below 2^24 in f32: even ones stay, odd ones go up or down. In f64 all stay."""
    return Sub(Add(x, BIG), BIG)


def by_rows(x: Value, rows: Value, order: tuple[int, ...] = tuple(range(PAIRS))) -> Value:
    """x turned by rows [1, S, 2 * PAIRS] of cosines and sines, the frequencies in another order."""
    parts = (Slice(rows, 2, 0, PAIRS), Slice(rows, 2, PAIRS, 2 * PAIRS))
    if order != tuple(range(PAIRS)):
        parts = tuple(Gather(part, constant(np.array(order), "i64"), 2) for part in parts)  # type: ignore[assignment]
    return apply_half(x, *(Concat((part, part), 2) for part in parts))


# What the angles are


def cosines_of_f64(x: Value, positions: Input) -> Value:
    """Taken in f64 of angles in f64, scaled there and again in f32."""
    angles = Cast(Mul(column(positions), row(SLOW)), "f64")
    both = Concat((angles, angles), 2)
    parts = (Mul(Cast(Mul(f(both), constant(3.0, "f64")), "f32"), constant(2.0, "f32")) for f in (Cos, Sin))
    return apply_half(x, *parts)


def frequencies_by_cosines(x: Value, positions: Input) -> Value:
    """Cosines are taken of constants too."""
    return by_angles(x, Mul(column(positions), Cos(row(np.arccos(SLOW)))))


def scaled_before(x: Value, positions: Input) -> Value:
    """A number multiplies what is turned by each of its two ways: a factor without tokens stands first."""
    cos, sin = (Reshape(part, (1, 1, S, DIM)) for part in half_cos_sin(positions, SLOW))
    two = constant(2.0, "f32")
    return Add(Mul(Mul(x, two), cos), Mul(Mul(rotate_half(x), two), sin))


def cosines_by_pair(x: Value, positions: Input) -> Value:
    """The later cosines are half as large: they turn by the angles, but are no cosines of one scale."""
    cos, sin = half_cos_sin(positions, SLOW)
    return apply_half(x, Mul(cos, row(np.tile([1.0, 1.0, 0.5, 0.5], 2))), sin)


def smaller_sines(x: Value, positions: Input) -> Value:
    cos, sin = half_cos_sin(positions, SLOW)
    return apply_half(x, cos, Mul(sin, constant(0.5, "f32")))


def sines_for_cosines(x: Value, positions: Input) -> Value:
    cos, sin = half_cos_sin(positions, SLOW)
    return apply_half(x, sin, cos)


def some_cosines_of_one(x: Value, positions: Input) -> Value:
    """The cosine of the last pair is the number 1, wherever the token is."""
    cos, sin = half_cos_sin(positions, SLOW)
    one = Broadcast(constant(np.ones((1, 1, 1)), "f32"), (1, S, 1))
    return apply_half(x, Concat((Slice(cos, 2, 0, PAIRS - 1), one) * 2, 2), sin)


def scaled_law(scale: float) -> Form:
    """Angles of position + 1, which is no multiple of the position, and a number that multiplies all of it."""

    def form(x: Value, positions: Input) -> Value:
        at = Add(column(positions), constant(1.0, "f32"))
        both = Concat((Mul(at, row(SLOW)),) * 2, 2)
        cos, sin = (Reshape(f(both), (1, 1, S, DIM)) for f in (Cos, Sin))
        number = constant(scale, "f32")
        return Add(Mul(Mul(x, cos), number), Mul(Mul(rotate_half(x), sin), number))

    return form


# Tables


def by_another_table(values: Array) -> Form:
    """The rows to look up are looked up themselves."""

    def form(x: Value, positions: Input) -> Value:
        rows = Gather(constant(values, "i32"), positions, 0)
        return by_rows(x, Reshape(Gather(constant(COLUMNS, "f32"), rows, 0), (1, S, 2 * PAIRS)))

    return form


def by_rounded_positions(x: Value, positions: Input) -> Value:
    """Positions that f32 rounds: not so in f64."""
    return by_rows(x, looked_up(COLUMNS, Cast(rounded_to_even(Cast(positions, "f32")), "i32")))


def by_elements(x: Value, positions: Input) -> Value:
    """Each column is looked up by itself, all in one row."""
    index = Reshape(Concat((Reshape(positions, (S, 1)),) * 2 * PAIRS, 1), (S, 2 * PAIRS))
    table = constant(COLUMNS, "f32")
    return by_rows(x, Reshape(GatherElements(table, index, 0), (1, S, 2 * PAIRS)))


def by_elements_of_several_rows(x: Value, positions: Input) -> Value:
    """The columns are looked up in rows of their own."""
    other = Sub(constant(LONGEST - 1, "i32"), positions)
    index = Concat((*(Reshape(positions, (S, 1)),) * PAIRS, *(Reshape(other, (S, 1)),) * PAIRS), 1)
    table = constant(COLUMNS, "f32")
    return by_rows(x, Reshape(GatherElements(table, index, 0), (1, S, 2 * PAIRS)))


def by_one_row(x: Value, positions: Input) -> Value:
    """A scale by position, and frequencies that are looked up in a row which is the same for all."""
    found = Gather(constant(np.stack([SLOW, SLOW / 2]), "f32"), constant(np.ones((1, 1)), "i32"), 0)
    scale = looked_up(np.linspace(1, 2, LONGEST)[:, None], positions)
    cos, sin = (Mul(f(Mul(column(positions), found)), scale) for f in (Cos, Sin))
    return apply_half(x, Concat((cos, cos), 2), Concat((sin, sin), 2))


def of_a_stack(x: Value, positions: Input) -> Value:
    """Cosines and sines are two tables in one."""
    stack = constant(np.stack(np.split(COLUMNS, 2, axis=1)), "f32")
    found = Gather(stack, Reshape(positions, (S,)), 1)
    cos, sin = (Reshape(Slice(found, 0, i, i + 1), (1, S, PAIRS)) for i in range(2))
    return apply_half(x, Concat((cos, cos), 2), Concat((sin, sin), 2))


def of_columns(x: Value, positions: Input) -> Value:
    """A table [columns, rows]."""
    found = Gather(constant(COLUMNS.T, "f32"), Reshape(positions, (S,)), 1)
    return by_rows(x, Reshape(Transpose(found, (1, 0)), (1, S, 2 * PAIRS)))


def of_rank_4(x: Value, positions: Input) -> Value:
    table = constant(COLUMNS.reshape(1, 1, LONGEST + 1, -1), "f32")
    return by_rows(x, Reshape(Gather(table, Reshape(positions, (S,)), 2), (1, S, 2 * PAIRS)))


def in_order(*order: int) -> Form:
    return lambda x, positions: by_rows(x, looked_up(COLUMNS, positions), order)


BACKWARDS = np.arange(LONGEST)[::-1].copy()
KEPT: dict[str, tuple[Form, int, int]] = {  # and how many `llm.rope_angles` and `llm.embed` it becomes
    "cosines of f64": (cosines_of_f64, 1, 0),
    "frequencies by cosines": (frequencies_by_cosines, 1, 0),
    "scaled before": (scaled_before, 1, 0),
    "cosines by pair": (cosines_by_pair, 0, 0),
    "smaller sines": (smaller_sines, 0, 0),
    "sines for cosines": (sines_for_cosines, 0, 0),
    "some cosines of one": (some_cosines_of_one, 0, 0),
    "half of another law": (scaled_law(0.5), 0, 0),
    "minus twice another law": (scaled_law(-2.0), 0, 0),
    "rows by another table": (by_another_table(BACKWARDS), 0, 1),
    "rows by another table, a column": (by_another_table(BACKWARDS[:, None]), 0, 1),
    "rows by rounded positions": (by_rounded_positions, 0, 1),
    "rows by element": (by_elements, 0, 1),
    "several rows by element": (by_elements_of_several_rows, 0, 0),
    "one row for all": (by_one_row, 0, 0),
    "a stack of tables": (of_a_stack, 0, 0),
    "a table of columns": (of_columns, 0, 0),
    "a table of rank 4": (of_rank_4, 0, 1),
    "columns in order": (in_order(0, 1, 2, 3), 0, 1),
    "columns backwards": (in_order(3, 2, 1, 0), 0, 1),
    "every other column, backwards": (in_order(2, 0, 3, 1), 0, 1),
    "columns out of order": (in_order(0, 1, 3, 2), 0, 1),
    "columns two apart, then not": (in_order(0, 2, 1, 3), 0, 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_angles_and_tables_say_at_every_position_what_the_graph_says(name: str) -> None:
    form, angles, tables = KEPT[name]
    before = rotation(form)
    after, (report,) = run_passes(before, [FuseRope()])
    assert report.refusals == [] and len(ropes(after)) == 1
    assert sum(isinstance(op, RopeAngles) for op in after.ops) == angles
    assert sum(isinstance(op, Embed) for op in after.ops) == tables
    for op in set(after.ops) - set(before.ops):
        assert not isinstance(op, (Reshape, Cast)) or op.type != op.x.type, "an op that does nothing"
    np.testing.assert_allclose(run(after, LONGEST), run(before, LONGEST), rtol=0, atol=1e-5)
    np.testing.assert_allclose(run(after, LONGEST, False), run(before, LONGEST, False), rtol=0, atol=2e-4)


def test_where_rows_are_looked_up_by_position_the_positions_are_given() -> None:
    """Not a copy of them, which would be another value than that of other tables."""
    after, _ = run_passes(rotation(in_order(3, 1, 2, 0)), [FuseRope()])
    (embed,) = (op for op in after.ops if isinstance(op, Embed))
    assert isinstance(embed.ids, Reshape) and isinstance(embed.ids.x, Input)


def test_two_positions_show_a_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope_angles, "_CHUNK", 2)
    after, _ = run_passes(rotation(lambda x, p: by_angles(x, Mul(column(p), row(SLOW)))), [FuseRope()])
    assert sum(isinstance(op, RopeAngles) for op in after.ops) == 1


def products_off_by(least: float) -> tuple[list[np.float32], float]:
    """Factors in f32 with which products of a position are so many 2^-23 off, or little more, and how much at worst."""
    generator, factors, worst = np.random.default_rng(0), [], 0.0
    at = np.arange(1, LONGEST, dtype=np.float32)
    while worst < least:
        tried = generator.uniform(0.5, 1, 2000).astype(np.float32)
        errors = (at[2] * tried).astype(np.float64) / (np.float64(at[2]) * tried) - 1
        factors.append(tried[errors.argmax()])
        at *= factors[-1]
        law = np.float64(np.float32(np.prod(np.array(factors, np.float64)))) * np.arange(1, LONGEST)
        worst = float(np.abs(1 - law / at).max()) * 2**23
    return factors, worst


@pytest.mark.parametrize("least", [3.1, 5.0])
def test_an_angle_may_be_four_roundings_off_and_no_more(least: float) -> None:
    factors, worst = products_off_by(least)
    assert least < worst < least + 0.9

    def form(x: Value, positions: Input) -> Value:
        value = column(positions)
        for factor in factors:
            value = Mul(value, constant(factor, "f32"))
        return by_angles(x, Mul(value, row(2.0 ** -np.arange(PAIRS))))

    after, _ = run_passes(rotation(form), [FuseRope()])
    assert sum(isinstance(op, RopeAngles) for op in after.ops) == (worst < 4)


def in_f16(x: Value, positions: Input) -> Value:
    """Half precision, the angles no multiple of the position."""
    at = Add(column(positions), constant(1.0, "f32"))
    both = Concat((Mul(at, row(SLOW)),) * 2, 2)
    return apply_half(Cast(x, "f16"), *(Cast(f(both), "f16") for f in (Cos, Sin)))


def test_angles_of_half_precision_are_given_in_f32() -> None:
    before = rotation(in_f16)
    after, _ = run_passes(before, [FuseRope()])
    (rope,) = ropes(after)
    assert rope.angles.dtype == "f32" and rope.x.dtype == "f16"
    np.testing.assert_allclose(run(after, LONGEST), run(before, LONGEST), rtol=0, atol=1e-5)


# What is no rotation


def stored(cos: Array, sin: Array, index: Value | None = None) -> Form:
    return lambda x, positions: apply_half(
        x, *(looked_up(v, positions if index is None else index) for v in (cos, sin))
    )


def apart(begin: int) -> Array:
    """Angles [rows, DIM] whose halves are equal before a row, and not from there on."""
    angles = ANGLES + 1
    return np.concatenate([angles, np.where(np.arange(len(angles))[:, None] < begin, angles, angles + 0.5)], axis=1)


def rounded_apart(x: Value, positions: Input) -> Value:
    """The second channels turn by positions that f32 rounds: in f64 they are the same."""
    both = (Mul(at, row(SLOW)) for at in (column(positions), rounded_to_even(column(positions))))
    angles = Concat(tuple(both), 2)
    return apply_half(x, Cos(angles), Sin(angles))


def beyond_its_end(x: Value, positions: Input) -> Value:
    """Rows by the token before, of a table which is shorter than the context: no sequence of that length has values."""
    late = Concat((Slice(positions, 1, 0, 1), Slice(positions, 1, 0, S - 1)), 1)
    return stored(np.cos(apart(0)[:SWITCH]), np.sin(apart(0)[:SWITCH]), late)(x, positions)


EQUAL = apart(LONGEST + 1)
REFUSED: dict[str, tuple[Form, str]] = {
    "cosines that part": (stored(np.cos(apart(SWITCH)), np.sin(EQUAL)), f"no rotation at position {SWITCH}"),
    "sines that part": (stored(np.cos(EQUAL), np.sin(apart(SWITCH))), f"no rotation at position {SWITCH}"),
    "apart by rounding": (rounded_apart, "no rotation at position 1"),
    "beyond its end": (beyond_its_end, "out of bounds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_channels_of_a_pair_that_turn_differently_are_refused(name: str) -> None:
    form, reason = REFUSED[name]
    before, report = rotation(form), Report()
    after = FuseRope().run(before, report)
    assert after.ops == before.ops and after.inputs == before.inputs
    assert len(report.refusals) == 1 and reason in report.refusals[0][1]


def test_a_regime_that_is_no_rotation_leaves_the_graph_its_inputs() -> None:
    """Of three regimes the last is none; another rotation of the graph needs no lengths."""
    x, positions = Input("x", Tensor((1, HEADS, S, DIM), "f32")), Input("positions", Tensor((1, S), "i32"))
    size = Reshape(SIZE, (1, 1, 1))
    middle = Where(Greater(size, constant(19, "i32")), row(SLOW / 2), row(SLOW))
    other = Where(Greater(size, constant(SWITCH, "i32")), row(SLOW / 4), middle)
    angles = Concat(tuple(Mul(column(positions), f) for f in (middle, other)), 2)
    refused = apply_half(x, Cos(angles), Sin(angles))
    found = apply_half(x, *half_cos_sin(positions, SLOW))
    before = Graph("main", (x, positions), (("y", refused), ("z", found)))
    after, (report,) = run_passes(before, [FuseRope()])
    assert len(ropes(after)) == 1 and len(report.refusals) == 1
    assert after.inputs == before.inputs


# In a text


def one_head() -> Graph:
    """[S, channels]"""
    x, positions = Input("x", Tensor((S, DIM), "f32")), Input("positions", Tensor((1, S), "i32"))
    cos, sin = (Reshape(value, (S, DIM)) for value in tables(positions))
    return Graph("main", (x, positions), (("y", half(x, cos, sin)),))


def parts_of_a_wider_value() -> Graph:
    """The halves are cut out of queries and keys side by side, and only they."""
    x, positions = Input("x", Tensor((1, HEADS, S, 2 * DIM), "f32")), Input("positions", Tensor((1, S), "i32"))
    cos, sin = (Slice(value, 3, 0, PAIRS) for value in tables(positions))
    a, b = Slice(x, 3, DIM, DIM + PAIRS), Slice(x, 3, DIM + PAIRS, 2 * DIM)
    y = Concat((Sub(Mul(a, cos), Mul(b, sin)), Add(Mul(b, cos), Mul(a, sin))), 3)
    return Graph("main", (x, positions), (("y", y),))


def widened_in_between() -> Graph:
    """Half precision, of which each product widens its own copy and rounds it again."""
    x, positions = Input("x", Tensor((1, HEADS, S, DIM), "f16")), Input("positions", Tensor((1, S), "i32"))
    cos, sin = tables(positions)
    products = (Mul(Cast(x, "f32"), cos), Mul(Cast(rotate_half(x), "f32"), sin))
    a, b = (Cast(product, "f16") for product in products)
    return Graph("main", (x, positions), (("y", Add(a, b)),))


def channels_before_tokens() -> Graph:
    """The other channels are put in order as [1, heads, channels, S]."""
    x, positions = Input("x", Tensor((1, HEADS, S, DIM), "f32")), Input("positions", Tensor((1, S), "i32"))
    cos, sin = tables(positions)
    flipped = Transpose(x, (0, 1, 3, 2))
    other = Concat((Neg(Slice(flipped, 2, PAIRS, DIM)), Slice(flipped, 2, 0, PAIRS)), 2)
    y = Add(Mul(x, cos), Mul(Transpose(other, (0, 1, 3, 2)), sin))
    return Graph("main", (x, positions), (("y", y),))


FORMS = {
    "one head": (one_head(), (S, 1, DIM)),
    "parts of a wider value": (parts_of_a_wider_value(), (S, HEADS, DIM)),
    "widened in between": (widened_in_between(), (S, HEADS, DIM)),
    "channels before tokens": (channels_before_tokens(), (S, HEADS, DIM)),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_rotation_of_a_text_is_one_rope(name: str) -> None:
    graph, shape = FORMS[name]
    after, (report,) = run_checked(graph, "fuse-rope", tolerance=1e-3 if name == "widened in between" else 1e-12)
    (rope,) = ropes(after)
    assert rope.shape == shape and report.refusals == []


def by_weights(x: Value, positions: Input) -> Value:
    """An angle for each pair that no position decides."""
    cos, sin = (Concat((weight(name, 1, 1, 1, PAIRS),) * 2, 3) for name in ("c", "s"))
    return half(x, cos, sin)


def heads_by_other_pairs(x: Value, positions: Input) -> Value:
    """The first head turns in pairs, the others add their first channel to all."""
    cos, sin = tables(positions)
    first = picked(Slice(x, 1, 0, 1), [4, 5, 6, 7, 0, 1, 2, 3], [0, 1, 2, 3])
    others = picked(Slice(x, 1, 1, HEADS), [0] * DIM, [0, 1, 2, 3])
    return Add(Mul(x, cos), Mul(Concat((first, others), 1), sin))


@pytest.mark.parametrize("form", [by_weights, heads_by_other_pairs])
def test_what_is_no_rotation_of_a_text_is_no_near_miss(form: Form) -> None:
    before, report = text(form), Report()
    assert FuseRope().run(before, report).ops == before.ops and report.refusals == []


def test_every_token_by_every_position_is_left_alone() -> None:
    """[1, S, S, channels], turned by the positions of its second tokens."""
    x, positions = Input("x", Tensor((1, S, S, DIM), "f32")), Input("positions", Tensor((1, S), "i32"))
    before, report = Graph("main", (x, positions), (("y", half(x, *tables(positions))),)), Report()
    assert FuseRope().run(before, report).ops == before.ops and report.refusals == []


# In a graph of arrays


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [T, symbol("B", 2, 4)])
def test_what_mixes_heads_and_a_free_number_of_tokens_is_left_alone(heads: int, tokens: object) -> None:
    """Read as [tokens, heads] for [heads, tokens], twice: with as many tokens as heads this changes nothing."""
    x = given("x", 1, heads, tokens, DIM)
    mixed = rotate_half(x)
    for _ in range(2):
        mixed = Reshape(Transpose(mixed, (0, 2, 1, 3)), x.shape)
    cos, sin = wide(tokens, PAIRS)
    before = graph_of(Add(Mul(x, cos), Mul(mixed, sin)))
    after, report = FuseRope().run(before, Report()), Report()
    assert after.ops == before.ops and report.refusals == []
