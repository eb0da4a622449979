"""What an encoder's outputs are for: embeddings, classes of a text, something for each token."""

from __future__ import annotations

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import Shape
from llmc.frontends.onnx.text import Companions

EMBEDDING, CLASSIFICATION, TOKENS = "embedding", "classification", "tokens"
# Outputs by what exporters call them: a row a text that is its embedding, a row a token of features.
_EMBEDDINGS = ("sentence_embedding", "embedding", "embeddings", "sentence_embeddings", "text_embeds", "dense_vecs")
_FEATURES = ("last_hidden_state", "token_embeddings", "hidden_states", "hidden_state")
_POOLED = ("pooler_output", "pooled_output")


def as_encoder(graph: Graph, companions: Companions, context: int) -> tuple[Graph, dict[str, object]]:
    """The graph under names that say what outputs are, and the manifest's `encoder`."""
    graph = _named(graph, companions.class_names)
    shapes = {name: value.shape for name, value in graph.outputs}
    kind, output = _purpose(shapes, companions.labels is not None)
    has_types = any(value.name == "token_types" for value in graph.inputs)
    labels = companions.labels
    width = shapes[output][-1] if shapes[output] else 0
    return graph, {
        "kind": kind,
        "output": output,
        "labels": labels if kind != EMBEDDING and labels is not None and len(labels) == width else None,
        "multi_label": kind == CLASSIFICATION and companions.multi_label,
        "max_tokens": context,
        "pair_types": has_types,
        "prompts": {},
        "default_prompt": None,
        "normalized": False,
    }


def _named(graph: Graph, classes: tuple[str, ...]) -> Graph:
    """Outputs that an exporter numbered get the names that the model's own class gives them."""
    known = {*_EMBEDDINGS, *_FEATURES, *_POOLED, "logits"}
    if any(name in known for name, _ in graph.outputs):
        return graph
    has_head = any("For" in name for name in classes)
    outputs = []
    taken: set[str] = {name for name, _ in graph.outputs}
    for name, value in graph.outputs:
        wanted = ("logits",) if has_head else ("last_hidden_state",) if value.rank == 3 else ("pooler_output",)
        new = next((candidate for candidate in wanted if candidate not in taken), name)
        taken.add(new)
        outputs.append((new, value))
    return graph.replace_outputs(outputs) if classes else graph


def _purpose(shapes: dict[str, Shape], has_labels: bool) -> tuple[str, str]:
    """The kind of encoder, and the name of its main output."""
    for name in _EMBEDDINGS:
        if name in shapes and len(shapes[name]) == 2:
            return EMBEDDING, name
    if "logits" in shapes:
        return (CLASSIFICATION if _is_a_row_a_text(shapes["logits"]) else TOKENS), "logits"
    for name in _FEATURES:
        if name in shapes:
            return TOKENS, name
    name, shape = next(iter(shapes.items()))
    if not _is_a_row_a_text(shape):
        return TOKENS, name
    return (CLASSIFICATION if has_labels else EMBEDDING), name


def _is_a_row_a_text(shape: Shape) -> bool:
    return all(isinstance(dim, int) for dim in shape)
