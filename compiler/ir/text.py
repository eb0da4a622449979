"""The canonical text of a graph and its parser: `parse(print_graph(g))` prints the same, and its hash is a cache key.

graph @main {T in [1, 512]} (%ids: tensor<[T], i32>) {
  @embed.weight: tensor<[256, 64], f32>
  %0 = llm.embed(@embed.weight, %ids) {dtype_name = "f32"} : tensor<[T, 64], f32>
  return hidden = %0
}
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import typing
from collections.abc import Callable
from dataclasses import fields

import numpy as np

from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import REGISTRY, Dense, Input, Op, Param, Value
from llmc.compiler.ir.types import KV, Tensor, Type, parse_encoding
from llmc.errors import IRError

_T = typing.TypeVar("_T")
_PLAIN_NAME = re.compile(r"[A-Za-z_][\w.\-/]*\Z")


def text_hash(graph: Graph) -> str:
    """A hash of the canonical text."""
    return hashlib.sha256(print_graph(graph).encode()).hexdigest()


def print_graph(graph: Graph) -> str:
    """The canonical text."""
    names: dict[Value, str] = {}
    for value in graph.inputs:
        names[value] = f"%{_name(value.name)}"
    for param in graph.params:
        names[param] = f"@{_name(param.name)}"
    for index, op in enumerate(graph.ops):
        names[op] = f"%{index}"
    symbols = ", ".join(f"{s.name} in [{s.low}, {'inf' if s.high is None else s.high}]" for s in graph.symbols)
    inputs = ", ".join(f"{names[value]}: {value.type}" for value in graph.inputs)
    lines = [f"graph @{_name(graph.name)} {{{symbols}}} ({inputs}) {{"]
    lines += [f"  {names[param]}: {param.type}" for param in graph.params]
    lines += [f"  {names[op]} = {print_op(op, names)}" for op in graph.ops]
    lines.append(f"  return {', '.join(f'{_name(name)} = {names[value]}' for name, value in graph.outputs)}")
    return "\n".join([*lines, "}", ""])


def print_op(op: Op, names: dict[Value, str]) -> str:
    """`name(operands) {attributes} : type`, with default attributes left out."""
    operands = []
    for _, operand in op.named_operands():
        if isinstance(operand, tuple):
            operands.append(f"[{', '.join(names[item] for item in operand)}]")
        else:
            operands.append("none" if operand is None else names[operand])
    defaults = {field.name: field.default for field in fields(op)}  # type: ignore[arg-type]
    attributes = {k: v for k, v in op.attributes().items() if v != defaults.get(k) or type(v) is not type(defaults[k])}
    text = ", ".join(f"{key} = {_attribute(value)}" for key, value in attributes.items())
    return f"{op.name}({', '.join(operands)}){f' {{{text}}}' if text else ''} : {op.type}"


def _name(name: str) -> str:
    return name if _PLAIN_NAME.match(name) else json.dumps(name)


def _attribute(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, Dim)):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_attribute(item) for item in value)}]"
    if isinstance(value, Dense):
        array = value.array
        if array.size <= 16:
            flat = ", ".join(_attribute(item) for item in array.reshape(-1).tolist())
            return f"dense<{array.dtype}, {list(array.shape)}, [{flat}]>"
        return f'dense<{array.dtype}, {list(array.shape)}, "{base64.b64encode(array.tobytes()).decode()}">'
    raise IRError(f"an attribute of type {type(value).__name__} cannot be printed")


_TOKEN = re.compile(
    r'\s*(?:(?P<comment>#[^\n]*)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>-?(?:\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|inf|nan|\d+)(?![\w]))'
    r"|(?P<word>[A-Za-z_][\w.\-/]*)|(?P<mark>//|[%@{}()\[\]<>:=,+*\-]))"
)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        end = len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(position, f"unexpected {text[position : position + 10]!r}")
            kind = match.lastgroup or ""
            if kind != "comment":
                self.tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self.at = 0
        self.symbols: dict[str, Dim] = {}
        self.values: dict[str, Value] = {}

    def _error(self, position: int, message: str) -> IRError:
        line = self.text.count("\n", 0, position) + 1
        return IRError(f"line {line}: {message}")

    def error(self, message: str) -> IRError:
        position = self.tokens[self.at][2] if self.at < len(self.tokens) else len(self.text)
        return self._error(position, message)

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else "end"

    def next(self) -> str:
        token = self.peek()
        if not token:
            raise self.error("unexpected end of text")
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() == token and self.kind() != "string":
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            found = f"found {self.peek()!r}" if self.peek() else "and the text ends"
            raise self.error(f"expected {token!r}, {found}")

    def items(self, end: str, read: Callable[[], _T]) -> list[_T]:
        """What stands before `end`, with commas between."""
        found: list[_T] = []
        while not self.accept(end):
            if found:
                self.expect(",")
            found.append(read())
        return found

    def name(self) -> str:
        kind, token = self.kind(), self.next()
        if kind == "string":
            return str(json.loads(token))
        if kind not in ("word", "number"):
            raise self.error(f"expected a name, found {token!r}")
        return token

    def graph(self) -> Graph:
        self.expect("graph")
        self.expect("@")
        name = self.name()
        self.expect("{")
        self.symbols.update(self.items("}", self.symbol))
        self.expect("(")
        inputs = self.items(")", self.input)
        self.expect("{")
        while self.accept("@"):
            param_name = self.name()
            self.expect(":")
            self.values[f"@{param_name}"] = Param(param_name, self.type())
        while self.accept("%"):
            result = self.name()
            self.expect("=")
            self.values[f"%{result}"] = self.op()
        self.expect("return")
        return Graph(name, tuple(inputs), tuple(self.items("}", self.output)))

    def symbol(self) -> tuple[str, Dim]:
        name = self.next()
        self.expect("in")
        self.expect("[")
        low = int(self.next())
        self.expect(",")
        high = self.next()
        self.expect("]")
        return name, symbol(name, low, None if high == "inf" else int(high))

    def input(self) -> Input:
        self.expect("%")
        name = self.name()
        self.expect(":")
        made = Input(name, self.type())
        self.values[f"%{name}"] = made
        return made

    def output(self) -> tuple[str, Value]:
        name = self.name()
        self.expect("=")
        return name, self.value()

    def value(self) -> Value:
        mark = self.next()
        if mark not in "%@":
            raise self.error(f"expected a value, found {mark!r}")
        key = mark + self.name()
        if key not in self.values:
            raise self.error(f"{key} is not defined before its use")
        return self.values[key]

    def op(self) -> Op:
        position = self.tokens[self.at][2] if self.at < len(self.tokens) else len(self.text)
        op_name = self.next()
        cls = REGISTRY.get(op_name)
        if cls is None:
            raise self.error(f"unknown op {op_name!r}")
        self.expect("(")
        arguments: dict[str, object] = {}
        for field in cls._operand_fields:
            if arguments:
                self.expect(",")
            arguments[field] = self.operand()
        self.expect(")")
        if self.accept("{"):
            arguments.update(self.items("}", self.named_attribute))
        try:
            op = cls(**arguments)
        except TypeError as error:
            raise self._error(position, f"{op_name}: {error}") from None
        except IRError as error:
            raise self._error(position, str(error)) from None
        self.expect(":")
        stated = self.type()
        if stated != op.type:
            raise self._error(position, f"{op_name} gives {op.type}, the text says {stated}")
        return op

    def operand(self) -> Value | tuple[Value, ...] | None:
        if self.accept("["):
            return tuple(self.items("]", self.value))
        return None if self.accept("none") else self.value()

    def named_attribute(self) -> tuple[str, object]:
        key = self.next()
        self.expect("=")
        return key, self.attribute()

    def attribute(self) -> object:
        kind, token = self.kind(), self.peek()
        if kind == "string":
            return json.loads(self.next())
        if token == "[":
            return self.list_of_attributes()
        if token in ("true", "false", "none"):
            return {"true": True, "false": False, "none": None}[self.next()]
        if token == "dense":
            return self.dense()
        if kind == "number" and re.search(r"[.einf]", token):
            return float(self.next())
        return self.dim()

    def list_of_attributes(self) -> tuple[object, ...]:
        self.expect("[")
        return tuple(self.items("]", self.attribute))

    def dense(self) -> Dense:
        self.expect("dense")
        self.expect("<")
        dtype = np.dtype(self.next())
        self.expect(",")
        shape = typing.cast("tuple[int, ...]", self.list_of_attributes())
        self.expect(",")
        if self.kind() == "string":
            array = np.frombuffer(base64.b64decode(json.loads(self.next())), dtype)
        else:
            array = np.array(self.list_of_attributes(), dtype)
        self.expect(">")
        return Dense(array.reshape(shape))

    def dim(self) -> int | Dim:
        total = self.term()
        while self.peek() in ("+", "-") or (self.kind() == "number" and self.peek().startswith("-")):
            if self.accept("+"):
                total = total + self.term()
            elif self.accept("-"):
                total = total - self.term()
            else:
                total = total + self.term()
        return total

    def term(self) -> int | Dim:
        total = self.factor()
        while self.peek() in ("*", "//"):
            if self.next() == "*":
                total = total * self.factor()
                continue
            divisor = self.factor()
            if not isinstance(divisor, int) or divisor < 1:
                raise self.error(f"a size can be divided by a positive number only, not by {divisor}")
            total = total // divisor
        return total

    def factor(self) -> int | Dim:
        if self.accept("("):
            inner = self.dim()
            self.expect(")")
            return inner
        kind, token = self.kind(), self.next()
        if kind == "number":
            return int(token)
        if token in self.symbols:
            return self.symbols[token]
        raise self.error(f"expected a size, found {token!r}")

    def type(self) -> Type:
        kind = self.next()
        self.expect("<")
        result: Type
        if kind == "tensor":
            self.expect("[")
            shape = self.items("]", self.dim)
            self.expect(",")
            dtype = self.next()
            encoding = parse_encoding(self.next()) if self.accept(",") else None
            result = Tensor(tuple(shape), dtype, encoding)
        elif kind == "kv":
            sizes = []
            for _ in range(3):
                sizes.append(int(self.next()))
                self.expect(",")
            result = KV(sizes[0], sizes[1], sizes[2], self.next())
        else:
            raise self.error(f"expected a type, found {kind!r}")
        self.expect(">")
        return result


def parse(text: str) -> Graph:
    """The graph that this text prints; IRError names the line of a mistake."""
    import llmc.compiler.ir  # noqa: F401  (registers the ops)

    parser = _Parser(text)
    graph = parser.graph()
    if parser.at != len(parser.tokens):
        raise parser.error(f"unexpected {parser.peek()!r} after the graph")
    return graph
