"""Vocabularies in GGUF metadata encode and decode as the libraries that they come from."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from gguf_files import TEMPLATE, write

from llmc.errors import FrontendError
from llmc.frontends.gguf.pre_tokenizers import PRE_TOKENIZERS
from llmc.frontends.gguf.reader import GgufFile
from llmc.frontends.gguf.text import read_text
from llmc.frontends.lifted import Text
from llmc.runtime.manifest import TextFacts
from llmc.runtime.tokenizer import Tokenizer

CORPUS = [
    "def greet(name):\n    return 'hello, ' + name\n", "The quick brown fox jumps over the lazy dog. " * 3,
    "numbers 1 22 333 4444 and words, words and more words!", "naïve café — 日本語 مرحبا 🙂 <tags> & [brackets]",
    "for index in range(10):\n    print(index, greet('world'))\n",
] * 8  # fmt: skip
TEXTS = (
    "a", "Hello world", "the quick  brown   fox", " leading and trailing ", "x = [1, 22, 333]\n\n\tdone",
    "naïve É 日本語 مرحبا 🙂", "don't we'll I'M", "", "words, words! 12345678",
)  # fmt: skip


def text_of(tmp_path: Path, metadata: dict[str, object], vocabulary: int = 1 << 20, by_order: bool = False) -> Text:
    path = write(tmp_path / "m.gguf", {"general.architecture": "llama", **metadata}, {})
    return read_text(path, GgufFile(path).metadata, vocabulary, by_order)


def tokenizer_of(text: Text) -> Tokenizer:
    facts = dict(text.facts or {})
    return Tokenizer(
        text.files["tokenizer.json"],
        TextFacts(
            chat_template=None, bos_id=facts["bos_id"], bos_token="", eos_token="", add_bos=bool(facts["add_bos"]),
            stop_ids=(), special_tokens={}, clean_up_spaces=bool(facts["clean_up_spaces"]),
        ),
    )  # fmt: skip


def sentence_piece(kind: str, size: int = 400, **more: object) -> object:
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=size, model_type=kind, minloglevel=3,
        hard_vocab_limit=False, character_coverage=0.99, **more,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def pieces_of(processor: object) -> dict[str, object]:
    """The vocabulary as llama.cpp's converter writes it."""
    p = processor
    count = p.get_piece_size()  # type: ignore[attr-defined]
    kinds = [
        2 if p.is_unknown(n) else 3 if p.is_control(n) else 6 if p.is_byte(n) else 5 if p.is_unused(n) else 1  # type: ignore[attr-defined]
        for n in range(count)
    ]
    return {
        "tokenizer.ggml.tokens": [p.id_to_piece(n) for n in range(count)],  # type: ignore[attr-defined]
        "tokenizer.ggml.scores": [float(p.get_score(n)) for n in range(count)],  # type: ignore[attr-defined]
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": p.unk_id(),  # type: ignore[attr-defined]
        "tokenizer.ggml.bos_token_id": p.bos_id() if p.bos_id() >= 0 else 0,  # type: ignore[attr-defined]
        "tokenizer.ggml.eos_token_id": p.eos_id(),  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_bpe(tmp_path: Path, prefix: bool) -> None:
    """Of neighbours that make a token, those with the highest score become it first: as SentencePiece itself."""
    processor = sentence_piece(
        "bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
    )  # fmt: skip
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": prefix, **pieces_of(processor)}
    tokenizer = tokenizer_of(text_of(tmp_path, metadata))
    for text in TEXTS:
        expected = processor.encode(text)  # type: ignore[attr-defined]
        if prefix and not text:
            expected = []
        assert tokenizer.encode(text) == [processor.bos_id(), *expected], text  # type: ignore[attr-defined]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unigram(tmp_path: Path) -> None:
    processor = sentence_piece("unigram", 300, normalization_rule_name="identity", remove_extra_whitespaces=True)
    metadata = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.remove_extra_whitespaces": True, **pieces_of(processor)}
    tokenizer = tokenizer_of(text_of(tmp_path, metadata))
    for text in TEXTS:
        if text:
            assert tokenizer.encode(text) == [*processor.encode(text), processor.eos_id()], text  # type: ignore[attr-defined]


def test_word_piece(tmp_path: Path) -> None:
    """BERT's vocabulary, in which llama.cpp marks beginnings of words instead of their other parts."""
    from tokenizers import BertWordPieceTokenizer

    original = BertWordPieceTokenizer(lowercase=True)
    original.train_from_iterator(CORPUS, vocab_size=300, show_progress=False)
    words = sorted(original.get_vocab(), key=original.get_vocab().__getitem__)
    special = [word for word in words if word.startswith("[") and word.endswith("]") and len(word) > 2]
    stored = [w if w in special else w[2:] if w.startswith("##") else f"\u2581{w}" for w in words]
    metadata = {
        "tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": stored,
        "tokenizer.ggml.token_type": [3 if word in special else 1 for word in words],
        "tokenizer.ggml.cls_token_id": words.index("[CLS]"), "tokenizer.ggml.unknown_token_id": words.index("[UNK]"),
        "tokenizer.ggml.seperator_token_id": words.index("[SEP]"),
    }  # fmt: skip
    tokenizer = tokenizer_of(text_of(tmp_path, metadata))
    original.save_model(str(tmp_path))
    expected = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=True)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text).ids, text


def byte_level(tmp_path: Path, pre: str, **more: object) -> tuple[dict[str, object], object]:
    """A byte-level vocabulary, and the library's own tokenizer with that way of cutting."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    original = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE_TOKENIZERS[pre].cuts]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    original.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    original.decoder = decoders.ByteLevel()
    original.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    state = json.loads(original.to_str())["model"]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.tokens": sorted(state["vocab"], key=state["vocab"].__getitem__),
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(state["vocab"]) - 2),
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, **more,
    }  # fmt: skip
    return metadata, original


@pytest.mark.parametrize("pre", sorted({value: name for name, value in PRE_TOKENIZERS.items()}.values()))
def test_byte_level(tmp_path: Path, pre: str) -> None:
    metadata, original = byte_level(tmp_path, pre, **{"tokenizer.ggml.add_bos_token": False})
    tokenizer = tokenizer_of(text_of(tmp_path, metadata))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if not PRE_TOKENIZERS[pre].whole:
            assert ids == original.encode(text).ids, text  # type: ignore[attr-defined]
        assert tokenizer.decode(ids) == text


def test_pieces_that_cuts_make() -> None:
    """What each way of cutting makes of texts that they differ in, said by hand."""
    from tokenizers import Regex, pre_tokenizers

    def cut(pre: str, text: str) -> list[str]:
        steps = [pre_tokenizers.Split(Regex(one), "isolated") for one in PRE_TOKENIZERS[pre].cuts]
        return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]

    assert cut("gpt-2", "I'm 1234  ok") == ["I", "'m", " 1234", " ", " ok"]
    assert cut("llama-bpe", "I'M 1234  ok") == ["I", "'M", " ", "123", "4", " ", " ok"]
    assert cut("qwen2", "I'M 12\n\nok") == ["I", "'M", " ", "1", "2", "\n\n", "ok"]
    assert cut("starcoder", "a12") == ["a", "1", "2"]
    assert cut("tekken", "HelloWorld 1") == ["Hello", "World", " ", "1"]
    assert cut("gpt-4o", "HelloWorld's 1234") == ["Hello", "World's", " ", "123", "4"]
    assert cut("falcon", "a=1234") == ["a", "=", "123", "4"]
    assert cut("deepseek-v3", "日本 1234") == ["日本", " ", "123", "4"]
    assert cut("bloom", "it, is") == ["it", ",", " is"]


def test_cuts_are_transformers() -> None:
    """Where transformers has a table of the same names, it says the same."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    from tokenizers import Regex, pre_tokenizers

    common = [name for name in mapping.GGUF_PRE_TOKENIZER_SPLITS if name in PRE_TOKENIZERS]
    assert len(common) > 15
    for name in common:
        theirs = pre_tokenizers.Split(Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
        (ours,) = (pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE_TOKENIZERS[name].cuts)
        for text in (*CORPUS[:5], *TEXTS):
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), (name, text)


def test_an_unknown_cut_is_told(tmp_path: Path) -> None:
    metadata, _ = byte_level(tmp_path, "gpt-2")
    for pre in ("fancy-new", "default", ""):
        text = text_of(tmp_path, metadata | {"tokenizer.ggml.pre": pre})
        assert text.facts is None
        assert "tokenizer.ggml.pre" in text.notes[-1] and "token ids only" in text.notes[-1]


def test_special_tokens_and_templates(tmp_path: Path) -> None:
    metadata, _ = byte_level(
        tmp_path, "llama-bpe",
        **{
            "tokenizer.chat_template": TEMPLATE, "tokenizer.chat_template.tool_use": "tools",
            "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.padding_token_id": 7,
        },
    )  # fmt: skip
    text = text_of(tmp_path, metadata)
    assert text.facts is not None
    assert text.facts["chat_template"] == TEMPLATE and text.facts["chat_templates"] == {"tool_use": "tools"}
    assert text.facts["stop_ids"] == [1, 5]
    assert text.facts["add_bos"] is True  # what llama.cpp does for this vocabulary where the file does not say
    assert text.facts["special_tokens"]["pad_token"]  # type: ignore[index]
    tokenizer = tokenizer_of(text)
    assert tokenizer.encode("a</s>b")[0] == 0 and 1 in tokenizer.encode("a</s>b")
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "ab"


def with_tokens(metadata: dict[str, object], *tokens: str, kind: int = 3) -> dict[str, object]:
    """The metadata of a vocabulary with tokens more at its end."""
    names, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(names, list) and isinstance(kinds, list)
    more = {"tokens": [*names, *tokens], "token_type": [*kinds, *[kind] * len(tokens)]}
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (("<|im_end|>", "<|end|>"), ("<|im_end|>", "<|end|>")),
        (("<|end|>", "<|call|>"), ("<|end|>", "<|call|>")),
        # gpt-oss: <|end|> ends its thoughts, and the answer comes behind it
        (("<|end|>", "<|return|>", "<|call|>"), ("<|return|>", "<|call|>")),
        (("<|calls|>", "<|flush|>", "<|end|>"), ("<|calls|>", "<|flush|>")),
        (("<|tool_response>", "<turn|>"), ("<|tool_response>", "<turn|>")),
        (("<|file_sep|>", "<|other|>"), ("<|file_sep|>",)),
    ],
)
def test_tokens_that_end_a_text_are_known_by_how_they_read(
    tokens: tuple[str, ...], ends: tuple[str, ...], tmp_path: Path
) -> None:
    metadata, _ = byte_level(tmp_path, "gpt-2")
    known = [*metadata["tokenizer.ggml.tokens"], *tokens]  # type: ignore[misc]
    wanted = {known.index(token) for token in ends} | ({1} if "<|tool_response>" not in tokens else set())
    for kind in (3, 4):
        facts = text_of(tmp_path, with_tokens(metadata, *tokens, kind=kind)).facts
        assert facts is not None and set(facts["stop_ids"]) == wanted  # type: ignore[call-overload]
    facts = text_of(tmp_path, with_tokens(metadata, *tokens, kind=1)).facts
    assert facts is not None and facts["stop_ids"] == [1]
    named = {"tokenizer.ggml.fim_sep_token_id": len(known) - 1}
    facts = text_of(tmp_path, with_tokens(metadata, *tokens, kind=1) | named).facts
    assert facts is not None and facts["stop_ids"] == [1, len(known) - 1]


def test_tokens_of_some_models_take_the_spaces_beside_them(tmp_path: Path) -> None:
    metadata = with_tokens(byte_level(tmp_path, "gpt-2")[0], "<|user|>", "<|endoftext|>", "[MASK]", "<mask>")

    def cut(text: str, **more: object) -> list[str]:
        """The tokens of a text."""
        named = {key.replace("__", "."): value for key, value in more.items()}
        ids = tokenizer_of(text_of(tmp_path, metadata | named)).encode(text, add_special=False)
        return [str(metadata["tokenizer.ggml.tokens"][number]) for number in ids]  # type: ignore[index]

    assert cut("<|user|>\na") == ["<|user|>", "Ċ", "a"]
    for name in ("Phi-3-mini", "phi3"):
        assert cut("<|user|> \na", general__name=name) == ["<|user|>", "a"]
        assert cut("<|endoftext|>\na", general__name=name) == ["<|endoftext|>", "Ċ", "a"]
    assert cut("a [MASK]", general__name="modern-bert")[-2:] == ["a", "[MASK]"]
    assert cut("a <mask>", general__architecture="jina-bert-v3")[-2:] == ["a", "<mask>"]
    assert cut("a <mask>", tokenizer__ggml__pre="jina-v2-de")[-2:] == ["a", "<mask>"]


def test_sampling_settings(tmp_path: Path) -> None:
    metadata, _ = byte_level(tmp_path, "gpt-2")
    assert text_of(tmp_path, metadata).generation == {"temperature": 0.0}
    sampling = {"general.sampling.temp": 0.75, "general.sampling.top_k": 20, "general.sampling.mirostat": 1}
    text = text_of(tmp_path, metadata | sampling)
    assert text.generation == {"temperature": 0.75, "top_k": 20}
    assert any("mirostat" in note for note in text.notes)
    given = {"temp": 0.5, "top_k": 7, "top_p": 0.875, "min_p": 0.125, "penalty_repeat": 1.25}
    text = text_of(tmp_path, metadata | {f"general.sampling.{name}": value for name, value in given.items()})
    assert text.generation == {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.875,
        "min_p": 0.125,
        "repetition_penalty": 1.25,
    }
    text = text_of(tmp_path, metadata | {"general.sampling.top_k": 20.5})
    assert "top_k" not in text.generation and any("top_k must be an integer" in note for note in text.notes)
    text = text_of(tmp_path, metadata | {"tokenizer.ggml.suppress_tokens": [3, 4], "tokenizer.ggml.magic": True})
    assert text.generation["suppress_tokens"] == [3, 4]
    assert any("tokenizer.ggml.magic" in note for note in text.notes)


def test_padding_may_be_an_ordinary_token(tmp_path: Path) -> None:
    metadata, _ = byte_level(tmp_path, "gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    text = text_of(tmp_path, metadata | {"tokenizer.ggml.padding_token_id": tokens.index("!")})  # type: ignore[attr-defined]
    assert not text.notes
    tokenizer = tokenizer_of(text)
    assert tokenizer.decode(tokenizer.encode("wow!")) == "wow!"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "twice"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "list of strings"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 numbers"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "scores must have a number"),
        ({"tokenizer.ggml.add_bos_token": 3}, "must be true or false"),
    ],
)
def test_wrong_lists_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    metadata, _ = byte_level(tmp_path, "gpt-2")
    with pytest.raises(FrontendError, match=said):
        text_of(tmp_path, metadata | change)


@pytest.mark.parametrize("kind", ["none", "rwkv", "plamo2"])
def test_other_kinds_take_ids_only(tmp_path: Path, kind: str) -> None:
    metadata, _ = byte_level(tmp_path, "gpt-2")
    text = text_of(tmp_path, metadata | {"tokenizer.ggml.model": kind})
    assert text.facts is None and "token ids only" in text.notes[-1]
