"""What turns a machine's features on in LLVM."""

from __future__ import annotations

TRIPLE = "x86_64-linux-gnu"
COMPILER_OPTIONS = ()


def attributes(features: frozenset[str]) -> list[str]:
    return [f"+{name}" for name in sorted(features)]
