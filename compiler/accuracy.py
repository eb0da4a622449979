"""How far a compiled model is from its original: each rounded matrix, and the outputs, on text that no choice was made
by. What is measured goes into the manifest (`runtime/accuracy.py` says what it means).

The original is the graph before its weights were rounded, in f32, caches too. A decoder's text is what the artifact
itself writes where it runs on this machine, with another seed than the text that weights were rounded by. An encoder
gets random ids that are all as likely, where those that weights are rounded by are by rank and in shorter texts: on
these, the figure would be of what was fitted. (all-MiniLM-L6-v2 in 4 bits: cosine 0.997 on ids by rank, 0.985 on these,
0.985 and 0.988 on two sets of sentences.) Inputs of layers are rows of the original's, spread over that text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.allocation import Matrix, matrices, merged
from llmc.compiler.calibrate import text_threads
from llmc.compiler.divergence import cosines_of, divergence_of, log_softmax, output_of
from llmc.compiler.encodings.grouped import GroupQuantized, stored_bytes
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.evaluate import Data, LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear, Quantize
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import KV, Array, Tensor
from llmc.compiler.own_text import Ids, chances_of, own_texts, random_texts, uniform_texts
from llmc.compiler.progress import Progress
from llmc.compiler.scenario import computed, prompt_runs, token_axis
from llmc.compiler.weights import name_of
from llmc.errors import CompileError

if TYPE_CHECKING:
    from llmc.frontends.lifted import Lifted

Floats = NDArray[np.float32]

TEXTS, LENGTH = 4, 128  # of a decoder: the example model's KL on them differs from seed to seed by a tenth
ENCODER_TEXTS, ENCODER_LENGTH = 24, 40
MOST_LOGITS = 1 << 26  # of the original, held at once: 256 MiB
ROWS = 64  # of a layer's inputs
BLOCK = 1024  # rows of a matrix that are compared at a time
DIGITS = 4
SEED = 0x6163  # text that is measured on is another than text that is rounded by, whose seed is the compile's own


class Running(Protocol):
    """A finished artifact that runs on this machine."""

    def write(self, starts: Sequence[int], chances: NDArray[np.float64]) -> list[Ids]:
        """Texts that begin with one id each and go on as the artifact says; chances [texts, length] as `draw` wants."""

    def logits(self, ids: Ids) -> Floats:
        """Logits behind each token of a text, [tokens, vocabulary]."""

    def encode(self, ids: Ids) -> Mapping[str, Array]:
        """All outputs of an encoder for a text."""


@dataclass
class RoundedHere:
    """What weights became while they were packed, in files of a folder: to be compared with what they were."""

    folder: Path
    files: dict[Value, Encoded] = field(default_factory=dict)

    def keep(self, weight: Value, encoded: Encoded) -> None:
        """Told of each weight as it is packed. Those that were rounded before are in files already."""
        if not isinstance(weight, Quantize) or weight in self.files:
            return
        parts = {}
        for name, part in encoded.parts.items():
            path = self.folder / f"packed.{len(self.files)}.{name}.npy"
            np.save(path, part)
            parts[name] = np.load(path, mmap_mode="r")
        self.files[weight] = Encoded(encoded.encoding, encoded.shape, parts)

    def of(self, weight: Value, load: LoadParam) -> Encoded:
        """What a weight became."""
        found = self.files[weight] if weight in self.files else evaluate_values([weight], {}, load, {})["0"]
        assert isinstance(found, Encoded)
        return found


@dataclass(frozen=True)
class Subject:
    """What is measured. original: the graph before weights are rounded; load: its weights. final, load_final: the graph
    that the artifact computes, and its. rounded: every weight that was rounded here, and what it became. running: the
    artifact; None where this machine does not run it."""

    lifted: Lifted
    original: Graph
    load: LoadParam
    final: Graph
    load_final: LoadParam
    originals: Mapping[Value, Quantize]
    kept: RoundedHere
    running: Running | None
    vocabulary: int
    seed: int

    @property
    def is_paged(self) -> bool:
        """Whether it goes on from a cache, so that writing token by token is cheap."""
        return any(isinstance(value.type, KV) for value in self.final.inputs)


def measure(subject: Subject, progress: Progress) -> dict[str, object]:
    """The manifest's `accuracy`. CompileError where the outputs are not finite, IRError where the graph does not take
    such text."""
    found: dict[str, object] = {"text": None, "vectors": None}
    inputs: dict[Value, Floats] = {}
    with text_threads() as pool:
        if subject.lifted.task == "generate":
            found["text"], inputs = _text(subject, pool, progress)
        elif subject.lifted.task == "encode":
            found["vectors"], inputs = _vectors(subject, pool, progress)
        found["tensors"] = _tensors(subject, inputs, pool, progress)
    return found


def _text(subject: Subject, pool: Executor, progress: Progress) -> tuple[dict[str, object], dict[Value, Floats]]:
    texts, source = _decoder_texts(subject, pool, progress)
    logits, inputs = _original(subject, subject.original.output("logits"), texts, pool, progress)
    progress.start("comparing with the original", len(texts), "texts")
    divergence, same, tokens = 0.0, 0, 0
    for ids, wanted, has in zip(texts, logits, _logits(subject, texts, pool), strict=True):
        count = len(ids) - 1
        expected, got = (log_softmax(each[:count, : subject.vocabulary]) for each in (wanted, has))
        divergence += divergence_of(expected, got)
        same += int((expected.argmax(axis=-1) == got.argmax(axis=-1)).sum())
        tokens += count
        progress.advance()
    if not math.isfinite(divergence):
        raise CompileError("outputs on its own text are not finite")
    return {
        "texts": len(texts),
        "tokens": tokens,
        "source": source,
        "through": "graph" if subject.running is None else "artifact",
        "mean_kl_divergence": rounded_figure(max(0.0, divergence / max(1, tokens))),
        "top1_agreement": rounded_figure(same / max(1, tokens)),
    }, inputs


def _decoder_texts(subject: Subject, pool: Executor, progress: Progress) -> tuple[list[Ids], str]:
    """Texts of a decoder, and how they were made."""
    vocabulary, seed = subject.vocabulary, subject.seed ^ SEED
    length = max(2, min(LENGTH, subject.lifted.max_context))
    count = max(1, min(TEXTS * LENGTH // length, MOST_LOGITS // (vocabulary * length)))
    texts = random_texts(subject.lifted, vocabulary, seed, count, length)
    if subject.running is not None and subject.is_paged:
        progress.start("writing text to measure by")
        return subject.running.write([int(ids[0]) for ids in texts], np.array(chances_of(texts, seed))), "written"
    progress.start("drawing text to measure by", len(texts), "texts")
    return own_texts(subject.original, subject.load, texts, vocabulary, seed, pool, progress.advance), "drawn"


def _logits(subject: Subject, texts: Sequence[Ids], pool: Executor) -> Iterable[Floats]:
    """What the artifact gives, or its graph where it does not run here: [tokens, vocabulary] of each text."""
    if subject.running is None:
        return outputs_of(subject.final, "logits", texts, subject.load_final, pool)
    return map(subject.running.logits, texts)


def _vectors(
    subject: Subject, pool: Executor, progress: Progress
) -> tuple[dict[str, object] | None, dict[Value, Floats]]:
    lifted = subject.lifted
    output = output_of(lifted, subject.original)
    texts = uniform_texts(lifted, subject.vocabulary, subject.seed ^ SEED, ENCODER_TEXTS, ENCODER_LENGTH)
    wanted, inputs = _original(subject, subject.original.output(output), texts, pool, progress)
    progress.start("comparing with the original", len(texts), "texts")
    cosines: list[Floats] = []
    for expected, has in zip(wanted, _encoded(subject, output, texts, pool), strict=True):
        cosines.append(cosines_of(expected, has))
        progress.advance()
    every = np.concatenate(cosines)
    if not np.isfinite(every).all():
        raise CompileError("outputs on random ids are not finite")
    return {
        "output": output,
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "rows": len(every),
        "through": "graph" if subject.running is None else "artifact",
        "mean_cosine": rounded_figure(float(every.mean(dtype=np.float64))),
        "least_cosine": rounded_figure(float(every.min())),
    }, inputs


def _encoded(subject: Subject, output: str, texts: Sequence[Ids], pool: Executor) -> Iterable[Array]:
    if subject.running is None:
        return outputs_of(subject.final, output, texts, subject.load_final, pool)
    running = subject.running
    return (running.encode(ids)[output] for ids in texts)


def outputs_of(
    graph: Graph, output: str, texts: Sequence[Ids], load: LoadParam, pool: Executor, wide: bool = False
) -> list[Array]:
    """An output of a graph for each text, as rows. wide: with caches in f32."""
    wanted = graph.output(output)
    for value, data in computed(graph, [wanted], prompt_runs(graph, texts, wide=wide), load, {}, pool):
        if value is wanted:
            return _by_text(wanted, data, texts)
    raise CompileError(f"output {output!r} is not computed from tokens")


def _original(
    subject: Subject, output: Value, texts: Sequence[Ids], pool: Executor, progress: Progress
) -> tuple[list[Array], dict[Value, Floats]]:
    """What the original gives for an output, for each text, and the rows that its layers see, by their input."""
    graph = subject.original
    layers = [op.x for op in graph.ops if isinstance(op, (Linear, GatedLinear)) and op.w in graph.constants]
    wanted = dict.fromkeys(layers)
    found: list[Array] = []
    inputs: dict[Value, Floats] = {}
    progress.start("running the original", len(wanted), "layers")
    for value, data in computed(graph, [output, *wanted], prompt_runs(graph, texts, wide=True), subject.load, {}, pool):
        if value is output:
            found = _by_text(output, data, texts)
        if value in wanted:
            inputs[value] = _spread([np.asarray(each) for each in data])
            progress.advance()
    return found, inputs


def _by_text(output: Value, data: Sequence[Data], texts: Sequence[Ids]) -> list[Array]:
    """An output of all steps as rows of each text: one for each token, or one for all."""
    axis = token_axis(output)
    rows: list[Array] = []
    for each in data:
        assert isinstance(each, np.ndarray)
        first = each if axis is None else np.moveaxis(each, axis, 0)
        count = each.shape[0] if axis is None and _has_texts(output) else 1 if axis is None else len(first)
        rows.append(first.reshape(count, -1))
    joined = np.concatenate(rows)
    ends = np.cumsum([1] * len(texts) if axis is None else [len(ids) for ids in texts])
    return np.split(joined, ends[:-1])


def _has_texts(output: Value) -> bool:
    """Whether an output has a row for each text of a step."""
    return bool(output.shape) and not isinstance(output.shape[0], int)


def _spread(data: Sequence[Array]) -> Floats:
    """Some rows of all texts' [..., features], evenly spread."""
    rows = np.concatenate([each.reshape(-1, each.shape[-1]) for each in data])
    at = np.unique(np.linspace(0, len(rows) - 1, ROWS).astype(np.intp))
    return rows[at].astype(np.float32)


def _tensors(
    subject: Subject, inputs: Mapping[Value, Floats], pool: Executor, progress: Progress
) -> list[dict[str, object]]:
    """Every matrix that was rounded, in the order of the graph."""
    seen: dict[object, list[Floats]] = {}
    for op in subject.original.ops:
        if isinstance(op, (Linear, GatedLinear)) and op.x in inputs:
            for matrix in merged(op.w):
                seen.setdefault(matrix.key, []).append(inputs[op.x])
    weights = rounded_weights_of(subject.final, subject.originals)
    progress.start("comparing weights", len(weights), "weights")
    found: list[dict[str, object]] = []
    for value, weight in weights:
        values = evaluate_values([weight.w], {}, subject.load, {})["0"]
        became = subject.kept.of(value, subject.load_final)
        assert isinstance(values, np.ndarray)
        assert isinstance(became.encoding, GroupQuantized)
        rounded = became.decode()
        for matrix in matrices(weight):
            rows = seen.get(matrix.key)
            x = None if rows is None else np.concatenate(rows)
            found.append(_tensor(weight, matrix, became, (values, rounded), x, pool))
        progress.advance()
    return found


def _tensor(
    weight: Quantize, matrix: Matrix, became: Encoded, values: tuple[Array, Array], x: Floats | None, pool: Executor
) -> dict[str, object]:
    count, width = matrix.rows.stop - matrix.rows.start, became.shape[-1]

    def sums(start: int) -> tuple[float, float, float, float]:
        rows = slice(start, min(start + BLOCK, matrix.rows.stop))
        w, v = (each[rows].astype(np.float32, copy=False) for each in values)
        off = w - v
        parts = (off, w) if x is None else (off, w, x @ off.T, x @ w.T)
        squares = [float(np.square(part, dtype=np.float64).sum()) for part in parts]
        return tuple(squares + [0.0] * (4 - len(squares)))  # type: ignore[return-value]

    starts = range(matrix.rows.start, matrix.rows.stop, BLOCK)
    totals = [math.fsum(column) for column in zip(*pool.map(sums, starts), strict=True)]
    encoding = became.encoding
    return {
        "name": _name(weight, matrix),
        "encoding": encoding.name,
        "bits": rounded_figure(8 * stored_bytes(encoding, (count, width)) / max(1, count * width)),
        "numbers": count * width,
        "weight_error": rounded_figure(totals[0] / totals[1] if totals[1] else 0.0),
        "output_error": rounded_figure(totals[2] / totals[3]) if x is not None and totals[3] else None,
    }


def rounded_weights_of(graph: Graph, originals: Mapping[Value, Quantize]) -> list[tuple[Value, Quantize]]:
    """The weights of a final graph that were rounded here, and as what they were to be. originals: those that were
    rounded by what their layers see, by what stands in their place."""
    found: dict[Value, Quantize] = {}
    for op in graph.ops:
        for value in (op.w,) if isinstance(op, (Linear, GatedLinear)) else (op.table,) if isinstance(op, Embed) else ():
            whole = value if isinstance(value, Quantize) else originals.get(value)
            if whole is not None and isinstance(value.type, Tensor):
                found[value] = whole
    return list(found.items())


def longest(lifted: Lifted, final: Graph, originals: Mapping[Value, Quantize]) -> dict[str, object]:
    """What `measure` gives, with figures that no other is longer than."""
    figure, count = -1.2345678901234567e-300, 1 << 62
    tensors = [
        {
            "name": _name(weight, matrix), "encoding": str(weight.tensor.encoding), "bits": figure, "numbers": count,
            "weight_error": figure, "output_error": figure,
        }
        for _, weight in rounded_weights_of(final, originals)
        for matrix in matrices(weight)
    ]  # fmt: skip
    text = {"source": "written", "through": "artifact", "mean_kl_divergence": figure, "top1_agreement": figure}
    output = output_of(lifted, final) if final.outputs else ""
    vectors = {"output": output, "rows": count, "through": "artifact", "mean_cosine": figure, "least_cosine": figure}
    counts = {"texts": count, "tokens": count}
    return {"text": counts | text, "vectors": counts | vectors, "tensors": tensors}


def _name(weight: Quantize, matrix: Matrix) -> str:
    return " + ".join(matrix.names) or name_of(weight)


def rounded_figure(value: float) -> float:
    """To as many digits as a figure is told with."""
    return float(f"{value:.{DIGITS}g}")
