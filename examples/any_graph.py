"""An ONNX model that is not text: compiled for arrays of any batch up to a limit, and compared with numpy."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import llmc

random = np.random.default_rng(0)
weight, bias = random.standard_normal((4, 3)).astype(np.float32), np.zeros(3, np.float32)
graph = helper.make_graph(
    [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Softmax", ["h"], ["y"], axis=-1)],
    "classifier",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
)
with tempfile.TemporaryDirectory() as folder:
    source, artifact = Path(folder) / "classifier.onnx", Path(folder) / "classifier.so"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), source)
    llmc.compile(source, artifact, dtype="f32", max_dims={"batch": 32})
    x = random.standard_normal((5, 4)).astype(np.float32)
    y = llmc.Runtime.load(artifact).run({"x": x})["y"]

scores = np.exp(x @ weight + bias)
print("largest difference from numpy:", np.abs(y - scores / scores.sum(axis=1, keepdims=True)).max())
