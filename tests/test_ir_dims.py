"""Symbolic sizes: arithmetic agrees with integers, equal sizes compare equal, bounds hold, nothing is guessed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from random_graphs import SYMBOLS, Sized, bindings, sizes

from llmc.compiler.ir.dims import (
    Dim,
    bounds,
    concrete,
    exact_division,
    known_at_most,
    product,
    substitute,
    symbol,
    symbols_of,
)
from llmc.errors import DimError

S, T, U = SYMBOLS["S"], SYMBOLS["T"], SYMBOLS["U"]


@given(sizes, bindings)
def test_arithmetic_agrees_with_integers(size: Sized, binding: dict[str, int]) -> None:
    assert concrete(size.value, binding) == size.number(binding)


@given(sizes, sizes, sizes)
def test_ring_laws_hold_as_equality(a: Sized, b: Sized, c: Sized) -> None:
    x, y, z = a.value, b.value, c.value
    assert x + y == y + x
    assert x * y == y * x
    assert (x + y) * z == x * z + y * z
    assert (x - y) + y == x
    assert hash((x + y) * z) == hash(x * z + y * z)
    assert x - x == 0


@given(sizes, bindings)
def test_bounds_are_sound(size: Sized, binding: dict[str, int]) -> None:
    try:
        low, high = bounds(size.value)
    except DimError:
        assume(False)
    found = size.number(binding)
    assert low <= found
    assert high is None or found <= high


@given(sizes, sizes, bindings)
def test_a_settled_inequality_holds_for_every_size(a: Sized, b: Sized, binding: dict[str, int]) -> None:
    try:
        settled = known_at_most(a.value, b.value)
    except DimError:
        assume(False)
    assert (a.number(binding) <= b.number(binding)) == settled


@given(sizes, sizes, bindings)
def test_exact_division_inverts_multiplication(a: Sized, b: Sized, binding: dict[str, int]) -> None:
    divisor = b.number(binding)
    assume(divisor != 0)
    quotient = exact_division(a.value, b.value) if b.value != 0 else None
    if quotient is not None:
        assert concrete(quotient, binding) * divisor == a.number(binding)


@given(st.integers(1, 50), st.integers(1, 50))
def test_exact_division_of_a_product_by_its_factor(a: int, b: int) -> None:
    assert exact_division(a * S * b, b * S) == a
    assert exact_division(a * S * T + b * S, S) == a * T + b


@given(sizes, bindings)
def test_substitution_in_steps_is_substitution_at_once(size: Sized, binding: dict[str, int]) -> None:
    partly = substitute(size.value, {"S": binding["S"]})
    assert concrete(partly, binding) == size.number(binding)


def test_bounds_of_products_of_factors_below_zero() -> None:
    x = (T - 7) // 2  # from -3 to 252, and 0 at T = 7
    assert bounds(x * x) == (-3 * 252, 252 * 252)
    assert bounds(x * S) == (-3 * 40, 252 * 40)
    with pytest.raises(DimError, match="no lower bound"):
        bounds(x * U)


def test_bounds_are_those_of_the_factors() -> None:
    v, zero = symbol("V", 1), symbol("Z", 0, 4)
    half = (U - 7) // 2  # from -4 on
    near = (T - 3) // 2  # from -1 to 254
    for size, expected in (
        (S * T, (2, 40 * 512)),
        (S * S, (4, 1600)),
        (2 * S - T, (4 - 512, 80 - 1)),
        (S * v, (2, None)),
        (U * v, (0, None)),
        (v * v + 3, (4, None)),
        (near * near, (-254, 254 * 254)),
        (near * -3, (-3 * 254, 3)),
        (half * S, (-4 * 40, None)),
        (half * zero, (-4 * 4, None)),
        (near * S, (-40, 254 * 40)),
        (U * symbol("W", 0), (0, None)),
        (symbol("A", 0) * S, (0, None)),
        (S // 7, (0, 5)),
    ):
        assert bounds(size) == expected, size


@pytest.mark.parametrize("d", [2, 3, 5])
@pytest.mark.parametrize("e", [-3, -2, -1, 1, 2, 3])
def test_what_two_floors_leave_is_known_exactly(d: int, e: int) -> None:
    """e (S - d (S // d)) + T - 7 (T // 7) + k: the first rest goes up to d - 1, the second one to 6."""
    rests = e * S - e * d * (S // d) + T - 7 * (T // 7)
    low, high = min(0, e * (d - 1)), max(0, e * (d - 1)) + 6
    for k in {-high - 1, -high, -low - 1, -low, 0}:
        if low + k >= 0:
            assert known_at_most(0, rests + k) and known_at_most(-k, rests)
        elif high + k < 0:
            assert not known_at_most(0, rests + k)
        else:
            with pytest.raises(DimError, match="cannot settle"):
                known_at_most(0, rests + k)


@pytest.mark.parametrize("divisor", [2, 3, 7])
def test_what_a_size_has_beside_its_own_floor_is_known_exactly(divisor: int) -> None:
    for low, high in itertools.product(range(3, 9), range(8, 18)):
        size = symbol("A", low, high)
        rest = size - size // divisor
        least, most = low - low // divisor, high - high // divisor
        assert known_at_most(least, rest) and known_at_most(rest, most), (low, high)
        assert not known_at_most(rest, least - 1) and not known_at_most(most + 1, rest), (low, high)


def test_a_size_of_no_given_range_is_any_number_from_0_on() -> None:
    assert bounds(symbol("A")) == (0, None)


def test_the_better_of_two_bounds_decides() -> None:
    a, b = symbol("A", 3, 9), symbol("B", 7, 9)
    assert not known_at_most(a // 3 + b // 7, 1)  # each floor by itself: at least 1
    assert known_at_most(2 * (S // 2), S + S * T)  # together with what is floored
    assert known_at_most(S // 2 * 2 + U, S + U + S * T)
    assert not known_at_most(S + U, S // 2 * 2 + U - 1)


def test_an_inequality_that_depends_on_the_sizes_is_an_error() -> None:
    with pytest.raises(DimError, match="cannot settle"):
        known_at_most(S, T)
    with pytest.raises(DimError, match="no lower bound"):
        bounds(-U)


def test_what_a_floor_leaves_is_less_than_its_divisor() -> None:
    for divisor in (2, 3, 7):
        below = S // divisor * divisor
        assert known_at_most(below, S)
        assert known_at_most(S, below + divisor - 1)
        assert not known_at_most(below + divisor, S)
        with pytest.raises(DimError):
            known_at_most(S, below + divisor - 2)


def test_a_free_symbol_is_named() -> None:
    with pytest.raises(DimError, match="needs a value for T"):
        concrete(S * T, {"S": 3})


def test_division_by_a_size_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(DimError, match="cannot divide"):
        (S + 1) // T
    with pytest.raises(DimError, match="cannot divide"):
        (S + 1) // -2
    assert (2 * S + 4) // -2 == -S - 2
    with pytest.raises(DimError, match="by zero"):
        exact_division(S, 0)


def test_sizes_print_canonically() -> None:
    assert str(1 + S * 2 + S * S) == "S*S + 2*S + 1"
    assert str((S + 3) // 4) == "(S + 3)//4"
    assert str(3 * ((S + 3) // 4)) == "3*((S + 3)//4)" and str(S // 4 * (T // 3)) == "((S)//4)*((T)//3)"
    assert str((S + 3) // 4 * ((S + 3) // 4)) == "((S + 3)//4)*((S + 3)//4)"
    assert S * T == T * S and (S + 1) + (T - S) == T + 1 and (S + 1) - S == 1
    assert isinstance(S * 2 // 2, Dim) and S * 2 // 2 == S
    assert product((2, S, 3)) == 6 * S
    assert {s.name for s in symbols_of((S + T) // 7)} == {"S", "T"}
    assert symbol("S", 2, 40) == S
