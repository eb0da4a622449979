"""Options and settings that all tests share."""

from __future__ import annotations

import os

import hypothesis
import pytest

# Models that tests write would draw bars into the error output that tests read.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Deterministic, and with no deadline: the machines that run this are shared.
hypothesis.settings.register_profile("llmc", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("llmc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected halves of tests/golden/*.llmc")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite golden files instead of comparing with them."""
    return bool(request.config.getoption("--update-golden"))
