"""flatten-tokens, insert-kv-cache, select-rows: a paged graph over mixed sequences means what the source graph does."""

from __future__ import annotations

import numpy as np
import pytest
from attention_harness import VOCABULARY, decoder, random_weights, run_sequence, run_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import KVAppend, PagedAttention, Rope, RopeAngles
from llmc.compiler.ir.text import parse, print_graph
from llmc.compiler.passes.flatten_tokens import FlattenTokens
from llmc.compiler.passes.fuse_rope import FuseRope
from llmc.compiler.passes.insert_kv_cache import InsertKVCache
from llmc.compiler.passes.manager import run_passes
from llmc.compiler.passes.select_rows import SelectRows

# f64 sums in another order: products of unit-scale numbers over 40 terms.
CLOSE = {"rtol": 0, "atol": 1e-11}
PAGED = (FuseRope(), FlattenTokens(), InsertKVCache(), SelectRows())


def paged(graph: Graph) -> Graph:
    after, _ = run_passes(graph, PAGED)
    assert parse(print_graph(after)).symbols == after.symbols
    return after


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, count]).integers(0, VOCABULARY, count).tolist()


SOURCE = decoder()
LOAD = random_weights(SOURCE)
TARGET = paged(SOURCE)


def test_the_paged_graph_has_the_promised_inputs_and_ops() -> None:
    assert [v.name for v in TARGET.inputs] == [
        "ids", "positions", "slots", "tiles", "block_table", "cache.0", "cache.1", "rows",
    ]  # fmt: skip
    assert [name for name, _ in TARGET.outputs] == ["logits", "cache.0.next", "cache.1.next"]
    kinds = [type(op) for op in TARGET.ops]
    assert kinds.count(PagedAttention) == kinds.count(KVAppend) == 2
    assert kinds.count(Rope) == 4 and kinds.count(RopeAngles) == 1


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_split_and_mixture_gives_each_sequence_its_own_logits(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 7, 31, 33, 70]), min_size=1, max_size=3))
    sequences = [tokens(length, seed) for seed, length in enumerate(lengths)]
    remaining = list(lengths)
    steps = []
    while any(remaining):
        step = []
        for sequence in data.draw(st.permutations(range(len(lengths)))):
            count = data.draw(st.integers(0, remaining[sequence]))
            if count:
                step.append((sequence, count))
                remaining[sequence] -= count
        if not step:
            sequence = next(i for i, left in enumerate(remaining) if left)
            step, remaining[sequence] = [(sequence, remaining[sequence])], 0
        steps.append(step)
    found = run_steps(TARGET, LOAD, sequences, steps, tile=data.draw(st.sampled_from([1, 3, 16])))
    for own, logits in zip(sequences, found, strict=True):
        np.testing.assert_allclose(logits, run_sequence(SOURCE, LOAD, own), **CLOSE)


@pytest.mark.parametrize("passes", [PAGED[:1], PAGED[:2]])
def test_each_pass_alone_keeps_the_meaning(passes: tuple) -> None:
    after, _ = run_passes(SOURCE, passes)
    own = tokens(9)
    expected = run_sequence(SOURCE, LOAD, own)
    if len(passes) == 1:
        np.testing.assert_allclose(run_sequence(after, LOAD, own, None), expected, **CLOSE)
        return
    from llmc.compiler.ir.evaluate import evaluate
    from llmc.compiler.ir.types import precise

    with precise():
        inputs = {"ids": np.asarray(own, np.int32), "positions": np.arange(9, dtype=np.int32)}
        np.testing.assert_allclose(evaluate(after, inputs, LOAD)["logits"], expected, **CLOSE)
