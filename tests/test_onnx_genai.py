"""Decoders of ONNX Runtime's generative exporter, end to end: recognised like any llama, quantized weights kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_harness import CACHE
from onnx_genai import VOCABULARY, genai_llama, in_blocks

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model, run_pipeline
from llmc.frontends import lift
from llmc.runtime.runtime import Runtime

PROMPT = np.random.default_rng(3).integers(0, VOCABULARY, 37)
LAYERS = 2


def logits_by_onnxruntime(model: onnx.ModelProto, ids: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            given[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        elif value.name == "position_ids":
            given[value.name] = np.arange(len(ids))[None]
    return session.run(["logits"], given)[0][0]


VARIANTS = {
    "apart": genai_llama(layers=LAYERS),
    "packed": genai_llama(layers=LAYERS, packed=True),
    "rotary in front": genai_llama(layers=LAYERS, rotary_inside=False),
    "window": genai_llama(layers=LAYERS, window=5),
    "4 bits": in_blocks(genai_llama(layers=LAYERS), 32),
    "4 bits, packed, zero points": in_blocks(genai_llama(layers=LAYERS, packed=True), 128, symmetric=False),
    "8 bits": in_blocks(genai_llama(layers=LAYERS), 64, bits=8),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_decoder_with_a_cache(variant: str, tmp_path: Path) -> None:
    model = VARIANTS[variant]
    onnx.save(model, tmp_path / "model.onnx")
    lifted = lift(str(tmp_path / "model.onnx"))
    assert lifted.task == "generate" and lifted.vocab_size == VOCABULARY
    given = {"ids": PROMPT[None].astype(np.int32), "positions": np.arange(37, dtype=np.int32)[None]}
    want = logits_by_onnxruntime(model, PROMPT)
    found = np.asarray(evaluate(lifted.graph, given, lifted.load)["logits"])[0]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
    graph = run_pipeline(lifted.graph, CompileOptions(quantization="int8"), load=lifted.load).graph
    ops = Counter(op.name for op in graph.ops if op not in graph.constants)
    assert ops["llm.paged_attention"] == ops["llm.kv_append"] == ops["llm.gated_linear"] == LAYERS
    assert ops["llm.rope"] == 2 * LAYERS and ops["llm.rms_norm"] == 2 * LAYERS + 1
    # Queries, keys and values in one, two more projections a layer besides the gated ones, and the head.
    assert ops["llm.linear"] == 3 * LAYERS + 1
    assert not {"t.matmul", "t.softmax", "t.mul", "t.sin", "t.cos"} & set(ops)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runtime, dict[str, object]]:
    folder = tmp_path_factory.mktemp("genai")
    onnx.save(VARIANTS["4 bits"], folder / "model.onnx")
    options = CompileOptions(quantization="none", max_step=32, kernel_cache=CACHE)
    manifest = compile_model(str(folder / "model.onnx"), folder / "model.so", options)
    return Runtime.load(folder / "model.so", threads=2), manifest


def test_the_artifact_s_logits_are_onnxruntime_s(four_bits: tuple[Runtime, dict[str, object]]) -> None:
    """Weights of 4 bits with scales rounded to f16, everything else f32."""
    runtime, _ = four_bits
    want = logits_by_onnxruntime(VARIANTS["4 bits"], PROMPT)
    found = runtime.forward(PROMPT)
    # Scales that are each off by up to 2^-11; the logits are sums of hundreds of such terms.
    assert np.abs(found - want).max() < 2e-3 * np.abs(want).max()
    assert (found.argmax(1) == want.argmax(1)).all()


def test_any_split_of_the_prompt_gives_the_same_logits(four_bits: tuple[Runtime, dict[str, object]]) -> None:
    runtime, _ = four_bits
    whole = runtime.forward(PROMPT)
    for cuts in ((1,), (16, 17, 18), tuple(range(1, len(PROMPT)))):
        sequence = runtime.sequence()
        rows = [runtime.step([(sequence, piece, "all")]) for piece in np.split(PROMPT, cuts)]
        np.testing.assert_allclose(np.concatenate(rows), whole, rtol=0, atol=1e-4)


def test_the_manifest_counts_the_numbers_that_the_integers_stand_for(
    four_bits: tuple[Runtime, dict[str, object]], tmp_path: Path
) -> None:
    model = four_bits[1]["model"]
    assert isinstance(model, dict)
    onnx.save(VARIANTS["apart"], tmp_path / "float.onnx")
    parameters = lift(str(tmp_path / "float.onnx")).parameters
    assert model["parameters"] == parameters
    # 4.5 bits a weight of the linear ops, 32 a number of the table and the rest.
    table = VOCABULARY * 128
    least = (4.5 * (parameters - 2 * table) + 32 * table) / parameters
    assert least < model["bits_per_weight"] < 1.25 * least + 1
