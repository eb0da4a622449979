"""`llmc compile model.onnx`, `llmc.compile` and `llmc.from_hf` of ONNX files, and directories that hold only those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from kernel_harness import CACHE
from onnx_exports import export
from onnx_files import mlp, write
from onnx_graphs import Nodes
from own_cache import use_own_cache

import llmc
from llmc import cli
from llmc.errors import LlmcError
from llmc.frontends import onnx_file


def run(*arguments: object) -> int:
    """The command's exit status."""
    return cli.run([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_cache(tmp_path / "cache", monkeypatch)


def test_a_graph_of_plain_tensors_runs_at_every_size(tmp_path: Path) -> None:
    path = write(mlp(31), tmp_path / "model.onnx")
    manifest = llmc.compile(path, tmp_path / "model.so", dtype="f32", max_dims={"batch": 33}, kernel_cache=CACHE)
    assert manifest["task"] == "run"
    runtime = llmc.Runtime.load(tmp_path / "model.so", threads=2)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 7, 31, 33):
        x = np.random.default_rng(batch).standard_normal((batch, 31)).astype(np.float32)
        (want,) = session.run(None, {"x": x})
        np.testing.assert_allclose(runtime.run({"x": x})["y"], want, rtol=0, atol=1e-4)
    with pytest.raises(LlmcError, match="batch"):
        runtime.run({"x": np.zeros((34, 31), np.float32)})


@pytest.mark.parametrize("side", ["left", "right", "integers"])
def test_weights_without_elements(side: str, tmp_path: Path) -> None:
    """Sums of nothing are 0."""
    nodes = Nodes({"x": ("float32", ["batch", 3])}, opset=21)
    nothing = nodes.add("Slice", "x", np.array([1]), np.array([1]), np.array([1]))
    if side == "left":
        result = nodes.add("MatMul", np.zeros((4, 0), np.float32), nodes.add("Transpose", nothing))
    elif side == "right":
        result = nodes.add("MatMul", nothing, np.zeros((0, 4), np.float32))
    else:
        integers, scale, zero = nodes.many(
            "DynamicQuantizeLinear", nodes.add("Concat", nothing, "x", axis=1), outputs=3
        )
        rounded = nodes.add("MatMulInteger", integers, np.zeros((3, 0), np.uint8), zero)
        result = nodes.add("Mul", nodes.add("Cast", rounded, to=1), scale)
    path = write(nodes.model(result), tmp_path / "model.onnx")
    x = np.ones((2, 3), np.float32)
    found = llmc.from_hf(path, dtype="f32", kernel_cache=CACHE).run({"x": x})[result]
    (want,) = nodes.runtime(result).run(None, {"x": x})
    np.testing.assert_array_equal(found, want)


def test_the_command_line_takes_a_file_and_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export("gpt2", "script", tmp_path)
    tokenizer = tmp_path / "words"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path.parent / name).rename(tokenizer / name)
    monkeypatch.chdir(tmp_path)
    assert run("compile", path, "-q", "none", "--tokenizer", tokenizer) == 0
    runtime = llmc.Runtime.load(tmp_path / "model-none.so", threads=2)
    assert runtime.tokenizer is not None and runtime.tokenizer.encode("hello")
    capsys.readouterr()
    for folder, message in ((tmp_path / "nothing", "there is no directory"), (tmp_path, "holds no tokenizer")):
        assert run("compile", path, "-q", "none", "--tokenizer", folder, "-o", "again.so") == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "again.so").exists()


def test_an_artifact_is_made_once(tmp_path: Path) -> None:
    write(mlp(7), tmp_path / "model.onnx")
    path = tmp_path / "model.onnx"
    for _ in range(2):
        llmc.from_hf(path, dtype="f32", kernel_cache=CACHE).run({"x": np.zeros((1, 7), np.float32)})
    assert len(list((tmp_path / "cache" / "artifacts").glob("*.so"))) == 1
    write(mlp(9), path)
    llmc.from_hf(path, dtype="f32", kernel_cache=CACHE).run({"x": np.zeros((1, 9), np.float32)})


def test_a_directory_that_holds_an_onnx_file_alone(tmp_path: Path) -> None:
    assert onnx_file(tmp_path) is None
    (tmp_path / "onnx").mkdir()
    inner = write(mlp(), tmp_path / "onnx" / "model.onnx")
    assert onnx_file(tmp_path) == inner
    outer = write(mlp(), tmp_path / "some.onnx")
    assert onnx_file(tmp_path) == outer and onnx_file(outer) == outer
    write(mlp(), tmp_path / "other.onnx")
    assert onnx_file(tmp_path) == inner  # of two, neither is meant
    write(mlp(), tmp_path / "model.onnx")
    assert onnx_file(tmp_path) == tmp_path / "model.onnx"
    (tmp_path / "model.safetensors").touch()
    assert onnx_file(tmp_path) is None
    assert onnx_file("organization/name") is None


def test_mistakes_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(mlp(), tmp_path / "model.onnx")
    for arguments, message in (
        ([tmp_path / "no.onnx"], "there is no file"),
        ([path, "--max-dim", "height=3"], "no size 'height'"),
    ):
        assert run("compile", *arguments, "-o", tmp_path / "model.so") == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1 and message in lines[0]
