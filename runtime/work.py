"""What callers ask of a step, cut into steps that an artifact can run."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.batch import Run
from llmc.runtime.sequence import Sequence

Rows = Literal["all", "last", "none"]


@dataclass(frozen=True)
class Work:
    """Tokens that a step appends to a sequence: the first `again` of them it had already, and are computed anew.
    decoding: see `Run`."""

    sequence: Sequence
    ids: NDArray[np.int32]
    rows: Rows
    again: int
    decoding: bool


def cut_into_steps(work: Items[Work], max_step: int, row_kinds: bool) -> list[list[Run]]:
    """Runs of at most max_step tokens together, in order; of one kind where kinds differ (`StepFacts.row_kinds`)."""
    steps: list[list[Run]] = []
    room = 0
    for item in work:
        sequence, ids, rows = item.sequence, item.ids, item.rows
        begin = 0
        if row_kinds and steps and steps[-1][-1].decoding != item.decoding:
            room = 0
        while begin < len(ids):
            if room == 0:
                steps.append([])
                room = max_step
            count = min(room, len(ids) - begin)
            is_end = begin + count == len(ids)
            if rows == "all":
                first_row = min(max(item.again - begin, 0), count)
            else:
                first_row = count - 1 if rows == "last" and is_end else count
            part = ids[begin : begin + count]
            steps[-1].append(Run(sequence, part, sequence.length + begin, first_row, item.decoding))
            begin += count
            room -= count
    return steps
