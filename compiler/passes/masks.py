"""What attention scores mean: scale, softcap, causal or not, window and ALiBi, read off their values.

Exporters build masks in endless ways; their values are few. A function from raw products q k to the softmax's operand
is evaluated at a few positions and compared with what `llm.attention` can say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Activation, Binary, Cast, Compare, Unary, Where
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Iota, Reshape, Transpose
from llmc.compiler.ir.types import INTEGERS, Array, numpy_dtype
from llmc.compiler.passes.probe import LENGTH, NOT_TOKENS, Probe
from llmc.errors import IRError

HIDDEN = -5e3  # a bias below this hides a key: sources write -1e4, the least float or -inf
FEW = 7  # positions that are always probed: 0, 1, ..., FEW - 1
_TOLERANCE = 1e-9
_LONGEST = 4096  # positions that a mask with tables is evaluated for, at most
_MOST_POSITIONS = 64  # of those, how many are looked at
_IDS = frozenset(("ids",))
_ELEMENTWISE = (Unary, Binary, Compare, Where, Cast, Activation)

Floats = NDArray[np.float64]


class Unrecognised(Exception):
    """Scores that `llm.attention` cannot express; the text says which, with the first example."""


@dataclass(frozen=True)
class Mask:
    """A mask [heads, queries, keys]: a query at p sees keys up to p (causal), the last `window` of them (0: all).

    Not causal: it sees all keys, or those less than `window` away on both sides.

    `slopes` [heads] add slope * key position (ALiBi, Press et al. 2022), up to a constant a row, which softmax ignores.
    """

    causal: bool
    window: int
    slopes: tuple[float, ...] | None


@dataclass(frozen=True)
class Scores:
    """softcap * tanh(scale * raw / softcap) + mask; softcap 0 means scale * raw."""

    scale: float
    softcap: float
    mask: Mask


def describe_scores(probe: Probe, raw: Value, scores: Value, exact_shift: bool = False) -> Scores:
    """What `scores` is as a function of `raw`, both [..., S, S] with as many leading elements.

    exact_shift: a constant a row counts as well (attention with sinks). Unrecognised when it is something else.
    """
    positions, known = _sample(probe, raw, scores)
    count = len(positions)
    shape = (*probe.shape(raw, count)[:-2], count, count)
    heads = math.prod(shape[:-2])

    def apply(values: Floats | float) -> Floats:
        full = np.broadcast_to(np.asarray(values, np.float64), (heads, count, count)).reshape(shape)
        with np.errstate(all="ignore"):
            try:
                found = probe.evaluate([scores], count, positions, {**known, raw: full})[0]
            except IRError as error:
                raise Unrecognised(f"its mask cannot be evaluated: {error}") from None
        if np.isnan(found).any():
            raise Unrecognised("its mask makes scores that are not a number")
        return np.asarray(found, np.float64).reshape(heads, count, count)

    bias = apply(0.0)
    mask = describe_mask(bias, np.asarray(positions), exact_shift)
    return Scores(*fit_scores(apply, bias), mask)


def fit_scores(apply: Callable[[Floats | float], Floats], bias: Floats) -> tuple[float, float]:
    """Scale and softcap of scores that `apply` computes from products, element by element; `bias` is apply(0).

    Unrecognised where they are not softcap * tanh(scale * product / softcap) + bias for all products and places.
    """
    seen = bias > HIDDEN
    one, hundred, huge = (apply(value)[seen] - bias[seen] for value in (1.0, 100.0, 1e9))
    if one.size == 0 or np.ptp(one) > _TOLERANCE * np.abs(one).max() or one[0] == 0:
        raise Unrecognised("its scale differs from place to place")
    softcap = 0.0
    scale = float(one[0])
    if not np.allclose(hundred, 100 * scale, rtol=1e-6):
        softcap = float(huge[0])
        scale = float(softcap * np.arctanh(one[0] / softcap)) if abs(one[0]) < abs(softcap) else 0.0
    random = np.random.default_rng(0).uniform(-2, 2, bias.shape) * (abs(softcap) or 1.0) / (abs(scale) or 1.0)
    expected = scale * random
    if softcap:
        expected = softcap * np.tanh(expected / softcap)
    found = apply(random)
    limit = _TOLERANCE * max(1.0, abs(softcap))
    if not np.allclose(found[seen] - bias[seen], expected[seen], rtol=_TOLERANCE, atol=limit):
        raise Unrecognised("its scores are neither scaled nor capped by softcap * tanh(score / softcap)")
    if (found[~seen] > HIDDEN).any():
        raise Unrecognised("what it hides depends on the scores")
    return _snapped(scale), _snapped(softcap)


def describe_mask(
    bias: Floats,
    positions: NDArray[np.int64],
    exact_shift: bool = False,
    keys: NDArray[np.int64] | None = None,
) -> Mask:
    """What an additive mask [heads, Q, K] means; Unrecognised with the first difference.

    The queries are at sorted `positions` [Q], and so are the keys unless they are at other positions, `keys` [K].
    """
    seen = bias > HIDDEN
    heads = seen.shape[0]
    if (seen != seen[:1]).any():
        head, query, key = np.argwhere(seen != seen[:1])[0]
        raise Unrecognised(f"head {head} and head 0 differ in whether query {query} sees key {key}")
    at = positions if keys is None else keys
    causal, window = describe_visible(seen[0], positions, at)
    slopes = np.asarray([_slope(bias[h], seen[h], positions, at, exact_shift, h) for h in range(heads)])
    return Mask(causal, window, tuple(_snapped(s) for s in slopes.tolist()) if slopes.any() else None)


def describe_visible(seen: NDArray[np.bool_], queries: NDArray[np.int64], keys: NDArray[np.int64]) -> tuple[bool, int]:
    """Whether what queries at positions [Q] see of keys at positions [K] is causal, and the window (0: all)."""
    if seen.all():
        return False, 0
    distance = queries[:, None] - keys[None, :]
    ahead = bool((seen & (distance < 0)).any())
    candidates = np.ones_like(seen) if ahead else distance >= 0
    apart = np.abs(distance)
    inside, outside = apart[seen & candidates], apart[~seen & candidates]
    nearest = int(outside.min()) if outside.size else 0
    furthest = int(inside.max()) if inside.size else -1
    expected = candidates & ((apart < nearest) if nearest else True)
    if (expected != seen).any():
        query, key = np.argwhere(seen & (distance < 0) if ahead else expected != seen)[0]
        verb = "sees" if seen[query, key] else "does not see"
        kind = "neither a window on both sides nor causal" if ahead else "not causal"
        kind += f" with a window of {nearest}" if nearest and not ahead else ""
        raise Unrecognised(f"the mask is {kind}: the query at {queries[query]} {verb} the key at {keys[key]}")
    if nearest and furthest + 1 != nearest:
        raise Unrecognised(f"its window is more than {furthest} and at most {nearest}, but which is not clear")
    return not ahead, nearest


def _slope(
    bias: Floats,
    seen: NDArray[np.bool_],
    positions: NDArray[np.int64],
    keys: NDArray[np.int64],
    exact_shift: bool,
    head: int,
) -> float:
    """The number that one head adds per position of the key."""
    if not seen.any(axis=1).all():
        raise Unrecognised(f"the query at {positions[np.flatnonzero(~seen.any(axis=1))[0]]} sees no key")
    columns = np.flatnonzero(seen[-1])
    last = bias[-1, columns]
    first, end = columns[0], columns[-1]
    slope = float((last[-1] - last[0]) / (keys[end] - keys[first])) if end > first else 0.0
    rest = bias - slope * keys[None, :]
    shift = -slope * positions if exact_shift else np.asarray([row[s][0] for row, s in zip(rest, seen, strict=True)])
    limit = _TOLERANCE * (1 + abs(slope) * float(keys[-1]))
    wrong = np.argwhere(seen & (np.abs(rest - shift[:, None]) > limit))
    if len(wrong):
        query, key = wrong[0]
        raise Unrecognised(
            f"head {head} adds {bias[query, key]:.6g} for the query at {positions[query]} and the key at "
            f"{keys[key]}, which is no slope times a distance"
        )
    return slope


def _snapped(value: float) -> float:
    """The f32 number that `value` is but for rounding, or `value`."""
    near = float(np.float32(value))
    return near if abs(near - value) <= 1e-12 * abs(value) else value


def _sample(probe: Probe, raw: Value, scores: Value) -> tuple[list[int], dict[Value, Array]]:
    """Positions to probe, and values at those positions for what counts them.

    A mask that is computed element by element from 0, 1, ... is evaluated at far positions without those between; each
    integer in it may be a window. Any other mask (a stored triangle, a running sum) is evaluated at 0, 1, ... to the
    end of its tables and past such integers, and looked at where what it hides changes.
    """
    mask_ops, frontier = _positional_ops(probe, raw, scores)
    constants = [op for op in mask_ops if probe.is_constant(op)]
    windows = sorted(n for n in _integers(probe, constants) if FEW - 2 <= n <= 1 << 20)
    counters = [op for op in mask_ops if isinstance(op, Iota) and op not in constants]
    layout = (Iota, Reshape, Broadcast, Transpose, *_ELEMENTWISE)
    if all(isinstance(op, layout) or op in constants for op in mask_ops) and all(
        c.size == probe.size for c in counters
    ):
        positions = sorted({*range(FEW), *(n + step for n in windows for step in (-2, -1, 0, 1, 2))})
        return positions, {op: np.asarray(positions, numpy_dtype(op.dtype)) for op in counters}

    tables = [dim for value in constants for dim in value.shape if isinstance(dim, int)]
    longest = max([FEW, *tables, *(n + 3 for n in windows)])
    size = min([longest, *(s.high for s in probe.graph.symbols if s.high is not None)])
    if size > _LONGEST:
        raise Unrecognised(f"its mask would have to be evaluated for {size} positions; {_LONGEST} are the most")
    try:
        values = probe.evaluate(frontier, size)
    except IRError as error:
        raise Unrecognised(f"its mask cannot be evaluated: {error}") from None
    changes: set[int] = set()
    for value, array in zip(frontier, values, strict=True):
        if value.shape and value.shape[-1] == probe.size:
            row = array[..., -1, :] if value.rank > 1 else array
            hidden = row if row.dtype == np.bool_ else np.asarray(row, np.float64) < HIDDEN
            changes |= {int(i) for i in np.argwhere(np.diff(hidden, axis=-1))[:, -1]}
    around = {p + step for p in changes for step in (-1, 0, 1, 2)}
    positions = sorted(p for p in {*range(FEW), *range(size - 3, size), *around} if 0 <= p < size)
    if len(positions) > _MOST_POSITIONS:
        raise Unrecognised(f"what its mask hides from the last query changes at {len(changes)} places")
    known = {}
    for value, array in zip(frontier, values, strict=True):
        for axis, dim in enumerate(value.shape):
            if dim == probe.size:
                array = np.take(array, positions, axis=axis)
        known[value] = array
    return positions, known


def _positional_ops(probe: Probe, raw: Value, scores: Value) -> tuple[list[Op], list[Value]]:
    """The ops that `scores` needs besides `raw` and that no token decides; and those that meet the raw scores."""
    found: list[Op] = []
    frontier: dict[Value, None] = {}
    seen: set[Value] = {raw}
    stack = [scores]
    while stack:
        value = stack.pop()
        if value in seen or not isinstance(value, Op):
            continue
        seen.add(value)
        stack.extend(value.operands)
        if not probe.sources[value] - NOT_TOKENS:
            found.append(value)
            continue
        frontier.update(
            dict.fromkeys(v for v in value.operands if v is not raw and not probe.sources.get(v, _IDS) - NOT_TOKENS)
        )
    return found, list(frontier)


def _integers(probe: Probe, constants: list[Op]) -> set[int]:
    """Whole numbers among the scalars of a mask."""
    found: set[int] = set()
    for op in constants:
        if product(op.shape) != 1 or probe.sources[op] - {LENGTH}:
            continue
        number = abs(float(probe.evaluate([op], 1)[0].reshape(-1)[0]))
        # Whole floats beyond are what sources fill hidden scores with.
        if number < 1 << 40 and (op.dtype in INTEGERS or (number.is_integer() and number < -HIDDEN)):
            found.add(int(number))
    return found
