"""Whole models as torch exports them, with a free batch and free length, against onnxruntime at several sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from onnx_exports import quietly

from llmc.compiler.ir.evaluate import evaluate
from llmc.frontends.onnx import lift
from llmc.frontends.onnx.model import OnnxModel

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip


def deberta() -> torch.nn.Module:
    config = transformers.DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16
    )
    return transformers.DebertaV2Model(config)


def t5() -> torch.nn.Module:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    return transformers.T5EncoderModel(config)


def vit() -> torch.nn.Module:
    sizes = {key: value for key, value in TEXT.items() if key not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


def swin() -> torch.nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinModel(config)


def segformer() -> torch.nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def convnext() -> torch.nn.Module:
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]))


class Plain(torch.nn.Module):
    """A model as a function of tensors that gives its first output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None:
            return self.model(pixel_values=first)[0]
        return self.model(input_ids=first, attention_mask=mask)[0]


def export(model: torch.nn.Module, text: bool, dynamo: bool, path: Path) -> None:
    ids = torch.arange(3, 21).reshape(2, 9)
    arguments = (ids, torch.ones_like(ids)) if text else (torch.zeros(2, 3, 32, 32),)
    names = ["ids", "mask"] if text else ["pixels"]
    free = {0: "batch", 1: "length"} if text else {0: "batch"}
    options: dict[str, object] = {"dynamic_axes": dict.fromkeys(names, free), "opset_version": 17, "dynamo": False}
    if dynamo:
        shapes = [dict.fromkeys(free, torch.export.Dim.AUTO) for _ in names]
        options = {"dynamic_shapes": shapes, "opset_version": 20, "dynamo": True, "verbose": False}
    with quietly():
        torch.onnx.export(Plain(model.eval()), arguments, str(path), input_names=names, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "script"])
@pytest.mark.parametrize("make", [deberta, t5, vit, swin, segformer, convnext], ids=lambda make: make.__name__)
def test_whole_models_hold_for_every_size(make: Callable[[], torch.nn.Module], dynamo: bool, tmp_path: Path) -> None:
    if dynamo and make in (t5, swin, segformer):
        pytest.skip("torch.export does not get through this model")
    torch.manual_seed(0)
    text = make in (deberta, t5)
    path = tmp_path / "model.onnx"
    export(make(), text, dynamo, path)
    names = {dim for value in OnnxModel(path).inputs for dim in value.dims or () if isinstance(dim, str)}
    lifted = lift(path, max_dims=dict.fromkeys(names, 64))
    graph = lifted.graph
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    for batch, length in ((1, 2), (2, 9), (3, 31)):
        mask = np.ones((batch, length), np.int64)
        mask[0, 3:] = batch == 1  # a padded sequence, where there are others
        arrays = {"ids": generator.integers(3, 99, (batch, length)), "mask": mask}
        if not text:
            arrays = {"pixels": generator.standard_normal((batch, 3, 32, 32)).astype(np.float32)}
        (expected,) = session.run(None, arrays)
        found = evaluate(graph, {value.name: arrays[value.name] for value in graph.inputs}, lifted.weights.load)
        (result,) = (np.asarray(value) for value in found.values())
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
