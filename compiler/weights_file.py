"""Weights in a file of their own, for artifacts that are compiled without them."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from llmc.compiler.artifact import WeightHash
from llmc.compiler.ir.types import Array
from llmc.files import OutputFile, write_all, writing


class WeightsFile:
    """Writes the bytes of the weights section to a file, all or nothing.

    What was at `path` stays until the `with` block ends without an error: a compile that fails later leaves the file
    that an older artifact belongs to. `seal` brings all bytes to the disk before that and says their hash.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = OutputFile(path)
        self._digest = WeightHash()
        self._position = 0

    def __enter__(self) -> WeightsFile:
        with writing(self.path):
            self._file.__enter__()
        return self

    @property
    def temporary(self) -> Path:
        """Where the bytes are until the `with` block ends."""
        return self._file.place

    def append(self, array: Array, align: int = 64) -> int:
        """Appends an array's bytes at a multiple of `align`; returns their offset."""
        self._write(bytes(-self._position % align))
        offset = self._position
        self._write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
        return offset

    def _write(self, data: bytes | memoryview) -> None:
        with writing(self.path):
            write_all(self._file.descriptor, data)
        self._digest.update(memoryview(data))
        self._position += len(data)

    def seal(self) -> str:
        """Ends the file; returns its hash."""
        with writing(self.path):
            os.fsync(self._file.descriptor)
        return self._digest.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self.path):
            self._file.__exit__(kind, error, trace)
