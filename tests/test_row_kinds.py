"""Where a machine has one arithmetic for few rows and another for many, a row's kind decides which, and never how many
rows there are: what lowering guards its calls with, and which steps the runtime makes."""

from __future__ import annotations

import itertools

import fake_artifact
import numpy as np
import pytest
from small_decoder import small_decoder
from x86_machines import MACHINES

from llmc.compiler.ir.dims import Dim, symbol, symbols_of
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.kernels import RunKernels  # noqa: F401  (registers the op)
from llmc.compiler.ir.llm import GatedLinear, Linear, Quantize, QuantizeActivations
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.runtime.runtime import Runtime
from llmc.targets import lower
from llmc.targets.cpu.codegen import build_module
from llmc.targets.kernel import Call, Scratch
from llmc.targets.lowering import Program
from llmc.targets.machine import Machine
from llmc.targets.x86 import detect

TILES = detect.machine("sapphirerapids")
SCHEMES = ("int4", "int6", "int8", "bf16", "f16", "none")
COUNTS = (1, 2, 4, 5, 8, 9, 16, 17, 33, 48, 49, 128, 129, 500)
# What sums up a row otherwise than the kernels of few rows do. attention_matrix is told which kind it has.
MANY = {"tile_linear", "activation_tiles"}


def lowered(scheme: str, machine: Machine) -> Program:
    options = CompileOptions(quantization=scheme, target="sapphirerapids", group_size=32, max_step=64)
    return lower(run_pipeline(small_decoder("head"), options).graph, machine)


def runs(call: Call, sizes: dict[str, int]) -> bool:
    return all(
        item.low <= sizes[item.symbol] and (item.high is None or sizes[item.symbol] <= item.high) for item in call.when
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kind_decides_and_not_the_number(scheme: str) -> None:
    """For every op: the same arithmetic at every number of tokens and of rows with logits, and one result each."""
    program = lowered(scheme, TILES)
    for prompt in (0, 1):
        for op in program.ops:
            kinds = set()
            for tokens in COUNTS:
                for rows in (1, 20, 200):
                    sizes = {"T": tokens, "R": rows, "B": 1, "SPLITS": 1, "PROMPT": prompt}
                    made = [call for call in op.calls if runs(call, sizes)]
                    results = [call for call in made if "linear" in call.kernel.name]
                    assert len(results) == any("linear" in call.kernel.name for call in op.calls), (op.op, sizes)
                    kinds.add(frozenset(family(call) for call in made))
            assert len(kinds) == 1, (op.op.name, kinds)
    names = {call.kernel.name for op in program.ops for call in op.calls}
    assert ("tile_linear" in names) == (scheme != "f16"), "tiles multiply no f16"


def scratches(call: Call) -> tuple[set[str], set[str]]:
    """The forms' buffers that a call reads, and those that it writes: a kernel's results come last."""
    names = [arg.name for arg in call.args if isinstance(arg, Scratch) and arg.name.startswith("@")]
    results = {"quantize_activations": 3, "round_activations": 1, "activation_tiles": 1}.get(call.kernel.name, 0)
    if call.kernel.name == "tile_linear":
        results = dict(call.kernel.params)["packed"] is True
    return set(names[: len(names) - results]), set(names[len(names) - results :])


def chain(kind: str) -> Graph:
    """Arrays through linear ops one behind the other, with a reader that needs own rows."""
    tokens = symbol("T", 1, 4096)
    x = Input("x", Tensor((tokens, 96), "f32"))
    dtype = "bf16" if kind == "bf16" else "f32"

    def weight(name: str, outputs: int, inputs: int) -> Value:
        plain = Param(name, Tensor((outputs, inputs), dtype))
        return Quantize(plain, "q4g32") if kind == "int8" else plain

    def rounds(value: Value) -> Value:
        if kind == "int8":
            return QuantizeActivations(value, 32)
        return Cast(Cast(value, "bf16"), "f32") if kind == "bf16" else value

    first = Linear(rounds(x), weight("a", 128, 96), activation="gelu")
    gated = GatedLinear(rounds(first), weight("b", 128, 128))
    last = Linear(rounds(gated), weight("c", 64, 64), residual=gated)
    others = Linear(rounds(last), weight("d", 33, 64)), Linear(rounds(last), weight("e", 40, 64))
    return Graph("chain", (x,), (("y", others[0]), ("z", others[1])))


KINDS = (*SCHEMES, "chain f32", "chain bf16", "chain int8")


@pytest.mark.parametrize("name", ["tiles", "znver5"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_written_before_it_is_read(kind: str, name: str) -> None:
    """At every size and kind of step; and nothing is written twice, or for nobody."""
    machine = TILES if name == "tiles" else detect.machine(name)
    array = kind.removeprefix("chain ")
    program = lower(chain(array), machine) if array != kind else lowered(kind, machine)
    shared = set()
    for tokens in COUNTS:
        for rows, prompt in itertools.product((1, 20, 200), (0, 1)):
            sizes = {"T": tokens, "R": rows, "B": 1, "SPLITS": 1, "PROMPT": prompt}
            written: set[str] = set()
            read: set[str] = set()
            for call in (call for op in program.ops for call in op.calls if runs(call, sizes)):
                reads, writes = scratches(call)
                assert reads <= written and not writes & written, (call.kernel.name, sizes)
                written, read = written | writes, read | reads
            assert written == read, sizes
            shared |= written
    assert shared or (kind not in ("int4", "int8", "chain int8") and name != "tiles") or kind == "f16"


def family(call: Call) -> str:
    """The name of a kernel; one for all whose sums are the same, bit by bit (tests/test_x86_company.py)."""
    name = call.kernel.name
    integers = ("quantized_linear_rows", "quantized_linear_blocks", "quantized_linear_tile_rows")
    floats = ("float_linear_rows", "float_linear_blocks")
    return "integers" if name in integers else "floats" if name in floats else name


def test_attention_is_told_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("small_decoder.DIM", 16)
    program = lowered("int8", TILES)
    (call,) = (c for op in program.ops for c in op.calls if c.kernel.name == "attention_matrix")
    assert [str(arg) for arg in call.args if isinstance(arg, Dim)] == ["M", "SPLITS", "PROMPT"]
    assert "tdpbf16ps" in build_module(call.kernel, TILES).inspect_source("asm")


@pytest.mark.parametrize("name", MACHINES)
def test_other_machines_have_one_arithmetic(name: str) -> None:
    for scheme in SCHEMES:
        for op in lowered(scheme, MACHINES[name]).ops:
            for call in op.calls:
                sizes = {item.name for arg in call.args if isinstance(arg, Dim) for item in symbols_of(arg)}
                assert "PROMPT" not in sizes | {item.symbol for item in call.when}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    facts = fake_artifact.manifest()["step"]
    assert isinstance(facts, dict)
    path = fake_artifact.write(tmp_path_factory.mktemp("kinds") / "model.so", step={**facts, "row_kinds": True})
    return Runtime.load(path, threads=2)


def steps_of(runtime: Runtime, *requests: tuple[object, object, str]) -> list[tuple[int, int]]:
    """(tokens, kind) of the steps that serve these requests."""
    runtime.set_profiling(True)
    try:
        runtime.step(requests)  # type: ignore[arg-type]
        return [(step["T"], step["PROMPT"]) for step in runtime.caller.profiled]
    finally:
        runtime.set_profiling(False)


def test_a_step_has_one_kind(runtime: Runtime) -> None:
    with runtime.sequence() as one, runtime.sequence() as two, runtime.sequence() as three:
        assert steps_of(runtime, (one, [1, 2], "last"), (two, [3], "last")) == [(3, 1)]
        long = np.arange(fake_artifact.MAX_STEP + 1) % 300
        assert steps_of(runtime, (one, [5], "last"), (two, [6], "all"), (three, long, "last")) == [
            (2, 0),
            (48, 1),
            (1, 1),
        ]
        assert steps_of(runtime, (three, [5, 6], "last"), (two, [6], "last")) == [(2, 1), (1, 0)]
        both = runtime.step_last([(one, np.array([7], np.int32)), (two, np.array([8, 9], np.int32))])
        found = [runtime.fetch_logits(place)[0].copy() for place in both]
    expected = [fake_artifact.reference_logits(ids)[-1] for ids in ([1, 2, 5, 7], [3, 6, 6, 8, 9])]
    assert all((logits == wanted).all() for logits, wanted in zip(found, expected, strict=True))


def test_what_is_left_of_a_prompt_is_a_prompt(runtime: Runtime) -> None:
    """Also one token behind a prefix that was found, and in a fork of it."""
    ids = np.arange(33, dtype=np.int32)
    runtime.forward(ids)
    with runtime.sequence() as sequence:
        assert sequence.adopt_prefix(ids) == 32
        with sequence.fork() as fork:
            assert steps_of(runtime, (sequence, ids[32:], "last"), (fork, ids[32:], "last")) == [(2, 1)]
            assert steps_of(runtime, (sequence, [4], "last"), (fork, [5], "last")) == [(2, 0)]
