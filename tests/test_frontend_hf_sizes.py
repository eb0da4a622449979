"""What a model computes of its sizes means the same for every size, not for the traced one alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_frontend_hf_aten import Wrapped, floats

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.hf import graph  # noqa: F401  (registers the handlers)
from llmc.frontends.hf.aten import Translation
from llmc.frontends.hf.export import quietly

Function = Callable[[torch.Tensor], torch.Tensor]
LOW, HIGH, TRACED = 2, 40, 12


def translated(function: Function) -> Graph:
    """The function of f32 [2, S, 5] as a graph; it is traced at one length, for lengths from LOW to HIGH."""
    length = torch.export.Dim("length", min=LOW, max=HIGH)
    with quietly():
        program = torch.export.export(
            Wrapped(function),
            (floats(2, TRACED, 5),),
            dynamic_shapes={"tensors": ({1: length},)},
            strict=False,
        ).run_decompositions({})
    (hole,) = (node for node in program.graph.nodes if node.op == "placeholder")
    size = symbol("S", LOW, HIGH)
    given = Input("x", Tensor((2, size, 5), "f32"))
    name = str(hole.meta["val"].shape[1].node.expr)
    (value,) = Translation({name: size}).run(program.graph_module, {hole: given})
    return Graph("sizes", (given,), (("y", value),))


# Functions of x [2, S, 5] that use S in each way that models do.
CASES: dict[str, Function] = {
    "a size": lambda x: x * x.shape[1],
    "sums and differences": lambda x: x * (2 * x.shape[1] - x.shape[1] // 3 + 7),
    "a square and a cube": lambda x: x * (x.shape[1] ** 2) + x.shape[1] * x.shape[1] * x.shape[1],
    "a quotient": lambda x: x + torch.arange(x.shape[1])[:, None] // (x.shape[1] // 3 + 1),
    "a remainder": lambda x: x * (x.shape[1] % 4),
    "a remainder of what may be negative": lambda x: x * ((x.shape[1] - 7) % 4),
    "a remainder of a multiple": lambda x: x * ((3 * x.shape[1] + 1) % 7),
    "the greater": lambda x: x * torch.sym_max(x.shape[1], 1),
    "the smaller": lambda x: x * torch.sym_min(x.shape[1], 1000),
    "positions": lambda x: x + torch.arange(x.shape[1] - 1, -1, -1)[:, None],
    "filled with a size": lambda x: x + torch.full((x.shape[1], 1), x.shape[1]),
    "as often as a size": lambda x: x.repeat(1, 2, 1)[:, : 2 * x.shape[1] - 2],
}


@pytest.mark.parametrize("name", CASES)
def test_a_function_of_sizes_is_torchs_at_every_length(name: str) -> None:
    function = CASES[name]
    found = translated(function)
    for length in (LOW, 3, 4, 7, 11, TRACED, 13, 31, 33, HIGH):
        x = floats(2, length, 5)
        got = evaluate(found, {"x": x.numpy()}, lambda name: np.zeros(0))["y"]
        want = function(x)
        assert got.shape == tuple(want.shape)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)  # a product of f32 numbers is rounded once or twice


REFUSED: dict[str, tuple[Function, str]] = {
    "a size that decides": (lambda x: x * torch.sym_max(x.shape[1], 20), "cannot settle"),
    "padded to a multiple": (lambda x: F.pad(x, (0, 0, 0, (4 - x.shape[1] % 4) % 4)), "depends on the sizes of inputs"),
    "a quotient by a size": (lambda x: x * (100 // x.shape[1]), "computes the size .* which is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_the_size_in_other_ways_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(FrontendError, match=message):
        translated(function)
