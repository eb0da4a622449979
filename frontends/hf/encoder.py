"""The facts of an encoder for the manifest: how texts become its inputs, and what its outputs mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.ir.op import Input
from llmc.errors import FrontendError
from llmc.frontends.hf.classes import BASE, SEQUENCES, TOKENS, ModelClass
from llmc.frontends.hf.generation import NOTHING
from llmc.frontends.hf.pooling import SENTENCE, TOKEN_EMBEDDINGS, Context, Module, Pooling, embedding_of
from llmc.frontends.hf.sentence import SCORE, Sentence, activation_of_scores
from llmc.frontends.hf.tokenizer import open_tokenizer, text_of, vocabulary_of
from llmc.frontends.lifted import Text, WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmc.frontends.hf.graph import Outputs  # torch, which readers of ONNX files do without

HIDDEN, LOGITS, EMBEDDING = "last_hidden_state", "logits", "embedding"  # names of outputs


@dataclass(frozen=True)
class EncoderText:
    """text: for the artifact. longest: the most tokens that the tokenizer gives a text, or None.

    types: whether token types are among what it gives the model. several: and are not all 0, for a text or a pair.
    """

    text: Text
    longest: int | None
    types: bool
    several: bool

    def with_types(self, count: int) -> EncoderText:
        """The same for a model that knows so many token types; 0: it takes none."""
        facts = self.text.facts
        if facts is None:
            return self
        return replace(self, text=replace(self.text, facts={**facts, "token_types": count if self.several else 0}))


def read_encoder_text(directory: Path, config: PreTrainedConfig, lower_case: bool = False) -> EncoderText:
    """The tokenizer of an encoder, whose own post-processor puts [CLS], [SEP] and the like around texts and pairs.

    lower_case: write every letter small first.
    """
    tokenizer, notes = open_tokenizer(directory)
    if tokenizer is None:
        return EncoderText(text_of(None, notes, directory, config, NOTHING), None, True, False)
    if lower_case:
        _write_small(tokenizer.backend_tokenizer)
    text = text_of(tokenizer, notes, directory, config, NOTHING)
    assert text.facts is not None
    # The post-processor puts all special tokens around a text, a first one too.
    text = replace(text, facts={**text.facts, "add_bos": False})
    given = [tokenizer("a"), tokenizer("a", "a")]
    types = "token_type_ids" in given[1]
    limit = tokenizer.model_max_length
    longest = int(limit) if isinstance(limit, int) and 2 <= limit < 1 << 28 else None  # none is written as 1e30
    return EncoderText(text, longest, types, types and any(any(one["token_type_ids"]) for one in given))


def _write_small(backend: Any) -> None:
    """Put a lower-casing normalizer in front of a tokenizer's own, unless that has one."""
    from tokenizers import normalizers

    own = backend.normalizer
    parts = [] if own is None else [own]
    if isinstance(own, normalizers.Sequence):
        parts = [own[index] for index in range(len(own))]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


@dataclass(frozen=True)
class EncoderPlan:
    """How an encoder is lifted. token_types: give it some. outputs: to keep of the model's own; None for all.

    modules: behind the base model, up to one embedding a text. padding: a token that does not count at a text's end.
    """

    kind: ModelClass
    text: EncoderText
    token_types: bool
    outputs: tuple[str, ...] | None
    modules: tuple[Module, ...]
    sentence: Sentence | None
    notes: tuple[str, ...]
    padding: int | None = None

    def finish(self, outputs: Outputs, positions: Input, weights: WeightSource) -> Outputs:
        """The graph's outputs from the model's own."""
        if not self.modules:
            return outputs
        own = {} if self.sentence is not None else outputs
        return {**own, EMBEDDING: embedding_of(self.modules, outputs[HIDDEN], Context(positions, weights))}

    def facts(self, config: PreTrainedConfig, outputs: Outputs, context: int) -> dict[str, object] | None:
        """The manifest's `encoder`, for texts of up to `context` tokens; None for heads without a known use."""
        if self.modules:
            use: dict[str, object] = {"kind": "embedding", "output": EMBEDDING, "labels": None, **NO_SCORES}
        elif self.kind.head in (SEQUENCES, TOKENS) and LOGITS in outputs:
            kind = "classification" if self.kind.head == SEQUENCES else "tokens"
            use = {"kind": kind, "output": LOGITS, "labels": _labels(config), **_scores(kind, config, self.sentence)}
        else:
            return None
        if self.padding is not None:
            use |= {"padding": self.padding}
        sentence = self.sentence
        longest = sentence.max_tokens if sentence is not None and sentence.max_tokens else self.text.longest
        return {
            **use,
            "max_tokens": min(longest or context, context),
            "prompts": dict(sentence.prompts) if sentence is not None else {},
            "default_prompt": sentence.default_prompt if sentence is not None else None,
            "normalized": sentence is not None and sentence.normalized,
        }


def plan_encoder(
    kind: ModelClass, config: PreTrainedConfig, directory: Path, sentence: Sentence | None = None
) -> EncoderPlan:
    """Decide how a model is lifted. directory: of the model itself, below that of `sentence` perhaps."""
    text = read_encoder_text(directory, config, sentence is not None and sentence.lower_case)
    known = int(getattr(config, "type_vocab_size", 0) or 0)
    types = text.types and known > 1
    text = text.with_types(known if types else 0)
    config.output_hidden_states = config.output_attentions = False
    padding = _padding(kind, config)
    if padding is not None and not getattr(config, "is_causal", True):
        text = replace(text, text=replace(text.text, notes=(*text.text.notes, _SEEN_PADDING)))
    if kind.looks_back:
        # Nothing is padded: the last token is the last of the text, without a search for padding. Where a text ends
        # with that token, the runtime takes it away.
        config.pad_token_id = config.get_text_config(decoder=True).pad_token_id = None
    notes: tuple[str, ...] = text.text.notes if sentence is None else (*text.text.notes, *sentence.notes)
    if sentence is not None and sentence.task == SCORE:
        if kind.head != SEQUENCES:
            raise FrontendError(f"{directory}: a cross encoder needs a model class that classifies sequences")
        return EncoderPlan(kind, text, types, None, (), sentence, notes, padding)
    if sentence is not None:
        return EncoderPlan(kind, text, types, (HIDDEN,), sentence.modules, sentence, notes)
    if kind.head != BASE:
        return EncoderPlan(kind, text, types, None, (), None, notes, padding)
    notes = (*notes, "embedding is the mean over tokens: the model does not say how one is made")
    return EncoderPlan(kind, text, types, None, (Pooling("", directory, TOKEN_EMBEDDINGS, SENTENCE),), None, notes)


_SEEN_PADDING = "texts that end with the token of padding are scored as without it, although tokens would see it"


def _padding(kind: ModelClass, config: PreTrainedConfig) -> int | None:
    """The token that a class of decoder layers looks for at the end of a text, to score the one before it; None where
    it looks for none."""
    padding = config.get_text_config(decoder=True).pad_token_id if kind.looks_back and kind.head == SEQUENCES else None
    if padding is None or kind.known is None or "pad_token_id" not in inspect.getsource(kind.known.forward):
        return None
    return int(padding) if 0 <= padding < vocabulary_of(config) else None


NO_SCORES = {"multi_label": False, "plain_scores": False}


def _scores(kind: str, config: PreTrainedConfig, sentence: Sentence | None) -> dict[str, bool]:
    """What the manifest says of a classifier's scores."""
    if kind != "classification":
        return NO_SCORES
    activation = activation_of_scores(vars(config), config.num_labels or 0, "config.json", sentence)
    return {"multi_label": activation == "sigmoid", "plain_scores": activation == "none"}


def _labels(config: PreTrainedConfig) -> list[str]:
    names: Mapping[Any, str] = config.id2label or {}
    return [str(names.get(number, f"LABEL_{number}")) for number in range(config.num_labels or 0)]
