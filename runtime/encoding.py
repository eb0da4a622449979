"""Running an encoder on texts: embeddings, classes, labels of tokens, or its outputs as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.errors import ContextError, RuntimeStateError, TextError
from llmc.runtime.fork_lock import ForkLock
from llmc.runtime.manifest import EncoderFacts
from llmc.runtime.ragged import RaggedRunner, Tokens
from llmc.runtime.settings import is_integer
from llmc.runtime.tokenizer import Encoded, Tokenizer

Text = str | tuple[str, str] | Sequence[int] | NDArray[np.integer]
Texts = Text | Sequence[Text]
Told = Callable[[int, int], None]
Activation = Literal["softmax", "sigmoid", "none"]
Array = NDArray[np.generic]

_TOKENIZED_AT_ONCE = 256  # texts
_LEAST_LENGTH = 1e-12  # of a vector that is divided by its length


@dataclass(frozen=True)
class _Item:
    """A text as tokens, with where each token lies in the text, and which tokens stand for no text."""

    tokens: Tokens
    encoded: Encoded | None


class Encoder:
    """An artifact that computes embeddings, classes or other outputs of whole texts. Methods may be called from several
    threads."""

    def __init__(
        self,
        artifact: Artifact,
        runner: RaggedRunner,
        lock: ForkLock,
        tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
    ) -> None:
        manifest = artifact.manifest
        self.path = artifact.path
        self.facts: EncoderFacts | None = manifest.encoder
        self.outputs = tuple(facts.name for facts in manifest.outputs)
        self.max_tokens = self.facts.max_tokens if self.facts else min(manifest.max_context, manifest.step.max_step)
        self.vocab_size = vocab_size
        self._runner = runner
        self._lock = lock
        self._tokenizer = tokenizer

    @property
    def dimension(self) -> int:
        """Numbers of an embedding."""
        facts = self._wanting("embedding")
        (width,) = next(array for array in self._runner.outputs if array.name == facts.output).shape[-1]
        assert isinstance(width, int)
        return width

    def embed(
        self, texts: Texts, prompt: str | None, prompt_name: str | None, normalize: bool | None, progress: Told | None
    ) -> NDArray[np.float32]:
        """See `Runtime.embed`."""
        facts = self._wanting("embedding")
        if normalize is False and facts.normalized:
            raise RuntimeStateError(
                f"{self.path} makes embeddings of length 1, which is part of the model: leave normalize=False away"
            )
        batch, alone = as_batch(texts)
        front = self._prompt(facts, prompt, prompt_name)
        if front and not all(isinstance(text, str) for text in batch):
            raise RuntimeStateError("a prompt goes in front of a text; token ids and pairs have none: give prompt=''")
        batch = [front + text if isinstance(text, str) else text for text in batch]
        result = np.empty((len(batch), self.dimension), np.float32)
        for index, found in self._run(batch, progress):
            result[index] = found[facts.output]
        if normalize and not facts.normalized:
            result /= np.maximum(np.linalg.norm(result, axis=-1, keepdims=True), _LEAST_LENGTH)
        return result[0] if alone else result

    def classify(
        self, texts: Texts, activation: Activation | None, progress: Told | None
    ) -> list[dict[str, object]] | dict[str, object]:
        """See `Runtime.classify`."""
        facts = self._wanting("classification")
        batch, alone = as_batch(texts)
        found: list[dict[str, object]] = []
        for _, outputs in self._run(batch, progress):
            row = outputs[facts.output].astype(np.float32).reshape(-1)
            plain = facts.plain_scores or len(row) == 1
            chosen = activation or ("sigmoid" if facts.multi_label else "none" if plain else "softmax")
            scores = activated(row, chosen)
            names = _labels(facts, len(row))
            best = int(scores.argmax())
            found.append(
                {
                    "label": names[best],
                    "score": float(scores[best]),
                    "scores": dict(zip(names, scores.tolist(), strict=True)),
                }
            )
        return found[0] if alone else found

    def tag(self, texts: Texts, progress: Told | None) -> list[list[dict[str, object]]] | list[dict[str, object]]:
        """See `Runtime.tag`."""
        facts = self._wanting("tokens")
        if facts.labels is None:
            raise RuntimeStateError(f"{self.path} has no labels for tokens; encode() gives its outputs as they are")
        batch, alone = as_batch(texts)
        tagged: list[list[dict[str, object]]] = []
        for index, outputs, item in self._run_items(batch, progress):
            scores = activated(outputs[facts.output].astype(np.float32), "softmax")
            best = scores.argmax(axis=-1)
            text, places = batch[index], item.encoded.places if item.encoded is not None else None
            entries: list[dict[str, object]] = []
            for place, label in enumerate(best.tolist()):
                entry: dict[str, object] = {"label": facts.labels[label], "score": float(scores[place, label])}
                if places is not None:
                    at = places[place]
                    if at is None:
                        continue
                    part, start, end = at
                    whole = text if isinstance(text, str) else str(text[part])
                    entry = {"word": whole[start:end], **entry, "start": start, "end": end}
                entries.append(entry)
            tagged.append(entries)
        return tagged[0] if alone else tagged

    def encode(self, texts: Texts, progress: Told | None) -> list[dict[str, Array]] | dict[str, Array]:
        """See `Runtime.encode`."""
        batch, alone = as_batch(texts)
        # Parts of a step's arrays would keep all of it in memory.
        found = [{name: array.copy() for name, array in outputs.items()} for _, outputs in self._run(batch, progress)]
        return found[0] if alone else found

    def _wanting(self, kind: str) -> EncoderFacts:
        """The facts of an encoder of this kind; for others, an error that says what fits."""
        if self.facts is None or self.facts.kind != kind:
            found = self.facts.kind if self.facts else "other"
            is_what, use = _KINDS[found]
            if found == "tokens" and self.facts and self.facts.labels:
                is_what, use = "gives every token a label", "tag()"
            raise RuntimeStateError(f"{self.path} {is_what}: use {use}, not {_METHODS[kind]}")
        return self.facts

    def _prompt(self, facts: EncoderFacts, prompt: str | None, name: str | None) -> str:
        """The text that goes in front of every text."""
        if prompt is not None and name is not None:
            raise RuntimeStateError("give prompt or prompt_name, not both")
        if prompt is not None:
            return prompt
        name = name if name is not None else facts.default_prompt
        if name is None:
            return ""
        if name not in facts.prompts:
            known = ", ".join(map(repr, facts.prompts)) or "none"
            raise RuntimeStateError(f"{self.path} has no prompt {name!r}; it has {known}")
        return facts.prompts[name]

    # Texts to tokens to steps

    def _run(self, batch: Sequence[Text], progress: Told | None) -> Iterator[tuple[int, dict[str, Array]]]:
        """(index, outputs) of each text, in order."""
        for index, outputs, _ in self._run_items(batch, progress):
            yield index, outputs

    def _run_items(self, batch: Sequence[Text], progress: Told | None) -> Iterator[tuple[int, dict[str, Array], _Item]]:
        done = 0
        for items in self._packed(self._tokenized(batch)):
            with self._lock:
                found = self._runner.run([item.tokens for item in items])
            for place, item in enumerate(items):
                yield done + place, {name: arrays[place] for name, arrays in found.items()}, item
            done += len(items)
            if progress is not None:
                progress(done, len(batch))

    def _packed(self, items: Iterable[_Item]) -> Iterator[list[_Item]]:
        """As many items as fit into a step, again and again, in order."""
        waiting: list[_Item] = []
        room = self._runner.facts.max_step
        for item in items:
            waiting.append(item)
            room -= len(item.tokens)
            while room < 0:
                count = self._runner.fitting([len(other.tokens) for other in waiting])
                yield waiting[:count]
                waiting = waiting[count:]
                room = self._runner.facts.max_step - sum(len(other.tokens) for other in waiting)
        while waiting:
            count = self._runner.fitting([len(other.tokens) for other in waiting])
            yield waiting[:count]
            waiting = waiting[count:]

    def _tokenized(self, batch: Sequence[Text]) -> Iterator[_Item]:
        for begin in range(0, len(batch), _TOKENIZED_AT_ONCE):
            part = batch[begin : begin + _TOKENIZED_AT_ONCE]
            texts = [as_text(text) for text in part if is_text(text)]
            found = iter(self._tokenizer().encode_batch(texts, self.max_tokens) if texts else ())
            for index, text in enumerate(part, begin):
                encoded = next(found) if is_text(text) else None
                yield _Item(self._tokens(index, text, encoded), encoded)

    def _tokens(self, index: int, text: Text, encoded: Encoded | None) -> Tokens:
        try:
            ids = np.asarray(text if encoded is None else encoded.ids)
        except ValueError:
            ids = np.zeros((0, 0))
        if encoded is not None and not len(ids):
            raise TextError(f"text {index} has no tokens: leave it out, or put something into it")
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise RuntimeStateError(
                f"text {index} must be a text, a pair of texts or a list of at least one token id, not {text!r:.60}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise RuntimeStateError(
                f"token id {low if low < 0 else high} of text {index} is not in the vocabulary of {self.vocab_size}"
            )
        if len(ids) > self.max_tokens:
            raise ContextError(f"text {index} has {len(ids)} token ids; {self.path} takes {self.max_tokens} at most")
        types = None if encoded is None else self._types(index, encoded)
        count = self._counted(ids)
        return Tokens(ids[:count].astype(np.int32, copy=False), None if types is None else types[:count])

    def _counted(self, ids: NDArray[np.integer]) -> int:
        """How many of a text's tokens the model reads: without padding at the end, and one at least."""
        if self.facts is None or self.facts.padding is None:
            return len(ids)
        kept = np.flatnonzero(ids != self.facts.padding)
        return int(kept[-1]) + 1 if len(kept) else 1

    def _types(self, index: int, encoded: Encoded) -> NDArray[np.int32] | None:
        """Token types, int32 [n]; None: all 0. Whatever the output: also that of a head without a use of its own."""
        known = self._tokenizer().facts.token_types
        if not known:
            return None
        types = np.asarray(encoded.types, np.int32)
        if types.max() >= known:
            raise TextError(
                f"the tokenizer gives text {index} token type {types.max()}, and {self.path} knows types below {known}"
            )
        return types if types.any() else None


_METHODS = {"embedding": "embed()", "classification": "classify()", "tokens": "tag()"}
_KINDS = {
    "embedding": ("makes embeddings", "embed()"),
    "classification": ("is a classifier", "classify()"),
    "tokens": ("gives rows of numbers for every token", "encode()"),
    "other": ("gives outputs of its own", "encode()"),
}


def is_text(text: object) -> bool:
    """Whether it is a text or a pair of texts, rather than token ids."""
    if isinstance(text, str):
        return True
    return isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text)


def as_text(text: Text) -> str | tuple[str, str]:
    """A text or a pair as the tokenizer takes it."""
    return text if isinstance(text, str) else (str(text[0]), str(text[1]))


def as_batch(texts: Texts) -> tuple[list[Text], bool]:
    """The texts as a list, and whether there was only one: a text, a tuple of two texts (a pair), or token ids."""
    if isinstance(texts, str) or (isinstance(texts, tuple) and is_text(texts)):
        return [texts], True
    if isinstance(texts, np.ndarray) and texts.ndim == 1 and texts.dtype.kind in "iu":
        return [texts], True
    try:
        batch: list[Text] = list(texts)  # type: ignore[arg-type]
    except TypeError as error:
        raise RuntimeStateError(f"texts are a text or a list of texts, not {texts!r:.60}") from error
    if batch and all(is_integer(item) for item in batch):
        return [np.array(batch, np.int64)], True
    return batch, False


def activated(row: NDArray[np.float32], activation: Activation) -> NDArray[np.float32]:
    """Scores of the last axis as probabilities, or as they are."""
    if activation == "none":
        return row
    if activation == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(0.5 * row)), np.float32)  # never overflows
    if activation != "softmax":
        raise RuntimeStateError(f"activation is softmax, sigmoid or none, not {activation!r}")
    powers = np.exp(row - row.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)


def _labels(facts: EncoderFacts, count: int) -> tuple[str, ...]:
    return facts.labels if facts.labels is not None else tuple(f"LABEL_{index}" for index in range(count))
