"""The checker passes sound passes at every stage of a decoder, and names pass, output, token of an unsound one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from pass_harness import S, c, graph_of, param, x
from small_decoder import VOCABULARY, small_decoder

from llmc.compiler import passes as _registered  # noqa: F401
from llmc.compiler.check import Checker, Difference, gaps_between, kl_divergence
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import llm
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import precise
from llmc.compiler.passes.manager import Pass, Report, parse_pipeline, run_passes
from llmc.compiler.scenario import Scenario, is_token_graph, random_inputs, random_params, vocabulary_of
from llmc.errors import CompileError

RECOGNISE = "canonicalize,fold,cse,fuse-embed,fuse-linear,fuse-norm,fuse-activation,canonicalize,cse"
TOKENS = f"{RECOGNISE},flatten-tokens,canonicalize,cse"
CACHED = f"{TOKENS},insert-kv-cache,select-rows"


@dataclass(frozen=True)
class Broken(Pass):
    """Changes the first op of a class that satisfies a test."""

    name: ClassVar[str] = "broken"
    what: str = ""

    def run(self, graph: Graph, report: Report) -> Graph:
        def rule(op: Op) -> Value | None:
            if self.what == "eps" and isinstance(op, llm.RMSNorm):
                return op.replace(eps=op.eps * 1.5)
            if self.what == "window" and isinstance(op, (llm.PagedAttention, llm.Attention)):
                return op.replace(window=4)
            if self.what == "rows" and isinstance(op, s.Gather):
                return s.Gather(op.x, e.Maximum(e.Sub(op.indices, e.constant(1, "i32")), e.constant(0, "i32")), op.axis)
            if self.what == "slots" and isinstance(op, llm.KVAppend):
                return op.replace(k=op.v)
            if self.what == "shape" and isinstance(op, llm.Linear) and op.shape[-1] == VOCABULARY:
                return s.Slice(op, op.rank - 1, 0, VOCABULARY - 1)
            return None

        if self.what == "output":
            return graph.replace_outputs((f"new_{name}", value) for name, value in graph.outputs)
        return rewrite(graph, rule)


def after(pipeline: str) -> Graph:
    return run_passes(small_decoder(), parse_pipeline(pipeline))[0]


@pytest.mark.parametrize("lengths", [(5, 2, 9), (2,), (PAGE + 3, 3, 2 * PAGE + 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_decoder_is_the_same_through_every_stage(lengths: tuple[int, ...], seed: int) -> None:
    checker = Checker(seed=seed, lengths=lengths, tolerance=1e-12)
    final, reports = run_passes(small_decoder(), parse_pipeline(CACHED), [checker])
    assert {op.level for op in final.ops if isinstance(op, llm.PagedAttention)} == {"llm"}
    assert {value.name for value in final.inputs} >= {"tiles", "block_table", "rows", "cache.0"}
    assert [d.pass_name for d in checker.differences] == [r.name for r in reports]


@pytest.mark.parametrize(
    ("pipeline", "what"),
    [
        (RECOGNISE, "eps"), (TOKENS, "eps"), (CACHED, "eps"), (RECOGNISE, "window"), (TOKENS, "window"),
        (CACHED, "window"), (CACHED, "rows"), (CACHED, "slots"),
    ],
)  # fmt: skip
def test_a_pass_that_changes_the_result_is_named(pipeline: str, what: str) -> None:
    with pytest.raises(CompileError, match=r"pass broken\{what=.*\} changed .* logits differs by .* at token"):
        run_passes(after(pipeline), [Broken(what)], [Checker()])


def test_a_window_differs_first_where_it_ends() -> None:
    """Sequences no longer than the window cannot tell."""
    run_passes(after(CACHED), [Broken("window")], [Checker(lengths=(4, 2))])
    with pytest.raises(CompileError, match="at token 4 of sequence 1"):
        run_passes(after(CACHED), [Broken("window")], [Checker(lengths=(4, 5))])


def test_a_lost_output_and_a_changed_shape_are_named() -> None:
    with pytest.raises(CompileError, match="lost output 'logits'"):
        run_passes(after(RECOGNISE), [Broken("output")], [Checker()])
    with pytest.raises(CompileError, match=r"changed output 'logits' from \(82, 33\) to \(82, 32\)"):
        run_passes(after(RECOGNISE), [Broken("shape")], [Checker()])


def test_quantize_is_reported_and_becomes_the_reference() -> None:
    pipeline = f"{CACHED},quantize{{scheme=int8,group-size=8}},canonicalize,cse"
    checker = Checker(tolerance=1e-9)
    run_passes(small_decoder(), parse_pipeline(pipeline), [checker])
    (quantized,) = (d for d in checker.differences if not d.exact)
    assert quantized.pass_name == "quantize"
    assert 1e-6 < quantized.relative < 0.1 and 0 < quantized.divergence < 0.01
    assert "KL divergence" in str(quantized)
    assert all(d.relative <= 1e-9 for d in checker.differences if d.exact)


def test_each_weight_is_quantized_once_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[llm.Quantize] = []
    evaluate_one = llm.Quantize.evaluate

    def counting(self: llm.Quantize, w: np.ndarray) -> object:
        rounded.append(self)
        return evaluate_one(self, w)

    monkeypatch.setattr(llm.Quantize, "evaluate", counting)
    pipeline = f"{CACHED},quantize{{scheme=int8,group-size=8}},canonicalize,cse,fuse-epilogues,split-rounding,cse"
    final, _ = run_passes(small_decoder(), parse_pipeline(pipeline), [Checker()])
    weights = [op for op in final.ops if isinstance(op, llm.Quantize)]
    assert len(weights) > 5
    assert len(rounded) == len({id(op) for op in rounded})


def test_results_are_reused_and_untouched_graphs_are_not_run() -> None:
    loads: list[str] = []
    graph = after(RECOGNISE)
    weights = random_params(graph)

    def counting(name: str) -> np.ndarray:
        loads.append(name)
        return np.asarray(weights(name))

    checker = Checker(counting, lengths=(5, 2, 9))
    run_passes(graph, parse_pipeline("canonicalize,cse,fold"), [checker])
    # Nothing is left to do: one run over three sequences together, each param loaded once for all of them.
    assert len(loads) == len(graph.params)
    assert [d.largest for d in checker.differences] == [0.0] * 3


def test_a_graph_without_tokens_is_checked_on_random_inputs() -> None:
    graph = graph_of(e.Mul(llm.RMSNorm(x(), None, 1e-5), param("w", 6)))
    run_passes(graph, parse_pipeline("fuse-norm"), [Checker()])
    with pytest.raises(CompileError, match="changed what the graph computes: broken: out0"):
        run_passes(graph, [Broken("eps")], [Checker(tolerance=1e-9)])


def test_a_single_number_is_compared_too() -> None:
    graph = graph_of(s.Gather(x(7), e.constant(2, "i32"), 0))
    with pytest.raises(CompileError, match="broken: out0 differs"):
        run_passes(graph, [Broken("rows")], [Checker()])


def test_one_checker_may_watch_several_runs() -> None:
    checker = Checker()
    for graph in (graph_of(e.Add(x(), c(0))), graph_of(e.Mul(x(), c(1)))):
        run_passes(graph, parse_pipeline("canonicalize"), [checker])
    with pytest.raises(CompileError, match="differs"):
        run_passes(graph_of(llm.RMSNorm(x(), None, 1e-2)), [Broken("eps")], [checker])


def test_a_graph_that_does_not_evaluate_is_named() -> None:
    # The index 9 is beyond the table, which no type can tell.
    value = e.Add(x(S, 4), s.Gather(param("t", 3, 4), e.constant(9, "i64"), 0))
    with pytest.raises(CompileError, match=r"the graph before cse does not evaluate: t\.gather"):
        run_passes(graph_of(value), parse_pipeline("cse"), [Checker()])


@pytest.mark.parametrize("stage", [RECOGNISE, TOKENS, CACHED])
def test_a_scenario_gives_the_same_outputs_at_every_stage(stage: str) -> None:
    scenario = Scenario.random(VOCABULARY, seed=3, lengths=(PAGE + 9, 2, 7))
    original, graph = small_decoder(), after(stage)
    weights = random_params(original)
    with precise():
        expected, found = scenario.run(original, weights), scenario.run(graph, weights)
    assert found.keys() == {"logits"} and found["logits"].shape == (scenario.tokens, VOCABULARY)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-9, atol=1e-12)


def test_sequences_run_together_are_sequences_run_alone() -> None:
    """Compile-time values are shared between them, but for those whose size is the sequence's."""
    ids = x(1, S, name="ids", dtype="i32")
    places = e.Cast(s.Reshape(s.Iota(S), (1, S, 1)), "f32")
    filled = e.Mul(s.Broadcast(param("w", 6), (1, S, 6)), e.Neg(param("w", 6)))
    value = e.Add(e.Mul(s.Gather(param("t", 9, 6), ids, 0), places), filled)
    graph, weights = graph_of(value, filled), random_params(graph_of(value))
    scenario = Scenario.random(9, lengths=(3, 2, 7))
    together = scenario.run(graph, weights)
    for index, sequence in enumerate(scenario.sequences):
        alone = evaluate(graph, {"ids": sequence[None]}, weights)
        begin = scenario.row(index, 0)
        for name, data in alone.items():
            np.testing.assert_array_equal(together[name][begin : begin + len(sequence)], np.asarray(data)[0])


def test_a_scenario_covers_each_token_once_and_no_page_twice() -> None:
    for seed in range(20):
        scenario = Scenario.random(10, seed, lengths=(2, PAGE + 1, 5, 2))
        spans = [span for step in scenario.steps for span in step]
        covered = sorted((span.sequence, p) for span in spans for p in range(span.begin, span.end))
        assert covered == [scenario.token(row) for row in range(scenario.tokens)]
        pages = [page for sequence in scenario.pages for page in sequence]
        assert len(set(pages)) == len(pages)


def test_ids_stay_within_the_tables_that_they_index() -> None:
    assert vocabulary_of(small_decoder()) == VOCABULARY
    assert vocabulary_of(after(CACHED)) == VOCABULARY
    graph = graph_of(s.Gather(param("t", 3, 5), x(S, name="picks", dtype="i32"), 1))
    assert not is_token_graph(graph)
    assert random_inputs(graph, 1, {"S": 40})["picks"].max() < 5  # type: ignore[union-attr]


def test_random_params_depend_on_name_and_seed_only() -> None:
    graph = small_decoder()
    load, again, other = random_params(graph), random_params(after(CACHED)), random_params(graph, seed=1)
    for param_ in graph.params:
        array = load(param_.name)
        assert array.shape == param_.shape and str(array.dtype) == "bfloat16"
        np.testing.assert_array_equal(array, again(param_.name))
        assert (array != other(param_.name)).any()
    with pytest.raises(CompileError, match="no param 'nothing'"):
        load("nothing")


def test_differences_of_what_is_not_finite() -> None:
    a = np.array([1.0, np.inf, np.nan, np.inf, 2.0])
    b = np.array([1.5, np.inf, np.nan, 0.0, np.nan])
    assert gaps_between(a, b).tolist() == [0.5, 0.0, 0.0, np.inf, np.inf]
    assert "inf" in str(Difference("p", "y", np.inf, np.inf))


def test_kl_divergence() -> None:
    """KL of (1/2, 1/2) against (1/4, 3/4) is ln(2) - ln(3) / 2; shifting logits changes nothing."""
    p, q = np.zeros((1, 2)), np.log([[1.0, 3.0]])
    assert kl_divergence(p, q + 7) == pytest.approx(np.log(2) - np.log(3) / 2)
    assert kl_divergence(q, q) == 0
