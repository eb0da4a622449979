"""fuse-linear and fuse-embed: every spelling of a product with a weight or a look-up, and what is refused."""

from __future__ import annotations

import pytest
from pass_harness import S, c, graph_of, names, param, run_checked, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import llm
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Param, Value
from llmc.compiler.passes.manager import Report

LINEAR = "canonicalize,cse,fuse-linear,canonicalize"
EMBED = "canonicalize,cse,fuse-embed"
SIZES = [(1, 1), (7, 31), (33, 1), (31, 129)]  # outputs, inputs


def linear_of(value: Value) -> tuple[llm.Linear, Report]:
    """The one linear op that the product becomes, and the pass's report."""
    after, reports = run_checked(graph_of(value), LINEAR, tolerance=1e-12)
    found = [op for op in after.ops if isinstance(op, llm.Linear)]
    assert len(found) == 1, after
    return found[0], reports[2]


def transposed(w: Value) -> Value:
    return s.Transpose(w, (1, 0))


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_torch_linear_takes_the_param_itself(n: int, k: int, dtype: str) -> None:
    op, _ = linear_of(s.Matmul(x(1, S, k), transposed(param("w", n, k, dtype=dtype))))
    assert isinstance(op.w, Param) and op.w.type == op.w.tensor and op.w.dtype == dtype
    assert op.shape == (1, S, n)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_weight_of_inputs_by_outputs_is_transposed_when_compiling(n: int, k: int) -> None:
    after, _ = run_checked(graph_of(s.Matmul(x(S, k), param("w", k, n))), LINEAR)
    (op,) = (op for op in after.ops if isinstance(op, llm.Linear))
    assert op.w in after.constants and op.w.shape == (n, k) and op.w.dtype == "bf16"


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_addmm_on_flattened_tokens_loses_its_reshapes(n: int, k: int) -> None:
    flat = s.Reshape(x(1, S, k), (S, k))
    value = s.Reshape(e.Add(param("b", n), s.Matmul(flat, param("w", k, n))), (1, S, n))
    after, _ = run_checked(graph_of(value), LINEAR)
    assert [name for name in names(after) if after.output("out0").level == "llm"][-1] == "llm.linear"
    op = after.output("out0")
    assert isinstance(op, llm.Linear) and isinstance(op.bias, Param) and op.shape == (1, S, n)
    assert not any(isinstance(o, s.Reshape) and o not in after.constants for o in after.ops)


def test_a_bias_of_any_rank_is_absorbed() -> None:
    y = s.Matmul(x(), transposed(param("w", 7, 6)))
    for bias in (param("b", 7), s.Reshape(param("b", 7), (1, 1, 7)), s.Broadcast(param("b", 7), (1, S, 7))):
        op, report = linear_of(e.Add(bias, y))
        assert isinstance(op.bias, Param) and report.hits["bias"] == 1


def test_a_batched_weight_of_one_matrix_is_a_matrix() -> None:
    weight = s.Broadcast(s.Reshape(param("w", 6, 7), (1, 6, 7)), (1, 6, 7))
    op, _ = linear_of(s.Matmul(x(), weight))
    assert op.w.shape == (7, 6)


@pytest.mark.parametrize(
    "weight",
    [
        s.Broadcast(param("w", 1, 6, 7), (4, 6, 7)),
        s.Broadcast(s.Reshape(param("w", 6, 7), (1, 6, 7)), (4, 6, 7)),
        s.Broadcast(s.Broadcast(param("w", 6, 7), (1, 6, 7)), (4, 6, 7)),
        s.Reshape(param("w", 3, 14), (1, 6, 7)),
        s.Reshape(param("w", 42), (1, 6, 7)),
        s.Reshape(s.Broadcast(param("w", 6, 7), (4, 6, 7)), (2, 2, 6, 7)),
        s.Reshape(s.Broadcast(param("w", 6, 7), (4, 6, 7)), (4, 1, 6, 7)),
    ],
    ids=str,
)
def test_one_matrix_for_all_of_a_batch_is_a_matrix(weight: Value) -> None:
    product = s.Matmul(x(*weight.shape[:-2], 5, 6), weight)
    after, _ = run_checked(graph_of(product), "fuse-linear", tolerance=1e-12)
    op = after.output("out0")
    assert isinstance(op, llm.Linear) and op.w.shape == (7, 6)


@pytest.mark.parametrize(
    "weight",
    [
        s.Reshape(param("w", 4, 6, 7), (2, 2, 6, 7)),
        s.Broadcast(param("w", 2, 1, 6, 7), (2, 2, 6, 7)),
        s.Reshape(param("w", 2, 12, 7), (2, 2, 6, 7)),
        s.Broadcast(param("w", 1, 7), (2, 2, 6, 7)),
        param("w", 0, 6, 7),
    ],
    ids=str,
)
def test_other_matrices_for_parts_of_a_batch_stay(weight: Value) -> None:
    product = s.Matmul(x(*weight.shape[:-2], 5, 6), weight)
    after, (report,) = run_checked(graph_of(product), "fuse-linear")
    assert "t.matmul" in names(after) and "one matrix a batch element" in report.refusals[0][1]


def test_a_part_of_a_weight_is_a_weight() -> None:
    """GPT-2 cuts its q, k and v from one matrix."""
    op, _ = linear_of(s.Matmul(x(), transposed(s.Slice(param("w", 12, 6), 0, 3, 10))))
    assert isinstance(op.w, s.Slice) and op.w.dtype == "bf16" and op.w.shape == (7, 6)


def test_a_weight_on_the_left_is_a_linear_on_its_side() -> None:
    op, report = linear_of(s.Matmul(param("w", 7, 6), transposed(x(S, 6))))
    assert op.shape == (S, 7) and report.hits["linear-transposed"] == 1


def test_a_bias_meets_one_row_of_outputs() -> None:
    row = llm.Linear(x(6, name="row"), param("w", 7, 6))
    after, _ = run_checked(graph_of(e.Add(s.Reshape(row, (1, 7)), param("b", 7))), "fuse-linear", tolerance=1e-12)
    op = after.output("out0")
    assert isinstance(op, s.Reshape) and isinstance(op.x, llm.Linear) and op.x.bias is not None


def test_a_number_is_no_row_of_outputs() -> None:
    """It has no last axis; what it is made of may have one."""
    number = param("b", dtype="f32")
    for value in (x(1, 1), s.Matmul(x(1, 6), param("w", 6, 1)), s.Reshape(x(1), (1, 1))):
        scalar = s.Reshape(value, ())
        after, _ = run_checked(graph_of(e.Add(scalar, number)), "fuse-linear", tolerance=1e-12)
        assert isinstance(after.output("out0"), e.Add)


def test_a_rounded_weight_keeps_its_rounding() -> None:
    rounded = e.Cast(e.Cast(param("w", 7, 6, dtype="f32"), "bf16"), "f32")
    op, _ = linear_of(s.Matmul(x(), transposed(rounded)))
    assert isinstance(op.w, e.Cast) and op.w.to == "bf16"


def test_a_bias_is_left_where_the_bare_product_is_used_too() -> None:
    y = s.Matmul(x(), transposed(param("w", 6, 6)))
    op, report = linear_of(e.Mul(e.Add(y, param("b", 6)), y))
    assert op.bias is None
    assert report.refusals[0][1] == "the product is also used without its bias"


def test_a_second_bias_stays_outside() -> None:
    y = e.Add(s.Matmul(x(), transposed(param("w", 6, 6))), param("b", 6))
    op, report = linear_of(e.Add(y, param("other", 6)))
    assert isinstance(op.bias, Param) and op.bias.name == "b" and report.hits["bias"] == 1


def test_a_residual_and_a_number_are_no_bias() -> None:
    y = s.Matmul(x(), transposed(param("w", 6, 6)))
    assert linear_of(e.Add(y, x()))[0].bias is None
    op, report = linear_of(e.Add(y, c(2)))
    assert op.bias is None and not report.refusals
    op, report = linear_of(e.Add(y, param("b", 1, 1, 6)))
    assert op.bias is not None
    op, report = linear_of(e.Add(s.Matmul(x(3, 6), transposed(param("w", 6, 6))), param("b", 3, 6)))
    assert op.bias is None and "no vector of 6 outputs" in report.refusals[0][1]


REFUSED: list[tuple[Value, str]] = [
    (s.Matmul(x(3, S, 6), param("w", 3, 6, 7)), "one matrix a batch element"),
    (s.Matmul(x(S, 6, dtype="i64"), e.constant([[1] * 2] * 6, "i64")), "not of floats"),
    (s.Matmul(x(S, 6), param("w", 1, 6, 7)), "the weight of [1, 6, 7] repeats the activations of [S, 6]"),
    (
        s.Matmul(x(1, 5, 6), s.Broadcast(param("w", 6, 7), (4, 6, 7))),
        "the weight of [4, 6, 7] repeats the activations of [1, 5, 6]",
    ),
    (
        s.Matmul(x(1, 4, 5, 6), s.Broadcast(param("w", 6, 7), (4, 1, 6, 7))),
        "the weight of [4, 1, 6, 7] repeats the activations of [1, 4, 5, 6]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("value", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_other_products_are_refused_with_a_reason(value: Value, reason: str) -> None:
    after, (report,) = run_checked(graph_of(value), "fuse-linear")
    assert "t.matmul" in names(after)
    assert reason in report.refusals[0][1]


def test_a_product_of_activations_or_of_weights_is_none() -> None:
    scores = s.Matmul(x(), s.Transpose(x(), (0, 2, 1)))
    weights = s.Matmul(param("a", 6, 7), param("b", 7, 8))
    for value in (scores, e.Add(x(1, S, 8), s.Reshape(s.Sum(weights, (0,)), (8,)))):
        after, (report,) = run_checked(graph_of(value), "fuse-linear")
        assert "t.matmul" in names(after) and not report.hits


IDS = x(1, S, name="ids", dtype="i32")


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("ids_dtype", ["i32", "i64"])
def test_a_look_up_in_a_table_is_an_embedding(dtype: str, ids_dtype: str) -> None:
    ids = IDS if ids_dtype == "i32" else e.Cast(IDS, "i64")
    after, (*_, report) = run_checked(graph_of(s.Gather(param("table", 33, 7, dtype=dtype), ids, 0)), EMBED)
    op = after.output("out0")
    assert isinstance(op, llm.Embed) and isinstance(op.table, Param) and op.dtype == "f32"
    assert report.hits == {"embed": 1}


def test_ids_are_taken_as_they_are_given() -> None:
    table = param("table", 33, 7, dtype="f32")
    after, _ = run_checked(graph_of(s.Gather(table, e.Cast(IDS, "i64"), 0)), "fuse-embed")
    assert names(after) == ["llm.embed"]
    narrowed = e.Cast(x(1, S, name="ids", dtype="i64"), "i32")  # large ones become other rows
    after, _ = run_checked(graph_of(s.Gather(table, narrowed, 0)), "fuse-embed")
    assert names(after) == ["t.cast", "llm.embed"]


def test_positions_with_an_offset_are_ids_as_well() -> None:
    """OPT's table starts at row 2."""
    positions = e.Add(x(1, S, name="positions", dtype="i32"), e.constant(2, "i32"))
    after, _ = run_checked(graph_of(e.Add(x(), s.Gather(param("table", 64, 6), positions, 0))), EMBED)
    assert "llm.embed" in names(after)


def test_look_ups_that_are_no_embedding_are_refused_or_left() -> None:
    ids = x(S, name="ids", dtype="i32")
    after, (report,) = run_checked(graph_of(s.Gather(param("table", 3, 33), ids, 1)), "fuse-embed")
    assert "t.gather" in names(after) and "not rows of a matrix" in report.refusals[0][1]
    after, (report,) = run_checked(graph_of(s.Gather(x(40, 6), ids, 0)), "fuse-embed")
    assert names(after) == ["t.gather"] and not report.refusals
    after, (report,) = run_checked(graph_of(s.Gather(param("table", 33, dtype="f32"), ids, 0)), "fuse-embed")
    assert names(after) == ["t.gather"] and "not rows of a matrix" in report.refusals[0][1]
    small = x(S, name="ids", dtype="u8")
    after, (report,) = run_checked(graph_of(s.Gather(param("table", 33, 7), small, 0)), "fuse-embed")
    assert "ids are u8" in report.refusals[0][1]
