"""AMX as a matrix unit: it serves what the machine has every instruction for, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmc.targets import machine_named
from llmc.targets.cpu.linear_plan import float_linear_plan
from llmc.targets.cpu.linear_problem import FloatProblem, QuantizedProblem
from llmc.targets.cpu.matrix_unit import matrix_unit
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser

SERVER = machine_named("sapphirerapids")
QUANTIZED = QuantizedProblem(n=64, k=64, bits=4, group=32, symmetric=True)
FLOAT = FloatProblem(n=64, k=64, dtype="bf16")


def without(*features: str) -> Machine:
    return replace(SERVER, features=SERVER.features - set(features))


def served(machine: Machine) -> set[str]:
    """What the unit serves of a machine."""
    unit = matrix_unit(machine)
    if unit is None:
        return set()
    found = {
        "many rows": unit.activations(64, 8, 32) is not None,
        "few integers": unit.quantized_rows(Chooser(machine), QUANTIZED, 8),
        "few floats": unit.float_rows(Chooser(machine), FLOAT),
        "attention": unit.attention(64, "float16"),
        **{limit.name: True for limit in unit.limits()},
    }
    return {name for name, serves in found.items() if serves}


FLOATS = {"many rows", "few floats", "attention"}


@pytest.mark.parametrize(
    ("machine", "lacks"),
    [
        (SERVER, set()),
        (without("amx-int8"), {"few integers", "tile_int8"}),
        (without("amx-bf16"), {*FLOATS, "tile_bf16"}),
        (without("avx512bf16"), FLOATS),  # makes bf16 of activations
        (without("avx512vbmi"), {"attention"}),  # looks up mantissas
    ],
)
def test_a_missing_feature_is_what_needs_it(machine: Machine, lacks: set[str]) -> None:
    everything = {*FLOATS, "few integers", "tile_int8", "tile_bf16"}
    assert served(SERVER) == everything
    assert served(machine) == everything - lacks


def test_few_rows_of_floats_go_where_their_activations_can_be_made() -> None:
    def names(machine: Machine) -> set[str]:
        plan = float_linear_plan(Chooser(machine), FLOAT)
        return {variant.kernel.name for variant in plan.variants}

    assert "float_linear_tile_rows" in names(SERVER)
    assert names(without("avx512bf16")) == {"float_linear_rows", "float_linear_blocks"}


@pytest.mark.parametrize(
    "machine",
    [machine_named("znver5"), machine_named("x86-64-v3"), without("amx-tile"), replace(SERVER, vector_bits=256)],
)
def test_there_is_none_without_tiles_or_vectors_as_wide(machine: Machine) -> None:
    assert matrix_unit(machine) is None
