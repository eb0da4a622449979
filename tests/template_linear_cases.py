"""Problems of linear templates and of those that round activations, as `template_cases` has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from cpu_linear_cases import activation_sums, wide
from kernel_harness import aligned
from template_cases import Case, Function, _normal

from llmc.compiler.encodings.levels import table_levels
from llmc.targets.cpu.forms import Bf16Pairs, IntegerGroups, integer_groups
from llmc.targets.cpu.linear_float import DequantizedBlocks, DequantizedRows, FloatBlocks, FloatRows
from llmc.targets.cpu.linear_problem import FloatProblem, QuantizedProblem
from llmc.targets.cpu.linear_quantized import QuantizedBlocks, QuantizedRows
from llmc.targets.cpu.quantize_activations import BytesProblem, QuantizeRows, RoundingProblem, RoundRows
from llmc.targets.machine import Machine
from llmc.targets.template import Template

ROWS = 37  # rows of activations: more than a block of most kernels, and no multiple of any


def _units(member: Template[Any], problem: QuantizedProblem | FloatProblem, machine: Machine) -> int:
    panels = -(-problem.layout(machine).tiles(problem.n) // member.tiles)  # type: ignore[attr-defined]
    blocks = isinstance(member, QuantizedBlocks | FloatBlocks | DequantizedBlocks)
    return panels * (-(-ROWS // member.row_block) if blocks else 1)  # type: ignore[attr-defined]


def _linear(
    template: type[Template[Any]],
    problem: QuantizedProblem | FloatProblem,
    x: list[np.ndarray] | Callable[[Machine], list[np.ndarray]],
    parts: list[np.ndarray],
    expected: np.ndarray,
) -> Case:
    """x: the kernel's activations. parts: of the weight, as its layout packs them."""

    def run(member: Template[Any], function: Function, machine: Machine) -> np.ndarray:
        out = aligned(np.full((ROWS, problem.n), np.nan, np.float32))
        packed = [aligned(array) for array in problem.layout(machine).pack(*parts).values()]
        given = [aligned(array) for array in (x(machine) if callable(x) else x)]
        function(*given, *packed, out, ROWS, 0, _units(member, problem, machine))
        return out

    return Case(template, problem, run, expected, 5e-6)


def _weights(problem: QuantizedProblem) -> tuple[list[np.ndarray], np.ndarray]:
    """As a layout packs them, and what they stand for, f64 [n, k]."""
    rng, most = np.random.default_rng(problem.n), 1 << problem.bits - 1
    groups = -(-problem.k // problem.group)
    q = rng.integers(-most + 1, most, (problem.n, problem.k)).astype(np.int8)
    scales = ((0.5 + rng.random((problem.n, groups))) / most).astype(np.float16)
    if problem.symmetric:
        levels = table_levels(problem.bits).values.astype(np.float64)[q + most] if problem.table else q
        return [q, scales], levels * wide(scales, problem.group, problem.k)
    stored, share = (q.astype(np.int16) + most).astype(np.uint8), -rng.random((problem.n, groups))
    minimums = (np.round(share * most) if problem.in_steps else share).astype(np.float16)
    least, wide_scales = wide(minimums, problem.group, problem.k), wide(scales, problem.group, problem.k)
    exact = stored * wide_scales + least * (wide_scales if problem.in_steps else 1)
    return [stored, scales, minimums], exact


def integers(template: type[Template[Any]], **facts: Any) -> Case:
    problem = QuantizedProblem(**facts)
    parts, exact = _weights(problem)
    arrays = IntegerGroups(problem.k, problem.group).encode(_normal(ROWS, problem.k))
    q = arrays["xq"].reshape(ROWS, -1, problem.group)
    x = arrays["xq"][:, : problem.k] * wide(arrays["xscales"], problem.group, problem.k)

    def given(machine: Machine) -> list[np.ndarray]:
        return [arrays["xq"], arrays["xscales"], activation_sums(machine, q)]

    return _linear(template, problem, given, parts, x @ exact.T)


def _dequantized(template: type[Template[Any]], **facts: Any) -> Case:
    problem, x = QuantizedProblem(**facts), _normal(ROWS, facts["k"])
    parts, exact = _weights(problem)
    return _linear(template, problem, [x], parts, x.astype(np.float64) @ exact.T)


def _floats(template: type[Template[Any]], **facts: Any) -> Case:
    problem, x = FloatProblem(**facts), _normal(ROWS, facts["k"])
    weight = _normal(problem.n, problem.k, seed=1).astype({"f32": np.float32, "f16": np.float16}[problem.dtype])
    return _linear(template, problem, [x], [weight], x.astype(np.float64) @ weight.astype(np.float64).T)


def _normed(x: np.ndarray, norm: str) -> tuple[list[np.ndarray], np.ndarray]:
    """What a norm reads beside x, and what comes of it in f64."""
    exact = x.astype(np.float64)
    if norm == "none":
        return [], exact
    weight = _normal(x.shape[1], seed=2)
    if norm == "layer":
        exact = exact - exact.mean(1, keepdims=True)
    return [weight], exact / np.sqrt((exact * exact).mean(1, keepdims=True) + 1e-5) * weight


def _bytes(k: int, group: int, norm: str) -> Case:
    problem, x = BytesProblem(k=k, group=group, norm=norm, eps=1e-5), _normal(ROWS, k)
    extra, exact = _normed(x, norm)

    def run(_: Template[Any], function: Function, machine: Machine) -> np.ndarray:
        form = integer_groups(machine, k, group)
        arrays = {buffer.name: aligned(buffer.empty()) for buffer in form.buffers(ROWS)}
        function(x, *extra, *arrays.values(), 0, ROWS)
        return form.decode(arrays, ROWS)

    # Half a step of the largest number.
    return Case(QuantizeRows, problem, run, exact, 0.5 / 127 + 1e-5)


def _halves(k: int, norm: str) -> Case:
    problem, x = RoundingProblem(k=k, norm=norm, eps=1e-5), _normal(ROWS, k)
    extra, exact = _normed(x, norm)

    def run(_: Template[Any], function: Function, __: Machine) -> np.ndarray:
        form = Bf16Pairs(k)
        arrays = {buffer.name: aligned(buffer.empty()) for buffer in form.buffers(ROWS)}
        function(x, *extra, *arrays.values(), 0, ROWS)
        return form.decode(arrays, ROWS)

    return Case(RoundRows, problem, run, exact, 2.0**-8)


def linear_cases() -> list[Case]:
    """Of every template for vectors, at sizes that no tile, group or block divides."""
    four = {"n": 33, "k": 129, "bits": 4, "group": 64, "symmetric": True}
    eight = {"n": 31, "k": 100, "bits": 8, "group": 32, "symmetric": False, "in_steps": True}
    table = {"n": 33, "k": 129, "bits": 4, "group": 64, "symmetric": True, "table": True}
    six = {"n": 17, "k": 70, "bits": 6, "group": 32, "symmetric": True, "table": True}
    kinds = (four, eight, table, six)
    found = [integers(template, **facts) for template in (QuantizedRows, QuantizedBlocks) for facts in kinds]
    for facts in (four, eight, six):
        found += [_dequantized(template, **facts) for template in (DequantizedRows, DequantizedBlocks)]
    for dtype in ("f32", "f16"):
        found += [_floats(template, n=33, k=129, dtype=dtype) for template in (FloatRows, FloatBlocks)]
    return [
        *found,
        *(_bytes(k, 32, norm) for k, norm in ((7, "none"), (129, "rms"))),
        *(_halves(k, norm) for k, norm in ((1, "none"), (33, "layer"))),
    ]
