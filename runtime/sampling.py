"""Choose the next token from logits. Pure functions on numpy arrays, in the order that transformers applies them:
repetition penalty, temperature, top-k, top-p, min-p, then a draw from what is left.

The filters work on *candidates*: token ids and their logits, the most likely first. With a vocabulary of 150,000 the
full sort that this seems to need would cost more than the rest of the step, so candidates are taken from the top only
as far as the filters can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import RuntimeStateError

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

_FIRST_CANDIDATES = 512


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing; seed None draws a fresh one."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (off) to 1")
        _require(0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise RuntimeStateError(f"{name} must be {wanted}, not {value}")


def apply_repetition_penalty(logits: Logits, seen: Ids, penalty: float) -> Logits:
    """Logits [vocab] with those of `seen` ids made less likely: divided by the penalty, or multiplied if negative.

    Keskar et al., CTRL, 2019, section 4.1, with the sign taken into account as transformers does. Each id once.
    """
    if penalty == 1 or not len(seen):
        return logits
    out = logits.copy()
    chosen = logits[seen]
    out[seen] = np.where(chosen < 0, chosen * np.float32(penalty), chosen / np.float32(penalty))
    return out


def largest(logits: Logits, count: int) -> Ids:
    """The ids of the `count` largest logits, largest first; equal ones by id."""
    count = min(count, len(logits))
    ids = np.argpartition(logits, len(logits) - count)[len(logits) - count :] if count < len(logits) else None
    if ids is None:
        return np.argsort(-logits, kind="stable")
    ids = np.sort(ids)
    return ids[np.argsort(-logits[ids], kind="stable")]


def keep_top_k(logits: Logits, k: int) -> int:
    """How many of the sorted candidates top-k keeps: k, and those equal to the last kept."""
    if k == 0 or k >= len(logits):
        return len(logits)
    return int(np.searchsorted(-logits, -logits[k - 1], side="right"))


def keep_top_p(probabilities: NDArray[np.float64], p: float) -> int:
    """How many of the sorted candidates top-p keeps: the fewest whose probabilities add up to p; at least one.

    probabilities: of the candidates, out of all tokens that are still in question; they may sum to less than 1.
    """
    if p >= 1:
        return len(probabilities)
    return min(len(probabilities), int(np.searchsorted(np.cumsum(probabilities), p, side="left")) + 1)


def keep_min_p(logits: Logits, min_p: float) -> int:
    """How many of the sorted candidates min-p keeps: those at least `min_p` times as likely as the first."""
    if min_p == 0:
        return len(logits)
    threshold = float(logits[0]) + np.log(min_p)
    return max(1, int(np.searchsorted(-logits.astype(np.float64), -threshold, side="right")))


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities, float64."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(weights / weights.sum())


def candidates(logits: Logits, options: SamplingOptions) -> tuple[Ids, NDArray[np.float64]]:
    """The tokens that may come next, most likely first, and their probabilities.

    logits: float32 [vocab], penalties applied. Without any filter: all tokens, in the order of their ids.
    """
    scaled = logits / np.float32(options.temperature)
    if options.top_k == 0 and options.top_p >= 1 and options.min_p == 0:
        return np.arange(len(scaled)), softmax(scaled)
    count = _FIRST_CANDIDATES if options.top_k == 0 else options.top_k + 1
    while True:
        ids = largest(scaled, count)
        ordered = scaled[ids]
        kept, certain = _filter(ordered, scaled, options)
        if certain:
            return ids[:kept], softmax(ordered[:kept])
        count = 8 * len(ids)


def _filter(ordered: Logits, scaled: Logits, options: SamplingOptions) -> tuple[int, bool]:
    """How many candidates the filters keep, and whether more candidates could not change that.

    It is certain once a filter stops before the last candidate: then the others, all smaller, would go as well.
    """
    kept = keep_top_k(ordered, options.top_k)
    complete = len(ordered) == len(scaled)
    certain = complete or kept < len(ordered)
    if options.top_k and not certain:
        return kept, False  # more candidates may equal the k-th
    if options.top_p < 1:
        # Top-p shares out the probability of what top-k left; without top-k that is every token.
        group = ordered[:kept] if options.top_k else scaled
        top = float(ordered[0])
        total = np.exp(group.astype(np.float64) - top).sum()
        by_p = keep_top_p(np.exp(ordered[:kept].astype(np.float64) - top) / total, options.top_p)
        certain = certain or by_p < kept
        kept = by_p
    by_min = keep_min_p(ordered[:kept], options.min_p)
    return by_min, certain or by_min < kept


class Sampler:
    """Options, a random generator and the ids seen so far: what one sequence needs to choose its tokens."""

    def __init__(self, options: SamplingOptions, vocab_size: int) -> None:
        self.options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._seen = np.zeros(vocab_size if options.repetition_penalty != 1 else 0, np.bool_)

    def observe(self, ids: NDArray[np.int32]) -> None:
        """These tokens are in the sequence: the repetition penalty holds for them."""
        if len(self._seen):
            self._seen[ids] = True

    def choose(self, logits: Logits) -> int:
        """The next token. logits: float32 [vocab], not changed."""
        if len(self._seen):
            logits = apply_repetition_penalty(logits, np.flatnonzero(self._seen), self.options.repetition_penalty)
        if self.options.greedy:
            return int(logits.argmax())
        ids, probabilities = candidates(logits, self.options)
        cumulative = np.cumsum(probabilities)
        place = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)])
