"""insert-kv-cache: which attentions share a cache, what every attention reads, and why some read none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pass_harness import graph_of

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention, KVAppend, PagedAttention
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.ragged import RelativeBias
from llmc.compiler.ir.types import KV, Tensor
from llmc.compiler.passes.flatten_tokens import SEQUENCES
from llmc.compiler.passes.insert_kv_cache import InsertKVCache
from llmc.compiler.passes.manager import Report
from llmc.errors import CompileError

T = symbol("T", 1, 64)
S = symbol("S", 1, 64)
STARTS = Input("starts", Tensor((SEQUENCES + 1,), "i32"))
TABLE = Param("table", Tensor((4, 2 * PAGE - 1), "f32"))
Size = int | Dim
NO_CACHE = "; no attention of this graph gets a cache"


def x(name: str, heads: int = 2, dim: int = 8, tokens: Size = T) -> Input:
    return Input(name, Tensor((tokens, heads, dim), "f32"))


def attention(q: Value, k: Value, v: Value, **said: object) -> Attention:
    return Attention(q, k, v, **{"causal": True, "scale": 0.5, **said})  # type: ignore[arg-type]


def run(graph: Graph, **options: object) -> tuple[Graph, Report]:
    report = Report()
    return InsertKVCache(**options).run(graph, report), report  # type: ignore[arg-type]


def paged(graph: Graph) -> list[PagedAttention]:
    return [op for op in graph.ops if isinstance(op, PagedAttention)]


def caches(graph: Graph) -> list[str]:
    return [value.name for value in graph.inputs if isinstance(value.type, KV)]


Q, K, V = x("q", 4), x("k"), x("v", 2, 6)


def test_what_an_attention_says_it_says_of_the_cache() -> None:
    sinks, slopes = (Param(name, Tensor((4,), "f32")) for name in ("sinks", "slopes"))
    op = attention(Q, K, V, sinks=sinks, slopes=slopes, window=5, softcap=3.0, bias=RelativeBias(TABLE, T))
    after, report = run(graph_of(op), kv_dtype="f16")
    (found,) = paged(after)
    assert (found.q, found.sinks, found.slopes, found.bias, found.starts) == (Q, sinks, slopes, TABLE, None)
    assert (found.scale, found.causal, found.window, found.softcap) == (0.5, True, 5, 3.0)
    assert [value.name for value in after.inputs] == ["k", "q", "v", "slots", "tiles", "block_table", "cache.0"]
    types = {value.name: str(value.type) for value in after.inputs[3:6]}
    assert types == {
        "slots": "tensor<[T], i32>", "tiles": "tensor<[Q, 4], i32>", "block_table": "tensor<[B, M], i32>",
    }  # fmt: skip
    assert all((symbol.low, symbol.high) == (1, None) for symbol in after.symbols if symbol.name in "QMB")
    assert after.inputs[-1].type == KV(2, 8, 6, "f16")
    assert [name for name, _ in after.outputs] == ["out0", "cache.0.next"]
    (append,) = [op for op in after.ops if isinstance(op, KVAppend)]
    assert (append.k, append.v, append.slots) == (K, V, after.inputs[3]) and after.outputs[1][1] is append
    assert report.hits == {"attention": 1, "cache": 1} and not report.refusals


def test_attentions_over_the_same_keys_and_values_share_a_cache() -> None:
    """Of the same keys alone, or the same values, they do not."""
    other, values = x("other", 4), x("values", 2, 6)
    for k, v, count in ((K, V, 1), (x("keys"), V, 2), (K, values, 2)):
        after, report = run(graph_of(attention(Q, K, V), attention(other, k, v)))
        assert len(caches(after)) == count == report.hits["cache"] and report.hits["attention"] == 2
        assert sum(isinstance(op, KVAppend) for op in after.ops) == count
        assert [name for name, _ in after.outputs[2:]] == [f"cache.{i}.next" for i in range(count)]
    assert all(isinstance(value, KVAppend) for _, value in after.outputs[2:])


def layered(*kinds: int, parallel: bool = False, dim: int = 8) -> Graph:
    """Layers of attention, each over what the one before gives, or over the same; of so many key heads."""
    value: Value = x("q", 4, dim)
    outputs = []
    for heads in kinds:
        keys = s.Slice(value, 1, 0, heads)
        read = attention(value, e.Neg(keys), e.Abs(keys), causal=False)
        outputs.append(read)
        value = value if parallel else read
    return graph_of(*(outputs if parallel else outputs[-1:]), also=[STARTS])


@pytest.mark.parametrize(
    ("graph", "count"),
    [
        (layered(2), 1), (layered(2, 2), 1), (layered(2, 2, 2), 1), (layered(2, 4), 2), (layered(2, 4, 2), 2),
        (layered(2, 4, 2, 4), 2), (layered(2, 2, parallel=True), 2), (layered(2, 4, parallel=True), 2),
    ],
)  # fmt: skip
def test_an_encoder_takes_over_a_cache_that_was_read(graph: Graph, count: int) -> None:
    after, report = run(graph, scratch=True)
    assert len(caches(after)) == count == report.hits["cache"]
    layers = report.hits["attention"]
    assert report.hits.get("shared cache", 0) == layers - count
    assert [name for name, _ in after.outputs] == [name for name, _ in graph.outputs], "nothing is kept"
    assert all(op.starts is STARTS and not op.causal for op in paged(after))
    # Every append is behind all that has read what it writes over.
    appended: dict[Value, list[KVAppend]] = {}
    for op in after.ops:
        if isinstance(op, KVAppend):
            appended.setdefault(op.cache, []).append(op)
    assert all(len(each) == 1 for each in appended.values()), "a cache is used linearly"


def test_a_cache_is_not_taken_over_while_someone_reads_it() -> None:
    """Two attentions read the first keys; the next layer is behind one of them only."""
    first = attention(Q, K, V, causal=False)
    beside = attention(x("other", 4), K, V, causal=False)
    for behind, count in ((first, 2), (s.Concat((first, beside), 1), 1)):
        keys = s.Slice(behind, 1, 0, 2)
        padded = s.Concat((keys, s.Slice(keys, 2, 0, 2)), 2)
        last = attention(x("queries", 4), padded, keys, causal=False)
        after, _ = run(graph_of(beside, last, also=[STARTS]), scratch=True)
        assert len(caches(after)) == count
        # A decoder keeps what each layer has.
        causal = graph_of(attention(x("a", 4), K, V), attention(x("b", 4), e.Neg(K), V))
        assert len(caches(run(causal)[0])) == 2


def test_keys_that_were_written_over_are_appended_again() -> None:
    """The second layer takes over the cache of the first, whose keys the third one reads too."""

    def widened(value: Value) -> Value:
        return s.Concat((value, s.Slice(value, 2, 0, 2)), 2)  # [T, heads, 6] -> [T, heads, 8]

    first = attention(Q, K, V, causal=False)
    keys = s.Slice(first, 1, 0, 2)
    second = attention(x("queries", 4), widened(keys), keys, causal=False)
    third = attention(widened(second), K, V, causal=False)
    after, report = run(graph_of(third, also=[STARTS]), scratch=True)
    assert report.hits == {"attention": 3, "cache": 2, "shared cache": 1}
    appends = [op for op in after.ops if isinstance(op, KVAppend)]
    assert len(appends) == 3 and len({op.cache for op in appends}) == 3, "a cache is used linearly"
    last = after.outputs[0][1]
    assert isinstance(last, PagedAttention) and last.cache is appends[-1] and appends[-1].k is K


def test_a_causal_layer_of_an_encoder_needs_no_lengths() -> None:
    after, _ = run(graph_of(attention(Q, K, V), also=[STARTS]), scratch=True)
    (op,) = paged(after)
    assert op.starts is None and op.causal


def four(causal: bool = True) -> Value:
    """Over a batch [1, T, heads, dim]."""
    q, k, v = (Input(name, Tensor((1, T, 2, 8), "f32")) for name in "qkv")
    return attention(q, k, v, causal=causal)


REFUSED: dict[str, tuple[Callable[[], Graph], bool, str]] = {
    "not causal": (
        lambda: graph_of(attention(Q, K, V, causal=False)), False,
        "it is not causal, so that earlier results change with later tokens",
    ),
    "a batch": (
        lambda: graph_of(four()), False,
        "it does not stand over tokens [T, heads, dim]: flatten-tokens comes first",
    ),
    "a batch of an encoder": (
        lambda: graph_of(four(False), also=[STARTS]), True,
        "it does not stand over tokens [T, heads, dim]: flatten-tokens comes first",
    ),
    "other keys": (
        lambda: graph_of(attention(Q, x("k", tokens=S), x("v", tokens=S))), False,
        "it does not stand over tokens [T, heads, dim]: flatten-tokens comes first",
    ),
    "no starts": (
        lambda: graph_of(attention(Q, K, V, causal=False)), True,
        "nothing says where sequences start: flatten-tokens comes first",
    ),
    "a bias": (
        lambda: graph_of(attention(Q, K, V, bias=Input("bias", Tensor((4, T, T), "f32")))), False,
        "it adds a bias to the scores that distances of tokens do not decide",
    ),
    "fixed tokens": (
        lambda: graph_of(attention(x("q", 4, 8, 7), x("k", 2, 8, 7), x("v", 2, 8, 7))), False,
        "the number of tokens, 7, is fixed",
    ),
    "another size": (
        lambda: graph_of(attention(Q, K, V), also=[Input("more", Tensor((S,), "f32"))]), False,
        "the graph has sizes besides T: flatten-tokens comes first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_attention_that_cannot_read_a_cache_is_refused(name: str) -> None:
    build, scratch, why = REFUSED[name]
    graph = build()
    after, report = run(graph, scratch=scratch)
    assert after is graph and [reason for _, reason in report.refusals] == [why + NO_CACHE]
    assert not report.hits


def test_one_attention_that_reads_none_keeps_all_from_it() -> None:
    graph = graph_of(attention(Q, K, V), attention(x("other", 4), K, V, causal=False))
    after, report = run(graph)
    assert after is graph and len(report.refusals) == 1
    graph = graph_of(e.Neg(Q))
    after, report = run(graph)
    assert after is graph and not report.refusals


def test_another_dtype_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(CompileError) as refused:
        run(graph_of(attention(Q, K, V)), kv_dtype="f64")
    assert str(refused.value) == "kv-dtype 'f64' is unknown; known: f16, f32"
