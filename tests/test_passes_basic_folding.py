"""fold, cse and what passes share: constants as their author saw them, vectors under shapes, uses that are counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pass_harness import S, c, graph_of, names, param, run_checked, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.cse import CSE
from llmc.compiler.passes.fold import Fold
from llmc.compiler.passes.manager import PASSES, Pass, Report, parse_pipeline, run_passes
from llmc.compiler.passes.rewriting import (
    Uses,
    is_number,
    rebuild,
    rewrite_counting,
    shaped,
    transposed,
    uncast,
    vector_of,
)
from llmc.errors import CompileError

X = x(4, 6, name="rows")


def folded(value: Value, limit: int = 65536) -> np.ndarray | None:
    """What a value is folded to; None where it stays."""
    after = Fold(limit).run(Graph("g", (), (("y", value),)), Report())
    found = after.output("y")
    return np.asarray(found.value.array) if isinstance(found, e.Constant) else None


# 8 log(2) / log(16) is 2 in f32, and less in f64 with the f32 of log(16).
TWO = e.Mul(e.Div(e.Log(c(2)), e.constant(np.log(np.float32(16)), "f32")), c(8))
THIRD = e.Div(c(1), c(3))
FOLDED: dict[str, tuple[Value, float]] = {
    "a cast to whole numbers": (e.Cast(TWO, "i64"), 2),
    "a cast to bytes": (e.Cast(TWO, "u8"), 2),
    "a floor": (e.Floor(TWO), 2),
    "a whole quotient": (e.FloorDivide(e.Mul(TWO, c(3)), c(2)), 3),
    "a rounding": (e.Round(e.Add(TWO, c(0.5))), 2),
    "a cast to truths": (e.Cast(e.Sub(TWO, c(2)), "bool"), False),
    "a whole quotient of whole numbers": (e.FloorDivide(e.constant(-7), e.constant(2)), -4),
    "a cast of whole numbers": (e.Cast(e.constant(2**40 + 1, "i64"), "i32"), 1),
    "a quotient, in f64": (THIRD, 1 / 3),
    "a number that was rounded to bf16": (e.Cast(e.Cast(THIRD, "bf16"), "f32"), 0.333984375),
    "a number that was rounded to f16": (e.Cast(e.Cast(THIRD, "f16"), "f32"), 0.333251953125),
    "what comes of a rounded number": (e.Mul(e.Cast(e.Cast(THIRD, "bf16"), "f32"), THIRD), float(
        np.float32(0.333984375) * np.float32(1 / 3)
    )),
    "a number that was cast to f64": (e.Cast(THIRD, "f64"), 1 / 3),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_in_f64_but_where_the_source_s_dtypes_decide(name: str) -> None:
    value, expected = FOLDED[name]
    found = folded(value)
    assert found is not None and float(found) == float(expected)


def test_no_more_than_the_limit_is_folded() -> None:
    table = e.Sin(e.Cast(s.Iota(6), "f32"))
    assert folded(table, 6) is not None and folded(table, 5) is None
    pairs = e.Mul(s.Reshape(table, (6, 1)), s.Reshape(table, (1, 6)))
    assert folded(pairs, 36) is not None and folded(pairs, 35) is None
    assert folded(Linear(s.Reshape(table, (1, 6)), e.constant(np.ones((2, 6)), "f32"))) is None  # no t-level op
    for size, stays in ((1 << 16, False), ((1 << 16) + 1, True)):
        graph = Graph("g", (), (("y", e.Neg(s.Iota(size))),))
        assert (Fold().run(graph, Report()) is graph) == stays
    assert folded(s.Iota(6)) is None and folded(s.Broadcast(c(1), (6,))) is None
    assert folded(e.Neg(s.Broadcast(c(1), (6,)))) is not None


def test_what_only_folded_values_need_is_no_constant_of_its_own() -> None:
    inner = e.Add(e.constant([1.0, 2.0], "f32"), c(1))
    outer = e.Mul(inner, c(3))
    after, (report,) = run_checked(graph_of(e.Mul(x(2, name="pair"), outer)), "fold", tolerance=0)
    assert report.hits == {"constant": 1} and names(after) == ["t.mul"]
    after, (report,) = run_checked(graph_of(e.Mul(x(2, name="pair"), outer), inner), "fold", tolerance=0)
    assert report.hits == {"constant": 2} and names(after) == ["t.mul"]
    free = graph_of(e.Add(x(S, name="free"), s.Broadcast(c(1), (S,))))
    assert Fold().run(free, Report()) is free


# cse


def test_params_of_one_name_and_two_types_stay_two() -> None:
    one, other = Param("w", Tensor((6,), "f32")), Param("w", Tensor((6,), "bf16"))
    report = Report()
    after = CSE().run(Graph("g", (X,), (("y", e.Add(e.Add(X, one), e.Cast(other, "f32"))),)), report)  # type: ignore[arg-type]
    assert len(after.params) == 2 and not report.hits


def test_a_list_of_operands_is_compared_item_by_item() -> None:
    negated = e.Neg(X)
    pairs = [s.Concat((X, negated), 0), s.Concat((X, negated), 0), s.Concat((negated, X), 0), s.Concat((X, negated), 1)]
    after, (report,) = run_checked(graph_of(*pairs[:3], s.Transpose(pairs[3], (1, 0))), "cse", tolerance=0)
    assert report.hits == {"t.concat": 1} and len(names(after)) == 5


def test_numbers_that_compare_equal_are_told_apart() -> None:
    zeros = [s.Pad(X, (0, 0), (1, 0), 0.0), s.Pad(X, (0, 0), (1, 0), -0.0), s.Pad(X, (0, 0), (1, 0), 0.0)]
    after = CSE().run(graph_of(*zeros), report := Report())
    assert report.hits == {"t.pad": 1}
    assert after.output("out0") is after.output("out2") and after.output("out0") is not after.output("out1")


# What passes share

W, HALF = param("w", 6, dtype="f32"), param("h", 6)  # HALF is bf16, widened
VECTORS: dict[str, tuple[Value, str | None]] = {
    "a vector": (W, "w"),
    "a widened vector": (HALF, "h"),
    "a row": (s.Reshape(W, (1, 1, 6)), "w"),
    "spread over rows": (s.Broadcast(W, (1, 6)), "w"),
    "widened under a row": (s.Reshape(HALF, (1, 6)), "h"),
    "stored as a row": (param("row", 1, 6, dtype="f32"), "row"),
    "spread over several rows": (s.Broadcast(W, (3, 6)), "w"),
    "a row over several rows": (s.Broadcast(s.Reshape(W, (1, 6)), (3, 6)), "w"),
    "several rows": (param("rows", 3, 6, dtype="f32"), None),
    "a column": (s.Reshape(W, (6, 1)), None),
    "a matrix as a vector": (s.Reshape(param("m", 2, 3, dtype="f32"), (6,)), "m"),
    "a widened row as a vector": (s.Reshape(param("wide row", 1, 6), (6,)), "wide row"),
    "one element": (s.Reshape(param("single", 1, dtype="f32"), ()), None),
    "a free number of rows": (x(symbol("N", 1, 4), 6, name="free"), None),
    "a number": (c(2), None),
    "one number spread": (s.Broadcast(param("one", 1, dtype="f32"), (6,)), "one"),
    "a number spread": (s.Broadcast(c(2), (6,)), ""),
    "five": (param("five", 5, dtype="f32"), None),
    "rounded": (e.Cast(W, "bf16"), "w"),
    "several rows spread": (s.Broadcast(param("rows", 3, 6, dtype="f32"), (2, 3, 6)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_is_seen_under_shapes_and_casts(name: str) -> None:
    value, source = VECTORS[name]
    found = vector_of(value, 6)
    if source is None:
        assert found is None
        return
    assert found is not None and found.shape == (6,)
    assert [p.name for p in graph_of(found).params] == ([source] if source else [])
    assert found.dtype == (
        "bf16" if name in ("a widened vector", "widened under a row", "a widened row as a vector", "rounded") else "f32"
    )


def test_casts_that_lose_nothing_are_seen_through() -> None:
    base = Param("h", Tensor((2, 6), "bf16"))
    wide = e.Cast(e.Cast(base, "f32"), "f64")
    assert uncast(wide) is base and uncast(e.Cast(base, "f16")).dtype == "f16"
    assert uncast(e.Cast(x(6, name="n", dtype="i8"), "f32")).dtype == "f32"
    assert transposed(e.Cast(s.Transpose(e.Cast(base, "f32"), (1, 0)), "f64")) is base
    turned = transposed(e.Cast(s.Transpose(e.Cast(base, "f32"), (0, 1)), "f64"))
    assert isinstance(turned, s.Transpose) and turned.permutation == (1, 0) and turned.shape == (6, 2)
    assert shaped(X, (4, 6)) is X and isinstance(shaped(W, (4, 6)), s.Broadcast)


def test_a_number_is_another_from_a_millionth_on() -> None:
    assert is_number(c(0.1), 0.1) and is_number(s.Broadcast(c(3.000001), (6,)), 3) and is_number(c(-2), -2)
    assert not is_number(c(3.00001), 3) and not is_number(c(2), -2) and not is_number(X, 0) and is_number(c(0), 0)
    assert not is_number(c(1e-9), 0)


def test_uses_are_those_of_what_a_value_has_become() -> None:
    """Two negations become one: the uses of either count, and an output is a use."""
    first, second = e.Neg(X), e.Neg(X)
    graph = graph_of(e.Abs(first), e.Exp(second), e.Sin(first), second)
    kept: dict[str, Op] = {}
    seen: dict[str, int] = {}

    def rule(op: Op, uses: Uses) -> Value | None:
        if isinstance(op, e.Neg):
            return kept.setdefault("neg", op)
        seen[op.name] = uses(op.operands[0])
        return None

    after = rewrite_counting(graph, rule)
    assert len([op for op in after.ops if isinstance(op, e.Neg)]) == 1
    assert max(seen.values()) == 4 and min(seen.values()) >= 2


def test_uses_are_counted_one_by_one() -> None:
    """Two outputs, two ops that read what takes the place of another op, and a value that is new."""
    twice, read = e.Neg(X), e.Exp(X)
    graph = Graph("g", (X,), (("a", twice), ("b", twice), ("c", e.Sin(read)), ("d", e.Cos(read))))  # type: ignore[arg-type]
    seen: dict[str, int] = {}

    def rule(op: Op, uses: Uses) -> Value | None:
        seen[op.name] = uses(op if isinstance(op, e.Neg) else op.operands[0])
        seen["new"] = uses(c(3))
        return e.Abs(X) if isinstance(op, e.Exp) else None

    rewrite_counting(graph, rule)
    assert seen == {"t.neg": 2, "t.exp": 2, "t.sin": 2, "t.cos": 2, "new": 0}


def test_what_depends_on_weights_alone_is_offered_to_no_rule() -> None:
    offered: list[str] = []
    graph = graph_of(e.Mul(X, e.Exp(W)))
    assert rewrite_counting(graph, lambda op, uses: offered.append(op.name)) is graph
    assert offered == ["t.mul"]


def test_a_graph_in_which_nothing_changes_is_the_same_graph() -> None:
    graph = graph_of(e.Abs(e.Neg(X)))
    assert rebuild(graph, lambda op, renewed: None) is graph
    after = rebuild(graph, lambda op, renewed: e.Exp(renewed(op.x)) if isinstance(op, e.Neg) else None)
    assert names(after) == ["t.exp", "t.abs"]
    # What is written over values of the old graph is of the new one.
    after = rebuild(graph, lambda op, renewed: e.Sin(X) if isinstance(op, e.Neg) else renewed(e.Exp(op.operands[0])))
    assert names(after) == ["t.sin", "t.exp"]


# Pipelines as text

TEXTS: dict[str, str] = {  # and what is printed of them
    "cse": "cse",
    " cse , fold ": "cse,fold",
    "fold{limit=7}": "fold{limit=7}",
    "fold{ limit = 65536 }": "fold",
    "fuse-epilogues{bias=false,residual=true},cse": "fuse-epilogues{bias=false},cse",
    "quantize{scheme=int8,group_size=32,search=false}": "quantize{scheme=int8,group-size=32,search=false}",
    "flatten-tokens{max-step=9,sequences=true}": "flatten-tokens{max-step=9,sequences=true}",
    "": "",
    ",cse,,": "cse",
    "cse{}": "cse",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_pipeline_is_read_and_printed(text: str) -> None:
    printed = ",".join(str(item) for item in parse_pipeline(text))
    assert printed == TEXTS[text] and parse_pipeline(printed) == parse_pipeline(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cse,bogus{x=1}", f"unknown pass 'bogus'; known: {', '.join(sorted(PASSES))}"),
        ("cse{limit=1}", "pass cse has no option 'limit'; it has: none"),
        ("fuse-epilogues{ more =1}", "pass fuse-epilogues has no option 'more'; it has: bias, activation, residual"),
        ("fuse-epilogues{bias=yes}", "expected true or false, found 'yes'"),
    ],
)
def test_a_pipeline_that_is_none_says_why(text: str, message: str) -> None:
    with pytest.raises(CompileError) as error:
        parse_pipeline(text)
    assert str(error.value) == message


def test_what_a_pass_did_is_told_in_order() -> None:
    graph, seen = graph_of(e.Add(e.Neg(X), e.Neg(X))), []
    after, reports = run_passes(
        graph,
        parse_pipeline("cse,fold"),
        [lambda item, before, result, report: seen.append((str(item), len(before.ops), len(result.ops), report.name))],
    )
    assert seen == [("cse", 3, 2, "cse"), ("fold", 2, 2, "fold")]
    assert [(r.name, r.ops_before, r.ops_after, dict(r.hits)) for r in reports] == [
        ("cse", 3, 2, {"t.neg": 1}), ("fold", 2, 2, {}),
    ]  # fmt: skip
    report = Report()
    report.refuse(after.ops[0], "why")
    report.refuse("what", "why")
    assert report.refusals == [("t.neg : tensor<[4, 6], f32>", "why"), ("what", "why")]
    with pytest.raises(CompileError, match="has no body"):
        Pass().run(graph, report)


# The manager


def test_a_report_begins_with_nothing() -> None:
    assert Report() == Report("", Counter(), [], 0.0, 0, 0)


def test_a_pass_that_is_exact_moves_nothing() -> None:
    assert Pass.moves == 0.0 and all(cls.moves == 0.0 for cls in PASSES.values() if cls.exact)


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    class Breaks(Pass):
        def run(self, graph: Graph, report: Report) -> Graph:
            return Graph("g", (), graph.outputs)

    with pytest.raises(CompileError, match=r"^pass .* broke the graph: t\.abs uses input rows"):
        run_passes(graph_of(e.Abs(X)), [Breaks()])
