"""Golden files: IR text, a pipeline, and the IR text that comes out, with what was refused and why.

tests/golden/NAME.llmc is the input, with a line `# pipeline: ...`, then a line `# ---`, then what is expected. After
a change that is meant, `pytest tests/test_golden.py --update-golden` rewrites the expected halves: read the diff.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from pass_harness import run_checked

from llmc.compiler.ir.text import parse, print_graph
from llmc.compiler.passes.manager import PASSES, parse_pipeline

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.llmc"))
_SEPARATOR = "# ---\n"
_PIPELINE = "# pipeline:"


@dataclass(frozen=True)
class Golden:
    """A golden file, taken apart."""

    source: str
    pipeline: str
    expected: str

    @classmethod
    def read(cls, path: Path) -> Golden:
        source, separator, expected = path.read_text().partition(_SEPARATOR)
        lines = [line for line in source.splitlines() if line.startswith(_PIPELINE)]
        assert len(lines) == 1, f"{path.name} needs one line {_PIPELINE!r}"
        assert separator or not expected, f"{path.name} needs a line {_SEPARATOR!r}"
        return cls(source, lines[0].removeprefix(_PIPELINE).strip(), expected)


def outcome(golden: Golden) -> str:
    """Refusals as comments, then the graph after the pipeline, checked against the graph before it."""
    after, reports = run_checked(parse(golden.source), golden.pipeline)
    refused = [f"# refused by {r.name}: {what}: {why}\n" for r in reports for what, why in r.refusals]
    return "".join(dict.fromkeys(refused)) + print_graph(after)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_pipeline_gives_the_expected_text(path: Path, update_golden: bool) -> None:
    golden = Golden.read(path)
    found = outcome(golden)
    if update_golden:
        path.write_text(golden.source + _SEPARATOR + found)
        return
    assert found == golden.expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_both_halves_survive_a_round_trip(path: Path) -> None:
    golden = Golden.read(path)
    for text in (golden.source, golden.expected):
        printed = print_graph(parse(text))
        assert print_graph(parse(printed)) == printed
        # A file says what the printer would say, but for its comments.
        assert [line for line in text.splitlines() if line and not line.startswith("#")] == printed.splitlines()


def test_every_pass_stands_in_a_golden_file() -> None:
    passes = {item.name for path in FILES for item in parse_pipeline(Golden.read(path).pipeline)}
    assert passes == set(PASSES)


def test_a_golden_file_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "wrong.llmc"
    path.write_text(FILES[0].read_text().replace(_SEPARATOR, _SEPARATOR + "# something else\n"))
    golden = Golden.read(path)
    assert outcome(golden) != golden.expected
