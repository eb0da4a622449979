"""ONNX nodes to t-level graphs: one small function an op, found by the op's domain, name and opset version.

Only what the outputs need is translated. Shapes of exported graphs are computed by nodes of their own (Shape, Gather,
Concat, ...): small integer tensors whose elements are known when compiling, as numbers or as sizes, are followed
element by element beside the graph, so that a Reshape finds its target as `Dim`s.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import Atom, Dim, FloorDiv, symbol
from llmc.compiler.ir.elementwise import Add, Cast, FloorDivide, Mul, constant
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Concat, Iota, Reshape, Slice
from llmc.compiler.ir.types import NUMPY_DTYPES, Shape
from llmc.errors import FrontendError, IRError, LlmcError

SMALL = 4096  # elements of a tensor whose contents are followed, and of an initializer that becomes a constant

Objects = NDArray[Any]  # of Python ints, floats, bools and Dims


class Item:
    """What a name of an ONNX graph stands for: a tensor, and its elements where they are known when compiling."""

    def __init__(self, value: Value | None = None, known: Objects | None = None, dtype: str = "i64") -> None:
        """Either may be missing, not both. known: an object array; dtype: its dtype, where value is missing."""
        if value is None and known is None:
            raise IRError("an item needs a value or known elements")
        self._value = value
        self.known = known
        self._dtype = dtype if value is None else value.dtype

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def shape(self) -> Shape:
        if self._value is not None:
            return self._value.shape
        assert self.known is not None
        return tuple(self.known.shape)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def value(self) -> Value:
        """The tensor in the graph; built from the known elements when first asked for."""
        if self._value is None:
            assert self.known is not None
            self._value = _materialised(self.known, self._dtype)
        return self._value

    @property
    def numbers(self) -> NDArray[Any] | None:
        """The known elements as a numeric array; None where one is a symbolic size, or nothing is known."""
        if self.known is None or any(isinstance(x, Dim) for x in self.known.flat):
            return None
        return np.asarray(self.known.tolist(), NUMPY_DTYPES[self.dtype]).reshape(self.known.shape)


def objects(elements: Any, shape: tuple[int, ...] | None = None) -> Objects:
    """An object array of Python numbers and sizes. shape: needed where `elements` is nested or a scalar."""
    if shape is None:
        array = np.empty(len(elements), object)
        array[:] = list(elements)
        return array
    flat = np.empty(int(np.prod(shape)), object)
    flat[:] = np.asarray(elements, object).reshape(-1)
    return flat.reshape(shape)


def _materialised(known: Objects, dtype: str) -> Value:
    if not any(isinstance(x, Dim) for x in known.flat):
        return constant(np.asarray(known.tolist(), NUMPY_DTYPES[dtype]).reshape(known.shape), dtype)
    first, *rest = (_scalar(x, dtype) for x in known.flat)
    return Reshape(Concat((first, *rest), 0) if rest else first, known.shape)


def _scalar(x: object, dtype: str) -> Value:
    """One element as a tensor [1]."""
    if not isinstance(x, Dim):
        return constant([x], dtype)
    value = _computed(x)
    return value if dtype == "i64" else Cast(value, dtype)


def _computed(size: int | Dim) -> Value:
    """A size as a tensor i64[1]: its polynomial, each symbol the last of 0, 1, ..., symbol."""
    if not isinstance(size, Dim):
        return constant([size], "i64")
    terms: list[Value] = []
    for monomial, coefficient in size.terms:
        factors = [_factor(atom) for atom, power in monomial for _ in range(power)]
        if coefficient != 1 or not factors:
            factors.insert(0, constant([coefficient], "i64"))
        terms.append(functools.reduce(Mul, factors))
    return functools.reduce(Add, terms)


def _factor(atom: Atom) -> Value:
    if isinstance(atom, FloorDiv):
        return FloorDivide(_computed(atom.numerator), constant([atom.divisor], "i64"))
    size = symbol(atom.name, atom.low, atom.high)
    return Slice(Iota(size + 1), 0, size, size + 1)


@dataclass(frozen=True)
class Node:
    """One node: attributes decoded to Python values (ints, floats, strings, lists, numpy arrays; a graph as `Body`).

    name: for messages; exporters leave it out at times, and then it is made from the op and its first output.
    """

    op: str
    domain: str
    version: int
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default."""
        return self.attributes.get(name, default)

    @property
    def where(self) -> str:
        """For messages: the op, its domain where that is not the standard one, and the node's name."""
        return f"{f'{self.domain:.60}.' if self.domain else ''}{self.op:.60} ({self.name:.160})"


@dataclass(frozen=True)
class Body:
    """A graph without its surroundings: the model's own, a function's, or a branch's. Nodes are in order of use."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Item] = field(default_factory=dict)

    @functools.cached_property
    def free(self) -> frozenset[str]:
        """The names that it takes from around it; kept, since every body around asks again."""
        own = {*self.inputs, *self.initializers, *(name for node in self.nodes for name in node.outputs)}
        used = {*self.outputs, *(name for node in self.nodes for name in node.inputs if name)}
        used.update(name for node in self.nodes for inner in bodies(node) for name in inner.free)
        return frozenset(used - own)


Result = Value | Item | Sequence[Value | Item]
Handler = Callable[..., Result]
_H = TypeVar("_H", bound=Handler)

# (domain, op) -> (first version it is for, handler), newest first. The standard domain is "".
HANDLERS: dict[tuple[str, str], list[tuple[int, Handler]]] = {}
# (domain, op) -> the attributes that are known, where the op has no versions and gets new ones as time goes by.
ATTRIBUTES: dict[tuple[str, str], frozenset[str]] = {}


def handles(*ops: str, domain: str = "", since: int = 1, attributes: Sequence[str] | None = None) -> Callable[[_H], _H]:
    """Register a function for ops of a domain, from an opset version on.

    It is called with the translation, the node and one `Item | None` an input of the node (None: left out); missing
    trailing inputs are left away, so give those defaults. It returns one value or item, or one for each output.
    attributes: all that it knows of, for ops without versions; a node with another one is refused, as nobody can tell
    what that changes.
    """

    def register(function: _H) -> _H:
        for op in ops:
            known = HANDLERS.setdefault((domain, op), [])
            if any(version == since for version, _ in known):
                raise ValueError(f"two functions handle {domain}.{op} since {since}")
            known.append((since, function))
            known.sort(key=lambda pair: pair[0], reverse=True)
            if attributes is not None:
                ATTRIBUTES[domain, op] = frozenset(attributes)
        return function

    return register


@functools.cache
def discover() -> None:
    """Import the modules that register handlers: ops_* of the standard domain, contrib_* and quantized_* of others."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name.startswith(("ops_", "contrib_", "quantized_")):
            importlib.import_module(f"{package}.{module.name}")


def handler_of(node: Node) -> Handler | None:
    """The handler for a node's op at its version."""
    discover()
    for since, function in HANDLERS.get((node.domain, node.op), []):
        if node.version >= since:
            return function
    return None


def _within(node: Node, handler: Handler, items: Sequence[Item | None]) -> Sequence[Item | None]:
    """The items that a handler takes; Unsupported for an input or an attribute that it does not know of."""
    for name in node.attributes:
        if name not in ATTRIBUTES.get((node.domain, node.op), node.attributes):
            raise Unsupported(f"its attribute {name!r:.60} is not known, and may change what is computed")
    most = _most_inputs(handler)
    for index, item in enumerate(items[most:], most):
        if item is not None:
            raise Unsupported(
                f"its input {index + 1} ({node.inputs[index]!r:.100}) is not known: it has {most} at most"
            )
    return items[:most]


@functools.cache
def _most_inputs(handler: Handler) -> int:
    """How many inputs of a node a handler takes at most."""
    kinds = [parameter.kind for parameter in inspect.signature(handler).parameters.values()]
    return sys.maxsize if inspect.Parameter.VAR_POSITIONAL in kinds else len(kinds) - len(("translation", "node"))


class Unsupported(LlmcError):
    """A form of a known op that has no translation; the text says which."""


class SizeUnknown(Unsupported):
    """A form that has a translation where some free size of the inputs is a number."""


class MayNotFit(SizeUnknown):
    """What is valid only where `room` is not negative, so that smaller sizes of the inputs may be refused."""

    def __init__(self, message: str, room: Dim) -> None:
        super().__init__(message)
        self.room = room


class Translation:
    """The state of one translation: what each name stands for.

    functions: the model's own, by (domain, name). wide_floats: dtypes that become f32 (see `OnnxModel.wide_floats`;
    casts of places to halves still round). fold: given an op's items, what is known of its result (`symbolic.fold`).
    """

    def __init__(
        self, functions: Mapping[tuple[str, str], Body] | None = None, wide_floats: frozenset[str] = frozenset()
    ) -> None:
        self.functions = dict(functions or {})
        self.wide_floats = wide_floats

    def dtype(self, dtype: str) -> str:
        """The dtype that this translation gives to a tensor of the source's dtype."""
        return "f32" if dtype in self.wide_floats else dtype

    def run(self, body: Body, given: Mapping[str, Item | None]) -> list[Item]:
        """Translate what a body's outputs need.

        given: its inputs (None: left out), and the names around it that it may use. Its own names come before those.
        """
        producer = {output: node for node in body.nodes for output in node.outputs if output}
        names = {name: item for name, item in {**given, **body.initializers}.items() if name not in producer}
        needed = _needed(body.outputs, producer)
        self._require_supported(node for node in body.nodes if node.name in needed)
        for node in body.nodes:
            if node.name not in needed:
                continue
            # An op may have outputs that its handler does not give.
            missing = [name for name in node.inputs if name and name not in names]
            if missing:
                raise FrontendError(f"{node.where} reads {missing[0]!r:.100}, which is not computed")
            found = self.node(node, [names[name] if name else None for name in node.inputs], names)
            names.update({name: item for name, item in zip(node.outputs, found, strict=False) if name})
        results = [names.get(name) for name in body.outputs]
        for name, item in zip(body.outputs, results, strict=True):
            if item is None:
                raise FrontendError(f"nothing computes the output {name!r:.100}")
        return [item for item in results if item is not None]

    def node(self, node: Node, items: Sequence[Item | None], around: Mapping[str, Item | None]) -> list[Item]:
        """The items of one node's outputs. around: every name that a branch inside the node may use."""
        from llmc.frontends.onnx.symbolic import fold, numbers_of

        function = self.functions.get((node.domain, node.op))
        handler = handler_of(node)
        if handler is None and function is not None:
            return self.call(node, function, items)
        assert handler is not None
        folded = fold(node, items, self)
        if folded is not None:
            return folded
        self.around = around
        try:
            result = handler(self, node, *_within(node, handler, items))
        except (IRError, Unsupported) as error:
            raise FrontendError(f"{node.where} cannot be translated: {error}") from error
        except (
            TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError
        ) as error:  # fmt: skip
            raise FrontendError(f"{node.where} is not valid: {type(error).__name__}: {error}") from error
        results = [result] if isinstance(result, (Value, Item)) else result
        return [item if isinstance(item, Item) else numbers_of(item) for item in results]

    def call(self, node: Node, function: Body, items: Sequence[Item | None]) -> list[Item]:
        """What a function's body computes, in place of a node; the last inputs may be left away."""
        if len(items) > len(function.inputs):
            raise FrontendError(f"{node.where} has {len(items)} inputs, but its function takes {len(function.inputs)}")
        left_away = [None] * (len(function.inputs) - len(items))
        return self.run(bound(function, node), dict(zip(function.inputs, (*items, *left_away), strict=True)))

    def _require_supported(self, nodes: Iterable[Node]) -> None:
        """One FrontendError that lists every op without a handler, with the names of its nodes."""
        missing: dict[str, list[str]] = {}
        for node in nodes:
            if handler_of(node) is None and (node.domain, node.op) not in self.functions:
                missing.setdefault(f"{f'{node.domain:.60}.' if node.domain else ''}{node.op:.60}", []).append(
                    node.name[:160]
                )
        if missing:
            listed = "; ".join(
                f"{op} ({len(names)}x: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for op, names in sorted(missing.items())
            )
            raise FrontendError(f"the model uses operations that are not supported: {listed}")


def bound(function: Body, node: Node) -> Body:
    """A function's body with its attribute references settled by the node that calls it, in branches too."""
    nodes = []
    for inner in function.nodes:
        settled = {}
        for name, value in inner.attributes.items():
            if isinstance(value, Body):
                settled[name] = bound(value, node)
            elif not isinstance(value, Reference):
                settled[name] = value
            elif value.name in node.attributes:
                settled[name] = node.attributes[value.name]
            elif value.default is not None:
                settled[name] = value.default
        unique = f"{node.name}/{inner.name}"
        nodes.append(Node(inner.op, inner.domain, inner.version, unique, inner.inputs, inner.outputs, settled))
    return Body(function.inputs, function.outputs, tuple(nodes), function.initializers)


@dataclass(frozen=True)
class Reference:
    """An attribute of a node in a function that stands for an attribute of the call."""

    name: str
    default: Any = None


def _needed(outputs: Sequence[str], producer: Mapping[str, Node]) -> set[str]:
    """The names of the nodes that outputs need, bodies of branches included."""
    found: set[str] = set()
    stack = list(outputs)
    while stack:
        node = producer.get(stack.pop())
        if node is None or node.name in found:
            continue
        found.add(node.name)
        stack += [*node.inputs, *(name for body in bodies(node) for name in free_names(body))]
    return found


def bodies(node: Node) -> list[Body]:
    """The graphs among a node's attributes."""
    return [value for value in node.attributes.values() if isinstance(value, Body)]


def free_names(body: Body) -> frozenset[str]:
    """The names that a body takes from around it."""
    return body.free
