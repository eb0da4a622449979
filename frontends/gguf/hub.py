"""GGUF files on the Hugging Face hub: `org/name:Q4_K_M`, or with a file's name behind the colon."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from llmc.errors import FrontendError
from llmc.frontends.gguf.source import is_first_part, is_other_part, part_names

_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,100}))?:([\w./-]{1,200})")


def hub_file(source: str) -> Path | None:
    """The (first) file that `org/name[@revision]:TAG` names, downloaded into the hub's cache with all of its parts;
    None for another text. FrontendError where there is no such file, or several, with the list of those that are."""
    found = _NAME.fullmatch(source)
    if found is None:
        return None
    name, revision, tag = found[1], found[2], found[3]
    from huggingface_hub import hf_hub_download

    from llmc.frontends.hf.source import asking_hub

    with asking_hub(name, revision):
        file = choose(name, tag, models_of(name, revision))
        paths = [Path(hf_hub_download(name, part, revision=revision)) for part in part_names(file)]
    return paths[0]


def models_of(name: str, revision: str | None) -> list[str]:
    """The models of text among a repository's GGUF files, the first part of each."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(name, revision=revision)
    return sorted(file for file in files if file.endswith(".gguf") and not is_other_part(file) and is_first_part(file))


def choose(name: str, tag: str, files: list[str]) -> str:
    """The file of that name, or the only one with that word in its name, such as Q4_K_M."""
    if tag in files:
        return tag
    word = re.compile(rf"(?:^|[-._/]){re.escape(tag)}(?:[-./]|$)", re.IGNORECASE)
    found = [file for file in files if word.search(file)]
    if len(found) != 1:
        what = f"several files are {tag!r:.60}" if found else f"none of its files is {tag!r:.60}"
        raise FrontendError(f"{name}: {what}: {listed(name, found or files)}")
    return found[0]


def listed(name: str, files: list[str]) -> str:
    """How to name each of the files."""
    if not files:
        return "it has no GGUF model of text"
    names = ", ".join(f"{name}:{PurePosixPath(file)}" for file in files[:12])
    return f"give one of {names}" + (f" (and {len(files) - 12} more)" if len(files) > 12 else "")
