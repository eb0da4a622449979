"""The reader of GGUF files: what it reads, and that a header is never trusted."""

from __future__ import annotations

import re
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf_files import ARRAY, F32, STRING, TYPES, header, text, typed, write

from llmc.errors import FrontendError
from llmc.frontends.gguf.reader import GgufFile, is_gguf
from llmc.frontends.gguf.tensor_types import TENSOR_TYPES, UNREAD_TYPES

METADATA = {
    "general.architecture": "llama", "a.int": 7, "a.negative": -3, "a.float": 0.25, "a.flag": True, "a.text": "naïve",
    "a.words": ["one", "", "three"], "a.numbers": [1, -2, 3], "a.floats": [0.5, 1.5], "a.flags": [True, False],
}  # fmt: skip


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = {name: ("F32", values(*shape)) for name, shape in (("a", (7,)), ("b", (31, 3)), ("c", (2, 33, 5)))}
    file = GgufFile(write(tmp_path / "m.gguf", METADATA, tensors))
    assert file.metadata == METADATA and file.version == 3
    for name, (_, array) in tensors.items():
        assert file.tensors[name].shape == array.shape
        np.testing.assert_array_equal(file.blocks(name).view(np.float32), array.reshape(-1, array.shape[-1]))
    rounded = np.arange(2 * 3 * 36, dtype=np.uint8).reshape(2, 3, 36)
    file = GgufFile(write(tmp_path / "m.gguf", METADATA, {"q": ("Q4_0", rounded), "a": tensors["a"]}))
    assert file.tensors["q"].shape == (2, 3, 64)
    np.testing.assert_array_equal(file.blocks("q"), rounded.reshape(6, 36))


def test_every_kind_of_number(tmp_path: Path) -> None:
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
    body = b"".join(text(f"k{kind}") + struct.pack(f"<I{code}", kind, 1) for kind, code in codes.items())
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 2, 0, len(codes)) + body)
    found = GgufFile(path).metadata
    assert list(found.values()) == [1] * len(codes)
    assert found["k7"] is True and isinstance(found["k12"], float)


def test_data_may_be_aligned_otherwise(tmp_path: Path) -> None:
    metadata = {"general.alignment": 8}
    head = header(metadata, {"a": ("F32", (2,), 0), "b": ("F32", (3,), 8)})
    data = np.arange(5, dtype=np.float32).tobytes()
    (tmp_path / "m.gguf").write_bytes(head + bytes(-len(head) % 8) + data)
    file = GgufFile(tmp_path / "m.gguf")
    assert file.blocks("b").view(np.float32).tolist() == [[2.0, 3.0, 4.0]]


def refused(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(FrontendError) as error:
        GgufFile(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def head(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GGUF", "has 4 bytes"),
        (b"GGML" + head()[4:], "begins with b'GGML', not b'GGUF': it is no GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
        (head(1), "version 1, which is not supported"),
        (head(4), "version 4, which is unknown"),
        (head(0), "version 0"),
        (head()[:23], "has 23 bytes"),
        (head(tensors=1 << 60), "tensors; at most"),
        (head(keys=1 << 60), "keys; at most"),
        (head(keys=1), "ends within"),
        (head(keys=1) + struct.pack("<Q", 1 << 50), "claims a length"),
        (head(keys=1) + text("k") + struct.pack("<I", 13), "unknown type 13"),
        (head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, F32, 1 << 55), "claims to have"),
        (head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 1 << 55), "claims to have"),
        (head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "array of arrays"),
        (head(keys=1) + struct.pack("<Q", 1) + b"\xff" + bytes(12), "not UTF-8"),
        (head(keys=2) + (text("k") + typed(1)) * 2, "twice"),
        (head(keys=1) + text("general.alignment") + typed(24), "power of two"),
        (head(keys=1) + text("general.alignment") + typed(0), "power of two"),
        (head(keys=1) + text("general.alignment") + typed(True), "power of two"),
        (head(keys=1) + text("general.alignment") + typed(32.0), "power of two"),
        (head(keys=1) + text("general.alignment") + typed(-32), "power of two"),
    ],
)
def test_headers_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    assert said in refused(tmp_path, data)


def table(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([table("a", (4,), 99, 0)], "type 99"),
        ([table("a", (4,), 9, 0)], "Q8_1"),
        ([table("a", (), 0, 0)], "0 dimensions"),
        ([table("a", (1,) * 5, 0, 0)], "5 dimensions"),
        ([table("a", (0, 4), 0, 0)], "dimensions"),
        ([table("a", (1 << 40, 1 << 40), 0, 0)], "dimensions"),
        ([table("a", (1 << 24, 1 << 24), 0, 0)], "has the dimensions"),
        ([table("a", (1 << 24, (1 << 24) - 1), 0, 0)], "outside the file"),
        ([table("a", (33, 4), 2, 0)], "rows of 33 weights, and Q4_0 has blocks of 32"),
        ([table("a", (4,), 0, 4)], "no multiple"),
        ([table("a", (4,), 0, 1 << 62)], "outside the file"),
        ([table("a", (1 << 20,), 0, 0)], "outside the file"),
        ([table("a", (4,), 0, 0), table("a", (4,), 0, 32)], "twice"),
        ([table("a", (16,), 0, 0), table("b", (16,), 0, 32)], "overlaps"),
    ],
)
def test_tables_are_refused(tmp_path: Path, entries: list[bytes], said: str) -> None:
    body = head(tensors=len(entries)) + b"".join(entries)
    assert said in refused(tmp_path, body + bytes(-len(body) % 32 + 128))


def read(tmp_path: Path, data: bytes) -> GgufFile:
    (tmp_path / "m.gguf").write_bytes(data)
    return GgufFile(tmp_path / "m.gguf")


def test_the_smallest_file(tmp_path: Path) -> None:
    file = read(tmp_path, head())
    assert (file.metadata, file.tensors) == ({}, {})
    for data, known in ((head(), True), (b"GGUF", True), (b"GGU", False), (b"GGUG" + head()[4:], False), (b"", False)):
        (tmp_path / "m").write_bytes(data)
        assert is_gguf(tmp_path / "m") is known


@pytest.mark.parametrize(("what", "most"), [("tensors", 1 << 17), ("keys", 1 << 14)])
def test_counts_have_a_limit(tmp_path: Path, what: str, most: int) -> None:
    """What is within it is read until the file ends."""
    assert "truncated" in refused(tmp_path, head(**{what: most}))
    assert f"claims to have {most + 1} {what}; at most {most}" in refused(tmp_path, head(**{what: most + 1}))


def test_names_have_a_limit(tmp_path: Path) -> None:
    key, name = "k" * ((1 << 16) - 1), "n" * (1 << 10)
    assert list(read(tmp_path, head(keys=1) + text(key) + typed(1)).metadata) == [key]
    assert "claims a length of 65536" in refused(tmp_path, head(keys=1) + text(key + "k") + typed(1))
    data = bytes(128)
    assert list(read(tmp_path, head(tensors=1) + table(name, (1,) * 4, 0, 0) + data).tensors) == [name]
    assert "claims a length of 1025" in refused(tmp_path, head(tensors=1) + table(name + "n", (1,), 0, 0) + data)


def test_alignment_has_a_limit(tmp_path: Path) -> None:
    most = 1 << 20
    start = head(tensors=1, keys=1) + text("general.alignment")
    data = start + typed(most) + table("a", (1,), 0, 0)
    (tmp_path / "m.gguf").write_bytes(data + bytes(most - len(data)) + struct.pack("<f", 7.5))
    assert GgufFile(tmp_path / "m.gguf").blocks("a").view(np.float32).tolist() == [[7.5]]
    least = head(tensors=1, keys=1) + text("general.alignment") + typed(1) + table("abc", (1,), 0, 0)
    assert read(tmp_path, least + struct.pack("<f", 7.5)).blocks("abc").view(np.float32).tolist() == [[7.5]]
    assert "power of two up to 1048576" in refused(tmp_path, start + typed(2 * most))


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 6, 7, STRING, 10, 11, 12])
def test_an_array_may_fill_the_file_and_not_claim_more(tmp_path: Path, kind: int) -> None:
    size = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1}.get(kind, 8)
    for count in (0, 1, 9):
        start = head(keys=1) + text("k") + struct.pack("<II", ARRAY, kind)
        whole = start + struct.pack("<Q", count) + bytes(count * size)
        found = read(tmp_path, whole).metadata["k"]
        assert isinstance(found, list) and len(found) == count and not any(found)
        more = start + struct.pack("<Q", count + 1) + bytes(count * size)
        assert f"claims to have {count + 1} items" in refused(tmp_path, more)


def test_the_arrays_of_a_file_have_a_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.frontends.gguf.reader._MOST_ITEMS", 10)
    arrays = {"a": [1] * 4, "b": ["x"] * 6}
    assert read(tmp_path, header(arrays, {})).metadata == arrays
    assert "'c' claims to have 1 items" in refused(tmp_path, header({**arrays, "c": [True]}, {}))


def sparse(path: Path, data: bytes, size: int) -> Path:
    """A file of so many bytes, zeros behind the data, which take no room."""
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def test_the_limit_of_items_is_above_all_vocabularies(tmp_path: Path) -> None:
    data = head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, 0, 1 << 23)
    found = GgufFile(sparse(tmp_path / "m.gguf", data, (1 << 23) + 1000)).metadata["k"]
    assert isinstance(found, list) and len(found) == 1 << 23


def test_no_more_is_read_than_any_model_has(tmp_path: Path) -> None:
    """2^23 items, and a header of 512 MiB."""
    data = head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, 0, (1 << 23) + 1)
    with pytest.raises(FrontendError, match="claims to have 8388609 items"):
        GgufFile(sparse(tmp_path / "m.gguf", data, (1 << 23) + 1000))
    data = head(keys=1) + text("k") + struct.pack("<I", STRING)
    data += struct.pack("<Q", (512 << 20) - len(data) - 8 + 1)
    with pytest.raises(FrontendError, match="claims a length"):
        GgufFile(sparse(tmp_path / "m.gguf", data, 513 << 20))


def test_a_header_has_a_limit_whatever_the_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.frontends.gguf.reader._MOST_HEADER_BYTES", 100)
    value = head(keys=1) + text("k") + struct.pack("<I", STRING)
    fits = text("x" * (100 - len(value) - 8))
    assert len(str(read(tmp_path, value + fits + bytes(1000)).metadata["k"])) == 100 - len(value) - 8
    longer = text("x" * (101 - len(value) - 8))
    assert "claims a length" in refused(tmp_path, value + longer + bytes(1000))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "missing", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(FrontendError, match=f"cannot be read: {said}"):
            GgufFile(path)
        assert not is_gguf(path)


def test_pages_that_were_read_are_given_back_and_read_again(tmp_path: Path) -> None:
    """Tensors of several pages, at places that are no multiple of a page."""
    arrays = {name: values(7, 1000 + number) for number, name in enumerate("abc")}
    file = GgufFile(write(tmp_path / "m.gguf", METADATA, {name: ("F32", array) for name, array in arrays.items()}))
    for name in "abcabccba":
        np.testing.assert_array_equal(file.blocks(name).view(np.float32), arrays[name])


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    found = 0
    mapping = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mapping = line.endswith(str(path))
        elif mapping and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def test_only_the_last_tensor_s_pages_stay(tmp_path: Path) -> None:
    """A whole model passes through, one tensor at a time."""
    size = 8 << 20  # large beside what a system reads ahead
    file = GgufFile(write(tmp_path / "m.gguf", {}, {name: ("F32", np.ones((2, size // 8))) for name in "abc"}))
    for name in "abc":
        assert file.blocks(name).sum() > 0
        assert size <= resident(tmp_path / "m.gguf") < 1.5 * size


def test_43_bytes(tmp_path: Path) -> None:
    """A key with an array that claims 2^63 items: nothing is allocated, nothing loops."""
    data = head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 1 << 63)
    assert len(data) < 64
    started = time.perf_counter()
    refused(tmp_path, data[:43] + bytes(max(0, 43 - len(data))))
    assert time.perf_counter() - started < 1


def small_model() -> bytes:
    """A header with everything in it that a header may have, and some data."""
    metadata = METADATA | {"general.alignment": 32, "llama.block_count": 1, "tokenizer.ggml.tokens": ["a", "b", "c"]}
    return header(metadata, {"x": ("F32", (4, 8), 0), "y": ("Q4_0", (2, 32), 128), "z": ("F16", (3,), 192)})


ENDS = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, seed: int) -> bytes:
    """A header with a few bytes changed, cut, doubled or made the ends of their range."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(0, len(out))), rng.integers(0, 6)
        if kind == 0:
            out[at] = int(rng.integers(0, 256))
        elif kind == 1:
            out[at : at + 8] = struct.pack("<Q", ENDS[rng.integers(len(ENDS))])
        elif kind == 2:
            out[at : at + 4] = struct.pack("<I", int(rng.integers(0, 50)))
        elif kind == 3:
            del out[at : at + int(rng.integers(1, 16))]
        elif kind == 4:
            out[at:at] = out[at : at + int(rng.integers(1, 64))]
        else:
            del out[at:]
            break
    return bytes(out)


def read_mutants(folder: Path, seeds: range) -> tuple[int, int]:
    """How many files were read and refused; another exception, or reading data that is not there, fails."""
    data, path = small_model(), folder / "m.gguf"
    read = wrong = 0
    for seed in seeds:
        changed = mutated(data, seed)
        path.write_bytes(changed + bytes(-len(changed) % 32 + 256))
        try:
            file = GgufFile(path)
            for name in file.tensors:
                file.blocks(name).sum()
            read += 1
        except FrontendError as error:
            assert "\n" not in str(error)
            wrong += 1
    return read, wrong


def test_mutated_headers(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    read, wrong = read_mutants(tmp_path, range(600))
    assert read > 20 and wrong > 200
    assert time.perf_counter() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB


@pytest.mark.slow
def test_many_mutated_headers(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, wrong = read_mutants(tmp_path, range(10_000))
    assert read > 300 and wrong > 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


# Bytes of the fields of a block, in the order of ggml-common.h: `ggml_half d` and the like.
FIELDS: dict[int, dict[str, tuple[int, ...]]] = {
    32: {
        "Q4_0": (2, 16), "Q4_1": (2, 2, 16), "Q5_0": (2, 4, 16), "Q5_1": (2, 2, 4, 16), "Q8_0": (2, 32),
        "IQ4_NL": (2, 16), "MXFP4": (1, 16),
    },
    256: {
        "Q2_K": (16, 64, 2, 2), "Q3_K": (32, 64, 12, 2), "Q4_K": (2, 2, 12, 128), "Q5_K": (2, 2, 12, 32, 128),
        "Q6_K": (128, 64, 16, 2), "Q8_K": (4, 256, 32), "IQ2_XXS": (2, 64), "IQ2_XS": (2, 64, 8),
        "IQ3_XXS": (2, 64, 32), "IQ1_S": (2, 32, 16), "IQ3_S": (2, 64, 8, 32, 4), "IQ2_S": (2, 64, 8, 8),
        "IQ4_XS": (2, 2, 4, 128), "IQ1_M": (32, 16, 8), "TQ1_0": (48, 4, 2), "TQ2_0": (64, 2),
    },
    1: {
        "F32": (4,), "F16": (2,), "I8": (1,), "I16": (2,), "I32": (4,), "I64": (8,), "F64": (8,), "BF16": (2,),
    },
}  # fmt: skip
# The names of `enum ggml_type`; those with a dash are not read.
ENUM = re.findall(
    r"\S+",
    "F32 F16 Q4_0 Q4_1 -Q4_2 -Q4_3 Q5_0 Q5_1 Q8_0 -Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 -Q4_0 -Q4_0 -Q4_0 TQ1_0 TQ2_0 -IQ4_NL -IQ4_NL -IQ4_NL "
    "MXFP4 -NVFP4 -Q1_0",
)


def test_types_have_the_sizes_that_their_fields_add_up_to() -> None:
    expected = {name: (block, sum(sizes)) for block, names in FIELDS.items() for name, sizes in names.items()}
    assert len(expected) == len(TENSOR_TYPES)
    for number, name in enumerate(ENUM):
        if name.startswith("-"):
            assert number not in TENSOR_TYPES and UNREAD_TYPES[number].startswith(name[1:])
            continue
        kind = TENSOR_TYPES[number]
        assert (kind.name, (kind.block, kind.size)) == (name, expected[name])
        assert kind.bits == 8 * kind.size / kind.block
    for name, (number, block, size) in TYPES.items():
        assert (ENUM[number], expected[name]) == (name, (block, size))  # what tests write
