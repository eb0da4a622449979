"""Text to token ids and back, and back piece by piece."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING

from llmc.runtime.decoder_steps import CLEAN_UP, Step, clean_up_steps, common, overlap, replaced, steps_of
from llmc.runtime.errors import TextError
from llmc.runtime.fork_lock import TOKENIZER, ForkLock
from llmc.runtime.manifest import TextFacts

if TYPE_CHECKING:
    import tokenizers


class Encoded:
    """A text, or a pair of texts, as tokens; what is rarely asked for is read when it is. front: whether a first token
    was put before those of the library."""

    def __init__(self, raw: tokenizers.Encoding, front: int | None = None) -> None:
        self._raw = raw
        self._front = front
        self.ids: list[int] = raw.ids if front is None else [front, *raw.ids]

    @property
    def types(self) -> list[int]:
        """Token types: 1 for a pair's second text, or what else the tokenizer tells apart."""
        types: list[int] = self._raw.type_ids
        return types if self._front is None else [0, *types]

    @property
    def places(self) -> list[tuple[int, int, int] | None]:
        """(text of the pair, first character, character behind the last) of each token; None: a special token."""
        found = [
            None if text is None else (text, *offsets)
            for text, offsets in zip(self._raw.sequence_ids, self._raw.offsets, strict=True)
        ]
        return found if self._front is None else [None, *found]


class Tokenizer:
    """A checkpoint's own tokenizer.json, with what its configuration adds."""

    def __init__(self, data: bytes, facts: TextFacts) -> None:
        import tokenizers

        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing more precise
            raise TextError(f"the artifact's tokenizer cannot be read: {error}. Compile the model again") from error
        self._truncation = self._tokenizer.truncation
        self._lock = ForkLock(TOKENIZER)
        # Padding and truncation are for training batches; a prompt is taken as it is.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = facts.split_special_tokens
        self.facts = facts
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._decoder = self._tokenizer.decoder
        state = None if self._decoder is None else self._decoder.__getstate__()  # what the library writes of it
        self._decoder_state = None if state is None else json.loads(state)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids. add_special: with the tokens that the tokenizer puts around a text, such as a first <s>; a chat
        template has put them already."""
        _check_unicode(text)
        with self._lock:  # truncation is a state of the library's tokenizer
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        bos = self.facts.bos_id
        if add_special and self.facts.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def encode_batch(self, texts: Ids[str | tuple[str, str]], most: int) -> list[Encoded]:
        """Texts, or pairs of texts, with special tokens around them. Longer ones than `most` tokens lose their end,
        or their start if the tokenizer says so, but not the special tokens; of a pair, the longer text loses first."""
        for text in texts:
            for part in (text,) if isinstance(text, str) else text:
                _check_unicode(part)
        bos = self.facts.bos_id if self.facts.add_bos else None
        side = self.facts.truncation_side or (self._truncation or {}).get("direction", "right")
        with self._lock:
            try:
                self._tokenizer.enable_truncation(
                    max(1, most - (bos is not None)), strategy="longest_first", direction=side
                )
                found = self._tokenizer.encode_batch(list(texts))
            except Exception as error:  # the library raises nothing more precise
                raise TextError(f"a text cannot be cut to {most} tokens: {error}") from error
            finally:
                self._tokenizer.no_truncation()
        return [Encoded(one, None if bos is None or one.ids[:1] == [bos] else bos) for one in found]

    def decode(self, ids: Ids[int], skip_special: bool = True) -> str:
        """Text. Ids that the tokenizer does not know become nothing."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return replaced(text, CLEAN_UP) if self.facts.clean_up_spaces else text

    def decoding_steps(self) -> list[Step]:
        """Steps that decode `words` as they come into the text that `decode` gives for all of them at once."""
        steps = steps_of(self._decoder, self._decoder_state)
        return [*steps, *clean_up_steps()] if self.facts.clean_up_spaces else steps

    def words(self, ids: Ids[int]) -> list[str]:
        """The tokens of which text is made: neither special ones, nor those that the tokenizer does not know."""
        found = map(self._tokenizer.id_to_token, ids)
        return [word for word in found if word is not None and word not in self._special]

    def special_text(self, token: int) -> str:
        """How a special token would read within a text; empty for any other token."""
        word = self._tokenizer.id_to_token(token)
        if word not in self._special:
            return ""
        return " " + word if self._decoder is None else self._decoder.decode(["a", word])[1:]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error


class Detokenizer:
    """Text that tokens add to those before them, in pieces of which nothing will change.

    The pieces join to the decoded text of the whole without that of the context. Where what follows changes how the
    context's own end decodes (a character that was cut, a space that is cleaned up), they start where the two differ.
    Work for a token depends on its own text alone.
    """

    def __init__(self, tokenizer: Tokenizer, context: Ids[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._steps = tokenizer.decoding_steps()
        self._told = ""  # the end of the context's text, which may still change
        if len(context):
            self._feed(context)
            self._told = self.pending

    def add(self, *tokens: int) -> str:
        """The text that is certain now: empty while a character is not complete."""
        return self._new(self._feed(tokens))

    def finish(self) -> str:
        """What is left at the end, complete or not."""
        return self._new(_finish(self._steps))

    @property
    def pending(self) -> str:
        """The text that `finish` would return."""
        text = _finish([copy.copy(step) for step in self._steps])
        return text[common(text, self._told) :]

    def _feed(self, ids: Ids[int]) -> str:
        parts = self._tokenizer.words(ids)
        for step in self._steps:
            parts = step.feed(parts)
        return "".join(parts)

    def _new(self, text: str) -> str:
        if not self._told:
            return text
        same = common(text, self._told)
        self._told = self._told[same:] if same == len(text) else ""
        return text[same:]


def _finish(steps: Ids[Step]) -> str:
    parts: list[str] = []
    for step in steps:
        parts = [*step.feed(parts), *step.finish()]
    return "".join(parts)


class StopMatcher:
    """Finds stop strings in a stream of pieces, and returns no part of one.

    Text that could be the beginning of a stop string is held back until it is known not to be one. Special tokens do
    not become text, but a stop string may be one, or hold one: such a token takes part in the search, unseen.
    """

    def __init__(self, stops: Ids[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._seen: list[bool] = []  # of the characters held: whether they are of the text
        self._pending = ""  # text that stands before `_unseen`, and is still to come
        self._unseen = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """The text that may go out. `stopped` is set once a stop string is complete: it and the rest are dropped."""
        if not self._unseen:
            return self._push(piece)
        if piece.startswith(self._pending):
            before, unseen, self._unseen = self._pending, self._unseen, ""
            return self._push(before) + self._push(unseen, seen=False) + self._push(piece[len(before) :])
        if self._pending.startswith(piece):
            self._pending = self._pending[len(piece) :]
        else:  # the token turned out to stand within a character
            self._unseen = ""
        return self._push(piece)

    def skip(self, special: str, pending: str = "") -> str:
        """Like `feed`, for a special token that would read like this. pending: text before it that is not certain."""
        if not any(_touch(stop, special) for stop in self._stops):
            return ""  # no stop string can know of it
        if not pending and not self._unseen:
            return self._push(special, seen=False)
        self._pending, self._unseen = pending, self._unseen + special
        return self._ended(pending)

    def look(self, pending: str) -> str:
        """The text that may still go out if text that is not certain completes a stop string: it ends there, so that
        what is pending is certain. Characters that are not complete are no text yet."""
        return self._ended(pending) if pending and "�" not in pending and not self.stopped else ""

    def _ended(self, pending: str) -> str:
        ended = copy.copy(self)
        ended._seen = list(self._seen)
        text = ended.feed(pending)
        self.stopped = ended.stopped
        return text if self.stopped else ""

    def _push(self, piece: str, seen: bool = True) -> str:
        if self.stopped:
            return ""
        self._held += piece
        self._seen += [seen] * len(piece)
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            text = self._take(min(found))
            self._held, self._seen = "", []
            return text
        return self._take(len(self._held) - max((overlap(self._held, stop) for stop in self._stops), default=0))

    def _take(self, count: int) -> str:
        """What is seen of the first characters held, which are no longer."""
        text, seen = self._held[:count], self._seen[:count]
        self._held, self._seen = self._held[count:], self._seen[count:]
        return text if all(seen) else "".join(one for one, is_seen in zip(text, seen, strict=True) if is_seen)

    def finish(self) -> str:
        """The text held back, when the text has ended."""
        return self._take(len(self._held))


def _touch(stop: str, special: str) -> bool:
    """Whether a text that matches `stop` can hold some of `special`."""
    inside = special in stop or stop in special
    return inside or overlap(special, stop) > 0 or overlap(stop, special) > 0
