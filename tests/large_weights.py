"""A fake artifact whose weights are of several chunks, so that they are checked and copied beside the first steps."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fake_artifact
import numpy as np
import pytest

from llmc.compiler.artifact import ArtifactWriter, WeightHash
from llmc.runtime import verified
from llmc.runtime import weights as module
from llmc.runtime.artifact import HASH_CHUNK, Artifact
from llmc.runtime.library import Library

IDS = list(range(33))
NBYTES = 3 * HASH_CHUNK + 5000
RIGHT = fake_artifact.reference_logits(IDS)
FLOAT = "tensor<[300], f32>"


def write(path: Path, kind: str = FLOAT, outside: Path | None = None) -> Path:
    """The fake artifact, with weights of several chunks, of which the model reads the first few."""
    data = np.random.default_rng(1).integers(0, 256, NBYTES, dtype=np.uint8)
    data[: fake_artifact.VOCAB] = fake_artifact.weights()
    entry: dict[str, object] = {"bytes": NBYTES}
    entry["tensors"] = [{"name": "bias", "offset": 0, "nbytes": NBYTES, "type": kind}]
    with ArtifactWriter(path, fake_artifact.library()) as writer:
        if outside is None:
            writer.begin_weights()
            writer.append(data)
        else:
            outside.write_bytes(data.tobytes())
            digest = WeightHash()
            digest.update(data.data)
            entry["hash"] = digest.hexdigest()
        writer.add_tokenizer(fake_artifact.byte_tokenizer())
        writer.add_manifest(fake_artifact.manifest(weights=entry))
    return path


def load_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All weights are large, no file is too young to be remembered, and nothing is copied where a test does not ask."""
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LEAST_LATER", 0)
    monkeypatch.setattr(verified, "_LEAST_AGE", -1)
    monkeypatch.setattr(module, "worth_copying", lambda _: False)


class Gate:
    """Holds the hashing of a thread of its own up before each piece, until it is opened; counts its pieces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.arrived, self.pieces = threading.Event(), threading.Event(), 0
        self.niceness: set[int] = set()  # of the threads that hash so
        real = Library.hash

        def hash_of(library: Library, data: np.ndarray, threads: int) -> np.ndarray:
            if threads == 0:
                self.pieces += 1
                self.niceness.add(os.getpriority(os.PRIO_PROCESS, 0))
                self.arrived.set()
                self.opened.wait()
            return real(library, data, threads)

        monkeypatch.setattr(Library, "hash", hash_of)


def place_of(path: Path) -> tuple[int, int]:
    """Where the weights lie in the file, and the bytes of their part."""
    artifact = Artifact.open(path)
    artifact.close()
    part = artifact.parts[".llmc.weights"]
    return part.offset, part.extent


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ 0x10]))
