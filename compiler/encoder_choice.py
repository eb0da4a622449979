"""Which precision an encoder gets where nobody says: the smallest whose vectors still point where the original's do.

Vectors are compared by angles, so a mean cosine is what counts, on random ids as `own_text.py` draws them. One
measuring of inputs serves all choices: matrices in 4 bits, of which more and more get 6 (`allocation.budgets`). Where
not even 6 bits for all of them do, it is 8.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.accuracy import ENCODER_TEXTS, SEED, cosines_of, output_of, outputs_of
from llmc.compiler.calibrate import text_threads
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.graph import Graph
from llmc.compiler.own_text import random_texts
from llmc.errors import LlmcError
from llmc.frontends.lifted import Lifted

NEAR = 0.99


class Near:
    """Whether the mean cosine of a graph's vectors with the original's is above `NEAR`."""

    def __init__(self, lifted: Lifted, original: Graph, vocabulary: int, seed: int) -> None:
        self._output = output_of(lifted, original)
        # Other ids than weights are rounded by, and than accuracy is told of.
        self._texts = random_texts(lifted, vocabulary, seed ^ SEED ^ 1)[:ENCODER_TEXTS]
        with text_threads() as pool:
            self._expected = outputs_of(original, self._output, self._texts, lifted.weights.load, pool, wide=True)

    def __call__(self, graph: Graph, load: LoadParam) -> bool:
        """False also where the graph gives nothing that could be compared."""
        try:
            with text_threads() as pool:
                found = outputs_of(graph, self._output, self._texts, load, pool)
        except LlmcError:
            return False
        cosines = np.concatenate([cosines_of(a, b) for a, b in zip(self._expected, found, strict=True)])
        return float(cosines.mean(dtype=np.float64)) > NEAR
