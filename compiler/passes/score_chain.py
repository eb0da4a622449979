"""The way from the products q k to the softmax's operand, taken apart op by op.

The ops between the two work element by element, so that a score is a function of one product and of those ops' other
operands. `take_apart` follows that function as an equation: scale * product + bias, softcap * tanh(product / cap),
and choices between a score and a number that no product decides. Any other op is refused by its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import (
    Activation,
    Add,
    And,
    Binary,
    Cast,
    Compare,
    Div,
    Maximum,
    Minimum,
    Mul,
    Neg,
    Not,
    Sub,
    Tanh,
    Unary,
    Where,
    constant,
)
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Matmul, Reshape
from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Shape
from llmc.compiler.passes.masks import HIDDEN, Unrecognised
from llmc.compiler.passes.rewriting import holds, number_of, shaped

STEPS = (Unary, Binary, Compare, Where, Cast, Activation, Reshape)  # a score depends on one product only
LOWEST = float(np.finfo(np.float32).min)
_ABSORBS = -1e30  # added to any score below this, in f32, the score is lost: all such keys are alike


@dataclass(frozen=True)
class Chain:
    """From the products `raw` to the scores: the ops that depend on raw, in order, and their operands that do not."""

    raw: Matmul
    scores: Value
    steps: tuple[Op, ...]
    other_operands: tuple[Value, ...]


@dataclass(frozen=True)
class Apart:
    """Scores as softcap * tanh(scale * factor * product / softcap) + bias; softcap 0 means scale * factor * product.

    factor: what broadcasts to the products; None: 1. chosen: a bool that broadcasts to the scores; where it does not
    hold the product counts for nothing and the score is the bias alone, one of `fills` (None: it is no number); None:
    it always holds. The bias broadcasts to the scores. masked: whether a value that is no number was added to it.
    """

    scale: float
    bias: Value
    softcap: float = 0.0
    factor: Value | None = None
    chosen: Value | None = None
    fills: tuple[float | None, ...] = ()
    masked: bool = False


def chain_of(graph: Graph, raw: Matmul, scores: Value) -> Chain:
    """The ops between `raw` and `scores`; all of them are in STEPS."""
    between = _between(raw, scores)
    steps = tuple(op for op in graph.ops if op in between)
    inside = {raw, *steps}
    others = dict.fromkeys(value for op in steps for value in op.operands if value not in inside)
    return Chain(raw, scores, steps, tuple(others))


def _between(raw: Value, scores: Value) -> set[Value]:
    depends: dict[Value, bool] = {raw: True}
    stack = [scores]
    while stack:
        value = stack[-1]
        if value in depends:
            stack.pop()
            continue
        operands = value.operands if isinstance(value, STEPS) else ()
        missing = [operand for operand in operands if operand not in depends]
        if missing:
            stack.extend(missing)
            continue
        depends[value] = any(depends[operand] for operand in operands)
        stack.pop()
    return {value for value, does in depends.items() if does and value is not raw}


def take_apart(chain: Chain) -> Apart:
    """The scores as an equation; Unrecognised names the op that makes them anything else."""
    parts: dict[Value, Apart] = {chain.raw: Apart(1.0, constant(0.0, chain.raw.dtype))}
    for op in chain.steps:
        parts[op] = _after(op, parts, chain.raw)
    return parts[chain.scores]


def _after(op: Op, parts: dict[Value, Apart], raw: Matmul) -> Apart:
    """The scores behind one more op."""
    if isinstance(op, Reshape):
        return _reshaped_parts(parts[op.x], op)
    if isinstance(op, Cast) and op.to in FLOATS:
        part = parts[op.x]
        if not holds(op.to, raw.dtype):
            raise Unrecognised(f"its scores, products in {raw.dtype}, are rounded to {op.to}")
        factor = None if part.factor is None else Cast(part.factor, op.to)
        return replace(part, bias=Cast(part.bias, op.to), factor=factor)
    if isinstance(op, Neg):
        return _times(parts[op.x], op, -1.0)
    if isinstance(op, Tanh) or (isinstance(op, Activation) and op.kind == "tanh"):
        part = parts[op.x]
        if part.softcap or number_of(part.bias) != 0 or part.chosen is not None:
            raise Unrecognised(f"{op.name} acts on scores that are capped or masked already")
        return replace(part, softcap=1.0)
    if isinstance(op, Where):
        return _where(op, parts)
    if isinstance(op, (Add, Sub, Mul, Div, Maximum, Minimum)):
        return _binary(op, parts)
    if isinstance(op, Compare):
        raise Unrecognised(f"{op.name} compares its scores, so that they decide themselves what counts")
    raise Unrecognised(f"its scores pass through {op.name}, which is neither scale, softcap nor mask")


def _binary(op: Binary, parts: dict[Value, Apart]) -> Apart:
    if op.a in parts and op.b in parts:
        raise Unrecognised(f"its scores meet themselves in {op.name}, which is neither scale, softcap nor mask")
    part, other, turned = (parts[op.a], op.b, False) if op.a in parts else (parts[op.b], op.a, True)
    if isinstance(op, (Add, Sub)):
        sign = -1.0 if isinstance(op, Sub) and turned else 1.0
        added: Value = type(op)(other, part.bias) if turned else type(op)(part.bias, other)
        number = number_of(other)
        more = None if number is None else (-1.0 if isinstance(op, Sub) and not turned else 1.0) * float(number)
        fills = tuple(None if f is None else sign * f + (more or 0.0) for f in part.fills)
        return replace(part, scale=sign * part.scale, bias=added, fills=fills, masked=part.masked or more is None)
    if isinstance(op, (Maximum, Minimum)):
        return _bounded(op, part, other)
    if isinstance(op, Div) and turned:
        raise Unrecognised(f"its scores divide in {op.name}, which is neither scale, softcap nor mask")
    number = number_of(other)
    if number is not None:
        return _times(part, op, 1 / float(number) if isinstance(op, Div) and number else float(number))
    if part.softcap:
        raise Unrecognised(f"capped scores are scaled by {op.name} from place to place")
    bias = part.bias if number_of(part.bias) == 0 else type(op)(part.bias, other)
    factor = Div(constant(1.0, other.dtype), other) if isinstance(op, Div) else other
    return replace(
        part, factor=factor if part.factor is None else Mul(part.factor, factor), bias=bias,
        fills=tuple(None for _ in part.fills),
    )  # fmt: skip


def _times(part: Apart, op: Op, number: float) -> Apart:
    """Scores times a number."""
    if not math.isfinite(number) or not number:
        raise Unrecognised(f"its scores are scaled by {number:g} in {op.name}")
    like = part.bias.dtype
    bias = part.bias if number_of(part.bias) == 0 else Mul(part.bias, constant(number, like))
    fills = tuple(None if f is None else f * number for f in part.fills)
    if not part.softcap:
        return replace(part, scale=part.scale * number, bias=bias, fills=fills)
    # softcap * tanh(scale * product / softcap): both grow, and tanh is odd.
    return replace(part, scale=part.scale * number, softcap=abs(part.softcap * number), bias=bias, fills=fills)


def _bounded(op: Maximum | Minimum, part: Apart, other: Value) -> Apart:
    """Bounds that only an infinite score is beyond: the least (greatest) number of the scores' dtype."""
    number = number_of(other)
    limits = np.finfo(NUMPY_DTYPES[op.dtype]) if op.dtype in ("f16", "f32", "f64") else np.finfo(np.float32)
    edge = float(limits.min if isinstance(op, Maximum) else limits.max) * 0.99  # bf16's are a little smaller
    beyond = number is not None and (number <= edge if isinstance(op, Maximum) else number >= edge)
    if not beyond:
        raise Unrecognised(f"its scores are bounded by {op.name}, which is neither scale, softcap nor mask")
    if isinstance(op, Minimum):
        return part
    assert number is not None
    fills = tuple(None if f is None else max(f, float(number)) for f in part.fills)
    return replace(part, bias=Maximum(part.bias, other), fills=fills)


def _where(op: Where, parts: dict[Value, Apart]) -> Apart:
    assert op.condition not in parts, "every op that makes a condition of scores is refused"
    if op.a in parts and op.b in parts:
        raise Unrecognised(f"its scores meet themselves in {op.name}, which is neither scale, softcap nor mask")
    part = parts[op.a] if op.a in parts else parts[op.b]
    fill = op.b if op.a in parts else op.a
    chosen = op.condition if op.a in parts else Not(op.condition)
    bias = Where(op.condition, part.bias, fill) if op.a in parts else Where(op.condition, fill, part.bias)
    number = number_of(fill)
    return replace(
        part,
        bias=bias,
        chosen=chosen if part.chosen is None else And(part.chosen, chosen),
        fills=(*part.fills, None if number is None else float(number)),
    )


def _reshaped_parts(part: Apart, op: Reshape) -> Apart:
    def moved(value: Value) -> Value:
        return reshaped(value, op.x.shape, op.to)

    return replace(
        part,
        bias=moved(part.bias),
        factor=None if part.factor is None else moved(part.factor),
        chosen=None if part.chosen is None else moved(part.chosen),
    )


def general_bias(part: Apart, exact_shift: bool) -> Value:
    """A bias to add to the scaled products that gives the same probabilities; Unrecognised where there is none.

    exact_shift: what is added to all keys of a query counts (attention with sinks).

    Where a choice puts a number in place of a score, the bias is that number, and the product is added to it: right
    where that number hides the key, and in a row that hides every key where all products are lost beside it.
    """
    if part.chosen is None:
        return part.bias
    for fill in part.fills:
        if fill is None or math.isnan(fill) or fill > HIDDEN:
            what = "what is no one number" if fill is None else f"{fill:g}"
            raise Unrecognised(f"{Where.name} puts {what} in place of some scores, which does not hide them")
    finite = {fill for fill in part.fills if math.isfinite(fill)}  # type: ignore[arg-type]
    if all(fill <= _ABSORBS for fill in finite):  # type: ignore[operator]
        return part.bias
    if exact_shift or part.masked or len(finite) > 1 or len(finite) < len(set(part.fills)):
        raise Unrecognised(
            f"{Where.name} hides scores by {max(finite):g} and something else is added to them as well, "  # type: ignore[type-var]
            "so that a query which sees no key cannot be told"
        )
    return Where(part.chosen, constant(0.0, "f32"), constant(LOWEST, "f32"))


def reshaped(x: Value, full: Shape, to: Shape) -> Value:
    """`x`, which broadcasts to `full`, so that it broadcasts to what `full` is reshaped to."""
    if product(x.shape) == 1:
        return Reshape(x, ()) if x.rank else x
    shape = (*(1,) * (len(full) - x.rank), *x.shape)
    # The last axes stay as they are, and those in front are split or merged: that does not matter where x has none.
    kept = 0
    while kept < min(len(full), len(to)) and full[len(full) - 1 - kept] == to[len(to) - 1 - kept]:
        kept += 1
    if all(dim == 1 for dim in shape[: len(shape) - kept]):
        return Reshape(x, (*(1,) * (len(to) - kept), *shape[len(shape) - kept :]))
    return Reshape(shaped(x, full), to)


def fitted(bias: Value, leading: Shape, to: Shape, rows: Shape) -> Value:
    """A bias that broadcasts to [*leading, *rows], so that it broadcasts to [*to, *rows] (leading axes reshaped)."""
    if leading == to or product(bias.shape) == 1:
        return bias if bias.rank <= len(to) + 2 else Reshape(bias, ())
    full = (*leading, *rows)
    return reshaped(bias, full, (*to, *rows))
