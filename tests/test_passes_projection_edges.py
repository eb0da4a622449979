"""merge-projections and split-projections: slices that are almost halves, or almost parts within heads, and dtypes."""

from __future__ import annotations

import pytest
from pass_harness import S, graph_of, param, run_checked, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import GatedLinear, Linear
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.passes.manager import Report

WIDTH = 6


def linear(outputs: int, *rows: object, name: str = "w", **more: object) -> Linear:
    """A projection of [*rows, WIDTH]; of [S, WIDTH] where no rows are given."""
    value = x(*(rows or (S,)), WIDTH, name="x")
    return Linear(value, param(f"{name}{outputs}", outputs, WIDTH, dtype="f32"), **more)  # type: ignore[arg-type]


def run(pipeline: str, *outputs: Value) -> tuple[Graph, Report]:
    after, (report,) = run_checked(graph_of(*outputs), pipeline, tolerance=1e-12)
    return after, report


def of(kind: type[Op], graph: Graph) -> list[Op]:
    return [op for op in graph.ops if isinstance(op, kind)]


def gated(whole: Value, gate: tuple[int, ...], up: tuple[int, ...]) -> Value:
    """silu(slice) * slice of one value; a slice is (axis, start, stop) or (axis, start, stop, step)."""
    return e.Mul(e.Activation(s.Slice(whole, *gate), "silu"), s.Slice(whole, *up))


HALVES: dict[str, tuple[Value, bool]] = {
    "of a matrix": (gated(linear(8), (1, 0, 4), (1, 4, 8)), True),
    "of three axes": (gated(linear(8, 1, S), (2, 0, 4), (2, 4, 8)), True),
    "of three axes, the other way": (gated(linear(8, 1, S), (-1, 4, 8), (2, 0, 4)), True),
    "of rows": (gated(linear(8, 8), (0, 0, 4), (0, 4, 8)), False),
    "of rows of three axes": (gated(linear(8, 1, 8), (1, 0, 4), (1, 4, 8)), False),
    "of columns and of rows": (gated(linear(2, 2), (1, 0, 1), (0, 1, 2)), False),
    "of rows and of columns": (gated(linear(2, 2), (0, 0, 1), (1, 1, 2)), False),
    "with a gap": (gated(linear(4), (1, 0, 2), (1, 3, 4)), False),
    "every second of both": (gated(linear(8), (1, 0, 4, 2), (1, 4, 8, 2)), False),
    "every second of the gate": (gated(linear(4), (1, 0, 2, 2), (1, 2, 4)), False),
    "every second of the other": (gated(linear(4), (1, 0, 2), (1, 2, 4, 2)), False),
}  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
def test_halves_of_the_outputs_and_nothing_else_are_gate_and_up(name: str) -> None:
    value, known = HALVES[name]
    after, report = run("merge-projections{qkv=false}", value)
    assert (len(of(GatedLinear, after)), len(of(Linear, after))) == ((1, 0) if known else (0, 1))
    assert report.hits == ({"gate and up in one weight": 1} if known else {}) and not report.refusals


def test_a_weight_with_the_gate_in_front_is_taken_as_it_is() -> None:
    after, _ = run("merge-projections", gated(linear(8), (1, 0, 4), (1, 4, 8)))
    (found,) = of(GatedLinear, after)
    assert isinstance(found, GatedLinear) and isinstance(found.w, Param)


def test_an_activated_product_times_what_is_no_product_stays() -> None:
    own = x(S, WIDTH, name="x")
    for value in (
        e.Mul(e.Activation(linear(WIDTH), "silu"), e.Abs(own)),
        e.Mul(e.Activation(own, "silu"), linear(WIDTH)),
    ):
        after, report = run("merge-projections", value)
        assert not report.hits and not report.refusals and len(of(Linear, after)) == 1


def test_weights_of_one_dtype_keep_it() -> None:
    def half(name: str, dtype: str) -> Linear:
        weight = param(name, 4, WIDTH, dtype=dtype)
        return Linear(x(S, WIDTH), weight if dtype == "f32" else weight.operands[0])  # type: ignore[attr-defined]

    for dtypes, expected in (
        (("bf16", "bf16"), "bf16"), (("f64", "f64"), "f64"), (("bf16", "f16"), "f32"), (("f64", "f16"), "f32"),
        (("f32", "f64"), "f32"),
    ):  # fmt: skip
        after, _ = run("merge-projections", *(half(f"{dtype}{i}", dtype) for i, dtype in enumerate(dtypes)))
        (found,) = of(Linear, after)
        assert isinstance(found, Linear) and found.w.dtype == expected


def test_a_projection_without_siblings_is_not_refused() -> None:
    after, report = run("merge-projections", linear(4, residual=x(S, 4, name="r")))
    assert len(of(Linear, after)) == 1 and report.refusals == []


THREE = s.Reshape(linear(24, 1, S), (1, S, 4, 3, 2))
WIDE = s.Reshape(linear(80), (S, 2, 40))
SPLIT: dict[str, tuple[Value, int]] = {  # and how many linears are left; 0: it stays
    "of three axes": (s.Slice(THREE, 3, 1, 2), 1),
    "rows that were put together": (s.Slice(s.Reshape(linear(12, 4), (2, 2, 12)), 2, 0, 6), 0),
    "as many channels as tokens": (s.Slice(WIDE, 2, 0, S), 0),
    "the channels behind as many as tokens": (s.Slice(WIDE, 2, S - 2, 40), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_parts_of_known_size_within_heads_become_projections(name: str) -> None:
    value, count = SPLIT[name]
    after, report = run("split-projections", value)
    assert report.hits == ({"projection": count} if count else {})
    assert len([op for op in of(s.Slice, after) if op not in after.constants]) == (0 if count else 1)
