"""Kernels to object files: TIR through TVM's LLVM code generator, cached by content.

The default TVM pipeline wraps every function in the packed calling convention, which checks arguments, needs TVM's
runtime symbols and hides aliasing facts from LLVM. Kernels here are plain C functions, so the pipeline below stops
before that: it lowers buffers, vectors and unrolled loops, and emits the function as it stands.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import CompileError
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine
from llmc.targets.stack import check_stack

if TYPE_CHECKING:
    import tvm


_TEMPORARY = ".tmp.o"
_STALE_SECONDS = 3600  # no kernel takes this long to compile


@functools.cache
def source_hash() -> str:
    """A hash of every source file of this room: a changed template never meets an old object file."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cache_key(kernel: Kernel, machine: Machine) -> str:
    """What an object file depends on: template sources, parameters, machine, TVM version."""
    text = "\0".join((source_hash(), kernel.symbol, machine.key, metadata.version("apache-tvm")))
    return hashlib.sha256(text.encode()).hexdigest()


def llvm_target(machine: Machine) -> tvm.target.Target:
    """TVM's target for a CPU machine."""
    import tvm

    facts: dict[str, object] = {"kind": "llvm", "mcpu": machine.mcpu, "opt-level": 3}
    return tvm.target.Target(facts)


def build_module(kernel: Kernel, machine: Machine) -> tvm.runtime.Module:
    """Generate code for one kernel. The module's `inspect_source("ll" or "asm")` shows it."""
    return _build([kernel], machine)


def _build(kernels: Iterable[Kernel], machine: Machine) -> tvm.runtime.Module:
    """Generate code for kernels with different symbols, as one module."""
    import tvm
    from tvm import tirx

    target = llvm_target(machine)
    functions, names = {}, {}
    for item in kernels:
        names[item.symbol] = item.describe()
        function = item.template(machine, **dict(item.params))
        attributes = {"global_symbol": item.symbol, "target": target, "tirx.noalias": True}
        functions[item.symbol] = function.with_attr(attributes)
    passes = [
        tirx.transform.StmtSimplify(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.BF16StorageLegalize(),
        tirx.transform.LowerIntrin(),
    ]
    with target:
        module = tvm.transform.Sequential(passes)(tvm.IRModule(functions))
        for symbol, name in names.items():
            check_stack(name, module[symbol])
        return tvm.get_global_func("target.build.llvm")(module, target)


def object_code(kernels: Iterable[Kernel], machine: Machine) -> bytes:
    """One object file with several kernels, past the cache: half the time of one file each where kernels are small."""
    return _object_code(_build({item.symbol: item for item in kernels}.values(), machine))


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
    missing = [(item, path) for item, path in zip(wanted, paths, strict=True) if not is_whole(path)]
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
    keep_object(path, _object_code(build_module(item, machine)))


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


def _object_code(module: tvm.runtime.Module) -> bytes:
    """The object file of a module, by way of memory: LLVM ends the process when a disk that it writes to is full."""
    handle = os.memfd_create("llmc-object")
    try:
        module.write_to_file(f"/proc/self/fd/{handle}", "o")
        return os.pread(handle, os.fstat(handle).st_size, 0)
    finally:
        os.close(handle)


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
