"""A model that ONNX Runtime has fused or quantized compiles to the very ops that the model as exported does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx_exports import quietly

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline, settled
from llmc.frontends import lift

IDS = np.random.default_rng(0).integers(0, 120, (1, 13))
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Encoder(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> object:
        given = dict(zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True))
        return self.model(**given).last_hidden_state


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, as the older exporter of torch writes it."""
    path = tmp_path_factory.mktemp("bert") / "exported.onnx"
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=200,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)  # no zeros or ones, which fusions might drop
    ids = torch.zeros(2, 9, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "sequence"} for name in (*INPUTS, "last_hidden_state")}
    with quietly(), torch.no_grad():
        torch.onnx.export(
            Encoder(model), (ids, ids + 1, ids), path, dynamo=False, opset_version=17, input_names=list(INPUTS),
            output_names=["last_hidden_state"], dynamic_axes=axes,
        )  # fmt: skip
    return path


def fused(source: Path, multi_head: bool) -> Path:
    """By the optimiser of onnxruntime.transformers."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    options.use_multi_head_attention = multi_head
    target = source.with_name(f"fused-{multi_head}.onnx")
    with quietly():
        model = optimizer.optimize_model(
            str(source), "bert", num_heads=4, hidden_size=128, opt_level=0, optimization_options=options
        )
        model.save_model_to_file(str(target))
    return target


def by_session(source: Path) -> Path:
    """By a session of ONNX Runtime, as it writes the graph that it would run."""
    target = source.with_name(f"session-{source.name}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return target


def dynamically_quantized(source: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    target = source.with_name(f"dynamic-{source.name}")
    with quietly():
        quantize_dynamic(source, target)
    return target


def final_ops(path: Path) -> tuple[Counter[str], set[str]]:
    """The ops of a step by name, and the encodings of its linear weights."""
    lifted = settled(lift(str(path)))
    assert lifted.task == "encode"
    options = CompileOptions(quantization="int8")
    graph = run_pipeline(lifted.graph, options, load=lifted.load, task=lifted.task).graph
    ops = [op for op in graph.ops if op not in graph.constants]
    encodings = {str(op.w.tensor.encoding) for op in ops if op.name == "llm.linear"}  # type: ignore[attr-defined]
    return Counter(op.name for op in ops if op.name != "t.cast"), encodings


def error_of(path: Path) -> float:
    """The largest difference from ONNX Runtime, of the translation, as a part of the largest number."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = dict(zip(INPUTS, (IDS, np.ones_like(IDS), np.zeros_like(IDS)), strict=True))
    kinds = {value.name: np.int32 if "int32" in value.type else np.int64 for value in session.get_inputs()}
    want = session.run(None, {name: arrays[name].astype(kind) for name, kind in kinds.items()})[0]
    lifted = settled(lift(str(path)))
    given = {"ids": IDS, "positions": np.arange(IDS.size)[None], "token_types": np.zeros_like(IDS)}
    found = evaluate(lifted.graph, {name: array.astype(np.int32) for name, array in given.items()}, lifted.load)
    hidden = np.asarray(found["last_hidden_state"])
    return float(np.abs(hidden.reshape(want.shape) - want).max() / np.abs(want).max())


@pytest.mark.parametrize(
    ("change", "operations"),
    [
        (lambda path: fused(path, False), {"Attention", "EmbedLayerNormalization", "SkipLayerNormalization"}),
        (lambda path: fused(path, True), {"MultiHeadAttention", "BiasGelu"}),
        (by_session, {"FusedMatMul", "BiasGelu"}),
        (dynamically_quantized, {"MatMulInteger", "DynamicQuantizeLinear"}),
        (lambda path: by_session(dynamically_quantized(path)), {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}),
    ],
    ids=["attention", "multi-head attention", "session", "dynamic", "dynamic in a session"],
)
def test_the_same_ops_remain(exported: Path, change: object, operations: set[str]) -> None:
    path = change(exported)  # type: ignore[operator]
    assert operations <= {node.op_type for node in onnx.load(path).graph.node}, "the optimiser fused something else"
    # f32 in other orders. Dynamic rounding may fall the other way here and there: by a step of 1 / 255 of a tensor.
    assert error_of(path) < (0.01 if "dynamic" in path.name else 1e-5)
    ops, encodings = final_ops(path)
    assert (ops, encodings) == final_ops(exported)
    assert ops["llm.paged_attention"] == 2 and encodings == {"q8g64"}
