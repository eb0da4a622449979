"""A Hugging Face model directory to a graph, its weights and what else an artifact needs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmc.compiler.ir.graph import Graph
from llmc.errors import FrontendError
from llmc.frontends.hf.checkpoint import ModelWeights
from llmc.frontends.hf.classes import ModelClass, choose_class
from llmc.frontends.hf.config import load_config, own_code, quiet, read_json
from llmc.frontends.hf.encoder import EncoderPlan, plan_encoder
from llmc.frontends.hf.export import first_position
from llmc.frontends.hf.graph import translate, without_outputs_of
from llmc.frontends.hf.lora import AdaptedWeights, Adapter, Modules
from llmc.frontends.hf.model import MetaModel
from llmc.frontends.hf.sentence import EMBED, read_sentence
from llmc.frontends.hf.source import adapters_below, resolve
from llmc.frontends.hf.stored import open_stored, quantization_of
from llmc.frontends.hf.tokenizer import read_text
from llmc.frontends.hf.trace import trace
from llmc.frontends.hf.weights import RandomWeights, open_checkpoint
from llmc.frontends.lifted import ENCODE, GENERATE, Lifted, Text, WeightSource
from llmc.frontends.stored_integers import keep_stored, stored_notes
from llmc.frontends.weight_sources import LayeredWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_DEFAULT_CONTEXT = 2048  # for a model that names no limit


@dataclass(frozen=True)
class Opened:
    """A model's files, read as far as building it needs. weights: its tensors by the checkpoint's names; None: random.

    plan: of an encoder. text: what turns text into tokens, read last. notes: for the user to read. least: as of
    `Lifted`.
    """

    config: PreTrainedConfig
    kind: ModelClass
    weights: WeightSource | None
    name: str
    text: Callable[[], Text]
    plan: EncoderPlan | None = None
    notes: tuple[str, ...] = ()
    least: Mapping[str, str] = field(default_factory=dict)


def lift(
    source: str | Path,
    *,
    max_context: int | None = None,
    weights: str = "checkpoint",
    seed: int = 0,
    lora: Sequence[str | Path] = (),
) -> Lifted:
    """Read a model: a directory, or a name on the Hugging Face hub. No weight is loaded; none of its code runs.

    max_context: tokens a sequence may have (default: the model's own limit); rotary frequencies are settled for it.
    weights: "checkpoint", or "random" for `RandomWeights(seed)`. lora: directories of adapters that are merged.
    """
    check_options(max_context, weights)
    model_dir = resolve(source)
    sentence = read_sentence(model_dir)
    base_dir = model_dir if sentence is None else sentence.transformer
    written = read_json(base_dir / "config.json")
    quantization = quantization_of(base_dir, written)
    config = load_config(base_dir)
    kind = choose_class(config, base_dir / "config.json", sentence is not None and sentence.task == EMBED)
    # The checkpoint's headers are checked before the slower export.
    named = getattr(config, "transformers_weights", None)
    checkpoint = open_checkpoint(base_dir, named) if weights == "checkpoint" else None
    told: tuple[str, ...] = ()
    if checkpoint is not None and quantization is not None:
        checkpoint, told = open_stored(quantization, checkpoint)
    if lora:
        checkpoint, merged = _adapted(checkpoint, lora, kind, config)
        told = (*told, *merged)
    plan = plan_encoder(kind, config, base_dir, sentence) if kind.task == ENCODE else None
    opened = Opened(
        config,
        kind,
        checkpoint,
        _name(source, model_dir),
        lambda: read_text(base_dir, config),
        plan,
        (*own_code(written), *adapters_below(base_dir), *told),
    )
    return lift_opened(opened, max_context, seed)


def _adapted(
    checkpoint: WeightSource | None, lora: Sequence[str | Path], kind: ModelClass, config: PreTrainedConfig
) -> tuple[WeightSource, tuple[str, ...]]:
    """The checkpoint with adapters merged in, and a note on each."""
    if checkpoint is None:
        raise FrontendError("--lora changes the checkpoint's weights, and not --weights random")
    with quiet(), torch.device("meta"):
        modules = Modules.of(kind.build(copy.deepcopy(config), "eager"))  # building changes a config
    notes = []
    for directory in lora:
        checkpoint = AdaptedWeights(checkpoint, Adapter.read(Path(directory).expanduser()), modules)
        notes.append(checkpoint.note)
    return checkpoint, tuple(notes)


def check_options(max_context: int | None, weights: str) -> None:
    """FrontendError for options of `lift` that make no sense."""
    if max_context is not None and max_context < 3:
        raise FrontendError(f"max context is {max_context}: at least 3 tokens are needed")
    if weights not in ("checkpoint", "random"):
        raise FrontendError(f"weights must be 'checkpoint' or 'random', not {weights!r}")


def lift_opened(opened: Opened, max_context: int | None, seed: int) -> Lifted:
    """Build, trace and translate a model whose files have been read."""
    config, kind, checkpoint, plan = opened.config, opened.kind, opened.weights, opened.plan
    positions = _max_positions(config)
    context = max_context if max_context is not None else positions or _DEFAULT_CONTEXT
    dtype = _checkpoint_dtype(config)  # building the model changes the config's
    stored: list[ModelWeights] = []  # the checkpoint as the weights of the model that was built last

    def untied(model: PreTrainedModel) -> frozenset[str]:
        if checkpoint is not None:
            stored[:] = [ModelWeights(model, checkpoint, partly=plan is not None)]
        return stored[0].untied if stored else frozenset()

    if plan is None:
        traced = trace(kind, config, context, untied=untied)
    else:
        traced = trace(kind, config, context, plan.token_types, plan.outputs, untied)
    model = traced.meta.model
    notes = [
        *opened.notes,
        *_other_positions(traced.meta, kind, config),
        *traced.notes,
        *(note for own in stored for note in own.notes),
    ]
    missing = [name for own in stored for name in own.missing]
    values = _weights(model, plan, stored[0] if stored else None, dtype, seed)
    if traced.room is not None:
        positions = min(positions or traced.room, traced.room)
    longest = traced.exported.longest
    if longest < (context if max_context is not None or positions is None else min(context, positions)):
        notes.append(f"{longest} tokens at most: the model has no more positions, or treats a full context differently")
    context = min(context, longest)
    if positions is not None and context > positions and not traced.meta.stretches:
        notes.append(
            f"the model was made for {positions} positions: of {context}, the later ones may make no sense to it"
        )
    graph, values = translate(traced, values, context, None if plan is None else plan.finish)
    graph = without_outputs_of(graph, missing)
    if stored:
        graph, values, kept = _with_integers(graph, values, stored[0])
        notes += kept
    text = opened.text() if plan is None else plan.text.text
    text_config = config.get_text_config(decoder=True)
    return Lifted(
        graph=graph,
        weights=values,
        name=opened.name,
        architecture=str(config.model_type),
        parameters=_parameters(model, plan),
        vocab_size=int(text_config.vocab_size),
        layers=int(text_config.num_hidden_layers),
        max_positions=positions or context,
        max_context=context,
        text=text,
        notes=(*notes, *(text.notes if plan is None else plan.notes)),
        config=config.to_diff_dict(),
        task=kind.task,
        encoder=None if plan is None else plan.facts(config, dict(graph.outputs), context),
        least=opened.least,
    )


def _other_positions(meta: MetaModel, kind: ModelClass, config: PreTrainedConfig) -> tuple[str, ...]:
    """A note on a decoder that counts positions from behind its padding's id, unless it is told them: as RoBERTa's."""
    if kind.task != GENERATE or not getattr(config, "is_decoder", False):
        return ()
    first, _ = first_position(meta.model, meta.takes("token_type_ids"))
    if not first or not meta.takes("position_ids"):
        return ()
    return (f"positions begin at 0, as in transformers' generate: the model by itself counts from {first}",)


def _weights(
    model: PreTrainedModel, plan: EncoderPlan | None, stored: ModelWeights | None, dtype: str, seed: int
) -> WeightSource:
    """Where every weight comes from. stored None: random."""
    modules = () if plan is None else plan.modules
    if stored is None:
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        return RandomWeights(shapes | {k: v for module in modules for k, v in module.shapes.items()}, dtype, seed)
    values: WeightSource = stored
    for module in modules:
        source = module.weights()
        values = values if source is None else LayeredWeights(source, values)
    return values


def _with_integers(
    graph: Graph, values: WeightSource, stored: ModelWeights
) -> tuple[Graph, WeightSource, tuple[str, ...]]:
    """The graph with weights that the checkpoint holds as integers made of these, what loads them, and notes."""
    found = {param.name: stored.integers(param.name) for param in graph.params if param.name in set(stored.names)}
    kept = {name: integers for name, integers in found.items() if integers is not None}
    graph, values = keep_stored(graph, values, kept, stored.turned)
    notes = stored_notes(kept.values())
    if stored.merged_integers:
        notes += (
            f"{stored.merged_integers} weights of the checkpoint are integers that others (experts) are made of: these "
            "are used as the floats that they stand for",
        )
    return graph, values, notes


def _parameters(model: PreTrainedModel, plan: EncoderPlan | None) -> int:
    modules = () if plan is None else plan.modules
    behind = sum(math.prod(shape) for module in modules for shape in module.shapes.values())
    return sum(value.numel() for value in model.parameters()) + behind


def _name(source: str | Path, directory: Path) -> str:
    """The hub's name of the model without its organization and revision, or the directory's."""
    return directory.resolve().name if Path(source).expanduser().is_dir() else str(source).split("@")[0].split("/")[-1]


def _max_positions(config: PreTrainedConfig) -> int | None:
    """The model's own limit on positions, whatever it calls it."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            return value
    return None


def _checkpoint_dtype(config: PreTrainedConfig) -> str:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, dict):  # by part of the model
        dtype = dtype.get("")
    return "bf16" if dtype == torch.bfloat16 else "f16" if dtype == torch.float16 else "f32"
