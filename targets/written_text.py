"""What a compiled model makes of texts on this machine: texts that it writes itself, id by id, and what it gives for
texts that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.encoded import PAGE
from llmc.runtime.runtime import Runtime

Ids = NDArray[np.int32]
Draw = Callable[[NDArray[np.float32], NDArray[np.float64]], Ids]


@dataclass(frozen=True)
class RunningArtifact:
    """A loaded artifact. draw: takes one id for each row of logits [texts, vocab], by numbers from 0 to 1."""

    runtime: Runtime
    draw: Draw

    def write(
        self, starts: Sequence[int], chances: NDArray[np.float64], tell: Callable[[], None] = lambda: None
    ) -> list[Ids]:
        """Texts [texts, length] that begin with one id each and go on as the model says. chances [texts, length]: what
        `draw` wants. tell: called after each column."""
        texts = np.empty(chances.shape, np.int32)
        texts[:, 0] = starts
        sequences = [self.runtime.sequence() for _ in starts]
        for at in range(1, chances.shape[1]):
            requests = [(each, texts[number, at - 1 : at], "last") for number, each in enumerate(sequences)]
            texts[:, at] = self.draw(self.runtime.step(requests), chances[:, at])  # type: ignore[arg-type]
            tell()
        for sequence in sequences:
            sequence.close()
        return list(texts)

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """Logits behind each token of a text, [tokens, vocabulary]."""
        with self.runtime.sequence(len(ids)) as sequence:
            return self.runtime.step([(sequence, ids, "all")])

    def encode(self, ids: Ids) -> Mapping[str, NDArray[np.generic]]:
        """All outputs of an encoder for a text."""
        found = self.runtime.encode(ids)
        assert isinstance(found, dict)
        return found


@contextmanager
def running(
    path: Path, weights: Path | None, texts: int, length: int, token_bytes: int, draw: Draw
) -> Iterator[RunningArtifact]:
    """The artifact at `path`, with room in its cache for so many texts of so many tokens.

    weights: the file with its weights, where it has none. token_bytes: of a token in the KV cache. LlmcError where the
    artifact does not run here.
    """
    pages = texts * (-(-length // PAGE) + 1)
    memory = pages * PAGE * max(1, token_bytes)
    with Runtime.load(path, kv_memory=memory, weights=weights, verify=False) as runtime:
        yield RunningArtifact(runtime, draw)


def write_texts(
    path: Path,
    starts: Sequence[int],
    chances: NDArray[np.float64],
    token_bytes: int,
    draw: Draw,
    tell: Callable[[], None] = lambda: None,
) -> list[Ids]:
    """What the artifact at `path` writes: see `running` and `RunningArtifact.write`."""
    with running(path, None, len(starts), chances.shape[1], token_bytes, draw) as artifact:
        return artifact.write(starts, chances, tell)
