"""Which kernels serve which op on x86; plain.py has the rules at priority 0."""

from __future__ import annotations

from llmc.compiler.ir.dims import Dim, Symbol, product
from llmc.compiler.ir.llm import GatedLinear, LayerNorm, Linear, QuantizeActivations, RMSNorm
from llmc.compiler.ir.op import Op, Value
from llmc.targets.kernel import Call, Packed, Range, Scratch, kernel
from llmc.targets.lowering import Context, Lowered
from llmc.targets.x86 import attention_rules, embedding_rules  # noqa: F401  (registers their rules)
from llmc.targets.x86.linear_plan import LinearPlan, float_linear_plan, quantized_linear_plan
from llmc.targets.x86.norms import norm_kernel
from llmc.targets.x86.plain import RULES
from llmc.targets.x86.quantize_activations import padded, quantize_activations

VECTOR = ("avx2", "fma", "f16c")


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


@RULES.lower(RMSNorm, LayerNorm, priority=10, needs=VECTOR)
def norm_rows(op: Op, context: Context) -> Lowered | str:
    """A row at a time, vectorised."""
    assert isinstance(op, (RMSNorm, LayerNorm))
    if op.dtype != "f32":
        return f"rows are {op.dtype}, not f32"
    size = features_of(op)
    bias = op.b if isinstance(op, LayerNorm) else None
    if (op.w is not None and op.w.dtype != "f32") or (bias is not None and bias.dtype != "f32"):
        return "the weights are not f32"
    offset = op.offset if isinstance(op, RMSNorm) else 0.0
    if offset not in (0.0, 1.0):
        return f"no kernel adds {offset} to the weight"
    made = norm_kernel(
        context.machine,
        kind="rms" if isinstance(op, RMSNorm) else "layer",
        features=size,
        eps=op.eps,
        weight=op.w is not None,
        bias=bias is not None,
        weight_offset=int(offset),
    )
    args = (op.x, *(v for v in (op.w, bias) if v is not None), "result")
    return Lowered((Call(made, args, rows_of(op), grain=max(1, 4096 // size), note=f"[{size}]"),))


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


@RULES.lower(QuantizeActivations, priority=10, needs=VECTOR)
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
    made = kernel(quantize_activations, context.machine.key, k=size, group=op.group, **params)
    parts = rounded_parts(op, op.group, context)
    args = (x, *extra, *(parts[name] for name, _ in ROUNDED))
    return Lowered((Call(made, args, rows_of(op), grain=max(1, 4096 // size), note=f"[{size}]"),))


def plan_calls(op: Linear | GatedLinear, plan: LinearPlan, activations: dict[str, object], context: Context) -> Lowered:
    """The calls of a linear plan: one a range of row counts."""
    rows = rows_of(op)
    named: dict[str, object] = {
        **activations,
        **{part: Packed(op.w, plan.layout, part) for part in ("data", "scales", "minimums")},
        "bias": op.bias,
        "residual": op.residual if isinstance(op, Linear) else None,
        "out": "result",
    }
    args = tuple(named[name] for name in plan.arguments)
    n, k = (size for size in op.w.shape if isinstance(size, int))
    weight_bytes = plan.layout.nbytes(n, k)
    calls = []
    for variant in plan.variants:
        if isinstance(rows, int):
            if not variant.low <= rows <= (variant.high or rows):
                continue
            when: tuple[Range, ...] = ()
        else:
            name = plain_symbol(rows)
            if name is None:
                if variant.high is not None:
                    continue  # only the variant without an upper limit serves any count
                when = ()
            else:
                when = (Range(name, variant.low, variant.high),)
        calls.append(
            Call(
                variant.kernel,
                (*args, rows),
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


def plain_symbol(rows: Dim) -> str | None:
    """The symbol's name when a size is just that symbol."""
    monomial, coefficient = rows.terms[0]
    if len(rows.terms) != 1 or coefficient != 1 or len(monomial) != 1:
        return None
    atom, power = monomial[0]
    return atom.name if isinstance(atom, Symbol) and power == 1 else None


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


@RULES.lower(Linear, GatedLinear, priority=20, needs=VECTOR)
def linear_quantized(op: Op, context: Context) -> Lowered | str:
    """Integer dot products of group-quantized weights and int8 activations."""
    assert isinstance(op, (Linear, GatedLinear))
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
    n, k = op.w.shape
    assert isinstance(n, int) and isinstance(k, int)
    symmetric = bool(getattr(encoding, "symmetric", True))
    plan = quantized_linear_plan(
        context.machine,
        n=n,
        k=k,
        bits=bits,
        group=group,
        symmetric=symmetric,
        **epilogue,  # type: ignore[arg-type]
    )
    parts = rounded_parts(op.x, group, context)
    lowered = plan_calls(op, plan, dict(parts), context)
    return Lowered(lowered.calls, reads=(op.x,))


@RULES.lower(Linear, GatedLinear, priority=10, needs=VECTOR)
def linear_float(op: Op, context: Context) -> Lowered | str:
    """f32 multiply-adds; weights in f32, f16 or bf16, or dequantized in registers."""
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
        plan = float_linear_plan(context.machine, n=n, k=k, dtype=op.w.dtype, **epilogue)  # type: ignore[arg-type]
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
    return plan_calls(op, plan, {"x": op.x}, context)
