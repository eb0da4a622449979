"""Text to token ids and back, and back piece by piece."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING

from llmc.runtime.errors import TextError
from llmc.runtime.fork_lock import TOKENIZER, ForkLock
from llmc.runtime.manifest import TextFacts

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "�"
# A UTF-8 character has at most four bytes: longer pending text that still ends in U+FFFD really is broken.
_MOST_PENDING = 8
# Tokens of the prompt that a decoder may look back at, to know whether the first piece starts with a space.
_CONTEXT = 6
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"))
_CLEAN_UP_REST = ((" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


class Encoded:
    """A text, or a pair of texts, as tokens; what is rarely asked for is read when it is. front: whether a first token
    was put before those of the library."""

    def __init__(self, raw: tokenizers.Encoding, front: int | None = None) -> None:
        self._raw = raw
        self._front = front
        self.ids: list[int] = raw.ids if front is None else [front, *raw.ids]

    @property
    def types(self) -> list[int]:
        """1 for the tokens of a pair's second text, if the tokenizer tells them apart."""
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
        self.facts = facts

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
        """Texts, or pairs of texts, with special tokens around them. Longer ones than `most` tokens lose their end, but
        not the special tokens; of a pair, the longer text loses first."""
        for text in texts:
            for part in (text,) if isinstance(text, str) else text:
                _check_unicode(part)
        bos = self.facts.bos_id if self.facts.add_bos else None
        with self._lock:
            side = (self._truncation or {}).get("direction", "right")
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
        if self.facts.clean_up_spaces:
            for old, new in (*_CLEAN_UP, *_CLEAN_UP_REST):
                text = text.replace(old, new)
        return text


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error


class Detokenizer:
    """Text of a growing sequence, in pieces that never end within a character.

    The text of a token depends on its neighbours (spaces, characters of several tokens), so a window of recent tokens
    is decoded with and without the new ones, and the difference is what they add. The window moves on whenever a piece
    comes out, so a token costs the same however long the text is. The pieces join to the text of the whole.
    """

    def __init__(self, tokenizer: Tokenizer, context: Ids[int] = ()) -> None:
        self._tokenizer = tokenizer
        # A window that starts within a character decodes to something else: one of four starts does not.
        for size in (_CONTEXT + 1, _CONTEXT + 2, _CONTEXT + 3, _CONTEXT):
            self._window = list(context[-size:])
            self._text = tokenizer.decode(self._window) if self._window else ""
            if _REPLACEMENT not in self._text:
                break
        self._known = len(self._window)  # tokens of the window whose text has come out

    def add(self, token: int) -> str:
        """The text that is certain now: empty while a character is not complete."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        pending = len(self._window) - self._known
        if len(text) <= len(self._text) or (text.endswith(_REPLACEMENT) and pending < _MOST_PENDING):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What is left at the end, complete or not."""
        text = self._tokenizer.decode(self._window)
        return text[len(self._text) :]

    def _advance(self, text: str) -> str:
        piece = text[len(self._text) :]
        # The tokens that gave this piece stay as context of the next.
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._text = self._tokenizer.decode(self._window)
        return piece


class StopMatcher:
    """Finds stop strings in a stream of pieces, and lets no part of one out.

    Text that could be the beginning of a stop string is held back until it is known not to be one.
    """

    def __init__(self, stops: Ids[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """The text that may go out. `stopped` is set once a stop string is complete: it and the rest are dropped."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that a stop string starts with, and is longer than."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
