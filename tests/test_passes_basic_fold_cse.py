"""fold and cse: what is known is computed once, what is not known stays, and nothing is merged that differs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from pass_harness import S, c, graph_of, names, param, run_checked, x
from random_graphs import graphs

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Param, Value
from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Tensor, precise
from llmc.compiler.passes.manager import parse_pipeline, run_passes
from llmc.compiler.passes.rewriting import holds

X = x()


def frequencies(size: int = 3) -> Value:
    """1 / 10000^(2i / n), as models compute rotary frequencies."""
    exponents = e.Div(e.Cast(e.Mul(s.Iota(size), e.constant(2, "i64")), "f32"), c(2 * size))
    return e.Reciprocal(e.Pow(s.Broadcast(c(10000), (size,)), exponents))


def constants_of(graph: Graph) -> list[np.ndarray]:
    return [op.value.array for op in graph.ops if isinstance(op, e.Constant)]


def test_a_known_subgraph_becomes_one_constant() -> None:
    after, (report,) = run_checked(graph_of(e.Mul(x(S, 3), frequencies())), "fold", tolerance=1e-15)
    assert names(after) == ["t.mul"] and report.hits == {"constant": 1}
    np.testing.assert_allclose(constants_of(after)[0], 10000.0 ** (-np.arange(3) / 3), rtol=1e-15)


def test_weights_stay_symbolic() -> None:
    graph = graph_of(e.Add(X, e.Mul(param("w", 6), frequencies(6))))
    after, _ = run_checked(graph, "fold", tolerance=1e-15)
    assert names(after) == ["t.cast", "t.mul", "t.add"]
    assert [value.name for value in after.params] == ["w"]


def test_what_depends_on_a_symbolic_size_stays() -> None:
    positions = e.Cast(s.Iota(S), "f32")
    graph = graph_of(e.Mul(x(S), positions))
    after, _ = run_checked(graph, "fold")
    assert after is graph


def test_large_values_and_broadcasts_stay() -> None:
    wide = e.Sin(e.Cast(s.Iota(100), "f32"))
    graph = graph_of(e.Mul(x(S, 100), wide))
    assert run_checked(graph, "fold{limit=99}")[0] is graph
    assert names(run_checked(graph, "fold{limit=100}")[0]) == ["t.mul"]
    full = graph_of(e.Add(x(50, 60), s.Broadcast(c(2), (50, 60))))
    assert run_checked(full, "fold")[0] is full


def test_an_intended_rounding_to_bf16_is_kept() -> None:
    """1/3 in bf16 and not 1/3: models round their tables on purpose."""
    rounded = e.Cast(e.Cast(e.Div(c(1), c(3)), "bf16"), "f32")
    # f64 evaluation ignores roundings, so that the two differ by bf16's precision, and by no more.
    after, _ = run_checked(graph_of(e.Mul(X, rounded)), "fold", tolerance=2**-8)
    assert constants_of(after)[0] == 0.333984375


def test_a_known_output_is_folded_too() -> None:
    after, _ = run_checked(graph_of(e.Add(c(1), c(2))), "fold")
    assert names(after) == [] and constants_of(after)[0] == 3


def test_what_is_not_finite_folds_without_a_warning() -> None:
    after, _ = run_checked(graph_of(e.Add(X, e.Log(c(0)))), "fold")
    assert constants_of(after)[0] == -np.inf


@pytest.mark.parametrize("pipeline", ["fold", "cse"])
def test_a_second_run_changes_nothing(pipeline: str) -> None:
    value = e.Add(e.Mul(X, c(2)), e.Mul(X, e.Add(c(1), c(1))))
    once, _ = run_checked(graph_of(value), pipeline)
    assert run_checked(once, pipeline)[0] is once


@given(graphs())
def test_random_graphs_mean_the_same(graph: Graph) -> None:
    folded, _ = run_checked(graph, "fold", tolerance=1e-12)
    merged, _ = run_checked(folded, "cse", tolerance=1e-15)
    assert len(merged.ops) <= len(graph.ops)
    keys = [(type(op), op.operands, str(op.attributes())) for op in merged.ops if not isinstance(op, e.Constant)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("narrow", NUMPY_DTYPES)
@pytest.mark.parametrize("wide", NUMPY_DTYPES)
def test_a_cast_loses_nothing_where_it_is_said_to(wide: str, narrow: str) -> None:
    """Extremes, neighbours of powers of two and small values survive a round trip exactly when `holds` says so."""
    to, kind = NUMPY_DTYPES[wide], NUMPY_DTYPES[narrow]
    if narrow in FLOATS:
        info = ml_dtypes.finfo(kind)
        values = np.array([info.max, -info.max, info.tiny, 1 + float(info.eps), 1 / 3, 0.0]).astype(kind)
    elif narrow == "bool":
        values = np.array([False, True])
    else:
        limits = np.iinfo(kind)
        values = np.array([limits.min, limits.max, limits.max - 1, limits.max // 3], kind)
    with np.errstate(all="ignore"):
        again = values.astype(to).astype(kind)
        kept = np.array_equal(again, values) and np.array_equal(values.astype(to) < 0, values < 0)
    # A float that happens to hold an integer's extremes may still lack some of its other values.
    assert holds(wide, narrow) <= kept
    if narrow in FLOATS and wide in FLOATS:
        assert holds(wide, narrow) == kept


def test_equal_ops_become_one_through_several_levels() -> None:
    def twice() -> Value:
        return e.Tanh(e.Mul(X, c(2)))

    after, (report,) = run_checked(graph_of(e.Add(twice(), twice())), "cse", tolerance=0)
    assert names(after) == ["t.mul", "t.tanh", "t.add"]
    assert report.hits == {"t.constant": 1, "t.mul": 1, "t.tanh": 1}
    assert after.output("out0").operands[0] is after.output("out0").operands[1]  # type: ignore[attr-defined]


def test_operands_of_commutative_ops_may_change_places() -> None:
    y = x(name="y")
    assert names(run_checked(graph_of(e.Sub(e.Add(X, y), e.Add(y, X))), "cse")[0]) == ["t.add", "t.sub"]
    assert len(names(run_checked(graph_of(e.Sub(e.Sub(X, y), e.Sub(y, X))), "cse")[0])) == 3


def test_params_of_one_name_become_one() -> None:
    one, other = (Param("w", Tensor((6,), "f32")) for _ in range(2))
    after, (report,) = run_checked(graph_of(e.Add(e.Add(X, one), other)), "cse", tolerance=0)
    assert len(after.params) == 1 and report.hits == {"param": 1}


# Pairs that look alike and are not.
DIFFERENT: list[tuple[str, Value, Value]] = [
    ("attribute", s.Sum(X, (1,)), s.Sum(X, (2,))),
    ("keep", e.Add(s.Sum(x(6), (0,)), c(0)), e.Add(s.Sum(x(6), (0,), False), c(0))),
    ("dtype of a constant", e.constant(1, "i32"), e.constant(1, "i64")),
    ("sign of zero", c(0.0), c(-0.0)),
    ("sign of a padding of zero", s.Pad(X, (0,) * 3, (1,) * 3, 0.0), s.Pad(X, (0,) * 3, (1,) * 3, -0.0)),
    ("shape of a constant", e.constant([1.0]), e.constant(1.0)),
    ("operand order", s.Concat((X, c6 := s.Broadcast(c(1), (1, S, 6))), 1), s.Concat((c6, X), 1)),
]  # fmt: skip


@pytest.mark.parametrize(("what", "a", "b"), DIFFERENT, ids=[case[0] for case in DIFFERENT])
def test_what_differs_is_not_merged(what: str, a: Value, b: Value) -> None:
    graph = Graph("g", (X,), (("a", a), ("b", b)))
    from llmc.compiler.passes.cse import CSE
    from llmc.compiler.passes.manager import Report

    after = CSE().run(graph, Report())
    assert after.output("a") is not after.output("b"), what


def test_what_jumps_is_decided_in_the_dtype_that_its_author_saw() -> None:
    """A bucket of distances: 8 log(16 / 8) / log(16), which is 2 in f32, and less in f64 with the f32 of log(16)."""
    ratio = e.Div(e.Log(e.Div(e.Cast(s.Iota(17), "f32"), c(8.0))), e.constant(np.log(np.float32(16)), "f32"))
    graph = graph_of(e.Add(x(17, dtype="i64"), e.Cast(e.Mul(ratio, c(8.0)), "i64")))
    after, _ = run_passes(graph, parse_pipeline("fold"))
    assert constants_of(after)[0][16] == 2
    with precise():
        (found,) = evaluate(graph, {"x": np.zeros(17, np.int64)}, lambda name: np.zeros(0)).values()
    assert np.asarray(found)[16] == 1
