"""What the scores of one attention mean: described by positions where that can be said, else as a bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import FLOATS, INTEGERS, Array, Shape, Tensor
from llmc.compiler.passes.masks import HIDDEN, Mask, Scores, Unrecognised, describe_mask, describe_scores
from llmc.compiler.passes.probe import NOT_TOKENS, Probe
from llmc.compiler.passes.relative_bias import relative_table
from llmc.compiler.passes.rewriting import number_of
from llmc.compiler.passes.score_bias import Chain, added, fitted, hides_nothing, scale_and_softcap
from llmc.errors import IRError

_NONE = Mask(False, 0, None)
_MOST = 1 << 24  # elements of a constant mask that is looked at, at most
_MOST_GUARDED = 1 << 22  # elements of scores that are evaluated to see which rows a guard zeroes, at most
_FEW = 5  # tokens to evaluate for where their number is free
_SPAN = 600  # tokens that a relative bias is looked at for: beyond where buckets of distances usually end


@dataclass(frozen=True)
class Meaning:
    """Scores, and a bias that broadcasts to [*batch, heads, Q, K] where the mask does not say all."""

    scores: Scores
    bias: Value | None = None


class ScoreReader:
    """Reads the chains of one graph. is_text: whether it is one sequence of tokens at positions."""

    def __init__(self, graph: Graph, probe: Probe) -> None:
        self.graph, self.probe = graph, probe
        self.is_text = probe.positions is not None
        self._probes: dict[Dim, Probe] = {}

    def acts(self, value: Value) -> bool:
        """Whether the value depends on more than positions, sizes and weights."""
        return bool(self.probe.sources.get(value, frozenset()) - NOT_TOKENS)

    def read(self, chain: Chain, batch: Shape, heads: int, exact_shift: bool) -> Meaning:
        """The meaning of a chain; exact_shift: as `describe_scores` has it. Unrecognised says what is in the way."""
        size = chain.scores.shape[-1]
        positional = not any(self.acts(value) for value in chain.met)
        counts_tokens = chain.scores.shape[-2] == size and (not self.is_text or size == self.probe.size)
        if positional and counts_tokens and isinstance(size, Dim):
            probe = self._counting(size)
            try:
                return Meaning(describe_scores(probe, chain.raw, chain.scores, exact_shift))
            except Unrecognised:
                relative = self._relative(probe, chain, batch, heads)
                if relative is not None:
                    return relative
                if self.is_text:
                    raise
        scale, softcap = scale_and_softcap(chain)
        bias = added(chain)
        mask = self._constant_mask(chain, bias, heads, exact_shift)
        if mask is not None:
            return Meaning(Scores(scale, softcap, mask))
        return Meaning(Scores(scale, softcap, _NONE), _leading(bias, chain, batch, heads))

    def _counting(self, size: Dim) -> Probe:
        """The probe whose number of tokens is `size`."""
        if size == self.probe.size:
            return self.probe
        if size not in self._probes:
            self._probes[size] = Probe(self.graph, size)
        return self._probes[size]

    def _relative(self, probe: Probe, chain: Chain, batch: Shape, heads: int) -> Meaning | None:
        """The chain as a bias that depends on distances only."""
        try:
            scale, softcap = scale_and_softcap(chain)
        except Unrecognised:
            return None
        bias = added(chain)
        assert probe.size is not None
        span = min([_SPAN, *(s.high for s in probe.size.symbols() if s.high is not None)])
        table = relative_table(probe, bias, span, stand_ins=True)
        if table is None or len(table) not in (1, heads):
            return None
        ahead = table[:, span:]
        causal = bool(ahead.size and (ahead < HIDDEN).all())
        return Meaning(Scores(scale, softcap, Mask(causal, 0, None)), _leading(bias, chain, batch, heads))

    def _constant_mask(self, chain: Chain, bias: Value, heads: int, exact_shift: bool) -> Mask | None:
        """What a bias of known numbers means as a mask; None where it is not known, or means no mask."""
        queries, keys = chain.scores.shape[-2:]
        if not all(self.probe.is_constant(v) or number_of(v) is not None for v in chain.met):
            return None
        if not isinstance(queries, int) or not isinstance(keys, int):
            return None
        if math.prod(self.probe.shape(bias, _FEW)[:-2]) * queries * keys > _MOST:
            return None
        try:
            found = np.asarray(self.probe.evaluate([bias], _FEW)[0], np.float64)
        except IRError:
            return None
        found = np.broadcast_to(found, (*found.shape[:-2], queries, keys)).reshape(-1, queries, keys)
        if hides_nothing(found) and not (exact_shift and found.any()):
            return _NONE
        try:
            mask = describe_mask(found, np.arange(queries) + keys - queries, exact_shift, np.arange(keys))
        except Unrecognised:
            return None
        return mask if mask.slopes is None or len(mask.slopes) == heads else None

    def require_guard(self, chain: Chain, guard: Value) -> None:
        """Unrecognised unless `guard` [..., Q, 1] holds only where a row of scores hides every key.

        Such rows have no shares (0 / 0), and `llm.attention` gives zeros there.
        """
        shape = self.probe.shape(chain.scores, _FEW)
        if math.prod(shape) > _MOST_GUARDED:
            raise Unrecognised(
                f"scores {chain.scores.type} are too large to see when its probabilities are set to zero"
            )
        for given in (self._random_met(chain), self._random_inputs()):
            raw = np.random.default_rng(2).standard_normal(self.probe.shape(chain.raw, _FEW))
            try:
                found = self.probe.evaluate(
                    [chain.scores, guard], _FEW, None, {**given, chain.raw: raw}, stand_ins=True
                )
            except IRError:
                continue
            hidden = np.isneginf(found[0]).all(axis=-1, keepdims=True)
            condition = np.asarray(found[1], bool)
            if condition.size == hidden.size:
                condition = condition.reshape(hidden.shape)
            if condition.ndim <= hidden.ndim and not (condition & ~hidden).any():
                return
        raise Unrecognised("its probabilities are set to zero in rows that see keys")

    def _random_met(self, chain: Chain) -> dict[Value, Array]:
        generator = np.random.default_rng(1)
        values = (v for v in chain.met if number_of(v) is None)
        return {v: _random_mask(v, self.probe.shape(v, _FEW), generator) for v in values}

    def _random_inputs(self) -> dict[Value, Array]:
        generator = np.random.default_rng(1)
        inputs = (v for v in self.graph.inputs if isinstance(v, Input) and isinstance(v.type, Tensor))
        return {
            v: _random_mask(v, self.probe.shape(v, _FEW), generator) for v in inputs if v is not self.probe.positions
        }


def _random_mask(value: Value, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Numbers for what a mask is made of, some rows of it all hidden."""
    seen: NDArray[np.bool_] = np.asarray(generator.random(shape) < 0.7)
    if len(shape) > 1:
        seen &= generator.random((*shape[:-1], 1)) < 0.6
    if value.dtype == "bool":
        return seen
    if value.dtype in INTEGERS:
        return np.asarray(generator.integers(0, 3, shape))
    assert value.dtype in FLOATS
    return np.where(seen, generator.standard_normal(shape), -np.inf)


def _leading(bias: Value, chain: Chain, batch: Shape, heads: int) -> Value:
    """A bias of the scores as one of [*batch, heads, Q, K]."""
    return fitted(bias, chain.scores.shape[:-2], (*(batch or (1,)), heads), chain.scores.shape[-2:])
