"""Options and settings that all tests share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import hypothesis
import pytest

# Models that tests write would draw bars into the error output that tests read.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Deterministic, and nothing that depends on time: the machines that run this are shared.
hypothesis.settings.register_profile(
    "llmc",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("llmc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected halves of tests/golden/*.llmc")
    parser.addoption(
        "--device", choices=("host", "apart"), default="host", help="where models run: tests/apart_device.py"
    )


@pytest.fixture(autouse=True, scope="session")
def chosen_device(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--device") == "apart":
            import apart_device

            apart_device.use_apart(patch.setitem)
        yield


@pytest.fixture(autouse=True)
def no_progress_of_slow_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log hears of work that takes long: on a busy machine of any, and tests read logs."""
    monkeypatch.setattr("llmc.cli.output._QUIET_SECONDS", math.inf)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite golden files instead of comparing with them."""
    return bool(request.config.getoption("--update-golden"))
