"""What attention over the paged cache computes, whichever template writes its kernel."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.encoded import PAGE
from llmc.targets.cpu.attention_query import QueryRows
from llmc.targets.kernel import Param
from llmc.targets.template import Problem


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """One unit is (tile, key-value head, split): u = (tile * kv_heads + kv_head) * S + split. Arguments:

        query f32[T, heads, head_dim], keys cache[pages, kv_heads, head_dim, 32], values cache[pages, kv_heads, 32,
        value_dim], tiles i32[Q, 4], block_table i32[B, M], [sinks f32[heads]], [slopes f32[heads]] (alibi),
        [starts i32[B + 1]] (not causal), [bias f32[heads, 2 * span - 1]] (span), [angles f32[T, 2, pairs],
        query_weight f32[head_dim]] (query), out f32[T, heads, value_dim], state f32[T, heads, S, 2],
        partial f32[T, heads, S - 1, value_dim], M, S

    window: how many keys a row sees, itself included (0: all). softcap c: scores become c * tanh(score / c) (0: off).
    sinks: a logit a head joins the softmax's denominator. alibi: slope * (key position - query position) is added to
    the scaled score. cache_dtype: float16 or float32. causal: a row sees the keys of its sequence up to its own
    position, the last `window` of them; else all keys, rows starts[s] to starts[s + 1], or those less than `window`
    away. span: bias adds a number by key - query + span - 1; no sequence is longer than span, which is a whole number
    of pages (0: none). query: what `QueryRows` is made from, where the queries are not rows of their own.

    The pages that a tile sees are in parts (attention_parts.py). Where S == 1, one unit does all of them, out is the
    result, and state and partial are not touched. Otherwise unit s does the tile's s-th part (unit 0 does all, if they
    are more than S) and writes (greatest score, denominator) to state and its unnormalised sum of values to out (s = 0)
    or to partial (s - 1); `attention_combine` merges them. A row whose part has no visible key writes finite numbers of
    weight zero, and a unit without a part a denominator of zero. Cache slots that no row of the tile may see are read
    but never enter a result.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    cache_dtype: str = "float16"
    causal: bool = True
    span: int = 0
    query: tuple[Param, ...] = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"attention: {self.heads} query heads are no multiple of {self.kv_heads} key-value heads")
        if self.cache_dtype not in ("float16", "float32"):
            raise ValueError(f"attention: cache_dtype must be float16 or float32, not {self.cache_dtype!r}")
        if self.span % PAGE:
            raise ValueError(f"attention: a table of distances spans whole pages of {PAGE} tokens, not {self.span}")

    @property
    def query_rows(self) -> QueryRows:
        """Where queries lie, and what happens to them first."""
        return QueryRows(*self.query) if self.query else QueryRows(self.heads * self.head_dim)  # type: ignore[arg-type]

    @property
    def group(self) -> int:
        """Query heads that read one key-value head."""
        return self.heads // self.kv_heads
