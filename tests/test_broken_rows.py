"""A decoder's logits beside a sequence whose numbers are broken: the same bits, in prompts, decoding, reused pages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from program_harness import CompiledGraph
from small_decoder import VOCABULARY, small_decoder

from llmc.compiler.ir.encoded import PAGE, Pages
from llmc.compiler.ir.types import KV, Array
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.compiler.scenario import random_params
from llmc.compiler.step_sizes import GENERATE
from llmc.targets import machine_named

BROKEN = VOCABULARY - 1  # the token whose embedding is no number
PAGES = 6

Run = tuple[list[int], int, list[int]]  # ids, the position of the first, pages


def step(program: CompiledGraph, caches: list[Pages], runs: list[Run]) -> tuple[list[Array], list[Pages]]:
    """The logits of each run's tokens, and the caches after."""
    firsts = np.cumsum([0, *(len(ids) for ids, _, _ in runs)])
    columns = max(len(pages) for _, _, pages in runs)
    positions = [np.arange(start, start + len(ids)) for ids, start, _ in runs]
    arrays = {
        "ids": np.concatenate([ids for ids, _, _ in runs]), "positions": np.concatenate(positions),
        "slots": np.concatenate(
            [np.array(own)[at // PAGE] * PAGE + at % PAGE for (_, _, own), at in zip(runs, positions, strict=True)]
        ),
        "tiles": [
            (index, firsts[index] + row, min(16, len(ids) - row), start + row)
            for index, (ids, start, _) in enumerate(runs)
            for row in range(0, len(ids), 16)
        ],
        "block_table": [[*pages, *[0] * (columns - len(pages))] for _, _, pages in runs], "rows": np.arange(firsts[-1]),
    }  # fmt: skip
    left = iter(caches)
    given = {
        value.name: next(left) if isinstance(value.type, KV) else np.ascontiguousarray(arrays[value.name], np.int32)
        for value in program.graph.inputs
    }
    logits, after = program.run(given)
    return [logits[a:b].copy() for a, b in itertools.pairwise(firsts)], after


def story(program: CompiledGraph, spoilt: int | None) -> list[list[Array]]:
    """Three prompts, some steps of decoding, and a new prompt in the pages of the last one. spoilt: the place of the
    broken token in the last prompt; None: it has none."""
    first, second, third = list(range(20)), list(range(30, -10, -1)), [3, 1, 4, 1, 5, 9, 2]
    second = [abs(token) for token in second]
    if spoilt is not None:
        third[spoilt] = BROKEN
    caches = [
        Pages(np.full_like(empty.keys, np.nan), np.full_like(empty.values, np.nan))
        for value in program.graph.inputs
        if isinstance(value.type, KV)
        for empty in [Pages.empty(value.type, PAGES)]
    ]
    found, caches = step(program, caches, [(third, 0, [1]), (first, 0, [4]), (second, 0, [2, 5])])
    said = [found]
    for more in range(3):
        runs: list[Run] = [([7], 20 + more, [4]), ([8], 7 + more, [1]), ([9], 40 + more, [2, 5])]
        found, caches = step(program, caches, runs)
        said.append([found[1], found[0], found[2]])
    found, caches = step(program, caches, [([5, 6], 0, [1]), ([9], 43, [2, 5])])
    said.append([np.zeros(0, np.float32), *found])
    return said


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_a_broken_sequence_changes_no_other(quantization: str, number: float) -> None:
    source = small_decoder(head="head")
    load = random_params(source, 3)
    options = CompileOptions(quantization=quantization, embedding="none")
    graph = run_pipeline(source, options, load=load, task=GENERATE).graph
    params = {param.name: load(param.name).copy() for param in graph.params}
    params["embed"][BROKEN] = number
    program = CompiledGraph(graph, machine_named("native"), params, largest=128)
    assert {value.type.dtype for value in graph.inputs if isinstance(value.type, KV)} == {
        "f32" if quantization == "none" else "f16"
    }
    beside = story(program, None)
    assert all(np.isfinite(logits).all() for found in beside for logits in found)
    for spoilt in (0, 3, 6):
        for found, expected in zip(story(program, spoilt), beside, strict=True):
            for logits, wanted in zip(found[1:], expected[1:], strict=True):
                assert (logits.view(np.uint32) == wanted.view(np.uint32)).all()
            if not np.isfinite(number) and len(found[0]):
                assert not np.isfinite(found[0][-1]).all()
