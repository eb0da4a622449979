"""Graphs: the verifier rejects what breaks a rule, rewriting keeps meaning, evaluation binds sizes, errors name it."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Add, Cast, Mul, Neg, constant
from llmc.compiler.ir.encoded import Pages
from llmc.compiler.ir.evaluate import bind_symbols, evaluate, evaluate_values
from llmc.compiler.ir.graph import Graph, rewrite, substitute_values
from llmc.compiler.ir.llm import KVAppend, Linear, PagedAttention
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import Concat, Iota, Matmul, Reshape, Slice
from llmc.compiler.ir.types import KV, Tensor, dtype_of, is_precise, parse_encoding, precise
from llmc.compiler.ir.verify import verify
from llmc.errors import DimError, IRError

S, T = symbol("S", 2, 40), symbol("T", 1)


def an_input(name: str = "x", *shape: object, dtype: str = "f32") -> Input:
    return Input(name, Tensor(tuple(shape) or (S, 4), dtype))  # type: ignore[arg-type]


def no_params(name: str) -> np.ndarray:
    raise AssertionError(f"{name} is not needed")


def corrupt(op: Op, **changes: object) -> Op:
    """A copy whose fields were changed behind the type checker's back, as a buggy pass might."""
    for key, value in changes.items():
        object.__setattr__(op, key, value)
    return op


def test_a_sound_graph_verifies() -> None:
    x = an_input()
    verify(Graph("g", (x,), (("y", Neg(x)),)))


def test_a_type_that_does_not_follow_from_the_operands_is_rejected() -> None:
    x = an_input()
    broken = corrupt(Neg(x), type=Tensor((S, 5), "f32"))
    with pytest.raises(IRError, match=r"t\.neg says it gives .*5.* its operands make that .*4"):
        verify(Graph("g", (x,), (("y", broken),)))


def test_operands_that_no_longer_fit_are_rejected() -> None:
    x = an_input()
    broken = corrupt(Add(x, x), b=an_input("z", S, 5))
    with pytest.raises(IRError, match="do not broadcast"):
        verify(Graph("g", (x,), (("y", broken),)))


def test_an_undeclared_input_is_rejected() -> None:
    x, stray = an_input(), an_input("stray")
    with pytest.raises(IRError, match="input stray, which graph g does not declare"):
        verify(Graph("g", (x,), (("y", Add(x, stray)),)))


def test_two_inputs_or_outputs_of_one_name_are_rejected() -> None:
    x = an_input()
    with pytest.raises(IRError, match="two inputs"):
        verify(Graph("g", (x, an_input()), (("y", Neg(x)),)))
    with pytest.raises(IRError, match="two outputs"):
        verify(Graph("g", (x,), (("y", Neg(x)), ("y", x))))


def test_an_op_of_another_level_is_rejected() -> None:
    x, w = an_input(), Param("w", Tensor((3, 4), "f32"))
    graph = Graph("g", (x,), (("y", Linear(x, w)),))
    verify(graph)
    with pytest.raises(IRError, match=r"llm\.linear is not legal here: only t ops are"):
        verify(graph, levels=("t",))


def test_an_unregistered_op_is_rejected() -> None:
    class Neg2(Neg):
        """A subclass without a name of its own: it prints as t.neg but is none."""

    x = an_input()
    with pytest.raises(IRError, match="not a registered op"):
        verify(Graph("g", (x,), (("y", Neg2(x)),)))


def test_a_cache_that_branches_is_rejected() -> None:
    cache, slots = Input("cache.0", KV(1, 4, 4, "f32")), an_input("slots", S, dtype="i32")
    x = an_input("x", S, 1, 4)
    one, other = KVAppend(cache, x, x, slots), KVAppend(cache, x, Neg(x), slots)
    with pytest.raises(IRError, match="appended to 2 times"):
        verify(Graph("g", (x, slots, cache), (("a", one), ("b", other))))
    verify(Graph("g", (x, slots, cache), (("a", KVAppend(one, x, x, slots)),)))


def paged(readers: str) -> Graph:
    """Two appends to one cache, and readers of the version between: the second append's keys come of them, or not."""
    q, k, v = (Input(name, Tensor((T, 2, 16), "f32")) for name in "qkv")
    slots, tiles = Input("slots", Tensor((T,), "i32")), Input("tiles", Tensor((symbol("Q", 1), 4), "i32"))
    table = Input("block_table", Tensor((symbol("B", 1), symbol("M", 1)), "i32"))
    cache = Input("cache.0", KV(2, 16, 16, "f32"))
    inputs = (q, k, v, slots, tiles, table, cache)
    first = KVAppend(cache, k, v, slots)
    early = PagedAttention(q, first, tiles, table)
    if readers == "of the input":
        late = PagedAttention(q, cache, tiles, table)
        return Graph("g", inputs, (("a", Add(early, late)), ("next", first)))
    second = KVAppend(first, Neg(early) if readers != "none before" else k, v, slots)
    after = PagedAttention(early, second, tiles, table)
    if readers == "beside":
        after = Add(after, PagedAttention(early, first, tiles, table))
    outputs = (("a", after), ("next", first if readers == "kept" else second))
    return Graph("g", inputs, outputs)


def test_a_cache_that_branches_is_rejected_after_one_that_is_only_read() -> None:
    cache, x = Input("cache.1", KV(1, 4, 4, "f32")), an_input("x", S, 1, 4)
    slots = an_input("slots", S, dtype="i32")
    read = paged("before")
    q, tiles, table, other = (read.input(name) for name in ("q", "tiles", "block_table", "cache.0"))
    reader = PagedAttention(q, other, tiles, table)
    appends = [KVAppend(cache, x, made, slots) for made in (x, Neg(x))]
    outputs = (("read", reader), *((f"next{i}", append) for i, append in enumerate(appends)))
    with pytest.raises(IRError, match="appended to 2 times"):
        verify(Graph("g", (q, tiles, table, other, cache, x, slots), outputs))


def test_a_cache_is_read_before_it_is_overwritten() -> None:
    verify(paged("before"))


@pytest.mark.parametrize("readers", ["beside", "none before", "of the input", "kept"])
def test_a_read_of_an_overwritten_cache_is_rejected(readers: str) -> None:
    """A reader that nothing puts before the append, of any version; and a version that is gone when the step ends."""
    with pytest.raises(IRError, match="overwrit"):
        verify(paged(readers))


def test_an_op_refuses_operands_that_break_its_rules_and_says_so() -> None:
    x = an_input()
    with pytest.raises(IRError, match=r"t\.matmul\(tensor<\[S, 4\], f32>, .*inner sizes differ"):
        Matmul(x, x)
    with pytest.raises(IRError, match="different dtypes"):
        Add(x, Cast(x, "f16"))
    with pytest.raises(IRError, match="different element counts"):
        Reshape(x, (S, 5))
    with pytest.raises(DimError, match="cannot settle"):
        Slice(x, 0, 0, 20)
    with pytest.raises(IRError, match="expected a KV cache"):
        KVAppend(x, x, x, x)
    with pytest.raises(IRError, match="expected a tensor"):
        Neg(Input("cache", KV(1, 2, 2, "f32")))
    with pytest.raises(IRError, match="unknown dtype"):
        Tensor((1,), "f8")
    with pytest.raises(IRError, match="negative size"):
        Tensor((-1,), "f32")
    with pytest.raises(IRError, match="unknown encoding"):
        parse_encoding("zip")
    with pytest.raises(IRError, match="no counterpart"):
        dtype_of(np.dtype(np.complex64))


def test_ops_are_immutable_and_compare_by_identity() -> None:
    x = an_input()
    one, other = Neg(x), Neg(x)
    assert one != other and one == one
    assert an_input() != an_input() and Param("w", x.type) != Param("w", x.type)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.x = other  # type: ignore[misc]


def test_a_graph_holds_what_its_outputs_need_operands_first() -> None:
    x = an_input()
    a = Neg(x)
    b = Mul(a, a)
    Neg(b)
    graph = Graph("g", (x,), (("y", b),))
    assert graph.ops == (a, b)
    assert graph.users[a] == (b, b)
    assert [symbol.name for symbol in graph.symbols] == ["S"]


def test_a_size_that_only_an_attribute_names_is_a_symbol_of_the_graph() -> None:
    x = an_input("x", S)
    graph = Graph("g", (x,), (("y", Concat((Slice(Iota(T + 1), 0, T, T + 1), Iota(T)), 0)),))
    assert [symbol.name for symbol in graph.symbols] == ["S", "T"]
    assert not graph.constants
    count = Iota(3)
    assert count in Graph("g", (), (("y", count),)).constants


def test_a_stored_constant_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        constant([1.0, 2.0]).value.array[0] = 5


def test_an_operand_after_an_absent_one_is_rewritten() -> None:
    x, w, residual = an_input(), Param("w", Tensor((4, 4), "f32")), an_input("residual")
    graph = Graph("g", (x, residual), (("y", Linear(x, w, None, Neg(residual))),))
    found = rewrite(graph, lambda op: op.x if isinstance(op, Neg) else None).output("y")
    assert isinstance(found, Linear) and found.residual is residual and found.bias is None


def test_a_deep_graph_needs_no_deep_stack() -> None:
    value: Value = an_input()
    source = value
    for _ in range(20_000):
        value = Neg(value)
    graph = Graph("g", (source,), (("y", value),))
    assert len(graph.ops) == 20_000
    assert repr(value) == "<t.neg  : tensor<[S, 4], f32>>"
    verify(graph)


def test_compile_time_values_are_those_over_params_and_constants() -> None:
    x, w = an_input(), Param("w", Tensor((4,), "f32"))
    scaled = Mul(w, constant(2.0, "f32"))
    graph = Graph("g", (x,), (("y", Add(x, scaled)),))
    assert scaled in graph.constants and w in graph.constants
    assert graph.output("y") not in graph.constants


def test_rewriting_reinfers_users_and_keeps_an_untouched_graph() -> None:
    x = an_input()
    joined = Concat((Neg(x), x), 0)
    graph = Graph("g", (x,), (("y", joined),))
    assert rewrite(graph, lambda op: None) is graph
    halved = rewrite(graph, lambda op: Slice(op.x, 0, 0, 1) if isinstance(op, Neg) else None)
    assert halved.output("y").shape == (S + 1, 4)


def test_an_input_that_is_replaced_is_no_input_any_more() -> None:
    x, z = an_input(), an_input("z")
    graph = substitute_values(Graph("g", (x, z), (("y", Add(x, z)),)), {z: constant(1.0, "f32")})
    assert [value.name for value in graph.inputs] == ["x"]
    unused = substitute_values(Graph("g", (x, z), (("y", Neg(x)),)), {z: constant(1.0, "f32")})
    assert [value.name for value in unused.inputs] == ["x"]


def test_evaluation_binds_symbols_from_shapes() -> None:
    x, y = an_input("x", S), an_input("y", S)
    graph = Graph("g", (x, y), (("out", Slice(Add(x, y), 0, 1, S)),))
    ones = np.ones(5, np.float32)
    assert evaluate(graph, {"x": ones, "y": ones}, no_params)["out"].shape == (4,)
    with pytest.raises(IRError, match="S is 6 here and 5 elsewhere"):
        evaluate(graph, {"x": ones, "y": np.ones(6, np.float32)}, no_params)
    with pytest.raises(IRError, match="input x has shape"):
        evaluate(graph, {"x": ones[None], "y": ones}, no_params)


@pytest.mark.parametrize(
    ("dim", "size", "expected"),
    [
        (S, 5, {"S": 5}), (S + 1, 6, {"S": 5}), (S - 2, 3, {"S": 5}), (7, 7, {}), (2 * S, 10, {}), (2 * S + 1, 11, {}),
        (S + T, 9, {}), (S + T + 1, 10, {}), (S * T, 20, {}), (S * S, 25, {}), (S * S + 1, 26, {}), (S * T + 1, 21, {}),
        (S // 2, 2, {}), (S // 2 + 1, 3, {}), (S - T, 1, {}), (3 - S, 1, {}), (S * S + S, 30, {}),
    ],
)  # fmt: skip
def test_sizes_are_read_off_where_one_symbol_is_plain(dim: object, size: int, expected: dict[str, int]) -> None:
    cache = Input("cache", KV(1, 4, 4, "f32"))
    x = an_input("x", dim)
    given = {"cache": Pages.empty(cache.kv, 1), "x": np.ones(size, np.float32)}
    assert bind_symbols(Graph("g", (cache, x), (("y", x),)), given) == expected
    y = an_input("y", 2, S + 1)
    both = {**given, "y": np.ones((2, 6), np.float32)}
    assert bind_symbols(Graph("g", (cache, x, y), (("y", x),)), both) == {"S": 5}
    for other in (5, 7):
        if expected:
            with pytest.raises(IRError, match=f"input y: S is {other - 1} here and 5 elsewhere"):
                bind_symbols(Graph("g", (x, y), (("y", x),)), {**both, "y": np.ones((2, other), np.float32)})


def test_a_long_chain_keeps_two_results_at_most() -> None:
    made: list[weakref.ref[np.ndarray]] = []

    class Watched(Neg):
        """A negation that is looked at."""

        def evaluate(self, x: np.ndarray) -> np.ndarray:
            assert sum(one() is not None for one in made) <= 1
            result = super().evaluate(x)
            made.append(weakref.ref(result))
            return result

    x = an_input("x", 3)
    value: Value = x
    for _ in range(9):
        value = Watched(value)
    evaluate_values([value], {x: np.ones(3, np.float32)}, no_params, {})
    assert len(made) == 9


def test_evaluation_names_a_missing_input() -> None:
    x = an_input()
    with pytest.raises(IRError, match="no value given for input x"):
        evaluate_values([Neg(x)], {}, no_params, {})


def test_precise_evaluation_is_f64_and_ends_with_its_block() -> None:
    x = an_input("x", S, dtype="bf16")
    graph = Graph("g", (x,), (("y", Add(Cast(x, "f32"), constant(1e-9, "f32"))),))
    with precise():
        assert is_precise()
        assert evaluate(graph, {"x": np.ones(2)}, no_params)["y"].tolist() == [1 + 1e-9] * 2
    assert not is_precise()
    assert evaluate(graph, {"x": np.ones(2, np.float32)}, no_params)["y"].tolist() == [1.0] * 2


def test_values_are_dropped_after_their_last_use() -> None:
    x = an_input()
    y = Neg(x)
    data = {x: np.ones((3, 4), np.float32)}
    # An output that is also an operand survives; so does what the caller gave.
    found = evaluate_values([y, Neg(y), y], data, no_params, {"S": 3})
    assert set(found) == {"0", "1", "2"} and found["0"] is found["2"]
    assert set(data) == {x}
    # One that several ops use, or one op twice, is there for all of them.
    again = Add(Mul(y, y), Neg(y))
    assert (evaluate_values([again], data, no_params, {"S": 3})["0"] == 2).all()
