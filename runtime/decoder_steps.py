"""The decoders of the tokenizers library, for tokens that come one by one.

In the library a decoder is a chain of steps over the whole list of tokens. Here each step takes tokens as they come
and holds back text that a later token may still change. For every sequence of tokens, the pieces that the steps give
join to the text that the decoder makes of the whole.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tokenizers

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
# What transformers' clean_up_tokenization replaces, in this order, each over the whole text.
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
# What the tokenizers library's WordPiece decoder replaces, within each token.
_WORD_PIECE_CLEAN_UP = (*CLEAN_UP[:7], (" do not", " don't"), *CLEAN_UP[7:])


class Step(Protocol):
    """A step of a decoder. It may split, join and hold back what it is fed; `finish` gives what is left at the end.

    What a step keeps is never changed in place: `copy.copy` gives a step that goes on from here by itself.
    """

    def feed(self, parts: list[str]) -> list[str]:
        """The text that later tokens cannot change, given these (after a step that joins: these pieces of text)."""

    def finish(self) -> list[str]:
        """The text held back so far, when no more tokens come. Called once."""


class Certain:
    """A step that holds nothing back."""

    def finish(self) -> list[str]:
        return []


class Replace(Certain):
    """Replaces within each token."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def feed(self, parts: list[str]) -> list[str]:
        return [part.replace(self._old, self._new) for part in parts]


class Strip(Certain):
    """Takes up to `left` and `right` of a character off the ends of each token."""

    def __init__(self, content: str, left: int, right: int) -> None:
        self._content, self._left, self._right = content, left, right

    def feed(self, parts: list[str]) -> list[str]:
        return [self._stripped(part) for part in parts]

    def _stripped(self, part: str) -> str:
        start = min(self._left, len(part) - len(part.lstrip(self._content)))
        end = min(self._right, len(part) - len(part.rstrip(self._content)))
        return part[start : max(start, len(part) - end)]


class ByteFallback:
    """<0x41> is a byte. A run of such tokens is known at its end: characters if all of it is UTF-8, or else one U+FFFD
    a byte, as the tokenizers library has it. So a run is kept back, whole characters too, until another token comes."""

    def __init__(self) -> None:
        self._run = b""

    def feed(self, parts: list[str]) -> list[str]:
        out: list[str] = []
        for part in parts:
            byte = _BYTE.fullmatch(part)
            if byte is not None:
                self._run += bytes.fromhex(byte[1])
            else:
                out += [*self.finish(), part]
        return out

    def finish(self) -> list[str]:
        run, self._run = self._run, b""
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return ["�"] * len(run)


class ByteLevel:
    """Each character of a token is a byte. Joins tokens. Bytes that may begin a character are kept back."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, parts: list[str]) -> list[str]:
        data = self._held + b"".join(map(self._bytes, parts))
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return [text]

    def finish(self) -> list[str]:
        return [codecs.utf_8_decode(self._held, "replace", True)[0]]

    @staticmethod
    def _bytes(token: str) -> bytes:
        try:
            return bytes([_BYTE_OF[character] for character in token])
        except KeyError:  # an added token is text
            return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: those that print stand for themselves, the others are counted from U+0100."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Metaspace(Certain):
    """A mark is a space, but in the first token, where it was put in front of the text."""

    def __init__(self, mark: str, prepended: bool) -> None:
        self._mark, self._first = mark, prepended

    def feed(self, parts: list[str]) -> list[str]:
        out = [part.replace(self._mark, " ") for part in parts]
        if parts and self._first:
            out[0], self._first = parts[0].replace(self._mark, ""), False
        return out


class WordPiece(Certain):
    """A token begins a word, unless it starts with a prefix or is the first."""

    def __init__(self, prefix: str, clean_up: bool) -> None:
        self._prefix, self._clean_up, self._first = prefix, clean_up, True

    def feed(self, parts: list[str]) -> list[str]:
        return [self._word(part) for part in parts]

    def _word(self, part: str) -> str:
        if not self._first:
            part = part.removeprefix(self._prefix) if part.startswith(self._prefix) else " " + part
        self._first = False
        return replaced(part, _WORD_PIECE_CLEAN_UP) if self._clean_up else part


class Words(Certain):
    """Spaces between tokens: what the library does without a decoder."""

    def __init__(self) -> None:
        self._first = True

    def feed(self, parts: list[str]) -> list[str]:
        out = [" " + part for part in parts]
        if parts and self._first:
            out[0], self._first = parts[0], False
        return out


class Suffix:
    """A suffix ends a word: a space, but in the last token."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._last: list[str] = []

    def feed(self, parts: list[str]) -> list[str]:
        known = [*self._last, *parts]
        self._last = known[-1:]
        return [part.replace(self._suffix, " ") for part in known[:-1]]

    def finish(self) -> list[str]:
        return [part.replace(self._suffix, "") for part in self._last]


class ReplaceText:
    """Replaces over the whole text. An end that `old` may begin with is kept back."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new, self._held = old, new, ""

    def feed(self, parts: list[str]) -> list[str]:
        *done, rest = (self._held + "".join(parts)).split(self._old)
        keep = overlap(rest, self._old)
        self._held = rest[len(rest) - keep :]
        return [self._new.join([*done, rest[: len(rest) - keep]])]

    def finish(self) -> list[str]:
        return [self._held]


class StripText:
    """Takes up to `left` and `right` of a character off the ends of the whole text."""

    def __init__(self, content: str, left: int, right: int) -> None:
        self._content, self._left, self._right, self._held = content, left, right, ""

    def feed(self, parts: list[str]) -> list[str]:
        text = "".join(parts)
        if self._left and text:
            rest = text.lstrip(self._content)
            taken = min(self._left, len(text) - len(rest))
            self._left = self._left - taken if not rest else 0
            text = text[taken:]
        text = self._held + text
        keep = min(self._right, len(text) - len(text.rstrip(self._content)))
        self._held = text[len(text) - keep :]
        return [text[: len(text) - keep]]

    def finish(self) -> list[str]:
        return []


class Unknown:
    """A decoder that this module has no steps for: its text is known at the end."""

    def __init__(self, decoder: tokenizers.decoders.Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[str] = []

    def feed(self, parts: list[str]) -> list[str]:
        self._tokens += parts
        return []

    def finish(self) -> list[str]:
        return [self._decoder.decode(self._tokens)]


def steps_of(decoder: tokenizers.decoders.Decoder | None, state: Mapping[str, object] | None) -> list[Step]:
    """Fresh steps that do as a decoder of the tokenizers library does. state: what the library writes of it."""
    if decoder is None:
        return [Words()]
    steps: list[Step] = []
    joined = False
    for one in _flat(state):
        kind = one.get("type")
        if kind == "Fuse":
            joined = True
            continue
        step = _joined_step(one) if joined else _token_step(one)
        if step is None:
            return [Unknown(decoder)]
        steps.append(step)
        joined = joined or kind == "ByteLevel"
    return steps


def _flat(state: object) -> list[Mapping[str, object]]:
    if not isinstance(state, dict):
        return [{}]
    if state.get("type") != "Sequence":
        return [state]
    return [one for inner in state["decoders"] for one in _flat(inner)]


def _token_step(one: Mapping[str, object]) -> Step | None:
    """The step of a decoder that sees tokens; None if it is unknown."""
    kind = one.get("type")
    if kind == "Replace":
        old = _literal(one)
        return Replace(old, str(one["content"])) if old else None
    if kind == "Strip":
        return Strip(str(one["content"]), _count(one["start"]), _count(one["stop"]))
    if kind == "ByteFallback":
        return ByteFallback()
    if kind == "ByteLevel":
        return ByteLevel()
    if kind == "Metaspace" and "prepend_scheme" in one:
        return Metaspace(str(one["replacement"]), one["prepend_scheme"] != "never")
    if kind == "WordPiece":
        return WordPiece(str(one["prefix"]), bool(one["cleanup"]))
    return Suffix(str(one["suffix"])) if kind == "BPEDecoder" else None


def _joined_step(one: Mapping[str, object]) -> Step | None:
    """The step of a decoder that sees the whole text as one token; None if it is unknown."""
    kind = one.get("type")
    if kind == "Replace":
        old = _literal(one)
        return ReplaceText(old, str(one["content"])) if old else None
    if kind == "Strip":
        return StripText(str(one["content"]), _count(one["start"]), _count(one["stop"]))
    return None


def _literal(one: Mapping[str, object]) -> str:
    """What a Replace looks for; empty if that is a regular expression, which Python's may read otherwise."""
    pattern = one.get("pattern")
    found = pattern.get("String") if isinstance(pattern, dict) else None
    return found if isinstance(found, str) else ""


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def clean_up_steps() -> list[Step]:
    """The steps of transformers' clean_up_tokenization."""
    return [ReplaceText(old, new) for old, new in CLEAN_UP]


def replaced(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A text after several replacements, one after the other."""
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def overlap(text: str, start: str) -> int:
    """The length of the longest end of `text` that `start` starts with, and is longer than."""
    for length in range(min(len(text), len(start) - 1), 0, -1):
        if text.endswith(start[:length]):
            return length
    return 0


def common(one: str, other: str) -> int:
    """The length of the longest start that two texts share."""
    differ = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))
