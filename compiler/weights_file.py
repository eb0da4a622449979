"""Weights in a file of their own, for artifacts that are compiled without them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

import numpy as np

from llmc.compiler.artifact import WeightHash, create_locked, remove_stale
from llmc.compiler.ir.types import Array
from llmc.errors import ArtifactError


class WeightsFile:
    """Writes the bytes of the weights section to a file, all or nothing.

    What was at `path` stays until the `with` block ends without an error: a compile that fails later leaves the file
    that an older artifact belongs to. `seal` brings all bytes to the disk before that and says their hash.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = WeightHash()
        self._position = 0

    def __enter__(self) -> WeightsFile:
        try:
            remove_stale(self.path)
            descriptor, self._temporary = create_locked(self.path)
            self._file = open(descriptor, "wb")
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    @property
    def temporary(self) -> Path:
        """Where the bytes are until the `with` block ends."""
        return self._temporary

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

    def seal(self) -> str:
        """Ends the file; returns its hash."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}; free some space there") from error
        return self._digest.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.replace(self._temporary, self.path)
        except OSError as problem:
            raise ArtifactError(f"cannot write {self.path}: {problem.strerror}; free some space there") from problem
        finally:
            self._temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what a full disk did not take is of no interest any more
                self._file.close()
