"""Queries, keys and values of an attention, traced to where they are smallest: the same numbers, and as few heads."""

from __future__ import annotations

import pytest
from attention_of_graphs import result
from pass_harness import graph_of

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.llm import Attention, Rope
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import Tensor

Shape = tuple[int | Dim, ...]
QUERIES, KEYS, DIM, VALUES = 5, 7, 4, 6
c = e.constant


def x(name: str, *shape: int | Dim) -> Input:
    return Input(name, Tensor(shape, "f32"))


def turned(k: Value) -> Value:
    return s.Transpose(k, (*range(k.rank - 2), k.rank - 1, k.rank - 2))


def attention(q: Value, k: Value, v: Value) -> Attention:
    scores = s.Matmul(q, turned(k))
    op = result(graph_of(s.Matmul(s.Softmax(scores, scores.rank - 1), v)))
    assert isinstance(op, Attention), op
    return op


# Operands that a product repeats

SPREAD: list[tuple[Shape, Shape, int]] = [
    ((2, 3), (), 3), ((2, 3), (3,), 3), ((2, 3), (1, 3), 3), ((2, 3), (2, 1), 1), ((2, 3), (1, 1), 3),
    ((3,), (), 1), ((3,), (1,), 1), ((1, 3), (), 1), ((1, 3), (1, 1), 1),
]  # fmt: skip


@pytest.mark.parametrize(("leading", "own", "heads"), SPREAD)
@pytest.mark.parametrize("which", ["q", "k", "v", "kv"])
def test_an_operand_that_a_product_repeats(leading: Shape, own: Shape, heads: int, which: str) -> None:
    """For all heads, or all sequences of a batch: keys and values of one head stay one, queries have them all."""
    shapes = {"q": (QUERIES, DIM), "k": (KEYS, DIM), "v": (KEYS, VALUES)}
    q, k, v = (x(n, *(own if n in which else leading), *shape) for n, shape in shapes.items())
    op = attention(q, k, v)
    batch, count = (leading[0] if len(leading) > 1 else 1), leading[-1]
    assert op.q.shape == (batch, QUERIES, count, DIM)
    shared = heads if which == "kv" else count
    assert op.k.shape == (batch, KEYS, shared, DIM) and op.v.shape == (batch, KEYS, shared, VALUES)


def test_scales_of_an_operand_that_is_repeated_are_kept() -> None:
    """Only what is traced to before its scale lacks it; that may be negative."""
    q, k, v = x("q", 2, 3, QUERIES, DIM), x("k", KEYS, DIM), x("v", 2, 3, KEYS, VALUES)
    assert attention(q, e.Mul(k, c(3.0)), v).scale == 1.0
    assert isinstance(attention(q, x("k", 2, 3, KEYS, DIM), e.Mul(v, c(2.0))).v, s.Transpose)
    for number in (-0.5, 0.25):
        op = attention(e.Mul(q, c(number)), x("k", 2, 3, KEYS, DIM), v)
        assert op.scale == number


def test_weighted_values_of_other_axes_than_the_scores_are_refused() -> None:
    """Two sequences of three heads become three of two: it is not known which head is which."""
    scores = s.Matmul(x("q", 2, 3, QUERIES, DIM), turned(x("k", 2, 3, KEYS, DIM)))
    shares = s.Reshape(s.Softmax(scores, 3), (3, 2, QUERIES, KEYS))
    found = result(graph_of(s.Matmul(shares, x("v", 3, 2, KEYS, VALUES))))
    assert found == "it is not clear which head of tensor<[3, 2, 7, 6], f32> is which"


# Rotated keys

HEADS, KV = 6, 2


def repeated(k: Value, batch: int) -> Value:
    """[tokens, KV, DIM] -> [tokens, HEADS, DIM], each head three times in a row."""
    tokens = batch * KEYS
    wide = s.Broadcast(s.Reshape(k, (tokens, KV, 1, DIM)), (tokens, KV, HEADS // KV, DIM))
    return s.Reshape(wide, (tokens, HEADS, DIM))


def heads_of(k: Value, batch: int, dim: int = DIM) -> Value:
    """[tokens, HEADS, dim] -> [batch, HEADS, KEYS, dim], or without a batch of one."""
    if batch == 1:
        return s.Transpose(k, (1, 0, 2))
    return s.Transpose(s.Reshape(k, (batch, KEYS, HEADS, dim)), (0, 2, 1, 3))


def rotated(k: Value) -> Rope:
    return Rope(k, x("angles", k.shape[0], 2, DIM // 2))


def queries(batch: int) -> Value:
    return x("q", *((batch,) if batch > 1 else ()), HEADS, QUERIES, DIM)


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_that_are_repeated_and_then_rotated_are_rotated_once(batch: int) -> None:
    k, v = (x(name, batch * KEYS, KV, DIM) for name in "kv")
    op = attention(queries(batch), heads_of(rotated(repeated(k, batch)), batch), heads_of(repeated(v, batch), batch))
    assert op.k.shape == (batch, KEYS, KV, DIM) == op.v.shape
    # Their scale is one of the scores.
    scaled = e.Mul(repeated(e.Mul(k, c(3.0)), batch), c(0.5))
    op = attention(queries(batch), heads_of(rotated(scaled), batch), heads_of(repeated(v, batch), batch))
    assert op.scale == 1.5 and op.k.shape == (batch, KEYS, KV, DIM)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_rotation_in_front_of_which_nothing_is_repeated_stays(batch: int) -> None:
    rope = rotated(e.Mul(x("k", batch * KEYS, HEADS, DIM), c(2.0)))
    op = attention(queries(batch), heads_of(rope, batch), heads_of(x("v", batch * KEYS, HEADS, DIM), batch))
    found = op.k
    while isinstance(found, s.Reshape):
        found = found.x
    assert isinstance(found, Rope) and isinstance(found.x, e.Mul) and op.scale == 1.0


def test_heads_in_another_order_behind_a_rotation() -> None:
    """Heads 0, 2, 4, 1, 3, 5 of keys that were repeated in front of it."""
    k, v = x("k", KEYS, KV, DIM), x("v", HEADS, KEYS, VALUES)
    apart = s.Transpose(s.Reshape(rotated(repeated(k, 1)), (KEYS, 3, 2, DIM)), (2, 1, 0, 3))
    op = attention(queries(1), s.Reshape(apart, (HEADS, KEYS, DIM)), v)
    assert op.k.shape == (1, KEYS, HEADS, DIM)


def test_tokens_that_are_counted_another_way_in_front_of_a_rotation() -> None:
    """[7, 2] tokens are not [2, 7]: what is rotated is what stands there."""
    k = s.Reshape(x("k", KEYS, 2, HEADS, DIM), (2 * KEYS, HEADS, DIM))
    op = attention(queries(2), heads_of(rotated(k), 2), heads_of(x("v", 2 * KEYS, HEADS, DIM), 2))
    assert op.k.shape == (2, KEYS, HEADS, DIM)
