"""Weights are the same bytes, checked, whether they are used in the file or copied into huge pages."""

from __future__ import annotations

import os
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from large_weights import place_of

from llmc.runtime import cpu
from llmc.runtime import weights as module
from llmc.runtime.device import Buffer, Use
from llmc.runtime.errors import ArtifactError, RuntimeStateError
from llmc.runtime.host import Host
from llmc.runtime.runtime import Runtime

IDS = list(range(33))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fake_artifact.write(tmp_path / "model.so")


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "worth_copying", lambda nbytes: nbytes > 0)
    monkeypatch.setattr(module, "_READ_BYTES", 1000)  # several reads, none of them whole pages


def in_file(array: np.ndarray) -> bool:
    """Whether an array is a view of something mapped from a file."""
    start = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= start < last:
            return line.split()[4] != "0"  # the inode
    return False


def test_a_copy_holds_what_the_file_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = Runtime.load(path, threads=1)
    assert in_file(placed.weights)  # too small to be worth a copy
    monkeypatch.setattr(module, "worth_copying", lambda nbytes: nbytes > 0)
    for threads, read in ((1, 1), (3, 1000), (2, 1 << 20)):
        monkeypatch.setattr(module, "_READ_BYTES", max(read, len(placed.weights) // 50))
        copied = Runtime.load(path, threads=threads)
        assert not in_file(copied.weights)
        assert (copied.weights == placed.weights).all()
        assert copied.weights.__array_interface__["data"][0] % 4096 == 0
        assert not copied.weights.flags.writeable
        assert (copied.forward(IDS) == placed.forward(IDS)).all()


@pytest.mark.usefixtures("copying")
def test_a_copy_is_checked(path: Path, tmp_path: Path) -> None:
    part = Runtime.load(path).artifact.parts[".llmc.weights"]
    data = bytearray(path.read_bytes())
    data[part.offset + part.bytes // 2] ^= 1
    changed = tmp_path / "changed.so"
    changed.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        Runtime.load(changed)


@pytest.mark.usefixtures("copying")
def test_a_file_that_shrinks_while_it_is_read_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ArtifactError, match="shorter"):
        Runtime.load(path)


@pytest.mark.usefixtures("copying")
def test_no_room_for_a_copy_means_in_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, (_, extent) = Host.reserve, place_of(path)

    def refuse(host: Host, nbytes: int, use: Use) -> Buffer:
        if nbytes == extent:
            raise RuntimeStateError("no address space")
        return reserve(host, nbytes, use)

    monkeypatch.setattr(Host, "reserve", refuse)
    assert in_file(Runtime.load(path).weights)


def test_a_copy_is_made_where_it_helps_and_harms_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    monkeypatch.setattr(module, "HUGE_PAGES", setting)
    monkeypatch.setattr(cpu, "available_memory", lambda: 100 << 20)
    assert not module.worth_copying(32 << 20)  # a system without huge pages
    setting.write_text("always madvise [never]\n")
    assert not module.worth_copying(32 << 20)
    for text in ("[always] madvise never\n", "always [madvise] never\n"):
        setting.write_text(text)
        assert module.worth_copying(32 << 20)
        assert module.worth_copying(50 << 20)
        assert not module.worth_copying(51 << 20)  # less than as much again would be free
        assert not module.worth_copying(1 << 20)  # small enough for the TLB


def test_the_caller_may_say_which(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for worth in (False, True):
        monkeypatch.setattr(module, "worth_copying", lambda _nbytes, worth=worth: worth)
        assert in_file(Runtime.load(path, share_weights=True).weights)
        assert not in_file(Runtime.load(path, share_weights=False).weights)
