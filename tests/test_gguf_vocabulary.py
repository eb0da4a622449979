"""Small vocabularies of every kind, whose tokens are said by hand."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers.tokenization_utils_base import generate_merges  # noqa: F401  loaded when tests are collected

from llmc.errors import FrontendError
from llmc.frontends.gguf import text as reading
from llmc.frontends.gguf.settings import Settings
from llmc.frontends.gguf.text import read_text
from llmc.frontends.gguf.vocabulary import NoTokenizer, Vocabulary
from llmc.frontends.lifted import Text

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)


def read(
    kind: str, tokens: list[str], kinds: list[int] | None = None, *, size: int = 1 << 20, ordered: bool = False,
    **more: object,
) -> Text:  # fmt: skip
    """A vocabulary of a model of `size` tokens; `bos=3` is tokenizer.ggml.bos_token_id."""
    metadata: dict[str, object] = {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens}
    if kinds is not None:
        metadata["tokenizer.ggml.token_type"] = kinds + [NORMAL] * (len(tokens) - len(kinds))
    for name, value in more.items():
        short = name in ("bos", "eos", "unknown", "separator", "seperator", "padding", "cls", "eot", "eom")
        metadata[f"tokenizer.ggml.{name}_token_id" if short else f"tokenizer.ggml.{name}"] = value
    return read_text(Path("m.gguf"), metadata, size, ordered)  # type: ignore[arg-type]


def tokenizer(text: Text) -> Tokenizer:
    return Tokenizer.from_str(text.files["tokenizer.json"].decode())


def ids(text: Text, written: str) -> list[int]:
    found: list[int] = tokenizer(text).encode(written).ids
    return found


# --- SentencePiece's BPE ------------------------------------------------------------------------------------------

PIECES = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "c", "ab", "bc", "\u2581a"]
SCORES = [0.0] * 7 + [-1.0, -2.0, -3.0]
SPECIAL = [UNKNOWN, CONTROL, CONTROL]


def test_pieces_of_the_highest_score_are_merged_first() -> None:
    assert ids(read("llama", PIECES, SPECIAL, scores=SCORES), "abc") == [1, 3, 7, 6]
    other = [*SCORES[:7], -2.0, -1.0, -3.0]
    assert ids(read("llama", PIECES, SPECIAL, scores=other), "abc") == [1, 9, 8]
    assert ids(read("llama", PIECES, SPECIAL, scores=[*other, 1.0]), "abc") == [1, 9, 8]  # a score too many
    assert ids(read("llama", PIECES, SPECIAL, scores=SCORES, add_space_prefix=False), "abc") == [1, 7, 6]
    # Tokens of an unknown kind are pieces as normal ones are; those that are not used are none.
    assert ids(read("llama", PIECES, [*SPECIAL, *[0] * 7], scores=SCORES), "abc") == [1, 3, 7, 6]
    assert ids(read("llama", PIECES, [*SPECIAL, *[1] * 4, UNUSED, 1, UNUSED], scores=SCORES), "abc") == [1, 3, 4, 8]


@pytest.mark.parametrize("written", ["a", " a", "  a  ", "a b", "", "   "])
def test_spaces_around_a_text_stay(written: str) -> None:
    for prefix in (True, False):
        found = tokenizer(read("llama", PIECES, SPECIAL, scores=SCORES, add_space_prefix=prefix))
        assert found.decode(found.encode(written).ids) == written


def test_what_is_in_no_piece() -> None:
    text = read("llama", PIECES, SPECIAL, scores=SCORES)
    assert ids(text, "azza") == [1, 9, 0, 4]  # one for all that is unknown in a row
    assert ids(read("llama", PIECES, SPECIAL, scores=SCORES, unknown=8), "z") == [1, 3, 8]
    for kinds in ([*SPECIAL, *[1] * 7, BYTE], None):
        text = read("llama", [*PIECES, "<0x0A>"], kinds, scores=[*SCORES, 0.0])
        assert ids(text, "a\n")[-1] == 10
    text = read("llama", [*PIECES, "<0x0B>"], [*SPECIAL, *[1] * 7, BYTE], scores=[*SCORES, 0.0])
    assert ids(text, "a\x0b")[-1] == 10 and 10 not in ids(text, "<0x0B>")  # which is no byte in a text


def test_pieces_in_their_own_order() -> None:
    """Gemma's: the earlier token first, whatever its score, and spaces in a row as real ones."""
    pieces = [*PIECES, "  ", "   "]
    text = read("llama", pieces, SPECIAL, scores=[-1000.0] * 12, ordered=True, add_space_prefix=False)
    assert ids(text, "abc") == [1, 7, 6] and ids(text, "a  b   c") == [1, 4, 10, 5, 11, 6]
    text = read("llama", [*PIECES[:7], "bc", "ab"], SPECIAL, scores=[0.0] * 9, ordered=True, add_space_prefix=False)
    assert ids(text, "abc") == [1, 4, 7]


def test_scores_that_are_all_the_same_say_nothing() -> None:
    def known(count: int, *scores: float, ordered: bool = False) -> bool:
        """Of so many pieces, which are a, b and letters twice; scores of the last ones."""
        letters = [chr(0x4E00 + number) for number in range(count - 2)]
        tokens = ["<unk>", "<s>", "</s>", "a", "b", *(2 * letter for letter in letters)]
        all_scores = [0.0, 0.0, 0.0, -5.0, -6.0, *[-1.0] * (count - 2)]
        all_scores[len(tokens) - len(scores) :] = scores
        text = read("llama", tokens, SPECIAL, scores=all_scores, ordered=ordered)
        assert text.facts is not None or "all of its tokens have the same score" in text.notes[-1]
        return text.facts is not None

    assert not known(513) and known(512) and known(513, -2.0) and known(513, -2.0, -3.0)
    assert known(513, ordered=True)


def test_pieces_with_merges_of_the_file() -> None:
    """Gemma 4's, without a space before a text."""
    text = read("gemma4", PIECES, SPECIAL, merges=["b c", "a b", "\u2581 a"])
    assert ids(text, "abc") == [4, 8] and ids(text, " a") == [9] and ids(text, "z") == [0]
    assert tokenizer(text).decode([9, 7]) == " aab"


# --- tokens with a meaning ----------------------------------------------------------------------------------------


def marked(kind: str, count: int = 200, **more: int) -> dict[str, int]:
    metadata = {"t.model": kind, "t.tokens": [f"t{number}" for number in range(count)]}
    metadata |= {f"t.{name}_token_id": number for name, number in more.items()}  # type: ignore[misc]
    return Vocabulary.of(Settings(Path("m"), metadata, "t")).marked  # type: ignore[arg-type]


def test_which_tokens_have_a_meaning() -> None:
    assert marked("gpt2") == {} and marked("gpt2", 5, bos=0, eos=4, eot=5, eom=-1) == {"bos": 0, "eos": 4}
    assert marked("llama") == {"bos": 1, "eos": 2, "unknown": 0} == marked("llama", bos=200, eos=-1)
    assert marked("llama", 2) == {"bos": 1, "unknown": 0} and marked("llama", bos=5)["bos"] == 5
    assert marked("t5") == {"eos": 1, "unknown": 2} and marked("bert") == {"unknown": 100}
    assert marked("bert", 100) == {}
    # The name of a key was spelled otherwise before 2025.
    assert marked("gpt2", seperator=3) == marked("gpt2", separator=3) == {"separator": 3}
    assert marked("gpt2", separator=3, seperator=4) == {"separator": 3} and marked("gpt2", seperator=200) == {}


def test_lists_of_a_vocabulary() -> None:
    found = Vocabulary.of(Settings(Path("m"), {"t.model": "x", "t.tokens": ["a", "", "b", ""]}, "t"))
    assert list(found.tokens) == ["a", "[EMPTY_1]", "b", "[EMPTY_3]"] and list(found.kinds) == [NORMAL] * 4
    with pytest.raises(FrontendError, match="has a token twice"):
        Vocabulary.of(Settings(Path("m"), {"t.model": "x", "t.tokens": ["a", "b", "a"]}, "t"))
    for wrong in (None, "ab", ["a", 1]):
        with pytest.raises(FrontendError, match=r"t\.tokens must be a list of strings"):
            Vocabulary.of(Settings(Path("m"), {"t.model": "x", "t.tokens": wrong}, "t"))  # type: ignore[dict-item]
    for kind in ("none", "no_vocab"):
        with pytest.raises(NoTokenizer):
            Vocabulary.of(Settings(Path("m"), {"t.model": kind, "t.tokens": ["a"]}, "t"))


def test_merges_are_of_tokens_that_make_one() -> None:
    def merges(tokens: list[str], *written: str) -> list[tuple[str, str]]:
        metadata = {"t.model": "x", "t.tokens": tokens, "t.merges": list(written)}
        return Vocabulary.of(Settings(Path("m"), metadata, "t")).merges()  # type: ignore[arg-type]

    assert merges(["a", "b", "ab"], "a b") == [("a", "b")]
    assert merges(["a", "b", "c", "ab", "bc"], "b c", "a b", "a c", "c d", "d c") == [("b", "c"), ("a", "b")]
    assert merges(["a", "ab", "aab"], "ab", "") == []
    assert merges([" a", "b", " ab", "a b", "a", " b"], " a b", "a  b") == [(" a", "b"), ("a", " b")]


@pytest.mark.parametrize(("kind", "more"), [("bert", {}), ("t5", {"scores": [0.0] * 2})])
def test_what_is_unknown_has_to_have_a_token(kind: str, more: dict[str, object]) -> None:
    with pytest.raises(FrontendError, match="unknown_token_id names no token"):
        read(kind, ["a", "b"], **more)


def test_tokens_that_stand_for_themselves() -> None:
    """Control tokens and those that a user has defined, in the text as it was given; the latter are written out."""
    tokens = [*PIECES, "<pad>", "[x y]", "<end>", "<turn>", "word"]
    kinds = [*SPECIAL, *[NORMAL] * 7, CONTROL, USER, NORMAL, USER, NORMAL]
    more = {"scores": [*SCORES, *[-9.0] * 5], "eot": 12, "eom": 13, "padding": 14}
    text = read("llama", tokens, kinds, **more)
    assert ids(text, "a<pad>b") == [1, 9, 10, 3, 5] and ids(text, "[x y]")[:2] == [1, 11]
    assert 12 in ids(text, "a<end>") and 13 in ids(text, "<turn>a")
    found = tokenizer(text)
    assert found.decode([9, 10, 11, 12, 13, 2]) == "a[x y]"
    assert 14 not in ids(text, "awordb")  # an ordinary token, which no merge makes
    assert text.facts is not None and text.facts["stop_ids"] == [2, 12, 13]


# --- what stands around a text ------------------------------------------------------------------------------------

ALPHABET = [chr(number) for number in range(ord("!"), ord("~") + 1)]


def byte_level(pre: str, *tokens: str, **more: object) -> Text:
    """Single characters from "!" to "~", then others."""
    return read("gpt2", [*ALPHABET, *tokens], merges=["a b"], pre=pre, **more)


A, B = ALPHABET.index("a"), ALPHABET.index("b")


def test_whether_a_token_comes_first_where_a_file_does_not_say() -> None:
    """As llama.cpp has it for each kind of vocabulary, and for byte-level ones by the way of cutting."""
    for pre, first in (("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False), ("dbrx", False)):
        text = byte_level(pre, "<s>", bos=94)
        assert ids(text, "b") == ([94, B] if first else [B])
        assert text.facts is not None and text.facts["add_bos"] is first and text.facts["bos_id"] == 94
        text = byte_level(pre, "<s>", bos=94, add_bos_token=not first)
        assert ids(text, "b") == ([B] if first else [94, B])
    assert byte_level("llama-bpe").facts["add_bos"] is False  # type: ignore[index]  # it has none
    text = byte_level("gpt-2", "<s>", "</s>", bos=94, eos=95, add_bos_token=True, add_eos_token=True)
    assert ids(text, "b") == [94, B, 95]
    assert tokenizer(text).encode("b", "a").ids == [94, B, 95, 94, A, 95]
    assert tokenizer(text).encode("b", "a").type_ids == [0, 0, 0, 1, 1, 1]
    unigram = ["<pad>", "</s>", "<unk>", "\u2581a"]
    text = read("t5", unigram, scores=[0.0] * 4, pre="llama-bpe", bos=0)
    assert ids(text, "a") == [3, 1] and text.facts is not None and text.facts["add_bos"] is False
    assert ids(read("t5", unigram, scores=[0.0] * 4, add_eos_token=False), "a") == [3]


def test_whether_a_piece_that_is_a_token_is_merged() -> None:
    for pre, whole in (("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False), ("dbrx", False)):
        assert ids(byte_level(pre, "ab", "ba", add_bos_token=False), "ba") == ([95] if whole else [B, A])
        assert ids(byte_level(pre, "ab", "ba", add_bos_token=False), "ab") == [94]


@pytest.mark.parametrize("token", ["$A", "a:b", "$"])
def test_tokens_that_a_template_takes_for_something_else(token: str) -> None:
    text = byte_level("llama-bpe", token + "x", bos=94)
    assert text.facts is None and "cannot be put around texts" in text.notes[-1]


def test_a_vocabulary_may_be_larger_than_a_model() -> None:
    def facts(size: int) -> tuple[object, object, bool]:
        text = byte_level("gpt-2", "<s>", "</s>", bos=94, eos=95, size=size)
        assert text.facts is not None and text.facts["split_special_tokens"] is False
        return text.facts["bos_id"], text.facts["stop_ids"], any("refused" in note for note in text.notes)

    assert facts(96) == (94, [95], False) and facts(95) == (94, [], True) and facts(94) == (None, [], True)


# --- unigrams and word pieces -------------------------------------------------------------------------------------


def test_the_end_of_a_turn_is_an_end_where_no_template_has_it() -> None:
    text = byte_level("gpt-2", "<|im_end|>", token_type=[NORMAL] * 94 + [CONTROL])
    assert text.facts is not None and text.facts["stop_ids"] == [94]


def test_unigrams() -> None:
    tokens = ["<pad>", "</s>", "<unk>", "\u2581", "a", "\u2581a", "b", "ab"]
    scores = [0.0, 0.0, 0.0, -3.0, -3.0, -2.0, -3.0, -10.0]
    more: dict[str, object] = {"scores": [*scores, 1.0], "add_eos_token": False}
    text = read("t5", tokens, [CONTROL, CONTROL, UNKNOWN], **more)
    assert ids(text, "ab") == [5, 6] and ids(text, "b z") == [3, 6, 3, 2]
    assert ids(text, "a  b ") == [5, 3, 3, 6, 3]
    shorter = read("t5", tokens, [CONTROL, CONTROL, UNKNOWN], remove_extra_whitespaces=True, **more)
    assert ids(shorter, "  a  b ") == [5, 3, 6]
    shorter = read("t5", tokens, None, remove_extra_whitespaces=True, add_space_prefix=False, **more)
    assert ids(shorter, "  a  b ") == [4, 3, 6]
    alone = read("t5", tokens, [CONTROL, CONTROL, UNKNOWN], add_space_prefix=False, **more)
    assert ids(alone, "a b") == [4, 3, 6] and tokenizer(alone).decode([4, 3, 6]) == "a b"
    assert tokenizer(text).decode([5, 6]) == "ab"
    other = read("t5", tokens, [CONTROL, CONTROL, NORMAL], unknown=4, **more)
    assert ids(other, "bz") == [3, 6, 4]
    with_bytes = read(
        "t5", [*tokens, "<0x7A>"], [*[CONTROL] * 3, *[NORMAL] * 5, BYTE], **{**more, "scores": [*scores, 0.0]}
    )
    assert ids(with_bytes, "az") == [5, 8]


def test_a_map_of_characters() -> None:
    """SentencePiece's: a trie, then text. Files have its bytes as signed or unsigned numbers."""
    data = struct.pack("<I", 2048) + bytes(2048) + "é".encode()
    for numbers in (list(data), list(struct.unpack(f"{len(data)}b", data))):
        text = read("t5", ["a", "b", "<unk>"], scores=[0.0] * 3, precompiled_charsmap=numbers)
        state = json.loads(text.files["tokenizer.json"])["normalizer"]
        (step,) = state["normalizers"]
        assert base64.b64decode(step["precompiled_charsmap"]) == data
    for none in ([], None):
        more = {} if none is None else {"precompiled_charsmap": none}
        text = read("t5", ["a", "b", "<unk>"], scores=[0.0] * 3, **more)
        assert json.loads(text.files["tokenizer.json"])["normalizer"] is None


def word_pieces(*kinds: int, **more: object) -> Text:
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "\u2581a", "a", "b", "\u2581c", "<x>", "[y]"]
    given: dict[str, object] = {"cls": 1, "separator": 2, "unknown": 3, **more}
    return read("bert", tokens, list(kinds) or None, **given)


def test_word_pieces() -> None:
    for kinds in ((), (CONTROL, CONTROL, CONTROL, UNKNOWN), (0,) * 10):
        text = word_pieces(*kinds)
        assert ids(text, "ab c") == [1, 4, 6, 7, 2] and ids(text, "b") == ids(text, "d") == [1, 3, 2]
        assert ids(text, "A\u00c1") == [1, 4, 5, 2]
        assert text.facts is not None
        assert (text.facts["add_bos"], text.facts["clean_up_spaces"]) == (False, True)
    assert ids(word_pieces(*[NORMAL] * 8, CONTROL), "a<x>") == [1, 4, 8, 2]
    assert tokenizer(word_pieces(*[NORMAL] * 9, CONTROL)).token_to_id("[y]") == 9
    assert tokenizer(read("bert", ["[UNK]", "[", "]"], unknown=0, cls=0, separator=0)).token_to_id("##[") == 1
    assert ids(text, "a" * 100) == [1, 4, *[5] * 99, 2] and ids(text, "a" * 101) == [1, 3, 2]
    assert ids(word_pieces(**{"normalizer.lowercase": False}), "aA") == [1, 3, 2]
    pair = tokenizer(text).encode("a", "c")
    assert (pair.ids, pair.type_ids) == ([1, 4, 2, 7, 2], [0, 0, 0, 1, 1])


def test_the_tokens_around_word_pieces() -> None:
    """Other names for them, then BERT's own places."""
    assert ids(word_pieces(cls=-1, bos=8, separator=-1, eos=9), "a") == [8, 4, 9]
    tokens = [f"[{number}]" for number in range(103)] + ["\u2581a"]
    assert ids(read("bert", tokens), "a") == [101, 103, 102]
    for count in (50, 102):
        with pytest.raises(FrontendError, match="separator_token_id is missing"):
            read("bert", tokens[:count], unknown=0)
    with pytest.raises(FrontendError, match="separator_token_id is missing"):
        read("bert", tokens[:101], separator=1)


# --- what goes wrong ----------------------------------------------------------------------------------------------


class PanicException(BaseException):
    """As the library raises it."""


def test_what_the_library_cannot_build_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: BaseException) -> None:
        def build(*given: object) -> None:
            raise error

        monkeypatch.setattr(reading, "build", build)
        byte_level("gpt-2")

    for error in (ValueError("why\n not"), PanicException("why\n not")):
        with pytest.raises(FrontendError, match=rf"cannot be built \({type(error).__name__}: why not\)$"):
            failing(error)
    with pytest.raises(FrontendError) as told:
        failing(ValueError("x" * 1000))
    assert str(told.value).count("x") == 200
    for passed in (KeyboardInterrupt(), FrontendError("as it is")):
        with pytest.raises(type(passed)) as same:
            failing(passed)
        assert same.value is passed


def test_keys_that_are_not_obeyed_are_named() -> None:
    more = {"magic": 1, "wand": 2, "fim_pre_token_id": 3, "add_sep_token": True, "scores": [1.0], "hf_json": "{}"}
    expected = "settings of the tokenizer that are not obeyed: tokenizer.ggml.magic, tokenizer.ggml.wand"
    assert byte_level("gpt-2", **more).notes == (expected,) and byte_level("gpt-2").notes == ()


def test_a_way_of_cutting_is_named_or_missing() -> None:
    for pre, said in (
        ("new", "pre 'new' is not known"),
        ("", "pre does not say how"),
        ("default", "pre does not say how"),
    ):
        assert said in byte_level(pre).notes[-1]
    pieces = tokenizer(byte_level("llama-bpe")).pre_tokenizer.pre_tokenize_str("I'M 1234")
    assert [piece for piece, _ in pieces] == ["I", "'M", "\u0120", "123", "4"]
