"""The C session layer fills a step's tables, and divides its work, as Python does."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.batch import choose_splits, choose_tile, cut, parts_of
from llmc.runtime.library import Step
from llmc.targets.cpu.library import c_sources

I64 = ctypes.c_int64
NAMES = ("ids", "positions", "slots", "lengths", "rows", "tiles", "starts", "block_table")
PAGE, TILE, SPLITS, PART = 32, 64, 16, 512


class Part(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p), ("pages", ctypes.c_void_p), ("page_count", I64), ("count", I64), ("start", I64),
        ("first_row", I64), ("length", I64), ("decoding", I64),
    )  # fmt: skip


class Tables(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in NAMES), ("block_table_room", I64))


class Division(ctypes.Structure):
    _fields_ = tuple((name, I64) for name in ("page", "tile", "max_splits", "part", "kv_heads", "threads"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("places") / "places.so"
    command = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(c_sources() / "places.c")], check=True)
    found = ctypes.CDLL(str(library))
    for name in ("llmc_choose_splits", "llmc_choose_tile", "llmc_parts_of", "llmc_table_numbers"):
        getattr(found, name).restype = I64
    return found


@settings(max_examples=300, deadline=None)
@given(
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    context=st.integers(1, 130_000),
    kv_heads=st.integers(1, 16),
    threads=st.integers(1, 64),
)
def test_work_is_divided_as_in_python(
    places: ctypes.CDLL, counts: list[int], context: int, kv_heads: int, threads: int
) -> None:
    division = Division(PAGE, TILE, SPLITS, PART, kv_heads, threads)
    parts = (Part * len(counts))(*(Part(count=count) for count in counts))
    tile = places.llmc_choose_tile(ctypes.byref(division), parts, I64(len(counts)))
    assert tile == choose_tile(counts, kv_heads, threads, TILE)
    tiles = sum(-(-count // tile) for count in counts)
    pieces = places.llmc_parts_of(ctypes.byref(division), I64(context))
    assert pieces == parts_of(context, PART, SPLITS)
    found = places.llmc_choose_splits(ctypes.byref(division), I64(tiles), I64(pieces))
    assert found == choose_splits(tiles, kv_heads, pieces, threads)


@settings(max_examples=200, deadline=None)
@given(start=st.integers(0, 500), count=st.integers(1, 300), decoding=st.booleans())
def test_tiles_end_where_those_of_python_do(places: ctypes.CDLL, start: int, count: int, decoding: bool) -> None:
    ids, pages = np.zeros(count, np.int32), np.zeros(-(-(start + count) // PAGE), np.int32)
    part = Part(ids.ctypes.data, pages.ctypes.data, len(pages), count, start, count, 0, int(decoding))
    room = 4 * count + len(pages) + 2
    arrays = {name: np.full(room, -1, np.int32) for name in NAMES}
    tables, step = Tables(*(array.ctypes.data for array in arrays.values()), room), Step()
    division = Division(PAGE, TILE, SPLITS, PART, 16, 1)
    places.llmc_fill_step(ctypes.byref(step), ctypes.byref(tables), ctypes.byref(division), ctypes.byref(part), I64(1))
    first, rows = cut(start, count, 1 if decoding else TILE)
    expected = np.stack([0 * first, first, rows, first + start], 1)[::-1]
    assert arrays["tiles"][: expected.size].reshape(-1, 4).tolist() == expected.tolist()
    assert list(step.sizes) == [count, len(first), 1, len(pages), 0, 1, int(not decoding)]


def test_tables_say_where_every_token_is(places: ctypes.CDLL) -> None:
    """Three sequences: the middle of a prompt (no row), a single token, and a prompt whose last rows are wanted."""
    runs = [(70, 40, 70), (1, 95, 0), (33, 0, 30)]  # tokens, the first one's position, the first row that is wanted
    ids = [np.arange(count, dtype=np.int32) + 100 * index for index, (count, _, _) in enumerate(runs)]
    pages = [np.arange(-(-(start + count) // PAGE), dtype=np.int32)[::-1].copy() + 7 for count, start, _ in runs]
    parts = (Part * 3)(*(
        Part(tokens.ctypes.data, table.ctypes.data, len(table), count, start, row, 5 + index, 0)
        for index, (tokens, table, (count, start, row)) in enumerate(zip(ids, pages, runs, strict=True))
    ))  # fmt: skip
    arrays = {name: np.full(500, -1, np.int32) for name in NAMES}
    tables, step = Tables(*(array.ctypes.data for array in arrays.values()), 500), Step()
    division = Division(PAGE, TILE, SPLITS, PART, 1, 1)
    assert places.llmc_table_numbers(parts, I64(3)) == 3 * 4
    places.llmc_fill_step(ctypes.byref(step), ctypes.byref(tables), ctypes.byref(division), parts, I64(3))
    assert list(step.sizes) == [104, 4, 3, 4, 4, 1, 1]
    positions = np.concatenate([start + np.arange(count) for count, start, _ in runs])
    owner = np.repeat(np.arange(3), [count for count, _, _ in runs])
    slots = [pages[s][p // PAGE] * PAGE + p % PAGE for s, p in zip(owner, positions, strict=True)]
    expected = {
        "ids": np.concatenate(ids),
        "positions": positions,
        "slots": slots,
        "lengths": 5 + owner,
        "rows": [70, 101, 102, 103],
        "tiles": [0, 24, 46, 64, 0, 0, 24, 40, 1, 70, 1, 95, 2, 71, 33, 0],
        "starts": [0, 70, 71, 104],
        "block_table": np.concatenate([np.pad(table, (0, 4 - len(table))) for table in pages]),
    }
    for name, values in expected.items():
        assert arrays[name][: len(values)].tolist() == list(values), name
        assert (arrays[name][len(values) :] == -1).all(), name
