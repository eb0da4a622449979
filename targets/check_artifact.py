"""The artifact itself beside the evaluator: through the runtime, its paged inputs, its arena, its threads.

Prompts go in in random pieces, several sequences together, then tokens one by one. Every step is watched and run again,
kernel by kernel (`replay`): each kernel's result is compared with the numpy meaning of its op on the operands that it
was given, and the step's outputs and caches with those of its kernels, bit for bit. At the end what the runtime gave
is compared with what the graph gives in numpy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.compiler.check import Checker, difference_of, gaps_between, in_own_dtypes
from llmc.compiler.ir.dims import concrete
from llmc.compiler.ir.encoded import Encoded, Pages
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.interface import output_values, size_names
from llmc.compiler.ir.llm import GatedLinear, KVAppend, Linear
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import FLOATS, KV, NUMPY_DTYPES, Array, Tensor
from llmc.errors import ArtifactError, CompileError
from llmc.runtime.artifact import Artifact
from llmc.runtime.library import Library, Step
from llmc.runtime.ragged import RaggedRunner, Tokens
from llmc.runtime.runtime import Runtime
from llmc.targets.lowering import LoweredOp, Program
from llmc.targets.memory import Plan
from llmc.targets.replay import Replay, StepFacts, StepRun, describe, is_rounding, is_written, unrounded
from llmc.targets.step_limits import SIZES, adapter_tables

THREADS = (1, 2)
DECODED = 3  # tokens at a sequence's end that go in one by one
# f32 sums in another order: a few roundings of 2^-24, relative to the largest value of a result.
F32 = 1e-5
# Where kernel and numpy both round activations to int8, a few in a thousand fall on the other side of a half, which
# moves a sum by a step of one activation: 1 / 127 of the largest, in sums of tens of terms and more.
INT8 = 2e-3
BF16 = 2e-3  # the same for bf16: a step is 2^-8 of one activation
# Whole graphs in f32, summed in another order: tens of ops.
WHOLE = 1e-4
HALF_CACHE = 1e-3  # keys and values that differ in the last digit of f32 may be rounded to others in f16, 2^-11 apart
_ULP = {"f16": 2.0**-10, "bf16": 2.0**-7}
_SLOTS = {"LLMC_TOKENS": 0, "LLMC_TILES": 1, "LLMC_SEQUENCES": 2, "LLMC_PAGES": 3, "LLMC_ROWS": 4, "LLMC_SPLITS": 5}
_SLOTS |= {"LLMC_PROMPT": 6, "LLMC_ADAPTED": 7}


@dataclass(frozen=True)
class Parts:
    """What a compile made, as far as a check needs it."""

    program: Program
    plan: Plan
    addresses: Mapping[object, int]  # of weights, by what a call's argument names
    load: LoadParam
    task: str


def check_artifact(path: Path, weights: Path | None, parts: Parts, checker: Checker) -> None:
    """Compares an artifact for this machine with its graph, on the inputs that `checker` ran the passes on.

    weights: the file with the weights, where they are not in the artifact. CompileError names the op and the kernel, or
    the number of threads, and how far it is off.
    """
    ops = steps = 0
    graph = parts.program.graph
    reference = checker.evaluate(graph, exact=False)
    allowed = allowed_differences(graph, reference, checker)
    for threads in THREADS:
        pages = 0 if checker.scenario is None else sum(len(pages) for pages in checker.scenario.pages) + 4
        runtime = _loaded(path, weights, threads, pages)
        watcher = _Watcher(parts, runtime, threads, meanings=threads == THREADS[0])
        try:
            outputs = _outputs(runtime, checker, watcher)
        finally:
            watcher.stop()
        ops, steps = max(ops, len(watcher.ops)), steps + watcher.steps
        for name, expected in reference.items():
            place = None if checker.scenario is None else checker.scenario.place
            what = f"the artifact at {threads} thread{'s' * (threads > 1)}"
            if outputs[name].shape != expected.shape:
                raise CompileError(f"{what} gives {name} as {outputs[name].shape}, not {expected.shape}")
            difference = difference_of(what, name, expected, outputs[name], False, place)
            checker.differences.append(difference)
            if not difference.relative <= allowed[name]:
                raise CompileError(
                    f"{difference}; allowed is {allowed[name]:.2g}. Every kernel computes what it should: what the "
                    "runtime gives a step (positions, slots, pages, rows) is wrong, or the graph was lowered wrongly"
                )
    checker.artifact = [
        f"{ops} ops of the artifact's {len(parts.program.ops)} beside their meaning, each on its own operands",
        f"the artifact's {steps} steps at {' and '.join(map(str, THREADS))} threads, bit for bit with its kernels run "
        "one by one, and its outputs with the graph's",
    ]


def refusal(path: Path) -> str:
    """Why this machine cannot run an artifact; empty where it can."""
    try:
        artifact = Artifact.open(path)
        try:
            artifact.check_machine()
        finally:
            artifact.close()
    except ArtifactError as error:
        return str(error)
    return ""


def _loaded(path: Path, weights: Path | None, threads: int, pages: int) -> Runtime:
    probe = Runtime.load(path, threads=threads, weights=weights, kv_memory=None if not pages else 1 << 40, verify=False)
    if not probe.paged or not pages:
        return probe
    # As many pages as the sequences need, so that copies of the whole cache are small.
    return Runtime.load(path, threads=threads, weights=weights, kv_memory=pages * probe.manifest.bytes_per_page)


def _outputs(runtime: Runtime, checker: Checker, watcher: _Watcher) -> dict[str, Array]:
    """What the runtime makes of the checker's inputs, by output; rows as the checker's."""
    if runtime.task == "run":
        found: dict[str, Array] = {}
        for inputs in checker.draws:
            graph = watcher.parts.program.graph
            arrays = {name: np.asarray(data) for name, data in in_own_dtypes(graph, inputs).items()}
            names = checker.names_of(graph, inputs)
            for name, array in runtime.run(arrays).items():
                found[names[name]] = np.asarray(array)
        return found
    if runtime.task == "encode":
        return _encoded(runtime, checker)
    return {"logits": _continued(runtime, checker)}


def _encoded(runtime: Runtime, checker: Checker) -> dict[str, Array]:
    """All sequences in as few steps as they fit into, the longest first."""
    scenario, runner = checker.scenario, runtime.caller
    assert scenario is not None and isinstance(runner, RaggedRunner)
    order = sorted(range(len(scenario.sequences)), key=lambda index: -len(scenario.sequences[index]))
    tokens = [Tokens(scenario.sequences[index], scenario.types(index)) for index in order]
    parts: dict[str, list[Array]] = {}
    while tokens:
        count = runner.fitting([len(item) for item in tokens])
        for name, arrays in runner.run(tokens[:count]).items():
            parts.setdefault(name, []).extend(np.array(array) for array in arrays)
        tokens = tokens[count:]
    found = {}
    for name, arrays in parts.items():
        by_sequence = [arrays[order.index(index)] for index in range(len(order))]
        per_token = (
            all(
                array.ndim and len(array) == len(ids)
                for array, ids in zip(by_sequence, scenario.sequences, strict=True)
            )
            and len(checker.outputs[name]) == scenario.tokens
        )
        rows = np.concatenate(by_sequence) if per_token else np.stack(by_sequence)
        found[name] = rows.reshape(len(rows), -1)
    return found


def _continued(runtime: Runtime, checker: Checker) -> Array:
    """Logits of all tokens [tokens, vocabulary]: prompts in random pieces, together; the last tokens one by one."""
    scenario = checker.scenario
    assert scenario is not None
    rng = np.random.default_rng(scenario.seed)
    out = np.full((scenario.tokens, runtime.vocab_size), np.nan, np.float32)
    # The graph computes each text as one of its whole length.
    sequences = [runtime.sequence(expected=len(ids)) for ids in scenario.sequences]
    ends = [max(1, len(ids) - DECODED) for ids in scenario.sequences]
    cuts = [sorted({0, int(rng.integers(0, end + 1)), end}) for end in ends]
    for turn in range(max(len(cut) for cut in cuts) - 1):
        pieces = [(i, cut[turn], cut[turn + 1]) for i, cut in enumerate(cuts) if turn + 1 < len(cut)]
        rng.shuffle(pieces)
        logits = runtime.step([(sequences[i], scenario.sequences[i][begin:end], "all") for i, begin, end in pieces])
        rows = [scenario.row(i, position) for i, begin, end in pieces for position in range(begin, end)]
        out[rows] = logits
    for step in range(DECODED):
        going = [i for i, end in enumerate(ends) if end + step < len(scenario.sequences[i])]
        if going:
            with runtime.lock:
                tokens = [int(scenario.sequences[i][ends[i] + step]) for i in going]
                for i, place in zip(going, runtime.decode([sequences[i] for i in going], tokens), strict=True):
                    out[scenario.row(i, ends[i] + step)] = runtime.fetch_logits(place)[0]
    for sequence in sequences:
        sequence.close()
    return out


def allowed_differences(graph: Graph, reference: dict[str, Array], checker: Checker) -> dict[str, float]:
    """How far each output of a whole artifact may be from its graph's, relative to the largest value.

    Kernels round activations where the graph says so, from operands that differ in the last digits: after some layers
    the two roundings have nothing to do with each other. Each is as far from the unrounded result as the other, so
    that they are twice as far apart at most; how far that is, is what leaving the roundings away changes.
    """
    floor = HALF_CACHE if any(isinstance(v.type, KV) and v.type.dtype == "f16" for v in graph.inputs) else WHOLE
    plain = _without_rounding(graph)
    if plain is graph:
        return dict.fromkeys(reference, floor)
    exact = checker.evaluate(plain, exact=False)
    return {name: floor + 2 * difference_of("", name, reference[name], exact[name]).relative for name in reference}


def _without_rounding(graph: Graph) -> Graph:
    def rule(op: Op) -> Value | None:
        if isinstance(op, (Linear, GatedLinear)) and op.rounding != "f32":
            return op.replace(rounding="f32")
        return unrounded(op) if is_rounding(op) else None

    return rewrite(graph, rule)


class _Watcher:
    """Stands in for the `run` of a runtime's device, which has to be the host: runs every step, and then again."""

    def __init__(self, parts: Parts, runtime: Runtime, threads: int, meanings: bool) -> None:
        self.parts, self.runtime, self.threads, self.meanings = parts, runtime, threads, meanings
        self.steps = 0
        self.ops: set[Op] = set()  # whose kernels were compared
        self.caller = runtime.caller
        assert isinstance(runtime.code, Library)
        self.replay = Replay(parts.program, runtime.code.handle, runtime.weights, parts.addresses, parts.load)
        self.device = runtime.device
        self._run = self.device.run
        self.device.run = self.run  # type: ignore[method-assign]
        self.device.in_process = False  # every step goes through that

    def stop(self) -> None:
        self.device.run = self._run  # type: ignore[method-assign]
        self.device.in_process = True

    def run(self, step: Step) -> None:
        """What `Device.run` does, watched."""
        facts = self._facts()
        self._run(step)
        self.steps += 1
        again = self.replay.run(facts, self._compare if self.meanings else None)
        self._same_bits(facts, again)

    def _facts(self) -> StepFacts:
        """The inputs of the step that is about to run, copied."""
        struct, graph, task = self.caller.step, self.parts.program.graph, self.parts.task
        binding = {symbol: int(struct.sizes[_SLOTS[slot]]) for symbol, slot in SIZES.items()}
        if task == "run":
            dims = (ctypes.c_int64 * max(1, len(size_names(graph)))).from_address(struct.dims)
            binding = dict(zip(size_names(graph), (int(size) for size in dims), strict=False))
        inputs = {}
        plain = [value for value in graph.inputs if not isinstance(value.type, KV)]
        tables = adapter_tables(graph)
        for index, value in enumerate(plain):
            shape = tuple(concrete(dim, binding) for dim in value.shape)
            if task == "run":
                place = (ctypes.c_void_p * len(plain)).from_address(struct.inputs)[index]
            elif value in tables:
                place = (ctypes.c_void_p * len(tables)).from_address(struct.adapter_tables)[tables.index(value)]
            else:
                place = getattr(struct, value.name)
            inputs[value.name] = _copied(place, shape, NUMPY_DTYPES[value.dtype])
        return StepFacts(inputs, self._caches(), binding)

    def _caches(self) -> list[Pages]:
        buffers = getattr(self.caller, "buffers", None)
        arrays = [] if buffers is None else buffers.arrays
        return [Pages(keys.copy(), values.copy()) for keys, values in zip(arrays[::2], arrays[1::2], strict=True)]

    def _same_bits(self, facts: StepFacts, again: StepRun) -> None:
        """The step's outputs and caches beside those of its kernels one by one."""
        what = f"the artifact at {self.threads} thread{'s' * (self.threads > 1)}"
        struct, graph = self.caller.step, self.parts.program.graph
        differs = ""
        for index, (name, array) in enumerate(again.outputs().items()):
            if self.parts.task == "generate":
                place = struct.logits
            else:
                place = (ctypes.c_void_p * len(output_values(graph))).from_address(struct.outputs)[index]
            if array.size and not _equal(_copied(place, array.shape, array.dtype), array):
                differs = differs or f"output {name}"
        for index, (mine, theirs) in enumerate(zip(again.caches, self._caches(), strict=True)):
            if not (_equal(mine.keys, theirs.keys) and _equal(mine.values, theirs.values)):
                differs = differs or f"cache {index}"
        if differs:
            whole = self.replay.run(facts, keep=True)
            arena = self.caller.arena
            first = whole.first_difference(
                self.parts.plan, self.device.fetch(arena.at(), (arena.nbytes,), np.dtype(np.uint8))
            )
            raise CompileError(
                f"{what}: {differs} has other bits than its own kernels give one by one"
                + (f", first at {first}" if first else "")
                + ": the plan of memory, the step's driver or the pool of threads is wrong"
            )

    def _compare(self, lowered: LoweredOp, run: StepRun) -> None:
        """One op's result beside its meaning."""
        op = lowered.op
        if isinstance(op, KVAppend):
            self._compare_cache(lowered, run)
        if not is_written(lowered) or not isinstance(op.type, Tensor):
            return
        self.ops.add(op)
        found = run.array(op)
        expected = run.meaning(op)
        assert isinstance(expected, np.ndarray)
        expected = expected.astype(found.dtype, copy=False)
        error = _error(lowered, run, expected, found)
        if error:
            raise CompileError(f"{describe(lowered)} computes something else than {op.name} means: {error}")

    def _compare_cache(self, lowered: LoweredOp, run: StepRun) -> None:
        op = lowered.op
        assert isinstance(op, KVAppend)
        index = run.cache_index(op)
        k, v, slots = (run.data(value) for value in (op.k, op.v, op.slots))
        expected = run.before[index].append(k, v, slots)  # type: ignore[arg-type]
        self.ops.add(op)
        for part in ("keys", "values"):
            a, b = getattr(expected, part), getattr(run.caches[index], part)
            error = _beyond(a, b, _tolerance(a, op.cache.kv.dtype))
            if error:
                raise CompileError(f"{describe(lowered)} writes other {part} into cache {index}: {error}")


def _copied(place: int | None, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    count = int(np.prod(shape, dtype=np.int64))
    if not count or not place:
        return np.zeros(shape, dtype)
    found: Array = np.frombuffer(bytearray(ctypes.string_at(place, count * dtype.itemsize)), np.uint8)
    return found.view(dtype).reshape(shape)


def _equal(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and np.array_equal(
        np.ascontiguousarray(a).reshape(-1).view(np.uint8), np.ascontiguousarray(b).reshape(-1).view(np.uint8)
    )


def _tolerance(expected: Array, dtype: str) -> Array | float:
    """How far a result of one op may be off, element by element."""
    if dtype not in FLOATS:
        return 0.0
    wide = np.abs(expected.astype(np.float64))
    finite = wide[np.isfinite(wide)]
    largest = float(finite.max()) if finite.size else 0.0
    return np.where(np.isfinite(wide), wide, 0.0) * _ULP.get(dtype, 0.0) + F32 * largest


def _beyond(expected: Array, found: Array, allowed: Array | float) -> str:
    """Where found is further from expected than allowed, in words; empty where it is not."""
    gaps = gaps_between(expected.astype(np.float64), found.astype(np.float64))
    excess = gaps - allowed
    if not gaps.size or not (excess > 0).any():
        return ""
    at = np.unravel_index(int(np.argmax(excess)), gaps.shape)
    limit = float(np.broadcast_to(allowed, gaps.shape)[at])
    return f"{found[at]} instead of {expected[at]} at {[int(i) for i in at]}; allowed is {limit:.3g}"


def _error(lowered: LoweredOp, run: StepRun, expected: Array, found: Array) -> str:
    """How a kernel's result differs from its op's meaning, in words; empty where it does not."""
    op = lowered.op
    error = _beyond(expected, found, _tolerance(expected, op.tensor.dtype))
    if not error or not isinstance(op, (Linear, GatedLinear)):
        return error
    wide, largest = found.astype(np.float64), float(np.abs(expected).max(initial=0.0))
    rounded = op.rounding != "f32" or (is_rounding(op.x) and run.replay.program.buffer_of(op.x) not in run.written)
    if not rounded:
        # Sums that cancel: relative to the sum of their terms' sizes.
        return _beyond(expected, found, F32 * max(largest, _terms(op, run)))
    if not _beyond(expected, found, INT8 * largest):
        return ""
    # Kernels may keep more of the activations than the graph asks for. Then they are much nearer to what the op means
    # without rounding than the rounding is: half as far at most.
    plain = run.meaning(op.replace(rounding="f32"), rounded=False)
    assert isinstance(plain, np.ndarray)
    rounding = float(np.abs(plain.astype(np.float64) - expected).max(initial=0.0))
    return error if np.abs(plain - wide).max(initial=0.0) > rounding / 2 + F32 * largest else ""


def _terms(op: Linear | GatedLinear, run: StepRun) -> float:
    """The largest sum of |x| |w| of a linear op."""
    x, w = run.data(op.x), run.data(op.w)
    weight = w.decode() if isinstance(w, Encoded) else w
    assert isinstance(x, np.ndarray) and isinstance(weight, np.ndarray)
    rows = np.abs(x.reshape(-1, x.shape[-1]).astype(np.float32))
    return float((rows @ np.abs(weight.astype(np.float32)).T).max(initial=0.0))
