"""From an ONNX file that is no text to `Runtime.run`: the artifact says what ONNX Runtime says, at any sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_harness import CACHE
from onnx import TensorProto, helper
from test_cli import run

import llmc
from llmc.errors import CompileError, RuntimeStateError
from llmc.runtime.runtime import Runtime

INPUTS = (("features", TensorProto.FLOAT, ["batch", "steps", 12]), ("chosen", TensorProto.INT64, ["batch"]),
          ("keep", TensorProto.BOOL, ["steps"]))  # fmt: skip
OUTPUTS = (("scores", TensorProto.FLOAT), ("best", TensorProto.INT64), ("same", TensorProto.FLOAT),
           ("flat", TensorProto.FLOAT), ("table", TensorProto.FLOAT), ("long", TensorProto.BOOL))  # fmt: skip


def write_model(path: Path) -> Path:
    """A small network over a sequence: two layers, a masked mean, a row of a table, and outputs that share memory."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((12, 33), np.float32),
        "b1": rng.standard_normal(33, np.float32),
        "w2": rng.standard_normal((33, 7), np.float32),
        "rows": rng.standard_normal((5, 7), np.float32),
        "axis": np.array([1], np.int64),
        "all": np.array([-1], np.int64),
        "four": np.array(4, np.int64),
    }
    node = helper.make_node
    nodes = [
        node("MatMul", ["features", "w1"], ["m1"]),
        node("Add", ["m1", "b1"], ["a1"]),
        node("Tanh", ["a1"], ["h1"]),
        node("MatMul", ["h1", "w2"], ["m2"]),
        node("Cast", ["keep"], ["kept"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["kept", "all"], ["column"]),
        node("Mul", ["m2", "column"], ["masked"]),
        node("ReduceSum", ["masked", "axis"], ["sum"], keepdims=0),
        node("Gather", ["rows", "chosen"], ["row"], axis=0),
        node("Add", ["sum", "row"], ["scores"]),
        node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
        node("Identity", ["features"], ["same"]),
        node("Reshape", ["scores", "all"], ["flat"]),
        node("Identity", ["rows"], ["table"]),
        node("Shape", ["keep"], ["shape"]),
        node("Greater", ["shape", "four"], ["long"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(*entry) for entry in INPUTS],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in OUTPUTS],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("network") / "network.onnx")


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    path = model.with_suffix(".so")
    llmc.compile(model, path, dtype="f32", max_dims={"steps": 129}, kernel_cache=CACHE)
    return path


def inputs(batch: int, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "features": rng.standard_normal((batch, steps, 12), np.float32),
        "chosen": rng.integers(0, 5, batch),
        "keep": rng.integers(0, 2, steps).astype(bool),
    }


@pytest.mark.parametrize("batch, steps", [(1, 1), (1, 129), (7, 31), (8, 33), (3, 4)])
def test_outputs_are_those_of_onnx_runtime(model: Path, artifact: Path, batch: int, steps: int) -> None:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    runtime = Runtime.load(artifact, threads=2)
    for seed in (0, 1):
        given = inputs(batch, steps, seed)
        expected = dict(zip((name for name, _ in OUTPUTS), session.run(None, given), strict=True))
        found = runtime.run(given)
        assert list(found) == [name for name, _ in OUTPUTS]
        for name, array in expected.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
            # Sums of up to 129 rows of size about 3.
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=2e-4 if name in ("scores", "flat") else 0)


def test_results_do_not_share_memory(artifact: Path) -> None:
    """Each output can be written to without changing another, the inputs or the model."""
    runtime = Runtime.load(artifact, threads=1)
    given = inputs(2, 5)
    first = runtime.run(given)
    for name, array in first.items():
        others = {other: value.copy() for other, value in first.items() if other != name}
        array[...] = array.dtype.type(1)
        for other, value in others.items():
            np.testing.assert_array_equal(first[other], value)
    np.testing.assert_array_equal(given["features"], inputs(2, 5)["features"])
    again = runtime.run(given)
    assert not np.array_equal(again["table"], first["table"])


def test_indices_beyond_a_table_are_errors(artifact: Path) -> None:
    """Negative ones count from the end, as in ONNX; others end the run, and the next one is as ever."""
    runtime = Runtime.load(artifact, threads=1)
    given = inputs(8, 4)
    chosen, rows = np.array([-1, -5, 0, 4, 1, 2, -2, 3]), np.array([4, 0, 0, 4, 1, 2, 3, 3])
    found, expected = (runtime.run({**given, "chosen": indices})["scores"] for indices in (chosen, rows))
    np.testing.assert_array_equal(found, expected)
    for wrong in (5, -6, 2**40, -(2**40), 2**31):
        with pytest.raises(
            RuntimeStateError, match=r"index out of range: axis 0 of .*, by chosen; the axis has 5 elements"
        ):
            runtime.run({**given, "chosen": np.array([*chosen[:7], wrong])})
    np.testing.assert_array_equal(runtime.run({**given, "chosen": chosen})["scores"], expected)


def test_larger_sizes_name_the_option(artifact: Path) -> None:
    runtime = Runtime.load(artifact, threads=1)
    with pytest.raises(RuntimeStateError, match=r"steps is 130 in .*compiled for 129 at most.*--max-dim steps=130"):
        runtime.run(inputs(1, 130))
    with pytest.raises(RuntimeStateError, match="batch is 2 in features and 3 in chosen"):
        runtime.run({**inputs(2, 4), "chosen": np.zeros(3, np.int64)})


def test_the_command_line(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.so"
    status, out, _ = run(capfd, "compile", model, "-q", "none", "--max-dim", "steps=16", "-o", path)
    assert status == 0
    assert "features float32 [batch, steps, 12]" in out and "steps 1 to 16" in out and "Runtime.load(" in out
    status, out, _ = run(capfd, "bench", path, "--dim", "steps=5", "--repeats", 1, "--json")
    assert status == 0 and json.loads(out)["sizes"]["steps"] == 5
    status, out, _ = run(capfd, "explain", path)
    assert status == 0 and "Kernels" in out
    status, _, err = run(capfd, "compile", model, "--max-dim", "stepz=16", "-o", path)
    assert status == 1 and "stepz" in err and len([line for line in err.splitlines() if "error" in line]) == 1


@pytest.mark.parametrize("text", ["steps", "=3", "steps=x", "steps=0", "steps=-1", "steps=1e3"])
def test_wrong_sizes_on_the_command_line(model: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "compile", model, "--max-dim", text)
    assert status == 1 and out == "" and "--max-dim" in err and len(err.splitlines()) == 1


def test_options_by_keyword_are_checked(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="--max-dim steps is at least 1"):
        llmc.compile(model, tmp_path / "x.so", max_dims={"steps": 0})
