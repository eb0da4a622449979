"""Weights in files beside the model, confined to its folder.

A location in an ONNX file is text from an untrusted author. It may only lead to a regular file in the model's folder
or below, without `..`, absolute paths, links, devices or pipes: else a model could read (and put into an artifact) any
file that the user can. Hard links are refused too: they name a file elsewhere under a name in the folder.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from pathlib import Path

from llmc.errors import FrontendError
from llmc.frontends.onnx.protobuf import Span

_MOST_PARTS = 16
_HUB_BLOB = re.compile(r"[0-9a-f]{40,64}\Z")


class ExternalFiles:
    """The files beside one model, each opened once and mapped."""

    def __init__(self, model: Path) -> None:
        self._folder = model.parent
        self._maps: dict[str, mmap.mmap] = {}

    def span(self, location: str, offset: int, length: int | None, needed: int, what: str) -> Span:
        """The bytes of a tensor. needed: how many it has; what: the tensor, for messages."""
        if length is not None and length != needed:
            raise FrontendError(f"{what} needs {needed} bytes, but has {length} in {location!r:.100}")
        if not needed:
            return Span(mmap.mmap(-1, mmap.PAGESIZE), 0, 0)  # wherever it lies
        if location not in self._maps:
            self._maps[location] = self._open(location, what)
        size = len(self._maps[location])
        if offset < 0 or offset + needed > size:
            raise FrontendError(
                f"{what} lies at bytes {offset}..{offset + needed} of {location!r:.100}, which has {size}: "
                "the file is truncated, or belongs to another model"
            )
        return Span(self._maps[location], offset, offset + needed)

    def _open(self, location: str, what: str) -> mmap.mmap:
        parts = _parts(location, what)
        shown = self._folder / location
        try:
            descriptor = self._descriptor(parts)
            try:
                return _mapped(descriptor, f"{what} lies in {shown}")
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise FrontendError(
                f"{what} lies in {shown}, which is missing: the model's weights are in files beside it; copy them too"
            ) from None
        except (OSError, ValueError) as error:
            why = "it is a link, or lies behind one" if _is_link_error(error) else error
            raise FrontendError(f"{what} lies in {shown}, which cannot be read: {why}") from None

    def _descriptor(self, parts: list[str]) -> int:
        """The opened file; no part of the way to it may be a link (what is checked is what is opened)."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        folder = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = inner
            blob = self._hub_blob(parts)
            if blob is not None:
                return os.open(blob, flags | os.O_NONBLOCK)
            # A device may do things when it is opened, so it is looked at before.
            kind = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
                raise ValueError("it is not a regular file")
            return os.open(parts[-1], flags | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)

    def _hub_blob(self, parts: list[str]) -> Path | None:
        """What a link in the Hugging Face hub's cache stands for: `snapshots/REVISION/...` to a file in `blobs`."""
        link = self._folder.joinpath(*parts)
        if not link.is_symlink():
            return None
        folder = self._folder.resolve()
        for snapshot in (folder, *folder.parents):
            if snapshot.parent.name == "snapshots":
                blobs = snapshot.parent.parent / "blobs"
                target = Path(os.path.normpath(link.parent.resolve() / os.readlink(link)))
                return target if target.parent == blobs and _HUB_BLOB.match(target.name) else None
        return None


def _mapped(descriptor: int, where: str) -> mmap.mmap:
    """An opened file, if it is one that belongs to the folder alone. where: the tensor and the file, for messages."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise FrontendError(f"{where}, which is not a regular file")
    if found.st_nlink > 1:
        raise FrontendError(
            f"{where}, which has {found.st_nlink} names (hard links): it may be a file from outside the model's "
            "folder. Copy it"
        )
    if not found.st_size:
        raise FrontendError(f"{where}, which is empty")
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def _parts(location: str, what: str) -> list[str]:
    """The parts of a relative path that leads down only."""
    parts = [part for part in location.split("/") if part != "."]
    bad = not parts or len(parts) > _MOST_PARTS or location.startswith("/")
    bad |= any(part in ("", "..") or "\0" in part or "\\" in part or ":" in part for part in parts)
    if bad or len(location) > 1024:
        raise FrontendError(
            f"{what} lies in {location!r:.100}: only a file in the model's own folder is read, by a plain relative path"
        )
    return parts


def _is_link_error(error: Exception) -> bool:
    """What opening a link without following it gives: ELOOP, or ENOTDIR where a folder was wanted."""
    import errno

    return isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENOTDIR)
