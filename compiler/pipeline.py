"""The whole compile in one list of phases: lift, passes, kernels, library, weights, artifact."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmc.compiler import passes as _passes  # noqa: F401  (registers all passes)
from llmc.compiler.adapting import AdapterTable, check_room, make_room
from llmc.compiler.artifact import ArtifactWriter
from llmc.compiler.estimate import estimate
from llmc.compiler.ir.attention import Attention
from llmc.compiler.ir.dims import symbols_of
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import KV
from llmc.compiler.losses import integer_notes, losses
from llmc.compiler.options import AUTO, INTEGERS, CompileOptions
from llmc.compiler.passes.causality import attends_causally
from llmc.compiler.passes.manager import Observer, Pass, Report, parse_pipeline, run_passes
from llmc.compiler.passes.probe import reading
from llmc.compiler.passes.quantize import QuantizeWeights
from llmc.compiler.passes.schemes import finer_than
from llmc.compiler.progress import Progress, Silent
from llmc.compiler.scratch import scratch_folder
from llmc.compiler.smoothing import ScaledWeights, has_uneven_factors, smoothed
from llmc.compiler.step_sizes import ENCODE, GENERATE, RUN, greatest, step_limit
from llmc.compiler.tables import check_tables
from llmc.compiler.unused import unused
from llmc.compiler.weights import Placed, Stored, packed_arrays, place
from llmc.compiler.weights_file import WeightsFile
from llmc.errors import CompileError, IRError

if TYPE_CHECKING:
    from llmc.compiler.accuracy import RoundedHere
    from llmc.compiler.check import Checker
    from llmc.compiler.encoder_choice import Near
    from llmc.compiler.ir.llm import Quantize
    from llmc.compiler.own_text import Ids
    from llmc.frontends.lifted import Lifted
    from llmc.targets.check_artifact import Parts
    from llmc.targets.lowering import Program
    from llmc.targets.memory import Plan

RECOGNISE = (
    "integer-products,canonicalize,fold,cse,fuse-activation,fuse-half-activation,fuse-norm,use-positions,fuse-rope,"
    "fuse-attention,fuse-linear,fuse-embed,order-inputs,keep-integers,canonicalize,fold,cse"
)


def pipeline_text(
    options: CompileOptions,
    task: str = GENERATE,
    vocabulary: int = 0,
    max_context: int = 0,
    least: Mapping[str, str] | None = None,
) -> str:
    """The passes of a compile, as text. task: what kind of graph it is (`frontends/lifted.py`).

    vocabulary, max_context: how many token ids and positions there are; 0: unknown. least: as of `Lifted`.
    """
    kv_dtype = "f32" if options.quantization == "none" else "f16"
    overrides = ";".join(f"{pattern}={scheme}" for pattern, scheme in options.overrides)
    finer = finer_than(options.quantization, least or {})
    at_least = ";".join(f"{name}={scheme}" for name, scheme in finer.items())
    quantize = (
        f"quantize{{scheme={options.quantization},group-size={options.group_size},"
        f"symmetric={str(options.symmetric).lower()},activations={options.activation_dtype},"
        f"embedding={options.embedding or 'auto'},head={options.head or 'auto'}"
        + (f",overrides={overrides}" if overrides else "")
        + (f",least={at_least}" if at_least else "")
        + "}"
    )
    apart = ";".join(filter(None, (overrides, at_least)))
    merge = "merge-projections" + (f"{{overrides={apart}}}" if apart else "")
    bounds = (
        "bound-indices"
        if task == RUN
        else (f"bound-indices{{text=true,vocabulary={vocabulary},context={max_context}}}")
    )
    finish = f"fuse-epilogues,canonicalize,fold,cse,widen-vectors,{bounds},split-rounding,cse"
    if task == RUN:  # any graph, as it is: its inputs are not tokens
        return ",".join([RECOGNISE, "split-projections,canonicalize,fold,cse", merge, quantize, finish])
    encodes = ",sequences=true" if task == ENCODE else ""
    scratch = ",scratch=true" if task == ENCODE else ""
    return ",".join(
        [
            RECOGNISE,
            f"flatten-tokens{{max-step={options.tokens_a_step(task == ENCODE)}{encodes}}}",
            "canonicalize,fold,cse,split-projections,canonicalize,cse",
            f"insert-kv-cache{{kv-dtype={kv_dtype}{scratch}}}",
            "select-rows{sequences=true},whole-sequence{sequences=true}" if encodes else "select-rows,whole-sequence",
            merge,
            quantize,
            finish,
        ]
    )


@dataclass
class Compiled:
    """A lifted model after all passes, and what each pass did."""

    graph: Graph
    reports: list[Report]
    first_layer: str = ""  # what the check of the first layer compared
    load: LoadParam | None = None  # of the graph's params, where some are not the model's own
    calibrated: str = "none"  # what weights were rounded by: none, self, or a file's hash
    original: Graph | None = None  # before weights were rounded
    # Weights that were rounded by what their layers see: what they were to be, by what stands in their place.
    originals: dict[Value, Quantize] = field(default_factory=dict)
    adapters: tuple[AdapterTable, ...] = ()  # what the tables of adapters are for, in order


def run_pipeline(
    graph: Graph,
    options: CompileOptions,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
    load: LoadParam | None = None,
    task: str = GENERATE,
    vocabulary: int = 0,
    max_context: int = 0,
    least: Mapping[str, str] | None = None,
) -> Compiled:
    """Run the options' passes over a lifted graph. `load` reads weights: some checkpoints store masks as such.

    vocabulary, max_context: how many token ids and positions the runtime lets through (default: as the graph shows).
    least: as of `Lifted`.
    """
    passes = parse_pipeline(pipeline_text(options, task, vocabulary, max_context or longest_sequence(graph), least))
    progress = progress or Silent()
    progress.start("passes", len(passes), "passes")

    original: list[Graph] = []

    def tick(item: Pass, before: Graph, _after: Graph, _report: Report) -> None:
        if isinstance(item, QuantizeWeights):
            original.append(before)
        progress.advance()

    with reading(load) if load is not None else nullcontext():
        final, reports = run_passes(graph, passes, [*observers, tick])
    return Compiled(final, reports, original=original[0])


def lift_model(source: str, options: CompileOptions, tokenizer: Path | None = None) -> Lifted:
    """A model read by its frontend, and settled where its files do not say what it is (see `Lifted.otherwise`)."""
    from llmc.frontends import lift

    return settled(
        lift(
            source, max_context=options.max_context, weights="random" if options.weights == "random" else "checkpoint",
            seed=options.seed, tokenizer=tokenizer, max_dims=dict(options.max_dims), dims=dict(options.dims),
            lora=options.lora,
        )
    )  # fmt: skip


def settled(lifted: Lifted) -> Lifted:
    """The model as lifted, or `Lifted.otherwise`: it is a decoder only if no attention of it sees later tokens."""
    if lifted.otherwise is None:
        return lifted
    with reading(lifted.weights.load):
        graph, _ = run_passes(lifted.graph, parse_pipeline(RECOGNISE))
        if attends_causally(graph):
            return replace(lifted, otherwise=None)
    encoder = lifted.otherwise()
    if any(isinstance(op, Attention) and not op.causal for op in graph.ops):
        return encoder
    note = (
        "taken for an encoder, as its attention is not known to see only tokens before: if it is a decoder, say so "
        'in a config.json beside it: {"architectures": ["ModelForCausalLM"]}'
    )
    return replace(encoder, notes=(*encoder.notes, note))


def evened(lifted: Lifted, options: CompileOptions, progress: Progress) -> Lifted:
    """The same model with evener activations, where they are rounded to int8 and some norm would make a few of them
    much larger than the others: see `smoothing.py`."""
    rounds = options.quantization in INTEGERS and options.activation_dtype == "int8"
    if not rounds or not options.has_weights or lifted.task == RUN:
        return lifted
    if not has_uneven_factors(lifted.graph, lifted.load):
        return lifted
    with reading(lifted.weights.load):
        graph, _ = run_passes(lifted.graph, parse_pipeline(RECOGNISE))
    found, norms = smoothed(graph, lifted.weights)
    if not found:
        return lifted
    progress.note(
        f"{norms} norm{'s' * (norms != 1)} with a few large weights: powers of two of these go to the layers behind, "
        "so that the others' activations keep more of their 8 bits. The model's own numbers stay what they are"
    )
    return replace(lifted, weights=ScaledWeights(lifted.weights, found))


def vocabulary_of(lifted: Lifted) -> int:
    """Token ids that the runtime lets through: as many as logits where the model generates; 1 where it knows none."""
    logits = dict(lifted.graph.outputs).get("logits") if lifted.task == GENERATE else None
    width = logits.shape[-1] if logits is not None else lifted.vocab_size
    return max(1, width) if isinstance(width, int) else max(1, lifted.vocab_size)


def longest_sequence(graph: Graph) -> int:
    """The most tokens of a sequence of a lifted text graph, ids [1, S]; 0 where S has no bound."""
    sizes = [value.shape[-1] for value in graph.inputs if value.name == "ids" and value.shape]
    symbols = [symbol for size in sizes for symbol in symbols_of(size)]
    return max((symbol.high or 0 for symbol in symbols), default=0)


def run_lifted(
    lifted: Lifted, options: CompileOptions, observers: Sequence[Observer] = (), progress: Progress | None = None
) -> Compiled:
    """Run the options' passes over a model as it was lifted."""
    load, vocabulary, context = lifted.weights.load, vocabulary_of(lifted), lifted.max_context
    return run_pipeline(
        lifted.graph, options, observers, progress, load, lifted.task, vocabulary, context, lifted.least
    )


def lower_to_kernels(graph: Graph, options: CompileOptions, max_context: int, task: str = GENERATE) -> Graph:
    """The k-level form of a graph after all passes: kernels chosen, buffers planned. For people and tests."""
    from llmc.targets import lower, machine_named
    from llmc.targets.kernel_graph import kernel_graph
    from llmc.targets.memory import plan_memory

    program = lower(graph, machine_named(options.target))
    step = step_limit(program.graph, options, max_context, task)
    return kernel_graph(program, plan_memory(program, greatest(program.graph, step, max_context, task)))


def compile_model(
    source: str,
    output: Path,
    options: CompileOptions,
    progress: Progress | None = None,
    tokenizer: Path | None = None,
    on_checked: Callable[[Checker], None] | None = None,
) -> dict[str, object]:
    """Compile a model directory, hub name or ONNX file into the artifact `output`; returns the artifact's manifest.

    `tokenizer`: the directory of one, where the model has none beside it. `on_checked`:
    told of what `options.check` compared; where that finds a difference, CompileError, and what was at `output` before
    is unchanged.
    """
    from llmc.compiler.manifest import creation_time
    from llmc.targets import check_tools, lower, machine_named

    progress, created = progress or Silent(), creation_time()
    machine = machine_named(options.target)
    check_tools(machine)  # a missing one is said now, not after the work
    progress.start("lifting the model")
    lifted = lift_model(source, options, tokenizer)
    finds, options = options.quantization == AUTO, first_choice(options, lifted)
    lifted = evened(lifted, options, progress)
    checker = checker_of(lifted, options)
    watching = [checker] if checker is not None else []
    compiled = run_lifted(lifted, options, watching, progress)
    check_room(lifted.task, compiled.graph, options)
    if checker is None:  # which compares all layers, and each pass
        compiled.first_layer = check_layer(lifted, options)
    if lifted.task != RUN:
        check_tables(compiled.graph, lifted.max_context, vocabulary_of(lifted), lifted.weights.load)
    lost = losses(compiled.graph, compiled.reports, lifted.task, options.quantization)
    step = step_limit(compiled.graph, options, lifted.max_context, lifted.task)
    idle = unused(options, lifted.task != RUN, compiled.reports, step)
    for note in (*lifted.notes, *integer_notes(compiled.reports), *lost, *idle):
        progress.note(note)

    with scratch_folder() as folder:
        if finds and lifted.task == ENCODE:
            options = near_choice(source, lifted, compiled, options, folder, progress, watching)
            rounded = None if compiled.load is None else (compiled.graph, compiled.load)
        else:
            rounded = round_by_inputs(source, lifted, compiled, options, folder, progress, watching)
        if rounded is not None and checker is not None:
            checker.calibrated(*rounded)
        make_room(lifted, compiled, options, watching)
        program = lower(compiled.graph, machine)
        tell = options.tells_accuracy(lifted.parameters)
        manifest = assemble(source, output, options, lifted, compiled, program, progress, created, checker, tell)
    if checker is not None and on_checked is not None:
        on_checked(checker)
    return manifest


def round_by_inputs(
    source: str,
    lifted: Lifted,
    compiled: Compiled,
    options: CompileOptions,
    folder: Path,
    progress: Progress,
    observers: Sequence[Observer],
    near: Near | None = None,
) -> tuple[Graph, LoadParam] | None:
    """Rounds weights by what their layers see, where the options ask for it: `compiled` has the new graph afterwards.
    None where they do not, or where the model's own text does not run, which is said. near: see `calibrate.Model`."""
    from llmc.compiler.calibrate import Model, calibrate_model
    from llmc.compiler.ir.llm import Quantize
    from llmc.targets.sources import closure_hash

    def anew(schemes: Mapping[str, str]) -> Graph:
        other = dataclasses.replace(options, overrides=(*options.overrides, *schemes.items()))
        again = run_lifted(lifted, other, observers, progress)
        compiled.reports = again.reports
        return again.graph

    def write(texts: Sequence[Ids]) -> list[Ids]:
        return written_texts(source, lifted, texts, options, folder, progress)

    measures = options.measures_inputs if options.bits_per_weight is None else True  # else nothing would be spent
    if measures is False or (measures is None and lifted.task == RUN):
        return None
    vocabulary, code = vocabulary_of(lifted), closure_hash("llmc.compiler.calibrate")
    if near is not None:
        code += closure_hash("llmc.compiler.encoder_choice") + f" {near.least}"
    model = Model(lifted, compiled.graph, vocabulary, anew, write, near)
    try:
        found = calibrate_model(model, options, code, folder, progress)
    except IRError as error:  # random ids are not what every graph takes
        if measures:
            raise CompileError(f"--calibrate: the model's own text does not run: {error}") from error
        progress.note(f"weights are rounded as with --fast: the model's own text does not run: {error}")
        return None
    compiled.graph, compiled.load = found[0], found[1].load
    compiled.originals = {became: weight for weight, became in found[1].packed.items() if isinstance(weight, Quantize)}
    compiled.calibrated = str(options.as_json()["calibrate"] or "self")
    return compiled.graph, compiled.load


def first_choice(options: CompileOptions, lifted: Lifted) -> CompileOptions:
    """The options with a scheme, where none was asked for: int4; int8 for an encoder that cannot be measured."""
    if options.quantization != AUTO:
        return options
    unknown = lifted.task == ENCODE and not options.has_weights
    return replace(options, quantization="int8" if unknown else "int4")


def near_choice(
    source: str,
    lifted: Lifted,
    compiled: Compiled,
    options: CompileOptions,
    folder: Path,
    progress: Progress,
    observers: Sequence[Observer],
) -> CompileOptions:
    """The options with the smallest scheme by which an encoder stays near enough to its original; `compiled` is that
    model afterwards. Bits that were asked for are taken as they are."""
    from llmc.compiler.calibrate import NotNear
    from llmc.compiler.encoder_choice import Near

    if not options.has_weights or options.bits_per_weight is not None:
        round_by_inputs(source, lifted, compiled, options, folder, progress, observers)
        return options
    assert compiled.original is not None
    near = Near(lifted, compiled.original, vocabulary_of(lifted), options.seed)

    def taken(scheme: str) -> CompileOptions:
        other = replace(options, quantization=scheme)
        again = run_lifted(lifted, other, observers, progress)
        compiled.graph, compiled.reports = again.graph, again.reports
        return other

    progress.start("looking for the fewest bits that do")
    try:
        if options.measures_inputs is not False:
            round_by_inputs(source, lifted, compiled, options, folder, progress, observers, near)
            if compiled.load is not None:
                return options
        found = taken("int6")
        if near(compiled.graph, lifted.weights.load):
            return found
    except NotNear:
        pass
    except IRError as error:  # random ids are not what every graph takes
        progress.note(f"weights have 8 bits, as fewer cannot be compared with the original: {error}")
    return taken("int8")


def written_texts(
    source: str, lifted: Lifted, texts: Sequence[Ids], options: CompileOptions, folder: Path, progress: Progress
) -> list[Ids]:
    """What the model writes behind the first id of each text: with weights of 8 bits, compiled for this machine.
    LlmcError where it does not run here, or has no cache, without which it would take too long. options: as the model
    is compiled afterwards. folder: for the artifact."""
    from llmc.compiler.manifest import creation_time
    from llmc.compiler.own_text import chances_of, draw
    from llmc.targets import lower, machine_named
    from llmc.targets.written_text import write_texts

    own = CompileOptions(
        quantization="int8", max_step=max(16, len(texts)), kernel_cache=options.kernel_cache, jobs=options.jobs
    )
    compiled, vocabulary = run_lifted(lifted, own, progress=progress), vocabulary_of(lifted)
    if not any(isinstance(value.type, KV) for value in compiled.graph.inputs):
        raise CompileError("it keeps no cache")
    program, path = lower(compiled.graph, machine_named("native")), folder / "writer.so"
    assemble(source, path, own, lifted, compiled, program, progress, creation_time())
    chances = np.array(chances_of(texts, options.seed))
    progress.start("writing text to round by", chances.shape[1] - 1, "tokens")
    found = write_texts(
        path,
        [int(text[0]) for text in texts],
        chances,
        estimate(compiled.graph, context=len(chances[0])).cache_per_token,
        lambda logits, chance: draw(logits[:, :vocabulary], chance),
        progress.advance,
    )
    path.unlink()
    return found


def checker_of(lifted: Lifted, options: CompileOptions) -> Checker | None:
    """The observer that `options.check` asks for."""
    if not options.check:
        return None
    from llmc.compiler.check import Checker

    return Checker(lifted.weights.load, options.seed, context=max(1, lifted.max_context))


def check_whole(path: Path, parts: Parts, options: CompileOptions, checker: Checker, weights: Path | None) -> None:
    """Compares an artifact at `path`, not yet in its place, with its graph; CompileError where they differ. What this
    machine cannot run is said in `checker.not_run`. weights: the file that has them, if there is one."""
    from llmc.targets.check_artifact import check_artifact, refusal
    from llmc.targets.emulated import check_emulated

    checker.lowered(parts.program.graph)
    checker.not_run = "its weights were left out" if options.weights == "none" else refusal(path)
    if not checker.not_run:
        check_artifact(path, weights, parts, checker)
    elif options.weights != "none":
        check_emulated(path, weights, parts, checker)


def check_layer(lifted: Lifted, options: CompileOptions) -> str:
    """Compares the model's first layer before and after the passes; what was compared, in words. CompileError names the
    pass that changed it."""
    from llmc.compiler.check_layer import check_first_layer

    plain = dataclasses.replace(
        options, quantization="none", activations=None, embedding=None, head=None, overrides=(), bits_per_weight=None
    )
    passes = parse_pipeline(pipeline_text(plain, lifted.task, vocabulary_of(lifted), lifted.max_context))
    with reading(lifted.weights.load):
        return str(check_first_layer(lifted.graph, passes, lifted.weights.load, lifted.max_context, options.seed))


def stored_values(program: Program) -> list[Stored]:
    """Every compile-time value that a kernel reads or that is an output, in first-use order."""
    from llmc.targets.kernel import Packed

    wanted: dict[Stored, None] = {}
    for lowered in program.ops:
        for call in lowered.calls:
            for argument in call.args:
                if isinstance(argument, Packed):
                    assert isinstance(argument.weight, Value)
                    wanted[Stored(argument.weight, argument.layout)] = None  # type: ignore[arg-type]
                elif isinstance(argument, Value) and argument in program.graph.constants:
                    wanted[Stored(argument, None)] = None
    for _, value in program.graph.outputs:
        if value in program.graph.constants:
            wanted[Stored(value, None)] = None
    return list(wanted)


def assemble(
    source: str,
    output: Path,
    options: CompileOptions,
    lifted: Lifted,
    compiled: Compiled,
    program: Program,
    progress: Progress,
    created: str,
    checker: Checker | None = None,
    tell_accuracy: bool = False,
) -> dict[str, object]:
    """Library, weights, tokenizer and manifest into one file, all or nothing; compared with its graph before it takes
    its place, where `checker` is given. tell_accuracy: measure it for the manifest."""
    from llmc.compiler.accuracy import RoundedHere
    from llmc.compiler.manifest import build_manifest, check_manifest, complete_manifest
    from llmc.compiler.revision import Written, longest_manifest, revised
    from llmc.targets import build_library
    from llmc.targets.check_artifact import Parts, refusal
    from llmc.targets.memory import plan_memory
    from llmc.targets.sources import closure_hash
    from llmc.targets.step_limits import StepLimits, failures_of
    from llmc.targets.target import Addresses
    from llmc.targets.written_text import running

    load = compiled.load or lifted.weights.load
    max_step = step_limit(program.graph, options, lifted.max_context, lifted.task)
    largest = greatest(program.graph, max_step, lifted.max_context, lifted.task)
    plan: Plan = plan_memory(program, largest)
    placed, nbytes = place(stored_values(program))
    limits = StepLimits(largest, vocabulary_of(lifted), max(1, lifted.max_context))
    failures = failures_of(program)
    manifest = build_manifest(
        source, options, lifted, compiled, program, plan, placed, nbytes, max_step, failures, created
    )
    addresses = Addresses(plan, weight_addresses(placed), cache_indices(program.graph), lifted.task, limits, manifest)
    cache = options.kernel_cache or default_cache()
    with scratch_folder() as folder:
        library = build_library(program, addresses, cache, folder, progress, options.jobs or os.cpu_count() or 1)
        apart = nullcontext() if options.weights_file is None else WeightsFile(options.weights_file)
        with apart as file, ArtifactWriter(output, library.path) as writer:
            if checker is not None:
                parts = Parts(program, plan, addresses.weights, load, lifted.task)
                weights = None if file is None else file.temporary
                writer.inspect = lambda path: check_whole(path, parts, options, checker, weights)
            kept = RoundedHere(folder) if tell_accuracy else None
            digest = write_weights(placed, nbytes, load, options, file or writer, progress, kept)
            tokenizer = lifted.text.files.get("tokenizer.json")
            if tokenizer is not None:
                writer.add_tokenizer(tokenizer)
            progress.start("writing")
            complete_manifest(manifest, library, digest)
            check_manifest(manifest)
            like = None if kept is None else longest_manifest(manifest, lifted, compiled)
            writer.add_manifest(manifest, like)
            if kept is not None:
                code = closure_hash("llmc.compiler.accuracy") + closure_hash("llmc.targets.written_text")
                apart_at = None if file is None else file.temporary
                written = Written(library.path, digest, apart_at, kept, refusal, running, code)
                writer.revise = lambda path: revised(path, manifest, written, lifted, compiled, options, progress)
            if checker is not None:
                progress.start("running the artifact beside its graph")
    return manifest


def write_weights(
    placed: list[Placed],
    nbytes: int,
    load: LoadParam,
    options: CompileOptions,
    target: ArtifactWriter | WeightsFile,
    progress: Progress,
    kept: RoundedHere | None = None,
) -> str:
    """Weights into the artifact, into a file of their own, or nowhere, one at a time. Returns the file's hash.

    kept: told of what they were rounded to."""
    if options.weights == "none":
        return ""
    progress.start("packing weights", nbytes, "bytes")
    if isinstance(target, ArtifactWriter):
        target.begin_weights()
    for offset, name, array in packed_arrays(placed, load, None if kept is None else kept.keep):
        if target.append(array) != offset:
            raise CompileError(f"{name} does not lie where it was planned: {offset}")
        progress.advance(array.nbytes)
    if isinstance(target, WeightsFile):
        return target.seal()
    target.end_weights()
    return ""


def weight_addresses(placed: list[Placed]) -> dict[object, int]:
    """Offsets by what a call's argument names: a value, or (value, layout, part)."""
    addresses: dict[object, int] = {}
    for item in placed:
        for part, offset in item.offsets.items():
            stored = item.stored
            key = stored.value if stored.layout is None else (stored.value, stored.layout, part)
            addresses[key] = offset
    return addresses


def cache_indices(graph: Graph) -> dict[Value, int]:
    """The number of each cache input, in input order."""
    caches = [value for value in graph.inputs if isinstance(value.type, KV)]
    return {value: index for index, value in enumerate(caches)}


def default_cache() -> Path:
    """Where compiled kernels are kept: $LLMC_CACHE_DIR, or the user's cache folder."""
    root = os.environ.get("LLMC_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llmc"
    )
    return Path(root) / "kernels"
