"""Exported encoders: the same graph over ragged tokens as of the original, and onnxruntime's numbers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import transformers
from kernel_harness import CACHE
from onnx_exports import export_encoder
from tiny_encoders import VOCAB, make_encoder

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model, run_pipeline
from llmc.frontends import Lifted, lift
from llmc.runtime.runtime import Runtime

OPTIONS = CompileOptions(quantization="none", max_step=64, kernel_cache=CACHE)
HIDDEN = ("last_hidden_state",)
# family, head, outputs, whether the export takes token types
CASES = {
    "bert": ("bert", "", (*HIDDEN, "pooler_output"), True),
    "bert classifier": ("bert", "SequenceClassification", ("logits",), True),
    "bert masked": ("bert", "MaskedLM", ("logits",), True),
    "roberta": ("roberta", "", HIDDEN, False),
    "distilbert tokens": ("distilbert", "TokenClassification", ("logits",), False),
    "mpnet": ("mpnet", "", HIDDEN, False),
    "modernbert": ("modernbert", "", HIDDEN, False),
}


def by_onnxruntime(path: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every output for one text."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    found = session.run(None, {value.name: given[value.name][None] for value in session.get_inputs()})
    return {value.name: array for value, array in zip(session.get_outputs(), found, strict=True)}


def by_evaluator(lifted: Lifted, ids: np.ndarray) -> dict[str, np.ndarray]:
    given = {"ids": ids, "positions": np.arange(len(ids)), "token_types": np.zeros_like(ids)}
    inputs = {value.name: given[value.name][None].astype(np.int32) for value in lifted.graph.inputs}
    return {name: np.asarray(array) for name, array in evaluate(lifted.graph, inputs, lifted.load).items()}


def operations(lifted: Lifted) -> Counter[str]:
    """How often each operation stands in the step, after all passes."""
    graph = run_pipeline(lifted.graph, OPTIONS, load=lifted.load, task=lifted.task).graph
    return Counter(op.name for op in graph.ops if op not in graph.constants)


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    family, head, outputs, types = CASES[request.param]
    directory = make_encoder(family, tmp_path_factory.mktemp("encoder") / family, head)
    return request.param, export_encoder(directory, head, outputs, types)


def test_an_exported_encoder_is_its_original(exported: tuple[str, Path]) -> None:
    """The same numbers as onnxruntime's, the same task and use, and the same operations after all passes."""
    case, path = exported
    lifted, original = lift(path), lift(path.parent.parent)
    for length in (2, 7, 33):
        ids = np.random.default_rng(length).integers(5, VOCAB, length)
        found = by_evaluator(lifted, ids)
        for name, want in by_onnxruntime(path, ids).items():
            np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-4)
        for name, want in by_evaluator(original, ids).items():
            if name in found:
                np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-4)
    facts = ("task", "encoder", "vocab_size", "layers", "max_context", "architecture")
    assert {name: getattr(lifted, name) for name in facts} == {name: getattr(original, name) for name in facts}
    assert lifted.text.facts is not None and lifted.text.facts == original.text.facts
    if case in ("bert", "bert classifier", "bert masked"):  # the others' exports leave outputs out
        ours, theirs = (operations(one) for one in (lifted, original))
        assert ours == theirs


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_model_in_a_sentence_transformers_directory_embeds_as_it_says(
    tmp_path: Path, mode: str, normalize: bool
) -> None:
    """The layout of the hub: modules.json and 1_Pooling above `onnx/model.onnx`."""
    directory = make_encoder("bert", tmp_path / "bert")
    path = export_encoder(directory, "", HIDDEN, types=True)
    kinds = [("models.Transformer", ""), ("models.Pooling", "1_Pooling")]
    kinds += [("models.Normalize", "2_Normalize")] if normalize else []
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.{t}"} for i, (t, p) in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_cls_token": mode == "cls",
               "pooling_mode_mean_tokens": mode == "mean"}  # fmt: skip
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    lifted = lift(path)
    assert lifted.encoder is not None and lifted.encoder["normalized"] == normalize
    assert [name for name, _ in lifted.graph.outputs] == ["embedding"]
    ids = np.random.default_rng(0).integers(5, VOCAB, 9)
    hidden = by_onnxruntime(path, ids)["last_hidden_state"]
    want = hidden.mean(1) if mode == "mean" else hidden[:, 0]
    want = want / np.linalg.norm(want, axis=1, keepdims=True) if normalize else want
    np.testing.assert_allclose(by_evaluator(lifted, ids)["embedding"], want, rtol=0, atol=1e-5)


def test_ragged_batches_of_an_exported_encoder(tmp_path: Path) -> None:
    """Compiled: texts of any lengths together give what each gives alone in onnxruntime."""
    path = export_encoder(make_encoder("bert", tmp_path / "bert"), "", HIDDEN, types=True)
    compile_model(str(path), tmp_path / "model.so", OPTIONS)
    runtime = Runtime.load(tmp_path / "model.so", threads=2)
    texts = [np.random.default_rng(n).integers(5, VOCAB, n).tolist() for n in (1, 31, 7, 100, 33)]
    found = runtime.embed(texts)
    want = np.stack([by_onnxruntime(path, np.array(ids))["last_hidden_state"][0].mean(0) for ids in texts])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)


def test_pairs_have_token_types_whatever_the_output_is_for(tmp_path: Path) -> None:
    """Also for a head without a use that llmc knows: the second text of a pair is of type 1, as the tokenizer says."""
    directory = make_encoder("bert", tmp_path / "bert", "MaskedLM")
    path = export_encoder(directory, "MaskedLM", ("logits",), types=True)
    compile_model(str(path), tmp_path / "model.so", OPTIONS)
    runtime = Runtime.load(tmp_path / "model.so", threads=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for text in (("def greet", "a name, and another"), ("x", "y"), ("only one",)):
        given = {name: np.array([ids]) for name, ids in tokenizer(*text).items()}
        (want,) = session.run(None, {value.name: given[value.name] for value in session.get_inputs()})
        found = runtime.encode(text if len(text) == 2 else text[0])
        np.testing.assert_allclose(found["logits"], want[0], rtol=0, atol=1e-4)  # type: ignore[call-overload,index]
