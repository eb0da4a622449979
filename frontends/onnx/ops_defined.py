"""Operators that the standard defines by other operators: they are replaced by their definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto

from llmc.compiler.ir.elementwise import constant
from llmc.compiler.ir.types import dtype_of
from llmc.frontends.onnx.forms import DTYPES
from llmc.frontends.onnx.translation import (
    SMALL,
    Body,
    Item,
    Node,
    Reference,
    Translation,
    Unsupported,
    handles,
    objects,
)

_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


def known_item(tensor: TensorProto) -> Item:
    """A tensor of a message as a constant of which every element is known, unless there are many."""
    array = onnx.numpy_helper.to_array(tensor)
    known = objects(array.tolist(), array.shape) if array.size <= SMALL else None
    return Item(constant(array, dtype_of(array.dtype)), known)


def body_of(message: GraphProto | FunctionProto, versions: Mapping[str, int]) -> Body:
    """A trusted graph or function (the standard's own; tests) as a body. versions: opset by domain."""

    def value(attribute: AttributeProto) -> Any:
        if attribute.ref_attr_name:
            return Reference(attribute.ref_attr_name)
        found = onnx.helper.get_attribute_value(attribute)
        if isinstance(found, TensorProto):
            return known_item(found)
        if isinstance(found, GraphProto):
            return body_of(found, versions)
        if isinstance(found, list):
            return [each.decode() if isinstance(each, bytes) else each for each in found]
        return found.decode() if isinstance(found, bytes) else found

    nodes = tuple(
        Node(
            node.op_type,
            node.domain,
            versions[node.domain],
            node.name or f"{node.op_type}_{index}",
            tuple(node.input),
            tuple(node.output),
            {attribute.name: value(attribute) for attribute in node.attribute},
        )
        for index, node in enumerate(message.node)
    )
    if isinstance(message, FunctionProto):
        return Body(tuple(message.input), tuple(message.output), nodes)
    initializers = {tensor.name: known_item(tensor) for tensor in message.initializer}
    inputs = tuple(info.name for info in message.input if info.name not in initializers)
    return Body(inputs, tuple(info.name for info in message.output), nodes, initializers)


def schema_of(node: Node) -> Any:
    """What the standard says of an op; typed loosely, for its stubs leave out what functions need."""
    return onnx.defs.get_schema(node.op, node.version, node.domain)


def _definition(node: Node, items: Sequence[Item | None]) -> FunctionProto:
    schema = schema_of(node)
    function = FunctionProto()
    if schema.has_function:
        version = max(version for version in schema.function_opset_versions if version <= node.version)
        function.ParseFromString(schema.get_function_with_opset_version(version))
        return function
    version = max(version for version in schema.context_dependent_function_opset_versions if version <= node.version)
    types = [_type(item).SerializeToString() for item in items]
    text = schema.get_context_dependent_function_with_opset_version(version, _message(node).SerializeToString(), types)
    function.ParseFromString(text)
    return function


def _message(node: Node) -> NodeProto:
    message = NodeProto(op_type=node.op, domain=node.domain, input=node.inputs, output=node.outputs)
    message.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in node.attributes.items())
    return message


def _type(item: Item | None) -> onnx.TypeProto:
    if item is None:
        return onnx.TypeProto()
    return onnx.helper.make_tensor_type_proto(_NUMBERS[item.dtype], None)


@handles("LinearAttention", since=27)
@handles("AffineGrid", since=20)
@handles("BlackmanWindow", "HammingWindow", "HannWindow", since=17)
def _defined(t: Translation, node: Node, *items: Item | None) -> list[Item]:
    function = _definition(node, items)
    if not function.node:
        raise Unsupported("the standard has no definition of it with these inputs and attributes")
    versions = {opset.domain: opset.version for opset in function.opset_import}
    schema = schema_of(node)
    defaults = {
        name: onnx.helper.get_attribute_value(a.default_value)
        for name, a in schema.attributes.items()
        if a.default_value.type
    }
    full = Node(
        node.op, node.domain, node.version, node.name, node.inputs, node.outputs, {**defaults, **node.attributes}
    )
    return t.call(full, body_of(function, versions), items)
