"""What a mask means for one attention: of which sizes it is known, and what is added where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from attention_of_graphs import result

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.ragged import RelativeBias
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes import attention_meaning
from llmc.compiler.passes.fuse_attention import FuseAttention
from llmc.compiler.passes.manager import Report
from llmc.compiler.passes.masks import Mask, Unrecognised

S, T = symbol("S", 1, 60), symbol("T", 1, 60)
FREE = symbol("F", 1)  # nothing bounds it
HEADS, DIM = 3, 4
Steps = Callable[[Value], Value]
Size = int | Dim
c = e.constant
NONE = c(-math.inf)


def graph_of(
    steps: Steps, queries: Size = S, keys: Size = S, text: bool = False, *extra: Input,
    keeps: Steps = lambda x: x, leading: tuple[Size, ...] = (1, HEADS),
) -> Graph:  # fmt: skip
    """One attention; `steps` make scores of products."""
    q, k, v = (
        Input(name, Tensor((*leading, rows, DIM), "f32"))
        for name, rows in zip("qkv", (queries, keys, keys), strict=True)
    )
    inputs = [Input(name, Tensor((1, S), "i32")) for name in ("ids", "positions")] if text else []
    order = (*range(len(leading)), len(leading) + 1, len(leading))
    shares = s.Softmax(steps(s.Matmul(q, s.Transpose(k, order))), len(leading) + 1)
    return Graph("g", (*inputs, q, k, v, *extra), (("out", s.Matmul(keeps(shares), v)),))


def said(graph: Graph, limit: float = 1e-11, **sizes: int) -> Mask:
    """The mask, where it says all."""
    op = result(graph, limit, **sizes)
    assert isinstance(op, Attention), op
    assert op.bias is None
    slopes = None if op.slopes is None else tuple(op.slopes.value.array.tolist())  # type: ignore[union-attr]
    return Mask(op.causal, op.window, slopes)


def back(queries: Size = S, keys: Size = S) -> Value:
    return e.Sub(s.Reshape(s.Iota(queries), (queries, 1)), s.Reshape(s.Iota(keys), (1, keys)))


def causal(queries: Size = S, keys: Size = S) -> Steps:
    return lambda x: e.Where(e.GreaterEqual(back(queries, keys), c(0)), x, NONE)


def number_of(size: Size) -> Value:
    """[1, 1]"""
    return s.Reshape(s.Slice(s.Iota(size + 1), 0, size, size + 1), (1, 1))


# Sizes

KNOWN = Mask(True, 0, None)
SIZED = Input("sized", Tensor((S, T), "f32"))  # tells the sizes
SIZES: dict[str, tuple[Graph, dict[str, int], Mask | None]] = {
    "as many queries as keys": (graph_of(causal()), {"S": 7}, KNOWN),
    "fixed": (graph_of(causal(5, 5), 5, 5), {}, KNOWN),
    "no mask, of unlike sizes": (graph_of(lambda x: x, S, T), {"S": 5, "T": 7}, Mask(False, 0, None)),
    "no mask, of sizes without bounds": (graph_of(lambda x: x, FREE, FREE), {"F": 5}, Mask(False, 0, None)),
    "no mask, fixed": (graph_of(lambda x: x, 3, 5), {}, Mask(False, 0, None)),
    "no mask of more queries than keys": (graph_of(lambda x: x, 5, 3), {}, Mask(False, 0, None)),
    "unlike sizes": (graph_of(causal(S, T), S, T), {"S": 5, "T": 7}, None),
    "fixed queries": (graph_of(causal(5, S), 5, S), {"S": 7}, None),
    "fixed keys": (graph_of(causal(S, 5), S, 5), {"S": 3}, None),
    "more queries than keys": (graph_of(causal(5, 3), 5, 3), {}, None),
    "twice a size": (graph_of(causal(S * 2, S * 2), S * 2, S * 2, False, SIZED), {"S": 4, "T": 3, "2*S": 8}, None),
    "one more than a size": (
        graph_of(causal(S + 1, S + 1), S + 1, S + 1, False, SIZED),
        {"S": 4, "T": 3, "S + 1": 5},
        None,
    ),
    "two sizes": (graph_of(causal(S * T, S * T), S * T, S * T, False, SIZED), {"S": 2, "T": 3, "S*T": 6}, None),
    "a size without bounds": (graph_of(causal(FREE, FREE), FREE, FREE), {"F": 5}, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_mask_is_known_of_one_sequence_with_itself(name: str) -> None:
    """Of other sizes it is added as it is."""
    graph, sizes, mask = SIZES[name]
    if mask is not None:
        assert said(graph, **sizes) == mask
        return
    op = result(graph, **sizes)
    assert isinstance(op, Attention), op
    assert (op.causal, op.window, op.slopes) == (False, 0, None) and op.bias is not None


def test_a_text_attends_over_its_own_tokens() -> None:
    assert said(graph_of(causal(), text=True), S=7) == KNOWN
    found = result(graph_of(causal(T, T), T, T, text=True), S=7, T=7)
    assert found == "scores tensor<[1, 3, T, T], f32> are not those of one sequence with itself"
    found = result(graph_of(causal(5, S), 5, S, text=True), S=7)
    assert found == "scores tensor<[1, 3, 5, S], f32> are not those of one sequence with itself"


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3), (2, 1, 3), (2, 2, 3), (S, 3)], ids=str)
@pytest.mark.parametrize("own", [0, 1, 2, 3])
def test_a_bias_reaches_the_heads_that_it_is_for(shape: tuple[Size, ...], own: int) -> None:
    """Products of heads, of sequences and heads, or of more axes; a bias of all, or of the last of them."""
    own = min(own, len(shape))
    bias = Input("bias", Tensor((*shape[len(shape) - own :], 5, 7), "f32"))
    op = result(graph_of(lambda x: e.Add(x, bias), 5, 7, False, bias, leading=shape), S=2)
    assert isinstance(op, Attention), op
    assert op.bias is not None


# Numbers that are added to all keys of a query


def late(number: float) -> Value:
    """[S, 1]: a number for queries from 30 on."""
    condition = e.GreaterEqual(s.Reshape(s.Iota(S), (S, 1)), c(30))
    return e.Mul(e.Cast(condition, "f32"), c(number))


ROWS: dict[str, Callable[[float], Value]] = {
    "a product": late,
    "a quotient": lambda n: e.Div(late(1.0), c(1 / n)),
    "a product in front": lambda n: e.Mul(c(n), late(1.0)),
    "a product of products": lambda n: e.Mul(e.Mul(late(1.0), c(-10.0)), c(n / -10)),
    "a choice": lambda n: e.Where(e.GreaterEqual(s.Reshape(s.Iota(S), (S, 1)), c(30)), c(n), c(0.0)),
    "a number for all queries": lambda n: e.Mul(c(n), c([[1.0]])),
    "by place": lambda n: e.Mul(e.Cast(s.Reshape(s.Iota(S), (S, 1)), "f32"), c(n / 59)),
    "by length": lambda n: e.Mul(e.Cast(number_of(S), "f32"), c(n / 60)),
    "slopes that start far away": lambda n: e.Mul(e.Cast(e.Add(s.Reshape(s.Iota(S), (1, S)), c(1000)), "f32"),
                                                  c(n / 1000)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("number", [0.9e6, 1.2e6, -1.2e6, 1e30, -1e30])
def test_a_number_for_all_keys_counts_where_scores_are_lost_beside_it(name: str, number: float) -> None:
    """In f32, beside 1e30 all scores of a query are alike."""

    def masked(raw: Value) -> Value:
        return e.Add(causal()(raw), ROWS[name](number))

    report = Report()
    after = FuseAttention().run(graph_of(masked, text=True), report)
    (op,) = [op for op in after.ops if isinstance(op, Attention)] or [None]
    assert (op is not None and op.bias is None) == (number == 0.9e6), report.refusals or op


def test_a_number_for_all_keys_that_is_lost_stays_where_sizes_are_fixed() -> None:
    for number, known in (
        (0.0, True),
        (-4999.0, True),
        (-5000.0, False),
        (-6e3, False),
        (1e6, True),
        (1.1e6, False),
        (1e30, False),
    ):
        # f64 beside 1e6 keeps 2e-10.
        op = result(graph_of(lambda x: e.Add(x, c([[number]])), 5, 7), 1e-9)  # noqa: B023
        assert isinstance(op, Attention) and (op.bias is None) == known
        steps: Steps = lambda x: causal(5, 5)(e.Add(x, c(number)))  # noqa: B023, E731
        op = result(graph_of(steps, 5, 5), 1e-9)
        assert isinstance(op, Attention) and op.causal == known


# Scales


SCALES: dict[str, tuple[Steps, float | None]] = {
    "of the seen": (lambda x: e.Mul(x, e.Where(e.GreaterEqual(back(), c(0)), c(2.0), c(3.0))), 2.0),
    "of other dtypes": (lambda x: e.Mul(x, e.Cast(e.Where(e.GreaterEqual(back(), c(0)), c(2), c(3)), "f32")), 2.0),
    "none of the hidden": (lambda x: e.Mul(x, e.Cast(e.GreaterEqual(back(), c(0)), "f32")), 1.0),
    "of near keys": (lambda x: e.Mul(x, e.Where(e.Less(back(), c(9)), c(2.0), c(3.0))), None),
    "nothing": (lambda x: e.Mul(x, e.Where(e.GreaterEqual(back(), c(0)), c(0.0), c(3.0))), None),
    "by key": (lambda x: e.Mul(x, e.Add(e.Cast(s.Reshape(s.Iota(S), (1, S)), "f32"), c(1.0))), None),
    "by the last key": (
        lambda x: e.Mul(x, e.Cast(e.Add(e.Div(s.Reshape(s.Iota(S), (1, S)), c(59)), c(1)), "f32")), None,
    ),
    "by the last key after all": (
        lambda x: e.Mul(x, e.Cast(e.Add(e.Div(s.Reshape(s.Iota(S), (1, S)), c(60)), c(1)), "f32")), 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dense", [False, True])
def test_a_scale_is_one_where_keys_are_seen(name: str, dense: bool) -> None:
    """dense: something else in the mask is no function of distance, so that every pair is looked at."""
    scaled, scale = SCALES[name]
    extra = e.GreaterEqual(*(e.Div(s.Reshape(s.Iota(S), shape), c(7)) for shape in ((S, 1), (1, S))))

    def steps(x: Value) -> Value:
        x = causal()(scaled(x))
        return e.Where(extra, x, NONE) if dense else x

    found = result(graph_of(steps, text=True), S=60)
    if scale is None:
        assert found == "its scale differs from place to place"
    else:
        assert isinstance(found, Attention) and found.scale == scale and found.causal


def quotients() -> Value:
    """[S, S]: whether a key is in the query's group of seven or in one before; no function of distance."""
    return e.GreaterEqual(*(e.Div(s.Reshape(s.Iota(S), shape), c(7)) for shape in ((S, 1), (1, S))))


@pytest.mark.parametrize("heads", [1, HEADS])
def test_pairs_are_looked_at_where_they_are_few(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all heads of a bias, 60 queries and 60 keys; beyond, what a solver does not follow is refused."""
    zeros = c(np.zeros((heads, 1, 1)), "f32")

    def scaled(x: Value) -> Value:
        x = e.Mul(x, e.Where(e.GreaterEqual(back(), c(0)), c(2.0), c(3.0)))
        return e.Where(quotients(), causal()(e.Add(x, zeros)), NONE)

    for most, known in ((heads * 3600, True), (heads * 3600 - 1, False)):
        monkeypatch.setattr(attention_meaning, "MOST_PAIRS", most)
        found = result(graph_of(scaled, text=True), S=20)
        assert (isinstance(found, Attention) and found.causal and found.scale == 2.0) == known
        if not known:
            assert isinstance(found, str) and "60 tokens are too many to look at every pair" in found
    monkeypatch.setattr(attention_meaning, "MOST_PAIRS", 0)
    proved = result(graph_of(lambda x: e.Where(quotients(), causal()(x), NONE), text=True), S=20)
    assert isinstance(proved, Attention) and proved.causal and proved.scale == 1.0


def test_pairs_of_the_longest_text_say_nothing_where_the_length_decides() -> None:
    """Short texts see keys ahead in their group; one of 60 tokens does not."""
    seen = e.And(quotients(), e.Or(e.GreaterEqual(back(), c(0)), e.Less(number_of(S), c(30))))
    assert isinstance(result(graph_of(lambda x: e.Where(seen, x, NONE), text=True), S=20), str)


def test_as_many_heads_as_tokens_are_looked_at() -> None:
    few = symbol("S", 1, HEADS)
    slopes = c(np.reshape([0.5, 0.25, 2.0], (3, 1, 1)), "f32")
    groups = e.GreaterEqual(*(e.Div(s.Reshape(s.Iota(few), shape), c(2)) for shape in ((few, 1), (1, few))))

    def masked(x: Value) -> Value:
        sloped = e.Add(x, e.Mul(slopes, e.Cast(e.Neg(back(few, few)), "f32")))
        return e.Where(groups, causal(few, few)(sloped), NONE)

    assert said(graph_of(masked, few, few), S=3) == Mask(True, 0, (0.5, 0.25, 2.0))


@pytest.mark.parametrize("extra", [(), (SIZED,)], ids=["no tokens", "tokens of another size"])
def test_a_mask_is_evaluated_for_its_own_number_of_tokens(extra: tuple[Input, ...]) -> None:
    """By an op that is not followed, in a graph whose inputs say of another size, or of none, that it counts tokens."""
    rows = s.Broadcast(s.Reshape(s.Iota(S), (S, 1)), (S, S))
    seen = s.GatherElements(e.GreaterEqual(back(), c(0)), rows, 0)
    assert said(graph_of(lambda x: e.Where(seen, x, NONE), S, S, False, *extra), S=7, T=5) == KNOWN


def test_weights_that_are_added_to_fixed_scores_stay_a_bias() -> None:
    weights = Param("w", Tensor((5, 7), "f32"))
    given = {"w": np.random.default_rng(0).standard_normal((5, 7))}
    op = result(graph_of(lambda x: e.Add(x, weights), 5, 7), given=given)
    assert isinstance(op, Attention) and op.bias is not None


def test_slopes_that_are_spread_over_a_free_batch_stay_a_bias() -> None:
    slopes = e.Mul(c(np.reshape([0.5, 0.25, 2.0], (3, 1, 1)), "f32"), e.Cast(e.Neg(back(5, 5)), "f32"))
    spread = s.Broadcast(slopes, (T, HEADS, 5, 5))
    op = result(graph_of(lambda x: e.Add(x, spread), 5, 5, False, SIZED, leading=(T, HEADS)), S=3, T=2)
    assert isinstance(op, Attention) and op.bias is not None and op.slopes is None


def test_a_choice_that_does_not_hide_is_refused_at_any_pair() -> None:
    at = [s.Reshape(s.Iota(S), shape) for shape in ((S, 1), (1, S))]
    quotients = e.GreaterEqual(*(e.Div(x, c(7)) for x in at))
    for dense, seen in enumerate((e.GreaterEqual(back(), c(0)), e.And(e.GreaterEqual(back(), c(0)), quotients))):
        for number, hides in ((-1e4, True), (-5e3, True), (-4e3, False), (0.0, False)):
            found = result(graph_of(lambda x: e.Where(seen, x, c(number)), text=True), S=40)  # noqa: B023
            if hides:
                assert isinstance(found, Attention) and found.causal
            else:
                adds = "head 0 adds -4000 for a query and the key 1 after it, which is no slope times a distance"
                puts = "t.where puts a number that does not hide the key in place of a score"
                assert found == (adds if number and dense else puts)


@pytest.mark.parametrize("numbers", [[2.0, 3.0], [0.0, 0.0], [math.inf, math.inf], [math.nan, math.nan]])
def test_a_scale_is_a_number(numbers: list[float]) -> None:
    """And not 0; where nothing is seen there is none."""
    seen, factor = np.ones((1, 2), bool), np.array([numbers])
    for keys in (seen, ~seen):
        with pytest.raises(Unrecognised, match="its scale differs from place to place"):
            attention_meaning._scale(keys, None, factor)
    assert attention_meaning._scale(seen, None, np.full((1, 2), -2.0)) == -2.0


# Tables of distances


def chosen(number: float, *, near: int = 9) -> Steps:
    """A logarithm of the distance, and a choice between scores and a number."""
    grown = e.Log(e.Add(e.Cast(e.Abs(back()), "f32"), c(1.0)))
    return lambda x: e.Where(e.Less(e.Abs(back()), c(near)), e.Sub(x, grown), c(number))


def test_a_table_is_said_where_the_product_counts_for_every_key_that_is_seen() -> None:
    found = result(graph_of(chosen(-1e30), text=True), S=40)
    assert isinstance(found, Attention) and isinstance(found.bias, RelativeBias)
    for number in (-4e3, 0.0):
        why = "t.where puts a number that does not hide the key in place of a score"
        assert result(graph_of(chosen(number), text=True), S=40) == why
    # A factor of the distance has no place in a table.
    factor = e.Add(e.Cast(e.Abs(back()), "f32"), c(1.0))
    found = result(graph_of(lambda x: e.Mul(chosen(-1e30)(x), factor), text=True), S=40)
    assert isinstance(found, str)


@pytest.mark.parametrize(("heads", "known"), [(1, True), (HEADS, True), (2, False)])
def test_a_table_has_one_row_or_one_a_head(heads: int, known: bool) -> None:
    grown = e.Log(e.Add(e.Cast(e.Abs(back()), "f32"), c(1.0)))
    bias = e.Mul(c(np.reshape([0.5, 1.0, 2.0][:heads], (heads, 1, 1)), "f32"), grown)
    if not known:
        # Two sequences of a batch: no head has this bias in all of them.
        bias = s.Reshape(bias, (2, 1, S, S))
        graph = graph_of(lambda x: e.Sub(x, bias), text=True, leading=(2, HEADS))
        assert isinstance(result(graph, S=40), str)
        return
    found = result(graph_of(lambda x: e.Sub(x, bias), text=True), S=40)
    assert isinstance(found, Attention) and isinstance(found.bias, RelativeBias)


def test_slopes_are_one_a_head_or_one_for_all() -> None:
    distance = e.Cast(e.Neg(back()), "f32")
    for numbers, expected in (([0.5], (0.5,) * 3), ([0.5, 0.25, 2.0], (0.5, 0.25, 2.0))):
        slopes = c(np.reshape(numbers, (-1, 1, 1)), "f32")
        assert said(graph_of(lambda x: causal()(e.Add(x, e.Mul(slopes, distance))), text=True), S=20) == Mask(  # noqa: B023
            True, 0, expected
        )
    # Of two sequences, whose three heads share them: alike or not, they are added as they are.
    for pair in ([0.5, 0.5], [0.5, 0.25]):
        slopes = c(np.reshape(pair, (2, 1, 1, 1)), "f32")
        graph = graph_of(lambda x: causal()(e.Add(x, e.Mul(slopes, distance))), leading=(2, HEADS))  # noqa: B023
        op = result(graph, S=20)
        assert isinstance(op, Attention) and op.slopes is None and op.bias is not None


def test_slopes_of_some_axes_of_heads() -> None:
    """Of two groups of three heads: one slope for all, or refused."""
    distance = e.Cast(e.Neg(back()), "f32")
    for pair, expected in (([0.5, 0.5], (0.5,) * 6), ([0.5, 0.25], None)):
        slopes = c(np.reshape(pair, (2, 1, 1, 1)), "f32")
        graph = graph_of(lambda x: causal()(e.Add(x, e.Mul(slopes, distance))), text=True, leading=(1, 2, 3))  # noqa: B023
        if expected is None:
            assert result(graph, S=20) == "it adds 2 slopes to scores of 6 heads"
        else:
            assert said(graph, S=20) == Mask(True, 0, expected)


def test_slopes_where_every_pair_is_looked_at_are_those_before_rounding() -> None:
    slopes = c(np.reshape([0.1, 0.3, 0.7], (3, 1, 1)), "f32")
    sloped = e.Mul(slopes, e.Cast(e.Neg(back()), "f32"))
    quotients = e.GreaterEqual(*(e.Div(s.Reshape(s.Iota(S), shape), c(7)) for shape in ((S, 1), (1, S))))
    found = said(graph_of(lambda x: e.Where(quotients, causal()(e.Add(x, sloped)), NONE), text=True), S=20)
    assert found == Mask(True, 0, (0.1, 0.3, 0.7))
    sloped = e.Mul(slopes, e.Cast(e.Neg(back(7, 7)), "f32"))
    # Fixed ones are read in f32.
    found = said(graph_of(lambda x: e.Add(x, sloped), 7, 7), 1e-6)
    assert found.slopes is not None and found.slopes == pytest.approx((0.1, 0.3, 0.7), rel=1e-6)


def test_rounding_of_a_source_is_looked_at() -> None:
    """In f16, 2,049 is 2,048: in f64 this were causal."""

    def rounds(size: Size) -> Steps:
        at = [e.Cast(e.Add(s.Reshape(s.Iota(size), shape), c(2048)), "f16") for shape in ((size, 1), (1, size))]
        return lambda x: e.Where(e.GreaterEqual(*at), x, NONE)

    for text in (False, True):
        report = Report()
        after = FuseAttention().run(graph_of(rounds(S), text=text), report)
        found = [op for op in after.ops if isinstance(op, Attention)]
        assert not any(op.causal for op in found) and bool(found) != text
    (op,) = [op for op in FuseAttention().run(graph_of(rounds(5), 5, 5), Report()).ops if isinstance(op, Attention)]
    assert not op.causal and op.bias is not None


@pytest.mark.parametrize("block", [1 << 21, 120, 1])
def test_pairs_are_looked_at_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that differs from the 30th query on is seen, whichever is the greater."""
    monkeypatch.setattr(attention_meaning, "_BLOCK", block)
    late = s.Broadcast(e.GreaterEqual(s.Reshape(s.Iota(S), (S, 1)), c(30)), (S, S))
    for numbers in ((2.0, 3.0), (3.0, 2.0), (2.0, 2.0)):
        factor = e.Where(late, *(c(number) for number in numbers))
        found = result(graph_of(lambda x: causal()(e.Mul(x, factor)), text=True), S=60)  # noqa: B023
        if numbers == (2.0, 2.0):
            assert isinstance(found, Attention) and found.scale == 2.0
        else:
            assert found == "its scale differs from place to place"


def test_a_fixed_mask_that_is_too_large_stays_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many heads, queries and keys as are looked at, and of one more head."""
    monkeypatch.setattr(attention_meaning, "MOST_PAIRS", 2 * 5 * 5)
    for heads, known in ((1, True), (2, True), (3, False)):
        mask = c(np.where(np.tril(np.ones((heads, 5, 5), bool)), 0.0, -math.inf), "f32")
        op = result(graph_of(lambda x: e.Add(x, mask), 5, 5, leading=(1, heads)))  # noqa: B023
        assert isinstance(op, Attention) and op.causal == known == (op.bias is None)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [0.0, -1.0, -3.0], [0.0, 1.0, 3.0], [-9.0, -9.0, -9.0]])
def test_a_fixed_bias_of_keys_is_kept_unless_it_is_one_number(row: list[float]) -> None:
    op = result(graph_of(lambda x: e.Add(x, c([row])), 2, 3))
    assert isinstance(op, Attention) and (op.bias is None) == (len(set(row)) == 1)


def test_a_fixed_number_a_query_is_no_mask() -> None:
    op = result(graph_of(lambda x: e.Add(x, c([[1.0], [-2.0], [0.0]])), 3, 4))
    assert isinstance(op, Attention) and op.bias is None and not op.causal


def test_slopes_by_key_count_beside_sinks() -> None:
    """They add a number to all keys of a query besides slopes times distances."""
    column = c(np.reshape([0.5, -1.0, 2.0], (1, HEADS, 1, 1)), "f32")

    def with_sinks(x: Value) -> Value:
        sloped = causal()(e.Add(x, e.Mul(c(0.25), e.Cast(s.Reshape(s.Iota(S), (1, S)), "f32"))))
        return s.Concat((sloped, s.Broadcast(column, (1, HEADS, S, 1))), 3)

    op = result(graph_of(with_sinks, keeps=lambda x: s.Slice(x, 3, 0, S)), S=7)
    assert isinstance(op, Attention) and op.sinks is not None and op.bias is not None and op.slopes is None


@pytest.mark.parametrize("number", [0.0, 1.5])
@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (S, S)])
def test_a_number_for_all_keys_counts_beside_sinks(number: float, queries: Size, keys: Size) -> None:
    column = c(np.reshape([0.5, -1.0, 2.0], (1, HEADS, 1, 1)), "f32")

    def with_sinks(x: Value) -> Value:
        scores = e.Add(x, s.Broadcast(c([[number]]), (queries, keys)))
        return s.Concat((scores, s.Broadcast(column, (1, HEADS, queries, 1))), 3)

    op = result(graph_of(with_sinks, queries, keys, keeps=lambda x: s.Slice(x, 3, 0, keys)), S=7)
    assert isinstance(op, Attention) and op.sinks is not None and (op.bias is None) == (number == 0)


def test_a_factor_of_queries_is_moved_to_their_products() -> None:
    """Products of [batch * heads]; scores and their factor over a batch; and factors of other dtypes, which stay."""
    factor = Input("factor", Tensor((1, 1, 5, 1), "f32"))

    def steps(x: Value) -> Value:
        return s.Reshape(e.Mul(s.Reshape(x, (2, 3, 5, 7)), factor), (6, 5, 7))

    op = result(graph_of(steps, 5, 7, False, factor, leading=(6,)))
    assert isinstance(op, Attention) and op.bias is None

    q, k, v = (Input(name, Tensor((6, rows, DIM), "f32")) for name, rows in zip("qkv", (5, 7, 7), strict=True))
    scores = e.Mul(s.Reshape(s.Matmul(q, s.Transpose(k, (0, 2, 1))), (2, 3, 5, 7)), factor)
    shares = s.Reshape(s.Softmax(scores, 3), (6, 5, 7))
    op = result(Graph("g", (q, k, v, factor), (("out", s.Matmul(shares, v)),)))
    assert isinstance(op, Attention) and op.bias is None

    for shape in ((HEADS, 1, 1), (2, 1, 1, 1), (2, 1, 5, 1)):
        other = Input("other", Tensor(shape, "f32"))
        op = result(graph_of(lambda x: e.Mul(x, other), 5, 7, False, other, leading=(2, HEADS)))  # noqa: B023
        assert isinstance(op, Attention) and op.bias is None

    def wide(x: Value) -> Value:
        return e.Mul(e.Cast(x, "f64"), e.Cast(factor, "f64"))

    found = result(graph_of(wide, 5, 7, False, factor, keeps=lambda x: e.Cast(x, "f32")))
    assert found == "its scale differs from place to place: it is a tensor<[1, 1, 5, 1], f64>"
