"""How far outputs are from those expected: logits by divergence, vectors by angle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import Array

if TYPE_CHECKING:
    from llmc.frontends.lifted import Lifted

Floats = NDArray[np.float32]


def log_softmax(logits: Array) -> Floats:
    """Log-probabilities of each row, f32 [rows, vocabulary]; sums in f64."""
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total), np.float32)


def divergence_of(expected: Floats, found: Floats) -> float:
    """The Kullback-Leibler divergence of rows of log-probabilities from those expected, in nats, summed over rows."""
    with np.errstate(invalid="ignore"):
        gaps = np.exp(expected) * (expected - found)
    # What is ruled out has no part in the sum.
    return float(np.where(np.isneginf(expected), 0, gaps).sum(dtype=np.float64))


def cosines_of(a: Array, b: Array) -> Floats:
    """The cosine of each row of a [rows, ...] with that of b, whose rows have as many numbers; 1 where both are 0."""
    first = a.reshape(len(a), -1).astype(np.float64)
    second = b.reshape(first.shape).astype(np.float64)
    lengths = np.sqrt(np.square(first).sum(axis=-1) * np.square(second).sum(axis=-1))
    dots = (first * second).sum(axis=-1)
    same = (first == second).all(axis=-1)
    cosines = np.where(same, 1.0, np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0))
    return np.asarray(np.clip(cosines, -1, 1), np.float32)


def output_of(lifted: Lifted, graph: Graph) -> str:
    """The output that an encoder is for."""
    return str((lifted.encoder or {}).get("output") or graph.outputs[0][0])
