"""The walk over a model's file: raw bytes are set aside, everything else comes out as protobuf itself reads it."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_files import mlp, model_of, value, write

from llmc.errors import FrontendError
from llmc.frontends.onnx import protobuf
from llmc.frontends.onnx.protobuf import Span, parse


def varint(number: int) -> bytes:
    return bytes([*(number >> shift & 0x7F | 0x80 for shift in range(0, number.bit_length() - 7, 7)),
                  number >> 7 * max(0, (number.bit_length() - 1) // 7)])  # fmt: skip


def field(number: int, wire: int, value: bytes) -> bytes:
    return varint(number << 3 | wire) + value


def whole(path: Path) -> onnx.ModelProto:
    """What a file holds, with the raw bytes put back that were set aside."""
    parsed = parse(path)
    for tensor, span in zip(parsed.message.graph.initializer, parsed.raw, strict=True):
        if span is not None:
            tensor.raw_data = span.data[span.begin : span.end]
    return parsed.message


# A field of each kind: a number, eight bytes, some bytes, four bytes. No message of ONNX has a field 1000, and a field
# of the wrong kind is none of its own: protobuf keeps both and passes them over.
KINDS = {0: varint(300), 1: bytes(range(1, 9)), 2: varint(3) + b"abc", 5: bytes(range(1, 5))}


@pytest.mark.parametrize("wire", KINDS)
def test_fields_that_onnx_does_not_have_are_passed_over(wire: int, tmp_path: Path) -> None:
    model = mlp(3, 200)
    tensor = model.graph.initializer[0]
    for message, own in ((model, 7), (model.graph, 5), (tensor, 9)):
        for number in (1000, *([own] if wire != 2 else [])):
            message.MergeFromString(field(number, wire, KINDS[wire]) + field(1001, 0, b"\x01"))
    found = whole(write(model, tmp_path / "model.onnx"))
    assert found == onnx.load(tmp_path / "model.onnx") and len(found.graph.initializer) == 3
    data = model.SerializeToString() + field(1000, wire, KINDS[wire])
    with pytest.raises(FrontendError, match=r"truncated or damaged: .*(ends behind what holds it|has no end)"):
        parse(write(data[:-1], tmp_path / "cut.onnx"))


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025])
def test_raw_bytes_from_1024_on_are_set_aside(size: int, tmp_path: Path) -> None:
    array = np.arange(size, dtype=np.uint8)
    model = model_of([], [], [value("y", [size])], {"y": array, "z": np.arange(3)})
    first, second = parse(write(model, tmp_path / "model.onnx")).raw
    assert ((first is not None), second) == (size >= 1024, None)
    assert whole(tmp_path / "model.onnx") == model
    if first is not None:
        assert first.data[first.begin : first.end] == array.tobytes()
        assert not parse(tmp_path / "model.onnx").message.graph.initializer[0].HasField("raw_data")


def test_of_raw_bytes_that_stand_twice_the_last_count(tmp_path: Path) -> None:
    long, longer, short = (numpy_helper.from_array(np.full(n, n, np.uint16)) for n in (600, 700, 5))
    for tensors in ((long, longer), (longer, long), (long, short), (short, long)):
        raw = b"".join(field(9, 2, varint(len(t.raw_data)) + t.raw_data) for t in tensors)
        graph = field(5, 2, varint(len(raw)) + raw)
        path = write(field(7, 2, varint(len(graph)) + graph), tmp_path / "model.onnx")
        assert whole(path) == onnx.load(path)


@pytest.mark.parametrize("size", [126, 127, 128, 129, 16382, 16383, 16384, 16385])
def test_messages_of_every_length_come_out(size: int, tmp_path: Path) -> None:
    """Lengths are written in seven bits a byte."""
    model = model_of([], [], [value("y", [1])], {"y": np.float32([3])})
    for message in (model.graph.initializer[0], model.graph):
        message.ClearField("doc_string")
        while message.ByteSize() < size:
            message.doc_string += "a" * max(1, (size - message.ByteSize()) // 2)
        if message.ByteSize() == size:
            assert whole(write(model, tmp_path / "model.onnx")) == model


def test_what_is_not_weights_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(7, 999)
    path = write(model, tmp_path / "model.onnx")
    size = parse(path).message.ByteSize()
    monkeypatch.setattr(protobuf, "_MOST_STRUCTURE", size)
    assert whole(path) == model
    monkeypatch.setattr(protobuf, "_MOST_STRUCTURE", size - 1)
    with pytest.raises(FrontendError, match=f"has {size} bytes beside its weights; at most {size - 1} are read"):
        parse(path)


def test_a_file_of_more_than_half_a_gigabyte_beside_its_weights_is_refused(tmp_path: Path) -> None:
    """The file has a hole: nothing of it is written or read."""
    path = write(mlp().SerializeToString() + field(1000, 2, varint(1 << 29)), tmp_path / "model.onnx")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 29))
    with pytest.raises(FrontendError, match="beside its weights; at most 536870912 are read"):
        parse(path)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x0b\x01", ": byte 0 starts no field of a known kind"),
        (b"\x08\x01\x02\x00", ": byte 2 starts no field of a known kind"),
        (b"\x3a\x05\x2a\x00", ": the field at byte 0 ends behind what holds it"),
        (b"\x3a\x02\x2a\x01\x08\x01", ": the field at byte 2 ends behind what holds it"),
        (b"\x08" + b"\x80" * 10 + b"\x01", ": a number before byte 11 has no end"),
        (b"\x08\x80", ": a number before byte 2 has no end"),
        (b"\x3a\x03\x0a\x01\xff", ""),
    ],
)  # fmt: skip
def test_damage_is_said_where_it_is(data: bytes, why: str, tmp_path: Path) -> None:
    """But for what protobuf itself finds."""
    path = write(data, tmp_path / "model.onnx")
    with pytest.raises(FrontendError) as raised:
        parse(path)
    assert str(raised.value) == f"{path} is no ONNX file, or it is truncated or damaged{why}"


def test_a_number_has_ten_bytes_at_most(tmp_path: Path) -> None:
    assert parse(write(b"\x08" + b"\x80" * 9 + b"\x01", tmp_path / "model.onnx")).raw == ()


@pytest.mark.parametrize(("name", "why"), [("a" * 300, "File name too long"), ("a\0b", "embedded null byte")])
def test_a_place_that_cannot_be_read_is_one_clear_error(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(FrontendError) as raised:
        parse(tmp_path / name)
    assert str(raised.value) == f"{tmp_path / name} cannot be read: {why}"


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process holds."""
    found, lines = False, Path("/proc/self/smaps").read_text().split("\n")
    for line in lines:
        if str(path) in line:
            found = True
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"{path} is not mapped")


def test_a_weight_s_pages_are_given_back(tmp_path: Path) -> None:
    pages = 64
    path = write(bytes(pages * mmap.PAGESIZE), tmp_path / "file")
    data = protobuf.map_file(path)
    spans = [Span(data, 3 * mmap.PAGESIZE + 5, 3 * mmap.PAGESIZE + 5), Span(data, 5, 20 * mmap.PAGESIZE)]
    spans.append(Span(data, 20 * mmap.PAGESIZE + 7, pages * mmap.PAGESIZE))
    for span, left in zip(spans, (pages - 1, pages - 20, 20), strict=True):
        assert sum(data[:: mmap.PAGESIZE]) == 0 and resident(path) == pages * mmap.PAGESIZE
        span.release()
        assert resident(path) == left * mmap.PAGESIZE
