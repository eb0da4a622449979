"""The thread pool: every unit runs once, on any number of threads; no race, no leak of workers, no death by fork."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
import time
from importlib import resources
from pathlib import Path

import fake_artifact
import numpy as np
import pytest

from llmc.runtime import cpu
from llmc.runtime.runtime import Runtime

HERE = Path(__file__).parent
SANITIZERS = {
    "plain": ["-O3"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
SHORT_TAGS = "-DLLMC_POOL_TAG_BITS=3"  # slices are set back after every seventh loop, and not after 16 million


POOL = ["pool_check.c", "pool.c", "hash.c"]
KINDS = [pytest.param(kind, marks=[] if kind == "plain" else [pytest.mark.slow]) for kind in SANITIZERS]


def check(
    programs: list[str], kind: str, compiler: str, folder: Path, *arguments: str, flags: tuple[str, ...] = ()
) -> str:
    """Builds a checking program with C code of the runtime and runs it: it exits 0, and says nothing on stderr, where
    all holds. Returns what it prints."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not here")
    sources = Path(str(resources.files("llmc.runtime.csrc")))
    binary = folder / "check"
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", *SANITIZERS[kind], *flags, f"-I{sources}"]
    parts = [str((sources if (sources / name).exists() else HERE) / name) for name in programs]
    command += [*parts, "-o", str(binary), "-lpthread", "-lm", "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and kind != "plain" and "cannot find" in built.stderr:
        pytest.skip("the sanitizer's library is not installed")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(binary), *arguments], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_unit_runs_once_and_nothing_races(tmp_path: Path, kind: str, compiler: str) -> None:
    check(POOL, kind, compiler, tmp_path, *(["fork"] if kind == "plain" else []))


@pytest.mark.parametrize("kind", KINDS)
def test_every_unit_runs_once_when_the_tags_of_slices_come_again(tmp_path: Path, kind: str) -> None:
    check(POOL, kind, "gcc", tmp_path, *(["fork"] if kind == "plain" else []), flags=(SHORT_TAGS,))


@pytest.mark.parametrize("flags", [(), ("-DLLMC_POOL_GROUP=2", "-DLLMC_POOL_TAG_BITS=2")], ids=["real", "small"])
def test_every_unit_runs_once_under_drawn_schedules(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Any thread may be held up at any access to what they share, for longer than a loop."""
    programs = ["pool_schedule_check.c", "pool.c"]
    check(programs, "plain", "gcc", tmp_path, "3000", flags=(*flags, "-DLLMC_POOL_TOUCH=schedule"))


def test_the_cost_of_a_loop_does_not_grow_with_the_square_of_the_threads(tmp_path: Path) -> None:
    """Cache lines that move between threads in a loop. Where each thread looks at all others they are N * N; at a word
    that all threads write to, the last one waits for 2 * N transfers."""
    programs = ["pool_touch_check.c", "pool.c"]
    flags = ("-DLLMC_POOL_TOUCH=count_touch",)
    counts = check(programs, "plain", "gcc", tmp_path, "2", "8", "32", "96", flags=flags).split()
    for threads, uneven, moved, taken in zip(*[map(float, counts)] * 4, strict=True):
        growth = threads * math.log2(threads)
        assert moved < 8 * growth + (16 * threads if uneven else 0), counts
        assert uneven or taken < 24, counts


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("kind", KINDS)
def test_choices_hold_their_promises_and_nothing_races(tmp_path: Path, kind: str, compiler: str) -> None:
    rounds = {"plain": 100, "address": 3000, "thread": 1000}
    check(["choose_check.c", "choose.c", "pool.c"], kind, compiler, tmp_path, str(rounds[kind]))


def workers() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fake_artifact.write(tmp_path / "model.so")


def test_artifacts_share_one_pool(path: Path, tmp_path: Path) -> None:
    """A second artifact starts no threads of its own, whichever code made the pool."""
    ids = list(range(40))
    first = Runtime.load(path, threads=3)
    first.forward(ids)
    before = workers()
    changed = fake_artifact.STEP.replace("+ weights[v]", "+ 1u + weights[v]")
    second = Runtime.load(fake_artifact.write(tmp_path / "second.so", source=changed), threads=3)
    assert (second.forward(ids) != first.forward(ids)).any()
    assert workers() == before


def test_threads_that_step_at_once_take_turns(path: Path) -> None:
    runtime = Runtime.load(path, threads=2)
    prompts = [[seed, *range(60)] for seed in range(6)]
    expected = [fake_artifact.reference_logits(prompt) for prompt in prompts]
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(20) if (runtime.forward(prompts[index]) != expected[index]).any())

    callers = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


FORK = """
import os, sys
import numpy as np
from llmc.runtime.runtime import Runtime
runtime = Runtime.load(sys.argv[1], threads=3)
expected = runtime.forward(list(range(40)))
child = os.fork()
same = (runtime.forward(list(range(40))) == expected).all()
if child == 0:
    os._exit(0 if same and len(os.listdir("/proc/self/task")) == 3 else 1)
assert same
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_starts_its_own_workers(path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK, str(path)], check=True, timeout=600)


def is_asleep(task: Path) -> bool:
    """Whether a thread waits for something, rather than for a processor."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_idle_workers_sleep(path: Path) -> None:
    runtime = Runtime.load(path, threads=4)
    runtime.forward(list(range(40)))
    assert workers() >= 4
    others = [path for path in Path("/proc/self/task").iterdir() if path.name != str(threading.get_native_id())]
    while not all(is_asleep(path) for path in others):  # one that spins for ever never is
        time.sleep(0.01)


def test_the_result_does_not_depend_on_threads(path: Path) -> None:
    ids = np.random.default_rng(3).integers(0, fake_artifact.VOCAB, 129).tolist()
    expected = fake_artifact.reference_logits(ids)
    for threads in (1, 2, 7, 40):
        assert (Runtime.load(path, threads=threads).forward(ids) == expected).all()


# How many threads there are to use


def test_threads_follow_the_cpus_of_the_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpu.available_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_features_have_llvm_names() -> None:
    flags = {"avx512_vnni", "avx512f", "avx_vnni", "sse4_1", "pni", "bmi1", "abm", "avx512_bf16", "amx_int8", "f16c"}
    assert cpu.llvm_features(flags, "x86_64") == {
        *("avx512vnni", "avx512f", "avxvnni", "sse4.1", "sse3", "bmi", "lzcnt", "avx512bf16", "amx-int8", "f16c")
    }
    assert cpu.llvm_features({"asimd", "asimddp", "i8mm", "sve2"}, "aarch64") == {"neon", "dotprod", "i8mm", "sve2"}
    assert cpu.features()
