"""What the control groups of this process allow it, read from the Linux kernel: CPUs and memory, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_quota(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs that the groups' quotas allow; None when unlimited.

    A group's limit holds for everything below it, so the smallest on the way to the root counts.
    """
    limits = [_quota_of(folder) for folder in _folders(mount, membership, "cpu")]
    return min((limit for limit in limits if limit is not None), default=None)


def free_memory(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that may still be allocated under the groups' limits; None when unlimited.

    Cached files count as used by the group that read them, but are given up before anything is killed.
    """
    limits = [_free_memory_of(folder) for folder in _folders(mount, membership, "memory")]
    return min((limit for limit in limits if limit is not None), default=None)


def _folders(mount: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups and of all groups above them.

    Inside a container the paths in /proc/self/cgroup may be those of the host: then what exists is the mount's root.
    """
    for line in _text(membership).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            roots = [mount]
        elif controller in controllers.split(","):
            roots = [mount / controller, mount / controllers]
        else:
            continue
        for root in roots:
            parts = [part for part in path.split("/") if part]
            folder = root if ".." in parts else root.joinpath(*parts)
            while folder != root:
                yield folder
                folder = folder.parent
            yield root


def _quota_of(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    if not words:
        words = [_text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()]
    try:
        quota, period = int(words[0]), int(words[1])
    except (ValueError, IndexError):
        return None  # "max", or no such file
    return quota / period if quota > 0 and period > 0 else None


def _free_memory_of(folder: Path) -> int | None:
    for limit_file, used_file, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            limit, used = int(_text(folder / limit_file)), int(_text(folder / used_file))
        except ValueError:
            continue  # "max", or no such file
        statistics = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
        cached = sum(
            int(statistics[name])
            for name in (f"{prefix}inactive_file", f"{prefix}active_file")
            if statistics.get(name, "").strip().isdigit()
        )
        return max(0, limit - max(0, used - cached))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
