"""How attention is lowered: keys and values to the cache, query tiles, the merge of splits."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.attention import KVAppend, PagedAttention
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.llm import RMSNorm, Rope, RopeAngles
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.ragged import span_of
from llmc.compiler.ir.structural import Reshape, Slice
from llmc.compiler.ir.types import KV
from llmc.targets.call_facts import keys, pairs
from llmc.targets.cpu.attention import AttentionPlan, attention_plan
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_query import QueryRows
from llmc.targets.cpu.plain import RULES
from llmc.targets.cpu.rope_angles import AnglesProblem
from llmc.targets.cpu.rope_angles import RopeAngles as AngleRows
from llmc.targets.cpu.rope_append import RopeAppend, rope_problem
from llmc.targets.cpu.row_kinds import PROMPT
from llmc.targets.cpu.vector_isa import missing_vectors
from llmc.targets.kernel import CachePart, Call, Joined, Needed, Range, Scratch
from llmc.targets.lowering import Context, Lowered

CACHE_DTYPES = {"f16": "float16", "f32": "float32"}
SPLITS = symbol("SPLITS", 1, 16)
PAGES = symbol("M", 1)
ONE_TOKEN = (Range("T", 1, 1), Range("SPLITS", 1, 1))
"""Where a key-value head is one unit of an append and of attention: a unit sees no key that another one appends."""


@dataclass(frozen=True)
class Heads:
    """Where a [T, heads, dim] value comes from: columns of rows that a linear op wrote, then a norm, then a turn.

    base: what is in memory, rows of `stride` numbers; the heads start at column `offset`.
    """

    base: Value
    stride: int
    offset: int
    norm: RMSNorm | None
    rope: Rope | None


def heads_of(value: Value, context: Context) -> Heads:
    """The longest chain behind `value` that only it uses: rope(norm(reshape(slice(base))))."""
    rope = norm = None
    if isinstance(value, Rope) and context.only_user(value) is not None and value.dtype == "f32":
        rope, value = value, value.x
        if context.only_user(value) is not rope:
            return _rows(value, None, rope)
    if isinstance(value, RMSNorm) and _per_head(value) and context.only_user(value) is not None:
        norm, value = value, value.x
    return _rows(value, norm, rope)


def _per_head(norm: RMSNorm) -> bool:
    return norm.w is not None and norm.w.dtype == "f32" and norm.offset in (0.0, 1.0)


def _rows(value: Value, norm: RMSNorm | None, rope: Rope | None) -> Heads:
    _, heads, dim = value.shape
    assert isinstance(heads, int) and isinstance(dim, int)
    width = heads * dim
    rows = value
    if isinstance(rows, Reshape) and rows.x.rank == 2 and rows.x.shape[1] == width:
        rows = rows.x
        if isinstance(rows, Slice) and rows.axis % 2 == 1 and rows.step == 1 and isinstance(rows.start, int):
            stride = rows.x.shape[1]
            assert isinstance(stride, int)
            return Heads(rows.x, stride, rows.start, norm, rope)
    return Heads(rows, width, 0, norm, rope)


def head_stride(heads: Heads, dim: int) -> tuple[int, int, int]:
    """(element stride of a token, offset of head 0, stride of a head), as `rope_problem` wants rows."""
    return heads.stride, heads.offset, dim


def _angles(rope: Rope | None) -> Value | None:
    return None if rope is None else rope.angles


def _norm_eps(heads: Heads) -> float | None:
    return None if heads.norm is None else heads.norm.eps


def _norm_offset(heads: Heads) -> float:
    return 0.0 if heads.norm is None else heads.norm.offset


def _cache_bytes(kind: KV) -> int:
    """Bytes of a token's keys and values in one layer's cache."""
    return kind.heads * (kind.key_dim + kind.value_dim) * (2 if kind.dtype == "f16" else 4)


def _pairs(rope: Rope | None) -> int:
    if rope is None:
        return 0
    pairs = rope.angles.shape[2]
    assert isinstance(pairs, int)
    return pairs


@RULES.lower(KVAppend, priority=10, needs=missing_vectors)
def append_to_cache(op: Op, context: Context) -> Lowered | str:
    """Keys (normalised and turned on the way) and values into their page."""
    assert isinstance(op, KVAppend)
    reason = _unfit(op)
    if reason:
        return reason
    k, v = heads_of(op.k, context), heads_of(op.v, context)
    if v.norm is not None or v.rope is not None:
        v = _rows(op.v, None, None)
    kind, dim = op.kv, op.kv.key_dim
    problem = rope_problem(
        heads=0,
        kv_heads=kind.heads,
        head_dim=dim,
        value_dim=kind.value_dim,
        pairs=_pairs(k.rope),
        interleaved=k.rope is not None and k.rope.interleaved,
        key_rows=head_stride(k, dim),
        value_rows=head_stride(v, kind.value_dim),
        norm_eps=_norm_eps(k),
        norm_offset=_norm_offset(k),
        cache_dtype=CACHE_DTYPES[kind.dtype],
    )
    append = context.choose(RopeAppend, problem)
    if isinstance(append, str):
        return append
    weight = None if k.norm is None else k.norm.w
    extras = (each for each in (_angles(k.rope), op.slots, weight) if each is not None)
    args = (k.base, v.base, *extras, CachePart(op.cache, "keys"), CachePart(op.cache, "values"))
    tokens = k.base.shape[0]
    note, written = f"[{kind.heads}, {dim}]", tokens * _cache_bytes(kind)
    made, units = append.kernel(problem, context.machine), problem.units(tokens)
    return Lowered((Call(made, args, units, append.grain(problem), note=note, bytes_moved=written),))


def _unfit(op: KVAppend) -> str:
    if op.k.dtype != "f32" or op.v.dtype != "f32":
        return f"keys are {op.k.dtype} and values {op.v.dtype}, not f32"
    if op.kv.dtype not in CACHE_DTYPES:
        return f"no kernel writes a cache of {op.kv.dtype}"
    return ""


@RULES.lower(PagedAttention, priority=10, needs=missing_vectors)
def attention_over_pages(op: Op, context: Context) -> Lowered | str:
    """Queries normalised and turned as they are read, attention by query tiles, splits of the context merged behind."""
    assert isinstance(op, PagedAttention)
    reason = _unread(op)
    if reason:
        return reason
    q = heads_of(op.q, context)
    plan = attention_plan(context, _attention_problem(op, q))
    return plan if isinstance(plan, str) else Lowered(_attention_calls(op, q, plan, _joined(op, q.base, context)))


def _unread(op: PagedAttention) -> str:
    """Which of the operands no kernel reads; empty where all are read."""
    if op.dtype != "f32":
        return f"queries are {op.dtype}, not f32"
    if op.cache.kv.dtype not in CACHE_DTYPES:
        return f"no kernel reads a cache of {op.cache.kv.dtype}"
    if any(value is not None and value.dtype != "f32" for value in (op.sinks, op.slopes)):
        return "sinks and slopes are not f32"
    if op.bias is not None and (op.bias.dtype != "f32" or span_of(op.bias) % PAGE):
        return f"a table of distances {op.bias.type} is not f32, or spans no whole pages"
    return ""


def _attention_problem(op: PagedAttention, q: Heads) -> AttentionProblem:
    kind, (_, heads, dim) = op.cache.kv, op.q.shape
    assert isinstance(heads, int) and isinstance(dim, int)
    rows = QueryRows(
        q.stride,
        q.offset,
        _pairs(q.rope),
        q.rope is not None and q.rope.interleaved,
        _norm_eps(q),
        _norm_offset(q),
    )
    return AttentionProblem(
        heads=heads,
        kv_heads=kind.heads,
        head_dim=dim,
        value_dim=kind.value_dim,
        scale=float(op.scale),
        window=op.window,
        softcap=float(op.softcap),
        sinks=op.sinks is not None,
        alibi=op.slopes is not None,
        cache_dtype=CACHE_DTYPES[kind.dtype],
        causal=op.causal,
        span=0 if op.bias is None else span_of(op.bias),
        query=() if rows == QueryRows(heads * dim) else rows.params(),
    )


def _attention_calls(op: PagedAttention, q: Heads, plan: AttentionPlan, joins: Joined | None) -> tuple[Call, Call]:
    """The query tiles, and behind them the merge of splits, if there are any."""
    kind, (tokens, heads, dim) = op.cache.kv, op.q.shape
    assert isinstance(heads, int) and isinstance(dim, int)
    state = Scratch("state", "f32", plan.state_elements(tokens, SPLITS))
    partial = Scratch("partial", "f32", plan.partial_elements(tokens, SPLITS))
    weight = None if q.norm is None else q.norm.w
    extras = (op.sinks, op.slopes, None if op.causal else op.starts, op.bias, _angles(q.rope), weight)
    args = (
        q.base, CachePart(op.cache, "keys"), CachePart(op.cache, "values"), op.tiles, op.block_table,
        *(value for value in extras if value is not None),
        "result", state, partial, PAGES, SPLITS, *((PROMPT,) if plan.by_kind else ()),
    )  # fmt: skip
    note = f"[{heads}/{kind.heads}, {dim}]"
    seen = pairs(op.window) if op.causal else 2 * pairs(op.window) - tokens  # both sides, a row itself once
    tile = Call(
        plan.tile,
        args,
        plan.tile_units(op.tiles.shape[0], SPLITS),
        note=note,
        bytes_moved=keys(op.window) * _cache_bytes(kind),
        operations=seen * (2 * heads * (dim + kind.value_dim)),
        arithmetic=plan.arithmetic,
        joins=joins,
    )
    merged, units = (state, partial, "result", SPLITS), plan.combine_units(tokens)
    merge = Call(plan.combine, merged, units, plan.combine_grain, (Range("SPLITS", 2, None),), note=note)
    return tile, merge


def _joined(op: PagedAttention, rows: Value, context: Context) -> Joined | None:
    """The append of the newest token, and the linear op that made its queries, keys and values, if that was one."""
    append = op.cache
    if not isinstance(append, KVAppend):
        return None
    kind, query_heads = append.kv, op.q.shape[1]
    assert isinstance(query_heads, int)
    heads = [(heads_of(op.q, context), query_heads // kind.heads * kind.key_dim)]
    heads += [(heads_of(append.k, context), kind.key_dim), (heads_of(append.v, context), kind.value_dim)]
    needs = [Needed(append)]
    # All columns: the loop of attention's units, one a key head, runs no others.
    is_whole = kind.heads * sum(width for _, width in heads) == rows.shape[-1]
    if is_whole and all(each.base is rows and rows.shape[-1] == each.stride for each, _ in heads):
        needs.append(Needed(rows, tuple((each.offset, width) for each, width in heads)))
    return Joined(tuple(needs), ONE_TOKEN)


@RULES.lower(RopeAngles, priority=10)
def angles_of_tokens(op: Op, context: Context) -> Lowered | str:
    """Cosines and sines of each token's position, once a step."""
    assert isinstance(op, RopeAngles)
    if op.frequencies.dtype != "f32" or op.positions.dtype != "i32":
        return f"positions are {op.positions.dtype} and frequencies {op.frequencies.dtype}, not i32 and f32"
    tokens, _, pairs = op.shape
    assert isinstance(pairs, int)
    problem = AnglesProblem(pairs, op.scale)
    angles = context.choose(AngleRows, problem)
    if isinstance(angles, str):
        return angles
    made = angles.kernel(problem, context.machine)
    return Lowered((Call(made, (op.positions, op.frequencies, "result"), tokens, angles.grain(problem)),))


@RULES.lower(Rope, priority=10, needs=missing_vectors)
def turn_heads(op: Op, context: Context) -> Lowered | str:
    """A turn that no attention absorbs."""
    assert isinstance(op, Rope)
    if op.dtype != "f32" or op.angles.dtype != "f32":
        return f"heads are {op.dtype} and angles {op.angles.dtype}, not f32"
    _, heads, dim = op.shape
    assert isinstance(heads, int) and isinstance(dim, int)
    rows = _rows(op.x, None, op)
    problem = rope_problem(
        heads=heads,
        kv_heads=0,
        head_dim=dim,
        pairs=_pairs(op),
        interleaved=op.interleaved,
        query_rows=head_stride(rows, dim),
    )
    turn = context.choose(RopeAppend, problem)
    if isinstance(turn, str):
        return turn
    made, tokens = turn.kernel(problem, context.machine), rows.base.shape[0]
    args = (rows.base, op.angles, "result")
    return Lowered((Call(made, args, problem.units(tokens), turn.grain(problem), note=f"[{heads}, {dim}]"),))
