"""Artifacts for another architecture, run under an emulator through their C interface, and compared.

A small C program (`emulated.c`) is compiled for the architecture and told what to feed; it gives back logits, rows of
an encoder, or tokens. What comes out is exact, how long it takes says nothing.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.check import Checker, Difference, difference_of
from llmc.errors import CompileError
from llmc.runtime import cpu
from llmc.runtime.artifact import Artifact
from llmc.runtime.manifest import Manifest
from llmc.targets.check_artifact import Parts, allowed_differences
from llmc.targets.cpu.c_compiler import compiler_command
from llmc.targets.cpu.library import c_sources
from llmc.targets.emulator import emulator_command
from llmc.targets.target import all_targets

Ids = Sequence[int] | NDArray[np.int32]
_SECONDS = 3600  # that a program may take
DECODED = 3  # tokens at a sequence's end that go in one by one


@dataclass(frozen=True)
class Emulated:
    """An artifact and what runs it. model: the CPU that is emulated, by qemu's name. weights: their file, if apart."""

    path: Path
    manifest: Manifest
    model: str = "max"
    weights: Path | None = None
    threads: int = 2

    @classmethod
    def open(cls, path: Path, model: str = "max", weights: Path | None = None, threads: int = 2) -> Emulated:
        """An artifact whose code and tables were checked; its weights are not. LlmcError where it is none."""
        artifact = Artifact.open(path)
        try:
            artifact.check_library()
            return cls(path, artifact.manifest, model, weights, threads)
        finally:
            artifact.close()

    def logits(self, pieces: Sequence[Sequence[Ids]]) -> NDArray[np.float32]:
        """Each sequence fed piece by piece: logits after each piece, f32 [pieces, vocabulary]."""
        lines = []
        for sequence in pieces:
            lines += ["sequence", *(_line("feed", piece) for piece in sequence)]
        found = np.frombuffer(self._run(lines), np.float32)
        return found.reshape(sum(map(len, pieces)), self.manifest.step.vocab_size)

    def greedy(self, prompt: Ids, count: int) -> list[int]:
        """The likeliest tokens behind a prompt, one after the other."""
        data = self._run(["sequence", _line("feed", prompt), f"greedy {count}"])
        found: list[int] = np.frombuffer(data[4 * self.manifest.step.vocab_size :], np.int32).tolist()
        return found

    def encode(self, texts: Sequence[Ids]) -> list[NDArray[np.float32]]:
        """The encoder's rows of each text, one after the other, flat: f32."""
        data = np.frombuffer(self._run([_line("encode", text) for text in texts]), np.float32)
        facts = self.manifest.encoder
        assert facts is not None
        per_token = facts.kind == "tokens"
        ends = np.cumsum([len(text) if per_token else 1 for text in texts])
        rows = np.split(data.reshape(int(ends[-1]), -1), ends[:-1])
        return [np.ascontiguousarray(each) for each in rows]

    def _run(self, lines: Sequence[str]) -> bytes:
        """What the program writes; CompileError has its complaint."""
        architecture = self.manifest.target.arch
        with tempfile.TemporaryDirectory(prefix="llmc-emulated-") as folder:
            program = Path(folder) / "emulated"
            _compile_program(architecture, program)
            command = [*emulator_command(architecture, self.model), str(program), str(self.path.resolve())]
            command += [str(self.threads), *([] if self.weights is None else [str(self.weights.resolve())])]
            text = "\n".join(lines).encode()
            try:
                done = subprocess.run(command, input=text, capture_output=True, check=False, timeout=_SECONDS)
            except subprocess.TimeoutExpired:
                raise CompileError(f"{self.path} did not end within {_SECONDS} s on an emulated {self.model}") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else f"signal {-done.returncode}"
            raise CompileError(f"{self.path} does not run on an emulated {self.model}: {reason:.300}")
        return done.stdout


def _line(command: str, ids: Ids) -> str:
    return f"{command} {len(ids)} {' '.join(str(int(token)) for token in ids)}"


def _compile_program(architecture: str, program: Path) -> None:
    machines = (target.machine(target.names()[0]) for target in all_targets() if target.architecture() == architecture)
    machine = next(machines, None)
    if machine is None:
        raise CompileError(f"no target is for {architecture}")
    source = Path(__file__).with_suffix(".c")
    command = [*compiler_command(machine), "-O1", f"-I{c_sources()}", str(source), "-o", str(program), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"the program that runs artifacts does not compile: {done.stderr.strip()[-300:]}")


def why_not(manifest: Manifest) -> str:
    """Why an artifact cannot be run under an emulator here; empty where it can."""
    architecture = manifest.target.arch
    if architecture == cpu.architecture() and not manifest.target.features <= cpu.features():
        return f"an emulator is used for other architectures than {architecture} only"
    if manifest.task == "run":
        return "an artifact of arrays is not run through llmc.h, which is for texts"
    if manifest.task == "encode" and manifest.encoder is None:
        return "what this encoder's outputs mean is not known, so that llmc.h does not give them"
    try:
        emulator_command(architecture)
    except CompileError as error:
        return str(error)
    return ""


def pieces_of(ids: Ids, rng: np.random.Generator) -> list[Ids]:
    """A sequence cut at two random places, and its last tokens one by one."""
    end = max(1, len(ids) - DECODED)
    cuts = sorted({0, *(int(cut) for cut in rng.integers(0, end + 1, 2)), end, *range(end, len(ids) + 1)})
    return [ids[first:last] for first, last in itertools.pairwise(cuts)]


def check_emulated(path: Path, weights: Path | None, parts: Parts, checker: Checker) -> None:
    """Compares an artifact that this machine cannot run with its graph in numpy, under an emulator, on the tokens that
    `checker` ran the passes on: after every piece that they are fed in. Where there is none, `checker.not_run` gets the
    reason. CompileError says how far it is off."""
    emulated = Emulated.open(path, weights=weights)
    reason = why_not(emulated.manifest)
    if not reason and "token_types" in {value.name for value in parts.program.graph.inputs}:
        reason = "token types other than 0 are given from Python only"
    if reason:
        checker.not_run += f" Nor under an emulator: {reason}"
        return
    checker.not_run = ""
    _compare(emulated, parts, checker)


def _compare(emulated: Emulated, parts: Parts, checker: Checker) -> None:
    graph, scenario = parts.program.graph, checker.scenario
    reference = checker.evaluate(graph, exact=False)
    allowed = allowed_differences(graph, reference, checker)
    assert scenario is not None
    if emulated.manifest.task == "generate":
        name, rng = "logits", np.random.default_rng(scenario.seed)
        pieces = [pieces_of(ids, rng) for ids in scenario.sequences]
        found = emulated.logits(pieces)
        ends = [np.cumsum([len(piece) for piece in sequence]) - 1 for sequence in pieces]
        rows = [scenario.row(number, int(at)) for number, each in enumerate(ends) for at in each]
        expected = reference[name][rows]
    else:
        assert emulated.manifest.encoder is not None
        name = emulated.manifest.encoder.output
        found = np.concatenate(emulated.encode(scenario.sequences))
        expected = reference[name].reshape(found.shape)
    what = f"the artifact on an emulated {emulated.model}"
    difference: Difference = difference_of(what, name, expected, found, False, None)
    checker.differences.append(difference)
    if not difference.relative <= allowed[name]:
        raise CompileError(f"{difference}; allowed is {allowed[name]:.2g}")
    checker.artifact = [f"the artifact on an emulated {emulated.model}: {len(found)} rows beside the graph's"]
