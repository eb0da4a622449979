"""Limits of control groups: the smallest on the way to the root counts; rubbish and absence mean no limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.runtime import control_groups, cpu


def write(root: Path, files: dict[str, str], membership: str) -> tuple[Path, Path]:
    mount = root / "cgroup"
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text + "\n")
    (root / "self").write_text(membership + "\n")
    return mount, root / "self"


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({}, "", None),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 4.0),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "800000 100000"}, "0::/a/b", 4.0),
        ({"cpu.max": "200000 100000"}, "0::/path/of/the/host", 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", None),
        ({"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/x", 0.5),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", 3.0),
        ({"cpu.max": "rubbish"}, "0::/\nrubbish\n::::", None),
        ({"cpu.max": "100000 100000"}, "0::/../../escape", 1.0),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, files: dict[str, str], membership: str, expected: float | None
) -> None:
    assert control_groups.cpu_quota(*write(tmp_path, files, membership)) == expected


STAT = "anon 5\ninactive_file 30\nactive_file 20\nslab 9"
STAT_1 = "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20"


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({}, "0::/", None),
        ({"memory.max": "max", "memory.current": "10"}, "0::/", None),
        ({"memory.max": "1000", "memory.current": "400"}, "0::/", 600),
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": STAT}, "0::/", 650),
        ({"memory.max": "1000", "memory.current": "2000"}, "0::/", 0),
        ({"a/memory.max": "1000", "a/memory.current": "100", "a/b/memory.max": "max"}, "0::/a/b", 900),
        (
            {
                "memory/x/memory.limit_in_bytes": "500",
                "memory/x/memory.usage_in_bytes": "200",
                "memory/x/memory.stat": STAT_1,
            },
            "4:memory:/x",
            350,
        ),
        ({"memory.max": "rubbish", "memory.current": "1", "memory.stat": "\n\nx"}, "0::/", None),
    ],
)
def test_free_memory_of_control_groups(
    tmp_path: Path, files: dict[str, str], membership: str, expected: int | None
) -> None:
    assert control_groups.free_memory(*write(tmp_path, files, membership)) == expected


def test_what_this_process_may_use_is_within_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited_memory, unlimited_threads = cpu.available_memory(), cpu.available_threads()
    monkeypatch.setattr(control_groups, "free_memory", lambda: 12345)
    monkeypatch.setattr(control_groups, "cpu_quota", lambda: 0.5)
    assert cpu.available_memory() == 12345 < unlimited_memory
    assert cpu.available_threads() == 1 <= unlimited_threads
    monkeypatch.setattr(control_groups, "cpu_quota", lambda: 1e9)
    assert cpu.available_threads() == unlimited_threads
