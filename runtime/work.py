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
    """Tokens that a step appends to a sequence: the first `again` of them it had already, and are computed anew."""

    sequence: Sequence
    ids: NDArray[np.int32]
    rows: Rows
    again: int


def cut_into_steps(work: Items[Work], max_step: int) -> list[list[Run]]:
    """Runs of at most max_step tokens together, in order."""
    steps: list[list[Run]] = []
    room = 0
    for item in work:
        sequence, ids, rows = item.sequence, item.ids, item.rows
        begin = 0
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
            steps[-1].append(Run(sequence, ids[begin : begin + count], sequence.length + begin, first_row))
            begin += count
            room -= count
    return steps
