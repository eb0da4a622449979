"""fuse-attention: matmul, mask, softmax, matmul become `llm.attention`, whatever stands between them.

What the scores mean, and how that is known, `attention_meaning` says. Which head reads which key head is followed
exactly through reshapes, transposes and repetitions (see `attention_operands`). The result is [..., S, heads, dim],
moved back to the source's layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Mul, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Matmul, Reshape, Transpose
from llmc.compiler.ir.types import Shape
from llmc.compiler.passes.attention_meaning import Meaning, MeaningReader
from llmc.compiler.passes.attention_operands import Heads, Operand
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.probe import Probe
from llmc.compiler.passes.row_guards import require_guard
from llmc.compiler.passes.score_chain import STEPS, chain_of
from llmc.compiler.passes.softmaxes import softmax_operand, weighted, without_maximum


@dataclass(frozen=True)
class _Found:
    """One attention: its parts, and the op whose value it replaces."""

    q: Heads
    k: Heads
    v: Heads
    meaning: Meaning
    sinks: Value | None
    result: Op


@dataclass(frozen=True)
class FuseAttention(Pass, name="fuse-attention"):
    """No options."""

    def run(self, graph: Graph, report: Report) -> Graph:
        probe = Probe(graph)
        finder = _Finder(graph, probe)
        found: dict[Op, _Found] = {}
        for op in graph.ops:
            logits = softmax_operand(op)
            if logits is None or not finder.depends_on_tokens(logits):
                continue
            try:
                attention = finder.find(op, logits)
            except Unrecognised as reason:
                report.refuse(op, str(reason))
                continue
            found[attention.result] = attention
            report.hit("attention" if attention.meaning.bias is None else "attention with a bias")
        new: dict[Value, Value] = {}
        for op in graph.ops:
            rebuilt: Value = op.map_operands(lambda value: new.get(value, value))
            if op in found:
                rebuilt = _build(found[op], new)
            if rebuilt is not op:
                new[op] = rebuilt
        return graph.replace_outputs((name, new.get(value, value)) for name, value in graph.outputs)


def _build(found: _Found, new: dict[Value, Value]) -> Value:
    _renewed(found.q.source, new)  # it may be a product that the old graph lacks
    q, k, v = (part.build(new) for part in (found.q, found.k, found.v))
    scores, bias = found.meaning.scores, found.meaning.bias
    slopes = None if scores.mask.slopes is None else constant(scores.mask.slopes, "f32")
    result = Attention(
        q, k, v, found.sinks, slopes, None if bias is None else _renewed(bias, new),
        scale=scores.scale * found.q.factor * found.k.factor, causal=scores.mask.causal, window=scores.mask.window,
        softcap=scores.softcap,
    )  # fmt: skip
    rank = result.rank
    moved = Transpose(result, (*range(rank - 3), rank - 2, rank - 3, rank - 1))
    return moved if moved.shape == found.result.shape else Reshape(moved, found.result.shape)


def _renewed(value: Value, new: dict[Value, Value]) -> Value:
    """A value built on the old graph's values, rebuilt on those of the new graph."""
    if value in new or not isinstance(value, Op):
        return new.get(value, value)
    new[value] = value.map_operands(lambda operand: _renewed(operand, new))
    return new[value]


class _Finder:
    """Finds the attention around a softmax."""

    def __init__(self, graph: Graph, probe: Probe) -> None:
        self.graph, self.probe = graph, probe
        self.reader = MeaningReader(graph, probe)

    def depends_on_tokens(self, value: Value) -> bool:
        """Whether the value depends on more than positions, sizes and weights."""
        return self.reader.depends_on_tokens(value)

    def find(self, softmax: Op, logits: Value) -> _Found:
        """The attention; Unrecognised says what is in the way."""
        scores, column = self._split_sinks(without_maximum(logits))
        if scores.rank < 2:
            raise Unrecognised(f"a softmax over {scores.type} is not over the keys of every query")
        raw = self._product(scores)
        if product(scores.shape[:-2]) != product(raw.shape[:-2]) or raw.shape[-2:] != scores.shape[-2:]:
            raise Unrecognised(f"products {raw.type} and scores {scores.type} differ in shape")
        shares, guards = weighted(self.graph, softmax, column is not None)
        if product(shares.shape[:-2]) != product(raw.shape[:-2]):
            raise Unrecognised(f"{shares.type}, weighted values, are no values of scores {scores.type}")
        if any(dim == 0 for dim in (*raw.shape, *raw.a.shape, *shares.shape)):
            raise Unrecognised(f"scores {scores.type} are empty")
        batch, heads = self._batch_and_heads(raw)
        chain = chain_of(self.graph, raw, scores)
        meaning = self.reader.read(chain, batch, heads, column is not None)
        for guard in guards:
            require_guard(chain, guard)
        sinks = None if column is None else self._sinks(column, heads)
        factor = meaning.query_factor
        scaled = raw.a if factor is None else Mul(raw.a, factor)
        q = Operand(scaled, raw.shape[:-2], False, batch, heads, scalable=True)
        k = Operand(raw.b, raw.shape[:-2], True, batch, heads, scalable=True)
        v = Operand(shares.b, shares.shape[:-2], False, batch, heads, scalable=False)
        queries, keys, values = _traced(q, shared=False), _traced(k), _traced(v)
        if keys.heads != values.heads:
            # The one with fewer heads is the one that was traced further; take both as they reach the products.
            keys, values = _traced(k, shared=False), _traced(v, shared=False)
        return _Found(queries, keys, values, meaning, sinks, shares)

    def _batch_and_heads(self, raw: Matmul) -> tuple[Shape, int]:
        """How the leading axes of scores are read. One sequence has no batch; otherwise the first of several axes."""
        leading = raw.shape[:-2]
        total = product(leading)
        if isinstance(total, int) and (self.reader.is_text or len(leading) < 2):
            return (), total
        inner = product(leading[1:])
        if len(leading) > 1 and isinstance(inner, int):
            return leading[:1], inner
        return leading, 1

    def _split_sinks(self, logits: Value) -> tuple[Value, Value | None]:
        """The scores, and the column of sinks [..., S, 1] that is concatenated to them."""
        if not isinstance(logits, Concat) or logits.axis % logits.rank != logits.rank - 1:
            return logits, None
        if len(logits.xs) != 2 or logits.xs[1].shape[-1] != 1 or self.depends_on_tokens(logits.xs[1]):
            raise Unrecognised("something other than one column of sinks is concatenated to its scores")
        return without_maximum(logits.xs[0]), logits.xs[1]

    def _sinks(self, column: Value, heads: int) -> Value:
        """Sinks [heads] from their column [..., heads, S, 1]."""
        value = column
        while isinstance(value, (Broadcast, Reshape)) and product(value.shape) != heads:
            value = value.x
        if not self.probe.is_constant(value) or product(value.shape) != heads:
            raise Unrecognised("its sinks are not one number a head, known when compiling")
        return value if value.shape == (heads,) else Reshape(value, (heads,))

    def _product(self, scores: Value) -> Matmul:
        """The one product of activations that the scores are a function of."""
        leaves: list[Matmul] = []
        others: list[Value] = []
        seen: set[Value] = set()
        stack = [scores]
        while stack:
            value = stack.pop()
            if value in seen or not self.depends_on_tokens(value):
                continue
            seen.add(value)
            if isinstance(value, Matmul) and self.depends_on_tokens(value.a) and self.depends_on_tokens(value.b):
                leaves.append(value)
            elif isinstance(value, STEPS):
                stack.extend(value.operands)
            else:
                others.append(value)
        if others and (self.reader.is_text or not leaves):
            name = others[0].name if isinstance(others[0], Op) else "an input"
            raise Unrecognised(f"its scores depend on {name}: {others[0].type}, which is no product of q and k")
        if len(leaves) != 1:
            raise Unrecognised(f"its scores depend on {len(leaves)} products of activations")
        return leaves[0]


def _traced(operand: Operand, shared: bool = True) -> Heads:
    found = operand.traced(shared)
    if found is None:
        raise Unrecognised(f"it is not clear which head of {operand.value.type} is which")
    return found
