"""Which products and softmaxes are one attention: its batch, heads and sinks, and why near misses are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from attention_of_graphs import result
from pass_harness import graph_of

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.fuse_attention import FuseAttention
from llmc.compiler.passes.manager import Report

S, B = symbol("S", 1, 60), symbol("B", 1, 8)
Size = int | Dim
Step = Callable[[Value], Value]
c = e.constant


def x(name: str, *shape: Size) -> Input:
    return Input(name, Tensor(shape, "f32"))


def keys(k: Value) -> Value:
    return s.Transpose(k, (*range(k.rank - 2), k.rank - 1, k.rank - 2))


def softmax(value: Value) -> Value:
    return s.Softmax(value, value.rank - 1)


TEXT = tuple(Input(name, Tensor((1, S), "i32")) for name in ("ids", "positions"))


def attention(leading: tuple[Size, ...], queries: Size = 5, count: Size = 7, *, scores: Step = lambda x: x,
              shares: Step = lambda x: x) -> Value:  # fmt: skip
    q, k, v = (
        x(name, *leading, rows, dim) for name, rows, dim in (("q", queries, 4), ("k", count, 4), ("v", count, 6))
    )
    return s.Matmul(shares(softmax(scores(s.Matmul(q, keys(k))))), v)


@pytest.mark.parametrize(
    ("leading", "text", "batch", "heads"),
    [
        ((3,), False, (1,), 3), ((1, 3), False, (1,), 3), ((2, 3), False, (2,), 3), ((2, 2, 3), False, (2,), 6),
        ((B, 3), False, (B,), 3), ((3, B), False, (3, B), 1), ((B,), False, (B,), 1), ((B, 2, 3), False, (B,), 6),
        ((), False, (1,), 1), ((1, 1), False, (1,), 1), ((1, 3), True, (1,), 3), ((2, 3), True, (1,), 6),
        ((3,), True, (1,), 3),
    ],
)  # fmt: skip
def test_leading_axes_are_a_batch_and_heads(
    leading: tuple[Size, ...], text: bool, batch: tuple[Size, ...], heads: int
) -> None:
    """Of one text all are heads; otherwise the first of several is a batch."""
    queries, count = (S, S) if text else (5, 7)
    op = result(graph_of(attention(leading, queries, count), also=TEXT if text else ()), B=2, S=5)
    assert isinstance(op, Attention), op
    assert op.q.shape == (*batch, queries, heads, 4)
    assert op.k.shape == (*batch, count, heads, 4) and op.v.shape == (*batch, count, heads, 6)


def joined(column: Value, *, first: bool = False, axis: int = 3) -> Step:
    return lambda scores: s.Concat((column, scores) if first else (scores, column), axis)


def cut(scores: Value) -> Value:
    return s.Slice(scores, 3, 0, 7)


def sinks(*numbers: float) -> Value:
    """[1, 3, 5, 1]"""
    return s.Broadcast(c(np.reshape(numbers, (1, -1, 1, 1)), "f32"), (1, 3, 5, 1))


def places() -> Value:
    return s.Broadcast(s.Reshape(e.Cast(s.Iota(5), "f32"), (1, 1, 5, 1)), (1, 3, 5, 1))


WITH_SINKS: dict[str, tuple[Step, str]] = {
    "a column": (joined(sinks(0.5, -1, 2)), ""),
    "by a negative axis": (joined(sinks(0.5, -1, 2), axis=-1), ""),
    "less the largest": (lambda x: e.Sub(y := joined(sinks(0.5, -1, 2))(x), s.Max(y, (3,))), ""),
    "less the largest of scores": (lambda x: joined(sinks(0.5, -1, 2))(e.Add(x, c(0.0))), ""),
    "of all heads alike": (joined(sinks(0.5, 0.5, 0.5)), ""),
    "one number": (joined(sinks(0.5)), "its sinks are not one number a head, known when compiling"),
    "a column in front": (
        joined(sinks(0.5, -1, 2), first=True),
        "something other than one column of sinks is concatenated to its scores",
    ),
    "two columns": (
        lambda x: s.Concat((x, sinks(0.5, -1, 2), sinks(0.5, -1, 2)), 3),
        "something other than one column of sinks is concatenated to its scores",
    ),
    "a wide column": (
        joined(s.Broadcast(sinks(0.5, -1, 2), (1, 3, 5, 2))),
        "something other than one column of sinks is concatenated to its scores",
    ),
    "a column of tokens": (
        joined(x("column", 1, 3, 5, 1)), "something other than one column of sinks is concatenated to its scores",
    ),
    "a column of places": (joined(places()), "its sinks are not one number a head, known when compiling"),
    "more rows": (
        lambda x: cut(s.Reshape(s.Concat((x, x), 2), (1, 3, 5, 14))),
        "its scores depend on t.slice: tensor<[1, 3, 5, 7], f32>, which is no product of q and k",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_SINKS)
def test_sinks_are_a_column_of_one_number_a_head(name: str) -> None:
    scores, why = WITH_SINKS[name]
    found = result(graph_of(attention((1, 3), scores=scores, shares=cut)))
    if why:
        assert found == why
    else:
        assert isinstance(found, Attention) and found.sinks is not None and found.sinks.shape == (3,)


def test_weights_are_sinks() -> None:
    param = Param("sinks", Tensor((3,), "f32"))
    for column in (
        s.Broadcast(s.Reshape(param, (1, 3, 1, 1)), (1, 3, 5, 1)),
        s.Broadcast(s.Reshape(param, (3, 1, 1)), (1, 3, 5, 1)),
    ):
        after = FuseAttention().run(graph_of(attention((1, 3), scores=joined(column), shares=cut)), Report())
        (op,) = [op for op in after.ops if isinstance(op, Attention)]
        found = op.sinks
        assert found is not None and found.shape == (3,)
        while isinstance(found, s.Reshape):
            found = found.x
        assert found is param


V = x("v", 2, 7, 6)
A, K7 = x("a", 2, 5, 4), x("k", 2, 7, 4)


def raw() -> Value:
    return s.Matmul(A, keys(K7))


def one_row() -> Value:
    return s.Reshape(s.Matmul(x("a", 1, 4), x("k", 4, 7)), (7,))


REFUSED: dict[str, tuple[Callable[[], Graph], str]] = {
    "two products": (
        lambda: graph_of(s.Matmul(softmax(e.Add(raw(), s.Matmul(x("b", 2, 5, 4), keys(K7)))), V)),
        "its scores depend on 2 products of activations",
    ),
    "no product": (
        lambda: graph_of(s.Matmul(softmax(x("scores", 2, 5, 7)), V)),
        "its scores depend on an input: tensor<[2, 5, 7], f32>, which is no product of q and k",
    ),
    "a sum": (
        lambda: graph_of(s.Matmul(softmax(s.Sum(x("scores", 2, 5, 7, 3), (3,), False)), V)),
        "its scores depend on t.sum: tensor<[2, 5, 7], f32>, which is no product of q and k",
    ),
    "a product by weights": (
        lambda: graph_of(s.Matmul(softmax(s.Matmul(A, Param("w", Tensor((4, 7), "f32")))), V)),
        "its scores depend on t.matmul: tensor<[2, 5, 7], f32>, which is no product of q and k",
    ),
    "one row": (
        lambda: graph_of(s.Matmul(s.Reshape(softmax(one_row()), (1, 7)), x("v", 7, 6))),
        "a softmax over tensor<[7], f32> is not over the keys of every query",
    ),
    "rows and keys in other places": (
        lambda: graph_of(s.Matmul(softmax(s.Reshape(raw(), (2, 7, 5))), x("values", 2, 5, 6))),
        "products tensor<[2, 5, 7], f32> and scores tensor<[2, 7, 5], f32> differ in shape",
    ),
    "scores of more heads than products": (
        lambda: graph_of(s.Matmul(softmax(e.Add(s.Matmul(x("a", 1, 5, 4), keys(x("k", 1, 7, 4))), x("bias", 2, 5, 7))),
                                  V)),
        "products tensor<[1, 5, 7], f32> and scores tensor<[2, 5, 7], f32> differ in shape",
    ),
    "values of more heads than scores": (
        lambda: graph_of(s.Matmul(softmax(s.Matmul(x("a", 1, 5, 4), keys(x("k", 1, 7, 4)))), V)),
        "tensor<[2, 5, 6], f32>, weighted values, are no values of scores tensor<[1, 5, 7], f32>",
    ),
    "no heads": (lambda: graph_of(attention((0,))), "scores tensor<[0, 5, 7], f32> are empty"),
    "no keys": (lambda: graph_of(attention((2,), 5, 0)), "scores tensor<[2, 5, 0], f32> are empty"),
    "no queries": (lambda: graph_of(attention((2,), 0, 7)), "scores tensor<[2, 0, 7], f32> are empty"),
    "no channels": (
        lambda: graph_of(s.Matmul(softmax(s.Matmul(x("a", 2, 5, 0), keys(x("k", 2, 7, 0)))), V)),
        "scores tensor<[2, 5, 7], f32> are empty",
    ),
    "no values": (
        lambda: graph_of(s.Matmul(softmax(raw()), x("values", 2, 7, 0))), "scores tensor<[2, 5, 7], f32> are empty",
    ),
    "places alone": (lambda: graph_of(e.Add(softmax(e.Cast(e.Sub(s.Reshape(s.Iota(5), (5, 1)), s.Iota(5)), "f32")),
                                            x("b", 5, 5))), ""),
    "over queries": (lambda: graph_of(s.Matmul(s.Softmax(raw(), 1), V)), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_attention_is_refused(name: str) -> None:
    build, why = REFUSED[name]
    assert result(build()) == why


def test_a_bias_of_tokens_is_added_but_to_a_text() -> None:
    bias = x("bias", 3, S, S)
    graph = [graph_of(attention((1, 3), S, S, scores=lambda y: e.Add(y, bias)), also=also) for also in ((), TEXT)]
    op = result(graph[0], S=5)
    assert isinstance(op, Attention) and op.bias is not None
    assert result(graph[1]) == ("its scores depend on an input: tensor<[3, S, S], f32>, which is no product of q and k")


# Heads that share keys

GROUPS, KV = 3, 2


def spread(value: Value, groups_first: bool = False) -> Value:
    """[1, kv, 7, dim] -> [1, kv * groups, 7, dim]; groups_first: heads 0, 1, 0, 1, ..., which are no groups."""
    dim = value.shape[-1]
    kinds = ((1, 1, KV, 7, dim), (1, GROUPS, KV, 7, dim)) if groups_first else ((1, KV, 1, 7, dim),
                                                                                (1, KV, GROUPS, 7, dim))  # fmt: skip
    return s.Reshape(s.Broadcast(s.Reshape(value, kinds[0]), kinds[1]), (1, KV * GROUPS, 7, dim))


@pytest.mark.parametrize(
    ("shared_keys", "shared_values", "heads"),
    [("groups", "groups", KV), ("turns", "turns", 6), ("groups", "turns", 6), ("turns", "groups", 6),
     ("groups", "none", 6), ("none", "groups", 6), ("none", "none", 6)],
)  # fmt: skip
def test_keys_and_values_are_shared_where_both_are_in_groups(shared_keys: str, shared_values: str, heads: int) -> None:
    def operand(name: str, dim: int, shared: str) -> Value:
        if shared == "none":
            return x(name, 1, 6, 7, dim)
        return spread(x(name, 1, KV, 7, dim), shared == "turns")

    k, v = operand("k", 4, shared_keys), operand("v", 3, shared_values)
    op = result(graph_of(s.Matmul(softmax(s.Matmul(x("q", 1, 6, 5, 4), keys(k))), v)))
    assert isinstance(op, Attention)
    assert op.k.shape == (1, 7, heads, 4) and op.v.shape == (1, 7, heads, 3)


def test_scales_of_queries_and_keys_are_one_scale() -> None:
    """On either side of what moves them; values keep theirs."""
    q, k, v = x("q", 1, 5, 3, 4), x("k", 1, 7, 3, 4), x("v", 1, 7, 3, 6)
    heads: Step = lambda y: s.Transpose(y, (0, 2, 1, 3))  # noqa: E731
    for scale_q, scale_k, scale in (
        (lambda y: e.Mul(y, c(0.5)), lambda y: y, 0.5), (lambda y: e.Mul(c(0.5), y), lambda y: y, 0.5),
        (lambda y: e.Div(y, c(4.0)), lambda y: e.Mul(y, c(3.0)), 0.75),
        (lambda y: y, lambda y: e.Div(e.Mul(y, c(3.0)), c(2.0)), 1.5),
        (lambda y: e.Mul(y, c(0.0)), lambda y: y, 1.0), (lambda y: e.Div(c(2.0), e.Exp(y)), lambda y: y, 1.0),
    ):  # fmt: skip
        for inside in (False, True):
            a, b = (heads(f(y)) if inside else f(heads(y)) for f, y in ((scale_q, q), (scale_k, k)))
            values = e.Mul(heads(v), c(2.0))
            op = result(graph_of(s.Matmul(softmax(s.Matmul(a, keys(b))), values)))
            assert isinstance(op, Attention) and op.scale == pytest.approx(scale, rel=1e-12)
            assert op.v is not v
            if scale != 1.0:
                assert op.q is q and op.k is k


@pytest.mark.parametrize("way", [e.Add, e.Mul])
def test_a_bias_or_a_factor_of_an_attention_is_that_of_the_new_one(way: type[e.Binary]) -> None:
    """A layer whose scores take what the layer before gives: nothing of the old one is left."""
    first = attention((1, 3))
    rows = s.Max(first, (3,))
    scores = e.Mul(way(s.Matmul(x("q2", 1, 3, 5, 4), keys(x("k2", 1, 3, 7, 4))), rows), c(0.5))
    graph = graph_of(s.Matmul(softmax(scores), x("v2", 1, 3, 7, 6)), first)
    assert isinstance(result(graph), Attention)
    after = FuseAttention().run(graph, Report())
    assert sum(isinstance(op, Attention) for op in after.ops) == 2
    assert not any(isinstance(op, (s.Softmax, s.Matmul)) for op in after.ops)
