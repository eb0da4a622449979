"""The kernel cache: what an object file depends on names it, and files that nobody uses go."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmc.targets import machine_named
from llmc.targets.cpu import kernel_cache
from llmc.targets.cpu.embedding import EmbeddingQuantized, QuantizedProblem
from llmc.targets.cpu.norms import Norm, NormProblem
from llmc.targets.kernel import Kernel
from llmc.targets.sources import closure, closure_hash

ROOT = Path(__file__).parent.parent
MACHINE = machine_named("x86-64-v3")
EMBEDDING = EmbeddingQuantized(4).kernel(QuantizedProblem(6, 64, True, True, 32, 0, 64, 1.0), MACHINE)
NORM = Norm(4, 4096).kernel(NormProblem("rms", 64, 1e-5), MACHINE)
DAY = 24 * 3600
LOADED = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    for known in [known for known in sys.modules if known.partition(".")[0] == "llmc"]:
        del sys.modules[known]
    importlib.import_module(name)
    found[name] = [known for known in sys.modules if known.partition(".")[0] == "llmc"]
print(json.dumps(found))
"""


def keys(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of an embedding and of a norm, where the rooms are copied to `root`."""

    def locate(name: str) -> Path | None:
        parts = name.split(".")[1:]
        if parts and not (root / parts[0]).exists():
            parts = ["llmc", *parts]
        place = root.joinpath(*parts or ["llmc"])
        return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.exists()), None)

    monkeypatch.setattr(kernel_cache, "closure_hash", lambda name: closure_hash(name, locate))
    return [kernel_cache.cache_key(item, MACHINE) for item in (EMBEDDING, NORM)]


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("compiler/encodings/levels.py", "6: 1 / 2", "6: 1 / 4", (True, True)),  # an architecture's layouts have tables
        ("targets/cpu/embedding.py", '"""', '"""Other words. ', (True, False)),
        ("targets/cpu/rules.py", '"""', '"""Other words. ', (False, False)),
        ("targets/memory.py", '"""', '"""Other words. ', (False, False)),
        ("compiler/passes/fuse_norm.py", '"""', '"""Other words. ', (False, False)),
        ("targets/cpu/vectors.py", '"""', '"""Other words. ', (True, True)),
        ("targets/cpu/codegen.py", '"opt-level": 3', '"opt-level": 2', (True, True)),
        ("targets/cpu/vector_isa.py", '"""', '"""Other words. ', (True, True)),
        ("targets/x86/isa.py", '"""', '"""Other words. ', (True, True)),
        ("targets/x86/features.py", '"""', '"""Other words. ', (True, True)),
        ("targets/cpu/kernel_cache.py", '"""', '"""Other words. ', (False, False)),
    ],
)
def test_a_key_covers_what_a_template_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, changed: tuple[bool, ...]
) -> None:
    for room in ("compiler", "targets", "runtime", "llmc"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    before = keys(tmp_path, monkeypatch)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    after = keys(tmp_path, monkeypatch)
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == changed


def test_no_module_that_is_imported_is_missing() -> None:
    """What importing a template's module brings in is in its closure, packages and what they import included."""
    names = [f"llmc.targets.{name}" for name in ("cpu.embedding", "cpu.plain", "x86.linear_tiles")]
    done = subprocess.run([sys.executable, "-c", LOADED, *names], check=True, capture_output=True, text=True)
    for name, loaded in json.loads(done.stdout).items():
        assert set(loaded) <= set(closure(name)), name


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Symbols of kernels that were compiled, in place of compiling them."""
    found: list[str] = []
    whole = Path(sys.executable).resolve().read_bytes()  # a whole ELF file, whatever is in it

    def code(kernels: list[Kernel], _machine: object) -> bytes:
        found.extend(item.symbol for item in kernels)
        return whole

    monkeypatch.setattr(kernel_cache, "object_code", code)
    return found


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def test_what_is_not_used_for_long_goes_and_what_is_used_stays(tmp_path: Path, compiled: list[str]) -> None:
    embedding, norms = kernel_cache.compile_kernels([EMBEDDING, NORM], MACHINE, tmp_path)
    swept = tmp_path / "swept"
    age(embedding, 31), age(norms, 31), age(swept, 2)
    kernel_cache.compile_kernels([EMBEDDING], MACHINE, tmp_path)
    assert embedding.exists() and not norms.exists()  # the one that is wanted is as good as new
    kernel_cache.compile_kernels([NORM], MACHINE, tmp_path)
    assert compiled == [EMBEDDING.symbol, NORM.symbol, NORM.symbol]
    age(norms, 29), age(swept, 2)
    kernel_cache.compile_kernels([EMBEDDING], MACHINE, tmp_path)
    assert norms.exists()
    age(norms, 31)
    kernel_cache.compile_kernels([EMBEDDING], MACHINE, tmp_path)
    assert norms.exists()  # looked for within a day
    age(swept, 2)
    with swept.open() as file:  # somebody is about to take what is there
        fcntl.flock(file, fcntl.LOCK_SH)
        kernel_cache.compile_kernels([EMBEDDING], MACHINE, tmp_path)
        assert norms.exists()
    kernel_cache.compile_kernels([EMBEDDING], MACHINE, tmp_path)
    assert not norms.exists()
