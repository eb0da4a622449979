"""Typed access to JSON from untrusted files: every wrong field is an `ArtifactError` that names it."""

from __future__ import annotations

import math

from llmc.runtime.errors import ArtifactError

MOST = 1 << 62  # no size, offset or count is larger


class Reader:
    """Typed access to a JSON object; every refusal names the field."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise refuse(path or "the manifest", "an object", value)
        self.value: dict[str, object] = value
        self.path = path

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def child(self, key: str) -> Reader:
        return Reader(self.value.get(key), self._name(key))

    def integer(self, key: str, low: int = 0, high: int = MOST, default: int | None = None) -> int:
        value = self.value.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise refuse(self._name(key), f"an integer in {low}..{high}", value)
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return None if self.value.get(key) is None else self.integer(key, low, high)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.value.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
            raise refuse(self._name(key), f"a number in {low:g}..{high:g}", value)
        return float(value)  # type: ignore[arg-type]

    def string(self, key: str, choices: tuple[str, ...] = (), default: str | None = None) -> str:
        value = self.value.get(key, default)
        if not isinstance(value, str) or (choices and value not in choices):
            raise refuse(self._name(key), " or ".join(map(repr, choices)) or "a string", value)
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.value.get(key, default)
        if not isinstance(value, bool):
            raise refuse(self._name(key), "true or false", value)
        return value

    def array(self, key: str, default: list[object] | None = None) -> list[object]:
        value = self.value.get(key, default)
        if not isinstance(value, list):
            raise refuse(self._name(key), "a list", value)
        return value

    def children(self, key: str) -> list[Reader]:
        """The objects of a list, which may be missing."""
        return [Reader(value, f"{self._name(key)}[{index}]") for index, value in enumerate(self.array(key, []))]

    def strings(self, key: str, default: list[object] | None = None) -> tuple[str, ...]:
        values = self.array(key, default)
        for value in values:
            if not isinstance(value, str):
                raise refuse(self._name(key), "a list of strings", value)
        return tuple(str(value) for value in values)


def refuse(name: str, wanted: str, value: object) -> ArtifactError:
    shown = "missing" if value is None else f"{value!r:.60}"
    return ArtifactError(
        f"the manifest cannot be used: {name} must be {wanted}, and is {shown}. Compile the model again"
    )
