"""GGUF files by the names of the hub, which is played here: no test asks the real one."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from gguf_files import write

from llmc.errors import FrontendError
from llmc.frontends.gguf.hub import listed
from llmc.frontends.gguf.source import gguf_source
from llmc.frontends.hf.source import resolve

FILES = (
    "README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-F16.gguf", "big/m-BF16-00001-of-00002.gguf",
    "big/m-BF16-00002-of-00002.gguf", "m-IQ4_XS.gguf",
)  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what `org/m` holds."""
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".gguf"):
            write(path, {"general.architecture": "llama"}, {})
        else:
            path.write_text("")

    def files(self: object, name: str, revision: str | None = None) -> list[str]:
        if name != "org/m" or revision not in (None, "v2"):
            raise OSError("nobody\nknows it")
        return list(FILES)

    def download(name: str, file: str, revision: str | None = None) -> str:
        assert file in files(None, name, revision)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_a_file_is_chosen_by_a_word_of_its_name(hub: Path) -> None:
    assert gguf_source("org/m:Q4_K_M") == hub / "m-Q4_K_M.gguf"
    assert gguf_source("org/m:q8_0") == hub / "m-Q8_0.gguf"
    assert gguf_source("org/m@v2:IQ4_XS") == hub / "m-IQ4_XS.gguf"
    assert gguf_source("org/m:BF16") == hub / "big/m-BF16-00001-of-00002.gguf"
    assert gguf_source("org/m:m-Q8_0.gguf") == hub / "m-Q8_0.gguf"
    assert gguf_source("org/m") is None and gguf_source("C:/m") is None


def test_what_is_not_there_is_refused_with_what_is(hub: Path) -> None:
    with pytest.raises(FrontendError, match=r"none of its files is 'Q4': give one of .*org/m:m-Q4_K_M\.gguf"):
        gguf_source("org/m:Q4")
    with pytest.raises(FrontendError, match=r"several files are 'm': give one of"):
        gguf_source("org/m:m")
    with pytest.raises(FrontendError, match="cannot be asked") as error:
        gguf_source("org/other:Q4_0")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 12, 13, 15])
def test_some_of_many_files_are_named(count: int) -> None:
    files = [f"m{number}.gguf" for number in range(count)]
    expected = "give one of " + ", ".join(f"o/m:m{number}.gguf" for number in range(min(count, 12)))
    assert listed("o/m", files) == expected + (f" (and {count - 12} more)" if count > 12 else "")
    assert "no GGUF model" in listed("o/m", [])


def test_a_repository_of_gguf_files_only(hub: Path) -> None:
    with pytest.raises(FrontendError, match=r"org/m holds GGUF models only: give one of org/m:big/.*Q4_K_M") as error:
        resolve("org/m")
    assert "mmproj" not in str(error.value)
