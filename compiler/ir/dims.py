"""Symbolic sizes: integer polynomials over named symbols with ranges.

A size is a plain `int` or a `Dim`. Arithmetic is exact and canonical, so equal sizes compare equal. An inequality is
settled from the symbols' ranges or raises `DimError`: it is never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from llmc.errors import DimError


@dataclass(frozen=True)
class Symbol:
    """A named size with an inclusive range; `high` None means unbounded."""

    name: str
    low: int
    high: int | None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FloorDiv:
    """`numerator // divisor` where the division is not exact; an opaque factor of a polynomial."""

    numerator: Dim
    divisor: int

    def __str__(self) -> str:
        return f"({self.numerator})//{self.divisor}"


Atom = Symbol | FloorDiv
Monomial = tuple[tuple[Atom, int], ...]
DimLike = "int | Dim"


@dataclass(frozen=True)
class Dim:
    """A non-constant polynomial: monomials with non-zero coefficients, sorted by their text."""

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__

    def __hash__(self) -> int:
        return hash(self._text)

    @cached_property
    def _text(self) -> str:
        parts = []
        for monomial, coefficient in self.terms:
            atoms = [atom for atom, power in monomial for _ in range(power)]
            # `*` and `//` bind alike, so a quotient among other factors needs brackets of its own.
            alone = coefficient == 1 and len(atoms) == 1
            factors = [f"({atom})" if isinstance(atom, FloorDiv) and not alone else str(atom) for atom in atoms]
            if coefficient != 1 or not factors:
                factors.insert(0, str(coefficient))
            parts.append("*".join(factors))
        return " + ".join(parts)

    def __add__(self, other: int | Dim) -> int | Dim:
        return _collect([*self.terms, *_terms(other)])

    __radd__ = __add__

    def __neg__(self) -> int | Dim:
        return self * -1

    def __sub__(self, other: int | Dim) -> int | Dim:
        return self + other * -1

    def __rsub__(self, other: int | Dim) -> int | Dim:
        return self * -1 + other

    def __mul__(self, other: int | Dim) -> int | Dim:
        return _collect([(_times(a, b), c * d) for a, c in self.terms for b, d in _terms(other)])

    __rmul__ = __mul__

    def __floordiv__(self, divisor: int | Dim) -> int | Dim:
        exact = exact_division(self, divisor)
        if exact is not None:
            return exact
        if not isinstance(divisor, int) or divisor <= 0:
            raise DimError(f"cannot divide {self} by {divisor}: only exact or positive constant divisors")
        return _collect([(((FloorDiv(self, divisor), 1),), 1)])

    def symbols(self) -> frozenset[Symbol]:
        """Every symbol that the polynomial mentions."""
        found: set[Symbol] = set()
        for monomial, _ in self.terms:
            for atom, _power in monomial:
                found |= {atom} if isinstance(atom, Symbol) else symbols_of(atom.numerator)
        return frozenset(found)


def _terms(value: int | Dim) -> tuple[tuple[Monomial, int], ...]:
    if isinstance(value, Dim):
        return value.terms
    return (((), int(value)),) if value else ()


def _times(a: Monomial, b: Monomial) -> Monomial:
    powers: dict[Atom, int] = dict(a)
    for atom, power in b:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(powers.items(), key=lambda item: str(item[0])))


def _collect(terms: list[tuple[Monomial, int]]) -> int | Dim:
    total: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    kept = [(m, c) for m, c in total.items() if c]
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    # Higher powers first, the constant last.
    kept.sort(key=lambda term: (-sum(power for _, power in term[0]), [(str(a), p) for a, p in term[0]]))
    return Dim(tuple(kept))


def symbol(name: str, low: int = 0, high: int | None = None) -> Dim:
    """The polynomial that is just this symbol."""
    return Dim(((((Symbol(name, low, high), 1),), 1),))


def symbols_of(value: int | Dim) -> frozenset[Symbol]:
    """Symbols of a size; none for an int."""
    return value.symbols() if isinstance(value, Dim) else frozenset()


def exact_division(value: int | Dim, divisor: int | Dim) -> int | Dim | None:
    """The quotient when `divisor` (an int or a single monomial) divides every term; None otherwise."""
    if value == divisor:
        return 1
    if isinstance(divisor, int):
        if divisor == 0:
            raise DimError(f"cannot divide {value} by zero")
        terms = _terms(value)
        if any(c % divisor for _, c in terms):
            return None
        return _collect([(m, c // divisor) for m, c in terms])
    if len(divisor.terms) != 1:
        return None
    monomial, coefficient = divisor.terms[0]
    quotient: list[tuple[Monomial, int]] = []
    for term, c in _terms(value):
        powers = dict(term)
        for atom, power in monomial:
            powers[atom] = powers.get(atom, 0) - power
        if c % coefficient or any(p < 0 for p in powers.values()):
            return None
        quotient.append((tuple((a, p) for a, p in powers.items() if p), c // coefficient))
    return _collect(quotient)


def bounds(value: int | Dim) -> tuple[int, int | None]:
    """Inclusive lower and upper bound from the symbols' ranges (upper None: unbounded)."""
    if isinstance(value, int):
        return value, value
    low, high = 0, 0
    unbounded_high = False
    for monomial, coefficient in value.terms:
        least: int = 1
        most: int | None = 1
        for atom, power in monomial:
            for _ in range(power):
                least, most = _product_of_intervals((least, most), bounds_of_atom(atom), value)
        if coefficient < 0 and most is None:
            raise DimError(f"no lower bound for {value}: give its symbols upper bounds")
        unbounded_high |= most is None
        ends = [coefficient * end for end in (least, most) if end is not None]
        low += min(ends)
        high += max(ends)
    return low, None if unbounded_high else high


Interval = tuple[int, "int | None"]


def _product_of_intervals(a: Interval, b: Interval, value: Dim) -> Interval:
    """Bounds of a product of factors that lie in `a` and in `b` (factors below 0 come from floor divisions)."""
    if a[0] >= 0 and b[0] >= 0:
        return a[0] * b[0], None if a[1] is None or b[1] is None else a[1] * b[1]
    if a[1] is not None and b[1] is not None:
        corners = [x * y for x in (a[0], a[1]) for y in (b[0], b[1])]
        return min(corners), max(corners)
    for x, y in ((a, b), (b, a)):
        if x[0] >= 0 and x[1] is not None:
            return y[0] * x[1], None
    raise DimError(f"no lower bound for {value}: give its symbols upper bounds")


def bounds_of_atom(atom: Atom) -> tuple[int, int | None]:
    """Bounds of one factor."""
    if isinstance(atom, Symbol):
        return atom.low, atom.high
    low, high = bounds(atom.numerator)
    return low // atom.divisor, None if high is None else high // atom.divisor


def known_at_most(a: int | Dim, b: int | Dim) -> bool:
    """Whether a <= b always holds; raises DimError when it holds for some sizes only."""
    difference = b - a
    low, high = bounds(difference)
    if low < 0 and isinstance(difference, Dim):
        tighter_low, tighter_high = _bounds_of_multiple(difference)
        low = max(low, tighter_low)
        high = tighter_high if high is None or (tighter_high is not None and tighter_high < high) else high
    if low >= 0:
        return True
    if high is not None and high < 0:
        return False
    raise DimError(f"cannot settle {a} <= {b} from the symbols' ranges")


def _bounds_of_multiple(value: Dim) -> Interval:
    """Bounds by way of d * (n // d) = n - rest, 0 <= rest < d: they see that 2 * (S // 2) is at most S."""
    whole: int | Dim = value
    scale, low_rest, high_rest = 1, 0, 0
    for monomial, coefficient in value.terms:
        if len(monomial) != 1 or not isinstance(monomial[0][0], FloorDiv) or monomial[0][1] != 1:
            continue
        atom = monomial[0][0]
        c, d = coefficient * scale, atom.divisor
        whole = (whole - _collect([(monomial, c)])) * d + atom.numerator * c
        low_rest, high_rest = low_rest * d + min(0, -c * (d - 1)), high_rest * d + max(0, -c * (d - 1))
        scale *= d
    low, high = bounds(whole)
    return -(-(low + low_rest) // scale), None if high is None else (high + high_rest) // scale


def substitute(value: int | Dim, binding: Mapping[str, int | Dim]) -> int | Dim:
    """Replace symbols by name; those not in `binding` stay."""
    if isinstance(value, int):
        return value
    total: int | Dim = 0
    for monomial, coefficient in value.terms:
        product: int | Dim = coefficient
        for atom, power in monomial:
            if isinstance(atom, Symbol):
                factor = binding.get(atom.name, _collect([(((atom, 1),), 1)]))
            else:
                factor = substitute(atom.numerator, binding) // atom.divisor
            for _ in range(power):
                product = product * factor
        total = total + product
    return total


def concrete(value: int | Dim, binding: Mapping[str, int]) -> int:
    """The integer that `value` is under a full binding; DimError names a symbol left free."""
    result = substitute(value, binding)
    if isinstance(result, Dim):
        missing = ", ".join(sorted(s.name for s in result.symbols()))
        raise DimError(f"size {value} needs a value for {missing}")
    return result


def product(shape: tuple[int | Dim, ...]) -> int | Dim:
    """The number of elements of a shape."""
    total: int | Dim = 1
    for dim in shape:
        total = total * dim
    return total
