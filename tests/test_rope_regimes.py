"""Models whose rotary angles depend on the length of the sequence: right at every length, through the cache too.

The original is transformers, called on the whole text. Up to 32 tokens the model turns by its short factors, beyond
them by its long ones: a sequence that grows past them is computed anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import load_reference
from kernel_harness import CACHE
from tiny_models import make_tiny

from llmc.compiler.check import Checker
from llmc.compiler.losses import losses
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import Compiled, compile_model, run_pipeline
from llmc.errors import LlmcError
from llmc.frontends.hf.lift import lift
from llmc.runtime.errors import CacheFullError, RuntimeStateError
from llmc.runtime.manifest import parse
from llmc.runtime.runtime import Runtime

SHORT = 32  # tokens of the short factors
CONTEXT = 100
TOLERANCE = 1e-4  # f32 against f32, summed in other orders, of logits of size about 3
PAIRS = 8
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SHORT, "factor": 4.0,
    "short_factor": [1 + 0.1 * i for i in range(PAIRS)], "long_factor": [2.0 + i for i in range(PAIRS)],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
IDS = np.random.default_rng(7).integers(2, 300, CONTEXT).astype(np.int32)
LENGTHS = (1, 9, 31, 32, 33, 34, 65, 100)


@dataclass(frozen=True)
class Model:
    """A tiny model and its f32 artifact."""

    directory: Path
    artifact: Path
    manifest: dict[str, object]

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime.load(self.artifact, threads=2)

    def original(self, ids: np.ndarray) -> np.ndarray:
        """transformers' logits [len(ids), vocab] of a whole text, by a model that has seen no other."""
        with torch.no_grad():
            logits = load_reference(self.directory)(torch.from_numpy(ids).long()[None], use_cache=False).logits
        return np.asarray(logits[0].float().numpy())


def compiled(rope: dict[str, object], folder: Path, **changes: object) -> Model:
    directory = make_tiny("llama", folder / "model", rope_parameters=rope, **changes)
    options = CompileOptions(quantization="none", max_step=16, max_context=CONTEXT, kernel_cache=CACHE)
    return Model(directory, folder / "model.so", compile_model(str(directory), folder / "model.so", options))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return compiled(LONGROPE, tmp_path_factory.mktemp("longrope"), max_position_embeddings=4 * SHORT)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_the_manifest_says_where_the_angles_change(model: Model) -> None:
    assert model.manifest["step"]["regimes"] == [SHORT]  # type: ignore[index]
    assert model.runtime.paged
    long, short = model.original(IDS[:40]), model.original(IDS[:20])
    assert np.abs(long[:20] - short).max() > 1e-2, "sets of factors that hardly differ would prove nothing"


@pytest.mark.parametrize("length", LENGTHS)
def test_a_whole_text_is_the_original(model: Model, length: int) -> None:
    same(model.runtime.forward(IDS[:length]), model.original(IDS[:length]))


@pytest.mark.parametrize("cuts", [(9, 31), (32,), (33,), (5, 40), (31, 32, 33, 34), (1, 2, 64, 65)])
def test_every_piece_of_a_growing_text_is_the_original_of_the_text_so_far(model: Model, cuts: tuple[int, ...]) -> None:
    with model.runtime.sequence() as sequence:
        for begin, end in zip((0, *cuts), (*cuts, 70), strict=True):
            same(model.runtime.step([(sequence, IDS[begin:end], "all")]), model.original(IDS[:end])[begin:])
            assert len(sequence) == end and np.array_equal(sequence.tokens, IDS[:end])
    model.runtime.pool.check()


def test_random_splits_of_several_sequences_in_one_step(model: Model) -> None:
    generator = np.random.default_rng(3)
    texts = [np.roll(IDS, shift)[: CONTEXT - 9 * shift] for shift in range(3)]
    sequences = [model.runtime.sequence() for _ in texts]
    while any(len(s) < len(t) for s, t in zip(sequences, texts, strict=True)):
        pending = [(s, t) for s, t in zip(sequences, texts, strict=True) if len(s) < len(t)]
        pieces = [t[len(s) : len(s) + int(generator.integers(1, 30))] for s, t in pending]
        rows = model.runtime.step([(s, piece, "last") for (s, _), piece in zip(pending, pieces, strict=True)])
        for (sequence, text), row in zip(pending, rows, strict=True):
            same(row, model.original(text[: len(sequence)])[-1])
    for sequence in sequences:
        sequence.close()
    model.runtime.pool.check()


def test_greedy_text_across_the_threshold_is_the_original_s(model: Model) -> None:
    expected = IDS[:28]
    for _ in range(10):
        expected = np.append(expected, model.original(expected)[-1].argmax()).astype(np.int32)
    stream = model.runtime.stream(IDS[:28], max_tokens=10, temperature=0.0, stop_token_ids=[])
    stream.text()
    assert stream.tokens[:10] == expected[28:].tolist()[: len(stream.tokens)]
    prompts = [IDS[:28], IDS[40:68], IDS[:5]]  # two cross in the same step
    texts = model.runtime.generate_batch(prompts, max_tokens=10, temperature=0.0)
    assert texts == [model.runtime.generate(prompt, max_tokens=10, temperature=0.0) for prompt in prompts]


def test_cached_pages_of_the_other_factors_are_not_shared(model: Model) -> None:
    """The first page, 32 tokens, is the same text in a short and in a long prompt, and other keys."""
    with model.runtime.sequence() as short:
        model.runtime.step([(short, IDS[:32], "last")])
    with model.runtime.sequence() as long:
        assert long.adopt_prefix(IDS[:80]) % 32 == 0
        same(model.runtime.step([(long, IDS[len(long) : 80], "last")])[0], model.original(IDS[:80])[-1])
    with model.runtime.sequence() as again:
        assert again.adopt_prefix(IDS[:80]) == 64
        same(model.runtime.step([(again, IDS[64:80], "last")])[0], model.original(IDS[:80])[-1])
    with model.runtime.sequence() as cut:  # adopted for a long prompt, and then no more than a few tokens are asked for
        cut.adopt_prefix(IDS[:80])
        cut.rollback(len(cut) - 20)
        same(model.runtime.step([(cut, IDS[20:23], "all")]), model.original(IDS[:23])[20:])
    model.runtime.pool.check()


def test_forks_and_rollbacks_keep_their_own_factors(model: Model) -> None:
    with model.runtime.sequence() as trunk:
        model.runtime.step([(trunk, IDS[:30], "last")])
        with trunk.fork() as branch:
            same(model.runtime.step([(branch, IDS[30:50], "all")]), model.original(IDS[:50])[30:])
            same(model.runtime.step([(trunk, IDS[30:32], "all")]), model.original(IDS[:32])[30:])
            branch.rollback(25)
            same(model.runtime.step([(branch, IDS[25:28], "all")]), model.original(IDS[:28])[25:])
        same(model.runtime.step([(trunk, IDS[32:33], "all")]), model.original(IDS[:33])[32:])
    model.runtime.pool.check()


def test_a_step_that_finds_no_room_leaves_all_as_it_was(model: Model) -> None:
    runtime = Runtime.load(model.artifact, threads=1, kv_memory=3 * model.runtime.manifest.bytes_per_page)
    first, second = runtime.sequence(), runtime.sequence()
    runtime.step([(first, IDS[:30], "last"), (second, IDS[:30], "last")])
    with pytest.raises(CacheFullError):  # two pages more than there are
        runtime.step([(first, IDS[30:40], "last"), (second, IDS[30:40], "last")])
    runtime.pool.check()
    for sequence in (first, second):
        assert len(sequence) == 30
        same(runtime.step([(sequence, IDS[30:31], "last")])[0], model.original(IDS[:31])[-1])
    second.close()
    same(runtime.step([(first, IDS[31:80], "last")])[0], model.original(IDS[:80])[-1])
    runtime.pool.check()


def test_a_sequence_that_will_be_long_is_computed_so_from_the_start(model: Model) -> None:
    with model.runtime.sequence(expected=50) as sequence:
        rows = [model.runtime.step([(sequence, piece, "all")]) for piece in np.split(IDS[:50], (9, 33))]
    same(np.concatenate(rows), model.original(IDS[:50]))
    with pytest.raises(RuntimeStateError, match=f"context has {CONTEXT}"):
        model.runtime.sequence(expected=CONTEXT + 1)


def test_an_artifact_that_was_saved_keeps_its_factors(model: Model, tmp_path: Path) -> None:
    model.runtime.save(tmp_path / "copy.so")
    same(Runtime.load(tmp_path / "copy.so", threads=1).forward(IDS[:40]), model.original(IDS[:40]))


def lost(found: Compiled) -> list[str]:
    """What a user is told that the model lost."""
    return losses(found.graph, found.reports, "generate", "none")


def test_every_pass_keeps_its_meaning_on_both_sides_of_the_threshold(model: Model) -> None:
    lifted = lift(model.directory, max_context=CONTEXT)
    checker = Checker(lifted.weights.load, lengths=(40, 7, 33, 32))
    found = run_pipeline(lifted.graph, CompileOptions(quantization="none"), [checker], load=lifted.weights.load)
    assert checker.differences and lost(found) == []


def test_angles_that_change_with_every_token_cost_the_cache_and_a_note_says_so(tmp_path: Path) -> None:
    """Dynamic NTK beyond the model's own 64 positions: right at every length, without a cache."""
    model = compiled(DYNAMIC, tmp_path, max_position_embeddings=64)
    assert not model.runtime.paged
    lifted = lift(model.directory, max_context=CONTEXT)
    found = run_pipeline(lifted.graph, CompileOptions(quantization="none"), load=lifted.weights.load)
    assert [note for note in lost(found) if "no KV cache" in note and "--max-context 64 " in note]
    assert not any("later ones" in note for note in lifted.notes)
    for length in (1, 9, 63, 64, 65, 100):
        same(model.runtime.forward(IDS[:length]), model.original(IDS[:length]))
    with model.runtime.sequence() as sequence:
        for begin, end in ((0, 50), (50, 64), (64, 65), (65, 90)):
            same(model.runtime.step([(sequence, IDS[begin:end], "all")]), model.original(IDS[:end])[begin:])


def test_within_the_trained_length_dynamic_angles_are_one_set_and_cached(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path, rope_parameters=DYNAMIC, max_position_embeddings=64)
    lifted = lift(directory, max_context=64)
    found = run_pipeline(lifted.graph, CompileOptions(quantization="none"), load=lifted.weights.load)
    assert lost(found) == [] and any(value.name == "cache.0" for value in found.graph.inputs)
    assert not any(value.name == "lengths" for value in found.graph.inputs)


def test_a_manifest_with_regimes_out_of_order_is_refused(model: Model) -> None:
    for regimes in ([40, 32], [0], ["32"], [32, 32]):
        changed = {**model.manifest, "step": {**model.manifest["step"], "regimes": regimes}}  # type: ignore[dict-item]
        with pytest.raises(LlmcError, match="ascending"):
            parse(json.dumps(changed).encode())
