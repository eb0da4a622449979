"""What a wheel of this project holds: every room, every C file, and metadata that is true."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("pip._vendor.tomli")

ROOT = Path(__file__).parent.parent
ROOMS = ("compiler", "frontends", "targets", "runtime")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources() -> set[str]:
    """Every source file of the package, named as it is imported."""
    found = {f"llmc/{path.relative_to(ROOT / 'llmc')}" for path in (ROOT / "llmc").rglob("*.py")}
    for room in ROOMS:
        for pattern in ("*.py", "*.c", "*.h", "py.typed"):
            found |= {f"llmc/{room}/{path.relative_to(ROOT / room)}" for path in (ROOT / room).rglob(pattern)}
    return {name for name in found if "__pycache__" not in name}


def test_every_package_is_listed() -> None:
    """setuptools takes no package that pyproject.toml does not name; a new folder must be added there."""
    folders = {name.rpartition("/")[0].replace("/", ".") for name in sources() if name.endswith("/__init__.py")}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_c_files_lie_in_packages() -> None:
    packages = set(PROJECT["tool"]["setuptools"]["packages"])
    for name in sources():
        assert name.rpartition("/")[0].replace("/", ".") in packages, name


def test_the_runtime_does_not_depend_on_the_compiler() -> None:
    needed = {text.split(">")[0].split("=")[0].split("<")[0] for text in PROJECT["project"]["dependencies"]}
    assert needed.isdisjoint({"apache-tvm", "torch", "transformers", "safetensors", "onnx"})
    pinned = {text for text in PROJECT["project"]["optional-dependencies"]["compile"] if "==" in text}
    assert {text.split("==")[0] for text in pinned} >= {"apache-tvm", "torch"}


@pytest.mark.slow
def test_a_wheel_holds_everything(tmp_path: Path) -> None:
    """Built from a copy of what git has, or would have: a stray build folder must not help."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not in a git checkout")
    tree = tmp_path / "tree"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("llmc-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_string(archive.read(f"{folder}/METADATA").decode())
    assert sources() <= names
    assert {name for name in names if not name.startswith(("llmc/", folder))} == set()
    assert metadata["Name"] == "llmc"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/NOTICE", f"{folder}/entry_points.txt"} <= names


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_readme_starts_with_its_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line.strip() for line in lines if line.strip().startswith("make ")][:2]
    assert [command.split()[:2] for command in commands] == [["make", "demo"], ["make", "test"]]
    assert lines.index(next(line for line in lines if line.strip().startswith("make "))) <= 4


def test_the_example_says_where_it_comes_from() -> None:
    folder = ROOT / "examples" / "pycoder"
    assert "PSF License" in (folder / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "heldout.txt",
    }
