"""Run tokens of several sequences in the steps of an artifact that goes on from a cache, or sees whole sequences."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.errors import ContextError
from llmc.runtime.kv_cache import CacheBuffers
from llmc.runtime.layer import Layer, Writing
from llmc.runtime.library import Library
from llmc.runtime.memory import address, reserve
from llmc.runtime.sequence import Sequence
from llmc.runtime.step_call import StepCaller

Rows = Literal["all", "last", "none"]
# What is fed to a sequence: token ids int32 [n] that lie one after the other, and which of their rows are wanted.
Feed = tuple[Sequence, NDArray[np.int32], Rows]


class StepRunner(StepCaller):
    """Steps of sequences. One thread at a time."""

    def __init__(self, artifact: Artifact, library: Library, weights: int, buffers: CacheBuffers, threads: int) -> None:
        super().__init__(artifact, library, weights, threads)
        self.buffers = buffers
        self.logits: NDArray[np.float32] = np.zeros((0, self.facts.vocab_size), np.float32)
        facts, manifest = self.facts, artifact.manifest
        self.max_context = manifest.max_context
        if facts.state != "paged":
            self.max_context = min(self.max_context, facts.max_step)  # every step sees the whole sequence
        self.step.cache, self.step.cache_pages = address(buffers.table), buffers.pages
        self.layer: Layer = Layer(library, manifest, self.step, self.make_tables(self.max_context), threads)
        self._make_room(1)

    def feed(self, feeds: Items[Feed], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Appends tokens to sequences, each once, in as few steps of `max_step` tokens as it takes. Returns the logits
        asked for, float32 [rows, vocab], in order. Sequences that were not reached are as before on an error.

        out: where to put them; otherwise they may lie in the runner's own buffer, and the next step overwrites them.
        """
        requests = []
        for sequence, ids, rows in feeds:
            self.check_context(sequence, len(ids))
            first_row = 0 if rows == "all" else len(ids) - (rows == "last")
            requests.append((sequence.place, ids, first_row))
        total = sum(len(ids) - first_row for _, ids, first_row in requests)
        if out is None or address(out) % 64 or self.facts.vocab_size % 16:
            self._make_room(min(total, self.facts.max_step))
        with self.calling() as layer:
            layer.begin(requests)
            try:
                done = self._step(out, 0)
                if out is None and not layer.left:
                    return self.logits[:done]
                if out is None:
                    out = np.empty((total, self.facts.vocab_size), np.float32)
                    out[:done] = self.logits[:done]
                while layer.left:
                    self.settle()
                    done += self._step(out, done)
            finally:
                layer.finish()
        return out

    def _step(self, out: NDArray[np.float32] | None, done: int) -> int:
        """One step, whose logits are the rows of `out` from `done` on; returns how many."""
        if out is None or done == len(out) or address(out[done:]) % 64:
            rows = self.layer.step()
            if out is not None:
                out[done : done + rows] = self.logits[:rows]
            return rows
        return self.layer.step(address(out[done:]))

    def _make_room(self, rows: int) -> None:
        """Makes the runner's own buffer one for so many rows of a step, at least."""
        if rows > len(self.logits):
            self.logits = reserve((rows, self.facts.vocab_size), np.float32)  # type: ignore[assignment]
            self.layer.write_logits_to(self.logits)

    def write(self, writing: Writing) -> BaseException | None:
        """Writes texts (csrc/layer.h). Returns the error that ended it, if one did: what came before it counts."""
        self._make_room(min(writing.number, self.facts.max_step))
        if self.is_watched:
            with self.calling() as layer:
                error = layer.write(writing)
        else:  # for a text whose tokens are wanted one by one, every microsecond is paid per token
            self.settle()
            error = self.layer.write(writing)
        if error is not None and not isinstance(error, Exception):
            raise error  # an interrupt
        return error

    def check_context(self, sequence: Sequence, count: int) -> None:
        """ContextError where so many more tokens are too many."""
        sequence.check_open()
        end = sequence.length + count
        if end > self.max_context:
            raise ContextError(
                f"{end} tokens are more than the context of {self.max_context} tokens that the artifact was "
                "compiled for: shorten the prompt, or compile with a larger --max-context"
            )
