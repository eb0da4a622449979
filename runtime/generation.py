"""From a prompt's tokens to text: sampling, stopping, and pieces as they come."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.errors import BatchError, RuntimeStateError
from llmc.runtime.logits import LogitsProcessors, needs_processors
from llmc.runtime.sampling import Chooser, Sampler, SamplingOptions
from llmc.runtime.settings import GenerationSettings, is_integer
from llmc.runtime.tokenizer import Detokenizer, StopMatcher
from llmc.runtime.writing import Draft

if TYPE_CHECKING:
    from llmc.runtime.device import Place
    from llmc.runtime.runtime import Runtime
    from llmc.runtime.sequence import Sequence as Cached

DEFAULT_MAX_TOKENS = 256


class Options(TypedDict, total=False):
    """Keyword options of `generate`, `stream`, `chat` and the like. What is not given, or None, is the model's own
    default. stop: strings that end the text and are not part of it. stop_token_ids: besides the model's own. max_time:
    seconds after which the text ends with the next token. lora: the name of a loaded adapter that the text is written
    with; of several prompts it may be a list, of a name or None for each. All others mean what they mean in
    transformers; 0, an empty list, or 1 for a penalty or probability turns one off that the model has on."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    min_new_tokens: int | None
    min_length: int | None
    max_time: float | None
    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    encoder_repetition_penalty: float | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    remove_invalid_values: bool | None
    lora: str | Sequence[str | None] | None


# Options whose setting has another name, or none.
_OTHER_NAMES = {"max_tokens": "max_new_tokens", "stop": "stop_strings"}
_OWN = ("seed", "stop_token_ids", "lora")
# Names of options in other libraries, and what they are called here.
_CALLED = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens (without the prompt's)",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "do_sample": "temperature (0: greedy)",
}


@dataclass(frozen=True)
class Limits:
    """When a text ends: after max_tokens or max_time seconds, before a stop string, at a stop token."""

    max_tokens: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    max_time: float | None = None


def resolve(
    options: Mapping[str, object], defaults: GenerationSettings, stop_ids: tuple[int, ...], prompt_length: int
) -> tuple[GenerationSettings, int | None, Limits]:
    """Settings, seed and limits of a text: the options as given, over the model's defaults; unknown names and values
    out of range are refused."""
    check_names(options)
    given = {
        _OTHER_NAMES.get(name, name): value for name, value in options.items() if value is not None and name not in _OWN
    }
    names = {setting: option for option, setting in _OTHER_NAMES.items()}
    try:
        settings = defaults.changed(given)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise RuntimeStateError(f"{names.get(name, name)} {rest}") from None
    seed = options.get("seed")
    if seed is not None and not is_integer(seed):
        raise RuntimeStateError(f"seed must be an integer, not {seed!r:.40}")
    if seed is not None and seed < 0:
        raise RuntimeStateError(f"seed must be 0 or more, not {seed}")
    ids = options.get("stop_token_ids")
    wanted = () if ids is None else tuple(ids) if isinstance(ids, Iterable) else (None,)
    if not all(is_integer(item) for item in wanted):
        raise RuntimeStateError(f"stop_token_ids must be a list of token ids, not {ids!r:.40}")
    return (
        settings,
        None if seed is None else int(seed),
        Limits(
            max_tokens=_most_tokens(settings, prompt_length),
            stop=settings.stop_strings,
            stop_ids=frozenset(stop_ids) | frozenset(int(item) for item in wanted),
            max_time=settings.max_time,
        ),
    )


def split_options(options: Mapping[str, object]) -> tuple[Options, dict[str, object]]:
    """Options of generation, and the others."""
    own = {name: value for name, value in options.items() if name in Options.__annotations__}
    rest = {name: value for name, value in options.items() if name not in own}
    called = [name for name in rest if name in _CALLED]
    if called:
        check_names(dict.fromkeys(called))
    return own, rest  # type: ignore[return-value]


def check_names(options: Mapping[str, object]) -> None:
    """Refuses names that are no option."""
    unknown = sorted(set(options) - set(Options.__annotations__))
    if not unknown:
        return
    called = [f"{name} is called {_CALLED[name]} here" for name in unknown if name in _CALLED]
    known = ", ".join(sorted(Options.__annotations__))
    what = "; ".join(called) or f"the options are {known}"
    raise RuntimeStateError(f"unknown option {', '.join(unknown)}; {what}")


def _most_tokens(settings: GenerationSettings, prompt_length: int) -> int:
    """A number of new tokens comes before one that counts the prompt, as in transformers."""
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    if settings.max_length is None:
        return DEFAULT_MAX_TOKENS
    if prompt_length >= settings.max_length:
        raise RuntimeStateError(
            f"the prompt has {prompt_length} tokens, and the model's max_length is {settings.max_length} for prompt "
            "and text together: give max_tokens, or a shorter prompt"
        )
    return settings.max_length - prompt_length


def make_sampler(
    settings: GenerationSettings, seed: int | None, limits: Limits, chooser: Chooser, prompt: list[int]
) -> Sampler:
    """What chooses the tokens after this prompt."""
    sampling = SamplingOptions(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seed=seed,
        top_h=settings.top_h,
        typical_p=settings.typical_p,
        epsilon_cutoff=settings.epsilon_cutoff,
        eta_cutoff=settings.eta_cutoff,
    )
    processors = None
    if needs_processors(settings):
        longest = len(prompt) + limits.max_tokens
        processors = LogitsProcessors(settings, prompt, limits.stop_ids, longest, chooser.vocab_size)
    sampler = Sampler(sampling, chooser, processors)
    sampler.observe(prompt)
    return sampler


class Writer:
    """One text in the making: takes tokens, or logits to choose one from, and gives the text that is certain.

    finish_reason: None while it goes on; "stop" at a stop string or token; "length" at max_tokens or at the end of the
    context; "time" after max_time.
    """

    def __init__(self, runtime: Runtime, prompt: NDArray[np.int32], options: Options) -> None:
        settings, seed, limits = resolve(options, runtime.manifest.generation, runtime.stop_ids, len(prompt))
        self._limits = limits
        self._has_regimes = bool(runtime.manifest.step.regimes)
        self._sampler = make_sampler(settings, seed, limits, runtime.chooser, prompt.tolist())
        self._tokenizer = runtime.tokenizer
        self._detokenizer = Detokenizer(self._tokenizer, prompt.tolist())
        self._matcher = StopMatcher(limits.stop)
        self._room = runtime.max_context - len(prompt)
        self._draft: Draft | None = None
        self.end_time: float | None = None  # of `time.perf_counter`
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def begin(self) -> None:
        """The text begins now: max_time counts from here."""
        if self._limits.max_time is not None:
            self.end_time = time.perf_counter() + self._limits.max_time

    def draft(self, sequence: Cached, whole: bool) -> Draft | None:
        """For tokens that C chooses and feeds one after the other, until it may be over; None: the next one is chosen
        here. whole: nobody waits for each token's text."""
        if not self._sampler.is_plain or (self._has_regimes and sequence.changes_regime(1)):
            return None
        if self._draft is None:
            self._draft = Draft(sequence.place, self._sampler, self._limits.stop_ids)
        most = min(self._limits.max_tokens, self._room + 1) - len(self.tokens)
        # A stop string is looked for after each token; and so is a change of regime, where all of them are fed again.
        one_by_one = self._limits.stop or self._has_regimes or not whole
        self._draft.begin(self.tokens[-1], 1 if one_by_one else most)
        return self._draft

    def choose(self, place: Place) -> str:
        """Chooses the next token from its logits, float32 [vocab] at this place; returns the text that may go out."""
        token = self._sampler.choose(place)
        if token not in self._limits.stop_ids:
            self._sampler.observe((token,))
        return self.write([token])

    def write(self, tokens: list[int]) -> str:
        """Takes up the next tokens; returns the text that may go out. Only the last of them may end the text."""
        self.tokens += tokens
        if not tokens:
            return ""
        piece, last = "", tokens[-1]
        if len(tokens) > 1 and self._limits.stop:
            piece = "".join(map(self._write_one, tokens[:-1]))
        elif len(tokens) > 1:
            piece = self._matcher.feed(self._detokenizer.add(*tokens[:-1]))
        if last in self._limits.stop_ids:
            return piece + self._end("stop", self._special(last))
        piece += self._write_one(last)
        if self._matcher.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._limits.max_tokens or len(self.tokens) > self._room:
            piece += self._end("length")
        elif self.end_time is not None and time.perf_counter() > self.end_time:
            piece += self._end("time")
        return piece

    def _special(self, token: int) -> str:
        return self._tokenizer.special_text(token) if self._limits.stop else ""

    def _write_one(self, token: int) -> str:
        if not self._limits.stop:
            return self._matcher.feed(self._detokenizer.add(token))
        special = self._special(token)
        if special:
            return self._matcher.skip(special, self._detokenizer.pending)
        piece = self._matcher.feed(self._detokenizer.add(token))
        return piece + self._matcher.look(self._detokenizer.pending)

    def _end(self, reason: str, special: str = "") -> str:
        self.finish_reason = reason
        piece = self._matcher.feed(self._detokenizer.finish()) + self._matcher.skip(special)
        if self._matcher.stopped:
            self.finish_reason = "stop"
        return piece + self._matcher.finish()


@dataclass
class Progress:
    """The state of a stream, in an object of its own, so that no reference to it keeps a dropped stream alive. whole:
    what is left is wanted as one text."""

    prompt_tokens: int
    cached_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    closed: bool = False
    whole: bool = False


class TextStream(Iterator[str]):
    """Pieces of text as the model writes them. Iterate over it, from one thread at a time; `close()` it, or drop it, to
    stop early."""

    def __init__(self, runtime: Runtime, prompt: NDArray[np.int32], options: Options) -> None:
        self._writer = Writer(runtime, prompt, options)
        self._progress = Progress(len(prompt))
        lora = options.get("lora")
        if lora is not None and not isinstance(lora, str):
            raise RuntimeStateError(f"lora is the name of one adapter, not {lora!r:.60}")
        self._pieces = _write(runtime, prompt, self._writer, self._progress, lora)

    @property
    def tokens(self) -> list[int]:
        """What was generated so far, a final stop token included."""
        return self._writer.tokens

    @property
    def finish_reason(self) -> str | None:
        """None until the end, then "stop", "length" or "time"; see `Writer`."""
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
        """Stops, and gives the sequence's cache pages back. From any thread: one that is in the middle of a piece gets
        no other, and gives them back itself."""
        self._progress.closed = True
        with contextlib.suppress(ValueError):  # the other thread is in the middle of a token
            self._pieces.close()

    def text(self) -> str:
        """All that is left, as one string."""
        self._progress.whole = True
        return "".join(self)


def _write(
    runtime: Runtime, prompt: NDArray[np.int32], writer: Writer, progress: Progress, lora: str | None
) -> Generator[str, None, None]:
    start = time.perf_counter()
    writer.begin()
    with runtime.sequence(lora=lora) as sequence:
        progress.cached_tokens = sequence.adopt_prefix(prompt)
        error: BaseException | None = None
        while error is None:
            if writer.tokens:
                (piece,), (broken,), failed = _write_on(runtime, [sequence], [writer], progress.whole)
                error = broken or failed
            else:
                with runtime.lock:  # the logits lie in a buffer that the next step of anyone overwrites
                    piece = writer.choose(runtime.step_last([(sequence, prompt[progress.cached_tokens :])])[0])
            elapsed = time.perf_counter() - start
            if len(writer.tokens) == 1:
                progress.prefill_seconds = elapsed
            progress.decode_seconds = elapsed - progress.prefill_seconds
            if piece and not progress.closed:
                yield piece
            if writer.finish_reason is not None or progress.closed:
                return
        raise error


def _write_on(
    runtime: Runtime, sequences: list[Cached], writers: list[Writer], whole: bool
) -> tuple[list[str], list[RuntimeStateError | None], BaseException | None]:
    """The next piece of each text that has begun, why there is no other behind it, and the error of a step that failed
    after them. One token each, or as many as nobody has to look at (`Writer.draft`)."""
    ready: list[Draft] = []
    for sequence, writer in zip(sequences, writers, strict=True):
        draft = writer.draft(sequence, whole)
        if draft is not None:
            ready.append(draft)
    if len(ready) < len(writers):
        with runtime.lock:
            places = runtime.decode(sequences, [writer.tokens[-1] for writer in writers])
            pairs = [_attempt(writer, place) for writer, place in zip(writers, places, strict=True)]
        return [piece for piece, _ in pairs], [error for _, error in pairs], None
    ends = [writer.end_time for writer in writers if writer.end_time is not None]
    failed = runtime.write(sequences, ready, min(ends) if ends else None)
    pieces = [writer.write(draft.take()) for writer, draft in zip(writers, ready, strict=True)]
    return pieces, [draft.error for draft in ready], failed


def _attempt(writer: Writer, place: Place) -> tuple[str, RuntimeStateError | None]:
    """The next piece of a text, or why there is none."""
    try:
        return writer.choose(place), None
    except RuntimeStateError as error:
        return "", error


def _lora_of_each(given: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """Which adapter each of several texts is written with."""
    if given is None or isinstance(given, str):
        return [given] * count
    names = list(given) if isinstance(given, Iterable) else []
    if len(names) != count or not all(name is None or isinstance(name, str) for name in names):
        raise RuntimeStateError(
            f"lora is a name, or a list of a name or None for each of {count} prompts, not {given!r:.60}"
        )
    return names


def generate_batch(runtime: Runtime, prompts: list[NDArray[np.int32]], options: Options) -> list[str]:
    """Texts of several prompts, written side by side: each step serves all that are not finished.

    With a seed, prompt number i draws with seed + i. `BatchError` where no token could be chosen for some of them, such
    as from logits that are NaN: when the others are finished.
    """
    seed, loras = options.get("seed"), _lora_of_each(options.get("lora"), len(prompts))
    writers = []
    for index, prompt in enumerate(prompts):
        own: Options = {**options, "seed": int(seed) + index} if is_integer(seed) else options
        writers.append(Writer(runtime, prompt, own))
        writers[-1].begin()
    texts = [""] * len(prompts)
    errors: dict[int, RuntimeStateError] = {}
    failed: BaseException | None = None
    sequences: list[Cached] = []
    try:
        for lora in loras:
            sequences.append(runtime.sequence(lora=lora))  # noqa: PERF401  (those that are made are closed)
        fresh = [(one, prompt[one.adopt_prefix(prompt) :]) for one, prompt in zip(sequences, prompts, strict=True)]
        pending = list(range(len(prompts)))
        while pending:
            going_on = [writers[index] for index in pending]
            if fresh:
                with runtime.lock:
                    pairs = [_attempt(*item) for item in zip(going_on, runtime.step_last(fresh), strict=True)]
                pieces, found, fresh = [piece for piece, _ in pairs], [error for _, error in pairs], []
            else:
                own_sequences = [sequences[index] for index in pending]
                pieces, found, failed = _write_on(runtime, own_sequences, going_on, whole=True)
            if failed is not None:
                raise failed
            for index, piece, error in zip(pending, pieces, found, strict=True):
                texts[index] += piece
                if error is not None:
                    errors[index] = error
            going = [index for index in pending if writers[index].finish_reason is None and index not in errors]
            for index in set(pending).difference(going):
                sequences[index].close()
            pending = going
    finally:
        for sequence in sequences:
            sequence.close()
    if errors:
        raise BatchError([None if index in errors else text for index, text in enumerate(texts)], errors)
    return texts
