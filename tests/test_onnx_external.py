"""Weights outside the model's file: the same as inside, and never from anywhere but the model's own folder."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_files import external, mlp, model_of, value, write

from llmc.compiler.ir.evaluate import evaluate
from llmc.errors import FrontendError
from llmc.frontends.lifted import Lifted
from llmc.frontends.onnx import lift

FIRST = np.frombuffer(next(t.raw_data for t in mlp().graph.initializer if t.name == "first"), np.float32)


def result(lifted: Lifted) -> np.ndarray:
    x = np.linspace(-1, 1, 3 * 7, dtype=np.float32).reshape(3, 7)
    found = evaluate(lifted.graph, {"x": x}, lifted.load)["y"]
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("where", ["weights.bin", "deep/er/weights.bin", "./weights.bin"])
@pytest.mark.parametrize("offset", [0, 3, 4096])
def test_outside_is_as_inside(tmp_path: Path, where: str, offset: int) -> None:
    inside = lift(write(mlp(), tmp_path / "inside.onnx"))
    (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / where).write_bytes(bytes(offset) + FIRST.tobytes() + b"more")
    outside = lift(write(external(mlp(), "first", where, offset=offset, length=FIRST.nbytes), tmp_path / "out.onnx"))
    np.testing.assert_array_equal(result(inside), result(outside))
    array = outside.load("first")  # the file's own bytes where its numbers stand at multiples of their size
    assert array.flags.aligned and array.flags.writeable == (offset % 4 > 0)


def test_a_length_and_an_offset_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(FIRST.tobytes())
    lifted = lift(write(external(mlp(), "first", "weights.bin"), tmp_path / "out.onnx"))
    np.testing.assert_array_equal(lifted.load("first").ravel(), FIRST)


@pytest.mark.parametrize("where", ["nothing.bin", "weights.bin"])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_a_tensor_without_elements_has_no_bytes_anywhere(tmp_path: Path, where: str, dtype: type) -> None:
    (tmp_path / "weights.bin").touch()
    nodes = [onnx.helper.make_node("Concat", ["x", "nothing"], ["y"], axis=0)]
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    stored = {"nothing": np.zeros((0, 7), dtype)}
    model = model_of(nodes, [value("x", [3, 7], kind)], [value("y", [3, 7], kind)], stored)
    lifted = lift(write(external(model, "nothing", where, length=0), tmp_path / "m.onnx"))
    x = np.arange(21).reshape(3, 7).astype(dtype)
    np.testing.assert_array_equal(evaluate(lifted.graph, {"x": x}, lifted.load)["y"], x)


def parts_of(count: int, length: int) -> str:
    """A path of so many parts and letters."""
    sizes = [(length - count + 1) // count] * count
    sizes[0] += length - count + 1 - sum(sizes)
    return "/".join("a" * size for size in sizes)


@pytest.mark.parametrize(("parts", "length", "good"), [(16, 31, True), (17, 33, False), (8, 1024, True),
                                                       (8, 1025, False)])  # fmt: skip
def test_how_deep_and_how_long_a_path_may_be(tmp_path: Path, parts: int, length: int, good: bool) -> None:
    where = parts_of(parts, length)
    assert len(where) == length and where.count("/") == parts - 1
    (tmp_path / where).parent.mkdir(parents=True)
    (tmp_path / where).write_bytes(FIRST.tobytes())
    path = write(external(mlp(), "first", where), tmp_path / "model.onnx")
    if good:
        np.testing.assert_array_equal(lift(path).load("first").ravel(), FIRST)
        return
    with pytest.raises(FrontendError, match="own folder"):
        lift(path)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../secret.bin", "own folder"),
        ("inner/../../secret.bin", "own folder"),
        ("/etc/passwd", "own folder"),
        ("inner//secret.bin", "own folder"),
        ("..\\secret.bin", "own folder"),
        ("C:secret.bin", "own folder"),
        ("", "own folder"),
        (".", "own folder"),
        ("a" * 2000, "own folder"),
        ("/".join("a" * 20), "own folder"),
        ("nothing.bin", "missing"),
        ("link.bin", "it is a link"),
        ("inner/inside.bin", "it is a link"),
        ("dangling.bin", "it is a link"),
        ("device.bin", "it is a link"),
        ("hard.bin", "2 names"),
        ("fifo.bin", "not a regular file"),
        ("folder.bin", "not a regular file"),
        ("empty.bin", "which is empty"),
        ("short.bin", f"at bytes 0..{FIRST.nbytes} of 'short.bin', which has {FIRST.nbytes - 1}: the file is trunc"),
    ],
)
def test_everything_else_is_refused_in_one_line(tmp_path: Path, location: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(FIRST.tobytes())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "inside.bin").write_bytes(FIRST.tobytes())
    (folder / "link.bin").symlink_to(secret)
    (folder / "dangling.bin").symlink_to("nowhere")
    (folder / "device.bin").symlink_to("/dev/zero")
    (folder / "inner").symlink_to(tmp_path / "elsewhere")
    os.link(secret, folder / "hard.bin")
    os.mkfifo(folder / "fifo.bin")
    (folder / "folder.bin").mkdir()
    (folder / "empty.bin").touch()
    (folder / "short.bin").write_bytes(FIRST.tobytes()[:-1])
    path = write(external(mlp(), "first", location), folder / "model.onnx")
    with pytest.raises(FrontendError, match=message) as raised:
        lift(path)
    assert "first" in str(raised.value) and "\n" not in str(raised.value)


def test_a_link_to_a_file_in_the_folder_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(FIRST.tobytes())
    (tmp_path / "link.bin").symlink_to("weights.bin")
    with pytest.raises(FrontendError, match="it is a link"):
        lift(write(external(mlp(), "first", "link.bin"), tmp_path / "model.onnx"))


def test_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match="own folder"):
        lift(write(external(mlp(), "first", "/dev/zero"), tmp_path / "model.onnx"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": -4}, "offset '-4'"),
        ({"offset": "0x10"}, "offset '0x10'"),
        ({"offset": "٣"}, "offset"),
        ({"offset": 1 << 80}, "offset"),
        ({"offset": 10**18 - 1}, "truncated"),
        ({"offset": 10**18}, f"external data with offset '{10**18}'"),
        *(({"offset": offset}, "truncated") for offset in (1, 4, 8, 256, 1024)),
        ({"length": 8}, "but has 8"),
        ({"length": 1 << 50}, "but has"),
    ],
)
def test_offsets_and_lengths_are_checked(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    (tmp_path / "weights.bin").write_bytes(FIRST.tobytes())
    with pytest.raises(FrontendError, match=message):
        lift(write(external(mlp(), "first", "weights.bin", **entries), tmp_path / "model.onnx"))


@pytest.mark.parametrize("hidden", [3, 99])  # 84 bytes, and 2,772 that are not parsed
def test_data_that_lies_in_two_places_is_refused(hidden: int, tmp_path: Path) -> None:
    data = next(tensor.raw_data for tensor in mlp(7, hidden).graph.initializer if tensor.name == "first")
    (tmp_path / "weights.bin").write_bytes(data)
    model = external(mlp(7, hidden), "first", "weights.bin")
    model.graph.initializer[0].raw_data = data
    with pytest.raises(FrontendError, match="'first' has its data in the model's file and outside it"):
        lift(write(model, tmp_path / "model.onnx"))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(FIRST.tobytes())
    model = external(mlp(), "first", "weights.bin")
    model.graph.initializer[0].external_data.add(key="location", value="other.bin")
    with pytest.raises(FrontendError, match="twice"):
        lift(write(model, tmp_path / "model.onnx"))


def test_the_hub_cache_may_link_to_its_own_store(tmp_path: Path) -> None:
    """The hub's cache keeps files as snapshots/REVISION/NAME, links to blobs/HASH."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / ("0" * 64)).write_bytes(FIRST.tobytes())
    write(external(mlp(), "first", "model.onnx_data"), blobs / ("1" * 64))
    (snapshot / "model.onnx").symlink_to(Path("../../../blobs") / ("1" * 64))
    (snapshot / "model.onnx_data").symlink_to(Path("../../../blobs") / ("0" * 64))
    np.testing.assert_array_equal(lift(snapshot / "model.onnx").load("first").ravel(), FIRST)
    hashed = "2" * 64
    for name in ("secret", "blobs/secret", hashed, f"snapshots/{hashed}"):
        (tmp_path / name).write_bytes(FIRST.tobytes())
    for target in ("secret", "blobs/../secret", "blobs/secret", hashed, f"snapshots/{hashed}", tmp_path / "secret"):
        (snapshot / "model.onnx_data").unlink()
        (snapshot / "model.onnx_data").symlink_to(Path("../../..") / target)
        with pytest.raises(FrontendError, match="it is a link"):
            lift(snapshot / "model.onnx")


def test_gigabytes_of_weights_are_not_read_to_lift(tmp_path: Path) -> None:
    """A sparse file of 8 GiB stands for one: lifting it takes less memory than a hundredth of it."""
    rows = 1 << 28
    model = mlp()
    for name, dims in (("first", [7, rows]), ("second", [rows, 7])):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.dims[:] = dims
    bias = onnx.helper.make_tensor("bias", onnx.TensorProto.FLOAT, [1], [1.0])
    next(tensor for tensor in model.graph.initializer if tensor.name == "bias").CopyFrom(bias)
    outside = external(external(model, "first", "big.bin"), "second", "big.bin")
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(rows * 7 * 4 + 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lifted = lift(write(outside, tmp_path / "model.onnx"))
    assert lifted.parameters == 2 * 7 * rows
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80 << 10  # KiB
