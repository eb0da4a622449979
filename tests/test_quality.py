"""What each precision costs on real text: perplexity of the example model against transformers in f32.

The limits are the project's promises, in percent of perplexity on the first 48 windows of the held-out text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import llmc
from llmc.cli.reference import transformers_reference
from llmc.runtime.perplexity import Quality, evaluate, windows_of
from llmc.runtime.runtime import Runtime

EXAMPLE = Path(__file__).parent.parent / "examples" / "pycoder"
WINDOWS = 48

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("quality")

    def compiled(dtype: str) -> Path:
        path = folder / f"{dtype}.so"
        if not path.exists():
            llmc.compile(EXAMPLE, path, dtype=dtype)
        return path

    return compiled


def quality(path: Path, with_reference: bool = False) -> Quality:
    runtime = Runtime.load(path)
    windows = windows_of(runtime, (EXAMPLE / "heldout.txt").read_text(encoding="utf-8"), 512, WINDOWS)
    return evaluate(runtime, windows, transformers_reference(EXAMPLE) if with_reference else None)


def test_f32_is_transformers(artifact: Callable[[str], Path]) -> None:
    found = quality(artifact("none"), with_reference=True)
    assert found.reference_perplexity is not None
    assert found.reference_perplexity == pytest.approx(16.52, abs=0.005)  # what the model's README says
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-4)
    assert found.mean_kl_divergence == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement is not None
    assert found.top1_agreement > 0.999  # ties in f32 may fall either way


@pytest.mark.parametrize(
    ("dtype", "base", "percent"),
    [("bf16", "none", 0.1), ("f16", "none", 0.1), ("int8", "bf16", 0.25), ("int4", "bf16", 1.0)],
)
def test_what_a_precision_costs(dtype: str, base: str, percent: float, artifact: Callable[[str], Path]) -> None:
    change = quality(artifact(dtype)).perplexity / quality(artifact(base)).perplexity - 1
    assert abs(change) <= percent / 100


def test_int4_is_small(artifact: Callable[[str], Path]) -> None:
    assert Runtime.load(artifact("int4")).manifest.model.bits_per_weight <= 4.9
