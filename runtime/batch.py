"""Turn runs of tokens of several sequences into the arrays of one step, and call it."""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.artifact import Artifact
from llmc.runtime.device import ALIGNMENT, Device, Place, Use
from llmc.runtime.kv_cache import CacheBuffers
from llmc.runtime.library import Decoding
from llmc.runtime.profile import StepSizes
from llmc.runtime.sequence import Sequence
from llmc.runtime.step_call import StepCaller

_UNITS_PER_THREAD = 4
_LEAST_TILE = 16


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one sequence in one step: positions start.. of `sequence`, ids int32 [n]. The logits of
    the rows from `first_row` on are wanted (n: none of them).

    decoding: each token is one that decodes, and not a prompt's, also where they are several: guesses to be checked.
    """

    sequence: Sequence
    ids: NDArray[np.int32]
    start: int
    first_row: int
    decoding: bool = False

    @property
    def rows(self) -> int:
        return len(self.ids) - self.first_row


def parts_of(tokens: int, part: int, most: int) -> int:
    """In how many parts attention takes a context of so many tokens: of `part` tokens each, or, where those would be
    more than `most`, of twice as many, four times, ..."""
    times = -(-tokens // (part * most))
    return -(-tokens // (part << (times - 1).bit_length()))


def choose_splits(tiles: int, kv_heads: int, parts: int, threads: int) -> int:
    """Into how many units attention cuts the context of a query tile, where that is taken in up to `parts` parts.

    One for every part, if threads would have too little to do with one for all of them: none, or, where there are more
    than two parts, so few that one waits for another. It decides who does the work, not what is computed: a row's
    parts, and the order in which they are merged, follow from its position alone.
    """
    units = tiles * kv_heads
    few = units < threads or (parts > 2 and units < _UNITS_PER_THREAD * threads)
    return parts if threads > 1 and few else 1


def choose_tile(counts: list[int], kv_heads: int, threads: int, most: int) -> int:
    """Tokens of a query tile, for runs of `counts` tokens: `most`, halved until every thread has a few units of work.

    A larger tile reads and converts its keys and values less often; below 16 that costs more than idle threads. What is
    computed for a row does not depend on which others are in its tile.
    """
    tile = most
    while tile > _LEAST_TILE and sum(-(-count // tile) for count in counts) * kv_heads < _UNITS_PER_THREAD * threads:
        tile = max(_LEAST_TILE, tile // 2)
    return tile


def cut(start: int, count: int, tile: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(first row, rows) of the query tiles of `count` tokens at positions from `start` on, which end at multiples of
    `tile`."""
    first = np.arange(start // tile * tile - start, count, tile, dtype=np.int32)
    first[0] = 0
    return first, np.diff(first, append=np.int32(count))


class StepRunner(StepCaller):
    """Steps that continue sequences from a cache. One thread at a time."""

    def __init__(self, artifact: Artifact, device: Device, weights: Place, buffers: CacheBuffers) -> None:
        super().__init__(artifact, device, weights)
        self.buffers = buffers
        self.kv_heads = min((layer.kv_heads for layer in artifact.manifest.layers), default=1)
        most = self.facts.max_step
        self.ids = self.int32("ids", (most,))
        self.positions = self.int32("positions", (most,))
        self.slots = self.int32("slots", (most,))
        self.lengths = self.int32("lengths", (most,))
        self.rows = self.int32("rows", (most,))
        self.tiles = self.int32("tiles", (most, 4))
        self.block_table = self.int32("block_table", (1024,))
        self.row_bytes = 4 * self.facts.vocab_size
        self.logits = device.reserve(self.row_bytes, Use.SPARSE)
        self.step.logits = self.logits.number
        # Plain integers go through these in a fraction of the time that numpy takes.
        self._ids_view, self._positions_view = self.ids.data, self.positions.data
        self._last_pages = self.int32("last_pages", (most,))
        self._decoding = Decoding(
            step=ctypes.addressof(self.step), last_pages=self.tables["last_pages"].number, page=self.facts.page,
            positions=self.step.positions, slots=self.step.slots, tiles=self.step.tiles,
        )  # fmt: skip
        # What the last step left in the tables, if it was one of `decode`: the stamp of each sequence.
        self._stamps: list[int] = []
        self._places: list[Place] = []
        self.step.cache, self.step.cache_pages = buffers.number, buffers.pages

    def run(self, runs: list[Run], out: Place | None = None) -> Place:
        """One step over at most max_step tokens. Returns where the logits are, float32 [rows, vocab], in the order of
        the runs.

        out: where to put them; otherwise they lie in the runner's own buffer, and the next step overwrites them.
        """
        self._stamps = []
        tokens, tiles, rows = self._fill_tokens(runs)
        pages = self._fill_block_table([run.sequence for run in runs])
        place = self._logits_place(rows) if out is None or out.number % ALIGNMENT else out
        splits = self._splits(tiles, [run.start + len(run.ids) for run in runs])
        sizes = (tokens, tiles, len(runs), pages, rows, splits, int(not all(run.decoding for run in runs)))
        self.step.sizes[:] = sizes
        self.step.logits = place.number
        self.call()
        if self.profiling:
            places = tuple((run.start, len(run.ids)) for run in runs)
            self.profiled.append(StepSizes(sizes, places))
        if out is None:
            return place
        if place is not out:
            self.device.copy(place, out, rows * self.row_bytes)
        return out

    def decode(self, sequences: list[Sequence], tokens: list[int]) -> list[Place]:
        """One step of one token of each sequence. Returns where the logits of each lie, float32 [vocab]."""
        stamps = [sequence.stamp for sequence in sequences]
        if stamps != self._stamps:
            self._stamps = []  # until the tables are whole
            self._fill_decoding(sequences)
            self._stamps = stamps
        if len(tokens) == 1:
            self._ids_view[0] = tokens[0]
            self._positions_view[0] = sequences[0].length
        else:
            count = len(tokens)
            self._ids_view[:count] = array("i", tokens)
            self._positions_view[:count] = array("i", [sequence.length for sequence in sequences])
        self.call(self._decoding)
        if self.profiling:
            places = tuple((sequence.length, 1) for sequence in sequences)
            self.profiled.append(StepSizes(tuple(self.step.sizes), places))
        return self._places

    def _fill_decoding(self, sequences: list[Sequence]) -> None:
        """Fills what stays as it is from one step of `decode` to the next, while the sequences have the same pages."""
        count = len(sequences)
        pages = self._fill_block_table(sequences)
        every = np.arange(count, dtype=np.int32)
        self.rows[:count] = every
        self.tiles[:count, 0] = self.tiles[:count, 1] = every
        self.tiles[:count, 2] = 1
        if self.facts.regimes:
            self.lengths[:count] = [self.facts.length_in(sequence.regime) for sequence in sequences]
        self._last_pages[:count] = [sequence.pages[-1] for sequence in sequences]
        self._decoding.count = count
        splits = self._splits(count, [sequence.length + 1 for sequence in sequences])
        self.step.sizes[:] = (count, count, count, pages, count, splits, 0)
        first = self._logits_place(count)
        self.step.logits = first.number
        self._places = [first + index * self.row_bytes for index in range(count)]

    def _splits(self, tiles: int, contexts: list[int]) -> int:
        """The step's number of splits, for so many query tiles, the last of each sequence at the end of its context."""
        facts = self.facts
        parts = max(parts_of(tokens, facts.part, facts.max_splits) for tokens in contexts)
        return choose_splits(tiles, self.kv_heads, parts, self.threads)

    def _fill_tokens(self, runs: list[Run]) -> tuple[int, int, int]:
        """Fills ids, positions, slots, tiles and rows; returns the numbers of tokens, tiles and rows."""
        page_size = self.facts.page
        tile_size = choose_tile([len(run.ids) for run in runs], self.kv_heads, self.threads, self.facts.tile)
        ids, positions, slots, rows, tiles = self.ids, self.positions, self.slots, self.rows, self.tiles
        token = tile = row = 0
        for index, run in enumerate(runs):
            start, count = run.start, len(run.ids)
            pages = run.sequence.pages
            if count == 1:  # the numpy calls below would cost more than the assignments
                ids[token] = run.ids[0]
                positions[token] = start
                slots[token] = int(pages[start // page_size]) * page_size + start % page_size if len(pages) else 0
                tiles[tile] = (index, token, 1, start)
                tile += 1
            else:
                end = token + count
                ids[token:end] = run.ids
                place = np.arange(start, start + count, dtype=np.int32)
                positions[token:end] = place
                if len(pages):
                    slots[token:end] = pages[place // page_size] * page_size + place % page_size
                else:
                    slots[token:end] = 0
                # The last first: it sees the longest context, and the work ends with small units.
                firsts, lengths = cut(start, count, 1 if run.decoding else tile_size)
                part = tiles[tile : tile + len(firsts)][::-1]
                part[:, 0] = index
                part[:, 1] = firsts + token
                part[:, 2] = lengths
                part[:, 3] = firsts + start
                tile += len(firsts)
            if self.facts.regimes:
                self.lengths[token : token + count] = self.facts.length_in(run.sequence.regime)
            wanted = run.rows
            if wanted == 1:
                rows[row] = token + count - 1
            elif wanted:
                rows[row : row + wanted] = np.arange(token + run.first_row, token + count, dtype=np.int32)
            token += count
            row += wanted
        return token, tile, row

    def _fill_block_table(self, sequences: list[Sequence]) -> int:
        """Fills the block table, int32 [sequences, pages]; returns its number of columns."""
        columns = max(1, max(sequence.page_count for sequence in sequences))
        if len(sequences) * columns > len(self.block_table):
            self.block_table = self.int32("block_table", (2 * len(sequences) * columns,))
        table = self.block_table[: len(sequences) * columns].reshape(len(sequences), columns)
        for index, sequence in enumerate(sequences):
            table[index, : sequence.page_count] = sequence.pages
            table[index, sequence.page_count :] = 0
        return columns

    def _logits_place(self, rows: int) -> Place:
        if rows * self.row_bytes > self.logits.nbytes:
            self.logits = self.device.reserve(rows * self.row_bytes, Use.SPARSE)
        return self.logits.at()
