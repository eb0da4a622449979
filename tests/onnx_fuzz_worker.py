"""Lifts damaged ONNX files: `python onnx_fuzz_worker.py FOLDER`, a seed a line on stdin, a verdict a line on stdout.

A process of its own, with little memory, so that a crash or a hang is a verdict of the parent's and not its end.
"""

from __future__ import annotations

import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from llmc.compiler.ir.op import Input
    from llmc.frontends import Lifted

MEMORY = 4 << 30  # bytes of address space; importing everything takes half
SECONDS = 30  # of this process, for one file; most take a hundredth of one
_SMALL = 1 << 20  # elements of the largest input for which a graph is evaluated
_SIZE = 3  # what every free size is then


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
    difference = compared(lifted, path) if lifted.task == "run" else ""
    return f"BAD {difference}" if difference else f"lifted: {lifted.task}"


def compared(lifted: Lifted, path: Path) -> str:
    """How a graph differs from what onnxruntime makes of the file; empty where it does not, or cannot say."""
    from llmc.compiler.ir.evaluate import evaluate

    rng = np.random.default_rng(0)
    given = {value.name: _numbers(value, rng) for value in lifted.graph.inputs}
    if any(array is None for array in given.values()):
        return ""
    ours = evaluate(lifted.graph, given, lifted.load)  # type: ignore[arg-type]  # none is None
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        wanted = {value.name for value in session.get_inputs()}
        found = session.run(None, {name: array for name, array in given.items() if name in wanted})
    except Exception:  # it refuses more, in exceptions of its own
        return ""
    for value, want in zip(session.get_outputs(), found, strict=True):
        own = np.asarray(ours[value.name])
        if own.shape != want.shape or own.dtype != want.dtype:
            return f"{value.name} is {own.dtype} {own.shape}, and {want.dtype} {want.shape} in onnxruntime"
        # Damage may ask for halves; the rest agrees to rounding.
        if not np.allclose(own.astype(np.float64), want.astype(np.float64), rtol=5e-3, atol=1e-4, equal_nan=True):
            return f"{value.name} has other numbers than in onnxruntime"
    return ""


def _numbers(value: Input, rng: np.random.Generator) -> np.ndarray | None:
    """Something for an input; None where it is too large to try."""
    from llmc.compiler.ir.dims import concrete, symbols_of
    from llmc.compiler.ir.types import NUMPY_DTYPES

    shape = [concrete(dim, {s.name: _SIZE for s in symbols_of(dim)}) for dim in value.tensor.shape]
    if np.prod(shape, dtype=object) > _SMALL:
        return None
    dtype = NUMPY_DTYPES[value.dtype]
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


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
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            found = verdict(path)
        except Exception:
            found = "BAD " + " | ".join(traceback.format_exc().splitlines()[-12:])
        signal.setitimer(signal.ITIMER_PROF, 0)
        path.unlink()
        print(seed, " ".join(found.split()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
