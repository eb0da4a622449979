"""Steps of whole sequences side by side: token arrays without padding, and a cache that lives for one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.device import Code, Device, Place
from llmc.runtime.kv_cache import CacheBuffers
from llmc.runtime.layer import Layer
from llmc.runtime.sizes import names_of, value_of
from llmc.runtime.step_call import StepCaller

# Pages of the scratch cache: enough for a full step of texts of so many tokens. Shorter ones take more steps.
_SHORT_TEXT = 8

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Tokens:
    """One whole sequence: ids int32 [n], n > 0, and token types int32 [n] (None: all 0)."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.ids)


class RaggedRunner(StepCaller):
    """Runs an encoder over sequences side by side; where the graph sees one sequence only, over one. One thread at a
    time."""

    def __init__(self, artifact: Artifact, device: Device, code: Code, weights: Place) -> None:
        super().__init__(artifact, device, weights)
        facts, manifest = self.facts, artifact.manifest
        self.outputs = manifest.outputs
        self.one_sequence = facts.state == "none"
        self.pages = -(-facts.max_step // min(facts.page, _SHORT_TEXT))
        self.buffers = CacheBuffers(device, manifest.layers, self.pages, facts.page)
        self._wanted = self.table("outputs", (max(1, len(self.outputs)),), np.uint64)
        self.step.cache, self.step.cache_pages = self.buffers.number, self.buffers.pages
        self.layer: Layer = Layer(code, manifest, self.step, self.make_tables(facts.max_step), device.threads)

    def fitting(self, lengths: Sequence[int]) -> int:
        """How many of the first sequences go into one step: at least one, whatever its length."""
        return self.layer.fitting(np.array(lengths, np.int64))

    def run(self, sequences: Sequence[Tokens]) -> dict[str, list[Array]]:
        """Each output, as one array a sequence: [tokens of it, ...] where the graph has a row a token, else [...].

        The sequences must fit into one step. Arrays of one output are parts of one array, which is new.
        """
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        tokens, count = int(starts[-1]), len(sequences)
        ids = np.concatenate([sequence.ids for sequence in sequences])
        types = None
        if any(sequence.types is not None for sequence in sequences):
            types = np.zeros(tokens, np.int32)
            for sequence, start in zip(sequences, starts.tolist(), strict=False):
                types[start : start + len(sequence)] = 0 if sequence.types is None else sequence.types
        binding = {"T": tokens, "S": tokens, "B": count}
        shapes = [tuple(value_of(size, binding) for size in facts.shape) for facts in self.outputs]
        places = self.results(shapes, [facts.dtype for facts in self.outputs])
        self._wanted[: len(places)] = [place.number for place in places]
        with self.calling() as layer:
            layer.encode(ids.astype(np.int32, copy=False), types, lengths)
        return {
            facts.name: self._parts(
                self.device.fetch(place, shape, facts.dtype), [names_of(size) for size in facts.shape], starts, count
            )
            for facts, place, shape in zip(self.outputs, places, shapes, strict=True)
        }

    def _parts(self, array: Array, names: list[frozenset[str]], starts: NDArray[np.int64], count: int) -> list[Array]:
        if self.one_sequence:  # [1, S, ...] or [1, ...], of the only sequence
            return [array[0] if array.ndim and array.shape[0] == 1 and not names[0] else array]
        if names and "T" in names[0]:
            return [array[starts[index] : starts[index + 1]] for index in range(count)]
        if names and "B" in names[0]:
            return list(array)
        return [array] * count  # the same for all: a table of the model's own
