"""Settings of generation do what they do in transformers: each processor's logits, each filter's tokens, whole texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_models import tiny
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kernel_harness import CACHE
from test_sampling import choose, chooser
from transformers import AutoModelForCausalLM, GenerationConfig

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.runtime.errors import RuntimeStateError
from llmc.runtime.generation import Limits, make_sampler
from llmc.runtime.runtime import Runtime
from llmc.runtime.settings import GenerationSettings

VOCAB = 23
ENDS = (3, 7)

ids = st.integers(0, VOCAB - 1)
id_lists = st.lists(ids, max_size=4)
sequences = st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=6)
RULES: dict[str, st.SearchStrategy[object]] = {
    "sequence_bias": st.lists(
        st.tuples(st.lists(ids, min_size=1, max_size=3), st.sampled_from([-7.5, 0.25, 3.0])).map(list),
        min_size=1,
        max_size=6,
    ),
    "encoder_repetition_penalty": st.sampled_from([0.7, 1.3]),
    "repetition_penalty": st.sampled_from([0.8, 1.2]),
    "no_repeat_ngram_size": st.integers(0, 4),
    "encoder_no_repeat_ngram_size": st.integers(0, 4),
    "bad_words_ids": sequences.filter(lambda found: any(item not in ([3], [7]) for item in found)),
    "min_length": st.integers(0, 12),
    "min_new_tokens": st.integers(0, 6),
    "forced_bos_token_id": ids,
    "forced_eos_token_id": ids | st.lists(ids, min_size=1, max_size=2),
    "remove_invalid_values": st.booleans(),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.sampled_from([0.9, 1.05, 2.0])).map(list),
    "suppress_tokens": id_lists,
    "begin_suppress_tokens": id_lists,
}
FILTERS: dict[str, st.SearchStrategy[object]] = {
    "temperature": st.sampled_from([0.3, 1.0, 1.7]),
    "top_h": st.sampled_from([0.2, 0.63, 1.0]),
    "top_k": st.integers(2, 30),
    "top_p": st.sampled_from([0.31, 0.87]),
    "min_p": st.sampled_from([0.013, 0.21]),
    "typical_p": st.sampled_from([0.17, 0.53, 0.91]),
    "epsilon_cutoff": st.sampled_from([0.0031, 0.047, 0.31]),
    "eta_cutoff": st.sampled_from([0.0029, 0.051, 0.41]),
}


def some_of(strategies: dict[str, st.SearchStrategy[object]]) -> st.SearchStrategy[dict[str, Any]]:
    """Values of some of the settings."""
    return st.fixed_dictionaries({}, optional=strategies)


@cache
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()


def theirs(given: dict[str, Any], prompt: list[int], text: list[int], logits: np.ndarray, most: int) -> np.ndarray:
    """float32 [vocab]: the scores that transformers' own processors make of logits; built as its `generate` does."""
    config = GenerationConfig(eos_token_id=list(ENDS), max_new_tokens=most, **given)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    start = torch.tensor([prompt])
    # What `generate` does with lengths before it builds the processors.
    config.max_length = most + len(prompt)
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + len(prompt)
    config._eos_token_tensor = torch.tensor(ENDS)
    processors = reference()._get_logits_processor(config, len(prompt), encoder_input_ids=start, device="cpu")
    return processors(torch.tensor([prompt + text]), torch.from_numpy(logits.copy())[None])[0].numpy()


def ours(given: dict[str, Any], prompt: list[int], text: list[int], logits: np.ndarray, most: int) -> np.ndarray:
    """float32 [vocab]: tokens' weights, 0 for those that are ruled out."""
    settings = GenerationSettings().changed({"temperature": 1.0} | given)
    place = chooser(VOCAB)
    sampler = make_sampler(settings, 0, Limits(most, (), frozenset(ENDS)), place, prompt)
    sampler.observe(text)
    choose(logits, sampler)
    return place.weights.copy()


@given(
    some_of(RULES),
    some_of(FILTERS),
    st.lists(ids, min_size=1, max_size=9),
    st.lists(ids, max_size=7),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@hypothesis_settings(max_examples=300, deadline=None, report_multiple_bugs=False)
def test_what_is_left_to_draw_from_is_what_transformers_leaves(
    rules: dict[str, Any], filters: dict[str, Any], prompt: list[int], text: list[int], seed: int, last: bool
) -> None:
    """Any mixture of settings, over distinct logits: the same tokens, in the same proportions."""
    logits = (np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32)
    most = len(text) + (1 if last else 5)
    forced = rules.get("forced_eos_token_id")
    banned = set(rules.get("suppress_tokens", ()))
    forced_sets = [{forced} if isinstance(forced, int) else set(forced or ()), {rules.get("forced_bos_token_id")}]
    if any(one and one <= banned for one in forced_sets):
        rules.pop("suppress_tokens")  # transformers refuses these together
    scores = theirs({"do_sample": True, "top_k": 0} | rules | filters, prompt, text, logits, most)
    before = logits.copy()
    if not np.isfinite(scores.max()):  # its own draw fails
        said = "no token is left" if (scores == -np.inf).all() else "infinite"
        with pytest.raises(RuntimeStateError, match=said):
            ours(rules | filters, prompt, text, logits, most)
        return
    found = ours(rules | filters, prompt, text, logits, most)
    assert (logits == before).all()
    expected = np.exp((scores - scores.max()).astype(np.float64))
    expected[expected < 1e-37] = 0  # below what f32 weights hold
    # Of tokens that are forced together, and so are equal, a filter may keep either.
    assert np.count_nonzero(found) == np.count_nonzero(expected)
    if isinstance(forced, int) or not forced:
        np.testing.assert_allclose(found / found.max(), expected, rtol=1e-4)
    else:
        np.testing.assert_allclose(np.sort(found / found.max()), np.sort(expected), rtol=1e-4)
