"""Parsing a model's file without copying its weights: a walk sets them aside, and protobuf reads the rest.

A `.onnx` file is one protobuf message in which initializers may be gigabytes of raw bytes. The file is mapped; the
walk finds the raw bytes of the graph's own initializers (`ModelProto.graph.initializer.raw_data`), remembers where they
lie, and gives the message without them to protobuf.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from llmc.errors import FrontendError

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # field numbers of ModelProto, GraphProto and TensorProto
_VARINT, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types; those of a fixed size with their bytes
_SET_ASIDE = 1024  # raw bytes of a tensor from which on they stay in the file
_MOST_STRUCTURE = 1 << 29  # bytes that are parsed; the graph of a model of a thousand layers has some millions


@dataclass(frozen=True)
class Span:
    """Bytes of a mapped file."""

    data: mmap.mmap
    begin: int
    end: int

    def release(self) -> None:
        """Give the pages back: weights pass through one at a time. Arrays that view them read them again."""
        begin = self.begin - self.begin % mmap.PAGESIZE
        self.data.madvise(mmap.MADV_DONTNEED, begin, self.end - begin)


@dataclass(frozen=True)
class Parsed:
    """A model's message. raw: for each initializer of the graph, where its raw bytes lie, or None (in the message)."""

    message: onnx.ModelProto
    raw: tuple[Span | None, ...]


class _Damaged(Exception):
    """What breaks the wire format."""


def parse(path: Path) -> Parsed:
    """Read a model's file; FrontendError in one line for whatever is no such thing."""
    data = map_file(path)
    pieces: list[memoryview] = []
    places: list[tuple[int, int] | None] = []
    view = memoryview(data)
    try:
        _walk_model(view, pieces, places)
        size = sum(len(piece) for piece in pieces)
        if size > _MOST_STRUCTURE:
            raise FrontendError(
                f"{path} has {size} bytes beside its weights; at most {_MOST_STRUCTURE} are read. "
                "Store large constants as initializers"
            )
        message = onnx.ModelProto()
        message.ParseFromString(b"".join(pieces))
    except (_Damaged, DecodeError) as error:
        why = f": {error}" if isinstance(error, _Damaged) else ""
        raise FrontendError(f"{path} is no ONNX file, or it is truncated or damaged{why}") from None
    if len(message.graph.initializer) != len(places):
        raise FrontendError(f"{path} is damaged: its weights cannot be told apart")
    return Parsed(message, tuple(None if place is None else Span(data, *place) for place in places))


def map_file(path: Path) -> mmap.mmap:
    """A regular file that is not empty, mapped for reading."""
    try:
        # Without O_NONBLOCK, opening a fifo would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise FrontendError(f"{path} is not a file: give the .onnx file of a model")
            if found.st_size == 0:
                raise FrontendError(f"{path} is empty")
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise FrontendError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise FrontendError(f"{path} cannot be read: {why}") from error


def _walk_model(view: memoryview, pieces: list[memoryview], places: list[tuple[int, int] | None]) -> None:
    copied = 0  # up to here, everything is in `pieces` or set aside
    for field, wire, start, begin, end in _fields(view, 0, len(view)):
        if field != _GRAPH or wire != _BYTES:
            continue
        inner: list[memoryview] = []
        _walk_graph(view, begin, end, inner, places)
        pieces += [view[copied:start], *_message(_GRAPH, inner)]
        copied = end
    pieces.append(view[copied:])


def _walk_graph(
    view: memoryview, begin: int, end: int, pieces: list[memoryview], places: list[tuple[int, int] | None]
) -> None:
    copied = begin
    for field, wire, start, inner_begin, inner_end in _fields(view, begin, end):
        if field != _INITIALIZER or wire != _BYTES:
            continue
        kept: list[memoryview] = []
        places.append(_walk_tensor(view, inner_begin, inner_end, kept))
        pieces += [view[copied:start], *_message(_INITIALIZER, kept)]
        copied = inner_end
    pieces.append(view[copied:end])


def _walk_tensor(view: memoryview, begin: int, end: int, pieces: list[memoryview]) -> tuple[int, int] | None:
    place = None
    copied = begin
    for field, wire, start, inner_begin, inner_end in _fields(view, begin, end):
        if field != _RAW_DATA or wire != _BYTES:
            continue
        place = None  # of a field that stands twice, the last counts
        if inner_end - inner_begin >= _SET_ASIDE:
            place = (inner_begin, inner_end)
            pieces.append(view[copied:start])
            copied = inner_end
    pieces.append(view[copied:end])
    return place


def _message(field: int, pieces: list[memoryview]) -> list[memoryview]:
    """A length-delimited field around pieces."""
    header = _encode(field << 3 | _BYTES) + _encode(sum(len(piece) for piece in pieces))
    return [memoryview(header), *pieces]


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(view: memoryview, begin: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, where the field begins, where its value begins and ends) of each field of a message."""
    at = begin
    while at < end:
        start = at
        tag, at = _varint(view, at, end)
        field, wire = tag >> 3, tag & 7
        if field == 0 or wire not in (_VARINT, _BYTES, *_FIXED):
            raise _Damaged(f"byte {start} starts no field of a known kind")
        if wire == _BYTES:
            length, at = _varint(view, at, end)
            stop = at + length
        elif wire in _FIXED:
            stop = at + _FIXED[wire]
        else:
            _, stop = _varint(view, at, end)
        if stop > end:
            raise _Damaged(f"the field at byte {start} ends behind what holds it")
        yield field, wire, start, at, stop
        at = stop


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """A variable-length integer of at most 10 bytes, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Damaged(f"a number before byte {at} has no end")
