"""insert-kv-cache: attention over the tokens at hand becomes attention over a paged cache of all tokens so far.

Each `llm.attention` over [T, heads, dim] appends its keys and values to a cache and reads its own sequence back. New
inputs: slots i32[T], tiles i32[Q, 4], block_table i32[B, M], and `cache.N: kv<...>` in the order of the layers; new
outputs: `cache.N.next`. Two attentions over the same keys and values share one cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.llm import Attention, KVAppend, PagedAttention, static
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import KV, Tensor
from llmc.compiler.passes.manager import Pass, Report
from llmc.errors import CompileError

KV_DTYPES = ("f16", "f32")


@dataclass(frozen=True)
class InsertKVCache(Pass, name="insert-kv-cache"):
    """`kv_dtype`: what keys and values are stored in (f16 or f32)."""

    kv_dtype: str = "f32"

    def run(self, graph: Graph, report: Report) -> Graph:
        if self.kv_dtype not in KV_DTYPES:
            raise CompileError(f"kv-dtype {self.kv_dtype!r} is unknown; known: {', '.join(KV_DTYPES)}")
        attentions = [op for op in graph.ops if isinstance(op, Attention)]
        reasons = [(op, _refusal(op, graph)) for op in attentions]
        for op, reason in reasons:
            if reason:
                report.refuse(op, f"{reason}; no attention of this graph gets a cache")
        if not attentions or any(reason for _, reason in reasons):
            return graph

        tokens = attentions[0].q.shape[0]
        slots = Input("slots", Tensor((tokens,), "i32"))
        tiles = Input("tiles", Tensor((symbol("Q", 1), 4), "i32"))
        block_table = Input("block_table", Tensor((symbol("B", 1), symbol("M", 1)), "i32"))
        caches: list[Input] = []
        versions: dict[tuple[Value, Value], Value] = {}
        appended: list[Value] = []

        def rule(op: Value) -> Value | None:
            if not isinstance(op, Attention):
                return None
            if (op.k, op.v) not in versions:
                kind = KV(static(op.k.shape[1]), static(op.k.shape[2]), static(op.v.shape[2]), self.kv_dtype)
                caches.append(Input(f"cache.{len(caches)}", kind))
                versions[op.k, op.v] = KVAppend(caches[-1], op.k, op.v, slots)
                appended.append(versions[op.k, op.v])
                report.hit("cache")
            report.hit("attention")
            return PagedAttention(
                op.q, versions[op.k, op.v], tiles, block_table, op.sinks, op.slopes,
                scale=op.scale, window=op.window, softcap=op.softcap,
            )  # fmt: skip

        after = substitute_values(graph, {}, rule)
        outputs = (*after.outputs, *((f"{cache.name}.next", v) for cache, v in zip(caches, appended, strict=True)))
        return Graph(graph.name, (*after.inputs, slots, tiles, block_table, *caches), outputs)


def _refusal(op: Attention, graph: Graph) -> str:
    """Why this attention cannot read a cache; empty when it can."""
    if not op.causal:
        return "it is not causal, so that earlier results change with later tokens"
    if op.q.rank != 3 or op.q.shape[0] != op.k.shape[0]:
        return "it does not stand over tokens [T, heads, dim]: flatten-tokens comes first"
    if not isinstance(op.q.shape[0], Dim):
        return f"the number of tokens, {op.q.shape[0]}, is fixed"
    if any(symbol.name not in ("T",) for symbol in graph.symbols):
        return "the graph has sizes besides T: flatten-tokens comes first"
    return ""
