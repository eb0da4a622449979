"""Standard streams that commands can use even if the shell gave closed, full, non-blocking or non-UTF-8 ones."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.errors import LlmcError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class ResultsError(OSError):
    """Results cannot be written to stdout."""


class _Results(io.FileIO):
    """Descriptor 1, which waits where it is not ready. Raises `ResultsError`, and `BrokenPipeError` as all do."""

    def write(self, data: ReadableBuffer) -> int:
        while True:
            try:
                count = super().write(data)
            except BrokenPipeError:
                raise
            except OSError as error:
                closed = "it is closed, and results have nowhere to go"
                said = closed if error.errno == errno.EBADF else error.strerror
                raise ResultsError(error.errno, said, "stdout") from error
            if count is not None:
                return count
            select.select([], [self], [])


def prepare() -> None:
    """Makes all three streams usable.

    A closed stdin is empty, one of ASCII is taken as UTF-8. A closed stderr takes everything; a closed stdout is an
    error when something is printed, and characters that its encoding has not are printed as escapes.
    """
    for number in range(3):
        if not _is_open(number):
            # Else the next file that is opened would get this number, and what is printed would land in it.
            os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BytesIO(), "utf-8")
    elif isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text become marks that the tokenizer refuses by place, and JSON can hold.
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="surrogateescape")
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(os.devnull, "w"), "utf-8", write_through=True)
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    errors = "strict" if sys.stdout is None else sys.stdout.errors
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Results(1, "w", closefd=False)),
        encoding,
        "backslashreplace" if errors in ("strict", "surrogateescape", "surrogatepass") else errors,
        line_buffering=os.isatty(1),
    )


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def silence(number: int) -> None:
    """Throws away further output to this descriptor, which cannot be written to."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def is_unicode(stream: object) -> bool:
    """Whether a text stream has every character."""
    name = str(getattr(stream, "encoding", None) or "utf-8")
    return name.lower().replace("_", "-").startswith("utf")


def read_text(file: Path, what: str) -> str:
    """A file in UTF-8, or stdin where it is called -, with \\n at the end of lines and no byte order mark. what: the
    option that names it, for errors."""
    if str(file) == "-":
        # Tests and programs that run a command in their own process may have put a text stream there.
        buffer = getattr(sys.stdin, "buffer", None)
        data = sys.stdin.read().encode() if buffer is None else buffer.read()
    else:
        data = file.read_bytes()
    try:
        text: str = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = "stdin" if str(file) == "-" else f"{what} {file}"
        raise LlmcError(f"{where} is not UTF-8: byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
