"""Group-quantized encodings: what rounding promises, whatever the weights and the shape."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.encodings import GroupQuantized, decode, encode, storage_bytes, stored_bytes
from llmc.compiler.encodings.grouped import BLOCK, widen
from llmc.compiler.encodings.levels import table_levels
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.types import Tensor, parse_encoding, precise
from llmc.errors import CompileError, IRError

ENCODINGS = [
    parse_encoding(name)
    for name in (
        "q4g32",
        "q4g64",
        "q6g16",
        "q8g64r",
        "t4g32r",
        "q4g32a",
        "q4g64a",
        "q8g32",
        "q8g64",
        "q8g32a",
        "q8g64a",
        "t4g32",
        "t4g64",
        "t6g64",
        "t2g64",
        "q3g64",
        "q3g32a",
        "t3g32",
        "t5g64",
        "q5g32",
        "q6g32a",
    )
]
IN_STEPS = [parse_encoding("q4g64z"), parse_encoding("q8g32z")]  # which nothing is rounded to
by_encoding = pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
SIZES = (1, 7, 31, 33, 129)

encodings = st.sampled_from([*ENCODINGS, *map(parse_encoding, ("q4g128", "q4g8a", "t4g8", "t6g8", "t4g128", "t6g128"))])
rows = st.integers(1, 5)
sizes = st.sampled_from([*SIZES, 64, 128])
kinds = st.sampled_from(["normal", "heavy", "positive", "tiny", "subnormal", "huge", "outlier", "sparse", "constant"])


def weights(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """f32 weights of some distribution."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    if kind == "heavy":
        w = rng.standard_t(2, shape)
    elif kind == "positive":
        w = np.abs(w) + 3
    elif kind == "outlier":
        w[..., shape[-1] // 2] = -40
    elif kind == "sparse":
        w *= rng.random(shape) < 0.05
    elif kind == "constant":
        w = np.full(shape, rng.standard_normal())
    scale = {"tiny": 1e-5, "subnormal": 1e-7, "huge": 1e4}.get(kind, 1.0)
    return (w * scale).astype(np.float32)


def error(encoded: Encoded, w: np.ndarray) -> np.ndarray:
    """Squared error a group [..., G], in f64."""
    group = encoded.encoding.scaled(w.shape[-1])
    with precise():
        squared = (encoded.decode() - w.astype(np.float64)) ** 2
    padded = np.pad(squared, [(0, 0)] * (w.ndim - 1) + [(0, -w.shape[-1] % group)])
    return padded.reshape(*w.shape[:-1], -1, group).sum(axis=-1)


def levels(encoding: GroupQuantized, q: np.ndarray) -> np.ndarray:
    """What integers stand for, in f64: themselves, or levels of a table; past its ends, nothing near."""
    if not encoding.table:
        return q.astype(np.float64)
    levels = table_levels(encoding.bits)
    known = np.concatenate([[-1e3], levels.values.astype(np.float64), [1e3]])
    return known[q.astype(int) - levels.lowest + 1]


def per_weight(part: np.ndarray, encoded: Encoded) -> np.ndarray:
    """A part with one value a group, repeated for every weight of the group, in f64."""
    return np.repeat(part.astype(np.float64), encoded.encoding.scaled(encoded.shape[-1]), axis=-1)[
        ..., : encoded.shape[-1]
    ]


@settings(max_examples=150, deadline=None)
@given(encodings, kinds, rows, sizes, st.booleans(), st.integers(0, 9))
def test_a_weight_in_range_is_at_most_half_a_step_off(encoding, kind, n, k, search, seed) -> None:
    w = weights(kind, (n, k), seed)
    encoded = encode(encoding, w, search=search)
    scale = np.abs(per_weight(encoded.parts["scales"], encoded))
    with precise():
        decoded = encoded.decode()
    off, q = np.abs(decoded - w), encoded.parts["q"].astype(int)
    # The step to the next integer on the weight's side of its own; a negative scale turns the sides.
    sign = np.where(per_weight(encoded.parts["scales"], encoded) < 0, -1, 1)
    towards = np.where((w > decoded) == (sign > 0), 1, -1)
    step = scale * np.abs(levels(encoding, q + towards) - levels(encoding, q))
    lowest, highest = encoding.levels.lowest, encoding.levels.highest
    assert q.min() >= lowest and q.max() <= highest
    saturated = (q == lowest) | (q == highest)
    # f32 arithmetic in choosing q: a tie may fall to either side, by 2^-22 of the weight (and of the minimum).
    slack = 2.0**-22 * (
        np.abs(w) + (0 if encoding.symmetric else np.abs(per_weight(encoded.parts["minimums"], encoded)))
    )
    if encoding.table:  # which byte is nearest is found in halves of bytes from the lowest one on: up to 253 in f32
        slack = slack + 2.0**-15 * scale
    within = off <= step / 2 + slack
    assert within[~saturated].all()
    if not search:  # the scale covers the largest weight, so saturation costs nothing either
        assert within.all()


@settings(max_examples=150, deadline=None)
@given(encodings, kinds, rows, sizes, st.integers(0, 9))
def test_a_search_never_loses_to_the_nearest_scale(encoding, kind, n, k, seed) -> None:
    w = weights(kind, (n, k), seed)
    searched, nearest = error(encode(encoding, w), w), error(encode(encoding, w, search=False), w)
    # Errors are compared in f32, whose sums over a group are good to about 1e-5; constants leave only that noise.
    noise = 1e-12 * (w.astype(np.float64) ** 2).max()
    assert (searched <= nearest * (1 + 1e-5) + noise).all()


def test_growing_steps_suit_weights() -> None:
    """Of the squared error of integers at even steps, searched as well, so much is left: of 6 bits, four fifths or
    fewer; of fewer bits, nine tenths."""
    rng = np.random.default_rng(0)
    normal, heavy = rng.standard_normal((512, 512)), rng.standard_t(5, (512, 512))
    for w, bits, at_most in ((normal, 6, 0.83), (heavy, 6, 0.62), (normal, 4, 0.89), (heavy, 4, 0.81)):
        groups = w.reshape(-1, 64)
        extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], 1)
        even = np.full(len(groups), np.inf)
        half = 1 << bits - 1
        for candidate in (half - 1, -half, *((-32.3, -32.7) if bits == 6 else (-8.4, -8.85))):
            scale = extreme / candidate
            off = groups - scale * np.clip(np.rint(groups / scale), -half, half - 1)
            even = np.minimum(even, (off**2).sum(axis=1))
        table = GroupQuantized(bits, 64, table=True)
        assert error(encode(table, w.astype(np.float32)), w).sum() <= at_most * even.sum()


@pytest.mark.parametrize(
    ("name", "at_most"),
    [("q4g64", 0.71), ("q4g32", 0.71), ("q4g64a", 0.90), ("q8g64", 0.93), ("t4g64", 0.9), ("t6g64", 0.93),
     ("t5g64", 0.92), ("t3g64", 0.82), ("t2g64", 0.62), ("q3g64", 0.6)],
)  # fmt: skip
def test_a_search_removes_error_from_normal_weights(name: str, at_most: float) -> None:
    """As benchmarks/quantization.py measures: of the squared error of the covering scale, this much is left."""
    w = weights("normal", (256, 512))
    encoding = parse_encoding(name)
    assert error(encode(encoding, w), w).sum() <= at_most * error(encode(encoding, w, search=False), w).sum()


@settings(max_examples=100, deadline=None)
@given(encodings, rows, sizes, st.booleans(), st.integers(0, 9))
def test_values_on_the_grid_come_back_unchanged(encoding, n, k, search, seed) -> None:
    """decode(encode(decode(e))) == decode(e) where each group reaches the ends of the integers' range."""
    rng = np.random.default_rng(seed)
    groups = -(-k // encoding.group)
    lowest, highest = encoding.levels.lowest, encoding.levels.highest
    q = rng.integers(lowest, highest + 1, (n, k))
    q[:, :: encoding.group] = highest
    if not encoding.symmetric:
        q[:, 1 :: encoding.group] = lowest
    elif not search:  # the scale covers the largest level: the lowest ones are out of its reach
        q = np.where(levels(encoding, q) < -levels(encoding, np.array(highest)), 0, q)
    scales = (2.0 ** rng.integers(-8, 3, (n, groups)) * rng.integers(1, 8, (n, groups))).astype(np.float16)
    parts = {"q": q.astype(np.int8 if encoding.symmetric else np.uint8), "scales": scales}
    if not encoding.symmetric:
        parts["minimums"] = (per_group_zero := -scales * np.float16(3))
        assert np.isfinite(per_group_zero).all()
    once = decode(Encoded(encoding, (n, k), parts))
    with precise():  # exact in f32: a level has at most 11 bits, and so has a scale
        np.testing.assert_array_equal(decode(Encoded(encoding, (n, k), parts)), once)
    np.testing.assert_array_equal(decode(encode(encoding, once, search=search)), once)


@by_encoding
@pytest.mark.parametrize("k", SIZES)
def test_rows_are_independent(encoding: GroupQuantized, k: int) -> None:
    """Any split into blocks of rows gives the bytes of the whole: weights can be streamed."""
    n = 2 * BLOCK // k + 3 if k == 129 else 13
    w = weights("normal", (n, k))
    whole = encode(encoding, w, threads=2)
    for start, stop in ((0, 1), (1, 8), (n - 5, n), (0, n)):
        block = encode(encoding, w[start:stop], threads=1)
        for name, part in whole.parts.items():
            np.testing.assert_array_equal(block.parts[name], part[start:stop])


@by_encoding
def test_stacked_matrices_are_rows_too(encoding: GroupQuantized) -> None:
    w = weights("normal", (2, 3, 33))
    stacked, flat = encode(encoding, w), encode(encoding, w.reshape(6, 33))
    assert stacked.parts["q"].shape == w.shape
    np.testing.assert_array_equal(stacked.decode().reshape(6, 33), flat.decode())


@by_encoding
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_dtype_of_the_checkpoint_does_not_matter(encoding: GroupQuantized, dtype: type) -> None:
    w = weights("normal", (5, 65)).astype(dtype)
    expected = encode(encoding, w.astype(np.float32))
    for name, part in encode(encoding, w).parts.items():
        np.testing.assert_array_equal(part, expected.parts[name])


def test_bf16_widens_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(widen(every), every.astype(np.float32))
    strided = every.reshape(-1, 16)[:, :5]
    np.testing.assert_array_equal(widen(strided), strided.astype(np.float32))


@by_encoding
@pytest.mark.parametrize("search", [False, True])
def test_zeros_stay_zeros(encoding: GroupQuantized, search: bool) -> None:
    w = weights("normal", (3, 130))
    w[1] = 0
    encoded = encode(encoding, w, search=search)
    assert not encoded.decode()[1].any()
    assert np.isfinite(encoded.parts["scales"]).all()


@by_encoding
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_empty_weights(encoding: GroupQuantized, shape: tuple[int, int]) -> None:
    encoded = encode(encoding, np.zeros(shape, np.float32))
    assert encoded.decode().shape == shape
    assert encoded.nbytes == 0


@by_encoding
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 128])
def test_a_weight_that_is_not_finite_is_refused(encoding: GroupQuantized, bad: float, column: int) -> None:
    w = weights("normal", (3, 129))
    w[1, column] = bad
    with pytest.raises(CompileError, match="not finite"):
        encode(encoding, w)


@by_encoding
def test_a_scale_beyond_f16_is_refused(encoding: GroupQuantized) -> None:
    with pytest.raises(CompileError, match="beyond f16"):
        encode(encoding, weights("huge", (3, 129)) * np.float32(1e5))


def test_integers_are_not_weights() -> None:
    with pytest.raises(CompileError, match="float"):
        encode(GroupQuantized(4, 64), np.zeros((3, 64), np.int32))


@by_encoding
def test_decoding_in_f64_is_exact(encoding: GroupQuantized) -> None:
    encoded = encode(encoding, weights("normal", (5, 129)))
    expected = per_weight(encoded.parts["scales"], encoded) * levels(encoding, encoded.parts["q"])
    if not encoding.symmetric:
        expected += per_weight(encoded.parts["minimums"], encoded)
    with precise():
        np.testing.assert_array_equal(encoded.decode(), expected)
    assert encoded.decode().dtype == np.float32
    np.testing.assert_allclose(encoded.decode(), expected, rtol=1e-6, atol=1e-7)


@given(st.sampled_from(ENCODINGS), st.sampled_from([8, 32, 64, 128, 256]))
def test_names_are_read_back(kind: GroupQuantized, group: int) -> None:
    encoding = replace(kind, group=group)
    assert parse_encoding(encoding.name) == encoding


@pytest.mark.parametrize(
    "name",
    ["q1g64", "q7g64", "t7g64", "q9g64a", "q4g0", "q4g12", "q4", "q04g64", "q4g64b", "t8g64", "t4g64a", "int4", ""],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(IRError):
        parse_encoding(name)


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("q4g64", (3, 128), 3 * 2 * 34),
        ("q4g64", (3, 129), 3 * 3 * 34),
        ("q4g32a", (1, 1), 20),
        ("t4g64", (3, 129), 3 * 3 * 34),
        ("t6g64", (3, 129), 3 * 3 * 50),
        ("t2g64", (3, 129), 3 * 3 * 18),
        ("q3g32a", (2, 33), 2 * 2 * 16),
        ("t5g64", (3, 129), 3 * 3 * 42),
        ("q8g64", (2, 5, 64), 660),
    ],
)
def test_stored_bytes_count_packed_integers_and_scales(name: str, shape: tuple[int, ...], size: int) -> None:
    encoding = parse_encoding(name)
    assert stored_bytes(encoding, shape) == size
    assert storage_bytes(Tensor(shape, "f32", encoding)) == size
    full = (shape[0], 1024)
    assert stored_bytes(encoding, full) * 8 == encoding.bits_per_weight * full[0] * full[1]


def test_a_scale_a_row_is_stored_once() -> None:
    encoding = parse_encoding("q8g64r")
    assert stored_bytes(encoding, (3, 129)) == 3 * (3 * 64 + 2)
    assert encoding.bits_per_weight == 8


def test_plain_tensors_are_stored_as_they_are() -> None:
    assert storage_bytes(Tensor((3, 5), "bf16")) == 30


@pytest.mark.parametrize("encoding", IN_STEPS, ids=str)
def test_minimums_in_steps_are_exact_for_zero_points(encoding: GroupQuantized) -> None:
    """(q - zero) * scale for every zero point of the integers, and for halves of them: f16 holds these."""
    rng, group, most = np.random.default_rng(encoding.bits), encoding.group, 1 << encoding.bits
    q = rng.integers(0, most, (7, 2 * group)).astype(np.uint8)
    scales = rng.random((7, 2)).astype(np.float16)
    zeros = rng.integers(0, 2 * most, (7, 2)) / 2
    encoded = Encoded(encoding, q.shape, {"q": q, "scales": scales, "minimums": (-zeros).astype(np.float16)})
    exact = (q - np.repeat(zeros, group, axis=1)) * np.repeat(scales.astype(np.float64), group, axis=1)
    with precise():
        np.testing.assert_array_equal(encoded.decode(), exact)
    with pytest.raises(CompileError, match="for integers that another tool chose"):
        encode(encoding, exact)
    with pytest.raises(IRError, match="has them in steps"):
        GroupQuantized(4, 64, True, in_steps=True)
