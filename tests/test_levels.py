"""What integers stand for: the nearest level of all is found, and levels, gaps and bytes say the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.compiler.encodings.levels import TABLE_BITS, EvenLevels, Levels, TableLevels, even_levels, table_levels

TABLES = [table_levels(bits) for bits in TABLE_BITS]
EVEN = [even_levels(4, True), even_levels(4, False), even_levels(8, True), even_levels(8, False)]
tables = pytest.mark.parametrize("levels", TABLES, ids=map(str, TABLE_BITS))


def name(levels: Levels) -> str:
    return f"{type(levels).__name__}-{levels.lowest}-{levels.highest}"


def integers(levels: Levels) -> np.ndarray:
    return np.arange(levels.lowest, levels.highest + 1)


def values(levels: Levels) -> np.ndarray:
    """The levels of all integers in order, f64, by `apply`."""
    found = integers(levels).astype(np.float32)
    levels.apply(found)
    return found.astype(np.float64)


def found(levels: Levels, wanted: np.ndarray) -> np.ndarray:
    out = wanted.astype(np.float32)
    levels.find(out)
    return out


def off_by(levels: Levels, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far it is from each number to the level that is found, and to the nearest one."""
    apart = np.abs(wanted.astype(np.float64)[:, None] - values(levels))
    places = found(levels, wanted).astype(int) - levels.lowest
    return np.take_along_axis(apart, places[:, None], 1)[:, 0], apart.min(1)


@pytest.mark.parametrize("levels", [*TABLES, *EVEN], ids=name)
def test_levels_rise_and_each_is_found_from_itself(levels: Levels) -> None:
    known = values(levels)
    assert (np.diff(known) > 0).all()
    np.testing.assert_array_equal(found(levels, known), integers(levels))
    assert [levels.level(int(q)) for q in integers(levels)] == known.tolist()


@pytest.mark.parametrize("levels", [*TABLES, *EVEN], ids=name)
def test_a_gap_is_the_wider_of_the_steps_beside_a_level(levels: Levels) -> None:
    steps = np.diff(values(levels))
    gaps = levels.gaps(integers(levels).astype(np.float64))
    for place, gap in enumerate(gaps):
        assert gap == max(steps[max(0, place - 1) : place + 1])


@tables
def test_levels_are_bytes_times_a_power_of_two_and_exact_in_f16(levels: TableLevels) -> None:
    assert len(levels.bytes) == levels.highest - levels.lowest + 1
    assert min(levels.bytes) >= -128 and max(levels.bytes) <= 127
    assert np.log2(levels.unit) % 1 == 0
    np.testing.assert_array_equal(values(levels), np.array(levels.bytes) * levels.unit)
    np.testing.assert_array_equal(values(levels).astype(np.float16), values(levels))


@pytest.mark.parametrize("levels", [*TABLES, *EVEN], ids=name)
@given(numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-200, 200, width=32), min_size=1))
def test_the_nearest_level_of_all_is_found(levels: Levels, numbers: list[float]) -> None:
    wanted = np.array(numbers, np.float32)
    distance, least = off_by(levels, wanted)
    # Tables are looked up by halves of bytes from the lowest one on: up to 253 in f32, which is rounded.
    allowed = 2.0**-16 * levels.unit if isinstance(levels, TableLevels) else 0.0
    assert (distance <= least + allowed).all()


@tables
def test_what_is_halfway_between_two_levels_is_one_of_them(levels: TableLevels) -> None:
    known = values(levels)
    middles = (known[1:] + known[:-1]) / 2
    distance, least = off_by(levels, middles)
    assert (distance == least).all()
    below, above = (np.nextafter(middles.astype(np.float32), np.float32(side)) for side in (-np.inf, np.inf))
    for beside in (below, above):
        distance, least = off_by(levels, beside)
        assert (distance <= least + 2.0**-16 * levels.unit).all()
    # A little further off it is the nearer one.
    np.testing.assert_array_equal(found(levels, middles - 2.0**-12), integers(levels)[:-1])
    np.testing.assert_array_equal(found(levels, middles + 2.0**-12), integers(levels)[1:])


@pytest.mark.parametrize("levels", [*TABLES, *EVEN], ids=name)
def test_beyond_the_ends_the_ends_are_found(levels: Levels) -> None:
    wide = np.array([-np.inf, -1e30, -129.0, 256.0, 1e30, np.inf])
    ends = [levels.lowest] * 3 + [levels.highest] * 3
    np.testing.assert_array_equal(found(levels, wide), ends)


def test_tables_are_known_by_what_they_hold() -> None:
    """As keys of a table of candidates, and of what is cached."""
    again = TableLevels(TABLES[0].lowest, TABLES[0].bytes, TABLES[0].unit)
    assert again == TABLES[0] and hash(again) == hash(TABLES[0]) and TABLES[0] != TABLES[1]
    assert even_levels(4, True) == EvenLevels(-8, 7) and even_levels(8, True).lowest == -127
    assert even_levels(4, False) == EvenLevels(0, 15) and even_levels(8, False).highest == 255


def test_steps_of_six_bits_grow_from_two_to_six_and_no_other_table_has_a_zero() -> None:
    six = np.array(table_levels(6).bytes)
    assert np.diff(six).min() == 2 and np.diff(six).max() == 6 and 0 in six
    for levels in TABLES:
        if levels.lowest > -32:
            assert 0 not in levels.bytes and -levels.bytes[0] > levels.bytes[-1]


@tables
def test_a_table_below_six_bits_spans_what_unsigned_bytes_multiply(levels: TableLevels) -> None:
    """Two products of at most 127 * 127 fit i16, and 0 is what the lowest byte is stored as."""
    assert levels.lowest == -32 or levels.bytes[-1] - levels.bytes[0] <= 127
    assert len(levels.bytes) == -2 * levels.lowest
