"""Choose the next token from logits, with the options that transformers has and in its order: repetition penalty,
temperature, top-k, top-p, min-p, then a draw from what is left.

The choice itself is the artifact's (`choose.c`), on the step's threads: with a vocabulary of 150,000 one pass of numpy
over the logits takes half a percent of the model's step, and top-p wants a dozen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.library import Library
from llmc.runtime.memory import address, reserve


class Choice(ctypes.Structure):
    """`LlmcChoice` of choose.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("seen", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("seen_count", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("penalty", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("uniform", ctypes.c_double),
    )


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


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise RuntimeStateError(f"{name} must be {wanted}, not {value}")


class Chooser:
    """The artifact's choice among `vocab_size` tokens and the memory that it works in, which all samplers share: one
    choice at a time."""

    def __init__(self, library: Library, vocab_size: int, threads: int) -> None:
        self.vocab_size = vocab_size
        self._library = library
        self._threads = threads
        self._scratch = reserve((library.choose_bytes(vocab_size),), np.uint8, huge_pages=True)
        self.scratch = address(self._scratch)
        self._greedy = Choice(scratch=self.scratch, count=vocab_size, penalty=1.0, top_p=1.0)
        self._greedy_address = ctypes.addressof(self._greedy)

    @property
    def weights(self) -> NDArray[np.float32]:
        """After a choice that was not greedy, float32 [vocab]: tokens' probabilities in proportion to the largest, and
        0 for those that were ruled out."""
        return self._scratch[: 4 * self.vocab_size].view(np.float32)

    def choose(self, choice: int) -> int:
        """The token. choice: the address of a filled `Choice`."""
        token: int = self._library.choose(choice, self._threads)
        if token < 0:
            raise RuntimeStateError("the model's logits are not finite: the artifact or its weights are broken")
        return token

    def likeliest(self, place: int) -> int:
        """The id of the largest logit of the float32 [vocab] at this address."""
        self._greedy.logits = place
        return self.choose(self._greedy_address)


class Sampler:
    """Options, a random generator and the ids seen so far: what one sequence needs to choose its tokens."""

    def __init__(self, options: SamplingOptions, chooser: Chooser) -> None:
        self.options = options
        self._chooser = chooser
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._penalty = options.repetition_penalty != 1
        self._known: set[int] = set()
        self._seen = np.zeros(chooser.vocab_size if self._penalty else 0, np.int32)
        self._greedy = options.greedy
        self._choice = Choice(
            seen=address(self._seen),
            scratch=chooser.scratch,
            count=chooser.vocab_size,
            top_k=options.top_k,
            penalty=options.repetition_penalty,
            temperature=0.0 if self._greedy else options.temperature,
            top_p=options.top_p,
            min_p=options.min_p,
        )
        self._address = ctypes.addressof(self._choice)

    def observe(self, ids: Iterable[int]) -> None:
        """These tokens are in the sequence: the repetition penalty holds for them."""
        if not self._penalty:
            return
        for token in ids:
            if token not in self._known:
                self._seen[len(self._known)] = token
                self._known.add(token)
        self._choice.seen_count = len(self._known)

    def choose(self, place: int) -> int:
        """The next token. place: where its logits lie, float32 [vocab]; they are as before afterwards."""
        choice = self._choice
        choice.logits = place
        if not self._greedy:
            choice.uniform = self._random.random()
        return self._chooser.choose(self._address)
