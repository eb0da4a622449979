"""Tokenizer, special tokens, chat templates and sampling settings of a GGUF file, as an artifact carries them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import FrontendError
from llmc.frontends.gguf.pre_tokenizers import pre_tokenizer
from llmc.frontends.gguf.reader import MetadataValue
from llmc.frontends.gguf.settings import Settings
from llmc.frontends.gguf.vocabulary import CONTROL, UNKNOWN, USER, NoTokenizer, Vocabulary, build
from llmc.frontends.hf.generation import Generation, generation_of
from llmc.frontends.lifted import Text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# transformers' names of settings, by those below general.sampling.
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip
# Names of tokens as a tokenizer's settings have them, by those of the keys.
_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "separator": "sep_token",
          "padding": "pad_token", "mask": "mask_token", "cls": "cls_token"}  # fmt: skip
# Of the kinds of vocabularies that do not know them, and what llama.cpp does not act on either.
_NO_EFFECT = (
    "pre", "scores", "merges", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap",
    "token_type_count", "suppress_tokens", "hf_json", "add_sep_token", "add_bos_token", "add_eos_token",
)  # fmt: skip
_END = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "<|return|>",
        "<EOT>", "[EOT]", "<|eom_id|>", "<|END_OF_TURN_TOKEN|>", "<turn|>", "<end_of_utterance>")  # fmt: skip


def read_text(path: Path, metadata: Mapping[str, MetadataValue], vocabulary: int, spaces_by_order: bool) -> Text:
    """vocabulary: how many tokens the model has. A file whose tokenizer cannot be built takes token ids only, and a
    note says why. spaces_by_order: see `vocabulary.build`."""
    generation = _generation(path, metadata, vocabulary)
    settings = Settings(path, metadata, "tokenizer.ggml")
    try:
        words = Vocabulary.of(settings)
        tokenizer = build(words, spaces_by_order)
        _add_tokens(tokenizer, words)
        adds_bos = _surround(tokenizer, words)
    except NoTokenizer as error:
        note = f"no tokenizer: {error}: the artifact takes token ids only"
        return Text(generation=generation.defaults, notes=(*generation.notes, note))
    except FrontendError:
        raise
    except BaseException as error:  # the library raises its panics as no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = " ".join(str(error).split())[:200]
        raise FrontendError(f"{path}: its tokenizer cannot be built ({type(error).__name__}: {why})") from error
    notes = [*generation.notes, *_unread(settings)]
    if len(words.tokens) > vocabulary:
        notes.append(
            f"the tokenizer has {len(words.tokens)} tokens, and the model a vocabulary of {vocabulary}: "
            "text that needs the others will be refused"
        )
    facts = _facts(words, metadata, vocabulary, adds_bos)
    return Text({"tokenizer.json": tokenizer.to_str().encode()}, facts, generation.defaults, tuple(notes))


def _add_tokens(tokenizer: Tokenizer, words: Vocabulary) -> None:
    """Tokens that stand for themselves wherever they occur in a text."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    # A file may name an ordinary token as padding: only what begins or ends a text is special whatever its kind.
    around = {words.marked[name] for name in ("bos", "eos", "eot", "eom") if name in words.marked}
    specials, others = [], []
    for number, token in enumerate(words.tokens):
        if known.get(token) != number:
            continue
        if number in around or words.kinds[number] in (CONTROL, UNKNOWN):
            specials.append(AddedToken(token, normalized=False))
        elif words.kinds[number] == USER:
            others.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens(others)


def _unread(settings: Settings) -> list[str]:
    """A note on keys of the tokenizer that have no effect here, but may have one elsewhere."""
    settings.ignore(*_NO_EFFECT)
    unread = [key for key in settings.unread() if not key.endswith("_token_id")]
    return [f"settings of the tokenizer that are not obeyed: {', '.join(unread):.200}"] if unread else []


def _surround(tokenizer: Tokenizer, words: Vocabulary) -> bool:
    """Put what belongs before and behind every text; returns whether a bos token comes first."""
    from tokenizers import processors

    settings, marked = words.settings, words.marked
    pre = pre_tokenizer(settings.text("pre")) if words.kind == "gpt2" else None
    if words.kind == "bert":
        return _surround_bert(tokenizer, words)
    first = settings.flag("add_bos_token", words.kind == "llama" or (pre is not None and pre.bos))
    last = settings.flag("add_eos_token", words.kind == "t5")
    bos = marked.get("bos") if first else None
    eos = marked.get("eos") if last else None
    around = {words.tokens[number]: number for number in (bos, eos) if number is not None}
    for token in around:
        if token.startswith("$") or ":" in token:  # which the library's templates take for something else
            raise NoTokenizer(f"its token {token!r:.40} cannot be put around texts")
    if around:
        begin = [words.tokens[bos]] if bos is not None else []
        end = [words.tokens[eos]] if eos is not None else []
        single = [*(f"{token}:0" for token in begin), "$A:0", *(f"{token}:0" for token in end)]
        pair = [*single, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=list(around.items())
        )
    return bos is not None


def _surround_bert(tokenizer: Tokenizer, words: Vocabulary) -> bool:
    from tokenizers import processors

    first = words.marked.get("cls", words.marked.get("bos", 101))
    last = words.marked.get("separator", words.marked.get("eos", 102))
    if max(first, last) >= len(words.tokens):
        raise words.settings.error("separator_token_id", "is missing")
    pair = [(words.tokens[number], number) for number in (first, last)]
    tokenizer.post_processor = processors.BertProcessing(pair[1], pair[0])
    return False


def _facts(
    words: Vocabulary, metadata: Mapping[str, MetadataValue], vocabulary: int, adds_bos: bool
) -> dict[str, object]:
    """The manifest's `tokenizer`."""
    marked = words.marked
    templates = _templates(metadata)
    ends = [marked[name] for name in ("eos", "eot", "eom") if name in marked]
    # Files without a key for the end of a turn: its token is in the template that writes turns.
    written = "".join(templates.values())
    ends += [
        number
        for number, token in enumerate(words.tokens)
        if token in _END and words.kinds[number] in (CONTROL, USER) and token in written
    ]
    bos = marked.get("bos")
    default = templates.pop("default", None)
    return {
        "chat_template": default,
        "chat_templates": templates,
        "bos_id": bos if bos is not None and bos < vocabulary else None,
        "bos_token": words.tokens[bos] if bos is not None else "",
        "eos_token": words.tokens[marked["eos"]] if "eos" in marked else "",
        "special_tokens": {_NAMES[name]: words.tokens[number] for name, number in marked.items() if name in _NAMES},
        "add_bos": adds_bos,
        "stop_ids": list(dict.fromkeys(token for token in ends if token < vocabulary)),
        "clean_up_spaces": words.kind == "bert",
        "split_special_tokens": False,
        "truncation_side": "right",
    }


def _templates(metadata: Mapping[str, MetadataValue]) -> dict[str, str]:
    """Chat templates by name; the one without is "default"."""
    prefix = "tokenizer.chat_template"
    found = {"default": metadata[prefix]} if prefix in metadata else {}
    found |= {key[len(prefix) + 1 :]: value for key, value in metadata.items() if key.startswith(f"{prefix}.")}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _generation(path: Path, metadata: Mapping[str, MetadataValue], vocabulary: int) -> Generation:
    """How text is chosen by default: greedily, unless the file asks for samples."""
    settings = Settings(path, metadata, "general.sampling")
    given: dict[str, object] = {}
    for theirs, ours in _SAMPLING.items():
        if settings.has(theirs):
            given[ours] = settings.get(theirs) if theirs == "top_k" else settings.number(theirs)
    suppressed = Settings(path, metadata, "tokenizer.ggml").integers("suppress_tokens")
    if suppressed:
        given["suppress_tokens"] = suppressed
    if given.get("temperature"):
        given["do_sample"] = True
    found = generation_of(given, path.name, vocabulary)
    unread = settings.unread()
    notes = (
        (*found.notes, f"settings of sampling that are not obeyed: {', '.join(unread):.200}") if unread else found.notes
    )
    return Generation(found.defaults, found.end_ids, notes)
