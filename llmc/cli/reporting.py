"""inspect, explain, doctor: what is in an artifact, why it is so, and what this machine has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.cli.step_sizes import sizes_text
from llmc.errors import ArtifactError

if TYPE_CHECKING:
    from llmc.runtime.artifact import Artifact
    from llmc.runtime.manifest import Manifest


def inspect(
    artifact: o.Artifact,
    weights: Annotated[bool, typer.Option("--weights", help="List every weight.")] = False,
    accuracy: Annotated[
        bool,
        typer.Option("--accuracy", help="Show how far it is from the original, in all and matrix by matrix, instead."),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw that by layer and kind: a .png, .svg or .pdf."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Show what is in a compiled model, and check every hash. None of its code runs.

    With --accuracy: what was measured when it was compiled (and no hashes of weights). Errors are squared, and parts of
    the squares of what they are errors of.
    """
    from llmc.cli.accuracy import show_accuracy
    from llmc.runtime.artifact import Artifact

    if accuracy or picture is not None:
        opened = Artifact.open(artifact)
        opened.close()
        show_accuracy(artifact, opened.manifest, picture, json)
        return

    opened = Artifact.open(artifact)
    try:
        checked = _check(opened)
        manifest = opened.manifest
        sizes = {part.name: part.bytes for part in opened.parts.values()}
        if json:
            output.print_json(
                {"path": str(artifact), "file_bytes": len(opened.mapping), "sections": sizes, "checked": checked,
                 "manifest": dict(manifest.raw)}
            )  # fmt: skip
            return
        provenance = _object(manifest.raw.get("provenance"))
        created = provenance.get("created")  # only if the compile was given a time
        output.facts(
            {
                "model": f"{manifest.model.name} ({manifest.model.parameters:,} parameters, "
                f"{manifest.model.bits_per_weight:.2f} bits each), from {manifest.model.source}",
                "made": f"by llmc {manifest.llmc_version}" + (f", {created}" if created else ""),
                "options": ", ".join(f"{k}={v}" for k, v in _object(provenance.get("options")).items()),
                "target": f"{manifest.target.name} ({manifest.target.arch})",
                "needs": " ".join(sorted(manifest.target.features)),
                **_use(manifest),
                "arena": output.size(manifest.step.arena_bytes),
                "file": f"{output.size(len(opened.mapping))}: "
                + ", ".join(f"{name} {output.size(count)}" for name, count in sizes.items()),
                "hashes": f"{len(checked)} of {len(sizes)} parts checked, all right",
            }
        )
        if weights:
            print()
            raw = _object(manifest.raw.get("weights")).get("tensors")
            kinds = [str(_object(entry).get("type", "")) for entry in raw] if isinstance(raw, list) else []
            rows = [
                (tensor.name, kind, tensor.offset, tensor.nbytes)
                for tensor, kind in zip(manifest.tensors, kinds, strict=True)
            ]
            output.table(rows, ("weight", "type", "offset", "bytes"))
    finally:
        opened.close()


def _adapters(manifest: Manifest) -> dict[str, object]:
    """What adapters there is room for."""
    facts = manifest.adapters
    if facts is None:
        return {}
    room = f"room for {facts.count} at a time, of rank {facts.rank} at most"
    return {"adapters": f"{room}, beside {len(facts.modules)} modules"}


def _use(manifest: Manifest) -> dict[str, object]:
    """What an artifact takes and gives."""
    from llmc.cli.kinds import kind_of
    from llmc.runtime.arrays import describe

    kind, step = kind_of(manifest), manifest.step
    if kind == "generate":
        layers, per_token = manifest.layers, manifest.bytes_per_page // step.page
        return {
            "context": f"{manifest.max_context} tokens, {step.max_step} a step at most",
            "KV cache": f"{len(layers)} layers, {output.size(per_token)} a token"
            + (f", {layers[0].dtype}" if layers else ""),
            "vocabulary": step.vocab_size,
            "chat": "yes" if manifest.text and manifest.text.chat_template else "no chat template",
            **_adapters(manifest),
        }
    rows: dict[str, object] = {"outputs": "; ".join(map(describe, manifest.outputs))}
    if kind == "run":
        sizes = ", ".join(f"{size.name} {size.low} to {size.high}" for size in manifest.symbols)
        return {"inputs": "; ".join(map(describe, manifest.inputs)) or "none", **rows, "sizes": sizes or "all fixed"}
    facts = manifest.encoder
    rows["texts"] = f"{facts.max_tokens if facts else manifest.max_context} tokens at most, {step.max_step} a step"
    rows["vocabulary"] = step.vocab_size
    if facts is not None and facts.labels is not None:
        rows["labels"] = ", ".join(facts.labels)
    if facts is not None and facts.prompts:
        rows["prompts"] = ", ".join(facts.prompts)
    return {"kind": kind, **rows}


def _check(artifact: Artifact) -> list[str]:
    """The parts whose hash was computed here, without loading the library; ArtifactError at the first wrong one."""
    import hashlib
    import mmap

    from llmc.compiler.artifact import WeightHash
    from llmc.runtime.artifact import WEIGHTS, damaged

    checked = []
    artifact.mapping.madvise(mmap.MADV_WILLNEED)  # from a slow disk: twice as fast as reading on demand
    for part in artifact.parts.values():
        extent = memoryview(artifact.mapping)[part.offset : part.offset + part.extent]
        if part.name == WEIGHTS:
            stream = WeightHash()
            stream.update(extent)
            digest = stream.hexdigest()
        else:
            digest = hashlib.sha256(extent).hexdigest()
        if digest != part.hash:
            raise damaged(artifact.path, part.name)
        checked.append(part.name)
    return checked


def explain(
    artifact: o.Artifact,
    all_entries: Annotated[bool, typer.Option("--all", help="Also passes that changed and refused nothing.")] = False,
    space: Annotated[
        bool, typer.Option("--space", help="The numbers that could be chosen in each kernel, and their values.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Say which passes did what and refused what, and which kernels were chosen over which others, and why."""
    from llmc.runtime.artifact import Artifact

    opened = Artifact.open(artifact)
    opened.close()
    raw = _object(opened.manifest.raw.get("explain"))
    if not raw:
        raise ArtifactError(f"{artifact} says nothing about how it was made: compile it again")
    if json:
        output.print_json(raw)
        return
    if space:
        _print_spaces(_objects(raw.get("kernels")))
        return
    print("Passes (ops before -> after)")
    for entry in _objects(raw.get("passes")):
        hits, refusals = _object(entry.get("hits")), _pairs(entry.get("refusals"))
        if hits or refusals or all_entries:
            done = ", ".join(f"{kind} {count}" for kind, count in hits.items()) or "nothing"
            print(f"  {entry.get('name')} ({entry.get('ops_before')} -> {entry.get('ops_after')}): {done}")
        for what, why in _counted(refusals):
            print(f"    not: {what}: {why}")
    if raw.get("first_layer"):
        print(f"  first layer as recognised and as lifted: {raw['first_layer']}")
    calibrated = str(raw.get("calibrated", "none"))
    if calibrated != "none":
        more = "" if calibrated == "self" else f" and of a file ({calibrated})"
        print(f"  weights rounded by what their layers see of the model's own text{more}")
    _print_kernels(_objects(raw.get("kernels")))


def _print_kernels(entries: list[Mapping[str, object]]) -> None:
    """Which rule lowered which ops, and which rows each kernel serves. What is the same of several ops is said once."""
    origins = {str(kernel.get("origin")) for entry in entries for kernel in _objects(entry.get("kernels"))}
    shared = f", parameters by {next(iter(origins))}" if len(origins) == 1 else ""
    print(f"\nKernels: the rows of a step that each serves{shared}")
    counts: dict[tuple[str, ...], int] = {}
    for entry in entries:
        lines = tuple(_choice_lines(entry, tell_origin=len(origins) > 1))
        counts[lines] = counts.get(lines, 0) + int(str(entry.get("count")))
    for (first, *others), count in counts.items():
        print(f"  {count} x {first}")
        for text in others:
            print(f"    {text}")


def _choice_lines(entry: Mapping[str, object], tell_origin: bool) -> list[str]:
    """The op and its rule, then a line for each kernel and each rule that refused."""
    reason = entry.get("reason")
    lines = [f"{entry.get('op')}: {entry.get('chosen')}" + (f" ({reason})" if reason else "")]
    kernels = _objects(entry.get("kernels"))
    served = [sizes_text(_guards(kernel.get("when"))) or "any" for kernel in kernels]
    width = max(map(len, served), default=0)
    for rows, kernel in zip(served, kernels, strict=True):
        given = kernel.get("parameters")
        parameters = ", ".join(map(str, given)) if isinstance(given, list) else ""
        origin = f" by {kernel.get('origin')}" if tell_origin else ""
        lines.append(f"{rows:<{width}}  {kernel.get('kernel')}({parameters}){origin}")
    return lines + [f"not {what}: {why}" for what, why in _pairs(entry.get("rejected"))]


def _print_spaces(entries: list[Mapping[str, object]]) -> None:
    """The kernels of the model, once each: how many ways there are to make one, and the values that each knob may have,
    the chosen one in brackets."""
    kernels = [kernel for entry in entries for kernel in _objects(entry.get("kernels"))]
    for lines in dict.fromkeys(tuple(_space_lines(kernel)) for kernel in kernels):
        print("\n".join(lines))


def _space_lines(kernel: Mapping[str, object]) -> list[str]:
    space, given = _object(kernel.get("space")), kernel.get("parameters")
    knobs = _object(space.get("knobs"))
    parameters = (
        [str(item) for item in given if str(item).partition("=")[0] not in knobs] if isinstance(given, list) else []
    )
    name = f"{kernel.get('kernel')}({', '.join(parameters)})"
    if not space:
        return [f"{name}: no knobs are declared"]
    bits = "the same bits" if space.get("exact") else "bits depend on those with *"
    legal = int(str(space.get("legal")))
    lines = [f"{name}: {legal} way{'s' * (legal != 1)}, {bits}, by {kernel.get('origin')}"]
    width = max(map(len, knobs), default=0) + 1
    for knob, facts in knobs.items():
        values, star = _object(facts), "" if _object(facts).get("exact") else "*"
        legal_values = values.get("values")
        listed = [
            f"[{value}]" if value == values.get("value") else str(value)
            for value in (legal_values if isinstance(legal_values, list) else [])
        ]
        lines.append(f"  {knob + star:<{width}}  {' '.join(listed)}")
    return lines


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _objects(value: object) -> list[Mapping[str, object]]:
    return [_object(entry) for entry in value] if isinstance(value, list) else []


def _pairs(value: object) -> list[tuple[str, str]]:
    if not isinstance(value, list):
        return []
    return [(str(pair[0]), str(pair[1])) for pair in value if isinstance(pair, list) and len(pair) == 2]


def _guards(value: object) -> list[tuple[str, int, int | None]]:
    """(symbol, low, high) guards; what is none is left out."""
    found = [item for item in value if isinstance(item, list) and len(item) == 3] if isinstance(value, list) else []
    return [(str(name), int(low), None if high is None else int(high)) for name, low, high in found]


def _counted(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Equal refusals once, with their number."""
    counts: dict[tuple[str, str], int] = {}
    for pair in pairs:
        counts[pair] = counts.get(pair, 0) + 1
    return [(f"{count} x {what}" if count > 1 else what, why) for (what, why), count in counts.items()]


def doctor(json: o.Json = False) -> None:
    """Check this machine: what llmc needs, what there is, and how to mend what is missing."""
    from llmc.cli.doctor import check_machine, targets

    findings = check_machine()
    problems = [finding for finding in findings if not finding.ok]
    if json:
        output.print_json(
            {"ok": not problems, "findings": [finding.as_json() for finding in findings], "targets": targets()}
        )
    else:
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'NO '} {finding.name:<14} {finding.value}")
            if finding.fix:
                print(f"{'':18} -> {finding.fix}")
        print(f"\ntargets: {', '.join(targets())}")
    if problems:
        output.line(f"{len(problems)} to mend: {', '.join(finding.name for finding in problems)}")
        raise typer.Exit(1)


COMMANDS = (
    (inspect, ("llmc inspect pycoder.so --weights", "llmc inspect pycoder.so --accuracy --picture errors.png")),
    (explain, ("llmc explain pycoder.so",)),
    (doctor, ("llmc doctor",)),
)
