"""From a prompt's tokens to text: sampling, stopping, and pieces as they come."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.manifest import GenerationDefaults
from llmc.runtime.sampling import Sampler, SamplingOptions
from llmc.runtime.tokenizer import Detokenizer, StopMatcher

if TYPE_CHECKING:
    from llmc.runtime.runtime import Runtime

DEFAULT_MAX_TOKENS = 256


class Options(TypedDict, total=False):
    """Keyword options of `generate`, `stream`, `chat` and the like. What is not given, or None, is the model's own
    default. stop: strings that end the text and are not part of it. stop_token_ids: besides the model's own."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None


@dataclass(frozen=True)
class Limits:
    """When a text ends: after max_tokens, before a stop string, at a stop token."""

    max_tokens: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]


def resolve(
    options: Options, defaults: GenerationDefaults, stop_ids: tuple[int, ...]
) -> tuple[SamplingOptions, Limits]:
    """Options as given, over the model's defaults; unknown names and values out of range are refused."""
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        known = ", ".join(sorted(Options.__annotations__))
        raise RuntimeStateError(f"unknown option {', '.join(unknown)}; the options are {known}")
    sampling = SamplingOptions(
        temperature=_number("temperature", options.get("temperature"), defaults.temperature),
        top_k=_integer("top_k", options.get("top_k"), defaults.top_k),
        top_p=_number("top_p", options.get("top_p"), defaults.top_p),
        min_p=_number("min_p", options.get("min_p"), defaults.min_p),
        repetition_penalty=_number(
            "repetition_penalty", options.get("repetition_penalty"), defaults.repetition_penalty
        ),
        seed=None if options.get("seed") is None else _integer("seed", options.get("seed"), 0),
    )
    max_tokens = _integer("max_tokens", options.get("max_tokens"), DEFAULT_MAX_TOKENS)
    if max_tokens < 1:
        raise RuntimeStateError(f"max_tokens must be 1 or more, not {max_tokens}")
    stop = options.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if not all(isinstance(text, str) for text in stops):
        raise RuntimeStateError(f"stop must be a string or a list of strings, not {stop!r:.40}")
    ids = options.get("stop_token_ids")
    wanted = () if ids is None else tuple(ids) if isinstance(ids, Iterable) else (None,)
    if not all(isinstance(item, int | np.integer) for item in wanted):
        raise RuntimeStateError(f"stop_token_ids must be a list of token ids, not {ids!r:.40}")
    return sampling, Limits(
        max_tokens=max_tokens,
        stop=stops,
        stop_ids=frozenset(stop_ids) | frozenset(int(item) for item in wanted),
    )


def _integer(name: str, given: object, default: int) -> int:
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise RuntimeStateError(f"{name} must be an integer, not {given!r:.40}")
    return int(given)


def _number(name: str, given: object, default: float) -> float:
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, int | float | np.number):
        raise RuntimeStateError(f"{name} must be a number, not {given!r:.40}")
    return float(given)


class Writer:
    """One text in the making: takes logits, chooses a token, gives the text that is certain.

    finish_reason: None while it goes on; "stop" at a stop string or token; "length" at max_tokens or at the end of the
    context.
    """

    def __init__(self, runtime: Runtime, prompt: NDArray[np.int32], options: Options) -> None:
        sampling, limits = resolve(options, runtime.manifest.generation, runtime.stop_ids)
        self._limits = limits
        self._sampler = Sampler(sampling, runtime.chooser)
        self._sampler.observe(prompt.tolist())
        self._tokenizer = runtime.tokenizer
        self._detokenizer = Detokenizer(self._tokenizer, prompt.tolist())
        self._matcher = StopMatcher(limits.stop)
        self._room = runtime.max_context - len(prompt)
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def write(self, place: int) -> str:
        """Chooses the next token from its logits, float32 [vocab] at this address; returns the text that may go out."""
        token = self._sampler.choose(place)
        self.tokens.append(token)
        special = self._tokenizer.special_text(token) if self._limits.stop else ""
        if token in self._limits.stop_ids:
            return self._end("stop", special)
        self._sampler.observe((token,))
        if special:
            piece = self._matcher.skip(special, self._detokenizer.pending)
        else:
            piece = self._matcher.feed(self._detokenizer.add(token))
            if self._limits.stop:
                piece += self._matcher.look(self._detokenizer.pending)
        if self._matcher.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._limits.max_tokens or len(self.tokens) > self._room:
            piece += self._end("length")
        return piece

    def _end(self, reason: str, special: str = "") -> str:
        self.finish_reason = reason
        piece = self._matcher.feed(self._detokenizer.finish()) + self._matcher.skip(special)
        if self._matcher.stopped:
            self.finish_reason = "stop"
        return piece + self._matcher.finish()


@dataclass
class Progress:
    """What a stream has done so far. Apart from the stream, so that nothing keeps a dropped stream alive."""

    prompt_tokens: int
    cached_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class TextStream(Iterator[str]):
    """Pieces of text as the model writes them. Iterate over it; `close()` it, or drop it, to stop early."""

    def __init__(self, runtime: Runtime, prompt: NDArray[np.int32], options: Options) -> None:
        self._writer = Writer(runtime, prompt, options)
        self._progress = Progress(len(prompt))
        self._pieces = _write(runtime, prompt, self._writer, self._progress)

    @property
    def tokens(self) -> list[int]:
        """What was generated so far, a final stop token included."""
        return self._writer.tokens

    @property
    def finish_reason(self) -> str | None:
        """None until the end, then "stop" or "length"."""
        return self._writer.finish_reason

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self._progress.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens the cache held already."""
        return self._progress.cached_tokens

    @property
    def prefill_seconds(self) -> float:
        """Time to the first token."""
        return self._progress.prefill_seconds

    @property
    def decode_seconds(self) -> float:
        """Time from the first token to the latest."""
        return self._progress.decode_seconds

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stops, and gives the sequence's cache pages back."""
        self._pieces.close()

    def text(self) -> str:
        """All that is left, as one string."""
        return "".join(self)


def _write(
    runtime: Runtime, prompt: NDArray[np.int32], writer: Writer, progress: Progress
) -> Generator[str, None, None]:
    start = time.perf_counter()
    with runtime.sequence() as sequence:
        progress.cached_tokens = sequence.adopt_prefix(prompt)
        sequences, ids = [sequence], prompt[progress.cached_tokens :]
        while True:
            with runtime.lock:  # the logits lie in a buffer that the next step of anyone overwrites
                if writer.tokens:
                    places = runtime.decode(sequences, writer.tokens[-1:])
                else:
                    places = runtime.step_last([(sequence, ids)])
                piece = writer.write(places[0])
            elapsed = time.perf_counter() - start
            if len(writer.tokens) == 1:
                progress.prefill_seconds = elapsed
            progress.decode_seconds = elapsed - progress.prefill_seconds
            if piece:
                yield piece
            if writer.finish_reason is not None:
                return


def generate_batch(runtime: Runtime, prompts: list[NDArray[np.int32]], options: Options) -> list[str]:
    """Texts of several prompts, written side by side: each step serves all that are not finished.

    With a seed, prompt number i draws with seed + i.
    """
    seed = options.get("seed")
    writers = []
    for index, prompt in enumerate(prompts):
        own: Options = {**options, "seed": seed + index} if seed is not None else options
        writers.append(Writer(runtime, prompt, own))
    texts = [""] * len(prompts)
    sequences = [runtime.sequence() for _ in prompts]
    try:
        fresh = [(one, prompt[one.adopt_prefix(prompt) :]) for one, prompt in zip(sequences, prompts, strict=True)]
        pending = list(range(len(prompts)))
        while pending:
            with runtime.lock:
                if fresh:
                    places, fresh = runtime.step_last(fresh), []
                else:
                    last = [writers[index].tokens[-1] for index in pending]
                    places = runtime.decode([sequences[index] for index in pending], last)
                for place, index in zip(places, pending, strict=True):
                    texts[index] += writers[index].write(place)
            for index in pending:
                if writers[index].finish_reason is not None:
                    sequences[index].close()
            pending = [index for index in pending if writers[index].finish_reason is None]
    finally:
        for sequence in sequences:
            sequence.close()
    return texts
