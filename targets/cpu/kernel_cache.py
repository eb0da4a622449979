"""Object files of kernels, kept in a folder by what they depend on; those that nobody uses any more go."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from llmc.errors import CompileError
from llmc.targets.cpu.codegen import object_code
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine
from llmc.targets.sources import closure_hash

_GENERATOR = object_code.__module__
_TEMPORARY = ".tmp.o"
_STALE_SECONDS = 3600  # no kernel takes this long to compile
_UNUSED_SECONDS = 30 * 24 * 3600  # an object file goes when nothing was linked with it for so long
_SWEEP_SECONDS = 24 * 3600  # how often they are looked for
_SWEPT = "swept"  # a file whose time is that of the last look; locked by who looks, and shared by who takes


def cache_key(kernel: Kernel, machine: Machine) -> str:
    """What an object file depends on: its template and how code is made of it, with all that these import, parameters,
    machine, TVM version."""
    named = (f"llmc.targets.{machine.arch}.{name}" for name in ("isa", "features"))  # found by their names
    sources = map(closure_hash, (*kernel.modules, _GENERATOR, *named))
    text = "\0".join((*sources, kernel.symbol, machine.key, metadata.version("apache-tvm")))
    return hashlib.sha256(text.encode()).hexdigest()


def compile_kernels(
    kernels: Iterable[Kernel],
    machine: Machine,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    jobs: int = 1,
) -> list[Path]:
    """Object files for these kernels, in order, from the cache where they are there. `progress(done, total)`.

    Files are written beside their place and renamed, so that several compiles may share a cache.
    """
    wanted = list(kernels)
    _open_cache(cache)
    paths = [cache / f"{cache_key(item, machine)}.o" for item in wanted]
    there = take_objects(cache, paths)
    _sweep(cache)
    missing = [(item, path) for item, path in zip(wanted, paths, strict=True) if path not in there]
    done = len(wanted) - len(missing)
    if progress is not None:
        for count in range(done):
            progress(count + 1, len(wanted))
    if not missing:
        return paths
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        for _ in pool.map(lambda job: _compile(job[0], job[1], machine), missing):
            done += 1
            if progress is not None:
                progress(done, len(wanted))
    return paths


def _compile(item: Kernel, path: Path, machine: Machine) -> None:
    keep_object(path, object_code([item], machine))


def keep_object(path: Path, data: bytes) -> None:
    """Write an object file into the cache, so that no other compile sees a part of it."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=_TEMPORARY)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise _refuse_cache(path.parent, error) from error


def _open_cache(cache: Path) -> None:
    """Makes the cache folder, and removes what compiles that were killed long ago have left in it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for stale in cache.glob(f"*{_TEMPORARY}"):
            with contextlib.suppress(FileNotFoundError):  # its writer, or another sweep, was faster
                if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                    stale.unlink()
    except OSError as error:
        raise _refuse_cache(cache, error) from error


def take_objects(cache: Path, paths: Iterable[Path]) -> set[Path]:
    """Which of these object files are there, to the last byte. They stay for as long as a compile may need them."""
    with _lock(cache, fcntl.LOCK_SH):
        there = {path for path in paths if is_whole(path)}
        for path in there:
            with contextlib.suppress(PermissionError):  # another user's
                os.utime(path)
    return there


def _sweep(cache: Path) -> None:
    """Removes object files that were not taken for long; now and then, and not while some are being taken."""
    now = time.time()
    with contextlib.suppress(FileNotFoundError):
        if 0 <= now - (cache / _SWEPT).stat().st_mtime < _SWEEP_SECONDS:
            return
    with _lock(cache, fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
        if locked is None:
            return
        os.utime(locked)
        for path in cache.glob("*.o"):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if now - path.stat().st_mtime > _UNUSED_SECONDS:
                    path.unlink()


@contextlib.contextmanager
def _lock(cache: Path, kind: int) -> Iterator[int | None]:
    """The cache's lock, as its descriptor; None where it is held by others (LOCK_NB) or cannot be had, as in a folder
    that only others may write to."""
    try:
        descriptor = os.open(cache / _SWEPT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, kind)
        except OSError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _refuse_cache(cache: Path, error: OSError) -> CompileError:
    return CompileError(
        f"the kernel cache {cache} cannot be written ({error.strerror}): "
        "free some space there, or set LLMC_CACHE_DIR to another folder"
    )


def is_whole(path: Path) -> bool:
    """Whether an object file is there to its last byte: a crash of the machine may leave an empty or shorter one."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    # ELF64: the table of sections, which LLVM writes last.
    (start,) = struct.unpack_from("<Q", header, 0x28)
    entry, count = struct.unpack_from("<HH", header, 0x3A)
    return bool(start > 0 and start + entry * count <= size)
