"""What an artifact says of a tokenizer, fact by fact, and what of its files is read at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmc.errors import FrontendError
from llmc.frontends.hf import tokenizer as hf
from llmc.frontends.hf.generation import NOTHING, Generation
from llmc.frontends.lifted import Text

WORDS = ("<unk>", "<s>", "</s>", "Hello", "world", "a")


def backend(*added: str | AddedToken, first: str = "") -> tokenizers.Tokenizer:
    """A tokenizer of words with ids 0 to 5. added: tokens after these. first: what every text gets in front."""
    built = tokenizers.Tokenizer(models.WordLevel(dict(zip(WORDS, range(6), strict=True)), unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.add_tokens(list(added))
    if first:
        number = built.token_to_id(first)
        built.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, number)])
    return built


def wrapped(built: tokenizers.Tokenizer, **settings: object) -> PreTrainedTokenizerFast:
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=built, **settings)


def of_size(size: int) -> Any:
    """A config of a text model with this vocabulary, within another that has none."""
    return SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=size) if decoder else None)


def text_of(
    directory: Path, built: tokenizers.Tokenizer, size: int = 6, ends: list[int] | None = None, **settings: object
) -> Text:
    generation = NOTHING if ends is None else Generation({"top_k": 3}, ends, ("of generation",))
    return hf.text_of(wrapped(built, **settings), ("of the tokenizer",), directory, of_size(size), generation)


def facts_of(*given: Any, **settings: Any) -> dict[str, Any]:
    facts = text_of(*given, **settings).facts
    assert facts is not None
    return facts


def test_ids_beyond_the_models_vocabulary_are_told(tmp_path: Path) -> None:
    """Of words and of added tokens."""
    for built, size, highest in ((backend(), 5, 5), (backend("<new>", "<newer>"), 7, 7), (backend("<new>"), 6, 6)):
        notes = text_of(tmp_path, built, size).notes
        assert notes[0] == "of the tokenizer"
        assert f"the tokenizer has ids up to {highest}, and the model a vocabulary of {size}: " in notes[1]
    for built, size in ((backend(), 6), (backend("<new>"), 7)):
        assert text_of(tmp_path, built, size).notes == ("of the tokenizer",)


def test_a_token_that_the_model_does_not_have_neither_begins_nor_ends_a_text(tmp_path: Path) -> None:
    built = backend("<a>", "<b>")
    facts = facts_of(tmp_path, built, 7, [6, 7, 0, 6], bos_token="<a>", eos_token="<b>")
    assert (facts["bos_id"], facts["bos_token"], facts["stop_ids"]) == (6, "<a>", [6, 0])
    facts = facts_of(tmp_path, built, 7, [6], bos_token="<b>", eos_token="<unk>")
    assert (facts["bos_id"], facts["bos_token"], facts["stop_ids"]) == (None, "<b>", [6, 0])
    assert facts_of(tmp_path, built, 6, bos_token="<b>")["bos_id"] is None
    facts = facts_of(tmp_path, built, 8, bos_token="<unk>", eos_token="</s>")
    assert (facts["bos_id"], facts["eos_token"], facts["stop_ids"]) == (0, "</s>", [2])
    facts = facts_of(tmp_path, built, 8, bos_token=None, eos_token=None)
    assert (facts["bos_id"], facts["bos_token"], facts["eos_token"]) == (None, "", "")
    assert (facts["stop_ids"], facts["add_bos"]) == ([], False)


def test_a_model_without_a_tokenizer_keeps_its_settings_of_generation(tmp_path: Path) -> None:
    generation = Generation({"top_k": 3}, [2], ("of generation",))
    text = hf.text_of(None, ("of the tokenizer",), tmp_path, of_size(6), generation)
    assert (text.files, text.facts, text.generation) == ({}, None, {"top_k": 3})
    assert text.notes == ("of the tokenizer", "of generation")
    assert text_of(tmp_path, backend(), ends=[2]).notes == ("of the tokenizer", "of generation")
    assert text_of(tmp_path, backend(), ends=[2]).generation == {"top_k": 3}


def test_special_tokens_are_by_their_names(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, backend("<new>"), 7, pad_token="<new>", split_special_tokens=True)
    assert facts["special_tokens"] == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<new>",
    }  # fmt: skip
    assert facts["split_special_tokens"] is True
    assert facts_of(tmp_path, backend())["split_special_tokens"] is False


@pytest.mark.parametrize(
    ("first", "bos", "puts"),
    [("<s>", "<s>", True), ("</s>", "<s>", False), ("<unk>", "<s>", False), ("", "<s>", False), ("", "<unk>", False)],
)
def test_texts_begin_with_a_token_where_all_of_them_do(first: str, bos: str, puts: bool, tmp_path: Path) -> None:
    """A first token that is one of the text's own, as an unknown one, is none."""
    assert facts_of(tmp_path, backend(first=first), bos_token=bos)["add_bos"] is puts


def test_a_token_that_only_some_texts_begin_with_is_not_put_first() -> None:
    encoded = iter([SimpleNamespace(ids=[1, 3], special_tokens_mask=[1, 0])] * 4 + [SimpleNamespace(ids=[3])])
    assert not hf._puts_first(SimpleNamespace(encode=lambda text: next(encoded)), 1)


# Tokens as the artifact's file holds them


def special_once() -> tokenizers.Tokenizer:
    """A token that was special when it was added, and is not any more: the library's decoding still skips it."""
    built = backend()
    built.add_special_tokens([AddedToken("<é>", special=True)])
    built.add_tokens([AddedToken("<é>", special=False)])
    return built


def test_a_token_that_decoding_skips_is_special_in_the_file() -> None:
    """Others are as they are, to the byte."""
    built = special_once()
    assert built.decode([6], skip_special_tokens=True) == "" and not built.get_added_tokens_decoder()[6].special
    text = hf._written(built)
    held = tokenizers.Tokenizer.from_str(text)
    assert held.decode([6], skip_special_tokens=True) == "" and held.decode([6], skip_special_tokens=False) == "<é>"
    for other in (backend("<new>"), backend(AddedToken("<new>", special=True)), backend()):
        assert hf._written(other) == other.to_str()
    built.add_tokens(["<plain>"])
    kept = {token["content"]: token["special"] for token in json.loads(hf._written(built))["added_tokens"]}
    assert kept == {"<é>": True, "<plain>": False}


def renamed(old: str, new: str) -> Callable[[tokenizers.Tokenizer], str]:
    return lambda built: str(built.to_str()).replace(f'"content":"{old}"', f'"content":"{new}"')


CHANGED: dict[str, Callable[[tokenizers.Tokenizer], str]] = {
    "a name": renamed("<new>", "<other>"),
    "a name before it": renamed("<new>", "<n>"),
    "one that is skipped": lambda built: built.to_str().replace('"special":false', '"special":true'),
    "one that is not": lambda built: built.to_str().replace('"special":true', '"special":false'),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_file_that_holds_other_tokens_is_not_taken(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = wrapped(backend("<new>", AddedToken("<skipped>", special=True)))
    assert hf._is_whole(whole, whole.backend_tokenizer)
    monkeypatch.setattr(hf, "_written", CHANGED[case])
    assert not hf._is_whole(whole, whole.backend_tokenizer)


def test_steps_in_python_cannot_be_written() -> None:
    """Nor can what the library does not read again."""

    class Upper:
        def normalize(self, text: tokenizers.NormalizedString) -> None:
            text.uppercase()

    whole = wrapped(backend())
    assert hf._is_whole(whole, whole.backend_tokenizer)
    whole.backend_tokenizer.normalizer = tokenizers.normalizers.Normalizer.custom(Upper())
    assert not hf._is_whole(whole, whole.backend_tokenizer)


def test_a_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    """Whatever its file says: transformers asks for it at each call, and nobody does here."""
    built = backend()
    built.enable_truncation(2)
    built.enable_padding(length=9)
    tokenizer, notes = hf._opened(wrapped(built), ("note",))
    assert tokenizer is not None and notes == ("note",)
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None


def test_a_tokenizer_that_has_no_file_takes_ids_only() -> None:
    class Slow:
        pass

    found, (note,) = hf._opened(Slow(), ())
    assert found is None and note == "Slow has no tokenizer.json form: the artifact takes token ids only"


@pytest.mark.parametrize(
    ("asked", "forced", "model", "cleans"),
    [
        (True, False, models.WordLevel({}, "<unk>"), True),
        (False, True, models.WordLevel({}, "<unk>"), False),
        (None, True, models.WordLevel({}, "<unk>"), False),
        (True, False, models.BPE(), False),
        (True, True, models.BPE(), True),
    ],
)
def test_text_is_cleaned_up_where_two_settings_agree(asked: bool, forced: bool, model: Any, cleans: bool) -> None:
    tokenizer = SimpleNamespace(
        clean_up_tokenization_spaces=asked,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=forced,
        backend_tokenizer=tokenizers.Tokenizer(model),
    )
    assert hf._cleans_up(tokenizer) is cleans


# Files


def test_transformers_reads_local_files_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def auto(directory: Path, **options: Any) -> object:
        asked.append(("auto", options))
        raise ValueError("a class of its own")

    def plain(directory: Path, **options: Any) -> str:
        asked.append(("plain", options))
        return "plain"

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", auto)
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", plain)
    with pytest.raises(ValueError, match="a class of its own"):  # without tokenizer.json
        hf._load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hf._load(tmp_path) == ("plain", ())
    tokens = {"eos_token": {"content": "<e>"}, "pad_token": "<p>", "token_of": {"content": "x"}, "x_token": {"id": 3}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**tokens, "auto_map": {}, "tokenizer_class": "T" * 99}))
    found, (note,) = hf._load(tmp_path)
    assert found == "plain" and f"own code ({'T' * 60}) never runs" in note
    assert {kind for kind, _ in asked} == {"auto", "plain"}
    assert all(options["local_files_only"] is True for _, options in asked)
    assert all(options["trust_remote_code"] is False for kind, options in asked if kind == "auto")
    end = asked[-1][1].pop("eos_token")
    assert (end.content, end.special) == ("<e>", True) and asked[-1] == ("plain", {"local_files_only": True})


def test_what_a_library_says_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")

    def fail(directory: Path) -> object:
        raise KeyError("a\n b" + "c" * 300)

    monkeypatch.setattr(hf, "_load", fail)
    with pytest.raises(FrontendError) as caught:
        hf.open_tokenizer(tmp_path)
    why = " ".join(str(KeyError("a\n b" + "c" * 300)).split())[:200]
    assert str(caught.value) == f"{tmp_path}: its tokenizer cannot be read (KeyError: {why})"

    def stop(directory: Path) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "_load", stop)
    with pytest.raises(KeyboardInterrupt):
        hf.open_tokenizer(tmp_path)


@pytest.mark.parametrize("name", hf._FILES)
def test_a_tokenizer_is_there_by_any_of_its_files(name: str, tmp_path: Path) -> None:
    assert not hf.has_tokenizer(tmp_path)
    assert hf.open_tokenizer(tmp_path) == (None, ("no tokenizer: the artifact takes token ids only",))
    (tmp_path / name).write_text("")
    assert hf.has_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "most"),
    [
        ("tokenizer.json", 512 << 20), ("tokenizer.model", 512 << 20), ("chat_template.jinja", 4 << 20),
        ("additional_chat_templates/x.jinja", 4 << 20), ("tokenizer_config.json", 16 << 20),
        ("chat_template.json", 16 << 20),
    ],
)  # fmt: skip
def test_a_file_of_text_is_read_up_to_its_limit(file: str, most: int, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    with (tmp_path / file).open("wb") as opened:
        opened.truncate(most + 1)
    if not hf.has_tokenizer(tmp_path):
        (tmp_path / "vocab.txt").write_text("")
    with pytest.raises(FrontendError, match=f"{file} has {most + 1} bytes; at most {most} are read"):
        hf.open_tokenizer(tmp_path)


def test_a_template_of_the_greatest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("x" * (4 << 20))
    assert len(hf._chat_templates(tmp_path)["default"]) == 4 << 20


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(FrontendError, match=r"chat_template\.jinja cannot be read: 'utf-8' codec"):
        hf._chat_templates(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FrontendError, match=r"chat_template\.jinja cannot be read: .*directory"):
        hf._chat_templates(tmp_path)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("t", {"default": "t"}), (None, {}), (7, {}), ({"a": "t", "b": 3}, {"a": "t"}),
        ([{"name": "a", "template": "t"}, {"name": 3, "template": "u"}, {"name": "c"}, 5], {"a": "t"}),
        ([{"name": ["a"], "template": "t"}, {"name": "b", "template": ["u"]}, {}], {}),
    ],
)  # fmt: skip
def test_templates_are_texts_by_name(said: object, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
    assert hf._chat_templates(tmp_path) == expected
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "chat_template.json")
    assert hf._chat_templates(tmp_path) == expected


def test_a_template_of_the_tokenizer_comes_before_that_of_the_processor(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one"}')
    (tmp_path / "chat_template.json").write_text('{"chat_template": "two"}')
    assert hf._chat_templates(tmp_path) == {"default": "one"}


def test_a_library_is_there_or_not() -> None:
    assert hf._is_installed("json") and not hf._is_installed("nobody_has_it") and not hf._is_installed("nobody.has.it")


def test_a_tiktoken_vocabulary_is_left_to_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is installed; and where tokenizer.json is there, no other file is looked at."""
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    monkeypatch.setattr(hf, "_is_installed", lambda name: True)
    hf._require_libraries(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FrontendError, match="is neither a SentencePiece model nor a tiktoken vocabulary"):
        hf._require_libraries(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    hf._require_libraries(tmp_path)
