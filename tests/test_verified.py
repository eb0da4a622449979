"""Records of files that were hashed: one counts for the file that it is about, as it was, and for its user alone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmc.runtime import verified

HASH = "5f" * 32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def facts_of(path: Path, offset: int = 0, nbytes: int = 5, expected: str = HASH) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return verified.facts_of(descriptor, offset, nbytes, expected)
    finally:
        os.close(descriptor)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"12345678")
    return tmp_path / "file"


def record(cache: Path) -> Path:
    (found,) = (cache / "verified").iterdir()
    return found


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_remembered_is_recalled(cache: Path, path: Path, whole: bool) -> None:
    facts = facts_of(path)
    assert verified.recall(facts) is None
    verified.remember(facts, not whole)
    verified.remember(facts, whole)
    assert verified.recall(facts) is whole
    assert record(cache).stat().st_mode & 0o777 == 0o600
    assert record(cache).parent.stat().st_mode & 0o777 == 0o700


def in_place(path: Path) -> None:
    """Other bytes, and the old time of writing."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def another(path: Path) -> None:
    """Another file with the same name, bytes and time of writing."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("change", [in_place, grow, another, lambda path: os.utime(path, ns=(1, 1))])
def test_a_file_that_changed_is_not_known(path: Path, change: Callable[[Path], object]) -> None:
    facts = facts_of(path)
    verified.remember(facts, True)
    time.sleep(0.05)  # some ticks of a file system's clock: `is_settled` sees to it in a runtime
    change(path)
    assert facts_of(path) != facts
    assert verified.recall(facts_of(path)) is None


def test_every_fact_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, whatever a file system makes of the others."""
    real = os.fstat(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    values = {name: getattr(real, name) for name in names}
    found = set()
    for changed in (None, *names):
        told = SimpleNamespace(**{name: value + (name == changed) for name, value in values.items()})
        monkeypatch.setattr(os, "fstat", lambda _, told=told: told)
        found.add(verified.facts_of(0, 0, 5, HASH))
    assert len(found) == 1 + len(names)


@pytest.mark.usefixtures("cache")
def test_a_record_is_about_these_bytes_and_this_hash(path: Path) -> None:
    verified.remember(facts_of(path), True)
    for other in (facts_of(path, 1), facts_of(path, 0, 6), facts_of(path, expected="5e" * 32), facts_of(path) + "0"):
        assert verified.recall(other) is None
    assert verified.recall(facts_of(path)) is True


def test_a_record_under_the_name_of_another_does_not_count(cache: Path, path: Path) -> None:
    """Names can be given to any file; what counts is what the record says."""
    facts, other = facts_of(path), facts_of(path, 1)
    verified.remember(facts, True)
    first = record(cache)
    verified.remember(other, False)
    (second,) = set((cache / "verified").iterdir()) - {first}
    shutil.copy(first, second)
    assert verified.recall(other) is None
    assert verified.recall(facts) is True


def owned_by_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)


def linked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.rename(place.with_name("elsewhere"))
    place.symlink_to("elsewhere")


def a_fifo(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.unlink()
    os.mkfifo(place, 0o600)


def aged(seconds: float) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda place, _: os.utime(place, (time.time() - seconds,) * 2)


BAD: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "another user's": owned_by_another,
    "writable by the group": lambda place, _: place.chmod(0o660),
    "writable by all": lambda place, _: place.chmod(0o602),
    "a link": linked,
    "a fifo": a_fifo,
    "a folder": lambda place, _: (place.unlink(), place.mkdir(0o700)),
    "empty": lambda place, _: place.write_bytes(b""),
    "cut short": lambda place, _: place.write_bytes(place.read_bytes()[:-9]),
    "longer": lambda place, _: place.write_bytes(place.read_bytes() + b"whole\n"),
    "no text": lambda place, _: place.write_bytes(b"\xff" * 100),
    "of another verdict": lambda place, _: place.write_bytes(b"w" + place.read_bytes()),
    "old": aged(8 * 86400),
    "from the future": aged(-3600),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_record_that_may_be_wrong_does_not_count(
    cache: Path, path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = facts_of(path)
    verified.remember(facts, True)
    assert verified.recall(facts) is True
    BAD[kind](record(cache), monkeypatch)
    assert verified.recall(facts) is None


def test_a_cache_that_cannot_be_used_is_no_error(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").write_bytes(b"")
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path / "plain"))
    verified.remember(facts_of(path), True)
    assert verified.recall(facts_of(path)) is None
    monkeypatch.delenv("LLMC_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    verified.remember(facts_of(path), True)
    assert verified.recall(facts_of(path)) is None


@pytest.mark.usefixtures("cache")
def test_a_hash_of_any_characters_is_no_error(path: Path) -> None:
    for text in ("\n", "é", "\ud800"):
        verified.remember(facts_of(path, expected=text), True)
        assert verified.recall(facts_of(path, expected=text)) is None


def test_old_records_make_room(cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "_MOST_RECORDS", 10)
    for offset in range(35):
        verified.remember(facts_of(path, offset), True)
        newest = facts_of(path, offset)
        assert verified.recall(newest) is True
        assert len(list((cache / "verified").iterdir())) <= 10
    assert all(not entry.name.startswith(".") for entry in (cache / "verified").iterdir())


def test_a_change_in_the_same_tick_is_waited_for(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert not verified.is_settled(descriptor)
        os.utime(path, (1, 1))  # says nothing: programs may set it
        assert not verified.is_settled(descriptor)
    finally:
        os.close(descriptor)
