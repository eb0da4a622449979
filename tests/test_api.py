"""llmc.compile and llmc.from_hf: what is compiled again, and what comes from the cache. No compiler runs here."""

from __future__ import annotations

import os
from pathlib import Path

import fake_artifact
import pytest

import llmc
from llmc import artifact_cache
from llmc.api import make_options
from llmc.compiler.options import CompileOptions, parse_overrides
from llmc.errors import CompileError, LlmcError


class Compiler:
    """Stands in for the pipeline: counts, and writes an artifact that runs."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, CompileOptions]] = []
        self.files: list[set[str]] = []

    def __call__(
        self, source: str, output: Path, options: CompileOptions, progress: object = None
    ) -> dict[str, object]:
        self.calls.append((source, options))
        self.files.append({path.name for path in Path(source).iterdir()})
        fake_artifact.write(output)
        return {"model": {"source": source}}


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr("llmc.compiler.pipeline.compile_model", found)
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path / "cache"))
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "fake"}')
    (folder / "model.safetensors").write_bytes(bytes(2 << 20))
    (folder / "tokenizer.json").write_text("{}")
    return folder


class Saved:
    """Something that saves itself, as transformers models and tokenizers do."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.content = name, content

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / self.name).write_bytes(self.content)


def test_the_second_time_comes_from_the_cache(compiler: Compiler, model: Path) -> None:
    first = llmc.from_hf(model, dtype="int8", threads=1)
    second = llmc.from_hf(str(model), dtype="int8", threads=1)
    assert len(compiler.calls) == 1
    assert first.artifact.path == second.artifact.path
    assert compiler.calls[0][1].quantization == "int8"
    assert "model-int8-" in first.artifact.path.name


def test_anything_that_changes_the_artifact_compiles_again(
    compiler: Compiler, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> int:
        llmc.from_hf(model)
        return len(compiler.calls)

    assert (again(), again()) == (1, 1)
    llmc.from_hf(model, group_size=32)
    assert again() == 2
    (model / "config.json").write_text('{"model_type": "FAKE"}')  # as long as before
    assert (again(), again()) == (3, 3)
    os.utime(model / "model.safetensors", (1, 1))
    assert (again(), again()) == (4, 4)
    (model / "chat_template.jinja").write_text("x")
    assert again() == 5
    monkeypatch.setattr(artifact_cache, "code_hash", lambda: "another version of the compiler")
    assert (again(), again()) == (6, 6)


def test_what_does_not_change_the_artifact_is_not_in_its_key(model: Path) -> None:
    path = artifact_cache.path_for(model, make_options())
    assert path == artifact_cache.path_for(model, make_options(jobs=1, check=True, kernel_cache=Path("/elsewhere")))
    (model / "README.md").write_text("words")
    assert path == artifact_cache.path_for(model, make_options())


def test_a_damaged_artifact_in_the_cache_is_made_again(compiler: Compiler, model: Path) -> None:
    path = llmc.from_hf(model).artifact.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    assert llmc.from_hf(model).generate("hello", max_tokens=2)
    assert len(compiler.calls) == 2


def test_another_tokenizer_takes_the_place_of_the_models_own(compiler: Compiler, model: Path, tmp_path: Path) -> None:
    llmc.from_hf(model, tokenizer=Saved("tokenizer.json", b"[1]"))
    llmc.from_hf(model, tokenizer=Saved("tokenizer.json", b"[1]"))
    llmc.from_hf(model, tokenizer=Saved("tokenizer.json", b"[2]"))
    assert len(compiler.calls) == 2
    assert compiler.files[0] == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (model / "tokenizer.json").read_text() == "{}"  # the original is as it was
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("[3]")
    (other / "model.safetensors").write_bytes(b"not this one")
    llmc.compile(model, tmp_path / "out.so", tokenizer=other)
    assert (model / "tokenizer.json").read_text() == "{}"
    assert (model / "model.safetensors").stat().st_size == 2 << 20


def test_a_model_in_memory_is_known_by_its_content(compiler: Compiler) -> None:
    for content in (b"a", b"a", b"b"):
        llmc.from_hf(Saved("config.json", content), tokenizer=Saved("tokenizer.json", b"{}"))
    assert len(compiler.calls) == 2
    assert compiler.files[0] == {"config.json", "tokenizer.json"}


def test_save_keeps_the_artifact_all_or_nothing(compiler: Compiler, model: Path, tmp_path: Path) -> None:
    runtime = llmc.from_hf(model)
    kept = tmp_path / "kept.so"
    kept.write_text("something old")
    runtime.save(kept)
    assert kept.read_bytes() == runtime.artifact.path.read_bytes()
    with pytest.raises(LlmcError, match="cannot write"):
        runtime.save(tmp_path / "no" / "folder.so")
    assert {path.name for path in tmp_path.iterdir()} == {"kept.so", "model", "cache"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int7"}, "int4"),
        ({"group_size": 33}, "group-size"),
        ({"group_size": False}, "group-size"),
        ({"groups": 32}, "groups"),
        ({"overrides": {"*": "int7"}}, "int4"),
        ({"max_context": 3}, "max-context"),
        ({"target": ""}, "target"),
        ({"jobs": 0}, "jobs"),
        ({"weights": ""}, "weights"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(CompileError, match=said):
        make_options(**options)  # type: ignore[arg-type]


def test_one_scale_a_row_has_the_command_lines_name() -> None:
    assert make_options(group_size="channel").group_size == make_options(group_size=0).group_size == 0


def test_options_as_python_gives_them_are_those_of_the_command_line() -> None:
    options = make_options("float32", overrides={"*.a": "int8", "b.c": "f16"}, max_context=64, weights="file")
    assert options.quantization == "none"
    assert options.overrides == parse_overrides(["*.a=int8", "b.c=f16"])


def test_a_cache_that_cannot_be_written_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LLMC_CACHE_DIR", str(blocked / "cache"))
    with pytest.raises(LlmcError, match="LLMC_CACHE_DIR"):
        llmc.from_hf(model)
