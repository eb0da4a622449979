"""What a model's weights become in a quantized checkpoint: the integers that `compile` would find, in even steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmc.compiler import pipeline
from llmc.compiler.allocation import matrices
from llmc.compiler.calibrate import Model, in_floats, rounded, text_threads
from llmc.compiler.encodings.feedback import Rounded
from llmc.compiler.encodings.grouped import encode
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import parse_encoding
from llmc.compiler.options import CompileOptions
from llmc.compiler.own_text import Ids, random_texts, texts_of_file
from llmc.compiler.progress import Progress, Silent
from llmc.compiler.scratch import scratch_folder


@dataclass(frozen=True)
class QuantizeOptions:
    """How a checkpoint is quantized.

    bits: of the integers of linear layers; the head and the embedding stay as they are. group_size: inputs that share a
    scale, 0: all of a row. calibrate: as of `CompileOptions`, None: "self". seed: of the text that the model writes.
    """

    bits: int = 4
    group_size: int = 128
    calibrate: str | None = None
    seed: int = 0

    def compile_options(self) -> CompileOptions:
        """How the model is read and rounded."""
        return CompileOptions(
            quantization=f"int{self.bits}", group_size=self.group_size, embedding="none", head="none",
            calibrate=self.calibrate or "self", seed=self.seed,
        )  # fmt: skip


def rounded_matrices(
    source: str, options: QuantizeOptions, progress: Progress | None = None
) -> Iterator[tuple[str, Encoded]]:
    """The weights of a model's linear layers, by the model's own names, and what they are rounded to. Those that the
    graph reads in another form than their own are left out. LlmcError for a model that cannot be read or measured."""
    progress = progress or Silent()
    chosen = options.compile_options()
    progress.start("lifting the model")
    lifted = pipeline.lift_model(source, chosen)
    for note in lifted.notes:
        progress.note(note)
    compiled = pipeline.run_lifted(lifted, chosen, progress=progress)
    graph = _in_even_steps(compiled.graph)
    with scratch_folder() as folder:

        def write(texts: Sequence[Ids]) -> list[Ids]:
            return pipeline.written_texts(source, lifted, texts, chosen, folder, progress)

        model = Model(lifted, graph, pipeline.vocabulary_of(lifted), lambda schemes: graph, write)
        yield from _matrices(_rounded(model, chosen, progress))


def _in_even_steps(graph: Graph) -> Graph:
    """Levels of a table have no form that others read: integers stand for themselves instead."""

    def rule(op: Op) -> Value | None:
        if not isinstance(op, Quantize) or not op.encoding.startswith("t"):
            return None
        return replace(op, encoding=f"q{op.encoding[1:]}")

    return rewrite(graph, rule)


def _rounded(model: Model, options: CompileOptions, progress: Progress) -> Iterator[tuple[Quantize, Rounded | Encoded]]:
    """Each weight of the graph's linear layers, and what it becomes."""
    load = model.lifted.weights.load
    if not options.measures_inputs:
        weights = list(dict.fromkeys(in_floats(model.graph)[1].values()))
        progress.start("rounding", len(weights), "weights")
        for weight in weights:
            values = evaluate_values([weight.w], {}, load, {})["0"]
            assert isinstance(values, np.ndarray)
            yield weight, encode(parse_encoding(weight.encoding), values)
            progress.advance()
        return
    texts = random_texts(model.lifted, model.vocabulary, options.seed)
    file = options.calibration_file
    more = [] if file is None else texts_of_file(file, model.lifted, model.vocabulary)
    with text_threads() as pool:
        for weight, (found,) in rounded(model, options, texts, more, progress, pool):
            yield weight, found


def _matrices(weights: Iterator[tuple[Quantize, Rounded | Encoded]]) -> Iterator[tuple[str, Encoded]]:
    """The model's own weights, by name, out of those that they have been merged into."""
    done: set[str] = set()
    for weight, found in weights:
        whole = found.encoded if isinstance(found, Rounded) else found
        for matrix in matrices(weight):
            if not isinstance(matrix.key, str) or matrix.key in done:
                continue  # a part of a weight, or its transpose
            done.add(matrix.key)
            parts = {name: part[matrix.rows] for name, part in whole.parts.items()}
            yield matrix.key, Encoded(whole.encoding, parts["q"].shape, parts)
