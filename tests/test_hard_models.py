"""Hard models: whatever is drawn from the grammar, the artifact says what onnxruntime or torch says, or is refused.

Each is compared at 300 tokens, in pieces through the cache, and token by token; see `hard_models`. `pytest -rP` shows
how each was taken, `python -m hard_models` (in tests/) does the same for any seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hard_models.building import onnx_model
from hard_models.comparing import TOKENS, OnnxReference, gap, inputs_of, objection, pieces, settled
from hard_models.drawing import ONNX, TORCH, draw, style_of
from hard_models.parts import GRAMMAR, SLOTS
from hard_models.seeds import MANY, ONCE_WRONG
from hard_models.sweeps import PATIENCE, none_wrong, shards

QUICK = 60


def quick() -> list[int]:
    """Seeds that were wrong once, and the first others."""
    others = [seed for seed in range(MANY) if seed not in ONCE_WRONG]
    return sorted([*ONCE_WRONG, *others][:QUICK])


@pytest.mark.parametrize("seeds", shards(quick(), 15))
@pytest.mark.timeout(PATIENCE)
def test_no_model_is_silently_wrong(seeds: Sequence[int]) -> None:
    none_wrong(seeds)


def test_the_same_seed_is_the_same_model() -> None:
    for seed in (3, 4, 11):
        first, second = (onnx_model(settled(seed)).SerializeToString(deterministic=True) for _ in range(2))
        assert first == second


def test_models_have_every_part_and_most_are_tests_at_once() -> None:
    drawn = [draw(seed, style_of(seed)) for seed in range(MANY)]
    unusual = {(slot, spec.parts[slot].name) for spec in drawn for slot in spec.unusual}
    for slot in SLOTS:
        assert len({name for where, name in unusual if where == slot}) >= len(GRAMMAR[slot]) - 1, slot
    objections = [objection(spec) for spec in drawn[:24]]
    assert sum(map(bool, objections)) <= 5, objections


def test_a_part_that_is_lost_would_be_seen() -> None:
    """What `objection` promises: without an unusual part a model is another, far beyond the tolerance."""
    spec = next(spec for seed in range(50) if (spec := settled(seed)).unusual == ("mask",) and spec.kind == "decoder")
    ids = inputs_of(spec)
    found, expected = (OnnxReference(onnx_model(model))(ids) for model in (spec.without("mask"), spec))
    assert found is not None and expected is not None
    assert gap(found, expected) > 1e-3


def test_torch_modules_are_the_onnx_models() -> None:
    """Both are written from the same parts: what differs is one of the two ways of writing them."""
    from hard_models.torch_models import module_of

    for seed in range(7, 7 + 8 * 6, 8):
        spec = settled(seed)
        assert spec.style == TORCH
        ids = inputs_of(spec)
        found, expected = module_of(spec)(ids), OnnxReference(onnx_model(replace(spec, style=ONNX)))(ids)
        assert (found is None) == (expected is None), spec
        if found is not None and expected is not None:
            assert gap(found, expected) < 5e-6, spec


def test_pieces_are_awkward_and_end_token_by_token() -> None:
    for seed in range(20):
        assert sum(pieces(seed)) == TOKENS and pieces(seed)[-3:] == [1, 1, 1]
    assert {size for seed in range(20) for size in pieces(seed)} >= {1, 2, 7, 31, 32, 33, 64, 129}
