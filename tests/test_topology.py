"""How many threads a step has by default, on machines that are described in a folder as Linux describes them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import fake_artifact
import pytest

from llmc.cli import doctor
from llmc.runtime import control_groups, cpu, topology


def ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 8} as "0-2,8"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


class FakeMachine:
    """Writes what Linux shows of a machine. cores: the CPUs of each core; nodes: the cores of each NUMA node."""

    def __init__(self, folder: Path, cores: list[list[int]], nodes: list[list[int]] | None = None) -> None:
        self.folder = folder
        self.cpus = frozenset(cpu for core in cores for cpu in core)
        for core in cores:
            for number in core:
                self.write(f"system/cpu/cpu{number}/topology/core_cpus_list", ranges(core))
        for node, members in enumerate(nodes or [list(range(len(cores)))]):
            found = [cpu for core in members for cpu in cores[core]]
            self.write(f"system/node/node{node}/cpulist", ranges(found))

    def write(self, path: str, text: object) -> None:
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n")

    def capacity(self, name: str, cpus: Iterable[int], value: int) -> None:
        for number in cpus:
            self.write(f"system/cpu/cpu{number}/{name}", value)

    def default(self, allowed: Iterable[int] | None = None) -> topology.DefaultThreads:
        cpus = self.cpus if allowed is None else frozenset(allowed)
        found = topology.default_threads(cpus, self.folder)
        assert 1 <= found.threads <= len(cpus)
        assert found.cpus is None or (found.cpus < cpus and len(found.cpus) >= found.threads)
        return found


def two_sockets(folder: Path) -> FakeMachine:
    """Two nodes of 48 cores of two threads each, numbered as Linux does: the second threads come last."""
    return FakeMachine(folder, [[core, core + 96] for core in range(96)], [list(range(48)), list(range(48, 96))])


def test_one_thread_for_each_physical_core_of_one_node(tmp_path: Path) -> None:
    found = two_sockets(tmp_path).default()
    assert found.threads == 48
    assert found.cpus == frozenset([*range(48), *range(96, 144)])  # one each of a core: the scheduler sees to it
    assert found.reason == "the physical cores of NUMA node 0, of 192 CPUs that may be used"


def test_the_node_with_most_cores_that_may_be_used(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    found = machine.default([*range(10), *range(96, 106), *range(60, 80)])  # 10 cores with two threads; 20 with one
    assert (found.threads, found.cpus) == (20, frozenset(range(60, 80)))
    assert found.reason == "the CPUs of NUMA node 1, of 40 CPUs that may be used"
    assert machine.default(range(48, 96)).cpus is None  # `numactl --cpunodebind=1`
    assert machine.default(range(48, 96)).threads == 48


def test_a_few_cores_are_used_whole(tmp_path: Path) -> None:
    """Virtual machines of a few CPUs, whose cores and nodes may be real or not: half of them is much to lose."""
    for cores in range(1, 4):
        found = FakeMachine(tmp_path / str(cores), [[2 * core, 2 * core + 1] for core in range(cores)]).default()
        assert found == topology.DefaultThreads(2 * cores, None, "all CPUs that may be used")
    assert FakeMachine(tmp_path / "4", [[2 * core, 2 * core + 1] for core in range(4)]).default().threads == 4
    nodes = FakeMachine(tmp_path / "nodes", [[core] for core in range(6)], [[0, 1, 2], [3, 4, 5]])
    assert nodes.default() == topology.DefaultThreads(6, None, "all CPUs that may be used")


def test_one_sibling_of_each_core_is_a_core(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, [[2 * core, 2 * core + 1] for core in range(16)])
    assert machine.default().threads == 16
    assert machine.default().cpus is None  # no core is left out
    container = machine.default(range(1, 32, 2))
    assert container == topology.DefaultThreads(16, None, "all CPUs that may be used")


def hybrid(folder: Path) -> FakeMachine:
    """Eight cores of two threads, and sixteen efficiency cores."""
    machine = FakeMachine(folder, [[2 * core, 2 * core + 1] for core in range(8)] + [[16 + core] for core in range(16)])
    machine.write("cpu_core/cpus", "0-15")
    machine.write("cpu_atom/cpus", "16-31")
    machine.capacity("cpu_capacity", range(32), 1024)
    machine.capacity("cpufreq/cpuinfo_max_freq", range(16), 5_000_000)
    machine.capacity("cpufreq/cpuinfo_max_freq", range(16, 32), 4_000_000)
    return machine


@pytest.mark.parametrize(("efficiency", "threads"), [(None, 8), (30, 8), (31, 8), (32, 24), (60, 24)])
def test_cores_of_at_least_half_the_largest_capacity(tmp_path: Path, efficiency: int | None, threads: int) -> None:
    machine = hybrid(tmp_path)
    if efficiency is not None:
        machine.capacity("acpi_cppc/highest_perf", range(14), 63)
        machine.capacity("acpi_cppc/highest_perf", [14, 15], 64)  # the best ones, a little faster
        machine.capacity("acpi_cppc/highest_perf", range(16, 32), efficiency)
    found = machine.default()
    assert (found.threads, found.cpus) == (threads, frozenset(range(16)) if threads == 8 else None)
    words = " with at least half the largest capacity" if threads == 8 else ""
    assert found.reason == f"the physical cores{words}, of 32 CPUs that may be used"
    assert machine.default(range(16, 32)).threads == 16  # none but slow ones may be used


def test_big_and_little_cores(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, [[core] for core in range(8)])
    machine.capacity("cpu_capacity", range(3), 300)
    machine.capacity("cpu_capacity", range(3, 7), 800)
    machine.capacity("cpu_capacity", [7], 1024)
    found = machine.default()
    assert (found.threads, found.cpus) == (5, frozenset(range(3, 8)))
    assert found.reason == "the CPUs with at least half the largest capacity, of 8 CPUs that may be used"
    assert machine.default(range(7)).threads == 4
    assert machine.default(range(3)).threads == 3


def test_cpus_that_are_offline(tmp_path: Path) -> None:
    """Linux lists them nowhere, and keeps a folder for each."""
    cores = [[core, core + 8] if core < 5 else [core] for core in range(8)]
    machine = FakeMachine(tmp_path, cores)
    for number in (13, 14, 15):
        (tmp_path / f"system/cpu/cpu{number}").mkdir()
    assert machine.default().threads == 8


def test_older_kernels_have_another_name_for_siblings(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, [[core, core + 8] for core in range(8)])
    for path in tmp_path.glob("system/cpu/cpu*/topology/core_cpus_list"):
        path.rename(path.with_name("thread_siblings_list"))
    assert machine.default().threads == 8


def test_what_is_not_there_restricts_nothing(tmp_path: Path) -> None:
    cpus = frozenset(range(100, 292))
    nothing = topology.default_threads(cpus, tmp_path / "nowhere")
    assert nothing == topology.DefaultThreads(192, None, "all CPUs that may be used")
    machine = two_sockets(tmp_path)
    for path in tmp_path.glob("system/node/node*/cpulist"):
        path.unlink()
    assert (machine.default().threads, machine.default().cpus) == (96, None)
    machine.write("system/node/node0/cpulist", "0-47")  # and of the others nothing is known
    machine.write("system/node/node1/cpulist", "")  # memory without CPUs
    machine.write("system/node/node2/cpulist", "60-70")
    assert (machine.default().threads, machine.default().cpus) == (96, None)
    machine.capacity("cpu_capacity", range(90), 10)  # so is it of the others' capacity
    assert machine.default().threads == 96


RUBBISH = [
    "",
    "x",
    "-",
    "3-",
    "-3",
    "5-2",
    "5-2,0",
    "0-99999999999999999999",
    "0,,1",
    "0 1",
    "1.5",
    "\u00b2",
    "\x00",
    "9" * 5000,
]


@pytest.mark.parametrize("text", RUBBISH)
def test_what_makes_no_sense_restricts_nothing(tmp_path: Path, text: str) -> None:
    machine = hybrid(tmp_path)
    machine.capacity("acpi_cppc/highest_perf", range(32), 50)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.write_text(text, encoding="utf-8")
    assert machine.default() == topology.DefaultThreads(32, None, "all CPUs that may be used")
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.unlink()
        path.mkdir()
    assert machine.default() == topology.DefaultThreads(32, None, "all CPUs that may be used")


def test_siblings_that_contradict_each_other_are_cores_at_least(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, [[core] for core in range(8)])
    machine.write("system/cpu/cpu0/topology/core_cpus_list", "0-7")
    machine.write("system/cpu/cpu1/topology/core_cpus_list", "5")
    assert machine.default().threads == 8


def test_a_quota_that_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = two_sockets(tmp_path)
    monkeypatch.setattr(cpu, "allowed_cpus", lambda: machine.cpus)
    monkeypatch.setattr(control_groups, "cpu_quota", lambda: 5.5)
    reason = "as many as the control group's quota of CPU time allows"
    assert cpu.default_threads(tmp_path) == topology.DefaultThreads(6, None, reason)
    monkeypatch.setattr(control_groups, "cpu_quota", lambda: 100.0)
    assert cpu.default_threads(tmp_path).threads == 48


# Where the threads run


def test_threads_that_are_started_meanwhile_keep_to_the_cpus() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset([max(before)])
    seen: list[set[int]] = []

    def look() -> None:
        seen.append(os.sched_getaffinity(0))

    with pytest.raises(KeyError), topology.confined(one):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [set(one)]
    assert os.sched_getaffinity(0) == before
    with topology.confined(None):
        assert os.sched_getaffinity(0) == before
    with topology.confined(frozenset([5000])):  # no such CPU
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


CONFINED = """
import os, sys
from llmc.runtime import cpu, topology
from llmc.runtime.runtime import Runtime
before = os.sched_getaffinity(0)
one = frozenset([max(before)])
cpu.default_threads = lambda: topology.DefaultThreads(4, one, "")
expected = Runtime.load(sys.argv[1], threads=1).forward([1, 2, 3])
runtime = Runtime.load(sys.argv[1], threads=int(sys.argv[2]) or None)
assert (runtime.forward([1, 2, 3]) == expected).all()
workers = [int(name) for name in os.listdir("/proc/self/task") if int(name) != os.getpid()]
assert runtime.threads == 4 and len(workers) >= 3
print(os.sched_getaffinity(0) == before, {os.sched_getaffinity(worker) == one for worker in workers})
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
@pytest.mark.parametrize(("threads", "confined"), [(0, True), (4, False)])
def test_the_pool_keeps_to_the_default_cpus_and_to_those_only_by_default(
    tmp_path: Path, threads: int, confined: bool
) -> None:
    path = fake_artifact.write(tmp_path / "model.so")
    command = [sys.executable, "-c", CONFINED, str(path), str(threads)]
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # numpy's own threads are none of the pool's
    done = subprocess.run(command, env=os.environ | one, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == (f"True {{{confined}}}\n", "")


def test_doctor_says_how_many_threads_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "default_threads", lambda: topology.DefaultThreads(48, None, "the reason"))
    found = {finding.name: finding.value for finding in doctor.check_machine()}
    assert found["threads"] == "48 by default: the reason"
