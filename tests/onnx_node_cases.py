"""The node tests of the ONNX standard, as graphs: one case an operator and a way to use it.

They come with the `onnx` package: each has a model of one node (or of the nodes that a function of the standard expands
to), its inputs, and the outputs that the standard's reference implementation gives.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Array, Tensor, dtype_of
from llmc.errors import FrontendError, LlmcError
from llmc.frontends.onnx.ops_defined import body_of, known_item
from llmc.frontends.onnx.translation import Item, Translation


@dataclass(frozen=True)
class NodeCase:
    """A model, the arrays that it is given, those that it should give, by name; and how near these should be."""

    name: str
    model: onnx.ModelProto
    inputs: Mapping[str, object]
    outputs: Mapping[str, object]
    rtol: float
    atol: float

    def __str__(self) -> str:
        return self.name

    @property
    def ops(self) -> frozenset[str]:
        """The operators of the model, with their domain unless that is the standard one."""
        return frozenset(f"{node.domain}.{node.op_type}".lstrip(".") for node in self.model.graph.node)


@functools.cache
def node_cases() -> tuple[NodeCase, ...]:
    """Every node test of the installed onnx."""
    return tuple(_node_cases())


def _node_cases() -> Iterator[NodeCase]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference implementation, which computes the expected values here
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    for case in sorted(cases, key=lambda case: case.name):
        for inputs, outputs in case.data_sets:
            graph = case.model.graph
            given = dict(zip((value.name for value in graph.input), map(_array, inputs), strict=False))
            expected = dict(zip((value.name for value in graph.output), map(_array, outputs), strict=False))
            yield NodeCase(case.name, case.model, given, expected, case.rtol, case.atol)


def _array(value: object) -> object:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def lifted_case(case: NodeCase) -> Graph:
    """The case's model as a graph over its inputs, of exactly their shapes.

    Where an op needs an input's values when compiling (a shape, axes, how often to repeat), inputs become constants: no
    more of them than are needed, and integers rather than others.
    """
    if any(info.type.WhichOneof("value") != "tensor_type" for info in case.model.graph.input):
        raise FrontendError("sequences and optional values are not tensors")
    arrays = {name: np.asarray(value) for name, value in case.inputs.items()}
    small = [name for name, a in arrays.items() if a.ndim <= 1]
    tried = [set(), {name for name in small if arrays[name].dtype.kind in "iub"}, set(small), set(arrays)]
    found = [_tried(case, arrays, tried[0])]
    for frozen in tried[1:]:
        if isinstance(found[-1], Graph) or not _lacks_values(found[-1]):
            break
        found.append(_tried(case, arrays, frozen))
    if not isinstance(found[-1], Graph):
        raise found[0] if isinstance(found[0], LlmcError) else AssertionError
    frozen = tried[len(found) - 1]
    for name in sorted(frozen):
        better = _tried(case, arrays, frozen - {name})
        if isinstance(better, Graph):
            found.append(better)
            frozen = frozen - {name}
    assert isinstance(found[-1], Graph)
    return found[-1]


def _lacks_values(failure: Graph | LlmcError) -> bool:
    return "known" in str(failure) or "depends on the input" in str(failure)


def _tried(case: NodeCase, arrays: Mapping[str, Array], frozen: set[str]) -> Graph | LlmcError:
    try:
        return _lifted(case, arrays, frozen)
    except LlmcError as error:
        return error


def _lifted(case: NodeCase, arrays: Mapping[str, Array], frozen: set[str]) -> Graph:
    inputs = {
        name: Input(name, Tensor(array.shape, dtype_of(array.dtype)))
        for name, array in arrays.items()
        if name not in frozen
    }
    given: dict[str, Item] = {name: Item(value) for name, value in inputs.items()}
    given.update({name: known_item(onnx.numpy_helper.from_array(arrays[name])) for name in frozen})
    versions = {opset.domain: opset.version for opset in case.model.opset_import}
    found = Translation().run(body_of(case.model.graph, versions), given)
    outputs = tuple(zip((value.name for value in case.model.graph.output), (item.value for item in found), strict=True))
    return Graph(case.name, tuple(inputs.values()), outputs)
