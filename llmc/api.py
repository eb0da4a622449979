"""The Python front door: compile a model to a file, or into a cache folder and load it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from llmc import artifact_cache
from llmc.errors import ArtifactError, CompileError, LlmcError

if TYPE_CHECKING:
    from llmc.compiler.options import CompileOptions
    from llmc.compiler.progress import Progress
    from llmc.frontends.hf.stored.writing import Written
    from llmc.runtime.runtime import Runtime

# The names that other libraries use for what -q calls them.
_SCHEME_NAMES = {
    "f32": "none", "fp32": "none", "float32": "none", "float16": "f16", "fp16": "f16", "bfloat16": "bf16",
    "i8": "int8", "i4": "int4",
}  # fmt: skip


@runtime_checkable
class Saves(Protocol):
    """A transformers model or tokenizer: all that is asked of it is to write itself to a folder."""

    def save_pretrained(self, folder: str) -> object:
        """Writes config and weights, or the tokenizer's files."""


Source = str | os.PathLike[str] | Saves


def make_options(dtype: str = "auto", **options: object) -> CompileOptions:
    """`CompileOptions` by keyword; CompileError names an option that there is none of, or a value out of range."""
    from llmc.compiler.options import CompileOptions

    known = {f.name for f in dataclasses.fields(CompileOptions)} - {"quantization"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise CompileError(f"unknown option {', '.join(unknown)}; the options are dtype, {', '.join(sorted(known))}")
    if options.get("lora", ()) is None:
        del options["lora"]
    if isinstance(options.get("lora"), (str, os.PathLike)):
        options["lora"] = (os.fspath(options["lora"]),)  # type: ignore[call-overload]
    for name in ("overrides", "max_dims", "dims"):
        pairs = options.get(name)
        if isinstance(pairs, Mapping):
            options[name] = tuple(pairs.items())
    return CompileOptions(quantization=_SCHEME_NAMES.get(dtype, dtype), **options)  # type: ignore[arg-type]


def compile(
    model: Source,
    output: str | os.PathLike[str],
    dtype: str = "auto",
    tokenizer: Source | None = None,
    progress: Progress | None = None,
    **options: object,
) -> dict[str, object]:
    """Compiles a model into the artifact `output`, all or nothing, and returns the artifact's manifest.

    model: a directory, a .gguf or .onnx file, a name on the Hugging Face hub, or a transformers model. dtype: "int8",
    "int6", ... "int2", "bf16", "f16" or "f32" ("none"); "auto" is int4, and for an encoder the fewest bits that stay
    near to it. tokenizer: where its own is not the one to use. options: the fields of `CompileOptions`, such as
    target="x86-64-v3", group_size=32, max_context=4096, overrides={"*.down_proj*": "int8"}, lora="adapter",
    max_dims={"batch": 16}, dims={"height": 48}. Raises `LlmcError`.
    """
    from llmc.compiler.pipeline import compile_model
    from llmc.compiler.scratch import scratch_folder

    chosen = make_options(dtype, **options)
    with scratch_folder() as folder:
        onnx = _onnx_file(model)
        if onnx is not None:
            return compile_model(
                str(onnx), Path(output), chosen, progress, tokenizer=_tokenizer_directory(tokenizer, folder)
            )
        gguf = _gguf_file(model, tokenizer)
        source = _as_source(model, tokenizer, folder) if gguf is None else str(gguf)
        return compile_model(source, Path(output), chosen, progress)


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str = "int4",
    form: str = "compressed-tensors",
    progress: Progress | None = None,
    **options: object,
) -> Written:
    """Writes a model as a quantized checkpoint that other tools read, into the new directory `output`, all or nothing.

    model: a directory, or a name on the Hugging Face hub. dtype: "int4", "int8" or, for form "gptq", "int2". form:
    "compressed-tensors" or "gptq". options: the fields of `QuantizeOptions`, such as group_size=32 or
    calibrate="none". Raises `LlmcError`.
    """
    from llmc.compiler.quantized_checkpoint import QuantizeOptions, rounded_matrices
    from llmc.frontends.hf.stored.writing import Original, form_of, write_checkpoint

    known = {field.name for field in dataclasses.fields(QuantizeOptions)} - {"bits"}
    if unknown := sorted(set(options) - known):
        raise CompileError(f"unknown option {', '.join(unknown)}; the options are {', '.join(sorted(known))}")
    bits = int(dtype[3:]) if dtype.startswith("int") and dtype[3:].isdecimal() else 0
    chosen_form, chosen = form_of(form, bits), QuantizeOptions(bits, **options)  # type: ignore[arg-type]
    chosen.compile_options()  # refuses what is out of range before anything is read
    rounded = rounded_matrices(str(model), chosen, progress)
    return write_checkpoint(
        Original.read(os.fspath(model)), Path(output), chosen_form, bits, chosen.group_size, rounded
    )


def from_hf(
    model_or_dir: Source,
    tokenizer: Source | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Runtime:
    """Compiles a model into the cache folder, unless it is there already, and loads it.

    model_or_dir, tokenizer, dtype, options: as for `compile`. threads: as for `Runtime.load`. The artifact can be kept
    with `.save(path)`. The cache is `$LLMC_CACHE_DIR/artifacts`, or `~/.cache/llmc/artifacts`.
    """
    from llmc.runtime.runtime import Runtime

    chosen = make_options(dtype, **options)
    path = cached_artifact(model_or_dir, tokenizer, chosen, progress)
    try:
        return Runtime.load(path, threads)
    except ArtifactError:  # damaged where it lay: it can be made again
        path.unlink(missing_ok=True)
        return Runtime.load(cached_artifact(model_or_dir, tokenizer, chosen, progress), threads)


def cached_artifact(
    model: Source, tokenizer: Source | None, options: CompileOptions, progress: Progress | None = None
) -> Path:
    """The path of the model's artifact in the cache, compiled now if it is not there."""
    from llmc.compiler.scratch import scratch_folder

    with scratch_folder() as folder:
        onnx = _onnx_file(model)
        if onnx is not None:
            return _cached_onnx(onnx, _tokenizer_directory(tokenizer, folder), options, progress)
        gguf = _gguf_file(model, tokenizer)
        if gguf is not None:
            return _cached_gguf(gguf, options, progress)
        source = _as_source(model, tokenizer, folder)
        directory = Path(source).expanduser()
        if not directory.is_dir():
            from llmc.frontends.hf.source import resolve

            directory = resolve(source)
        by_content = directory.is_relative_to(folder)  # files just written: their times say nothing
        path = artifact_cache.path_for(directory, options, by_content)
        if not path.exists():
            from llmc.compiler.pipeline import compile_model

            artifact_cache.make_folder(path.parent)
            compile_model(str(source), path, options, progress)
        return path


def _cached_onnx(model: Path, tokenizer: Path | None, options: CompileOptions, progress: Progress | None) -> Path:
    """As `cached_artifact`, of an ONNX file."""
    from llmc.compiler.pipeline import compile_model

    if not model.exists():
        raise LlmcError(f"there is no file {model}")
    text = "" if tokenizer is None else artifact_cache.model_hash(tokenizer, by_content=True)
    path = artifact_cache.path_for(model.absolute().parent, options, more=f"{model.name} {text}")
    if not path.exists():
        artifact_cache.make_folder(path.parent)
        compile_model(str(model), path, options, progress, tokenizer=tokenizer)
    return path


def _cached_gguf(model: Path, options: CompileOptions, progress: Progress | None) -> Path:
    """As `cached_artifact`, of a GGUF file, or of the first of its parts."""
    from llmc.compiler.pipeline import compile_model
    from llmc.frontends.gguf.source import part_names

    parts = [model.with_name(name) for name in part_names(model.name)]
    facts = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts if part.exists()]
    path = artifact_cache.path_for(model.absolute().parent, options, more=repr(facts))
    if not path.exists():
        artifact_cache.make_folder(path.parent)
        compile_model(str(model), path, options, progress)
    return path


def _gguf_file(model: Source, tokenizer: Source | None) -> Path | None:
    """The GGUF file that a source is, or names; None for another source. LlmcError with a tokenizer beside it."""
    if isinstance(model, Saves):
        return None
    from llmc.frontends.gguf.source import gguf_source

    path = gguf_source(os.fspath(model))
    if path is not None and tokenizer is not None:
        raise LlmcError(f"{path} has a tokenizer of its own: another one can be given to an .onnx model only")
    return path


def _onnx_file(model: Source) -> Path | None:
    """The ONNX file that a source is, or that its directory holds instead of other weights."""
    if isinstance(model, Saves):
        return None
    from llmc.frontends import onnx_file

    return onnx_file(os.fspath(model))


def _tokenizer_directory(tokenizer: Source | None, folder: Path) -> Path | None:
    """Where a tokenizer's files are; one in memory is written to `folder`."""
    if tokenizer is None or not isinstance(tokenizer, Saves):
        return None if tokenizer is None else _directory(tokenizer)
    own = folder / "own-tokenizer"
    own.mkdir()
    _save(tokenizer, own)
    return own


def _as_source(model: Source, tokenizer: Source | None, folder: Path) -> str:
    """A directory or hub name; models that are in memory, or have another tokenizer, are written to `folder`."""
    if tokenizer is None and not isinstance(model, Saves):
        return os.fspath(model)
    target = folder / (_name_of(model) or "model")
    target.mkdir()
    if isinstance(model, Saves):
        _save(model, target)
    else:
        from llmc.frontends.hf.source import module_paths

        directory = _directory(model)
        _copy(directory, target, lambda name: True)
        for below in module_paths(directory / "modules.json"):
            if (directory / below).is_dir():
                (target / below).mkdir(parents=True, exist_ok=True)
                _copy(directory / below, target / below, lambda name: True)
    if isinstance(tokenizer, Saves):
        # Not into `target`: files there may be links to the model's own, which writing would change.
        own = folder / "own-tokenizer"
        own.mkdir()
        _save(tokenizer, own)
        _copy(own, target, lambda name: True)
    elif tokenizer is not None:
        _copy(_directory(tokenizer), target, lambda name: "token" in name or name in _TEXT_FILES)
    return str(target)


_TEXT_FILES = ("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "spiece.model")


def _name_of(model: Source) -> str:
    if isinstance(model, Saves):
        return type(model).__name__
    return Path(os.path.abspath(os.fspath(model))).name


def _save(part: Saves, target: Path) -> None:
    try:
        part.save_pretrained(str(target))
    except Exception as error:  # anything that the model's own library raises
        raise LlmcError(f"{type(part).__name__}.save_pretrained failed: {error}") from error


def _directory(source: str | os.PathLike[str]) -> Path:
    from llmc.frontends.hf.source import resolve

    return resolve(os.fspath(source))


def _copy(source: Path, target: Path, wanted: artifact_cache.Wanted) -> None:
    """Hard links where that is possible, so that weights are not written again."""
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted(path.name):
            artifact_cache.link_or_copy(path.resolve(), target / path.name)
