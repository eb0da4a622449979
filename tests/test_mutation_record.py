"""The arguments why mutants are equivalent are about the code that is there."""

from __future__ import annotations

from pathlib import Path

import mutation_record
import pytest

BLOCK = """[compiler/example.py]
- if a > 1:
+ if a >= 1:
+ if a != 0:
= a is even
"""


def test_a_block_has_lines_and_an_argument() -> None:
    (block,) = mutation_record.parse(BLOCK, "example.txt")
    assert block == mutation_record.Equivalent(
        "compiler/example.py", "if a > 1:", ("if a >= 1:", "if a != 0:"), "a is even"
    )
    assert mutation_record.reasons([block])["compiler/example.py", "if a > 1:", "if a != 0:"] == "a is even"


@pytest.mark.parametrize(
    "text",
    [
        "- if a > 1:\n+ if a >= 1:\n= no module\n",
        "[a.py]\n+ if a >= 1:\n",
        "[a.py]\n- if a > 1:\n= nothing changed\n",
        "[a.py]\n- if a > 1:\n+ if a >= 1:\n= \n",
        "[a.py]\n- if a > 1:\n+ if a >= 1:\n",
        "[a.py]\nsome words\n",
    ],
)
def test_what_is_out_of_place_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"example\.txt"):
        mutation_record.parse(text, "example.txt")


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("for a, b in zip(x, y, strict=True):", "for a, b in zip(x, y, strict=False):", True),
        ("for a, b in parts(x, y, strict=True):", "for a, b in parts(x, y, strict=False):", False),
        ("return x.reshape(-1, n - 1)", "return x.reshape(~1, n - 1)", True),
        ("return x.reshape(-1, n-1)", "return x.reshape(- 2, n-1)", True),
        ("return x.reshape(-1, n-1)", "return x.reshape(-1, n- 2)", False),
        ("return x.reshape(-1, 2)", "return x.reshape(+1, 2)", False),
        ("return x[-1]", "return x[- 2]", False),
    ],
)
def test_some_changes_are_the_same_everywhere(before: str, after: str, same: bool) -> None:
    assert bool(mutation_record.reason({}, "compiler/example.py", before, after)) == same


def test_a_line_that_is_gone_makes_its_block_stale(tmp_path: Path) -> None:
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler" / "example.py").write_text("    if a > 1:\n        pass\n")
    blocks = mutation_record.parse(BLOCK, "example.txt")
    assert mutation_record.stale(blocks, tmp_path) == []
    (tmp_path / "compiler" / "example.py").write_text("    if a > 2:\n        pass\n")
    assert mutation_record.stale(blocks, tmp_path) == ["compiler/example.py: if a > 1:"]


def test_no_argument_is_about_code_that_is_gone() -> None:
    assert mutation_record.stale(mutation_record.load()) == []
