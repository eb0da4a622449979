"""How an encoder's file says that a text becomes one vector, as a plan of the frontend for transformers' encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import FrontendError
from llmc.frontends.hf.classes import ModelClass
from llmc.frontends.hf.encoder import HIDDEN, EncoderPlan, EncoderText
from llmc.frontends.hf.pooling import SENTENCE, TOKEN_EMBEDDINGS, Pooling
from llmc.frontends.hf.sentence import EMBED, Sentence
from llmc.frontends.lifted import Text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# llama.cpp's numbers of kinds of pooling.
_NONE, _RANK = 0, 4
_MODES = {1: "mean", 2: "cls", 3: "lasttoken"}


def plan_pooled(kind: ModelClass, config: PreTrainedConfig, text: Text, pooling: int, path: Path) -> EncoderPlan:
    """pooling: as the file has it. FrontendError for scores of pairs, and for numbers without a meaning."""
    config.output_hidden_states = config.output_attentions = False
    if text.facts is not None:
        # The post-processor puts all special tokens around a text; types other than 0 are not told apart.
        text = replace(text, facts={**text.facts, "add_bos": False, "token_types": 0})
    encoder = EncoderText(text, None, False, False)
    if pooling == _NONE:
        notes = (*text.notes, "the file does not say how tokens become an embedding: outputs are those of all tokens")
        return EncoderPlan(kind, encoder, False, (HIDDEN,), (), None, notes)
    if pooling not in _MODES:
        what = "scores of pairs of texts" if pooling == _RANK else f"pooling_type {pooling}"
        raise FrontendError(f"{path}: it makes {what}, which is not supported")
    module = Pooling("", path, TOKEN_EMBEDDINGS, SENTENCE, modes=(_MODES[pooling],))
    sentence = Sentence(path, (module,), EMBED, None, False, {}, None)
    return EncoderPlan(kind, encoder, False, (HIDDEN,), (module,), sentence, text.notes)
