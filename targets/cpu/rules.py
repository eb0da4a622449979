"""Which kernels serve which op; plain.py has the rules at priority 0."""

from __future__ import annotations

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.llm import GatedLinear, LayerNorm, Linear, QuantizeActivations, RMSNorm
from llmc.compiler.ir.op import Op, Value
from llmc.targets.cpu import (  # noqa: F401  (registers their rules)
    attention_rules,
    checked_index,
    embedding_rules,
    functions,
    linear_rules,
    low_rank_rules,
    pooling,
)
from llmc.targets.cpu.linear_rules import refuses_integers, rows_of
from llmc.targets.cpu.norms import Norm, NormProblem
from llmc.targets.cpu.plain import RULES as RULES
from llmc.targets.cpu.vector_isa import missing_vectors
from llmc.targets.kernel import Call
from llmc.targets.lowering import Context, Lowered


def features_of(value: Value) -> int:
    """Columns of a value seen as a matrix; they are always known when compiling."""
    size = value.shape[-1]
    assert isinstance(size, int)
    return size


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


@RULES.lower(QuantizeActivations, priority=10, needs=missing_vectors)
def round_rows(op: Op, context: Context) -> Lowered | str:
    """A row at a time, in the forms that are read; a norm in front that nobody else reads is computed on the way."""
    assert isinstance(op, QuantizeActivations)
    for user in context.graph.users.get(op, ()):
        if user not in context.agreement.statements:
            linear = isinstance(user, (Linear, GatedLinear))
            why = refuses_integers(user, context) if linear else "no linear op"  # type: ignore[arg-type]
            return f"{user.name} cannot read rounded activations: {why}"
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
    calls = []
    for writing in context.agreement.writes_of(op):
        made = writing.form.writer(context, **params)
        args = (x, *extra, *context.buffers(op, writing.form).values())
        calls.append(Call(made.kernel, args, rows_of(op), made.grain, writing.when, note=f"[{size}]"))
    return Lowered(tuple(calls), reads=(x,))
