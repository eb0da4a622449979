"""What a compiled model will need, from its graph alone: no weight is read and no kernel is built.

Give it the graph after all passes: weights then have their final encodings, and caches are inputs. A graph straight
from a frontend works too and counts what is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.compiler.encodings import storage_bytes
from llmc.compiler.ir.dims import concrete, product
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import parameter_count
from llmc.compiler.ir.llm import (
    Attention,
    Embed,
    GatedLinear,
    KVAppend,
    LayerNorm,
    Linear,
    PagedAttention,
    RMSNorm,
)
from llmc.compiler.ir.op import Op, Tokens, Value
from llmc.compiler.ir.structural import Broadcast, Gather, Matmul, Reshape, Slice, Transpose
from llmc.compiler.ir.types import KV, Tensor, itemsize
from llmc.compiler.passes.schemes import find_head

GROUPS = ("embedding", "attention", "mlp", "head", "norms and biases", "other")
LIBRARY_BYTES = 1 << 20  # kernels, driver, manifest and tokenizer: 0.3 to 3 MiB

_OF_STEPS = ("S", "T", "R", "Q", "B", "M")  # sizes of a step of tokens

# Between a projection and the attention that it serves are ops that treat each token alone: norms, rotations, clamps.
_ENDS = (Tokens.MIXES, Tokens.WEIGHTS)
# Ops whose result lies in their operand's memory.
_VIEWS = (Reshape, Slice, Broadcast)


@dataclass(frozen=True)
class Estimate:
    """Memory of one compiled model, in bytes unless said otherwise.

    weights: by part, a value that two parts share counted once, for the first of GROUPS that reads it (a head tied to
    the embedding is in `embedding`). parameters: numbers in the checkpoint's tensors that the model reads.
    cache_per_token: keys and values of all layers for one token; cache: for `context` tokens of `sequences` sequences,
    in whole pages, or for those of a step where the cache keeps nothing between steps. arena: activations of a step of
    `step` tokens, at the fullest moment, without padding. tables: the part of the embedding that nothing multiplies by.
    """

    weights: Mapping[str, int]
    tables: int
    parameters: int
    cache_per_token: int
    context: int
    sequences: int
    cache: int
    step: int
    arena: int

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(self.weights.values())

    @property
    def file_bytes(self) -> int:
        """The artifact, roughly: weights and a MiB of everything else."""
        return self.weight_bytes + LIBRARY_BYTES

    @property
    def memory(self) -> int:
        """While running: weights, cache and arena."""
        return self.weight_bytes + self.cache + self.arena

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, all parts counted."""
        return 8 * self.weight_bytes / self.parameters if self.parameters else 0.0

    @property
    def read_per_token(self) -> int:
        """Weight bytes that decoding one token reads: all but the tables in which it only looks up a row."""
        return self.weight_bytes - self.tables


def estimate(graph: Graph, *, context: int, step: int = 512, sequences: int = 1) -> Estimate:
    """Memory by part for `sequences` sequences of `context` tokens in steps of at most `step` tokens."""
    weights, tables = _weights(graph)
    per_token = _cache_per_token(graph)
    pages = -(-context // PAGE) * sequences
    if _keeps_nothing(graph):
        pages = min(pages, step // PAGE + sequences)
    return Estimate(
        weights=weights,
        tables=tables,
        parameters=parameter_count(graph),
        cache_per_token=per_token,
        context=context,
        sequences=sequences,
        cache=pages * PAGE * per_token,
        step=step,
        arena=_arena(graph, min(step, context * sequences)),
    )


def stored_bits(graph: Graph) -> int:
    """Bits of all weights that a step reads."""
    return 8 * sum(_weights(graph)[0].values())


def _weights(graph: Graph) -> tuple[dict[str, int], int]:
    """Bytes of every compile-time value that an op of the step reads, by group; and of tables only looked up in."""
    head = find_head(graph)
    attention = _attention_linears(graph)
    readers: dict[Value, set[str]] = {}
    for op in graph.ops:
        if op in graph.constants:
            continue
        for value in op.operands:
            if value in graph.constants and isinstance(value.type, Tensor):
                readers.setdefault(value, set()).add(_group(op, value, head, attention))
    totals = dict.fromkeys(GROUPS, 0)
    tables = 0
    for value, groups in readers.items():
        size = storage_bytes(value.tensor)
        totals[min(groups, key=GROUPS.index)] += size
        if groups == {"embedding"}:
            tables += size
    return totals, tables


def _group(op: Op, value: Value, head: Linear | None, attention: frozenset[Op]) -> str:
    if isinstance(op, Embed):
        return "embedding"
    if isinstance(op, (RMSNorm, LayerNorm)):
        return "norms and biases"
    if not isinstance(op, (Linear, GatedLinear)):
        return "other"
    if value is not op.w:
        return "norms and biases"
    if op is head:
        return "head"
    return "attention" if op in attention else "mlp"


def _attention_linears(graph: Graph) -> frozenset[Op]:
    """Linears whose result attention reads, or which read attention's result.

    Where no attention was recognised, a product of two values that are computed at run time stands for it.
    """
    found: set[Op] = set()
    for op in graph.ops:
        if _is_attention(op, graph):
            found |= _linears_behind([operand for operand in op.operands if operand not in graph.constants])
        if isinstance(op, Linear):
            value: Value = op.x
            while isinstance(value, (Reshape, Transpose, Cast)):
                value = value.x
            if isinstance(value, Op) and _is_attention(value, graph):
                found.add(op)
    return frozenset(found)


def _is_attention(op: Op, graph: Graph) -> bool:
    if isinstance(op, Matmul):
        # A gathered operand is the weight of an expert.
        return not any(operand in graph.constants or _is_gathered(operand) for operand in op.operands)
    return isinstance(op, (Attention, PagedAttention, KVAppend))


def _is_gathered(value: Value) -> bool:
    while isinstance(value, (Reshape, Transpose, Cast)):
        value = value.x
    return isinstance(value, Gather)


def _linears_behind(values: list[Value]) -> set[Op]:
    found: set[Op] = set()
    seen: set[Value] = set()
    while values:
        value = values.pop()
        if value in seen:
            continue
        seen.add(value)
        if isinstance(value, Linear):
            found.add(value)
        elif isinstance(value, Op) and value.tokens not in _ENDS and not isinstance(value, (GatedLinear, Embed)):
            values.extend(value.operands)
    return found


def _cache_per_token(graph: Graph) -> int:
    """Bytes that one token adds to all caches; from the attention ops, in f16, where no cache is there yet."""
    kinds = [value.type for value in graph.inputs if isinstance(value.type, KV)]
    if kinds:
        return sum(kind.heads * (kind.key_dim + kind.value_dim) * itemsize(kind.dtype) for kind in kinds)
    total = 0
    for op in graph.ops:
        if isinstance(op, Attention):
            per_token = product((op.k.shape[-2], op.k.shape[-1] + op.v.shape[-1]))
            total += per_token * itemsize("f16") if isinstance(per_token, int) else 0
    return total


def _keeps_nothing(graph: Graph) -> bool:
    """Whether caches are scratches of a step: no output is their next version."""
    kept = any(isinstance(value.type, KV) for _, value in graph.outputs)
    return not kept and any(isinstance(value.type, KV) for value in graph.inputs)


def _arena(graph: Graph, tokens: int) -> int:
    """Bytes of the values that are alive at the fullest moment of a step of `tokens` tokens.

    A size that counts no tokens, sequences or pages is the greatest that it may be.
    """
    sizes = {
        symbol.name: tokens if symbol.name in _OF_STEPS or symbol.high is None else symbol.high
        for symbol in graph.symbols
    }
    owner: dict[Value, Value] = {}
    for op in graph.ops:
        if op not in graph.constants and isinstance(op.type, Tensor):
            inner = op.operands[0] if isinstance(op, _VIEWS) else op
            owner[op] = owner.get(inner, inner)
    order = [op for op in graph.ops if op in owner]
    last: dict[Value, int] = {}
    for index, op in enumerate(order):
        for value in (op, *op.operands):
            if value in owner:
                last[owner[value]] = index
    for _, value in graph.outputs:
        if value in owner:
            last[owner[value]] = len(order)
    ends: dict[int, list[Value]] = {}
    for value, index in last.items():
        ends.setdefault(index, []).append(value)
    alive = most = 0
    for index, op in enumerate(order):
        if owner[op] is op:
            alive += _size(op, sizes)
            most = max(most, alive)
        alive -= sum(_size(value, sizes) for value in ends.get(index, ()) if isinstance(value, Op))
    return most


def _size(value: Value, sizes: Mapping[str, int]) -> int:
    return concrete(product(value.shape), sizes) * itemsize(value.dtype)
