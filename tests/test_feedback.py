"""Rounding with error feedback: what it promises for any inputs, weights and sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.encodings import GroupQuantized, encode, feedback
from llmc.compiler.encodings.feedback import BLOCK, Curvature, _Rows, encode_with_feedback
from llmc.compiler.encodings.levels import table_levels
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.types import parse_encoding, precise
from llmc.errors import CompileError

KINDS = [
    parse_encoding(name)
    for name in (
        "q4g32",
        "q4g64",
        "q8g64",
        "q4g64a",
        "t4g32",
        "t4g64",
        "t4g128",
        "t6g64",
        "t2g64",
        "t3g32",
        "t5g64",
        "t4g16",
        "q8g64r",
        "t4g64r",
    )
]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
SIZES = (1, 7, 31, 33, 129)


def layer(rows: int, inputs: int, samples: int, seed: int = 0, dead: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A weight [rows, inputs], and the moments [inputs, inputs] of correlated inputs of very different sizes."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((samples, inputs)) @ random.standard_normal((inputs, inputs))
    x *= np.exp(random.standard_normal(inputs))
    if dead:
        x[:, :: max(2, inputs // 3)] = 0
    return random.standard_normal((rows, inputs)).astype(np.float32), (x.T @ x / samples).astype(np.float32)


def rounded(kind: GroupQuantized, w: np.ndarray, curvature: Curvature, **options: int) -> Encoded:
    """The weight in its encoding."""
    return encode_with_feedback(kind, w, curvature, **options).encoded


def output_error(w: np.ndarray, encoded: Encoded, moments: np.ndarray) -> np.ndarray:
    """The mean square by which each row's output changes, in f64."""
    with precise():
        difference = w.astype(np.float64) - encoded.decode()
    return np.einsum("nk,kl,nl->n", difference, moments.astype(np.float64), difference)


def damped(moments: np.ndarray, damping: float = 0.01) -> np.ndarray:
    wide = moments.astype(np.float64)
    return wide / (np.trace(wide) / len(wide) or 1) + damping * np.eye(len(wide))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from((1, 3, 33)),
    st.sampled_from(SIZES),
    st.sampled_from((1, 5, 400)),
    st.booleans(),
    st.integers(0, 9),
)
def test_no_row_is_worse_than_rounded_for_itself(
    kind: GroupQuantized, rows: int, inputs: int, samples: int, dead: bool, seed: int
) -> None:
    w, moments = layer(rows, inputs, samples, seed, dead)
    found = rounded(kind, w, Curvature.of(moments))
    exact = damped(moments)
    alone = output_error(w, encode(kind, w), exact)
    # Errors are compared in f32, where they are sums of products of numbers of both signs.
    assert (output_error(w, found, exact) <= alone * (1 + 1e-3) + 1e-9).all()


@by_kind
def test_outputs_of_correlated_inputs_are_far_better(kind: GroupQuantized) -> None:
    w, moments = layer(64, 256, 2000)
    found = rounded(kind, w, Curvature.of(moments))
    gain = output_error(w, found, moments).sum() / output_error(w, encode(kind, w), moments).sum()
    assert gain < 0.5


@by_kind
def test_parts_are_those_of_the_encoding(kind: GroupQuantized) -> None:
    w, moments = layer(7, 129, 50)
    found, plain = rounded(kind, w, Curvature.of(moments)), encode(kind, w)
    assert found.encoding == kind
    assert {n: (p.shape, p.dtype) for n, p in found.parts.items()} == {
        n: (p.shape, p.dtype) for n, p in plain.parts.items()
    }
    assert found.parts["q"].min() >= kind.levels.lowest
    assert found.parts["q"].max() <= kind.levels.highest
    assert np.isfinite(found.parts["scales"]).all()


@by_kind
def test_errors_and_powers_are_those_of_the_outputs(kind: GroupQuantized) -> None:
    """In units of the moments' mean, as they are damped: by its own weights, and by what they become."""
    w, moments = layer(300, 129, 300)
    found = encode_with_feedback(kind, w, Curvature.of(moments))
    exact = damped(moments)
    np.testing.assert_allclose(found.powers, np.einsum("nk,kl,nl->n", w, exact, w.astype(np.float64)), rtol=1e-4)
    np.testing.assert_allclose(found.errors, output_error(w, found.encoded, exact), rtol=1e-2, atol=1e-6)


@by_kind
def test_rows_do_not_depend_on_each_other_or_on_threads(kind: GroupQuantized, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MOST_ROWS", 256)  # so that there are two blocks
    w, moments = layer(300, 129, 300)
    curvature = Curvature.of(moments)
    whole = rounded(kind, w, curvature, threads=1)
    again = rounded(kind, w, curvature, threads=3)
    assert all(np.array_equal(part, again.parts[name]) for name, part in whole.parts.items())


def test_no_other_integer_of_a_row_is_better() -> None:
    """Coordinate descent ends where no single step of an integer lowers the error (but for what f32 does not see)."""
    kind = GroupQuantized(4, 32)
    w, moments = layer(3, 2 * BLOCK + 1, 400)
    found = rounded(kind, w, Curvature.of(moments), sweeps=40)
    exact = damped(moments)
    best = output_error(w, found, exact)
    q = found.parts["q"]
    for at in range(q.shape[1]):
        for step in (-1, 1):
            moved = q.copy()
            moved[:, at] = np.clip(moved[:, at] + step, kind.levels.lowest, kind.levels.highest)
            other = Encoded(kind, w.shape, found.parts | {"q": moved})
            assert (output_error(w, other, exact) >= best * (1 - 1e-4)).all()


def stands_for(kind: GroupQuantized, integers: np.ndarray) -> np.ndarray:
    """What integers stand for, beside scale and minimum, in f64."""
    if not kind.table:
        return integers.astype(np.float64)
    levels = table_levels(kind.bits)
    return levels.values.astype(np.float64)[integers.astype(int) - levels.lowest]


def nearest(kind: GroupQuantized, wanted: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """The integers whose numbers are nearest, by looking at all of them."""
    integers = np.arange(kind.levels.lowest, kind.levels.highest + 1)
    numbers = stands_for(kind, integers)
    gaps = np.abs(wanted[:, None] - (numbers * scale[:, None] + minimum[:, None]))
    return integers[gaps.argmin(axis=1)]


@by_kind
def test_errors_are_fed_back_as_a_plain_loop_does_it(kind: GroupQuantized) -> None:
    """GPTQ without blocks, in f64, with the inverse of H made anew for what is left behind each input."""
    w, moments = layer(9, 2 * BLOCK + 1, 600)
    curvature = Curvature.of(moments)
    rows = _Rows(kind, w, curvature)
    scales, minimums = rows.scales.T.astype(np.float64), rows.minimums.T.astype(np.float64)
    rows.feed_back()
    left, wanted, q = list(curvature.order), w.astype(np.float64), np.zeros(w.shape)
    exact = damped(moments)
    while left:
        at, group = left[0], left[0] // kind.scaled(w.shape[1])
        inverse = np.linalg.inv(exact[np.ix_(left, left)])
        q[:, at] = nearest(kind, wanted[:, at], scales[:, group], minimums[:, group])
        level = stands_for(kind, q[:, at])
        error = (wanted[:, at] - level * scales[:, group] - minimums[:, group]) / inverse[0, 0]
        wanted[:, left[1:]] -= np.multiply.outer(error, inverse[0, 1:])
        left.pop(0)
    # One integer that falls the other way, as sums are in f32, moves those behind it: most rows have none.
    assert np.mean(q == rows.q.T) > 0.97


@by_kind
def test_a_sweep_takes_each_input_after_the_other(kind: GroupQuantized) -> None:
    """Coordinate descent without blocks, in f64, from the same start."""
    w, moments = layer(9, 2 * BLOCK + 1, 600)
    rows = _Rows(kind, w, Curvature.of(moments))
    for at in range(w.shape[1]):  # each for itself, so that there is much to change
        rows._round(at, rows.w[at])
    rows.measure()
    q, v, exact = rows.q.T.astype(np.float64), rows.v.T.astype(np.float64), damped(moments)
    scales, minimums = rows.scales.T.astype(np.float64), rows.minimums.T.astype(np.float64)
    rows.descend()
    for at in range(w.shape[1]):
        group = at // kind.scaled(w.shape[1])
        wanted = v[:, at] + (w - v) @ exact[:, at] / exact[at, at]
        q[:, at] = nearest(kind, wanted, scales[:, group], minimums[:, group])
        level = stands_for(kind, q[:, at])
        v[:, at] = level * scales[:, group] + minimums[:, group]
    assert np.mean(q == rows.q.T) > 0.97  # as above


@by_kind
def test_scales_are_fitted_by_least_squares(kind: GroupQuantized) -> None:
    w, moments = layer(5, 129, 600)
    rows = _Rows(kind, w, Curvature.of(moments))
    rows.feed_back()
    levels = stands_for(kind, rows.q)
    found = rows._fitted(levels.astype(np.float32))
    root = np.linalg.cholesky(damped(moments)).T
    for row in range(len(w)):
        columns = np.zeros((129, len(rows.groups)))
        target = w[row].astype(np.float64)
        for index, group in enumerate(rows.groups):
            columns[group, index] = levels[group, row]
            target[group] -= rows.minimums[index, row]
        least = np.linalg.lstsq(root @ columns, root @ target, rcond=None)[0]
        errors = [float(np.sum((root @ (columns @ scales - target)) ** 2)) for scales in (least, found[:, row])]
        assert errors[1] <= errors[0] * 1.01  # scales are rounded to f16


def test_the_factor_is_of_the_inverse_in_the_order_of_rounding() -> None:
    for inputs in (*SIZES, 200):
        _, moments = layer(1, inputs, 3 * inputs)
        curvature = Curvature.of(moments)
        order = curvature.order
        assert (np.diff(np.diag(curvature.moments)[order]) <= 0).all()
        assert (np.tril(curvature.factor, -1) == 0).all()
        factor = curvature.factor.astype(np.float64)
        product = factor.T @ factor @ damped(moments)[np.ix_(order, order)]
        np.testing.assert_allclose(product, np.eye(inputs), atol=2e-4)


def test_the_unit_of_inputs_does_not_matter() -> None:
    w, moments = layer(7, 64, 300)
    found = rounded(KINDS[0], w, Curvature.of(moments))
    for unit in (2.0**-40, 2.0**40):
        again = rounded(KINDS[0], w, Curvature.of(moments * np.float32(unit)))
        assert all(np.array_equal(part, again.parts[name]) for name, part in found.parts.items())


def test_inputs_that_were_never_seen_leave_each_weight_to_itself() -> None:
    w, _ = layer(7, 64, 1)
    found = rounded(KINDS[1], w, Curvature.of(np.zeros((64, 64), np.float32)))
    assert (output_error(w, found, np.eye(64)) <= output_error(w, encode(KINDS[1], w), np.eye(64)) * (1 + 1e-5)).all()


def test_what_is_not_finite_is_refused() -> None:
    w, moments = layer(3, 33, 50)
    with pytest.raises(CompileError, match="not finite"):
        rounded(KINDS[0], np.where(w > 1, np.inf, w), Curvature.of(moments))
    moments[3, 3] = np.nan
    with pytest.raises(ValueError, match="moment"):
        Curvature.of(moments)


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e3])
def test_weights_at_the_ends_of_f16(scale: float) -> None:
    w, moments = layer(7, 129, 300)
    w = (w * scale).astype(np.float32)
    for kind in KINDS:
        found = rounded(kind, w, Curvature.of(moments))
        assert np.isfinite(found.decode()).all()
        exact = damped(moments)
        assert (output_error(w, found, exact) <= output_error(w, encode(kind, w), exact) * (1 + 1e-3)).all()
