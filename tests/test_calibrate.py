"""Rounding by what layers see: the texts, the moments, and what a compiled model gains."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx_files import mlp, write
from own_cache import use_own_cache
from tiny_encoders import make_encoder
from tiny_models import make_tiny

import llmc
from llmc.api import make_options
from llmc.compiler import calibrate as calibration
from llmc.compiler import own_text
from llmc.compiler.calibrate import Model, calibrate, calibrate_model, in_floats, text_threads, with_integers
from llmc.compiler.encodings.feedback import Curvature
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.llm import GatedLinear, Linear, Quantize
from llmc.compiler.options import CompileOptions
from llmc.compiler.own_text import own_texts, random_texts, texts_of_file
from llmc.compiler.pipeline import lift_model, run_lifted
from llmc.compiler.progress import Silent
from llmc.compiler.scenario import prompt_inputs
from llmc.errors import CompileError, IRError
from llmc.frontends.lifted import Lifted

FAMILIES = ("llama", "llama_odd", "qwen2_tied", "gpt2", "gemma2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: make_tiny(name, folder / name) for name in FAMILIES}


@functools.cache
def lifted_and_graph(source: Path) -> tuple[Lifted, Graph]:
    chosen = CompileOptions()
    lifted = lift_model(str(source), chosen)
    return lifted, run_lifted(lifted, chosen).graph


def linears(graph: Graph) -> list[Linear | GatedLinear]:
    return [op for op in graph.ops if isinstance(op, (Linear, GatedLinear))]


@pytest.mark.parametrize("family", ["llama_odd", "gemma2", "gpt2", "albert"])  # ALBERT's layers share their weights
def test_moments_are_those_of_the_layers_inputs(
    family: str, tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside each op's input, asked for as an output of the graph, one text after another."""
    lifted, graph = lifted_and_graph(tiny.get(family) or make_encoder(family, tmp_path / family))
    texts = random_texts(lifted, 300, 0)[:3]
    floats, layers = in_floats(graph)
    expected: dict[Quantize, np.ndarray] = {}
    for layer, weight in layers.items():
        asked = floats.replace_outputs([("x", layer.x)])
        inputs = [evaluate(asked, prompt_inputs(floats, ids), lifted.load)["x"] for ids in texts]
        rows = np.concatenate([np.asarray(x).reshape(-1, layer.x.shape[-1]) for x in inputs]).astype(np.float64)
        expected[weight] = expected.get(weight, 0) + rows.T @ rows / len(rows)
    seen: list[np.ndarray] = []

    def curvature(moments: np.ndarray, damping: float) -> Curvature:
        seen.append(moments)
        return real(moments, damping)

    real = Curvature.of
    monkeypatch.setattr(Curvature, "of", curvature)
    dict(calibrate(graph, lifted.load, texts, 0.01, Silent()))
    assert len(seen) == len(expected)
    for found in seen:
        gaps = [
            float(np.abs(found - moments).max() / np.abs(moments).max())
            for moments in expected.values()
            if moments.shape == found.shape
        ]
        assert min(gaps) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2_tied", "gpt2"])
def test_every_weight_of_a_layer_is_rounded_and_nothing_else_changes(
    family: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    lifted, graph = lifted_and_graph(tiny[family])
    rounded = calibrate(graph, lifted.load, random_texts(lifted, 300, 0)[:2], 0.01, Silent())
    encoded = ((weight, each.encoded) for weight, (each,) in rounded)
    found, store = with_integers(graph, lifted.load, encoded, tmp_path)
    before, after = linears(graph), linears(found)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert isinstance(old.w, Quantize)
        assert isinstance(new.w, PackGroups)
        assert new.w.type == old.w.type
        assert new.attributes() == old.attributes()
    ids = np.arange(40, dtype=np.int32)
    own = evaluate(found, prompt_inputs(found, ids), store.load)["logits"]
    exact = evaluate(in_floats(graph)[0], prompt_inputs(graph, ids), lifted.load)["logits"]
    assert np.corrcoef(np.ravel(own), np.ravel(exact))[0, 1] > 0.8  # 4 bits of random weights


def test_a_weight_that_several_layers_read_is_rounded_once_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_encoder("albert", tmp_path / "albert")
    lifted, graph = lifted_and_graph(source)
    weights = {op.w for op in linears(graph)}
    assert len(weights) < len(linears(graph))
    calls: list[object] = []
    real = calibration.encode_with_feedback
    monkeypatch.setattr(calibration, "encode_with_feedback", lambda *a: calls.append(a) or real(*a))
    rounded = dict(calibrate(graph, lifted.load, random_texts(lifted, 90, 0)[:2], 0.1, Silent()))
    assert len(calls) == len(weights)
    assert rounded.keys() == weights


def test_as_many_rounds_as_ids_write_the_text_one_id_at_a_time(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lifted, graph = lifted_and_graph(tiny["llama"])
    floats, _ = in_floats(graph)
    start = [ids[:9] for ids in random_texts(lifted, 300, 0)[:3]]
    monkeypatch.setattr(own_text, "ROUNDS", 9)
    texts = own_texts(floats, lifted.load, start, 300, 7)
    for number, text in enumerate(texts):
        chances = np.random.default_rng((7, number)).random(len(text))
        logits = np.asarray(evaluate(floats, prompt_inputs(floats, text), lifted.load)["logits"])
        assert text[0] == start[number][0]
        for at in range(1, len(text)):
            p = np.exp(logits[at - 1, :300].astype(np.float64))
            sums = np.cumsum(p / p.sum())
            assert sums[text[at]] >= chances[at] - 1e-6
            assert (sums[text[at] - 1] if text[at] else 0) <= chances[at] + 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_by_rows_are_those_of_the_whole_text(
    family: str, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lifted, graph = lifted_and_graph(tiny[family])
    floats, _ = in_floats(graph)
    texts = random_texts(lifted, 300, 0)[:3]
    monkeypatch.setattr(own_text, "CHUNK", 31)
    by_rows = own_texts(floats, lifted.load, texts, 300, 7)
    monkeypatch.setattr(own_text, "find_head", lambda graph: None)
    monkeypatch.setattr(own_text, "MOST_LOGITS", 2 * 300 * 128)
    whole = own_texts(floats, lifted.load, texts, 300, 7)
    same = np.concatenate([a == b for a, b in zip(by_rows, whole, strict=True)])
    assert same.mean() > 0.99  # a number that lies on the border of two ids may fall either way


def test_ids_are_drawn_as_often_as_predicted() -> None:
    p = np.array([0.5, 0.0, 0.3, 0.2])
    with np.errstate(divide="ignore"):
        logits = np.tile(np.log(p).astype(np.float32) + 3, (1000, 1))
    drawn = own_text.draw(logits, (np.arange(1000) + 0.5) / 1000)
    assert np.bincount(drawn, minlength=4).tolist() == [500, 0, 300, 200]
    impossible_first = np.array([[-np.inf, 0.0]], np.float32)
    assert own_text.draw(impossible_first, np.zeros(1)).tolist() == [1]


def test_texts_begin_and_end_as_the_tokenizer_says(tiny: dict[str, Path], tmp_path: Path) -> None:
    lifted, _ = lifted_and_graph(tiny["llama"])
    texts = random_texts(lifted, 300, 0)
    assert len(texts) == own_text.SEQUENCES
    assert {len(text) for text in texts} == {128}  # the model's context
    bos = (lifted.text.facts or {}).get("bos_id")
    assert bos is None or {int(text[0]) for text in texts} == {bos}
    encoder, _ = lifted_and_graph(make_encoder("bert", tmp_path / "bert"))
    around = own_text._around(encoder, 16)
    for text in random_texts(encoder, 90, 0):
        assert len(text) == 16
        assert text.max() < 90
        assert ([*text[: len(around[0])]], [*text[16 - len(around[1]) :]]) == around


def test_the_same_seed_gives_the_same_bytes(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        use_own_cache(tmp_path / name, monkeypatch)  # nothing that was rounded before is found
        llmc.compile(tiny["llama"], tmp_path / f"{name}.so", calibrate="self")
    assert (tmp_path / "a.so").read_bytes() == (tmp_path / "b.so").read_bytes()


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({}, None),  # where the model is one of texts
        ({"symmetric": False}, None),
        ({"dtype": "int6"}, None),
        ({"weights": "weights.bin"}, None),
        ({"calibrate": "self"}, True),
        ({"calibrate": "text.txt"}, True),
        ({"dtype": "int8"}, False),
        ({"dtype": "int8", "calibrate": "self"}, True),
        ({"calibrate": "none"}, False),
        ({"weights": "random"}, False),
        ({"weights": "none"}, False),
    ],
)
def test_which_compiles_measure(options: dict[str, object], measured: bool | None) -> None:
    assert make_options(**options).measures_inputs is measured  # type: ignore[arg-type]


def test_arrays_are_not_measured(tmp_path: Path) -> None:
    """A graph that is no model of texts: by default its weights are rounded for themselves, and to ask is an error."""
    write(mlp(), tmp_path / "arrays.onnx")
    llmc.compile(tmp_path / "arrays.onnx", tmp_path / "arrays.so")
    with pytest.raises(CompileError, match="only models of texts"):
        llmc.compile(tmp_path / "arrays.onnx", tmp_path / "arrays.so", calibrate="self")


def test_a_model_that_its_own_text_does_not_run_is_compiled_all_the_same(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a graph looks an id up in a shorter table: unless it was asked for, and then by an error."""

    def fails(*_: object) -> None:
        raise IRError("index 7 is out of range")

    monkeypatch.setattr(calibration, "calibrate_model", fails)
    found = llmc.compile(tiny["llama"], tmp_path / "model.so")
    assert found["explain"]["calibrated"] == "none"  # type: ignore[index]
    with pytest.raises(CompileError, match="own text does not run: index 7"):
        llmc.compile(tiny["llama"], tmp_path / "model.so", calibrate="self")


def test_outputs_are_nearer_to_the_models_own(tiny: dict[str, Path], tmp_path: Path) -> None:
    """KL on texts that the model writes with another seed, at the same size."""
    lifted, graph = lifted_and_graph(tiny["llama"])
    floats, _ = in_floats(graph)
    with text_threads() as pool:
        held = own_texts(floats, lifted.load, random_texts(lifted, 320, 5)[:4], 320, 5, pool)

    def anew(schemes: Mapping[str, str]) -> Graph:
        return run_lifted(lifted, CompileOptions(overrides=tuple(schemes.items()))).graph

    def refuse(_: object) -> list[np.ndarray]:
        raise CompileError("the model is too small for it")

    model = Model(lifted, graph, 320, anew, refuse)
    found, store = calibrate_model(model, CompileOptions(), "", tmp_path, Silent())
    divergences = [0.0, 0.0]
    for ids in held:
        exact = np.asarray(evaluate(floats, prompt_inputs(floats, ids), lifted.load)["logits"], np.float64)
        for index, (other, loader) in enumerate(((graph, lifted.load), (found, store.load))):
            logits = np.asarray(evaluate(other, prompt_inputs(other, ids), loader)["logits"], np.float64)
            p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact, logits))
            divergences[index] += float((np.exp(p) * (p - q)).sum(-1).mean())
    assert divergences[1] < 0.9 * divergences[0]  # random weights gain less than trained ones, whose inputs correlate


def test_a_checked_compile(tiny: dict[str, Path], tmp_path: Path) -> None:
    """The artifact is compared with the graph that has the rounded weights."""
    found = llmc.compile(tiny["gpt2"], tmp_path / "model.so", check=True)
    assert found


def test_files_of_text(tiny: dict[str, Path], tmp_path: Path) -> None:
    lifted, _ = lifted_and_graph(tiny["llama"])
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one two three\nfour five six\n" * 40)
    lines.write_text("".join(json.dumps({"text": "one two three"}) + "\n" for _ in range(40)))
    for path in (plain, lines):
        texts = texts_of_file(path, lifted, 320)
        assert max(map(len, texts)) <= 128
        bos = (lifted.text.facts or {}).get("bos_id")
        assert bos is None or {int(text[0]) for text in texts} == {bos}
    llmc.compile(tiny["llama"], tmp_path / "model.so", calibrate=str(plain))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "No such file"),
        ("empty.txt", b"\n\n", "there is no text"),
        ("bytes.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"other": 1}\n', "JSON objects"),
        ("bad2.jsonl", b"not json\n", "JSON objects"),
        ("bad3.jsonl", b'{"text": "a"}\n{"text": 5}\n', "JSON objects"),
    ],
)
def test_files_that_are_no_text(
    name: str, content: bytes | None, message: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CompileError, match=message):
        llmc.compile(tiny["llama"], tmp_path / "model.so", calibrate=str(tmp_path / name))
    assert not (tmp_path / "model.so").exists()
