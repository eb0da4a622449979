"""Which transformers class a model directory is for, and whether that is compiled as a decoder or an encoder.

The class is the one that config.json names under `architectures`, where transformers itself has it for this model type;
else its auto classes decide. Nothing here knows any model by its name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.errors import FrontendError
from llmc.frontends.hf.config import quiet
from llmc.frontends.lifted import ENCODE, GENERATE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CAUSAL, BASE, SEQUENCES, TOKENS, OTHER = "causal", "base", "sequences", "tokens", "other"


@dataclass(frozen=True)
class ModelClass:
    """task: what the graph is for. head: what stands on the last layer. known: the class itself; None if "causal".

    looks_back: whether the model is made of decoder layers, whatever its head: its tokens see only those before.
    """

    task: str
    head: str
    known: type[PreTrainedModel] | None
    looks_back: bool

    def build(self, config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
        """The model in f32, on the default device. implementation: of attention, as transformers names it."""
        import torch
        from transformers import AutoModelForCausalLM

        if self.known is not None:
            return self.known._from_config(  # type: ignore[no-untyped-call, no-any-return]
                config, attn_implementation=implementation, dtype=torch.float32
            )
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call, no-any-return]
            config, attn_implementation=implementation, dtype=torch.float32, trust_remote_code=False
        )


def choose_class(config: PreTrainedConfig, where: object, base_only: bool = False) -> ModelClass:
    """The class of a model's config. base_only: without a head, whatever config.json says. FrontendError names `where`.

    A model type that has both causal and masked heads is a decoder where its config says so (`is_decoder`).
    """
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    alone = _names(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, kind)
    if config.is_encoder_decoder and alone and (base_only or _named(config) in alone):
        # An encoder that was saved alone, with the config of the whole; sentence-transformers takes no other part.
        return ModelClass(ENCODE, BASE, _encoder_class(alone[0], config, where), False)
    if config.is_encoder_decoder:
        raise FrontendError(
            f"{where}: model type {kind!r} has an encoder and a decoder, which is not supported yet: "
            "llmc compiles decoders and encoders by themselves"
        )
    causal = _names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind)
    masked = _names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, kind)
    looks_back = bool(causal) and (not masked or bool(getattr(config, "is_decoder", False)))
    base = _names(auto.MODEL_MAPPING_NAMES, kind)
    heads = {
        BASE: [*base, *_names(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, kind)],
        SEQUENCES: _names(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, kind),
        TOKENS: _names(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, kind),
        OTHER: _names(auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, kind),
    }
    found = [BASE] if base_only else [head for head in heads if _named(config) in heads[head]]
    if found:
        name = _named(config) if _named(config) in heads[found[0]] else next(iter(heads[found[0]]), None)
        return ModelClass(ENCODE, found[0], _encoder_class(name, config, where), looks_back)
    if looks_back:
        return ModelClass(GENERATE, CAUSAL, None, True)
    named = _named(config)
    if named in _names(auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, kind):
        raise FrontendError(f"{where}: {named} takes several texts a question, which is not supported yet")
    if named is None or not _is_native(named, config):
        named = next(iter(base), None)
    return ModelClass(ENCODE, BASE if named in base else OTHER, _encoder_class(named, config, where), looks_back)


def _names(mapping: object, kind: str) -> list[str]:
    """The names of the classes that one of transformers' tables has for a model type."""
    found = mapping.get(kind, ())  # type: ignore[attr-defined]
    return [found] if isinstance(found, str) else list(found)


def _named(config: PreTrainedConfig) -> str | None:
    names = getattr(config, "architectures", None)
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _is_native(name: str, config: PreTrainedConfig) -> bool:
    """Whether transformers has a model class of that name for this kind of config."""
    import transformers

    found = getattr(transformers, name, None)
    return (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and getattr(found, "config_class", None) is type(config)
    )


def _encoder_class(name: str | None, config: PreTrainedConfig, where: object) -> type[PreTrainedModel]:
    """A class that takes text, by its name; FrontendError if it takes anything else."""
    import transformers

    with quiet():
        native = name is not None and _is_native(name, config)
    if not native:
        raise FrontendError(f"{where}: model type {config.model_type!r} has no model class that takes text")
    found: type[PreTrainedModel] = getattr(transformers, str(name))
    parameters = inspect.signature(found.forward).parameters
    others = [kind for kind in ("pixel_values", "input_values", "input_features") if kind in parameters]
    if found.main_input_name != "input_ids" or "input_ids" not in parameters or others:
        what = others[0] if others else found.main_input_name
        raise FrontendError(
            f"{where}: {name} takes {what}, not text alone, which is not supported: llmc compiles models of text"
        )
    return found
