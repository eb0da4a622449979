"""embed, classify: vectors and labels of texts, from encoders."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.cli.kinds import require
from llmc.cli.streams import read_text
from llmc.cli.writing import load, wait_verified
from llmc.errors import LlmcError
from llmc.files import OutputFile, names_stdout, refusal, write_all, writing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmc.runtime.runtime import Runtime

_SHOWN_NUMBERS = 6
_SHOWN_CHARACTERS = 48
_MOST_SHOWN = 20  # rows of a similarity matrix, for people

Texts = Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="The texts.")]
Lines = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="Also every line of a file in UTF-8; - is stdin.")
]


def embed(
    model: o.ModelOrArtifact,
    texts: Texts = None,
    file: Lines = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="NAME", help="Put the model's prompt of this name in front.")
    ] = None,
    prompt_text: Annotated[str | None, typer.Option("--prompt-text", help="Put this in front of every text.")] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Make vectors of length 1, if the model does not do it.")
    ] = False,
    path: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write all numbers: .npy, float32 [texts, n].")
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Show the cosine of every two texts' vectors.")
    ] = False,
    threads: o.Threads = None,
    quantization: o.Quantization = "int8",
    weights: o.Weights = None,
    verify: o.Verify = None,
    json: o.Json = False,
) -> None:
    """Make a vector of every text."""
    import numpy as np

    if path is not None:
        _check_output(path, json or similarity)
    batch = read_texts(texts, file)
    runtime = load(model, quantization, threads, weights, verify)
    require(runtime.manifest, runtime.artifact.path, "embed", "embed")
    started = time.perf_counter()
    with output.counted("embedding", len(batch)) as advance:
        found = runtime.embed(
            batch, prompt=prompt_text, prompt_name=prompt, normalize=normalize or None, progress=advance
        )
    seconds = time.perf_counter() - started
    wait_verified(runtime)
    cosines = cosine_matrix(found) if similarity else None
    if path is not None:
        data = io.BytesIO()
        np.save(data, found)
        with writing(path, LlmcError), OutputFile(path) as target:
            write_all(target.descriptor, data.getbuffer())
    if json:
        result: dict[str, object] = {"dimension": runtime.dimension, "texts": batch, "seconds": round(seconds, 6)}
        if path is None:
            result["embeddings"] = found.tolist()
        else:
            result["path"] = str(path)
        if cosines is not None:
            result["similarity"] = cosines.tolist()
        output.print_json(result)
        return
    if cosines is not None:
        _print_matrix(batch, cosines)
    elif path is None:
        _print_vectors(batch, found)
    where = f" in {path}" if path is not None else ""
    output.line(f"{output.count(len(batch), 'vector')} of {runtime.dimension} numbers{where}, {seconds:.3f} s")


def _print_vectors(texts: list[str], vectors: NDArray[np.float32]) -> None:
    """The first numbers of each text's vector, and how to get all."""
    for text, row in zip(texts, vectors, strict=True):
        numbers = " ".join(f"{number: .4f}" for number in row[:_SHOWN_NUMBERS])
        print(f"{numbers} ...  {shortened(text)}" if len(row) > _SHOWN_NUMBERS else f"{numbers}  {shortened(text)}")
    output.line("-o FILE.npy or --json gives all numbers, --similarity compares the texts")


def _check_output(path: Path, prints: bool) -> None:
    """Refuses a file that cannot be written, before the work. prints: results go to stdout too."""
    why = refusal(path)
    if why is not None:
        raise LlmcError(f"cannot write {path} (-o): {why}")
    if prints and names_stdout(path):
        raise LlmcError(f"-o {path} writes to stdout, where --json and --similarity print: give a file")


def classify(
    model: o.ModelOrArtifact,
    texts: Texts = None,
    file: Lines = None,
    pair_with: Annotated[
        str | None,
        typer.Option("--pair-with", metavar="TEXT", help="Classify pairs: this text (a query, say) with each other."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show the scores of all labels.")] = False,
    threads: o.Threads = None,
    quantization: o.Quantization = "int8",
    weights: o.Weights = None,
    verify: o.Verify = None,
    json: o.Json = False,
) -> None:
    """Say which class every text, or every token of it, is of."""
    batch = read_texts(texts, file)
    runtime = load(model, quantization, threads, weights, verify)
    require(runtime.manifest, runtime.artifact.path, "classify", "classify")
    facts = runtime.manifest.encoder
    if facts is not None and facts.kind == "tokens":
        if pair_with is not None:
            raise LlmcError(f"--pair-with is for classes of whole texts; {runtime.artifact.path} labels tokens")
        _tag(runtime, batch, json)
        return
    pairs = batch if pair_with is None else [(pair_with, text) for text in batch]
    with output.counted("classifying", len(batch)) as advance:
        found = runtime.classify(pairs, progress=advance)
    wait_verified(runtime)
    assert isinstance(found, list)
    if json:
        output.print_json({"texts": batch, "pair_with": pair_with, "classes": found})
        return
    for text, entry in zip(batch, found, strict=True):
        scores = entry["scores"]
        assert isinstance(scores, dict)
        shown = sorted(scores.items(), key=lambda item: -item[1]) if every else [(entry["label"], entry["score"])]
        print(f"{', '.join(f'{label} {score:.4f}' for label, score in shown)}  {shortened(text)}")


def _tag(runtime: Runtime, batch: list[str], json: bool) -> None:
    with output.counted("tagging", len(batch)) as advance:
        found = runtime.tag(batch, progress=advance)
    wait_verified(runtime)
    if json:
        output.print_json({"texts": batch, "tokens": found})
        return
    for text, entries in zip(batch, found, strict=True):
        print(shortened(text))
        output.table([(f"  {entry['word']}", entry["label"], f"{entry['score']:.4f}") for entry in entries])  # type: ignore[index]


def read_texts(texts: list[str] | None, file: Path | None) -> list[str]:
    """The texts of the command line, then the lines of a file."""
    batch = list(texts or ())
    if file is not None:
        lines = read_text(file, "--file").split("\n")
        batch += lines if lines[-1] else lines[:-1]
    if not batch:
        raise LlmcError("no texts: give them as arguments, or a file of lines with --file")
    return batch


def cosine_matrix(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosine of every two rows."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return np.asarray(unit @ unit.T, np.float32)


def _print_matrix(texts: list[str], cosines: NDArray[np.float32]) -> None:
    shown = min(len(texts), _MOST_SHOWN)
    rows = [
        (index, *(f"{value:.3f}" for value in cosines[index, :shown]), shortened(texts[index]))
        for index in range(shown)
    ]
    output.table(rows, ("", *map(str, range(shown)), ""))
    if shown < len(texts):
        output.line(f"the first {shown} of {len(texts)} texts; --json gives all")


def shortened(text: str) -> str:
    """A text in one short line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


COMMANDS = (
    (embed, ("llmc embed minilm.so 'A man is eating food.' 'Someone has a meal.' --similarity",
             "llmc embed minilm.so --file sentences.txt --prompt query -o sentences.npy")),
    (classify, ("llmc classify sentiment.so 'What a day!' 'Never again.' --all",
                "llmc classify reranker.so 'Paris is large.' 'Cats sleep.' --pair-with 'the capital of France'")),
)  # fmt: skip
