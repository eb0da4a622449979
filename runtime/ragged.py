"""Steps of whole sequences side by side: token arrays without padding, and a cache that lives for one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.batch import choose_splits, choose_tile, parts_of
from llmc.runtime.device import Device, Place
from llmc.runtime.kv_cache import CacheBuffers
from llmc.runtime.profile import StepSizes
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

    def __init__(self, artifact: Artifact, device: Device, weights: Place) -> None:
        super().__init__(artifact, device, weights)
        facts, manifest = self.facts, artifact.manifest
        self.outputs = manifest.outputs
        self.one_sequence = facts.state == "none"
        self.kv_heads = min((layer.kv_heads for layer in manifest.layers), default=1)
        most = facts.max_step
        self.pages = -(-most // min(facts.page, _SHORT_TEXT))
        self.buffers = CacheBuffers(device, manifest.layers, self.pages, facts.page)
        self.ids = self.int32("ids", (most,))
        self.positions = self.int32("positions", (most,))
        self.token_types = self.int32("token_types", (most,))
        self.slots = self.int32("slots", (most,))
        self.tiles = self.int32("tiles", (most, 4))
        self.starts = self.int32("starts", (most + 1,))
        self.lengths = self.int32("lengths", (most,))
        self.block_table = self.int32("block_table", (1024,))
        self._wanted = self.table("outputs", (max(1, len(self.outputs)),), np.uint64)
        self.step.cache, self.step.cache_pages = self.buffers.number, self.buffers.pages

    def fitting(self, lengths: Sequence[int]) -> int:
        """How many of the first sequences go into one step: at least one, whatever its length."""
        if self.one_sequence:
            return 1
        tokens = pages = 0
        for count, length in enumerate(lengths):
            tokens += length
            pages += -(-length // self.facts.page)
            if tokens > self.facts.max_step or pages > self.pages:
                return max(1, count)
        return len(lengths)

    def run(self, sequences: Sequence[Tokens]) -> dict[str, list[Array]]:
        """Each output, as one array a sequence: [tokens of it, ...] where the graph has a row a token, else [...].

        The sequences must fit into one step. Arrays of one output are parts of one array, which is new.
        """
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        tokens, count = int(lengths.sum()), len(sequences)
        starts = self._fill_tokens(sequences, lengths, tokens)
        tiles, pages = self._fill_places(lengths, starts)
        parts = parts_of(int(lengths.max()), self.facts.part, self.facts.max_splits)
        splits = choose_splits(tiles, self.kv_heads, parts, self.threads)
        sizes = (tokens, tiles, count, pages, tokens, splits, 1)
        self.step.sizes[:] = sizes
        binding = {"T": tokens, "S": tokens, "B": count}
        shapes = [tuple(value_of(size, binding) for size in facts.shape) for facts in self.outputs]
        places = self.results(shapes, [facts.dtype for facts in self.outputs])
        self._wanted[: len(places)] = [place.number for place in places]
        self.call()
        if self.profiling:
            self.profiled.append(StepSizes(sizes, tuple((0, int(length)) for length in lengths)))
        return {
            facts.name: self._parts(
                self.device.fetch(place, shape, facts.dtype), [names_of(size) for size in facts.shape], starts, count
            )
            for facts, place, shape in zip(self.outputs, places, shapes, strict=True)
        }

    def _parts(self, array: Array, names: list[frozenset[str]], starts: NDArray[np.int32], count: int) -> list[Array]:
        if self.one_sequence:  # [1, S, ...] or [1, ...], of the only sequence
            return [array[0] if array.ndim and array.shape[0] == 1 and not names[0] else array]
        if names and "T" in names[0]:
            return [array[starts[index] : starts[index + 1]] for index in range(count)]
        if names and "B" in names[0]:
            return list(array)
        return [array] * count  # the same for all: a table of the model's own

    def _fill_tokens(self, sequences: Sequence[Tokens], lengths: NDArray[np.int64], tokens: int) -> NDArray[np.int32]:
        """Fills ids, token types, positions and starts; returns the starts, int32 [B + 1]."""
        starts = self.starts[: len(sequences) + 1]
        starts[0] = 0
        np.cumsum(lengths, out=starts[1:])
        np.concatenate([sequence.ids for sequence in sequences], out=self.ids[:tokens])
        self.positions[:tokens] = np.arange(tokens) - np.repeat(starts[:-1], lengths)
        if any(sequence.types is not None for sequence in sequences):
            for sequence, start in zip(sequences, starts.tolist(), strict=False):
                self.token_types[start : start + len(sequence)] = 0 if sequence.types is None else sequence.types
        else:
            self.token_types[:tokens] = 0
        if self.facts.regimes:
            self.lengths[:tokens] = np.repeat(lengths, lengths)
        return starts

    def _fill_places(self, lengths: NDArray[np.int64], starts: NDArray[np.int32]) -> tuple[int, int]:
        """Fills slots, tiles and the block table; returns the numbers of tiles and of the table's columns. Every
        sequence has pages of its own, one after another."""
        page_size, count, tokens = self.facts.page, len(lengths), int(starts[-1])
        pages = -(-lengths // page_size)
        first_page = np.cumsum(pages) - pages
        columns = int(pages.max())
        self.slots[:tokens] = np.repeat(first_page * page_size, lengths) + self.positions[:tokens]
        if count * columns > len(self.block_table):
            self.block_table = self.int32("block_table", (2 * count * columns,))
        table = self.block_table[: count * columns].reshape(count, columns)
        column = np.arange(columns)
        table[:] = np.where(column < pages[:, None], first_page[:, None] + column, 0)
        tile = choose_tile(lengths.tolist(), self.kv_heads, self.threads, self.facts.tile)
        number = -(-lengths // tile)
        total = int(number.sum())
        sequence = np.repeat(np.arange(count), number)
        row = tile * (np.arange(total) - np.repeat(np.cumsum(number) - number, number))
        tiles = self.tiles[:total]
        tiles[:, 0] = sequence
        tiles[:, 1] = starts[sequence] + row
        tiles[:, 2] = np.minimum(tile, lengths[sequence] - row)
        tiles[:, 3] = row
        return total, columns
