"""Tokenizer, special tokens, chat templates and sampling settings of a GGUF file, as an artifact carries them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import FrontendError
from llmc.frontends.gguf.pre_tokenizers import pre_tokenizer
from llmc.frontends.gguf.reader import MetadataValue
from llmc.frontends.gguf.settings import Settings
from llmc.frontends.gguf.vocabulary import CONTROL, ENDS, UNKNOWN, USER, NoTokenizer, Vocabulary, build
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
_MASK_TAKES_SPACES = ("nomic-bert-moe", "jina-bert-v3")  # architectures
# What llama.cpp ends a text at wherever a vocabulary has it: ends of turns, and what stands between files of code.
_END = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<|END_OF_TURN_TOKEN|>",
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
        "<REPO>", "<reponame>", "<|file_sep|>")  # fmt: skip
# Of these, what is none in a vocabulary that has the others: there it ends a part of an answer, or nothing.
_NO_END = {"<|end|>": (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>")), "</s>": (("<|tool_response>",),)}


def read_text(path: Path, metadata: Mapping[str, MetadataValue], vocabulary: int, spaces_by_order: bool) -> Text:
    """vocabulary: how many tokens the model has. A file whose tokenizer cannot be built takes token ids only, and a
    note says why. spaces_by_order: see `vocabulary.build`."""
    generation = _generation(path, metadata, vocabulary)
    settings = Settings(path, metadata, "tokenizer.ggml")
    try:
        words = Vocabulary.of(settings)
        tokenizer = build(words, spaces_by_order)
        _add_tokens(tokenizer, words, metadata)
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


def _add_tokens(tokenizer: Tokenizer, words: Vocabulary, metadata: Mapping[str, MetadataValue]) -> None:
    """Tokens that stand for themselves wherever they occur in a text."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    # A file may name an ordinary token as padding: only what begins or ends a text is special whatever its kind.
    around = {words.marked[name] for name in ("bos", *ENDS) if name in words.marked}
    before, behind = _swallowing(words, metadata)
    specials, others = [], []
    for number, token in enumerate(words.tokens):
        if known.get(token) != number:
            continue
        added = AddedToken(token, normalized=False, lstrip=token in before, rstrip=token in behind)
        if number in around or words.kinds[number] in (CONTROL, UNKNOWN):
            specials.append(added)
        elif words.kinds[number] == USER:
            others.append(added)
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens(others)


def _swallowing(words: Vocabulary, metadata: Mapping[str, MetadataValue]) -> tuple[set[str], set[str]]:
    """Tokens that take spaces before them, and behind them, as their own. Files do not say which do: as in llama.cpp,
    the model's name does, its architecture and the name of its pre-tokenizer."""
    name, architecture = (str(metadata.get(f"general.{key}", "")) for key in ("name", "architecture"))
    pre = str(metadata.get("tokenizer.ggml.pre", ""))
    if any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or architecture in _MASK_TAKES_SPACES:
        return {"<mask>"}, set()
    if any(part in name.lower() for part in ("phi-3", "phi3")):
        added = (
            token for token, kind in zip(words.tokens, words.kinds, strict=False) if kind in (CONTROL, USER, UNKNOWN)
        )
        return set(), {*added, "</s>"} - {"<unk>", "<s>", "<|endoftext|>"}
    return ({"[MASK]"} if "modern-bert" in name.lower() else set()), set()


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
        "stop_ids": [token for token in _ends(words) if token < vocabulary],
        "clean_up_spaces": words.kind == "bert",
        "split_special_tokens": False,
        "truncation_side": "right",
    }


def _ends(words: Vocabulary) -> list[int]:
    """The tokens that end a text: those that keys name, and those that are known by how they read."""
    found = [words.marked[name] for name in ENDS if name in words.marked]
    texts = {token: number for number, token in enumerate(words.tokens) if words.kinds[number] in (CONTROL, USER)}
    known = [token for token in _END if token in texts]
    no_ends = [token for token, beside in _NO_END.items() if any(set(others) <= set(texts) for others in beside)]
    found += [texts[token] for token in known]
    return list(dict.fromkeys(number for number in found if words.tokens[number] not in no_ends))


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
