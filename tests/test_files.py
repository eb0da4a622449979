"""Every file that is written, whatever its name stands for: files are replaced whole, links followed, devices kept."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from fake_kinds import write_encoder

from llmc.cli import run as command
from llmc.compiler.artifact import ArtifactWriter
from llmc.compiler.weights_file import WeightsFile
from llmc.errors import ArtifactError, LlmcError
from llmc.files import OutputFile, names_stdout, refusal, target_of, write_all, writing
from llmc.runtime.runtime import Runtime

Writer = Callable[[Path], None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_artifact.write(tmp_path_factory.mktemp("files") / "fake.so")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("files") / "encoder.so")


@pytest.fixture(params=["artifact", "save", "weights", "embed", "roofline"])
def write(request: pytest.FixtureRequest, artifact: Path, encoder: Path, capfd: pytest.CaptureFixture[str]) -> Writer:
    """Each way in which llmc writes a file that a user names."""

    def write_artifact(path: Path) -> None:
        with ArtifactWriter(path, fake_artifact.library()) as writer:
            writer.add_manifest(fake_artifact.manifest())

    def save(path: Path) -> None:
        Runtime.load(artifact, threads=1).save(path)

    def weights(path: Path) -> None:
        with WeightsFile(path) as file:
            file.append(np.ones(1000, np.float32))
            file.seal()

    def embed(path: Path) -> None:
        if command(["embed", str(encoder), "a", "b", "-o", str(path)]):
            raise LlmcError(capfd.readouterr().err)

    def roofline(path: Path) -> None:
        """As `draw_roofline` does: the drawing itself takes seconds."""
        with writing(path, LlmcError), OutputFile(path) as file:
            write_all(file.descriptor, b"a picture")

    ways = {"artifact": write_artifact, "save": save, "weights": weights, "embed": embed, "roofline": roofline}
    return ways[request.param]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_link_stays_and_its_target_is_replaced(write: Writer, tmp_path: Path, depth: int) -> None:
    """Also through two links, relative ones, and into another folder."""
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "v1", tmp_path / "current"
    target.write_bytes(b"old")
    target.chmod(0o640)
    before = target.stat().st_ino
    link.symlink_to("real/v1" if depth == 1 else "real/second")
    if depth == 2:
        (tmp_path / "real" / "second").symlink_to("v1")
    write(link)
    assert link.is_symlink() and not target.is_symlink()
    assert target.stat().st_ino != before and target.read_bytes()[:3] != b"old"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert files(tmp_path) == {"real", "current"} and files(tmp_path / "real") <= {"v1", "second"}


def test_a_link_to_nothing_makes_its_target(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new").stat().st_size > 8


def test_links_in_a_circle_are_named(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(LlmcError, match=r"cannot write .*symbolic links"):
        write(tmp_path / "a")


def node(path: Path, minor: int) -> Path:
    """A device of our own, like /dev/null (3) or /dev/full (7): a fault must not hit the real ones."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        path.open("wb").close()
    except OSError:
        pytest.skip("device nodes cannot be made here: that takes root and a file system that allows it")
    return path


def test_a_device_is_written_to_and_stays(write: Writer, tmp_path: Path) -> None:
    null = node(tmp_path / "null", 3)
    before = null.stat()
    write(null)
    assert stat.S_ISCHR(null.stat().st_mode)
    assert (null.stat().st_rdev, null.stat().st_ino) == (before.st_rdev, before.st_ino)
    assert files(tmp_path) == {"null"}


def test_a_fifo_is_written_to_and_stays(write: Writer, tmp_path: Path) -> None:
    fifo, plain = tmp_path / "fifo", tmp_path / "plain"
    os.mkfifo(fifo)
    with pytest.raises(LlmcError, match="nobody reads from it"):
        write(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    found = bytearray()

    def read() -> None:
        while data := os.read(reader, 1 << 16):
            found.extend(data)

    thread = threading.Thread(target=read)
    keep = os.open(fifo, os.O_WRONLY)  # so that the reader sees no end before the writer has come
    thread.start()
    write(fifo)
    os.close(keep)
    thread.join()
    os.close(reader)
    write(plain)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert bytes(found) == plain.read_bytes()
    assert files(tmp_path) == {"fifo", "plain"}


def test_a_socket_is_refused_and_stays(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(LlmcError, match="it is a socket"):
            write(Path("socket"))
        assert stat.S_ISSOCK(Path("socket").stat().st_mode)


def test_a_full_device_is_named(write: Writer, tmp_path: Path) -> None:
    full = node(tmp_path / "full", 7)
    with pytest.raises(LlmcError, match=r"cannot write .*full: No space left on device"):
        write(full)
    assert stat.S_ISCHR(full.stat().st_mode)


@pytest.mark.parametrize("name", ["m" * 255, "*[?].so", "a\nb", "ü" * 100])
def test_any_name_will_do(write: Writer, tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    write(tmp_path / name)
    assert files(tmp_path) == {name}


def test_what_can_be_known_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "lost").symlink_to("no folder/x")
    assert refusal(tmp_path / "x") is None
    assert refusal(Path("/dev/null")) is None
    assert "there is no folder" in str(refusal(tmp_path / "lost"))
    assert "folder; give a file name" in str(refusal(tmp_path))
    assert "Not a directory" in str(refusal(Path(__file__) / "x")) or "no folder" in str(refusal(Path(__file__) / "x"))


def test_a_descriptor_of_this_process_is_a_stream(tmp_path: Path) -> None:
    """`> file` and `>(program)` of a shell: what was opened is written to, at the place where it stands."""
    with (tmp_path / "x").open("wb", buffering=0) as file:
        file.write(b"before ")
        for folder in ("/dev/fd", "/proc/self/fd", f"/proc/{os.getpid()}/fd"):
            path = Path(folder) / str(file.fileno())
            assert target_of(path).descriptor == file.fileno()
            with OutputFile(path) as target:
                write_all(target.descriptor, b"and after ")
    assert (tmp_path / "x").read_bytes() == b"before " + 3 * b"and after "
    assert not names_stdout(tmp_path / "x")


def test_vectors_and_an_artifact_into_a_pipe(artifact: Path, encoder: Path, tmp_path: Path) -> None:
    piped = f"{sys.executable} -m llmc embed {encoder} a b -o /dev/stdout | cat > {tmp_path}/piped.npy"
    subprocess.run(["bash", "-c", piped], check=True, capture_output=True)
    assert np.load(tmp_path / "piped.npy").shape[0] == 2
    mixed = [sys.executable, "-m", "llmc", "embed", str(encoder), "a", "-o", "/dev/stdout", "--json"]
    ended = subprocess.run(mixed, capture_output=True, text=True)
    assert ended.returncode == 1 and "give a file" in ended.stderr and ended.stdout.count("{") == 1


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), OutputFile(path) as file:
        write_all(file.descriptor, b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and files(tmp_path) == {"x"}
    with pytest.raises(ArtifactError, match="cannot write"), writing(path):
        raise OSError(5, "Input/output error")
