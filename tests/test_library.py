"""The runtime's own C code is compiled once for a compiler, not once a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import llmc.targets.cpu.library as library
from llmc.targets import machine_named

MACHINE = machine_named("native")
RUNTIME = library.c_sources()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that the compiler was run for."""
    found: list[str] = []
    real = library._run

    def run(machine: library.Machine, *arguments: str) -> None:
        found.append(Path(arguments[2]).name)
        real(machine, *arguments)

    monkeypatch.setattr(library, "_run", run)
    return found


def test_objects_are_kept_and_mended(runs: list[str], tmp_path: Path) -> None:
    sources = sorted(path.name for path in RUNTIME.glob("*.c"))
    first = library.runtime_objects(MACHINE, RUNTIME, tmp_path, tmp_path)
    assert runs == sources and all(path.parent == tmp_path for path in first)
    whole = first[0].read_bytes()
    assert library.runtime_objects(MACHINE, RUNTIME, tmp_path, tmp_path) == first
    assert runs == sources
    first[0].write_bytes(whole[:-1])  # a machine that crashed
    library.runtime_objects(MACHINE, RUNTIME, tmp_path, tmp_path)
    assert runs == [*sources, sources[0]] and first[0].read_bytes() == whole


def test_other_sources_and_other_compilers_have_objects_of_their_own(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "runtime"
    changed.mkdir()
    for path in (*RUNTIME.glob("*.c"), *RUNTIME.glob("*.h")):
        shutil.copy(path, changed)
    first = library.runtime_objects(MACHINE, changed, tmp_path, tmp_path)
    header = changed / "pool.h"
    header.write_text(header.read_text() + "\n// more\n")
    second = library.runtime_objects(MACHINE, changed, tmp_path, tmp_path)
    monkeypatch.setenv("CC", f"{library.compiler_command(MACHINE)[0]} -DOTHER=1")
    third = library.runtime_objects(MACHINE, changed, tmp_path, tmp_path)
    assert len({*first, *second, *third}) == len(runs) == 3 * len(first)
