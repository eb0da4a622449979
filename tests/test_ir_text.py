"""The text of a graph: parsing what was printed gives the same graph, and mistakes are named by line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_graphs import Sized, data_for, graphs, sizes, weight

from llmc.compiler.ir.dims import bounds, symbol
from llmc.compiler.ir.elementwise import Activation, Add, constant
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import KVAppend, Linear, Quantize, RMSNorm
from llmc.compiler.ir.op import Input, Param
from llmc.compiler.ir.text import parse, print_graph, text_hash
from llmc.compiler.ir.types import KV, Tensor
from llmc.errors import DimError, IRError

S = symbol("S", 2, 40)


@given(graphs())
def test_parsing_what_was_printed_prints_the_same(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse(text)
    assert print_graph(again) == text
    assert text_hash(again) == text_hash(graph)


@given(graphs(), st.integers(2, 9))
def test_the_parsed_graph_computes_the_same(graph: Graph, size: int) -> None:
    data = data_for(graph, size)
    expected, found = evaluate(graph, data, weight), evaluate(parse(print_graph(graph)), data, weight)
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name])


@given(sizes)
def test_any_size_survives_the_text(size: Sized) -> None:
    try:
        low = bounds(size.value)[0]
    except DimError:
        return
    if low < 0:
        return
    symbols = {"S": 5, "T": 6, "U": 7}
    anchors = Input("a", Tensor(tuple(symbol(*s) for s in (("S", 2, 40), ("T", 1, 512), ("U", 0, None))), "f32"))
    assert len(symbols) == anchors.rank
    graph = Graph("g", (anchors, Input("x", Tensor((size.value,), "f32"))), (("out", anchors),))
    assert parse(print_graph(graph)).input("x").shape == (size.value,)


@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_any_name_survives_the_text(input_name: str, param_name: str) -> None:
    x, w = Input(input_name, Tensor((S,), "f32")), Param(param_name, Tensor((1,), "f32"))
    again = parse(print_graph(Graph("g", (x,), (("out", Add(x, w)),))))
    assert [value.name for value in again.inputs] == [input_name]
    assert [value.name for value in again.params] == [param_name]


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"])
@pytest.mark.parametrize("count", [1, 16, 17, 65])
def test_constants_keep_every_bit(dtype: str, count: int) -> None:
    values = np.linspace(-100, 100, count) / 3 if dtype[0] in "fb" and dtype != "bool" else np.arange(count) % 2
    made = constant(values, dtype)
    graph = Graph("g", (), (("out", made),))
    (again,) = parse(print_graph(graph)).ops
    assert again.attributes() == made.attributes()
    assert again.type == made.type


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -0.0, 1e-45, 1e38, 0.1])
def test_awkward_numbers_survive_the_text(value: float) -> None:
    text = print_graph(Graph("g", (), (("out", constant(value, "f32")),)))
    assert print_graph(parse(text)) == text
    assert str(evaluate(parse(text), {}, weight)["out"]) == str(np.float32(value))


def test_every_kind_of_type_and_attribute_survives_the_text() -> None:
    x = Input("x", Tensor((S, 64), "f32"))
    slots, cache = Input("slots", Tensor((S,), "i32")), Input("cache.0", KV(1, 64, 64, "f16"))
    w = Quantize(Param("w", Tensor((64, 64), "bf16")), "q4g32", search=False)
    y = Linear(RMSNorm(x, None, 1e-6, 1.0), w, None, x, "gelu", "int8")
    from llmc.compiler.ir.structural import Reshape

    heads = Reshape(y, (S, 1, 64))
    graph = Graph("g", (x, slots, cache), (("y", y), ("next", KVAppend(cache, heads, heads, slots))))
    text = print_graph(graph)
    assert print_graph(parse(text)) == text
    for part in ("q4g32", "kv<1, 64, 64, f16>", "search = false", 'activation = "gelu"', "eps = 1e-06", "none"):
        assert part in text


def test_the_hash_changes_with_an_attribute() -> None:
    x = Input("x", Tensor((S,), "f32"))
    hashes = {text_hash(Graph("g", (x,), (("y", Activation(x, kind)),))) for kind in ("silu", "gelu")}
    assert len(hashes) == 2


T = symbol("T", 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("S - 1", S - 1), ("S -1", S - 1), ("40 - S", 40 - S), ("S - T + 2", S - T + 2), ("7", 7),
        ("S + T - 1 + S", 2 * S + T - 1), ("2*S*3", 6 * S), ("2*(S + 1)", 2 * S + 2), ("(S*T)//3", S * T // 3),
        ("(S)//4*3", S // 4 * 3), ("(S + 3)//4*2//3", (S + 3) // 4 * 2 // 3), ("(S)//1", S), ("-1*S + 40", 40 - S),
        ("S - 2*T + 512", S - 2 * T + 512), ("-1 + S", S - 1),
    ],
)  # fmt: skip
def test_sizes_are_read_as_they_are_written(text: str, size: object) -> None:
    head = f"graph @g {{S in [2, 40], T in [1, inf]}} (%a: tensor<[S, T], f32>, %x: tensor<[{text}, 3], f32>) {{"
    assert parse(f"{head}\n  return y = %x\n}}").input("x").shape == (size, 3)


@pytest.mark.parametrize("divisor", ["0", "-2", "S", "(1 - 1)"])
def test_a_size_is_divided_by_positive_numbers_only(divisor: str) -> None:
    with pytest.raises(IRError, match="line 1: a size can be divided by a positive number only"):
        parse(f"graph @g {{S in [2, 40]}} (%x: tensor<[S, (S + 1)//{divisor}], f32>) {{\n  return y = %x\n}}")


def test_a_cache_keeps_its_sizes_in_order() -> None:
    cache = Input("cache", KV(2, 8, 4, "bf16"))
    assert parse(print_graph(Graph("g", (cache,), (("y", cache),)))).input("cache").type == cache.type


_HEAD = "graph @g {S in [2, 40]} (%x: tensor<[S, 4], f32>) {\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("  %0 = t.nonsense(%x) : tensor<[S, 4], f32>\n  return y = %0\n}", "line 2: unknown op 't.nonsense'"),
        ("  %0 = t.neg(%z) : tensor<[S, 4], f32>\n  return y = %0\n}", "line 2: %z is not defined"),
        ("  %0 = t.neg(%x) : tensor<[S, 5], f32>\n  return y = %0\n}", "line 2: t.neg gives .* the text says"),
        ("  %0 = t.sum(%x) : tensor<[S, 1], f32>\n  return y = %0\n}", "line 2: t.sum: .*axes"),
        ("  %0 = t.neg(%x) : tensor<[Q, 4], f32>\n  return y = %0\n}", "line 2: expected a size, found 'Q'"),
        ("  return y = %x\n} trailing", "line 3: unexpected 'trailing'"),
        ("  return y = %x", "line 2: expected ',', and the text ends"),
        ("  return y =", "line 2: unexpected end of text"),
        ("  return y ? %x\n}", r"line 2: unexpected ' \? %x"),
        ("  return y ? %x and so on\n}", "line 2: unexpected ' \\? %x and '$"),
        ("  return y = %x z = %x\n}", "line 2: expected ',', found 'z'"),
        ("  %0 = t.add(%x %x) : tensor<[S, 4], f32>\n  return y = %0\n}", "line 2: expected ',', found '%'"),
        ("  %0 = t.concat([%x %x], 0) : tensor<[S, 4], f32>\n  return y = %0\n}", "line 2: expected ',', found '%'"),
        ("  %0 = t.neg(%x) : tensor<[S 4], f32>\n  return y = %0\n}", "line 2: expected ',', found '4'"),
        (
            "  %0 = t.sum(%x) {axes = [0 1]} : tensor<[1, 1], f32>\n  return y = %0\n}",
            "line 2: expected ',', found '1'",
        ),
        (
            '  %0 = t.iota() {size = 3 dtype_name = "i64"} : tensor<[3], i64>\n  return y = %0\n}',
            "line 2: expected ',', found 'dtype_name'",
        ),
        ("  %0 = t.cast(%x) {to = 3} : tensor<[S, 4], f32>\n  return y = %0\n}", "unknown dtype"),
    ],
)
def test_a_mistake_is_named(body: str, message: str) -> None:
    with pytest.raises(IRError, match=message):
        parse(_HEAD + body)
