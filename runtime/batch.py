"""Run tokens of several sequences in the steps of an artifact that goes on from a cache, or sees whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.device import ALIGNMENT, Buffer, Code, Device, Place, Use
from llmc.runtime.errors import ContextError
from llmc.runtime.kv_cache import CacheBuffers
from llmc.runtime.layer import Layer, Writing
from llmc.runtime.lora import Adapters, AdapterTables
from llmc.runtime.sequence import Sequence
from llmc.runtime.step_call import StepCaller

Rows = Literal["all", "last", "none"]
ROWS: tuple[Rows, ...] = get_args(Rows)
# What is fed to a sequence: token ids int32 [n] that lie one after the other, and which of their rows are wanted.
Feed = tuple[Sequence, NDArray[np.int32], Rows]


class StepRunner(StepCaller):
    """Steps of sequences. One thread at a time."""

    def __init__(self, artifact: Artifact, device: Device, code: Code, weights: Place, buffers: CacheBuffers) -> None:
        super().__init__(artifact, device, weights)
        self.buffers = buffers
        self.row_bytes = 4 * self.facts.vocab_size
        manifest = artifact.manifest
        self.max_context = manifest.max_context
        if self.facts.state != "paged":
            self.max_context = min(self.max_context, self.facts.max_step)  # every step sees the whole sequence
        self.step.cache, self.step.cache_pages = buffers.number, buffers.pages
        self.layer: Layer = Layer(code, manifest, self.step, self.make_tables(self.max_context), device.threads)
        tables = None if manifest.adapters is None else AdapterTables(device, manifest.adapters)
        self.step.adapter_tables = None if tables is None else tables.number
        self.adapters = Adapters(artifact.path, tables, self.layer)
        self._rooms: list[Buffer] = []  # the runner's own memory for logits, once there is some
        if not device.in_process:
            self.layer.drive(device.choose, buffers.copy, _fetching(device, self._rooms, self.facts.vocab_size))
        self._make_room(1)

    def feed(self, feeds: Items[Feed], out: Place | None = None) -> Place:
        """Appends tokens to sequences, each once, in as few steps of `max_step` tokens as it takes. Returns where the
        logits asked for are, float32 [rows, vocab], in order. Sequences that were not reached are as before on an
        error.

        out: where to put them; otherwise they may lie in the runner's own buffer, and the next step overwrites them.
        """
        requests = []
        for sequence, ids, rows in feeds:
            self.check_context(sequence, len(ids))
            first_row = 0 if rows == "all" else len(ids) - (rows == "last")
            requests.append((sequence.place, ids, first_row))
        total = sum(len(ids) - first_row for _, ids, first_row in requests)
        if out is None or out.number % ALIGNMENT or self.row_bytes % ALIGNMENT:
            self._make_room(min(total, self.facts.max_step))
        with self.calling() as layer:
            layer.begin(requests)
            try:
                done = self._step(out, 0, total)
                if out is None and not layer.left:
                    return self.logits.at()
                if out is None:
                    out = self.device.reserve(total * self.row_bytes, Use.RESULT).at()
                    self.device.copy(self.logits.at(), out, done * self.row_bytes)
                while layer.left:
                    self.settle()
                    done += self._step(out, done, total)
            finally:
                layer.finish()
        return out

    def _step(self, out: Place | None, done: int, total: int) -> int:
        """One step, whose logits are the rows from `done` on of the `total` at a place; returns how many."""
        target = None if out is None else out + done * self.row_bytes
        if target is not None and done < total and target.number % ALIGNMENT == 0:
            return self.layer.step(target.number)
        rows = self.layer.step()
        if target is not None:
            self.device.copy(self.logits.at(), target, rows * self.row_bytes)
        return rows

    @property
    def logits(self) -> Buffer:
        """The runner's own memory for logits."""
        return self._rooms[-1]

    def _make_room(self, rows: int) -> None:
        """Makes the runner's own memory for logits one for so many rows of a step, at least."""
        if not self._rooms or rows * self.row_bytes > self.logits.nbytes:
            self._rooms[:] = [self.device.reserve(rows * self.row_bytes, Use.SPARSE)]
            self.layer.write_logits_to(self.logits.number)

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


def _fetching(device: Device, rooms: Items[Buffer], count: int) -> Callable[[int], NDArray[np.float32]]:
    """What brings a row of `count` logits here, of which the number is given: it lies in the last of these rooms."""

    def fetch(number: int) -> NDArray[np.float32]:
        place = rooms[-1].at(number - rooms[-1].number)
        return device.fetch(place, (count,), np.float32)  # type: ignore[return-value]

    return fetch
