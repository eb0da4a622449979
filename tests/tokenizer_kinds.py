"""Twenty kinds of tokenizers, as checkpoints have them, with small vocabularies; and strings that try them.

Every kind is a function that writes a directory: tokenizer.json, tokenizer_config.json and a config.json.
"""

# ruff: noqa: RUF001  (letters of other scripts that look like Latin ones are wanted here)

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "def greet(name):\n    return 'hello, ' + name\n\nfor index in range(10):\n    print(index, greet('world'))\n" * 3,
    "The quick brown fox jumps over the lazy dog. Don't stop! It 's 3.14 or 1,000,000 , isn 't it ?\n\n\tHello again.\n"
    * 3,
    "naïve café déjà vu straße “quotes” … №5 Привет мир! Γειά σου. שלום مرحبا नमस्ते\n" * 2,
    "日本語のテキストです。今天天气很好，中文字符。한국어 텍스트 입니다.\n" * 2,
    "😀 😃 👍🏽 👨‍👩‍👧 🇫🇷 ❤️ I 'm , we 've , you 're fine .\n" * 2,
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _write(directory: Path, tokenizer: Tokenizer, **settings: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    size = max(tokenizer.get_vocab(True).values()) + 1
    config = {"model_type": "llama", "vocab_size": size, "hidden_size": 8, "num_attention_heads": 1}
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "intermediate_size": 8}))


def _around(single: str, *tokens: tuple[str, int]) -> processors.PostProcessor:
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=list(tokens))


# Byte-level BPE


def _byte_level(special: list[str], pre_tokenizer: object = None, **model: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _split(pattern: str) -> object:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2(directory: Path, **settings: object) -> None:
    end = "<|endoftext|>"
    names = {"bos_token": end, "eos_token": end, "unk_token": end}
    _write(directory, _byte_level([end]), tokenizer_class="GPT2Tokenizer", **names, **settings)


def gpt2_that_cleans_up(directory: Path) -> None:
    """The setting does nothing: it is not for BPE."""
    gpt2(directory, clean_up_tokenization_spaces=True)


def gpt2_forced_to_clean_up(directory: Path) -> None:
    forced = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    gpt2(directory, clean_up_tokenization_spaces=True, **forced)


def opt(directory: Path) -> None:
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = _around("</s> $A", ("</s>", 2))
    _write(directory, tokenizer, tokenizer_class="GPT2Tokenizer", bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def roberta(directory: Path) -> None:
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pre_tokenizers.ByteLevel(True))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True}
    _write(directory, tokenizer, tokenizer_class="RobertaTokenizer", mask_token=mask, add_prefix_space=True)


def llama3(directory: Path) -> None:
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = _byte_level([begin, end, "<|eot_id|>"], _split(_GPT4_WORDS), ignore_merges=True)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(False), _around(f"{begin} $A", (begin, 0))])
    names = {"bos_token": begin, "eos_token": end, "clean_up_tokenization_spaces": True}
    _write(directory, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **names)


def qwen2(directory: Path) -> None:
    words = _GPT4_WORDS.replace("{1,3}", "")
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], _split(words))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("<tool_call>", "<think>")])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    _write(directory, tokenizer, tokenizer_class="Qwen2Tokenizer", errors="replace", **names)


def deepseek(directory: Path) -> None:
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    pieces = [r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]
    splits = [pre_tokenizers.Split(Regex(piece), "isolated") for piece in pieces]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = _byte_level([begin, end], pre_tokenizers.Sequence([*splits, bytes_of]))
    tokenizer.post_processor = _around(f"{begin} $A", (begin, 0))
    _write(directory, tokenizer, tokenizer_class="LlamaTokenizerFast", bos_token=begin, eos_token=end, legacy=True)


def flags(directory: Path) -> None:
    """Added tokens that take spaces with them, that match whole words, and that are not special."""
    tokenizer = _byte_level(["<s>", "</s>"])
    tokenizer.add_special_tokens(
        [AddedToken("<L>", lstrip=True), AddedToken("<R>", rstrip=True), AddedToken("<W>", single_word=True)]
    )
    tokenizer.add_tokens([AddedToken("Hello"), AddedToken("  ", normalized=False)])
    _write(directory, tokenizer, bos_token="<s>", eos_token="</s>")


def split_special(directory: Path) -> None:
    """In text, special tokens are text."""
    _write(directory, _byte_level(["<s>", "</s>"]), bos_token="<s>", eos_token="</s>", split_special_tokens=True)


# BPE over marked words, with a token a byte


def _byte_fallback() -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=500, limit_alphabet=80, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    words = dict.fromkeys(["<unk>", "<s>", "</s>", *_BYTES, *sorted(model["vocab"], key=model["vocab"].get)])
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in ("<unk>", "<s>", "</s>")])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = _around("<s> $A", ("<s>", 1))
    return tokenizer


_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def llama2(directory: Path) -> None:
    _write(directory, _byte_fallback(), tokenizer_class="LlamaTokenizer", legacy=False, **_ENDS)


def llama2_generic(directory: Path) -> None:
    _write(directory, _byte_fallback(), tokenizer_class="PreTrainedTokenizerFast", **_ENDS)


def mistral(directory: Path) -> None:
    tokenizer = _byte_fallback()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["[INST]", "[/INST]"])
    _write(directory, tokenizer, tokenizer_class="LlamaTokenizer", **_ENDS)


def phi3(directory: Path) -> None:
    tokenizer = _byte_fallback()
    marks = ("<|user|>", "<|end|>")
    tokenizer.add_special_tokens([AddedToken(word, rstrip=True, normalized=False) for word in marks])
    _write(
        directory, tokenizer, tokenizer_class="LlamaTokenizer", add_bos_token=False, **_ENDS | {"eos_token": "<|end|>"}
    )


def gemma(directory: Path) -> None:
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<end_of_turn>"])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("\n\n", "▁▁", "<table>")])
    _write(directory, tokenizer, tokenizer_class="GemmaTokenizer", **_ENDS)


# Unigram, WordPiece, words


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram(directory: Path) -> None:
    tokenizer = _unigram()
    tokenizer.post_processor = _around("<s> $A </s>", ("<s>", 0), ("</s>", 2))
    _write(directory, tokenizer, tokenizer_class="XLMRobertaTokenizer", mask_token="<mask>", **_ENDS)


def unigram_that_cleans_up(directory: Path) -> None:
    tokenizer = _unigram()
    tokenizer.post_processor = _around("</s> $A", ("</s>", 2))
    _write(directory, tokenizer, clean_up_tokenization_spaces=True, **_ENDS)


def _word_piece(clean_up: bool, **normalizer: object) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=clean_up)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=350, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece(directory: Path) -> None:
    tokenizer = _word_piece(True, lowercase=True)
    tokenizer.post_processor = _around("[CLS] $A [SEP]", ("[CLS]", 2), ("[SEP]", 3))
    _write(directory, tokenizer, tokenizer_class="BertTokenizer", do_lower_case=True, clean_up_tokenization_spaces=True)


def word_piece_without_its_own_clean_up(directory: Path) -> None:
    tokenizer = _word_piece(False, lowercase=False, strip_accents=False)
    _write(directory, tokenizer, unk_token="[UNK]", eos_token="[SEP]", clean_up_tokenization_spaces=True)


def words(directory: Path) -> None:
    """No decoder: spaces between tokens."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    _write(directory, tokenizer, clean_up_tokenization_spaces=True, **_ENDS)


def words_with_suffixes(directory: Path) -> None:
    """As the first GPT: a mark ends a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    _write(directory, tokenizer, **_ENDS)


KINDS: dict[str, Callable[[Path], None]] = {
    kind.__name__: kind
    for kind in (
        gpt2, gpt2_that_cleans_up, gpt2_forced_to_clean_up, opt, roberta, llama3, qwen2, deepseek, flags, split_special,
        llama2, llama2_generic, mistral, phi3, gemma, unigram, unigram_that_cleans_up, word_piece,
        word_piece_without_its_own_clean_up, words, words_with_suffixes,
    )
}  # fmt: skip

_CODES = (
    (0x20, 0x7E), (0xA0, 0x2FF), (0x300, 0x36F), (0x370, 0x6FF), (0x900, 0xDFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xFFF0, 0xFFFF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF),
)  # fmt: skip
_SPACES = ("\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", " \n ", "\x0b", "\x00", "\x7f", "  ", "     ")
_EMOJI = ("😀", "👍🏽", "🇫🇷", "❤️", "👨‍👩‍👧", "🏳️‍🌈")
_MARKS = (
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "[INST]", "<|user|>", "<|end|>",
    "[CLS]", "[SEP]", "<tool_call>", "<unk>", "<0x41>", "▁", "##", "Ġ", "<L>", "<R>", "<W>", "<mask>", "</w>", "\ufffd",
)  # fmt: skip
_PUNCTUATION = (" .", " ,", " !", " ?", " 's", " n't", " ' ", "don't", " 've", "…", "''", "' ", " do not", " '", " n")


def strings(count: int, seed: int = 7) -> list[str]:
    """Unicode of many kinds, spaces, code, contractions, control characters and special tokens within text."""
    chance = random.Random(seed)
    known = [word for text in CORPUS for word in text.split()]
    parts: list[Callable[[], str]] = [
        lambda: chance.choice(known),
        lambda: chance.choice(_SPACES),
        lambda: chance.choice(_EMOJI),
        lambda: chance.choice("aeonu") + chance.choice("\u0301\u0308\u0327\u0323\u20dd") * chance.randint(1, 2),
        lambda: chance.choice(_MARKS),
        lambda: chance.choice(_PUNCTUATION),
        lambda: str(chance.randrange(10 ** chance.randint(1, 9))),
        lambda: chr(chance.randint(*chance.choice(_CODES))),
    ]
    out = ["", " ", "  ", "\n", "a", " a", "a ", "\ufffd", "x\ufffd", "\ufeffhi", "A" * 100, "\u0301", "don ' t ' ' '"]
    while len(out) < count:
        pieces = [chance.choice(parts)() + " " * (chance.random() < 0.4) for _ in range(chance.randint(1, 14))]
        out.append("".join(pieces))
    return out[:count]


def id_lists(size: int, count: int, seed: int = 7) -> list[list[int]]:
    """Any ids: characters that are broken, special tokens in between, and some that no tokenizer knows."""
    chance = random.Random(seed)
    lists = [[chance.randrange(size + 2) for _ in range(chance.randint(1, 30))] for _ in range(count - count // 2)]
    narrow = min(size, 280)  # mostly bytes, in tokenizers that begin with them
    return lists + [[chance.randrange(narrow) for _ in range(chance.randint(1, 30))] for _ in range(count // 2)]
