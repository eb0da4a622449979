"""Vectorised softmax and activations equal their meaning, at sizes around those of a vector, and with infinities."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from program_batch import ProgramBatch

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.targets import machine_named
from llmc.targets.lowering import Program

SIZE = symbol("S", 1, 4000)
X = Input("x", Tensor((3, SIZE), "f32"))
FIXED = Input("y", Tensor((2, 5, 37), "f32"))
GRAPH = Graph(
    "functions",
    (X, FIXED),
    (
        ("softmax", s.Softmax(X, 1)),
        ("fixed softmax", s.Softmax(FIXED, -1)),
        ("fixed sigmoid", e.Sigmoid(FIXED)),
        *((kind, e.Activation(X, kind)) for kind in e.ACTIVATIONS),
    ),
)


@functools.cache
def compiled(machine: str) -> tuple[ProgramBatch, Program]:
    batch = ProgramBatch(machine_named(machine))
    program = batch.add(GRAPH)
    batch.build()
    return batch, program


def check(machine: str, x: np.ndarray) -> dict[str, np.ndarray]:
    batch, program = compiled(machine)
    data = {"x": x, "y": np.linspace(-9, 9, 370, dtype=np.float32).reshape(2, 5, 37)}
    expected, found = evaluate(GRAPH, data, data.__getitem__), batch.run(program, data)
    for name, value in expected.items():
        # The vector functions are within 1e-6 of the exact ones (vector_math.py).
        np.testing.assert_allclose(found[name], np.asarray(value), rtol=3e-6, atol=1e-6, err_msg=name)
    return found


@pytest.mark.parametrize("machine", ["native", "x86-64-v3"])
def test_functions_equal_their_meaning(machine: str) -> None:
    choices = {item.op.name: item.choice.rule for item in compiled(machine)[1].ops}
    assert choices == {
        "t.softmax": "softmax_vectors",
        "t.activation": "activation_vectors",
        "t.sigmoid": "activation_vectors",
    }
    for size in (1, 7, 8, 15, 16, 31, 33, 129, 1023, 1025):
        check(machine, np.random.default_rng(size).standard_normal((3, size)).astype(np.float32) * 6)


@pytest.mark.parametrize("machine", ["native", "x86-64-v3"])
def test_what_vanishes_does_so_however_large_x_is(machine: str) -> None:
    """x times something that vanishes is 0 for any number, and not a number for minus infinity: as it is spelled."""
    x = np.full((3, 37), 0.5, np.float32)
    x[0, :6] = -88, -89, -1e5, -1e30, -3e38, -np.inf
    found = check(machine, x)
    for name in ("silu", "quick_gelu", "gelu", "gelu_tanh"):
        assert np.abs(found[name][0, :5]).max() < 1e-30 and np.isnan(found[name][0, 5]), name


@pytest.mark.parametrize("machine", ["native", "x86-64-v3"])
def test_a_row_with_nothing_to_share_is_not_a_number_and_others_are(machine: str) -> None:
    for size in (5, 16, 37):
        x = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
        x[0, -1] = np.nan
        x[1, 0] = -np.inf
        x[2, :] = -np.inf
        found = check(machine, x)["softmax"]
        assert np.isnan(found[[0, 2]]).all()
        assert found[1, 0] == 0 and np.isclose(found[1].sum(), 1)
        x[2, 1] = np.inf
        assert np.isnan(check(machine, x)["softmax"][2]).all()


def test_other_axes_and_dtypes_have_plain_kernels() -> None:
    batch = ProgramBatch(machine_named("native"))
    half = Input("h", Tensor((3, 4), "f16"))
    outputs = (("a", s.Softmax(X, 0)), ("b", s.Softmax(half, 1)), ("c", e.Activation(half, "gelu")))
    program = batch.add(Graph("others", (X, half), outputs))
    assert {item.choice.rule for item in program.ops} == {"plain_rule"}
