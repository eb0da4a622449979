"""Which precision an encoder gets where nobody says: the smallest whose vectors still point where the original's do.

Vectors are compared by angles, so a mean cosine is what counts, on random ids like those that accuracy is told of. One
measuring of inputs serves all choices: matrices in 4 bits on average, then in more and more (`allocation.budgets`).
Where not even 6 bits for all of them do, it is 8.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from llmc.compiler.accuracy import ENCODER_LENGTH, ENCODER_TEXTS, SEED, outputs_of
from llmc.compiler.calibrate import text_threads
from llmc.compiler.divergence import cosines_of, output_of
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import Array
from llmc.compiler.own_text import uniform_texts

if TYPE_CHECKING:
    from llmc.frontends.lifted import Lifted

NEAR = 0.99


class Near:
    """Whether the mean cosine of a graph's vectors with the original's is above `least`."""

    def __init__(self, lifted: Lifted, original: Graph, vocabulary: int, seed: int) -> None:
        self.least = NEAR
        self._lifted, self._original, self._output = lifted, original, output_of(lifted, original)
        # Others than those that accuracy is told of: that figure decides nothing.
        self._texts = uniform_texts(lifted, vocabulary, seed ^ SEED ^ 1, ENCODER_TEXTS, ENCODER_LENGTH)

    @cached_property
    def _expected(self) -> list[Array]:
        with text_threads() as pool:
            load = self._lifted.weights.load
            return outputs_of(self._original, self._output, self._texts, load, pool, wide=True)

    def __call__(self, graph: Graph, load: LoadParam) -> bool:
        """IRError where random ids are not what the graph takes."""
        expected = self._expected
        with text_threads() as pool:
            found = outputs_of(graph, self._output, self._texts, load, pool)
        cosines = np.concatenate([cosines_of(a, b) for a, b in zip(expected, found, strict=True)])
        return float(cosines.mean(dtype=np.float64)) > self.least
