"""torch's exported graphs to t-level graphs: one small function an aten op, found by the op's name.

Only what the output needs is translated. Shapes come from the trace (its symbolic sizes become ours) and every
translated value is checked against them. f64 becomes f32; where a model rounds to bf16 or f16, so does the graph.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from llmc.compiler.ir.dims import Dim, known_at_most
from llmc.compiler.ir.elementwise import Cast, constant
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Broadcast, Iota, Reshape, Slice
from llmc.compiler.ir.types import FLOATS, Shape
from llmc.errors import DimError, FrontendError, IRError

Scalar = bool | int | float
# The translation of a traced node: a tensor, a size, a plain number, several of them, or none.
Meaning = Any
Handler = Callable[..., Meaning]
_H = TypeVar("_H", bound=Handler)

HANDLERS: dict[str, Handler] = {}

_DTYPES = {
    torch.float64: "f32",  # no model needs more, and no kernel has it
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_RANK = ("bool", "u8", "i8", "i16", "i32", "i64", "bf16", "f16", "f32")
# Higher-order ops that only wrap a graph: name -> where the graph stands among the arguments.
_WRAPPERS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}


def handles(*names: str) -> Callable[[_H], _H]:
    """Register a function for aten ops: `add` for all overloads, `add.Tensor` for one.

    It is called with the translation, the node, and the op's arguments with nodes replaced by what they stand for.
    """

    def register(function: _H) -> _H:
        for name in names:
            if name in HANDLERS:
                raise ValueError(f"two functions handle aten.{name}")
            HANDLERS[name] = function
        return function

    return register


class Translation:
    """The state of one translation: what each node of the traced graph stands for."""

    def __init__(self, sizes: Mapping[str, Dim]) -> None:
        self.sizes = sizes
        self.meanings: dict[torch.fx.Node, Meaning] = {}

    # What the trace says about a node.

    def size(self, value: int | torch.SymInt) -> int | Dim:
        """Our size for one of the trace's."""
        if isinstance(value, int):
            return value
        try:
            return self._polynomial(value.node.expr)
        except DimError as error:
            raise FrontendError(f"the model computes the size {value.node.expr}: {error}") from error

    def _polynomial(self, expression: Any) -> int | Dim:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            return self.sizes[str(expression)]
        parts = [self._polynomial(part) for part in expression.args]
        kind = type(expression).__name__
        if kind == "Add":
            total: int | Dim = 0
            for part in parts:
                total = total + part
            return total
        if kind == "Mul":
            product: int | Dim = 1
            for part in parts:
                product = product * part
            return product
        if kind == "Pow" and isinstance(parts[1], int) and parts[1] >= 0:
            power: int | Dim = 1
            for _ in range(parts[1]):
                power = power * parts[0]
            return power
        if kind in ("Max", "Min"):
            best = parts[0]
            for part in parts[1:]:
                if known_at_most(best, part) == (kind == "Max"):
                    best = part
            return best
        if kind in ("FloorDiv", "CleanDiv", "PythonMod", "Mod") and isinstance(parts[1], int):
            quotient = parts[0] // parts[1]
            return quotient if "Div" in kind else parts[0] - quotient * parts[1]
        raise FrontendError(f"the model computes the size {expression}, which is not supported")

    def shape(self, node: torch.fx.Node) -> Shape:
        """The shape of a node's tensor."""
        return tuple(self.size(dim) for dim in node.meta["val"].shape)

    def dtype(self, node: torch.fx.Node) -> str:
        """Our dtype of a node's tensor."""
        return dtype_name(node.meta["val"].dtype)

    # Making values.

    def tensor(self, value: Meaning, dtype: str) -> Value:
        """A tensor of `dtype` from a tensor, a number or a size."""
        if isinstance(value, Value):
            return cast(value, dtype)
        if isinstance(value, Dim):
            # The last of 0..value, as a scalar.
            return cast(Reshape(Slice(Iota(value + 1), 0, value, value + 1), ()), dtype)
        return constant(value, dtype)

    def pair(self, a: Meaning, b: Meaning) -> tuple[Value, Value]:
        """Two operands in the dtype that torch computes them in (f32 for any float)."""
        dtype = promoted(a, b)
        return self.tensor(a, dtype), self.tensor(b, dtype)

    def filled(self, node: torch.fx.Node, value: Meaning) -> Value:
        """A tensor of the node's type, every element `value`."""
        return broadcast(self.tensor(value, self.dtype(node)), self.shape(node))

    # Walking the graph.

    def run(self, module: torch.fx.GraphModule, given: Mapping[torch.fx.Node, Meaning]) -> Meaning:
        """Translate what the graph's output needs; returns the output's meaning."""
        self.meanings.update(given)
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        needed = _needed(output, self.meanings)
        _require_supported(needed)
        for node in module.graph.nodes:
            if node in needed and node not in self.meanings and node is not output:
                self.meanings[node] = self._node(module, node)
        return self._arguments(output.args)[0]

    def _arguments(self, arguments: Any) -> Any:
        return torch.fx.node.map_arg(arguments, lambda node: self.meanings[node])

    def _node(self, module: torch.fx.GraphModule, node: torch.fx.Node) -> Meaning:
        from llmc.frontends.hf.aten_complex import Complex, on_complex

        found = node.meta.get("val")
        if isinstance(found, torch.SymInt):
            return self.size(found)
        if node.op == "get_attr":
            attribute = getattr(module, str(node.target))
            return from_torch(attribute, str(node.target)) if isinstance(attribute, torch.Tensor) else attribute
        name = _name(node)
        if name in _WRAPPERS:
            index = _WRAPPERS[name]
            inner = self._arguments(node.args[index])
            given = self._arguments(node.args[index + 1 :])
            holes = [hole for hole in inner.graph.nodes if hole.op == "placeholder"]
            return self.run(inner, dict(zip(holes, given, strict=True)))
        handler = HANDLERS.get(name) or HANDLERS[name.partition(".")[0]]
        try:
            arguments, options = self._arguments(node.args), self._arguments(node.kwargs)
            if any(isinstance(argument, Complex) for argument in arguments):
                return on_complex(name.partition(".")[0], self, node, arguments)
            value = handler(self, node, *arguments, **options)
            self._check(node, value)
        except IRError as error:
            raise FrontendError(f"{node.name} (aten.{name}) cannot be translated: {error}") from error
        except TypeError as error:
            raise FrontendError(f"{node.name} (aten.{name}) has arguments that are not supported: {error}") from error
        return value

    def _check(self, node: torch.fx.Node, value: Meaning) -> None:
        expected = node.meta.get("val")
        if isinstance(value, Value) and isinstance(expected, torch.Tensor):
            shape, dtype = self.shape(node), self.dtype(node)
            if value.shape != shape or value.dtype != dtype:
                raise IRError(f"got {value.type}, the trace has {list(shape)} {dtype}")


def _name(node: torch.fx.Node) -> str:
    """`add.Tensor` for aten ops, `namespace::name.overload` for others, the plain name for functions."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        packet, _, overload = str(target).partition(".")[2].partition(".")
        return f"{packet}.{overload}" if target.namespace == "aten" else f"{target.namespace}::{packet}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())  # type: ignore[no-untyped-call]
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}".removeprefix("_operator.")


def _needed(output: torch.fx.Node, known: Mapping[torch.fx.Node, Meaning]) -> set[torch.fx.Node]:
    needed: set[torch.fx.Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        # A size is read off the trace, whatever computed it.
        if node not in known and not isinstance(node.meta.get("val"), torch.SymInt):
            stack.extend(node.all_input_nodes)
    return needed


def _require_supported(nodes: set[torch.fx.Node]) -> None:
    """One FrontendError that lists every op without a handler."""
    missing: Counter[str] = Counter()
    example: dict[str, str] = {}
    for node in sorted(nodes, key=lambda node: node.name):
        if node.op != "call_function" or isinstance(node.meta.get("val"), torch.SymInt):
            continue
        name = _name(node)
        if name in _WRAPPERS or name in HANDLERS or name.partition(".")[0] in HANDLERS:
            continue
        missing[name] += 1
        example.setdefault(name, node.name)
    if missing:
        listed = ", ".join(f"{name} ({count}x, first at {example[name]})" for name, count in missing.most_common())
        raise FrontendError(f"the model uses operations that are not supported yet: {listed}")


@handles("getitem")
def _getitem(_: Translation, node: torch.fx.Node, values: tuple[Meaning, ...], index: int) -> Meaning:
    return operator.getitem(values, index)


# Helpers that the handlers share.


def dtype_name(dtype: torch.dtype) -> str:
    """Our name of a torch dtype, every float as f32."""
    if dtype not in _DTYPES:
        raise FrontendError(f"dtype {dtype} is not supported")
    return _DTYPES[dtype]


def promoted(*values: Meaning) -> str:
    """The dtype that torch computes in: tensors decide, numbers only when they are of a higher kind."""
    tensors = [value.dtype for value in values if isinstance(value, Value)]
    numbers = [value for value in values if not isinstance(value, Value)]
    dtype = max(tensors, key=_RANK.index, default="bool")
    if {"bf16", "f16"} <= set(tensors):
        return "f32"
    if any(isinstance(number, float) for number in numbers) and dtype not in FLOATS:
        return "f32"
    if dtype == "bool" and any(not isinstance(number, bool) for number in numbers):
        return "i64"
    return dtype


def cast(value: Value, dtype: str) -> Value:
    """The value in another dtype; a widened integer is cast from its source."""
    if value.dtype == dtype:
        return value
    if isinstance(value, Cast) and value.dtype == "i64" and value.x.dtype == "i32":
        return cast(value.x, dtype)
    return Cast(value, dtype)


def reshape(value: Value, shape: Shape) -> Value:
    """The value in another shape; itself when it has that shape."""
    return value if value.shape == shape else Reshape(value, shape)


def broadcast(value: Value, shape: Shape) -> Value:
    """The value repeated up to a shape; itself when it has that shape."""
    return value if value.shape == shape else Broadcast(value, shape)


def axis(value: Value, index: int) -> int:
    """A non-negative axis."""
    return index + value.rank if index < 0 else index


def from_torch(tensor: torch.Tensor, name: str) -> Value:
    """A constant with a real tensor's values."""
    if tensor.device.type == "meta":
        raise FrontendError(f"the model keeps tensor {name} outside its buffers, so its values are unknown")
    array = tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.detach().numpy()
    return constant(array, dtype_name(tensor.dtype))
