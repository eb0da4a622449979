"""Which files' weights were hashed before, so that an unchanged file is not hashed at every load.

A record is a small file in the cache folder, named by the hash of what it says: which bytes of which file had which
hash. The file is known by device, inode, size and the times of its last writing and last change: the second is set by
the system alone, so that a file that was written to is never taken for what it was, whatever its other time says. What
a disk changes without telling the system is not seen; so a record counts for some days only.

Nothing here is needed: a record that cannot be read or written is one that is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import time
from pathlib import Path

from llmc.files import cache_folder

_MOST_AGE = 7 * 86400  # seconds that a record counts for
_MOST_RECORDS = 256
_MOST_BYTES = 1024  # of a record
# A file may be written to twice within one tick of its file system's clock, and has the same times after both. Where
# the last change is this long ago (seconds) when the hashing starts, a later one has another time: 2 s is the coarsest
# clock there is.
_LEAST_AGE = 2.5
_VERDICTS = {"whole": True, "damaged": False}


def facts_of(descriptor: int, offset: int, nbytes: int, expected: str) -> str:
    """What a record is about: `nbytes` at `offset` of an open file as it is now, and the hash that they should have."""
    status = os.fstat(descriptor)
    numbers = (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, offset, nbytes,
    )  # fmt: skip
    return " ".join((*map(str, numbers), expected))


def is_settled(descriptor: int) -> bool:
    """Whether any change of an open file from now on will show in its times."""
    return time.time() - os.fstat(descriptor).st_ctime > _LEAST_AGE


def recall(facts: str) -> bool | None:
    """True where these bytes had the right hash, False where they had a wrong one; None where nothing is known.

    Only a record that this user wrote, that nobody else can write to, and that is not too old counts.
    """
    try:
        place = _place(facts)
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
            if not 0 <= time.time() - status.st_mtime < _MOST_AGE:
                return None
            lines = os.read(descriptor, _MOST_BYTES).decode("ascii").splitlines()
        finally:
            os.close(descriptor)
    except (OSError, ValueError, RuntimeError):  # the last: a user without a home
        return None
    return _VERDICTS.get(lines[0]) if len(lines) == 2 and lines[1] == facts else None


def remember(facts: str, whole: bool) -> None:
    """Writes a record, all or nothing, and removes old ones where there are many."""
    verdict = next(word for word, means in _VERDICTS.items() if means is whole)
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        place = _place(facts)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(6)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(f"{verdict}\n{facts}\n")
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
        _remove_old(place.parent)


def _place(facts: str) -> Path:
    return cache_folder() / "verified" / hashlib.sha256(facts.encode()).hexdigest()[:32]


def _remove_old(folder: Path) -> None:
    """Keeps the newest half of a folder that is full; other processes may be doing the same."""
    with os.scandir(folder) as entries:
        found = [(entry.stat(follow_symlinks=False).st_mtime_ns, entry.path) for entry in entries]
    if len(found) > _MOST_RECORDS:
        for _, path in sorted(found)[: len(found) - _MOST_RECORDS // 2]:
            with contextlib.suppress(OSError):
                os.unlink(path)
