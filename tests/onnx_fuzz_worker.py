"""Lifts damaged ONNX files: `python onnx_fuzz_worker.py FOLDER`, a seed a line on stdin, a verdict a line on stdout.

A process of its own, with little memory, so that a crash or a hang is a verdict of the parent's and not its end.
"""

from __future__ import annotations

import resource
import signal
import sys
import traceback
from pathlib import Path

MEMORY = 3 << 30  # bytes of address space; importing everything takes half
SECONDS = 20  # for one file; most take a hundredth of one
_SMALL = 1 << 22  # elements of the inputs of a graph that is run through the passes


def verdict(path: Path) -> str:
    """ "refused: ...", or "lifted" and what it became. Anything but an LlmcError goes through."""
    from llmc.compiler.options import CompileOptions
    from llmc.compiler.pipeline import run_pipeline
    from llmc.errors import LlmcError
    from llmc.frontends.onnx import lift

    try:
        lifted = lift(path)
    except LlmcError as error:
        text = str(error)
        plain = text.isprintable() and len(text) < 1000
        return f"refused: {text}" if plain else f"BAD message of {len(text)}: {text!r}"
    for name in lifted.weights.names:
        lifted.load(name)
    try:
        run_pipeline(lifted.graph, CompileOptions(quantization="int8"), load=lifted.load, task=lifted.task)
    except LlmcError as error:
        return f"lifted, not compiled: {error}"
    return f"lifted: {lifted.task}"


def main(folder: Path) -> None:
    from onnx_mutations import mutated, seeds

    from llmc.compiler import passes  # noqa: F401  (imported before memory is bounded)
    from llmc.frontends import onnx  # noqa: F401

    models = seeds()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        seed = int(line)
        path = folder / f"{seed}.onnx"
        path.write_bytes(mutated(models, seed))
        signal.alarm(SECONDS)
        try:
            found = verdict(path)
        except Exception:
            found = "BAD " + " | ".join(traceback.format_exc().splitlines()[-12:])
        signal.alarm(0)
        path.unlink()
        print(seed, " ".join(found.split()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
