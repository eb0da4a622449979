"""One operation of ONNX Runtime against its translation: the same inputs through both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from llmc.compiler import passes as _registered  # noqa: F401
from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.elementwise import constant
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import FLOATS, Tensor, dtype_of
from llmc.compiler.passes.manager import Report, parse_pipeline, run_passes
from llmc.compiler.passes.probe import reading
from llmc.frontends.onnx.symbolic import numbers_of, objects
from llmc.frontends.onnx.translation import Body, Item, Node, Translation

MICROSOFT = "com.microsoft"
_names = (f"x{i}" for i in itertools.count())


class Case:
    """A node with its inputs: arrays, `Fixed` arrays (known when compiling), or None for what is left out."""

    def __init__(
        self,
        op: str,
        inputs: Sequence[np.ndarray | Fixed | None],
        attributes: Mapping[str, object] | None = None,
        outputs: int = 1,
        domain: str = MICROSOFT,
        symbols: Mapping[int, str] | None = None,
    ) -> None:
        """symbols: sizes that become symbols of these names wherever an input that is not fixed has them."""
        self.op, self.domain, self.outputs = op, domain, outputs
        self.inputs = list(inputs)
        self.attributes = dict(attributes or {})
        self.symbols = {size: symbol(name, 1, 64) for size, name in (symbols or {}).items()}
        self.names = ["" if x is None else f"in{i}" for i, x in enumerate(self.inputs)]

    def onnxruntime(self) -> list[np.ndarray]:
        """The outputs by ONNX Runtime, its own optimisations off."""
        results = [f"out{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, self.names, results, domain=self.domain, **self.attributes)
        values = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(plain(x).dtype), plain(x).shape)
            for name, x in zip(self.names, self.inputs, strict=True)
            if x is not None and not isinstance(x, Fixed)
        ]
        fixed = [
            onnx.numpy_helper.from_array(x.array, name)
            for name, x in zip(self.names, self.inputs, strict=True)
            if isinstance(x, Fixed)
        ]
        wanted = [onnx.ValueInfoProto(name=name) for name in results]
        graph = helper.make_graph([node], "one", values, wanted, fixed)
        imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, self.given())

    def given(self) -> dict[str, np.ndarray]:
        """The arrays of inputs that are not fixed, by name."""
        pairs = zip(self.names, self.inputs, strict=True)
        return {name: x for name, x in pairs if x is not None and not isinstance(x, Fixed)}

    def graph(self) -> Graph:
        """The translation, all outputs of it."""
        inputs: list[Input] = []
        items: list[Item | None] = []
        for name, x in zip(self.names, self.inputs, strict=True):
            if x is None:
                items.append(None)
            elif isinstance(x, Fixed):
                items.append(x.item())
            else:
                shape = tuple(self.symbols.get(size, size) for size in x.shape)
                inputs.append(Input(name, Tensor(shape, dtype_of(x.dtype))))
                items.append(Item(inputs[-1]))
        results = tuple(f"out{i}" for i in range(self.outputs))
        node = Node(self.op, self.domain, 1, "the_node", tuple(self.names), results, self.attributes)
        found = Translation().node(node, items, {})
        named = [(name, item.value) for name, item in zip(results, found, strict=False)]
        return Graph("one", tuple(inputs), tuple(named))

    def translated(self) -> list[np.ndarray]:
        """The outputs of the translation, evaluated."""
        graph = self.graph()
        found = evaluate(graph, self.given(), lambda name: np.zeros(0))
        return [np.asarray(found[name]) for name, _ in graph.outputs]


class Fixed:
    """An input that is known when compiling. known: its elements, where they are sizes (Dims among them)."""

    def __init__(self, array: np.ndarray, known: Sequence[int | Dim] | None = None) -> None:
        self.array, self.known = np.asarray(array), known

    def item(self) -> Item:
        if self.known is not None:
            return Item(known=objects(self.known, self.array.shape), dtype=dtype_of(self.array.dtype))
        value: Value = constant(self.array, dtype_of(self.array.dtype))
        return numbers_of(value)


def plain(x: np.ndarray | Fixed) -> np.ndarray:
    """The array."""
    return x.array if isinstance(x, Fixed) else x


def compare(case: Case, tolerance: float = 2e-5, outputs: Sequence[int] | None = None) -> None:
    """The translation gives what ONNX Runtime gives, to a part of each output's largest number.

    Both compute in f32 in different orders: sums of a few dozen products differ by some 1e-6 of the largest.
    """
    expected, found = case.onnxruntime(), case.translated()
    for index in range(case.outputs) if outputs is None else outputs:
        want, have = expected[index], found[index]
        assert have.shape == want.shape and have.dtype == want.dtype, (index, have.shape, want.shape, have.dtype)
        largest = max(1e-3, float(np.abs(want.astype(np.float64)).max(initial=0)))
        error = float(np.abs(have.astype(np.float64) - want.astype(np.float64)).max(initial=0)) / largest
        assert error <= tolerance, f"output {index}: {error:.2e} of the largest value"


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Random numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


class Model:
    """A small ONNX model as a graph with params, without reading it from a file."""

    def __init__(
        self, model: onnx.ModelProto, symbols: Mapping[str, Dim] | None = None, wide_floats: bool = False
    ) -> None:
        """symbols: what the named sizes of inputs become (default: up to 64 each). wide_floats: as a text model."""
        self.model = model
        versions = {entry.domain: entry.version for entry in model.opset_import}
        body = model.graph
        self.params = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in body.initializer}
        initializers = {name: self._stored(name, array) for name, array in self.params.items()}
        nodes = tuple(
            Node(
                node.op_type,
                node.domain,
                versions.get(node.domain, 1),
                node.name or node.output[0],
                tuple(node.input),
                tuple(node.output),
                {a.name: _attribute(a) for a in node.attribute},
            )
            for node in body.node
        )
        sizes = dict(symbols or {})
        self.inputs = []
        for value in body.input:
            if value.name in self.params:
                continue
            kind = value.type.tensor_type
            dims = [
                sizes.setdefault(d.dim_param, symbol(d.dim_param, 1, 64)) if d.dim_param else d.dim_value
                for d in kind.shape.dim
            ]
            dtype = dtype_of(helper.tensor_dtype_to_np_dtype(kind.elem_type))
            self.inputs.append(Input(value.name, Tensor(tuple(dims), dtype)))
        names = tuple(value.name for value in body.output)
        whole = Body(tuple(value.name for value in self.inputs), names, nodes, initializers)
        translation = Translation(wide_floats=frozenset(FLOATS if wide_floats else ()))
        found = translation.run(whole, {value.name: Item(value) for value in self.inputs})
        outputs = tuple((name, item.value) for name, item in zip(names, found, strict=True))
        self.graph = Graph("model", tuple(self.inputs), outputs)

    @staticmethod
    def _stored(name: str, array: np.ndarray) -> Item:
        if array.size <= 16:
            return numbers_of(constant(array, dtype_of(array.dtype)))
        return Item(Param(name, Tensor(array.shape, dtype_of(array.dtype))))

    def load(self, name: str) -> np.ndarray:
        return self.params[name]

    def passed(self, pipeline: str) -> tuple[Graph, list[Report]]:
        """The graph after some passes, which may read weights."""
        with reading(self.load):
            return run_passes(self.graph, parse_pipeline(pipeline), [])

    def evaluated(self, graph: Graph, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.asarray(x) for name, x in evaluate(graph, given, self.load).items()}

    def onnxruntime(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by ONNX Runtime, its own optimisations off."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        data = self.model.SerializeToString()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in self.model.graph.output]
        return dict(zip(names, session.run(names, dict(given)), strict=True))


def _attribute(attribute: onnx.AttributeProto) -> object:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
