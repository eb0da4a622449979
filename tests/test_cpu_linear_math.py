"""vector_math is f32-accurate on every instruction set, and each dot of bytes is exact at the extremes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from kernel_harness import Compiled, aligned
from x86_machines import MACHINES, each_machine

from llmc.targets.cpu import builder as b
from llmc.targets.cpu import vector_math
from llmc.targets.cpu.codegen import build_module
from llmc.targets.cpu.vector_isa import isa_for, weight_tiles
from llmc.targets.cpu.vectors import load, splat, store
from llmc.targets.kernel import kernel
from llmc.targets.machine import Machine


def apply_function(machine: Machine, name: str):
    """(x f32, out f32): one vector a unit."""
    isa = isa_for(machine)

    def body(p, s):
        x, out = (b.view(p[n], [b.MANY], "float32") for n in ("x", "out"))
        with b.loop(s["end"] - s["begin"]) as i:
            at = (s["begin"] + i) * isa.lanes
            value = load(x, at, isa.lanes)
            direct = getattr(vector_math, name, None)
            store(out, at, direct(isa, value) if direct else vector_math.activation(isa, name, value))

    return b.plain_function([("x", "float32"), ("out", "float32")], [], body)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


_ERF = np.vectorize(math.erf)
REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "erf": _ERF,
    "sigmoid": _sigmoid,
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
}


def run(machine: Machine, name: str, x: np.ndarray) -> np.ndarray:
    out = aligned(np.zeros_like(x))
    Compiled(kernel(apply_function, machine.key, name=name), machine)(
        aligned(x), out, 0, x.size // isa_for(machine).lanes
    )
    return out


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize("name", REFERENCES)
def test_functions_are_f32_accurate(machine: Machine, name: str) -> None:
    x = np.concatenate([np.linspace(-80, 80, 16000), np.linspace(-6, 6, 16000), np.zeros(16)]).astype(np.float32)
    expected = REFERENCES[name](x.astype(np.float64))
    # 4e-7 is 3 units in the last place at 1; results above 1 are compared relatively.
    assert (np.abs(run(machine, name, x) - expected) / np.maximum(1, np.abs(expected))).max() < 4e-7


@pytest.mark.parametrize("machine", each_machine())
def test_exp_is_relatively_accurate_and_ends_well(machine: Machine) -> None:
    x = np.linspace(-87.3, 88.3, 32000).astype(np.float32)
    assert np.abs(run(machine, "exp", x) / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    ends = np.array([-np.inf, -1e30, -88, -0.0, 0, 1e30, np.inf, 1] * 2, np.float32)
    result = run(machine, "exp", ends)
    assert (result[:3] == 0).all() and (result[3:5] == 1).all()
    assert np.isfinite(result).all() and (result[5:7] > 2e38).all()


def byte_dot(machine: Machine, bits: int):
    """(weights i8 stored bytes, activations i8, out i32): one vector of quads, one dot."""
    isa = isa_for(machine)

    def body(p, s):
        w, a = (b.view(p[n], [b.MANY], "int8") for n in ("w", "a"))
        out = b.view(p["out"], [b.MANY], "int32")
        with b.loop(s["end"] - s["begin"]) as i:
            at = s["begin"] + i
            weights, activations = (load(each, at * isa.vector_bytes, isa.vector_bytes) for each in (w, a))
            store(out, at * isa.lanes, isa.dot(splat(0, isa.lanes, "int32"), weights, activations, bits))

    return b.plain_function([("w", "int8"), ("a", "int8"), ("out", "int32")], [], body)


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_dot_is_exact_for_every_weight_at_extreme_activations(machine: Machine, bits: int, symmetric: bool) -> None:
    isa = isa_for(machine)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)
    low = max(low, -127)
    rng = np.random.default_rng(0)
    logical = rng.integers(low, high, (4096, 4), endpoint=True)
    logical[:64] = rng.choice([low, high], (64, 4))
    activations = rng.integers(-127, 127, (4096, 4), endpoint=True)
    activations[:128] = rng.choice([-127, 127], (128, 4))
    offset = weight_tiles(machine).offset(bits, symmetric)
    stored = (logical + offset).astype(np.uint8).view(np.int8)
    out = aligned(np.zeros(4096, np.int32))
    compiled = Compiled(kernel(byte_dot, machine.key, bits=bits), machine)
    compiled(aligned(stored), aligned(activations.astype(np.int8)), out, 0, 4096 // isa.lanes)
    counted = offset - isa.dot_centre(bits)  # what of it is left in the weights that were multiplied
    np.testing.assert_array_equal(out - counted * activations.sum(1), (logical * activations).sum(1))


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize("bits", [4, 6])
def test_dot_is_exact_for_every_byte_of_a_table(machine: Machine, bits: int) -> None:
    """At extreme activations, and where all four weights are the same end of the table."""
    isa, layout = isa_for(machine), weight_tiles(machine).quantized(bits, 64, symmetric=True, table=True)
    assert layout.table is not None
    rng, stored = np.random.default_rng(bits), np.array(layout.table)
    ends = [stored.argmin(), stored.argmax()]
    codes = rng.integers(0, len(stored), (4096, 4))
    codes[:64], codes[64:66] = rng.choice(ends, (64, 4)), np.array(ends)[:, None]
    activations = rng.integers(-127, 127, (4096, 4), endpoint=True)
    activations[:128] = rng.choice([-127, 127], (128, 4))
    out = aligned(np.zeros(4096, np.int32))
    compiled = Compiled(kernel(byte_dot, machine.key, bits=layout.byte_bits), machine)
    weights = aligned(stored[codes].astype(np.uint8).view(np.int8))
    compiled(weights, aligned(activations.astype(np.int8)), out, 0, 4096 // isa.lanes)
    counted = layout.byte_offset - isa.dot_centre(layout.byte_bits)
    levels = (stored - layout.byte_offset)[codes]
    np.testing.assert_array_equal(out - counted * activations.sum(1), (levels * activations).sum(1))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("avx2", r"vpmaddubsw.*%ymm"),
        ("avxvnni", r"\{vex\}\s*vpdpbusd.*%ymm"),
        ("avx512", r"vpmaddubsw.*%zmm"),
        ("avx512vnni", r"vpdpbusd.*%zmm"),
    ],
)
def test_each_instruction_set_uses_its_own_dot(name: str, pattern: str) -> None:
    machine = MACHINES[name]
    assembly = build_module(kernel(byte_dot, machine.key, bits=4), machine).inspect_source("asm")
    assert re.search(pattern, assembly)
    if name in ("avx2", "avxvnni"):
        assert "%zmm" not in assembly
