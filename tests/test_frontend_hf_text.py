"""Tokenizers, templates and defaults of a directory, in the form that the runtime's manifest takes."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizer_kinds as kinds
import tokenizers
import transformers
from hf_models import tiny
from tokenizer_pair import check_decoding, check_encoding, read

from llmc.errors import FrontendError
from llmc.frontends.hf import tokenizer as hf_tokenizer
from llmc.frontends.hf.config import load_config
from llmc.frontends.hf.tokenizer import read_text
from llmc.frontends.lifted import Text


def text_of(directory: Path, **files: object) -> Text:
    """The tiny llama's text with some files replaced (None removes one; dicts become JSON)."""
    shutil.copytree(tiny("llama"), directory, dirs_exist_ok=True)
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        if content is None:
            path.unlink()
        elif isinstance(content, dict):
            old = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**old, **content}))
        else:
            path.write_text(str(content))
    return read_text(directory, load_config(directory))


def facts_of(text: Text) -> dict[str, object]:
    assert text.facts is not None
    return text.facts


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    text = text_of(tmp_path)
    ours = tokenizers.Tokenizer.from_buffer(text.files["tokenizer.json"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in ("def greet(name):\n    return", "naïve — 日本語 🙂", "", " </s>x<s>"):
        assert ours.encode(sample).ids == theirs(sample)["input_ids"]


def test_special_tokens_and_stops(tmp_path: Path) -> None:
    facts = facts_of(text_of(tmp_path, generation_config__json={"eos_token_id": [7, 9]}))
    assert (facts["bos_id"], facts["bos_token"], facts["eos_token"]) == (0, "<s>", "</s>")
    # The ids to stop at first, then the end token itself.
    assert facts["stop_ids"] == [7, 9, 1]
    assert facts["add_bos"] is False


def test_stop_ids_outside_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    facts = facts_of(text_of(tmp_path, generation_config__json={"eos_token_id": [7, 10**9, -1, "x", True]}))
    assert facts["stop_ids"] == [7, 1]


def test_a_tokenizer_that_puts_a_first_token_says_so(tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    facts = facts_of(text_of(tmp_path / "m", tokenizer__json=tokenizer.to_str()))
    assert facts["add_bos"] is True


def _named(*pairs: tuple[str, str]) -> dict[str, object]:
    return {"chat_template": [{"name": name, "template": template} for name, template in pairs]}


_NO_TEMPLATE: dict[str, object] = {"chat_template": None}
# Files, the default template, the others.
TEMPLATES: dict[str, tuple[dict[str, object], str | None, dict[str, str]]] = {
    "string": ({"tokenizer_config__json": {"chat_template": "one"}}, "one", {}),
    "list": ({"tokenizer_config__json": _named(("tool_use", "a"), ("default", "b"))}, "b", {"tool_use": "a"}),
    "list without a default": ({"tokenizer_config__json": _named(("rag", "c"))}, None, {"rag": "c"}),
    "own file first": ({"tokenizer_config__json": {"chat_template": "one"}, "chat_template__jinja": "two"}, "two", {}),
    "processor's file": (
        {"tokenizer_config__json": _NO_TEMPLATE, "chat_template__json": {"chat_template": "d"}},
        "d",
        {},
    ),
    "none": ({"tokenizer_config__json": _NO_TEMPLATE}, None, {}),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_chat_template_is_found(case: str, tmp_path: Path) -> None:
    files, default, others = TEMPLATES[case]
    facts = facts_of(text_of(tmp_path, **files))
    assert (facts["chat_template"], facts["chat_templates"]) == (default, others)


def test_templates_in_a_folder_have_their_files_names(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    facts = facts_of(text_of(tmp_path, chat_template__jinja="plain"))
    assert (facts["chat_template"], facts["chat_templates"]) == ("plain", {"tool_use": "tools"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == {"default": "plain", "tool_use": "tools"}


def test_generation_is_greedy_unless_the_checkpoint_samples(tmp_path: Path) -> None:
    settings: dict[str, object] = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    quiet = text_of(tmp_path, generation_config__json=settings)
    assert quiet.generation == settings | {"temperature": 0.0}
    samples = text_of(tmp_path, generation_config__json=settings | {"do_sample": True})
    assert samples.generation == settings | {"top_k": 50}


def test_a_model_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    text = text_of(tmp_path, tokenizer__json=None)
    assert text.files == {} and text.facts is None and "token ids only" in text.notes[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match="tokenizer"):
        text_of(tmp_path, tokenizer__json=content)


def test_remote_tokenizer_code_never_runs(tmp_path: Path) -> None:
    remote = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "EvilTokenizer"}
    text = text_of(tmp_path, tokenizer_config__json=remote, evil__py="raise SystemExit('code ran')")
    assert facts_of(text)["eos_token"] == "</s>"


def test_slow_files_are_converted(tmp_path: Path) -> None:
    """vocab.json and merges.txt, as the first byte-level models had them."""
    shutil.copytree(tiny("gpt2"), tmp_path, dirs_exist_ok=True)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"})
    )
    text = read_text(tmp_path, load_config(tmp_path))
    ours = tokenizers.Tokenizer.from_buffer(text.files["tokenizer.json"])
    assert ours.decode(ours.encode("def greet(name):").ids) == "def greet(name):"


# What tokenizer files say


def _set(directory: Path, file: str = "tokenizer_config.json", **content: object) -> None:
    path = directory / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **content}))


def _drop(directory: Path, *names: str) -> None:
    path = directory / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name not in names}
    path.write_text(json.dumps(kept))


def _slow_files(directory: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))


def _versioned(directory: Path) -> None:
    shutil.copy(directory / "tokenizer.json", directory / "tokenizer.4.0.0.json")
    kinds.llama3(directory)
    (directory / "tokenizer.json").rename(directory / "other")
    (directory / "tokenizer.4.0.0.json").rename(directory / "tokenizer.json")
    (directory / "other").rename(directory / "tokenizer.9.9.9.json")
    _set(directory, fast_tokenizer_files=["tokenizer.json", "tokenizer.9.9.9.json"])


_UNTYPED = {"content": "<new>", "lstrip": True, "rstrip": False, "special": True}
_TOKEN = {"__type": "AddedToken", **_UNTYPED}
# kind of tokenizer, and what changes in its files
SAID: dict[str, tuple[str, Callable[[Path], object]]] = {
    "clean_up absent": ("word_piece", lambda path: _drop(path, "clean_up_tokenization_spaces")),
    "clean_up null": ("unigram_that_cleans_up", lambda path: _set(path, clean_up_tokenization_spaces=None)),
    "clean_up for words": ("words", lambda path: None),
    "split_special_tokens": ("llama2", lambda path: _set(path, split_special_tokens=True)),
    "no split_special_tokens": ("split_special", lambda path: _set(path, split_special_tokens=False)),
    "spaces_between_special_tokens": ("qwen2", lambda path: _set(path, spaces_between_special_tokens=True)),
    "use_default_system_prompt": ("llama2", lambda path: _set(path, use_default_system_prompt=True)),
    "errors": ("gpt2", lambda path: _set(path, errors="strict")),
    "legacy": ("llama2", lambda path: _set(path, legacy=True)),
    "no add_prefix_space": ("llama2", lambda path: _set(path, add_prefix_space=False)),
    "add_prefix_space": ("gpt2", lambda path: _set(path, add_prefix_space=True)),
    "add_eos_token": ("llama2", lambda path: _set(path, add_eos_token=True)),
    "no add_bos_token": ("llama2", lambda path: _set(path, add_bos_token=False)),
    "extra_special_tokens list": ("gpt2", lambda path: _set(path, extra_special_tokens=["def", "<new>"])),
    "extra_special_tokens dict": ("gpt2", lambda path: _set(path, extra_special_tokens={"image_token": "<new>"})),
    "additional_special_tokens": ("llama3", lambda path: _set(path, additional_special_tokens=["Hello", _TOKEN])),
    "token of a name of its own": ("gpt2", lambda path: _set(path, image_token="<new>")),
    "added_tokens_decoder": ("gpt2", lambda path: _set(path, added_tokens_decoder={"600": _UNTYPED})),
    "special_tokens_map.json": ("gpt2", lambda path: _set(path, "special_tokens_map.json", pad_token="Hello")),
    "added_tokens.json": ("gpt2", lambda path: (_slow_files(path), _set(path, "added_tokens.json", **{"<new>": 600}))),
    "slow files": ("gpt2", _slow_files),
    "fast_tokenizer_files": ("gpt2", _versioned),
    "padding_side": ("llama2", lambda path: _set(path, padding_side="right", pad_token="</s>")),
    "model_max_length": ("gpt2", lambda path: _set(path, model_max_length=3)),
    "do_lower_case": ("word_piece", lambda path: _set(path, do_lower_case=False)),
    "strip_accents": ("word_piece", lambda path: _set(path, strip_accents=True, tokenize_chinese_chars=False)),
    "class unknown": ("llama3", lambda path: _set(path, tokenizer_class="NobodyKnowsTokenizer")),
    "class of another model": ("gpt2", lambda path: _set(path, tokenizer_class="LlamaTokenizer")),
    "no tokenizer_config": ("gpt2", lambda path: (path / "tokenizer_config.json").unlink()),
    "chat_template": ("gpt2", lambda path: _set(path, chat_template="x")),
    "special no longer": (
        "llama3",
        lambda path: _set(path, added_tokens_decoder={"2": _UNTYPED | {"content": "<|eot_id|>", "special": False}}),
    ),
    "bos is the unknown token": ("words", lambda path: _set(path, bos_token="<unk>")),
}


@pytest.mark.parametrize("case", SAID)
def test_what_tokenizer_files_say_takes_effect_as_in_transformers(case: str, tmp_path: Path) -> None:
    kind, change = SAID[case]
    kinds.KINDS[kind](tmp_path)
    change(tmp_path)
    pair = read(tmp_path)
    for text in [*kinds.strings(40, seed=5), "a <new> def <new>Hello</s> <s> <|eot_id|> a", "It 's , x ."]:
        check_decoding(pair, check_encoding(pair, text), [2])


ENDS: dict[str, tuple[dict[str, object], list[int]]] = {
    "generation_config": ({"generation_config__json": {"eos_token_id": [7, 9]}}, [7, 9, 1]),
    "one": ({"generation_config__json": {"eos_token_id": 7}}, [7, 1]),
    "lists of lists": ({"generation_config__json": {"eos_token_id": [[7], [9, 7]]}}, [7, 9, 1]),
    "config": ({"generation_config__json": None, "config__json": {"eos_token_id": [5, 6]}}, [5, 6, 1]),
    "null": ({"generation_config__json": {"eos_token_id": None}, "config__json": {"eos_token_id": None}}, [1]),
    "object": ({"tokenizer_config__json": {"eos_token": {"__type": "AddedToken", "content": "<s>"}}}, [1, 0]),
    "object without a type": ({"tokenizer_config__json": {"eos_token": {"content": "<s>", "lstrip": False}}}, [1, 0]),
    "special_tokens_map": (
        {"tokenizer_config__json": {"eos_token": None}, "special_tokens_map__json": {"eos_token": {"content": "<s>"}}},
        [1, 0],
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_end_tokens_are_found_wherever_they_stand(case: str, tmp_path: Path) -> None:
    files, ends = ENDS[case]
    assert facts_of(text_of(tmp_path, **files))["stop_ids"] == ends


def test_remote_tokenizer_code_leaves_the_other_settings(tmp_path: Path) -> None:
    """Its class is not run, which a note says; what the files say besides takes effect."""
    kinds.unigram_that_cleans_up(tmp_path)
    remote = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "EvilTokenizer"}
    _set(tmp_path, **remote, split_special_tokens=True, extra_special_tokens=["def"], truncation_side="left")
    text = read_text(tmp_path, load_config(tmp_path))
    facts = facts_of(text)
    assert (facts["clean_up_spaces"], facts["split_special_tokens"], facts["truncation_side"]) == (True, True, "left")
    assert any("EvilTokenizer" in note and "never runs" in note for note in text.notes)
    ours = tokenizers.Tokenizer.from_buffer(text.files["tokenizer.json"])
    assert any(token.special and token.content == "def" for token in ours.get_added_tokens_decoder().values())


def test_a_tokenizer_with_steps_of_its_own_takes_ids_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python around tokenizer.json cannot be in an artifact: text would be other than in transformers."""
    kinds.gpt2(tmp_path)
    whole = transformers.GPT2Tokenizer._encode_plus, transformers.GPT2Tokenizer._decode

    def encode(self: object, text: str, **more: object) -> object:
        return whole[0](self, text.upper(), **more)

    def decode(self: object, token_ids: list[int], **more: object) -> object:
        return whole[1](self, token_ids=[*token_ids, 70], **more)

    for name, changed in (("_encode_plus", encode), ("_decode", decode)):
        with monkeypatch.context() as patch:
            patch.setattr(transformers.GPT2Tokenizer, name, changed)
            text = read_text(tmp_path, load_config(tmp_path))
        assert text.facts is None and "steps of its own" in text.notes[0] and "GPT2Tokenizer" in text.notes[0]
    assert read_text(tmp_path, load_config(tmp_path)).facts is not None


def test_a_tokenizer_that_changes_as_it_is_written_takes_ids_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the artifact holds is what is compared, token by token: here one that the file makes special."""
    kinds.flags(tmp_path)
    whole = hf_tokenizer._written

    def written(backend: tokenizers.Tokenizer) -> str:
        state = json.loads(whole(backend))
        next(token for token in state["added_tokens"] if token["content"] == "Hello")["special"] = True
        return json.dumps(state)

    assert read_text(tmp_path, load_config(tmp_path)).facts is not None
    monkeypatch.setattr(hf_tokenizer, "_written", written)
    text = read_text(tmp_path, load_config(tmp_path))
    assert text.facts is None and "added tokens that this file cannot hold" in text.notes[0]


def test_merges_are_never_dropped_at_random(tmp_path: Path) -> None:
    """A setting of training, which a note names: transformers would encode otherwise each time."""
    kinds.llama3(tmp_path)
    plain = read_text(tmp_path, load_config(tmp_path))
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    text = read_text(tmp_path, load_config(tmp_path))
    assert text.files == plain.files and text.facts == plain.facts
    assert text.notes == ("the tokenizer drops merges at random (dropout 0.5): the artifact does not",)


def test_a_tokenizer_whose_library_panics_is_refused(tmp_path: Path) -> None:
    """What is not Python's own error: a decoder that reads before a token's start."""
    kinds.llama3(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.decoder = tokenizers.decoders.Strip("a", 0, 2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FrontendError, match=r"its tokenizer cannot be read \(PanicException"):
        read_text(tmp_path, load_config(tmp_path))


def test_a_tokenizer_that_fails_on_text_is_refused(tmp_path: Path) -> None:
    """Its files can be read, but not every text can be encoded: no [UNK] in its vocabulary."""
    kinds.word_piece(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["unk_token"] = "[NONE]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    _set(tmp_path, unk_token="[NONE]", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(FrontendError, match=r"its tokenizer cannot be read \(.*(Missing|\[NONE\]|\[UNK\])"):
        read_text(tmp_path, load_config(tmp_path))


def test_steps_for_some_texts_alone_are_noted(tmp_path: Path) -> None:
    """CodeLlama's class fills a gap that <FILL_ME> marks; all other text is as its tokenizer.json says."""
    kinds.llama2(tmp_path)
    _set(tmp_path, tokenizer_class="CodeLlamaTokenizer")
    _set(tmp_path, "config.json", model_type="llama")
    text = read_text(tmp_path, load_config(tmp_path))
    assert text.facts is not None
    assert [
        note for note in text.notes if "CodeLlamaTokenizer does more with some texts" in note and "_encode_plus" in note
    ]
    kinds.llama3(tmp_path / "plain")
    assert read_text(tmp_path / "plain", load_config(tmp_path / "plain")).notes == ()


# SentencePiece


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose tokenizer is tokenizer.model alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("spm")
    kinds.llama2(directory)
    (directory / "tokenizer.json").unlink()
    (directory / "corpus").write_text("\n".join(line for text in kinds.CORPUS for line in text.split("\n")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus"), model_prefix=str(directory / "tokenizer"), vocab_size=400, byte_fallback=True,
        model_type="bpe", character_coverage=0.98, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return directory


def test_a_sentencepiece_model_alone_is_enough(sentence_piece: Path) -> None:
    import sentencepiece

    pair = read(sentence_piece)
    own = sentencepiece.SentencePieceProcessor(model_file=str(sentence_piece / "tokenizer.model"))
    for text in ("Hello again, don't stop!", "def greet(name):", "naïve 😀"):
        ids = check_encoding(pair, text)
        check_decoding(pair, ids, [1])
        assert ids == own.encode(text)  # this directory asks for no first token


@pytest.mark.parametrize("missing", [["sentencepiece"], ["google.protobuf"], ["sentencepiece", "google.protobuf"]])
def test_without_its_library_a_sentencepiece_model_is_refused_by_its_name(
    sentence_piece: Path, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hf_tokenizer.find_spec
    monkeypatch.setattr(hf_tokenizer, "find_spec", lambda name: None if name in missing else found(name))
    names = " ".join(name.removeprefix("google.") for name in missing)
    with pytest.raises(FrontendError, match=rf"tokenizer.model is a SentencePiece model.*pip install {names}, or put"):
        read_text(sentence_piece, load_config(sentence_piece))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"\x0a\xff\xff"])
def test_a_damaged_sentencepiece_model_is_refused(sentence_piece: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(sentence_piece, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        FrontendError, match=r"tokenizer.model is neither a SentencePiece model nor a tiktoken vocabulary"
    ):
        read_text(tmp_path, load_config(tmp_path))


def test_a_tiktoken_vocabulary_is_not_taken_for_a_sentencepiece_model(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    kinds.llama2(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    if hf_tokenizer.find_spec("tiktoken") is None:
        with pytest.raises(FrontendError, match="is a tiktoken vocabulary, and reading it needs tiktoken: pip install"):
            read_text(tmp_path, load_config(tmp_path))
