"""Rounding the weights of linear layers by what goes through them: texts are run through the graph, the second moments
of each layer's inputs are measured, and its weight is rounded with error feedback (`encodings/feedback.py`).

The graph is run once, op by op for all texts, in its own numpy meaning and with weights as the model has them. A weight
is rounded as soon as all of its readers' inputs are known.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.allocation import MORE, Assembly, Losses, assemblies, budgets, others, saved, spent_on
from llmc.compiler.divergence import output_of
from llmc.compiler.encodings.feedback import DAMPING, SWEEPS, Curvature, Rounded, encode_with_feedback
from llmc.compiler.encodings.grouped import encode, grouped
from llmc.compiler.estimate import stored_bits
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.evaluate import Data, LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph, rewrite, substitute_values
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear, Quantize, QuantizeActivations, static
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.types import Array, Tensor, dtype_of
from llmc.compiler.own_text import ENCODER_DAMPING, ROUNDS, Ids, own_texts, random_texts, texts_of_file
from llmc.compiler.passes.schemes import Overrides
from llmc.compiler.progress import Progress
from llmc.compiler.rounded_cache import NotKept, RoundedCache, key_of
from llmc.compiler.rounded_parts import RoundedParts, remove_left, rounded_parts
from llmc.compiler.scenario import computed, prompt_runs
from llmc.compiler.sensitivity import TOKENS, divergence_from, relative_error, rounding_losses
from llmc.compiler.weights import name_of
from llmc.errors import CompileError, LlmcError

if TYPE_CHECKING:
    from llmc.compiler.options import CompileOptions
    from llmc.frontends.lifted import Lifted

Floats = NDArray[np.float32]
Moments = Floats
Schemes: TypeAlias = Mapping[str, str]  # by names of params
Layer: TypeAlias = Linear | GatedLinear
Keep: TypeAlias = Callable[[Quantize, Rounded], Rounded]

MOMENTS_BLOCK = 512  # inputs, of those whose moments a thread finds at a time
WRITES_FROM = 1 << 22  # parameters of a model that is compiled to write text
OVERHEAD = 4.0  # measured with 0.5B parameters: all there is, beside products of matrices at full speed


@dataclass(frozen=True)
class Model:
    """A model that is to be rounded. graph: after all passes. vocabulary: ids that it takes. anew: makes the graph with
    schemes of its own for some params, by their names. write: what the model writes behind the first id of each text;
    LlmcError where it does not run here. near: whether a graph and what loads it is near enough to the model, where
    bits are to be spent until it is."""

    lifted: Lifted
    graph: Graph
    vocabulary: int
    anew: Callable[[Schemes], Graph]
    write: Callable[[Sequence[Ids]], list[Ids]]
    near: Callable[[Graph, LoadParam], bool] | None = None


def calibrate_model(
    model: Model, options: CompileOptions, code: str, folder: Path, progress: Progress
) -> tuple[Graph, RoundedWeights]:
    """The model's graph with weights rounded by what their layers see of its own text and of the file that the options
    name, and the rounded weights. code: a hash of what does the rounding. folder: for the rounded weights.

    Taken from the cache where the same was rounded before. CompileError for a model that is not one of texts.
    """
    lifted, graph, vocabulary = model.lifted, model.graph, model.vocabulary
    if lifted.task == "run":
        raise CompileError("--calibrate: only models of texts can be measured, this graph's inputs cannot be made up")
    load = lifted.weights.load
    texts = random_texts(lifted, vocabulary, options.seed)
    file = options.calibration_file
    more = [] if file is None else texts_of_file(file, lifted, vocabulary)
    floats, layers = in_floats(graph)
    weights, cache = list(dict.fromkeys(layers.values())), RoundedCache.default()
    if not weights:
        return graph, RoundedWeights(folder, load)
    progress.start("looking for rounded weights")
    # A weights' file fits every artifact of the model, also those that were compiled without weights.
    apart = options.weights_file is not None
    overrides = Overrides(options.overrides)
    most = 0.0 if apart else most_bits(graph, lifted.parameters, options.bits_per_weight, saved(weights, overrides))
    encodings = [weight.encoding for weight in weights]
    searched = model.near is not None
    key = key_of(
        floats, load, [*texts, *more], code, encodings, most, vocabulary, options.seed, searched, options.overrides
    )
    with suppress(NotKept):
        schemes = cache.schemes(key)
        other = model.anew(schemes) if schemes else graph
        found, store = with_integers(other, load, cache.read(key, rounded_weights(other)), folder)
        remove_left(cache.folder, key)
        return found, store
    with rounded_parts(cache.folder, key, folder, weights) as parts:
        with text_threads() as pool:
            for weight, _ in rounded(model, options, texts, more, progress, pool, not apart, parts):
                parts.finish(weight)
            kept = parts.in_order()
            losses = None if apart else losses_of(model, kept, parts.texts() or [*texts, *more], progress, pool)
        for budget in [most] if apart or not searched else budgets(kept, most):
            schemes = {} if apart else spent_on(kept, budget, overrides, losses)
            other, chosen = _with_schemes(model, schemes, kept)
            found, store = with_integers(other, load, ((each.weight, each.encoded()) for each in chosen), folder)
            if model.near is None or model.near(found, store.load):
                schemes = schemes if other is not graph else {}
                _note(schemes, progress)
                cache.write(key, schemes, (each.encoded() for each in chosen))
                parts.remove()
                return found, store
    raise NotNear


class NotNear(LlmcError):
    """No choice of bits is near enough to the model."""


def rounded(
    model: Model,
    options: CompileOptions,
    texts: Sequence[Ids],
    more: Sequence[Ids],
    progress: Progress,
    pool: Executor,
    otherwise: bool = False,
    parts: RoundedParts | None = None,
) -> Iterator[tuple[Quantize, list[Rounded]]]:
    """What `calibrate` finds on the model's own texts and on more of them. texts: what its own begin as. parts: what a
    compile that was ended has found already, which comes first, and where drawn texts are kept for the next one."""
    floats, layers = in_floats(model.graph)
    load, decodes = model.lifted.weights.load, model.lifted.task == "generate"
    drawn = parts.texts() if decodes and parts is not None else []
    done = _done(parts, [*(drawn or texts), *more], otherwise, bool(drawn), progress)
    left = {layer: weight for layer, weight in layers.items() if weight not in done}
    tell_cost(left, texts, more, decodes and not drawn, progress)
    if decodes and not drawn:
        drawn = _written(model, texts, progress) or own_texts(
            floats, load, texts, model.vocabulary, options.seed, pool, progress.advance
        )
        if parts is not None:
            parts.keep_texts(drawn)
            done = parts.find([*drawn, *more], otherwise)
    damping = DAMPING if decodes or more else ENCODER_DAMPING
    yield from done.items()
    keep = _as_it_is if parts is None else parts.put
    yield from calibrate(model.graph, load, [*(drawn or texts), *more], damping, progress, pool, otherwise, done, keep)


def _done(
    parts: RoundedParts | None, texts: Sequence[Ids], otherwise: bool, drawn: bool, progress: Progress
) -> dict[Quantize, list[Rounded]]:
    """The weights that were rounded by these texts before, which is said."""
    if parts is None:
        return {}
    done = parts.find(texts, otherwise)
    if done or drawn:
        progress.note(
            f"goes on where a compile of the same was ended: {len(done)} of {len(parts.weights)} weights are rounded"
        )
    return done


def _with_schemes(
    model: Model, schemes: Schemes, kept: Mapping[Quantize, Sequence[Rounded]]
) -> tuple[Graph, list[Assembly]]:
    """The graph with these schemes for some params, and what its weights become."""
    if schemes:
        other = model.anew(schemes)
        # With other schemes the passes could take the model apart in another way.
        with suppress(KeyError):
            return other, assemblies(rounded_weights(other), kept)
        model.anew({})
    return model.graph, assemblies(kept, kept)


def _note(schemes: Schemes, progress: Progress) -> None:
    if schemes:
        counts = ", ".join(f"{scheme} to {count}" for scheme, count in sorted(Counter(schemes.values()).items()))
        progress.note(
            f"bits go where they are worth most: of the matrices, {counts} (llmc inspect --accuracy lists all)"
        )


def _written(model: Model, texts: Sequence[Ids], progress: Progress) -> list[Ids]:
    """What the model writes behind the first id of each text; none where that is not to be had."""
    if model.lifted.parameters >= WRITES_FROM:
        try:
            return model.write(texts)
        except (LlmcError, OSError) as error:
            progress.note(f"the model's text is drawn in one pass, as it cannot be written: {error}")
    progress.start("drawing text to round by", ROUNDS * len(texts), "texts")
    return []


def rounded_weights(graph: Graph) -> list[Quantize]:
    """The weights of linear layers that are to be rounded, in order."""
    return list(dict.fromkeys(in_floats(graph)[1].values()))


def most_bits(graph: Graph, parameters: int, budget: float | None, saved: float) -> float:
    """Bits that may be spent on weights beyond those that the graph has already; negative for fewer. budget: bits a
    parameter in all, None for `allocation.MORE` more. saved: bits that the weights could do without. CompileError where
    that is too little."""
    if budget is None:
        return MORE * parameters
    have, least = (bits / max(1, parameters) for bits in (stored_bits(graph), stored_bits(graph) - saved))
    if budget < least:
        raise CompileError(
            f"--bits-per-weight {budget:g}: what is asked for takes {least:.3f} at least. Give less to some "
            "(--embedding int4, --head int4), ask for a smaller scheme (-q int3), or give more bits"
        )
    return (budget - have) * parameters


def losses_of(
    model: Model,
    kept: Mapping[Quantize, Sequence[Rounded]],
    texts: Sequence[Ids],
    progress: Progress,
    pool: Executor,
) -> Losses | None:
    """What the model loses by each of these weights alone, rounded to the first that it may become; None where outputs
    are not finite. A weight that changes nothing on this text is left out: elsewhere it may. texts: of which the
    beginning is read. Activations are not rounded meanwhile: where a weight changes
    them a little, some are rounded otherwise, which hides what the weight itself does."""
    exact = rewrite(model.graph, lambda op: op.x if isinstance(op, QuantizeActivations) else None)
    floats, layers = in_floats(exact)
    readers: dict[Op, Quantize] = dict(layers.items())
    tables = {weight.w: weight for weight in kept}
    for op in floats.ops:
        if isinstance(op, Embed) and op.table in tables:
            readers[op] = tables[op.table]
    decodes = model.lifted.task == "generate"
    output = "logits" if decodes else output_of(model.lifted, floats)
    inputs = prompt_runs(floats, [text[:TOKENS] for text in texts], TOKENS, wide=True)[0]
    found = rounding_losses(
        floats, readers, output, inputs, model.lifted.weights.load, lambda weight: kept[weight][0].encoded.decode(),
        divergence_from(model.vocabulary) if decodes else relative_error, progress, pool,
    )  # fmt: skip
    if not all(map(math.isfinite, found.values())):
        return None
    return {weight: loss for weight, loss in found.items() if loss > 0}


def tell_cost(
    layers: Mapping[Layer, Quantize], texts: Sequence[Ids], more: Sequence[Ids], decodes: bool, progress: Progress
) -> None:
    """Says beforehand how long it takes, where that is more than a minute, by how fast this machine multiplies now."""
    shapes = {weight: tuple(static(dim) for dim in weight.shape) for weight in layers.values()}
    tokens = sum(map(len, texts)) * (ROUNDS * decodes + 1) + sum(map(len, more))
    products = tokens * sum(math.prod(shapes[weight]) for weight in layers.values())
    # Products with the moments of all inputs: for each of four encodings the outputs, feedback and two errors, and for
    # each sweep of two of them a fit, an error and slopes.
    products += sum(n * k * k * (14 + 6 * SWEEPS) + k**3 for n, k in shapes.values())
    # With each weight rounded alone, a text runs through half of the model on average.
    products += TOKENS * sum(n * k for n, k in shapes.values()) * len(shapes) // 2
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

    def add(self, weight: Quantize, encoded: Encoded) -> None:
        """Keep what a weight became."""
        made_of = name_of(weight)
        names = itertools.chain([made_of], (f"{made_of} ({number})" for number in itertools.count(2)))
        name = next(each for each in names if each not in self.files)  # several weights may be made of one param
        params: dict[str, Param] = {}
        for part, array in encoded.parts.items():
            whole = name if part == "q" else f"{name} ({part})"
            self.files[whole] = self.folder / f"{len(self.files)}.npy"
            np.save(self.files[whole], array)
            params[part] = Param(whole, Tensor(array.shape, dtype_of(array.dtype)))
        self.packed[weight] = PackGroups(params["q"], params["scales"], params.get("minimums"), str(encoded.encoding))

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


def _as_it_is(_: Quantize, rounded: Rounded) -> Rounded:
    return rounded


def calibrate(
    graph: Graph,
    load: LoadParam,
    texts: Sequence[Ids],
    damping: float,
    progress: Progress,
    pool: Executor | None = None,
    more: bool = False,
    done: Collection[Quantize] = (),
    keep: Keep = _as_it_is,
) -> Iterator[tuple[Quantize, list[Rounded]]]:
    """Each weight of the graph's linear layers, but for those that are done, and what its layers' inputs make of it in
    its encoding; with `more`, in others besides. keep: given each of them as soon as it is there, gives what is
    handed out in its place."""
    floats, layers = in_floats(graph)
    waiting = Counter(weight for weight in layers.values() if weight not in done)
    readers: dict[Value, list[Layer]] = {}
    for layer, weight in layers.items():
        if weight not in done:
            readers.setdefault(layer.x, []).append(layer)
    moments: dict[Quantize, Moments] = {}
    progress.start("rounding by what layers see", len(waiting) + len(done), "weights")
    progress.advance(len(done))
    runs = prompt_runs(floats, texts)
    for value, data in computed(floats, list(readers), runs, load, {}, pool):
        if value not in readers:
            continue
        seen = _moments(data, pool)
        for layer in readers[value]:
            weight = layers[layer]
            moments[weight] = moments[weight] + seen if weight in moments else seen
            waiting[weight] -= 1
            if not waiting[weight]:
                yield weight, _rounded(weight, moments.pop(weight), damping, load, more, keep)
                progress.advance()


def with_integers(
    graph: Graph, load: LoadParam, weights: Iterable[tuple[Quantize, Encoded]], folder: Path
) -> tuple[Graph, RoundedWeights]:
    """The graph with what weights became in their place, and what loads it. folder: for their files."""
    store = RoundedWeights(folder, load)
    for weight, encoded in weights:
        store.add(weight, encoded)
    return substitute_values(graph, dict(store.packed)), store


def _moments(inputs: Sequence[Data], pool: Executor | None) -> Moments:
    """The mean of x x^T over rows x of all texts, [K, K]. pool: of threads that share its blocks."""
    texts: list[Floats] = []
    for x in inputs:
        assert isinstance(x, np.ndarray)
        texts.append(x.reshape(-1, x.shape[-1]).astype(np.float32, copy=False))
    size, rows = texts[0].shape[-1], sum(map(len, texts))
    total = np.zeros((size, size), np.float32)

    def block(at: tuple[int, int]) -> None:
        here, there = (slice(start, start + MOMENTS_BLOCK) for start in at)
        for x in texts:
            total[here, there] += x[:, here].T @ x[:, there]
        total[here, there] /= np.float32(rows)
        if here != there:
            total[there, here] = total[here, there].T

    blocks = list(combinations_with_replacement(range(0, size, MOMENTS_BLOCK), 2))
    for _ in (map if pool is None else pool.map)(block, blocks):
        pass
    return total


def _rounded(
    weight: Quantize, moments: Moments, damping: float, load: LoadParam, more: bool, keep: Keep
) -> list[Rounded]:
    """What a weight becomes. Inputs that overflow say nothing: the weight is rounded for itself.

    A finer encoding is rounded without sweeps: it leaves so little noise that it does not matter."""
    kind = grouped(weight.tensor.encoding)  # type: ignore[arg-type]
    values = evaluate_values([weight.w], {}, load, {})["0"]
    assert isinstance(values, np.ndarray)
    try:
        if not np.isfinite(moments).all():
            none = np.zeros(len(values), np.float32)
            return [keep(weight, Rounded(encode(kind, values), none, none))]
        curvature = Curvature.of(moments, damping)
        kinds = [(kind, SWEEPS), *((each, SWEEPS if each.bits < kind.bits else 0) for each in others(kind) if more)]
        return [keep(weight, encode_with_feedback(each, values, curvature, sweeps)) for each, sweeps in kinds]
    except CompileError as error:  # an encoding that refuses numbers does not know whose they are
        raise CompileError(f"{name_of(weight)}: {error}") from error
