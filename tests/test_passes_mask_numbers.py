"""Masks in numbers: what each says, exactly at the limits, and the first place where it says something else."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from llmc.compiler.ir.types import Array
from llmc.compiler.passes.masks import ByDistance, Mask, Unrecognised, describe_mask, mask_of, require_mask

SHIFTED = "its mask adds a number to all keys of a query, which counts beside sinks"


def at_distances(*values: float | tuple[float, ...], first: int = 0, exact: Array | None = None) -> ByDistance:
    """What is added at the distances from `first` on, one number for all heads or one for each."""
    own = np.atleast_2d(np.asarray(values, np.float64).T)
    return ByDistance(np.arange(first, first + own.shape[1]), own, own if exact is None else exact)


def back_of(queries: int, keys: int) -> Array:
    """How far a key is behind its query [Q, K]; the last query stands at the last key."""
    return np.arange(queries)[:, None] + keys - queries - np.arange(keys)


def described(back: Array, seen: Array, hidden: float = -math.inf, **options: bool) -> Mask:
    """What a mask means that adds 0 to keys which are seen, and `hidden` to the others."""
    return describe_mask(np.where(seen, 0.0, hidden)[None], np.arange(len(back)) + back.shape[1] - len(back), **options)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Mask(False, 0, None), [True, True, True, True, True, True, True]),
        (Mask(True, 0, None), [True, True, True, True, False, False, False]),
        (Mask(True, 1, None), [False, False, False, True, False, False, False]),
        (Mask(True, 3, None), [False, True, True, True, False, False, False]),
        (Mask(False, 1, None), [False, False, False, True, False, False, False]),
        (Mask(False, 3, None), [False, True, True, True, True, True, False]),
    ],
)
def test_what_a_mask_shows(mask: Mask, expected: list[bool]) -> None:
    assert mask.shows(np.arange(-3, 4)).tolist() == expected


@pytest.mark.parametrize("window", [0, 1, 2, 6])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (2, 7), (1, 7), (7, 8)])
def test_a_mask_is_known_by_its_numbers(queries: int, keys: int, causal: bool, window: int) -> None:
    """Up to what its places show: a window of 1 is on both sides, and no key is after the last query."""
    back = back_of(queries, keys)
    seen = (back >= 0) | (not causal)
    seen &= (np.abs(back) < window) | (not window)
    found = described(back, seen)
    ahead = seen[back < 0]
    assert found.causal == (not ahead.any() if ahead.size else not seen.all())
    assert found.window == window if keys > window else found.window in (0, window)
    np.testing.assert_array_equal(found.shows(-back), seen)


@pytest.mark.parametrize(("number", "hides"), [(-5000.0, True), (-4999.0, False)])
def test_a_key_is_hidden_from_a_bias_of_minus_5000_on(number: float, hides: bool) -> None:
    back = back_of(5, 5)
    if hides:
        assert described(back, back >= 0, number) == Mask(True, 0, None)
        assert described(back, (back >= 0) & (back < 2), number) == Mask(True, 2, None)
        assert described(back, np.abs(back) < 2, number) == Mask(False, 2, None)
    else:
        with pytest.raises(Unrecognised, match="adds -4999 for a query and the key 1 after it, which is no slope"):
            described(back, back >= 0, number)
    own = at_distances(number, number, number, first=-1)
    if hides:
        with pytest.raises(Unrecognised, match="hides from a query the key at its own place"):
            mask_of(own)
    else:
        assert mask_of(own) == Mask(False, 0, None), "one number for all keys changes no share"


@pytest.mark.parametrize("number", [-math.inf, -1e30])
def test_how_hidden_a_key_is_does_not_count(number: float) -> None:
    """Nor does a slope where keys are hidden by a number."""
    back = back_of(5, 5)
    bias = np.where(back < 0, number, np.where(back > 2, -6000.0, -0.5 * back)) - 1.25
    assert describe_mask(bias[None], np.arange(5)) == Mask(True, 3, (0.5,))


def test_a_mask_of_the_last_query_alone_is_causal_only_where_it_hides() -> None:
    """No key is after it: nothing tells a window from one on both sides."""
    assert mask_of(at_distances(0.0, 0.0, 0.0, first=-2)) == Mask(False, 0, None)
    assert mask_of(at_distances(-math.inf, 0.0, 0.0, first=-2)) == Mask(True, 2, None)
    assert mask_of(at_distances(0.0)) == Mask(False, 0, None)
    assert mask_of(at_distances(0.0, -math.inf)) == Mask(True, 0, None)
    # A head that sees a later key is enough.
    assert not at_distances((0.0, 0.0), (-math.inf, 0.0)).is_causal
    assert not at_distances(0.0, -math.inf, 0.0).is_causal


@pytest.mark.parametrize(
    ("own", "exact", "why"),
    [
        ([math.nan, 0.0], [0.0, 0.0], "its mask makes scores that are not a number"),
        ([0.0, 0.0], [0.0, math.nan], "its mask makes scores that are not a number"),
        ([0.0, math.inf], [0.0, 0.0], "its mask makes scores infinite"),
    ],
)
def test_scores_that_are_no_numbers_are_refused(own: list[float], exact: list[float], why: str) -> None:
    for head in (0, 1):
        arrays = [np.zeros((2, 2)), np.zeros((2, 2))]
        for array, values in zip(arrays, (own, exact), strict=True):
            array[head] = values
        with pytest.raises(Unrecognised, match=f"^{why}$"):
            ByDistance(np.arange(-1, 1), *arrays)
    with pytest.raises(Unrecognised, match="not a number"):
        require_mask(Mask(False, 0, None), np.asarray([[[0.0, math.nan], [0.0, 0.0]]]), np.arange(2), np.arange(2))


@pytest.mark.parametrize("shift", [2.0**-21, -(2.0**-21), 2.0**-20, -(2.0**-20), -4.0])
def test_a_number_for_all_keys_counts_beside_sinks(shift: float) -> None:
    """Up to the rounding of f32."""
    back = back_of(4, 5)
    assert described(back, back >= 0, exact_shift=True) == Mask(True, 0, None)
    bias = np.where(back >= 0, shift, -1e30)[None]
    assert describe_mask(bias, np.arange(4) + 1) == Mask(True, 0, None)
    two = np.concatenate([bias - shift, bias])
    for each in (bias, two):
        if abs(shift) <= 2.0**-21:
            assert describe_mask(each, np.arange(4) + 1, exact_shift=True).causal
            continue
        with pytest.raises(Unrecognised, match=f"^{SHIFTED}$"):
            describe_mask(each, np.arange(4) + 1, exact_shift=True)
        with pytest.raises(Unrecognised, match=f"^{SHIFTED}$"):
            require_mask(Mask(True, 0, None), each, np.arange(4) + 1, np.arange(5), exact_shift=True)
    # One row alone is looked at as well: neither the first nor the last, which tell the mask.
    one = np.where(back >= 0, 0.0, -1e30)[None]
    one[0, 2] += shift
    if abs(shift) > 2.0**-21:
        with pytest.raises(Unrecognised, match=f"^{SHIFTED}$"):
            describe_mask(one, np.arange(4) + 1, exact_shift=True)


@pytest.mark.parametrize("slope", [0.5, -0.25, 1.0 / 3.0, 12.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_slopes_hold_to_four_roundings_of_the_furthest(slope: float, side: int) -> None:
    """2^-21 of slope * distance; twice that is another bias, at whatever distance."""
    at = np.arange(-9, 10)
    exact = (slope * at)[None]
    limit = 2.0**-21 * abs(slope) * 9
    for place in (0, 5, 18):
        own = exact.copy()
        own[0, place] += side * 0.99 * limit
        assert mask_of(ByDistance(at, own, exact)).slopes == pytest.approx((slope,), rel=1e-15)
        own[0, place] += side * limit
        with pytest.raises(Unrecognised, match="which is no slope times a distance"):
            mask_of(ByDistance(at, own, exact))
    # So it is at a distance of one, where there is no other.
    at, own = np.arange(-1, 1), np.asarray([[-slope, 0.0]])
    for roundings, known in ((0.99, True), (1.5, False)):
        rounded = own.copy()
        rounded[0, 0] += side * roundings * 2.0**-21 * abs(slope)
        if known:
            assert mask_of(ByDistance(at, rounded, own)).slopes == pytest.approx((slope,), rel=1e-15)
            continue
        with pytest.raises(Unrecognised, match="which is no slope times a distance"):
            mask_of(ByDistance(at, rounded, own))


def test_slopes_are_those_of_the_furthest_key_in_f64() -> None:
    """Numbers that f32 rounds are read as what they were: f32 numbers themselves, or thirds."""
    at = np.arange(-9, 1)
    exact = np.stack([at / 3.0, np.float64(np.float32(0.1)) * at, 0.0 * at]) + 7.0
    own = (exact - 7.0).astype(np.float32).astype(np.float64)
    assert mask_of(ByDistance(at, own, exact)).slopes == pytest.approx((1 / 3.0, float(np.float32(0.1)), 0), abs=1e-15)
    for array in (own, exact):
        array[:, 0] = -math.inf  # not seen: it tells no slope
    found = mask_of(ByDistance(at, own, exact))
    assert (found.causal, found.window) == (True, 9)
    assert found.slopes == pytest.approx((1 / 3.0, float(np.float32(0.1)), 0), abs=1e-15)
    assert found.slopes[1] == float(np.float32(0.1)), "an f32 number but for the last bits is that number"


@pytest.mark.parametrize("slope", [0.1, 0.3, -0.7, 1e-3])
def test_slopes_are_f32_numbers_but_for_rounding(slope: float) -> None:
    near = float(np.float32(slope))
    for off, snaps in ((3e-13, True), (-3e-13, True), (3e-12, False)):
        at = np.arange(-8, 1)
        exact = (at * near * (1 + off))[None]
        assert (mask_of(ByDistance(at, exact, exact)).slopes == (near,)) == snaps


def test_a_query_that_sees_its_own_place_alone_shows_no_slope() -> None:
    back = back_of(4, 4)
    sloped = np.where(back == 0, 0.0, -np.inf) - 0.5 * back
    assert describe_mask(np.stack([sloped, sloped]), np.arange(4)) == Mask(True, 1, None)
    sloped = np.where((back == 0) | (back == 1), 0.0, -np.inf) - 0.5 * back
    assert describe_mask(np.stack([sloped, sloped]), np.arange(4)) == Mask(True, 2, (0.5, 0.5))


OTHERS: dict[str, tuple[ByDistance, str]] = {
    "heads, a key before": (
        at_distances((0.0, -math.inf), (0.0, 0.0), (0.0, 0.0), first=-2),
        "head 1 and head 0 differ in whether a query sees the key 2 before it",
    ),
    "heads, a key after": (
        at_distances((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (-math.inf, 0.0), first=-1),
        "head 1 and head 0 differ in whether a query sees the key 2 after it",
    ),
    "heads, the second sees its own place alone": (
        at_distances((-1.0, -math.inf, -1.0), (0.0, 0.0, 0.0), first=-1),
        "head 1 and head 0 differ in whether a query sees the key 1 before it",
    ),
    "heads, two keys before": (
        at_distances((0.0, -math.inf), (0.0, -math.inf), (0.0, 0.0), first=-2),
        "head 1 and head 0 differ in whether a query sees the key 2 before it",
    ),
    "a bias, before": (
        at_distances(1.0, 0.75, 0.0, first=-2),
        "head 0 adds 0.75 for a query and the key 1 before it, which is no slope times a distance",
    ),
    "a bias of the second head": (
        at_distances((0.0, -2.0), (0.0, -1.5), (0.0, 0.0), (0.0, 1.0), first=-2),
        "head 1 adds -1.5 for a query and the key 1 before it, which is no slope times a distance",
    ),
    "a hole": (
        at_distances(0.0, -math.inf, 0.0, 0.0, -math.inf, first=-3),
        "the mask is not causal with a window of 2: a query sees the key 3 before it",
    ),
    "a hole in a side": (
        at_distances(-math.inf, 0.0, -math.inf, 0.0, first=-1),
        "the mask is neither causal nor a window on both sides: a query sees the key 2 after it",
    ),
    "one side longer": (
        at_distances(0.0, 0.0, 0.0, 0.0, -math.inf, first=-2),
        "the mask is neither causal nor a window on both sides: a query sees the key 2 before it",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_mask_is_refused_with_its_first_difference(name: str) -> None:
    bias, why = OTHERS[name]
    with pytest.raises(Unrecognised) as refused:
        mask_of(bias)
    assert str(refused.value) == why


PLACES: list[tuple[Mask, tuple[int, int], float, str]] = [
    (Mask(True, 0, None), (1, 0), -math.inf, "the mask is not causal: the query at 2 does not see the key at 0"),
    (Mask(True, 0, None), (2, 4), 0.0, "the mask is not causal: the query at 3 sees the key at 4"),
    (Mask(True, 2, None), (2, 1), 0.0, "the mask is not causal with a window of 2: the query at 3 sees the key at 1"),
    (
        Mask(False, 2, None), (0, 2), -math.inf,
        "the mask is neither causal nor a window on both sides: the query at 1 does not see the key at 2",
    ),
    (
        Mask(True, 0, None), (2, 1), 0.5,
        "head 1 adds 0.5 for the query at 3 and the key at 1, which is no slope times a distance",
    ),
    (
        Mask(True, 3, (0.0, 0.5)), (3, 2), 0.0,
        "head 1 adds 0 for the query at 4 and the key at 2, which is no slope times a distance",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "place", "number", "why"), PLACES)
def test_one_pair_that_differs_is_named(mask: Mask, place: tuple[int, int], number: float, why: str) -> None:
    """Queries 1 to 4 and keys 0 to 4; the second head has the other number."""
    queries, keys = np.arange(4) + 1, np.arange(5)
    distances = keys - queries[:, None]
    slopes = np.asarray(mask.slopes or (0.0, 0.0))[:, None, None]
    bias = np.where(mask.shows(distances), slopes * distances, -1e30) + 3.0
    require_mask(mask, bias, queries, keys)
    bias[(1, *place)] = number + 3.0
    with pytest.raises(Unrecognised, match=f"^{re.escape(why)}$"):
        require_mask(mask, bias, queries, keys)
    # Nothing is said of a pair that no query of these is in.
    if place[0] > 0:
        require_mask(mask, bias[:, : place[0]], queries[: place[0]], keys)


def test_what_is_added_to_all_keys_is_at_most_a_million() -> None:
    assert mask_of(at_distances(1e6, 1e6, -math.inf, first=-1)) == Mask(True, 0, None)
    with pytest.raises(Unrecognised, match=r"which f32 loses beside such a number$"):
        mask_of(at_distances(1e6 + 0.5, 1e6 + 0.5, -math.inf, first=-1))


def test_keys_that_a_steep_slope_hides_are_outside_of_no_window() -> None:
    """One head's slope hides what is five back, another's does not."""
    back = np.arange(9, -1, -1)
    slopes = [(-1000.0 * d, -1.0 * d) for d in back]
    assert mask_of(at_distances(*slopes, (-math.inf, -math.inf), first=-9)) == Mask(True, 0, (1000.0, 1.0))


def test_of_one_token_nothing_is_a_slope() -> None:
    assert mask_of(at_distances(3.0)) == Mask(False, 0, None)
