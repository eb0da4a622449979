"""What ops mean at the edges: indices at both ends, nothing to reduce, numbers that a narrower sum would lose."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from test_ir_ops import run

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import integers, llm
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import INTEGERS, NUMPY_DTYPES, SIGNED, Tensor, dtype_of, precise
from llmc.errors import IRError

Array = np.ndarray


def of(make: object, *arrays: Array) -> Array:
    """An op of arrays, evaluated."""
    inputs = [Input(f"i{n}", Tensor(a.shape, dtype_of(a.dtype))) for n, a in enumerate(arrays)]
    op = make(*inputs)  # type: ignore[operator]
    assert isinstance(op, Op)
    found = np.asarray(run(op, dict(zip(inputs, arrays, strict=True))))
    assert found.shape == tuple(op.shape) and found.dtype == NUMPY_DTYPES[op.dtype]
    return found


@pytest.mark.parametrize("dtype", SIGNED)
@pytest.mark.parametrize("sized", [False, True])
def test_places_are_checked_at_both_ends(dtype: str, sized: bool) -> None:
    def checked(*places: int) -> Array:
        x = np.array(places, NUMPY_DTYPES[dtype])
        if sized:
            return of(s.CheckedIndex, x, np.full(x.shape, 5))
        return of(lambda i: s.CheckedIndex(i, None, 5, "a table"), x)

    assert checked(-5, -1, 0, 4).tolist() == [0, 4, 0, 4]
    said = "index out of range: an index: {}$" if sized else "index out of range: a table; the axis has 5 elements: {}$"
    for first in (5, 6, -6, -7):
        with pytest.raises(IRError, match=said.format(first)):
            checked(1, first, 9)


def test_places_without_a_sign_are_not_from_the_end() -> None:
    def checked(*places: int) -> Array:
        return of(lambda i: s.CheckedIndex(i, None, 5), np.array(places, np.uint8))

    assert checked(0, 4).tolist() == [0, 4]
    for place in (5, 251, 255):
        with pytest.raises(IRError, match=f"an index; the axis has 5 elements: {place}$"):
            checked(place)


def test_places_are_checked_with_the_size_of_each() -> None:
    places, sizes = np.array([[-1, 2], [0, -3]]), np.array([[4, 3], [1, 3]])
    assert of(s.CheckedIndex, places, sizes).tolist() == [[3, 2], [0, 0]]
    with pytest.raises(IRError, match=r"an index: 2$"):
        of(s.CheckedIndex, places, sizes - np.array([[0, 1], [0, 0]]))


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("axis", [0, 1])
def test_halves_are_added_up_in_f32(dtype: str, axis: int) -> None:
    """4096 ones: in halves a sum stays at 2048 (f16) or 256 (bf16)."""
    ones = np.ones((4096, 2) if axis == 0 else (2, 4096), NUMPY_DTYPES[dtype])
    assert of(lambda x: s.Sum(x, (axis,), False), ones).astype(float).tolist() == [4096, 4096]
    assert of(lambda x: s.Mean(x, (axis,), False), ones).astype(float).tolist() == [1, 1]
    product = of(s.Matmul, ones.T, ones) if axis == 0 else of(s.Matmul, ones, ones.T)
    assert (product.astype(float) == 4096).all()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_multiplied_exactly(dtype: str) -> None:
    large = int(np.iinfo(NUMPY_DTYPES[dtype]).max)
    a = np.array([[large - 2, 1]], NUMPY_DTYPES[dtype])
    assert of(s.Matmul, a, np.array([[1], [2]], NUMPY_DTYPES[dtype])).tolist() == [[large]]


def test_f64_is_multiplied_in_f64() -> None:
    a = np.array([[1.0, 1e-12]])
    assert of(s.Matmul, a, np.ones((2, 1))).tolist() == [[1 + 1e-12]]
    assert of(lambda x: s.Softmax(x, 0), np.array([0.0, -30.0]))[1] == np.exp(-30) / (1 + np.exp(-30))


@pytest.mark.parametrize("keep", [False, True])
def test_reducing_nothing(keep: bool) -> None:
    none = np.zeros((2, 0), np.float32)
    shape = (2, 1) if keep else (2,)
    expected: dict[type[s.Reduce], float] = {s.Sum: 0, s.Prod: 1, s.Max: -np.inf, s.Min: np.inf, s.Mean: np.nan}
    for kind, value in expected.items():
        np.testing.assert_array_equal(of(lambda x, kind=kind: kind(x, (1,), keep), none), np.full(shape, value))
    for kind, end in ((s.Max, "min"), (s.Min, "max")):
        for dtype in INTEGERS:
            found = of(lambda x, kind=kind: kind(x, (1,), keep), none.astype(NUMPY_DTYPES[dtype]))
            assert (found == getattr(np.iinfo(NUMPY_DTYPES[dtype]), end)).all()
        found = of(lambda x, kind=kind: kind(x, (1,), keep), none.astype(bool))
        assert (found == (kind is s.Min)).all()
    for one, value in ((s.Any, False), (s.All, True)):
        assert (of(lambda x, one=one: one(x, (1,), keep), none.astype(bool)) == value).all()


def test_a_mean_of_integers_is_cut_off() -> None:
    x = np.array([[7, 8], [-7, -8]], np.int32)
    assert of(lambda i: s.Mean(i, (1,), False), x).tolist() == [7, -7]
    assert of(lambda i: s.Mean(i, (0, 1)), x).tolist() == [[0]]


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
def test_the_best_of_floats_not_a_number_first(dtype: str) -> None:
    x = np.array([1.0, np.nan, 3.0, -np.inf, np.nan, 3.0, np.inf]).astype(NUMPY_DTYPES[dtype])
    assert of(lambda i: s.TopK(i, 7, 0), x).tolist() == [1, 4, 6, 2, 5, 0, 3]
    assert of(lambda i: s.TopK(i, 7, 0, False), x).tolist() == [3, 0, 2, 5, 6, 1, 4]


@pytest.mark.parametrize("dtype", (*INTEGERS, "f64"))
def test_the_best_of_neighbours(dtype: str) -> None:
    """Numbers that differ by their last bit only."""
    if dtype == "f64":
        x = np.array([1.0, 1 + 2**-52, 1.0])
    else:
        large = int(np.iinfo(NUMPY_DTYPES[dtype]).max)
        x = np.array([large - 1, large, large - 1], NUMPY_DTYPES[dtype])
    assert of(lambda i: s.TopK(i, 3, 0), x).tolist() == [1, 0, 2]
    assert of(lambda i: s.TopK(i, 3, 0, False), x).tolist() == [0, 2, 1]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_bits_are_moved_as_far_as_they_go(dtype: str) -> None:
    own = NUMPY_DTYPES[dtype]
    info, bits = np.iinfo(own), 8 * own.itemsize
    a = np.array([0, 1, 5, info.max, info.min, 0 if dtype[0] == "u" else -1], own)
    for by in (0, 1, bits - 1, bits, bits + 1, 127, *(() if dtype[0] == "u" else (-1, -bits))):
        b = np.full(a.shape, by).astype(own)
        left, right = of(e.ShiftLeft, a, b), of(e.ShiftRight, a, b)
        for x, up, down in zip(a.tolist(), left.tolist(), right.tolist(), strict=True):
            within = 0 <= by < bits
            wrapped = (x << by) % (1 << bits) if within else 0
            assert up % (1 << bits) == wrapped
            assert down == (x >> by if within else -1 if x < 0 else 0)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_divided_towards_zero_and_down(dtype: str) -> None:
    numbers = [0, 1, 2, 3, 7, 31, 100, 127] + ([] if dtype[0] == "u" else [-1, -2, -3, -7, -31, -100])
    pairs = [(x, y) for x, y in itertools.product(numbers, numbers) if y]
    a, b = (np.array(part, NUMPY_DTYPES[dtype]) for part in zip(*pairs, strict=True))
    assert of(e.Div, a, b).tolist() == [int(x / y) for x, y in pairs]
    assert of(e.FloorDivide, a, b).tolist() == [x // y for x, y in pairs]
    assert of(e.Mod, a, b).tolist() == [x % y for x, y in pairs]
    assert of(e.Fmod, a, b).tolist() == [x - y * int(x / y) for x, y in pairs]


def test_powers_of_integers() -> None:
    pairs = list(itertools.product([-3, -2, -1, 0, 1, 2, 3], [-3, -2, -1, 0, 1, 2, 3]))
    a, b = (np.array(part) for part in zip(*pairs, strict=True))
    expected = [x**y if y >= 0 else x ** (-y) if abs(x) == 1 else 0 for x, y in pairs]
    assert of(e.Pow, a, b).tolist() == expected


def test_a_part_of_a_part() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    assert of(lambda i: s.Slice(i, 1, 0, 3, 2), x).tolist() == x[:, ::2].tolist()
    assert of(lambda i: s.Slice(i, -1, 1, 4, 3), x).tolist() == x[..., 1:4:3].tolist()
    assert of(lambda i: s.Pad(i, (0, 1, 0), (1, 0, 2), 5.0), x)[2, 0, 5] == 5
    assert of(lambda i: s.Pad(i, (1, 0, 0), (0, 0, 0)), x)[0].tolist() == np.zeros((3, 4)).tolist()
    n = symbol("n", 0, 4)
    assert s.Slice(Input("x", Tensor((n,), "f32")), 0, 0, n, 3).shape == ((n + 2) // 3,)


def mixed(name: str) -> tuple[Op, list[Input]]:
    """An op whose operands are of several dtypes."""
    made: list[Input] = []

    def x(*shape: int, dtype: str = "f32") -> Input:
        made.append(Input(f"x{len(made)}", Tensor(shape, dtype)))
        return made[-1]

    ops: dict[str, Callable[[], Op]] = {
        "linear": lambda: llm.Linear(
            x(2, 3, 5), x(4, 5, dtype="bf16"), x(4, dtype="f16"), x(2, 3, 4), activation="silu"
        ),
        "linear of halves": lambda: llm.Linear(x(3, 5, dtype="f16"), x(4, 5), x(4), x(3, 4, dtype="f16")),
        "gated linear": lambda: llm.GatedLinear(x(3, 5), x(8, 5, dtype="f16"), x(8, dtype="bf16"), "gelu"),
        "rms norm": lambda: llm.RMSNorm(x(3, 5, dtype="f16"), x(5, dtype="bf16"), 0.1, 1.0),
        "layer norm": lambda: llm.LayerNorm(x(3, 5, dtype="bf16"), x(5), x(5, dtype="f16"), 0.1),
        "rms norm of doubles": lambda: llm.RMSNorm(x(3, 5, dtype="f64"), x(5), 0.1),
        "layer norm by halves": lambda: llm.LayerNorm(x(3, 5), x(5, dtype="f16"), x(5), 0.1),
        "layer norm of doubles": lambda: llm.LayerNorm(x(3, 5, dtype="f64"), x(5), x(5), 0.1),
        "rope angles of scale 0": lambda: llm.RopeAngles(x(3), x(4), 0.0),
        "rope angles of scale 1": lambda: llm.RopeAngles(x(3), x(4)),
        "rope of doubles": lambda: llm.Rope(x(3, 2, 9, dtype="f64"), x(3, 2, 4)),
        "rope angles": lambda: llm.RopeAngles(x(3), x(4, dtype="f16"), 0.5),
        "rope": lambda: llm.Rope(x(3, 2, 9, dtype="f16"), x(3, 2, 4), True),
        "rope of halves": lambda: llm.Rope(x(3, 2, 9, dtype="f16"), x(3, 2, 4)),
        "embed": lambda: llm.Embed(x(7, 3, dtype="f16"), e.constant([6, 0, 2]), "f32"),
        "scale integers": lambda: integers.ScaleIntegers(
            e.constant([[1, 2, -3]]), x(3, dtype="f16"), e.constant([[7]], "i8")
        ),
        "round to integers": lambda: integers.RoundToIntegers(x(3, 5, dtype="f16"), x(5, dtype="f64"), None, "i8"),
    }
    return ops[name](), made


@pytest.mark.parametrize(
    "name",
    [
        "linear", "linear of halves", "gated linear", "rms norm", "layer norm", "rope angles", "rope", "rope of halves",
        "embed", "scale integers", "round to integers", "rms norm of doubles", "layer norm by halves",
        "layer norm of doubles", "rope angles of scale 0", "rope angles of scale 1", "rope of doubles",
    ],
)  # fmt: skip
def test_operands_of_other_dtypes_decompose_to_the_same(name: str) -> None:
    op, inputs = mixed(name)
    simpler = op.decompose()
    assert simpler is not None and simpler.type == op.type
    rng = np.random.default_rng(3)
    data = {value: 3 * rng.standard_normal(value.shape) for value in inputs}
    with precise():
        np.testing.assert_allclose(run(simpler, data), run(op, data), rtol=1e-12, atol=1e-12)


def test_activations_are_rounded_without_other_roundings_where_that_is_asked() -> None:
    x = np.random.default_rng(3).standard_normal((2, 3, 21))
    value = Input("x", Tensor(x.shape, "f32"))
    with precise():
        found = run(llm.QuantizeActivations(value, 8), {value: x})
    padded = np.pad(x, ((0, 0), (0, 0), (0, 3))).reshape(2, 3, 3, 8)
    scale = np.abs(padded).max(-1, keepdims=True) / 127
    expected = (np.round(padded / scale) * scale).reshape(2, 3, 24)[..., :21]
    np.testing.assert_allclose(found, expected, rtol=1e-15, atol=0)


def test_activations_of_zeros_and_of_none_are_rounded() -> None:
    for shape in ((2, 21), (0, 21), (2, 8), (1,)):
        x = Input("x", Tensor(shape, "f32"))
        assert not run(llm.QuantizeActivations(x, 8), {x: np.zeros(shape, np.float32)}).any()


@pytest.mark.parametrize("block", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scales_and_zeros_of_blocks_broadcast_like_any_others(block: int, axis: int) -> None:
    """Of [7, 7, 7] integers: one a block of an axis, or one for all of it, with all leading axes or without some."""
    rng = np.random.default_rng(3)
    q = rng.integers(-8, 8, (7, 7, 7))
    count = -(-7 // block)
    whole = [tuple(count if i == axis else 7 for i in range(3)), tuple(count if i == axis else 1 for i in range(3))]
    shapes = [*whole, tuple(1 if i == axis else 7 for i in range(3)), (), (1,)]
    shapes += [shape[start:] for shape in whole for start in (1, 2)]
    for shape in shapes:
        scales, zeros = rng.random(shape), rng.integers(-3, 3, shape)
        values = [
            Input(n, Tensor(x.shape, d)) for n, x, d in zip("qsz", (q, scales, zeros), ("i8", "f64", "i8"), strict=True)
        ]
        op = integers.ScaleIntegers(values[0], values[1], values[2], axis, block)

        def spread(values: Array, shape: tuple[int, ...] = shape) -> Array:
            full = values.reshape((1,) * (3 - len(shape)) + shape)
            return full if full.shape[axis] == 1 else full.take(np.arange(7) // block, axis)

        given = dict(zip(values, (q.astype(np.int8), scales, zeros.astype(np.int8)), strict=True))
        expected = (q - spread(zeros)) * spread(scales)
        np.testing.assert_allclose(run(op, given), expected, rtol=1e-15)
        np.testing.assert_allclose(run(op.decompose(), given), expected, rtol=1e-15)


def test_nibbles_of_a_vector_and_of_no_rows() -> None:
    assert of(integers.UnpackNibbles, np.array([0x21, 0xF0], np.uint8)).tolist() == [1, 2, 0, 15]
    assert of(integers.UnpackNibbles, np.zeros((0, 3), np.uint8)).shape == (0, 6)


def test_angles_without_a_scale_are_of_the_unit_circle() -> None:
    positions, frequencies = np.array([0.0, 1.0, 7.0], np.float32), np.array([1.0, 0.125], np.float32)
    found, angles = of(llm.RopeAngles, positions, frequencies), np.outer(positions, frequencies)
    np.testing.assert_allclose(found, np.stack([np.cos(angles), np.sin(angles)], 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 9])
def test_a_rotation_of_all_channels_leaves_none_over(dim: int, interleaved: bool) -> None:
    x, angles = Input("x", Tensor((3, 2, dim), "f32")), Input("angles", Tensor((3, 2, 4), "f32"))
    op = llm.Rope(x, angles, interleaved)
    made = op.decompose()
    assert all(0 not in value.shape for value in topological([made]))
    rng = np.random.default_rng(3)
    given = {x: rng.standard_normal(x.shape), angles: rng.standard_normal(angles.shape)}
    with precise():
        np.testing.assert_allclose(run(made, given), run(op, given), rtol=1e-12, atol=1e-12)


ENCODINGS = ("q8g32", "q4g32a")


def packed(encoding: str, rows: int, name: str = "") -> tuple[integers.PackGroups, dict[Input, Array]]:
    """A weight of given integers, of [rows, 65]."""
    rng, signed = np.random.default_rng(rows), encoding == "q8g32"
    q = rng.integers(-127, 128, (rows, 65)).astype(np.int8) if signed else rng.integers(0, 16, (rows, 65), np.uint8)
    arrays = [q, *(rng.random((rows, 3)).astype(np.float32) for _ in range(1 if signed else 2))]
    values = [Input(f"{name}{n}", Tensor(array.shape, dtype_of(array.dtype))) for n, array in enumerate(arrays)]
    made = integers.PackGroups(values[0], values[1], None if signed else values[2], encoding)
    return made, dict(zip(values, arrays, strict=True))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_of_a_packed_weight_are_packed_rows(encoding: str) -> None:
    weight, given = packed(encoding, 7)
    rows = integers.PackGroups.of_rows(weight, lambda x: s.Slice(x, 0, 1, 7, 2))
    assert isinstance(rows, integers.PackGroups) and rows.encoding == encoding
    np.testing.assert_array_equal(run(llm.Dequantize(rows), given), run(llm.Dequantize(weight), given)[1:7:2])
    plain = Input("plain", Tensor((7, 65), "f32"))
    assert integers.PackGroups.of_rows(plain, e.Neg).operands == (plain,)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rows", [(1,), (3, 1), (1, 7, 2)], ids=str)
def test_packed_weights_are_stacked_row_by_row(encoding: str, rows: tuple[int, ...]) -> None:
    parts = [packed(encoding, count, f"{place}.") for place, count in enumerate(rows)]
    given = {value: array for _, arrays in parts for value, array in arrays.items()}
    whole = integers.PackGroups.stacked([part for part, _ in parts])
    expected = np.concatenate([run(llm.Dequantize(part), given) for part, _ in parts])
    np.testing.assert_array_equal(run(llm.Dequantize(whole), given), expected)


def test_parameters_are_the_numbers_that_integers_stand_for() -> None:
    """Parts of a weight count once, as the weight; a weight that two ops read counts once; others as they are."""
    q, other = (Param(name, Tensor((7, 16), "u8")) for name in ("q", "other"))
    scales, bias = Param("scales", Tensor((1, 32), "f32")), Param("bias", Tensor((7,), "f32"))
    x = Input("x", Tensor((7, 32), "f32"))
    weight = integers.ScaleIntegers(integers.UnpackNibbles(q), scales)
    again = integers.ScaleIntegers(integers.UnpackNibbles(q), scales)
    second = integers.ScaleIntegers(integers.UnpackNibbles(other), scales)
    known = integers.ScaleIntegers(e.constant(np.ones((7, 32)), "i8"), e.constant(2.0, "f32"))

    def count(*values: Value) -> int:
        return integers.parameter_count(Graph("g", (x,), tuple((str(i), value) for i, value in enumerate(values))))

    assert count(weight) == count(weight, again) == 7 * 32
    assert count(weight, second) == count(weight, second, again) == 2 * 7 * 32
    assert count(weight, scales) == 7 * 32 and count(weight, bias) == 7 * 32 + 7
    assert count(known) == 7 * 32 and count(weight, known, again) == 2 * 7 * 32
    assert count(e.Add(x, s.Broadcast(scales, (7, 32)))) == 32
    assert count(integers.ScaleIntegers(e.Cast(x, "i8"), scales)) == 32  # no weight
