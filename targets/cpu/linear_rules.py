"""Linear ops: the forms that they can read activations in, and their calls in the forms that were agreed on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.llm import GatedLinear, Linear, QuantizeActivations
from llmc.compiler.ir.op import Op, Value
from llmc.targets.agreement import Reading, Statement, Way, Writing, unrounded
from llmc.targets.cpu.layouts import PLANES
from llmc.targets.cpu.linear_plan import float_linear_plan, quantized_linear_plan
from llmc.targets.cpu.linear_problem import FloatProblem, ManyRowsProblem, QuantizedProblem
from llmc.targets.cpu.matrix_unit import MatrixUnit, matrix_unit
from llmc.targets.cpu.plain import RULES
from llmc.targets.cpu.row_kinds import few_when, in_company, many_when, only_few
from llmc.targets.cpu.variants import LinearPlan, Variant
from llmc.targets.cpu.vector_isa import missing_vectors
from llmc.targets.forms import Form
from llmc.targets.kernel import Call, Packed, Range, Workspace
from llmc.targets.lowering import Context, Lowered

AnyLinear: TypeAlias = Linear | GatedLinear
INTEGER_BITS = tuple(PLANES)


def rows_of(value: Value) -> int | Dim:
    """Rows of a value seen as a matrix over its last axis."""
    return product(value.shape[:-1])


def is_vector(value: Value | None, size: int, context: Context) -> bool:
    """Whether a value is an f32 [size] known when compiling (or absent)."""
    return value is None or (value.shape == (size,) and value.dtype == "f32" and context.known(value))


@dataclass(frozen=True)
class LinearStatement(Statement):
    """plan: the kernels with the arithmetic of few rows. unit: what has that of many, if there is one for this op."""

    plan: LinearPlan
    unit: MatrixUnit | None


@RULES.states(Linear, GatedLinear)
def linear_statement(op: Op, context: Context) -> LinearStatement | None:
    """Activations as the kernels of few rows read them; or for many rows as the matrix unit does."""
    assert isinstance(op, (Linear, GatedLinear))
    if missing_vectors(context.machine):
        return None
    integers = refuses_integers(op, context) is None
    if not integers and refuses_floats(op, context) is not None:
        return None
    unit = _unit_of(op, context)
    plan = (_integer_plan if integers else _float_plan)(op, unit is not None, context)
    value, rows = _read_by(op), rows_of(op)
    ways = [Way(tuple(_few(plan, rows, None, context)))]
    if unit is not None and not only_few(rows, context.graph):
        bits, many_from = weight_bits(op), unit.rows_from(weight_bits(op))
        many = many_when(rows, many_from, None, many_from, context.graph)
        form, result = _unit_form(op, unit), unit.result(_features(op), bits)
        if many is not None and form is not None:
            writes = () if result is None else (Writing(result, many),)
            reads = (*_few(plan, rows, many_from, context), Reading(form, many))
            ways.append(Way(reads, unit.cost(bits), writes))
    return LinearStatement(value, op.x, tuple(ways), plan, unit)


def _few(plan: LinearPlan, rows: int | Dim, many_from: int | None, context: Context) -> Iterator[Reading]:
    """What kernels with the arithmetic of few rows read, if that of many serves `many_from` rows and more."""
    for form, group in itertools.groupby(plan.variants, lambda variant: variant.form):
        variants = list(group)
        when = few_when(rows, variants[0].low, variants[-1].high, many_from, context.graph)
        if when is not None:
            yield Reading(form, when)


def _read_by(op: AnyLinear) -> Value:
    """What a linear op's kernels read: beside weights in f32 nothing is to be gained, and a rounding is on purpose."""
    if isinstance(op.x, QuantizeActivations) or (op.w.dtype == "f32" and op.w.tensor.encoding is None):
        return op.x
    return unrounded(op.x)


def weight_bits(op: AnyLinear) -> int:
    """Bits of a weight as `MatrixUnit` counts them; 0 for one that it is not for."""
    if op.w.tensor.encoding is not None:
        return int(getattr(op.w.tensor.encoding, "bits", 0))
    return {"bf16": 16, "f32": 32}.get(op.w.dtype, 0)


def _unit_of(op: AnyLinear, context: Context) -> MatrixUnit | None:
    """The machine's matrix unit, if it could serve this op: it takes what is rounded in the graph, and f32 weights."""
    unit = matrix_unit(context.machine)
    takes = weight_bits(op) == 32 or unrounded(op.x) is not op.x
    return unit if unit is not None and takes and _unit_form(op, unit) is not None else None


def _unit_form(op: AnyLinear, unit: MatrixUnit) -> Form | None:
    return unit.activations(_shape(op)[1], weight_bits(op), getattr(op.w.tensor.encoding, "group", None))


def _shape(op: AnyLinear) -> tuple[int, int]:
    """[outputs, inputs] of the weight."""
    n, k = op.w.shape
    assert isinstance(n, int) and isinstance(k, int)
    return n, k


def _features(op: AnyLinear) -> int:
    """Columns of the result."""
    return _shape(op)[0] // (2 if isinstance(op, GatedLinear) else 1)


def _facts(op: AnyLinear) -> dict[str, Any]:
    """What any `LinearProblem` has."""
    n, k = _shape(op)
    return {
        "n": n,
        "k": k,
        "gated": isinstance(op, GatedLinear),
        "activation": op.activation or "none",
        "bias": op.bias is not None,
        "residual": isinstance(op, Linear) and op.residual is not None,
    }


def _refuses_epilogue(op: AnyLinear, context: Context) -> str | None:
    if op.dtype != "f32":
        return f"activations are {op.dtype}, not f32"
    return None if is_vector(op.bias, _shape(op)[0], context) else "the bias is no f32 vector known when compiling"


def refuses_integers(op: AnyLinear, context: Context) -> str | None:
    """Why no kernel multiplies integers for this op; None where one does."""
    encoding = op.w.tensor.encoding
    group = getattr(encoding, "group", 0)
    if getattr(encoding, "bits", 0) not in INTEGER_BITS:
        return "the weight is not quantized"
    if not isinstance(op.x, QuantizeActivations):
        return "the activations are not rounded to int8"
    if op.x.group != group:
        return f"activations in groups of {op.x.group}, weights in groups of {group}"
    return _refuses_epilogue(op, context)


def refuses_floats(op: AnyLinear, context: Context) -> str | None:
    """Why no kernel multiplies floating point numbers for this op; None where one does."""
    if not context.known(op.w):
        return "the weight is not known when compiling"
    if op.x.tensor.encoding is not None:
        return "the activations are rounded to int8"
    if op.rounding != "f32":
        return f"activations rounded to {op.rounding} need split-rounding first"
    epilogue = _refuses_epilogue(op, context)
    if epilogue is not None:
        return epilogue
    encoding = op.w.tensor.encoding
    if encoding is None:
        return None if op.w.dtype in ("f32", "f16", "bf16") else f"no kernel reads {op.w.dtype} weights"
    return None if getattr(encoding, "bits", 0) in INTEGER_BITS else f"no kernel reads weights in {encoding}"


def _encoding(op: AnyLinear) -> dict[str, Any]:
    """What a quantized weight's integers are."""
    encoding = op.w.tensor.encoding
    symmetric, table = bool(getattr(encoding, "symmetric", True)), bool(getattr(encoding, "table", False))
    group, in_steps = getattr(encoding, "group", 0), bool(getattr(encoding, "in_steps", False))
    found = {"bits": weight_bits(op), "group": group, "symmetric": symmetric, "table": table, "in_steps": in_steps}
    return found | {"per_row": bool(getattr(encoding, "per_row", False))}


def _integer_plan(op: AnyLinear, on_unit: bool, context: Context) -> LinearPlan:
    return quantized_linear_plan(context, QuantizedProblem(**_encoding(op), **_facts(op)))


def _float_plan(op: AnyLinear, on_unit: bool, context: Context) -> LinearPlan:
    """on_unit: the matrix unit could serve the op. Activations of few rows stay as they are then, since the memory is
    their limit; else they are rounded where the graph rounds them and the machine multiplies pairs of bf16."""
    if op.w.tensor.encoding is not None:
        return quantized_linear_plan(context, QuantizedProblem(**_encoding(op), **_facts(op)), "f32")
    pairs = not on_unit and unrounded(op.x) is not op.x
    problem = FloatProblem(dtype=op.w.dtype, pairs=pairs, **_facts(op))
    return float_linear_plan(context, problem, in_company(context.graph))


@RULES.lower(Linear, GatedLinear, priority=20, needs=missing_vectors)
def linear_quantized(op: Op, context: Context) -> Lowered | str:
    """Integer dot products of group-quantized weights and int8 activations; many rows on tiles, where there are any."""
    assert isinstance(op, (Linear, GatedLinear))
    return refuses_integers(op, context) or _lowered(op, context)


@RULES.lower(Linear, GatedLinear, priority=10, needs=missing_vectors)
def linear_float(op: Op, context: Context) -> Lowered | str:
    """f32 multiply-adds; weights in f32, f16 or bf16, or dequantized in registers; many rows on tiles, where there are
    any."""
    assert isinstance(op, (Linear, GatedLinear))
    return refuses_floats(op, context) or _lowered(op, context)


def _lowered(op: AnyLinear, context: Context) -> Lowered:
    statement = context.agreement.statements[op]
    assert isinstance(statement, LinearStatement)
    value, rows, k = statement.value, rows_of(op), _shape(op)[1]
    calls = []
    for writing in context.agreement.converts(op):
        args = (value, *context.buffers(value, writing.form).values())
        made = writing.form.writer(context)
        calls.append(Call(made.kernel, args, rows, made.grain, writing.when, note=f"[{k}]"))
    unit, many_from = statement.unit, None
    if unit is not None and context.agreement.way(op) is not statement.ways[0]:
        many_from = unit.rows_from(weight_bits(op))
        calls += _calls_of_many(op, statement, unit, many_from, context)
    for variant in statement.plan.variants:
        when = few_when(rows, variant.low, variant.high, many_from, context.graph)
        if when is not None:
            calls.append(_call(op, statement, statement.plan, variant, when, {"out": "result"}, context))
    return Lowered(tuple(calls), reads=(value,))


def _calls_of_many(
    op: AnyLinear, statement: LinearStatement, unit: MatrixUnit, many_from: int, context: Context
) -> Iterator[Call]:
    """The calls that run on the matrix unit; their result is in another form than f32 where that was agreed on."""
    out: dict[str, object] = {"out": "result"}
    instead = context.agreement.writes_instead(op)
    for of, writing in instead:
        (out["out"],) = context.buffers(of, writing.form).values()
    problem = ManyRowsProblem(packed=bool(instead), **_encoding(op), **_facts(op))
    plan = unit.plan(context, problem)
    for variant in plan.variants:
        when = many_when(rows_of(op), variant.low, variant.high, many_from, context.graph)
        if when is not None:
            given = {**out, "workspace": Workspace(variant.workspace)}
            yield _call(op, statement, plan, variant, when, given, context)


def _call(
    op: AnyLinear,
    statement: LinearStatement,
    plan: LinearPlan,
    variant: Variant,
    when: tuple[Range, ...],
    given: Mapping[str, object],
    context: Context,
) -> Call:
    """A call of one kernel; `given`: pointers by name, beside the op's own."""
    (n, k), rows, units = _shape(op), rows_of(op), variant.units(rows_of(op))
    named: dict[str, object] = {
        **{part: Packed(op.w, plan.layout, part) for part in ("data", "scales", "minimums")},
        "bias": op.bias,
        "residual": op.residual if isinstance(op, Linear) else None,
        **context.buffers(statement.value, variant.form),
        **given,
    }
    return Call(
        variant.kernel,
        (*(named[name] for name in plan.names(variant)), rows),
        units,
        variant.grain,
        when,
        note=f"[{n}, {k}]",
        bytes_moved=plan.layout.nbytes(n, k),
        operations=rows * (2 * n * k * plan.products),
        arithmetic=plan.arithmetic,
        columns=variant.columns,
    )
