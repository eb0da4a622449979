"""A lifted model computes what transformers computes, for every family that we know how to make."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hf_models import lifted_logits, lifted_tiny, load_reference, random_ids, reference_logits, tiny
from tiny_models import FAMILIES, PROMISED, make_tiny

from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.verify import verify
from llmc.errors import FrontendError
from llmc.frontends.hf.lift import lift

# Two f32 evaluations of logits of size about 3, whose products are summed in different orders.
TOLERANCE = 1e-4
# Shorter and longer than the windows of 3 and 5; one token; odd and even.
SIZES = (1, 2, 3, 5, 8, 17)
# Their own attention code, which does not go through transformers' interface.
WRITTEN_OUT = ("falcon", "falcon_alibi", "gptj", "bloom")

slow = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in PROMISED]


@pytest.mark.parametrize("family", [*PROMISED, *slow])
def test_logits_are_transformers(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny(family)
    started = time.perf_counter()
    lifted = lifted_tiny(family)
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(f" {family}: {seconds:.1f} s, {len(lifted.graph.ops)} ops", end="")
    verify(lifted.graph)
    model = load_reference(directory)
    for size in SIZES:
        ids = random_ids(lifted.vocab_size, size)
        difference = np.abs(lifted_logits(lifted, ids) - reference_logits(model, ids)).max()
        assert difference < TOLERANCE, f"{size} tokens: {difference}"
    # A wrong lift must not pass because all logits are alike.
    assert reference_logits(model, ids).std() > 0.1


@pytest.mark.parametrize("family", PROMISED)
def test_every_layer_is_captured_or_a_note_says_why(family: str) -> None:
    lifted = lifted_tiny(family)
    captured = [op for op in lifted.graph.ops if isinstance(op, Attention)]
    if family in WRITTEN_OUT:
        assert any("attention is not captured" in note for note in lifted.notes)
    else:
        assert len(captured) == lifted.layers
        assert not any("attention" in note for note in lifted.notes)


def test_windows_and_softcap_stand_on_the_captured_layers() -> None:
    def attentions(family: str) -> list[Attention]:
        return [op for op in lifted_tiny(family).graph.ops if isinstance(op, Attention)]

    assert [op.window for op in attentions("mistral")] == [5, 5]
    # Gemma 2 alternates, the first layer slides; its scores are capped at 50.
    assert [(op.window, op.softcap) for op in attentions("gemma2")] == [(5, 50.0), (0, 50.0)]
    assert all(op.causal for op in attentions("qwen2"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gptj"])
def test_positions_are_an_input(family: str) -> None:
    """Tokens need not start at position 0."""
    lifted, model = lifted_tiny(family), load_reference(tiny(family))
    ids = random_ids(lifted.vocab_size, 6)
    positions = np.arange(3, 9, dtype=np.int32)[None]
    shifted = lifted_logits(lifted, ids, positions)
    np.testing.assert_allclose(shifted, reference_logits(model, ids, positions), atol=TOLERANCE)


def test_a_tied_head_is_the_embedding() -> None:
    lifted = lifted_tiny("qwen2_tied")
    names = [param.name for param in lifted.graph.params]
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names
    assert lifted.parameters == sum(int(np.prod(lifted.weights.shape(name))) for name in names)


def test_the_graph_says_only_sizes_up_to_the_context() -> None:
    (symbol,) = lift(tiny("llama"), max_context=77).graph.symbols
    assert (symbol.name, symbol.low, symbol.high) == ("S", 2, 77)


@pytest.mark.parametrize(
    "settings",
    [{"use_bidirectional_attention": True}, {"use_bidirectional_attention": True, "is_causal": False}],
)
def test_a_causal_mask_that_the_layers_deny_is_refused(settings: dict[str, bool], tmp_path: Path) -> None:
    """transformers' default attention drops such a mask, its plain one obeys it."""
    directory = make_tiny("gemma", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    if settings.get("is_causal", True):
        with pytest.raises(FrontendError, match=r"the model's mask hides tokens ahead.* say is_causal: false"):
            lift(directory)
        return
    lifted, ids = lift(directory), random_ids(320, 9)
    difference = np.abs(lifted_logits(lifted, ids) - reference_logits(load_reference(directory), ids)).max()
    assert difference < TOLERANCE
