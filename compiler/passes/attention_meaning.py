"""The ops between the products q k and the softmax, as parameters of `llm.attention`.

The scores are taken apart by an equation (`score_chain`). Their bias is then, in this order, the first of these:

1. by distance: it depends on the distance of key and query alone, by structure (`distances`), and is known at every
   distance below the context: a causal mask, a window, ALiBi; or, in a text, a table of distances;
2. dense: it is evaluated for every query and every key, where these are few enough and no length decides it;
3. proved: a solver shows that whole-number conditions are a causal mask or a window at every length (`mask_solver`);
4. general: it is added as it is, to every pair (not in a text: such a graph keeps its own ops).

Only values that were evaluated or that a proof covers decide. What fits none of the four is refused: the reason names
the op, or the first place at which it differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.ragged import RelativeBias
from llmc.compiler.ir.types import Array, Shape, precise
from llmc.compiler.passes.distance_tables import table_of
from llmc.compiler.passes.distances import Distances
from llmc.compiler.passes.masks import (
    FURTHEST_SHIFT,
    HIDDEN,
    NO_MASK,
    ByDistance,
    Floats,
    Mask,
    Scores,
    Unrecognised,
    describe_mask,
    mask_of,
    require_mask,
)
from llmc.compiler.passes.pair_functions import MOST_PAIRS, PairReader
from llmc.compiler.passes.points import Point
from llmc.compiler.passes.probe import Probe
from llmc.compiler.passes.rewriting import number_of
from llmc.compiler.passes.score_chain import Apart, Chain, fitted, general_bias, reshaped, take_apart
from llmc.errors import IRError

_T = TypeVar("_T")
_BLOCK = 1 << 21  # of those, at a time
_FEW = 2  # what other sizes are while shapes are looked at


@dataclass(frozen=True)
class Meaning:
    """Scores, and a bias that broadcasts to [*batch, heads, Q, K] where the mask does not say all.

    query_factor: what queries [..., Q, dim] are to be multiplied by, [..., Q or 1, 1]; None: 1.
    """

    scores: Scores
    bias: Value | None = None
    query_factor: Value | None = None


@dataclass(frozen=True)
class _Pairs:
    """A mask as functions of a query and a key: what is added, whether the product counts, and its factor."""

    bias: Point
    chosen: Point | None
    factor: Point | None


class MeaningReader:
    """Reads the scores of one graph's attentions."""

    def __init__(self, graph: Graph, probe: Probe) -> None:
        self.graph, self.probe = graph, probe
        self.is_text = probe.positions is not None
        self._readers: dict[Dim, tuple[PairReader, Distances]] = {}
        self._found: dict[tuple[object, ...], tuple[Mask, float] | Unrecognised] = {}
        self._tables: dict[tuple[object, ...], tuple[Value, bool] | Unrecognised] = {}

    def depends_on_tokens(self, value: Value) -> bool:
        """Whether the value depends on more than positions, sizes and weights."""
        return self.probe.depends_on_tokens(value)

    def read(self, chain: Chain, batch: Shape, heads: int, exact_shift: bool) -> Meaning:
        """The meaning of a chain. exact_shift: what is added to all keys of a query counts (attention with sinks).

        Unrecognised says what is in the way.
        """
        part = take_apart(chain)
        factor = _query_factor(chain, part)
        if factor is not None:
            part = replace(part, factor=None)
        return replace(self._read(chain, part, batch, heads, exact_shift), query_factor=factor)

    def _read(self, chain: Chain, part: Apart, batch: Shape, heads: int, exact_shift: bool) -> Meaning:
        """The meaning of scores that `take_apart` has taken apart."""
        if number_of(part.bias) == 0 and part.chosen is None and part.factor is None:
            return Meaning(Scores(part.scale, part.softcap, NO_MASK))
        reason = Unrecognised("tokens decide what is added to its scores")
        if not any(self.depends_on_tokens(value) for value in chain.other_operands):
            try:
                return self._positional(chain, part, batch, heads, exact_shift)
            except Unrecognised as error:
                reason = error
        if self.is_text:
            raise reason
        if part.factor is not None:
            raise Unrecognised(f"its scale differs from place to place: it is a {part.factor.type}")
        bias = general_bias(part, exact_shift)
        bias = fitted(bias, chain.scores.shape[:-2], (*(batch or (1,)), heads), chain.scores.shape[-2:])
        return Meaning(Scores(part.scale, part.softcap, NO_MASK), bias)

    def _positional(self, chain: Chain, part: Apart, batch: Shape, heads: int, exact_shift: bool) -> Meaning:
        """The meaning of a mask that positions and sizes decide."""
        queries, keys = chain.scores.shape[-2:]
        # Only the number of keys is gone through: what any other size decides is not known from one of its values.
        others = frozenset(self.graph.symbols) - (keys.symbols() if isinstance(keys, Dim) else frozenset())
        if any(value in self.probe.decided_by(others) for value in chain.other_operands):
            raise Unrecognised("a size other than the number of keys decides what is added to its scores")
        if isinstance(queries, int) and isinstance(keys, int):
            mask, scale = self._of_fixed_sizes(chain, part, queries, keys, heads, exact_shift)
            _require_heads(mask, chain, part, batch)
            return Meaning(Scores(part.scale * scale, part.softcap, mask))
        if queries != keys or not isinstance(keys, Dim) or (self.is_text and keys != self.probe.size):
            raise Unrecognised(f"scores {chain.scores.type} are not those of one sequence with itself")
        reader, distances = self._reader_of(keys)
        pairs = _Pairs(
            reader.pair(part.bias),
            None if part.chosen is None else reader.pair(part.chosen),
            None if part.factor is None else reader.pair(part.factor),
        )
        key = (reader, pairs, heads, exact_shift)
        if key not in self._found:
            self._found[key] = _answer(lambda: self._mask(reader, distances, pairs, heads, exact_shift))
        found = self._found[key]
        if not isinstance(found, Unrecognised):
            mask, scale = found
            _require_heads(mask, chain, part, batch)
            return Meaning(Scores(part.scale * scale, part.softcap, mask))
        if not self.is_text:
            raise found
        if key not in self._tables:
            reason = found
            self._tables[key] = _answer(lambda: self._table(distances, pairs, heads, keys, reason))
        table = self._tables[key]
        if isinstance(table, Unrecognised):
            raise table
        bias, causal = table
        return Meaning(Scores(part.scale, part.softcap, Mask(causal, 0, None)), bias)

    def _reader_of(self, size: Dim) -> tuple[PairReader, Distances]:
        """The readers of masks over sequences of `size` tokens."""
        if size not in self._readers:
            symbols = sorted(size.symbols(), key=str)
            most = None if len(symbols) != 1 or str(size) != symbols[0].name else symbols[0].high
            if most is None:
                raise Unrecognised(f"its mask is for {size} tokens, and their greatest number is not known")
            probe = self.probe if size == self.probe.size else Probe(self.graph, size)
            reader = PairReader(probe, most, size=size)
            self._readers[size] = reader, Distances(reader)
        return self._readers[size]

    # 1. By distance

    def _mask(
        self, reader: PairReader, distances: Distances, pairs: _Pairs, heads: int, exact_shift: bool
    ) -> tuple[Mask, float]:
        """The mask, and what the scale is times, shown in one of the ways that the module names."""
        rewrite = distances.by_distance if exact_shift else distances.up_to_rows
        bias = _answer(lambda: rewrite(pairs.bias))
        others = _answer(
            lambda: [None if p is None else distances.by_distance(p) for p in (pairs.chosen, pairs.factor)]
        )
        if isinstance(bias, Unrecognised) or isinstance(others, Unrecognised):
            points = [p for p in (pairs.bias, pairs.chosen, pairs.factor) if p is not None]
            by_length = any("length" in p.variables for p in points)
            if not by_length and math.prod(pairs.bias.shape) * reader.most**2 <= MOST_PAIRS:
                return self._dense(reader, pairs, heads, exact_shift)
            from llmc.compiler.passes.mask_solver import proved_mask

            return proved_mask(reader, pairs.bias, pairs.chosen, pairs.factor, exact_shift), 1.0
        added = distances.numbers(bias)
        chosen, factor = (None if p is None else distances.numbers(p).own for p in others)
        scale = _scale(added.relative > HIDDEN, None if chosen is None else chosen > 0, factor)
        return _for_heads(mask_of(added, exact_shift), heads), scale

    def _table(
        self, distances: Distances, pairs: _Pairs, heads: int, size: Dim, reason: Unrecognised
    ) -> tuple[Value, bool]:
        """A bias by distance of a text, and whether it is causal; `reason`: why it is no mask."""
        bias = distances.found_by_distance(pairs.bias)
        if isinstance(bias, Unrecognised) or pairs.factor is not None or math.prod(bias.shape) not in (1, heads):
            raise reason
        if pairs.chosen is not None:
            # Where the product does not count, it must not matter: those keys are hidden, and no query sees none.
            seen = distances.numbers(bias).relative > HIDDEN
            _scale(seen, distances.numbers(distances.by_distance(pairs.chosen)).own > 0, None)
        return RelativeBias(table_of(distances, bias, heads), size), self._is_causal(distances, pairs)

    def _is_causal(self, distances: Distances, pairs: _Pairs) -> bool:
        """Whether a bias by distance hides all later keys; False where it needs weights that cannot be read now."""
        added = _answer(lambda: distances.numbers(distances.by_distance(pairs.bias)))
        causal = added if isinstance(added, Unrecognised) else _answer(lambda: added.is_causal)
        return causal is True

    # 2. Dense

    def _dense(self, reader: PairReader, pairs: _Pairs, heads: int, exact_shift: bool) -> tuple[Mask, float]:
        """The mask, compared for every query and every key; the length decides nothing of it."""
        most = reader.most
        at = np.arange(most)

        def block(point: Point, queries: Array, keys: Array, exact: bool = False) -> Array:
            """[heads, Q, K]"""
            found = _evaluated(reader, point, queries, keys, exact)
            full = np.broadcast_to(found, (len(queries), keys.shape[1], *point.shape))
            return np.moveaxis(full.reshape(len(queries), keys.shape[1], -1), 2, 0)

        last, first = np.full((1, 1), most - 1), np.zeros((1, 1), np.int64)
        edges = [
            np.concatenate([block(pairs.bias, last, at[None], exact), block(pairs.bias, first, at[None, 1:], exact)], 2)
            for exact in (False, True)
        ]
        values = [edge[:, 0].astype(np.float64) for edge in edges]
        places = np.concatenate([at - most + 1, at[1:]])
        mask = mask_of(ByDistance(places, *values), exact_shift)
        scale: float | None = None
        step = max(1, _BLOCK // (most * max(1, math.prod(pairs.bias.shape))))
        for start in range(0, most, step):
            rows = at[start : start + step]
            added = block(pairs.bias, rows[:, None], at[None]).astype(np.float64)
            require_mask(mask, added, rows, at, exact_shift)
            seen = added - added[:, np.arange(len(rows)), rows][..., None] > HIDDEN
            chosen, factor = (None if p is None else block(p, rows[:, None], at[None])
                              for p in (pairs.chosen, pairs.factor))  # fmt: skip
            found = _scale(seen, chosen, factor)
            if scale is not None and found != scale:
                raise Unrecognised("its scale differs from place to place")
            scale = found
        assert scale is not None
        return _for_heads(mask, heads), scale

    def _of_fixed_sizes(
        self, chain: Chain, part: Apart, queries: int, keys: int, heads: int, exact_shift: bool
    ) -> tuple[Mask, float]:
        """The mask of a number of queries and of keys that are fixed, all of it."""
        shapes = [self.probe.shape(value, _FEW) for value in (part.bias, part.chosen, part.factor) if value is not None]
        if max(math.prod(shape[:-2]) for shape in shapes) * queries * keys > MOST_PAIRS or queries > keys:
            raise Unrecognised(f"its mask of {queries} queries and {keys} keys is too large to be looked at")

        def evaluated(value: Value | None) -> Array | None:
            if value is None:
                return None
            try:
                found = self.probe.evaluate([value], _FEW, exact=False)[0]
            except IRError as error:
                raise Unrecognised(f"its mask cannot be evaluated: {error}") from None
            return np.broadcast_to(found, (*found.shape[:-2], queries, keys)).reshape(-1, queries, keys)

        added = evaluated(part.bias)
        assert added is not None
        bias = added.astype(np.float64)
        mask = self._fixed_mask(bias, np.arange(queries) + keys - queries, exact_shift)
        seen = bias - bias.max(axis=-1, keepdims=True) > HIDDEN
        return _for_heads(mask, heads), _scale(seen, evaluated(part.chosen), evaluated(part.factor))

    @staticmethod
    def _fixed_mask(bias: Floats, at: Array, exact_shift: bool) -> Mask:
        same = bool(((bias > HIDDEN) & (bias <= FURTHEST_SHIFT) & (bias == bias[..., :1])).all())
        if same and not (exact_shift and bias.any()):
            return NO_MASK
        return describe_mask(bias, at, exact_shift)


def _query_factor(chain: Chain, part: Apart) -> Value | None:
    """A factor of the products that is the same for all keys, as one of the queries: (f q) k = f (q k).

    So are factors by head or by place, such as those of longer contexts (log n / log N).
    """
    factor = part.factor
    if factor is None or (factor.rank and factor.shape[-1] != 1) or factor.dtype != chain.raw.a.dtype:
        return None
    moved = reshaped(factor, chain.scores.shape, chain.raw.shape) if factor.rank else factor
    return moved if not moved.rank or moved.shape[-1] == 1 else None


def _answer(question: Callable[[], _T]) -> _T | Unrecognised:
    """What the function returns, or the reason why it refuses."""
    try:
        return question()
    except Unrecognised as reason:
        return reason


def _evaluated(reader: PairReader, point: Point, queries: Array, keys: Array, exact: bool) -> Array:
    try:
        if not exact:
            return reader.evaluate(point, queries, keys)
        with precise():
            return reader.evaluate(point, queries, keys)
    except IRError as error:
        raise Unrecognised(f"its mask cannot be evaluated: {error}") from None


def _scale(seen: Array, chosen: Array | None, factor: Array | None) -> float:
    """What products are times where keys are seen [heads, ...]; Unrecognised unless it is one number there, not 0."""
    if chosen is not None and (seen & ~np.broadcast_to(chosen, np.broadcast_shapes(seen.shape, chosen.shape))).any():
        raise Unrecognised("t.where puts a number that does not hide the key in place of a score")
    if factor is None:
        return 1.0
    shape = np.broadcast_shapes(seen.shape, factor.shape)
    found = np.broadcast_to(factor, shape)[np.broadcast_to(seen, shape)].astype(np.float64)
    if not found.size or not np.isfinite(found).all() or (found != found[0]).any() or found[0] == 0:
        raise Unrecognised("its scale differs from place to place")
    return float(found[0])


def _require_heads(mask: Mask, chain: Chain, part: Apart, batch: Shape) -> None:
    """Unrecognised where slopes are those of the sequences of a batch, of which there may be as many as heads."""
    if mask.slopes is None or not batch or part.bias.rank < chain.scores.rank:
        return
    if isinstance(part.bias.shape[0], int) and part.bias.shape[0] > 1:
        raise Unrecognised(f"what is added to its scores, {part.bias.type}, differs within a batch")


def _for_heads(mask: Mask, heads: int) -> Mask:
    """The mask with one slope a head."""
    if mask.slopes is None or len(mask.slopes) == heads:
        return mask
    if len(set(mask.slopes)) > 1:
        raise Unrecognised(f"it adds {len(mask.slopes)} slopes to scores of {heads} heads")
    return replace(mask, slopes=mask.slopes[:1] * heads)
