"""Every promised family, lifted and recognised: one paged attention a layer, rotations as llm.rope, the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attention_harness import run_sequence, run_steps
from tiny_models import PROMISED, VOCAB, make_tiny

from llmc.compiler import passes  # noqa: F401  (registers all passes)
from llmc.compiler.ir.llm import PagedAttention, Rope, RopeAngles
from llmc.compiler.ir.structural import Matmul, Softmax
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.manager import parse_pipeline, run_passes
from llmc.compiler.passes.probe import reading
from llmc.frontends.hf.lift import lift

PIPELINE = (
    "canonicalize,fold,cse,fuse-activation,fuse-norm,use-positions,fuse-rope,fuse-attention,fuse-linear,fuse-embed,"
    "canonicalize,fold,cse,flatten-tokens,canonicalize,fold,cse,fuse-linear,split-projections,canonicalize,insert-kv-cache,"
    "select-rows,canonicalize,fold,cse"
)
# Beyond the promise: a stored local mask, a table of sines, ALiBi built by another exporter.
FAMILIES = tuple(dict.fromkeys((*PROMISED, "gpt_neo", "codegen", "mpt")))
NO_ROTATION = ("gpt2", "gpt_neo", "opt", "falcon_alibi", "bloom", "mpt")
FROM_A_TABLE = ("gptj", "codegen")
LAYERS = 2
# The others are among the slow tests: test_end_to_end.py has their logits, through the artifact.
QUICK = ("qwen2", "qwen3", "mistral", "gpt_neox", "opt", "olmo2", "falcon")


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_family_is_recognised_and_means_the_same(family: str, tmp_path: Path) -> None:
    lifted = lift(make_tiny(family, tmp_path))
    with reading(lifted.load):
        after, reports = run_passes(lifted.graph, parse_pipeline(PIPELINE))
    refused = [r.refusals for r in reports if r.name in ("fuse-rope", "fuse-attention", "flatten-tokens")]
    assert refused == [[], [], []]
    kinds = [type(op) for op in after.ops]
    assert kinds.count(PagedAttention) == LAYERS and Softmax not in kinds and Matmul not in kinds
    assert kinds.count(Rope) == (0 if family in NO_ROTATION else 2 * LAYERS)
    assert kinds.count(RopeAngles) == (0 if family in (*NO_ROTATION, *FROM_A_TABLE) else 1)
    # Nothing but weights is of a rank above [T, heads, dim].
    assert [op for op in after.ops if op not in after.constants and isinstance(op.type, Tensor) and op.rank > 3] == []
    logits = after.output("logits")
    assert str(logits.shape[0]) == "R" and logits.shape[1] == VOCAB

    sequences = [np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate((37, 6))]
    found = run_steps(after, lifted.load, sequences, [[(0, 20), (1, 1)], [(1, 4), (0, 1)], [(0, 16), (1, 1)]])
    for own, logits in zip(sequences, found, strict=True):
        expected = run_sequence(lifted.graph, lifted.load, own)
        # Activations are recognised through constants printed with seven digits: 1e-9 of logits of about 1.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-8)
