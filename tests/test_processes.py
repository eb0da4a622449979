"""Processes and threads: forks while others work, what is given back when a model is dropped, what holds the lock."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from fake_kinds import write_arrays, write_encoder
from watched import Run, watch, watching

from llmc.runtime import cpu
from llmc.runtime.artifact import Artifact
from llmc.runtime.errors import ArtifactError, RuntimeStateError
from llmc.runtime.fork_lock import LIBRARIES, STEPS, TOKENIZER, ForkLock
from llmc.runtime.library import Library, Step
from llmc.runtime.runtime import Runtime
from llmc.runtime.sequence import Sequence

# A child that hangs is ended by the alarm, long after any that works. Threads of the parent are known to be at work
# when the event is set; from then on they never pause.
PREPARE = """
import os, signal, sys, threading
import numpy as np
from llmc.runtime.runtime import Runtime
path, threads = sys.argv[1], 3
runtime = Runtime.load(path, threads=2)
ones = np.ones((3, 3), np.float32)
calls = {
    "generate": lambda: runtime.generate("hello", max_tokens=5),
    "encode": lambda: runtime.encode(["hello", "good bye"]),
    "run": lambda: runtime.run({"x": ones, "y": np.ones((3, 2), int), "half": ones}),
}
call = calls[runtime.task]
expected = repr(call())
started, over = threading.Event(), threading.Event()
def work():
    while not over.is_set():
        call()
        started.set()
workers = [threading.Thread(target=work) for _ in range(threads)]
for worker in workers:
    worker.start()
started.wait()
"""
FORKS = (
    PREPARE
    + """
def child():
    signal.alarm(500)
    same = repr(call()) == expected
    os._exit(0 if same else 3)
statuses = []
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        child()
    statuses.append(os.waitpid(pid, 0)[1])
over.set()
for worker in workers:
    worker.join()
assert statuses == [0] * 8, statuses
assert repr(call()) == expected
"""
)
POOL = (
    PREPARE
    + """
import multiprocessing
def answer(_):
    signal.alarm(500)
    return repr(call())
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert set(pool.map_async(answer, range(4)).get(500)) == {expected}
over.set()
for worker in workers:
    worker.join()
"""
)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("processes")
    return {
        "generate": fake_artifact.write(folder / "decoder.so"),
        "encode": write_encoder(folder / "encoder.so"),
        "run": write_arrays(folder / "arrays.so"),
    }


@pytest.mark.parametrize("kind", ["generate", "encode", "run"])
def test_children_of_a_busy_process_work(kinds: dict[str, Path], kind: str) -> None:
    subprocess.run([sys.executable, "-c", FORKS, str(kinds[kind])], check=True, timeout=600)


def test_a_pool_of_forked_processes_works(kinds: dict[str, Path]) -> None:
    subprocess.run([sys.executable, "-c", POOL, str(kinds["generate"])], check=True, timeout=600)


def forked(work: object) -> int:
    """The exit status of a child that calls `work`; 14 where it hung."""
    import signal

    pid = os.fork()
    if pid == 0:
        signal.alarm(500)
        try:
            work()  # type: ignore[operator]
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("rank", [STEPS, TOKENIZER, LIBRARIES])
def test_a_fork_waits_for_the_holder_of_a_lock(rank: int) -> None:
    lock, inside, leave = ForkLock(rank), threading.Event(), threading.Event()
    done: list[str] = []

    def hold() -> None:
        with lock:
            inside.set()
            leave.wait()
            done.append("whole")

    def check() -> None:
        with lock:
            assert done == ["whole"]

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    threading.Timer(0.01, leave.set).start()
    assert forked(check) == 0
    holder.join()
    with lock:
        assert forked(check) == 0  # the thread that forks may hold it: it is in the child too


def test_a_lock_that_a_fork_did_not_get_is_an_error_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = ForkLock(STEPS)
    lock.lose()
    with pytest.raises(RuntimeStateError, match=r"forked in the middle of a step.*load the model again"), lock:
        pass


def belongings() -> tuple[int, int]:
    """Open descriptors and mappings of files that have names ending in .so or (deleted)."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")), sum(line.endswith((".so", "(deleted)")) for line in lines)


@pytest.mark.parametrize("kind", ["generate", "encode", "run"])
def test_what_a_model_took_is_given_back(kinds: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Descriptors, mappings and the disk space of deleted files; without waiting for a collection of garbage."""
    keep = Runtime.load(kinds["generate"], threads=1)  # the first: the pool's workers run in its code
    before = None
    for index in range(4):
        path = tmp_path / f"{index}.so"
        shutil.copy(kinds[kind], path)
        runtime = Runtime.load(path, threads=2)
        if kind == "encode":
            runtime.encode(["hello"])
        elif kind == "generate":
            runtime.generate("hello", max_tokens=2)
        path.unlink()
        del runtime
        found = belongings()
        before = before or found
        assert found == before
    assert keep.generate("hello", max_tokens=3)


def test_a_dropped_model_may_be_written_over_and_loaded_again(kinds: dict[str, Path], tmp_path: Path) -> None:
    keep = Runtime.load(kinds["generate"], threads=1)
    path = tmp_path / "model.so"
    shutil.copy(kinds["generate"], path)
    first = Runtime.load(path, threads=1)
    again = Runtime.load(path, threads=1)
    del first
    assert (again.forward([5]) == fake_artifact.reference_logits([5])).all()  # one of two is left: the code stays
    del again
    changed = fake_artifact.STEP.replace("+ weights[v]", "+ 1u + weights[v]")
    path.write_bytes(fake_artifact.write(tmp_path / "other.so", source=changed).read_bytes())
    assert (Runtime.load(path, threads=1).forward([5]) != fake_artifact.reference_logits([5])).any()
    assert (keep.forward([5]) == fake_artifact.reference_logits([5])).all()


@pytest.mark.parametrize(
    ("function", "error", "told"),
    [
        ("llmc_run", KeyboardInterrupt, None),
        ("llmc_pool_use", KeyboardInterrupt, None),
        ("llmc_choose", AttributeError, "lacks a function"),
    ],
)
def test_code_that_was_not_taken_never_answers_for_other_code(
    kinds: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: type,
    told: str | None,
) -> None:
    """The next file may get the same descriptor, by whose number the loader knows code."""

    class Failing(ctypes.CDLL):
        def __getattr__(self, name: str) -> object:
            if name == function:
                raise error(name)
            return super().__getattr__(name)

    keep = Runtime.load(kinds["generate"], threads=1)
    changed = fake_artifact.STEP.replace("+ weights[v]", "+ 1u + weights[v]")
    paths = [tmp_path / "refused.so", fake_artifact.write(tmp_path / "next.so", source=changed)]
    shutil.copy(kinds["generate"], paths[0])
    before = belongings()
    with monkeypatch.context() as patch, closing(Artifact.open(paths[0])) as artifact:
        patch.setattr("llmc.runtime.library.ctypes.CDLL", Failing)
        with pytest.raises(ArtifactError if told else error, match=told):
            Library.load(artifact)
    del artifact
    assert belongings() == before
    assert (Runtime.load(paths[1], threads=1).forward([5]) != fake_artifact.reference_logits([5])).any()
    assert (keep.forward([5]) == fake_artifact.reference_logits([5])).all()


@pytest.mark.parametrize(
    ("said", "flag", "advice"),
    [
        ("failed to map segment from shared object", os.ST_NOEXEC, "mounted noexec.*copy it to another place"),
        ("failed to map segment from shared object", 0, "Compile it again"),
        ("cannot open shared object file: Too many open files", 0, "raise the limit"),
    ],
)
def test_code_that_cannot_be_loaded_says_why(
    kinds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, flag: int, advice: str
) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: {said}")

    path = tmp_path / "model.so"
    shutil.copy(kinds["generate"], path)
    monkeypatch.setattr("llmc.runtime.library.ctypes.CDLL", refuse)
    monkeypatch.setattr(os, "statvfs", lambda _: type("Flags", (), {"f_flag": flag}))
    with pytest.raises(ArtifactError, match=advice):
        Runtime.load(path, threads=1)


def test_a_processor_that_cannot_be_asked_is_no_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RuntimeStateError, match=r"/proc/cpuinfo cannot be read .Too many open files"):
        cpu.features.__wrapped__()


# Threads

IDS = list(range(40))
TOKEN = np.array([7], np.int32)


# Functions of the session layer that change what all sequences share, or run steps.
DECODING = {"sequence", "fork", "end", "rollback", "adopt", "feed_begin", "feed_step", "feed_end", "write"}
TOUCHING = {*DECODING, "encode_step"}


def guard(runtime: Runtime, used: list[str]) -> None:
    """From now on, steps and the session layer insist on the lock; `used` has the names of the calls that were made."""

    def guarded(function: Callable[..., object], name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            assert runtime.lock.held, f"{name} without the lock"
            used.append(name)
            return function(*arguments)

        return call

    if runtime.caller.layer is not None:
        calls = runtime.caller.layer._call
        calls.update({name: guarded(calls[name], name) for name in TOUCHING if name in calls})
    watch(runtime, lambda run: guarded(run, "run"))  # type: ignore[arg-type, return-value]


def decodes(runtime: Runtime) -> None:
    def prompt() -> Sequence:
        sequence = runtime.sequence()
        sequence.append(IDS)
        return sequence

    first = prompt()
    runtime.step([(first, [1], "all")])
    runtime.step_last([(first, TOKEN), (prompt(), TOKEN)])
    runtime.decode([first], [3])
    other = first.fork()
    runtime.decode([first, other], [3, 4])
    other.rollback(12)
    other.close()
    runtime.sequence().adopt_prefix(IDS)
    runtime.collect_orphans()
    runtime.forward(IDS)
    runtime.generate("hello", max_tokens=3)
    runtime.generate_batch(["hello", "good bye"], max_tokens=3, temperature=1.0)
    stream = runtime.stream("hello", max_tokens=9)
    next(stream)
    stream.close()
    runtime.chat("hello", max_tokens=3)


CALLS: dict[str, Callable[[Runtime], object]] = {
    "generate": decodes,
    "encode": lambda runtime: runtime.encode(["hello", "good bye"]),
    "run": lambda runtime: runtime.run(
        {"x": np.ones((3, 3), np.float32), "y": np.ones((3, 2), int), "half": np.ones((3, 3), np.float32)}
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_every_method_holds_the_lock_while_it_touches_what_is_shared(kinds: dict[str, Path], kind: str) -> None:
    runtime = Runtime.load(kinds[kind], threads=1)
    used: list[str] = []
    guard(runtime, used)
    CALLS[kind](runtime)
    assert not runtime.lock.held
    assert set(used) == {"run", *{"generate": DECODING, "encode": {"encode_step"}, "run": set()}[kind]}


@pytest.mark.parametrize("method", ["decode", "step_last"])
def test_steps_of_other_threads_do_not_change_an_answer(kinds: dict[str, Path], method: str) -> None:
    """Threads that decode and never look at their logits, beside one whose logits are compared."""
    runtime = Runtime.load(kinds["generate"], threads=2)
    over, failed = threading.Event(), list[BaseException]()

    def work(seed: int) -> None:
        try:
            sequence = runtime.sequence()
            sequence.append([seed])
            while not over.is_set():
                if method == "decode":
                    runtime.decode([sequence], [seed])
                else:
                    runtime.step_last([(sequence, TOKEN)])
                if len(sequence) > 300:
                    sequence.rollback(299)
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for worker in workers:
        worker.start()
    expected = fake_artifact.reference_logits(IDS)
    wrong = sum(bool((runtime.forward(IDS) != expected).any()) for _ in range(150))
    over.set()
    for worker in workers:
        worker.join()
    assert (wrong, failed) == (0, [])
    runtime.pool.check()


def hold(sequence: Sequence) -> Generator[None, None, None]:
    with sequence:
        yield


def test_garbage_may_be_collected_in_the_middle_of_a_step(kinds: dict[str, Path]) -> None:
    """A stream in a circle of references is closed whenever garbage is collected, in a thread that has the lock too."""
    runtime = Runtime.load(kinds["generate"], threads=1)
    first = runtime.sequence()
    first.append(IDS)
    kept = first.fork()

    def collecting(run: Run) -> Run:
        def call(step: Step) -> None:
            gc.collect()
            run(step)
            gc.collect()

        return call

    def leave_in_a_circle(sequence: Sequence) -> None:
        circle: list[object] = [hold(sequence)]
        next(circle[0])  # type: ignore[call-overload]
        circle.append(circle)

    gc.disable()
    try:
        leave_in_a_circle(first.fork())
        with watching(runtime, collecting):
            first.append(IDS)
    finally:
        gc.enable()
    assert len(runtime.orphans) == 1
    runtime.collect_orphans()
    first.close()
    assert [runtime.pool.users[page] for page in kept.pages.tolist()] == [1, 1]
    kept.close()
    runtime.pool.check()
    assert runtime.pool.available == runtime.pool.capacity


def test_a_model_may_be_collected_before_its_streams(kinds: dict[str, Path]) -> None:
    """All of it in one circle of garbage: whatever is finalized first, nothing asks a closed layer for anything."""
    runtime = Runtime.load(kinds["generate"], threads=1)
    stream, sequence = runtime.stream("hello", max_tokens=50), runtime.sequence()
    next(stream)
    sequence.append(IDS)
    circle: list[object] = [hold(sequence), stream, runtime]
    next(circle[0])  # type: ignore[call-overload]
    circle.append(circle)
    runtime.circle = circle  # type: ignore[attr-defined]
    layer = weakref.ref(runtime.layer)
    del runtime, stream, sequence, circle
    gc.collect()
    assert layer() is None


def test_an_interrupt_in_a_step_leaves_sequences_as_they_were(kinds: dict[str, Path]) -> None:
    """Also one that comes before the runtime could say that it gives up what has not run."""
    runtime = Runtime.load(kinds["generate"], threads=1)
    sequence = runtime.sequence()
    sequence.append(IDS)
    before = runtime.pool.available

    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    with watching(runtime, lambda run: interrupt):
        for use in (lambda: sequence.append(IDS), lambda: runtime.generate("hello", max_tokens=3)):
            with pytest.raises(KeyboardInterrupt):
                use()
    runtime.layer.begin([(sequence.place, np.arange(90, dtype=np.int32), 90)])  # and nobody comes back for it
    assert (sequence.append([1]) == fake_artifact.reference_logits([*IDS, 1])[-1]).all()
    assert runtime.pool.available == before
    runtime.pool.check()


def test_a_stream_is_closed_by_another_thread(kinds: dict[str, Path]) -> None:
    """One that is in the middle of a token makes no other, and gives its pages back."""
    runtime = Runtime.load(kinds["generate"], threads=1)
    stream = runtime.stream("hello", max_tokens=300)
    inside, closed = threading.Event(), threading.Event()

    def slow(run: Run) -> Run:
        def call(step: Step) -> None:
            run(step)
            if len(stream.tokens) == 3:
                inside.set()
                closed.wait(60)

        return call

    watch(runtime, slow)
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.append("".join(stream)))
    reader.start()
    assert inside.wait(60)
    stream.close()
    closed.set()
    reader.join()
    assert (len(stream.tokens), stream.finish_reason, len(texts)) == (4, None, 1)
    assert runtime.pool.available == runtime.pool.capacity
    runtime.pool.check()
