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
_BLOCK = 512
_BLOCK_OF_MAXIMA = 64


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
        _require(0 <= self.top_p <= 1, "top_p", self.top_p, "from 0 (the likeliest only) to 1 (off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (off) to 1")
        _require(0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def filters(self) -> bool:
        """Whether any token can be ruled out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise RuntimeStateError(f"{name} must be {wanted}, not {value}")


def apply_repetition_penalty(logits: Logits, seen: Ids, penalty: float, out: Logits | None = None) -> Logits:
    """Logits [vocab] with those of `seen` ids made less likely: divided by the penalty, or multiplied if negative.

    Keskar et al., CTRL, 2019, section 4.1, with the sign taken into account as transformers does. Each id once.
    out: float32 [vocab] for the result.
    """
    out = np.empty_like(logits) if out is None else out
    out[:] = logits
    chosen = logits[seen]
    out[seen] = np.where(chosen < 0, chosen * np.float32(penalty), chosen / np.float32(penalty))
    return out


def largest(logits: Logits, count: int) -> Ids:
    """The ids of the `count` largest logits, largest first; equal ones by id.

    The count-th largest maximum of blocks bounds the count-th largest logit from below, so only what is above that
    needs to be sorted.
    """
    count = min(count, len(logits))
    maxima = np.maximum.reduceat(logits, np.arange(0, len(logits), _BLOCK_OF_MAXIMA))
    if count < len(maxima):
        bound = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
        ids = np.flatnonzero(logits >= bound)
    elif count < len(logits):
        ids = np.sort(np.argpartition(logits, len(logits) - count)[len(logits) - count :])
    else:
        ids = np.arange(len(logits))
    return ids[np.argsort(-logits[ids], kind="stable")[:count]]


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


def exponentials(logits: Logits, out: Logits) -> Logits:
    """exp(logits - largest), in `out`."""
    np.subtract(logits, logits.max(), out=out)
    np.exp(out, out=out)
    return out


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Probabilities. The exponential is f32, as numpy has it ten times as fast, and the sum f64."""
    weights = np.exp(logits - logits.max()).astype(np.float64)
    return np.asarray(weights / weights.sum())


def candidates(
    logits: Logits, options: SamplingOptions, scratch: Logits | None = None
) -> tuple[Ids, NDArray[np.float64]]:
    """The tokens that may come next, most likely first, and their probabilities.

    logits: float32 [vocab], penalties applied. scratch: float32 [2, vocab] to work in. Without any filter: all tokens,
    in the order of their ids.
    """
    work = np.empty((2, len(logits)), np.float32) if scratch is None else scratch
    scaled = np.multiply(logits, np.float32(1 / options.temperature), out=work[0])
    if not options.filters:
        return np.arange(len(scaled)), softmax(scaled)
    total = 0.0
    if options.top_p < 1 and options.top_k == 0:
        total = float(exponentials(scaled, work[1]).sum(dtype=np.float64))
    count = _FIRST_CANDIDATES if options.top_k == 0 else options.top_k + 1
    while True:
        ids = largest(scaled, count)
        ordered = scaled[ids]
        kept, certain = _filter(ordered, len(ordered) == len(scaled), total, options)
        if certain:
            return ids[:kept], softmax(ordered[:kept])
        count = 8 * len(ids)


def _filter(ordered: Logits, complete: bool, total: float, options: SamplingOptions) -> tuple[int, bool]:
    """How many candidates the filters keep, and whether more candidates could not change that.

    It is certain once a filter stops before the last candidate: then the others, all smaller, would go as well.
    complete: the candidates are all tokens. total: without top-k, the sum of exp(logit - largest) over all tokens.
    """
    kept = keep_top_k(ordered, options.top_k)
    certain = complete or kept < len(ordered)
    if options.top_k and not certain:
        return kept, False  # more candidates may equal the k-th
    if options.top_p < 1:
        # Top-p shares out the probability of what top-k left; without top-k that is every token.
        weights = np.exp(ordered[:kept] - ordered[0]).astype(np.float64)
        by_p = keep_top_p(weights / (weights.sum() if options.top_k else total), options.top_p)
        certain = certain or by_p < kept
        kept = by_p
    by_min = keep_min_p(ordered[:kept], options.min_p)
    return by_min, certain or by_min < kept


def draw(weights: NDArray[np.floating], uniform: float) -> int:
    """The index that a number in [0, 1) stands for, when each has a share of it in proportion to its weight.

    In two levels, blocks and then one block, as a running sum over a whole vocabulary takes a millisecond.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * float(blocks[-1])
    block = min(int(np.searchsorted(blocks, target, side="right")), len(blocks) - 1)
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    target -= float(blocks[block - 1]) if block else 0.0
    place = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target, side="right"))
    if place == len(inside):  # rounding: the last that can be drawn at all
        place = int(np.flatnonzero(inside)[-1])
    return block * _BLOCK + place


class Sampler:
    """Options, a random generator and the ids seen so far: what one sequence needs to choose its tokens."""

    def __init__(self, options: SamplingOptions, vocab_size: int) -> None:
        self.options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._penalty = options.repetition_penalty != 1
        self._seen = np.zeros(vocab_size if self._penalty else 0, np.bool_)
        # Arrays of this size from the allocator would be fresh pages every time, at several times the cost of the sums.
        self._penalized = np.empty(vocab_size if self._penalty else 0, np.float32)
        self._scratch = np.empty((2, 0 if options.greedy else vocab_size), np.float32)

    def observe(self, ids: NDArray[np.int32]) -> None:
        """These tokens are in the sequence: the repetition penalty holds for them."""
        if self._penalty:
            self._seen[ids] = True

    def choose(self, logits: Logits) -> int:
        """The next token. logits: float32 [vocab], not changed."""
        if self._penalty:
            seen = np.flatnonzero(self._seen)
            logits = apply_repetition_penalty(logits, seen, self.options.repetition_penalty, self._penalized)
        best = int(logits.argmax())  # of a NaN, if there is one
        if not np.isfinite(logits[best]):
            raise RuntimeStateError("the model's logits are not finite: the artifact or its weights are broken")
        if self.options.greedy:
            return best
        uniform = float(self._random.random())
        if not self.options.filters:
            scaled = np.multiply(logits, np.float32(1 / self.options.temperature), out=self._scratch[0])
            return draw(exponentials(scaled, self._scratch[1]), uniform)
        ids, probabilities = candidates(logits, self.options, self._scratch)
        return int(ids[draw(probabilities, uniform)])
