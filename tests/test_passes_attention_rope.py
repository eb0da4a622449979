"""fuse-rope: every way of writing a rotation becomes llm.rope, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from attention_harness import (
    DIM,
    HEADS,
    S,
    apply_half,
    decoder,
    frequencies,
    half_cos_sin,
    half_rotation,
    random_weights,
    rotate_half,
    run_sequence,
    weight,
)

from llmc.compiler.ir.elementwise import Add, Cast, Cos, Mul, Neg, Sin, Sub, constant
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, Linear, Rope, RopeAngles
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import (
    Broadcast,
    Concat,
    Gather,
    GatherElements,
    Matmul,
    Reshape,
    Slice,
    Transpose,
)
from llmc.compiler.ir.types import Tensor, precise
from llmc.compiler.passes.canonicalize import Canonicalize
from llmc.compiler.passes.fuse_rope import FuseRope
from llmc.compiler.passes.manager import Report, run_passes

ROTARY = 4  # channels that turn in the partial forms


def split_form(x: Value, positions: Input) -> Value:
    """cat(a cos - b sin, b cos + a sin) with cosines of half the channels."""
    both = half_cos_sin(positions, frequencies(DIM // 2))
    cos, sin = (Reshape(Slice(value, 2, 0, DIM // 2), (1, 1, S, DIM // 2)) for value in both)
    a, b = Slice(x, 3, 0, DIM // 2), Slice(x, 3, DIM // 2, DIM)
    return Concat((Sub(Mul(a, cos), Mul(b, sin)), Add(Mul(b, cos), Mul(a, sin))), 3)


def scaled(x: Value, positions: Input) -> Value:
    return apply_half(x, *half_cos_sin(positions, frequencies(DIM // 2), 1.2071))


def matmul_angles(x: Value, positions: Input) -> Value:
    """inv_freq @ positions, transposed, as transformers writes it."""
    column = constant(frequencies(DIM // 2).reshape(1, DIM // 2, 1), "f32")
    angles = Transpose(Matmul(column, Reshape(Cast(positions, "f32"), (1, 1, S))), (0, 2, 1))
    both = Concat((angles, angles), 2)
    return apply_half(x, Cos(both), Sin(both))


def partial_half(x: Value, positions: Input) -> Value:
    turned = apply_half(Slice(x, 3, 0, ROTARY), *half_cos_sin(positions, frequencies(ROTARY // 2)))
    return Concat((turned, Slice(x, 3, ROTARY, DIM)), 3)


def still_tail(x: Value, positions: Input) -> Value:
    """Half rotation whose last pair has frequency 0: it counts as a pair, and passes."""
    values = frequencies(DIM // 2)
    values[-1] = 0
    return apply_half(x, *half_cos_sin(positions, values))


def repeat_pairs(x: Value) -> Value:
    """[1, S, n] -> [1, S, 2n], each column twice in a row."""
    n = int(x.shape[2])
    return Reshape(Broadcast(Reshape(x, (1, S, n, 1)), (1, S, n, 2)), (1, S, 2 * n))


def rotate_pairs(x: Value) -> Value:
    """(-x1, x0, -x3, x2, ...) of the last axis, by stack and reshape."""
    last, dim = x.rank - 1, int(x.shape[-1])
    even, odd = Slice(x, last, 0, dim, 2), Slice(x, last, 1, dim, 2)
    column = (*x.shape[:-1], dim // 2, 1)
    return Reshape(Concat((Reshape(Neg(odd), column), Reshape(even, column)), last + 1), x.shape)


def apply_pairs(x: Value, cos: Value, sin: Value) -> Value:
    shape = (1, 1, S, int(x.shape[-1]))
    cos, sin = (Reshape(repeat_pairs(value), shape) for value in (cos, sin))
    return Add(Mul(x, cos), Mul(rotate_pairs(x), sin))


def interleaved(x: Value, positions: Input) -> Value:
    cos, sin = (Slice(v, 2, 0, DIM // 2) for v in half_cos_sin(positions, frequencies(DIM // 2)))
    return apply_pairs(x, cos, sin)


def partial_interleaved_before_transpose(x: Value, positions: Input) -> Value:
    """GPT-J's order: rotate [1, S, heads, dim], then transpose."""
    heads = int(x.shape[1])
    x = Transpose(x, (0, 2, 1, 3))
    cos, sin = (Slice(v, 2, 0, ROTARY // 2) for v in half_cos_sin(positions, frequencies(ROTARY // 2)))
    cos, sin = (Reshape(repeat_pairs(v), (1, S, 1, ROTARY)) for v in (cos, sin))
    turn = Slice(x, 3, 0, ROTARY)
    turned = Add(Mul(turn, cos), Mul(rotate_pairs(turn), sin))
    assert turned.shape == (1, S, heads, ROTARY)
    return Transpose(Concat((turned, Slice(x, 3, ROTARY, DIM)), 3), (0, 2, 1, 3))


def sine_table(rows: int) -> Value:
    """[rows, ROTARY]: sines, then cosines, rounded to f32 as a checkpoint's buffer is."""
    angles = np.outer(np.arange(rows), frequencies(ROTARY // 2).astype(np.float64))
    return constant(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32), "f32")


def table_interleaved(x: Value, positions: Input) -> Value:
    rows = Gather(sine_table(40), positions, 0)
    sin, cos = Slice(rows, 2, 0, ROTARY // 2), Slice(rows, 2, ROTARY // 2, ROTARY)
    turned = apply_pairs(Slice(x, 3, 0, ROTARY), cos, sin)
    return Concat((turned, Slice(x, 3, ROTARY, DIM)), 3)


def curved(x: Value, positions: Input) -> Value:
    """Angles that are no multiple of the position: kept as tensors."""
    at = Reshape(Cast(positions, "f32"), (1, S, 1))
    angles = Mul(Mul(at, at), constant(frequencies(DIM // 2).reshape(1, 1, -1), "f32"))
    both = Concat((angles, angles), 2)
    return apply_half(x, Cos(both), Sin(both))


Form = Callable[[Value, Input], Value]
BY_FREQUENCY: list[tuple[Form, bool, int]] = [
    (half_rotation, False, DIM // 2),
    (split_form, False, DIM // 2),
    (scaled, False, DIM // 2),
    (matmul_angles, False, DIM // 2),
    (partial_half, False, ROTARY // 2),
    (still_tail, False, DIM // 2),
    (interleaved, True, DIM // 2),
    (partial_interleaved_before_transpose, True, ROTARY // 2),
]
BY_TENSOR: list[tuple[Form, bool, int]] = [
    (table_interleaved, True, ROTARY // 2),
    (curved, False, DIM // 2),
]


def rotation(form: Form) -> Graph:
    x = Input("x", Tensor((1, HEADS, S, DIM), "f32"))
    positions = Input("positions", Tensor((1, S), "i32"))
    return Graph("main", (x, positions), (("y", form(x, positions)),))


def assert_same(before: Graph, after: Graph, positions: list[int]) -> None:
    """Both graphs agree in f64 on random x at the given positions."""
    x = np.random.default_rng(0).standard_normal((1, HEADS, len(positions), DIM))
    inputs = {"x": x, "positions": np.asarray([positions], np.int32)}
    with precise():
        expected = evaluate(before, inputs, random_weights(before))["y"]
        # Angles up to 30 radians, exact to f64.
        np.testing.assert_allclose(evaluate(after, inputs, random_weights(after))["y"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("canonical", [False, True], ids=["as-lifted", "canonical"])
@pytest.mark.parametrize(("form", "pairs_interleave", "pairs"), BY_FREQUENCY + BY_TENSOR)
def test_a_rotation_becomes_one_rope(form: Form, pairs_interleave: bool, pairs: int, canonical: bool) -> None:
    before = rotation(form)
    if canonical:
        before, _ = run_passes(before, [Canonicalize()])
    after, reports = run_passes(before, [FuseRope()])
    assert_same(before, after, [3, 0, 1, 30, 7])
    ropes = [op for op in after.ops if isinstance(op, Rope)]
    assert len(ropes) == 1 and reports[0].refusals == []
    assert ropes[0].interleaved == pairs_interleave and ropes[0].angles.shape == (S, 2, pairs)
    assert isinstance(ropes[0].angles, RopeAngles) == ((form, pairs_interleave, pairs) in BY_FREQUENCY)
    assert not any(isinstance(op, Mul) and op.rank == 4 for op in after.ops)


def test_the_frequencies_are_the_models_own_to_the_last_bit() -> None:
    after, _ = run_passes(rotation(scaled), [FuseRope()])
    angles = next(op for op in after.ops if isinstance(op, RopeAngles))
    found = angles.frequencies.value.array  # type: ignore[attr-defined]
    assert np.array_equal(found, frequencies(DIM // 2).astype(np.float64))
    assert angles.scale == pytest.approx(1.2071, rel=1e-7)  # the constant is an f32


def test_a_table_is_looked_up_by_position_with_its_columns_in_order() -> None:
    after, _ = run_passes(rotation(table_interleaved), [FuseRope()])
    kinds = [type(op) for op in after.ops]
    assert kinds.count(Embed) == 1 and Gather not in kinds


def test_layers_share_their_angles() -> None:
    after, _ = run_passes(decoder(layers=3), [FuseRope()])
    kinds = [type(op) for op in after.ops]
    assert kinds.count(Rope) == 6 and kinds.count(RopeAngles) == 1


def test_two_bases_give_two_angles() -> None:
    before = decoder(
        lambda x, positions: (
            half_rotation(x, positions)
            if x.shape[1] == HEADS
            else apply_half(x, *half_cos_sin(positions, frequencies(DIM // 2, 500.0)))
        )
    )
    after, _ = run_passes(before, [FuseRope()])
    load = random_weights(before)
    assert sum(isinstance(op, RopeAngles) for op in after.ops) == 2
    found, expected = (run_sequence(graph, load, [1, 2, 3, 4, 5]) for graph in (after, before))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def not_a_rotation_by_sign(x: Value, positions: Input) -> Value:
    cos, sin = half_cos_sin(positions, frequencies(DIM // 2))
    shape = (1, 1, S, DIM)
    unsigned = Concat((Slice(x, 3, DIM // 2, DIM), Slice(x, 3, 0, DIM // 2)), 3)
    return Add(Mul(x, Reshape(cos, shape)), Mul(unsigned, Reshape(sin, shape)))


def gated_by_position(x: Value, positions: Input) -> Value:
    return Mul(x, Reshape(Cos(Cast(positions, "f32")), (1, 1, S, 1)))


def two_sources(x: Value, positions: Input) -> Value:
    cos, sin = half_cos_sin(positions, frequencies(DIM // 2))
    other = Linear(x, weight("mix", DIM, DIM))
    shape = (1, 1, S, DIM)
    return Add(Mul(x, Reshape(cos, shape)), Mul(rotate_half(other), Reshape(sin, shape)))


@pytest.mark.parametrize("form", [not_a_rotation_by_sign, gated_by_position, two_sources])
def test_what_is_no_rotation_stays(form: Form) -> None:
    before = rotation(form)
    assert FuseRope().run(before, Report()).ops == before.ops


def test_frequencies_that_are_weights_hold_for_any_weights() -> None:
    def learned(x: Value, positions: Input) -> Value:
        column = Reshape(Cast(positions, "f32"), (1, S, 1))
        angles = Mul(column, Reshape(weight("inv_freq", DIM // 2), (1, 1, DIM // 2)))
        both = Concat((angles, angles), 2)
        return apply_half(x, Cos(both), Sin(both))

    before = rotation(learned)
    after = FuseRope().run(before, Report())
    assert sum(isinstance(op, Rope) for op in after.ops) == 1
    assert_same(before, after, [0, 5, 2])


@pytest.mark.parametrize("elementwise", [False, True], ids=["gather", "gather_elements"])
def test_a_table_may_be_a_weight(elementwise: bool) -> None:
    def looked_up(x: Value, positions: Input) -> Value:
        if elementwise:
            index = Broadcast(Reshape(positions, (1, S, 1)), (1, S, ROTARY))
            rows: Value = GatherElements(weight("table", 1, 40, ROTARY), index, 1)
        else:
            rows = Gather(weight("table", 40, ROTARY), positions, 0)
        sin, cos = Slice(rows, 2, 0, ROTARY // 2), Slice(rows, 2, ROTARY // 2, ROTARY)
        turned = apply_pairs(Slice(x, 3, 0, ROTARY), cos, sin)
        return Concat((turned, Slice(x, 3, ROTARY, DIM)), 3)

    before = rotation(looked_up)
    after = FuseRope().run(before, Report())
    assert_same(before, after, [3, 0, 39, 2])
    kinds = [type(op) for op in after.ops]
    assert kinds.count(Rope) == kinds.count(Embed) == 1 and Gather not in kinds and GatherElements not in kinds


@pytest.mark.parametrize("which", [0, 1])
def test_channels_of_queries_and_keys_side_by_side(which: int) -> None:
    """Slices merged into [q; k] of each head: the rotation has no x of its own shape."""

    def fused(x: Value, positions: Input) -> Value:
        cos, sin = (Reshape(v, (1, 1, S, ROTARY)) for v in half_cos_sin(positions, frequencies(ROTARY // 2)))
        first = which * (DIM // 4)
        low, high = (Slice(x, 3, first + i, first + i + ROTARY // 2) for i in (0, ROTARY // 2))
        turned = Add(Mul(Slice(x, 3, first, first + ROTARY), cos), Mul(Concat((Neg(high), low), 3), sin))
        return Concat((turned, Slice(x, 3, first + ROTARY, first + ROTARY + DIM // 4)), 3)

    before = rotation(fused)
    after = FuseRope().run(before, Report())
    assert_same(before, after, [3, 0, 20])
    (rope,) = (op for op in after.ops if isinstance(op, Rope))
    assert rope.shape == (S, HEADS, ROTARY + DIM // 4)
