"""Encoders as ONNX files, as users export them: compiled, each sequence of a mixture equals the model alone.

The models pool and normalise as sentence-transformers does, with an attention mask, so that exports hold what users'
exports hold: masks, padding that is counted, sizes as values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from onnx_exports import quietly
from program_harness import CompiledGraph
from small_encoder import step_inputs
from tiny_encoders import VOCAB, make_encoder

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.compiler.step_sizes import ENCODE
from llmc.frontends import lift
from llmc.targets import machine_named

LENGTHS = (1, 7, 31, 33, 129)
TYPED = ("bert",)


class Sentences(torch.nn.Module):
    """Hidden states, and their mean over the mask with length 1."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *types: torch.Tensor) -> object:
        extra = {"token_type_ids": types[0]} if types else {}
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra).last_hidden_state
        mask = attention_mask.unsqueeze(-1).expand(hidden.size()).float()
        mean = torch.sum(hidden * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)
        return hidden, torch.nn.functional.normalize(mean, p=2, dim=1)


def export(family: str, dynamo: bool, folder: Path) -> tuple[Path, Sentences]:
    """model.onnx beside config.json, and the model."""
    make_encoder(family, folder)
    with quietly():
        kind = "eager" if family == "mpnet" or not dynamo else "sdpa"
        model = Sentences(transformers.AutoModel.from_pretrained(folder, attn_implementation=kind)).eval()
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if family in TYPED else [])]
        tokens = torch.arange(18).reshape(2, 9) + 5
        arguments = (tokens, torch.ones_like(tokens), *([torch.zeros_like(tokens)] if family in TYPED else []))
        shapes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=150)}
        sizes = (
            {"dynamic_shapes": (shapes, shapes, *([(shapes,)] if family in TYPED else []))} if dynamo
            else {"dynamic_axes": {name: {0: "batch", 1: "sequence"} for name in names}, "opset_version": 17}
        )  # fmt: skip
        outputs = ["last_hidden_state", "sentence_embedding"]
        torch.onnx.export(
            model, arguments, str(folder / "model.onnx"), dynamo=dynamo, verbose=False, input_names=names,
            output_names=outputs, **sizes,
        )  # fmt: skip
    return folder / "model.onnx", model


CASES = [
    ("roberta", False),
    ("mpnet", True),
    pytest.param("bert", False, marks=pytest.mark.slow),
    pytest.param("modernbert", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "dynamo"), CASES)
def test_an_exported_encoder_is_each_sequence_alone(family: str, dynamo: bool, tmp_path: Path) -> None:
    path, model = export(family, dynamo, tmp_path / family)
    lifted = lift(str(path))
    assert lifted.task == ENCODE
    compiled = run_pipeline(lifted.graph, CompileOptions(quantization="none"), load=lifted.weights.load, task=ENCODE)
    graph = compiled.graph
    assert "cache.0" in {value.name for value in graph.inputs}, [r.refusals for r in compiled.reports if r.refusals]
    params = {param.name: lifted.weights.load(param.name) for param in graph.params}
    program = CompiledGraph(graph, machine_named("native"), params, largest=256, task="encode")
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(3, VOCAB, n).tolist(), [0] * n) for n in LENGTHS]
    found = program.run_arrays(step_inputs(graph, sequences))
    starts = np.cumsum([0, *LENGTHS])
    for index, (ids, types) in enumerate(sequences):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            given = (tokens, torch.ones_like(tokens), *([torch.tensor([types])] if family in TYPED else []))
            hidden, sentence = (tensor[0].numpy() for tensor in model(*given))
        rows = found["last_hidden_state"][starts[index] : starts[index + 1]]
        # f32 twice, in other orders of summation: a few units in the last of 24 places, through three layers.
        np.testing.assert_allclose(rows, hidden, rtol=0, atol=2e-5 * np.abs(hidden).max())
        np.testing.assert_allclose(found["sentence_embedding"][index], sentence, rtol=0, atol=2e-6)
