"""Weights that are checked and copied beside the first steps: damage is never missed, and answers never change."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from fake_kinds import write_arrays, write_encoder
from large_weights import IDS, NBYTES, RIGHT, Gate, flip, load_later, place_of, write
from test_weights_memory import in_file

from llmc.compiler.encodings import GroupQuantized
from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Tensor
from llmc.runtime import cpu, verified
from llmc.runtime import manifest as facts
from llmc.runtime import weights as module
from llmc.runtime.artifact import HASH_CHUNK, Artifact
from llmc.runtime.device import Buffer, Use
from llmc.runtime.errors import ArtifactError, RuntimeStateError
from llmc.runtime.host import Host
from llmc.runtime.library import Library
from llmc.runtime.runtime import Runtime


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("loading") / "model.so")


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load_later(monkeypatch, tmp_path)


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    """A copy, which a test may damage before it is loaded."""
    shutil.copy(made, tmp_path / "model.so")
    return tmp_path / "model.so"


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "worth_copying", lambda _: True)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.opened.set()


def records(tmp_path: Path) -> int:
    folder = tmp_path / "cache" / "verified"
    return len(list(folder.iterdir())) if folder.exists() else 0


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llmc-loading"]


def test_steps_run_before_the_weights_are_checked(path: Path, gate: Gate, tmp_path: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    runtime = Runtime.load(path, threads=2)
    gate.arrived.wait()
    assert (runtime.forward(IDS) == RIGHT).all()
    assert not runtime.verified
    assert records(tmp_path) == 0
    gate.opened.set()
    assert runtime.wait_verified()
    assert runtime.verified
    runtime.finish_loading()
    assert (gate.pieces, records(tmp_path), loading_threads()) == (4, 1, [])
    own = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread: no other's is changed
    assert own == before
    assert gate.niceness == {min(19, own + 10)}
    assert (runtime.forward(IDS) == RIGHT).all()


@pytest.mark.usefixtures("copying")
def test_steps_go_on_in_the_copy(path: Path, gate: Gate) -> None:
    runtime = Runtime.load(path, threads=2)
    gate.arrived.wait()
    place = runtime.caller.step.weights
    assert in_file(runtime.weights)
    with runtime.sequence() as sequence:
        first = sequence.append(IDS[:10])
        gate.opened.set()
        runtime.finish_loading()
        rest = runtime.step([(sequence, IDS[10:], "all")])
    assert (first == RIGHT[9]).all()
    assert (rest == RIGHT[10:]).all()
    weights = runtime.weights
    assert not in_file(weights)
    assert not weights.flags.writeable
    assert runtime.caller.step.weights == weights.__array_interface__["data"][0] != place
    offset, _ = place_of(path)
    assert weights.tobytes() == path.read_bytes()[offset : offset + NBYTES]
    assert runtime.verified


@pytest.mark.usefixtures("copying", "gate")
def test_memory_that_a_copy_will_take_is_not_given_to_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, extent = place_of(path)
    page = Artifact.open(path).manifest.bytes_per_page
    for free, copied, pages in ((2 * 50 * page, False, 50), (2 * 50 * page + extent, True, 50), (extent, True, 13)):
        monkeypatch.setattr(cpu, "available_memory", lambda free=free: free)
        monkeypatch.setattr(module, "worth_copying", lambda _, copied=copied: copied)
        assert Runtime.load(path, threads=1).pool.capacity == pages


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("place", [0, 299, HASH_CHUNK - 1, HASH_CHUNK, 2 * HASH_CHUNK + 77, NBYTES - 1, -1])
def test_damage_is_refused(path: Path, place: int, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once where that is asked for, with the first steps elsewhere, and at once by the next load."""
    monkeypatch.setattr(module, "worth_copying", lambda _: copied)
    offset, extent = place_of(path)
    flip(path, offset + place % extent)
    runtime = Runtime.load(path, threads=1)
    for wait in (runtime.wait_verified, runtime.finish_loading, lambda: runtime.forward(IDS)):
        for _ in range(2):
            with pytest.raises(ArtifactError, match=r"model\.so is damaged: \.llmc\.weights is not what was written"):
                wait()
    assert not runtime.verified
    for verify in (None, True, None):
        with pytest.raises(ArtifactError, match="is damaged"):
            Runtime.load(path, threads=1, verify=verify)
    assert Runtime.load(path, threads=1, verify=False).forward([1]).shape == (1, fake_artifact.VOCAB)


def test_a_stream_ends_with_the_damage(path: Path, gate: Gate) -> None:
    flip(path, place_of(path)[0] + 5 * 1000 * 1000)
    runtime = Runtime.load(path, threads=1)
    stream = runtime.stream("hello", max_tokens=40)
    next(stream)
    gate.opened.set()
    runtime._weights.join()
    with pytest.raises(ArtifactError, match="is damaged"):
        next(stream)
    with pytest.raises(ArtifactError, match="is damaged"):
        runtime.generate_batch(["a", "b"], max_tokens=3)
    assert runtime.pool.available == runtime.pool.capacity
    runtime.pool.check()


def test_a_file_that_was_found_right_is_not_hashed_again(
    path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.opened.set()
    Runtime.load(path, threads=1).finish_loading()
    pieces = gate.pieces
    for copied in (False, True):
        monkeypatch.setattr(module, "worth_copying", lambda _, copied=copied: copied)
        again = Runtime.load(path, threads=1)
        assert again.verified
        again.finish_loading()
        assert again.verified
        assert in_file(again.weights) is not copied
        assert (again.forward(IDS) == RIGHT).all()
    assert gate.pieces == pieces


def test_a_check_at_once_is_remembered_and_made_in_any_case(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checks: list[int] = []
    real = Library.hash
    monkeypatch.setattr(Library, "hash", lambda *given: checks.append(given[2]) or real(*given))
    for count in (1, 2):
        assert Runtime.load(path, threads=2, verify=True).verified
        assert checks == [2] * count
    assert records(tmp_path) == 1
    assert Runtime.load(path, threads=2).verified
    assert not Runtime.load(path, threads=2, verify=False).wait_verified()
    assert checks == [2, 2]


@pytest.mark.parametrize("restored", [False, True])
def test_a_file_that_is_damaged_after_it_was_found_right_is_refused(path: Path, restored: bool) -> None:
    """By another process, in place, and with its time of writing put back."""
    runtime = Runtime.load(path, threads=1)
    runtime.finish_loading()
    del runtime  # nothing of it is loaded: its code may be written over
    before = path.stat()
    time.sleep(0.05)  # as above: ticks
    flip(path, place_of(path)[0] + NBYTES // 2)
    if restored:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match="is damaged"):
        Runtime.load(path, threads=1).finish_loading()


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(path: Path, gate: Gate, tmp_path: Path) -> None:
    runtime = Runtime.load(path, threads=1)
    gate.arrived.wait()
    time.sleep(0.05)
    path.chmod(0o600)
    gate.opened.set()
    runtime.finish_loading()
    assert runtime.verified
    assert records(tmp_path) == 0


def test_a_file_that_was_just_written_is_not_remembered(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another write within the same tick would leave no trace in its times."""
    monkeypatch.setattr(verified, "_LEAST_AGE", 1e9)
    for verify in (None, True):
        runtime = Runtime.load(path, threads=1, verify=verify)
        runtime.finish_loading()
        assert runtime.verified
    assert records(tmp_path) == 0


def test_a_cache_that_cannot_be_written_is_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE_DIR", str(path))
    for _ in range(2):
        runtime = Runtime.load(path, threads=1)
        runtime.finish_loading()
        assert runtime.verified


# Weights that steps look places up with


ENCODING = GroupQuantized(4, 32)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_plain_integers_may_be_indices(dtype: str) -> None:
    """As `compiler/ir/ranges.py` has it, which believes what such weights hold."""
    for shape in ((), (3,), (4, 64)):
        plain, encoded = Tensor(shape, dtype), Tensor(shape, dtype, ENCODING)
        assert facts.Tensor("w", 0, 1, str(plain)).may_be_indices is (dtype not in FLOATS)
        assert not facts.Tensor("w", 0, 1, str(encoded)).may_be_indices
    for unknown in ("", "f32", dtype, f"tensor<[3], {dtype}", "tensor<[3], f128>", "kv<1, 2, 3, f32>"):
        assert facts.Tensor("w", 0, 1, unknown).may_be_indices


@pytest.mark.parametrize("kind", ["tensor<[300], i64>", "tensor<[300], bool>", ""])
def test_weights_that_may_be_indices_are_checked_before_any_step(tmp_path: Path, gate: Gate, kind: str) -> None:
    path = write(tmp_path / "model.so", kind)
    assert Runtime.load(path, threads=1).verified
    assert Runtime.load(path, threads=1).verified
    time.sleep(0.05)
    flip(path, place_of(path)[0] + 1)
    for _ in range(2):
        with pytest.raises(ArtifactError, match="is damaged"):
            Runtime.load(path, threads=1)
    assert gate.pieces == 0


# Where the weights are


@pytest.mark.parametrize("share", [True, False])
def test_the_caller_may_say_where(path: Path, gate: Gate, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either is checked beside the steps, on the bytes that they use."""
    monkeypatch.setattr(module, "worth_copying", lambda _: True)
    damaged = path.with_name("damaged.so")
    shutil.copy(path, damaged)
    flip(damaged, place_of(path)[0] + NBYTES // 3)
    runtimes = [Runtime.load(file, threads=1, share_weights=share) for file in (path, damaged)]
    assert [in_file(runtime.weights) for runtime in runtimes] == [share, share]
    gate.opened.set()
    runtimes[0].finish_loading()
    assert in_file(runtimes[0].weights) is share
    runtimes[1]._weights.join()
    with pytest.raises(ArtifactError, match=r"damaged\.so is damaged"):
        runtimes[1].forward(IDS)


@pytest.mark.parametrize("copied", [False, True])
def test_weights_in_a_file_of_their_own(tmp_path: Path, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "worth_copying", lambda _: copied)
    outside = tmp_path / "weights.bin"
    path = write(tmp_path / "model.so", outside=outside)
    for _ in range(2):
        runtime = Runtime.load(path, threads=1, weights=outside)
        runtime.finish_loading()
        assert runtime.verified
        assert in_file(runtime.weights) is not copied
        assert (runtime.forward(IDS) == RIGHT).all()
    assert records(tmp_path) == 1
    time.sleep(0.05)
    flip(outside, NBYTES - 1)
    with pytest.raises(ArtifactError, match=r"weights\.bin is damaged"):
        Runtime.load(path, threads=1, weights=outside).finish_loading()
    with pytest.raises(ArtifactError, match=r"weights\.bin is damaged"):
        Runtime.load(path, threads=1, weights=outside)


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("kind", ["generate", "encode", "run"])
def test_every_kind_of_step_moves_on(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts.Manifest, "has_indices", False)
    makers: dict[str, Callable[[Path], Path]] = {
        "generate": fake_artifact.write, "encode": write_encoder, "run": write_arrays,
    }  # fmt: skip
    ones = np.ones((3, 3), np.float32)
    calls: dict[str, Callable[[Runtime], object]] = {
        "generate": lambda runtime: runtime.generate("hello", max_tokens=5),
        "encode": lambda runtime: runtime.encode(["hello", "good bye"]),
        "run": lambda runtime: runtime.run({"x": ones, "y": np.ones((3, 2), int), "half": ones}),
    }
    path = makers[kind](tmp_path / "model.so")
    runtime = Runtime.load(path, threads=1, verify=True, share_weights=True)
    expected = repr(calls[kind](runtime))
    moved = Runtime.load(path, threads=1)
    place = moved.caller.step.weights
    assert repr(calls[kind](moved)) == expected
    moved._weights.join()
    assert repr(calls[kind](moved)) == expected
    assert moved.caller.step.weights != place or not moved.manifest.weights_bytes
    assert not moved._weights.pending


# What goes wrong


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EIO, "Input/output error"), r"model\.so could not be read and checked: Input/output error"),
        (MemoryError("none"), r"model\.so could not be read and checked: MemoryError"),
        (None, "became shorter"),
    ],
)
def test_an_error_is_that_of_the_next_step(
    path: Path,
    error: Exception | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*_: object) -> int:
        if error is not None:
            raise error
        return 0

    monkeypatch.setattr(os, "preadv", fail)
    runtime = Runtime.load(path, threads=1)
    runtime._weights.join()
    for _ in range(2):
        with pytest.raises(ArtifactError, match=told):
            runtime.forward(IDS)
    assert capfd.readouterr().err == ""
    assert records(tmp_path) == 0


@pytest.mark.usefixtures("copying")
def test_without_a_thread_the_work_is_done_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    damaged = path.with_name("damaged.so")
    shutil.copy(path, damaged)
    flip(damaged, place_of(path)[0])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    runtime = Runtime.load(path, threads=1)
    assert runtime.verified
    assert (runtime.forward(IDS) == RIGHT).all()
    assert not in_file(runtime.weights)
    with pytest.raises(ArtifactError, match="is damaged"):
        Runtime.load(damaged, threads=1).forward(IDS)


@pytest.mark.usefixtures("copying")
def test_no_room_for_a_copy_means_in_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, (_, extent) = Host.reserve, place_of(path)

    def refuse(host: Host, nbytes: int, use: Use) -> Buffer:
        if nbytes == extent:
            raise RuntimeStateError("no address space")
        return reserve(host, nbytes, use)

    monkeypatch.setattr(Host, "reserve", refuse)
    for share in (None, False):
        runtime = Runtime.load(path, threads=1, share_weights=share)
        runtime.finish_loading()
        assert in_file(runtime.weights)


@pytest.mark.parametrize("name", ["verify", "share_weights"])
def test_what_is_no_choice_is_refused(path: Path, name: str) -> None:
    for value in (1, "yes", np.True_):
        with pytest.raises(RuntimeStateError, match=f"{name} must be True, False or None"):
            Runtime.load(path, **{name: value})  # type: ignore[arg-type]


# Ends, and other processes and threads


@pytest.mark.usefixtures("copying")
def test_a_closed_model_works_no_more(path: Path, gate: Gate) -> None:
    with Runtime.load(path, threads=1) as runtime:
        gate.arrived.wait()
        threading.Timer(0.01, gate.opened.set).start()
    assert loading_threads() == []
    assert gate.pieces == 1
    for use in (lambda: runtime.forward(IDS), runtime.finish_loading, runtime.wait_verified):
        with pytest.raises(RuntimeStateError, match="closed: load it again"):
            use()
    assert len(runtime.weights) == 0
    runtime.close()
    assert (Runtime.load(path, threads=1).forward(IDS) == RIGHT).all()


@pytest.mark.usefixtures("copying")
def test_a_model_that_is_dropped_ends_its_work(path: Path, gate: Gate) -> None:
    keep = Runtime.load(path, threads=1, verify=False, share_weights=True)  # the first: its code stays
    keep.finish_loading()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    runtime = Runtime.load(path, threads=1)
    (thread,) = loading_threads()
    gate.arrived.wait()
    del runtime
    gate.opened.set()
    thread.join()
    assert gate.pieces == 1
    del thread
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_models_of_one_file(path: Path, tmp_path: Path) -> None:
    wrong: list[object] = []

    def work() -> None:
        try:
            runtime = Runtime.load(path, threads=2)
            wrong.extend(1 for _ in range(5) if (runtime.forward(IDS) != RIGHT).any())
            runtime.finish_loading()
            wrong.extend(1 for _ in range(5) if not runtime.verified or (runtime.forward(IDS) != RIGHT).any())
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert records(tmp_path) == 1


# Each piece takes so long that the process is sure to end, or to fork, while there is work left.
SLOW = """
import atexit, os, signal, sys, threading, time
pieces = []
@atexit.register
def report():  # after all that was registered later
    if "--report" in sys.argv:
        print(len(pieces), [thread.name for thread in threading.enumerate() if thread.daemon])
from llmc.runtime import verified, weights
from llmc.runtime.errors import ArtifactError
from llmc.runtime.library import Library
from llmc.runtime.runtime import Runtime
weights.LEAST_LATER, weights.worth_copying = 0, lambda _: True
real, parent = Library.hash, os.getpid()
def slow(library, data, threads):
    if os.getpid() == parent:
        time.sleep(0.5)
    pieces.append(threads)
    return real(library, data, threads)
Library.hash = slow
runtime = Runtime.load(sys.argv[1], threads=2)
logits = runtime.forward([1, 2, 3])
assert not runtime.verified
"""
FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        signal.alarm(500)
        assert not runtime.verified
        status = 0
        try:
            assert (runtime.forward([1, 2, 3]) == logits).all()
            place = runtime.caller.step.weights
            runtime.finish_loading()
            assert runtime.caller.step.weights == place  # children share what is mapped
            assert runtime.verified and (runtime.forward([1, 2, 3]) == logits).all()
        except ArtifactError as error:
            status = 7 if "is damaged" in str(error) else 8
        except BaseException:
            status = 9
        os._exit(status)
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
try:
    runtime.finish_loading()
    print(runtime.verified)
except ArtifactError:
    print("refused")
"""


def python(code: str, path: Path, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code, str(path), *arguments]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    return shown.stdout


def test_a_process_may_end_while_the_work_goes_on(path: Path, tmp_path: Path) -> None:
    assert python(SLOW, path, "--report") in ("0 []\n", "1 []\n", "2 []\n")  # no piece more, and nobody is at it
    assert python(SLOW, path) == ""
    assert python(SLOW + "import threading; threading.Thread(target=lambda: time.sleep(0.1)).start()", path) == ""
    assert python(SLOW + "runtime.circle = runtime; del runtime", path) == ""
    assert records(tmp_path) == 0


def test_children_of_a_process_do_the_work_anew(path: Path) -> None:
    assert python(SLOW + FORK, path) == "[0, 0, 0]\nTrue\n"
    flip(path, place_of(path)[0] + NBYTES - 2)
    assert python(SLOW + FORK, path) == "[7, 7, 7]\nrefused\n"


@pytest.mark.usefixtures("copying")
def test_work_that_was_given_up_leaves_nothing_to_use(path: Path, gate: Gate) -> None:
    """As when the interpreter ends, and another thread still runs steps: half of a copy is no copy."""
    runtime = Runtime.load(path, threads=1)
    gate.arrived.wait()
    assert runtime._weights._loading is not None
    runtime._weights._loading.cancel()
    gate.opened.set()
    runtime._weights.join()
    with pytest.raises(ArtifactError, match="given up before its weights were checked"):
        runtime.forward(IDS)
