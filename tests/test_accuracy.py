"""What artifacts tell of their accuracy, beside its definitions, computed in other ways."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import CACHE
from onnx_files import mlp, write
from own_cache import use_own_cache
from tiny_encoders import make_encoder
from tiny_models import make_tiny

import llmc
from llmc.api import make_options
from llmc.cli.reference import transformers_reference
from llmc.compiler import accuracy as measuring
from llmc.compiler import encoder_choice, pipeline
from llmc.compiler.accuracy_cache import AccuracyCache
from llmc.compiler.allocation import budgets
from llmc.compiler.encodings import encode
from llmc.compiler.encodings.feedback import Rounded
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.op import Param
from llmc.compiler.ir.types import Tensor, parse_encoding
from llmc.compiler.options import CompileOptions
from llmc.compiler.own_text import Ids
from llmc.compiler.progress import Silent
from llmc.compiler.revision import note_what_is_lost
from llmc.errors import CompileError, IRError
from llmc.frontends.lifted import Lifted
from llmc.runtime.accuracy import Accuracy
from llmc.runtime.artifact import Artifact
from llmc.runtime.runtime import Runtime

Compile = Callable[..., Accuracy | None]
_lift_model = pipeline.lift_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are measured anew in every test; models are lifted once for all."""
    use_own_cache(tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(pipeline, "lift_model", _lifted)


@functools.cache
def _lift(source: str) -> Lifted:
    return _lift_model(source, CompileOptions())


def _lifted(source: str, options: CompileOptions, tokenizer: Path | None = None) -> Lifted:
    return _lift(source)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    models = {name: make_tiny(name, folder / name) for name in ("llama_odd", "qwen2_tied", "gpt2")}
    return models | {name: make_encoder(name, folder / name) for name in ("bert", "albert")}


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    def run(source: Path, name: str = "model.so", **options: object) -> Accuracy | None:
        llmc.compile(source, tmp_path / name, kernel_cache=CACHE, **options)  # type: ignore[arg-type]
        return told(tmp_path / name)

    return run


def told(path: Path) -> Accuracy | None:
    opened = Artifact.open(path)
    opened.close()
    return opened.manifest.accuracy


def checkpoint(source: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(source / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama_odd", "int4"),
        pytest.param("qwen2_tied", "int8", marks=pytest.mark.slow),
        pytest.param("gpt2", "int6", marks=pytest.mark.slow),
    ],
)
def test_weight_errors_are_their_definition(family: str, dtype: str, tiny: dict[str, Path], compiled: Compile) -> None:
    """Of weights that are rounded each for itself: rounded here once more, matrix by matrix, as they are stored."""
    found = compiled(tiny[family], dtype=dtype, calibrate="none")
    assert found is not None
    weights = checkpoint(tiny[family])
    seen = 0
    for tensor in found.tensors:
        w = weights[tensor.name] if tensor.name in weights else weights[f"transformer.{tensor.name}"]
        w = w.astype(np.float32)
        if family == "gpt2" and ".c_" in tensor.name:  # its layers are stored the other way round
            if "attn.c_attn" in tensor.name:
                continue  # in parts
            w = w.T
        assert tensor.numbers == w.size
        off = w - encode(parse_encoding(tensor.encoding), w).decode()
        assert tensor.weight_error == pytest.approx(float((off**2).sum() / (w**2).sum()), rel=1e-3)
        seen += 1
    assert seen > 3


def test_output_errors_and_divergence_are_their_definitions(
    tiny: dict[str, Path], tmp_path: Path, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside transformers on the same text: what the layers get is caught there by hooks."""
    import torch

    texts: list[Ids] = []

    def caught(*arguments: object) -> object:
        made = real(*arguments)  # type: ignore[arg-type]
        texts.extend(made[0])
        return made

    real = measuring._decoder_texts
    monkeypatch.setattr(measuring, "_decoder_texts", caught)
    monkeypatch.setattr(measuring, "ROWS", 1 << 20)  # all of them
    found = compiled(tiny["llama_odd"], dtype="int4", calibrate="none")
    assert found is not None
    assert found.text is not None
    assert (found.text.texts, found.text.tokens) == (len(texts), sum(len(ids) - 1 for ids in texts))
    assert (found.text.source, found.text.through) == ("written", "artifact")

    reference = transformers_reference(tiny["llama_odd"])
    layers = dict(reference._model.named_modules())
    rows: dict[str, list[np.ndarray]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: rows.setdefault(name, []).append(
            inputs[0].detach().reshape(-1, inputs[0].shape[-1]).numpy()
        )

    for name, layer in layers.items():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(hook(f"{name}.weight"))
    divergence, same = 0.0, 0
    with Runtime.load(tmp_path / "model.so") as runtime:
        for ids in texts:
            expected, has = (np.float64(each[:-1]) for each in (reference(ids), runtime.forward(ids)))
            p, q = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (expected, has))
            divergence += float((np.exp(p) * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert found.text.mean_kl_divergence == pytest.approx(divergence / found.text.tokens, rel=2e-3)
    assert found.text.top1_agreement == pytest.approx(same / found.text.tokens, abs=3e-3)

    weights = checkpoint(tiny["llama_odd"])
    compared = 0
    for tensor in found.tensors:
        if tensor.name not in rows:
            assert tensor.output_error is None  # looked up, not multiplied by
            continue
        w, x = weights[tensor.name].astype(np.float32), np.concatenate(rows[tensor.name])
        off = w - encode(parse_encoding(tensor.encoding), w).decode()
        assert tensor.output_error == pytest.approx(float(((x @ off.T) ** 2).sum() / ((x @ w.T) ** 2).sum()), rel=2e-3)
        compared += 1
    assert compared == 3 * 7 + 1


@pytest.mark.parametrize("dtype", [pytest.param("int4", marks=pytest.mark.slow), "int8"])
def test_cosines_are_those_of_an_artifact_in_f32(
    dtype: str, tiny: dict[str, Path], tmp_path: Path, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[Ids] = []

    def caught(*arguments: object) -> list[Ids]:
        texts[:] = real(*arguments)  # type: ignore[arg-type]
        return texts

    compiled(tiny["bert"], "f32.so", dtype="none")
    real = measuring.uniform_texts
    monkeypatch.setattr(measuring, "uniform_texts", caught)
    found = compiled(tiny["bert"], dtype=dtype)
    assert found is not None
    assert found.vectors is not None
    assert found.text is None
    rows = []
    for name in ("f32.so", "model.so"):
        with Runtime.load(tmp_path / name) as runtime:
            rows.append(runtime.embed(texts, normalize=True).astype(np.float64))
    cosines = (rows[0] * rows[1]).sum(-1)
    assert found.vectors.rows == found.vectors.texts == len(texts)
    assert found.vectors.mean_cosine == pytest.approx(cosines.mean(), abs=2e-4)
    assert found.vectors.least_cosine == pytest.approx(cosines.min(), abs=2e-4)
    assert found.vectors.mean_cosine > 0.98


@pytest.mark.slow
def test_layers_that_share_a_weight_are_all_measured(tiny: dict[str, Path], compiled: Compile) -> None:
    found = compiled(tiny["albert"], dtype="int8")
    assert found is not None
    names = [tensor.name for tensor in found.tensors]
    assert len(names) == len(set(names))
    assert sum(tensor.output_error is not None for tensor in found.tensors) > 5


def test_bits_that_differ_are_told(tiny: dict[str, Path], compiled: Compile) -> None:
    """Matrices of a weight that was put together of pieces in several encodings, and what their outputs lose."""
    found = compiled(tiny["llama_odd"], dtype="int4", bits_per_weight=9.0, calibrate="self")
    assert found is not None
    kinds = {tensor.encoding[:2] for tensor in found.tensors}
    assert {"t4", "t6"} <= kinds
    for tensor in found.tensors:
        if tensor.output_error is not None and tensor.encoding.startswith("t6"):
            assert tensor.output_error < 5e-3


def test_the_same_bytes_measured_or_remembered(
    tiny: dict[str, Path], tmp_path: Path, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(tiny["llama_odd"], "a.so", dtype="int4")  # rounded by what layers see
    assert first is not None
    (kept,) = AccuracyCache.default().folder.glob("*.json")
    kept.unlink()
    compiled(tiny["llama_odd"], "b.so", dtype="int4")
    kept.write_text("no JSON")  # damaged: as if it were not there
    compiled(tiny["llama_odd"], "c.so", dtype="int4")
    assert json.loads(kept.read_text())
    monkeypatch.setattr(measuring, "measure", lambda *_: pytest.fail("measured again"))
    compiled(tiny["llama_odd"], "d.so", dtype="int4")
    assert len({(tmp_path / f"{name}.so").read_bytes() for name in "abcd"}) == 1


def test_where_the_artifact_does_not_run_its_graph_does(
    tiny: dict[str, Path], compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compiled(tiny["llama_odd"], dtype="int8")
    monkeypatch.setattr("llmc.targets.check_artifact.refusal", lambda path: "needs avx9")
    there = compiled(tiny["llama_odd"], dtype="int8")
    assert here is not None and there is not None
    assert there.text is not None and here.text is not None
    assert (there.text.source, there.text.through) == ("drawn", "graph")
    assert 0.3 < there.text.mean_kl_divergence / here.text.mean_kl_divergence < 3
    assert [each.weight_error for each in there.tensors] == [each.weight_error for each in here.tensors]


@pytest.mark.slow
def test_an_encoders_graph_is_as_near_as_the_artifact(
    tiny: dict[str, Path], compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compiled(tiny["bert"], dtype="int4", calibrate="none")
    monkeypatch.setattr("llmc.targets.check_artifact.refusal", lambda path: "needs avx9")
    there = compiled(tiny["bert"], dtype="int4", calibrate="none")
    assert here is not None and there is not None
    assert here.vectors is not None and there.vectors is not None
    assert there.vectors.through == "graph"
    assert there.vectors.mean_cosine == pytest.approx(here.vectors.mean_cosine, abs=1e-3)
    assert there.tensors == here.tensors  # inputs of layers are the original's either way


def test_weights_in_a_file_are_measured(tiny: dict[str, Path], tmp_path: Path, compiled: Compile) -> None:
    apart = compiled(tiny["llama_odd"], dtype="int8", weights=str(tmp_path / "weights.bin"))
    inside = compiled(tiny["llama_odd"], dtype="int8")
    assert apart is not None
    assert apart == inside


def test_arrays_tell_what_their_weights_lose(tmp_path: Path, compiled: Compile) -> None:
    found = compiled(write(mlp(), tmp_path / "arrays.onnx"), dtype="int8")
    assert found is not None
    assert (found.text, found.vectors) == (None, None)
    assert found.tensors and all(tensor.output_error is None for tensor in found.tensors)


@pytest.mark.parametrize(
    ("options", "parameters", "measured"),
    [
        ({"dtype": "int4"}, 1 << 40, True),  # where rounding takes long anyway
        ({"dtype": "int4", "calibrate": "none"}, 1 << 40, False),
        ({"dtype": "int4", "calibrate": "none"}, 1 << 20, True),
        ({"dtype": "int8"}, 1 << 40, False),
        ({"dtype": "int8", "accuracy": True}, 1 << 40, True),
        ({"dtype": "int4", "accuracy": False}, 1, False),
        ({"dtype": "bf16"}, 1, False),
        ({"dtype": "bf16", "accuracy": True}, 1, True),
        ({"dtype": "int4", "weights": "random"}, 1, False),
        ({"dtype": "int4", "weights": "none"}, 1, False),
    ],
)
def test_which_compiles_measure(options: dict[str, object], parameters: int, measured: bool) -> None:
    assert make_options(**options).tells_accuracy(parameters) is measured  # type: ignore[arg-type]


def test_accuracy_of_weights_that_are_not_there_is_refused() -> None:
    with pytest.raises(CompileError, match="--accuracy needs the model's weights"):
        make_options(weights="none", accuracy=True)


def test_floats_are_measured_when_asked_for(tiny: dict[str, Path], compiled: Compile) -> None:
    found = compiled(tiny["llama_odd"], dtype="bf16", accuracy=True)
    assert found is not None and found.text is not None
    assert found.tensors == ()
    assert found.text.mean_kl_divergence < 1e-3


@pytest.mark.parametrize("what", ["error", "nan"])
def test_what_cannot_be_measured_is_said_and_compiled_all_the_same(
    what: str, tiny: dict[str, Path], compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise IRError("index 7 is out of range")

    if what == "error":
        monkeypatch.setattr(measuring, "_decoder_texts", fails)
    else:
        monkeypatch.setattr(measuring, "divergence_of", lambda *_: float("nan"))
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda _, text: notes.append(text))
    assert compiled(tiny["llama_odd"], dtype="int8") is None
    assert any("does not tell its accuracy" in note for note in notes)
    with pytest.raises(CompileError, match="--accuracy: it cannot be measured"):
        compiled(tiny["llama_odd"], dtype="int8", accuracy=True)


def test_text_that_is_measured_on_is_not_what_weights_were_rounded_by(
    tiny: dict[str, Path], compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    real = measuring.random_texts

    def caught(lifted: Lifted, vocabulary: int, seed: int, *more: int) -> list[Ids]:
        seeds.append(seed)
        return real(lifted, vocabulary, seed, *more)

    for module in ("calibrate", "accuracy"):
        monkeypatch.setattr(f"llmc.compiler.{module}.random_texts", caught)
    compiled(tiny["llama_odd"], dtype="int4", seed=5)
    assert len(seeds) == len(set(seeds)) == 2


def test_the_manifest_on_the_way_is_the_one_that_is_returned(tiny: dict[str, Path], tmp_path: Path) -> None:
    manifest = llmc.compile(tiny["llama_odd"], tmp_path / "model.so", dtype="int8", kernel_cache=CACHE)
    opened = Artifact.open(tmp_path / "model.so")
    opened.close()
    assert json.loads(json.dumps(manifest)) == opened.manifest.raw
    with Runtime.load(tmp_path / "model.so", verify=True) as runtime:  # every byte of the file that was revised
        assert runtime.manifest.accuracy == told(tmp_path / "model.so")


def test_matrices_of_which_little_is_left_are_named() -> None:
    said: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    def measured(*errors: float | None) -> dict[str, object]:
        return {
            "tensors": [
                {"name": f"layer.{i} + other", "encoding": "t2g64", "output_error": error}
                for i, error in enumerate(errors)
            ]
        }

    note_what_is_lost(measured(0.5, None, 0.1), Notes())
    assert not said
    note_what_is_lost(measured(0.51, 0.1, 1.26, 0.6, 0.7), Notes())
    assert len(said) == 1
    assert "layer.2 + other (t2g64, 126%), layer.4 + other (t2g64, 70%), layer.3" in said[0]
    assert "and 1 more" in said[0] and "'layer.2=int8'" in said[0]


# An encoder that nobody gave a precision


def encodings(found: Accuracy | None) -> set[str]:
    assert found is not None
    return {tensor.encoding[:2] for tensor in found.tensors if tensor.output_error is not None}


def test_an_encoder_finds_the_fewest_bits(
    tiny: dict[str, Path], compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which its vectors are near enough: with more asked for, more bits; found again without another look."""
    sizes = []
    for near, kinds in ((-1.0, {"t4"}), (0.9, {"t4"}), (2.0, {"q8"})):
        monkeypatch.setattr(encoder_choice, "NEAR", near)
        found = compiled(tiny["bert"])
        assert kinds <= encodings(found)
        assert found is not None and found.vectors is not None
        assert found.vectors.mean_cosine > near or near > 1
        sizes.append(sum(tensor.bits * tensor.numbers for tensor in found.tensors))
    assert sizes == sorted(sizes)


def test_what_was_found_is_kept(tiny: dict[str, Path], compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(tiny["bert"])
    monkeypatch.setattr(encoder_choice.Near, "__call__", lambda *_: pytest.fail("looked for again"))
    assert compiled(tiny["bert"]) == first


@pytest.mark.parametrize(("near", "kinds"), [(-1.0, {"t6"}), (2.0, {"q8"})])
def test_without_measuring_inputs_it_is_six_bits_or_eight(
    near: float, kinds: set[str], tiny: dict[str, Path], compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_choice, "NEAR", near)
    assert encodings(compiled(tiny["bert"], calibrate="none")) == kinds


def test_an_encoder_that_takes_no_random_ids_has_eight_bits(
    tiny: dict[str, Path], compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bool:
        raise IRError("index 7 is out of range")

    monkeypatch.setattr(encoder_choice.Near, "__call__", fails)
    assert encodings(compiled(tiny["bert"])) == {"q8"}


@pytest.mark.parametrize(
    ("family", "options", "scheme"),
    [
        ("llama_odd", {}, "int4"),  # a decoder
        ("llama_odd", {"weights": "none"}, "int4"),
        ("bert", {"weights": "none"}, "int8"),  # nothing can be measured
        ("bert", {"weights": "random"}, "int8"),
        ("bert", {}, "int4"),  # to begin with
    ],
)
def test_the_first_choice(family: str, options: dict[str, object], scheme: str, tiny: dict[str, Path]) -> None:
    chosen = pipeline.first_choice(make_options(**options), _lift(str(tiny[family])))  # type: ignore[arg-type]
    assert chosen.quantization == scheme
    named = pipeline.first_choice(make_options("int6", **options), _lift(str(tiny[family])))  # type: ignore[arg-type]
    assert named.quantization == "int6"


def test_budgets_end_with_all_in_the_finer_encoding() -> None:
    """Each is more than the one before, and the first is what is spent without being asked."""
    kinds = [parse_encoding(name) for name in ("t4g32", "t6g32")]
    w = np.ones((8, 64), np.float32)
    none = np.zeros(8, np.float32)
    weight = Quantize(Param("w", Tensor((8, 64), "f32")), "t4g32")
    kept = {weight: [Rounded(encode(kind, w), none, none) for kind in kinds]}
    found = budgets(kept, 100.0)
    assert found[0] == 100.0
    assert found[-1] == 2 * 8 * 64
    assert found == sorted(set(found))
