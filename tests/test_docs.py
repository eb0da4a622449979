"""Documentation says what is true: commands parse, Python compiles and names exist, links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import llmc
from llmc.cli.app import command

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md"])
USERS = (ROOT / "README.md", ROOT / "docs" / "users.md")


def commands_in(page: Path) -> list[str]:
    """Lines of indented blocks that call llmc."""
    lines = re.findall(r"^    (.*\bllmc .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [line[line.index("llmc ") :] for line in lines if not line.lstrip().startswith(("#", ".venv"))]


@pytest.mark.parametrize("page", USERS, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    found = commands_in(page)
    assert len(found) >= 4
    for line in found:
        _, name, *rest = shlex.split(line, comments=True)
        command().commands[name].make_context(name, rest)  # a usage error if an option or an argument is wrong


def test_every_command_is_documented() -> None:
    for page in USERS:
        text = page.read_text(encoding="utf-8")
        assert [name for name in command().commands if f"llmc {name}" not in text] == []


@pytest.mark.parametrize("page", USERS, ids=lambda page: page.name)
def test_python_compiles_and_uses_what_there_is(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "llmc":
                assert all(hasattr(llmc, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"llmc": llmc, "model": llmc.Runtime, "Runtime": llmc.Runtime}.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(program: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.getbasetemp() / "examples-cache"  # shared: the model is compiled once
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        env={**os.environ, "LLMC_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_the_glossary_defines_each_word_once_and_is_linked() -> None:
    glossary = ROOT / "docs" / "glossary.md"
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", glossary.read_text(encoding="utf-8"), re.MULTILINE)
    words = [word.strip() for row in rows if row != "word" for word in row.split(",")]
    assert len(words) == len(set(words))
    assert {"tile", "block", "part", "unit", "chunk", "row", "slot", "page", "split", "panel", "group", "form", "step",
            "run"} <= set(words)  # fmt: skip
    for page in ("architecture.md", "contributing.md"):
        assert "](glossary.md)" in (ROOT / "docs" / page).read_text(encoding="utf-8")
