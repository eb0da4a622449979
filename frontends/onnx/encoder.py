"""What an encoder's outputs are for: embeddings, classes of a text, something for each token.

A model that gives a row of features a token becomes one that embeds texts: by the modules of a sentence-transformers
directory around it, else by the mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import Shape
from llmc.frontends.hf.encoder import read_encoder_text
from llmc.frontends.hf.pooling import SENTENCE, TOKEN_EMBEDDINGS, Context, Module, Pooling, Truncate, embedding_of
from llmc.frontends.hf.sentence import Sentence, read_sentence
from llmc.frontends.lifted import Text, WeightSource
from llmc.frontends.onnx.text import Companions
from llmc.frontends.weight_sources import LayeredWeights

EMBEDDING, CLASSIFICATION, TOKENS = "embedding", "classification", "tokens"
# Outputs by what exporters call them: a row a text that is its embedding, a row a token of features.
_EMBEDDINGS = ("sentence_embedding", "embedding", "embeddings", "sentence_embeddings", "text_embeds", "dense_vecs")
_FEATURES = ("last_hidden_state", "token_embeddings", "hidden_states", "hidden_state")
_POOLED = ("pooler_output", "pooled_output")
_ANSWERS = ("start_logits", "end_logits")  # of transformers' question answering
_TOKEN_TYPES = 2  # of a model that takes them: those of the two texts of a pair


@dataclass(frozen=True)
class Encoder:
    """graph: outputs have known names. facts: the manifest's `encoder`, if any. weights: those of modules too."""

    graph: Graph
    facts: dict[str, object] | None
    weights: WeightSource
    text: Text
    notes: tuple[str, ...]


def as_encoder(graph: Graph, companions: Companions, weights: WeightSource, vocabulary: int, context: int) -> Encoder:
    """The graph of a text model that is no decoder, with what it is for. context: tokens of a text at most."""
    graph = _named(graph, companions.class_names)
    sentence = _sentence(companions)
    folder, settings = companions.tokenizer_folder(), companions.settings(vocabulary)
    lower_case = sentence is not None and sentence.lower_case
    text = read_encoder_text(folder, settings, lower_case)  # type: ignore[arg-type]
    companions.require_tokenizer(text.text)
    takes_types = "token_types" in [value.name for value in graph.inputs]
    text = text.with_types(_TOKEN_TYPES if takes_types else 0)
    notes = (*text.text.notes, *(sentence.notes if sentence is not None else ()))
    kind, output = _purpose(graph, companions.labels is not None)
    if kind is None:
        modules = sentence.modules if sentence is not None and sentence.modules else ()
        if not modules:
            modules = (Pooling("", folder, TOKEN_EMBEDDINGS, SENTENCE),)
            notes = (*notes, "embedding is the mean over tokens: the model does not say how one is made")
        context_of = Context(graph.input("positions"), _with_modules(weights, modules))
        graph = _pooled(graph, output, modules, context_of, keep=sentence is None)
        weights, kind, output = context_of.weights, EMBEDDING, EMBEDDING
    elif kind == EMBEDDING and sentence is not None:
        graph = _truncated(graph, output, sentence)
    shape = graph.output(output).shape
    if not _is_used(graph, kind, output, companions.labels, vocabulary):
        return Encoder(graph, None, weights, text.text, notes)
    longest = (sentence.max_tokens if sentence is not None else None) or text.longest or context
    activation = companions.activation_of_scores(_width(shape), sentence) if kind == CLASSIFICATION else None
    facts: dict[str, object] = {
        "kind": kind,
        "output": output,
        "labels": _labels(companions, shape) if kind != EMBEDDING else None,
        "multi_label": activation == "sigmoid",
        "plain_scores": activation == "none",
        "max_tokens": min(longest, context),
        "prompts": dict(sentence.prompts) if sentence is not None else {},
        "default_prompt": sentence.default_prompt if sentence is not None else None,
        "normalized": sentence is not None and sentence.normalized,
    }
    return Encoder(graph, facts, weights, text.text, notes)


def _sentence(companions: Companions) -> Sentence | None:
    """The sentence-transformers directory that the model lies in."""
    path = companions.find("modules.json")
    return read_sentence(path.parent) if path is not None else None


def _truncated(graph: Graph, output: str, sentence: Sentence) -> Graph:
    """A graph with the modules in it, whose embedding the library cuts as it cuts theirs."""
    made = graph.output(output)
    for module in sentence.modules:
        made = module.of(made) if isinstance(module, Truncate) else made
    return graph.replace_outputs([(name, made if name == output else value) for name, value in graph.outputs])


def _with_modules(weights: WeightSource, modules: tuple[Module, ...]) -> WeightSource:
    """The model's weights, and those that modules have files of their own for."""
    for module in modules:
        own = module.weights()
        if own is not None:
            weights = LayeredWeights(own, weights)
    return weights


def _pooled(graph: Graph, features: str, modules: tuple[Module, ...], context: Context, keep: bool) -> Graph:
    """The graph with an output `embedding`. keep: beside its own outputs."""
    own = graph.outputs if keep else ()
    return graph.replace_outputs([*own, (EMBEDDING, embedding_of(modules, graph.output(features), context))])


def _named(graph: Graph, classes: tuple[str, ...]) -> Graph:
    """Outputs that an exporter numbered get the names that the model's own class gives them; others keep theirs."""
    known = {*_EMBEDDINGS, *_FEATURES, *_POOLED, "logits"}
    names = [name for name, _ in graph.outputs]
    if not classes or any(name in known or name.endswith("_logits") for name in names):
        return graph
    if any("QuestionAnswering" in name for name in classes) and len(names) == len(_ANSWERS):
        return graph.replace_outputs(list(zip(_ANSWERS, (value for _, value in graph.outputs), strict=True)))
    has_head = any("For" in name for name in classes)
    outputs = []
    taken: set[str] = {name for name, _ in graph.outputs}
    for name, value in graph.outputs:
        wanted = "logits" if has_head else "last_hidden_state" if value.rank == 3 else "pooler_output"
        new = name if wanted in taken else wanted
        taken.add(new)
        outputs.append((new, value))
    return graph.replace_outputs(outputs)


def _purpose(graph: Graph, has_labels: bool) -> tuple[str | None, str]:
    """The kind of encoder, and the name of its main output; None with that of the features of tokens."""
    shapes = {name: value.shape for name, value in graph.outputs}
    for name in _EMBEDDINGS:
        if name in shapes and _is_a_row_a_text(shapes[name]):
            return EMBEDDING, name
    if "logits" in shapes:
        return (CLASSIFICATION if _is_a_row_a_text(shapes["logits"]) else TOKENS), "logits"
    features = [name for name, shape in shapes.items() if len(shape) == 3 and _width(shape)]
    for name in _FEATURES:
        if name in features:
            return None, name
    if features and not has_labels:
        return None, features[0]
    name, shape = next(iter(shapes.items()))
    if not _is_a_row_a_text(shape):
        return TOKENS, name
    return (CLASSIFICATION if has_labels else EMBEDDING), name


def _is_used(graph: Graph, kind: str, output: str, labels: list[str] | None, vocabulary: int) -> bool:
    """Whether embedding, classifying or tagging is what a model's output is for: not words for masked ones, nor the
    starts and ends of answers, nor anything else that is no row of numbers a text or a token."""
    shape = graph.output(output).shape
    if kind != TOKENS:
        return _is_a_row_a_text(shape)
    width = _width(shape)
    is_known = output == "logits" or len(graph.outputs) == 1 or (labels is not None and len(labels) == width)
    return len(shape) == 3 and 0 < width < vocabulary and is_known


def _labels(companions: Companions, shape: Shape) -> list[str]:
    """A name a class: the config's, or numbers as transformers gives them."""
    width = _width(shape)
    labels = companions.labels
    return labels if labels is not None and len(labels) == width else [f"LABEL_{number}" for number in range(width)]


def _width(shape: Shape) -> int:
    return shape[-1] if shape and isinstance(shape[-1], int) else 0


def _is_a_row_a_text(shape: Shape) -> bool:
    return len(shape) == 2 and all(isinstance(dim, int) for dim in shape)
