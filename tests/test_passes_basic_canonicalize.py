"""canonicalize: each rule does what its name says, nothing changes what is computed, the result is a fixpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from pass_harness import S, c, graph_of, names, param, run_checked, x
from random_graphs import graphs

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import llm
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.passes.canonical_elementwise import ELEMENTWISE_RULES
from llmc.compiler.passes.canonical_structural import STRUCTURAL_RULES
from llmc.compiler.passes.canonicalize import Canonicalize, canonical
from llmc.compiler.passes.manager import Report
from llmc.errors import CompileError

X, Y = x(), x(name="y")
POSITIVE = e.Add(e.Mul(Y, Y), c(1))
INTS = x(1, S, 6, name="n", dtype="i64")
FLAG = e.Greater(X, Y)
HALF = x(1, S, 6, name="h", dtype="bf16")
HALF16 = x(1, S, 6, name="h16", dtype="f16")
E = e.Exp(X)
SHIFTED = e.Exp(e.Sub(X, s.Max(X, (-1,))))
ASKEW = e.Exp(e.Sub(X, s.Max(X, (1,))))  # the maximum is along another axis than the sum: it does not cancel
LONG = x(64, name="long")
QUERIES = x(1, S, 2, 6, name="q")


def i(value: int) -> e.Constant:
    return e.constant(value, "i64")


# rule: the ops it is offered, and the op at the root of what should come out.
CASES: list[tuple[str, Value, str]] = [
    ("cast_to_same", e.Cast(X, "f32"), "x"),
    ("cast_of_cast", e.Cast(e.Cast(HALF, "f32"), "bf16"), "h"),
    ("cast_of_cast", e.Cast(e.Cast(x(1, S, 6, name="k", dtype="i32"), "i64"), "i32"), "k"),
    ("cast_of_iota", e.Mul(e.Cast(s.Iota(S), "i32"), x(S, name="k", dtype="i32")), "t.mul"),
    ("strip_broadcast", e.Add(X, s.Broadcast(param("w", 6, dtype="f32"), (1, S, 6))), "t.add"),
    ("strip_broadcast", e.Where(FLAG, X, s.Broadcast(c(1), (1, S, 6))), "t.where"),
    ("constant_to_the_right", e.Add(c(2), X), "t.add"),
    ("constant_to_the_right", e.Less(c(2), X), "t.gt"),
    ("drop_neutral", e.Add(X, c(0)), "x"),
    ("drop_neutral", e.Mul(X, s.Broadcast(c(1), (1, S, 6))), "x"),
    ("drop_neutral", e.Div(x(6, name="v"), s.Broadcast(c(1), (3, 6))), "t.broadcast"),
    ("drop_neutral", e.Maximum(X, c(float("-inf"))), "x"),
    ("absorb", e.And(FLAG, e.constant(False)), "t.broadcast"),
    ("absorb", e.Mul(INTS, i(0)), "t.broadcast"),
    ("mean_from_sum", e.Div(s.Sum(X, (2,)), c(6)), "t.mean"),
    ("mean_from_sum", e.Mul(s.Sum(X, (2,)), c(1 / 6)), "t.mean"),
    ("subtract_from_zero", e.Sub(c(0), X), "t.neg"),
    ("subtract_constant", e.Sub(X, c(3)), "t.add"),
    ("subtract_constant", e.Sub(INTS, i(3)), "t.add"),
    ("add_constants", e.Add(e.Add(INTS, i(3)), i(4)), "t.add"),
    ("add_or_subtract_negated", e.Add(X, e.Neg(Y)), "t.sub"),
    ("add_or_subtract_negated", e.Add(e.Neg(X), Y), "t.sub"),
    ("add_or_subtract_negated", e.Sub(X, e.Neg(Y)), "t.add"),
    ("multiply_by_minus_one", e.Mul(X, c(-1)), "t.neg"),
    ("undo_twice", e.Neg(e.Neg(X)), "x"),
    ("undo_twice", e.Relu(e.Relu(X)), "t.relu"),
    ("power_by_constant", e.Pow(X, c(2)), "t.mul"),
    ("power_by_constant", e.Pow(X, c(3)), "t.mul"),
    ("power_by_constant", e.Pow(POSITIVE, c(0.5)), "t.sqrt"),
    ("power_by_constant", e.Pow(POSITIVE, c(-0.5)), "t.rsqrt"),
    ("power_by_constant", e.Pow(POSITIVE, c(-1)), "t.reciprocal"),
    ("power_by_constant", e.Pow(POSITIVE, c(-2)), "t.reciprocal"),
    ("power_by_constant", e.Pow(X, c(0)), "t.broadcast"),
    ("divide_by_power_of_two", e.Div(X, c(-8)), "t.mul"),
    ("logistic", e.Reciprocal(e.Add(c(1), e.Exp(e.Neg(X)))), "t.sigmoid"),
    ("logistic", e.Div(Y, e.Add(e.Exp(e.Neg(X)), c(1))), "t.mul"),
    ("divide_by_root_or_reciprocal", e.Div(X, e.Sqrt(POSITIVE)), "t.mul"),
    ("divide_by_root_or_reciprocal", e.Div(X, e.Rsqrt(POSITIVE)), "t.mul"),
    ("divide_by_root_or_reciprocal", e.Div(c(1), POSITIVE), "t.reciprocal"),
    ("multiply_by_reciprocal", e.Mul(X, e.Reciprocal(POSITIVE)), "t.div"),
    ("root_of_reciprocal", e.Reciprocal(e.Sqrt(POSITIVE)), "t.rsqrt"),
    ("root_of_reciprocal", e.Sqrt(e.Reciprocal(POSITIVE)), "t.rsqrt"),
    ("maximum_with_zero", e.Maximum(X, c(0)), "t.relu"),
    ("select_known", e.Where(e.constant(True), X, Y), "x"),
    ("select_known", e.Where(e.Not(FLAG), X, Y), "t.where"),
    ("select_known", e.Where(FLAG, X, X), "x"),
    ("softmax_from_exponentials", e.Div(E, s.Sum(E, (-1,))), "t.softmax"),
    ("softmax_from_exponentials", e.Div(SHIFTED, s.Sum(SHIFTED, (2,))), "t.softmax"),
    ("softmax_from_exponentials", e.Div(ASKEW, s.Sum(ASKEW, (2,))), "t.softmax"),
    ("normalize_reduction", s.Sum(X, (-1, 1)), "t.sum"),
    ("normalize_reduction", s.Sum(X, ()), "x"),
    ("reshape_to_same", s.Reshape(X, (1, S, 6)), "x"),
    ("reshape_of_reshape", s.Reshape(s.Reshape(X, (S, 6)), (S, 2, 3)), "t.reshape"),
    ("reshape_of_reduction", s.Reshape(s.Sum(X, (2,), False), (1, S, 1)), "t.sum"),
    ("reshape_of_reduction", s.Reshape(s.Sum(X, (2,)), (1, S)), "t.sum"),
    ("reshape_of_constant", e.Add(X, s.Reshape(e.constant([1.0, 2, 3, 4, 5, 6]), (1, 1, 6))), "t.add"),
    ("reshape_of_constant", s.Transpose(e.constant([[1.0, 2, 3]]), (1, 0)), "t.constant"),
    ("transpose_of_nothing", s.Transpose(X, (0, 1, 2)), "x"),
    ("transpose_of_nothing", s.Transpose(X, (1, 0, 2)), "t.reshape"),
    ("transpose_of_transpose", s.Transpose(s.Transpose(X, (2, 0, 1)), (1, 2, 0)), "x"),
    ("transpose_of_transpose", s.Transpose(s.Transpose(QUERIES, (0, 2, 3, 1)), (0, 1, 3, 2)), "t.transpose"),
    ("broadcast_of_nothing", s.Broadcast(X, (1, 1, S, 6)), "t.reshape"),
    ("broadcast_of_broadcast", s.Broadcast(s.Broadcast(X, (2, S, 6)), (3, 2, S, 6)), "t.broadcast"),
    ("broadcast_of_broadcast", s.Broadcast(s.Reshape(x(S, 6, name="m"), (1, S, 6)), (3, S, 6)), "t.broadcast"),
    ("slice_of_everything", s.Slice(X, 1, 0, S), "x"),
    ("slice_of_slice", s.Slice(s.Slice(X, 2, 1, 6), 2, 1, 4, 2), "t.slice"),
    ("slice_of_concat", s.Slice(s.Concat((X, Y), 2), 2, 7, 9), "t.slice"),
    ("slice_of_concat", s.Slice(s.Concat((X, Y), 1), 1, S, 2 * S), "y"),
    ("concat_of_one", s.Concat((X,), 1), "x"),
    ("concat_of_one", s.Concat((X, s.Slice(Y, 2, 3, 3)), 2), "x"),
    ("concat_of_concat", s.Concat((s.Concat((X, Y), 2), X), -1), "t.concat"),
    ("concat_of_slices", s.Concat((s.Slice(X, 2, 0, 2), s.Slice(X, 2, 2, 6)), 2), "x"),
    ("gather_of_one", s.Gather(LONG, i(-2), 0), "t.reshape"),
    ("gather_of_one", s.Gather(LONG, e.constant([3, 4, 5], "i64"), 0), "t.slice"),
    ("pad_by_nothing", s.Pad(X, (0, 0, 0), (0, 0, 0)), "x"),
    ("move_before_widening", s.Transpose(e.Cast(HALF, "f32"), (2, 0, 1)), "t.cast"),
    ("concat_before_widening", s.Concat((e.Cast(HALF, "f32"), e.Cast(HALF, "f32")), 1), "t.cast"),
    ("axis_from_the_front", s.Softmax(X, -1), "t.softmax"),
    ("norm_before_transpose", llm.RMSNorm(s.Transpose(QUERIES, (0, 2, 1, 3)), None, 1e-6), "t.transpose"),
]  # fmt: skip


def root(value: Value) -> str:
    return value.name if not isinstance(value, Op) else type(value).name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rule", "value", "expected"), CASES, ids=[f"{rule}-{n}" for n, (rule, _, _) in enumerate(CASES)]
)
def test_each_rule_fires_and_keeps_the_meaning(rule: str, value: Value, expected: str) -> None:
    after, (report,) = run_checked(graph_of(value), "canonicalize", tolerance=1e-12)
    assert report.hits[rule] >= 1, report.hits
    assert root(after.output("out0")) == expected


def test_every_rule_has_a_case() -> None:
    known = {rule.__name__ for _, rule in (*ELEMENTWISE_RULES, *STRUCTURAL_RULES)}
    assert known == {rule for rule, _, _ in CASES}


# What must stay as it is, and why.
KEPT: list[tuple[str, Value]] = [
    ("1/3 is not exact", e.Div(X, c(3))),
    ("dividing integers truncates", e.Div(INTS, i(4))),
    ("(-inf) ** 0.5 is inf, its root is not a number", e.Pow(X, c(0.5))),
    ("(-0) ** -0.5 is inf, the root's reciprocal -inf", e.Pow(e.Relu(X), c(-0.5))),
    ("a cast to bf16 rounds", e.Cast(e.Cast(X, "bf16"), "f32")),
    ("i64 does not fit in i32", e.Cast(e.Cast(INTS, "i32"), "f32")),
    ("the sum is over 6, not 5", e.Div(s.Sum(X, (2,)), c(5))),
    ("x + c and then + d rounds twice", e.Add(e.Add(X, c(0.1)), c(0.2))),
    ("exp(x) / sum over two axes is no softmax", e.Div(E, s.Sum(E, (1, 2)))),
    ("the slice reaches into both pieces", s.Slice(s.Concat((X, Y), 2), 2, 5, 8)),
    ("the slices do not meet", s.Concat((s.Slice(X, 2, 0, 2), s.Slice(X, 2, 3, 6)), 2)),
    ("the inner slice leaves some out", s.Slice(s.Slice(X, 2, 0, 6, 2), 2, 1, 3)),
    ("the slices leave some out", s.Concat((s.Slice(X, 2, 0, 2, 2), s.Slice(X, 2, 2, 6, 2)), 2)),
    ("two dtypes do not make one concat", s.Concat((e.Cast(HALF, "f32"), e.Cast(HALF16, "f32")), 1)),
    ("indices from the end are no range", s.Gather(LONG, e.constant([-1, 0, 1], "i64"), 0)),
    ("the slices change places", s.Concat((s.Slice(X, 2, 2, 6), s.Slice(X, 2, 0, 2)), 2)),
    ("the transpose moves S", s.Transpose(X, (0, 2, 1))),
    ("the norm is over the axis that moved", llm.RMSNorm(s.Transpose(QUERIES, (0, 1, 3, 2)), None, 1e-6)),
    ("the broadcast gives the sum its shape", e.Add(s.Broadcast(x(1, 1, 6, name="r"), (1, 3, 6)), c(1))),
]


@pytest.mark.parametrize(("why", "value"), KEPT, ids=[why for why, _ in KEPT])
def test_what_would_change_the_result_is_kept(why: str, value: Value) -> None:
    graph = graph_of(value)
    after, _ = run_checked(graph, "canonicalize")
    assert names(after) == names(graph), why


@given(graphs())
def test_random_graphs_mean_the_same_after_and_stay_so(graph: Graph) -> None:
    after, _ = run_checked(graph, "canonicalize", tolerance=1e-9)
    again, (report,) = run_checked(after, "canonicalize")
    assert again is after
    assert not report.hits


@given(graphs())
def test_random_graphs_mean_the_same_after_all_basic_passes(graph: Graph) -> None:
    pipeline = "canonicalize,fold,cse,canonicalize,fuse-linear,fuse-norm,fuse-activation,fuse-embed,cse"
    after, _ = run_checked(graph, pipeline)
    assert len(after.ops) <= 3 * len(graph.ops) + 3  # powers and broadcasts are spelled out, no more


def test_a_rule_that_changes_a_type_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import llmc.compiler.passes.canonicalize as module

    def wrong(op: Op) -> Value | None:
        return s.Reshape(op.operands[0], (S, 6)) if op.operands[0].rank == 3 else None

    monkeypatch.setitem(module._rules_of, e.Neg, (wrong,))
    with pytest.raises(CompileError, match="rule wrong turned"):
        canonical(e.Neg(X), Report())


def test_rules_that_undo_each_other_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import llmc.compiler.passes.canonicalize as module

    monkeypatch.setitem(module._rules_of, e.Neg, (lambda op: e.Abs(op.operands[0]),))
    monkeypatch.setitem(module._rules_of, e.Abs, (lambda op: e.Neg(op.operands[0]),))
    with pytest.raises(CompileError, match="two rules undo each other"):
        canonical(e.Neg(X), Report())


def _chain(steps: int, grow: Callable[[Value], Value]) -> Graph:
    value: Value = X
    for _ in range(steps):
        value = grow(value)
    return graph_of(value)


def test_the_work_is_linear_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in ops offered to the rules, not in seconds: twice the graph, twice the work."""
    import llmc.compiler.passes.canonicalize as module

    offered = 0

    def counting(op: Op, report: Report) -> Value:
        nonlocal offered
        offered += 1
        return canonical(op, report)

    monkeypatch.setattr(module, "canonical", counting)

    def grow(value: Value) -> Value:
        norm = e.Mul(value, e.Rsqrt(e.Add(s.Mean(e.Pow(value, c(2)), (-1,)), c(1e-5))))
        return e.Add(value, s.Reshape(s.Reshape(e.Div(norm, c(2)), (S, 6)), (1, S, 6)))

    work = []
    for steps in (100, 200):
        offered = 0
        Canonicalize().run(_chain(steps, grow), Report())
        work.append(offered)
    assert work[1] <= 2.1 * work[0]
