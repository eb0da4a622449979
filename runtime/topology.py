"""How many threads a step has by default, and on which CPUs: from cores, capacities and memory nodes as Linux has them.

A step reads all weights once, so memory is the limit, which few threads of a node reach; and every loop ends when the
last thread does. So (docs/adr/0016): the CPUs of one NUMA node, without those that are less than half as fast as the
fastest, and one thread for each physical core. What cannot be read, or makes no sense, restricts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

DEVICES = Path("/sys/devices")
# With fewer cores every CPU counts: half of them is much to lose where a virtual machine shows cores and nodes that are
# not there.
LEAST_CORES = 4
_RANGE = re.compile("([0-9]{1,5})(?:-([0-9]{1,5}))?")


@dataclass(frozen=True)
class DefaultThreads:
    """threads: how many. cpus: where the pool's threads may run, None for all CPUs of the process: fewer only where
    other nodes or slow cores are left out, as the scheduler itself puts one thread on each core. reason: in words."""

    threads: int
    cpus: frozenset[int] | None
    reason: str


def default_threads(allowed: frozenset[int], devices: Path = DEVICES) -> DefaultThreads:
    """What the CPUs that this process may use, `allowed`, are best used for. devices: the folder as Linux has it."""
    fast = _fast(allowed, devices)
    core = {cpu: _core(cpu, devices) for cpu in fast}
    node, chosen = _largest_node(fast, core, devices)
    cores = len({core[cpu] for cpu in chosen})
    threads = cores if cores >= LEAST_CORES else len(chosen)
    if threads == len(allowed):
        return DefaultThreads(threads, None, "all CPUs that may be used")
    reason = "the physical cores" if threads < len(chosen) else "the CPUs"
    if node is not None:
        reason += f" of NUMA node {node}"
    if fast != allowed:
        reason += " with at least half the largest capacity"
    reason += f", of {len(allowed)} CPUs that may be used"
    return DefaultThreads(threads, chosen if chosen != allowed else None, reason)


@contextmanager
def confined(cpus: frozenset[int] | None) -> Iterator[None]:
    """Lets this thread, and those that it starts meanwhile, run on these CPUs only. They keep that, it does not."""
    before: set[int] | None = None
    if cpus is not None:
        with suppress(OSError, AttributeError):  # a sandbox may refuse: then they run anywhere
            own = os.sched_getaffinity(0)
            os.sched_setaffinity(0, cpus)
            before = own
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError):  # CPUs that were taken away meanwhile
                os.sched_setaffinity(0, before)


def _fast(cpus: frozenset[int], devices: Path) -> frozenset[int]:
    """The CPUs of at least half the largest capacity, by the first source that tells CPUs apart.

    Intel's hybrids may have the same `cpu_capacity` everywhere, and clocks do not tell how much a core does in a cycle:
    where nothing else is known, their efficiency cores count as slow.
    """
    folder = devices / "system/cpu"
    performance, efficiency = _numbers(devices / "cpu_core/cpus"), _numbers(devices / "cpu_atom/cpus")
    for name in ("cpu_capacity", "acpi_cppc/highest_perf", "cpufreq/cpuinfo_max_freq"):
        if name.startswith("cpufreq") and performance and efficiency:
            return cpus & performance or cpus
        capacity = {cpu: _number(folder / f"cpu{cpu}" / name) for cpu in cpus}
        if 0 not in capacity.values() and len(set(capacity.values())) > 1:
            largest = max(capacity.values())
            return frozenset(cpu for cpu in cpus if 2 * capacity[cpu] >= largest)
    return cpus


def _core(cpu: int, devices: Path) -> int:
    """The first CPU of the core that a CPU is of: itself, where that is not known."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        siblings = _numbers(devices / "system/cpu" / f"cpu{cpu}" / "topology" / name)
        if siblings and cpu in siblings:
            return min(siblings)
    return cpu


def _largest_node(cpus: frozenset[int], core: dict[int, int], devices: Path) -> tuple[int | None, frozenset[int]]:
    """The node with the most physical cores, the first of several, and its CPUs; no node and all CPUs where they are of
    one node only, or of very small ones, or not all of any."""
    nodes = {}
    for path in sorted((devices / "system/node").glob("node[0-9]*")):
        found = _numbers(path / "cpulist")
        if path.name[4:].isdecimal() and found and found & cpus:
            nodes[int(path.name[4:])] = found & cpus
    if len(nodes) < 2 or frozenset().union(*nodes.values()) != cpus:
        return None, cpus
    cores = {node: len({core[cpu] for cpu in members}) for node, members in nodes.items()}
    node = min(nodes, key=lambda number: (-cores[number], number))
    return (node, nodes[node]) if cores[node] >= LEAST_CORES else (None, cpus)


def _numbers(path: Path) -> frozenset[int] | None:
    """A list such as "0-3,8"; None where there is none."""
    found: set[int] = set()
    for part in _text(path).split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            return None
        begin, end = int(match[1]), int(match[2] or match[1])
        if begin > end:
            return None
        found.update(range(begin, end + 1))
    return frozenset(found)


def _number(path: Path) -> int:
    """0 where there is none."""
    text = _text(path)
    return int(text) if text.isdecimal() and len(text) < 16 else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
