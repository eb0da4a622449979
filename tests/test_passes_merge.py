"""merge-projections and fuse-epilogues: the graph means the same before and after, and near-misses say why."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.ir.elementwise import Add
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import GatedLinear, Linear
from llmc.compiler.ir.op import Input, Param
from llmc.compiler.ir.structural import Transpose
from llmc.compiler.ir.text import parse
from llmc.compiler.ir.types import Tensor, precise
from llmc.compiler.ir.verify import verify
from llmc.compiler.passes.fuse_epilogues import FuseEpilogues
from llmc.compiler.passes.manager import Pass, Report, parse_pipeline, run_passes
from llmc.compiler.passes.merge_projections import MergeProjections

TOKENS, FEATURES = 3, 31
SHAPES = {
    "w1": "7, 31", "w2": "33, 31", "w3": "33, 31", "w4": "66, 31", "w5": "31, 33", "w6": "31, 31",
    "b1": "7", "b2": "33", "b3": "33", "b4": "66", "row": "1, 33", "one": "1",
}  # fmt: skip


def graph_of(body: str, outputs: str) -> Graph:
    """A graph over x, y [T, 31] and the params that the body mentions."""
    used = {name: shape for name, shape in SHAPES.items() if f"@{name}" in body}
    lines = ["graph @main {T in [1, 64]} (%x: tensor<[T, 31], f32>, %y: tensor<[T, 31], f32>) {"]
    lines += [f"  @{name}: tensor<[{shape}], f32>" for name, shape in used.items()]
    lines += [f"  {line.strip()}" for line in body.strip().splitlines()]
    return parse("\n".join([*lines, f"  return {outputs}", "}", ""]))


def run(graph: Graph) -> dict[str, np.ndarray]:
    """The graph in f64 on inputs and params that depend on their names and shapes only."""
    rng = np.random.default_rng(7)
    inputs = {value.name: rng.standard_normal((TOKENS, FEATURES)) for value in graph.inputs}
    shapes = {param.name: param.shape for param in graph.params}

    def load(name: str) -> np.ndarray:
        return np.random.default_rng(sum(name.encode())).standard_normal(shapes[name])

    with precise():
        return evaluate(graph, inputs, load)


def check(graph: Graph, item: Pass) -> tuple[Graph, Report]:
    """Run a pass: valid, means the same, and finds nothing more when it runs again."""
    after, [report] = run_passes(graph, [item])
    before_values, after_values = run(graph), run(after)
    assert before_values.keys() == after_values.keys()
    for name, expected in before_values.items():
        # Sums may be taken in another order: a few units in the last place of f64.
        np.testing.assert_allclose(after_values[name], expected, rtol=1e-12, atol=1e-12)
    again = Report()
    verify(item.run(after, again))
    assert not again.hits
    return after, report


def linears(graph: Graph) -> list[Linear | GatedLinear]:
    return [op for op in graph.ops if isinstance(op, (Linear, GatedLinear))]


def reasons(report: Report) -> str:
    return " | ".join(reason for _, reason in report.refusals)


QKV = """
%q = llm.linear(%x, @w2, none, none) : tensor<[T, 33], f32>
%k = llm.linear(%x, @w1, @b1, none) : tensor<[T, 7], f32>
%v = llm.linear(%x, @w3, none, none) : tensor<[T, 33], f32>
"""


def test_siblings_become_one_linear_and_slices() -> None:
    after, report = check(graph_of(QKV, "q = %q, k = %k, v = %v"), MergeProjections())
    [merged] = linears(after)
    assert merged.shape[-1] == 73
    assert merged.bias is not None  # zeros for the parts that have none
    assert report.hits == {"3 linears": 1}


def test_no_bias_is_made_where_no_part_has_one() -> None:
    after, _ = check(graph_of(QKV.replace("@b1", "none"), "q = %q, k = %k, v = %v"), MergeProjections())
    assert linears(after)[0].bias is None


def test_merging_can_be_turned_off() -> None:
    graph = graph_of(QKV, "q = %q, k = %k, v = %v")
    assert check(graph, MergeProjections(qkv=False))[0] is graph
    [item] = parse_pipeline("merge-projections{qkv=false,gate-up=false}")
    assert item == MergeProjections(qkv=False, gate_up=False)


def test_another_x_is_another_group() -> None:
    body = QKV + "%o = llm.linear(%y, @w6, none, none) : tensor<[T, 31], f32>\n"
    after, _ = check(graph_of(body, "q = %q, k = %k, v = %v, o = %o"), MergeProjections())
    assert len(linears(after)) == 2


def test_a_projection_that_an_activation_follows_stays_apart() -> None:
    """In a parallel block q, k, v and the MLP read one x; the MLP's activation can then still be fused into it."""
    body = (
        QKV
        + """
    %u = llm.linear(%x, @w4, @b4, none) : tensor<[T, 66], f32>
    %g = t.activation(%u) {kind = "gelu"} : tensor<[T, 66], f32>
    """
    )
    after, _ = check(graph_of(body, "q = %q, k = %k, v = %v, g = %g"), MergeProjections())
    assert sorted(op.shape[-1] for op in linears(after)) == [66, 73]
    fused, _ = check(after, FuseEpilogues())
    assert {op.activation for op in linears(fused)} == {"", "gelu"}


def test_parts_with_different_overrides_stay_apart() -> None:
    graph = graph_of(QKV, "q = %q, k = %k, v = %v")
    after, report = check(graph, MergeProjections(overrides="w1=int8"))
    assert sorted(op.shape[-1] for op in linears(after)) == [7, 66]
    assert "schemes" in reasons(report)
    assert len(linears(check(graph, MergeProjections(overrides="w?=int8"))[0])) == 1


def test_a_part_with_a_residual_stays_apart() -> None:
    body = QKV + "%o = llm.linear(%x, @w6, none, %y) : tensor<[T, 31], f32>\n"
    after, report = check(graph_of(body, "q = %q, k = %k, v = %v, o = %o"), MergeProjections())
    assert len(linears(after)) == 2
    assert "residual" in reasons(report)


def test_a_weight_computed_at_run_time_stays_apart() -> None:
    body = """
    %w = t.mul(@w6, %z) : tensor<[31, 31], f32>
    %a = llm.linear(%x, %w, none, none) : tensor<[T, 31], f32>
    %b = llm.linear(%x, @w2, none, none) : tensor<[T, 33], f32>
    """
    text = str(graph_of("%z = t.abs(@w6) : tensor<[31, 31], f32>\n" + body, "a = %a, b = %b"))
    text = text.replace("%y: tensor<[T, 31], f32>", "%y: tensor<[31, 31], f32>").replace("t.abs(@w6)", "t.abs(%y)")
    graph = parse(text)
    report = Report()
    assert len(linears(MergeProjections().run(graph, report))) == 2
    assert "run time" in reasons(report)


GATE = """
%g = llm.linear(%x, @w2, {gate_bias}, none) : tensor<[T, 33], f32>
%u = llm.linear(%x, @w3, {up_bias}, none) : tensor<[T, 33], f32>
%a = t.activation(%g) {{kind = "{kind}"}} : tensor<[T, 33], f32>
%h = t.mul({product}) : tensor<[T, 33], f32>
"""


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("product", ["%a, %u", "%u, %a"])
@pytest.mark.parametrize("biases", [("none", "none"), ("@b2", "none"), ("none", "@b3"), ("@b2", "@b3")])
def test_gate_and_up_become_one_gated_linear(kind: str, product: str, biases: tuple[str, str]) -> None:
    body = GATE.format(kind=kind, product=product, gate_bias=biases[0], up_bias=biases[1])
    after, report = check(graph_of(body, "h = %h"), MergeProjections())
    [gated] = linears(after)
    assert isinstance(gated, GatedLinear) and gated.activation == kind
    assert (gated.bias is None) == (biases == ("none", "none"))
    assert report.hits == {"gate and up": 1}


@pytest.mark.parametrize("other", ["%u = llm.linear(%x", "%g = llm.linear(%x"])
@pytest.mark.parametrize("product", ["%a, %u", "%u, %a"])
def test_gate_and_up_of_different_inputs_stay_apart(other: str, product: str) -> None:
    """activation(W1 x) * (W2 y) is a gated linear of neither x nor y."""
    body = GATE.format(kind="silu", product=product, gate_bias="none", up_bias="none")
    before = graph_of(body.replace(other, other.replace("%x", "%y")), "h = %h")
    after, report = check(before, MergeProjections())
    assert after is before and not report.hits


def test_a_gate_with_its_activation_fused_is_recognised_too() -> None:
    body = GATE.format(kind="silu", product="%a, %u", gate_bias="@b2", up_bias="none")
    fused, _ = check(graph_of(body, "h = %h"), FuseEpilogues())
    after, _ = check(fused, MergeProjections())
    assert [type(op) for op in linears(after)] == [GatedLinear]


HALVES = """
%w = llm.linear(%x, @w4, @b4, none) : tensor<[T, 66], f32>
%l = t.slice(%w) {{axis = 1, start = 0, stop = {cut}}} : tensor<[T, {cut}], f32>
%r = t.slice(%w) {{axis = 1, start = {cut}, stop = {end}}} : tensor<[T, {cut}], f32>
%a = t.activation({gate}) {{kind = "silu"}} : tensor<[T, {cut}], f32>
%h = t.mul(%a, {up}) : tensor<[T, {cut}], f32>
"""


@pytest.mark.parametrize(("gate", "up"), [("%l", "%r"), ("%r", "%l")])
def test_halves_of_one_linear_become_a_gated_linear(gate: str, up: str) -> None:
    body = HALVES.format(gate=gate, up=up, cut=33, end=66)
    after, report = check(graph_of(body, "h = %h"), MergeProjections())
    assert [type(op) for op in linears(after)] == [GatedLinear]
    assert report.hits == {"gate and up in one weight": 1}


def test_slices_that_are_no_halves_stay() -> None:
    body = HALVES.format(gate="%l", up="%r", cut=32, end=64)
    after, _ = check(graph_of(body, "h = %h"), MergeProjections())
    assert [type(op) for op in linears(after)] == [Linear]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [("%u", "a part is used"), ("%g", "a part is used"), ("%a", "activated gate is used")],
)
def test_a_gate_whose_parts_are_used_elsewhere_says_so(extra: str, reason: str) -> None:
    body = GATE.format(kind="silu", product="%a, %u", gate_bias="none", up_bias="none")
    after, report = check(graph_of(body, f"h = %h, e = {extra}"), MergeProjections(qkv=False))
    assert all(isinstance(op, Linear) for op in linears(after))
    assert reason in reasons(report)


@pytest.mark.parametrize("overrides", ["w2=int8", "w3=int8", "w2=int8;w3=int4"])
def test_overrides_that_differ_keep_gate_and_up_apart(overrides: str) -> None:
    body = GATE.format(kind="silu", product="%a, %u", gate_bias="none", up_bias="none")
    after, report = check(graph_of(body, "h = %h"), MergeProjections(overrides=overrides))
    assert len(linears(after)) == 2
    assert "overrides" in reasons(report)


@pytest.mark.parametrize("overrides", ["w?=int8", "w2=int8;w3=int8"])
def test_overrides_that_say_the_same_of_both_do_not(overrides: str) -> None:
    body = GATE.format(kind="silu", product="%a, %u", gate_bias="none", up_bias="none")
    after, _ = check(graph_of(body, "h = %h"), MergeProjections(overrides=overrides))
    assert [op.name for op in linears(after)] == ["llm.gated_linear"]


def test_bias_activation_and_residual_are_fused() -> None:
    body = """
    %a = llm.linear(%x, @w2, none, none) : tensor<[T, 33], f32>
    %b = t.add(@row, %a) : tensor<[T, 33], f32>
    %c = t.activation(%b) {kind = "gelu"} : tensor<[T, 33], f32>
    %d = llm.linear(%c, @w5, none, none) : tensor<[T, 31], f32>
    %e = t.add(%d, @one) : tensor<[T, 31], f32>
    %f = t.add(%x, %e) : tensor<[T, 31], f32>
    """
    after, report = check(graph_of(body, "f = %f"), FuseEpilogues())
    assert report.hits == {"bias": 2, "gelu": 1, "residual": 1}
    first, second = linears(after)
    assert first.bias is not None and first.activation == "gelu" and first.residual is None
    assert second.bias is not None and second.residual is after.inputs[0]


def test_a_constant_that_differs_from_row_to_row_is_no_bias() -> None:
    x, w, rows = (
        Input("x", Tensor((3, 31), "f32")),
        *(Param(n, Tensor((33, k), "f32")) for n, k in (("w", 31), ("r", 3))),
    )
    linear, table = Linear(x, w), Transpose(rows, (1, 0))
    for total in (Add(linear, table), Add(table, linear)):
        graph = Graph("g", (x,), (("out", total),))
        report = Report()
        assert FuseEpilogues().run(graph, report).ops == graph.ops and not report.hits


def test_a_second_bias_is_added_to_the_first() -> None:
    body = """
    %a = llm.linear(%x, @w2, @b2, none) : tensor<[T, 33], f32>
    %b = t.add(%a, @b3) : tensor<[T, 33], f32>
    """
    after, report = check(graph_of(body, "b = %b"), FuseEpilogues())
    assert report.hits == {"bias": 1} and after.outputs[0][1] is linears(after)[0]


PARALLEL = """
%a = llm.linear(%x, @w6, none, none) : tensor<[T, 31], f32>
%b = llm.linear(%y, @w6, none, none) : tensor<[T, 31], f32>
"""


@pytest.mark.parametrize(
    "sums",
    [
        "%s = t.add(%a, %b) : tensor<[T, 31], f32>\n%r = t.add(%s, %x) : tensor<[T, 31], f32>",
        "%s = t.add(%a, %b) : tensor<[T, 31], f32>\n%r = t.add(%x, %s) : tensor<[T, 31], f32>",
        "%s = t.add(%x, %a) : tensor<[T, 31], f32>\n%r = t.add(%b, %s) : tensor<[T, 31], f32>",
        "%s = t.add(%b, %x) : tensor<[T, 31], f32>\n%r = t.add(%s, %a) : tensor<[T, 31], f32>",
    ],
)
def test_parallel_residuals_become_a_chain(sums: str) -> None:
    after, report = check(graph_of(PARALLEL + sums, "r = %r"), FuseEpilogues())
    assert len(after.ops) == 2 and all(isinstance(op, Linear) for op in after.ops)
    assert report.hits == {"residual": 2}


def test_a_linear_that_is_used_elsewhere_is_not_computed_twice() -> None:
    sums = "%s = t.add(%a, %b) : tensor<[T, 31], f32>\n%r = t.add(%s, %x) : tensor<[T, 31], f32>"
    after, report = check(graph_of(PARALLEL + sums, "r = %r, a = %a"), FuseEpilogues())
    assert len(linears(after)) == 2
    assert report.hits == {"residual": 1}
    assert "another is added already" in reasons(report)


@pytest.mark.parametrize(
    ("tail", "outputs", "reason"),
    [
        ("%r = t.add(%x, %a) : tensor<[T, 31], f32>", "r = %r, a = %a", "used too"),
        ("%r = t.add(%a, %a) : tensor<[T, 31], f32>", "r = %r", "used too"),
        ('%r = t.activation(%a) {kind = "silu"} : tensor<[T, 31], f32>', "r = %r, a = %a", "used too"),
        ("%r = t.add(%a, @one) : tensor<[T, 31], f32>", "r = %r, a = %a", "used too"),
        (
            '%s = t.add(%a, %x) : tensor<[T, 31], f32>\n%r = t.activation(%s) {kind = "silu"} : tensor<[T, 31], f32>',
            "r = %r",
            "residual is added already",
        ),
        (
            '%s = t.activation(%a) {kind = "silu"} : tensor<[T, 31], f32>\n%r = t.add(%s, @one) : tensor<[T, 31], f32>',
            "r = %r",
            "silu is applied already",
        ),
        (
            "%s = t.add(%a, %x) : tensor<[T, 31], f32>\n%r = t.add(%s, %y) : tensor<[T, 31], f32>",
            "r = %r",
            "another is added already",
        ),
    ],
)
def test_what_is_not_fused_says_why(tail: str, outputs: str, reason: str) -> None:
    body = "%a = llm.linear(%x, @w6, none, none) : tensor<[T, 31], f32>\n" + tail
    _, report = check(graph_of(body, outputs), FuseEpilogues())
    assert reason in reasons(report)


def test_each_kind_of_epilogue_can_be_turned_off() -> None:
    body = """
    %a = llm.linear(%x, @w6, none, none) : tensor<[T, 31], f32>
    %b = t.add(%a, @one) : tensor<[T, 31], f32>
    %c = t.activation(%b) {kind = "silu"} : tensor<[T, 31], f32>
    %d = t.add(%c, %x) : tensor<[T, 31], f32>
    """
    graph = graph_of(body, "d = %d")
    assert check(graph, FuseEpilogues())[1].hits == {"bias": 1, "silu": 1, "residual": 1}
    assert check(graph, FuseEpilogues(activation=False, residual=False))[1].hits == {"bias": 1}
    off = FuseEpilogues(bias=False, activation=False, residual=False)
    assert check(graph, off)[0] is graph


def test_a_gated_mlp_block_becomes_two_linears() -> None:
    body = (
        GATE.format(kind="silu", product="%a, %u", gate_bias="none", up_bias="none")
        + """
    %d = llm.linear(%h, @w5, none, none) : tensor<[T, 31], f32>
    %r = t.add(%x, %d) : tensor<[T, 31], f32>
    """
    )
    merged, _ = check(graph_of(body, "r = %r"), MergeProjections())
    after, _ = check(merged, FuseEpilogues())
    assert [type(op) for op in linears(after)] == [GatedLinear, Linear]
    assert after.outputs[0][1] is linears(after)[1]
