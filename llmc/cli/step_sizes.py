"""The sizes of a step for which a kernel is called, for people."""

from __future__ import annotations

from collections.abc import Sequence

# What counts rows: symbols of a step, for all tokens or those whose logits are wanted, and a profile's word for both.
_ROWS = ("T", "S", "R", "rows")
_KIND = "PROMPT"  # 1 in steps that read prompts, 0 in steps where each row decodes


def sizes_text(when: Sequence[tuple[str, int, int | None]]) -> str:
    """`1`, `2-4`, `17 and more` rows for (symbol, low, high) guards, high None: no limit. Sizes that are no rows have
    their name in front (`splits 2 and more`), and the kind of rows stands behind their number (`1-128 of prompts`, `any
    that decode`). Empty where nothing is asked for."""
    numbers = ", ".join(
        _range(low, high) if name in _ROWS else f"{name.lower()} {_range(low, high)}"
        for name, low, high in when
        if name != _KIND
    )
    kinds = ["of prompts" if low else "that decode" for name, low, _ in when if name == _KIND]
    return " ".join([numbers or "any", *kinds]) if kinds else numbers


def _range(low: int, high: int | None) -> str:
    if high is None:
        return f"{low} and more"
    return str(low) if low == high else f"{low}-{high}"
