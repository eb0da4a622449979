"""What a model's or a caller's settings do to logits before a token is chosen: the logits processors of transformers,
in its order and in f32 as there. Few models ask for any, so they are plain numpy over a copy of the logits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.settings import LARGEST, GenerationSettings

_TOP_H_TOKENS = 100  # that top-h looks at, as transformers has it


def needs_processors(settings: GenerationSettings) -> bool:
    """Whether any of these settings needs `LogitsProcessors`. The repetition penalty alone does not: the artifact knows
    it, unless top-h, which comes after it, is on."""
    return bool(
        settings.top_h
        or settings.sequence_bias
        or settings.encoder_repetition_penalty != 1
        or settings.no_repeat_ngram_size
        or settings.encoder_no_repeat_ngram_size
        or settings.bad_words_ids
        or settings.min_length
        or settings.min_new_tokens
        or settings.forced_bos_token_id is not None
        or settings.forced_eos_token_id
        or settings.remove_invalid_values
        or settings.exponential_decay_length_penalty
        or settings.suppress_tokens
        or settings.begin_suppress_tokens
    )


class NGrams:
    """Which tokens have followed each run of `size - 1` tokens in a sequence that grows."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], list[int]] = {}

    def add(self, token: int) -> None:
        if len(self._last) == self._size - 1:
            self._followers.setdefault(self._last, []).append(token)
        self._last = (*self._last, token)[-(self._size - 1) :] if self._size > 1 else ()

    def after(self, ids: list[int]) -> list[int]:
        """The tokens that have followed the end of `ids`."""
        end = tuple(ids[len(ids) - self._size + 1 :]) if len(ids) >= self._size - 1 else None
        return [] if end is None else self._followers.get(end, [])


class LogitsProcessors:
    """What the settings do to one sequence's logits. `observe` tells them of the prompt first, then of each token.

    stop_ids: the tokens that end a text. max_length: tokens of prompt and text together, at most. Of tokens and
    sequences outside of the vocabulary nothing is held, as they never come; forced ones are refused.
    """

    def __init__(
        self, settings: GenerationSettings, prompt: list[int], stop_ids: Iterable[int], max_length: int, vocab_size: int
    ) -> None:
        first = settings.forced_bos_token_id
        for token in (*settings.forced_eos_token_id, *(() if first is None else (first,))):
            if not 0 <= token < vocab_size:
                raise RuntimeStateError(f"the forced token id {token} is not in the vocabulary of {vocab_size}")
        self._settings = settings
        self._vocab_size = vocab_size
        self._prompt = len(prompt)
        self._max_length = max_length
        self._ids: list[int] = []
        self._stops = self._known(stop_ids)
        self._suppressed = self._known(settings.suppress_tokens)
        self._begin_suppressed = self._known(settings.begin_suppress_tokens)
        # A text that starts with a forced token is said to begin after it.
        self._begin = self._prompt + (self._prompt <= 1 and first is not None)
        new = settings.min_new_tokens
        self._min_length = settings.min_length if new is None else self._prompt + new
        self._seen: set[int] = set()
        self._prompt_ids = self._known(prompt)
        self._biases = self._possible(settings.sequence_bias)
        ends = set(self._stops.tolist())
        bad = [(ids, -np.inf) for ids in settings.bad_words_ids if not (len(ids) == 1 and ids[0] in ends)]
        self._bad_words = self._possible(bad)
        self._ngrams = NGrams(settings.no_repeat_ngram_size) if settings.no_repeat_ngram_size else None
        self._prompt_ngrams = None
        if settings.encoder_no_repeat_ngram_size:
            self._prompt_ngrams = NGrams(settings.encoder_no_repeat_ngram_size)
            for token in prompt:
                self._prompt_ngrams.add(token)

    def _known(self, ids: Iterable[int]) -> NDArray[np.int64]:
        return np.array(sorted({token for token in ids if 0 <= token < self._vocab_size}), np.int64)

    def _possible(self, biases: Iterable[tuple[tuple[int, ...], float]]) -> dict[tuple[int, ...], float]:
        return {ids: bias for ids, bias in biases if max(ids) < self._vocab_size}

    def observe(self, ids: Iterable[int]) -> None:
        """Notes that these tokens come next in the sequence."""
        for token in ids:
            self._ids.append(token)
            self._seen.add(token)
            if self._ngrams is not None:
                self._ngrams.add(token)

    def process(self, logits: NDArray[np.float32]) -> None:
        """Changes the logits of the next token, float32 [vocab], in place."""
        settings, length = self._settings, len(self._ids)
        with np.errstate(over="ignore", invalid="ignore"):
            self._add_biases(logits, self._biases)
            if settings.encoder_repetition_penalty != 1:
                penalize(logits, self._prompt_ids, 1 / settings.encoder_repetition_penalty)
            if settings.repetition_penalty != 1:
                penalize(logits, np.fromiter(self._seen, np.int64, len(self._seen)), settings.repetition_penalty)
            for ngrams in (self._ngrams, self._prompt_ngrams):
                if ngrams is not None:
                    logits[ngrams.after(self._ids)] = -np.inf
            self._add_biases(logits, self._bad_words)
            if length < self._min_length:
                logits[self._stops] = -np.inf
            if length == 1 and settings.forced_bos_token_id is not None:
                _force(logits, [settings.forced_bos_token_id])
            if length == self._max_length - 1 and settings.forced_eos_token_id:
                _force(logits, list(settings.forced_eos_token_id))
            if settings.remove_invalid_values:
                np.nan_to_num(logits, copy=False, nan=0.0, posinf=LARGEST, neginf=-LARGEST)
            if settings.exponential_decay_length_penalty is not None:
                start, factor = settings.exponential_decay_length_penalty
                self._urge_to_stop(logits, length - start - self._prompt, factor)
            logits[self._suppressed] = -np.inf
            if length == self._begin:
                logits[self._begin_suppressed] = -np.inf

    def _add_biases(self, logits: NDArray[np.float32], biases: dict[tuple[int, ...], float]) -> None:
        """Adds the bias of each sequence whose beginning the text ends with to the logit of its last token."""
        total: dict[int, np.float32] = {}
        for (*beginning, last), bias in biases.items():
            if not beginning or self._ids[-len(beginning) :] == beginning:
                total[last] = total.get(last, np.float32(0)) + np.float32(bias)
        for token, added in total.items():
            logits[token] += added

    def _urge_to_stop(self, logits: NDArray[np.float32], beyond: int, factor: float) -> None:
        if beyond <= 0:
            return
        try:
            growth = np.float32(factor**beyond - 1)
        except OverflowError:
            growth = np.float32(np.inf)
        ends = logits[self._stops]
        logits[self._stops] = np.where(np.isfinite(ends), ends + np.abs(ends) * growth, ends)


def penalize(logits: NDArray[np.float32], ids: NDArray[np.int64], penalty: float) -> None:
    """Divides the logits of these tokens by the penalty, or multiplies them where they are negative. In place."""
    scores = logits[ids]
    logits[ids] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))


def _force(logits: NDArray[np.float32], ids: list[int]) -> None:
    logits[:] = -np.inf
    logits[ids] = 0


def keep_top_h(logits: NDArray[np.float32], top_h: float) -> None:
    """Top-h: of the 100 likeliest tokens the first whose entropy adds up to `top_h` of that of all of them; the
    likeliest always. The others become minus infinity, in place. Broken logits stay as they are."""
    if not np.isfinite(logits.max()):
        return
    order = np.argsort(-logits, kind="stable")[:_TOP_H_TOKENS]
    probabilities = _softmax(logits[order])
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = -probabilities * np.log(probabilities)
    kept = np.cumsum(parts) <= np.nansum(parts) * top_h
    kept[0] = True
    rest = np.ones(len(logits), bool)
    rest[order[kept]] = False
    logits[rest] = -np.inf


def still_kept(
    weights: NDArray[np.float64], typical_p: float, epsilon_cutoff: float, eta_cutoff: float
) -> NDArray[np.bool_]:
    """Typical-p, the epsilon cutoff and the eta cutoff, one after the other, over the tokens that the filters before
    them have left: bool [tokens]. weights: their probabilities, in any proportion; all above 0."""
    kept = _typical(weights / weights.sum(), typical_p) if typical_p < 1 else np.ones(len(weights), bool)
    likeliest = weights == weights.max(where=kept, initial=0.0)
    if epsilon_cutoff > 0:
        kept &= likeliest | (weights / weights.sum(where=kept) >= epsilon_cutoff)
    if eta_cutoff > 0:
        probabilities = weights / weights.sum(where=kept)
        entropy = -(probabilities * np.log(probabilities)).sum(where=kept)
        kept &= likeliest | (probabilities >= min(eta_cutoff, eta_cutoff**0.5 * float(np.exp(-entropy))))
    return kept


def _typical(probabilities: NDArray[np.float64], mass: float) -> NDArray[np.bool_]:
    """The tokens whose surprise is nearest to the expected one, until they make up `mass`, and those as near."""
    surprise = -np.log(probabilities)
    distance = np.abs(surprise - (probabilities * surprise).sum())
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(probabilities[order]) < mass).sum()), len(order) - 1)
    kept: NDArray[np.bool_] = distance <= distance[order[last]]
    return kept


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(scores.astype(np.float64) - float(scores.max()))
    return np.asarray(weights / weights.sum())
