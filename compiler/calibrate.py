"""Rounding the weights of linear layers by what goes through them: texts are run through the graph, the second moments
of each layer's inputs are measured, and its weight is rounded with error feedback (`encodings/feedback.py`).

The graph is run once, op by op for all texts, in its own numpy meaning and with weights as the model has them. A weight
is rounded as soon as all of its readers' inputs are known.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.encodings.feedback import DAMPING, SWEEPS, Curvature, encode_with_feedback
from llmc.compiler.encodings.grouped import encode, grouped
from llmc.compiler.ir.evaluate import Data, LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph, rewrite, substitute_values
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear, Quantize, static
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.types import Array, Tensor, dtype_of
from llmc.compiler.own_text import ENCODER_DAMPING, ROUNDS, Ids, own_texts, random_texts, texts_of_file
from llmc.compiler.progress import Progress
from llmc.compiler.rounded_cache import NotKept, Parts, RoundedCache, key_of
from llmc.compiler.scenario import computed, prompt_inputs
from llmc.compiler.weights import name_of
from llmc.errors import CompileError

if TYPE_CHECKING:
    from llmc.compiler.options import CompileOptions
    from llmc.frontends.lifted import Lifted

Moments = NDArray[np.float32]
Layer: TypeAlias = Linear | GatedLinear

OVERHEAD = 4.0  # measured with 0.5B parameters: all there is, beside products of matrices at full speed


def calibrate_model(
    lifted: Lifted,
    graph: Graph,
    options: CompileOptions,
    vocabulary: int,
    code: str,
    folder: Path,
    progress: Progress,
) -> tuple[Graph, LoadParam]:
    """The model's graph after all passes with weights rounded by what their layers see of its own text and of the file
    that the options name, and what loads them. vocabulary: ids that it takes. code: a hash of what does the rounding.
    folder: for the rounded weights.

    Taken from the cache where the same was rounded before. CompileError for a model that is not one of texts.
    """
    if lifted.task == "run":
        raise CompileError("--calibrate: only models of texts can be measured, this graph's inputs cannot be made up")
    load, decodes = lifted.weights.load, lifted.task == "generate"
    texts = random_texts(lifted, vocabulary, options.seed)
    file = options.calibration_file
    more = [] if file is None else texts_of_file(file, lifted, vocabulary)
    floats, layers = in_floats(graph)
    weights, cache = list(dict.fromkeys(layers.values())), RoundedCache.default()
    if not weights:
        return graph, load
    progress.start("looking for rounded weights")
    encodings = [weight.encoding for weight in weights]
    key = key_of(floats, load, [*texts, *more], code, encodings, vocabulary, options.seed)
    with suppress(NotKept):
        found, store = with_integers(graph, load, cache.read(key, weights), folder)
        return found, store.load
    with text_threads() as pool:
        tell_cost(layers, texts, more, decodes, progress)
        if decodes:
            progress.start("writing text to round by", ROUNDS * len(texts), "texts")
            texts = own_texts(floats, load, texts, vocabulary, options.seed, pool, progress.advance)
        damping = DAMPING if decodes or more else ENCODER_DAMPING
        rounded = calibrate(graph, load, [*texts, *more], damping, progress, pool)
        found, store = with_integers(graph, load, rounded, folder)
    cache.write(key, ((weight, store.parts(weight)) for weight in weights))
    return found, store.load


def tell_cost(
    layers: Mapping[Layer, Quantize], texts: Sequence[Ids], more: Sequence[Ids], decodes: bool, progress: Progress
) -> None:
    """Says beforehand how long it takes, where that is more than a minute, by how fast this machine multiplies now."""
    shapes = {weight: tuple(static(dim) for dim in weight.shape) for weight in layers.values()}
    tokens = sum(map(len, texts)) * (ROUNDS * decodes + 1) + sum(map(len, more))
    products = tokens * sum(math.prod(shapes[weight]) for weight in layers.values())
    # Feedback once and, for each sweep, slopes, two errors and a fit: as many products with the moments of all inputs.
    products += sum(n * k * k * (1 + 4 * SWEEPS) + k**3 for n, k in shapes.values())
    a = np.ones((512, 1024), np.float32)
    b = np.ones((1024, 1024), np.float32)
    seconds = math.inf
    for _ in range(3):
        started = time.perf_counter()
        a @ b
        seconds = min(seconds, time.perf_counter() - started)
    rate = a.size * len(b) / seconds * len(os.sched_getaffinity(0))
    minutes = OVERHEAD * products / rate / 60
    if minutes > 1:
        progress.note(f"rounding by what layers see takes about {minutes:.0f} minutes; --fast leaves it out")


@contextmanager
def text_threads() -> Iterator[Executor]:
    """Threads that share texts among them, one a core, while products of matrices take one thread each: so their sums
    have one order, however many cores there are."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield pool


@dataclass
class RoundedWeights:
    """The parts of rounded weights, in files of a folder; the model's own weights besides."""

    folder: Path
    source: LoadParam
    files: dict[str, Path] = field(default_factory=dict)
    packed: dict[Value, PackGroups] = field(default_factory=dict)  # by what was to be rounded

    def add(self, weight: Quantize, parts: Parts) -> None:
        """Keep a weight's parts."""
        name = name_of(weight)
        name = f"{name} ({weight.encoding})" if name in self.files else name
        params: dict[str, Param] = {}
        for part, array in parts.items():
            whole = name if part == "q" else f"{name} ({part})"
            self.files[whole] = self.folder / f"{len(self.files)}.npy"
            np.save(self.files[whole], array)
            params[part] = Param(whole, Tensor(array.shape, dtype_of(array.dtype)))
        self.packed[weight] = PackGroups(params["q"], params["scales"], params.get("minimums"), weight.encoding)

    def parts(self, weight: Quantize) -> Parts:
        """A weight's parts, as they were kept."""
        packed = self.packed[weight]
        found = {"q": packed.q, "scales": packed.scales, "minimums": packed.minimums}
        return {part: self.load(value.name) for part, value in found.items() if isinstance(value, Param)}

    def load(self, name: str) -> Array:
        """A param's values: a part, or a weight of the model's own."""
        if name not in self.files:
            return self.source(name)
        values: Array = np.load(self.files[name], mmap_mode="r")
        return values


def in_floats(graph: Graph) -> tuple[Graph, dict[Layer, Quantize]]:
    """The graph with the weights that `quantize` was given, and which of its linear ops had which rounded weight."""
    rounded: dict[Layer, Quantize] = {}

    def rule(op: Op) -> Value | None:
        if isinstance(op, Embed) and isinstance(op.table, Quantize):
            return op.replace(table=op.table.w)
        if isinstance(op, (Linear, GatedLinear)) and isinstance(op.w, Quantize):
            layer = op.replace(w=op.w.w)
            assert isinstance(layer, (Linear, GatedLinear))
            rounded[layer] = op.w
            return layer
        return None

    return rewrite(graph, rule), rounded


def calibrate(
    graph: Graph,
    load: LoadParam,
    texts: Sequence[Ids],
    damping: float,
    progress: Progress,
    pool: Executor | None = None,
) -> Iterator[tuple[Quantize, Parts]]:
    """Each weight of the graph's linear layers, and the parts of its encoding that its layers' inputs ask for."""
    floats, layers = in_floats(graph)
    waiting = Counter(layers.values())
    readers: dict[Value, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.x, []).append(layer)
    moments: dict[Quantize, Moments] = {}
    progress.start("rounding by what layers see", len(waiting), "weights")
    runs = [prompt_inputs(floats, ids) for ids in texts]
    for value, data in computed(floats, list(readers), runs, load, {}, pool):
        if value not in readers:
            continue
        seen = _moments(data)
        for layer in readers[value]:
            weight = layers[layer]
            moments[weight] = moments[weight] + seen if weight in moments else seen
            waiting[weight] -= 1
            if not waiting[weight]:
                yield weight, _rounded(weight, moments.pop(weight), damping, load)
                progress.advance()


def with_integers(
    graph: Graph, load: LoadParam, weights: Iterable[tuple[Quantize, Parts]], folder: Path
) -> tuple[Graph, RoundedWeights]:
    """The graph with the given parts in place of weights, and what loads them. folder: for their files."""
    store = RoundedWeights(folder, load)
    for weight, parts in weights:
        store.add(weight, parts)
    return substitute_values(graph, dict(store.packed)), store


def _moments(inputs: Sequence[Data]) -> Moments:
    """The mean of x x^T over rows x of all texts, [K, K]."""
    total: Moments | None = None
    rows = 0
    for x in inputs:
        assert isinstance(x, np.ndarray)
        wide = x.reshape(-1, x.shape[-1]).astype(np.float32, copy=False)
        product = wide.T @ wide
        total = product if total is None else total + product
        rows += len(wide)
    assert total is not None
    return total / np.float32(rows)


def _rounded(weight: Quantize, moments: Moments, damping: float, load: LoadParam) -> Parts:
    """The parts of a weight's encoding. Inputs that overflow say nothing: the weight is rounded for itself."""
    kind = grouped(weight.tensor.encoding)  # type: ignore[arg-type]
    values = evaluate_values([weight.w], {}, load, {})["0"]
    assert isinstance(values, np.ndarray)
    try:
        if not np.isfinite(moments).all():
            return encode(kind, values).parts
        return encode_with_feedback(kind, values, Curvature.of(moments, damping)).parts
    except CompileError as error:  # an encoding that refuses numbers does not know whose they are
        raise CompileError(f"{name_of(weight)}: {error}") from error
