"""A row of a linear op has the same bits beside any number of others: every variant's kernel adds up in one order."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_linear_cases import Case
from test_cpu_linear_float import float_case
from test_cpu_linear_quantized import quantized_case
from x86_machines import each_machine

from llmc.targets.machine import Machine

ROWS = 33


def first_rows(case: Case, rows: int) -> np.ndarray:
    """The result of the plan's own kernel for the first `rows` rows."""
    taken = Case.__new__(Case)
    vars(taken).update(vars(case))
    taken.tokens, taken.expected, taken.terms = rows, case.expected[:rows], case.terms[:rows]
    (variant,) = (v for v in case.plan.variants if v.low <= rows and (v.high is None or rows <= v.high))
    return taken.run(variant, pieces=1 + rows % 3)


def check_every_number_of_rows(case: Case) -> None:
    whole = first_rows(case, ROWS)
    assert np.abs(whole - case.expected).max() < 0.1, "it is what it should be"
    for rows in range(1, ROWS):
        assert np.array_equal(first_rows(case, rows), whole[:rows]), rows


# k: whole parts and groups, and what is left over; n: the last tile and the last unit are short.
K = 200
FLOATS = {
    "f32": {"n": 70, "dtype": "f32", "bias": True, "residual": True},
    "gated bf16": {"n": 140, "dtype": "bf16", "gated": True, "activation": "silu", "residual": True},
    "f16": {"n": 70, "dtype": "f16", "activation": "gelu"},
    "pairs of bf16": {"n": 70, "dtype": "bf16", "activations": "bf16"},
}
INTEGERS = {
    "gated int4": {"n": 140, "bits": 4, "group": 64, "symmetric": True, "gated": True, "activation": "silu"},
    "int4 with minimums": {"n": 70, "bits": 4, "group": 32, "symmetric": False, "bias": True, "residual": True},
    "int8": {"n": 70, "bits": 8, "group": 64, "symmetric": True, "residual": True},
    "int4, f32 activations": {"n": 70, "bits": 4, "group": 64, "symmetric": True, "activations": "f32"},
    "gated int8, f32 activations": {"n": 140, "bits": 8, "group": 64, "symmetric": False, "activations": "f32"}
    | {"gated": True, "activation": "gelu_tanh"},
}


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize("name", FLOATS)
def test_float_weights(machine: Machine, name: str) -> None:
    check_every_number_of_rows(float_case(machine, ROWS, k=K, **FLOATS[name]))


@pytest.mark.parametrize("machine", each_machine())
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_weights(machine: Machine, name: str) -> None:
    check_every_number_of_rows(quantized_case(machine, ROWS, k=K, **INTEGERS[name]))
