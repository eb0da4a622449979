"""Which kernels serve which op; plain.py has the rules at priority 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.llm import GatedLinear, LayerNorm, Linear, QuantizeActivations, RMSNorm
from llmc.compiler.ir.op import Op, Value
from llmc.targets.cpu import (  # noqa: F401  (registers their rules)
    attention_rules,
    checked_index,
    embedding_rules,
    functions,
    pooling,
)
from llmc.targets.cpu.linear_plan import FEW_ROWS, Layout, LinearPlan, float_linear_plan, quantized_linear_plan
from llmc.targets.cpu.matrix_unit import MatrixUnit, many_rows_unit, matrix_unit
from llmc.targets.cpu.norms import Norm, NormProblem
from llmc.targets.cpu.plain import RULES as RULES
from llmc.targets.cpu.quantize_activations import padded, quantize_activations, round_activations
from llmc.targets.cpu.row_kinds import Guard, few_when, in_company, many_when, only_few
from llmc.targets.cpu.vector_isa import missing_vectors
from llmc.targets.kernel import Call, Packed, Scratch, Workspace, kernel
from llmc.targets.lowering import Context, Lowered


def rows_of(value: Value) -> int | Dim:
    """Rows of a value seen as a matrix over its last axis."""
    return product(value.shape[:-1])


def features_of(value: Value) -> int:
    """Columns of a value seen as a matrix; they are always known when compiling."""
    size = value.shape[-1]
    assert isinstance(size, int)
    return size


def is_vector(value: Value | None, size: int, context: Context) -> bool:
    """Whether a value is an f32 [size] known when compiling (or absent)."""
    return value is None or (value.shape == (size,) and value.dtype == "f32" and context.known(value))


@RULES.lower(RMSNorm, LayerNorm, priority=10, needs=missing_vectors)
def norm_rows(op: Op, context: Context) -> Lowered | str:
    """A row at a time, vectorised."""
    assert isinstance(op, (RMSNorm, LayerNorm))
    if op.dtype != "f32":
        return f"rows are {op.dtype}, not f32"
    if isinstance(op.shape[-1], Dim):
        return f"the rows of {op.type} are of a size that is not known when compiling"
    size = features_of(op)
    bias = op.b if isinstance(op, LayerNorm) else None
    if (op.w is not None and op.w.dtype != "f32") or (bias is not None and bias.dtype != "f32"):
        return "the weights are not f32"
    offset = op.offset if isinstance(op, RMSNorm) else 0.0
    if offset not in (0.0, 1.0):
        return f"no kernel adds {offset} to the weight"
    problem = NormProblem(
        kind="rms" if isinstance(op, RMSNorm) else "layer",
        features=size,
        eps=float(op.eps),
        weight=op.w is not None,
        bias=bias is not None,
        weight_offset=int(offset),
    )
    norm = context.choose(Norm, problem)
    if isinstance(norm, str):
        return norm
    args = (op.x, *(v for v in (op.w, bias) if v is not None), "result")
    made = norm.kernel(problem, context.machine)
    return Lowered((Call(made, args, rows_of(op), grain=norm.grain(problem), note=f"[{size}]"),))


ROUNDED = (("xq", "i8"), ("xscales", "f32"), ("xsums", "i32"))


def rounded_parts(value: Value, group: int, context: Context) -> dict[str, Scratch]:
    """The buffers of a rounded activation: bytes, and a scale and a sum a row and group."""
    size, rows = features_of(value), rows_of(value)
    columns = {
        "xq": padded(size, group),
        "xscales": padded(size, group) // group,
        "xsums": padded(size, group) // group,
    }
    return {part: Scratch(context.scratch_name(value, part), dtype, rows * columns[part]) for part, dtype in ROUNDED}


def tiles_of(value: Value, inputs: int, context: Context, split: int = 1) -> Scratch:
    """The buffer of an activation as bf16 in tiles; split: bf16 an activation."""
    name = "xtiles" if split == 1 else f"xtiles{split}"
    return Scratch(context.scratch_name(value, name), "uint16", _unit(context).elements(rows_of(value), inputs, split))


def _unit(context: Context) -> MatrixUnit:
    """The machine's matrix unit, where tiles serve many rows."""
    unit = many_rows_unit(context.machine)
    assert unit is not None
    return unit


@RULES.lower(QuantizeActivations, priority=10, needs=missing_vectors)
def round_rows(op: Op, context: Context) -> Lowered | str:
    """A row at a time; a norm in front that nobody else reads is computed on the way."""
    assert isinstance(op, QuantizeActivations)
    size = features_of(op)
    x: Value = op.x
    norm = x if isinstance(x, (RMSNorm, LayerNorm)) and context.only_user(x) is op else None
    params: dict[str, float | str | bool] = {}
    extra: tuple[Value, ...] = ()
    if norm is not None:
        bias = norm.b if isinstance(norm, LayerNorm) else None
        fits = norm.w is not None and norm.w.dtype == "f32" and norm.x.dtype == "f32"
        if fits and (bias is None or bias.dtype == "f32"):
            assert norm.w is not None
            offset = norm.offset if isinstance(norm, RMSNorm) else 0.0
            kind = "rms" if isinstance(norm, RMSNorm) else "layer"
            params = {"norm": kind, "eps": norm.eps, "weight_offset": offset, "norm_bias": bias is not None}
            extra = (norm.w,) if bias is None else (norm.w, bias)
            x = norm.x
    rows, grain, note = rows_of(op), max(1, 4096 // size), f"[{size}]"
    calls = []
    unit = many_rows_unit(context.machine)
    many_from = None if unit is None else unit.rows_from(8)
    few = few_when(rows, 1, None, many_from, context.graph)
    if few is not None:
        made = kernel(quantize_activations, context.machine.key, k=size, group=op.group, **params)
        parts = rounded_parts(op, op.group, context)
        args = (x, *extra, *(parts[name] for name, _ in ROUNDED))
        calls.append(Call(made, args, rows, grain, few, note=note))
    many = None if many_from is None else many_when(rows, many_from, None, many_from, context.graph)
    if unit is not None and many is not None and writes_tiles(op.x, context) is None:
        inputs = padded(size, op.group)
        made = unit.activations(k=size, inputs=inputs, **params)
        calls.append(Call(made, (x, *extra, tiles_of(op, inputs, context)), rows, grain, many, note=note))
    return Lowered(tuple(calls), reads=(x,))


def writes_tiles(value: Value, context: Context) -> Scratch | None:
    """Where a linear op of many rows writes its result as bf16 in tiles, for its one user that reads it so.

    That user rounds it and sees no more, or multiplies it in three parts.
    """
    if not isinstance(value, (Linear, GatedLinear)) or not _on_tiles(value, context):
        return None
    user, unit = context.only_user(value), _unit(context)
    split = unit.split_of(_tile_bits(value))
    if isinstance(user, QuantizeActivations):
        fits = features_of(value) % user.group == 0 and split == 1
        return tiles_of(user, features_of(value), context) if fits else None
    read: Value = value
    reader = user
    if isinstance(user, Cast):
        again = context.only_user(user)
        reader = context.only_user(again) if isinstance(again, Cast) else None
        read = again if isinstance(again, Cast) and unrounded(again) is value else read
    if not isinstance(reader, (Linear, GatedLinear)) or reader.x is not read or not _on_tiles(reader, context):
        return None
    if read_by(reader) is not value:
        return None
    alike = split == unit.split_of(_tile_bits(reader))
    if not alike or features_of(value) != _tile_inputs(reader, unit):
        return None
    return tiles_of(value, features_of(value), context, split)


def unrounded(x: Value) -> Value:
    """The f32 value that casts to bf16 and back round, or x itself: kernels may keep what a rounding would drop."""
    if isinstance(x, Cast) and isinstance(x.x, Cast) and x.dtype == x.x.x.dtype == "f32" and x.x.dtype == "bf16":
        return x.x.x
    return x


def read_by(op: Linear | GatedLinear) -> Value:
    """What a linear op's kernels read: beside weights in f32 nothing is to be gained, and a rounding is on purpose."""
    return op.x if op.w.dtype == "f32" and op.w.tensor.encoding is None else unrounded(op.x)


def _on_tiles(op: Linear | GatedLinear, context: Context) -> bool:
    """Whether tiles serve this op, when it has many rows."""
    return not only_few(rows_of(op), context.graph) and _tiles_fit(op, context)


def _tiles_fit(op: Linear | GatedLinear, context: Context) -> bool:
    """Whether tiles could serve many rows of this op."""
    if many_rows_unit(context.machine) is None:
        return False
    if isinstance(op.x, QuantizeActivations):
        return not isinstance(_integers(op, context), str)
    bits = _tile_bits(op)
    fits = bits == 32 or (bits in (4, 8, 16) and unrounded(op.x) is not op.x)
    return fits and context.known(op.w) and not isinstance(_epilogue(op, context), str)


def _tile_bits(op: Linear | GatedLinear) -> int:
    """Bits of a weight as `MatrixUnit` counts them; 0 for one that no tiles are for."""
    if op.w.tensor.encoding is not None:
        return int(getattr(op.w.tensor.encoding, "bits", 0))
    return {"bf16": 16, "f32": 32}.get(op.w.dtype, 0)


def _tile_inputs(op: Linear | GatedLinear, unit: MatrixUnit) -> int:
    """Columns of the tiles that a linear op reads: whole groups of its weight."""
    return padded(_shape(op)[1], getattr(op.w.tensor.encoding, "group", unit.inputs))


def plan_calls(op: Linear | GatedLinear, plan: LinearPlan, activations: dict[str, object], context: Context) -> Lowered:
    """The calls of a linear plan: one a range of row counts."""
    rows, calls, many_from = rows_of(op), [], None
    if "xtiles" in activations:
        many_from = _unit(context).rows_from(_tile_bits(op))
        calls = _tile_calls(op, activations, context)
    n, k = _shape(op)
    weight_bytes = plan.layout.nbytes(n, k)
    for variant in plan.variants:
        when = few_when(rows, variant.low, variant.high, many_from, context.graph)
        if when is not None:
            calls.append(
                Call(
                    variant.kernel,
                    (*_arguments(op, plan.layout, variant.arguments or plan.arguments, activations), rows),
                    variant.units(rows),
                    variant.grain,
                    when,
                    note=f"[{n}, {k}]",
                    bytes_moved=weight_bytes,
                    operations=rows * (2 * n * k),
                    arithmetic={"i8": "int8", "bf16": "bf16"}.get(plan.activations, "f32"),
                )
            )
    return Lowered(tuple(calls))


def _tile_calls(op: Linear | GatedLinear, activations: dict[str, object], context: Context) -> list[Call]:
    """The calls of a linear op for as many rows as tiles are for."""
    rows, (n, k), packed = rows_of(op), _shape(op), writes_tiles(op, context)
    epilogue, encoding = _epilogue(op, context), op.w.tensor.encoding
    assert isinstance(epilogue, dict)
    facts: dict[str, Any] = {**epilogue}
    if encoding is not None:
        facts |= {name: getattr(encoding, name) for name in ("group", "symmetric")}
    unit, bits = _unit(context), _tile_bits(op)
    plan, many_from = unit.plan(n=n, k=k, bits=bits, packed=packed is not None, **facts), unit.rows_from(bits)
    if packed is not None:
        activations = {**activations, "out": packed}
    calls = []
    for variant in plan.variants:
        when = many_when(rows, variant.low, variant.high, many_from, context.graph)
        if when is not None:
            named = {**activations, "workspace": Workspace(variant.workspace)}
            calls.append(
                Call(
                    variant.kernel,
                    (*_arguments(op, plan.layout, plan.arguments, named), rows),
                    variant.units(rows),
                    1,
                    when,
                    note=f"[{n}, {k}]",
                    bytes_moved=plan.layout.nbytes(n, k),
                    operations=rows * (2 * n * k * plan.products),
                    arithmetic="bf16",
                )
            )
    return calls


def _arguments(
    op: Linear | GatedLinear, layout: Layout, names: Sequence[str], given: dict[str, object]
) -> list[object]:
    """A kernel's pointers by name; `given` goes before the op's own."""
    named: dict[str, object] = {
        **{part: Packed(op.w, layout, part) for part in ("data", "scales", "minimums")},
        "bias": op.bias,
        "residual": op.residual if isinstance(op, Linear) else None,
        "out": "result",
        **given,
    }
    return [named[name] for name in names]


def _shape(op: Linear | GatedLinear) -> tuple[int, int]:
    """[outputs, inputs] of the weight."""
    n, k = op.w.shape
    assert isinstance(n, int) and isinstance(k, int)
    return n, k


def _epilogue(op: Linear | GatedLinear, context: Context) -> dict[str, object] | str:
    """The epilogue's parameters, or why it cannot be fused."""
    if op.dtype != "f32":
        return f"activations are {op.dtype}, not f32"
    n = op.w.shape[0]
    assert isinstance(n, int)
    if not is_vector(op.bias, n, context):
        return "the bias is no f32 vector known when compiling"
    return {
        "gated": isinstance(op, GatedLinear),
        "activation": op.activation or "none",
        "bias": op.bias is not None,
        "residual": isinstance(op, Linear) and op.residual is not None,
    }


@RULES.lower(Linear, GatedLinear, priority=20, needs=missing_vectors)
def linear_quantized(op: Op, context: Context) -> Lowered | str:
    """Integer dot products of group-quantized weights and int8 activations; many rows on tiles, where there are any."""
    assert isinstance(op, (Linear, GatedLinear))
    plan = _integers(op, context)
    if isinstance(plan, str):
        return plan
    assert isinstance(op.x, QuantizeActivations)
    given: dict[str, object] = {**rounded_parts(op.x, op.x.group, context)}
    if _on_tiles(op, context):
        given["xtiles"] = tiles_of(op.x, padded(features_of(op.x), op.x.group), context)
    return Lowered(plan_calls(op, plan, given, context).calls, reads=(op.x,))


def _integers(op: Linear | GatedLinear, context: Context) -> LinearPlan | str:
    """The plan of a linear op with integer weights and activations, or why there is none."""
    encoding = op.w.tensor.encoding
    bits, group = getattr(encoding, "bits", 0), getattr(encoding, "group", 0)
    if bits not in (4, 8):
        return "the weight is not quantized"
    if not isinstance(op.x, QuantizeActivations):
        return "the activations are not rounded to int8"
    if op.x.group != group:
        return f"activations in groups of {op.x.group}, weights in groups of {group}"
    epilogue = _epilogue(op, context)
    if isinstance(epilogue, str):
        return epilogue
    n, k = _shape(op)
    return quantized_linear_plan(
        context.machine,
        n=n,
        k=k,
        bits=bits,
        group=group,
        symmetric=bool(getattr(encoding, "symmetric", True)),
        **epilogue,  # type: ignore[arg-type]
    )


@RULES.lower(Linear, GatedLinear, priority=10, needs=missing_vectors)
def linear_float(op: Op, context: Context) -> Lowered | str:
    """f32 multiply-adds; weights in f32, f16 or bf16, or dequantized in registers.

    Activations that the graph rounds to bf16 are rounded where the machine multiplies pairs of bf16. With tiles those
    of few rows stay as they are: the memory is their limit.
    """
    assert isinstance(op, (Linear, GatedLinear))
    if not context.known(op.w):
        return "the weight is not known when compiling"
    if op.x.tensor.encoding is not None:
        return "the activations are rounded to int8"
    if op.rounding != "f32":
        return f"activations rounded to {op.rounding} need split-rounding first"
    epilogue = _epilogue(op, context)
    if isinstance(epilogue, str):
        return epilogue
    n, k = op.w.shape
    assert isinstance(n, int) and isinstance(k, int)
    encoding = op.w.tensor.encoding
    if encoding is None:
        if op.w.dtype not in ("f32", "f16", "bf16"):
            return f"no kernel reads {op.w.dtype} weights"
        paired = unrounded(op.x) is not op.x and not _tiles_fit(op, context)
        plan = float_linear_plan(
            context.machine,
            n=n,
            k=k,
            dtype=op.w.dtype,
            activations="bf16" if paired else "f32",
            in_company=in_company(context.graph),
            **epilogue,  # type: ignore[arg-type]
        )
    else:
        bits, group = getattr(encoding, "bits", 0), getattr(encoding, "group", 0)
        if bits not in (4, 8):
            return f"no kernel reads weights in {encoding}"
        plan = quantized_linear_plan(
            context.machine,
            n=n,
            k=k,
            bits=bits,
            group=group,
            symmetric=bool(getattr(encoding, "symmetric", True)),
            activations="f32",
            **epilogue,  # type: ignore[arg-type]
        )
    x, rows = read_by(op), rows_of(op)
    given: dict[str, object] = {"x": x}
    if plan.activations == "bf16":  # the machine multiplies pairs of bf16
        given["x"] = pairs = Scratch(context.scratch_name(x, "pairs"), "uint16", rows * (-(-k // 2) * 2))
        made = kernel(round_activations, context.machine.key, k=k)
        rounding = Call(made, (x, pairs), rows, max(1, 4096 // k), note=f"[{k}]")
        return Lowered((rounding, *plan_calls(op, plan, given, context).calls), reads=(x,))
    cut: list[Call] = []  # calls that make tiles of the activations
    unit = matrix_unit(context.machine)
    if unit is None:
        return Lowered(plan_calls(op, plan, given, context).calls, reads=(x,))

    def to_tiles(tiles: Scratch, inputs: int, split: int, when: Guard) -> Scratch:
        if when is not None:
            made = unit.activations(k=k, inputs=inputs, parts=split)
            cut.append(Call(made, (x, tiles), rows, max(1, 4096 // k), when, note=f"[{k}]"))
        return tiles

    many_from = unit.rows_from(_tile_bits(op)) if _on_tiles(op, context) else None
    for variant in plan.variants:
        if FEW_ROWS in variant.arguments:
            inputs, most, split = padded(k, unit.inputs), variant.high or rows, unit.few_split
            few = Scratch(context.scratch_name(x, FEW_ROWS), "uint16", unit.elements(most, inputs, split))
            when = few_when(rows, variant.low, variant.high, many_from, context.graph)
            given[FEW_ROWS] = to_tiles(few, inputs, split, when)
    if many_from is not None:
        inputs, split = _tile_inputs(op, unit), unit.split_of(_tile_bits(op))
        many = many_when(rows, many_from, None, many_from, context.graph) if writes_tiles(x, context) is None else None
        given["xtiles"] = to_tiles(tiles_of(x, inputs, context, split), inputs, split, many)
    return Lowered((*cut, *plan_calls(op, plan, given, context).calls), reads=(x,))
