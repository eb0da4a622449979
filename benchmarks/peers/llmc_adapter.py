"""llmc itself, measured as the others are: `llmc compile`, then steps of the public runtime."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
from protocol import Engine, Facts, Options, Task, Timing, main

import llmc
from llmc.runtime.measure import decode_greedily, weight_bytes_per_token


class LlmcEngine:
    def __init__(self, task: Task) -> None:
        self._runtime = llmc.Runtime.load(task.file, threads=task.threads)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        runtime = self._runtime
        sequences = [runtime.sequence() for _ in prompts]
        rows = [np.array(prompt, np.int32) for prompt in prompts]
        try:
            start = time.perf_counter()
            places = runtime.step_last(list(zip(sequences, rows, strict=True)))
            first = [runtime.chooser.likeliest(place) for place in places]
            prefill = time.perf_counter() - start
            return Timing(prefill, sum(decode_greedily(runtime, sequences, first, new_tokens - 1)))
        finally:
            for sequence in sequences:
                sequence.close()

    def uses(self) -> str:
        return ""


class LlmcAdapter:
    def check(self) -> Facts:
        return {"version": f"{llmc.__version__}, sources {source_hash()}", "machine": machine()}

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        artifact = out / "model.so"
        llmc.compile(model, artifact, **{"calibrate": "none", **options})  # how weights are rounded takes no time
        runtime = llmc.Runtime.load(artifact, threads=1)
        manifest = runtime.manifest
        return {
            "file": str(artifact),
            "file_bytes": artifact.stat().st_size,
            "bytes_per_token": weight_bytes_per_token(manifest.raw, manifest.weights_bytes),
        }

    def load(self, task: Task) -> Engine:
        return LlmcEngine(task)


def machine() -> str:
    """The machine that `native` means here."""
    from llmc.targets import machine_named

    found = machine_named("native")
    return f"{found.mcpu}: {' '.join(sorted(found.features))}"


def source_hash() -> str:
    """Of all Python and C sources: an artifact of older sources is compiled again."""
    digest = hashlib.sha256()
    for name in ("llmc", "llmc.compiler", "llmc.frontends", "llmc.targets", "llmc.runtime"):
        module = __import__(name, fromlist=["__path__"])
        folder = Path(module.__path__[0])
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main(LlmcAdapter())
