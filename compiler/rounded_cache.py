"""Weights that were rounded by what layers see, kept for the next compile of the same model.

A file `HASH.npz` in `$LLMC_CACHE_DIR/rounded` (or `~/.cache/llmc/rounded`) has the encoding and the parts of each
weight in the order of the graph, integers of 4 bits two to a byte. The hash covers the graph, the content of its
weights, the texts, and the code. What cannot be read, or is damaged, counts as not there; what cannot be written is not
kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.compiler.encodings.grouped import grouped
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.text import print_graph
from llmc.compiler.ir.types import Array, parse_encoding
from llmc.errors import IRError
from llmc.files import cache_folder

UNUSED_SECONDS = 30 * 24 * 3600.0  # after which a file goes


class NotKept(LookupError):
    """There is no whole file of these weights."""


def key_of(graph: Graph, load: LoadParam, texts: Iterable[Array], *facts: object) -> str:
    """Of a graph in floats, its weights, what it is run on before texts are drawn anew, and whatever else decides."""
    digest = hashlib.sha256(f"{print_graph(graph)}\0{facts!r}".encode())
    for array in (*(load(param.name) for param in graph.params), *texts):
        digest.update(f"{array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class RoundedCache:
    """The files of one folder."""

    folder: Path

    @classmethod
    def default(cls) -> RoundedCache:
        return cls(cache_folder() / "rounded")

    def schemes(self, key: str) -> dict[str, str]:
        """The schemes, by names of params, that the weights were given besides; `NotKept` as for `read`."""
        with self._file(key) as file:
            return dict(file["schemes"].tolist())

    def read(self, key: str, weights: Sequence[Quantize]) -> Iterator[tuple[Quantize, Encoded]]:
        """These weights and what they became, one after another; `NotKept` where they are not there or, at any of them,
        damaged."""
        with self._file(key) as file:
            for number, weight in enumerate(weights):
                yield weight, _unpacked(weight, file, f"{number}.")

    @contextlib.contextmanager
    def _file(self, key: str) -> Iterator[np.lib.npyio.NpzFile]:
        path = self.folder / f"{key}.npz"
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                yield file
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, IRError) as error:
            raise NotKept(path) from error
        with contextlib.suppress(OSError):
            os.utime(path)

    def write(self, key: str, schemes: Mapping[str, str], weights: Iterable[Encoded]) -> None:
        """Keep what all weights became, and the schemes that some were given besides, whole or not at all; what was not
        used for long goes."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            descriptor, temporary = tempfile.mkstemp(suffix=".partial", dir=self.folder)
            try:
                with open(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as entries:
                    for name, array in _arrays(schemes, weights):
                        with entries.open(f"{name}.npy", "w", force_zip64=True) as entry:
                            np.lib.format.write_array(entry, array, allow_pickle=False)
                os.replace(temporary, self.folder / f"{key}.npz")
            except BaseException:
                os.unlink(temporary)
                raise

    def _sweep(self) -> None:
        for path in (*self.folder.glob("*.npz"), *self.folder.glob("*.partial")):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                    path.unlink()


def _arrays(schemes: Mapping[str, str], weights: Iterable[Encoded]) -> Iterator[tuple[str, Array]]:
    """What a file has, by name."""
    yield "schemes", np.array(list(schemes.items()), np.str_).reshape(-1, 2)
    for number, encoded in enumerate(weights):
        yield f"{number}.encoding", np.array(str(encoded.encoding))
        for name, part in encoded.parts.items():
            yield f"{number}.{name}", _packed(encoded, name, part)


def _packed(encoded: Encoded, name: str, part: Array) -> Array:
    """As it is stored: integers of up to 4 bits two to a byte."""
    if name != "q" or grouped(encoded.encoding).bits > 4:
        return part
    even = np.pad(part, [(0, 0), (0, part.shape[1] % 2)]).view(np.uint8) & 15
    return even[:, ::2] | (even[:, 1::2] << 4)


def _unpacked(weight: Quantize, file: np.lib.npyio.NpzFile, prefix: str) -> Encoded:
    """What a weight became; ValueError where that does not fit."""
    kind = grouped(parse_encoding(str(file[f"{prefix}encoding"])))
    if kind.name != weight.encoding:  # the graph is made with the schemes that are in the file
        raise ValueError(f"{kind} does not fit")
    rows, inputs = weight.shape
    assert isinstance(rows, int)
    assert isinstance(inputs, int)
    q = file[f"{prefix}q"]
    if kind.bits <= 4:
        q = np.stack([q & 15, q >> 4], axis=-1).reshape(len(q), -1)[:, :inputs]
        q = ((q ^ 8).astype(np.int8) - np.int8(8)) if kind.symmetric else q
    parts: dict[str, Array] = {"q": q, "scales": file[f"{prefix}scales"]}
    if not kind.symmetric:
        parts["minimums"] = file[f"{prefix}minimums"]
    groups = (rows, kind.scales(inputs))
    expected = {"q": ((rows, inputs), np.int8 if kind.symmetric else np.uint8)}
    for name, part in parts.items():
        shape, dtype = expected.get(name, (groups, np.float16))
        if part.shape != shape or part.dtype != dtype:
            raise ValueError(f"{name} does not fit")
    return Encoded(kind, (rows, inputs), parts)
