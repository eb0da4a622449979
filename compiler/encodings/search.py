"""Choosing the scale of each group of weights: nearest, or the least squared error among a few candidates.

All functions take groups as f32 [M, G] and work on M groups at once. A candidate scale gives integers q; the scale
that fits *those* best is (w . q) / (q . q), and the error that it leaves is w . w - (w . q)^2 / (q . q). So candidates
are compared by (w . q)^2 / (q . q) without ever forming the error, at five passes over the weights each.

4-bit integers reach from -8 to 7, so a scale may be negative: the extreme weight, whatever its sign, then maps to -8,
and what is best is to let it saturate a little (a scale 2 to 10% below extreme / -8). Where integers stand for levels
of a table (`levels.py`), those are what q means above.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.encodings.levels import EvenLevels, Levels, even_levels, table_levels
from llmc.errors import CompileError

Floats = NDArray[np.float32]

# The level that the extreme weight of a group is mapped to before clamping. Chosen by benchmarks/quantization.py: 4-bit
# weights in groups of 64 keep 0.70 of the squared error of the nearest scale, as they would with 200 candidates.
CANDIDATES: dict[Levels, tuple[float, ...]] = {
    even_levels(8, True): (127.0, 126.0, 124.5, 123.0),
    table_levels(2): (-3.56, 3.26, -4.7, -2.88, 2.62),
    table_levels(3): (-4.68, -5.44, 4.42, -4.17, -5.06),
    table_levels(4): (7.25, -8.5, -8.0, 7.8, -9.2),
    table_levels(5): (-16.92, -15.41, 14.9, -16.41, -17.42),
    table_levels(6): (61.0, -64.0, -64.6, -65.3),
}
# Even levels below 8 bits, as parts of the lowest; the highest is tried besides.
BEYOND = (1.0, 1.05, 1.106)
# Asymmetric: the part of the range [min, max] that the integers cover, around its middle.
SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84)

_F16_HIGHEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Rounding:
    """Integers [M, G], f16 scales [M] and, where asymmetric, f16 minimums [M]."""

    q: NDArray[np.int8] | NDArray[np.uint8]
    scales: NDArray[np.float16]
    minimums: NDArray[np.float16] | None = None


def round_symmetric(w: Floats, levels: Levels, search: bool, importance: Floats | None = None) -> Rounding:
    """w = scale * the level of q. importance [G]: what an error of each place counts, squared (default: all the same).
    CompileError where a weight is not finite or a scale does not fit f16."""
    top, bottom = _extremes(w)
    extreme = np.where(-bottom > top, bottom, top)
    work = np.empty_like(w)
    scales = _covering_scale(np.abs(extreme), levels.level(levels.highest))
    nearest = _integers(w, scales, levels, work).astype(np.int8)
    if not search:
        return Rounding(nearest, scales)

    best = np.full(len(w), -1, np.float32)
    chosen = np.zeros(len(w), np.float32)
    for candidate in _candidates(levels):
        step = np.divide(extreme, np.float32(candidate), dtype=np.float32)
        _quantized(w, _reciprocal(step), levels, work)
        _keep_better(w, work, best, chosen, levels, importance)
    # The fitted scale may round some weights differently: fit once more.
    _quantized(w, _reciprocal(chosen), levels, work)
    _keep_better(w, work, best, chosen, levels, importance)

    # The rounding to f16 is the only step whose error the comparison above did not see: settle it exactly.
    nearest_error = _squared_error(w, nearest, scales, levels, work, importance=importance)
    found_scales = _to_f16(chosen)
    found = _integers(w, found_scales, levels, work).astype(np.int8)
    worse = _squared_error(w, found, found_scales, levels, work, importance=importance) >= nearest_error
    found[worse] = nearest[worse]
    return Rounding(found, np.where(worse, scales, found_scales))


def _candidates(levels: Levels) -> tuple[float, ...]:
    """What the extreme weight of a group may be mapped to."""
    if levels in CANDIDATES:
        return CANDIDATES[levels]
    return (float(levels.highest), *(levels.lowest * part for part in BEYOND))


def round_asymmetric(w: Floats, levels: EvenLevels, search: bool) -> Rounding:
    """w = scale * q + minimum, q from 0. CompileError where a weight is not finite or a scale does not fit f16."""
    highest = levels.highest
    top, bottom = _extremes(w)
    minimums = _to_f16(bottom)
    above = minimums.astype(np.float32) > bottom
    minimums = np.where(above, np.nextafter(minimums, np.float16(-np.inf)), minimums)
    scales = _covering_scale(top - minimums.astype(np.float32), highest)
    work = np.empty_like(w)
    nearest = _offset_integers(w, scales, minimums, levels, work).astype(np.uint8)
    if not search:
        return Rounding(nearest, scales, minimums)

    # Around the middle of the range the sums below lose no digits to a common offset.
    middle = (top * np.float32(0.5) + bottom * np.float32(0.5)).astype(np.float32)
    half = (top * np.float32(0.5) - bottom * np.float32(0.5)).astype(np.float32)
    centred = w - middle[:, None]
    total = centred.sum(axis=1)
    best = np.full(len(w), -1, np.float32)
    chosen, origin = np.zeros_like(best), np.zeros_like(best)
    for shrink in (*SHRINKS, None):
        if shrink is not None:
            step = half * np.float32(2 * shrink / highest)
            start = half * np.float32(-shrink)
        else:
            step, start = chosen.copy(), origin.copy()
        np.subtract(centred, start[:, None], out=work)
        _quantized(work, _reciprocal(step), levels, work)
        _keep_better_line(centred, total, work, best, chosen, origin)
    found_scales, found_minimums = _to_f16(chosen), _to_f16(origin + middle)
    found = _offset_integers(w, found_scales, found_minimums, levels, work).astype(np.uint8)
    nearest_error = _squared_error(w, nearest, scales, levels, work, minimums)
    worse = _squared_error(w, found, found_scales, levels, work, found_minimums) >= nearest_error
    found[worse] = nearest[worse]
    return Rounding(found, np.where(worse, scales, found_scales), np.where(worse, minimums, found_minimums))


def _extremes(w: Floats) -> tuple[Floats, Floats]:
    """Largest and smallest weight of each group. CompileError where a weight is not finite."""
    # Folding halves onto each other is several times faster than a reduction over so short an axis.
    top, bottom = w, w
    while top.shape[1] % 2 == 0 and top.shape[1] > 8:
        half = top.shape[1] // 2
        top = np.maximum(top[:, :half], top[:, half:])
        bottom = np.minimum(bottom[:, :half], bottom[:, half:])
    top, bottom = top.max(axis=1), bottom.min(axis=1)
    if not (np.isfinite(top) & np.isfinite(bottom)).all():
        raise CompileError(
            "a weight is not finite (infinity or NaN): the checkpoint is damaged, or needs another dtype"
        )
    return top, bottom


def _to_f16(values: Floats) -> NDArray[np.float16]:
    largest = float(np.abs(values).max(initial=0))
    if largest > _F16_HIGHEST:
        raise CompileError(
            f"a group of weights needs a scale or minimum of {largest:.3g}, beyond f16's {_F16_HIGHEST:.0f}: "
            "give this weight the scheme bf16 or none"
        )
    return values.astype(np.float16)


def _covering_scale(largest: Floats, highest: float) -> NDArray[np.float16]:
    """The f16 scale next to largest / highest for which `largest` still rounds to `highest` at most.

    Among f16's subnormal numbers the next one below may be too small by half; then the one above is taken.
    """
    scales = _to_f16(largest / np.float32(highest))
    short = scales.astype(np.float32) * np.float32(highest + 0.5) < largest
    return np.where(short, np.nextafter(scales, np.float16(np.inf)), scales)


def _reciprocal(values: Floats) -> Floats:
    """1 / values, 0 where that is not finite (a group of zeros, or of numbers next to zero)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / values
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _quantized(w: Floats, inverse: Floats, levels: Levels, out: Floats) -> None:
    """out = the integers of the levels nearest to w / scale."""
    np.multiply(w, inverse[:, None], out=out)
    levels.find(out)


def _integers(w: Floats, scales: NDArray[np.float16], levels: Levels, work: Floats) -> Floats:
    _quantized(w, _reciprocal(scales.astype(np.float32)), levels, work)
    return work


def _offset_integers(
    w: Floats, scales: NDArray[np.float16], minimums: NDArray[np.float16], levels: Levels, work: Floats
) -> Floats:
    np.subtract(w, minimums.astype(np.float32)[:, None], out=work)
    return _integers(work, scales, levels, work)


def _keep_better(
    w: Floats, q: Floats, best: Floats, chosen: Floats, levels: Levels, importance: Floats | None = None
) -> None:
    """Where (w . q)^2 / (q . q) beats `best`, take it and the fitted scale. q becomes its levels.

    importance: weighs the products' terms.
    """
    levels.apply(q)
    weighed = q if importance is None else q * importance
    products = np.einsum("mg,mg->m", w, weighed)
    squares = np.einsum("mg,mg->m", q, weighed)
    squares = np.maximum(squares, np.float32(1) if importance is None else np.float32(np.finfo(np.float32).tiny))
    fitted = products / squares
    score = fitted * products
    better = score > best
    np.copyto(best, score, where=better)
    np.copyto(chosen, fitted, where=better)


def _keep_better_line(w: Floats, total: Floats, q: Floats, best: Floats, chosen: Floats, origin: Floats) -> None:
    """The same for w = scale * q + origin: ordinary least squares of w on q, scored by the variance explained."""
    size = np.float32(w.shape[1])
    products = np.einsum("mg,mg->m", w, q)
    squares = np.einsum("mg,mg->m", q, q)
    sums = q.sum(axis=1)
    spread = squares - sums * sums / size
    covariance = products - total * sums / size
    flat = spread <= np.float32(0)
    fitted = np.where(flat, np.float32(0), covariance / np.where(flat, np.float32(1), spread))
    offset = (total - fitted * sums) / size
    score = fitted * covariance
    better = score > best
    np.copyto(best, score, where=better)
    np.copyto(chosen, fitted, where=better)
    np.copyto(origin, offset, where=better)


def _squared_error(
    w: Floats,
    q: NDArray[np.int8] | NDArray[np.uint8],
    scales: NDArray[np.float16],
    levels: Levels,
    work: Floats,
    minimums: NDArray[np.float16] | None = None,
    importance: Floats | None = None,
) -> Floats:
    work[...] = q
    levels.apply(work)
    work *= scales.astype(np.float32)[:, None]
    if minimums is not None:
        work += minimums.astype(np.float32)[:, None]
    np.subtract(w, work, out=work)
    result: Floats = np.einsum("mg,mg->m", work, work if importance is None else work * importance)
    return result
