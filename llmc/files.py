"""Write a file all or nothing, whatever its name stands for: what was there before stays until the new one is whole."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from llmc.errors import ArtifactError, LlmcError

_MOST_LINKS = 40  # as Linux
_MOST_NAME = 60  # characters of a name that its temporary file repeats: names have 255 bytes at most
_COPY_BYTES = 1 << 20


def cache_folder() -> Path:
    """The folder of everything that llmc caches: $LLMC_CACHE_DIR, $XDG_CACHE_HOME/llmc or ~/.cache/llmc."""
    given = os.environ.get("LLMC_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmc"


@dataclass(frozen=True)
class Target:
    """Where bytes go that are written to a path.

    path: the path with its links followed. descriptor: the open file of this process that it names, such as
    /dev/stdout; None elsewhere. is_stream: bytes can only go into it, in order; else it is a file that can be replaced.
    """

    path: Path
    is_stream: bool = False
    descriptor: int | None = None


def target_of(path: Path) -> Target:
    """Follows links, also to files that are not there yet. Raises `OSError` for what nothing can be written to."""
    place = path
    for _ in range(_MOST_LINKS):
        descriptor = _own_descriptor(place)
        if descriptor is not None:
            return Target(place, True, descriptor)
        try:
            place = place.parent / os.readlink(place)
        except OSError:
            break  # no link, or nothing there
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    try:
        mode = os.stat(place).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Target(place)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; give a file name")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, f"it is a {'block device' if stat.S_ISBLK(mode) else 'socket'}; give a file name")
    return Target(place, not stat.S_ISREG(mode))


def _own_descriptor(place: Path) -> int | None:
    """The number in /dev/fd/63 or /proc/self/fd/1."""
    if not place.name.isascii() or not place.name.isdecimal():
        return None
    folder = os.path.realpath(place.parent)
    return int(place.name) if re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd", folder) else None


def names_stdout(path: Path) -> bool:
    """Whether bytes for `path` would go where this process prints to."""
    try:
        target = target_of(path)
        return target.is_stream and os.path.samestat(os.stat(target.path), os.fstat(1)) and not _is_null(target.path)
    except OSError:
        return False


def _is_null(path: Path) -> bool:
    return os.path.samestat(os.stat(path), os.stat(os.devnull))


def refusal(path: Path) -> str | None:
    """Why nothing can be written to `path`, as far as that is known before the work; None where nothing speaks against
    it."""
    try:
        target = target_of(path)
    except OSError as error:
        return error.strerror
    if target.is_stream:
        writable = target.descriptor is not None or os.access(target.path, os.W_OK)
        return None if writable else "no permission to write to it"
    folder = target.path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}; make it first"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"no permission to write in {folder}"


class OutputFile:
    """The bytes that `path` is to have. All methods raise `OSError`; `writing` makes one clear error of that.

    A file is replaced in one move when all bytes are on the disk; a link to it stays a link. Two writers of the same
    file do not meet: the one that ends last wins. A device such as /dev/null, a FIFO or a stream such as /dev/stdout is
    never replaced: bytes are kept apart until they are whole, and then go into it.

        with OutputFile(path) as file:
            os.write(file.descriptor, data)      # anywhere in it, as often as needed
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1
        self._stream = -1
        self._temporary: Path | None = None

    def open(self) -> None:
        """Makes the place that bytes are gathered in."""
        target = target_of(self.path)
        if target.is_stream:
            self._stream = _open_stream(target)
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
            return
        self._target = target.path
        _remove_stale(target.path)
        self.descriptor, self._temporary = _create_locked(target.path)
        if target.path.exists():
            os.fchmod(self.descriptor, stat.S_IMODE(target.path.stat().st_mode))

    @property
    def place(self) -> Path:
        """Where the bytes can be read before `commit`."""
        return self._temporary or Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")

    def commit(self) -> None:
        """Ends the file: its bytes are at `path` now."""
        if self._stream >= 0:
            _copy(self.descriptor, self._stream)
            return
        assert self._temporary is not None
        os.fsync(self.descriptor)
        os.replace(self._temporary, self._target)
        self._temporary = None
        _sync_folder(self._target.parent)

    def discard(self) -> None:
        """Closes everything, and removes what was not committed."""
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        for descriptor in (self.descriptor, self._stream):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor, self._stream, self._temporary = -1, -1, None

    def __enter__(self) -> OutputFile:
        try:
            self.open()
        except BaseException:
            self.discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()


@contextmanager
def writing(path: Path, kind: type[LlmcError] = ArtifactError) -> Iterator[None]:
    """Raises every `OSError` again as an error that says what could not be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise kind(not_written(path, error)) from error


def not_written(path: Path, error: OSError) -> str:
    """What to say of an error while `path` was written."""
    try:
        is_stream = target_of(path).is_stream
    except OSError:
        is_stream = False
    if is_stream:
        return f"cannot write {path}: {error.strerror or error}"
    advice = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        advice = f"no space is left in {path.parent or '.'}: free some, or choose another place"
    elif error.errno in (errno.EFBIG, errno.EDQUOT):
        advice = "the file would be larger than the system allows here: raise the limit, or choose another place"
    return f"cannot write {path}: {advice}. What was there before is unchanged."


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Writes every byte."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view[: 1 << 30]) :]


def _open_stream(target: Target) -> int:
    """Opens the place that bytes go to. A FIFO without a reader is an error, as opening it would wait for one."""
    if target.descriptor is not None:
        return os.dup(target.descriptor)
    try:
        stream = os.open(target.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nobody reads from it: start its reader first") from error
        raise
    os.set_blocking(stream, True)
    return stream


def _copy(source: int, stream: int) -> None:
    position = 0
    while data := os.pread(source, _COPY_BYTES, position):
        write_all(stream, data)
        position += len(data)


def _create_locked(path: Path) -> tuple[int, Path]:
    """A new temporary file beside `path`, locked for as long as its writer lives."""
    while True:
        temporary = path.with_name(f".{path.name[:_MOST_NAME]}.{secrets.token_hex(6)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another writer's clean-up may have taken it between the two calls above.
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Removes temporary files of this path whose writers have ended: no process holds their lock."""
    for stale in path.parent.glob(f".{glob.escape(path.name[:_MOST_NAME])}.*.tmp"):
        try:
            descriptor = os.open(stale, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink(missing_ok=True)
        except OSError:
            pass  # its writer lives
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
