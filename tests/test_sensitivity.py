"""What a model loses by one weight alone: the same as running it with that weight replaced, one after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_encoders import make_encoder
from tiny_models import make_tiny

from llmc.compiler.calibrate import Model, in_floats, losses_of, text_threads
from llmc.compiler.divergence import output_of
from llmc.compiler.encodings import encode
from llmc.compiler.encodings.feedback import Rounded
from llmc.compiler.ir.evaluate import Data
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear, Quantize, QuantizeActivations
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import parse_encoding
from llmc.compiler.options import CompileOptions
from llmc.compiler.own_text import random_texts
from llmc.compiler.pipeline import lift_model, run_lifted, vocabulary_of
from llmc.compiler.progress import Silent
from llmc.compiler.scenario import evaluate_with, prompt_inputs
from llmc.compiler.sensitivity import TOKENS, divergence_from, relative_error, rounding_losses

OPTIONS = CompileOptions(quantization="int4", group_size=32)


def model_of(family: str, folder: Path) -> Model:
    source = make_encoder(family, folder) if family == "bert" else make_tiny(family, folder)
    lifted = lift_model(str(source), OPTIONS)
    graph = run_lifted(lifted, OPTIONS).graph
    return Model(lifted, graph, vocabulary_of(lifted), lambda _: graph, lambda texts: list(texts))


def rounded(model: Model) -> dict[Quantize, list[Rounded]]:
    kept: dict[Quantize, list[Rounded]] = {}
    for weight in dict.fromkeys(in_floats(model.graph)[1].values()):
        rng = np.random.default_rng(len(kept))
        w = rng.standard_normal([int(str(dim)) for dim in weight.shape]).astype(np.float32)
        none = np.zeros(len(w), np.float32)
        kept[weight] = [Rounded(encode(parse_encoding(weight.encoding), w / np.sqrt(w.shape[1])), none, none)]
    return kept


def exact_and_alone(graph: Graph, weight: Quantize | None) -> Graph:
    """The graph with activations as they are and all weights in floats, but for one that stays rounded."""

    def rule(op: Op) -> Value | None:
        if isinstance(op, QuantizeActivations):
            return op.x
        if isinstance(op, (Linear, GatedLinear)) and isinstance(op.w, Quantize) and op.w is not weight:
            return op.replace(w=op.w.w)
        if isinstance(op, Embed) and isinstance(op.table, Quantize) and op.table is not weight:
            return op.replace(table=op.table.w)
        return None

    return rewrite(graph, rule)


@pytest.mark.parametrize("family", ["llama_odd", "llama_tied", "gpt_neox_sequential", "bert"])
def test_losses_are_those_of_a_run_with_the_weight_replaced(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path / family)
    kept, load = rounded(model), model.lifted.weights.load
    decodes = model.lifted.task == "generate"
    texts = random_texts(model.lifted, model.vocabulary, 0)
    with text_threads() as pool:
        found = losses_of(model, kept, texts, Silent(), pool)
    assert found is not None
    unused = {weight for weight in kept if weight not in found}  # of another output
    assert not unused or family == "bert"
    reference = exact_and_alone(model.graph, None)
    name = "logits" if decodes else output_of(model.lifted, reference)
    count = 1 if decodes else -(-TOKENS // len(texts[0]))
    inputs = prompt_inputs(reference, *(text[:TOKENS] for text in texts[:count]), wide=True)
    expected = evaluate_with(reference, inputs, load, {})[name]
    distance = divergence_from(model.vocabulary) if decodes else relative_error
    for weight in found:
        became = kept[weight]
        known: dict[Value, Data] = {weight: became[0].encoded}
        got = evaluate_with(exact_and_alone(model.graph, weight), inputs, load, known)[name]
        assert isinstance(expected, np.ndarray) and isinstance(got, np.ndarray)
        np.testing.assert_allclose(found[weight], distance(expected, got), rtol=1e-3, atol=1e-7)
        assert found[weight] > 1e-4  # the weight became another one
    for weight in unused:
        known = {weight: kept[weight][0].encoded}
        got = evaluate_with(exact_and_alone(model.graph, weight), inputs, load, known)[name]
        np.testing.assert_array_equal(got, expected)


def test_a_graph_without_weights_loses_nothing(tmp_path: Path) -> None:
    model = model_of("llama_odd", tmp_path / "llama_odd")
    graph = in_floats(model.graph)[0]
    inputs = prompt_inputs(graph, np.arange(5, dtype=np.int32))
    load = model.lifted.weights.load
    none = rounding_losses(graph, {}, "logits", inputs, load, lambda _: np.zeros(0), relative_error, Silent())
    assert none == {}


def test_losses_that_are_not_finite_are_not_told(tmp_path: Path) -> None:
    model = model_of("llama_odd", tmp_path / "llama_odd")
    kept = rounded(model)
    broken = next(iter(kept.values()))[0].encoded
    broken.parts["scales"][:] = np.float16(np.nan)
    with text_threads() as pool:
        assert losses_of(model, kept, random_texts(model.lifted, model.vocabulary, 0), Silent(), pool) is None


def test_weights_that_change_nothing_on_the_text_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere they may: they are not taken for worthless."""
    model = model_of("llama_odd", tmp_path / "llama_odd")
    kept = rounded(model)
    first, second, third = list(kept)[:3]
    told = {first: 0.0, second: 0.5, third: -1e-9}
    monkeypatch.setattr("llmc.compiler.calibrate.rounding_losses", lambda *_: told)
    with text_threads() as pool:
        found = losses_of(model, kept, random_texts(model.lifted, model.vocabulary, 0), Silent(), pool)
    assert found == {second: 0.5}


def test_distances() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 10)).astype(np.float32)
    p, q = (np.exp(each[:, :7].astype(np.float64)) for each in (a, b))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    np.testing.assert_allclose(divergence_from(7)(a, b), (p * np.log(p / q)).sum(1).mean(), rtol=1e-5)
    assert divergence_from(7)(a, a) == 0
    np.testing.assert_allclose(relative_error(a, b), np.square(a - b).sum() / np.square(a).sum(), rtol=1e-6)
    assert relative_error(a, a) == 0 == relative_error(0 * a, 0 * a)
