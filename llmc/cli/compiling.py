"""compile, ir, estimate: compile a model into a file, or show its graph or memory need without that."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.cli.accuracy import summary_of
from llmc.cli.graph_diff import graph_diff
from llmc.errors import CompileError
from llmc.files import names_stdout, refusal, target_of

if TYPE_CHECKING:
    from llmc.compiler.check import Checker
    from llmc.compiler.ir.graph import Graph
    from llmc.compiler.options import CompileOptions
    from llmc.compiler.passes.manager import Pass, Report


def compile(
    model: o.Model,
    path: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write; default: MODEL-Q.so here, MODEL.so without -q."),
    ] = None,
    target: o.Target = "native",
    quantization: o.Quantization = "auto",
    group_size: o.GroupSize = 64,
    symmetric: o.Symmetric = True,
    activations: o.Activations = None,
    embedding: o.Embedding = None,
    head: o.Head = None,
    override: o.Overrides = None,
    calibrate: o.Calibrate = None,
    bits_per_weight: o.BitsPerWeight = None,
    fast: o.Fast = False,
    lora: o.Lora = None,
    adapters: o.Adapters = 0,
    adapter_rank: o.AdapterRank = 64,
    accuracy: o.Accuracy = None,
    max_context: o.MaxContext = None,
    max_step: o.MaxStep = None,
    max_dim: o.MaxDims = None,
    dim: o.Dims = None,
    tokenizer: o.Tokenizer = None,
    weights: Annotated[
        str,
        typer.Option("--weights", metavar="embed|random|none|FILE", help="Into the artifact, noise, nowhere, a file."),
    ] = "embed",
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare every pass, each rounding and the artifact itself with the model."),
    ] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Kernels built at once.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the text to round by, random weights, --check.")] = 0,
    json: o.Json = False,
) -> None:
    """Compile a model into one shared library."""
    from llmc.compiler.pipeline import compile_model

    if fast and calibrate not in (None, "none"):
        raise CompileError(f"--fast is --calibrate none, and not --calibrate {calibrate}")
    options = o.compile_options(
        override, max_dim, dim, target=target, quantization=quantization, group_size=group_size, symmetric=symmetric,
        activations=activations, embedding=embedding, head=head, max_context=max_context, max_step=max_step,
        weights=weights, jobs=jobs, seed=seed, check=check, calibrate="none" if fast else calibrate,
        bits_per_weight=bits_per_weight, lora=tuple(lora or ()), accuracy=accuracy, adapters=adapters,
        adapter_rank=adapter_rank,
    )  # fmt: skip
    scheme = "" if quantization == "auto" else f"-{quantization}"
    name = Path(model.rstrip("/")).name.removesuffix(".onnx").removesuffix(".gguf")
    path = path or Path(f"{name}{scheme}.so")
    check_outputs(model, path, options.weights_file, json)
    checkers: list[Checker] = []
    started = time.perf_counter()
    with output.progress() as progress:
        manifest = compile_model(model, path, options, progress, tokenizer, checkers.append)
    seconds = round(time.perf_counter() - started, 2)
    file_bytes = None if target_of(path).is_stream else path.stat().st_size
    if json:
        result: dict[str, object] = {
            "path": str(path),
            "file_bytes": file_bytes,
            "model": manifest["model"],
            "target": manifest["target"],
            "compile_seconds": seconds,
            "not_quantized": [list(pair) for pair in quantization_refusals(manifest)],
            "accuracy": manifest.get("accuracy"),
        }
        for checker in checkers:
            result["check"] = [asdict(difference) for difference in checker.differences]
            result["checked"] = checker.summary()
        output.print_json(result)
        return
    with redirect_stdout(sys.stderr if names_stdout(path) else sys.stdout):
        _print_result(path, manifest, file_bytes, seconds, checkers)


def _print_result(
    path: Path, manifest: dict[str, object], file_bytes: int | None, seconds: float, checkers: Sequence[Checker]
) -> None:
    """What a compile found and made. file_bytes: None where it went into no file that could be read again."""
    for checker in checkers:
        print("\n".join(checker.summary()))
    parameters, bits = _at(manifest, "model", "parameters"), _at(manifest, "model", "bits_per_weight")
    weight = f"{bits} bits per weight, " if parameters else ""
    size = "" if file_bytes is None else f"{output.size(file_bytes)}, "
    print(f"{path}: {size}{weight}compiled in {seconds} s")
    told = summary_of(manifest)
    if told:
        print(told)
    if file_bytes is not None:
        _print_use(path)


def _print_use(path: Path) -> None:
    """What a compiled model is for, if not for continuing texts, and which command to try next."""
    from llmc.cli.kinds import kind_of, next_command
    from llmc.runtime.arrays import describe
    from llmc.runtime.artifact import Artifact

    opened = Artifact.open(path)
    opened.close()
    manifest = opened.manifest
    kind = kind_of(manifest)
    if kind == "generate":
        return
    if kind == "run":
        print(f"inputs: {'; '.join(map(describe, manifest.inputs)) or 'none'}")
        sizes = ", ".join(f"{size.name} {size.low} to {size.high}" for size in manifest.symbols)
        if sizes:
            print(f"sizes: {sizes} (--max-dim NAME=N for more, --dim NAME=N for one size only)")
    elif manifest.encoder is not None:
        facts = manifest.encoder
        what = {"embed": "embeddings", "classify": "classes", "encode": "rows of numbers for every token"}[kind]
        labels = f" ({', '.join(facts.labels[:8])}{', ...' if len(facts.labels) > 8 else ''})" if facts.labels else ""
        print(f"makes {what}{labels} of texts of at most {facts.max_tokens} tokens")
        if facts.prompts:
            default = f", {facts.default_prompt!r} by default" if facts.default_prompt else ""
            print(f"prompts: {', '.join(facts.prompts)}{default}")
    print(f"outputs: {'; '.join(map(describe, manifest.outputs))}")
    print(f"try: {next_command(manifest, path)}")


def check_outputs(model: str, path: Path, weights_file: Path | None, json: bool) -> None:
    """Refuses places where nothing can be written, or where something else is, before the work and not after it."""
    for place, option in ((path, "-o"), (weights_file, "--weights")):
        if place is None:
            continue
        why = refusal(place)
        if why is not None:
            raise CompileError(f"cannot write {place} ({option}): {why}")
        if Path(model).is_file() and place.exists() and place.samefile(model):
            raise CompileError(f"cannot write {place} ({option}): it is the model itself")
        if json and names_stdout(place):
            raise CompileError(f"{option} {place} and --json both write to stdout: give a file, or leave one away")
    if weights_file is not None and target_of(weights_file) == target_of(path):
        raise CompileError(f"{path} cannot be both the artifact (-o) and the weights' file (--weights)")


def quantization_refusals(manifest: dict[str, object]) -> list[tuple[str, str]]:
    """(layer, why) of what could not take its scheme."""
    passes = _at(manifest, "explain", "passes")
    found = []
    for entry in passes if isinstance(passes, list) else []:
        if str(entry.get("name", "")).startswith("quantize"):
            found += [(str(what), str(why)) for what, why in entry.get("refusals", [])]
    return found


def _at(values: dict[str, object], section: str, key: str) -> object:
    part = values.get(section)
    return part.get(key) if isinstance(part, dict) else None


def ir(
    model: o.Model,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="PASS",
            help="After a pass; PASS#2: its second run; lift: the first graph, kernels: the last.",
        ),
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="What the pass changed, as a unified diff.")] = False,
    passes: Annotated[bool, typer.Option("--passes", help="List the passes and what they did instead.")] = False,
    target: o.Target = "native",
    quantization: o.Quantization = "int4",
    group_size: o.GroupSize = 64,
    symmetric: o.Symmetric = True,
    activations: o.Activations = None,
    embedding: o.Embedding = None,
    head: o.Head = None,
    override: o.Overrides = None,
    max_context: o.MaxContext = None,
    max_step: o.MaxStep = None,
    max_dim: o.MaxDims = None,
    dim: o.Dims = None,
    json: o.Json = False,
) -> None:
    """Print a model's graph as text, whole or as a pass left it."""
    options = o.compile_options(
        override, max_dim, dim, target=target, quantization=quantization, group_size=group_size, symmetric=symmetric,
        activations=activations, embedding=embedding, head=head, max_context=max_context, max_step=max_step,
    )  # fmt: skip
    steps = run_steps(model, options)
    if passes:
        rows = [(name, report.ops_before, report.ops_after, _hits(report)) for name, _, _, report in steps[1:]]
        if json:
            keys = ("name", "ops_before", "ops_after", "hits")
            output.print_json({"passes": [dict(zip(keys, row, strict=True)) for row in rows]})
        else:
            output.table(rows, ("pass", "ops before", "ops after", "rewrites"))
        return
    name, before, graph, _ = _find(steps, after)
    from llmc.compiler.ir.text import print_graph

    text = print_graph(graph)
    if diff:
        text = graph_diff(print_graph(before), text, f"before {name}", f"after {name}")
    if json:
        output.print_json({"after": name, "diff" if diff else "text": text})
    else:
        sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")


Step = tuple[str, "Graph", "Graph", "Report"]  # name (with #n when it runs again), before, after, what it did


def run_steps(model: str, options: CompileOptions) -> list[Step]:
    """The lifted graph, and every pass's."""
    from llmc.compiler.passes.manager import Report
    from llmc.compiler.pipeline import lift_model, lower_to_kernels, run_lifted

    with output.progress() as progress:
        progress.start("lifting the model")
        lifted = lift_model(model, options)
        steps: list[Step] = [("lift", lifted.graph, lifted.graph, Report("lift"))]
        seen: dict[str, int] = {}

        def keep(item: Pass, before: Graph, after: Graph, report: Report) -> None:
            seen[item.name] = seen.get(item.name, 0) + 1
            number = seen[item.name]
            steps.append((item.name if number == 1 else f"{item.name}#{number}", before, after, report))

        final = run_lifted(lifted, options, [keep], progress).graph
        kernels = lower_to_kernels(final, options, lifted.max_context, lifted.task)
        report = Report("kernels", ops_before=len(final.ops), ops_after=len(kernels.ops))
        steps.append(("kernels", final, kernels, report))
    return steps


def _find(steps: list[Step], after: str | None) -> Step:
    if after is None:
        return steps[-2]  # the last pass; the kernel level is long, and shown when asked for
    wanted = after.removesuffix("#1")
    for step in steps:
        if step[0] == wanted:
            return step
    raise CompileError(f"no pass {after!r} in this compile; there are: {', '.join(step[0] for step in steps)}")


def _hits(report: Report) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(report.hits.items()))


def estimate(
    model: o.Model,
    quantization: o.Quantization = "int4",
    target: o.Target = "native",
    group_size: o.GroupSize = 64,
    symmetric: o.Symmetric = True,
    activations: o.Activations = None,
    embedding: o.Embedding = None,
    head: o.Head = None,
    override: o.Overrides = None,
    max_context: o.MaxContext = None,
    max_step: o.MaxStep = None,
    max_dim: o.MaxDims = None,
    dim: o.Dims = None,
    sequences: Annotated[int, typer.Option("--sequences", help="Texts at once.")] = 1,
    json: o.Json = False,
) -> None:
    """Say how much memory a compiled model will need, by part, without compiling it."""
    from llmc.compiler.estimate import estimate as estimate_graph
    from llmc.compiler.pipeline import lift_model, run_lifted

    if sequences < 1:
        raise CompileError(f"--sequences is at least 1, not {sequences}")
    options = o.compile_options(
        override, max_dim, dim, target=target, quantization=quantization, group_size=group_size, symmetric=symmetric,
        activations=activations, embedding=embedding, head=head, max_context=max_context, max_step=max_step,
    )  # fmt: skip
    with output.progress() as progress:
        progress.start("lifting the model")
        lifted = lift_model(model, options)
        graph = run_lifted(lifted, options, (), progress).graph
    step = options.tokens_a_step(lifted.task == "encode")
    found = estimate_graph(graph, context=max(1, lifted.max_context), step=step, sequences=sequences)
    derived = {
        "weight_bytes": found.weight_bytes,
        "bits_per_weight": round(found.bits_per_weight, 4),
        "weight_bytes_per_token": found.read_per_token,
        "file_bytes": found.file_bytes,
        "memory_bytes": found.memory,
    }
    if json:
        output.print_json(asdict(found) | {"weights": dict(found.weights)} | derived)
        return
    rows = [(f"weights: {part}", output.size(count)) for part, count in found.weights.items() if count]
    steps = "" if lifted.task == "run" else f", {found.step} tokens a step"
    rows.append(("weights", output.size(found.weight_bytes)))
    if found.cache:
        rows.append((f"KV cache, {sequences} x {found.context} tokens", output.size(found.cache)))
    rows += [
        (f"activations{steps}", output.size(found.arena)),
        ("memory while running", output.size(found.memory)),
        ("artifact's file, about", output.size(found.file_bytes)),
    ]
    output.table(rows)
    if found.parameters:
        print(f"{found.parameters:,} parameters, {found.bits_per_weight:.2f} bits per weight")


COMMANDS = (
    (compile, ("llmc compile examples/pycoder -q int4 -o pycoder.so",
               "llmc compile examples/pycoder --target x86-64-v3 --override '*.down_proj*=int8' --check")),
    (ir, ("llmc ir examples/pycoder --after fuse-norm --diff", "llmc ir examples/pycoder --passes")),
    (estimate, ("llmc estimate examples/pycoder -q int8 --max-context 1024",)),
)  # fmt: skip
