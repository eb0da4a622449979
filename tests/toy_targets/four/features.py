"""What turns a machine's features on in LLVM."""

from __future__ import annotations


def attributes(features: frozenset[str]) -> list[str]:
    return [f"+{name}" for name in sorted(features)]
