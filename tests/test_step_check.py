"""What a step is given is looked at before it runs: what cannot be is a code of step.h, and nothing is written."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from program_harness import CompiledGraph
from small_decoder import VOCABULARY, of_modules, small_decoder
from small_encoder import VOCABULARY as WORDS
from small_encoder import random_sequences, small_encoder, step_inputs

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.elementwise import Add
from llmc.compiler.ir.encoded import Pages
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import KV, Tensor
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.adapt_linears import AdaptLinears
from llmc.compiler.passes.manager import Report
from llmc.compiler.pipeline import run_pipeline
from llmc.compiler.scenario import empty_tables, random_params
from llmc.compiler.step_sizes import ENCODE, GENERATE
from llmc.runtime.device import Use
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.host import Host
from llmc.runtime.library import Choice, Library, Step
from llmc.runtime.memory import address
from llmc.targets import machine_named
from llmc.targets.step_limits import STEP_FAILURES, failures_of

MOST, CONTEXT, PAGES = 64, 96, 5
TOKENS, TILES, SEQUENCES, TABLE, ROWS, SPLITS = range(6)  # places in `sizes`
KINDS = dict(
    zip(
        ("size", "pointer", "memory", "id", "position", "slot", "page", "row", "start", "tile", "adapter"),
        range(1, 12),
        strict=True,
    )
)
ADAPTED = "adapted"  # a decoder with room for adapters
Spoil = Callable[[Step], None]


def number(name: str, place: int, value: int) -> Spoil:
    """Puts a number into one of the step's tables."""

    def spoil(step: Step) -> None:
        ctypes.c_int32.from_address(getattr(step, name) + 4 * place).value = value

    return spoil


def tile(*values: int) -> Spoil:
    """Puts other numbers into the second of the three tiles, which are of 32, 1 and 7 rows."""

    def spoil(step: Step) -> None:
        for place, value in enumerate(values):
            number("tiles", 4 + place, value)(step)

    return spoil


def size(place: int, value: int) -> Spoil:
    return lambda step: step.sizes.__setitem__(place, value)


def field(name: str, value: int | None) -> Spoil:
    return lambda step: setattr(step, name, value)


def shifted(name: str) -> Spoil:
    return lambda step: setattr(step, name, getattr(step, name) + 4)


def element(name: str, place: int, value: int | None) -> Spoil:
    """Puts a pointer or a size into one of the step's tables of them."""

    def spoil(step: Step) -> None:
        ctypes.c_int64.from_address(getattr(step, name) + 8 * place).value = value or 0

    return spoil


@cache
def program(task: str) -> CompiledGraph:
    if task == "run":
        x = Input("x", Tensor((symbol("n", 2, 9), 5), "f32"))
        return CompiledGraph(Graph("sum", (x,), (("out", Add(x, x)),)), machine_named("native"), {}, task=task)
    source = small_encoder(layers=1) if task == ENCODE else of_modules(small_decoder())
    load, options = random_params(source, 3), CompileOptions(quantization="none")
    graph = run_pipeline(source, options, load=load, task=ENCODE if task == ENCODE else GENERATE).graph
    if task == ADAPTED:
        graph = AdaptLinears(count=2, rank=3).run(graph, Report())
    params = {param.name: load(param.name) for param in graph.params}
    limits = {"vocabulary": WORDS if task == ENCODE else VOCABULARY, "context": CONTEXT}
    return CompiledGraph(
        graph, machine_named("native"), params, largest=MOST, task=task.replace(ADAPTED, GENERATE), **limits
    )


def decoder_inputs(graph: Graph) -> dict[str, np.ndarray | Pages]:
    """33 tokens of one sequence and 7 of another, which lie in pages 4, 1 and 2."""
    positions = np.array([*range(33), *range(7)])
    arrays: dict[str, object] = {
        "ids": np.arange(40) % VOCABULARY, "positions": positions, "rows": [32, 39], "block_table": [[4, 1], [2, 0]],
        "adapters": [2] * 33 + [0] * 7,
        "slots": np.array([*[4] * 32, 1, *[2] * 7]) * 32 + positions % 32,
        "tiles": [(0, 0, 32, 0), (0, 32, 1, 32), (1, 33, 7, 0)],
    }  # fmt: skip
    return {
        value.name: Pages.empty(value.type, PAGES)
        if isinstance(value.type, KV)
        else np.ascontiguousarray(np.asarray(arrays[value.name], np.int32))
        for value in graph.inputs
        if not value.name.startswith("adapter.")
    } | empty_tables(graph)


def answer(task: str, spoil: Spoil) -> tuple[int, bytes]:
    """What a spoilt step returns, and what it leaves in its outputs and caches."""
    compiled = program(task)
    compiled.spoil, compiled.allowed = spoil, True
    try:
        if task in (GENERATE, ADAPTED):
            logits, caches = compiled.run(decoder_inputs(compiled.graph))
            return compiled.code, b"".join(a.tobytes() for a in (logits, *(p.keys for p in caches)))
        if task == ENCODE:
            found = compiled.run_arrays(step_inputs(compiled.graph, random_sequences([33, 7], 1), tile=32))
        else:
            found = compiled.run_arrays({"x": np.ones((3, 5), np.float32)})
        return compiled.code, b"".join(array.tobytes() for array in found.values())
    finally:
        compiled.spoil, compiled.allowed = (lambda _step: None), False


INT_MIN, INT_MAX, LARGE = -(2**31), 2**31 - 1, 2**62
SIZES: list[tuple[str, Spoil]] = [
    *(("size", size(place, value)) for place in range(6) for value in (-1, INT_MIN, MOST + 1, LARGE, -LARGE)),
    *(("size", size(place, 0)) for place in (TOKENS, TILES, SEQUENCES, TABLE, SPLITS)),
]
TABLES: list[tuple[str, Spoil]] = [
    *(("pointer", field(name, None)) for name in ("arena", "weights", "cache", "ids", "slots", "tiles", "block_table")),
    *(("pointer", shifted(name)) for name in ("arena", "weights", "ids", "positions", "slots", "tiles", "block_table")),
    ("pointer", element("cache", 1, None)),
    ("memory", field("arena_bytes", 0)),
    *(("memory", field("cache_pages", value)) for value in (0, -1)),
    *(("id", number("ids", place, value)) for place in (0, 39) for value in (-1, 1 << 16, INT_MIN, INT_MAX)),
    *(("position", number("positions", 39, value)) for value in (-1, CONTEXT, INT_MAX)),
    *(("slot", number("slots", place, value)) for place in (0, 39) for value in (-1, 32 * PAGES, INT_MIN, INT_MAX)),
    ("slot", field("cache_pages", 1)),
    *(("page", number("block_table", place, value)) for place in range(4) for value in (-1, PAGES, INT_MIN, INT_MAX)),
    *(("tile", tile(sequence, 32, 1, 32)) for sequence in (-1, 2, INT_MAX)),
    *(("tile", tile(0, first, 1, 32)) for first in (-1, 40, INT_MIN, INT_MAX)),
    *(("tile", tile(0, 32, rows, 32)) for rows in (0, -1, 2, 65, INT_MAX, INT_MIN)),
    *(("tile", tile(0, 32, 1, position)) for position in (-1, 64, INT_MIN, INT_MAX)),
]
CASES: dict[str, list[tuple[str, Spoil]]] = {
    GENERATE: [
        *SIZES,
        *TABLES,
        ("id", number("ids", 7, VOCABULARY)),
        *(("pointer", field(name, None)) for name in ("rows", "logits")),
        *(("row", number("rows", place, value)) for place in (0, 1) for value in (-1, 40, INT_MAX)),
    ],
    ENCODE: [
        *SIZES[:5],
        *TABLES,
        ("id", number("ids", 7, WORDS)),
        *(("pointer", field(name, None)) for name in ("starts", "token_types", "outputs")),
        *(("pointer", element("outputs", place, value)) for place in (0, 1) for value in (None, 68)),
        *(("start", number("starts", 0, value)) for value in (-1, 1)),
        *(("start", number("starts", 1, value)) for value in (-1, 0, 40, 41, INT_MAX, INT_MIN)),
        *(("start", number("starts", 2, value)) for value in (39, 41, INT_MAX)),
        ("tile", tile(0, 33, 1, 32)),  # the other sequence's
        ("tile", tile(0, 32, 1, 31)),
    ],
    ADAPTED: [
        *(("adapter", number("adapters", place, value)) for place in (0, 39) for value in (-1, 3, INT_MIN, INT_MAX)),
        ("adapter", number("adapters", 39, 1)),  # one more than is said
        ("adapter", number("adapters", 0, 0)),
        *(("adapter", size(7, value)) for value in (0, 32, 34)),
        *(("size", size(7, value)) for value in (-1, MOST + 1, LARGE)),
        *(("pointer", field(name, None)) for name in ("adapters", "adapter_tables")),
        *(("pointer", element("adapter_tables", place, value)) for place in (0, 5) for value in (None, 68)),
    ],
    "run": [
        *(("size", element("dims", 0, value)) for value in (-1, 0, 1, 10, LARGE)),
        *(("pointer", field(name, None)) for name in ("dims", "inputs", "outputs")),
        *(("pointer", element(name, 0, value)) for name in ("inputs", "outputs") for value in (None, 68)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("task", CASES)
def test_a_step_that_cannot_be_is_a_code_and_does_nothing(task: str) -> None:
    code, right = answer(task, lambda _step: None)
    assert code == 0
    untouched = None
    for kind, spoil in CASES[task]:
        code, left = answer(task, spoil)
        assert code == KINDS[kind], (kind, code)
        untouched = untouched or left
        assert left == untouched != right
    assert answer(task, lambda _step: None) == (0, right)  # the one after is as if nothing had happened


def test_token_types_beyond_their_table_are_a_failure_of_the_graph() -> None:
    for value in (-3, 2, INT_MAX):
        code, _ = answer(ENCODE, number("token_types", 5, value))
        assert "index out of range" in failures_of(program(ENCODE).program)[code - 1]


def test_every_code_of_the_header_has_its_text() -> None:
    header = Path(str(resources.files("llmc.runtime.csrc"))).joinpath("step.h").read_text()
    names = re.findall(r"^    LLMC_WRONG_(\w+)(?: = 1)?,", header, re.MULTILINE)
    assert [name.lower() for name in names] == list(KINDS)
    assert len(STEP_FAILURES) == len(KINDS) and all(
        word in text
        for word, text in zip(
            ("size", "pointer", "memory", "id", "position", "slot", "page", "row", "starts", "tiles", "adapters"),
            STEP_FAILURES,
            strict=True,
        )
    )
    for task in CASES:
        assert failures_of(program(task).program)[: len(KINDS)] == list(STEP_FAILURES)


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0} for name in ("logits", "scratch", "seen", "count")),
        *({"count": value} for value in (-1, -LARGE, 2**31)),
        *({"seen_count": value} for value in (-1, 10, LARGE)),
        *({"top_k": value} for value in (-1, -LARGE)),
        *({"penalty": value} for value in (0.0, -1.0, np.nan, np.inf)),
        *({"temperature": value} for value in (-1.0, np.nan, np.inf)),
        *({name: value} for name in ("top_p", "min_p") for value in (-0.1, 1.1, np.nan)),
        *({"uniform": value} for value in (-0.1, 1.0, np.nan)),
        *({"id": value} for value in (-1, 9, INT_MIN, INT_MAX)),
    ],
)
def test_a_choice_that_cannot_be_is_an_error_and_changes_nothing(wrong: dict[str, float]) -> None:
    path = fake_artifact.library()
    library, device = Library(path, str(path)), Host(2)
    device.use(library)
    scratch = device.reserve(library.choose_bytes(9), Use.DENSE)
    logits, seen = np.arange(9, dtype=np.float32), np.array([8, 1], np.int32)
    given = {
        "logits": address(logits), "seen": address(seen), "scratch": scratch.number, "count": 9, "seen_count": 2,
        "top_k": 3, "penalty": 1.5, "temperature": 1.0, "top_p": 0.9, "min_p": 0.1, "uniform": 0.5,
    }  # fmt: skip
    before = logits.copy()
    choice = Choice(**given)
    assert device.choose(choice) >= 0
    if "id" in wrong:
        seen[1] = wrong["id"]
    else:
        for name, value in wrong.items():
            setattr(choice, name, value)
    with pytest.raises(RuntimeStateError, match="a choice that cannot be"):
        device.choose(choice)
    assert (logits == before).all()
