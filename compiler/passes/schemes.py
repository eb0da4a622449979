"""What a user may ask for a weight: schemes, overrides by name, and which weights an op reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from llmc.compiler.encodings import GroupQuantized
from llmc.compiler.encodings.grouped import fits, grouped
from llmc.compiler.encodings.levels import TABLE_BITS
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.llm import Embed, GatedLinear, Linear
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Tensor, parse_encoding
from llmc.errors import CompileError, IRError

FLOAT_SCHEMES = {"none": "f32", "bf16": "bf16", "f16": "f16"}
INTEGER_SCHEMES = {f"int{bits}": bits for bits in (2, 3, 4, 5, 6, 8)}
_ENCODING = re.compile(r"[qt]\d+g\d+[ar]?\Z")
_CHANNEL_GROUP = 64  # of activations, in front of weights that have one scale a row


@dataclass(frozen=True)
class Scheme:
    """How one weight is kept: as floats of `dtype`, or in an `encoding` by name."""

    dtype: str = ""
    encoding: str = ""

    def __str__(self) -> str:
        return self.encoding or self.dtype


def scheme_of(text: str, group_size: int, symmetric: bool) -> Scheme:
    """The scheme that `none`, `bf16`, `f16`, `int8`, ... `int2` or an encoding's name stands for.

    CompileError for another text.

    group_size 0: one scale a row. Below 8 bits integers have tables of levels, and those of up to 4 bits that are not
    symmetric even steps above a minimum. The others are symmetric whatever `symmetric` says: their error is far below
    that of int8 activations.
    """
    if text in FLOAT_SCHEMES:
        return Scheme(dtype=FLOAT_SCHEMES[text])
    try:
        if text in INTEGER_SCHEMES:
            bits = INTEGER_SCHEMES[text]
            symmetric, per_row = symmetric or bits > 4, group_size == 0
            group_size = group_size or _CHANNEL_GROUP
            if not fits(bits, group_size):
                raise CompileError(f"scheme {text!r}: no layout of {bits} bits in groups of {group_size}, but of 32")
            table = symmetric and bits in TABLE_BITS
            return Scheme(encoding=GroupQuantized(bits, group_size, symmetric, table, per_row=per_row).name)
        if _ENCODING.match(text):
            return Scheme(encoding=parse_encoding(text).name)
    except IRError as error:
        raise CompileError(f"scheme {text!r}: {error}") from None
    known = ", ".join((*FLOAT_SCHEMES, *INTEGER_SCHEMES))
    raise CompileError(f"unknown scheme {text!r}; known: {known}, or an encoding such as t4g32")


@dataclass(frozen=True)
class Overrides:
    """`pattern=scheme;pattern=scheme`: shell patterns over params' names; the first that matches wins."""

    items: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Overrides:
        """From the option's text; CompileError for an item without `=`."""
        items = []
        for item in filter(None, (part.strip() for part in text.split(";"))):
            pattern, equals, scheme = item.rpartition("=")
            if not equals or not pattern:
                raise CompileError(f"override {item!r} is not PATTERN=SCHEME, such as *.down_proj.*=int8")
            items.append((pattern.strip(), scheme.strip()))
        return cls(tuple(items))

    def of(self, names: Iterable[str]) -> str:
        """The scheme for a weight made of these params; empty for none."""
        names = tuple(names)
        for pattern, scheme in self.items:
            if any(fnmatchcase(name, pattern) for name in names):
                return scheme
        return ""

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns that match none of these names."""
        names = tuple(names)
        return [pattern for pattern, _ in self.items if not any(fnmatchcase(name, pattern) for name in names)]


def bits_of(text: str) -> int:
    """Bits of an integer scheme, or of an encoding by name; 0 for floats."""
    encoding = scheme_of(text, 64, symmetric=True).encoding
    return grouped(parse_encoding(encoding)).bits if encoding else 0


def finer_than(scheme: str, least: Mapping[str, str]) -> dict[str, str]:
    """Those of the schemes by name that have more bits than this one; none where it is one of floats."""
    bits = bits_of(scheme)
    return {name: text for name, text in least.items() if bits and bits_of(text) > bits}


def param_names(value: Value) -> tuple[str, ...]:
    """Names of the params that a compile-time value is made of, in first-use order."""
    return tuple(found.name for found in topological([value]) if isinstance(found, Param))


def find_head(graph: Graph) -> Linear | None:
    """The linear op that output `logits` comes from, seen through every op that carries what one operand computes:
    casts, softcaps, scales, choices of rows; or None."""
    found = behind_logits(graph)
    return found if isinstance(found, Linear) else None


def behind_logits(graph: Graph) -> Value | None:
    """The head, or the value behind the logits where it cannot be found any further; None without such an output."""
    value = dict(graph.outputs).get("logits")
    while isinstance(value, Op) and not isinstance(value, Linear):
        inner = [operand for operand in value.operands if operand not in graph.constants and _is_float(operand)]
        if not value.carries or len(inner) != 1:
            break
        value = inner[0]
    return value


def looks_up_tokens(op: Embed, graph: Graph) -> bool:
    """Whether the ids are the model's input `ids`, not positions or the choices of a router.

    In a graph without an input of that name, any integers that no floats decide will do.
    """
    named = any(value.name == "ids" for value in graph.inputs)
    pending: list[Value] = [op.ids]
    while pending:
        value = pending.pop()
        if isinstance(value, Input) and (value.name == "ids" or not named):
            return True
        if isinstance(value, Op) and not _is_float(value):
            pending.extend(operand for operand in value.operands if not _is_float(operand))
    return False


def _is_float(value: Value) -> bool:
    return isinstance(value.type, Tensor) and value.dtype in ("f64", "f32", "f16", "bf16")


def weight_ops(graph: Graph) -> list[Linear | GatedLinear]:
    """Linear ops, gated or not, in order."""
    return [op for op in graph.ops if isinstance(op, (Linear, GatedLinear))]


def describe(op: Op, weight: Value) -> str:
    """An op and the params that its weight is made of, for reports."""
    names = param_names(weight)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{op.name} {shown} : {op.type}" if names else f"{op.name} : {op.type}"
