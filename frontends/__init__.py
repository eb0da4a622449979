"""Outside formats to graphs. Nothing else in llmc reads those formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmc.errors import FrontendError
from llmc.frontends.lifted import Lifted

__all__ = ["Lifted", "lift", "onnx_file"]


def lift(
    source: str | Path,
    *,
    max_context: int | None = None,
    weights: str = "checkpoint",
    seed: int = 0,
    tokenizer: str | Path | None = None,
    max_dims: Mapping[str, int] | None = None,
    dims: Mapping[str, int] | None = None,
    lora: Sequence[str | Path] = (),
) -> Lifted:
    """Read a model: an ONNX or GGUF file, a Hugging Face directory, or a name on the hub. No weight is loaded, no code
    runs.

    max_context: tokens a sequence may have (default: the model's own limit). weights: "checkpoint", or "random" for
    noise from `seed`. tokenizer: the directory of one, where the model has none beside it. max_dims: the greatest value
    of each free size of an ONNX graph that is not text. dims: free sizes that are numbers, in such a graph. lora:
    directories of adapters that are merged into a Hugging Face model's weights.
    """
    path = onnx_file(source)
    if path is not None:
        _no_adapters(source, lora)
        from llmc.frontends.onnx import lift as lift_onnx

        return lift_onnx(
            path, max_context=max_context, weights=weights, seed=seed, tokenizer=tokenizer, max_dims=max_dims, dims=dims
        )
    for name in sorted({**(max_dims or {}), **(dims or {})}):
        raise FrontendError(f"{source} takes text, which has no size {name!r:.60}: --max-context bounds it")
    if tokenizer is not None:
        raise FrontendError(f"{source} has a tokenizer of its own: another one can be given to an .onnx model only")
    from llmc.frontends.gguf.source import gguf_source

    path = gguf_source(source)
    if path is not None:
        _no_adapters(source, lora)
        from llmc.frontends.gguf.lift import lift as lift_gguf

        return lift_gguf(path, max_context=max_context, weights=weights, seed=seed)
    _not_several(source)
    from llmc.frontends.hf.lift import lift as lift_hf

    return lift_hf(source, max_context=max_context, weights=weights, seed=seed, lora=lora)


def _no_adapters(source: str | Path, lora: Sequence[str | Path]) -> None:
    if lora:
        raise FrontendError(f"--lora: {source} is no Hugging Face model, whose weights adapters are made for")


def onnx_file(source: str | Path) -> Path | None:
    """The ONNX file that a source is: itself, or the one in a directory that has no other weights; None otherwise."""
    path = Path(source).expanduser()
    if path.suffix.lower() == ".onnx":
        return path
    for found in _onnx_files(path):
        named = [file for file in found if file.name == "model.onnx"] or found
        if len(named) == 1:
            return named[0]
    return None


def _onnx_files(path: Path) -> list[list[Path]]:
    """Those in a directory that has no other weights, and those in its folder `onnx`."""
    if not path.is_dir() or any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*.bin*")):
        return []
    return [sorted(folder.glob("*.onnx")) for folder in (path, path / "onnx")]


def _not_several(source: str | Path) -> None:
    """FrontendError for a directory that has ONNX files alone, none of which is the one to take."""
    path = Path(source).expanduser()
    files = [str(file.relative_to(path)) for found in _onnx_files(path) for file in found]
    if files:
        shown = ", ".join(files[:6]) + (f" and {len(files) - 6} more" if len(files) > 6 else "")
        raise FrontendError(f"{source} holds several ONNX files: give one of them: {shown}")
