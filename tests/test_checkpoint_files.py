"""Files of weights, byte by byte: where their borders lie, and that every dtype comes out as it went in."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES
from llmc.errors import FrontendError
from llmc.frontends.hf import weights
from llmc.frontends.hf.weights import ArrayWeights, SafetensorsFile, ShardedFiles, is_finite, open_checkpoint, shortened

KINDS = weights._SAFETENSORS_DTYPES
# What files call dtypes, and what torch does.
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path) -> str:
    with pytest.raises(FrontendError) as caught:
        SafetensorsFile(path)
    return str(caught.value)


def numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 1, 1, 0, 1]]).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_is_what_torch_wrote(kind: str, tmp_path: Path) -> None:
    """Through a safetensors file, a file of torch's, and back to torch."""
    tensor = numbers(TORCH[kind])
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    torch.save({"x": tensor}, tmp_path / "x.bin")
    for source in (SafetensorsFile(tmp_path / "x.safetensors"), weights.TorchFile(tmp_path / "x.bin")):
        array = source.load("x")
        assert (source.dtype("x"), source.shape("x"), list(source.names)) == (KINDS[kind], (2, 6), ["x"])
        assert array.dtype == weights.STORED_DTYPES[KINDS[kind]]
        assert array.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
        if not kind.startswith("F8"):
            back = weights.to_torch(array)
            assert isinstance(back, torch.Tensor) and back.dtype == tensor.dtype and torch.equal(back, tensor)


@pytest.mark.parametrize("shift", range(9))
def test_a_tensor_is_read_wherever_it_lies(shift: int, tmp_path: Path) -> None:
    """Aligned, in place and not to be written; else a copy. Behind others, of which some are empty."""
    header = {
        "first": entry("U8", [shift], 0, shift), "empty": entry("F32", [0, 5], shift, shift),
        "x": entry("F32", [2, 3], shift, shift + 24), "scalar": entry("F16", [], shift + 24, shift + 26),
    }  # fmt: skip
    values = np.arange(6, dtype=np.float32)
    pad = "" if not (8 + len(json.dumps(header))) % 4 else " " * (-(8 + len(json.dumps(header))) % 4)
    text = json.dumps(header) + pad
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(range(shift)) + values.tobytes() + b"\0\x3c")
    file = SafetensorsFile(path)
    assert file.load("first").tolist() == list(range(shift))
    assert file.load("empty").shape == (0, 5)
    assert file.load("x").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.load("x").flags.aligned and file.load("x").flags.writeable == (shift % 4 != 0)
    assert file.load("scalar").tolist() == 1


def test_pages_are_given_back_when_the_next_tensor_is_read(tmp_path: Path) -> None:
    """Whole pages that the one before lies in, and none before the first has been read."""
    page, given = mmap.PAGESIZE, []

    class Watched(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            super().madvise(option, start, length)
            given.append((option, start, start + length))

    sizes = {"a": page + 100, "b": 3 * page, "c": 7}
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())).tolist(), strict=True))
    header = {name: entry("U8", [size], ends[name] - size, ends[name]) for name, size in sizes.items()}
    path = write(tmp_path / "x.safetensors", header, bytes(ends["c"]))
    file = SafetensorsFile(path)
    with path.open("rb") as opened:
        file._bytes = Watched(opened.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + len(json.dumps(header))
    file.load("a")
    assert given == []
    file.load("b")
    file.load("c")
    assert [(option, begin // page, begin % page) for option, begin, _ in given] == [
        (mmap.MADV_DONTNEED, start // page, 0), (mmap.MADV_DONTNEED, (start + ends["a"]) // page, 0),
    ]  # fmt: skip
    assert [end for *_, end in given] == [start + ends["a"], start + ends["b"]]


@pytest.mark.parametrize("size", range(8))
def test_a_file_too_short_for_a_header_says_so(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    assert refusal(path) == f"{path} is no safetensors file: it has {size} bytes"


def test_a_header_ends_where_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert list(SafetensorsFile(path).names) == []
    path.write_bytes(struct.pack("<Q", 3) + b"{}")
    assert "its header claims 3 bytes" in refusal(path)
    path.write_bytes(struct.pack("<Q", 0))
    assert "its header is not valid JSON" in refusal(path)


def test_a_header_has_at_most_100_mib(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    most = 100 << 20
    for length, said in ((most, "not valid JSON"), (most + 1, f"its header claims {most + 1} bytes")):
        path.write_bytes(struct.pack("<Q", length) + b"\xff")
        with path.open("rb+") as file:
            file.truncate(9 + most)
        assert said in refusal(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "x.safetensors") == f"{tmp_path / 'x.safetensors'} cannot be read: No such file or directory"
    )


def test_metadata_are_texts_by_name(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt", "n": 3}, "x": entry("U8", [1], 0, 1), "A": entry("U8", [1], 1, 2)}
    file = SafetensorsFile(write(tmp_path / "a", header, b"12"))
    assert file.metadata == {"format": "pt"} and list(file.names) == ["x", "A"]
    assert SafetensorsFile(write(tmp_path / "b", {"__metadata__": ["format"]})).metadata == {}
    assert SafetensorsFile(write(tmp_path / "c", {})).metadata == {}


def test_places_are_as_they_are_described_up_to_the_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def said(*tensors: dict[str, object], size: int = 8) -> str:
        write(path, {f"t{number}": tensor for number, tensor in enumerate(tensors)}, bytes(size))
        try:
            SafetensorsFile(path)
        except FrontendError as error:
            return str(error)
        return ""

    assert said(entry("F32", [2], 0, 8)) == ""
    assert "'t0' lies at bytes 1..9, outside the file" in said(entry("F32", [2], 1, 9))
    assert "'t0' lies at bytes 4..0, outside the file" in said(entry("F32", [1], 4, 0))
    assert "takes 8 bytes, but F32 [3] needs 12" in said(entry("F32", [3], 0, 8))
    assert "takes 8 bytes, but F32 [1] needs 4" in said(entry("F32", [1], 0, 8))
    assert said(entry("F32", [1], 4, 8), entry("F32", [1], 0, 4)) == ""
    assert "tensor 't0' overlaps another one" in said(entry("U8", [4], 3, 7), entry("F32", [1], 0, 4))
    assert said(entry("F32", [1] * 8, 0, 4)) == ""
    assert "has shape" in said(entry("F32", [1] * 9, 0, 4))
    assert "needs 4611686018427387903" in said(entry("U8", [(1 << 62) - 1], 0, 8))
    for size in (1 << 62, 1 << 63, -1):
        assert "has shape" in said(entry("U8", [size], 0, 8))
    assert "takes 5 bytes, but U8 [3] needs 3" in said(entry("U8", [3], 3, 8))
    assert "has data_offsets" in said({"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]})
    assert "has data_offsets" in said({"dtype": "U8", "shape": [1]})
    assert "has dtype None, which is not supported" in said({"shape": [1], "data_offsets": [0, 1]})


FIRST, SECOND = Path("a.safetensors"), Path("b.safetensors")


def arrays(**named: object) -> ArrayWeights:
    return ArrayWeights({name: np.asarray(value) for name, value in named.items()})


def test_what_stands_in_two_files_is_the_same_in_both() -> None:
    one = np.arange(6, dtype=np.float32)
    both = ShardedFiles({FIRST: arrays(x=one, y=one), SECOND: arrays(x=one.copy(), z=one)})
    assert list(both.names) == ["x", "y", "z"]
    for other in (one + 1, one.astype(np.float64), one.reshape(2, 3), one.view(np.int32)):
        with pytest.raises(FrontendError, match=r"b\.safetensors: tensor 'x' stands in another file"):
            ShardedFiles({FIRST: arrays(x=one), SECOND: arrays(x=other)})


def test_an_index_may_lack_nothing_but_constants() -> None:
    parts = {FIRST: arrays(x=[1.0])}
    constants = ("a.rotary_emb.inv_freq", "position_ids", "a.position_ids", "h.0.attn.masked_bias")
    ShardedFiles(parts, dict.fromkeys(("x", *constants), "a.safetensors"))
    for lost in ("y", "my_position_ids", "a.rotary_emb.inv_freq.weight", "masked_bias"):
        with pytest.raises(FrontendError, match=f"index lists tensors that its files lack: {lost}$"):
            ShardedFiles(parts, {"x": "a.safetensors", lost: "a.safetensors"})


def test_metadata_of_all_files_are_one(tmp_path: Path) -> None:
    files = [
        SafetensorsFile(write(tmp_path / name, {"__metadata__": {name: "1", "both": name}})) for name in ("a", "b")
    ]
    found = ShardedFiles({FIRST: files[0], SECOND: files[1], Path("c"): arrays(x=1)})
    assert found.metadata == {"a": "1", "b": "1", "both": "b"}


def index(path: Path, *files: object) -> Path:
    path.write_text(json.dumps({"weight_map": {f"x{number}": file for number, file in enumerate(files)}}))
    return path


def test_an_index_names_files_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    save_file({"x0": torch.ones(1)}, tmp_path / "s.safetensors")
    (tmp_path / "zone").mkdir()
    assert list(open_checkpoint(index(path, "s.safetensors").parent).names) == ["x0"]
    for file in ("", ".", "..", "../s.safetensors", "zone/s.safetensors", str(tmp_path / "s.safetensors")):
        with pytest.raises(FrontendError, match="names a file outside its directory"):
            open_checkpoint(index(path, file).parent)
    for file in ("lost.safetensors", "zone"):
        with pytest.raises(FrontendError, match=f"lists '{file}', which is missing"):
            open_checkpoint(index(path, file).parent)
    for text in ("{}", '{"weight_map": ["s.safetensors"]}', '{"weight_map": {"x0": 3, "x1": "s.safetensors"}}'):
        path.write_text(text)
        with pytest.raises(FrontendError, match="has no weight_map from tensor names to files"):
            open_checkpoint(tmp_path)
    with path.open("rb+") as opened:
        opened.truncate((256 << 20) + 1)
    with pytest.raises(FrontendError, match=f"has {(256 << 20) + 1} bytes; at most {256 << 20} are read"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_is_found_by_its_name(tmp_path: Path) -> None:
    """safetensors before torch's files, one file before an index, and a file of another name where it is the only."""
    with pytest.raises(FrontendError, match=f"{tmp_path} has no weights: expected model.safetensors"):
        open_checkpoint(tmp_path)

    def first() -> list[str]:
        return list(open_checkpoint(tmp_path).names)

    save_file({"other": torch.ones(1)}, tmp_path / "net.safetensors")
    assert first() == ["other"]
    torch.save({"torch": torch.ones(1)}, tmp_path / "part.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"torch": "part.bin"}}))
    assert first() == ["torch"]
    torch.save({"one": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert first() == ["one"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"other": "net.safetensors"}}))
    assert first() == ["other"]
    save_file({"model": torch.ones(1)}, tmp_path / "model.safetensors")
    assert first() == ["model"]


def test_of_two_files_none_is_guessed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FrontendError, match="has no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("named", ["", ".", "..", "folder/net.safetensors", 7])
def test_a_checkpoint_that_a_config_names_lies_beside_it(named: object, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "folder" / "net.safetensors")
    with pytest.raises(FrontendError, match=r"config\.json: transformers_weights must name a file beside it, and is"):
        open_checkpoint(tmp_path, named)
    with pytest.raises(FrontendError, match="names 'folder', which is missing"):
        open_checkpoint(tmp_path, "folder")


def test_a_torch_file_holds_tensors_by_name(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for content in ([torch.ones(1)], {"x": torch.ones(1), "step": 3}, 7):
        torch.save(content, path)
        with pytest.raises(FrontendError, match=r"pytorch_model\.bin must hold tensors by name"):
            open_checkpoint(tmp_path)
    torch.save({"x": torch.ones(1, dtype=torch.complex64)}, path)
    with pytest.raises(FrontendError, match="tensor 'x' has dtype complex64, which is not supported"):
        open_checkpoint(tmp_path)
    torch.save({"x": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)  # the form of old
    assert open_checkpoint(tmp_path).load("x").tolist() == [0, 1, 2]
    for content in (b"", b"PK\x03\x04", b"\x80\x02cos\nsystem\nq\x00."):
        path.write_bytes(content)
        with pytest.raises(FrontendError, match="is damaged, or holds more than plain tensors"):
            open_checkpoint(tmp_path)


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_torch_file_of_either_form_runs_no_code(is_new: bool, tmp_path: Path) -> None:
    torch.save({"x": Exploit()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
    with pytest.raises(FrontendError, match="objects in it could run code, so it is not read"):
        open_checkpoint(tmp_path)


def test_a_torch_file_is_mapped_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a model of any size is not read at once."""
    asked: list[dict[str, object]] = []
    load = torch.load

    def watched(path: Path, **options: object) -> object:
        asked.append(options)
        return load(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", watched)
    for is_new in (True, False):
        torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
        assert open_checkpoint(tmp_path).load("x").tolist() == [1, 1]
    assert [options.get("mmap") for options in asked] == [True, True, None]


@given(st.lists(st.text("abc", min_size=1), unique=True), st.integers(1, 4))
@settings(max_examples=50)
def test_names_for_a_message_are_the_first_few_and_how_many_more(names: list[str], most: int) -> None:
    said = shortened(names, most)
    kept, _, more = said.partition(" and ")
    assert kept == ", ".join(sorted(names)[:most])
    assert more == (f"{len(names) - most} more" if len(names) > most else "")


def test_a_message_names_six() -> None:
    assert shortened("fabcedg") == "a, b, c, d, e, f and 1 more"


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_number_that_is_none_is_found_wherever_it_stands(dtype: str) -> None:
    kind = NUMPY_DTYPES[dtype]
    largest = ml_dtypes.finfo(kind).max
    array = np.zeros((2, (1 << 18) + 1), kind)
    array[0, 0], array[1, -1] = largest, -largest
    assert is_finite(array) and is_finite(array[:, ::2]) and is_finite(array[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for row, column in ((0, 0), (0, (1 << 18) - 1), (0, 1 << 18), (1, (1 << 18) - 2), (1, -1)):
            wrong = array.copy()
            wrong[row, column] = bad
            assert not is_finite(wrong)
        assert not is_finite(np.array(bad, kind))


@pytest.mark.parametrize("dtype", [name for name in NUMPY_DTYPES if name not in FLOATS])
def test_integers_are_numbers(dtype: str) -> None:
    for bits in (0, 0x7F, 0x80, 0xFF):
        assert is_finite(np.full(8, bits, np.uint8).view(NUMPY_DTYPES[dtype]))
