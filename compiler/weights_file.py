"""Weights in a file of their own, for artifacts that are compiled without them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType

import numpy as np

from llmc.compiler.artifact import WeightHash
from llmc.compiler.ir.types import Array
from llmc.errors import ArtifactError


class WeightsFile:
    """Writes the bytes of the weights section to a file, all or nothing; `hash` is known after the `with` block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hash = ""
        self._digest = WeightHash()
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        self._position = 0

    def __enter__(self) -> WeightsFile:
        try:
            self._file = self._temporary.open("xb")
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    def append(self, array: Array, align: int = 64) -> int:
        """Appends an array's bytes at a multiple of `align`; returns their offset."""
        self._write(bytes(-self._position % align))
        offset = self._position
        self._write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
        return offset

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}; free some space there") from error
        self._digest.update(memoryview(data))
        self._position += len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._temporary, self.path)
                self.hash = self._digest.hexdigest()
        except OSError as problem:
            raise ArtifactError(f"cannot write {self.path}: {problem.strerror}; free some space there") from problem
        finally:
            self._temporary.unlink(missing_ok=True)
