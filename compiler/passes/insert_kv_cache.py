"""insert-kv-cache: attention over the tokens at hand becomes attention over a paged cache of all tokens so far.

Each `llm.attention` over [T, heads, dim] appends its keys and values to a cache and reads its own sequence back. New
inputs: slots i32[T], tiles i32[Q, 4], block_table i32[B, M], and `cache.N: kv<...>` in the order of the layers; new
outputs: `cache.N.next`. Two attentions over the same keys and values share one cache.

An encoder (`scratch=true`) sees whole sequences in one step, so that its cache holds nothing between steps: there are
no outputs `cache.N.next`, and a layer whose keys and values come of what the layer before has read takes over the
cache of that layer. Attention that is not causal sees the whole sequence: `starts` i32[B + 1] says how long that is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmc.compiler.ir.attention import Attention, KVAppend, PagedAttention
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph, substitute_values, topological
from llmc.compiler.ir.llm import static
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.ragged import RelativeBias
from llmc.compiler.ir.types import KV, Tensor
from llmc.compiler.passes.flatten_tokens import SEQUENCES
from llmc.compiler.passes.manager import Pass, Report
from llmc.errors import CompileError

KV_DTYPES = ("f16", "f32")


@dataclass(frozen=True)
class InsertKVCache(Pass, name="insert-kv-cache"):
    """`kv_dtype`: what keys and values are stored in (f16 or f32). `scratch`: nothing is kept between steps."""

    kv_dtype: str = "f32"
    scratch: bool = False

    def run(self, graph: Graph, report: Report) -> Graph:
        if self.kv_dtype not in KV_DTYPES:
            raise CompileError(f"kv-dtype {self.kv_dtype!r} is unknown; known: {', '.join(KV_DTYPES)}")
        attentions = [op for op in graph.ops if isinstance(op, Attention)]
        reasons = [(op, _refusal(op, graph, self.scratch)) for op in attentions]
        for op, reason in reasons:
            if reason:
                report.refuse(op, f"{reason}; no attention of this graph gets a cache")
        if not attentions or any(reason for _, reason in reasons):
            return graph
        given = {value.name: value for value in graph.inputs}

        tokens = attentions[0].q.shape[0]
        slots = Input("slots", Tensor((tokens,), "i32"))
        tiles = Input("tiles", Tensor((symbol("Q", 1), 4), "i32"))
        block_table = Input("block_table", Tensor((SEQUENCES, symbol("M", 1)), "i32"))
        starts = given.get("starts")
        caches: list[_Cache] = []
        versions: dict[tuple[Value, Value], tuple[_Cache, _Version]] = {}

        def rule(op: Value) -> Value | None:
            if not isinstance(op, Attention):
                return None
            found = versions.get((op.k, op.v))
            if found is None or found[0].versions[-1] is not found[1]:
                kind = KV(static(op.k.shape[1]), static(op.k.shape[2]), static(op.v.shape[2]), self.kv_dtype)
                cache = self._cache_for(op, kind, caches, report)
                version = _Version(KVAppend(cache.latest, _wide(op.k), _wide(op.v), slots))
                versions[op.k, op.v] = cache, version
                cache.versions.append(version)
            else:
                version = found[1]
            report.hit("attention")
            paged = PagedAttention(
                _wide(op.q), version.append, tiles, block_table, op.sinks, op.slopes,
                starts=None if op.causal else starts, bias=_table(op), scale=op.scale, causal=op.causal,
                window=op.window, softcap=op.softcap,
            )  # fmt: skip
            version.readers.append(paged)
            return paged if op.dtype == paged.dtype else Cast(paged, op.dtype)

        after = substitute_values(graph, {}, rule)
        following = () if self.scratch else tuple((f"{c.input.name}.next", c.latest) for c in caches)
        inputs = (*after.inputs, slots, tiles, block_table, *(cache.input for cache in caches))
        return Graph(graph.name, inputs, (*after.outputs, *following))

    def _cache_for(self, op: Attention, kind: KV, caches: list[_Cache], report: Report) -> _Cache:
        """A new cache, or, where nothing is kept, one that every attention so far has read before `op` appends."""
        if self.scratch:
            needed = set(topological((op.k, op.v)))
            for cache in caches:
                if cache.input.type == kind and all(reader in needed for reader in cache.versions[-1].readers):
                    report.hit("shared cache")
                    return cache
        caches.append(_Cache(Input(f"cache.{len(caches)}", kind)))
        report.hit("cache")
        return caches[-1]


@dataclass
class _Version:
    """What a cache holds after an append, and who reads that."""

    append: KVAppend
    readers: list[Op] = field(default_factory=list)


@dataclass
class _Cache:
    """A cache, and its versions in order."""

    input: Input
    versions: list[_Version] = field(default_factory=list)

    @property
    def latest(self) -> Value:
        return self.versions[-1].append if self.versions else self.input


def _wide(value: Value) -> Value:
    """Halves as f32, which caches are read and written in."""
    return Cast(value, "f32") if value.dtype in ("f16", "bf16") else value


def _table(op: Attention) -> Value | None:
    return op.bias.table if isinstance(op.bias, RelativeBias) else None


def _refusal(op: Attention, graph: Graph, scratch: bool) -> str:
    """Why this attention cannot read a cache; empty when it can."""
    if not op.causal and not scratch:
        return "it is not causal, so that earlier results change with later tokens"
    if op.q.rank != 3 or op.q.shape[0] != op.k.shape[0]:
        return "it does not stand over tokens [T, heads, dim]: flatten-tokens comes first"
    if scratch and all(value.name != "starts" for value in graph.inputs):
        return "nothing says where sequences start: flatten-tokens comes first"
    if op.bias is not None and not isinstance(op.bias, RelativeBias):
        return "it adds a bias to the scores that distances of tokens do not decide"
    if not isinstance(op.q.shape[0], Dim):
        return f"the number of tokens, {op.q.shape[0]}, is fixed"
    if any(symbol.name not in ("T", "B") for symbol in graph.symbols):
        return "the graph has sizes besides T: flatten-tokens comes first"
    return ""
