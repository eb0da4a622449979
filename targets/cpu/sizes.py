"""Symbolic sizes as kernel parameters, and as the expressions that kernels compute with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import Dim, FloorDiv
from llmc.targets.cpu import builder as b
from llmc.targets.kernel import Param

if TYPE_CHECKING:
    from tvm.tirx import Expr


def dim_param(dim: int | Dim) -> Param:
    """A size as a kernel parameter: an int, or nested tuples that `dim_expression` reads."""
    if isinstance(dim, int):
        return dim
    return tuple(
        (coefficient, tuple((_atom_param(atom), power) for atom, power in monomial))
        for monomial, coefficient in dim.terms
    )


def _atom_param(atom: object) -> Param:
    if isinstance(atom, FloorDiv):
        return ("//", dim_param(atom.numerator), atom.divisor)
    return str(atom)


def dim_expression(dim: Param, sizes: Mapping[str, Expr]) -> Expr:
    """The int64 expression of a size parameter."""
    if isinstance(dim, int):
        return b.index(dim)
    total: Expr | None = None
    for coefficient, monomial in _pairs(dim):
        assert isinstance(coefficient, int)
        term: Expr = b.index(coefficient)
        for atom, power in _pairs(monomial):
            factor = sizes[atom] if isinstance(atom, str) else _quotient(atom, sizes)
            assert isinstance(power, int)
            for _ in range(power):
                term = term * factor
        total = term if total is None else total + term
    assert total is not None
    return total


def _pairs(value: Param) -> list[tuple[Param, Param]]:
    assert isinstance(value, tuple)
    return [(item[0], item[1]) for item in value if isinstance(item, tuple)]


def _quotient(atom: Param, sizes: Mapping[str, Expr]) -> Expr:
    assert isinstance(atom, tuple) and isinstance(atom[2], int)
    return dim_expression(atom[1], sizes) // atom[2]
