"""split-projections: parts that lie head by head become projections of their own, and only those."""

from __future__ import annotations

import numpy as np
import pytest
from attention_harness import random_weights, weight

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Reshape, Slice
from llmc.compiler.ir.types import Tensor, precise
from llmc.compiler.passes.manager import run_passes
from llmc.compiler.passes.split_projections import SplitProjections

T = symbol("T", 1, 64)
PARTS = {
    "third axis": ((3, 4, 5), 2, [(0, 2), (2, 3), (3, 4)]),
    "last axis": ((3, 20), 2, [(0, 5), (5, 10), (10, 20)]),
    "some channels unused": ((3, 20), 2, [(0, 5), (7, 9)]),
}


def graph_of(shape: tuple[int, ...], axis: int, ranges: list[tuple[int, int]], bias: bool = True) -> Graph:
    x = Input("x", Tensor((T, 8), "f32"))
    outputs = int(np.prod(shape))
    y = Linear(x, weight("w", outputs, 8), weight("b", outputs) if bias else None)
    heads = Reshape(y, (T, *shape))
    parts: list[Value] = [Slice(heads, axis, start, stop) for start, stop in ranges]
    return Graph("main", (x,), tuple((f"y{i}", part) for i, part in enumerate(parts)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_each_part_is_a_projection_of_its_own(name: str, bias: bool) -> None:
    before = graph_of(*PARTS[name], bias)
    after, _ = run_passes(before, [SplitProjections()])
    linears = [op for op in after.ops if isinstance(op, Linear)]
    assert len(linears) == len(PARTS[name][2])
    assert not any(isinstance(op, Slice) and op not in after.constants for op in after.ops)
    load = random_weights(before)
    for tokens in (1, 7):
        x = np.random.default_rng(tokens).standard_normal((tokens, 8))
        with precise():
            expected, found = (evaluate(graph, {"x": x}, load) for graph in (before, after))
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "parts",
    [
        ((3, 4, 5), 1, [(0, 1), (1, 3)]),  # whole runs of outputs: a slice of the result is as good
        ((1, 20), 2, [(0, 5), (5, 20)]),  # the same behind an axis of size 1
        ((3, 20), 2, [(0, 15), (5, 20)]),  # parts that overlap would cost more than they save
    ],
)
def test_other_slices_stay(parts: tuple[tuple[int, ...], int, list[tuple[int, int]]]) -> None:
    before = graph_of(*parts)
    after, _ = run_passes(before, [SplitProjections()])
    assert after.ops == before.ops


def test_a_projection_with_another_use_stays() -> None:
    before = graph_of(*PARTS["third axis"])
    linear = next(op for op in before.ops if isinstance(op, Linear))
    before = before.replace_outputs([*before.outputs, ("all", linear)])
    after, _ = run_passes(before, [SplitProjections()])
    assert after.ops == before.ops
