"""Templates: every way to write a kernel computes the same, and what cannot be is refused in a line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from small_decoder import small_decoder
from small_encoder import small_encoder
from template_cases import Case, cases, functions
from template_linear_cases import linear_cases
from x86_machines import MACHINES, runnable

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.targets import lower, machine_named
from llmc.targets.cpu import rules  # noqa: F401  (imports all templates)
from llmc.targets.cpu.norms import Norm, NormProblem
from llmc.targets.cpu.stack import MOST_STACK_BYTES, stack_bytes
from llmc.targets.kernel import Kernel
from llmc.targets.lowering import Context
from llmc.targets.machine import Machine
from llmc.targets.template import Chooser, Problem, Template, count, describe_space, is_exact, knob, knobs, space
from llmc.targets.x86.activation_tiles import ActivationTiles
from llmc.targets.x86.attention_matrix import AttentionMatrix
from llmc.targets.x86.linear_float_tile_rows import FloatTileRows
from llmc.targets.x86.linear_tile_rows import QuantizedTileRows
from llmc.targets.x86.tile_plan import TileLinear

TARGETS = ("x86-64-v3", "znver4", "sapphirerapids")
RUNNABLE = [name for name in ("avx2", "avx512vnni") if runnable(name)]
SOME = 3
SLACK = 24 << 10  # of what is stated as taken of the stack: indices are counted as more than there are
CASES = [*cases(), *linear_cases()]


def templates(kind: type[Template[Any]] = Template) -> Iterator[type[Template[Any]]]:
    """All that have kernels."""
    for below in kind.__subclasses__():
        if below.name:
            yield below
        yield from templates(below)


def lowered_kernels(quantization: str, target: str) -> list[tuple[Kernel, Machine]]:
    options, machine = CompileOptions(quantization=quantization, group_size=32, max_step=64), machine_named(target)
    graphs = [
        run_pipeline(small_decoder(), options).graph,
        run_pipeline(small_encoder(), options, task="encode").graph,
    ]
    calls = [call for graph in graphs for op in lower(graph, machine).ops for call in op.calls]
    return list({call.kernel.symbol: (call.kernel, machine) for call in calls if call.kernel.problem}.values())


@pytest.fixture(scope="module")
def met() -> list[tuple[Kernel, Machine]]:
    """Kernels of a decoder and an encoder."""
    return [item for q in ("none", "int4") for target in TARGETS for item in lowered_kernels(q, target)]


def all_members(template: type[Template[Any]]) -> Iterator[Template[Any]]:
    """What knobs may be, legal or not."""
    values = [field.values for field in knobs(template)]
    for chosen in itertools.product(*values):
        yield template(*chosen)


def facts(item: Case) -> str:
    return f"{item.template.__name__}-" + "-".join(str(value) for value in item.problem.params().values())[:60]


def some_of(met: list[tuple[Kernel, Machine]]) -> list[tuple[Kernel, Machine]]:
    """At most a few problems of each template and machine: whole spaces are long."""
    rng, kept = random.Random(0), dict[tuple[object, str], list[tuple[Kernel, Machine]]]()
    for kernel, machine in rng.sample(met, len(met)):
        kept.setdefault((type(kernel.template), machine.name), []).append((kernel, machine))
    return [item for items in kept.values() for item in items[:SOME]]


def test_what_is_chosen_is_in_its_space(met: list[tuple[Kernel, Machine]]) -> None:
    assert len({type(kernel.template) for kernel, _ in met}) >= 10
    for kernel, machine in some_of(met):
        template, problem = kernel.template, kernel.problem
        assert isinstance(template, Template) and problem is not None
        assert template in set(space(type(template), problem, machine)), kernel.describe()
        described = describe_space(kernel, machine)
        assert described is not None
        assert described["legal"] == count(type(template), problem, machine) >= 1


def test_what_is_refused_has_a_reason_of_one_line(met: list[tuple[Kernel, Machine]]) -> None:
    refused = 0
    for template, problem, machine in {(type(kernel.template), kernel.problem, m): 0 for kernel, m in some_of(met)}:
        legal = set(space(template, problem, machine))
        for member in all_members(template):
            reason = member.refuse(problem, machine)
            assert (member in legal) == (reason == "")
            assert "\n" not in reason and len(reason) < 120 and reason.strip() == reason
            refused += bool(reason)
    assert refused > 100


def test_no_less_stack_is_taken_than_is_stated(met: list[tuple[Kernel, Machine]]) -> None:
    rng = random.Random(0)
    for number, (kernel, machine) in enumerate(some_of(met)):
        template, problem = type(kernel.template), kernel.problem
        member = kernel.template if number % 2 else rng.choice(list(space(template, problem, machine)))
        taken, stated = stack_bytes(member.build(problem, machine)), member.stack_bytes(problem, machine)
        assert taken <= stated <= taken + SLACK, (member, problem)


def test_knobs_that_change_bits_do_not_depend_on_rows(met: list[tuple[Kernel, Machine]]) -> None:
    for kernel, machine in met:
        template = type(kernel.template)
        for rows in ((1, 1), (2, 4), (17, None)):
            other = template.default(kernel.problem, machine, rows)
            for field in knobs(template):
                assert field.exact or getattr(other, field.name) == getattr(kernel.template, field.name)


def test_every_template_with_numbers_in_its_code_is_here() -> None:
    have = {template for template in templates() if any(field.code for field in knobs(template))}
    # Those for tile registers: test_x86_attention_matrix.py, test_x86_linear_tiles.py, test_forms.py.
    on_tiles = {AttentionMatrix, TileLinear, QuantizedTileRows, FloatTileRows, ActivationTiles}
    assert have == {item.template for item in CASES} | on_tiles


def check(item: Case, machine: Machine, members: list[Template[Any]]) -> None:
    """Each member computes what numpy does, and those alike but for exact knobs have the same bits."""
    compiled = functions((member.kernel(item.problem, machine) for member in members), machine)
    bits: dict[tuple[int, ...], bytes] = {}
    inexact = [field.name for field in knobs(item.template) if not field.exact]
    assert bool(inexact) != is_exact(item.template)
    for member in members:
        found = item.run(member, compiled[member.kernel(item.problem, machine).symbol], machine)
        error = np.abs(found.astype(np.float64) - item.expected).max()
        assert error <= item.tolerance * max(1.0, np.abs(item.expected).max()), (member, error)
        key = tuple(getattr(member, name) for name in inexact)
        assert bits.setdefault(key, found.tobytes()) == found.tobytes(), member


def distinct(item: Case, machine: Machine) -> list[Template[Any]]:
    """The space, without members that have the same code."""
    found = {
        member.kernel(item.problem, machine).symbol: member for member in space(item.template, item.problem, machine)
    }
    return list(found.values())


@pytest.mark.parametrize("item", CASES, ids=facts)
@pytest.mark.parametrize("name", RUNNABLE)
def test_some_of_a_space(name: str, item: Case) -> None:
    machine = MACHINES[name]
    """The default and another member. LLVM takes seconds for each: the whole spaces are among the slow tests."""
    another = random.Random(facts(item)).choice(distinct(item, machine))
    check(item, machine, [item.template.default(item.problem, machine), another])


@pytest.mark.slow
@pytest.mark.parametrize("item", CASES, ids=facts)
@pytest.mark.parametrize("name", RUNNABLE)
def test_all_of_a_space(name: str, item: Case) -> None:
    check(item, MACHINES[name], distinct(item, MACHINES[name]))


def test_a_rule_is_told_why_no_kernel_can_be() -> None:
    from llmc.compiler.ir.graph import Graph
    from llmc.targets.cpu.attention_problem import AttentionProblem
    from llmc.targets.cpu.attention_tile import AttentionTile

    context = Context(MACHINES["avx2"], Graph("g", (), ()))
    wide = AttentionProblem(16, 1, 2048, 2048, 0.1)
    assert context.choose(AttentionTile, wide) == (
        f"needs 1620 KiB of stack, and threads are sure of {MOST_STACK_BYTES >> 10}"
    )
    assert count(AttentionTile, wide, MACHINES["avx2"]) == 0


def test_fewer_rows_at_a_time_where_heads_are_wide() -> None:
    from llmc.targets.cpu.attention_problem import AttentionProblem
    from llmc.targets.cpu.attention_tile import AttentionTile

    chosen = Chooser(MACHINES["avx2"]).choose(AttentionTile, AttentionProblem(8, 1, 1024, 1024, 0.1))
    assert isinstance(chosen, AttentionTile) and chosen.chunk < 64


def test_a_kernels_name_has_the_problem_and_what_its_code_depends_on() -> None:
    machine, problem = MACHINES["avx2"], NormProblem("rms", 64, 1e-5)
    symbols = {Norm(chains, 4096).kernel(problem, machine).symbol for chains in (1, 2, 4, 8)}
    assert len(symbols) == 4
    made = Norm(4, 1024).kernel(problem, machine)
    assert made.symbol in symbols and made.name == "norm"  # what is worth a thread is none of the code's affair
    assert made.parameters() == ["kind=rms", "features=64", "eps=1e-05", "weight", "groups=1", "chains=4"]
    assert Norm(4, 4096).kernel(NormProblem("rms", 65, 1e-5), machine).symbol not in symbols


def test_a_knob_has_values_in_order() -> None:
    with pytest.raises(ValueError, match="in order"):
        knob(4, 2)
    with pytest.raises(ValueError, match="in order"):
        knob()
    assert Norm(3, 4096).refuse(NormProblem("rms", 64, 1e-5), MACHINES["avx2"]) == "chains is one of 1, 2, 4, 8, not 3"


def test_a_problem_is_hashable_and_has_parameters_only() -> None:
    for item in CASES:
        assert isinstance(hash(item.problem), int) and isinstance(item.problem, Problem)
