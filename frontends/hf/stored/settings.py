"""A quantization's settings as a checkpoint gives them: each read with its kind and limits, or refused by name.

A setting that nobody asks for may change what the weights stand for, or what the model does with its activations, so
that it is refused too (`require_known`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llmc.errors import FrontendError

ADVICE = "compile the original that it was made from, and let llmc quantize it (-q int4)"


@dataclass(frozen=True)
class Settings:
    """A JSON object. where: its file and place in it, for messages. A setting that is null counts as left out."""

    values: Mapping[str, object]
    where: str
    _known: set[str] = field(default_factory=set, repr=False, compare=False)
    _inner: dict[str, Settings] = field(default_factory=dict, repr=False, compare=False)

    def get(self, name: str) -> object:
        """A value as it stands; None where it is left out."""
        self._known.add(name)
        return self.values.get(name)

    def ignore(self, *names: str) -> None:
        """Settings that say nothing of what the weights stand for: how they were found, or which code runs them."""
        self._known.update(names)

    def expect(self, name: str, *allowed: object, why: str = "") -> None:
        """FrontendError for a setting that has another value than these. why: what is not read."""
        value = self.get(name)
        if value is None or any(value == known and type(value) is type(known) for known in allowed):
            return
        listed = " or ".join(repr(known) for known in allowed) or "none"
        raise self.wrong(name, f"{listed}{why and ': '}{why}")

    def refuse(self, name: str, why: str) -> None:
        """FrontendError for a setting that is there and says more than nothing (false, {} or [])."""
        if self.get(name):
            raise FrontendError(f"{self.where}: {name} {why}, which is not read: {ADVICE}")

    def require_known(self) -> None:
        """FrontendError for the first setting that nobody has asked for, here or in the settings inside."""
        for name, value in self.values.items():
            if value is not None and name not in self._known:
                raise FrontendError(
                    f"{self.where}: {name!r:.60} is not known, and may change what the weights stand for: {ADVICE}, or "
                    "take it away if it has no effect"
                )
        for inner in self._inner.values():
            inner.require_known()

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def wrong(self, name: str, expected: str) -> FrontendError:
        """What to raise for a setting that is not as expected."""
        return FrontendError(f"{self.where}: {name} is {self.values.get(name)!r:.60}, expected {expected}")

    def integer(self, name: str, default: int | None, least: int, most: int) -> int:
        """A whole number from least to most; no default: it has to be there."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, f"a whole number, {least} to {most}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A text."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def choice(self, name: str, known: tuple[str, ...], default: str = "") -> str:
        """One of several texts, however its letters are cased."""
        value = self.text(name, default).lower()
        if value not in known:
            raise self.wrong(name, " or ".join(repr(other) for other in known))
        return value

    def inner(self, name: str) -> Settings | None:
        """Settings inside of these; None where they are left out."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "a JSON object")
        return self._inner.setdefault(
            name, Settings(value, f"{self.where}: {name if name.isprintable() else ascii(name):.60}")
        )

    def each(self, name: str) -> Iterator[tuple[str, Settings]]:
        """The objects of an object, by their names."""
        found = self.inner(name)
        for key in found.values if found is not None else ():
            assert found is not None
            part = found.inner(key)
            if part is not None:
                yield key, part
