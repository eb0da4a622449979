"""From a program to the loadable part of an artifact: object files and the step driver, linked by the C compiler."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from llmc.compiler.progress import Progress
from llmc.errors import CompileError
from llmc.targets.call_facts import call_costs
from llmc.targets.cpu.c_compiler import compiler_command
from llmc.targets.cpu.driver import generate_step
from llmc.targets.cpu.kernel_cache import compile_kernels, keep_object, take_objects
from llmc.targets.cpu.limits import limit_kernels
from llmc.targets.cpu.system_needs import least_glibc
from llmc.targets.kernel import Kernel
from llmc.targets.lowering import Program
from llmc.targets.machine import Machine
from llmc.targets.target import Addresses, Library

# What the runtime calls (pool.h, choose.h, layer.h), or C programs (llmc.h). Beside these an artifact exports its
# kernels, which `llmc compile --check` calls one by one, and the limit kernels; everything else is its own.
INTERFACE = (
    "llmc_abi", "llmc_adapt", "llmc_adapter_begin", "llmc_adapter_end", "llmc_adapter_users", "llmc_adopt",
    "llmc_api", "llmc_choose", "llmc_choose_bytes", "llmc_close", "llmc_encode_fitting", "llmc_encode_step",
    "llmc_end", "llmc_error", "llmc_feed_begin", "llmc_feed_end", "llmc_feed_left", "llmc_feed_step", "llmc_fork",
    "llmc_hash", "llmc_layer_drop_kept", "llmc_layer_open", "llmc_layer_pages", "llmc_pool_create", "llmc_pool_use",
    "llmc_rollback", "llmc_run", "llmc_sequence", "llmc_write",
)  # fmt: skip

# All artifacts have the same function names, and a process may hold several of them, in one namespace (RTLD_GLOBAL, or
# one program linked with two). -Bsymbolic: what an artifact calls is its own, whatever was loaded before it. relro and
# now: nobody writes over its table of functions later on. No `-z nodelete`: a dropped artifact gives back its memory
# and the disk space of its file; the one whose code the pool's workers run keeps itself loaded (pool.c).
_LINKER = ("-Wl,-Bsymbolic", "-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,--build-id=none")


def kernels_of(program: Program) -> list[Kernel]:
    """Every kernel that a program calls, once, in first-use order."""
    found: dict[str, Kernel] = {}
    for lowered in program.ops:
        for call in lowered.calls:
            found.setdefault(call.kernel.symbol, call.kernel)
    return list(found.values())


def device() -> str:
    """CPUs are the host's: see `runtime/devices.py`."""
    return "host"


def check_tools(machine: Machine) -> None:
    """CompileError where there is no C compiler: said before the work, not after it."""
    compiler_command(machine)


def build_library(
    program: Program, addresses: Addresses, cache: Path, folder: Path, progress: Progress, jobs: int = 1
) -> Library:
    """Compile what the cache does not have, generate the driver and link; `folder` holds the intermediate files."""
    check_tools(program.machine)
    limits = limit_kernels(program.machine)
    kernels = [*kernels_of(program), *(item.kernel for item in limits)]
    progress.start("compiling kernels", len(kernels), "kernels")
    objects = compile_kernels(kernels, program.machine, cache, lambda _done, _total: progress.advance(), jobs)
    progress.start("linking")
    source, calls = generate_step(program, addresses)
    driver = folder / "step.c"
    _write(driver, source)
    output = folder / "library.so"
    runtime = c_sources()
    # The driver is long and only calls: -O1 takes a third of the time.
    compiled = [*objects, folder / "step.o", *runtime_objects(program.machine, runtime, cache, folder)]
    _run(program.machine, "-O1", "-c", str(driver), "-o", str(folder / "step.o"), f"-I{runtime}")
    # Object files go through a response file: a long command line may be refused.
    listing = folder / "objects.txt"
    _write(listing, "\n".join(f'"{path}"' for path in compiled))
    linking = link_options([*INTERFACE, *(item.symbol for item in kernels)], folder)
    _run(program.machine, "-o", str(output), f"@{listing}", *linking)
    costs, facts = call_costs(program), [asdict(item.facts) for item in limits]
    return Library(output, calls, source, costs, facts, least_glibc(output))


def c_sources() -> Path:
    """The folder of the runtime's C code."""
    import llmc.runtime.csrc

    return Path(llmc.runtime.csrc.__path__[0])


def link_options(exported: Iterable[str], folder: Path) -> list[str]:
    """What the C compiler makes an artifact's library with. exported: names (`*` allowed) that others may call."""
    script = folder / "exports.map"
    _write(script, "{ global: " + " ".join(f"{name};" for name in exported) + " local: *; };\n")
    # libdl: a part of libc since glibc 2.34.
    return ["-shared", f"-Wl,--version-script={script}", *_LINKER, "-lm", "-ldl"]


def runtime_objects(machine: Machine, runtime: Path, cache: Path, folder: Path) -> list[Path]:
    """Object files of the runtime's own C code, the same in every artifact: from the cache where they are there.

    They depend on the sources and on the compiler: its command, and the file that it is.
    """
    command = compiler_command(machine)
    compiler = Path(shutil.which(command[0]) or command[0]).resolve()
    about = compiler.stat()
    digest = hashlib.sha256("\0".join([*command, str(compiler), str(about.st_size), str(about.st_mtime_ns)]).encode())
    for source in sorted((*runtime.glob("*.c"), *runtime.glob("*.h"))):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    found = []
    for source in sorted(runtime.glob("*.c")):
        kept = cache / f"{source.stem}-{digest.hexdigest()}.o"
        if not take_objects(cache, [kept]):
            made = folder / f"{source.stem}.o"
            _run(machine, "-O3", "-c", str(source), "-o", str(made))  # the pool hashes weights: -O3 vectorises that
            keep_object(kept, made.read_bytes())
        found.append(kept)
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise CompileError(
            f"cannot write {path} ({error.strerror}): free some space there, or set TMPDIR to another folder"
        ) from error


def _run(machine: Machine, *arguments: str) -> None:
    """One run of the C compiler; CompileError has its first complaint."""
    command = [*compiler_command(machine), "-fPIC", "-std=gnu11", "-pthread", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"the C compiler {command[0]} cannot be run: {error.strerror}") from error
    if result.returncode:
        raise CompileError(
            f"the C compiler {command[0]} failed with exit code {result.returncode}: {_reason(result.stderr)}; "
            "`llmc doctor` tries it"
        )


def _reason(said: str) -> str:
    """The line of a compiler's or linker's output that says most."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line or "cannot" in line or "not recognized" in line]
    own = [line for line in telling if not line.startswith("collect2:")]  # gcc's word for "the linker failed"
    return next(iter([*own, *telling, *lines[-1:]]), "it said nothing")[:300]
