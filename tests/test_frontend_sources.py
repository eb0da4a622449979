"""What kind of model a source is: an ONNX file, a folder with one, or what transformers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from llmc.compiler.ir.graph import Graph
from llmc.errors import FrontendError
from llmc.frontends import lift, onnx, onnx_file
from llmc.frontends.gguf import lift as gguf_lift
from llmc.frontends.hf import lift as hf_lift
from llmc.frontends.lifted import Lifted, Text
from llmc.frontends.weight_sources import ArrayWeights

FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), ""),
    "one file of any name": (("net.onnx",), "net.onnx"),
    "one of them is the model": (("a.onnx", "model.onnx", "z.onnx"), "model.onnx"),
    "one below": (("config.json", "onnx/net.onnx"), "onnx/net.onnx"),
    "the model below": (("onnx/a.onnx", "onnx/model.onnx", "onnx/model_q4.onnx"), "onnx/model.onnx"),
    "here before below": (("net.onnx", "onnx/model.onnx"), "net.onnx"),
    "below, as here are two": (("a.onnx", "b.onnx", "onnx/model.onnx"), "onnx/model.onnx"),
    "two": (("a.onnx", "b.onnx"), ""),
    "two below": (("onnx/a.onnx", "onnx/b.onnx"), ""),
    "none": (("config.json", "model.bin"), ""),
    "safetensors beside it": (("model.onnx", "model.safetensors"), ""),
    "an index of safetensors beside it": (("onnx/model.onnx", "model.safetensors.index.json"), ""),
    "torch's weights beside it": (("model.onnx", "pytorch_model.bin"), ""),
    "parts of torch's weights beside it": (("model.onnx", "pytorch_model-00001-of-00002.bin"), ""),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_an_onnx_model_where_it_has_one_and_no_other_weights(name: str, tmp_path: Path) -> None:
    files, expected = FOLDERS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert onnx_file(tmp_path) == (tmp_path / expected if expected else None)
    assert onnx_file(str(tmp_path)) == onnx_file(tmp_path)


@pytest.mark.parametrize("names", [("a.onnx", "b.onnx"), ("onnx/decoder_model.onnx", "onnx/encoder_model.onnx")])
def test_several_onnx_files_are_named(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FrontendError, match=f"several ONNX files: give one of them: {', '.join(names)}"):
        lift(tmp_path)


def test_a_file_is_an_onnx_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert onnx_file(tmp_path / "gone.onnx") == tmp_path / "gone.onnx"
    assert onnx_file(tmp_path / "GONE.ONNX") == tmp_path / "GONE.ONNX"
    assert onnx_file("someone/a-model") is None and onnx_file(tmp_path / "model.safetensors") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert onnx_file("~/net.onnx") == tmp_path / "net.onnx"


# What each frontend is given, of the options that all models have, and of those that only some have.
ALL = {"max_context": 9, "weights": "random", "seed": 4}
GIVEN: dict[str, tuple[str, str, dict[str, object]]] = {
    "net.onnx": ("onnx", "Path", {"tokenizer": "t", "max_dims": {"n": 2}, "dims": {"m": 3}}),
    "net.gguf": ("gguf", "Path", {}),
    "someone/a-model": ("hf", "str", {"lora": ("a", "b")}),
}


@pytest.mark.parametrize("source", GIVEN)
def test_a_source_is_read_by_the_frontend_of_its_kind(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, type_name, more = GIVEN[source]
    read: list[tuple[str, object, dict[str, object]]] = []
    for name, frontend in (("onnx", onnx), ("gguf", gguf_lift), ("hf", hf_lift)):
        monkeypatch.setattr(frontend, "lift", lambda path, name=name, **options: read.append((name, path, options)))
    monkeypatch.setattr(
        "llmc.frontends.gguf.source.gguf_source", lambda name: Path(name) if str(name).endswith(".gguf") else None
    )
    lift(source, **ALL, **more)  # type: ignore[arg-type]
    ((found, path, options),) = read
    assert (found, str(path), options) == (kind, source, {**ALL, **more})
    assert isinstance(path, Path) == (type_name == "Path")
    lift(source)
    assert {name: value for name, value in read[1][2].items() if value} == {"weights": "checkpoint"}
    assert read[1][2]["max_context"] is None and read[1][2]["seed"] == 0


@pytest.mark.parametrize("source", ["net.onnx", "net.gguf"])
def test_an_adapter_is_for_a_model_of_transformers(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llmc.frontends.gguf.source.gguf_source", lambda name: Path(name) if str(name).endswith(".gguf") else None
    )
    with pytest.raises(FrontendError, match=f"--lora: {source} is no Hugging Face model, whose weights adapters are"):
        lift(source, lora=["a"])


def model_of(text: Text, **more: Any) -> Lifted:
    numbers = {"parameters": 0, "vocab_size": 0, "layers": 0, "max_positions": 0, "max_context": 0}
    return Lifted(
        Graph("g", (), ()), ArrayWeights({"w": np.ones(2)}), "a-model", "Decoder", **numbers, text=text, **more
    )


def test_a_model_does_one_of_three_tasks() -> None:
    for task in ("generate", "encode", "run"):
        assert model_of(Text(), task=task).task == task
    assert model_of(Text()).task == "generate" and model_of(Text()).load("w").tolist() == [1, 1]
    with pytest.raises(FrontendError, match="unknown task 'write'; known: generate, encode, run"):
        model_of(Text(), task="write")


def test_a_text_sides_tokenizer_neither_cuts_nor_pads() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=4)
    found = Text({"tokenizer.json": tokenizer.to_str().encode()}).tokenizer()
    assert (found.truncation, found.padding, found.get_vocab()) == (None, None, {"a": 0, "b": 1})
    assert Text({"other.json": b""}).tokenizer() is None


def test_a_model_is_shown_without_its_files_and_settings() -> None:
    text = Text({"tokenizer.json": b"vocabulary"}, notes=("a note",))
    model = model_of(text, config={"hidden_size": 64}, otherwise=lambda: model, least={"w": "int4"})
    assert "a note" in repr(model) and "a-model" in repr(model)
    for part in ("vocabulary", "hidden_size", "otherwise", "int4"):
        assert part not in repr(model)


@pytest.mark.parametrize("option", ["dims", "max_dims"])
def test_a_text_model_has_no_free_sizes(option: str) -> None:
    with pytest.raises(FrontendError, match="someone/a-model takes text, which has no size 'n': --max-context"):
        lift("someone/a-model", **{option: {"n": 7}})  # type: ignore[arg-type]
    with pytest.raises(FrontendError, match="no size 'm'"):
        lift("someone/a-model", max_dims={"n": 7}, dims={"m": 1})


def test_a_text_model_has_a_tokenizer_of_its_own() -> None:
    for sizes in (None, {}):
        with pytest.raises(FrontendError, match="someone/a-model has a tokenizer of its own"):
            lift("someone/a-model", tokenizer="elsewhere", dims=sizes, max_dims=sizes)
