"""Where a model is: what of a directory or of the hub's repository is a model's, and what is said of all else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from llmc.errors import FrontendError
from llmc.frontends.hf import source

READ = ("config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt", "tokenizer.model", "qwen.tiktoken")
OTHER = (
    "evil.py", "onnx/model.onnx", "model.onnx", "m.gguf", "consolidated.safetensors", "original/params.json",
    "training_args.bin", "optimizer.json", "trainer_state.json", "README.md", "tf_model.h5",
)  # fmt: skip
SAFETENSORS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TORCH = ("pytorch_model-00001-of-00001.bin",)

Hub = Callable[..., list[str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Plays a repository; returns what of its files was downloaded for `org/m@v2`."""

    def downloaded(files: Iterable[str], modules: object = None) -> list[str]:
        got: set[str] = set()

        def download(name: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
            assert (name, revision) == ("org/m", "v2")
            for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                got.add(file)
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).write_text(json.dumps(modules) if file == "modules.json" else "{}")
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: list(files))
        assert source.resolve("org/m@v2") == tmp_path
        return sorted(got)

    return downloaded


def test_of_a_repository_only_what_is_read_is_downloaded(hub: Hub) -> None:
    assert hub((*READ, *OTHER, *SAFETENSORS, *TORCH)) == sorted((*READ, *SAFETENSORS))


def test_torchs_weights_are_downloaded_where_there_are_no_others(hub: Hub) -> None:
    assert hub((*READ, *OTHER[:4], *OTHER[5:], *TORCH)) == sorted((*READ, *TORCH))


def test_modules_in_folders_are_downloaded_as_modules_json_lists_them(hub: Hub) -> None:
    below = ("1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "2_Dense/config.json")
    never = ("2_Dense/onnx/config.json", "3_Other/config.json")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../x"}, {"path": 7}, "3_Other"]
    got = hub((*READ, "modules.json", "model.safetensors", *below, *never), modules)
    assert got == sorted((*READ, "modules.json", "model.safetensors", *below))


def test_a_modules_json_that_lists_no_folders_asks_for_no_more(hub: Hub) -> None:
    got = hub((*READ, "modules.json", "model.safetensors", "1_Pooling/config.json"), [{"path": ""}])
    assert got == sorted((*READ, "modules.json", "model.safetensors"))


def test_gguf_files_are_looked_for_only_where_there_are_no_weights(hub: Hub) -> None:
    assert hub((*READ, "m-Q8_0.gguf", *TORCH)) == sorted((*READ, *TORCH))
    for path in (*TORCH, *SAFETENSORS):
        assert not Path(path).exists()


def test_a_repository_of_settings_and_gguf_files_is_told_how_they_are_named(hub: Hub) -> None:
    with pytest.raises(FrontendError, match=r"^org/m holds GGUF models only: give one of org/m:m-Q8_0\.gguf$"):
        hub((*READ, "m-Q8_0.gguf"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError, "org/m@v2 is gated: accept its terms on huggingface.co and run `hf auth login`"),
        (errors.RevisionNotFoundError, "org/m has no revision 'v2' on the Hugging Face hub"),
        (errors.RepositoryNotFoundError, "there is no directory org/m@v2, and no such model on the Hugging Face hub"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(error: Callable[..., Exception], said: str) -> None:
    with pytest.raises(FrontendError) as caught, source.asking_hub("org/m", "v2"):
        raise error("no", response=SimpleNamespace(headers={}, request=None))
    assert str(caught.value) == said


def test_a_hub_that_cannot_be_asked_is_said_in_one_line() -> None:
    with pytest.raises(FrontendError) as caught, source.asking_hub("org/m", None):
        raise OSError("no\n net " + "x" * 200)
    assert str(caught.value) == (
        f"there is no directory org/m, and the Hugging Face hub cannot be asked (OSError: no net {'x' * 153})"
    )
    with pytest.raises(FrontendError, match=r"^ours$"), source.asking_hub("org/m", None):
        raise FrontendError("ours")


@pytest.mark.parametrize("name", ["m", "org/m", "o.r-g_1/m.2-b", "a" * 96 + "/" + "b" * 96])
def test_names_of_the_hub_are_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(asked: str, revision: object, **patterns: object) -> str:
        assert (asked, revision) == (name, None)
        raise OSError("asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FrontendError, match="asked"):
        source.resolve(name)


@pytest.mark.parametrize("name", ["-m", "a/b/c", "org/", "/m", "m n", ".", "..x/y", "a" * 97, "org/" + "b" * 97])
def test_what_is_no_name_of_the_hub_is_a_directory_that_is_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(FrontendError, match=r"there is no directory .*: give the one that holds config\.json"):
        source.resolve(name)


def test_a_path_is_never_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(FrontendError, match="there is no directory someone/model: give"):
        source.resolve(Path("someone/model"))
    with pytest.raises(FrontendError, match="the model's name is empty"):
        source.resolve("")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert source.resolve("~/m") == tmp_path / "m"


@pytest.mark.parametrize("suffix", [*(key for key in source._FORMATS if key.startswith(".")), ".txt", ""])
def test_a_file_is_no_directory(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.touch()
    kind = source._FORMATS.get(suffix, "a file: give the directory that holds config.json and the weights")
    with pytest.raises(FrontendError) as caught:
        source.resolve(path)
    assert str(caught.value) == f"{path} is {kind}"


def test_links_may_lead_within_the_model_and_into_the_hubs_own_store(tmp_path: Path) -> None:
    model, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for folder in (model / "part", blobs):
        folder.mkdir(parents=True)
    (blobs / "1").touch()
    (model / "own.txt").touch()
    (model / "a.json").symlink_to("../../blobs/1")
    (model / "b.json").symlink_to("own.txt")
    (model / "part" / "c.json").symlink_to("../own.txt")
    (model / "readme.md").symlink_to("/etc/hostname")  # is not read
    source.check_links(model, model)
    source.check_links(model / "part", model)
    (tmp_path / "secret").touch()
    for name in ("config.json", "t.jinja", "v.txt", "s.model", "q.tiktoken", "w.safetensors", "w.bin"):
        (model / name).symlink_to("../../secret")
        with pytest.raises(FrontendError, match=f"{name} links to .*secret, outside the model's directory: copy"):
            source.check_links(model, model)
        (model / name).unlink()
    (model / "out").symlink_to("../../blobs")
    with pytest.raises(FrontendError, match="out leads outside the model's directory"):
        source.check_links(model / "out", model)


def test_only_the_hubs_cache_has_a_store_beside_its_models(tmp_path: Path) -> None:
    model, blobs = tmp_path / "models" / "abc", tmp_path / "blobs"
    model.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").touch()
    (model / "a.json").symlink_to("../../blobs/1")
    with pytest.raises(FrontendError, match="outside the model's directory"):
        source.check_links(model, model)


def said_of(directory: Path, **files: object) -> str:
    """What is said of a directory with these files; empty if it may be a model."""
    directory.mkdir()
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(json.dumps(content))
    try:
        source.require_checkpoint(directory)
    except FrontendError as error:
        return str(error)
    return ""


def test_a_directory_without_settings_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    known = said_of(tmp_path / "a", tf_model__h5=1, params__json=1, x__txt=1)
    assert known == f"{tmp_path / 'a'} has no config.json, and params.json is {source._FORMATS['params.json']}"
    assert "and m.h5 is a TensorFlow checkpoint" in said_of(tmp_path / "b", m__h5=1)
    assert said_of(tmp_path / "c", m__h5=1, config__json={}) == ""
    assert said_of(tmp_path / "d", m__h5=1, modules__json=[]) == ""
    assert said_of(tmp_path / "e", model__safetensors=1, pytorch_model__bin=1) == ""  # who reads them says the rest


ADAPTERS: dict[str, tuple[dict[str, object], tuple[str, ...], str]] = {
    "one that can be merged": (
        {"adapter_config__json": {"peft_type": "LORA", "base_model_name_or_path": "x/y"}, "config__json": {}},
        ("holds a LORA adapter of x/y (adapter_config.json), which llmc does not apply: compile the model that it is "
         "for with --lora ", f", or {source.MERGE}"),
        "take the adapter's files away",
    ),
    "beside weights": (
        {"adapter_config__json": {"peft_type": "IA3"}, "model-1__safetensors": 1},
        ("holds an IA3 adapter (adapter_config.json)",
         f", or {source.MERGE}, or take the adapter's files away to compile the weights beside it"),
        " of ",
    ),
    "beside torch's weights": (
        {"adapter_config__json": {"peft_type": "ADALORA", "base_model_name_or_path": ""}, "pytorch_model__bin": 1},
        ("holds an ADALORA adapter (", "or take the adapter's files away"),
        " of ",
    ),
    "prompts": (
        {"adapter_config__json": {"peft_type": "PREFIX_TUNING"}},
        ("holds a PREFIX_TUNING adapter", ": it is no change of weights, so that it cannot be merged"),
        ";",
    ),
    "prompts beside weights": (
        {"adapter_config__json": {"peft_type": "P_TUNING"}, "model__safetensors": 1},
        ("holds a P_TUNING adapter", "cannot be merged; take the adapter's files away"),
        "peft",
    ),
    "without settings": (
        {"adapter_model__safetensors": 1, "config__json": {}},
        (f"holds an adapter (adapter_model.safetensors), which llmc does not apply: {source.MERGE}",),
        "--lora",
    ),
    "of no kind": (
        {"adapter_config__json": {"peft_type": 7, "base_model_name_or_path": ["x"]}},
        ("holds an adapter (adapter_config.json)", "--lora"),
        " of ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_named_with_what_can_be_done(case: str, tmp_path: Path) -> None:
    files, parts, never = ADAPTERS[case]
    said = said_of(tmp_path / "m", **files)
    assert all(part in said for part in parts)
    assert never not in said.replace(str(tmp_path), "")


def test_other_files_of_an_adapters_name_are_no_adapter(tmp_path: Path) -> None:
    assert said_of(tmp_path / "m", adapter_model__md=1, config__json={}) == ""


def test_an_adapter_of_long_names_is_named_in_part(tmp_path: Path) -> None:
    said = said_of(tmp_path / "m", adapter_config__json={"peft_type": "B" * 99, "base_model_name_or_path": "n" * 199})
    assert f"holds a {'B' * 38} of {'n' * 96} (" in said


def test_adapters_in_folders_are_listed(tmp_path: Path) -> None:
    assert source.adapters_below(tmp_path) == ()
    for name in ("b" * 150, "a" * 150):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    (note,) = source.adapters_below(tmp_path)
    assert note.endswith(f"one is loaded: {'a' * 150}, {'b' * 48}")


def test_a_path_below_is_one_on_every_system() -> None:
    for path in ("a", "a/b", "1_Pooling", "a.b/c-d"):
        assert source.is_below(path)
    for path in ("", ".", "/a", "..", "a/../b", "a\\b", "a\0b", "a*", "a?b", "[a]", "c:a"):
        assert not source.is_below(path)
    assert source.module_paths(Path("nowhere/modules.json")) == []
