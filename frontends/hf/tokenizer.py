"""Tokenizer, special tokens, chat template and generation defaults, as an artifact carries them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import FrontendError
from llmc.frontends.hf.config import quiet, read_json
from llmc.frontends.hf.generation import Generation, read_generation
from llmc.frontends.lifted import Text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_MOST_TOKENIZER_BYTES = 512 << 20
_MOST_TEMPLATE_BYTES = 4 << 20


def read_text(directory: Path, config: PreTrainedConfig) -> Text:
    """Collect what turns text into tokens and back. A model without a tokenizer is served by token ids alone."""
    generation = read_generation(directory, vocabulary_of(config))
    return text_of(*open_tokenizer(directory), directory, config, generation)


def vocabulary_of(config: PreTrainedConfig) -> int:
    """How many tokens the text model has."""
    return int(config.get_text_config(decoder=True).vocab_size)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer's files."""
    return any((directory / name).exists() for name in _FILES)


def open_tokenizer(directory: Path) -> tuple[Any | None, tuple[str, ...]]:
    """transformers' tokenizer of a directory, without limits of its own; None and a note where there is none."""
    if not has_tokenizer(directory):
        return None, ("no tokenizer: the artifact takes token ids only",)
    try:
        tokenizer = _load(directory)
    except Exception as error:  # transformers and its converters raise many kinds
        why = " ".join(str(error).split())[:200]
        raise FrontendError(f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {why})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None, (f"{type(tokenizer).__name__} has no tokenizer.json form: the artifact takes token ids only",)
    backend.no_truncation()
    backend.no_padding()
    return tokenizer, ()


def text_of(
    tokenizer: Any | None,
    notes: tuple[str, ...],
    directory: Path,
    config: PreTrainedConfig,
    generation: Generation,
) -> Text:
    """What an artifact carries of a tokenizer (None: there is none, as `notes` say), and of the model's settings of
    generation."""
    notes = (*notes, *generation.notes)
    if tokenizer is None:
        return Text(generation=generation.defaults, notes=notes)
    vocabulary = vocabulary_of(config)
    stop_ids = generation.end_ids
    backend = tokenizer.backend_tokenizer
    probe = [int(token) for token in tokenizer("a")["input_ids"]]
    highest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= vocabulary:
        notes = (
            *notes,
            f"the tokenizer has ids up to {highest}, and the model a vocabulary of {vocabulary}: "
            "text that needs the others will be refused",
        )
    bos = tokenizer.bos_token_id
    if tokenizer.eos_token_id is not None:
        stop_ids = [*stop_ids, int(tokenizer.eos_token_id)]
    templates = _chat_templates(directory)
    facts: dict[str, object] = {
        "chat_template": templates.pop("default", None),
        "chat_templates": templates,
        "bos_id": bos if bos is not None and 0 <= bos < vocabulary else None,
        "bos_token": tokenizer.bos_token or "",
        "eos_token": tokenizer.eos_token or "",
        "special_tokens": {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        },
        "add_bos": bos is not None and probe[:1] == [bos],
        "stop_ids": list(dict.fromkeys(token for token in stop_ids if 0 <= token < vocabulary)),
        "clean_up_spaces": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
    }
    return Text({"tokenizer.json": backend.to_str().encode()}, facts, generation.defaults, notes)


def _load(directory: Path) -> Any:
    """transformers' tokenizer of the directory (slow ones are converted); its own code never runs."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = directory / "tokenizer.json"
    if path.exists() and path.stat().st_size > _MOST_TOKENIZER_BYTES:
        raise FrontendError(f"{path} has {path.stat().st_size} bytes; at most {_MOST_TOKENIZER_BYTES} are read")
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception:
            # A class that is unknown, or remote code: tokenizer.json says everything that matters by itself.
            if not path.exists():
                raise
            known = ("bos_token", "eos_token", "unk_token", "pad_token")
            named = _optional_json(directory / "tokenizer_config.json")
            tokens = {name: _token(named[name]) for name in known if _token(named.get(name)) is not None}
            return PreTrainedTokenizerFast(tokenizer_file=str(path), **tokens)  # type: ignore[no-untyped-call]


def _token(value: object) -> str | None:
    """A special token's text: a string, or an object that holds one."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_templates(directory: Path) -> dict[str, str]:
    """Chat templates by name: from files of their own, or else from tokenizer_config.json, as a string, which is the
    default one, or a list with names."""
    files = {"default": directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _template_file(path) for name, path in files.items() if path.exists()}
    if found:
        return found
    template = _optional_json(directory / "tokenizer_config.json").get("chat_template")
    if template is None:
        template = _optional_json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    if isinstance(template, dict):
        return {name: text for name, text in template.items() if isinstance(name, str) and isinstance(text, str)}
    return {"default": template} if isinstance(template, str) else {}


def _template_file(path: Path) -> str:
    if path.stat().st_size > _MOST_TEMPLATE_BYTES:
        raise FrontendError(f"{path} has {path.stat().st_size} bytes; at most {_MOST_TEMPLATE_BYTES} are read")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FrontendError(f"{path} cannot be read: {error}") from error


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path, most_bytes=16 << 20) if path.exists() else {}
