"""Which kernels serve one linear op at every number of tokens, over one packed weight.

A `LinearPlan` is all that a lowering rule needs: the layout to pack the weight with, the kernels, for which T each one
runs, the forms that they read activations in, and how their work divides.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from llmc.targets.cpu.forms import Bf16Pairs, integer_groups
from llmc.targets.cpu.linear_float import DequantizedBlocks, DequantizedRows, FloatBlocks, FloatRows
from llmc.targets.cpu.linear_problem import FloatProblem, LinearProblem, QuantizedProblem, chosen
from llmc.targets.cpu.linear_quantized import QuantizedBlocks, QuantizedRows
from llmc.targets.cpu.matrix_unit import FewRows, matrix_unit
from llmc.targets.cpu.variants import Layout, LinearPlan, Variant
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.forms import Form, OwnRows
from llmc.targets.template import Chooser


def quantized_linear_plan(chooser: Chooser, problem: QuantizedProblem, activations: str = "i8") -> LinearPlan:
    """y[T, features] from weights of 2 to 6 or 8 bits.

    activations "i8": 8-bit activations in the weight's groups; the sums are exact but for one f32 rounding a group.
    "f32": weights are dequantized in registers and multiplied with f32 activations (no machine multiplies bf16 by
    integers, so bf16 gains nothing and loses digits).
    """
    if activations not in ("i8", "f32"):
        raise ValueError(f"unknown activations {activations!r}; known: i8, f32")
    machine = chooser.machine
    unit, layout = matrix_unit(machine), problem.layout(machine)
    if activations == "f32":
        return _float_plan(chooser, (DequantizedRows, DequantizedBlocks), problem, layout, OwnRows(problem.k))
    form = integer_groups(machine, problem.k, problem.group)

    def rows(low: int, high: int) -> Variant:
        member = chosen(chooser, QuantizedRows, problem, (low, high))
        few = FewRows(member.kernel(problem, machine), high, member.tiles, member.least)
        return _rows_variant(few, form, problem, layout, low, high)

    def several(low: int, high: int) -> Variant:
        found = None if unit is None else unit.quantized_rows(chooser, problem, high)
        return rows(low, high) if found is None else _rows_variant(found, form, problem, layout, low, high)

    blocks = chosen(chooser, QuantizedBlocks, problem, (17, None))
    many = _blocks_variant(blocks, form, problem, layout, 17, chooser)
    variants = (rows(1, 1), rows(2, 4), several(5, 8), several(9, 16), many)
    return LinearPlan(layout, _arguments(layout, problem), variants, "int8")


def float_linear_plan(chooser: Chooser, problem: FloatProblem, in_company: bool = False) -> LinearPlan:
    """y[T, features] from weights of dtype "f32", "f16" or "bf16".

    problem.pairs asks for products of bf16 pairs, which are f32 ones where weights or machine do not do that.
    in_company: every number of rows has the same bits in a row; else only where that costs nothing.
    """
    pairs = problem.pairs and problem.dtype == "bf16" and isa_for(chooser.machine).bf16_dots is not None
    problem = dataclasses.replace(problem, pairs=pairs)
    form = Bf16Pairs(problem.k) if pairs else OwnRows(problem.k)
    return _float_plan(chooser, (FloatRows, FloatBlocks), problem, problem.layout(chooser.machine), form, in_company)


def _float_plan(
    chooser: Chooser,
    templates: tuple[type[Any], type[Any]],
    problem: QuantizedProblem | FloatProblem,
    layout: Layout,
    form: Form,
    in_company: bool = False,
) -> LinearPlan:
    """Few rows stream the weight: through the matrix unit, if it is of bf16, else through vector registers.

    templates: of few rows, and of blocks of rows.
    """
    isa, unit = isa_for(chooser.machine), matrix_unit(chooser.machine)

    def plan(*variants: Variant) -> LinearPlan:
        arithmetic = "bf16" if isinstance(form, Bf16Pairs) else "f32"
        return LinearPlan(layout, _arguments(layout, problem), variants, arithmetic)

    def rows(low: int, high: int) -> Variant:
        member = chosen(chooser, templates[0], problem, (low, high))
        few = FewRows(member.kernel(problem, chooser.machine), high, member.tiles, member.least)
        return _rows_variant(few, form, problem, layout, low, high)

    on_unit = None
    if unit is not None and isinstance(problem, FloatProblem) and problem.dtype == "bf16" and isinstance(form, OwnRows):
        on_unit = unit.float_rows(chooser, problem)
    few: tuple[Variant, ...]
    if on_unit is not None:
        read = on_unit.form or form
        if in_company:  # the matrix unit adds up in another order than vectors
            return plan(_rows_variant(on_unit, read, problem, layout, 1, None))
        few = rows(1, 1), _rows_variant(on_unit, read, problem, layout, 2, on_unit.rows)
    else:
        bounds = (0, 1, 4, 8, 12) if isa.registers >= 32 else (0, 1, 4, 6, 8)
        few = tuple(rows(low + 1, high) for low, high in itertools.pairwise(bounds))
    most = few[-1].high
    assert most is not None
    blocks = chosen(chooser, templates[1], problem, (most + 1, None))
    return plan(*few, _blocks_variant(blocks, form, problem, layout, most + 1, chooser))


def _arguments(layout: Layout, problem: LinearProblem) -> tuple[str, ...]:
    fused = (name for name in ("bias", "residual") if getattr(problem, name))
    return (*layout.arrays(problem.n, problem.k), *fused, "out")


def _rows_variant(
    few: FewRows, form: Form, problem: LinearProblem, layout: Layout, low: int, high: int | None
) -> Variant:
    """A kernel whose every unit streams its share of the weight."""
    units = -(-layout.tiles(problem.n) // few.tiles)
    grain = max(1, few.least * units // layout.nbytes(problem.n, problem.k))
    columns = few.tiles * layout.tile_rows // (2 if problem.gated else 1)
    return Variant(few.kernel, form, low, high, units, 0, grain, columns=columns)


def _blocks_variant(
    member: Any, form: Form, problem: LinearProblem, layout: Layout, low: int, chooser: Chooser
) -> Variant:
    """A prefill kernel: units are large, so that each is worth a thread."""
    panels = -(-layout.tiles(problem.n) // member.tiles)
    return Variant(member.kernel(problem, chooser.machine), form, low, None, panels, member.row_block)
