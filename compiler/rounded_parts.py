"""Weights that a compile has rounded so far, in files, so that one that is killed goes on where it was.

A folder `HASH.parts` beside the rounded weights of finished compiles, of the same hash, has the drawn texts and each
weight, as soon as it is rounded: its arrays, and then a file that names these with their hashes. It is one compile's at
a time: others of the same hash, and those that cannot write there, have their files in a scratch folder. It goes when
all weights are kept; one that is left goes after a week. What is damaged, or was rounded by other texts, counts as not
there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmc.compiler.allocation import others
from llmc.compiler.encodings.feedback import Rounded
from llmc.compiler.encodings.grouped import GroupQuantized, empty_parts, grouped
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.types import Array
from llmc.compiler.own_text import Ids

LEFT_SECONDS = 7 * 24 * 3600.0  # after which a folder that a compile has left goes
BLOCK_BYTES = 1 << 22  # read at once
_SUFFIX = ".parts"
_TEXTS = "texts"
_MEASURED = ("powers", "errors")


@dataclass
class RoundedParts:
    """The weights of a graph that are rounded, in files of a folder. scratch: where they are if that cannot be written
    to. weights: those of the graph, in order; each is known by its number."""

    folder: Path
    scratch: Path
    weights: Sequence[Quantize]
    digest: str = ""  # of the texts that weights are rounded by
    _kept: dict[Quantize, list[Rounded]] = field(default_factory=dict)
    _texts: list[Ids] = field(default_factory=list)
    _saved: dict[str, list[str]] = field(default_factory=dict)  # arrays that no file names yet

    def texts(self) -> list[Ids]:
        """Texts that were drawn before, if there are any."""
        if self._texts:
            return self._texts
        found = _Files(self._files(_TEXTS, ""))
        if found.keys() != {"ids", "ends"}:
            return []
        return [np.array(ids, np.int32) for ids in np.split(found["ids"], found["ends"][:-1])]

    def keep_texts(self, texts: Sequence[Ids]) -> None:
        """Keep drawn texts."""
        self._texts = list(texts)
        self._save(_TEXTS, "ids", np.concatenate(texts))
        self._save(_TEXTS, "ends", np.cumsum([len(text) for text in texts]))
        self._name_saved(_TEXTS, "")

    def find(self, texts: Sequence[Ids], more: bool) -> dict[Quantize, list[Rounded]]:
        """Weights that were rounded by these texts before, and what they became. more: in other encodings besides."""
        digest = hashlib.sha256()
        for text in texts:
            digest.update(f"{text.dtype} {text.shape}\0".encode() + text.tobytes())
        self.digest = digest.hexdigest()
        for number, weight in enumerate(self.weights):
            rounded = self._found(number, weight, more)
            if rounded:
                self._kept[weight] = rounded
        return dict(self._kept)

    def put(self, weight: Quantize, rounded: Rounded) -> Rounded:
        """What a weight became in one encoding, in files: all of it may not fit the memory."""
        encoded, number = rounded.encoded, str(self.weights.index(weight))
        arrays = {**encoded.parts, "powers": rounded.powers, "errors": rounded.errors}
        paths = {name: self._save(number, f"{encoded.encoding}.{name}", array) for name, array in arrays.items()}
        parts = _Files({name: paths[name] for name in encoded.parts})
        found = Rounded(Encoded(encoded.encoding, encoded.shape, parts), rounded.powers, rounded.errors)
        self._kept.setdefault(weight, []).append(found)
        return found

    def finish(self, weight: Quantize) -> None:
        """A weight is there in all encodings that it is to have: the next compile may take it."""
        self._name_saved(str(self.weights.index(weight)), self.digest)

    def _save(self, of: str, name: str, array: Array) -> Path:
        """The file that has an array from now on."""
        path = self.folder / f"{of}.{name}.npy"
        try:
            np.save(path, array)
            self._saved.setdefault(of, []).append(name)
        except OSError:
            if self.folder == self.scratch:
                raise
            path = self.scratch / path.name
            np.save(path, array)
            self._saved.setdefault(of, []).append("")  # which no compile that comes after will find
        return path

    def _name_saved(self, of: str, texts: str) -> None:
        """The file that says which arrays there are, when all of them are."""
        names = self._saved.pop(of, [""])
        if "" in names:
            return
        unnamed = self.folder / f"{of}.partial"
        with contextlib.suppress(OSError):
            hashes = {name: _hash_of(self.folder / f"{of}.{name}.npy") for name in names}
            unnamed.write_text(json.dumps({"texts": texts, "arrays": hashes}), encoding="utf-8")
            os.replace(unnamed, self.folder / f"{of}.json")

    def in_order(self) -> dict[Quantize, list[Rounded]]:
        """What all weights became, in the order of the graph, whichever of them were rounded before."""
        return {weight: self._kept[weight] for weight in self.weights}

    def remove(self) -> None:
        """Removes the folder, as all weights are kept elsewhere; a scratch folder goes by itself."""
        if self.folder != self.scratch:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self, number: int, weight: Quantize, more: bool) -> list[Rounded]:
        """What a weight was rounded to; nothing where that is not there, damaged, or does not fit."""
        files = self._files(str(number), self.digest)
        own = grouped(weight.tensor.encoding)  # type: ignore[arg-type]
        kinds: list[GroupQuantized] = [own, *(others(own) if more else ())]
        rows, inputs = weight.shape
        assert isinstance(rows, int) and isinstance(inputs, int)
        found = []
        # Of inputs that overflow, a weight is rounded in its own encoding only.
        for kind in kinds[: len({name.split(".")[0] for name in files})]:
            expected = empty_parts(kind, rows, inputs)
            expected |= {name: np.empty(rows, np.float32) for name in _MEASURED}
            paths = _Files({name: files.pop(f"{kind}.{name}", Path()) for name in expected})
            try:
                whole = all(
                    (paths[name].shape, paths[name].dtype) == (x.shape, x.dtype) for name, x in expected.items()
                )
            except (OSError, ValueError):
                whole = False
            if not whole:
                return []
            powers, errors = np.array(paths["powers"]), np.array(paths["errors"])
            parts = _Files({name: path for name, path in paths.files.items() if name not in _MEASURED})
            found.append(Rounded(Encoded(kind, (rows, inputs), parts), powers, errors))
        return [] if files else found

    def _files(self, name: str, texts: str) -> dict[str, Path]:
        """Files of arrays, by name; none where any is damaged or not there, or texts were others."""
        try:
            index = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            files = {each: self.folder / f"{name}.{each}.npy" for each in index["arrays"]}
            whole = all(_hash_of(files[each]) == known for each, known in index["arrays"].items())
            return files if whole and index["texts"] == texts else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}


@dataclass(frozen=True)
class _Files(Mapping[str, Array]):
    """Arrays in files, each of which is open only as long as somebody has the array: there may be thousands."""

    files: Mapping[str, Path]

    def __getitem__(self, name: str) -> Array:
        values: Array = np.load(self.files[name], mmap_mode="r")
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def rounded_parts(cache: Path, key: str, scratch: Path, weights: Sequence[Quantize]) -> Iterator[RoundedParts]:
    """The parts of a compile that is known by a key; while the `with` block runs they are nobody else's. cache: the
    folder of finished compiles' weights. scratch: for one that goes on in no case."""
    with contextlib.ExitStack() as stack:
        folder = scratch
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            _sweep(cache)
            stack.enter_context(_locked(cache / f"{key}{_SUFFIX}"))
            folder = cache / f"{key}{_SUFFIX}"
        yield RoundedParts(folder, scratch, weights)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A folder, made where it is not there, that is this process's own; OSError where it is another's."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists():  # its owner has removed it in between
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(descriptor)


def remove_left(cache: Path, key: str) -> None:
    """Removes what a compile has left that was ended when all of its weights were kept."""
    folder = cache / f"{key}{_SUFFIX}"
    with contextlib.suppress(OSError):
        if folder.exists():
            with _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Removes folders that were left for long."""
    for folder in cache.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > LEFT_SECONDS:
                remove_left(cache, folder.name.removesuffix(_SUFFIX))
