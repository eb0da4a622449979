"""Tokenizer, special tokens, chat template and generation defaults, as an artifact carries them.

What tokenizer files say takes effect as in transformers, by one of these ways:
- transformers builds it into the tokenizer, and the artifact's tokenizer.json holds it: vocabulary, merges, normalizer,
  pre-tokenizer, post-processor, decoder, `tokenizer_class`, added and special tokens wherever they are named
  (`added_tokens_decoder`, special_tokens_map.json, added_tokens.json, `extra_special_tokens`, `*_token`),
  `add_bos_token`, `add_eos_token`, `add_prefix_space`, `legacy`, `do_lower_case`, `strip_accents`,
  `tokenize_chinese_chars`, `trim_offsets`, `fix_mistral_regex`, `fast_tokenizer_files` and the like.
- transformers acts on it around the tokenizer, and it is a fact of the manifest: `clean_up_tokenization_spaces` (which
  a BPE tokenizer needs a second key for), `split_special_tokens`, `truncation_side`, `model_max_length` and
  `model_input_names` (of encoders), `chat_template`, and which token is bos, eos and so on.
- transformers does not act on it either, when it encodes one text or decodes: `padding_side`, padding and truncation in
  tokenizer.json, `use_default_system_prompt`, `spaces_between_special_tokens`, `errors`, `sp_model_kwargs` (those of
  slow tokenizers), `use_fast`, `name_or_path`, `processor_class`.
- a tokenizer class has steps of its own around all that: the artifact takes token ids only, and a note says so. Where
  they matter for some texts alone, the note says that these are encoded plainly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import FrontendError
from llmc.frontends.hf.config import quiet, read_json
from llmc.frontends.hf.generation import Generation, read_generation
from llmc.frontends.lifted import Text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SENTENCE_PIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "sentencepiece.model")
_FILES = ("tokenizer.json", *_SENTENCE_PIECE, "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")  # a token in base64 and its rank
# Texts that a tokenizer's own steps would show in: spaces, letters of several kinds and scripts, punctuation.
_PROBES = ("a", "Hello world", "  don't , stop !\n\tx = [1, 22]", "naïve É 日本語 مرحبا 🙂", "<s>a</s> [SEP] <|x|>")
_MOST_TOKENIZER_BYTES = 512 << 20
_MOST_TEMPLATE_BYTES = 4 << 20


def read_text(directory: Path, config: PreTrainedConfig) -> Text:
    """Collect tokenizer, special tokens and templates. A model without a tokenizer takes token ids only."""
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
    _chat_templates(directory)  # transformers reads them too; one that cannot be read is named here
    if not has_tokenizer(directory):
        return None, ("no tokenizer: the artifact takes token ids only",)
    _require_libraries(directory)
    try:
        return _opened(*_load(directory))
    except FrontendError:
        raise
    except BaseException as error:  # transformers, its converters and the tokenizer itself raise many kinds
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of what is not Python
            raise
        why = " ".join(str(error).split())[:200]
        raise FrontendError(f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {why})") from error


def _opened(tokenizer: Any, notes: tuple[str, ...]) -> tuple[Any | None, tuple[str, ...]]:
    """The tokenizer without limits of its own; None and a note where the artifact cannot hold it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None, (f"{type(tokenizer).__name__} has no tokenizer.json form: the artifact takes token ids only",)
    if getattr(backend.model, "dropout", None):
        notes = (
            *notes,
            f"the tokenizer drops merges at random (dropout {backend.model.dropout:g}): the artifact does not",
        )
        backend.model.dropout = None
    if not _is_whole(tokenizer, backend):
        name = type(tokenizer).__name__
        return None, (
            f"{name} has steps of its own around its tokenizer.json, or added tokens that this file cannot hold: the "
            "artifact takes token ids only",
        )
    backend.no_truncation()
    backend.no_padding()
    return tokenizer, (*notes, *_own_methods(tokenizer))


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
    beyond = [number for number in backend.get_vocab(with_added_tokens=True).values() if number >= vocabulary]
    if beyond:
        notes = (
            *notes,
            f"the tokenizer has ids up to {max(beyond)}, and the model a vocabulary of {vocabulary}: "
            "text that needs the others will be refused",
        )
    bos = tokenizer.bos_token_id
    if tokenizer.eos_token_id is not None:
        stop_ids = [*stop_ids, int(tokenizer.eos_token_id)]
    templates = _chat_templates(directory)
    facts: dict[str, object] = {
        "chat_template": templates.pop("default", None),
        "chat_templates": templates,
        "bos_id": bos if bos is not None and bos < vocabulary else None,
        "bos_token": tokenizer.bos_token or "",
        "eos_token": tokenizer.eos_token or "",
        "special_tokens": {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        },
        "add_bos": bos is not None and _puts_first(backend, bos),
        "stop_ids": list(dict.fromkeys(token for token in stop_ids if token < vocabulary)),
        "clean_up_spaces": _cleans_up(tokenizer),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "truncation_side": tokenizer.truncation_side,
    }
    return Text({"tokenizer.json": _written(backend).encode()}, facts, generation.defaults, notes)


def _written(backend: Any) -> str:
    """The tokenizer as its file holds it. A token that was special before tokenizer_config.json said otherwise stays so
    for the library's decoding, which the library itself does not write."""
    text: str = backend.to_str()
    kept = [
        number
        for number, token in backend.get_added_tokens_decoder().items()
        if not token.special
        and backend.decode([number], skip_special_tokens=True) != backend.decode([number], skip_special_tokens=False)
    ]
    if not kept:
        return text
    state = json.loads(text)
    for token in state["added_tokens"]:
        token["special"] |= token["id"] in kept
    return json.dumps(state, ensure_ascii=False)


def _puts_first(backend: Any, token: int) -> bool:
    """Whether texts get this token in front of their own: one of a text's own may be the same (unk that is bos too)."""
    encoded = [backend.encode(text) for text in _PROBES]
    return all(one.ids[:1] == [token] and one.special_tokens_mask[0] for one in encoded)


def _cleans_up(tokenizer: Any) -> bool:
    """Whether decoded text loses spaces before punctuation, as transformers' `_decode` decides: from BPE, which has the
    spaces that the text had, only by a key of its own."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return bool(forced) or type(tokenizer.backend_tokenizer.model).__name__ != "BPE"


def _is_whole(tokenizer: Any, backend: Any) -> bool:
    """Whether a tokenizer does what its backend does, once written and read again as the artifact holds it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    try:
        held = Tokenizer.from_str(_written(backend))
    except Exception:  # the library cannot write steps that are Python
        return False
    held.no_truncation()
    held.no_padding()
    held.encode_special_tokens = tokenizer.split_special_tokens
    for text in _PROBES:
        ids = list(tokenizer(text)["input_ids"])
        decoded = held.decode(ids, skip_special_tokens=True)
        if _cleans_up(tokenizer):
            decoded = PreTrainedTokenizerBase.clean_up_tokenization(tokenizer, decoded)
        with quiet():
            if held.encode(text).ids != ids or tokenizer.decode(ids, skip_special_tokens=True) != decoded:
                return False
    return all(
        held.id_to_token(number) == backend.id_to_token(number)
        and held.decode([number], skip_special_tokens=True) == backend.decode([number], skip_special_tokens=True)
        for number in backend.get_added_tokens_decoder()
    )


def _own_methods(tokenizer: Any) -> tuple[str, ...]:
    """A note on a class that has steps in Python, but does not need them for ordinary text: CodeLlama's makes something
    else of <FILL_ME>, and Whisper's of times."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    steps = ("__call__", "_encode_plus", "_batch_encode_plus", "encode", "decode", "_decode", "clean_up_tokenization")
    own = [name for name in steps if getattr(kind, name, None) is not getattr(PreTrainedTokenizerFast, name, None)]
    if not own:
        return ()
    return (
        f"{kind.__name__} does more with some texts, in Python ({', '.join(own)}): the artifact encodes them plainly",
    )


def _require_libraries(directory: Path) -> None:
    """FrontendError with the true cause where transformers would need a library that is missing, or cannot read a file:
    its own message names the last of several libraries that it tries."""
    if (directory / "tokenizer.json").exists():
        return
    path = next(
        (directory / name for name in (*_SENTENCE_PIECE, "tiktoken.model") if (directory / name).is_file()), None
    )
    if path is None:
        return
    _check_size(path, _MOST_TOKENIZER_BYTES)
    with path.open("rb") as file:
        is_tiktoken = _TIKTOKEN_LINE.match(file.read(512)) is not None
    kind = "a tiktoken vocabulary" if is_tiktoken else "a SentencePiece model"
    needed = (
        {"tiktoken": "tiktoken"} if is_tiktoken else {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    )
    missing = [name for name, module in needed.items() if not _is_installed(module)]
    if missing:
        raise FrontendError(
            f"{path} is {kind}, and reading it needs {' and '.join(missing)}: pip install {' '.join(missing)}, or put "
            "the model's tokenizer.json beside it"
        )
    if not is_tiktoken:
        from sentencepiece import SentencePieceProcessor

        try:
            SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # the library raises several kinds
            raise FrontendError(
                f"{path} is neither a SentencePiece model nor a tiktoken vocabulary: it may be cut or damaged. Get it "
                "again, or put the model's tokenizer.json beside it"
            ) from error


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would lie in
        return False


def _load(directory: Path) -> tuple[Any, tuple[str, ...]]:
    """transformers' tokenizer of the directory (slow ones are converted), with notes; its own code never runs."""
    from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

    path = directory / "tokenizer.json"
    if path.exists():
        _check_size(path, _MOST_TOKENIZER_BYTES)
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True), ()
        except Exception:
            if not path.exists():
                raise
            # A class that is remote code, or whose own code cannot read the files: tokenizer.json and the settings
            # beside it say everything that matters. Some write a special token as an object that does not say so.
            named = _optional_json(directory / "tokenizer_config.json")
            tokens: dict[str, Any] = {
                name: AddedToken(value["content"], special=True)
                for name, value in named.items()
                if name.endswith("_token") and isinstance(value, dict) and isinstance(value.get("content"), str)
            }
            plain = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True, **tokens)
            if "auto_map" not in named:
                return plain, ()
            kind = named.get("tokenizer_class")
            return plain, (f"the tokenizer's own code ({kind!s:.60}) never runs: its tokenizer.json is taken alone",)


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
    named: Iterable[tuple[object, object]] = [("default", template)]
    if isinstance(template, dict):
        named = template.items()
    elif isinstance(template, list):
        named = [(item.get("name"), item.get("template")) for item in template if isinstance(item, dict)]
    return {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}


def _template_file(path: Path) -> str:
    _check_size(path, _MOST_TEMPLATE_BYTES)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FrontendError(f"{path} cannot be read: {error}") from error


def _check_size(path: Path, most: int) -> None:
    size = path.stat().st_size
    if size > most:
        raise FrontendError(f"{path} has {size} bytes; at most {most} are read")


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path, most_bytes=16 << 20) if path.exists() else {}
