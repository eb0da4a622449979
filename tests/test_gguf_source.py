"""Where a GGUF model is: in a folder, in one file, or in the parts of one that was split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_files import write

from llmc.errors import FrontendError
from llmc.frontends.gguf.source import (
    gguf_source,
    is_first_part,
    is_other_part,
    model_name,
    open_files,
    part_names,
)

METADATA = {"general.architecture": "llama", "a.int": 7}


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def split(folder: Path, parts: int = 3) -> list[Path]:
    paths = []
    for number in range(parts):
        metadata: dict[str, object] = {"split.no": number, "split.count": parts, "split.tensors.count": parts}
        metadata |= METADATA if number == 0 else {}
        path = folder / f"m-{number + 1:05}-of-{parts:05}.gguf"
        paths.append(write(path, metadata, {f"t{number}": ("F32", values(4))}))
    return paths


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:  # any of them may be given
        assert [list(file.tensors) for file in open_files(path)] == [["t0"], ["t1"], ["t2"]]
    assert gguf_source(tmp_path) == paths[0] and model_name(paths[1]) == "m"
    paths[1].unlink()
    with pytest.raises(FrontendError, match=r"m-00002-of-00003.gguf is missing"):
        open_files(paths[0])
    write(paths[1], {"split.no": 2, "split.count": 3}, {"t1": ("F32", values(4))})
    with pytest.raises(FrontendError, match="is not part 2 of 3"):
        open_files(paths[0])
    write(paths[1], {"split.no": 1, "split.count": 3}, {})
    with pytest.raises(FrontendError, match="have 2 tensors, and should have 3"):
        open_files(paths[0])
    write(paths[1], {"split.no": 1, "split.count": 3, "a.int": 8}, {"t1": ("F32", values(4))})
    with pytest.raises(FrontendError, match="otherwise than"):
        open_files(paths[0])
    other = write(tmp_path / "renamed.gguf", {"split.no": 0, "split.count": 3}, {})
    with pytest.raises(FrontendError, match="its name must say"):
        open_files(other)


def test_parts_that_are_not_as_they_say(tmp_path: Path) -> None:
    def wrong(said: str, metadata: dict[str, object], name: str = "m-00002-of-00003.gguf") -> None:
        paths = split(tmp_path)
        write(tmp_path / name, metadata, {"t1": ("F32", values(4))})
        with pytest.raises(FrontendError, match=said):
            open_files(paths[0] if name.startswith("m-") else tmp_path / name)

    for count, number in ((2, 1), (4, 1), (3, 0), (3, 2)):
        wrong("is not part 2 of 3", {"split.no": number, "split.count": count})
    wrong("'a.int' otherwise than m-00001-of-00003.gguf", {"split.no": 1, "split.count": 3, "a.int": 6})
    wrong("'new' otherwise than", {"split.no": 1, "split.count": 3, "a.int": 7, "new": 1})
    for name in ("x-00002-of-00004.gguf", "x-00002-of-00002.gguf", "x-2-of-3.gguf"):
        wrong(
            r"one of 3 parts of a model, which its name must say: NAME-00001-of-00003\.gguf", {"split.count": 3}, name
        )
    for count in (0, 1, -3, "3", True):  # a model of one part, whatever it is called
        path = write(tmp_path / "x-00001-of-00003.gguf", {"split.count": count}, {})
        assert [file.path for file in open_files(path)] == [path]
    for more, said in ((0, "m-00001-of-04096.gguf is missing"), (1, "claims to be one of 4097 parts; at most 4096")):
        path = write(tmp_path / f"m-00002-of-0{4096 + more}.gguf", {"split.count": 4096 + more}, {})
        with pytest.raises(FrontendError, match=said):
            open_files(path)
    paths = split(tmp_path, 2)
    write(paths[0], {"split.no": 0, "split.count": 2, "split.tensors.count": 1, "a.int": 7}, {"t0": ("F32", values(4))})
    write(paths[1], {"split.no": 1, "split.count": 2, "a.int": 7}, {"t1": ("F32", values(4))})
    with pytest.raises(FrontendError, match="have 2 tensors, and should have 1"):
        open_files(paths[0])
    write(paths[0], {"split.no": 0, "split.count": 2}, {})
    write(paths[1], {"split.no": 1, "split.count": 2}, {})
    assert len(open_files(paths[1])) == 2  # that do not say how many tensors there are


def test_names_of_parts() -> None:
    assert [is_first_part(f"m-{number:05}-of-00009.gguf") for number in range(4)] == [False, True, False, False]
    assert is_first_part("m.gguf") and is_first_part("m-1-of-2.gguf")
    assert part_names("a/m-00001-of-00002.gguf") == ["a/m-00001-of-00002.gguf", "a/m-00002-of-00002.gguf"]
    for name in ("m.gguf", "m-00001-of-00001.gguf", "m-00001-of-00000.gguf", "m-00001-of-04097.gguf"):
        assert part_names(name) == [name]
    names = part_names("m-00003-of-04096.gguf")
    assert len(names) == 4096 and names[-1] == "m-04096-of-04096.gguf"
    for name, other in (("mmproj-m.gguf", True), ("a/mmproj.gguf", True), ("mmproj/m.gguf", False), ("m.gguf", False)):
        assert is_other_part(name) is other
    assert model_name(Path("a/m.gguf")) == "m" and model_name(Path("a/m-00002-of-00003.gguf")) == "m"


def test_a_folder_with_other_weights_is_no_gguf_model(tmp_path: Path) -> None:
    one = write(tmp_path / "one.gguf", METADATA, {})
    others = {"pytorch_model.bin": True, "pytorch_model-1.bin.index": True, "model.safetensors.index.json": True}
    for name, is_model in (others | {"pytorch_model.txt": False, "model.bin": False, "config.json": False}).items():
        (tmp_path / name).touch()
        assert gguf_source(tmp_path) == (None if is_model else one)
        (tmp_path / name).unlink()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "m.onnx").touch()
    assert gguf_source(tmp_path) == one
    (tmp_path / "config.json").touch()
    assert gguf_source(tmp_path) is None
    assert gguf_source(one) == one and gguf_source(tmp_path / "org/missing") is None
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert gguf_source(empty) == empty  # by its name, to be refused with a reason


@pytest.mark.parametrize("count", [8, 9])
def test_some_of_the_models_of_a_folder_are_named(tmp_path: Path, count: int) -> None:
    for number in range(count):
        write(tmp_path / f"m{number}.gguf", METADATA, {})
    with pytest.raises(FrontendError, match=r"one of m0\.gguf, .*, m7\.gguf" + (" and more$" if count > 8 else "$")):
        gguf_source(tmp_path)


def test_where_a_model_is(tmp_path: Path) -> None:
    blob = write(tmp_path / "sha256-0123", METADATA, {})
    assert gguf_source(blob) == blob  # as ollama stores it, known by its first bytes
    (tmp_path / "other").write_bytes(b"nothing of the kind")
    assert gguf_source(tmp_path / "other") is None
    assert gguf_source(tmp_path / "missing.gguf") is None
    folder = tmp_path / "folder"
    folder.mkdir()
    assert gguf_source(folder) is None
    one = write(folder / "one-Q4_K_M.gguf", METADATA, {})
    write(folder / "mmproj-one.gguf", METADATA, {})
    assert gguf_source(folder) == one
    write(folder / "one-Q8_0.gguf", METADATA, {})
    with pytest.raises(FrontendError, match=r"several GGUF models: .*one-Q4_K_M.gguf, one-Q8_0.gguf$"):
        gguf_source(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert gguf_source(folder) is None
