"""Rounding that feeds each weight's error to the weights that are rounded after it, so that a layer's *outputs* change
least, where a search changes the weights least.

For inputs x of a layer with the second moments H = mean(x x^T), a row w of its weight that becomes v changes the
outputs by (w - v) H (w - v)^T on average. Inputs are rounded one after another, those of the largest moment first, and
the error of each is made up for by those that follow, in proportion to the inverse of H (GPTQ: Frantar et al. 2022,
arXiv 2210.17323, after Hassibi & Stork 1993). Then come sweeps: scales by least squares under H, and each integer once
more, with all the others as they are (coordinate descent; both only ever lower the error of a row).

Rows are independent: a large weight may be rounded block by block of rows, on several threads, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.encodings.grouped import GroupQuantized, each_block, empty_parts, encode, round_groups, widen
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.types import Array

Floats = NDArray[np.float32]

SWEEPS = 2
# Added to H's diagonal, as a part of its mean: what the sample of inputs does not show, it does not rule out.
DAMPING = 0.01
PANEL = 256  # rows or columns of a matrix that change at a time, however many threads there are
BLOCK = 64  # inputs whose errors reach the inputs behind the block in one product
RIDGE = 1e-4  # of least squares, relative to each scale's own weight
_F16_HIGHEST = float(np.finfo(np.float16).max)
# Numbers of a weight that are rounded at a time, in whole rows, whatever the threads, so that products have one shape.
# The more rows, the less of the time goes to calling numpy; the memory for them is some ten times theirs.
AT_ONCE, LEAST_ROWS, MOST_ROWS = 1 << 20, 256, 1024


@dataclass(frozen=True)
class Curvature:
    """What all rows of a layer share: H, damped, and the inverse's factor, both in the order of rounding.

    order: inputs by falling H[i, i]. factor: U, upper triangular, with U^T U = inverse(H[order][:, order]).
    """

    moments: Floats
    order: NDArray[np.intp]
    factor: Floats

    @classmethod
    def of(cls, moments: Array, damping: float = DAMPING, threads: int | None = None) -> Curvature:
        """Of moments [K, K], in any unit. Inputs that are always 0 cost nothing, whatever their weights become. Beside
        the result there is one matrix in f64, which changes in place: K may be 11,008 and more.

        ValueError where a moment is not finite.
        """
        if not np.isfinite(moments).all():
            raise ValueError("a moment is not finite")
        diagonal = np.einsum("ii->i", moments).astype(np.float64)
        unit = (float(diagonal.mean()) if len(diagonal) else 0.0) or 1.0
        order = np.argsort(-(diagonal / unit + damping), kind="stable")
        # H = A A^T with A upper, from the factor of H read backwards; then inverse(H) = U^T U with U = inverse(A).
        places = np.empty_like(order)
        places[order[::-1]] = np.arange(len(order))
        damped, lower = np.empty(moments.shape, np.float32), np.empty(moments.shape, np.float64)
        for start in range(0, len(order), PANEL):
            rows = np.arange(start, min(start + PANEL, len(order)))
            part = moments[rows].astype(np.float64) / unit
            part[rows - start, rows] += damping
            damped[rows] = part
            lower[places[rows]] = part[:, order[::-1]]
        _factorise(lower, threads)
        _invert(lower, threads)
        return cls(damped, order, np.array(lower[::-1, ::-1], np.float32, order="C"))


def _factorise(a: NDArray[np.float64], threads: int | None) -> None:
    """Replaces a symmetric matrix A by the lower triangular L with L L^T = A (Cholesky), panel by panel."""
    for first in range(0, len(a), PANEL):
        last = min(first + PANEL, len(a))
        corner = np.linalg.cholesky(a[first:last, first:last])
        a[first:last, first:last], a[first:last, last:] = corner, 0
        a[last:, first:last] = a[last:, first:last] @ np.linalg.inv(corner).T

        def update(start: int, first: int = first, last: int = last) -> None:
            stop = min(start + PANEL, len(a))
            a[start:stop, last:stop] -= a[start:stop, first:last] @ a[last:stop, first:last].T

        each_block(update, range(last, len(a), PANEL), threads)


def _invert(lower: NDArray[np.float64], threads: int | None) -> None:
    """Replaces a lower triangular matrix by its inverse, by halves: a third of the operations of a general one."""
    size = len(lower)
    if size <= BLOCK:
        lower[...] = np.tril(np.linalg.inv(lower))
        return
    half = size // 2
    before, behind, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(before, threads)
    _invert(behind, threads)

    def columns(start: int) -> None:
        corner[:, start : start + PANEL] = behind @ corner[:, start : start + PANEL]

    def rows(start: int) -> None:
        corner[start : start + PANEL] = -(corner[start : start + PANEL] @ before)

    each_block(columns, range(0, half, PANEL), threads)
    each_block(rows, range(0, size - half, PANEL), threads)


@dataclass(frozen=True)
class Rounded:
    """A rounded weight. powers, errors [N]: the mean square of each output, and that by which it changes."""

    encoded: Encoded
    powers: Floats
    errors: Floats


def encode_with_feedback(
    kind: GroupQuantized, w: Array, curvature: Curvature, sweeps: int = SWEEPS, threads: int | None = None
) -> Rounded:
    """Round a weight [N, K] to an encoding by its layer's inputs: no row's outputs are further off on average than with
    `encode`. CompileError as `encode`."""
    parts = empty_parts(kind, *w.shape)
    powers, errors = np.zeros((2, len(w)), np.float32)
    count = max(LEAST_ROWS, min(MOST_ROWS, AT_ONCE // max(1, w.shape[1])))

    def one_block(start: int) -> None:
        rows = _Rows(kind, widen(w[start : start + count]), curvature)
        rows.feed_back()
        rows.measure()
        for _ in range(sweeps):
            rows.refit()
            rows.descend()
        here = slice(start, start + count)
        found, errors[here] = rows.best_parts()
        powers[here] = rows.powers()
        for name, part in found.items():
            parts[name][here] = part

    each_block(one_block, range(0, len(w), count), threads)
    return Rounded(Encoded(kind, w.shape, parts), powers, errors)


class _Rows:
    """Some rows while they are rounded. Arrays are [K, N]: an input's weights of all rows lie side by side.

    scales, minimums [G, N]; q: the integers, as floats; v: what they stand for; slopes: H (w - v), by which an error is
    the sum of (w - v) times them.
    """

    def __init__(self, kind: GroupQuantized, w: Floats, curvature: Curvature) -> None:
        self.kind, self.levels, self.curvature = kind, kind.levels, curvature
        self.w = np.ascontiguousarray(w.T)
        inputs, rows = self.w.shape
        self.group = kind.scaled(inputs)
        self.groups = [slice(at, min(at + self.group, inputs)) for at in range(0, inputs, self.group)]
        self.scales = np.empty((len(self.groups), rows), np.float32)
        self.minimums = np.zeros_like(self.scales)
        importance = np.einsum("ii->i", curvature.moments)
        for index, group in enumerate(self.groups):
            # Weighted by each input's own moment: the search sees numbers that count alike.
            found = round_groups(kind, np.ascontiguousarray(w[:, group]), search=True, importance=importance[group])
            self.scales[index] = found.scales
            if found.minimums is not None:
                self.minimums[index] = found.minimums
        self.q = np.zeros_like(self.w)
        self.v = np.zeros_like(self.w)
        self.outputs = curvature.moments @ self.w  # H w
        self.slopes = self.outputs

    def _round(self, at: int, wanted: Floats) -> Floats:
        """Take the integers nearest to what input `at` should weigh; returns what they stand for."""
        group = at // self.group
        scale, minimum = self.scales[group], self.minimums[group]
        q = np.divide(wanted - minimum, scale, out=np.zeros_like(wanted), where=scale != 0)
        self.levels.find(q)
        self.q[at] = q
        self.levels.apply(q)
        rounded: Floats = q * scale + minimum
        self.v[at] = rounded
        return rounded

    def feed_back(self) -> None:
        """Round every input once, in order, each error going to the inputs behind it."""
        order, factor = self.curvature.order, self.curvature.factor
        wanted = self.w[order]
        for first in range(0, len(order), BLOCK):
            last = min(first + BLOCK, len(order))
            errors = np.empty((last - first, wanted.shape[1]), np.float32)
            for at in range(first, last):
                error = (wanted[at] - self._round(int(order[at]), wanted[at])) / factor[at, at]
                errors[at - first] = error
                wanted[at + 1 : last] -= np.multiply.outer(factor[at, at + 1 : last], error)
            wanted[last:] -= factor[first:last, last:].T @ errors

    def measure(self) -> None:
        """Find the slopes of v as it is."""
        self.slopes = self.curvature.moments @ (self.w - self.v)

    def errors(self) -> Floats:
        """(w - v) H (w - v)^T of each row."""
        return _dots(self.w - self.v, self.slopes)

    def powers(self) -> Floats:
        """w H w^T of each row."""
        return _dots(self.w, self.outputs)

    def descend(self) -> None:
        """Round every input once more, to the best integer with all the others as they are."""
        moments, slopes = self.curvature.moments, self.slopes
        for first in range(0, len(moments), BLOCK):
            last = min(first + BLOCK, len(moments))
            changes = np.empty((last - first, slopes.shape[1]), np.float32)
            for at in range(first, last):
                before = self.v[at].copy()
                change = self._round(at, before + slopes[at] / moments[at, at]) - before
                changes[at - first] = change
                slopes[first:last] -= np.multiply.outer(moments[first:last, at], change)
            slopes[:first] -= moments[:first, first:last] @ changes
            slopes[last:] -= moments[last:, first:last] @ changes

    def refit(self) -> None:
        """Scales (not minimums) by least squares under H for the integers as they are, in the rows that gain by it."""
        levels = self.q.copy()
        self.levels.apply(levels)
        found = self._fitted(levels)
        values = levels
        for index, group in enumerate(self.groups):
            values[group] = values[group] * found[index] + self.minimums[index]
        slopes = self.curvature.moments @ (self.w - values)
        better = _dots(self.w - values, slopes) < self.errors()
        self.scales = np.where(better, found, self.scales)
        self.v = np.where(better, values, self.v)
        self.slopes = np.where(better, slopes, self.slopes)

    def _fitted(self, levels: Floats) -> Floats:
        """The scales [G, N] of least error, rounded to f16."""
        moments, starts = self.curvature.moments, [group.start for group in self.groups]
        right = np.add.reduceat(levels * self._above_minimums(), starts, axis=0).T
        normal = np.empty((levels.shape[1], len(starts), len(starts)), np.float32)
        for index, group in enumerate(self.groups):
            reached = moments[:, group] @ levels[group]
            normal[:, index] = np.add.reduceat(levels * reached, starts, axis=0).T
        diagonal = np.einsum("nii->ni", normal)
        diagonal[...] = np.where(diagonal > 0, diagonal * np.float32(1 + RIDGE), 1)
        found = np.linalg.solve(normal, right[..., None])[..., 0].T
        return np.asarray(np.clip(found, -_F16_HIGHEST, _F16_HIGHEST).astype(np.float16), np.float32)

    def _above_minimums(self) -> Floats:
        """H times what the weights are above their minimums."""
        if self.kind.symmetric:
            return self.outputs
        minimums = np.empty_like(self.w)
        for index, group in enumerate(self.groups):
            minimums[group] = self.minimums[index]
        return self.outputs - self.curvature.moments @ minimums

    def best_parts(self) -> tuple[dict[str, Array], Floats]:
        """Integers [N, K], scales and minimums [N, G], as `Encoded` holds them; of a row whose weights are better
        rounded each for itself, those. Besides, what each row's outputs are off by [N], in the mean square."""
        searched = encode(self.kind, self.w.T, threads=1)
        off = self.w - np.ascontiguousarray(searched.decode().T)
        alone, error = _dots(off, self.curvature.moments @ off), self.errors()
        better = ~(error <= alone)  # also where what is fed back has overflowed
        q = self.q.T.astype(np.int8 if self.kind.symmetric else np.uint8)
        halves = {"scales": self.scales.T.astype(np.float16), "minimums": self.minimums.T.astype(np.float16)}
        found: dict[str, Array] = {"q": q, **halves}
        best = {name: np.where(better[:, None], part, found[name]) for name, part in searched.parts.items()}
        return best, np.where(better, alone, error)


def _dots(a: Floats, b: Floats) -> Floats:
    """The sum of products of each column [K, N]."""
    result: Floats = np.einsum("kn,kn->n", a, b)
    return result
