"""What kind of model a source is: an ONNX file, a folder with one, or what transformers read."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.compiler.ir.graph import Graph
from llmc.errors import FrontendError
from llmc.frontends import lift, onnx_file
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


def test_a_file_is_an_onnx_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert onnx_file(tmp_path / "gone.onnx") == tmp_path / "gone.onnx"
    assert onnx_file("someone/a-model") is None and onnx_file(tmp_path / "model.safetensors") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert onnx_file("~/net.onnx") == tmp_path / "net.onnx"


def test_a_model_is_shown_without_its_files_and_settings() -> None:
    text = Text({"tokenizer.json": b"vocabulary"}, notes=("a note",))
    graph = Graph("g", (), ())
    numbers = {"parameters": 0, "vocab_size": 0, "layers": 0, "max_positions": 0, "max_context": 0}
    model = Lifted(
        graph, ArrayWeights({}), "a-model", "Decoder", **numbers, text=text, config={"hidden_size": 64},
        otherwise=lambda: model,
    )  # fmt: skip
    assert "a note" in repr(model) and "a-model" in repr(model)
    for part in ("vocabulary", "hidden_size", "otherwise"):
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
