"""Measuring the accuracy of an artifact that is written but not in its place, for its manifest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc.compiler import accuracy
from llmc.compiler.accuracy import RoundedHere
from llmc.compiler.accuracy_cache import AccuracyCache
from llmc.compiler.estimate import estimate
from llmc.compiler.manifest import check_manifest
from llmc.compiler.options import CompileOptions
from llmc.compiler.own_text import Ids, draw
from llmc.compiler.progress import Progress
from llmc.compiler.rounded_cache import key_of
from llmc.errors import CompileError, LlmcError

if TYPE_CHECKING:
    from llmc.compiler.pipeline import Compiled
    from llmc.frontends.lifted import Lifted


LOST = 0.5  # of the mean square of a matrix's outputs: its error is told beyond it

Draw: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.float64]], Ids]


class Load(Protocol):
    """How an artifact is loaded: `targets/written_text.py`."""

    def __call__(
        self, path: Path, weights: Path | None, texts: int, length: int, token_bytes: int, draw: Draw
    ) -> AbstractContextManager[accuracy.Running]:
        """The artifact at a path, with room for so many texts of so many tokens."""


@dataclass(frozen=True)
class Written:
    """What an artifact has been made of, and how it runs. library: its code; digest: its weights' hash; weights: the
    file that has them, if there is one; kept: what weights were rounded to. refusal: why this machine cannot run an
    artifact, empty where it can; load: loads it; code: a hash of what measures."""

    library: Path
    digest: str
    weights: Path | None
    kept: RoundedHere
    refusal: Callable[[Path], str]
    load: Load
    code: str


def longest_manifest(manifest: dict[str, object], lifted: Lifted, compiled: Compiled) -> dict[str, object]:
    """One that is as long as what `revised` gives can be."""
    return {**manifest, "accuracy": accuracy.longest(lifted, compiled.graph, compiled.originals)}


def revised(
    path: Path,
    manifest: dict[str, object],
    written: Written,
    lifted: Lifted,
    compiled: Compiled,
    options: CompileOptions,
    progress: Progress,
) -> dict[str, object] | None:
    """The manifest of the artifact at `path` with its accuracy; None where that cannot be measured, which is said."""
    try:
        manifest["accuracy"] = measured_accuracy(path, written, lifted, compiled, options, progress)
        check_manifest(manifest)
    except LlmcError as error:  # random ids are not what every graph takes
        if options.accuracy:
            raise CompileError(f"--accuracy: it cannot be measured: {error}") from error
        progress.note(f"the artifact does not tell its accuracy: {error}")
        manifest.pop("accuracy", None)
        return None
    note_what_is_lost(manifest["accuracy"], progress)
    return manifest


def note_what_is_lost(measured: Any, progress: Progress) -> None:
    """Says which matrices hardly compute what they did. measured: the manifest's `accuracy`."""
    lost = [each for each in measured["tensors"] if (each["output_error"] or 0.0) > LOST]
    if lost:
        lost.sort(key=lambda each: -each["output_error"])
        shown = ", ".join(f"{each['name']} ({each['encoding']}, {each['output_error']:.0%})" for each in lost[:3])
        rest = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        first = lost[0]["name"].split(" + ")[0]
        progress.note(
            "rounding leaves little of what these matrices compute (error, against the mean square of their outputs): "
            f"{shown}{rest}. Give them more bits, as with --override '{first}=int8'"
        )


def measured_accuracy(
    path: Path, written: Written, lifted: Lifted, compiled: Compiled, options: CompileOptions, progress: Progress
) -> dict[str, object]:
    """What the manifest says of the accuracy of the artifact at `path`; from the cache, where the same was measured."""
    from llmc.compiler.pipeline import vocabulary_of
    from llmc.compiler.step_sizes import RUN

    assert compiled.original is not None
    load, vocabulary, not_run = lifted.weights.load, vocabulary_of(lifted), written.refusal(path)
    code = (written.code, bool(not_run))
    library = np.frombuffer(written.library.read_bytes(), np.uint8)
    progress.start("looking for its accuracy")
    key = key_of(compiled.original, load, [library], written.digest, *code, vocabulary, options.seed)
    cache = AccuracyCache.default()
    found = cache.read(key)
    if found is not None:
        return found
    with ExitStack() as stack:
        artifact = None
        if not not_run and lifted.task != RUN:
            per_token = estimate(compiled.graph, context=accuracy.LENGTH).cache_per_token
            sizes = (accuracy.TEXTS * accuracy.LENGTH, 1, per_token)  # as many pages as that many texts of one token
            artifact = stack.enter_context(
                written.load(path, written.weights, *sizes, lambda logits, chance: draw(logits[:, :vocabulary], chance))
            )
        subject = accuracy.Subject(
            lifted, compiled.original, load, compiled.graph, compiled.load or load, compiled.originals, written.kept,
            artifact, vocabulary, options.seed,
        )  # fmt: skip
        found = accuracy.measure(subject, progress)
    cache.write(key, found)
    return found
