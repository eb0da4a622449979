"""quantize: the result is what the rounded weights make of it, exactly; and everything left out is reported."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.encodings import encode
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.llm import Dequantize, Embed, GatedLinear, Linear, Quantize
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.text import parse, print_graph
from llmc.compiler.ir.types import parse_encoding, precise
from llmc.compiler.passes.manager import Pass, Report, parse_pipeline, run_passes
from llmc.compiler.passes.quantize import QuantizeWeights
from llmc.compiler.passes.schemes import Overrides, find_head, param_names
from llmc.errors import CompileError

MODEL = """
graph @main {T in [1, 64]} (%ids: tensor<[T], i32>) {
  @embed.weight: tensor<[19, 33], bf16>
  @norm.weight: tensor<[33], f32>
  @mlp.gate.weight: tensor<[129, 33], bf16>
  @mlp.up.weight: tensor<[129, 33], bf16>
  @mlp.down.weight: tensor<[33, 129], bf16>
  @mlp.down.bias: tensor<[33], f32>
  @head.weight: tensor<[19, 33], bf16>
  %0 = llm.embed(@embed.weight, %ids) : tensor<[T, 33], f32>
  %1 = llm.rms_norm(%0, @norm.weight) {eps = 0.01} : tensor<[T, 33], f32>
  %2 = t.concat([@mlp.gate.weight, @mlp.up.weight]) {axis = 0} : tensor<[258, 33], bf16>
  %3 = llm.gated_linear(%1, %2, none) {activation = "silu"} : tensor<[T, 129], f32>
  %4 = llm.linear(%3, @mlp.down.weight, @mlp.down.bias, %0) : tensor<[T, 33], f32>
  %5 = llm.linear(%4, HEAD, none, none) : tensor<[T, 19], f32>
  %6 = t.tanh(%5) : tensor<[T, 19], f32>
  return logits = %6
}
"""
UNTIED = parse(MODEL.replace("HEAD", "@head.weight"))
TIED = parse(MODEL.replace("HEAD", "@embed.weight").replace("  @head.weight: tensor<[19, 33], bf16>\n", ""))


def run(graph: Graph) -> np.ndarray:
    """The logits in f64 for fixed ids, with params that depend on their names and shapes only."""
    shapes = {param.name: param.shape for param in graph.params}

    def load(name: str) -> np.ndarray:
        values = np.random.default_rng(sum(name.encode())).standard_normal(shapes[name]) / 8
        return values.astype(np.float16).astype(np.float64)  # exact in every float dtype of the checkpoints

    with precise():
        return evaluate(graph, {"ids": np.array([3, 18, 0, 3, 7], np.int32)}, load)["logits"]


def quantize(graph: Graph, item: Pass) -> tuple[Graph, Report]:
    after, [report] = run_passes(graph, [item])
    return after, report


def weights(graph: Graph) -> dict[str, str]:
    """Names of params -> how the op that reads them keeps them."""
    found = {}
    for op in graph.ops:
        if isinstance(op, (Linear, GatedLinear, Embed)):
            value = op.table if isinstance(op, Embed) else op.w
            kind = "embedding" if isinstance(op, Embed) else "linear"
            found[f"{kind} {'+'.join(param_names(value))}"] = str(value.tensor.encoding or value.dtype)
    return found


def dequantized(graph: Graph) -> Graph:
    """The same graph with every encoded weight spelled out as the floats that it decodes to."""

    def rule(op: Op) -> Value | None:
        if isinstance(op, Embed) and op.table.tensor.encoding is not None:
            return op.replace(table=Dequantize(op.table))
        if isinstance(op, (Linear, GatedLinear)) and op.w.tensor.encoding is not None:
            return op.replace(w=Dequantize(op.w))
        return None

    return rewrite(graph, rule)


@pytest.mark.parametrize("graph", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "int6", "int8", "q4g32"])
def test_the_result_is_that_of_the_dequantized_weights(graph: Graph, scheme: str, symmetric: bool) -> None:
    options = QuantizeWeights(scheme=scheme, symmetric=symmetric, activations="f32")
    after, report = quantize(graph, options)
    assert not report.refusals
    assert any(isinstance(op, Quantize) for op in after.ops)
    np.testing.assert_array_equal(run(after), run(dequantized(after)))
    assert not np.array_equal(run(after), run(graph))


def test_the_rounded_weight_is_what_the_encoding_makes_of_it() -> None:
    after, _ = quantize(UNTIED, QuantizeWeights(activations="f32", overrides="embed*=none;mlp*=none"))
    head = find_head(after)
    assert head is not None and isinstance(head.w, Quantize)
    expected_weight: dict[str, np.ndarray] = {}

    def load(name: str) -> np.ndarray:
        shape = {param.name: param.shape for param in UNTIED.params}[name]
        values = np.random.default_rng(sum(name.encode())).standard_normal(shape) / 8
        values = values.astype(np.float16).astype(np.float64)
        if name == "head.weight":
            expected_weight[name] = values
            with precise():
                return encode(parse_encoding("t6g64"), values).decode()
        return values

    with precise():
        expected = evaluate(UNTIED, {"ids": np.array([3, 18, 0, 3, 7], np.int32)}, load)["logits"]
    np.testing.assert_array_equal(run(after), expected)


@pytest.mark.parametrize("scheme", ["none", "bf16", "f16"])
def test_float_schemes_cast(scheme: str) -> None:
    after, report = quantize(UNTIED, QuantizeWeights(scheme=scheme))
    dtype = {"none": "f32"}.get(scheme, scheme)
    assert set(weights(after).values()) == {dtype}
    # In f64 a cast is exact, so nothing changes: the rounding of a cast is the dtype's own.
    np.testing.assert_array_equal(run(after), run(UNTIED))
    assert not report.refusals
    assert all(op.rounding == "f32" for op in after.ops if isinstance(op, (Linear, GatedLinear)))


def test_a_weight_that_has_its_dtype_already_is_left_as_it_is() -> None:
    assert quantize(UNTIED, QuantizeWeights(scheme="bf16"))[0] is UNTIED


@pytest.mark.parametrize("scheme", ["int4", "t4g64"])
def test_int4_keeps_head_and_embedding_at_six_bits(scheme: str) -> None:
    after, report = quantize(UNTIED, QuantizeWeights(scheme))
    assert weights(after) == {
        "embedding embed.weight": "t6g64",
        "linear mlp.gate.weight+mlp.up.weight": "t4g64",
        "linear mlp.down.weight": "t4g64",
        "linear head.weight": "t6g64",
    }
    assert report.hits == {"embedding t6g64": 1, "linear t4g64": 2, "head t6g64": 1}


def test_int4_keeps_a_table_that_the_head_shares_at_six_bits() -> None:
    after, report = quantize(TIED, QuantizeWeights(symmetric=False))
    assert weights(after)["embedding embed.weight"] == weights(after)["linear embed.weight"] == "t6g64"
    assert report.hits == {"embedding t6g64": 1, "linear q4g64a": 2, "tied head t6g64": 1}


@pytest.mark.parametrize("options", [{"scheme": "int8", "embedding": "int6"}, {"overrides": "embed*=t6g32"}])
def test_an_embedding_in_six_bits_is_what_its_rounded_weights_make_of_it(options: dict[str, str]) -> None:
    after, report = quantize(UNTIED, QuantizeWeights(activations="f32", **options))
    assert weights(after)["embedding embed.weight"] == ("t6g64" if "embedding" in options else "t6g32")
    assert not report.refusals
    np.testing.assert_array_equal(run(after), run(dequantized(after)))
    assert not np.array_equal(run(after), run(quantize(UNTIED, QuantizeWeights(activations="f32"))[0]))


@pytest.mark.parametrize(
    ("graph", "options", "expected"),
    [
        (UNTIED, {"scheme": "int6"}, ("t6g64", "t6g64", "t6g64")),
        (UNTIED, {"scheme": "t6g32", "symmetric": False}, ("t6g32", "t6g32", "t6g32")),
        (UNTIED, {"head": "int6", "group_size": 32}, ("t6g32", "t4g32", "t6g32")),
        (UNTIED, {"overrides": "*.down.weight=int6"}, ("t6g64", "t6g64", "t6g64")),
        (TIED, {"embedding": "int6"}, ("t6g64", "t4g64", "t6g64")),
        (TIED, {"overrides": "embed*=int6"}, ("t6g64", "t4g64", "t6g64")),
    ],
)
def test_six_bits_are_for_every_weight(graph: Graph, options: dict[str, object], expected: tuple[str, ...]) -> None:
    after, report = quantize(graph, QuantizeWeights(activations="f32", **options))  # type: ignore[arg-type]
    head = find_head(after)
    assert head is not None and not report.refusals
    found = weights(after)
    embedding, down = (found[f"{what}.weight"] for what in ("embedding embed", "linear mlp.down"))
    assert (embedding, down, str(head.w.tensor.encoding)) == expected
    np.testing.assert_array_equal(run(after), run(dequantized(after)))


def test_embedding_and_head_have_their_own_schemes() -> None:
    after, _ = quantize(UNTIED, QuantizeWeights(embedding="f16", head="int4", group_size=32, symmetric=False))
    assert weights(after) == {
        "embedding embed.weight": "f16",
        "linear mlp.gate.weight+mlp.up.weight": "q4g32a",
        "linear mlp.down.weight": "q4g32a",
        "linear head.weight": "q4g32a",
    }


@pytest.mark.parametrize("scheme", ["int4", "int8", "bf16", "f16", "none"])
def test_a_tied_table_is_rounded_once(scheme: str) -> None:
    after, _ = quantize(TIED, QuantizeWeights(scheme=scheme, head="int4"))
    [embed] = [op for op in after.ops if isinstance(op, Embed)]
    head = find_head(after)
    assert head is not None and head.w is embed.table


def test_a_tied_table_is_seen_through_casts() -> None:
    def rule(op: Op) -> Value | None:
        return op.replace(table=Cast(op.table, "f32")) if isinstance(op, Embed) else None

    after, _ = quantize(rewrite(TIED, rule), QuantizeWeights())
    [embed] = [op for op in after.ops if isinstance(op, Embed)]
    head = find_head(after)
    assert head is not None and head.w is embed.table


@pytest.mark.parametrize(
    ("scheme", "activations", "rounding"),
    [
        ("int4", "int8", "int8"), ("int8", "int8", "int8"), ("int4", "bf16", "bf16"), ("int4", "f32", "f32"),
        ("bf16", "int8", "f32"), ("bf16", "bf16", "bf16"), ("none", "int8", "f32"),
    ],
)  # fmt: skip
def test_activations_are_rounded_as_asked(scheme: str, activations: str, rounding: str) -> None:
    after, _ = quantize(UNTIED, QuantizeWeights(scheme=scheme, activations=activations))
    assert {op.rounding for op in after.ops if isinstance(op, (Linear, GatedLinear))} == {rounding}


def test_overrides_match_names_and_the_first_wins() -> None:
    overrides = "*.down.*=int8;mlp.*=q4g32;head.weight=none"
    after, _ = quantize(UNTIED, QuantizeWeights(overrides=overrides))
    assert weights(after) == {
        "embedding embed.weight": "t6g64",
        "linear mlp.gate.weight+mlp.up.weight": "q4g32",
        "linear mlp.down.weight": "q8g64",
        "linear head.weight": "f32",
    }


def test_a_merged_weight_whose_parts_have_different_overrides_is_reported() -> None:
    after, report = quantize(UNTIED, QuantizeWeights(overrides="mlp.up.*=int8"))
    assert weights(after)["linear mlp.gate.weight+mlp.up.weight"] == "q8g64"
    assert "different schemes" in report.refusals[0][1]


def test_an_override_of_a_tied_table_is_for_both_its_uses() -> None:
    after, _ = quantize(TIED, QuantizeWeights(overrides="embed*=f16"))
    assert {key: kind for key, kind in weights(after).items() if "embed" in key} == {
        "embedding embed.weight": "f16",
        "linear embed.weight": "f16",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int7"}, "unknown scheme 'int7'"),
        ({"scheme": "q7g64"}, "7 bits and even steps"),
        ({"scheme": "t7g64"}, "7 bits and a table"),
        ({"embedding": "fp8"}, "unknown scheme 'fp8'"),
        ({"group_size": 12}, "groups of 12"),
        ({"activations": "int4"}, "unknown activations"),
        ({"overrides": "mlp.*"}, "PATTERN=SCHEME"),
        ({"overrides": "mlp.*=int9"}, "unknown scheme 'int9'"),
        ({"overrides": "mlpp.*=int8"}, "matches no weight"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        quantize(UNTIED, QuantizeWeights(**options))


def test_a_weight_computed_at_run_time_is_reported() -> None:
    graph = parse("""
    graph @main {T in [1, 64]} (%x: tensor<[T, 33], f32>, %w: tensor<[7, 33], f32>) {
      @v: tensor<[33, 5], f32>
      %0 = llm.linear(%x, %w, none, none) : tensor<[T, 7], f32>
      %1 = t.matmul(%x, @v) : tensor<[T, 5], f32>
      return a = %0, b = %1
    }
    """)
    after, report = quantize(graph, QuantizeWeights())
    assert after is graph
    assert {reason for _, reason in report.refusals} == {
        "its weight is computed at run time",
        "not read by llm.linear or llm.embed: its weight stays f32",
    }


def test_tables_that_tokens_do_not_index_stay_as_they_are() -> None:
    graph = parse("""
    graph @main {T in [1, 64]} (%ids: tensor<[T], i32>, %positions: tensor<[T], i32>) {
      @tokens: tensor<[19, 33], f32>
      @places: tensor<[64, 33], f32>
      @experts: tensor<[5, 33], f32>
      @big: tensor<[5, 7, 33], bf16>
      %0 = t.cast(%ids) {to = "i64"} : tensor<[T], i64>
      %1 = llm.embed(@tokens, %0) : tensor<[T, 33], f32>
      %2 = llm.embed(@places, %positions) : tensor<[T, 33], f32>
      %3 = t.argmax(%1) {axis = 1} : tensor<[T], i64>
      %4 = llm.embed(@experts, %3) : tensor<[T, 33], f32>
      %5 = t.gather(@big, %3) : tensor<[T, 7, 33], bf16>
      return a = %1, b = %2, c = %4, d = %5
    }
    """)
    after, report = quantize(graph, QuantizeWeights())
    assert weights(after) == {
        "embedding tokens": "t6g64",
        "embedding places": "f32",
        "embedding experts": "f32",
    }
    assert report.hits == {"embedding t6g64": 1, "table left as it is": 2}
    [(what, reason)] = report.refusals
    assert "big" in what and "stays bf16" in reason
    overridden, _ = quantize(graph, QuantizeWeights(overrides="places=int8"))
    assert weights(overridden)["embedding places"] == "q8g64"


def test_quantizing_twice_is_reported() -> None:
    once, _ = quantize(UNTIED, QuantizeWeights())
    twice, report = quantize(once, QuantizeWeights())
    assert twice is once
    assert not report.refusals
    assert report.hits == {"linear already t4g64": 2, "embedding already t6g64": 1, "head already t6g64": 1}


def test_the_text_of_a_quantized_graph_is_read_back() -> None:
    after, _ = quantize(TIED, QuantizeWeights())
    assert print_graph(parse(print_graph(after))) == print_graph(after)


def test_the_pass_is_written_and_read_as_text() -> None:
    item = QuantizeWeights(scheme="int8", group_size=32, overrides="*.down.*=int4;head*=none")
    assert parse_pipeline(str(item)) == [item]
    assert not QuantizeWeights.exact


def test_overrides_give_an_empty_scheme_for_other_names() -> None:
    overrides = Overrides.parse("a.*=int8; b?=int4;")
    assert [overrides.of([name]) for name in ("a.x", "b1", "b", "xa.x")] == ["int8", "int4", "", ""]
    assert overrides.of(["z", "b2"]) == "int4"
    assert overrides.unmatched(["a.b"]) == ["b?"]


def test_an_override_that_another_one_hides_has_to_be_known_too() -> None:
    with pytest.raises(CompileError, match="unknown scheme 'int7'"):
        quantize(UNTIED, QuantizeWeights(overrides="*=int8;*.up.*=int7"))


def test_weights_are_rounded_from_f32() -> None:
    text = """
graph @main {T in [1, 64]} (%x: tensor<[T, 32], f32>) {
  @w: tensor<[8, 32], f64>
  %0 = llm.linear(%x, @w, none, none) : tensor<[T, 8], f32>
  return y = %0
}
"""
    after, _ = quantize(parse(text), QuantizeWeights(scheme="int8"))
    (linear,) = (op for op in after.ops if isinstance(op, Linear))
    assert isinstance(linear.w, Quantize) and isinstance(linear.w.w, Cast) and linear.w.w.to == "f32"
