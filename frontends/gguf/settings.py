"""The metadata of a GGUF file as typed settings, of which every one that is read is remembered.

A key of the architecture that nobody asked for may change what the model computes, so it is refused (`unread`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmc.errors import FrontendError
from llmc.frontends.gguf.reader import MetadataValue


@dataclass
class Settings:
    """The keys below one prefix. `get` and its like take names without it, and say what is wrong with a value."""

    path: Path
    metadata: Mapping[str, MetadataValue]
    prefix: str
    used: set[str] = field(default_factory=set)

    def get(self, name: str) -> MetadataValue | None:
        """A value as it stands; None where there is none."""
        key = f"{self.prefix}.{name}"
        self.used.add(key)
        return self.metadata.get(key)

    def has(self, name: str) -> bool:
        """Whether the key stands in the file; it does not count as read."""
        return f"{self.prefix}.{name}" in self.metadata

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; lists of one number many times count as it. FrontendError without one and a default."""
        value = self.get(name)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None and default is not None:
            return default
        if isinstance(value, list):
            raise self.error(name, "differs from layer to layer, which is not supported")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, "is missing" if value is None else f"must be an integer, and is {value!r:.40}")
        return value

    def integers(self, name: str) -> list[int] | None:
        """A list of whole numbers; None where there is none."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return [int(item) for item in value]
        raise self.error(name, f"must be a list of integers, and is {value!r:.40}")

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number. f32 values come as the shortest decimal that means them, which is what was written."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, "is missing" if value is None else f"must be a finite number, and is {value!r:.40}")
        return shortest(float(value))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, and is {value!r:.40}")
        return value

    def flags(self, name: str) -> list[bool] | None:
        """A list of truth values; None where there is none."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, list) and all(isinstance(item, bool) for item in value):
            return [bool(item) for item in value]
        raise self.error(name, f"must be a list of true and false, and is {value!r:.40}")

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, and is {value!r:.40}")
        return value

    def expect(self, name: str, allowed: Collection[MetadataValue], why: str = "") -> None:
        """FrontendError where the key stands in the file with a value that is not among these."""
        value = self.get(name)
        if value is None:
            return
        listed = value if isinstance(value, list) else [value]
        for item in listed:
            found = shortest(item) if isinstance(item, float) else item
            if not any(found == known and isinstance(found, bool) == isinstance(known, bool) for known in allowed):
                raise self.error(name, f"is {item!r:.40}, which is not supported{why and ': '}{why}")

    def ignore(self, *names: str) -> None:
        """Keys that say nothing about what the model computes."""
        self.used.update(f"{self.prefix}.{name}" for name in names)

    def unread(self) -> list[str]:
        """The keys below the prefix that nothing has asked for."""
        return [key for key in self.metadata if key.startswith(f"{self.prefix}.") and key not in self.used]

    def error(self, name: str, what: str) -> FrontendError:
        return FrontendError(f"{self.path}: {self.prefix}.{name} {what}")


def shortest(value: float) -> float:
    """An f32 as the shortest decimal that rounds to it: 1e-05 is stored as 9.99999974737875e-06."""
    import numpy as np

    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value
