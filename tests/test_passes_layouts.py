"""Following moved values digit by digit, and rotations by factors of which nothing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.evaluate import evaluate, evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Rope
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import Array, Tensor, precise
from llmc.compiler.passes.fuse_rope import FuseRope
from llmc.compiler.passes.layouts import Layout, arranged
from llmc.compiler.passes.manager import Report

B, S = symbol("B", 1, 8), symbol("S", 1, 64)


def no_params(name: str) -> Array:
    raise AssertionError(name)


def computed(value: Value, given: dict[Value, Array]) -> Array:
    return np.asarray(evaluate_values([value], given, no_params, {"B": 3, "S": 7})["0"])


def factorings(total: int) -> list[tuple[int, ...]]:
    """Shapes of up to three axes with this many elements."""
    pairs = [(a, total // a) for a in range(1, total + 1) if total % a == 0]
    return [(total,), *pairs, *((a, b, c // b) for a, c in pairs for b in range(1, c + 1) if c % b == 0)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_followed_value_is_arranged_as_its_layout_says(data: st.DataObject) -> None:
    """Any chain of moves: putting the source's elements in the order of the digits gives the value."""
    shape = data.draw(st.sampled_from(factorings(24)))
    source = Input("x", Tensor(shape, "f32"))
    layout, value = Layout(shape), source
    for _ in range(data.draw(st.integers(0, 4))):
        move: s.Reshape | s.Transpose
        if data.draw(st.booleans()):
            move = s.Reshape(value, data.draw(st.sampled_from(factorings(24))))
        else:
            move = s.Transpose(value, tuple(data.draw(st.permutations(range(value.rank)))))
        if not layout.follow(move):
            return
        value = move
    wanted = [digit for axis in range(value.rank) for digit in layout.leaves(axis)]
    again = arranged(source, layout.source(), wanted, value.shape)
    x = np.arange(24.0).reshape(shape)
    np.testing.assert_array_equal(computed(again, {source: x}), computed(value, {source: x}))


def test_free_sizes_split_off_their_factors() -> None:
    layout = Layout((B * 12, S, 8))
    assert layout.reshape((B, 12, S, 2, 4))
    layout.permute((0, 2, 1, 4, 3))
    assert [[digit.size for digit in layout.leaves(axis)] for axis in range(5)] == [[B], [S], [12], [4], [2]]
    assert [[digit.size for digit in axis] for axis in layout.source()] == [[B, 12], [S], [2, 4]]


def test_repeated_digits_are_none_of_the_source() -> None:
    layout = Layout((2, 1, 5))
    layout.broadcast((3, 2, 4, 5))
    assert layout.reshape((3, 8, 5))
    assert [digit.repeated for digit in layout.leaves(1)] == [False, True]
    assert [digit.repeated for digit in layout.leaves(0)] == [True]


@pytest.mark.parametrize(
    ("shape", "to"), [((6, 4), (4, 6)), ((2, 3), (3, 2)), ((S, 4), (4, S)), ((2, 3), (2, 2, 3))], ids=str
)
def test_what_cuts_across_digits_is_not_followed(shape: tuple[int | Dim, ...], to: tuple[int | Dim, ...]) -> None:
    assert not Layout(shape).reshape(to)


def test_what_is_repeated_a_free_number_of_times_may_be_there_once() -> None:
    layout = Layout((1, 4))
    layout.broadcast((S, 4))
    assert [(digit.size, digit.repeated) for digit in layout.leaves(0)] == [(S, True)]


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [((2, 3, 4), (2, 0, 1), [s.Transpose]), ((2, 12), (1, 0, 2), [s.Reshape, s.Transpose, s.Reshape])],
)
def test_axes_are_taken_apart_where_their_digits_part(
    shape: tuple[int, ...], order: tuple[int, ...], expected: list[type]
) -> None:
    """A transpose alone where each axis stays whole."""
    source = Input("x", Tensor(shape, "f32"))
    layout = Layout(shape)
    assert layout.reshape((2, 3, 4))
    digits = [digit for axis in layout.source() for digit in axis]
    wanted = [digits[i] for i in order]
    to = tuple(int(digit.size) for digit in wanted)  # type: ignore[arg-type]
    found = arranged(source, layout.source(), wanted, to if len(shape) == 3 else (math.prod(to[:2]), to[2]))
    kinds, value = [], found
    while value is not source:
        kinds.append(type(value))
        value = value.operands[0]
    assert kinds == expected
    x = np.arange(24.0).reshape(shape)
    moved = x.reshape(2, 3, 4).transpose(order)
    np.testing.assert_array_equal(computed(found, {source: x}).reshape(moved.shape), moved)


DIM = 8


def rotate_half(x: Value) -> Value:
    last = x.rank - 1
    return s.Concat((e.Neg(s.Slice(x, last, DIM // 2, DIM)), s.Slice(x, last, 0, DIM // 2)), last)


def rotated(form: str, x: Value, cos: Value, sin: Value) -> Value:
    """x [..., heads, DIM] turned by cos, sin [..., 1, pairs], as sources write it."""
    last, pairs = x.rank - 1, int(cos.shape[-1])  # type: ignore[arg-type]
    turned = s.Slice(x, last, 0, 2 * pairs) if 2 * pairs < DIM else x
    if form == "rotate_half":
        wide = [s.Concat((y, y), last) for y in (cos, sin)]
        return e.Add(e.Mul(x, wide[0]), e.Mul(rotate_half(x), wide[1]))
    if form == "interleaved":
        a, b = (s.Slice(turned, last, i, 2 * pairs - 1 + i, 2) for i in (0, 1))
    else:
        a, b = s.Slice(turned, last, 0, pairs), s.Slice(turned, last, pairs, 2 * pairs)
    first = e.Sub(e.Mul(cos, a), e.Mul(sin, b))
    second = e.Add(e.Mul(sin, a), e.Mul(cos, b))
    if form == "interleaved":
        columns = tuple(s.Reshape(y, (*y.shape, 1)) for y in (first, second))
        y: Value = s.Reshape(s.Concat(columns, last + 1), turned.shape)
    else:
        y = s.Concat((first, second), last)
    return y if 2 * pairs == DIM else s.Concat((y, s.Slice(x, last, 2 * pairs, DIM)), last)


def rope_graph(form: str, pairs: int, batch: int | Dim, tokens: int | Dim, cached: bool) -> Graph:
    x = Input("x", Tensor((batch, tokens, 3, DIM), "f32"))
    at = Input("at", Tensor((batch, tokens), "i64"))
    shape = (50, pairs) if cached else (batch, tokens, pairs)
    caches = [Input(name, Tensor(shape, "f32")) for name in ("cos", "sin")]
    rows = [s.Gather(cache, at, 0) if cached else cache for cache in caches]
    cos, sin = (s.Reshape(row, (batch, tokens, 1, pairs)) for row in rows)
    inputs = (x, at, *caches) if cached else (x, *caches)
    return Graph("main", inputs, (("out", rotated(form, x, cos, sin)),))


FORMS = [("half", 4), ("half", 2), ("interleaved", 4), ("interleaved", 3), ("rotate_half", 4)]


@pytest.mark.parametrize(("batch", "tokens"), [(B, S), (2, 7), (1, S), (2, 1)], ids=str)
@pytest.mark.parametrize("cached", [False, True], ids=["given", "cached"])
@pytest.mark.parametrize(("form", "pairs"), FORMS)
def test_rotations_by_inputs_are_rope(form: str, pairs: int, cached: bool, batch: int | Dim, tokens: int | Dim) -> None:
    before = rope_graph(form, pairs, batch, tokens, cached)
    report = Report()
    after = FuseRope().run(before, report)
    found = [op for op in after.ops if isinstance(op, Rope)]
    assert len(found) == 1 and found[0].interleaved == (form == "interleaved")
    assert not any(isinstance(op, (e.Mul, e.Sub, e.Add)) for op in after.ops)
    assert found[0].angles.shape == (batch * tokens, 2, pairs)
    generator = np.random.default_rng(3)
    sizes = {"B": 3, "S": 9}
    given_: dict[str, Array] = {}
    for value in before.inputs:
        shape = tuple(dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape)
        given_[value.name] = (
            generator.integers(0, 50, shape) if value.dtype == "i64" else generator.standard_normal(shape)
        )
    with precise():
        expected, result = (np.asarray(evaluate(g, given_, no_params)["out"]) for g in (before, after))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def test_what_only_looks_like_a_rotation_is_left_alone() -> None:
    """Two signs that are wrong, and channels that are scaled as well."""
    x, (cos, sin) = Input("x", Tensor((2, 7, 3, DIM), "f32")), (Input(n, Tensor((2, 7, 1, 4), "f32")) for n in "cs")
    a, b = s.Slice(x, 3, 0, 4), s.Slice(x, 3, 4, 8)
    mirrored = s.Concat((e.Add(e.Mul(cos, a), e.Mul(sin, b)), e.Sub(e.Mul(sin, a), e.Mul(cos, b))), 3)
    scaled = e.Mul(rotated("half", x, cos, sin), s.Broadcast(e.constant(np.arange(8.0)), (2, 7, 1, 8)))
    for y in (mirrored, scaled):
        graph = Graph("main", (x, cos, sin), (("out", y),))
        after = FuseRope().run(graph, Report())
        # The rotation inside the scaled one may be found; the scaling stays.
        assert not any(isinstance(op, Rope) for op in after.ops) or y is scaled
        with precise():
            data = {v.name: np.random.default_rng(len(v.name)).standard_normal(v.shape) for v in graph.inputs}
            expected, found = (np.asarray(evaluate(g, data, no_params)["out"]) for g in (graph, after))
        assert math.isclose(float(np.abs(expected - found).max()), 0, abs_tol=1e-12)
