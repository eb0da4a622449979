"""Halves of a block, of which one becomes results beside the other's products: the bits of a block that is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from arm_machines import MACHINES as ARM_MACHINES
from template_cases import functions
from template_linear_cases import integers
from x86_machines import MACHINES, runnable

from llmc.targets import machine_named
from llmc.targets.cpu.linear_problem import QuantizedProblem
from llmc.targets.cpu.linear_quantized import QuantizedBlocks
from llmc.targets.cpu.tile_slices import slices_of
from llmc.targets.cpu.vector_isa import isa_for
from llmc.targets.machine import Machine

TABLE = {"symmetric": True, "table": True}
STEPS = {"symmetric": False, "in_steps": True}
# No tile, group or block divides them. Groups of more quads than stand beside other work come in two parts.
PROBLEMS = [
    {"n": 33, "k": 129, "bits": 4, "group": 64, **TABLE},
    {"n": 65, "k": 7, "bits": 8, "group": 32, **STEPS},
    {"n": 1, "k": 300, "bits": 4, "group": 128, **TABLE},
    {"n": 31, "k": 300, "bits": 6, "group": 256, **TABLE},
    {"n": 17, "k": 70, "bits": 4, "group": 16, "symmetric": False},
]


def machines() -> list[Any]:
    """Those of here whose products other work can stand between, and an emulated one."""
    here = [name for name in ("avxvnni", "avx512vnni") if runnable(name)]
    emulated = pytest.param(ARM_MACHINES["dotprod"], id="dotprod")
    return [*(pytest.param(MACHINES[name], id=name) for name in here), emulated]


@pytest.mark.parametrize("machine", machines())
@pytest.mark.parametrize("facts", PROBLEMS, ids=lambda facts: f"{facts['bits']}-{facts['group']}")
def test_halves_have_the_bits_of_the_whole(machine: Machine, facts: dict[str, Any]) -> None:
    case = integers(QuantizedBlocks, **facts)
    default = QuantizedBlocks.default(case.problem, machine)
    tiles = 4 // slices_of(isa_for(machine), case.problem.layout(machine))  # type: ignore[attr-defined]
    whole = replace(default, rows=4, slices=4, tiles=tiles, row_block=32, panel=8 << 10, overlap=1)
    members = [whole, replace(whole, overlap=2), replace(whole, rows=2, overlap=2, panel=32 << 10)]
    assert not any(member.refuse(case.problem, machine) for member in members)
    kernels = [member.kernel(case.problem, machine) for member in members]
    compiled = functions(kernels, machine)
    expected, *found = (case.run(m, compiled[k.symbol], machine) for m, k in zip(members, kernels, strict=True))
    assert np.abs(expected - case.expected).max() <= case.tolerance * np.abs(case.expected).max()
    for each in found:
        np.testing.assert_array_equal(each, expected)


def test_what_halves_need_is_said() -> None:
    problem = QuantizedProblem(n=64, k=128, bits=4, group=64, symmetric=True)
    older, newer = machine_named("x86-64-v3"), machine_named("icelake-server")
    widened = replace(QuantizedBlocks.default(problem, older), overlap=2)
    assert widened.refuse(problem, older) == "sums that are widened by and by leave no place for other work"
    default = QuantizedBlocks.default(problem, newer)
    assert default.overlap == 2 and not default.refuse(problem, newer)
    parts = replace(default, slices=2)
    assert parts.refuse(problem, newer) == "halves of 2 slices are not all of a panel's 4"
