"""Seeds whose models came out wrong once, each with the reason: `make test` always has them."""

from __future__ import annotations

ONCE_WRONG: dict[int, str] = {}
