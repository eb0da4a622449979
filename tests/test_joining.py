"""Calls that share a loop: which do, that their memory does not overlap, and that it changes no bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import small_decoder
from tiny_models import make_tiny

from llmc.compiler.ir.dims import Dim, concrete
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model, run_pipeline
from llmc.runtime.runtime import Runtime
from llmc.targets import lower, machine_named, memory
from llmc.targets.cpu.vector_isa import weight_tiles
from llmc.targets.joining import MOST_BYTES, JoinedLoop, Part, joined_loop
from llmc.targets.kernel import Call, Joined, Kernel, Needed, Range
from llmc.targets.lowering import Program
from llmc.targets.step_limits import SIZES

KERNEL = Kernel(lambda: None)  # type: ignore[arg-type, return-value]
ONE = (Range("T", 1, 1),)
COLUMNS = ((0, 32), (64, 16))


@dataclass
class Case:
    """Three ops: one that computes 96 columns of rows, one that has the same units as the third, and the third."""

    columns: int = 8
    nbytes: int = MOST_BYTES
    needed: tuple[tuple[int, int], ...] = COLUMNS
    rows_when: tuple[Range, ...] = ONE
    others: list[Call] = field(default_factory=list)  # of the first op
    middle: dict[str, Any] = field(default_factory=dict)

    def loop(self, between: bool = False) -> JoinedLoop | None:
        """The third op's; between: whether there is another op in front of it."""
        first, second = object(), object()
        rows = Call(KERNEL, (), 12, when=self.rows_when, columns=self.columns, bytes_moved=2 * self.nbytes)
        joins = Joined((Needed(second), Needed(first, self.needed)), (Range("SPLITS", 1, 1), Range("T", 1, 1)))
        ops = [(first, (*self.others, rows)), (second, (Call(KERNEL, (), 2, **self.middle),))]
        ops += [(object(), (Call(KERNEL, (), 2),))] * between
        ops += [(object(), (Call(KERNEL, (), 2, joins=joins),))]
        program = SimpleNamespace(ops=[SimpleNamespace(op=op, calls=calls) for op, calls in ops])
        return joined_loop(cast(Program, program), len(ops) - 1)


def test_a_loop_takes_in_the_units_it_needs() -> None:
    # 6 of the 12 units are needed by each of the loop's: half of the bytes.
    loop = Case().loop()
    assert loop is not None
    assert loop.parts == (Part(0, 0, ((0, 4), (8, 2))), Part(1, 0, ((0, 1),)))
    assert loop.when == (Range("SPLITS", 1, 1), Range("T", 1, 1), *ONE)


@pytest.mark.parametrize(
    "case",
    [
        Case(nbytes=MOST_BYTES + 1),
        Case(columns=0),
        Case(columns=16, needed=((8, 16),)),
        Case(columns=16, needed=((0, 8),)),
        Case(rows_when=(Range("T", 2, None),)),
        Case(others=[Call(KERNEL, (), 12, when=(Range("T", 1, 4),))]),
        Case(others=[Call(KERNEL, (), 12, when=(Range("PROMPT", 1, None),))]),
    ],
    ids=["large", "no columns", "begins within a unit", "ends within a unit", "never", "two", "maybe two"],
)
def test_what_does_not_fit_stays_outside(case: Case) -> None:
    loop = case.loop()
    assert loop is not None
    assert [part.place for part in loop.parts] == [1]


def test_conditions_of_what_is_taken_in_hold_for_the_loop() -> None:
    other = Call(KERNEL, (), 12, when=(Range("PROMPT", 1, None),))
    decoding = (*ONE, Range("PROMPT", 0, 0))
    loop = Case(others=[other], rows_when=decoding).loop()
    assert loop is not None
    assert loop.parts[0].number == 1
    assert loop.when[-2:] == decoding


def test_a_call_that_can_fail_or_is_not_right_before_is_not_taken_in() -> None:
    assert Case(middle={"failure": "no"}).loop() is None
    assert Case().loop(between=True) is None


def test_what_one_loop_uses_does_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are at different calls of it at the same time."""
    monkeypatch.setattr(small_decoder, "DIM", 16)
    options = CompileOptions(quantization="int4", target="x86-64-v3", group_size=32)
    program = lower(run_pipeline(small_decoder.small_decoder(), options).graph, machine_named("x86-64-v3"))
    sizes = dict.fromkeys(SIZES, 64) | {"SPLITS": 16}
    offsets, blocks = memory.plan_memory(program, sizes).offsets, memory._lifetimes(program, sizes)
    nbytes = {block.key: block.nbytes for block in blocks}
    found = 0
    for place in range(len(program.ops)):
        loop = joined_loop(program, place)
        if loop is None:
            continue
        found += len(loop.parts)
        used = {key for at in (place, *(part.place for part in loop.parts)) for key in buffers(program, at)}
        assert len(used) > 2
        for some, other in combinations(used & nbytes.keys(), 2):
            assert offsets[some] + nbytes[some] <= offsets[other] or offsets[other] + nbytes[other] <= offsets[some]
    assert found == 2  # the append, and the linear op before it


def buffers(program: Program, place: int) -> set[object]:
    """What the calls of an op read and write, as the plan names it."""
    lowered, keys = program.ops[place], set()
    for call in lowered.calls:
        for value in (*memory.values_of(call), *([lowered.op] if "result" in call.args else [])):
            keys.add(program.buffer_of(value))
        keys |= {memory.scratch_key(lowered.op, item) for item in call.args if isinstance(item, memory.Scratch)}
    return keys


@pytest.mark.parametrize("target", ["x86-64-v3", "znver4"])
@pytest.mark.parametrize("quantization", ["int4", "int8", "bf16", "none"])
@pytest.mark.parametrize("dim", [4, 15, 16, 24, 30, 48])
def test_a_loop_runs_each_unit_that_it_takes_in_once(
    dim: int, quantization: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one token, where attention has a unit a key head; heads may end within a tile of the weight."""
    monkeypatch.setattr(small_decoder, "DIM", dim)
    options = CompileOptions(quantization=quantization, target=target, group_size=32)
    program = lower(run_pipeline(small_decoder.small_decoder(), options).graph, machine_named(target))
    loops = [loop for place in range(len(program.ops)) if (loop := joined_loop(program, place)) is not None]
    assert loops
    for loop in loops:
        for part in loop.parts:
            call = program.ops[part.place].calls[part.number]
            units = [
                first + u * count + i for u in range(small_decoder.KV_HEADS) for first, count in part.ranges
                for i in range(count)
            ]  # fmt: skip
            wanted = concrete(call.units, {"T": 1, "R": 1}) if isinstance(call.units, Dim) else call.units
            assert sorted(units) == list(range(int(wanted)))  # type: ignore[call-overload]
            if part.ranges != ((0, 1),):
                assert call.columns % weight_tiles(machine_named(target)).rows == 0
                width = program.ops[part.place].op.shape[-1]
                assert call.columns * (int(wanted) - 1) < width <= call.columns * int(wanted)  # type: ignore[call-overload]


@pytest.mark.parametrize("heads", [2, 1])
def test_one_loop_and_several_give_the_same_bits(tmp_path: Path, heads: int) -> None:
    """While kernels are timed, each has a loop of its own."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": heads, "head_dim": 16}
    directory = make_tiny("llama", tmp_path / "model", **sizes)
    options = CompileOptions(quantization="int4", calibrate="none", accuracy=False, group_size=32, max_context=256)
    compile_model(str(directory), tmp_path / "model.so", options)
    found = []
    for threads, profiling in ((1, True), (1, False), (2, False), (3, False)):
        runtime = Runtime.load(tmp_path / "model.so", threads=threads)
        runtime.set_profiling(profiling)
        with runtime.sequence() as sequence:
            found.append(np.concatenate([runtime.step([(sequence, [token], "all")]) for token in range(3, 70)]))
    for other in found[1:]:
        assert np.array_equal(found[0].view(np.int32), other.view(np.int32))
