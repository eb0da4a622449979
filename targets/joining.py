"""Which calls of a program may run in one loop over the pool's threads: see `kernel.Joined`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.targets.kernel import Call, Needed, Range

if TYPE_CHECKING:
    from llmc.targets.lowering import Program

MOST_BYTES = 48 << 10
"""Bytes from memory that a part may add to a unit of a loop: nobody can help with what is in one unit."""


@dataclass(frozen=True)
class Part:
    """An earlier call in the loop: the op's place in the program, the call's among the op's calls, and the units that
    unit u of the loop needs: first + u * count and the next ones, `count` in all, for each of `ranges`."""

    place: int
    number: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class JoinedLoop:
    """A loop that runs `parts`, in order, before the first call of the op that it is of, while `when` holds."""

    parts: tuple[Part, ...]
    when: tuple[Range, ...]


def joined_loop(program: Program, place: int) -> JoinedLoop | None:
    """The loop of the first call of the op at this place, if it can take in calls right before it."""
    calls = program.ops[place].calls
    if not calls or calls[0].joins is None:
        return None
    when, parts = (*calls[0].when, *calls[0].joins.when), list[Part]()
    for needed in calls[0].joins.needs:
        before = place - len(parts) - 1
        if before < 0 or program.ops[before].op is not needed.op:
            break
        found = _part(before, program.ops[before].calls, when, needed)
        if found is None:
            break
        parts.append(found)
        when = (*when, *program.ops[before].calls[found.number].when)
    return JoinedLoop(tuple(reversed(parts)), when) if parts else None


def _part(place: int, calls: Sequence[Call], when: tuple[Range, ...], needed: Needed) -> Part | None:
    """One of an op's calls whose units the loop can run, and beside which no other runs while `when` and it hold."""
    for number, call in enumerate(calls):
        both, others = (*when, *call.when), (other for other in calls if other is not call)
        if _exclude(when, call.when) or not all(_exclude(both, other.when) for other in others):
            continue
        ranges = _ranges(call, needed)
        if ranges and not call.failure:
            return Part(place, number, ranges)
    return None


def _ranges(call: Call, needed: Needed) -> tuple[tuple[int, int], ...]:
    """The units of a call that are needed; none where they are not its own ones."""
    if not needed.columns:
        return ((0, 1),)
    if not call.columns or any(number % call.columns for both in needed.columns for number in both):
        return ()
    ranges = tuple((first // call.columns, count // call.columns) for first, count in needed.columns)
    assert isinstance(call.bytes_moved, int) and isinstance(call.units, int)
    nbytes = call.bytes_moved * sum(count for _, count in ranges) // call.units
    return ranges if nbytes <= MOST_BYTES else ()


def _exclude(some: tuple[Range, ...], others: tuple[Range, ...]) -> bool:
    """Whether two conditions never hold together."""
    return any(
        a.symbol == b.symbol and ((a.high is not None and a.high < b.low) or (b.high is not None and b.high < a.low))
        for a in some
        for b in others
    )
