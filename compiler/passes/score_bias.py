"""What is added to attention scores, as a value: for masks and biases that are no function of positions alone.

Between the product q k and the softmax stand ops that work element by element, so that one score is a function of one
product and of the values that meet it there. That function is evaluated at random numbers, whatever those values may
be; where it is softcap * tanh(scale * product / softcap) plus something, that something is the function at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Activation, Binary, Cast, Compare, Unary, Where, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Matmul, Reshape
from llmc.compiler.ir.types import INTEGERS, Array, Shape, precise
from llmc.compiler.passes.masks import HIDDEN, Floats, Unrecognised, fit_scores
from llmc.compiler.passes.rewriting import number_of, shaped

STEPS = (Unary, Binary, Compare, Where, Cast, Activation, Reshape)  # a score depends on one product only
_SAMPLES = 512


@dataclass(frozen=True)
class Chain:
    """From the products `raw` to the scores: the ops that depend on raw, in order, and the values that meet them."""

    raw: Matmul
    scores: Value
    steps: tuple[Op, ...]
    met: tuple[Value, ...]


def chain_of(graph: Graph, raw: Matmul, scores: Value) -> Chain:
    """The ops between `raw` and `scores`; all of them are in STEPS."""
    between = _between(raw, scores)
    steps = tuple(op for op in graph.ops if op in between)
    inside = {raw, *steps}
    met = dict.fromkeys(value for op in steps for value in op.operands if value not in inside)
    return Chain(raw, scores, steps, tuple(met))


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


def scale_and_softcap(chain: Chain) -> tuple[float, float]:
    """What the scores are besides something that is added; Unrecognised where they are anything else."""
    for hiding in (False, True):
        generator = np.random.default_rng(0)
        met = {value: _samples(value, generator, hiding) for value in chain.met}

        def apply(values: Floats | float, met: dict[Value, Array] = met) -> Floats:
            return _pointwise(chain, np.broadcast_to(np.asarray(values, np.float64), (_SAMPLES,)), met)

        found = fit_scores(apply, apply(0.0))
    return found


def _samples(value: Value, generator: np.random.Generator, hiding: bool) -> Array:
    """What a value may be at _SAMPLES places; hiding: -inf, too."""
    number = number_of(value)
    if number is not None:
        return np.full(_SAMPLES, number)
    if value.dtype == "bool":
        return np.arange(_SAMPLES) % 2 == 0 if generator.random() < 0.5 else generator.random(_SAMPLES) < 0.5
    if value.dtype in INTEGERS:
        return generator.integers(0, 3, _SAMPLES)
    numbers = 3 * generator.standard_normal(_SAMPLES)
    return np.where(generator.random(_SAMPLES) < 0.2, -np.inf, numbers) if hiding else numbers


def _pointwise(chain: Chain, raw: Floats, met: dict[Value, Array]) -> Floats:
    """The scores of some products, where each of them meets one element of every value."""
    values: dict[Value, Array] = {chain.raw: raw, **met}
    with precise(), np.errstate(all="ignore"):
        for op in chain.steps:
            if isinstance(op, Reshape):
                values[op] = values[op.x]
            else:
                values[op] = np.asarray(op.evaluate(*(values[operand] for operand in op.operands)))
    found = np.asarray(values[chain.scores], np.float64)
    if np.isnan(found).any():
        raise Unrecognised("its mask makes scores that are not a number")
    return found


def added(chain: Chain) -> Value:
    """The scores for products of 0, in as few elements as the values that meet them have."""
    zeros: dict[Value, Value] = {chain.raw: constant(0.0, chain.raw.dtype)}
    for op in chain.steps:
        if isinstance(op, Reshape):
            zeros[op] = _reshaped(zeros[op.x], op.x.shape, op.to)
        else:
            zeros[op] = op.map_operands(lambda value: zeros.get(value, value))
    return zeros[chain.scores]


def _reshaped(x: Value, full: Shape, to: Shape) -> Value:
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
    return _reshaped(bias, full, (*to, *rows))


def hides_nothing(bias: Floats) -> bool:
    """Whether a bias [..., Q, K] adds the same to all keys of a query, which a softmax does not see."""
    return bool(np.isfinite(bias).all() and (bias > HIDDEN).all() and (bias == bias[..., :1]).all())
