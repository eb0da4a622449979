"""Small ONNX graphs, run by onnxruntime and by the evaluator after translation, with free sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, helper

from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Array, Tensor, dtype_of
from llmc.frontends.onnx.ops_defined import body_of
from llmc.frontends.onnx.translation import Item, Translation

OPSET = 21
Shape = Sequence[int | str]


@dataclass(frozen=True)
class Draws:
    """Arrays of random numbers, the same ones for the same seed and calls."""

    rng: np.random.Generator

    def floats(self, *shape: int) -> Array:
        """Normal f32."""
        return self.rng.standard_normal(shape).astype(np.float32)

    def integers(self, *shape: int, dtype: type = np.uint8) -> Array:
        """Anything that the dtype holds."""
        info = np.iinfo(dtype)
        return self.rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


@dataclass
class Nodes:
    """A graph in the making. `add` gives the name of an op's output; numbers become initializers.

    inputs: (dtype, shape) by name; a size that is a text is free, from 1 to 64.
    """

    inputs: Mapping[str, tuple[str, Shape]]
    opset: int = OPSET
    nodes: list[NodeProto] = field(default_factory=list)
    stored: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, op: str, *operands: object, outputs: int = 1, **attributes: object) -> str:
        found = self.many(op, *operands, outputs=outputs, **attributes)
        return found[0]

    def many(self, op: str, *operands: object, outputs: int = 1, **attributes: object) -> list[str]:
        names = [self._name(operand) for operand in operands]
        results = [f"{op.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, names, results, name=f"node_{len(self.nodes)}", **attributes))
        return results

    def _name(self, operand: object) -> str:
        if isinstance(operand, str):
            return operand
        if operand is None:
            return ""
        array = np.asarray(operand)
        name = f"constant_{len(self.stored)}"
        self.stored.append(onnx.numpy_helper.from_array(array, name))
        return name

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The graph as a file would hold it; results have no types, as onnxruntime finds these itself."""
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
            for name, (dtype, shape) in self.inputs.items()
        ]
        graph = helper.make_graph(
            self.nodes, "graph", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], self.stored
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    def items(self, *outputs: str) -> tuple[list[Item], tuple[Input, ...]]:
        """What the outputs are after translation, and the inputs that they are over."""
        inputs = tuple(
            Input(
                name, Tensor(tuple(symbol(d, 1, 64) if isinstance(d, str) else d for d in shape), dtype_of(np.dtype(t)))
            )
            for name, (t, shape) in self.inputs.items()
        )
        given = {value.name: Item(value) for value in inputs}
        return Translation().run(body_of(self.model(*outputs).graph, {"": self.opset}), given), inputs

    def graph(self, *outputs: str) -> Graph:
        """The translated graph."""
        items, inputs = self.items(*outputs)
        return Graph("graph", inputs, tuple(zip(outputs, (item.value for item in items), strict=True)))

    def runtime(self, *outputs: str) -> onnxruntime.InferenceSession:
        """onnxruntime's session of the graph, as it stands."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        model = self.model(*outputs).SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def evaluated(graph: Graph, arrays: Mapping[str, Array]) -> list[Array]:
    """The graph's outputs, in order."""

    def no_params(name: str) -> Array:
        raise AssertionError(name)

    found = evaluate(graph, {value.name: arrays[value.name] for value in graph.inputs}, no_params)
    return [np.asarray(found[name]) for name, _ in graph.outputs]


def compare(nodes: Nodes, outputs: Sequence[str], arrays: Mapping[str, Array], rtol: float = 1e-5) -> None:
    """Shapes, dtypes and values of the translated graph are onnxruntime's."""
    expected = nodes.runtime(*outputs).run(None, {name: np.asarray(array) for name, array in arrays.items()})
    found = evaluated(nodes.graph(*outputs), arrays)
    for name, own, other in zip(outputs, found, expected, strict=True):
        other = np.asarray(other)
        assert (own.shape, own.dtype) == (other.shape, other.dtype), name
        np.testing.assert_allclose(own, other, rtol=rtol, atol=rtol, err_msg=name)
