"""Plain kernels equal the ops' numpy meaning, at sizes that are no multiple of anything."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import Compiled, aligned

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import concrete, symbol
from llmc.compiler.ir.op import REGISTRY, Input, Op
from llmc.compiler.ir.types import NUMPY_DTYPES, Tensor
from llmc.targets import machine_named
from llmc.targets.cpu.plain import PlainCall, plain_call
from llmc.targets.cpu.plain_builder import FORMS
from llmc.targets.template import Chooser

T = symbol("T", 1, 512)
X = Input("x", Tensor((T, 7, 5), "f32"))
POSITIVE = Input("z", Tensor((T, 7, 5), "f32"))
Y = Input("y", Tensor((7, 1), "f32"))
INTEGERS = Input("n", Tensor((T, 7, 5), "i64"))
INDICES = Input("i", Tensor((3,), "i32"))
CONDITION = Input("c", Tensor((T, 7, 5), "bool"))
MATRIX = Input("w", Tensor((5, 9), "f32"))
BINARY = (e.Add, e.Sub, e.Mul, e.Div, e.FloorDivide, e.Mod, e.Maximum, e.Minimum)
COMPARISONS = (e.Equal, e.NotEqual, e.Less, e.LessEqual, e.Greater, e.GreaterEqual)
REDUCTIONS = (s.Sum, s.Mean, s.Max, s.Min)

CASES: list[Op] = [
    *(kind(POSITIVE) for kind in e.Unary.__subclasses__() if kind is not e.Not),
    *(kind(X) for kind in (e.Neg, e.Abs, e.Exp, e.Tanh, e.Sigmoid, e.Erf, e.Floor, e.Round, e.Relu)),
    e.Not(CONDITION),
    *(kind(X, POSITIVE) for kind in BINARY),
    *(kind(X, Y) for kind in BINARY),
    *(kind(INTEGERS, e.constant(3)) for kind in BINARY),
    e.Pow(POSITIVE, X),
    *(kind(X, POSITIVE) for kind in COMPARISONS),
    *(kind(INTEGERS, e.constant(1)) for kind in COMPARISONS),
    e.And(CONDITION, CONDITION),
    e.Or(CONDITION, CONDITION),
    e.Where(CONDITION, X, Y),
    *(e.Cast(X, dtype) for dtype in ("i32", "i64", "bf16", "f16", "bool")),
    *(e.Activation(X, kind) for kind in e.ACTIVATIONS),
    s.Iota(T + 2),
    s.Iota((T + 5) // 4, "i32"),
    s.Transpose(X, (2, 0, 1)),
    s.Broadcast(Y, (T, 7, 5)),
    s.Slice(X, 1, 2, 7, 2),
    s.Slice(X, 0, T - 1, T),
    s.Concat((X, POSITIVE, X), 1),
    s.Concat((X, POSITIVE), 0),
    s.Pad(X, (0, 1, 2), (0, 0, 1), 0.5),
    s.Gather(X, INDICES, 2),
    s.GatherElements(X, INTEGERS, 2),
    *(s.Cumsum(X, axis) for axis in (0, 1, 2)),
    *(kind(X, axes, keep) for kind in REDUCTIONS for axes, keep in (((1, 2), True), ((0,), False), ((2,), True))),
    s.Max(INTEGERS, (1,)),
    s.Any(CONDITION, (1,)),
    s.All(CONDITION, (2,), False),
    s.Argmax(X, 1),
    s.Softmax(X, 2),
    s.Softmax(X, 0),
    s.Matmul(X, MATRIX),
    s.Matmul(X, s.Transpose(POSITIVE, (0, 2, 1))),
]


def inputs(tokens: int) -> dict[Input, np.ndarray]:
    rng = np.random.default_rng(tokens)
    shape = (tokens, 7, 5)
    return {
        X: rng.standard_normal(shape, np.float32),
        POSITIVE: rng.random(shape, np.float32) + 0.1,
        Y: rng.standard_normal((7, 1), np.float32) + 3,
        INTEGERS: rng.integers(-5, 5, shape),
        INDICES: np.array([1, -1, 4], np.int32),
        CONDITION: rng.random(shape) > 0.5,
        MATRIX: rng.standard_normal((5, 9), np.float32),
    }


@pytest.mark.parametrize("op", CASES, ids=lambda op: repr(op).replace(" ", "_"))
def test_plain_kernel_equals_meaning(op: Op) -> None:
    machine = machine_named("native")
    for tokens in (1, 3):
        data: dict[object, np.ndarray] = dict(inputs(tokens))
        for operand in op.operands:
            if isinstance(operand, Op):
                data[operand] = operand.bind({"T": tokens}).evaluate(*(data[x] for x in operand.operands))
        arguments = [data[x] for x in op.operands]
        expected = op.bind({"T": tokens}).evaluate(*arguments)
        out = aligned(np.full(expected.shape, 111, NUMPY_DTYPES[op.dtype]))
        call = plain_call(op, Chooser(machine))
        assert isinstance(call, PlainCall)
        symbols = dict(call.kernel.params)["symbols"]
        count = concrete(call.units, {"T": tokens})
        compiled = Compiled(call.kernel, machine)
        half = count // 2  # any split of the units gives the same
        for begin, end in ((half, count), (0, half)):
            compiled(*(aligned(a) for a in arguments), out, *(tokens for _ in symbols), begin, end)
        # One f32 rounding a step of a short reduction; libm against numpy in transcendental functions.
        np.testing.assert_allclose(out.astype(np.float64), expected.astype(np.float64), rtol=3e-6, atol=3e-6)


def test_every_tensor_op_has_a_plain_kernel() -> None:
    tensor_ops = {name for name in REGISTRY if name.startswith("t.")} - {"t.constant", "t.reshape", "t.checked_index"}
    # Constants are known when compiling, reshapes share their operand's buffer, a kernel that can fail says so.
    assert tensor_ops == set(FORMS)
