"""aten ops on complex numbers, which rotary embeddings are sometimes written with: pairs of real tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Value
from llmc.errors import FrontendError
from llmc.frontends.hf.aten import HANDLERS, Meaning, Translation, handles, reshape

Node = torch.fx.Node
# Ops that do the same to the real and the imaginary part.
_BY_PART = (
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "expand", "permute", "transpose", "slice",
    "select", "contiguous", "clone", "detach", "alias",
)  # fmt: skip


@dataclass(frozen=True)
class Complex:
    """real + i * imaginary, two tensors of one shape."""

    real: Value
    imaginary: Value


def on_complex(name: str, t: Translation, node: Node, arguments: tuple[Meaning, ...]) -> Meaning:
    """An op that has a complex operand; `name` without its overload."""
    if name == "mul":
        a, b = (x if isinstance(x, Complex) else t.tensor(x, "f32") for x in arguments)
        return _multiply(a, b)
    if name in ("view_as_real", "real", "imag"):
        return HANDLERS[name](t, node, *arguments)
    if name in ("to", "_to_copy"):
        return arguments[0]
    if name not in _BY_PART:
        raise FrontendError(f"{node.name}: aten.{name} of complex numbers is not supported")
    x, *others = arguments
    return Complex(HANDLERS[name](t, node, x.real, *others), HANDLERS[name](t, node, x.imaginary, *others))


def _multiply(a: Meaning, b: Meaning) -> Complex:
    if not isinstance(a, Complex):
        a, b = b, a
    if not isinstance(b, Complex):
        return Complex(e.Mul(a.real, b), e.Mul(a.imaginary, b))
    real = e.Sub(e.Mul(a.real, b.real), e.Mul(a.imaginary, b.imaginary))
    return Complex(real, e.Add(e.Mul(a.real, b.imaginary), e.Mul(a.imaginary, b.real)))


@handles("polar")
def _polar(t: Translation, node: Node, length: Value, angle: Value) -> Complex:
    return Complex(e.Mul(length, e.Cos(angle)), e.Mul(length, e.Sin(angle)))


@handles("complex")
def _complex(t: Translation, node: Node, real: Value, imaginary: Value) -> Complex:
    return Complex(real, imaginary)


@handles("view_as_complex")
def _view_as_complex(t: Translation, node: Node, x: Value) -> Complex:
    last, shape = x.rank - 1, x.shape[:-1]
    return Complex(reshape(s.Slice(x, last, 0, 1), shape), reshape(s.Slice(x, last, 1, 2), shape))


@handles("view_as_real")
def _view_as_real(t: Translation, node: Node, x: Complex) -> Value:
    parts = tuple(reshape(part, (*part.shape, 1)) for part in (x.real, x.imaginary))
    return s.Concat(parts, x.real.rank)


@handles("real")
def _real(t: Translation, node: Node, x: Complex) -> Value:
    return x.real


@handles("imag")
def _imag(t: Translation, node: Node, x: Complex) -> Value:
    return x.imaginary
