"""The checks of `llmc doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from llmc.cli.output import size
from llmc.errors import LlmcError
from llmc.files import cache_folder
from llmc.runtime import cpu

_RUNTIME = ("numpy", "tokenizers", "jinja2")
_COMPILING = ("apache-tvm", "torch", "transformers", "safetensors", "ml_dtypes", "huggingface-hub")
_LEAST_FREE = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ok False: something does not work without it; fix: what to do about it."""

    name: str
    value: str
    ok: bool = True
    fix: str | None = None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def check_machine() -> list[Finding]:
    """Every finding, in the order in which a person would ask."""
    checks: list[Callable[[], list[Finding]]] = [_python, _packages, _linker, _processor, _memory, _caches]
    return [finding for check in checks for finding in check()]


def targets() -> list[str]:
    """Names for --target."""
    from llmc.targets import machine_names

    return machine_names()


def _python() -> list[Finding]:
    import llmc

    enough = sys.version_info >= (3, 10)
    return [
        Finding("llmc", f"{llmc.__version__} in {Path(llmc.__file__).parent}"),
        Finding("python", platform.python_version(), enough, None if enough else "use Python 3.10 or newer"),
    ]


def _packages() -> list[Finding]:
    found = [_package(name, "not installed", False, "pip install llmc") for name in _RUNTIME]
    missing = "not installed: this machine runs models, and cannot compile them"
    return found + [_package(name, missing, True, "pip install 'llmc[compile]'") for name in _COMPILING]


def _package(name: str, missing: str, ok: bool, fix: str) -> Finding:
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, missing, ok, fix)


def _linker() -> list[Finding]:
    path = shutil.which("gcc")
    if path is None:
        fix = "install gcc (Debian, Ubuntu: apt install gcc); it links what is compiled"
        return [Finding("gcc", "not found", False, fix)]
    try:
        first = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout.partition("\n")[
            0
        ]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("gcc", f"{path} does not run: {error}", False, "install gcc again")]
    return [Finding("gcc", first)]


def _processor() -> list[Finding]:
    from llmc.targets import machine_named

    used = cpu.available_threads()
    total = os.cpu_count() or used
    cores = f"{used} of {total} (cpuset and cgroup quota)" if used < total else str(used)
    try:
        machine = machine_named("native")
    except LlmcError as error:
        return [Finding("cpu", platform.machine(), False, str(error)), Finding("cores", cores), _threads()]
    caches = " + ".join(size(count) for count in (machine.l1_bytes, machine.l2_bytes, machine.l3_bytes))
    return [
        Finding("cpu", f"{_model_name()} ({cpu.architecture()})"),
        Finding("native target", f"{machine.mcpu}, {machine.vector_bits}-bit vectors, caches {caches}"),
        Finding("features", " ".join(sorted(machine.features))),
        Finding("cores", cores),
        _threads(),
    ]


def _threads() -> Finding:
    default = cpu.default_threads()
    return Finding("threads", f"{default.threads} by default: {default.reason}")


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _memory() -> list[Finding]:
    return [Finding("free memory", size(cpu.available_memory()))]


def _caches() -> list[Finding]:
    root = cache_folder()
    used = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) if root.is_dir() else 0
    existing = root
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        return [Finding("cache", f"{root} cannot be written", False, "set LLMC_CACHE_DIR to a folder that can be")]
    free = shutil.disk_usage(existing).free
    fix = (
        None if free >= _LEAST_FREE else f"little space is left: remove {root}, or set LLMC_CACHE_DIR to another folder"
    )
    return [Finding("cache", f"{root}: {size(used)} used, {size(free)} free", True, fix)]
