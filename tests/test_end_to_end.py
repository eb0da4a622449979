"""From a model directory to logits: what the compiled artifact says is what transformers says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_harness import CACHE
from tiny_models import FAMILIES, PROMISED, make_tiny

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.runtime.runtime import Runtime

PROMPT = np.random.default_rng(0).integers(2, 300, 45)
WITHOUT_CACHE = ("gpt_neo",)  # served whole sequences at a time


class Model:
    """A tiny model, its f32 artifact, and transformers' own answers."""

    def __init__(self, family: str, folder: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.family = family
        self.directory = make_tiny(family, folder / family)
        self.artifact = folder / f"{family}.so"
        options = CompileOptions(quantization="none", max_step=32, kernel_cache=CACHE)
        self.manifest = compile_model(str(self.directory), self.artifact, options)
        self.runtime = Runtime.load(self.artifact, threads=2)
        self.reference = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.reference(torch.from_numpy(ids)[None]).logits[0].numpy()

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        with torch.no_grad():
            out = self.reference.generate(
                torch.from_numpy(ids)[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=[],
                pad_token_id=0,
            )
        return [int(token) for token in out[0, len(ids) :]]


# The others are among the slow tests: test_passes_attention_models.py has how they are recognised, and what that means.
QUICK = ("llama", "gemma2", "phi3", "gpt2", "falcon_alibi", "gptj", "bloom")


@pytest.fixture(
    scope="module",
    params=[family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in PROMISED],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp("end_to_end"))


def test_logits_equal_the_original(model: Model) -> None:
    expected = model.logits(PROMPT)
    # f32 against f32, summed in other orders: about 1e-5 for logits of a few units.
    np.testing.assert_allclose(model.runtime.forward(PROMPT), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.2, "logits that hardly differ would prove nothing"


def test_any_split_of_the_prompt_gives_the_same_logits(model: Model) -> None:
    whole = model.runtime.forward(PROMPT)
    for cuts in ((1,), (31, 33), (16, 17, 18, 44), tuple(range(1, len(PROMPT)))):
        sequence = model.runtime.sequence()
        rows = [model.runtime.step([(sequence, part, "all")]) for part in np.split(PROMPT, cuts) if len(part)]
        np.testing.assert_allclose(np.concatenate(rows), whole, rtol=0, atol=1e-4)


def test_64_greedy_tokens_are_the_same(model: Model) -> None:
    sequence = model.runtime.sequence()
    start = PROMPT[:9]
    tokens: list[int] = []
    row = model.runtime.step([(sequence, start, "last")])
    for _ in range(64):
        tokens.append(int(row[0].argmax()))
        row = model.runtime.step([(sequence, np.array(tokens[-1:]), "last")])
    expected = model.greedy(start, 64)
    assert tokens == expected
    assert len(set(expected)) > 3, "a constant continuation would prove nothing"


def test_sequences_of_one_step_do_not_see_each_other(model: Model) -> None:
    alone = [model.runtime.forward(PROMPT[start:stop]) for start, stop in ((0, 7), (7, 8), (8, 20))]
    sequences = [model.runtime.sequence() for _ in alone]
    parts = [PROMPT[0:7], PROMPT[7:8], PROMPT[8:20]]
    together = model.runtime.step([(s, p, "all") for s, p in zip(sequences, parts, strict=True)])
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-4)


def test_attention_is_recognised(model: Model) -> None:
    step = model.manifest["step"]
    assert isinstance(step, dict)
    assert step["state"] == "paged"
    kv = model.manifest["kv"]
    assert isinstance(kv, dict)
    assert len(kv["layers"]) == model.reference.config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PROMISED)))
def test_other_families(family: str, tmp_path: Path) -> None:
    model = Model(family, tmp_path)
    np.testing.assert_allclose(model.runtime.forward(PROMPT), model.logits(PROMPT), rtol=0, atol=1e-4)


def test_what_is_not_recognised_still_runs(tmp_path: Path) -> None:
    model = Model(WITHOUT_CACHE[0], tmp_path)
    np.testing.assert_allclose(model.runtime.forward(PROMPT), model.logits(PROMPT), rtol=0, atol=1e-4)
    sequence = model.runtime.sequence()
    rows = [model.runtime.step([(sequence, part, "last")]) for part in np.split(PROMPT, (20, 21))]
    np.testing.assert_allclose(rows[-1], model.logits(PROMPT)[-1:], rtol=0, atol=1e-4)
