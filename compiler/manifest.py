"""What an artifact says about itself; runtime/manifest.py says which fields the runtime checks and uses.

The same model, options and versions give the same bytes: nothing here depends on when, where or how fast a model was
compiled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.adapting import adapter_facts
from llmc.compiler.estimate import estimate
from llmc.compiler.ir.attention import MOST_PARTS, PART, TILE
from llmc.compiler.ir.dims import Dim, symbols_of
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.interface import output_values, size_names
from llmc.compiler.ir.llm import PagedAttention
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.text import text_hash
from llmc.compiler.ir.types import KV, NUMPY_DTYPES
from llmc.compiler.options import CompileOptions
from llmc.compiler.passes.lengths import length_regimes
from llmc.errors import ArtifactError, CompileError
from llmc.runtime.manifest import parse

if TYPE_CHECKING:
    from llmc.compiler.pipeline import Compiled
    from llmc.compiler.weights import Placed
    from llmc.frontends.lifted import Lifted
    from llmc.targets.kernel import Call
    from llmc.targets.lowering import Choice, Program
    from llmc.targets.memory import Plan
    from llmc.targets.target import Library

SCHEMA = 1
ABI = 8
_CACHE_DTYPES = {"f16": "float16", "f32": "float32"}


def build_manifest(
    source: str,
    options: CompileOptions,
    lifted: Lifted,
    compiled: Compiled,
    program: Program,
    plan: Plan,
    placed: list[Placed],
    nbytes: int,
    max_step: int,
    failures: list[str],
    created: str,
) -> dict[str, object]:
    """The manifest of a model before it is linked: plain JSON values only. `complete_manifest` adds the rest."""
    from llmc.compiler.step_sizes import GENERATE, RUN, greatest

    layers = _layers(program)
    largest = greatest(program.graph, max_step, lifted.max_context, lifted.task) if lifted.task == RUN else {}
    return {
        "schema": SCHEMA,
        "abi": ABI,
        "llmc_version": _version("llmc"),
        "task": lifted.task,
        "model": {
            "name": lifted.name,
            "source": _source(source),
            "parameters": lifted.parameters,
            "bits_per_weight": round(8 * weight_bytes(placed) / max(1, lifted.parameters), 4),
        },
        "target": {
            "name": program.machine.name,
            "arch": program.machine.architecture,
            "features": sorted(program.machine.features),
            "device": program.machine.device,
            "machine": program.machine.mcpu,
        },
        "step": {
            "max_step": max_step,
            "page": PAGE,
            "tile": TILE,
            "max_splits": MOST_PARTS,
            "part": PART,
            "arena_bytes": max(plan.nbytes, 64),
            "vocab_size": _vocabulary(program, lifted),
            "state": state_of(program.graph, lifted.task),
            "failures": failures,
            "row_kinds": _has_row_kinds(program),
            "regimes": list(length_regimes(program.graph, lifted.max_context)),
        },
        "inputs": [_array(value.name, value) for value in program.graph.inputs] if lifted.task == RUN else [],
        "outputs": [] if lifted.task == GENERATE else [_array(*pair) for pair in output_values(program.graph)],
        "symbols": [
            {"name": name, "low": min(s.low for s in program.graph.symbols if s.name == name), "high": largest[name]}
            for name in (size_names(program.graph) if lifted.task == RUN else [])
        ],
        "max_context": max(1, lifted.max_context),
        "kv": {"layers": layers},
        "weights": {
            "bytes": nbytes,
            "source": options.weights if options.weights_file is None else "file",
            "tensors": [
                {"name": item.stored.name, "offset": min(item.offsets.values()), "nbytes": item.nbytes}
                | {"type": str(item.stored.value.type)}
                for item in placed
            ],
        },
        **({"adapters": adapter_facts(compiled.adapters, options)} if compiled.adapters else {}),
        "encoder": lifted.encoder,
        "tokenizer": lifted.text.facts,
        "generation": lifted.text.generation,
        "explain": explain(compiled, program),
        "memory": {
            "arena_bytes": plan.nbytes,
            "arena_bytes_without_reuse": plan.without_reuse,
            "weights_bytes": nbytes,
            # Decoding one token reads all weights but tables in which it only looks up a row.
            "weight_bytes_per_token": min(nbytes, estimate(program.graph, context=PAGE).read_per_token),
        },
        "provenance": {
            "options": options.as_json()
            | {"calibrate": compiled.calibrated}
            | ({} if options.weights_file is None else {"weights": "file"}),
            "graph": text_hash(compiled.graph),
            **({"created": created} if created else {}),
            "tvm": _version("apache-tvm"),
        },
    }


def complete_manifest(manifest: dict[str, Any], library: Library, weights_hash: str) -> None:
    """Adds what is known once the library is linked and the weights are written; weights_hash: empty for none."""
    manifest["step"] |= {"calls": library.calls, "costs": library.costs, "limits": library.limits}
    if library.glibc:
        manifest["target"]["glibc"] = library.glibc
    if weights_hash:
        manifest["weights"]["hash"] = weights_hash


def creation_time() -> str:
    """What $SOURCE_DATE_EPOCH says, as an artifact has it; empty where it is not set. CompileError where it is no time.

    https://reproducible-builds.org/specs/source-date-epoch
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not given:
        return ""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(given)))
    except (ValueError, OverflowError, OSError) as error:
        raise CompileError(
            f"SOURCE_DATE_EPOCH is {given!r:.40}: it should be the seconds since 1970, or not be set"
        ) from error


def _source(given: str) -> str:
    """The model as a command names it: a name on the hub, or that of a file or folder, wherever it lies."""
    return Path(os.path.abspath(given)).name if os.path.exists(given) else given


def check_manifest(manifest: Mapping[str, object]) -> None:
    """CompileError where the runtime could not read it: a file that can never be loaded is not made."""
    try:
        parse(json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode())
    except (ArtifactError, ValueError) as error:
        why = str(error).removesuffix(". Compile the model again").removeprefix("the manifest cannot be used: ")
        raise CompileError(f"this model cannot become an artifact, as that could not be loaded: {why}") from error


def state_of(graph: Graph, task: str) -> str:
    """What the steps of a graph see: "run" its own inputs, "ragged" whole sequences of tokens, side by side, "paged"
    parts of sequences that go on from a cache, "none" one whole sequence."""
    from llmc.compiler.step_sizes import ENCODE, RUN

    if task == RUN:
        return "run"
    if task == ENCODE:
        return "ragged" if any(value.name == "starts" for value in graph.inputs) else "none"
    return "paged" if any(isinstance(value.type, KV) for value in graph.inputs) else "none"


def _has_row_kinds(program: Program) -> bool:
    """Whether a kernel, or which one runs, depends on the step's `LLMC_PROMPT`."""
    calls = [call for lowered in program.ops for call in lowered.calls]
    sizes = [size for call in calls for size in call.args if isinstance(size, Dim)]
    guards = {item.symbol for call in calls for item in call.when}
    return "PROMPT" in guards | {item.name for size in sizes for item in symbols_of(size)}


def _vocabulary(program: Program, lifted: Lifted) -> int | Dim:
    """Tokens that there are: as many as logits where the model generates; 1 where it knows no tokens."""
    from llmc.compiler.step_sizes import GENERATE

    outputs = dict(program.graph.outputs)
    return outputs["logits"].shape[-1] if lifted.task == GENERATE else max(1, lifted.vocab_size)


def _array(name: str, value: Value) -> dict[str, object]:
    """An input or output: numpy's name of the dtype, and sizes as ints or as the text of a polynomial."""
    shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    return {"name": name, "dtype": NUMPY_DTYPES[value.dtype].name, "shape": shape}


def weight_bytes(placed: list[Placed]) -> int:
    """Stored bytes of everything that comes from the checkpoint (tables that the compiler made up count too)."""
    return sum(item.nbytes for item in placed)


def _layers(program: Program) -> list[dict[str, object]]:
    windows: dict[Value, int] = {}
    for op in program.graph.ops:
        if isinstance(op, PagedAttention):
            cache: Value = op.cache
            while cache not in program.graph.inputs:
                cache = cache.operands[0]  # type: ignore[attr-defined]
            windows[cache] = op.window
    return [
        {
            "kv_heads": value.type.heads,
            "head_dim": value.type.key_dim,
            "value_dim": value.type.value_dim,
            "dtype": _CACHE_DTYPES[value.type.dtype],
            "window": windows.get(value) or None,
        }
        for value in program.graph.inputs
        if isinstance(value.type, KV)
    ]


def explain(compiled: Compiled, program: Program) -> dict[str, object]:
    """What passes did and refused, and which rule lowered what, for `llmc explain`."""
    passes: list[Mapping[str, object]] = [
        {
            "name": report.name,
            "hits": dict(report.hits),
            "refusals": [list(pair) for pair in report.refusals],
            "ops_before": report.ops_before,
            "ops_after": report.ops_after,
        }
        for report in compiled.reports
    ]
    groups: dict[tuple[object, ...], dict[str, object]] = {}
    chosen = [(lowered.choice, _kernels(lowered.calls, program)) for lowered in program.ops]
    for choice, kernels in [*chosen, *((choice, []) for choice in program.decomposed)]:
        key = (choice.op, choice.rule, choice.rejected, json.dumps(kernels))
        entry = groups.setdefault(key, _entry(choice, kernels))
        entry["count"] = int(str(entry["count"])) + 1
    return {
        "passes": passes,
        "first_layer": compiled.first_layer,
        "calibrated": compiled.calibrated,
        "kernels": list(groups.values()),
    }


def _entry(choice: Choice, kernels: list[dict[str, object]]) -> dict[str, object]:
    return {
        "op": choice.op,
        "type": choice.type,
        "count": 0,
        "chosen": choice.rule or "decomposed",
        "reason": choice.reason,
        "rejected": [list(pair) for pair in choice.rejected],
        "kernels": kernels,
    }


def _kernels(calls: tuple[Call, ...], program: Program) -> list[dict[str, object]]:
    """The kernels of an op, those for few rows first. when: (symbol, low, high) of the step's sizes, as in costs."""
    found: list[dict[str, object]] = [
        {
            "kernel": call.kernel.name,
            "parameters": call.kernel.parameters(),
            "when": [[item.symbol, item.low, item.high] for item in call.when],
            "origin": call.origin,
            "space": program.space_of(call.kernel),
        }
        for call in sorted(calls, key=lambda call: [(item.symbol, item.low) for item in call.when])
    ]
    return [kernel for index, kernel in enumerate(found) if kernel not in found[:index]]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
