"""Exported decoders: whatever the exporter wrote, the same step as of the original, and onnxruntime's logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from kernel_harness import CACHE
from onnx_exports import CACHED, STYLES, export
from tiny_models import VOCAB

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.types import Tensor
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.manager import Report
from llmc.compiler.pipeline import compile_model, run_pipeline
from llmc.frontends import Lifted, lift
from llmc.runtime.runtime import Runtime

FAMILIES = ("llama", "qwen2", "gpt2", "phi3")
QUICK = [("llama", "optimum"), ("qwen2", "script"), ("gpt2", "optimum"), ("phi3", "optimum")]
# torch.export takes half a minute for each.
SLOW = [(family, style) for family in FAMILIES for style in STYLES if (family, style) not in QUICK]
CASES = [
    pytest.param(case, id="-".join(case), marks=[pytest.mark.slow] if case in SLOW else []) for case in (*QUICK, *SLOW)
]
# Passes whose finds do not depend on how the exporter spelled things. Activations, attention and layer norms come fused
# from some sources already: what they become is counted as operations.
FOUND = ("fuse-rope", "fuse-embed", "insert-kv-cache", "merge-projections", "fuse-epilogues")
OPTIONS = CompileOptions(quantization="none", max_step=32, kernel_cache=CACHE)
PROMPT = np.random.default_rng(5).integers(3, VOCAB, 31)


@dataclass(frozen=True)
class Exported:
    """An exported model beside its original, and onnxruntime's opinion."""

    path: Path
    style: str
    session: onnxruntime.InferenceSession
    lifted: Lifted
    original: Lifted

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """onnxruntime's, of a text at once, f32[tokens, vocab]."""
        given: dict[str, np.ndarray] = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past"):
                given[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            else:
                row = {"input_ids": ids, "position_ids": np.arange(len(ids))}.get(value.name, np.ones_like(ids))
                given[value.name] = row[None].astype(np.int64)
        found = self.session.run(None, given)[0]
        assert isinstance(found, np.ndarray)
        return found[0]


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    family, style = request.param
    path = export(family, style, tmp_path_factory.mktemp(f"{family}-{style}"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    yield Exported(path, style, session, lift(path), lift(path.parent))


def _hits(reports: list[Report]) -> dict[str, Counter[str]]:
    """What the passes in FOUND found, by pass; and the linear ops."""
    found: dict[str, Counter[str]] = {}
    for report in reports:
        name = report.name.split("{")[0]
        if name in FOUND:
            found.setdefault(name, Counter()).update(report.hits)
        if name == "fuse-linear":
            found.setdefault(name, Counter()).update(linear=report.hits.get("linear", 0))
    return found


def test_it_is_lifted_as_the_original_is(exported: Exported) -> None:
    lifted, original = exported.lifted, exported.original
    assert lifted.task == original.task == "generate"
    assert [value.name for value in lifted.graph.inputs] == ["ids", "positions"]
    facts = ("vocab_size", "layers", "max_positions", "max_context", "architecture")
    assert {name: getattr(lifted, name) for name in facts} == {name: getattr(original, name) for name in facts}
    # Norms' weights and biases are constants in the graph; tied weights may be written twice.
    assert 0.95 * original.parameters < lifted.parameters < 1.2 * original.parameters
    assert lifted.text.facts == original.text.facts and lifted.text.files == original.text.files


def test_one_sequence_means_the_same(exported: Exported) -> None:
    given = {"ids": PROMPT[None].astype(np.int32), "positions": np.arange(len(PROMPT), dtype=np.int32)[None]}
    found = evaluate(exported.lifted.graph, given, exported.lifted.load)["logits"]
    np.testing.assert_allclose(np.asarray(found)[0], exported.logits(PROMPT), rtol=0, atol=1e-4)


def test_the_passes_find_what_they_find_in_the_original(exported: Exported) -> None:
    """The same fusions in the same number, and the same operations after them."""
    both = [run_pipeline(lifted.graph, OPTIONS, load=lifted.load) for lifted in (exported.lifted, exported.original)]
    ours, theirs = (_hits(compiled.reports) for compiled in both)
    assert ours == theirs
    refused = [r.refusals for r in both[0].reports if r.name.split("{")[0] in ("fuse-attention", "flatten-tokens")]
    assert refused == [[], []]
    ops, original_ops = (
        Counter(op.name for op in compiled.graph.ops if op not in compiled.graph.constants) for compiled in both
    )
    assert ops == original_ops
    assert ops["llm.paged_attention"] == ops["llm.kv_append"] == exported.original.layers
    graph = both[0].graph
    ranks = [op.rank for op in graph.ops if op not in graph.constants and isinstance(op.type, Tensor)]
    assert max(ranks) <= 3


def test_the_artifact_s_logits_are_onnxruntime_s(exported: Exported, tmp_path: Path) -> None:
    """Whole prompts, prompts in pieces, and a greedy continuation with the cache."""
    compile_model(str(exported.path), tmp_path / "model.so", OPTIONS)
    runtime = Runtime.load(tmp_path / "model.so", threads=2)
    for length in (1, 7, 31):
        want = exported.logits(PROMPT[:length])
        np.testing.assert_allclose(runtime.forward(PROMPT[:length]), want, rtol=0, atol=1e-4)
    sequence = runtime.sequence()
    pieces = [runtime.step([(sequence, piece, "all")]) for piece in np.split(PROMPT, (1, 5, 20))]
    np.testing.assert_allclose(np.concatenate(pieces), exported.logits(PROMPT), rtol=0, atol=1e-4)
    own = [int(pieces[-1][-1].argmax())]
    theirs = list(PROMPT)
    for _ in range(8):
        theirs.append(int(exported.logits(np.array(theirs))[-1].argmax()))
        assert own[-1] == theirs[-1]
        own.append(int(runtime.step([(sequence, np.array(own[-1:]), "last")])[-1].argmax()))


def test_a_cache_is_taken_out_whole(exported: Exported) -> None:
    """Neither keys and values of earlier steps nor those for later ones are left in the graph."""
    assert [name for name, _ in exported.lifted.graph.outputs] == ["logits"]
    has_past = any(value.name.startswith("past") for value in exported.session.get_inputs())
    assert has_past == (exported.style in CACHED)
