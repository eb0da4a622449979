"""What a user may ask for a weight, how weights are named in reports, and which op is the head."""

from __future__ import annotations

import pytest
from pass_harness import graph_of, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.manager import Report
from llmc.compiler.passes.quantize import QuantizeWeights
from llmc.compiler.passes.schemes import (
    Overrides,
    Scheme,
    behind_logits,
    describe,
    find_head,
    looks_up_tokens,
    param_names,
    scheme_of,
    weight_ops,
)
from llmc.errors import CompileError

T = symbol("T", 1, 64)
X = x(T, 6)


def param(name: str, *shape: int, dtype: str = "f32") -> Param:
    return Param(name, Tensor(shape, dtype))


@pytest.mark.parametrize(
    ("text", "symmetric", "expected"),
    [
        ("none", True, "f32"), ("bf16", False, "bf16"), ("f16", True, "f16"), ("int4", True, "t4g32"),
        ("int4", False, "q4g32a"), ("int8", True, "q8g32"), ("int8", False, "q8g32"), ("int6", True, "t6g32"),
        ("int6", False, "t6g32"), ("q4g64", True, "q4g64"), ("q4g64a", True, "q4g64a"), ("t4g64", False, "t4g64"),
        ("t6g64", True, "t6g64"), ("q8g128", False, "q8g128"),
        ("int2", True, "t2g32"), ("int3", True, "t3g32"), ("int3", False, "q3g32a"), ("int5", False, "t5g32"),
    ],
)  # fmt: skip
def test_a_scheme_stands_for_a_dtype_or_an_encoding(text: str, symmetric: bool, expected: str) -> None:
    found = scheme_of(text, 32, symmetric)
    assert str(found) == expected
    assert (found.dtype, found.encoding) == ((expected, "") if text in ("none", "bf16", "f16") else ("", expected))


KNOWN = "known: none, bf16, f16, int2, int3, int4, int5, int6, int8, or an encoding such as t4g32"


@pytest.mark.parametrize(
    ("text", "message"),
    [("int7", f"unknown scheme 'int7'; {KNOWN}"), ("q4g64aa", f"unknown scheme 'q4g64aa'; {KNOWN}"),
     ("q4", f"unknown scheme 'q4'; {KNOWN}"), ("", f"unknown scheme ''; {KNOWN}")],
)  # fmt: skip
def test_an_unknown_scheme_is_named_beside_those_that_are_known(text: str, message: str) -> None:
    with pytest.raises(CompileError) as error:
        scheme_of(text, 64, True)
    assert str(error.value) == message
    for name, reason in (("q7g64", "7 bits and even steps"), ("t8g64", "8 bits and a table")):
        with pytest.raises(CompileError, match=f"scheme '{name}': .*{reason}"):
            scheme_of(name, 64, True)
    with pytest.raises(CompileError, match="scheme 'int4': "):
        scheme_of("int4", 7, True)


def test_overrides_are_patterns_with_schemes() -> None:
    assert Overrides.parse("").items == () and Overrides.parse(" ; ;").items == ()
    assert Overrides.parse(" a* = int8 ;b=none").items == (("a*", "int8"), ("b", "none"))
    assert Overrides.parse("a=b=int8").items == (("a=b", "int8"),)
    for text in ("a", "=int8", "a=int8;b"):
        with pytest.raises(CompileError, match="is not PATTERN=SCHEME, such as"):
            Overrides.parse(text)
    assert Overrides.parse("A*=int8").of(["a"]) == "" and Overrides.parse("a?=int8").of(iter(["x", "ab"])) == "int8"
    assert Overrides.parse("a=int8;z=int4").unmatched(iter(["a", "b"])) == ["z"]


def test_a_weight_is_named_by_up_to_three_of_its_params() -> None:
    for count, expected in (
        (0, "llm.linear : tensor<[T, 12], f32>"),
        (1, "llm.linear p0 : tensor<[T, 3], f32>"),
        (3, "llm.linear p0, p1, p2 : tensor<[T, 9], f32>"),
        (4, "llm.linear p0, p1, p2 and 1 more : tensor<[T, 12], f32>"),
        (6, "llm.linear p0, p1, p2 and 3 more : tensor<[T, 18], f32>"),
    ):
        parts = tuple(param(f"p{i}", 3, 6) for i in range(count))
        weight: Value = s.Concat(parts, 0) if parts else x(12, 6, name="w")
        assert param_names(weight) == tuple(part.name for part in parts)
        assert describe(Linear(X, weight), weight) == expected


HEAD = Linear(X, param("head", 9, 6))
OTHER = Linear(X, param("other", 9, 6))
ROWS = Input("rows", Tensor((symbol("R", 1),), "i32"))
HEADS: dict[str, tuple[Value, Value | None]] = {
    "the head itself": (HEAD, HEAD),
    "a softcap": (e.Mul(e.Tanh(e.Mul(HEAD, e.constant(0.1, "f32"))), e.constant(10.0, "f32")), HEAD),
    "a scale by weights": (e.Mul(param("scale", 9), HEAD), HEAD),
    "a choice of rows": (s.Gather(HEAD, ROWS, 0), HEAD),
    "a cast": (e.Cast(e.Cast(HEAD, "bf16"), "f32"), HEAD),
    "a sum of two": (e.Add(HEAD, OTHER), None),
    "another value": (e.Neg(X), None),
    "a norm": (s.Softmax(s.Sum(HEAD, (1,)), 1), None),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_found_behind_what_carries_its_numbers(name: str) -> None:
    value, expected = HEADS[name]
    inputs = tuple(v for v in (X, ROWS) if v in graph_of(value).inputs)
    graph = Graph("g", inputs, (("logits", value), ("other", OTHER)))  # type: ignore[arg-type]
    assert find_head(graph) is expected
    assert find_head(graph.replace_outputs([("other", value)])) is None
    assert behind_logits(graph.replace_outputs([("other", value)])) is None


IDS, POSITIONS = (Input(name, Tensor((T,), "i32")) for name in ("ids", "positions"))
TABLE = param("table", 9, 6)
BEST = s.Argmax(e.Cast(s.Reshape(IDS, (T, 1)), "f32"), 1)
LOOKUPS: dict[str, tuple[Value, bool, bool]] = {  # beside ids; and where no input has that name
    "ids": (IDS, True, True),
    "ids in i64 and another shape": (s.Reshape(e.Cast(IDS, "i64"), (T, 1)), True, True),
    "ids and two": (e.Add(IDS, e.constant(2, "i32")), True, True),
    "positions": (POSITIONS, False, True),
    "positions or ids": (e.Maximum(POSITIONS, IDS), True, True),
    "a table of whole numbers": (s.Gather(e.constant([3, 1, 2], "i32"), IDS, 0), True, True),
    "the best of floats": (BEST, False, False),
    "floats that were cut": (e.Cast(e.Cast(IDS, "f32"), "i32"), False, False),
    "a constant": (e.constant([1, 2], "i64"), False, False),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_table_that_tokens_look_up(name: str) -> None:
    ids, beside, alone = LOOKUPS[name]
    op = Embed(TABLE, ids)
    assert looks_up_tokens(op, Graph("g", (IDS, POSITIONS), (("y", op),))) == beside
    renamed = {IDS: Input("words", IDS.type), POSITIONS: Input("places", POSITIONS.type)}

    def other(value: Value) -> Value:
        return renamed.get(value) or (value.map_operands(other) if hasattr(value, "map_operands") else value)  # type: ignore[call-overload]

    unnamed = Embed(TABLE, other(ids))
    assert looks_up_tokens(unnamed, Graph("g", tuple(renamed.values()), (("y", unnamed),))) == alone


def test_what_stands_before_ids_in_the_alphabet_is_no_token() -> None:
    choices = Input("choices", IDS.type)
    op = Embed(TABLE, choices)
    assert not looks_up_tokens(op, Graph("g", (IDS, choices), (("y", op),)))


def test_linears_are_listed_in_order() -> None:
    gated = GatedLinear(X, param("gate", 8, 6), None, "silu")
    graph = graph_of(gated, e.Neg(HEAD), Embed(TABLE, s.Argmax(X, 1)))
    assert set(weight_ops(graph)) == {gated, HEAD}


# quantize: what is left out is said, and what is none of its business is not

UNREAD = "not read by llm.linear or llm.embed: its weight stays {}"
READS: dict[str, tuple[Value, list[str]]] = {
    "a product of matrices": (s.Matmul(X, param("m", 6, 4)), [UNREAD.format("f32")]),
    "a product in halves": (
        s.Matmul(x(T, 6, name="h", dtype="f16"), param("m", 6, 4, dtype="f16")), [UNREAD.format("f16")]
    ),
    "a vector": (e.Mul(X, param("v", 6)), []),
    "a vector under ones": (e.Mul(X, param("v", 1, 6)), []),
    "whole numbers": (e.Add(x(2, 6, name="n", dtype="i32"), param("n", 2, 6, dtype="i32")), []),
    "a table of whole numbers": (
        Embed(param("t", 9, 6, dtype="i8"), s.Argmax(X, 1)), ["its weight is i8, not floats"],
    ),
    "a weight that is computed": (Linear(X, x(8, 6, name="w")), ["its weight is computed at run time"]),
    "a matrix that is no weight": (s.Matmul(X, e.constant([[1.0] * 4] * 6, "f32")), []),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_a_weight_that_is_not_read_as_one_is_named(name: str) -> None:
    value, reasons = READS[name]
    graph, report = graph_of(value), Report()
    assert QuantizeWeights().run(graph, report) is graph
    assert [why for _, why in report.refusals] == reasons and not report.hits


@pytest.mark.parametrize(
    ("options", "head", "linear"),
    [
        ({"scheme": "int4"}, "t6g64", "t4g64"), ({"scheme": "int8"}, "q8g64", "q8g64"),
        ({"scheme": "t4g64"}, "t6g64", "t4g64"), ({"scheme": "t4g32"}, "t4g32", "t4g32"),
        ({"scheme": "q4g64"}, "q4g64", "q4g64"), ({"scheme": "int4", "head": "int8"}, "q8g64", "t4g64"),
        ({"scheme": "int6"}, "t6g64", "t6g64"),
        ({"scheme": "int4", "head": "int4"}, "t4g64", "t4g64"), ({"scheme": "int4", "head": "f16"}, "f16", "t4g64"),
        ({"scheme": "bf16"}, "bf16", "bf16"), ({"scheme": "none", "head": "int8"}, "q8g64", "f32"),
        ({"scheme": "int4", "group_size": 32, "symmetric": False}, "t6g32", "q4g32a"),
    ],
)  # fmt: skip
def test_the_head_has_a_scheme_of_its_own(options: dict[str, object], head: str, linear: str) -> None:
    inner = Linear(X, param("inner", 6, 6))
    logits = Linear(inner, param("lm_head", 9, 6))
    after = QuantizeWeights(**options).run(Graph("g", (X,), (("logits", logits),)), Report())  # type: ignore[arg-type]
    found = [str(op.w.tensor.encoding or op.w.dtype) for op in after.ops if isinstance(op, Linear)]
    assert found == [linear, head]
    assert Scheme(dtype="f32") != Scheme(encoding="f32")
