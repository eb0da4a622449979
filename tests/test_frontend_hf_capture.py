"""Attention captured through transformers' interfaces: one op that means what the model's own attention means."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_frontend_hf_aten import causal, floats
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.hf import graph  # noqa: F401  (registers the handlers)
from llmc.frontends.hf.aten import Translation
from llmc.frontends.hf.capture import IMPLEMENTATION, Refused, meaning_of
from llmc.frontends.hf.export import quietly
from llmc.frontends.hf.trace import _why_not_captured

TOKENS = 12
Q, K, V, SINKS = floats(1, 6, TOKENS, 8), floats(1, 2, TOKENS, 8, seed=1), floats(1, 2, TOKENS, 8, seed=2), floats(6)


class Layer(torch.nn.Module):
    """A layer that calls the attention interface. is_causal: the layer's own, if it has one."""

    def __init__(self, options: dict[str, object], mask: Callable[..., torch.Tensor] | None, **own: object) -> None:
        super().__init__()
        self.options, self.mask = options, mask
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        mask = None
        if self.mask is not None:
            mask = AttentionMaskInterface()[IMPLEMENTATION](1, TOKENS, TOKENS, mask_function=self.mask)
        options = {**self.options, "s_aux": sinks} if self.options.get("s_aux") else self.options
        return AttentionInterface()[IMPLEMENTATION](self, q, k, v, mask, **options)[0]


def exported(layer: Layer) -> torch.export.ExportedProgram:
    with quietly():
        return torch.export.export(layer, (Q, K, V, SINKS), strict=False)


def captured(layer: Layer) -> np.ndarray:
    tensors, program = (Q, K, V, SINKS), exported(layer)
    holes = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = tuple(Input(f"x{i}", Tensor(tuple(x.shape), "f32")) for i, x in enumerate(tensors))
    (value,) = Translation({}).run(program.graph_module, dict(zip(holes, inputs, strict=True)))
    data = {f"x{i}": x.numpy() for i, x in enumerate(tensors)}
    return np.asarray(evaluate(Graph("op", inputs, (("y", value),)), data, lambda name: np.zeros(0))["y"])


def plain(scale: float, seen: torch.Tensor, softcap: float = 0.0, sinks: bool = False) -> torch.Tensor:
    """Attention written out. [1, tokens, heads, size]"""
    k, v = K.repeat_interleave(3, 1), V.repeat_interleave(3, 1)
    scores = Q @ k.mT * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks:  # a key without a value
        scores = torch.cat([scores, SINKS[None, :, None, None].expand(1, 6, TOKENS, 1)], -1)
    return (scores.softmax(-1)[..., :TOKENS] @ v).transpose(1, 2)


DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None, :]
PAST, ALL, WINDOW = DISTANCE >= 0, DISTANCE > -99, (DISTANCE >= 0) & (DISTANCE < 3)


def window_of_3(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (key <= query) & (key > query - 3)


def everywhere(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(query + key, dtype=torch.bool)


CASES: dict[str, tuple[Layer, torch.Tensor]] = {
    "nothing said": (Layer({}, None), plain(8**-0.5, PAST)),
    "a scale": (Layer({"scaling": 0.25}, None), plain(0.25, PAST)),
    "a layer that is not causal": (Layer({}, None, is_causal=False), plain(8**-0.5, ALL)),
    "a layer that is causal": (Layer({"is_causal": None}, None, is_causal=True), plain(8**-0.5, PAST)),
    "a call that is not causal": (Layer({"is_causal": False}, None, is_causal=True), plain(8**-0.5, ALL)),
    "a window": (Layer({"sliding_window": 3}, None), plain(8**-0.5, WINDOW)),
    "a cap": (Layer({"softcap": 0.5, "scaling": 2.0}, None), plain(2.0, PAST, softcap=0.5)),
    "sinks": (Layer({"s_aux": True}, None), plain(8**-0.5, PAST, sinks=True)),
    "a mask with a window": (Layer({}, window_of_3), plain(8**-0.5, WINDOW)),
    "a mask decides, not the window": (Layer({"sliding_window": 2}, causal), plain(8**-0.5, PAST)),
    "a mask decides, not the layer": (Layer({}, everywhere, is_causal=True), plain(8**-0.5, ALL)),
    "what attention has no use for": (
        Layer({"position_ids": torch.arange(3), "dropout": 0.0}, None),
        plain(8**-0.5, PAST),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_captured_attention_is_the_one_written_out(case: str) -> None:
    layer, want = CASES[case]
    np.testing.assert_allclose(captured(layer), want.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_bias": torch.zeros(12, 12)}, "a tensor argument 'position_bias'"),
        ({"scaling": torch.tensor(0.5)}, "scale or window is computed"),
        ({"sliding_window": torch.tensor(4)}, "scale or window is computed"),
        ({"softcap": 0.0}, "capped at 0"),
    ],
)
def test_an_attention_that_the_op_cannot_express_is_not_captured(options: dict[str, object], message: str) -> None:
    with pytest.raises(Refused, match=message):
        AttentionInterface()[IMPLEMENTATION](Layer({}, None), Q, K, V, None, **options)


def test_a_window_to_both_sides_that_no_mask_states_is_refused() -> None:
    with pytest.raises(FrontendError, match="a window without causality"):
        captured(Layer({"sliding_window": 3, "is_causal": False}, None))


def test_a_captured_mask_has_the_shape_of_transformers_masks() -> None:
    mask = AttentionMaskInterface()[IMPLEMENTATION](1, 3, 5)
    assert mask.shape == (1, 1, 3, 5) and mask.dtype == torch.bool


def test_a_layer_with_a_mask_that_has_no_meaning_is_not_captured() -> None:
    def chunks(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query // 4 == key // 4

    def itself(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query == key

    for known in (window_of_3, itself):
        assert _why_not_captured(exported(Layer({}, known)), 1) == ""
    assert "none of those that are known" in _why_not_captured(exported(Layer({}, chunks)), 1)


# What a mask means.


def test_a_window_beyond_every_context_is_none() -> None:
    furthest = 1 << 24
    for window in (furthest - 1, furthest, furthest + 1, furthest + 5):
        meaning = meaning_of(lambda b, h, q, k, w=window: causal(b, h, q, k) & (k > q - w))
        assert meaning == (True, window if window <= furthest else 0)


def test_positions_that_there_are_not_do_not_matter() -> None:
    assert meaning_of(lambda b, h, q, k: causal(b, h, q, k) & (k >= 0)) == (True, 0)


def differs_at(query: int, key: int, window: int) -> Callable[..., torch.Tensor]:
    """A causal mask, perhaps with a window, but for one place."""

    def mask(b: object, h: object, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = causal(b, h, q, k) & (k > q - window) if window else causal(b, h, q, k)
        return seen ^ ((q == query) & (k == key))

    return mask


@pytest.mark.parametrize("window", [0, 100])
def test_a_mask_that_differs_at_one_place_is_another(window: int) -> None:
    """Models change masks near powers of two and near a window's multiples (chunks): each such place is looked at."""
    corners = [0, 2, *(1 << i for i in range(3, 24)), *(window * i for i in (1, 2, 3))]
    for corner in corners:
        for query, key in ((corner + 1, corner), (corner - 3, corner - 4), (corner + 19, corner + 18)):
            if key < 0:
                continue
            with pytest.raises(Refused):
                meaning_of(differs_at(query, key, window))
