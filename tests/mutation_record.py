"""Mutants that change nothing anybody could see, with the argument for each: tests/equivalent_mutants.

One file a room. A block names a module (in brackets), a line as it is, one or more lines as mutants have it, and why
nothing changes:

    [compiler/passes/cse.py]
    - if len(users) > 1:
    + if len(users) >= 1:
    + if len(users) != 1:
    = a value without users was dropped before

Lines are compared without the space around them. A block whose line is no longer in its module is an error: the
argument was about other code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "equivalent_mutants"

# (what the line has somewhere, a part of it, what the mutant has instead of that part, why nothing changes)
RULES = (
    ("zip(", "strict=True", "strict=False", "only a check is lost: the lengths are equal by construction"),
    ("@dataclass", "frozen=True", "frozen=False", "only a check is lost: nothing assigns to these fields"),
    (".astype(", "copy=False", "copy=True", "a copy more, with the same numbers"),
    ("reshape(", "reshape(-1", "reshape(~1", "numpy finds the size that any negative number stands for"),
    ("reshape(", "reshape(-1", "reshape(- 2", "numpy finds the size that any negative number stands for"),
)


@dataclass(frozen=True)
class Equivalent:
    """Mutants of one line, by the line that they have instead, and why they are the same."""

    module: str
    before: str
    after: tuple[str, ...]
    why: str


def parse(text: str, where: str) -> list[Equivalent]:
    """The blocks of a file. `ValueError` names a line that is not as this module's docstring says."""
    found: list[Equivalent] = []
    module, before, after = "", "", []
    for number, line in enumerate(text.split("\n"), 1):
        mark, content = line[:2], line[2:].strip()
        if line.startswith("[") and line.endswith("]"):
            module = line[1:-1]
        elif mark == "- " and module and not before:
            before = content
        elif mark == "+ " and before:
            after.append(content)
        elif mark == "= " and after and content:
            found.append(Equivalent(module, before, tuple(after), content))
            before, after = "", []
        elif line.strip() and not line.startswith("#"):
            raise ValueError(f"{where}:{number}: {line!r} does not belong here")
    if before:
        raise ValueError(f"{where}: the last block has no argument")
    return found


def load(folder: Path = FOLDER) -> list[Equivalent]:
    """All blocks of all files."""
    return [block for path in sorted(folder.glob("*.txt")) for block in parse(path.read_text(), path.name)]


def reasons(blocks: list[Equivalent]) -> dict[tuple[str, str, str], str]:
    """(module, line, line of the mutant) -> why it is equivalent."""
    return {(block.module, block.before, after): block.why for block in blocks for after in block.after}


def reason(known: Mapping[tuple[str, str, str], str], module: str, before: str, after: str) -> str:
    """Why a mutant is equivalent, by what is known or by a rule; empty if nothing says so."""
    for where, part, instead, why in RULES:
        changed = (before[: at.start()] + instead + before[at.end() :] for at in re.finditer(re.escape(part), before))
        if where in before and after in changed:
            return why
    return known.get((module, before, after), "")


def stale(blocks: list[Equivalent], root: Path = ROOT) -> list[str]:
    """What is said about lines that are not in their modules any more."""
    found = []
    for block in blocks:
        path = root / block.module
        lines = {line.strip() for line in path.read_text().split("\n")} if path.exists() else set()
        if block.before not in lines:
            found.append(f"{block.module}: {block.before}")
    return found
