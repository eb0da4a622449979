"""No kernel leaves its arrays on the stack: proved of its code, also for machines that this one is not."""

from __future__ import annotations

import pytest
from array_bounds import beyond_arrays
from small_decoder import small_decoder
from small_encoder import small_encoder

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.targets import lower, machine_named
from llmc.targets.cpu import builder as b
from llmc.targets.cpu import linear_overlap
from llmc.targets.cpu.linear_problem import QuantizedProblem
from llmc.targets.cpu.linear_quantized import QuantizedBlocks
from llmc.targets.x86.linear_tile_rows import QuantizedTileRows

TARGETS = ("x86-64-v3", "znver4", "sapphirerapids", "aarch64", "aarch64+i8mm")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "int4", "int8"])
@pytest.mark.parametrize("target", TARGETS)
def test_indices_of_arrays_lie_within(target: str, scheme: str) -> None:
    """Every linear kernel of a decoder and an encoder. Loops of attention run as far as a step's tables say."""
    options = CompileOptions(quantization=scheme, group_size=32, max_step=64)
    machine = machine_named(target)
    graphs = [
        run_pipeline(small_decoder(), options).graph,
        run_pipeline(small_encoder(), options, task="encode").graph,
    ]
    calls = [call for graph in graphs for op in lower(graph, machine).ops for call in op.calls]
    kernels = {call.kernel.symbol: call.kernel for call in calls if "linear" in call.kernel.name}
    assert len(kernels) > 5
    for kernel in kernels.values():
        assert beyond_arrays(kernel.build(machine)) == [], kernel.describe()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_a_ring_of_groups_is_one(bits: int, symmetric: bool, per_row: bool) -> None:
    """More groups than the ring has places: each place is used again."""
    machine = machine_named("sapphirerapids")
    problem = QuantizedProblem(n=32, k=1024, bits=bits, group=64, symmetric=symmetric, per_row=per_row)
    chosen = QuantizedTileRows.default(problem, machine)
    assert not chosen.refuse(problem, machine)
    assert beyond_arrays(chosen.build(problem, machine)) == []


@pytest.mark.parametrize("wrong", ["row", "total", "position"])
def test_a_place_beyond_an_array_or_a_view_of_one_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of halves of a block keep in variables where they belong."""
    machine = machine_named("icelake-server")
    problem = QuantizedProblem(n=64, k=300, bits=4, group=64, symmetric=False)
    chosen = QuantizedBlocks.default(problem, machine)
    assert chosen.overlap == 2 and beyond_arrays(chosen.build(problem, machine), views=True) == []

    def far(place: linear_overlap.LatePlace, spare: int) -> None:
        for name in ("row", "total", "position"):
            setattr(place, name, b.Scalar("int64", 1000 if name == wrong else 0))

    monkeypatch.setattr(linear_overlap.LatePlace, "__init__", far)
    assert beyond_arrays(chosen.build(problem, machine), views=True) != []
