"""The cache folder of compiled artifacts, whose names are hashes of everything that could change an artifact."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import llmc
from llmc.errors import ArtifactError, CompileError
from llmc.files import cache_folder

if TYPE_CHECKING:
    from llmc.compiler.options import CompileOptions

Wanted = Callable[[str], bool]

_READ_WHOLE = 1 << 20  # smaller files are hashed; of larger ones size and time are enough
_MODEL_FILES = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".tiktoken",
    ".safetensors",
    ".bin",
    ".onnx",
    ".onnx_data",
    ".data",
)


def path_for(directory: Path, options: CompileOptions, by_content: bool = False, more: str = "") -> Path:
    """Where the artifact of this model with these options belongs. by_content: hash large files too.

    more: what else decides about the artifact, such as which of the directory's files is the model.
    """
    from llmc.targets import machine_named

    facts = {
        "llmc": llmc.__version__,
        "code": code_hash(),
        "machine": machine_named(options.target).key,
        "options": options.as_json(),
        "model": model_hash(directory, by_content),
        "more": more,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    # A folder in the hub's cache is named by its commit; the model's name stands two levels above.
    name = directory.parent.parent.name if directory.parent.name == "snapshots" else directory.resolve().name
    name = re.sub(r"[^\w.-]+", "-", name.removeprefix("models--"))[:60]
    return cache_folder() / "artifacts" / f"{name}-{options.quantization}-{key}.so"


def model_hash(directory: Path, by_content: bool = False) -> str:
    """Changes when a file of the model does: names, sizes, and content or times."""
    from llmc.frontends.hf.source import module_paths

    digest = hashlib.sha256()
    try:
        # sentence-transformers keeps settings and small weights in folders.
        folders = [directory, *(directory / below for below in module_paths(directory / "modules.json"))]
        for path in (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())):
            if path.suffix not in _MODEL_FILES or not path.is_file():
                continue
            facts = path.stat()
            digest.update(f"{path.name}\0{facts.st_size}\0".encode())
            if by_content or facts.st_size <= _READ_WHOLE:
                with path.open("rb") as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
            else:
                digest.update(str(facts.st_mtime_ns).encode())
    except OSError as error:
        raise CompileError(f"{error.filename} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


@functools.cache
def code_hash() -> str:
    """Changes when the code that makes artifacts does, so that a developer never runs an old one."""
    import llmc.compiler
    import llmc.frontends
    import llmc.runtime
    import llmc.targets

    digest = hashlib.sha256()
    for package in (llmc.compiler, llmc.frontends, llmc.targets, llmc.runtime):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".c", ".h"):
                digest.update(f"{package.__name__}/{path.relative_to(folder)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """The cache folder, made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"the cache folder {folder} cannot be made ({error.strerror}): set LLMC_CACHE_DIR to another"
        ) from error


def link_or_copy(source: Path, target: Path) -> None:
    """`target` with the content of `source`, in place of what was there."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
