"""Near misses of norms and activations, and numbers at their limits: the artifact's arrays are onnxruntime's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import CACHE
from onnx import TensorProto
from onnx_files import write
from onnx_graphs import Nodes

import llmc
from llmc.errors import LlmcError
from llmc.runtime.runtime import Runtime

X = {"x": ("f4", ("n", 32))}
f32 = np.float32
Build = Callable[[Nodes], list[str]]


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(32).astype(f32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def mean(g: Nodes, x: str, axis: int = -1) -> str:
    return g.add("ReduceMean", x, i64(axis))


def mean_square(g: Nodes, x: str, axis: int = -1) -> str:
    return mean(g, g.add("Mul", x, x), axis)


def centred(g: Nodes) -> str:
    return g.add("Sub", "x", mean(g, "x"))


def near_rms_norms(g: Nodes) -> list[str]:
    """Epsilon outside of the root, the greater of two instead of a sum, over the other axis, and one that is a norm."""
    square = mean_square(g, "x")
    outside = g.add("Mul", g.add("Div", "x", g.add("Add", g.add("Sqrt", square), f32(0.5))), weights())
    greater = g.add("Div", "x", g.add("Sqrt", g.add("Max", square, f32(2.0))))
    other_axis = g.add("Div", "x", g.add("Sqrt", g.add("Add", mean_square(g, "x", 0), f32(0.1))))
    true = g.add("Mul", g.add("Div", "x", g.add("Sqrt", g.add("Add", mean_square(g, "x"), f32(0.1)))), weights())
    return [outside, greater, other_axis, true]


def norms_with_weights_of_the_caller(g: Nodes) -> list[str]:
    y = g.add("Div", "x", g.add("Sqrt", g.add("Add", mean_square(g, "x"), f32(0.1))))
    return [g.add("Mul", y, "w"), g.add("Add", y, "w")]


def norms_with_a_column_of_weights(g: Nodes) -> list[str]:
    """Of a square x: the weight is one number a row, not one a feature."""
    y = g.add("Div", "x", g.add("Sqrt", g.add("Add", mean_square(g, "x"), f32(0.1))))
    return [g.add("Mul", y, g.add("Unsqueeze", weights(), i64(1)))]


def near_layer_norms(g: Nodes) -> list[str]:
    """Unbiased, and the row itself over the deviation of what is centred."""
    c = centred(g)
    unbiased = g.add("Div", g.add("ReduceSum", g.add("Mul", c, c), i64(-1)), f32(31))
    raw = g.add("Div", "x", g.add("Sqrt", g.add("Add", mean_square(g, c), f32(1e-5))))
    return [g.add("Div", c, g.add("Sqrt", g.add("Add", unbiased, f32(1e-5)))), raw]


def layer_norm_of_no_variance(g: Nodes) -> list[str]:
    return [g.add("LayerNormalization", "x", weights(), weights(1), epsilon=0.0)]


def near_gelus(g: Nodes) -> list[str]:
    """Each is one constant or one factor away from an activation that has a name; the first has it."""
    x = g.add("Mul", "x", f32(3))

    def erf(root: float, one: float = 1.0) -> str:
        return g.add("Add", g.add("Erf", g.add("Div", x, f32(root))), f32(one))

    def tanh(inner: str) -> str:
        return g.add("Add", f32(1), g.add("Tanh", g.add("Mul", f32(0.7978845608), g.add("Add", x, inner))))

    square = g.add("Mul", x, x)
    cube = g.add("Mul", x, square)
    half = g.add("Mul", x, f32(0.5))
    return [
        g.add("Mul", g.add("Mul", x, erf(np.sqrt(2))), f32(0.5)),
        g.add("Mul", x, erf(np.sqrt(2))),
        g.add("Mul", g.add("Mul", x, erf(2.0)), f32(0.5)),
        g.add("Mul", x, erf(np.sqrt(2), 0.9)),
        g.add("Mul", x, g.add("Sigmoid", g.add("Mul", x, f32(1.5)))),
        g.add("Mul", x, g.add("Sigmoid", g.add("Mul", x, f32(1.70205)))),
        g.add("Mul", half, tanh(g.add("Mul", f32(0.044), cube))),
        g.add("Mul", half, tanh(g.add("Mul", f32(0.044715), square))),
        g.add("Mul", square, g.add("Sigmoid", x)),
    ]


def numbers_at_their_limits(g: Nodes) -> list[str]:
    plain = ("Relu", "Sigmoid", "Tanh", "Gelu", "Exp", "Erf", "LeakyRelu", "Sign", "Round", "Softplus", "HardSwish")
    rows = [g.add(op, "x") for op in (*plain, "Elu", "IsNaN", "Sqrt", "Reciprocal")]
    rows += [g.add(op, "x", f32(0)) for op in ("Max", "Less")]
    rows += [g.add("Pow", "x", f32(power)) for power in (0.5, -0.5, 2, 3, -1, -2, 0)]
    rows += [g.add(op, "x", axis=-1) for op in ("Softmax", "LogSoftmax", "ArgMax")]
    rows += [g.add(op, "x", i64(-1)) for op in ("ReduceMax", "ReduceMean")]
    relu = g.add("Relu", "x")
    silu = g.add("Mul", "x", g.add("Sigmoid", "x"))
    clipped = [g.add("Min", "x", f32(1)), g.add("Clip", "x", f32(-1), f32(1))]
    return [*rows, *clipped, g.add("Gelu", "x", approximate="tanh"), silu, g.add("Mul", relu, relu)]


def integers(g: Nodes) -> list[str]:
    two = [g.add(op, "a", "b") for op in ("Mul", "Add", "Div", "Mod", "Max")]
    kinds = (TensorProto.INT8, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT)
    casts = [g.add("Cast", "a", to=kind) for kind in kinds]
    back = g.add("Cast", casts[1], to=TensorProto.INT64)
    more = [g.add("Sub", "a", np.int64(-(2**63))), g.add("Mul", g.add("Mul", "a", np.int64(3)), np.int64(5))]
    return [*two, g.add("Mod", "a", "b", fmod=1), g.add("Abs", "a"), g.add("Neg", "a"), *casts, back, *more]


def casts(g: Nodes) -> list[str]:
    kinds = (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT16)
    found = [g.add("Cast", "x", to=kind) for kind in kinds]
    return [*found, g.add("Cast", found[-1], to=TensorProto.FLOAT)]


def odd_sizes(g: Nodes) -> list[str]:
    """Halves of an odd size change places; pairs of rows; backwards; twice."""
    size = g.add("Shape", "x", start=0, end=1)
    half = g.add("Div", size, i64(2))
    first, rest = g.add("Slice", "x", i64(0), half, i64(0)), g.add("Slice", "x", half, size, i64(0))
    even = g.add("Slice", "x", i64(0), g.add("Mul", half, i64(2)), i64(0))
    pairs = g.add("Reshape", even, g.add("Concat", half, i64(2, 32), axis=0))
    backwards = g.add("Slice", "x", i64(-1), i64(-(2**62)), i64(0), i64(-2))
    return [
        g.add("Concat", rest, first, axis=0), g.add("ReduceSum", pairs, i64(1), keepdims=0), backwards,
        g.add("Tile", "x", i64(2, 1)),
    ]  # fmt: skip


def constants_that_round(g: Nodes) -> list[str]:
    """What f32 makes of constants: overflow to infinity, 0.1 + 0.2, 3 * 1.1."""
    infinite = g.add("Div", g.add("Mul", f32(1e30), f32(1e30)), f32(1e30))
    third = g.add("Add", f32(0.1), f32(0.2))
    negative = g.add("Neg", "x")
    return [
        g.add("Mul", "x", g.add("Reciprocal", infinite)),
        g.add("Where", g.add("Equal", third, f32(0.3)), "x", negative),
        g.add("Where", g.add("Greater", third, f32(0.3)), "x", negative),
        g.add("Where", g.add("Less", g.add("Mul", f32(3), f32(1.1)), f32(3.3)), "x", negative),
        g.add("Mul", "x", g.add("Floor", g.add("Div", f32(0.7), f32(0.1)))),
    ]


def _limits() -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((9, 32)).astype(f32) * 2
    x[0, 0], x[1, 1], x[2, 2], x[3] = np.nan, np.inf, -np.inf, -np.inf
    x[4, :2], x[5], x[5, ::2], x[6, 3:5], x[7, 1:3] = (1e38, -1e38), 0, -0.0, (100, -100), (2.5, 3.5)
    return x


def _flat() -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((9, 32)).astype(f32)
    x[3], x[4, 5], x[5, 1] = 2, np.nan, np.inf
    return x


def _integers() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    a = rng.integers(-(2**62), 2**62, (9, 32))
    a[0], a[1, 0] = np.arange(-16, 16), -(2**63)
    return {"a": a, "b": rng.integers(1, 9, (9, 32)) * rng.choice([-1, 1], (9, 32))}


def _casts() -> np.ndarray:
    x = (np.random.default_rng(1).standard_normal((9, 32)) * 1000).astype(f32)
    x[0, :5] = 0.5, -0.5, 70000, 1e-8, -0.0
    return x


TWO = {"a": ("i8", ("n", 32)), "b": ("i8", ("n", 32))}
# What is built, its inputs, and values for them where random ones are not enough.
CASES: list[tuple[Build, dict[str, tuple[str, tuple[object, ...]]], Callable[[], object] | None]] = [
    (near_rms_norms, X, None),
    (norms_with_weights_of_the_caller, {**X, "w": ("f4", (32,))}, None),
    (norms_with_a_column_of_weights, {"x": ("f4", (32, 32))}, None),
    (near_layer_norms, X, None),
    (layer_norm_of_no_variance, X, _flat),
    (near_gelus, X, None),
    (numbers_at_their_limits, X, _limits),
    (integers, TWO, _integers),
    (casts, X, _casts),
    (odd_sizes, X, None),
    (constants_that_round, X, None),
]


def compile_model(g: Nodes, outputs: list[str], folder: Path) -> Runtime:
    path = write(g.model(*outputs), folder / "model.onnx")
    sizes = {"n": 64} if any("n" in shape for _, shape in g.inputs.values()) else {}
    llmc.compile(path, folder / "model.so", dtype="f32", max_dims=sizes, kernel_cache=CACHE)
    return Runtime.load(folder / "model.so", threads=2)


@pytest.mark.parametrize(("build", "inputs", "values"), CASES, ids=[case[0].__name__ for case in CASES])
def test_arrays_are_onnxruntime_s(
    build: Build, inputs: dict[str, tuple[str, tuple[int | str, ...]]], values: Callable[[], object], tmp_path: Path
) -> None:
    g = Nodes(inputs)
    outputs = build(g)
    rng = np.random.default_rng(5)
    given = values() if values else None
    if isinstance(given, np.ndarray):
        given = {"x": given}
    if given is None:
        given = {
            name: rng.standard_normal([9 if size == "n" else size for size in shape]).astype(dtype)
            for name, (dtype, shape) in inputs.items()
        }
    found = list(compile_model(g, outputs, tmp_path).run(given).values())
    expected = g.runtime(*outputs).run(outputs, given)
    for name, ours, theirs in zip(outputs, found, expected, strict=True):
        # f32 throughout; the approximated functions are within 1e-6 of the exact ones (vector_math.py).
        exact = {} if np.asarray(theirs).dtype.kind == "f" else {"rtol": 0, "atol": 0}
        np.testing.assert_allclose(ours, theirs, **({"rtol": 3e-6, "atol": 2e-6} | exact), err_msg=name)


def scores(g: Nodes, scale: object) -> str:
    return g.add("Mul", g.add("MatMul", "q", g.add("Transpose", "k", perm=[0, 2, 1])), scale)


QKV = dict.fromkeys("qkv", ("f4", (2, "n", 16)))


def test_attention_with_a_mask_that_is_given_and_a_scale_a_head(tmp_path: Path) -> None:
    """A query that sees no key is not a number, or 0 where the model says so."""
    g = Nodes({**QKV, "m": ("?", (1, "n", "n"))})
    shown = g.add("Where", "m", scores(g, np.array([[[0.2]], [[0.5]]], f32)), f32(-np.inf))
    p = g.add("Softmax", shown, axis=-1)
    outputs = [g.add("MatMul", x, "v") for x in (p, g.add("Where", g.add("IsNaN", p), f32(0), p))]
    rng = np.random.default_rng(1)
    given = {name: rng.standard_normal((2, 9, 16)).astype(f32) for name in "qkv"} | {"m": rng.random((1, 9, 9)) < 0.5}
    given["m"][0, 4] = False
    found = compile_model(g, outputs, tmp_path).run(given)
    for ours, theirs in zip(found.values(), g.runtime(*outputs).run(outputs, given), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("op", ["RandomNormalLike", "Dropout"])
def test_chance_is_refused(op: str, tmp_path: Path) -> None:
    g = Nodes(X)
    random = g.add(op, "x") if op == "RandomNormalLike" else g.add(op, "x", f32(0.5), np.array(True))
    with pytest.raises(LlmcError, match=op):
        compile_model(g, [g.add("Sub", random, "x")], tmp_path)
