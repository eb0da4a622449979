"""A folder for intermediate files that is gone afterwards, even after kill -9: the next one sweeps up."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.errors import CompileError

_PREFIX = "llmc-scratch-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder under $TMPDIR, locked for as long as the `with` block runs and removed at its end.

    A folder that nobody holds a lock on was left by a process that died, and is removed here. CompileError where no
    folder can be made.
    """
    _sweep()
    try:
        descriptor, folder = _create_locked()
    except OSError as error:
        raise CompileError(
            f"no folder for intermediate files can be made in {tempfile.gettempdir()} ({error.strerror}): "
            "free some space there, or set TMPDIR to another folder"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _create_locked() -> tuple[int, Path]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another process's sweep may have taken it between its making and the lock.
        if folder.exists():
            return descriptor, folder
        os.close(descriptor)


def _sweep() -> None:
    """Removes this user's folders whose makers are dead."""
    for stale in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(stale, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale, ignore_errors=True)
        except OSError:
            pass  # its maker lives
        finally:
            os.close(descriptor)
