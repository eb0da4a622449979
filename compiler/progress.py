"""How far a long compile has come: an interface, and a default that shows nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of phases (`start` names one and its number of units) and of units done (`advance`)."""

    def start(self, phase: str, total: int | None = None, unit: str = "") -> None:
        """A new phase begins; the one before has ended. `total` units are expected, if that is known."""

    def advance(self, count: int = 1) -> None:
        """`count` more units of the current phase are done."""

    def note(self, text: str) -> None:
        """One line that a person should see, such as a layer that could not take a scheme."""


class Silent:
    """Progress that shows nothing."""

    def start(self, phase: str, total: int | None = None, unit: str = "") -> None:
        """Says nothing."""

    def advance(self, count: int = 1) -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""
