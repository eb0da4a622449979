"""An ONNX file as bodies of nodes: decoded once, every claim of it checked, no weight read.

The bodies keep what translation relies on: names are unique, nodes stand in order of use, every input is computed by
some node, functions do not call themselves, and everything has a bounded size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto

from llmc.compiler.ir.elementwise import constant
from llmc.compiler.ir.op import Param
from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Tensor
from llmc.errors import FrontendError
from llmc.frontends.onnx import ordering
from llmc.frontends.onnx.forms import DTYPES, HALVES, cast
from llmc.frontends.onnx.initializers import (
    MOST_AXES,
    OnnxWeights,
    Stored,
    TensorReader,
    element_count,
    ir_dtype,
    text_of,
)
from llmc.frontends.onnx.protobuf import Parsed, Span, parse
from llmc.frontends.onnx.translation import SMALL, Body, Item, Node, Reference, objects

OLDEST_OPSET, NEWEST_OPSET = 7, onnx.defs.onnx_opset_version()
_MOST_NODES = 250_000  # with every call of a function expanded
_MOST_NAME = 4096  # characters
_MOST_SHOWN = 200  # of a node's name, which is for messages only
_MATRIX = 64  # elements of the smallest matrix of floats that is a weight rather than a constant


@dataclass(frozen=True)
class Signature:
    """An input or output of the model. dims: a number, a dim_param, or None where the file says nothing.

    dtype: an ONNX dtype's number; 0 where the file does not say. dims is None where even the rank is unknown.
    """

    name: str
    dtype: int
    dims: tuple[int | str | None, ...] | None


class OnnxModel:
    """A model's file. inputs: those that a caller gives, so without initializers; outputs: as the file orders them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._read(parse(path))
        except UnicodeDecodeError as error:
            raise FrontendError(f"{path} is damaged: a text in it is not UTF-8 ({error.reason})") from None
        except RecursionError:
            raise FrontendError(f"{path} is nested too deep") from None

    def _read(self, parsed: Parsed) -> None:
        message = parsed.message
        if not message.HasField("graph") or not message.graph.output:
            raise FrontendError(f"{self.path} holds no graph with outputs: is it an ONNX model?")
        self._parsed = parsed
        self.opsets = _opsets(message.opset_import, str(self.path))
        graph = message.graph
        initializers = {text_of(tensor.name) for tensor in graph.initializer}
        self.inputs = tuple(_signature(info, "input") for info in graph.input if info.name not in initializers)
        self.outputs = tuple(_signature(info, "output") for info in graph.output)
        for kind, infos in (("inputs", self.inputs), ("outputs", self.outputs)):
            _require_distinct([info.name for info in infos], f"{self.path} has two {kind} called")

    def wide_floats(self) -> frozenset[str]:
        """The dtypes that are f32 in a text model: f64, and halves if those are what most of its weights are.

        How such a model rounds is noise. One whose weights are f32 rounds to halves where it says so, and nowhere else.
        """
        counts: Counter[str] = Counter()
        for tensor in self._parsed.message.graph.initializer:
            dtype = DTYPES.get(tensor.data_type)
            if dtype in FLOATS:
                counts[dtype] += math.prod(tensor.dims)
        halves = sum(counts[dtype] for dtype in HALVES)
        return frozenset(("f64", *(HALVES if halves >= sum(counts.values()) - halves else ())))

    def bodies(self, wide_floats: frozenset[str] = frozenset()) -> Bodies:
        """The model's graph and functions. wide_floats: dtypes that become f32."""
        try:
            return _Decoder(self, self._parsed, wide_floats).bodies()
        except UnicodeDecodeError as error:
            raise FrontendError(f"{self.path} is damaged: a text in it is not UTF-8 ({error.reason})") from None
        except RecursionError:
            raise FrontendError(f"{self.path} is nested too deep") from None


@dataclass(frozen=True)
class Bodies:
    """A model ready to be translated."""

    main: Body
    functions: Mapping[tuple[str, str], Body]
    weights: OnnxWeights


def _opsets(imports: Iterable[Any], what: str) -> dict[str, int]:
    """Version by domain; the standard domain is ""."""
    found: dict[str, int] = {}
    for entry in imports:
        domain = _domain(entry.domain)
        if found.setdefault(domain, entry.version) != entry.version:
            raise FrontendError(f"{what} imports two versions of the operators of {domain or 'ONNX'}")
        if entry.version < 1:
            raise FrontendError(f"{what} imports version {entry.version} of the operators of {domain or 'ONNX'}")
    version = found.get("", NEWEST_OPSET)
    if not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise FrontendError(
            f"{what} uses opset {version}; {OLDEST_OPSET} to {NEWEST_OPSET} are read. "
            "onnx.version_converter changes a model's opset"
        )
    return found


def _signature(info: ValueInfoProto, kind: str) -> Signature:
    what = f"{kind} {text_of(info.name)!r:.100}"
    if not info.name or len(info.name) > _MOST_NAME:
        raise FrontendError(f"the model has an {kind} without a name" if not info.name else f"{what}: a name that long")
    if info.type.WhichOneof("value") not in (None, "tensor_type"):
        raise FrontendError(f"{what} is a {info.type.WhichOneof('value')}: only tensors are supported")
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return Signature(info.name, tensor.elem_type, None)
    dims: list[int | str | None] = []
    for dim in tensor.shape.dim:
        kind_of_dim = dim.WhichOneof("value")
        if kind_of_dim == "dim_value":
            # Old exporters write 0 or -1 for a size that they do not know.
            dims.append(dim.dim_value if dim.dim_value > 0 else None)
        else:
            dims.append(text_of(dim.dim_param) or None if kind_of_dim == "dim_param" else None)
    if len(dims) > MOST_AXES:
        raise FrontendError(f"{what} has {len(dims)} axes")
    element_count((dim for dim in dims if isinstance(dim, int)), what)
    return Signature(info.name, tensor.elem_type, tuple(dims))


def _require_distinct(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise FrontendError(f"{what} {name!r:.100}")
        seen.add(name)


class _Decoder:
    """From messages to bodies."""

    def __init__(self, model: OnnxModel, parsed: Parsed, wide_floats: frozenset[str]) -> None:
        self._path = model.path
        self._message = parsed.message
        self._raw = parsed.raw
        self._opsets = model.opsets
        self._wide = wide_floats
        self._tensors = TensorReader(model.path)
        self._weights = OnnxWeights()
        self._overloads: set[tuple[str, str]] = set()

    def bodies(self) -> Bodies:
        functions: dict[tuple[str, str], Body] = {}
        messages = list(self._message.functions)
        self._overloads = {(_domain(f.domain), _overloaded(f.name, f.overload)) for f in messages if f.overload}
        for function in messages:
            key = (
                _domain(function.domain),
                _overloaded(function.name, function.overload) if function.overload else text_of(function.name),
            )
            if key in functions:
                raise FrontendError(f"{self._path} has two functions {'.'.join(key)!r:.100}")
            functions[key] = self._function(function)
        main = self._graph(self._message.graph, frozenset(), "the graph", self._opsets, {}, self._raw)
        ordering.require_bounded(main, functions, _MOST_NODES)
        return Bodies(main, functions, self._weights)

    def _function(self, function: FunctionProto) -> Body:
        what = printable(f"function {text_of(function.domain)}.{text_of(function.name)}")
        opsets = _opsets(function.opset_import, what) or self._opsets
        defaults = {text_of(entry.name): entry for entry in function.attribute_proto}
        nodes, constants = self._nodes(function.node, what, opsets, defaults, frozenset(map(text_of, function.input)))
        return self._body(
            what, map(text_of, function.input), map(text_of, function.output), nodes, constants, frozenset()
        )

    def _graph(
        self,
        graph: GraphProto,
        around: frozenset[str],
        what: str,
        opsets: Mapping[str, int],
        defaults: Mapping[str, AttributeProto],
        raw: Sequence[Span | None] = (),
    ) -> Body:
        stored: dict[str, tuple[TensorProto, Span | None]] = {}
        for index, tensor in enumerate(graph.initializer):
            if not text_of(tensor.name) or tensor.name in stored:
                raise FrontendError(f"{what} has two initializers {tensor.name!r:.100}, or one without a name")
            stored[tensor.name] = (tensor, raw[index] if raw else None)
        inputs = [text_of(info.name) for info in graph.input if info.name not in stored]
        outputs = [text_of(info.name) for info in graph.output]
        nodes, constants = self._nodes(graph.node, what, opsets, defaults, around | set(inputs) | set(stored))
        _require_distinct([*stored, *constants], f"{what} computes twice what is called")
        if graph.sparse_initializer:
            stored_sparse = [entry.values.name for entry in graph.sparse_initializer]
            raise FrontendError(f"{what} has sparse initializers ({stored_sparse[0]!r:.100}), which are not supported")
        return self._body(what, inputs, outputs, nodes, {**constants, **stored}, around)

    def _body(
        self,
        what: str,
        inputs: Iterable[str],
        outputs: Iterable[str],
        nodes: Sequence[Node],
        stored: Mapping[str, tuple[TensorProto, Span | None]],
        around: frozenset[str],
    ) -> Body:
        inputs, outputs = tuple(inputs), tuple(outputs)
        _require_distinct(inputs, f"{what} has two inputs called")
        ordered = ordering.in_order(nodes, {*inputs, *stored}, around, what)
        computed = {*inputs, *stored, *around, *(name for node in nodes for name in node.outputs)}
        for name in outputs:
            if name not in computed:
                raise FrontendError(f"nothing computes the output {name!r:.100} of {what}")
        used = {*outputs, *(name for node in nodes for name in ordering.read_by(node))}
        items = {name: self._item(name, *stored[name]) for name in stored if name in used}
        return Body(inputs, outputs, tuple(ordered), items)

    def _nodes(
        self,
        messages: Iterable[NodeProto],
        what: str,
        opsets: Mapping[str, int],
        defaults: Mapping[str, AttributeProto],
        around: frozenset[str],
    ) -> tuple[list[Node], dict[str, tuple[TensorProto, Span | None]]]:
        """The nodes under names of their own, and apart from them the constants."""
        messages = list(messages)
        if len(messages) > _MOST_NODES:
            raise FrontendError(f"{what} has {len(messages)} nodes; at most {_MOST_NODES} are read")
        visible = around | {text_of(name) for message in messages for name in message.output if name}
        nodes: list[Node] = []
        constants: dict[str, tuple[TensorProto, Span | None]] = {}
        taken: set[str] = set()
        for index, message in enumerate(messages):
            name = _node_name(message, index, taken)
            tensor = _constant_of(message)
            if tensor is not None:
                (output,) = message.output
                if output in constants:
                    raise FrontendError(f"{what} computes {output!r:.100} twice")
                constants[output] = (tensor, None)
                continue
            nodes.append(self._node(message, name, opsets, defaults, visible))
        return nodes, constants

    def _node(
        self,
        message: NodeProto,
        name: str,
        opsets: Mapping[str, int],
        defaults: Mapping[str, AttributeProto],
        visible: frozenset[str],
    ) -> Node:
        domain = _domain(message.domain)
        what = f"{printable(text_of(message.op_type)):.60} ({name})"
        op = message.op_type
        if message.overload and (domain, _overloaded(op, message.overload)) in self._overloads:
            op = _overloaded(op, message.overload)
        for text in map(text_of, (op, domain, *message.input, *message.output)):
            if len(text) > _MOST_NAME:
                raise FrontendError(f"{what} has a name of {len(text)} characters")
        if not op.isprintable() or not domain.isprintable():
            raise FrontendError(f"{what} has the op {op!r:.60} of {domain!r:.60}, which is no name")
        # Some exporters forget to import a domain that they use.
        version = opsets.get(domain, 1 if domain else NEWEST_OPSET)
        attributes: dict[str, Any] = {}
        for attribute in message.attribute:
            if text_of(attribute.name) in attributes:
                raise FrontendError(f"{what} has two attributes {attribute.name!r:.60}")
            decode = self._attribute_decoder(what, visible, opsets, defaults)
            if attribute.ref_attr_name:
                default = defaults.get(text_of(attribute.ref_attr_name))
                value = None if default is None else decode(default)
                attributes[attribute.name] = Reference(attribute.ref_attr_name, value)
            else:
                attributes[attribute.name] = decode(attribute)
        return Node(op, domain, version, name, tuple(message.input), tuple(message.output), attributes)

    def _attribute_decoder(
        self,
        what: str,
        visible: frozenset[str],
        opsets: Mapping[str, int],
        defaults: Mapping[str, AttributeProto],
    ) -> Callable[[AttributeProto], Any]:
        def tensor(message: TensorProto, name: str) -> Item:
            return self._item(f"{what}.{name}", message, None)

        def graph(message: GraphProto, name: str) -> Body:
            return self._graph(message, visible, f"attribute {name!r:.60} of {what}", opsets, defaults)

        def decode(attribute: AttributeProto) -> Any:
            kind = attribute.type
            if kind == AttributeProto.TENSOR:
                return tensor(attribute.t, attribute.name)
            if kind == AttributeProto.TENSORS:
                return [tensor(item, attribute.name) for item in attribute.tensors]
            if kind == AttributeProto.GRAPH:
                return graph(attribute.g, attribute.name)
            if kind == AttributeProto.GRAPHS:
                return [graph(item, attribute.name) for item in attribute.graphs]
            if kind == AttributeProto.STRING:
                return attribute.s.decode()
            if kind == AttributeProto.STRINGS:
                return [item.decode() for item in attribute.strings]
            if kind in (AttributeProto.FLOAT, AttributeProto.INT):
                return attribute.f if kind == AttributeProto.FLOAT else attribute.i
            if kind in (AttributeProto.FLOATS, AttributeProto.INTS):
                return list(attribute.floats if kind == AttributeProto.FLOATS else attribute.ints)
            raise FrontendError(f"{what}: attribute {attribute.name!r:.60} is of a kind that is not supported ({kind})")

        return decode

    def _item(self, name: str, message: TensorProto, raw: Span | None) -> Item:
        """What an initializer's name stands for: a constant whose elements are known, or a param."""
        stored = self._tensors.stored(message, f"tensor {name!r:.100}", raw)
        dtype = "f32" if stored.dtype in self._wide else stored.dtype
        if math.prod(stored.shape) <= SMALL and not _is_matrix(stored):
            array = stored.read().astype(NUMPY_DTYPES[dtype])
            return Item(constant(array, dtype), objects(array.tolist(), array.shape))
        param = Param(self._weights.add(name, stored), Tensor(stored.shape, stored.dtype))
        return Item(cast(param, dtype))


def _is_matrix(stored: Stored) -> bool:
    """Whether a small tensor is a weight like its larger relatives: floats with two axes or more that are not 1."""
    return stored.dtype in FLOATS and sum(dim > 1 for dim in stored.shape) > 1 and math.prod(stored.shape) >= _MATRIX


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else text_of(domain)


def printable(name: str) -> str:
    """A name for messages: of bounded length, and without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:_MOST_SHOWN])


def _overloaded(name: str, overload: str) -> str:
    return f"{text_of(name)}:{text_of(overload)}"


def _node_name(message: NodeProto, index: int, taken: set[str]) -> str:
    """A name that no other node of the body has: the file's own, or the op and its first output."""
    output = next((text_of(name) for name in message.output if name), str(index))
    name = printable(text_of(message.name) or f"{text_of(message.op_type)}_{output}")
    if name in taken:
        name = f"{name}#{index}"
    while name in taken:
        name += "'"
    taken.add(name)
    return name


def _constant_of(message: NodeProto) -> TensorProto | None:
    """The tensor that a Constant node is, if it is one."""
    if (message.op_type, _domain(message.domain)) != ("Constant", "") or message.input or len(message.output) != 1:
        return None
    if len(message.attribute) != 1:
        return None
    (attribute,) = message.attribute
    return attribute.t if attribute.type == AttributeProto.TENSOR and not attribute.ref_attr_name else None


def signature_dtype(signature: Signature, kind: str) -> str:
    """The IR dtype of an input or output."""
    return ir_dtype(signature.dtype, f"{kind} {signature.name!r:.100}")
