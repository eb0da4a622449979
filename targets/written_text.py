"""Texts that a compiled model writes on this machine, some at a time, id by id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.encoded import PAGE
from llmc.runtime.runtime import Runtime

Ids = NDArray[np.int32]


def write_texts(
    path: Path,
    starts: Sequence[int],
    chances: NDArray[np.float64],
    token_bytes: int,
    draw: Callable[[NDArray[np.float32], NDArray[np.float64]], Ids],
    tell: Callable[[], None] = lambda: None,
) -> list[Ids]:
    """Texts [texts, length] that begin with one id each and go on as the model says, by the artifact at `path`.

    chances [texts, length]: numbers from 0 to 1, by which `draw` takes one id for each row of logits [texts, vocab].
    token_bytes: of a token in the KV cache. tell: called after each column. LlmcError where the artifact does not run
    here.
    """
    count, length = chances.shape
    texts = np.empty((count, length), np.int32)
    texts[:, 0] = starts
    pages = count * (-(-length // PAGE) + 1)
    with Runtime.load(path, kv_memory=pages * PAGE * max(1, token_bytes)) as runtime:
        sequences = [runtime.sequence() for _ in starts]
        for at in range(1, length):
            logits = runtime.step([(each, texts[number, at - 1 : at], "last") for number, each in enumerate(sequences)])
            texts[:, at] = draw(logits, chances[:, at])
            tell()
    return list(texts)
