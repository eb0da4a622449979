"""Tiny random encoders in a directory, as a user would have them: config, safetensors, tokenizer.

    directory = make_encoder("bert", tmp_path / "bert", head="SequenceClassification", num_labels=3)

The same family, head, seed and options always give the same bytes.
"""

from __future__ import annotations

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


def make_encoder(family: str, directory: Path, head: str = "", *, seed: int = 0, **config: object) -> Path:
    """Write an encoder of `family` (a key of ENCODERS) into `directory` and return it.

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
    return directory
