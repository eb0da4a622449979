"""Load an artifact's code and call it: the C interface of step.h and pool.h, through ctypes."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import manifest
from llmc.runtime.artifact import HASH_CHUNK, Artifact
from llmc.runtime.errors import ArtifactError, StepError
from llmc.runtime.limits import LimitFunction, load_functions
from llmc.runtime.memory import address


class Step(ctypes.Structure):
    """`LlmcStep` of step.h. sizes: T, Q, B, M, R, S."""

    _fields_ = (
        ("sizes", ctypes.c_int64 * 6),
        ("ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("arena", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("profile", ctypes.c_void_p),
        ("token_types", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("dims", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
    )


class Library:
    """The loaded code of one artifact.

    Libraries stay loaded until the process ends, as the pool's workers run in the code of the first. The loader knows
    a library by the name it was opened with, and would give the old code for a name it has seen: so the name is that
    of the file descriptor that was checked, which stays open for as long.
    """

    _lock = threading.Lock()
    _loaded: dict[tuple[int, int], tuple[tuple[int, int], Library]] = {}  # noqa: RUF012  (guarded by _lock)
    _pool: int | None = None

    def __init__(self, path: Path, name: str) -> None:
        try:
            handle = ctypes.CDLL(name)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be loaded: {error}. Compile it again on this system") from error
        self._handle = handle
        try:
            self._run = handle.llmc_run
            self._hash = handle.llmc_hash
            self.choose, self._choose_bytes = handle.llmc_choose, handle.llmc_choose_bytes
            pool_create, pool_use, abi = handle.llmc_pool_create, handle.llmc_pool_use, handle.llmc_abi
        except AttributeError as error:
            raise ArtifactError(
                f"{path} lacks a function that every artifact has: {error}. Compile it again"
            ) from error
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._run.restype = ctypes.c_int
        self._hash.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self._hash.restype = None
        self.choose.argtypes, self.choose.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
        self._choose_bytes.argtypes, self._choose_bytes.restype = [ctypes.c_int64], ctypes.c_int64
        pool_create.argtypes, pool_create.restype = [], ctypes.c_void_p
        pool_use.argtypes, pool_use.restype = [ctypes.c_void_p], None
        abi.argtypes, abi.restype = [], ctypes.c_int64
        if abi() != manifest.ABI:
            raise ArtifactError(f"{path} has code of ABI {abi()}; this runtime calls ABI {manifest.ABI}. Compile again")
        if Library._pool is None:
            Library._pool = pool_create()
        if Library._pool is not None:
            pool_use(Library._pool)

    @classmethod
    def load(cls, artifact: Artifact) -> Library:
        """The code of a checked artifact; an artifact that is loaded already is not loaded twice."""
        status = os.fstat(artifact.descriptor)
        file, version = (status.st_dev, status.st_ino), (status.st_mtime_ns, status.st_size)
        with cls._lock:
            known = cls._loaded.get(file)
            if known is not None:
                if known[0] != version:
                    raise ArtifactError(
                        f"{artifact.path} was overwritten while it was loaded. Restart this process; and replace the "
                        "file of a loaded artifact with `mv` (as llmc itself does), not with `cp`"
                    )
                return known[1]
            kept = os.dup(artifact.descriptor)
            name = f"/proc/self/fd/{kept}"
            try:
                library = cls(artifact.path, name if Path(name).exists() else str(artifact.path.absolute()))
            except BaseException:
                os.close(kept)
                raise
            cls._loaded[file] = version, library
            return library

    def run(self, step: int, threads: int) -> None:
        """Runs one step. step: the address of a filled `Step`."""
        code = self._run(step, threads)
        if code:
            raise StepError(f"the artifact's step failed with code {code}")

    def limits(self, facts: Sequence[manifest.LimitFacts]) -> list[LimitFunction]:
        """The functions that measure the machine's limits."""
        return load_functions(self._handle, facts)

    def choose_bytes(self, count: int) -> int:
        """Bytes of scratch that a choice among `count` tokens needs."""
        return int(self._choose_bytes(count))

    def hash(self, data: NDArray[np.uint8], threads: int) -> NDArray[np.uint64]:
        """The 64-bit hashes of the 4 MiB chunks of `data`."""
        out = np.zeros(-(-len(data) // HASH_CHUNK), np.uint64)
        self._hash(address(data), len(data), address(out), threads)
        return out
