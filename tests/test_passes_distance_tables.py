"""Tables of distances: at every distance what the bias adds to a score, for any head, and why some are none."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from mask_harness import Pairs

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.ragged import span_of
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.passes import distance_tables
from llmc.compiler.passes.distance_tables import distance_table
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.probe import Probe

c = e.constant
Build = Callable[[Pairs], Value]


def heads(*numbers: float, dtype: str = "f32") -> Value:
    return c(np.reshape(numbers, (-1, 1, 1)), dtype)


def far(p: Pairs) -> Value:
    """[S, S]: the distance, in floats."""
    return e.Cast(p.back, "f32")


def six(p: Pairs) -> Value:
    """[6, S, S]"""
    return e.Add(e.Mul(heads(1, -2, 3, 5, 7, 11), far(p)), heads(0, 5, 1, 2, 3, 4))


def weights(*shape: int) -> Value:
    return c(np.random.default_rng(1).standard_normal(shape), "f32")


BIASES: dict[str, tuple[int, Build]] = {
    "a distance": (1, far),
    "the other way round": (1, lambda p: e.Neg(far(p))),
    "a number": (1, lambda p: s.Broadcast(c(2.5), (p.size, p.size))),
    "truth": (1, lambda p: e.Cast(p.causal, "f32")),
    "whole numbers": (1, lambda p: e.Mul(e.Sub(p.k, p.q), c(3))),
    "in narrow floats": (1, lambda p: e.Cast(far(p), "bf16")),
    "hidden": (1, lambda p: e.Where(p.causal, far(p), c(-math.inf))),
    "of each head": (6, six),
    "a rest, a quotient": (1, lambda p: e.Cast(e.Add(e.Mod(p.back, c(3)), e.Div(p.back, c(2))), "f32")),
    "an activation": (1, lambda p: e.Activation(far(p), "tanh")),
    "functions": (1, lambda p: e.Exp(e.Neg(e.Abs(far(p))))),
    "a batch of one": (6, lambda p: s.Reshape(six(p), (1, 6, p.size, p.size))),
    "groups": (6, lambda p: s.Reshape(six(p), (2, 3, p.size, p.size))),
    "turned": (6, lambda p: s.Transpose(six(p), (0, 2, 1))),
    "groups, turned": (6, lambda p: s.Transpose(s.Reshape(six(p), (2, 3, p.size, p.size)), (1, 0, 3, 2))),
    "spread": (3, lambda p: s.Broadcast(far(p), (3, p.size, p.size))),
    "spread of heads": (6, lambda p: s.Broadcast(s.Reshape(e.Mul(heads(1, 2, 3), far(p)), (1, 3, p.size, p.size)),
                                                 (2, 3, p.size, p.size))),
    "some of each group": (4, lambda p: s.Slice(s.Reshape(six(p), (2, 3, p.size, p.size)), 1, 1, 3)),
    "some heads": (3, lambda p: s.Slice(six(p), 0, 1, 6, 2)),
    "some heads, by a negative axis": (2, lambda p: s.Slice(six(p), -3, 3, 5)),
    "heads, one after another": (8, lambda p: s.Concat((e.Mul(heads(1, 2), far(p)), e.Neg(six(p))), -3)),
    "groups, one after another": (
        12,
        lambda p: s.Concat(tuple(s.Reshape(x, (2, 3, p.size, p.size)) for x in (six(p), e.Neg(six(p)))), 1),
    ),
    "the greatest of heads": (1, lambda p: s.Max(six(p), (0,))),
    "the sum of groups": (3, lambda p: s.Sum(s.Reshape(six(p), (2, 3, p.size, p.size)), (0,), False)),
    "the least of groups": (2, lambda p: s.Min(s.Reshape(six(p), (2, 3, p.size, p.size)), (-3,), False)),
    "looked up": (1, lambda p: s.Gather(weights(40), e.Add(p.back, c(20)))),
    "looked up of each head": (2, lambda p: s.Gather(weights(2, 40), e.Add(p.back, c(20)), 1)),
    "looked up by a negative axis": (2, lambda p: s.Gather(weights(2, 40), e.Add(p.back, c(20)), -1)),
    "rows looked up": (3, lambda p: s.Transpose(s.Gather(weights(40, 3), e.Add(p.back, c(20))), (2, 0, 1))),
    "stored": (1, lambda p: s.Slice(s.Slice(c(np.subtract.outer(np.arange(12.0), np.arange(12.0)) ** 3, "f32"),
                                            0, 0, p.size), 1, 0, p.size)),
    "stored of heads": (2, lambda p: s.Slice(
        s.Slice(c(np.stack([np.subtract.outer(np.arange(12.0), np.arange(12.0)) ** n for n in (2, 3)]), "f32"),
                1, 1, p.size + 1), 2, 2, p.size + 2)),
    "stored, heads behind": (2, lambda p: s.Transpose(s.Slice(
        s.Slice(c(np.stack([np.subtract.outer(np.arange(12.0), np.arange(12.0)) ** n for n in (2, 3)], 2), "f32"),
                0, 1, p.size + 1), 1, 2, p.size + 2), (2, 0, 1))),
    "stored, heads between": (2, lambda p: s.Transpose(s.Slice(
        s.Slice(c(np.stack([np.subtract.outer(np.arange(12.0), np.arange(12.0)) ** n for n in (2, 3)], 1), "f32"),
                0, 1, p.size + 1), 2, 2, p.size + 2), (1, 0, 2))),
}  # fmt: skip


@pytest.mark.parametrize("most", [9, 1, 2, 10])
@pytest.mark.parametrize("name", BIASES)
def test_a_table_holds_what_a_bias_adds_at_every_distance(name: str, most: int) -> None:
    places = Pairs(most)
    rows, build = BIASES[name]
    bias = build(places)
    probe = places.reader(bias).probe
    for count in (rows, 4) if rows == 1 else (rows,):
        table = distance_table(probe, bias, count)
        span = span_of(table)
        assert table.shape == (count, 2 * span - 1) and table.dtype == "f32"
        assert most <= span < most + PAGE and span % PAGE == 0
        (numbers,) = probe.evaluate([table], 1, exact=False)
        (expected,) = probe.evaluate([bias], most, exact=False)
        expected = np.broadcast_to(expected.reshape(-1, most, most), (count, most, most)).astype(np.float32)
        at = np.arange(most)
        np.testing.assert_array_equal(
            np.asarray(numbers)[:, at - at[:, None] + span - 1], np.maximum(expected, np.float32(-1e28))
        )


def refusal(bias: Value, count: int = 2, *inputs: Input) -> str:
    ids = Input("ids", Tensor((1, symbol("S", 1, 9)), "i32"))
    with pytest.raises(Unrecognised) as refused:
        distance_table(Probe(Graph("g", (*(inputs or (ids,)),), (("out", bias),))), bias, count)
    return str(refused.value)


def test_what_is_no_table_of_distances_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Pairs()
    assert refusal(e.Add(p.token, far(p)), 2, Input("ids", Tensor((1, p.size), "i32")), p.token) == (
        "token ids decide what it adds to scores"
    )
    assert refusal(e.Mul(heads(1, 2, 3), far(p))) == "it adds a bias tensor<[3, S, S], f32> to scores of 2 heads"
    assert refusal(e.Cast(e.Mul(p.q, p.k), "f32")) == ("its mask is not decided by the distance of key and query alone")
    free = Pairs()
    free.size = symbol("S", 1)
    at = s.Iota(free.size)
    bias = e.Cast(e.Sub(s.Reshape(at, (free.size, 1)), at), "f32")
    why = "it adds a bias by position, and the longest sequence is not known"
    assert refusal(bias, 2, Input("ids", Tensor((1, free.size), "i32"))) == why
    assert refusal(weights(2, 5, 5), 2, Input("x", Tensor((5,), "f32"))) == why
    too_large = "its table of distances for 9 tokens is too large: compile with a smaller --max-context"
    ids = Input("ids", Tensor((1, p.size), "i32"))
    many = s.Broadcast(far(p), (1 << 22, p.size, p.size))
    assert refusal(many, 1 << 22, ids) == too_large, "17 distances for each of four million heads"
    for most, known in ((34, True), (33, False)):
        monkeypatch.setattr(distance_tables, "_MOST_ELEMENTS", most)
        bias = far(p)
        if known:
            distance_table(Probe(Graph("g", (ids,), (("out", bias),))), bias, 2)
        else:
            assert refusal(bias) == too_large


def test_weights_may_be_in_a_table_and_need_not_be_known() -> None:
    p = Pairs()
    param = Param("table", Tensor((2, 40), "f32"))
    bias = e.Mul(s.Gather(param, e.Add(p.back, c(20)), 1), heads(0.5, 2))
    probe = p.reader(bias).probe
    table = distance_table(probe, bias, 2)
    found, expected = (np.asarray(x) for x in probe.evaluate([table, bias], 9, stand_ins=True))
    at = np.arange(9)
    rows: Array = found[:, at - at[:, None] + span_of(table) - 1]
    np.testing.assert_array_equal(rows, expected)
