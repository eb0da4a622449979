"""Small ONNX files for tests: built by hand, written to a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def value(name: str, shape: Sequence[int | str | None], dtype: int = FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, dtype, list(shape))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Mapping[str, np.ndarray] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 21,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model that onnx itself does not check: tests write wrong ones too."""
    stored = [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()]
    graph = helper.make_graph(list(nodes), "main", list(inputs), list(outputs), stored)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def write(model: onnx.ModelProto | bytes, path: Path) -> Path:
    """The file of a model."""
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def mlp(width: int = 7, hidden: int = 70, dtype: type = np.float32) -> onnx.ModelProto:
    """x [batch, width] -> Relu(x @ first + bias) @ second [batch, width]; `first` and `second` are params."""
    rng = np.random.default_rng(width)
    arrays = {
        "first": rng.standard_normal((width, hidden)).astype(dtype),
        "bias": rng.standard_normal(hidden).astype(dtype),
        "second": rng.standard_normal((hidden, width)).astype(dtype),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["positive"]),
        helper.make_node("MatMul", ["positive", "second"], ["y"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model_of(nodes, [value("x", ["batch", width], kind)], [value("y", ["batch", width], kind)], arrays)


def external(model: onnx.ModelProto, name: str, location: str, **entries: object) -> onnx.ModelProto:
    """The model with one initializer said to lie outside. entries: offset, length."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))
    return changed
