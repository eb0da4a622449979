"""Where a model is: a local directory, or a name on the Hugging Face hub that is downloaded into its cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from llmc.errors import FrontendError
from llmc.frontends.hf.config import read_json, read_json_list

# What a model needs, and never code.
_ALWAYS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_SAFETENSORS = ("*.safetensors",)
_TORCH = ("pytorch_model*.bin",)
# Other copies of the same weights, and whatever stands in folders.
_NEVER = ("*/*", "consolidated*", "*.onnx*", "*.gguf", "*.py", "training_args*", "optimizer*", "trainer_state*")
# Weights in formats that are not read, by file name or suffix: what they are, and what to do.
_ORIGINAL = "compile the original that it was made from, a directory with config.json and safetensors"
_FORMATS = {
    ".ggml": f"a GGML file, which is not read: {_ORIGINAL}",
    ".pth": "a checkpoint in the form that its trainer wrote, which is not read: convert it to the form of "
    "transformers (transformers has convert_*_weights_to_hf.py scripts), or take the model's own -hf version",
    ".pt": "a file of torch's own, which is not read: save the model with transformers' save_pretrained",
    ".ckpt": "a training checkpoint, which is not read: save the model with transformers' save_pretrained",
    ".h5": "a TensorFlow checkpoint, which is not read: save the model with transformers' save_pretrained",
    ".msgpack": "a Flax checkpoint, which is not read: save the model with transformers' save_pretrained",
    ".nemo": "a NeMo checkpoint, which is not read: convert it to the form of transformers",
    ".mnn": f"an MNN model, which is not read: {_ORIGINAL}",
    ".tflite": f"a TFLite model, which is not read: {_ORIGINAL}",
    ".safetensors": "weights alone: give the directory that holds them beside their config.json",
    ".bin": "weights alone: give the directory that holds them beside their config.json",
    "params.json": "the settings of a checkpoint in its trainer's own form, which is not read: convert it to the form "
    "of transformers, or take the model's own -hf version",
    "model_index.json": "a diffusion pipeline, which llmc does not compile: it compiles models of text",
}
MERGE = "merge it with peft (merge_and_unload, then save_pretrained) and compile the result"
# Adapters of PEFT that add tokens or keys and values in front, or layers with gates: there is nothing to merge.
_PROMPT_ADAPTERS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
)  # fmt: skip
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")
_READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".bin")


def resolve(source: str | Path) -> Path:
    """The directory of `source`: a path, or `organization/name[@revision]`; FrontendError in one line otherwise."""
    if not str(source):
        raise FrontendError("the model's name is empty: give its directory, or its name on the Hugging Face hub")
    path = Path(source).expanduser()
    if path.is_dir():
        check_links(path, path)
        require_checkpoint(path)
        return path
    if path.exists():
        known = _FORMATS.get(path.suffix, "")
        raise FrontendError(
            f"{source} is {known}" if known else
            f"{source} is a file: give the directory that holds config.json and the weights"
        )  # fmt: skip
    name, _, revision = str(source).partition("@")
    if isinstance(source, Path) or not _HUB_NAME.match(name):
        raise FrontendError(f"there is no directory {source}: give the one that holds config.json and the weights")
    return _download(name, revision or None)


def check_links(directory: Path, model: Path) -> None:
    """Files that a directory of `model` holds lie in the model; the hub's cache alone may link to its own store."""
    root = model.resolve()
    if not directory.resolve().is_relative_to(root):
        raise FrontendError(f"{directory} leads outside the model's directory: copy it instead")
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for path in sorted(directory.iterdir()):
        if path.suffix in _READ and path.is_symlink():
            target = path.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                raise FrontendError(f"{path} links to {target}, outside the model's directory: copy the file instead")


def module_paths(path: Path) -> list[str]:
    """The folders that a modules.json of sentence-transformers names, below its own; empty if there is no such file."""
    if not path.exists():
        return []
    entries = read_json_list(path)
    found = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return [below for below in found if isinstance(below, str) and is_below(below)]


def is_below(path: str) -> bool:
    """Whether a relative path names something below where it starts, on every system, and no pattern."""
    pure = PurePosixPath(path)
    return bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and not set(path) & set("\\\0*?[:")


@contextlib.contextmanager
def asking_hub(name: str, revision: str | None) -> Iterator[None]:
    """What goes wrong between here and the hub as FrontendErrors in one line."""
    from huggingface_hub import errors

    shown = f"{name}@{revision}" if revision else name
    try:
        yield
    except FrontendError:
        raise
    except errors.GatedRepoError:
        raise FrontendError(f"{shown} is gated: accept its terms on huggingface.co and run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise FrontendError(f"{name} has no revision {revision!r} on the Hugging Face hub") from None
    except errors.RepositoryNotFoundError:
        raise FrontendError(f"there is no directory {shown}, and no such model on the Hugging Face hub") from None
    except Exception as error:  # connection errors of several libraries
        why = " ".join(str(error).split())[:160]
        raise FrontendError(
            f"there is no directory {shown}, and the Hugging Face hub cannot be asked ({type(error).__name__}: {why})"
        ) from None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: tuple[str, ...], never: tuple[str, ...] = _NEVER) -> Path:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(never))
        )

    with asking_hub(name, revision):
        directory = fetch(_ALWAYS + _SAFETENSORS)
        if not any(directory.glob("*.safetensors")):
            directory = fetch(_ALWAYS + _TORCH)
        if (directory / "modules.json").exists():
            # The modules of a sentence-transformers model lie in folders of their own.
            folders = module_paths(directory / "modules.json")
            wanted = tuple(f"{folder}/{file}" for folder in folders for file in (*_ALWAYS, *_SAFETENSORS, *_TORCH))
            directory = fetch(wanted, tuple(f"{folder}/*/*" for folder in folders)) if folders else directory
        elif not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
            from llmc.frontends.gguf.hub import listed, models_of

            models = models_of(name, revision)
            if models:
                raise FrontendError(f"{name} holds GGUF models only: {listed(name, models)}")
    check_links(directory, directory)
    require_checkpoint(directory)
    return directory


def require_checkpoint(directory: Path) -> None:
    """FrontendError for a directory in another format than that of transformers, or with an adapter in it."""
    adapter = directory / "adapter_config.json"
    if adapter.exists():
        raise FrontendError(_adapter(directory, read_json(adapter), adapter.name))
    for weights in sorted(path for path in directory.glob("adapter_model*") if path.suffix in _READ):
        raise FrontendError(_adapter(directory, {}, weights.name))
    if (directory / "config.json").exists() or (directory / "modules.json").exists():
        return
    for path in sorted(directory.iterdir()):
        # What is missing beside files that are read is said by who reads them.
        if path.name in _FORMATS or (path.suffix in _FORMATS and path.suffix not in _READ):
            found = _FORMATS.get(path.name) or _FORMATS[path.suffix]
            raise FrontendError(f"{directory} has no config.json, and {path.name} is {found}")


def adapters_below(directory: Path) -> tuple[str, ...]:
    """A note on adapters in folders of a checkpoint, where PEFT keeps those that have names: transformers loads the
    checkpoint without them."""
    names = sorted(path.parent.name for path in directory.glob("*/adapter_config.json"))
    if not names:
        return ()
    return (f"adapters in folders are left out, as transformers does until one is loaded: {', '.join(names):.200}",)


def _adapter(directory: Path, described: dict[str, object], file: str) -> str:
    kind, base = described.get("peft_type"), described.get("base_model_name_or_path")
    what = f"a{'n' if str(kind)[:1] in 'AI' else ''} {kind} adapter" if isinstance(kind, str) else "an adapter"
    of = f" of {base}" if isinstance(base, str) and base else ""
    beside = any(directory.glob("model*.safetensors*")) or any(directory.glob("pytorch_model*.bin*"))
    away = "take the adapter's files away to compile the weights beside it"
    if kind in _PROMPT_ADAPTERS:
        advice = "it is no change of weights, so that it cannot be merged" + (f"; {away}" if beside else "")
    else:
        with_base = f"compile the model that it is for with --lora {directory}, or " if described else ""
        advice = with_base + MERGE + (f", or {away}" if beside else "")
    return f"{directory} holds {what:.40}{of:.100} ({file}), which llmc does not apply: {advice}"
