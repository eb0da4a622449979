"""fuse-rope on what is nearly a rotation, and in graphs of arrays: each condition of the recogniser by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from attention_harness import DIM, HEADS, S, apply_half, frequencies, half_cos_sin, rotate_half, weight
from pass_harness import SEEDS, graph_of, run_checked

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Add, Cast, Cos, Mul, Neg, Sin, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Rope
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Gather, Reshape, Slice, Transpose
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.fuse_rope import FuseRope
from llmc.compiler.passes.manager import Report

PAIRS = DIM // 2
Form = Callable[[Value, Input], Value]


def ropes(graph: Graph) -> list[Rope]:
    return [op for op in graph.ops if isinstance(op, Rope)]


# In a text: x [1, heads, S, dim], positions [1, S]


def text(form: Form, heads: int = HEADS) -> Graph:
    x = Input("x", Tensor((1, heads, S, DIM), "f32"))
    positions = Input("positions", Tensor((1, S), "i32"))
    return Graph("main", (x, positions), (("y", form(x, positions)),))


def tables(positions: Value, channels: int = DIM, base: float = 10000.0) -> tuple[Value, Value]:
    """cos and sin [1, 1, S, channels] of cat(angles, angles)."""
    cos, sin = half_cos_sin(positions, frequencies(channels // 2, base))
    return Reshape(cos, (1, 1, S, channels)), Reshape(sin, (1, 1, S, channels))


def picked(x: Value, channels: Sequence[int], minus: Sequence[int] = ()) -> Value:
    """These channels of x in this order; those at the places `minus` with the other sign."""
    runs: list[list[int]] = []
    for place, channel in enumerate(channels):
        last = runs[-1] if runs else []
        if last and channel == last[1] and (place in minus) == bool(last[2]):
            last[1] += 1
        else:
            runs.append([channel, channel + 1, int(place in minus)])
    cut = [(Slice(x, x.rank - 1, a, b), sign) for a, b, sign in runs]
    return Concat(tuple(Neg(part) if sign else part for part, sign in cut), x.rank - 1)


def turned(x: Value, positions: Input) -> Value:
    return apply_half(x, *half_cos_sin(positions, frequencies(int(x.shape[-1]) // 2)))


def weighted_and_shifted(x: Value, positions: Input) -> Value:
    """A norm's weight and a bias come before the rotation: they are no part of it."""
    return turned(Add(Mul(x, weight("w", DIM)), weight("b", DIM)), positions)


def factors_on_the_left(x: Value, positions: Input) -> Value:
    cos, sin = tables(positions)
    return Add(Mul(cos, x), Mul(sin, rotate_half(x)))


def through_f64(x: Value, positions: Input) -> Value:
    """Nothing is rounded on the way."""
    cos, sin = tables(positions)
    wide = Cast(x, "f64")
    return Cast(Cast(Add(Mul(Cast(wide, "f32"), cos), Mul(Cast(rotate_half(wide), "f32"), sin)), "f64"), "f32")


def through_bf16(x: Value, positions: Input) -> Value:
    """The turned channels are rounded on the way, and the source is."""
    cos, sin = tables(positions)
    half = Cast(x, "bf16")
    return Cast(Cast(Add(Mul(Cast(half, "f32"), cos), Mul(Cast(rotate_half(half), "f32"), sin)), "bf16"), "f32")


def one_head_of_several(x: Value, positions: Input) -> Value:
    return Concat((turned(Slice(x, 1, 0, 1), positions), Slice(x, 1, 1, HEADS)), 1)


def all_heads_but_the_first(x: Value, positions: Input) -> Value:
    return Concat((Slice(x, 1, 0, 1), turned(Slice(x, 1, 1, HEADS), positions)), 1)


def rest_negated(x: Value, positions: Input) -> Value:
    return Concat((turned(Slice(x, 3, 0, PAIRS), positions), Neg(Slice(x, 3, PAIRS, DIM))), 3)


def rest_changes_places(x: Value, positions: Input) -> Value:
    return Concat((turned(Slice(x, 3, 0, PAIRS), positions), picked(x, [6, 7, 4, 5])), 3)


def rest_is_mixed(x: Value, positions: Input) -> Value:
    """Behind the turned channels each is itself and two others."""
    cos, sin = (Slice(value, 3, 0, PAIRS) for value in tables(positions))
    others = Add(Mul(Slice(x, 3, 0, PAIRS), cos), Mul(Slice(x, 3, 2, 6), sin))
    return Concat((turned(Slice(x, 3, 0, PAIRS), positions), Add(Slice(x, 3, PAIRS, DIM), others)), 3)


def last_channels(x: Value, positions: Input) -> Value:
    """`llm.rope` passes the channels behind the turned ones, not those in front."""
    return Concat((Slice(x, 3, 0, PAIRS), turned(Slice(x, 3, PAIRS, DIM), positions)), 3)


def all_but_the_outer_channels(x: Value, positions: Input) -> Value:
    return Concat((Slice(x, 3, 0, 1), turned(Slice(x, 3, 1, 7), positions), Slice(x, 3, 7, 8)), 3)


# Each becomes one rope; its heads and channels.
ONE_ROPE: dict[str, tuple[Form, int, int]] = {
    "weight and bias before it": (weighted_and_shifted, HEADS, DIM),
    "factors on the left": (factors_on_the_left, HEADS, DIM),
    "through f64": (through_f64, HEADS, DIM),
    "one head of several": (one_head_of_several, 1, DIM),
    "all heads but the first": (all_heads_but_the_first, HEADS - 1, DIM),
    "the rest negated": (rest_negated, HEADS, PAIRS),
    "the rest changes places": (rest_changes_places, HEADS, PAIRS),
    "the rest is mixed": (rest_is_mixed, HEADS, PAIRS),
    "the last channels": (last_channels, HEADS, PAIRS),
    "all but the outer channels": (all_but_the_outer_channels, HEADS, 6),
}


@pytest.mark.parametrize("name", ONE_ROPE)
def test_a_rotation_of_a_part_is_one_rope_of_that_part(name: str) -> None:
    form, heads, channels = ONE_ROPE[name]
    after, (report,) = run_checked(text(form), "fuse-rope", tolerance=1e-12)
    (rope,) = ropes(after)
    assert rope.shape == (S, heads, channels) and report.refusals == []


def test_a_text_may_have_one_head() -> None:
    after, (report,) = run_checked(text(turned, heads=1), "fuse-rope", tolerance=1e-12)
    assert len(ropes(after)) == 1 and report.refusals == []


def of_terms(x: Value, positions: Input, channels: Sequence[int], minus: Sequence[int]) -> Value:
    cos, sin = tables(positions)
    return Add(Mul(x, cos), Mul(picked(x, channels, minus), sin))


def heads_change_places(x: Value, positions: Input) -> Value:
    cos, sin = tables(positions)
    rolled = Concat((Slice(x, 1, 1, HEADS), Slice(x, 1, 0, 1)), 1)
    return Add(Mul(x, cos), Mul(rotate_half(rolled), sin))


def counted_twice(x: Value, positions: Input) -> Value:
    cos, sin = tables(positions)
    return Add(Add(Mul(x, cos), Mul(x, tables(positions, base=100.0)[0])), Mul(rotate_half(x), sin))


def three_channels(x: Value, positions: Input) -> Value:
    cos, sin = tables(positions)
    third = Mul(picked(x, [3, 0, 1, 2, 7, 4, 5, 6]), tables(positions, base=100.0)[1])
    return Add(Add(Mul(x, cos), third), Mul(rotate_half(x), sin))


def cut_to_integers(x: Value, positions: Input) -> Value:
    """A cast to integers is no linear function."""
    cos, sin = tables(positions)
    return Add(Mul(x, cos), Mul(Cast(Cast(rotate_half(x), "i32"), "f32"), sin))


def channels_before_tokens(x: Value, positions: Input) -> Value:
    cos, sin = (Transpose(value, (0, 1, 3, 2)) for value in tables(positions))
    flipped = Transpose(x, (0, 1, 3, 2))
    other = Concat((Neg(Slice(flipped, 2, PAIRS, DIM)), Slice(flipped, 2, 0, PAIRS)), 2)
    return Transpose(Add(Mul(flipped, cos), Mul(other, sin)), (0, 1, 3, 2))


def beyond_the_columns(x: Value, positions: Input) -> Value:
    """Columns are looked up where there are none: no step could compute this."""
    index = constant(np.arange(DIM) + 1, "i64")
    cos, sin = (Gather(value, index, 3) for value in tables(positions))
    return Add(Mul(x, cos), Mul(rotate_half(x), sin))


UNCHANGED: dict[str, Form] = {
    "heads change places": heads_change_places,
    "a channel is counted twice": counted_twice,
    "three channels": three_channels,
    "a ring of four": lambda x, p: of_terms(x, p, [1, 2, 3, 0, 5, 6, 7, 4], [0, 4]),
    "two blocks of halves": lambda x, p: of_terms(x, p, [2, 3, 0, 1, 6, 7, 4, 5], [0, 1, 4, 5]),
    "mirrored pairs": lambda x, p: of_terms(x, p, [7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3]),
    "pairs of pairs": lambda x, p: of_terms(x, p, [1, 0, 3, 2, 6, 7, 4, 5], [0, 2, 4, 5]),
    "only one half turns": lambda x, p: of_terms(x, p, [4, 5, 6, 7, 4, 5, 6, 7], [0, 1, 2, 3]),
    "cut to integers": cut_to_integers,
    "through bf16": through_bf16,
    "channels before tokens": channels_before_tokens,
    "beyond the columns": beyond_the_columns,
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_is_no_rotation_of_a_text_is_left_alone(name: str) -> None:
    before, report = text(UNCHANGED[name]), Report()
    assert FuseRope().run(before, report).ops == before.ops and report.refusals == []


# In arrays: nothing counts positions, and cosines and sines may be inputs

T = symbol("T", 2, 9)
N = symbol("N", 2, 4)


def given(name: str, *shape: object, dtype: str = "f32") -> Input:
    return Input(name, Tensor(shape, dtype))  # type: ignore[arg-type]


def wide(*shape: object, dtype: str = "f32") -> tuple[Value, Value]:
    """Cosines and sines of a shape [..., pairs], each given once and repeated for both channels of a pair."""
    parts = (given("c", *shape, dtype=dtype), given("s", *shape, dtype=dtype))
    return tuple(Concat((part, part), len(shape) - 1) for part in parts)  # type: ignore[return-value]


def half(x: Value, cos: Value, sin: Value) -> Value:
    return Add(Mul(x, cos), Mul(rotate_half(x), sin))


def pairwise(x: Value, cos: Value, sin: Value) -> Value:
    """Interleaved, by columns repeated one after the other."""
    channels = int(x.shape[-1])
    order = [c // 2 for c in range(channels)]
    cos, sin = (Gather(value, constant(np.array(order), "i64"), value.rank - 1) for value in (cos, sin))
    return Add(Mul(x, cos), Mul(picked(x, [c ^ 1 for c in range(channels)], range(0, channels, 2)), sin))


def by_parts(x: Value, cos: Value, sin: Value) -> Value:
    """cat(a cos - b sin, b cos + a sin)."""
    last = x.rank - 1
    a, b = Slice(x, last, 0, PAIRS), Slice(x, last, PAIRS, DIM)
    return Concat((Add(Mul(a, cos), Neg(Mul(b, sin))), Add(Mul(cos, b), Mul(sin, a))), last)


def from_one_table() -> tuple[Value, Value]:
    """Cosines and sines side by side, sines first."""
    table = given("table", 5, DIM)
    return tuple(Concat((part, part), 1) for part in (Slice(table, 1, PAIRS, DIM), Slice(table, 1, 0, PAIRS)))  # type: ignore[return-value]


def signed(x: Value) -> Value:
    s = given("s", 5, PAIRS)
    other = Concat((Slice(x, 3, PAIRS, DIM), Slice(x, 3, 0, PAIRS)), 3)
    return Add(Mul(x, wide(5, PAIRS)[0]), Mul(other, Concat((Neg(s), s), 1)))


def by_static_positions() -> Value:
    """A number of positions that is not free: no text."""
    angles = Mul(Reshape(Cast(given("positions", 1, 5, dtype="i32"), "f32"), (5, 1)), given("f", 1, PAIRS))
    return half(given("x", 2, 3, 5, DIM), *(Concat((f(angles), f(angles)), 1) for f in (Cos, Sin)))  # type: ignore[arg-type]


def beside_a_free_input() -> Value:
    """An input of a free last size counts no tokens where nothing gives positions."""
    scale = Reshape(given("rows", 1, T), (T, 1, 1))
    return half(Mul(given("x", T, 2, DIM), scale), *wide(T, 1, PAIRS))


X = given("x", 2, 3, 5, DIM)
FLAT = given("x", 8)

IN_ARRAYS: dict[str, tuple[Value, tuple[object, ...], bool]] = {  # and the rope's shape, and whether interleaved
    "[batch, heads, tokens, dim]": (half(X, *wide(5, PAIRS)), (5, 6, DIM), False),
    "one angle a batch and token": (half(X, *wide(2, 1, 5, PAIRS)), (10, 3, DIM), False),
    "one angle a head": (half(X, *wide(3, 1, PAIRS)), (3, 10, DIM), False),
    "sines by batch, cosines by token too": (
        half(X, wide(2, 1, 5, PAIRS)[0], wide(2, 1, 1, PAIRS)[1]),
        (10, 3, DIM),
        False,
    ),
    "sines by token, cosines by batch too": (half(X, wide(2, 1, 5, PAIRS)[0], wide(5, PAIRS)[1]), (10, 3, DIM), False),
    "[tokens, heads, dim]": (half(given("x", 5, 2, DIM), *wide(5, 1, PAIRS)), (5, 2, DIM), False),
    "[batch, tokens, heads, dim]": (half(given("x", 2, 5, 3, DIM), *wide(1, 5, 1, PAIRS)), (5, 6, DIM), False),
    "free tokens": (half(given("x", 1, 3, T, DIM), *wide(T, PAIRS)), (T, 3, DIM), False),
    "free batch": (half(given("x", N, 3, 5, DIM), *wide(N, 1, 5, PAIRS)), (5 * N, 3, DIM), False),
    "interleaved": (pairwise(X, given("c", 5, PAIRS), given("s", 5, PAIRS)), (5, 6, DIM), True),
    "by parts": (by_parts(X, given("c", 5, PAIRS), given("s", 5, PAIRS)), (5, 6, DIM), False),
    "some channels pass": (
        Concat((half(Slice(X, 3, 0, PAIRS), *wide(5, PAIRS // 2)), Slice(X, 3, PAIRS, DIM)), 3),
        (5, 6, DIM),
        False,
    ),
    "one table": (half(X, *from_one_table()), (5, 6, DIM), False),
    "signed sines": (signed(X), (5, 6, DIM), False),
    "f16": (half(given("x", 5, 2, DIM, dtype="f16"), *wide(5, 1, PAIRS, dtype="f16")), (5, 2, DIM), False),
    "pairs of a flat value": (Reshape(half(Reshape(FLAT, (2, 2, 2)), *wide(2, 1)), (8,)), (2, 2, 2), False),
    "positions of a known number": (by_static_positions(), (5, 6, DIM), False),
    "beside a free input": (beside_a_free_input(), (T, 2, DIM), False),
}


@pytest.mark.parametrize("name", IN_ARRAYS)
def test_a_rotation_of_arrays_is_one_rope_by_columns_of_what_is_given(name: str) -> None:
    value, shape, interleaved = IN_ARRAYS[name]
    after, (report,) = run_checked(graph_of(value), "fuse-rope", SEEDS, tolerance=1e-12)
    (rope,) = ropes(after)
    assert rope.shape == shape and rope.interleaved == interleaved and report.refusals == []
    assert report.hits == {"interleaved" if interleaved else "half": 1} and rope.angles.dtype == "f32"
    for op in after.ops:
        if isinstance(op, (Broadcast, Cast, Reshape, Slice)) and op not in graph_of(value).ops:
            assert op.type != op.x.type, "an op that does nothing"
    assert not any(isinstance(op, Mul) and op.rank == value.rank and op.shape == value.shape for op in after.ops) or (
        name == "beside a free input"
    )


def neighbours(x: Value) -> Value:
    """The second channel of a pair is that of the row before."""
    cos, sin = wide(T, 1, PAIRS)
    before = Concat((Slice(x, 0, 0, 1), Slice(x, 0, 0, T - 1)), 0)
    return Add(Mul(x, cos), Mul(rotate_half(before), sin))


def rows_change_places(x: Value) -> Value:
    cos, sin = wide(5, PAIRS)
    other = Reshape(Transpose(x, (0, 2, 1, 3)), (2, 3, 5, DIM))
    return Add(Mul(x, cos), Mul(rotate_half(other), sin))


def one_row_for_all(x: Value) -> Value:
    """What is added comes of the first row alone."""
    cos, sin = wide(5, PAIRS)
    return Add(Mul(x, cos), Slice(Mul(rotate_half(x), sin), 2, 0, 1))


def free_channels() -> Value:
    """Interleaved pairs, of which nobody knows how many there are."""
    x = given("x", 5, 2 * N)
    c, s = (Reshape(given(name, 5, N), (5, N, 1)) for name in ("c", "s"))
    both = Reshape(x, (5, N, 2))
    cos, sin = (Concat((value, value), 2) for value in (c, s))
    other = Concat((Neg(Slice(both, 2, 1, 2)), Slice(both, 2, 0, 1)), 2)
    return Reshape(Add(Mul(both, cos), Mul(other, sin)), (5, 2 * N))


def queries_and_keys_side_by_side() -> Value:
    return half(Slice(given("x", 5, 2, 2 * DIM), 2, 0, DIM), *wide(5, 1, PAIRS))


def two_tables(x: Value) -> Value:
    """Half of the pairs by one value, half by another."""
    names = ("c", "s", "d", "t")
    c, s, d, t = (given(name, 5, PAIRS // 2) for name in names)
    low, high = (Slice(x, 3, a, a + PAIRS) for a in (0, PAIRS))

    def by(value: Value, first: Value, second: Value) -> Value:
        parts = (Slice(value, 3, 0, PAIRS // 2), Slice(value, 3, PAIRS // 2, PAIRS))
        return Concat((Mul(parts[0], first), Mul(parts[1], second)), 3)

    return Concat((Add(by(low, c, d), Neg(by(high, s, t))), Add(by(high, c, d), by(low, s, t))), 3)


def scaled_by_a_third_value(x: Value) -> Value:
    cos, sin = wide(5, PAIRS)
    scale = Concat((given("z", 5, PAIRS),) * 2, 1)
    return Add(Mul(Mul(x, cos), scale), Mul(Mul(rotate_half(x), sin), scale))


NOT_IN_ARRAYS: dict[str, tuple[Value, str]] = {
    "the channels of a pair turn differently": (
        half(X, given("c", 5, DIM), given("s", 5, DIM)),
        "two channels of a pair differ in what they are multiplied by",
    ),
    "equal cosines, other sines": (
        half(X, wide(5, PAIRS)[0], given("t", 5, DIM)),
        "two channels of a pair differ in what they are multiplied by",
    ),
    "equal sines, other cosines": (
        half(X, given("d", 5, DIM), wide(5, PAIRS)[1]),
        "two channels of a pair differ in what they are multiplied by",
    ),
    "two tables": (two_tables(X), "its cosines or sines are not columns of one value"),
    "scaled by a third value": (
        scaled_by_a_third_value(X),
        "its cosines or sines are not columns of one value",
    ),
    "one number a channel of each row": (half(given("x", 5, DIM), *wide(5, PAIRS)), ""),
    "one row of channels for all": (half(X, *wide(1, PAIRS)), ""),
    "a vector of channels for all": (half(X, *wide(PAIRS)), ""),
    "one number a row": (half(X, given("c", 5, 1), given("s", 5, 1)), ""),
    "one number a row and channel": (half(X, *wide(2, 3, 5, PAIRS)), ""),
    "the row before": (neighbours(given("x", T, 2, DIM)), ""),
    "rows change places": (rows_change_places(X), ""),
    "one row for all": (one_row_for_all(X), ""),
    "free channels": (free_channels(), ""),
    "whole numbers": (half(given("x", 5, 2, DIM, dtype="i32"), *wide(5, 1, PAIRS, dtype="i32")), ""),
}


@pytest.mark.parametrize("name", NOT_IN_ARRAYS)
def test_what_is_no_rotation_of_arrays_is_left_alone(name: str) -> None:
    value, reason = NOT_IN_ARRAYS[name]
    before, report = graph_of(value), Report()
    assert FuseRope().run(before, report).ops == before.ops
    assert [why for _, why in report.refusals] == ([reason] if reason else [])


@pytest.mark.parametrize("name", ["equal sines, other cosines", "one row for all"])
def test_a_rotation_behind_another_value_is_found(name: str) -> None:
    refused, reason = NOT_IN_ARRAYS[name]
    cos, sin = (Concat((given(name, 5, PAIRS),) * 2, 1) for name in ("other c", "other s"))
    found = half(X, cos, sin)
    after, (report,) = run_checked(graph_of(refused, found, Neg(refused)), "fuse-rope", tolerance=1e-12)
    assert len(ropes(after)) == 1 and len(report.refusals) == bool(reason)


def test_of_a_wider_value_the_slice_turns() -> None:
    after, _ = run_checked(graph_of(queries_and_keys_side_by_side()), "fuse-rope", tolerance=1e-12)
    assert [rope.shape for rope in ropes(after)] == [(5, 2, DIM)]
