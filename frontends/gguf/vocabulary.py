"""The vocabulary in a GGUF file's metadata as a tokenizer of the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.frontends.gguf.pre_tokenizers import pre_tokenizer
from llmc.frontends.gguf.settings import Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of tokens
SPACE = "\u2581"  # what SentencePiece writes for a space
# The tokens with a meaning where a file does not say which they are, as in llama.cpp, by the kind of vocabulary. Its 11
# for byte-level ones is Falcon's, and an ordinary token of any other.
_DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "t5": {"eos": 1, "unknown": 2}, "bert": {"unknown": 100}}
ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # those that end a text
_MARKED = ("bos", "unknown", "separator", "padding", "mask", "cls", *ENDS)


class NoTokenizer(Exception):
    """Why a vocabulary cannot be used; the message is for the user."""


@dataclass(frozen=True)
class Vocabulary:
    """What the keys below `tokenizer.ggml` say. kinds: of each token; marked: the tokens with a meaning, by name."""

    settings: Settings
    kind: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    marked: dict[str, int]

    @classmethod
    def of(cls, settings: Settings) -> Vocabulary:
        """FrontendError for lists that do not fit each other; NoTokenizer where there is no vocabulary."""
        kind = settings.text("model", "none")
        if kind in ("none", "no_vocab"):
            raise NoTokenizer("it has no vocabulary")
        tokens = settings.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise settings.error("tokens", "must be a list of strings")
        texts = [str(token) or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        if len(set(texts)) != len(texts):
            raise settings.error("tokens", "has a token twice")
        kinds = settings.integers("token_type")
        if kinds is not None and len(kinds) < len(texts):
            raise settings.error("token_type", f"has {len(kinds)} numbers for {len(texts)} tokens")
        marked = {}
        for name in _MARKED:
            number = settings.integer(f"{name}_token_id", -1)
            if name == "separator" and number == -1:  # its key before 2025
                number = settings.integer("seperator_token_id", -1)
            if not 0 <= number < len(texts):
                number = _DEFAULTS.get(kind, {}).get(name, -1)
            if 0 <= number < len(texts):
                marked[name] = number
        return cls(settings, kind, texts, kinds or [NORMAL] * len(texts), marked)

    def scores(self) -> list[float]:
        """A number for each token, the higher the earlier it is merged or the likelier it is."""
        found = self.settings.get("scores")
        if not isinstance(found, list) or len(found) < len(self.tokens):
            raise self.settings.error("scores", f"must have a number for each of {len(self.tokens)} tokens")
        return [float(score) for score in found]

    def unknown(self) -> int:
        """The token that stands for what is in none of them."""
        if "unknown" not in self.marked:
            raise self.settings.error("unknown_token_id", "names no token")
        return self.marked["unknown"]

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens, the earliest first; those that make no token are left out."""
        found = self.settings.get("merges")
        if not isinstance(found, list):
            raise NoTokenizer("its byte-level vocabulary has no merges")
        known, pairs = set(self.tokens), []
        for merge in found:
            at = str(merge).find(" ", 1)  # a token may begin with a space
            left, right = str(merge)[:at], str(merge)[at + 1 :]
            if at > 0 and {left, right, left + right} <= known:
                pairs.append((left, right))
        return pairs


def build(vocabulary: Vocabulary, spaces_by_order: bool) -> Tokenizer:
    """The tokenizer without its special tokens. NoTokenizer where it is of a kind that is not known.

    spaces_by_order: a SentencePiece vocabulary whose tokens are merged in their own order, and of which those of
    several spaces are ordinary (Gemma's).
    """
    builders = {"gpt2": _byte_level, "t5": _unigram, "bert": _word_piece}
    if vocabulary.kind == "llama":
        return _sentence_piece(vocabulary, spaces_by_order)
    if vocabulary.kind == "gemma4":
        return _merged_pieces(vocabulary)
    if vocabulary.kind not in builders:
        known = ", ".join(sorted([*builders, "llama", "gemma4"]))
        raise NoTokenizer(f"tokenizer.ggml.model {vocabulary.kind!r:.40} is not known ({known})")
    return builders[vocabulary.kind](vocabulary)


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = vocabulary.settings.text("pre")
    pre = pre_tokenizer(name)
    if pre is None:
        said = f"{name!r:.40} is not known" if name and name != "default" else "does not say how text is cut into words"
        raise NoTokenizer(f"tokenizer.ggml.pre {said}: gguf_new_metadata.py --pre-tokenizer NAME writes the right one")
    model = models.BPE(vocab=_numbered(vocabulary.tokens), merges=vocabulary.merges(), ignore_merges=pre.whole)
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in pre.cuts]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: Vocabulary, spaces_by_order: bool) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours that make a token, those with the highest score become it first."""
    from transformers.tokenization_utils_base import generate_merges

    tokens = list(vocabulary.tokens)
    scores = vocabulary.scores()
    if spaces_by_order:
        # Tokens of spaces alone are stored with real ones; their scores do not say when they are merged.
        tokens = [SPACE * len(token) if not token.strip(" ") else token for token in tokens]
        scores = [-float(number) for number in range(len(tokens))]
    pieces = [n for n, kind in enumerate(vocabulary.kinds[: len(tokens)]) if kind in (NORMAL, USER, 0)]
    if len({scores[number] for number in pieces if len(tokens[number]) > 1}) < 2 and len(pieces) > 512:
        raise NoTokenizer("all of its tokens have the same score, so that nothing says how they are merged")
    known = {tokens[number]: number for number in pieces}
    merges = generate_merges(known, {tokens[number]: scores[number] for number in pieces})
    prefix = vocabulary.settings.flag("add_space_prefix", True)
    return _pieces(vocabulary, tokens, merges, prefix)


def _merged_pieces(vocabulary: Vocabulary) -> Tokenizer:
    """The same with merges from the file."""
    return _pieces(vocabulary, list(vocabulary.tokens), vocabulary.merges(), prefix=False)


def _pieces(vocabulary: Vocabulary, tokens: list[str], merges: list[tuple[str, str]], prefix: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.marked.get("unknown", 0)
    model = models.BPE(
        vocab=_numbered(tokens), merges=merges, unk_token=tokens[unknown], fuse_unk=True,
        byte_fallback=BYTE in vocabulary.kinds or "<0x0A>" in tokens,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(pattern=" ", content=SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _unigram(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = vocabulary.unknown()
    pairs = list(zip(vocabulary.tokens, vocabulary.scores(), strict=False))
    tokenizer = Tokenizer(models.Unigram(pairs, unk_id=unknown, byte_fallback=BYTE in vocabulary.kinds))
    steps: list[normalizers.Normalizer] = []
    charsmap = vocabulary.settings.get("precompiled_charsmap")
    if isinstance(charsmap, list) and charsmap:
        steps.append(normalizers.Precompiled(bytes(int(byte) % 256 for byte in charsmap)))
    if vocabulary.settings.flag("remove_extra_whitespaces", False):
        from tokenizers import Regex

        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if vocabulary.settings.flag("add_space_prefix", True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    return tokenizer


def _word_piece(vocabulary: Vocabulary) -> Tokenizer:
    """BERT's. Files have a leading mark at the beginning of words; the library has "##" in front of what is none."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = vocabulary.tokens[vocabulary.unknown()]
    words: dict[str, int] = {}
    for number, token in enumerate(vocabulary.tokens):
        whole = vocabulary.kinds[number] not in (NORMAL, 0) or (token.startswith("[") and token.endswith("]"))
        text = token if whole else token[1:] if token.startswith(SPACE) else f"##{token}"
        words.setdefault(text, number)
    tokenizer = Tokenizer(models.WordPiece(vocab=words, unk_token=unknown, max_input_chars_per_word=100))
    lowercase = vocabulary.settings.flag("normalizer.lowercase", True)
    accents = vocabulary.settings.flag("normalizer.strip_accents", lowercase)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer
