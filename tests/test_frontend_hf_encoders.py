"""A lifted encoder computes what transformers computes, for every family and head that we know how to make."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import hf_models
import numpy as np
import pytest
import torch
import transformers
from tiny_encoders import ENCODERS, VOCAB, make_encoder

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.verify import verify
from llmc.frontends.hf import lift
from llmc.frontends.lifted import ENCODE, Lifted

Array = np.ndarray
# Two f32 evaluations of values of size about 1, whose products are summed in different orders.
TOLERANCE = 1e-5
# The shortest, odd ones, and beyond every window.
SIZES = (2, 7, 33, 129)


@cache
def directory_of(family: str, head: str = "") -> Path:
    return make_encoder(family, hf_models._root / f"encoder-{family}-{head}", head)


@cache
def lifted_encoder(family: str, head: str = "") -> Lifted:
    return lift(directory_of(family, head))


@cache
def reference(family: str, head: str = "") -> torch.nn.Module:
    auto = getattr(transformers, f"AutoModelFor{head}") if head else transformers.AutoModel
    model: torch.nn.Module = auto.from_pretrained(directory_of(family, head), dtype=torch.float32).eval()
    return model


def inputs_of(lifted: Lifted, size: int) -> dict[str, Array]:
    """A sequence of random ids, padding's own among them, of two texts where the model tells texts apart."""
    ids = np.random.default_rng(size).integers(0, VOCAB, (1, size)).astype(np.int32)
    ids[ids == lifted.config.get("pad_token_id")] = VOCAB - 1
    found = {"ids": ids, "positions": np.arange(size, dtype=np.int32)[None]}
    if any(value.name == "token_types" for value in lifted.graph.inputs):
        found["token_types"] = (np.arange(size, dtype=np.int32) > size // 2).astype(np.int32)[None]
    return found


def outputs_of(model: torch.nn.Module, inputs: dict[str, Array]) -> dict[str, Array]:
    """What transformers returns, by name."""
    arguments = {"ids": "input_ids", "token_types": "token_type_ids"}
    given = {arguments[name]: torch.from_numpy(value).long() for name, value in inputs.items() if name in arguments}
    with torch.no_grad():
        returned = model(**given)
    return {name: value.numpy() for name, value in returned.items() if isinstance(value, torch.Tensor)}


def check(family: str, head: str = "") -> None:
    lifted, model = lifted_encoder(family, head), reference(family, head)
    verify(lifted.graph)
    assert lifted.task == ENCODE
    for size in SIZES:
        inputs = inputs_of(lifted, size)
        expected = outputs_of(model, inputs)
        found = evaluate(lifted.graph, inputs, lifted.load)
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"{name}, {size}")
            assert value.std() > 0.1  # a wrong lift must not pass because all values are alike


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_outputs_are_transformers(family: str) -> None:
    check(family)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_attention_is_captured_and_sees_both_sides(family: str) -> None:
    lifted = lifted_encoder(family)
    captured = [op for op in lifted.graph.ops if isinstance(op, Attention)]
    assert len(captured) == lifted.layers
    assert not any(op.causal for op in captured)
    assert not any("attention" in note for note in lifted.notes)


def test_every_family_is_known() -> None:
    assert set(ENCODERS) >= {"bert", "distilbert"}
