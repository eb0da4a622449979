"""Tiny random encoders in a directory, as a user would have them: config, safetensors, tokenizer.

    directory = make_encoder("bert", tmp_path / "bert", head="SequenceClassification", num_labels=3)
    directory = make_sentence("mpnet", tmp_path / "mpnet", "mean", modules="N")

The same family, head, seed and options always give the same bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tiny_models import randomize

VOCAB = 320
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
}
# RoBERTa's positions start behind the padding's id.
_ROBERTA = _BERT | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1,
                    "max_position_embeddings": 162}  # fmt: skip

# Our name of a variant: the transformers model type, and its settings.
ENCODERS: dict[str, tuple[str, dict[str, object]]] = {
    "bert": ("bert", _BERT),
    "distilbert": ("distilbert", {"vocab_size": VOCAB, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4,
                                  "max_position_embeddings": 160, "pad_token_id": 0}),
    "roberta": ("roberta", _ROBERTA),
    "xlm_roberta": ("xlm-roberta", _ROBERTA),
    "mpnet": ("mpnet", _BERT | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
                                "max_position_embeddings": 162}),
    "modernbert": ("modernbert", _BERT | {"num_hidden_layers": 3, "global_attn_every_n_layers": 3,
                                          "local_attention": 8, "bos_token_id": 0, "eos_token_id": 1,
                                          "cls_token_id": 0, "sep_token_id": 1}),
    "albert": ("albert", _BERT | {"embedding_size": 32}),
    "electra": ("electra", _BERT | {"embedding_size": 32}),
}  # fmt: skip


HEADS = ("", "SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering")


_TEXT = (
    "The quick brown fox jumps over the lazy dog. How are you today? I am fine, thank you! Pack my box with five dozen "
    "liquor jugs. A cat sat on the mat; the mat was red. What is the capital of France? Paris is, and it has been so "
    "for 1000 years. def greet(name): return 'hello, ' + name"
)


def make_encoder(family: str, directory: Path, head: str = "", *, seed: int = 0, **config: object) -> Path:
    """Write an encoder of `family` (a key of ENCODERS) and its tokenizer into `directory` and return it.

    head: as in transformers' auto classes, such as "SequenceClassification"; none for the bare model.
    """
    import torch
    import transformers

    model_type, settings = ENCODERS[family]
    loaded = transformers.AutoConfig.for_model(model_type, **{**settings, **config})
    auto = getattr(transformers, f"AutoModelFor{head}") if head else transformers.AutoModel
    torch.manual_seed(seed)
    model = auto.from_config(loaded, dtype=torch.float32).eval()
    randomize(model, seed)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    longest = int(loaded.max_position_embeddings)
    write_encoder_tokenizer(directory, "bpe" if "roberta" in family else family, min(longest, 160))
    return directory


def write_encoder_tokenizer(directory: Path, kind: str = "bert", longest: int = 160) -> None:
    """A tokenizer for encoders, trained on a little text; never more entries than VOCAB. longest: its own limit.

    kind: "bpe" for RoBERTa's byte-level one, "mpnet" for WordPiece with RoBERTa's special tokens, "unigram" for that of
    XLM-R, anything else for BERT's WordPiece.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    style = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bert = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special = style if kind in ("bpe", "mpnet", "unigram") else bert
    options = {"vocab_size": VOCAB, "special_tokens": special, "show_progress": False}
    if kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
        around, name = processors.RobertaProcessing(("</s>", 2), ("<s>", 0)), "RobertaTokenizer"
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
        around, name = processors.RobertaProcessing(("</s>", 2), ("<s>", 0)), "PreTrainedTokenizerFast"
    else:
        unknown = special[1] if special is bert else "<unk>"
        tokenizer = tokenizers.Tokenizer(models.WordPiece(_word_pieces(special), unk_token=unknown))
        tokenizer.add_special_tokens(special)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = None
        around = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )  # fmt: skip
        if special is style:
            around = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        name = "PreTrainedTokenizerFast"
    if trainer is not None:
        tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    tokenizer.post_processor = around
    tokenizer.save(str(directory / "tokenizer.json"))
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    if special is bert:
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings: dict[str, object] = dict(zip(names, special, strict=True))
    types = ["token_type_ids"] if special is bert and kind != "distilbert" else []
    settings |= {"model_input_names": ["input_ids", *types, "attention_mask"]}
    if special is style:
        settings |= {"cls_token": "<s>", "sep_token": "</s>"}
    settings |= {"tokenizer_class": name, "model_max_length": longest}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _word_pieces(special: list[str]) -> dict[str, int]:
    """A WordPiece vocabulary of the text's letters, words and last two letters. The library's trainer breaks ties by
    chance, so that models would get other ids in each run."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]", _TEXT.lower())))
    letters = sorted({letter for word in words for letter in word})
    endings = sorted({f"##{word[-2:]}" for word in words if len(word) > 3})
    return {
        piece: number
        for number, piece in enumerate(
            dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *endings, *words])
        )
    }


def make_sentence(
    family: str,
    directory: Path,
    pooling: str | tuple[str, ...] = "mean",
    *,
    modules: str = "",
    config: dict[str, object] | None = None,
    **options: object,
) -> Path:
    """A sentence-transformers directory of a tiny encoder, written by that library; returns it.

    modules: what stands behind the pooling, of D (dense), L (layer norm), N (normalize). config: as of `make_encoder`.
    options: of the library's SentenceTransformer (such as prompts), and max_seq_length.
    """
    import sentence_transformers
    import torch
    from sentence_transformers.sentence_transformer import modules as library

    base = make_encoder(family, directory.parent / f"{directory.name}-base", **config or {})
    torch.manual_seed(5)
    longest = options.pop("max_seq_length", None)
    include = bool(options.pop("include_prompt", True))
    transformer = library.Transformer(str(base), max_seq_length=longest)
    width = int(transformer.model.config.hidden_size)
    parts = [transformer, library.Pooling(width, pooling, include_prompt=include)]
    width *= 1 if isinstance(pooling, str) else len(pooling)
    for letter in modules:
        if letter == "D":
            parts.append(library.Dense(width, 24, activation_function=torch.nn.GELU()))
            width = 24
        else:
            parts.append(library.LayerNorm(width) if letter == "L" else library.Normalize())
    sentence_transformers.SentenceTransformer(modules=parts, **options).save(str(directory), create_model_card=False)
    return directory
