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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process, as they share what fixtures compile, but for those that say otherwise."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite golden files instead of comparing with them."""
    return bool(request.config.getoption("--update-golden"))
