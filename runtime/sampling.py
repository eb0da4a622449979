"""Choose the next token from logits, with the options that transformers has and in its order: logits processors (the
repetition penalty is one), temperature, top-h, top-k, top-p, min-p, typical-p, epsilon cutoff, eta cutoff, then a draw
from what is left.

The choice itself is the artifact's (`choose.c`), where the logits are: with a vocabulary of 150,000 one pass of numpy
over the logits takes half a percent of the model's step, and top-p wants a dozen. What few models ask for is numpy's
(`logits.py`), on a copy that is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.device import Device, Place, Use
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.library import Choice
from llmc.runtime.logits import LogitsProcessors, keep_top_h, still_kept
from llmc.runtime.memory import address

_DRAWS = 64  # random numbers that are made together
BROKEN = "the model's logits are not finite: the artifact or its weights are broken"
INFINITE = (
    "the settings make logits infinite: a factor of exponential_decay_length_penalty, a bias or a penalty is too "
    "large, or a penalty too small"
)


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0, top_h 0, typical_p 1 and cutoffs of 0 filter nothing; seed
    None draws a fresh one."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    top_h: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 <= self.top_p <= 1, "top_p", self.top_p, "from 0 (the likeliest only) to 1 (off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (off) to 1")
        _require(0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")
        _require(0 <= self.top_h <= 1, "top_h", self.top_h, "from 0 (off) to 1")
        _require(0 < self.typical_p < float("inf"), "typical_p", self.typical_p, "above 0, and 1 for off")
        _require(0 <= self.epsilon_cutoff < 1, "epsilon_cutoff", self.epsilon_cutoff, "from 0 (off) to below 1")
        _require(0 <= self.eta_cutoff < 1, "eta_cutoff", self.eta_cutoff, "from 0 (off) to below 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def filters_late(self) -> bool:
        """Whether a filter is on that comes after those of the artifact."""
        return self.typical_p < 1 or self.epsilon_cutoff > 0 or self.eta_cutoff > 0


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise RuntimeStateError(f"{name} must be {wanted}, not {value}")


class Chooser:
    """The artifact's choice among `vocab_size` tokens and the memory that it works in, which all samplers share: one
    choice at a time."""

    def __init__(self, device: Device, scratch_bytes: int, vocab_size: int) -> None:
        """scratch_bytes: `Code.choose_bytes` of the vocabulary."""
        self.device = device
        self.vocab_size = vocab_size
        self.scratch = device.reserve(scratch_bytes, Use.DENSE)
        self._greedy = Choice(scratch=self.scratch.number, count=vocab_size, penalty=1.0, top_p=1.0)
        self._row = device.reserve(4 * vocab_size, Use.TABLE)
        self.row: NDArray[np.float32] = self._row.table((vocab_size,), np.float32)  # type: ignore[assignment]

    @property
    def row_number(self) -> int:
        """Of `row`, float32 [vocab]: room for a copy of logits that is changed before the choice."""
        return self._row.number

    @property
    def weights(self) -> NDArray[np.float32]:
        """After a choice that was not greedy, float32 [vocab]: tokens' probabilities in proportion to the largest, and
        0 for those that were ruled out."""
        return self.fetch(self.scratch.at())

    def fetch(self, place: Place) -> NDArray[np.float32]:
        """The float32 [vocab] at a place; see `Device.fetch`."""
        return self.device.fetch(place, (self.vocab_size,), np.float32)  # type: ignore[return-value]

    def likeliest(self, place: Place) -> int:
        """The id of the largest logit of the float32 [vocab] at a place."""
        self._greedy.logits = place.number
        token = self.device.choose(self._greedy)
        if token < 0:
            raise RuntimeStateError(BROKEN)
        return token


class Sampler:
    """Options, a random generator and the ids seen so far: what one sequence needs to choose its tokens. processors:
    what changes its logits first, the repetition penalty included."""

    def __init__(self, options: SamplingOptions, chooser: Chooser, processors: LogitsProcessors | None = None) -> None:
        self.options = options
        self._chooser, self.device = chooser, chooser.device
        self._processors = processors
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._penalty = options.repetition_penalty != 1 and processors is None
        self._draws: NDArray[np.float64] = np.zeros(0)  # random numbers that were made, and how many of them are used
        self._used = self._draws_place = 0
        penalized = chooser.vocab_size if self._penalty else 0
        self._known = np.zeros(penalized, np.uint8)  # 1 for those that are in _seen
        self._seen_table = self.device.reserve(4 * penalized, Use.TABLE)
        self._seen: NDArray[np.int32] = self._seen_table.table((penalized,), np.int32)  # type: ignore[assignment]
        self._greedy = options.greedy
        top_h = not self._greedy and options.top_h > 0
        self._plain = processors is None and not top_h and (self._greedy or not options.filters_late)
        self._choice = Choice(
            seen=self._seen_table.number,
            scratch=chooser.scratch.number,
            count=chooser.vocab_size,
            top_k=options.top_k,
            penalty=options.repetition_penalty if self._penalty else 1.0,
            temperature=0.0 if self._greedy else 1.0 if top_h else options.temperature,
            top_p=options.top_p,
            min_p=options.min_p,
        )

    def observe(self, ids: Iterable[int]) -> None:
        """These tokens are in the sequence: penalties and the like hold for them."""
        if self._processors is not None:
            self._processors.observe(ids)
        if not self._penalty:
            return
        count = self._choice.seen_count
        for token in ids:
            if not self._known[token]:
                self._known[token] = 1
                self._seen[count] = token
                count += 1
        self._choice.seen_count = count

    @property
    def is_plain(self) -> bool:
        """Whether the artifact chooses by itself, without numpy before or after it: then it may write on its own."""
        return self._plain

    @property
    def choice(self) -> Choice:
        """For who chooses by it: whose tokens are observed by that."""
        return self._choice

    @property
    def seen(self) -> int | None:
        """The address of `choice.seen` as this process sees it, int32 [vocab]; None: there is no penalty."""
        return address(self._seen) if self._penalty else None

    @property
    def known(self) -> int | None:
        """The address of the flags of the ids that a penalty is for, uint8 [vocab]; None: there is no penalty."""
        return address(self._known) if self._penalty else None

    def draws(self, count: int) -> int | None:
        """Where the next random numbers lie, float64 [count], until more are asked for; None where nothing is drawn.
        `drawn` says how many were used."""
        if self._greedy:
            return None
        left = len(self._draws) - self._used
        if left < count:
            new = self._random.random(max(count - left, _DRAWS))
            self._draws, self._used = np.concatenate([self._draws[self._used :], new]), 0
            self._draws_place = address(self._draws)
        return self._draws_place + 8 * self._used

    def drawn(self, count: int) -> None:
        """So many of them were used."""
        self._used += count

    def choose(self, place: Place) -> int:
        """The next token. place: where its logits lie, float32 [vocab]; they are as before afterwards."""
        choice = self._choice
        choice.logits = place.number if self._plain else self._changed(place)
        if not self._greedy:
            self.draws(1)
            choice.uniform = self._draws[self._used]
            self.drawn(1)
        token = self.device.choose(choice)
        if token < 0:
            raise self._no_token(place)
        return token if self._plain or self._greedy or not self.options.filters_late else self._choose_late()

    def _changed(self, place: Place) -> int:
        """The number of a copy of the logits after processors and top-h."""
        row = self._chooser.row
        row[:] = self._chooser.fetch(place)
        if self._processors is not None:
            self._processors.process(row)
        if not self._greedy and self.options.top_h > 0:
            with np.errstate(over="ignore"):
                row /= np.float32(self.options.temperature)
            keep_top_h(row, self.options.top_h)
        return self._chooser.row_number

    def _choose_late(self) -> int:
        """A draw from what the late filters leave of what the artifact's have left."""
        options, row, weights = self.options, self._chooser.row, self._chooser.weights
        ids = np.flatnonzero(weights)
        left = weights[ids].astype(np.float64)
        kept = still_kept(left, options.typical_p, options.epsilon_cutoff, options.eta_cutoff)
        row.fill(-np.inf)
        row[ids[kept]] = np.log(left[kept])
        draw = Choice(
            logits=self._chooser.row_number, scratch=self._chooser.scratch.number, count=len(row), penalty=1.0,
            temperature=1.0, top_p=1.0, uniform=self._choice.uniform,
        )  # fmt: skip
        return self.device.choose(draw)

    def _no_token(self, place: Place) -> RuntimeStateError:
        """Why the artifact could not choose: the settings rule out all tokens, or the model's logits are not finite."""
        if not np.isfinite(self._chooser.fetch(place).max()):
            return RuntimeStateError(BROKEN)
        if not self._plain and (self._chooser.row == -np.inf).all():
            return RuntimeStateError(
                "no token is left to choose: the settings rule all of them out (suppress_tokens, bad_words_ids, "
                "no_repeat_ngram_size and the like; an empty list or 0 turns one off)"
            )
        return RuntimeStateError(INFINITE)
