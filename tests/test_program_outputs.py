"""The step of any graph: its own inputs, outputs and names of sizes; every output has memory of its own."""

from __future__ import annotations

import numpy as np
import pytest
from program_harness import CompiledGraph

from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.elementwise import Add, Mul, constant
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.structural import Concat, Matmul, Reshape, Slice, Transpose
from llmc.compiler.ir.types import Tensor
from llmc.errors import CompileError
from llmc.targets import machine_named
from llmc.targets.cpu.driver import c_expression
from llmc.targets.memory import most

# Names that are words of C, of the step's own sizes, or no identifiers at all.
N, M = symbol("int", 0, 129), symbol("T", 1, 40)
X, Y = Input("logits", Tensor((N, 5), "f32")), Input("ids", Tensor((5, M), "f32"))
SIZES = [(1, 1), (7, 31), (33, 2), (129, 40)]


def compiled(*outputs: tuple[str, Value], inputs: tuple[Input, ...] = (X, Y), **params: np.ndarray) -> CompiledGraph:
    return CompiledGraph(Graph("any", inputs, outputs), machine_named("native"), params, task="run")


def agrees(program: CompiledGraph, inputs: dict[str, np.ndarray], **params: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of the compiled graph, which are those of the numpy meaning."""
    found = program.run_arrays(inputs)
    expected = evaluate(program.graph, inputs, params.__getitem__)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], np.asarray(array), rtol=2e-6, atol=2e-6, err_msg=name)
    return found


def random_inputs(n: int, m: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "logits": rng.standard_normal((n, 5), np.float32),
        "ids": rng.standard_normal((5, m), np.float32),
    }


def test_inputs_and_sizes_may_have_any_names() -> None:
    program = compiled(("product", Matmul(X, Y)), ("wide", Transpose(Y, (1, 0))))
    for n, m in SIZES:
        agrees(program, random_inputs(n, m))


def test_outputs_that_share_memory_are_copied() -> None:
    """One value under two names, reshaped, also used further on; inputs and constants as outputs."""
    table = Param("table", Tensor((3, 4), "f32"))
    total = Add(X, X)
    program = compiled(
        ("flat", Reshape(total, (5 * N,))),
        ("total", total),
        ("again", total),
        ("further", Mul(total, constant(3.0, "f32"))),
        ("input", X),
        ("flat input", Reshape(X, (5 * N,))),
        ("table", Reshape(table, (4, 3))),
        table=np.arange(12, dtype=np.float32).reshape(3, 4),
    )
    params = {"table": np.arange(12, dtype=np.float32).reshape(3, 4)}
    for n, m in SIZES:
        agrees(program, random_inputs(n, m), **params)


def test_empty_inputs_give_empty_outputs() -> None:
    program = compiled(("total", Add(X, X)), ("input", X), ("other", Add(Y, Y)))
    found = agrees(program, random_inputs(0, 3))
    assert found["total"].shape == (0, 5)


def test_parts_of_a_whole_lie_apart() -> None:
    """Slices whose sizes shrink as another size grows are planned at their largest."""
    k = symbol("k", 0, 40)
    x = Input("x", Tensor((40 - k, 3), "f32"))
    other = Input("other", Tensor((k, 3), "f32"))
    both = Concat((Mul(x, constant(2.0, "f32")), Mul(other, constant(5.0, "f32"))), 0)
    whole = Mul(both, both)
    program = compiled(("first", Slice(whole, 0, 0, 1, 1)), ("all", Add(whole, whole)), inputs=(x, other))
    rng = np.random.default_rng(1)
    for size in (0, 1, 7, 40):
        agrees(program, {"x": rng.standard_normal((40 - size, 3), np.float32), "other": np.ones((size, 3), np.float32)})


@pytest.mark.parametrize(
    "size, largest", [(40 - M, 39), (N * M, 129 * 40), ((N + 3) // 2, 66), (2 * N - M, 257), (7, 7)]
)
def test_the_most_of_a_size_is_never_too_little(size: int | Dim, largest: int) -> None:
    assert most(size, {"int": 129, "T": 40}) == largest


def test_a_size_without_a_greatest_value_is_named() -> None:
    with pytest.raises(CompileError, match="greatest value of T"):
        most(N * M, {"int": 3})


def test_divisions_round_down() -> None:
    """C rounds towards zero; sizes round down."""
    assert c_expression((N - 3) // 2, {"int": "n"}).count("floor_division") == 1
    x = Input("x", Tensor((N, 1), "f32"))
    y = Input("y", Tensor(((N - 1) // 2 + 1, 1), "f32"))
    program = compiled(("y", Mul(y, constant(2.0, "f32"))), ("x", Add(x, x)), inputs=(x, y))
    for n in (0, 1, 2, 7, 128):
        agrees(program, {"x": np.ones((n, 1), np.float32), "y": np.ones(((n - 1) // 2 + 1, 1), np.float32)})
