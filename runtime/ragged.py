"""Steps of whole sequences side by side: token arrays without padding, and a cache that lives for one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.kv_cache import CacheBuffers
from llmc.runtime.layer import Layer
from llmc.runtime.library import Library
from llmc.runtime.memory import address, aligned_empty
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

    def __init__(self, artifact: Artifact, library: Library, weights: int, threads: int) -> None:
        super().__init__(artifact, library, weights, threads)
        facts, manifest = self.facts, artifact.manifest
        self.outputs = manifest.outputs
        self.one_sequence = facts.state == "none"
        self.pages = -(-facts.max_step // min(facts.page, _SHORT_TEXT))
        self.buffers = CacheBuffers(manifest.layers, self.pages, facts.page)
        self._wanted = np.zeros(max(1, len(self.outputs)), np.uint64)
        self.step.outputs = address(self._wanted)
        self.step.cache, self.step.cache_pages = address(self.buffers.table), self.buffers.pages
        self.layer: Layer = Layer(library, manifest, self.step, self.make_tables(facts.max_step), threads)

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
        results = [
            aligned_empty(tuple(value_of(size, binding) for size in facts.shape), facts.dtype) for facts in self.outputs
        ]
        self._wanted[: len(results)] = [address(array) for array in results]
        with self.calling() as layer:
            layer.encode(ids.astype(np.int32, copy=False), types, lengths)
        return {
            facts.name: self._parts(array, [names_of(size) for size in facts.shape], starts, count)
            for facts, array in zip(self.outputs, results, strict=True)
        }

    def _parts(self, array: Array, names: list[frozenset[str]], starts: NDArray[np.int64], count: int) -> list[Array]:
        if self.one_sequence:  # [1, S, ...] or [1, ...], of the only sequence
            return [array[0] if array.ndim and array.shape[0] == 1 and not names[0] else array]
        if names and "T" in names[0]:
            return [array[starts[index] : starts[index + 1]] for index in range(count)]
        if names and "B" in names[0]:
            return list(array)
        return [array] * count  # the same for all: a table of the model's own
