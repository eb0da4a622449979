"""The session layer fills a step's tables as docs/architecture.md has them, and divides its work sensibly."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.layer import Tables
from llmc.runtime.library import Step
from llmc.targets.cpu.library import c_sources

I64 = ctypes.c_int64
NAMES = tuple(name for name, _ in Tables._fields_)
PAGE, TILE, SPLITS, PART = 32, 64, 16, 512


class Part(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p), ("pages", ctypes.c_void_p), ("page_count", I64), ("count", I64), ("start", I64),
        ("first_row", I64), ("length", I64), ("adapter", I64), ("decoding", I64),
    )  # fmt: skip


class Division(ctypes.Structure):
    _fields_ = tuple((name, I64) for name in ("page", "tile", "max_splits", "part", "kv_heads", "threads"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("places") / "places.so"
    command = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(c_sources() / "places.c")], check=True)
    found = ctypes.CDLL(str(library))
    for name in ("llmc_choose_splits", "llmc_choose_tile", "llmc_parts_of"):
        getattr(found, name).restype = I64
    return found


def division(kv_heads: int = 1, threads: int = 1, tile: int = TILE, most: int = SPLITS, part: int = PART) -> object:
    return ctypes.byref(Division(PAGE, tile, most, part, kv_heads, threads))


@given(st.integers(1, 600), st.integers(1, 64), st.integers(1, 16), st.integers(1, 128))
@settings(deadline=None)
def test_splits_are_for_threads_without_work(
    places: ctypes.CDLL, tiles: int, kv_heads: int, parts: int, threads: int
) -> None:
    splits = places.llmc_choose_splits(division(kv_heads, threads), I64(tiles), I64(parts))
    assert splits in (1, parts)
    assert splits == 1 or tiles * kv_heads < 4 * threads
    assert splits == parts or threads == 1 or tiles * kv_heads >= (threads if parts <= 2 else 4 * threads)


@given(st.integers(1, 200_000), st.sampled_from([1, 4, 16]), st.sampled_from([32, 512]))
@settings(deadline=None)
def test_parts_are_as_short_as_their_number_allows(places: ctypes.CDLL, tokens: int, most: int, part: int) -> None:
    """The least of part, 2 * part, 4 * part, ... of which `most` hold the context."""
    length = next(part << i for i in range(40) if (part << i) * most >= tokens)
    assert places.llmc_parts_of(division(most=most, part=part), I64(tokens)) == -(-tokens // length) <= most


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=9),
    st.integers(1, 64),
    st.integers(1, 128),
    st.sampled_from([8, 16, 64, 100]),
)
@settings(deadline=None)
def test_tiles_are_as_large_as_leaves_every_thread_work(
    places: ctypes.CDLL, counts: list[int], kv_heads: int, threads: int, most: int
) -> None:
    def units(tile: int) -> int:
        return sum(-(-count // tile) for count in counts) * kv_heads

    parts = (Part * len(counts))(*(Part(count=count) for count in counts))
    tile = places.llmc_choose_tile(division(kv_heads, threads, most), parts, I64(len(counts)))
    assert min(16, most) <= tile <= most
    assert tile in (min(16, most), most) or units(tile) >= 4 * threads
    if tile < most:
        assert units(most) < 4 * threads


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, 500), count=st.integers(1, 300), size=st.sampled_from([16, 64, 100]), decoding=st.booleans()
)
def test_tiles_end_where_the_positions_say(
    places: ctypes.CDLL, start: int, count: int, size: int, decoding: bool
) -> None:
    """At multiples of their size, the last first; a token that decodes, such as a guess that is checked, has one of its
    own."""
    ids, pages = np.zeros(count, np.int32), np.zeros(-(-(start + count) // PAGE), np.int32)
    part = Part(ids.ctypes.data, pages.ctypes.data, len(pages), count, start, count, 0, 0, int(decoding))
    arrays = {name: np.full(4 * count + len(pages) + 2, -1, np.int32) for name in NAMES}
    tables, step = Tables(*(array.ctypes.data for array in arrays.values())), Step()
    divided = division(kv_heads=4, tile=size)
    places.llmc_fill_step(ctypes.byref(step), ctypes.byref(tables), divided, ctypes.byref(part), I64(1))
    tokens, number, sequences, columns, rows, splits, prompt, adapted = step.sizes
    assert (tokens, sequences, columns, rows, splits, prompt) == (count, 1, len(pages), 0, 1, int(not decoding))
    assert adapted == 0
    tiles = arrays["tiles"][: 4 * number].reshape(-1, 4)[::-1]
    assert (tiles[:, 0] == 0).all() and (tiles[:, 3] == tiles[:, 1] + start).all()
    ends = tiles[:, 1] + tiles[:, 2]
    assert tiles[0, 1] == 0 and ends[-1] == count and (tiles[1:, 1] == ends[:-1]).all()
    length = 1 if decoding else size
    assert all((start + end) % length == 0 for end in ends[:-1].tolist())
    assert ((start + tiles[:, 1]) // length == (start + ends - 1) // length).all()


def test_tables_say_where_every_token_is(places: ctypes.CDLL) -> None:
    """Three sequences: the middle of a prompt (no row), a single token, and a prompt whose last rows are wanted."""
    runs = [(70, 40, 70), (1, 95, 0), (33, 0, 30)]  # tokens, the first one's position, the first row that is wanted
    ids = [np.arange(count, dtype=np.int32) + 100 * index for index, (count, _, _) in enumerate(runs)]
    pages = [np.arange(-(-(start + count) // PAGE), dtype=np.int32)[::-1].copy() + 7 for count, start, _ in runs]
    parts = (Part * 3)(*(
        Part(tokens.ctypes.data, table.ctypes.data, len(table), count, start, row, 5 + index, (3, 0, 1)[index], 0)
        for index, (tokens, table, (count, start, row)) in enumerate(zip(ids, pages, runs, strict=True))
    ))  # fmt: skip
    arrays = {name: np.full(500, -1, np.int32) for name in NAMES}
    tables, step = Tables(*(array.ctypes.data for array in arrays.values())), Step()
    places.llmc_fill_step(ctypes.byref(step), ctypes.byref(tables), division(), parts, I64(3))
    assert list(step.sizes) == [104, 4, 3, 4, 4, 1, 1, 103]
    positions = np.concatenate([start + np.arange(count) for count, start, _ in runs])
    owner = np.repeat(np.arange(3), [count for count, _, _ in runs])
    slots = [pages[s][p // PAGE] * PAGE + p % PAGE for s, p in zip(owner, positions, strict=True)]
    expected = {
        "ids": np.concatenate(ids),
        "positions": positions,
        "slots": slots,
        "lengths": 5 + owner,
        "adapters": np.array([3, 0, 1])[owner],
        "rows": [70, 101, 102, 103],
        "tiles": [0, 24, 46, 64, 0, 0, 24, 40, 1, 70, 1, 95, 2, 71, 33, 0],
        "starts": [0, 70, 71, 104],
        "block_table": np.concatenate([np.pad(table, (0, 4 - len(table))) for table in pages]),
    }
    for name, values in expected.items():
        assert arrays[name][: len(values)].tolist() == list(values), name
        assert (arrays[name][len(values) :] == -1).all(), name
