"""Where a GGUF model is: a file of any name, all parts of one that was split, the one in a directory."""

from __future__ import annotations

import re
from pathlib import Path

from llmc.errors import FrontendError
from llmc.frontends.gguf.reader import GgufFile, is_gguf

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 4096
_OTHER = "mmproj"  # files of vision and sound that lie beside a model of text


def gguf_source(source: str | Path) -> Path | None:
    """The (first) GGUF file that a source is: itself, the one in a directory that has no other weights, or the one that
    `org/name:TAG` names on the Hugging Face hub, which is downloaded.

    FrontendError for a directory with several models; None for what is something else.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path if path.suffix == ".gguf" or is_gguf(path) else None
    if not path.exists() and isinstance(source, str):
        from llmc.frontends.gguf.hub import hub_file

        return hub_file(source)
    if not path.is_dir() or any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*.bin*")):
        return None
    if (path / "config.json").exists() and any(path.glob("**/*.onnx")):
        return None
    models = [file for file in sorted(path.glob("*.gguf")) if not is_other_part(file.name) and is_first_part(file.name)]
    if len(models) > 1:
        names = ", ".join(file.name for file in models[:8]) + (" and more" if len(models) > 8 else "")
        raise FrontendError(f"{path} holds several GGUF models: give the path of one of {names}")
    return models[0] if models else None


def is_first_part(name: str) -> bool:
    """Whether a file's name says nothing of parts, or that it is the first."""
    part = _PART.fullmatch(name)
    return part is None or int(part[2]) == 1


def is_other_part(name: str) -> bool:
    """Whether a file is the vision or sound part of a model."""
    return name.rpartition("/")[2].startswith(_OTHER)


def part_names(name: str) -> list[str]:
    """The names of all parts of the model whose first one has this name."""
    part = _PART.fullmatch(name)
    if part is None or not 1 <= int(part[3]) <= _MOST_PARTS:
        return [name]
    return [f"{part[1]}-{number:05}-of-{part[3]}.gguf" for number in range(1, int(part[3]) + 1)]


def model_name(path: Path) -> str:
    """The file's name without what says that it is a part, or a GGUF file."""
    part = _PART.fullmatch(path.name)
    return part[1] if part else path.name.removesuffix(".gguf")


def open_files(path: Path) -> list[GgufFile]:
    """The file, or all parts of the model that it is a part of, in their order."""
    first = GgufFile(path)
    count = first.metadata.get("split.count")
    part = _PART.fullmatch(path.name)
    if not isinstance(count, int) or count < 2:
        return [first]
    if part is None or int(part[3]) != count:
        raise FrontendError(
            f"{path} is one of {count} parts of a model, which its name must say: NAME-00001-of-{count:05}.gguf"
        )
    if count > _MOST_PARTS:
        raise FrontendError(f"{path} claims to be one of {count} parts; at most {_MOST_PARTS} are read")
    files: list[GgufFile] = []
    for number in range(1, count + 1):
        place = path.with_name(f"{part[1]}-{number:05}-of-{count:05}.gguf")
        if not place.is_file():
            raise FrontendError(f"{path} is one of {count} parts, and {place.name} is missing: download it too")
        file = first if number == int(part[2]) else GgufFile(place)
        if file.metadata.get("split.count") != count or file.metadata.get("split.no") != number - 1:
            raise FrontendError(f"{place} is not part {number} of {count}, as its name says: download the model again")
        own = [key for key in file.metadata if not key.startswith("split.")]
        strange = [key for key in own if files and file.metadata[key] != files[0].metadata.get(key)]
        if strange:
            raise FrontendError(
                f"{place} says {strange[0]!r:.80} otherwise than {files[0].path.name}: is it a part of it?"
            )
        files.append(file)
    expected = files[0].metadata.get("split.tensors.count")
    found = sum(len(file.tensors) for file in files)
    if expected is not None and expected != found:
        raise FrontendError(f"{path}: its parts have {found} tensors, and should have {expected}")
    return files
