"""Choose the next token from logits. Pure functions on numpy arrays, in the order that transformers applies them:
repetition penalty, temperature, top-k, top-p, min-p, then a draw from what is left.

The filters work on *candidates*: token ids and their logits, the most likely first. With a vocabulary of 150,000 a
full sort would take as long as the model's step, so candidates are taken from the top only as far as the filters can
reach, and the whole vocabulary is only ever passed over in a straight line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import RuntimeStateError

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

_BLOCK = 512
_ROWS_OF_MAXIMA = 64
# Weights, relative to the largest, down to which top-p looks for what it needs before it looks at (nearly) all.
_TOP_P_DEPTHS = (2.0**-6, 2.0**-10, 2.0**-14)


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

    The count-th largest maximum of groups bounds the count-th largest logit from below, so only what is above that
    needs to be sorted. A group is a column of the logits laid out in rows: so the maxima of all are taken at once.
    """
    count = min(count, len(logits))
    columns = len(logits) // _ROWS_OF_MAXIMA
    if count < columns:
        maxima = logits[: _ROWS_OF_MAXIMA * columns].reshape(_ROWS_OF_MAXIMA, columns).max(axis=0)
        bound = np.partition(maxima, columns - count)[columns - count]
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


def keep_min_p(logits: NDArray[np.floating], min_p: float) -> int:
    """How many of the sorted candidates min-p keeps: those at least `min_p` times as likely as the first."""
    if min_p == 0:
        return len(logits)
    threshold = float(logits[0]) + np.log(min_p)
    return max(1, int(np.searchsorted(-logits.astype(np.float64), -threshold, side="right")))


def exponentials(logits: Logits, temperature: float, out: Logits) -> Logits:
    """exp((logits - largest) / temperature), in `out`."""
    np.subtract(logits, logits.max(), out=out)
    if temperature != 1:
        np.multiply(out, np.float32(1 / temperature), out=out)
    np.exp(out, out=out)
    return out


def block_sums(weights: NDArray[np.floating]) -> NDArray[np.float64]:
    """Sums of _BLOCK weights each, the last of the rest; float64. Inside of a block they are summed pairwise in the
    weights' own precision, which costs a fifth of converting them."""
    whole = len(weights) // _BLOCK
    sums = weights[: whole * _BLOCK].reshape(whole, _BLOCK).sum(axis=1).astype(np.float64)
    return np.append(sums, weights[whole * _BLOCK :].sum(dtype=np.float64))


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities. The exponential is as precise as the logits: numpy has it in f32 ten times as fast."""
    weights = np.exp(logits - logits.max()).astype(np.float64)
    return np.asarray(weights / weights.sum())


def candidates(
    logits: Logits, options: SamplingOptions, scratch: Logits | None = None
) -> tuple[Ids, NDArray[np.float64]]:
    """The tokens that may come next, most likely first, and their probabilities.

    logits: float32 [vocab], penalties applied. scratch: float32 [vocab] to work in. Without any filter: all tokens, in
    the order of their ids.
    """
    best = logits.max()
    if not options.filters:
        return np.arange(len(logits)), softmax((logits - best) * np.float32(1 / options.temperature))
    others = 0.0  # weight, with the likeliest token's as 1, of the tokens that top-p counts and that are no candidates
    if options.top_k:
        ids = _top_k(logits, options.top_k)
    elif options.top_p < 1:
        weights = exponentials(logits, options.temperature, np.empty_like(logits) if scratch is None else scratch)
        ids = _top_p(logits, weights, options.top_p * float(block_sums(weights).sum()))
        weights[ids] = 0  # a difference of sums would have the rounding of the large weights, larger than the small
        others = float(block_sums(weights).sum())
    else:
        # With some slack: what is exact is decided below.
        threshold = float(best) + options.temperature * (np.log(options.min_p) - 1e-3) - 1e-6 * abs(float(best))
        ids = np.flatnonzero(logits >= np.float32(threshold))
        ids = ids[np.argsort(-logits[ids], kind="stable")]
    # Few from here on: in float64, so that the edges are where they should be.
    scaled = (logits[ids].astype(np.float64) - float(best)) / options.temperature
    if options.top_p < 1:
        shares = np.exp(scaled)
        scaled = scaled[: keep_top_p(shares / (others + shares.sum()), options.top_p)]
    scaled = scaled[: keep_min_p(scaled, options.min_p)]
    return ids[: len(scaled)], softmax(scaled)


def _top_k(logits: Logits, k: int) -> Ids:
    """The ids that top-k keeps, most likely first: k, and those equal to the last of them."""
    count = k + 1
    while True:
        ids = largest(logits, count)
        kept = keep_top_k(logits[ids], k)
        if kept < len(ids) or len(ids) == len(logits):
            return ids[:kept]
        count = 8 * count  # more may equal the k-th


def _top_p(logits: Logits, weights: Logits, wanted: float) -> Ids:
    """Ids, most likely first, among which are the fewest whose weights add up to `wanted`, and hardly more.

    Only values are sorted until it is known how far down they go: that is several times as fast as sorting ids.
    weights: of the logits, float32 [vocab], the largest 1. Where they are equal the logits still tell.
    """
    for depth in _TOP_P_DEPTHS:
        values = weights[weights >= np.float32(depth)]
        if values.sum(dtype=np.float64) > wanted:
            break
    else:
        values = weights
    values = np.sort(values)[::-1]
    # One more than the sum asks for: the caller decides the edge, on weights that may differ in their last digit.
    last = min(int(np.searchsorted(np.cumsum(values, dtype=np.float64), wanted)) + 1, len(values) - 1)
    ids = np.flatnonzero(weights >= values[last])
    return ids[np.argsort(-logits[ids], kind="stable")]


def draw(weights: NDArray[np.floating], uniform: float) -> int:
    """The index that a number in [0, 1) stands for, when each has a share of it in proportion to its weight.

    In two levels, blocks and then one block, as a running sum over a whole vocabulary takes a millisecond.
    """
    blocks = np.cumsum(block_sums(weights))
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
        self._scratch = np.empty(0 if options.greedy else vocab_size, np.float32)

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
            return draw(exponentials(logits, self.options.temperature, self._scratch), uniform)
        ids, probabilities = candidates(logits, self.options, self._scratch)
        return int(ids[draw(probabilities, uniform)])
