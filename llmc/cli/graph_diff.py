"""The difference of two graphs' texts, blind to the numbers of values: one op less renumbers all that follow."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

_NUMBER = re.compile(r"%\d+\b")
_CONTEXT = 3


def graph_diff(before: str, after: str, old_name: str, new_name: str) -> str:
    """A unified diff. Lines that differ in value numbers only count as equal and are shown as they are afterwards."""
    return "".join(_lines(before.splitlines(), after.splitlines(), old_name, new_name))


def _lines(old: list[str], new: list[str], old_name: str, new_name: str) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, _masked(old), _masked(new), autojunk=False)
    groups = list(matcher.get_grouped_opcodes(_CONTEXT))
    if groups:
        yield f"--- {old_name}\n+++ {new_name}\n"
    for group in groups:
        (_, old_start, _, new_start, _), (_, _, old_end, _, new_end) = group[0], group[-1]
        yield f"@@ -{old_start + 1},{old_end - old_start} +{new_start + 1},{new_end - new_start} @@\n"
        for kind, old_from, old_to, new_from, new_to in group:
            if kind == "equal":
                yield from (f" {line}\n" for line in new[new_from:new_to])
                continue
            yield from (f"-{line}\n" for line in old[old_from:old_to])
            yield from (f"+{line}\n" for line in new[new_from:new_to])


def _masked(lines: list[str]) -> list[str]:
    return [_NUMBER.sub("%", line) for line in lines]
