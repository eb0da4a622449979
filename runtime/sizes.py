"""Sizes as a manifest writes them: integers, or polynomials of named sizes such as `2*batch + -1*(length + 3)//4`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmc.runtime.errors import RuntimeStateError

NAME = re.compile(r"[A-Za-z_][\w.\-/]*\Z")
_TOKEN = re.compile(r"\s*(?:(\d{1,19})|([A-Za-z_](?:[\w.\-]|/(?!/))*)|(//|[-+*()]))")
_MOST_CHARACTERS = 4096
_MOST_DEPTH = 32
_MOST_TERMS = 64
_MOST = 1 << 62

# A size in postfix: integers and names push themselves, operators take two values.
Size = tuple[int | str, ...]


class SizeError(ValueError):
    """A text that is no size."""


def parse_size(value: object) -> Size:
    """A size from what a manifest has in a shape: an int or a text. Raises `SizeError`."""
    if type(value) is int:
        if not 0 <= value < _MOST:
            raise SizeError("out of range")
        return (value,)
    if not isinstance(value, str) or len(value) > _MOST_CHARACTERS:
        raise SizeError("neither an integer nor a short text")
    tokens: list[int | str] = []
    place = 0
    text = value.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise SizeError(f"unreadable at {text[place : place + 20]!r}")
        tokens.append(int(found[1]) if found[1] else f"={found[2]}" if found[2] else found[3])
        place = found.end()
    parser = _Parser(tokens)
    size = parser.sum(0)
    if parser.place != len(tokens):
        raise SizeError("more than one size")
    return tuple(size)


class _Parser:
    """Sums of products of integers, names, sums in brackets, and their quotients by integers that are not zero."""

    def __init__(self, tokens: Sequence[int | str]) -> None:
        self.tokens = tokens
        self.place = 0

    def _peek(self) -> int | str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def sum(self, depth: int) -> list[int | str]:
        total = self._product(depth)
        while self._peek() == "+":
            self.place += 1
            total += [*self._product(depth), "+"]
        return total

    def _product(self, depth: int) -> list[int | str]:
        result = self._atom(depth)
        while self._peek() in ("*", "//"):
            operator = str(self._peek())
            self.place += 1
            factor = self._atom(depth)
            if operator == "//" and not (len(factor) == 1 and type(factor[0]) is int and factor[0] > 0):
                raise SizeError("a division by something that is no positive integer")
            result += [*factor, operator]
        return result

    def _atom(self, depth: int) -> list[int | str]:
        token = self._peek()
        self.place += 1
        if self.place > _MOST_TERMS * 8 or depth > _MOST_DEPTH:
            raise SizeError("too long")
        if token == "-":
            number = self._peek()
            self.place += 1
            if type(number) is not int:
                raise SizeError("a minus before something that is no integer")
            return [-number]
        if token == "(":
            inside = self.sum(depth + 1)
            if self._peek() != ")":
                raise SizeError("a bracket that does not close")
            self.place += 1
            return inside
        if type(token) is int or (isinstance(token, str) and token.startswith("=")):
            return [token]
        raise SizeError(f"no size before {token!r}" if token is not None else "it ends too early")


def names_of(size: Size) -> frozenset[str]:
    """The names in a size."""
    return frozenset(item[1:] for item in size if isinstance(item, str) and item.startswith("="))


def value_of(size: Size, binding: Mapping[str, int]) -> int:
    """The size where names stand for integers."""
    stack: list[int] = []
    for item in size:
        if isinstance(item, int):
            stack.append(item)
        elif item.startswith("="):
            stack.append(binding[item[1:]])
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(left + right if item == "+" else left * right if item == "*" else left // right)
            if abs(stack[-1]) >= _MOST:
                raise RuntimeStateError("a size of the artifact has no sensible value: it is beyond 2^62")
    return stack[0]


def show(size: Size) -> str:
    """A size for people."""
    stack: list[tuple[str, str]] = []  # text, and its outermost operator
    for item in size:
        if isinstance(item, int):
            stack.append((str(item), ""))
        elif item.startswith("="):
            stack.append((item[1:], ""))
        else:
            (right, of_right), (left, of_left) = stack.pop(), stack.pop()
            if item == "+":
                stack.append((f"{left} + {right}", "+"))
                continue
            # Products and quotients are read from the left.
            left = f"({left})" if of_left == "+" else left
            right = f"({right})" if of_right else right
            stack.append((f"{left}{item}{right}", item))
    return stack[0][0]


@dataclass(frozen=True)
class NamedSize:
    """A size that inputs decide: at least `low` and, as memory was planned for that, at most `high`."""

    name: str
    low: int
    high: int
