"""What each call of a step costs at least, for the manifest: bytes from memory and operations, as polynomials.

A polynomial is {"": constant, "T": factor, "Q*T": factor, ...} over the sizes of a step (docs/architecture.md), and
over what attention sees: KEYS, the keys that some row of a sequence sees, summed over the sequences, and PAIRS, the
pairs of a row and a key that it sees. KEYS128 and PAIRS128 are those within a window of 128 tokens.
"""

from __future__ import annotations

import json
from fractions import Fraction

from llmc.compiler.ir.dims import Atom, Dim, Symbol, symbol
from llmc.targets.kernel import Call
from llmc.targets.lowering import Program

Polynomial = dict[tuple[str, ...], Fraction]


def keys(window: int) -> Dim:
    """KEYS of attention with this window (0: none)."""
    return symbol(f"KEYS{window or ''}")


def pairs(window: int) -> Dim:
    """PAIRS of attention with this window (0: none)."""
    return symbol(f"PAIRS{window or ''}")


def call_costs(program: Program) -> list[dict[str, object]]:
    """Distinct costs, each with the calls that have it: numbers in the order in which the step calls."""
    calls = [call for lowered in program.ops for call in lowered.calls]
    found: dict[str, tuple[dict[str, object], list[int]]] = {}
    for index, call in enumerate(calls):
        cost = _cost(call)
        found.setdefault(json.dumps(cost), (cost, []))[1].append(index)
    return [{**cost, "calls": indices} for cost, indices in found.values()]


def _cost(call: Call) -> dict[str, object]:
    return {
        "bytes": polynomial(call.bytes_moved),
        "operations": polynomial(call.operations),
        "arithmetic": call.arithmetic,
        "when": [[item.symbol, item.low, item.high] for item in call.when],
    }


def polynomial(size: object) -> dict[str, int | float]:
    """A size by monomial. Floor divisions are taken as exact ones: costs need no remainders."""
    assert isinstance(size, (int, Dim))
    terms = _expanded(size)
    return {
        "*".join(names): int(factor) if factor.denominator == 1 else float(factor)
        for names, factor in sorted(terms.items())
    }


def _expanded(size: int | Dim) -> Polynomial:
    if isinstance(size, int):
        return {(): Fraction(size)} if size else {}
    total: Polynomial = {}
    for monomial, coefficient in size.terms:
        product: Polynomial = {(): Fraction(coefficient)}
        for atom, power in monomial:
            for _ in range(power):
                product = _times(product, _atom(atom))
        for names, factor in product.items():
            total[names] = total.get(names, Fraction(0)) + factor
    return total


def _atom(atom: Atom) -> Polynomial:
    if isinstance(atom, Symbol):
        return {(atom.name,): Fraction(1)}
    return {names: factor / atom.divisor for names, factor in _expanded(atom.numerator).items()}


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    out: Polynomial = {}
    for a, x in left.items():
        for b, y in right.items():
            names = tuple(sorted((*a, *b)))
            out[names] = out.get(names, Fraction(0)) + x * y
    return out
