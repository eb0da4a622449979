"""use-positions: counts of tokens become the positions of tokens; nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from attention_harness import (
    DIM,
    S,
    apply_half,
    decoder,
    frequencies,
    half_cos_sin,
    random_weights,
    run_sequence,
    run_steps,
    weight,
)
from test_passes_attention_softmax import written

from llmc.compiler.ir.elementwise import Add, Cast, Maximum, Mul, Sub, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention, RopeAngles
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Broadcast, Cumsum, Gather, Iota, Reshape, Slice
from llmc.compiler.passes.flatten_tokens import FlattenTokens
from llmc.compiler.passes.fuse_attention import FuseAttention
from llmc.compiler.passes.fuse_rope import FuseRope
from llmc.compiler.passes.insert_kv_cache import InsertKVCache
from llmc.compiler.passes.manager import Report, run_passes
from llmc.compiler.passes.select_rows import SelectRows
from llmc.compiler.passes.use_positions import UsePositions


def running_sum() -> Value:
    return Sub(Cumsum(Broadcast(constant(1), (1, S)), 1), constant(1))


def counted_by(count: Callable[[], Value], rows: int = 70) -> Graph:
    """A decoder that adds a learned embedding of each token's count to its queries and keys."""

    def rotate(x: Value, positions: Input) -> Value:
        table = Gather(weight("places", rows, DIM), count(), 0)
        return Add(x, Reshape(table, (1, 1, S, DIM)))

    return decoder(rotate)


def beyond(length: int) -> Value:
    """How many tokens there are beyond `length`."""
    size = Slice(Iota(S + 1, "i32"), 0, S, S + 1)
    return Maximum(Sub(size, constant(length, "i32")), constant(0, "i32"))


COUNTS: dict[str, Callable[[], Value]] = {
    "iota": lambda: Reshape(Iota(S), (1, S)),
    "running sum": running_sum,
    "after a past of nothing": lambda: Add(Reshape(Iota(S, "i32"), (1, S)), beyond(64)),
    "offset": lambda: Add(Reshape(Iota(S, "i32"), (1, 1, S)), constant(2, "i32")),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_become_positions_and_the_graph_is_paged(name: str) -> None:
    before = counted_by(COUNTS[name])
    passes = [UsePositions(), FlattenTokens(), InsertKVCache(), SelectRows()]
    after, reports = run_passes(before, passes)
    assert all(report.refusals == [] for report in reports) and reports[0].hits["count"] >= 1
    assert not any(isinstance(op, (Iota, Cumsum)) for op in after.ops)
    load = random_weights(before)
    sequences = [np.random.default_rng(i).integers(0, 29, length).tolist() for i, length in enumerate((33, 7))]
    found = run_steps(after, load, sequences, [[(1, 2), (0, 30)], [(0, 3), (1, 5)]])
    for own, logits in zip(sequences, found, strict=True):
        np.testing.assert_allclose(logits, run_sequence(before, load, own), rtol=0, atol=1e-11)


def test_a_rotation_by_count_is_found() -> None:
    def rotate(x: Value, positions: Input) -> Value:
        return apply_half(x, *half_cos_sin(Reshape(Iota(S), (1, S)), frequencies(DIM // 2)))

    after, _ = run_passes(decoder(rotate), [UsePositions(), FuseRope()])
    assert sum(isinstance(op, RopeAngles) for op in after.ops) == 1


def test_masks_are_recognised_in_either_order() -> None:
    for passes in ([UsePositions(), FuseAttention()], [FuseAttention(), UsePositions()]):
        after, _ = run_passes(decoder(attend=written()), passes)
        assert [op.causal for op in after.ops if isinstance(op, Attention)] == [True, True]


@pytest.mark.parametrize(
    "count",
    [
        lambda: Sub(constant(63), Reshape(Iota(S), (1, S))),  # backwards
        lambda: Mul(Reshape(Iota(S), (1, S)), constant(2)),
        lambda: Add(Reshape(Iota(S, "i32"), (1, S)), beyond(63)),  # a count for every length but the greatest
    ],
)
def test_other_integers_stay_and_flattening_refuses(count: Callable[[], Value]) -> None:
    before = counted_by(count, rows=140)
    after, _ = run_passes(before, [UsePositions()])
    load = random_weights(before)
    own = list(range(9))
    expected = run_sequence(before, load, own)
    np.testing.assert_allclose(run_sequence(after, load, own), expected, rtol=0, atol=1e-12)
    report = Report()
    assert FlattenTokens().run(before, report) is before and "counts tokens" in report.refusals[0][1]


def test_a_count_that_rounds_is_none() -> None:
    """bf16 counts to 256 only: what is a count in f64 is none in the graph's own dtypes."""
    long = Cast(Cast(Add(Reshape(Iota(S), (1, S)), constant(200)), "bf16"), "i64")
    after, _ = run_passes(counted_by(lambda: Sub(long, constant(200))), [UsePositions()])
    assert any(isinstance(op, Cast) and op.to == "bf16" for op in after.ops)


def test_a_sum_that_is_a_count_only_for_short_sequences_stays() -> None:
    """min(position, 50): equal to the position at first."""
    from llmc.compiler.ir.elementwise import Minimum

    before = counted_by(lambda: Minimum(Reshape(Iota(S), (1, S)), constant(50)))
    after, _ = run_passes(before, [UsePositions()])
    load = random_weights(before)
    own = [1] * 60
    expected = run_sequence(before, load, own)
    np.testing.assert_allclose(run_sequence(after, load, own), expected, rtol=0, atol=1e-12)
