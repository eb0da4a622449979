"""The C session layer (llmc.h) over a step that is known exactly: random calls by several threads, under sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_pool import KINDS, check

from llmc.targets.cpu.library import c_sources

ROUNDS = {"plain": 300, "address": 2000, "thread": 500}
SOURCES = sorted(path.name for path in c_sources().glob("*.c"))


@pytest.mark.parametrize("state", ["paged", "stateless", "regimes"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_are_what_was_fed_and_nothing_races(tmp_path: Path, kind: str, compiler: str, state: str) -> None:
    programs = ["session_check.c", *SOURCES]
    flags = {"paged": (), "stateless": ("-DSTATELESS",), "regimes": ("-DREGIMES",)}[state]
    check(programs, kind, compiler, tmp_path, str(ROUNDS[kind]), flags=flags)
