"""Rotary frequencies of every scaling that transformers has, at every length of a sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hf_models import lifted_logits, load_reference, random_ids, reference_logits
from tiny_models import make_tiny

from llmc.frontends.hf.lift import lift

TOLERANCE = 1e-4  # two f32 evaluations of logits of size about 3
PAIRS = 8  # heads of 16 channels
TRAINED = 64  # the length before scaling; the models' own limit is 128
SCALINGS: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "longrope": {
        "short_factor": [1 + 0.1 * i for i in range(PAIRS)],
        "long_factor": [2 + 0.5 * i for i in range(PAIRS)],
        "original_max_position_embeddings": TRAINED,
        "factor": 2.0,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def scaled_model(kind: str, directory: Path) -> Path:
    return make_tiny("llama", directory, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **SCALINGS[kind]})


def test_no_scaling_of_transformers_is_left_out() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) | {"default"} == set(SCALINGS)


@pytest.mark.parametrize("kind", SCALINGS)
def test_logits_are_transformers(kind: str, tmp_path: Path) -> None:
    """Within the trained length, right after it, at the model's limit, and beyond all of these; in any context."""
    directory = scaled_model(kind, tmp_path)
    for context, sizes in ((TRAINED, (33, TRAINED)), (200, (9, TRAINED, TRAINED + 1, 100, 128, 129, 200))):
        lifted = lift(directory, max_context=context)
        for size in sizes:
            ids = random_ids(lifted.vocab_size, size)
            # transformers keeps the frequencies of the longest sequence so far: each length wants a fresh model.
            want = reference_logits(load_reference(directory), ids)
            what = f"context {context}, {size} tokens"
            np.testing.assert_allclose(lifted_logits(lifted, ids), want, atol=TOLERANCE, err_msg=what)


@pytest.mark.parametrize(("kind", "last"), [("longrope", TRAINED), ("dynamic", 128)])
def test_the_context_changes_nothing_for_short_sequences(kind: str, last: int, tmp_path: Path) -> None:
    directory = scaled_model(kind, tmp_path)
    ids = random_ids(320, last + 1)
    short, long = (lift(directory, max_context=context) for context in (last, last + 1))
    within = lifted_logits(long, ids[:, :20])
    np.testing.assert_array_equal(lifted_logits(short, ids[:, :20]), within)
    grown = lifted_logits(long, ids)[:, :20]
    assert np.abs(grown - within).max() > (1e-2 if kind == "longrope" else 1e-5)


def test_each_layer_type_may_change_its_own_frequencies(tmp_path: Path) -> None:
    """One kind of layers turns by other factors in long sequences, the other by one set in all."""
    factors = {"short_factor": [1 + 0.1 * i for i in range(16)], "long_factor": [2 + 0.5 * i for i in range(16)]}
    longrope = {"rope_type": "longrope", "rope_theta": 1e6, **SCALINGS["longrope"], **factors}
    parameters = {"full_attention": longrope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    directory = make_tiny("gemma3_text", tmp_path, rope_parameters=parameters)
    lifted = lift(directory)
    for size in (12, TRAINED, TRAINED + 1, 100):
        ids = random_ids(lifted.vocab_size, size)
        want = reference_logits(load_reference(directory), ids)
        np.testing.assert_allclose(lifted_logits(lifted, ids), want, atol=TOLERANCE, err_msg=f"{size} tokens")


def test_each_layer_type_has_its_own_frequencies(tmp_path: Path) -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    directory = make_tiny("gemma3_text", tmp_path, rope_parameters=parameters)
    lifted = lift(directory)
    ids = random_ids(lifted.vocab_size, 12)
    want = reference_logits(load_reference(directory), ids)
    np.testing.assert_allclose(lifted_logits(lifted, ids), want, atol=TOLERANCE)
