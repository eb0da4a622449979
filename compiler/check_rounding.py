"""Whether an inexact pass rounds as its encodings say: every weight element by element, and how activations round.

An encoding bounds the error of each element: a 4-bit weight is at most half a step of its group away from the model's
own, f16 has 11 bits, an activation is a multiple of max|x| / 127. What a pass rounded is found by walking the graphs
before and after it side by side; the bounds are checked against the weights themselves, by formulas of its own. Then
the roundings are undone, and the rest must compute exactly what the graph did before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.encodings.grouped import GroupQuantized
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.evaluate import Data, LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph, substitute_values, topological
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.llm import GatedLinear, Linear
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Array, Tensor, precise
from llmc.compiler.passes.manager import Pass
from llmc.errors import CompileError

# The largest relative rounding errors of dtypes, round to nearest: half a step of the last of 11, 8, 24 or 53 bits.
_HALF_ULP = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24, "f64": 2.0**-53}
_LEAST_F16 = 2.0**-25  # half the smallest number that f16 has
_BLOCK = 1 << 22  # weights compared at a time


@dataclass(frozen=True)
class Unrounded:
    """A graph after a pass with its roundings undone, how far it may be from the one before (relative to the largest
    value of an output), and what was compared, in words."""

    graph: Graph
    tolerance: float = 0.0
    compared: tuple[str, ...] = ()


@dataclass
class _Pairs:
    """Values that take each other's place in two graphs: weights, and linear ops whose rounding differs.

    replaced: values that were rewritten into something of another form.
    """

    constants: frozenset[Value]
    weights: dict[Value, Value] = field(default_factory=dict)  # by what is there after
    linears: dict[Value, Linear | GatedLinear] = field(default_factory=dict)
    replaced: list[Value] = field(default_factory=list)

    def walk(self, before: Graph, after: Graph) -> None:
        stack = [(a, b) for (_, a), (_, b) in zip(before.outputs, after.outputs, strict=True)]
        seen: set[tuple[Value, Value]] = set()
        while stack:
            a, b = stack.pop()
            if a is b or (a, b) in seen:
                continue
            seen.add((a, b))
            if b in self.constants and a in before.constants and not _same_kind(a, b):
                self.weights[b] = a
            elif not isinstance(a, Op) or not isinstance(b, Op) or not _same_kind(a, b):
                self.replaced.append(b)
            else:
                if isinstance(b, (Linear, GatedLinear)) and b.rounding != a.rounding:  # type: ignore[attr-defined]
                    assert isinstance(a, (Linear, GatedLinear))
                    self.linears[b] = a
                stack += zip(a.operands, b.operands, strict=True)


def _same_kind(a: Value, b: Value) -> bool:
    if type(a) is not type(b) or not isinstance(a, Op) or not isinstance(b, Op):
        return False
    skipped = ("rounding",)
    mine = {key: value for key, value in a.attributes().items() if key not in skipped}
    same = all(b.attributes()[key] == value for key, value in mine.items())
    return same and len(a.operands) == len(b.operands)


def check_rounding(item: Pass, before: Graph, after: Graph, load: LoadParam, known: Mapping[Value, Data]) -> Unrounded:
    """Compares what the pass rounded with the bounds of the encodings; CompileError names pass, weight and bound.

    known: quantized weights that are evaluated already.
    """
    pairs = _Pairs(after.constants)
    pairs.walk(before, after)
    with precise():
        for b, a in pairs.weights.items():
            _check_weight(item, a, b, load, known)
    for b in pairs.linears:
        assert isinstance(b, (Linear, GatedLinear))
        _check_activations(item, b)

    def undo(op: Op) -> Value | None:
        return op.replace(rounding="f32") if isinstance(op, (Linear, GatedLinear)) and op.rounding != "f32" else None

    mapping = {b: a if a.dtype == b.dtype else Cast(a, b.dtype) for b, a in pairs.weights.items()}
    graph = substitute_values(after, mapping, undo if pairs.linears else None)
    if pairs.linears and any(a.rounding != "f32" for a in pairs.linears.values()):
        raise CompileError(f"pass {item} changed a rounding that was there: nothing says how far that may go")
    names = [_encoding_name(b) for b in pairs.weights if _encoding_name(b) not in ("f32", "f64")]
    compared = []
    if names:
        encodings = ", ".join(sorted(set(names)))
        compared.append(f"{item.name}: {len(names)} weight{'s' * (len(names) > 1)} element by element ({encodings})")
    if pairs.linears:
        kinds = sorted({b.rounding for b in pairs.linears})  # type: ignore[attr-defined]
        compared.append(f"{item.name}: activations of {len(pairs.linears)} linear ops ({', '.join(kinds)})")
    return Unrounded(graph, item.moves if pairs.replaced else 0.0, tuple(compared))


def _encoding_name(value: Value) -> str:
    kind = value.tensor
    return kind.dtype if kind.encoding is None else kind.encoding.name


def _name(value: Value) -> str:
    names = [item.name for item in topological([value]) if isinstance(item, Param)]
    return " + ".join(names[:2]) if names else "a constant"


def _check_weight(item: Pass, before: Value, after: Value, load: LoadParam, known: Mapping[Value, Data]) -> None:
    """One weight against what it was rounded from."""
    original = np.asarray(evaluate_values([before], {}, load, {})["0"])
    found = known[after] if after in known else _as_stored(after, load)
    what = f"pass {item}: weight {_name(after)}, stored as {_encoding_name(after)},"
    if not isinstance(found, Encoded):
        bound = np.abs(original) * _HALF_ULP.get(after.dtype, 0.0) * (1 + 2.0**-8) + _smallest(after.dtype)
        _require(what, original, np.asarray(found).astype(np.float64), bound)
        return
    kind = found.encoding
    assert isinstance(kind, GroupQuantized)
    groups = kind.scales(original.shape[-1])
    scales = found.parts["scales"]
    if found.shape != original.shape or scales.shape != (*original.shape[:-1], groups):
        raise CompileError(
            f"{what} has scales {list(scales.shape)} for values {list(original.shape)} in groups of {kind.group}"
        )
    rows = original.reshape(-1, original.shape[-1])
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        piece = Encoded(
            kind, rows[part].shape, {name: data.reshape(len(rows), -1)[part] for name, data in found.parts.items()}
        )
        values = piece.decode()
        if isinstance(_root(after), PackGroups):
            _require(what, rows[part], values, _kept_bound(piece, rows[part]))
        else:
            _require_quantized(what, rows[part], values, piece)


def _root(value: Value) -> Value:
    while isinstance(value, Cast):
        value = value.x
    return value


def _as_stored(value: Value, load: LoadParam) -> Data:
    """A weight as an artifact has it: rounded to its dtype, which f64 evaluation does not do."""
    data = evaluate_values([value], {}, load, {})["0"]
    if isinstance(data, Encoded) or not isinstance(value.type, Tensor):
        return data
    narrow = NUMPY_DTYPES[value.dtype]
    return np.asarray(data).astype(narrow)


def _smallest(dtype: str) -> float:
    return _LEAST_F16 if dtype == "f16" else 1e-40 if dtype in FLOATS else 0.0


def _require(what: str, original: Array, found: Array, bound: Array) -> None:
    error = np.abs(found - original)
    wrong = ~(error <= bound)
    if wrong.any():
        at = np.unravel_index(int(np.argmax(np.where(wrong, error, -1))), error.shape)
        raise CompileError(
            f"{what} is {float(found[at]):.6g} at {[int(i) for i in at]} where the model has "
            f"{float(original[at]):.6g}: off by {float(error[at]):.3g}, and the encoding allows {float(bound[at]):.3g}"
        )


def _per_element(values: Array, group: int, size: int) -> Array:
    """[rows, groups] -> [rows, size]."""
    return np.repeat(values.astype(np.float64), group, axis=1)[:, :size]


def _reduced(rows: Array, group: int, function: np.ufunc) -> Array:
    """A reduction of every group of a row: [rows, groups]; a short last group is reduced as it is."""
    return np.asarray(function.reduceat(rows, np.arange(0, rows.shape[1], group), axis=1))


def _require_quantized(what: str, rows: Array, values: Array, encoded: Encoded) -> None:
    """Weights that were rounded by groups: each to the integer nearest by the scale that was chosen, or to the last one
    there is; and no group worse than with the scale that just covers it.

    The nearest: within half a step (the chosen scale, times the gap of its level). Saturated ones: a search may choose
    a scale of extreme / 8.85 where 4 bits end at 7, which leaves 1.85 / 8.85 of the extreme, or 1.5 covering steps, and
    the scale that fits best may be a little smaller: within two. The mean square over a group: half a covering step at
    most, which plain rounding never exceeds.
    """
    kind = encoded.encoding
    assert isinstance(kind, GroupQuantized)
    size, q = rows.shape[1], encoded.parts["q"].astype(np.float64)
    group = kind.scaled(size)
    scale = _per_element(np.abs(encoded.parts["scales"]), group, size)
    levels = kind.levels
    gap, ends = levels.gaps(q), np.array([levels.lowest, levels.highest], np.float64)
    widest = levels.gaps(ends).max()
    top, bottom = _reduced(rows, group, np.maximum), _reduced(rows, group, np.minimum)
    last = levels.level(levels.highest)
    covering = np.maximum(top, -bottom) / last if kind.symmetric else (top - bottom) / last
    tiny = _LEAST_F16 * (abs(levels.level(levels.lowest)) + last)  # of scales that f16 rounds to steps
    rounding = 2.0**-9 * np.maximum(np.abs(top), np.abs(bottom))  # of scales and minimums to f16, at the ends
    half = scale * gap * (0.5 + 2.0**-9) + 1e-6 * np.abs(rows)
    saturated = (q <= levels.lowest) | (q >= levels.highest)
    allowed = _per_element(2 * covering * widest + rounding, group, size) + tiny
    if not kind.symmetric:
        half = half + tiny
    _require(what, rows, values, np.where(saturated, allowed, np.minimum(half + tiny, allowed)))
    count = np.diff(np.append(np.arange(0, size, group), size))
    square = np.sqrt(_reduced((values - rows) ** 2, group, np.add) / count)
    limit = covering * widest / 2 + rounding + tiny
    if not (square <= limit).all():
        row, which = np.unravel_index(int(np.argmax(square - limit)), square.shape)
        raise CompileError(
            f"{what} is off by {square[row, which]:.3g} in the mean of group {which} of row {row}, and rounding to the "
            f"nearest allows {limit[row, which]:.3g}"
        )


def _kept_bound(encoded: Encoded, rows: Array) -> Array:
    """Integers that the source had already: only scales and minimums are rounded, to f16. Scales that are small beside
    the largest may lose more (`keep_integers`)."""
    kind = encoded.encoding
    assert isinstance(kind, GroupQuantized)
    scales = np.abs(encoded.parts["scales"].astype(np.float64))
    lost = 2.0**-14 * scales.max(initial=0.0) * (1 << kind.bits)
    bound = 2.0**-11 * np.abs(rows)
    if not kind.symmetric and not kind.in_steps:
        bound = bound + 2.0**-10 * _per_element(np.abs(encoded.parts["minimums"]), kind.group, rows.shape[1])
    return np.asarray(bound * (1 + 2.0**-8) + lost + _LEAST_F16 * (1 << kind.bits))


def _check_activations(item: Pass, op: Linear | GatedLinear) -> None:
    """What the op makes of activations: read off its product with rows of the identity, beside the formula.

    int8: an integer of -127 to 127 times max|x| / 127 of its group, the nearest one. bf16: 8 bits.
    """
    size = op.x.shape[-1]
    assert isinstance(size, int)
    group = int(getattr(op.w.tensor.encoding, "group", 0)) or 64
    rng = np.random.default_rng(size)
    x = (rng.standard_normal((4, size)) * np.exp(rng.standard_normal((4, size)))).astype(np.float32)
    x[2] = 0.0
    ends = np.unique(np.concatenate([np.arange(min(size, 2 * group)), np.arange(max(0, size - 2 * group), size)]))
    identity = np.zeros((len(ends), size), np.float32)
    identity[np.arange(len(ends)), ends] = 1.0
    plain = Linear(op.x, op.w, rounding=op.rounding)
    found = np.asarray(plain.evaluate(x, identity, None, None))
    what = f"pass {item}: activations of {_name(op.w)}, rounded to {op.rounding},"
    if op.rounding == "bf16":
        _require(what, x[:, ends], found, np.abs(x[:, ends]) * _HALF_ULP["bf16"] * (1 + 2.0**-8))
        return
    step = (_reduced(np.abs(x), group, np.maximum) / 127).repeat(group, axis=1)[:, ends]
    _require(what, x[:, ends], found, step * (0.5 + 1e-4))
    integers = found / np.where(step == 0, 1, step)
    off = np.abs(integers - np.round(integers)).max(initial=0.0)
    if off > 1e-4 or np.abs(integers).max(initial=0.0) > 127 + 1e-4:  # f32 has 127 to 2^-17
        raise CompileError(
            f"{what} are no whole multiples of max|x| / 127 of groups of {group}: off by {off:.3g} of a step"
        )
