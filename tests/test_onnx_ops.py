"""Single ONNX operators against onnxruntime, numpy and torch: awkward sizes, empty tensors, both zeros.

The standard's own node tests (test_onnx_node_tests.py) cover each op once; these cover what they leave out.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx_graphs import Nodes, compare, evaluated
from onnx_products import exact_products

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Array, Tensor, dtype_of
from llmc.errors import FrontendError
from llmc.frontends.onnx.forms import DTYPES, OTHER_DTYPES, dtype_named
from llmc.frontends.onnx.supported import supported_ops
from llmc.frontends.onnx.translation import (
    HANDLERS,
    Body,
    Item,
    Node,
    Reference,
    Translation,
    Unsupported,
    discover,
)

RNG = np.random.default_rng(5)
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1e-8, -1e-8, 88.0, -88.0, 1e30, np.inf, -np.inf, np.nan]
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (3, 0, 2), (2, 31), (33, 1, 5))

UNARY = (
    "Abs", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Tanh", "Sigmoid", "Erf", "Floor", "Ceil", "Round", "Relu",
    "Sign", "Sin", "Cos", "Sinh", "Cosh", "Atan", "Asinh", "Softplus", "Softsign", "IsNaN", "IsInf", "Elu", "Selu",
    "LeakyRelu", "HardSigmoid", "HardSwish", "Identity", "Mish", "ThresholdedRelu", "Celu", "Shrink",
)  # fmt: skip
# onnxruntime gives other numbers than the formula where it is not finite: its own approximations saturate.
FINITE_ONLY = {"Erf", "Sinh", "Cosh", "Asinh", "Softplus", "Softsign", "Elu", "Selu", "Celu", "HardSwish", "Mish",
               "Tanh", "Sigmoid", "HardSigmoid", "Sin", "Cos", "LeakyRelu", "ThresholdedRelu", "Shrink",
               "Relu"}  # fmt: skip


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def one(
    op: str, *arrays: Array | None, opset: int = 21, outputs: int = 1, rtol: float = 1e-5, **attributes: object
) -> None:
    """The op over arrays is what onnxruntime gives."""
    named = {f"x{i}": a for i, a in enumerate(arrays) if a is not None}
    nodes = Nodes({name: (str(a.dtype), a.shape) for name, a in named.items()}, opset)
    operands = [None if a is None else f"x{i}" for i, a in enumerate(arrays)]
    compare(nodes, nodes.many(op, *operands, outputs=outputs, **attributes), named, rtol)


def stored(
    op: str, x: Array, *constants: object, rtol: float = 1e-5, outputs: int = 1, opset: int = 21, **attributes: object
) -> None:
    """As `one`, with every input but the first in the file."""
    nodes = Nodes({"x": (str(x.dtype), x.shape)}, opset)
    compare(nodes, nodes.many(op, "x", *constants, outputs=outputs, **attributes), {"x": x}, rtol)


@pytest.mark.parametrize("op", UNARY)
def test_functions_of_one_number(op: str) -> None:
    special = SPECIAL[np.isfinite(SPECIAL) & (np.abs(SPECIAL) <= 88)] if op in FINITE_ONLY else SPECIAL
    one(op, special.astype(np.float32))
    for shape in SHAPES:
        one(op, floats(*shape))


@pytest.mark.parametrize("op", ["Acos", "Asin", "Acosh", "Atanh", "Tan"])
def test_functions_of_part_of_the_numbers(op: str) -> None:
    span = np.linspace(1, 9, 33) if op == "Acosh" else np.linspace(-0.99, 0.99, 33)
    one(op, span.astype(np.float32))


INVERSES: dict[str, tuple[Callable[..., Array], float, float]] = {
    # The function, and where it is defined; beyond that it is no number.
    "Sinh": (np.sinh, -np.inf, np.inf), "Cosh": (np.cosh, -np.inf, np.inf), "Asinh": (np.arcsinh, -np.inf, np.inf),
    "Acosh": (np.arccosh, 1, np.inf), "Atanh": (np.arctanh, -1, 1), "Asin": (np.arcsin, -1, 1),
    "Acos": (np.arccos, -1, 1), "Atan": (np.arctan, -np.inf, np.inf),
    "Softplus": (lambda x: np.logaddexp(0, x), -np.inf, np.inf),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("op", INVERSES)
def test_functions_are_right_to_some_last_places_at_every_size(op: str, dtype: type) -> None:
    """From the least normal number to the largest, and around 1; infinite only where the result is."""
    function, low, high = INVERSES[op]
    info = np.finfo(dtype)
    sizes = np.geomspace(float(info.tiny), float(info.max) * 0.999, 500)
    sizes = np.concatenate([sizes, np.linspace(0, 12, 500), 1 + np.geomspace(float(info.eps), 1, 50)])
    x = np.concatenate([sizes, -sizes]).astype(dtype)
    nodes = Nodes({"x": (np.dtype(dtype).name, x.shape)})
    (found,) = evaluated(nodes.graph(nodes.add(op, "x")), {"x": x})
    defined = (x >= low) & (x <= high)
    assert np.isnan(found[~defined]).all()
    with np.errstate(over="ignore", divide="ignore"):
        expected = function(x[defined].astype(np.longdouble)).astype(dtype)
    np.testing.assert_allclose(found[defined], expected, rtol=4 * info.eps, atol=float(info.tiny))


def test_signs_of_zero_survive() -> None:
    zeros = np.array([0.0, -0.0], np.float32)
    for op in ("Neg", "Ceil", "Floor", "Sinh", "Round", "Sqrt", "Identity"):
        nodes = Nodes({"x": ("float32", (2,))})
        (found,) = evaluated(nodes.graph(nodes.add(op, "x")), {"x": zeros})
        np.testing.assert_array_equal(np.signbit(found), [op == "Neg", op != "Neg"], err_msg=op)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow", "Less", "Equal", "GreaterOrEqual", "Max", "Min"])
@pytest.mark.parametrize("shapes", [((), (7,)), ((0, 3), (1, 3)), ((2, 1, 31), (5, 1)), ((1,), (1, 1))], ids=str)
def test_broadcast_pairs(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (floats(*shape) for shape in shapes)
    one(op, np.abs(a) if op == "Pow" else a, b, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int8, np.uint8])
def test_integers_divide_towards_zero_and_rest_has_a_sign(dtype: type) -> None:
    low = 0 if np.dtype(dtype).kind == "u" else -100
    a, b = RNG.integers(low, 100, 64).astype(dtype), RNG.integers(1, 9, 64).astype(dtype)
    b = b if low == 0 else b * RNG.choice([-1, 1], 64).astype(dtype)
    one("Div", a, b)
    one("Mod", a, b)
    one("Mod", a, b, fmod=1)


def test_large_integers_divide_exactly() -> None:
    a = np.array([2**62 + 1, -(2**62) - 1, 2**53 + 1], np.int64)
    one("Div", a, np.array([3, 3, 1], np.int64))


def test_integer_powers() -> None:
    one("Pow", RNG.integers(-5, 6, (3, 7)), RNG.integers(0, 5, (3, 1)))
    one("Pow", floats(7), RNG.integers(-3, 4, 7), rtol=1e-4)
    nodes = Nodes({"x": ("int64", (2,))})
    (found,) = evaluated(nodes.graph(nodes.add("Pow", "x", np.int64(39))), {"x": np.array([3, -3])})
    assert found.tolist() == [3**39, -(3**39)]  # more than f64 tells apart


def test_the_rest_of_a_division_of_floats_has_the_sign_of_what_is_divided() -> None:
    a, b = np.array([5.5, -5.5, 5.5, -5.5, 0.3, 7], np.float32), np.array([2, 2, -2, -2, 0.1, np.inf], np.float32)
    one("Mod", a, b, fmod=1)


@pytest.mark.parametrize("shapes", [((7,), (7,)), ((7,), (7, 3)), ((3, 7), (7,)), ((2, 1, 3, 7), (5, 7, 1)),
                                    ((0, 7), (7, 2)), ((2, 0), (0, 3)), ((7,), (2, 7, 3)),
                                    ((2, 3, 7), (7,))], ids=str)  # fmt: skip
def test_matmul_of_every_rank(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (floats(*shape) for shape in shapes)
    nodes = Nodes({"a": ("float32", a.shape), "b": ("float32", b.shape)})
    (found,) = evaluated(nodes.graph(nodes.add("MatMul", "a", "b")), {"a": a, "b": b})
    expected = np.matmul(a, b)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", [
    "ij,jk->ik", "bhqd,bhkd->bhqk", "bhqk,bhkd->bqhd", "ij->ji", "ij->", "ii->i", "ii", "ij,ij->i", "i,j->ij",
    "ij,kj,kl->il", "...ij,...jk->...ik", "b...d,d->b...", "bij,bjk", "iji->ij", "ab,cd->acbd", "ij,j",
])  # fmt: skip
def test_einsum_is_numpys(equation: str) -> None:
    sizes = dict(zip("abcdhijkq", (2, 3, 4, 5, 3, 4, 7, 2, 6), strict=True), l=5)
    arrays = []
    for i, term in enumerate(equation.split("->")[0].split(",")):
        # An ellipsis stands for two axes, of which the second operand repeats the first.
        hidden = [1 if i else 2, 3] if "..." in term else []
        before, _, after = term.partition("...")
        arrays.append(floats(*(sizes[x] for x in before), *hidden, *(sizes[x] for x in after)))
    nodes = Nodes({f"x{i}": ("float32", a.shape) for i, a in enumerate(arrays)})
    output = nodes.add("Einsum", *nodes.inputs, equation=equation)
    (found,) = evaluated(nodes.graph(output), {f"x{i}": a for i, a in enumerate(arrays)})
    expected = np.einsum(equation, *arrays)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_slices_are_numpys(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(0, 7) for _ in range(3))
    x = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    axes = rng.sample(range(3), rng.randint(1, 3))
    starts, ends = ([rng.choice([rng.randint(-9, 9), 2**63 - 1, -(2**63)]) for _ in axes] for _ in range(2))
    steps = [rng.choice([-3, -2, -1, 1, 2, 3]) for _ in axes]
    index = [slice(None)] * 3
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # numpy has no number for "before the first element".
        past = step < 0 and end < -shape[axis]
        index[axis] = slice(start, None if past else end, step)
    nodes = Nodes({"x": ("float32", shape)})
    negative = [axis - 3 if rng.random() < 0.5 else axis for axis in axes]
    output = nodes.add("Slice", "x", np.array(starts), np.array(ends), np.array(negative), np.array(steps))
    (found,) = evaluated(nodes.graph(output), {"x": x})
    np.testing.assert_array_equal(found, x[tuple(index)])


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads(mode: str) -> None:
    for pads in ([0, 2, 1, 0], [1, -1, 0, 3], [0, 0, 0, 0]):
        if mode == "constant" or min(pads) >= 0:
            stored("Pad", floats(3, 5), np.array(pads), np.float32(1.5) if mode == "constant" else None, mode=mode)


@pytest.mark.parametrize("negative", [0, 1])
@pytest.mark.parametrize("positive", [0, 1])
def test_infinities_of_each_sign(negative: int, positive: int) -> None:
    one("IsInf", SPECIAL.astype(np.float32), detect_negative=negative, detect_positive=positive)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("op", ["Min", "Max", "Sum", "Mean"])
def test_any_number_of_operands(op: str, count: int) -> None:
    one(op, *(floats(3, 1 if i else 7) for i in range(count)))


def test_powers_of_other_types() -> None:
    one("Pow", np.array([2, 3, 10, 10], np.int64), np.array([0.5, 2.0, -1.0, 0.5], np.float32))
    one("Pow", np.array([2, 3, 10], np.int32), np.array([1.5, 2.0, 0.0], np.float64))
    one("Pow", np.array([2, 3, 10], np.float32), np.array([2, -1, 0], np.int64))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64, np.uint8])
def test_clips(dtype: type) -> None:
    x = np.array([0, 1, 5, 100, 127], dtype)
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    for low, high in ((1, 5), (None, 5), (1, None), (None, None), (7, 3), (info.min, 5), (1, info.max)):
        operands = [None if bound is None else np.array(bound, dtype) for bound in (low, high)]
        while operands and operands[-1] is None:
            operands.pop()
        stored("Clip", x, *operands)
    nodes = Nodes({"x": (np.dtype(dtype).name, x.shape)})
    ends = (-np.inf, np.inf) if np.dtype(dtype).kind == "f" else (info.min, info.max)
    assert not nodes.graph(nodes.add("Clip", "x", *(np.array(end, dtype) for end in ends))).ops
    one("Clip", np.array([-2.5, 0, 9], np.float32), opset=10, min=-1.0, max=3.0)
    one("Clip", np.array([-2.5, 0, 9], np.float32), opset=10, max=3.0)
    one("Clip", np.array([-2.5, 0, 9], np.float32), opset=10, min=1.0)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.float32])
def test_signs_of_numbers_of_each_type(dtype: type) -> None:
    one("Sign", np.array([0, 1, 5, 100] if np.dtype(dtype).kind == "u" else [-7, 0, 3, -1], dtype))


def test_constants_of_each_kind() -> None:
    nodes = Nodes({})
    outputs = [
        nodes.add("Constant", value_int=5),
        nodes.add("Constant", value_ints=[1, -2, 3]),
        nodes.add("Constant", value_float=0.1),
        nodes.add("Constant", value_floats=[0.1, -2.5]),
    ]
    compare(nodes, outputs, {}, rtol=0)
    with pytest.raises(FrontendError, match="a constant given by value_string is not supported"):
        nodes.graph(nodes.add("Constant", value_string="a"))
    with pytest.raises(FrontendError, match="a constant given by nothing is not supported"):
        nodes.graph(nodes.add("Constant"))


def test_every_data_type_has_its_number() -> None:
    for name, number in TensorProto.DataType.items():
        if number in DTYPES:
            assert dtype_of(helper.tensor_dtype_to_np_dtype(number)) == DTYPES[number]
        elif number in OTHER_DTYPES:
            assert OTHER_DTYPES[number] == name.lower()
            with pytest.raises(Unsupported, match=f"the data type {name.lower()} is not supported"):
                dtype_named(number)
        else:
            assert name == "UNDEFINED" or number > max(OTHER_DTYPES), name
    with pytest.raises(Unsupported, match="the data type 99 is not supported"):
        dtype_named(99)


def test_broadcasting_from_an_axis_on_is_refused() -> None:
    nodes = Nodes({"x": ("float32", (2, 3)), "y": ("float32", (2,))}, 6)
    with pytest.raises(FrontendError, match="as before opset 7, is not supported"):
        nodes.graph(nodes.add("Add", "x", "y", axis=0, broadcast=1))


@pytest.mark.parametrize("op", ["Sinh", "Softplus", "Tan", "Mish"])
def test_functions_of_floats_refuse_integers(op: str) -> None:
    nodes = Nodes({"x": ("int32", (3,))})
    with pytest.raises(FrontendError, match="needs floats, not i32"):
        nodes.graph(nodes.add(op, "x"))


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("LeakyRelu", {"alpha": 0.3}), ("ThresholdedRelu", {"alpha": 0.3}), ("Elu", {"alpha": 0.3}),
        ("Celu", {"alpha": 0.3}), ("Selu", {"alpha": 0.3, "gamma": 1.2}), ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
        ("Shrink", {"lambd": 0.4, "bias": 0.3}), ("Shrink", {"lambd": 0.4}), ("Gelu", {"approximate": "tanh"}),
        ("Gelu", {}), ("Swish", {}), ("Swish", {"alpha": 1.0}), ("Swish", {"alpha": 2.0}), ("Swish", {"alpha": 0.5}),
    ],
)  # fmt: skip
def test_nonlinearities_with_parameters(op: str, attributes: dict[str, object]) -> None:
    one(op, np.linspace(-3, 3, 61).astype(np.float32), opset=24 if op == "Swish" else 21, **attributes)


def test_a_gelu_of_another_form_is_refused() -> None:
    nodes = Nodes({"x": ("float32", (3,))})
    with pytest.raises(FrontendError, match="approximate='odd' is neither of none, tanh"):
        nodes.graph(nodes.add("Gelu", "x", approximate="odd"))


def test_dropout_outside_training_is_nothing() -> None:
    x = floats(3, 7)
    for operands in ((), (np.float32(0.5),), (np.float32(0.5), np.array(False)), (np.float32(0), np.array(True))):
        nodes = Nodes({"x": ("float32", x.shape)})
        outputs = nodes.many("Dropout", "x", *operands, outputs=2)
        found, mask = evaluated(nodes.graph(*outputs), {"x": x})
        np.testing.assert_array_equal(found, x)
        np.testing.assert_array_equal(mask, np.ones(x.shape, bool))
    old = Nodes({"x": ("float32", x.shape)}, 10)
    kept, mask = old.many("Dropout", "x", outputs=2)
    np.testing.assert_array_equal(evaluated(old.graph(kept), {"x": x})[0], x)
    with pytest.raises(FrontendError, match=f"nothing computes the output '{mask}'"):
        old.graph(mask)
    for operands in ((np.float32(0.5), np.array(True)), (None, np.array(True))):
        nodes = Nodes({"x": ("float32", x.shape)})
        with pytest.raises(FrontendError, match="dropout while training is random"):
            nodes.graph(nodes.add("Dropout", "x", *operands))


@pytest.mark.parametrize("largest", [0, 1])
def test_top_k_keeps_the_order_of_equals(largest: int) -> None:
    x = RNG.integers(0, 4, (3, 33)).astype(np.float32)
    for k in (1, 7, 33):
        stored("TopK", x, np.array([k]), outputs=2, largest=largest)
    stored("TopK", x, np.array([2]), outputs=2, axis=0, largest=largest)


@pytest.mark.parametrize("seed", range(8))
def test_gathers_and_scatters_of_several_axes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 3, 5)).astype(np.float32)
    index = np.stack([rng.integers(-n, n, (2, 6)) for n in x.shape[: 1 + seed % 3]], -1)
    one("GatherND", x, index)
    one("GatherElements", x, rng.integers(-3, 3, (4, 2, 5)), axis=1)
    one("Gather", x, rng.integers(-5, 5, (2, 2)), axis=-1)
    updates = rng.standard_normal((2, 6, *x.shape[index.shape[-1] :])).astype(np.float32)
    for reduction in ("add", "mul", "max", "min"):
        one("ScatterND", x, index, updates, reduction=reduction)
        elements = rng.integers(-4, 4, (3, 2, 5))
        one("ScatterElements", x, elements, rng.standard_normal((3, 2, 5)).astype(np.float32), reduction=reduction)
    once = np.stack([rng.permutation(4)[:3]], -1)
    one("ScatterND", x, once, rng.standard_normal((3, 3, 5)).astype(np.float32))


@pytest.mark.parametrize("seed", range(16))
def test_convolutions_are_torchs(seed: int) -> None:
    rng = random.Random(seed)
    spatial = rng.randint(1, 3)
    groups = rng.choice([1, 1, 2, 4])
    kernel = [rng.randint(1, 3) for _ in range(spatial)]
    strides, dilations = ([rng.randint(1, 3) for _ in range(spatial)] for _ in range(2))
    pads = [rng.randint(0, 2) for _ in range(spatial)]
    sizes = [rng.randint(7, 9) for _ in range(spatial)]
    x, w, bias = floats(2, 4, *sizes), floats(8, 4 // groups, *kernel), floats(8)
    options = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads * 2, "group": groups}
    nodes = Nodes({"x": ("float32", x.shape)})
    (found,) = evaluated(nodes.graph(nodes.add("Conv", "x", w, bias, **options)), {"x": x})
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    expected = function(*map(torch.from_numpy, (x, w, bias)), strides, pads, dilations, groups).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # The transposed one takes the result back to the input's channels.
    extra = [min(1, step - 1) for step in strides]
    nodes = Nodes({"x": ("float32", found.shape)})
    output = nodes.add("ConvTranspose", "x", w, **options, output_padding=extra)
    back = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    (turned,) = evaluated(nodes.graph(output), {"x": found})
    wanted = back(torch.from_numpy(found), torch.from_numpy(w), None, strides, pads, extra, groups, dilations).numpy()
    assert turned.shape == wanted.shape
    np.testing.assert_allclose(turned, wanted, rtol=1e-5, atol=1e-4)


def test_a_convolution_over_free_sizes() -> None:
    w = floats(6, 4, 3)
    nodes = Nodes({"x": ("float32", ("B", 4, "S"))})
    output = nodes.add("Conv", "x", w, kernel_shape=[3], pads=[2, 0])
    for batch, tokens in ((1, 1), (3, 31)):
        compare(nodes, [output], {"x": floats(batch, 4, tokens)})


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize("ceil", [0, 1])
def test_pooling(op: str, ceil: int) -> None:
    for kernel, stride, pad in ((2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 3, 0)):
        options = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "ceil_mode": ceil}
        one(op, floats(1, 3, 9, 8), opset=18, **options)
        if op == "AveragePool" and not ceil:
            one(op, floats(1, 3, 9, 8), count_include_pad=1, **options)


@exact_products
@pytest.mark.parametrize("rows", [1, 2])
def test_integer_products_with_zero_points(rows: int) -> None:
    a, b = RNG.integers(0, 255, (3, 31)).astype(np.uint8), RNG.integers(-128, 127, (31, 7)).astype(np.int8)
    zero = np.array(7, np.uint8), np.array(-3, np.int8)
    columns = RNG.integers(-9, 9, 7).astype(np.int8)
    one("MatMulInteger", a, b, zero[0], zero[1] if rows == 1 else columns)


class TestTranslation:
    """What goes wrong is said once, with the names of nodes."""

    def test_every_op_that_is_missing_is_named_at_once(self) -> None:
        nodes = Nodes({"x": ("float32", (2, 3))})
        first = nodes.add("Fancy", "x")
        second = nodes.add("Plain", first)
        nodes.add("Unneeded", second)
        third = nodes.add("Fancy", second)
        with pytest.raises(FrontendError) as caught:
            nodes.graph(third)
        assert str(caught.value) == (
            "the model uses operations that are not supported: Fancy (2x: node_0, node_3); Plain (1x: node_1)"
        )

    @pytest.mark.parametrize(
        ("op", "attributes", "message"),
        [
            ("Concat", {"axis": 7}, "axis 7 is outside"),
            ("Transpose", {"perm": [0, 0]}, "no permutation"),
            ("Softmax", {"axis": 2}, "axis 2 is outside"),
            ("Cast", {"to": TensorProto.STRING}, "data type string"),
            ("DepthToSpace", {"blocksize": 2}, "is not valid"),
            ("LRN", {}, "is not valid"),
        ],
    )
    def test_a_wrong_node_is_named(self, op: str, attributes: dict[str, object], message: str) -> None:
        nodes = Nodes({"x": ("float32", (2, 3))})
        with pytest.raises(FrontendError, match=rf"^{op} \(node_0\).*{message}"):
            nodes.graph(nodes.add(op, "x", **attributes))

    def test_only_what_the_outputs_need_is_translated(self) -> None:
        nodes = Nodes({"x": ("float32", (2, 3))})
        nodes.add("Unsupported", "x")
        assert [op.name for op in nodes.graph(nodes.add("Exp", "x")).ops] == ["t.exp"]

    def test_a_function_of_the_model_is_put_in_its_place(self) -> None:
        inner = Node("LeakyRelu", "", 21, "leaky", ("a",), ("b",), {"alpha": Reference("slope", 0.5)})
        body = Body(("a",), ("b",), (inner, Node("Neg", "", 21, "negative", ("b",), ("c",))))
        function = Body(("a",), ("c",), body.nodes)
        translation = Translation({("own", "Bent"): function})
        x = Input("x", Tensor((3,), "f32"))
        for given, slope in (({"slope": 0.25}, 0.25), ({}, 0.5)):
            call = Node("Bent", "own", 1, "call", ("x",), ("y",), given)
            (item,) = translation.run(Body(("x",), ("y",), (call,)), {"x": Item(x)})
            from llmc.compiler.ir.graph import Graph

            (found,) = evaluated(Graph("g", (x,), (("y", item.value),)), {"x": np.array([1, -1, -2], np.float32)})
            np.testing.assert_array_equal(found, [-1, slope, 2 * slope])

    def test_a_translation_is_for_versions_in_which_the_op_was_changed(self) -> None:
        versions: dict[tuple[str, str], set[int]] = {}
        for schema in onnx.defs.get_all_schemas_with_history():
            versions.setdefault((schema.domain, schema.name), set()).add(schema.since_version)
        discover()
        wrong = [
            (op, since)
            for (domain, op), handlers in HANDLERS.items()
            for since, _ in handlers
            if domain == "" and since > 1 and since not in versions[domain, op]
        ]
        assert not wrong

    def test_supported_ops_are_listed_by_name(self) -> None:
        found = supported_ops()
        assert len(found) >= 190
        assert list(found) == sorted(set(found))
        assert {"MatMul", "Softmax", "com.microsoft.MatMulNBits"} <= set(found)


def branch(name: str, op: str, value: float) -> object:
    """A graph without inputs that uses x from around it."""
    constant = helper.make_tensor(f"{name}_constant", TensorProto.FLOAT, [], [value])
    return helper.make_graph(
        [helper.make_node(op, ["x", f"{name}_constant"], [f"{name}_result"], name=f"{name}_node")],
        name,
        [],
        [helper.make_tensor_value_info(f"{name}_result", TensorProto.FLOAT, None)],
        [constant],
    )


@pytest.mark.parametrize("known", [True, False, None])
def test_branches_known_and_unknown(known: bool | None) -> None:
    nodes = Nodes({"x": ("float32", (2, 3)), "flag": ("bool", ())})
    condition = "flag" if known is None else np.array(known)
    output = nodes.add("If", condition, then_branch=branch("then", "Add", 1), else_branch=branch("else", "Mul", 3))
    if known is not None:
        assert [type(op) for op in nodes.graph(output).ops] == [e.Constant, e.Add if known else e.Mul]
    for flag in (True, False):
        arrays = {"x": floats(2, 3), "flag": np.array(flag)}
        compare(nodes, [output], arrays)
