"""Load an artifact's code: the C interface of step.h, choose.h and pool.h, through ctypes (layer.h: `layer.py`)."""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import errno
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc.runtime import manifest
from llmc.runtime.artifact import HASH_CHUNK, LIBRARY, Artifact
from llmc.runtime.errors import ArtifactError, StepError
from llmc.runtime.fork_lock import LIBRARIES, ForkLock
from llmc.runtime.limits import Limits, load_functions, measure_limits
from llmc.runtime.memory import address

_RTLD_NOLOAD = 4  # Linux: only a library that is loaded already


class Step(ctypes.Structure):
    """`LlmcStep` of step.h. sizes: T, Q, B, M, R, S, PROMPT, ADAPTED. Pointers are numbers of places
    (`runtime/device.py`)."""

    _fields_ = (
        ("sizes", ctypes.c_int64 * 8),
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
        ("arena_bytes", ctypes.c_int64),
        ("cache_pages", ctypes.c_int64),
        ("adapters", ctypes.c_void_p),
        ("adapter_tables", ctypes.c_void_p),
    )


class Choice(ctypes.Structure):
    """`LlmcChoice` of choose.h. Pointers are numbers of places."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("seen", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("seen_count", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("penalty", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("uniform", ctypes.c_double),
    )


def _why_not_loaded(path: Path, error: OSError) -> str:
    """What to say of code that the loader refused."""
    try:
        forbidden = os.statvfs(path).f_flag & os.ST_NOEXEC
    except OSError:
        forbidden = 0
    if forbidden:
        return f"{path} lies on a file system that is mounted noexec, so its code cannot run: copy it to another place"
    if not Path("/proc/self/fd").exists():
        return f"{path} cannot be loaded: /proc, through which its code is read, is not mounted"
    if any(os.strerror(number) in str(error) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)):
        return f"{path} cannot be loaded: {error}. Close something, or raise the limit (`ulimit -a` shows it)"
    return f"{path} cannot be loaded: {error}. Compile it again on this system"


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """Changes when a file is written to."""
    return status.st_mtime_ns, status.st_size


class Library:
    """The loaded code of one artifact, unloaded when nothing refers to it any more.

    `run` and `choose` are its C functions, for `runtime/host.py`: of a struct of this file and a number of
    threads.

    The first one stays loaded until the process ends, as the pool's workers run in its code. The loader knows a library
    by the name it was opened with, and would give the old code for a name it has seen: so the name is that of the file
    descriptor that was checked, which stays open for as long.
    """

    _lock = ForkLock(LIBRARIES)
    # By file: the hash of its code when it was loaded, and the code. (guarded by _lock)
    _loaded: dict[tuple[int, int], tuple[str, weakref.ref[Library]]] = {}  # noqa: RUF012
    _pool: int | None = None
    _pool_owner: Library | None = None

    def __init__(self, path: Path, name: str, failures: Sequence[str] = ()) -> None:
        self.failures = failures
        try:
            handle = ctypes.CDLL(name)
        except OSError as error:
            raise ArtifactError(_why_not_loaded(path, error)) from error
        self._handle = handle
        try:
            self.run = handle.llmc_run
            self._hash = handle.llmc_hash
            self.choose, self._choose_bytes = handle.llmc_choose, handle.llmc_choose_bytes
            pool_create, pool_use, abi = handle.llmc_pool_create, handle.llmc_pool_use, handle.llmc_abi
        except AttributeError as error:
            raise ArtifactError(
                f"{path} lacks a function that every artifact has: {error}. Compile it again"
            ) from error
        self.run.argtypes, self.run.restype = [ctypes.POINTER(Step), ctypes.c_int64], ctypes.c_int
        self._hash.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self._hash.restype = None
        self.choose.argtypes, self.choose.restype = [ctypes.POINTER(Choice), ctypes.c_int64], ctypes.c_int64
        self._choose_bytes.argtypes, self._choose_bytes.restype = [ctypes.c_int64], ctypes.c_int64
        pool_create.argtypes, pool_create.restype = [], ctypes.c_void_p
        pool_use.argtypes, pool_use.restype = [ctypes.c_void_p], None
        abi.argtypes, abi.restype = [], ctypes.c_int64
        if abi() != manifest.ABI:
            raise ArtifactError(f"{path} has code of ABI {abi()}; this runtime calls ABI {manifest.ABI}. Compile again")
        if Library._pool is None:
            Library._pool, Library._pool_owner = pool_create(), self
        if Library._pool is not None:
            pool_use(Library._pool)

    @classmethod
    def load(cls, artifact: Artifact) -> Library:
        """The code of an artifact whose library was checked; one that is loaded already is not loaded twice."""
        status = os.fstat(artifact.descriptor)
        file, version = (status.st_dev, status.st_ino), artifact.parts[LIBRARY].hash
        with cls._lock:
            known = cls._loaded.get(file)
            if known is not None:
                if known[0] != version:
                    raise ArtifactError(
                        f"{artifact.path} was overwritten while it was loaded. Restart this process; and replace the "
                        "file of a loaded artifact with `mv` (as llmc itself does), not with `cp`"
                    )
                library = known[1]()
                if library is not None:
                    return library
            kept = os.dup(artifact.descriptor)
            name = f"/proc/self/fd/{kept}"
            try:
                library = cls(artifact.path, name, artifact.manifest.step.failures)
            except BaseException:  # an interrupt too, at any point of it
                cls._abandon(name, kept)
                raise
            entry = cls._loaded[file] = version, weakref.ref(library)
            # Its functions are called through it only, so that none is called after it is gone.
            weakref.finalize(library, cls._unload, library._handle, kept, _stamp(status), file, entry).atexit = False
            return library

    @classmethod
    def _unload(cls, handle: ctypes.CDLL, kept: int, stamp: object, file: tuple[int, int], entry: object) -> None:
        """Gives back the mappings, the descriptor and, of a file that was deleted, the disk space."""
        with cls._lock:
            if _stamp(os.fstat(kept)) != stamp:
                return  # overwritten in place: what the loader would run to end it may be anything
            _ctypes.dlclose(handle._handle)
            if cls._is_loaded(handle._name):
                return  # all the same, and known by this name
            os.close(kept)
            if cls._loaded.get(file) is entry:
                del cls._loaded[file]

    @classmethod
    def _abandon(cls, name: str, kept: int) -> None:
        """Unloads what was refused, or interrupted, if it was loaded at all. The descriptor is closed only where the
        loader has forgotten the name: another file's descriptor may get its number, and would be answered with this
        code."""
        with contextlib.suppress(OSError):
            handle = _ctypes.dlopen(name, _RTLD_NOLOAD | os.RTLD_NOW)
            _ctypes.dlclose(handle)
            _ctypes.dlclose(handle)  # the one that was loaded: nobody else knows the name
        if not cls._is_loaded(name):
            os.close(kept)

    @staticmethod
    def _is_loaded(name: str) -> bool:
        try:
            _ctypes.dlclose(_ctypes.dlopen(name, _RTLD_NOLOAD | os.RTLD_NOW))
        except OSError:
            return False
        return True

    @property
    def handle(self) -> ctypes.CDLL:
        """The code itself: for checks that call its kernels one by one."""
        return self._handle

    def failure(self, code: int) -> StepError:
        """The error that a step's code is, with what the manifest's `failures` say of it."""
        if 0 < code <= len(self.failures):
            return StepError(self.failures[code - 1])
        return StepError(f"the artifact's step failed with code {code}")

    def measure_limits(self, facts: Sequence[manifest.LimitFacts], threads: int) -> Limits:
        """What the machine can do at most on so many threads, by the functions that `facts` tell of."""
        return measure_limits(load_functions(self._handle, facts), threads)

    def choose_bytes(self, count: int) -> int:
        """Bytes of scratch that a choice among `count` tokens needs."""
        return int(self._choose_bytes(count))

    def start_threads(self, threads: int) -> None:
        """Starts the pool's workers for so many threads now, which inherit the CPUs that this thread may use. Else they
        start when they are first needed."""
        self.hash(np.zeros(0, np.uint8), threads)

    def hash(self, data: NDArray[np.uint8], threads: int) -> NDArray[np.uint64]:
        """The 64-bit hashes of the 4 MiB chunks of `data`. threads: at most so many, in a turn between steps; 0: on
        the calling thread, beside the steps of others. (Artifacts made before that was known take a turn for it.)"""
        out = np.zeros(-(-len(data) // HASH_CHUNK), np.uint64)
        self._hash(address(data), len(data), address(out), threads)
        return out
