"""Damaged, foreign and newer artifacts; compiles that are killed, interrupted, or run twice at once."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bad_input_tools as tools
import numpy as np
import pytest
from bad_input_tools import judge, refused

import llmc
from llmc.errors import ArtifactError
from llmc.runtime import manifest
from llmc.runtime.artifact import WEIGHTS, Artifact, Part
from llmc.runtime.library import Library
from llmc.runtime.runtime import Runtime

IDS = [3, 141, 59, 26, 5]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tools.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """No code of an artifact may be loaded."""

    def load(artifact: Artifact) -> Library:
        raise AssertionError(f"the code of {artifact.path} was loaded before the artifact was refused")

    monkeypatch.setattr(Library, "load", load)


def parts() -> list[Part]:
    opened = Artifact.open(tools.artifact())
    opened.close()
    return list(opened.parts.values())


def logits() -> np.ndarray:
    return Runtime.load(tools.artifact(), threads=1).forward(IDS)


# Damage


def flipped_places() -> list[int]:
    """The ELF header, the file's end, and in every part its ends and some places between."""
    size = tools.artifact().stat().st_size
    places = [0, 4, 5, 16, 18, 24, 32, 40, 58, 60, 62, size - 1, size - 8, size - 12, size - 20, size - 48, size - 100]
    for part in parts():
        places += [part.offset + part.extent * step // 8 for step in range(1, 8, 3)] + [part.offset + part.extent - 1]
    return sorted(set(places))


def test_a_flipped_byte_anywhere_is_found_before_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code, tables, texts: before the code is loaded. Weights: before they are used. The file and the part are named,
    and what to do."""
    data = tools.artifact().read_bytes()
    load = Library.load
    places = flipped_places()
    assert len(places) > 30
    for place in places:
        part = next((part for part in parts() if part.offset <= place < part.offset + part.extent), None)
        name = part.name if part else "seal"
        loaded = []
        monkeypatch.setattr(Library, "load", lambda artifact, loaded=loaded: loaded.append(1) or load(artifact))
        # A new file each time: the code of a loaded one lies in memory as it lies in the file.
        path = tmp_path / f"flipped-{place}.so"
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(ArtifactError, match=r"again|not an artifact|Run: llmc compile") as caught:
            Runtime.load(path, threads=1)
            pytest.fail(f"byte {place} of the {name} was not found")
        assert str(path) in str(caught.value)
        assert name == WEIGHTS or not loaded, f"the code was loaded in spite of byte {place} of the {name}"
        path.unlink()


@pytest.mark.parametrize("command", ["run", "inspect", "explain", "bench"])
def test_every_command_refuses_a_damaged_artifact(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = {part.name: part for part in parts()}
    data = tools.artifact().read_bytes()
    place = found[".llmc.manifest"].offset + 100
    path = tmp_path / "bad.so"
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    refused(capfd, rf"{path} is damaged: \.llmc\.manifest.*again", command, path, *(["hi"] if command == "run" else []))


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, no_code: None) -> None:
    data = tools.artifact().read_bytes()
    path = tmp_path / "short.so"
    edges = [edge for part in parts() for edge in (part.offset, part.offset + part.bytes, part.offset + 1)]
    for length in [*range(0, 70, 7), *edges, *range(0, len(data), 9973), len(data) - 48, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"short\.so.*(again|makes one)"):
            Runtime.load(path, threads=1)


NO_ARTIFACTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file; `llmc compile"),
    "empty": (Path.touch, "is empty"),
    "a folder": (Path.mkdir, "is a folder"),
    "text": (lambda path: path.write_text("hello " * 1000), "is not an ELF library"),
    "zeros": (lambda path: path.write_bytes(bytes(10_000)), "is not an ELF library"),
    "a program": (lambda path: tools.copy_of(Path("/bin/true").resolve(), path), "llmc did not make"),
    "with more behind it": (lambda path: path.write_bytes(tools.artifact().read_bytes() + b"\0"), "again"),
    "two in one": (lambda path: path.write_bytes(tools.artifact().read_bytes() * 2), "again"),
}


@pytest.mark.parametrize("name", NO_ARTIFACTS)
def test_what_is_no_artifact_is_refused(
    name: str, tmp_path: Path, no_code: None, capfd: pytest.CaptureFixture[str]
) -> None:
    make, said = NO_ARTIFACTS[name]
    path = tmp_path / "x.so"
    make(path)
    refused(capfd, rf"x\.so.*{said}", "run", path, "hi")


def test_a_damaged_artifact_in_the_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.artifact()
    (tmp_path / "kernels").symlink_to(tools.CACHE / "kernels")
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path))
    llmc.from_hf(tools.model(), calibrate="none")
    (path,) = (tmp_path / "artifacts").iterdir()
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1])
    np.testing.assert_array_equal(llmc.from_hf(tools.model(), calibrate="none").forward(IDS), logits())


# Machines and versions


REBUILD = r"Run: llmc compile \S+ --target native -o \S+good\.so"


def test_a_cpu_without_the_features_is_told_how_to_rebuild(
    monkeypatch: pytest.MonkeyPatch, no_code: None, capfd: pytest.CaptureFixture[str]
) -> None:
    needs = manifest.parse(Artifact.open(tools.artifact())._checked(".llmc.manifest")).target.features
    monkeypatch.setattr("llmc.runtime.cpu.features", lambda: frozenset(needs - {"avx2"}))
    refused(capfd, f"needs avx2, which this CPU does not have. {REBUILD}", "run", tools.artifact(), "hi")


def test_another_architecture_is_told_how_to_rebuild(
    monkeypatch: pytest.MonkeyPatch, no_code: None, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmc.runtime.cpu.architecture", lambda: "riscv64")
    refused(capfd, f"is for .*, and this machine is riscv64. {REBUILD}", "run", tools.artifact(), "hi")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("SCHEMA", 0, "a newer llmc.*again"), ("SCHEMA", 99, "an older llmc.*again"), ("ABI", 0, "ABI.*again")],
)
def test_another_version_is_refused(
    name: str,
    value: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    no_code: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(manifest, name, value)
    refused(capfd, rf"good\.so: .*{said}", "run", tools.artifact(), "hi")


# Compiles that do not end as they should. Code that runs before the command makes it wait at a chosen moment.

_WAIT = "\n    open({flag!r}, 'w').close(); time.sleep(1e6)\n"
MOMENTS = {
    "before the kernels": "import time, llmc.targets.cpu.kernel_cache as c\ndef wait(*_):"
    + _WAIT
    + "c._open_cache = wait",
    "in the kernel cache": "import time, os\ndef wait(*_):" + _WAIT + "os.replace = wait",
    "while linking": "import time, subprocess\ndef wait(*_, **__):" + _WAIT + "subprocess.run = wait",
    "before the artifact is in place": "import time, os\ndef wait(_):" + _WAIT + "os.fsync = wait",
}


def waiting(moment: str, old: Path, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A compile to `old` that has come to the moment, and waits."""
    flag = folder / "here"
    before = MOMENTS[moment].format(flag=str(flag))
    process = tools.start(
        "compile", tools.model(), *tools.QUICK, "-o", old, before=before, TMPDIR=str(folder / "tmp"), **environment
    )
    deadline = time.monotonic() + 600
    while not flag.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.fixture
def old(tmp_path: Path) -> Path:
    for name in ("out", "tmp"):
        (tmp_path / name).mkdir()
    return tools.copy_of(tools.artifact(), tmp_path / "out" / "old.so")


def left_over(folder: Path) -> list[str]:
    """Our temporary files under a folder; other libraries' are not ours."""
    return [str(path) for path in folder.rglob("*") if path.suffix == ".tmp" or "llmc-" in path.name]


@pytest.mark.parametrize("moment", ["while linking", "before the artifact is in place"])
def test_kill_loses_nothing_and_the_next_compile_sweeps_up(
    moment: str, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    process = waiting(moment, old, tmp_path)
    process.kill()
    process.communicate()
    assert left_over(tmp_path), "the process was to be killed in the middle of its work"
    assert old.read_bytes() == tools.artifact().read_bytes()
    np.testing.assert_array_equal(Runtime.load(old, threads=1).forward(IDS), logits())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    status, _, err = tools.run(capfd, "compile", tools.model(), *tools.QUICK, "-o", old)
    assert status == 0, err
    assert left_over(tmp_path) == []
    np.testing.assert_array_equal(Runtime.load(old, threads=1).forward(IDS), logits())


def test_kill_in_the_kernel_cache_leaves_no_broken_kernel(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tools.artifact()
    kernels = tmp_path / "cache" / "kernels"
    kernels.parent.mkdir()
    tools.copy_of(tools.CACHE / "kernels", kernels)
    for path in sorted(kernels.glob("*.o"), key=lambda path: path.stat().st_size)[:2]:
        path.unlink()
    whole = {path: path.read_bytes() for path in kernels.glob("*.o")}
    process = waiting("in the kernel cache", old, tmp_path, LLMC_CACHE_DIR=str(kernels.parent))
    process.kill()
    process.communicate()
    assert {path: path.read_bytes() for path in kernels.glob("*.o") if ".tmp" not in path.name} == whole
    monkeypatch.setenv("LLMC_CACHE_DIR", str(kernels.parent))
    assert tools.run(capfd, "compile", tools.model(), *tools.QUICK, "-o", old)[0] == 0
    np.testing.assert_array_equal(Runtime.load(old, threads=1).forward(IDS), logits())


@pytest.mark.parametrize("moment", ["before the kernels", "before the artifact is in place"])
def test_ctrl_c_ends_at_once_and_leaves_nothing(moment: str, old: Path, tmp_path: Path) -> None:
    process = waiting(moment, old, tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)  # where it waits, it would wait for days
    assert process.returncode == 130
    assert out == ""
    *progress, last = err.splitlines()  # a slow machine hears how far it is
    assert last == "llmc: stopped"
    assert all(line.startswith("llmc: ") and "error" not in line for line in progress), err
    assert left_over(tmp_path) == []
    assert old.read_bytes() == tools.artifact().read_bytes()


def test_two_compiles_of_one_output_both_succeed(old: Path) -> None:
    """The one that ends last wins; their options differ, so that a mixture would show."""
    schemes = ("int4", "int8")
    processes = [tools.start("compile", tools.model(), *tools.QUICK, "-o", old, "-q", scheme) for scheme in schemes]
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    runtime = Runtime.load(old, threads=1)
    options = runtime.manifest.raw["provenance"]["options"]  # type: ignore[call-overload]
    assert options["quantization"] in schemes
    assert np.isfinite(runtime.forward(IDS)).all()


def test_a_limit_on_file_sizes_is_a_full_disk(old: Path) -> None:
    """The kernel ends writes of this process: the whole chain in a process of its own."""
    room = tools.artifact().stat().st_size - 20_000
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"
    process = tools.start("compile", tools.model(), *tools.QUICK, "-o", old, before=code)
    out, err = process.communicate(timeout=600)
    judge(process.returncode, out, err, rf"cannot write {old}: the file would be larger than the system allows")
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert old.read_bytes() == tools.artifact().read_bytes()


def test_a_scratch_folder_of_a_living_process_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.compiler.scratch import scratch_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / "llmc-scratch-dead"
    (dead / "inner").mkdir(parents=True)
    with scratch_folder() as first:
        (first / "file").touch()
        with scratch_folder() as second:
            assert (first / "file").exists()
            assert sorted(tmp_path.iterdir()) == sorted((first, second))
    assert list(tmp_path.iterdir()) == []
    assert not os.path.exists(dead)
